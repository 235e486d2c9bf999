"""
HealthGPT for the transformers library: answers questions about medical images and draws medical images.

Importing this package registers its classes with transformers' Auto classes: `from_pretrained` then loads checkpoints with
this package's code, whatever copy of it they carry, and needs no `trust_remote_code`.
"""

from importlib import import_module

import wrapt

from .imports import on_demand

__version__ = "0.1.0"

_MODULES = {
    "HealthGPTConfig": "configuration_healthgpt",
    "HealthGPTError": "errors_healthgpt",
    "HealthGPTForConditionalGeneration": "modeling_healthgpt",
    "HealthGPTModel": "modeling_healthgpt",
    "HealthGPTProcessor": "processing_healthgpt",
    "HealthGPTVQGANConfig": "configuration_healthgpt",
    "TaskConfig": "configuration_healthgpt",
}
__all__ = list(_MODULES)
__getattr__ = on_demand(__name__, _MODULES)


def _register_config(module):
    from transformers import AutoConfig

    AutoConfig.register(module.HealthGPTConfig.model_type, module.HealthGPTConfig)
    module.HealthGPTConfig.register_for_auto_class()  # what is saved takes the code along


def _register_model(module):
    from transformers import AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM

    model = module.HealthGPTForConditionalGeneration
    for auto_class in (AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM):
        auto_class.register(model.config_class, model)
    model.register_for_auto_class("AutoModelForImageTextToText")


def _register_processor(module):
    from transformers import AutoProcessor

    from .configuration_healthgpt import HealthGPTConfig

    AutoProcessor.register(HealthGPTConfig, module.HealthGPTProcessor)
    module.HealthGPTProcessor.register_for_auto_class()


def _register_when_imported():
    """For the same reason the classes are registered only once they, or the Auto classes, are imported."""
    for part, register in (
        ("configuration", _register_config),
        ("modeling", _register_model),
        ("processing", _register_processor),
    ):
        name = f"{__name__}.{part}_healthgpt"
        wrapt.register_post_import_hook(register, name)
        wrapt.register_post_import_hook(
            lambda _, name=name: import_module(name), f"transformers.models.auto.{part}_auto"
        )


if __name__ == "healthgpt":  # pytest imports this file under the name of its folder too
    _register_when_imported()
