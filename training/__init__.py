"""Training of HealthGPT: the three stages, on transformers' Trainer."""

from ..imports import on_demand

_MODULES = {
    "HealthGPTTrainer": "trainer",
    "RECIPES": "recipes",
    "Recipe": "recipes",
    "STAGES": "recipes",
    "TrainingCollator": "data",
    "add_codes": "data",
    "add_task": "tasks",
    "last_checkpoint": "trainer",
    "recipe_of": "recipes",
    "save_plugin": "tasks",
    "start_fusion": "tasks",
    "training_arguments": "trainer",
    "typical_codes": "data",
}
__all__ = list(_MODULES)
__getattr__ = on_demand(__name__, _MODULES)
