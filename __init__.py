"""HealthGPT for the transformers library: answers questions about medical pictures and draws medical pictures."""

from importlib import import_module

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


def __getattr__(name):
    """Imports torch and transformers only when a class is asked for, so that the command line answers at once."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)
