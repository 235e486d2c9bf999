"""Training of HealthGPT: the three stages, on transformers' Trainer."""

from .data import TrainingCollator, add_codes, read_samples
from .recipes import RECIPES, STAGES, Recipe
from .tasks import add_task, save_plugin
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
    "read_samples",
    "save_plugin",
    "training_arguments",
]
