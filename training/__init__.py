"""Training of HealthGPT: the three stages, on transformers' Trainer."""

from .data import TrainingCollator, add_codes, typical_codes
from .recipes import RECIPES, STAGES, Recipe, recipe_of
from .tasks import add_task, save_plugin, start_fusion
from .trainer import HealthGPTTrainer, last_checkpoint, training_arguments

__all__ = [
    "RECIPES",
    "STAGES",
    "HealthGPTTrainer",
    "Recipe",
    "TrainingCollator",
    "add_codes",
    "add_task",
    "last_checkpoint",
    "recipe_of",
    "save_plugin",
    "start_fusion",
    "training_arguments",
    "typical_codes",
]
