"""HealthGPT for the transformers library: answers questions about medical pictures and draws medical pictures."""

from .configuration_healthgpt import HealthGPTConfig, HealthGPTVQGANConfig, TaskConfig
from .modeling_healthgpt import HealthGPTForConditionalGeneration, HealthGPTModel
from .processing_healthgpt import HealthGPTProcessor

__version__ = "0.1.0"

__all__ = [
    "HealthGPTConfig",
    "HealthGPTForConditionalGeneration",
    "HealthGPTModel",
    "HealthGPTProcessor",
    "HealthGPTVQGANConfig",
    "TaskConfig",
]
