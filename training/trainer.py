"""
Training of single parts of a HealthGPT on transformers' `Trainer`.

    recipe: part -> learning rate --> those parts train in float32, all others are frozen
    checkpoints: trained parts only, with optimiser, schedule and random states, so that a killed run goes on as if it had not been

Mixed precision, accumulation, gradient checkpointing, several processes and logs are the Trainer's own.
"""

import json
import os
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from ..errors_healthgpt import HealthGPTError
from ..hub_export.confine import reading
from .recipes import Recipe
from .tasks import parts_of

TRAINED_NAME = "trained.safetensors"
WARMUP = 0.03  # of all steps; the paper has a warm-up and does not say how long


def training_arguments(
    recipe: Recipe, model, output: str | Path, per_device_batch_size: int = 1, **options
) -> TrainingArguments:
    """
    Arguments for [`HealthGPTTrainer`] as a recipe says.

    Args:
        recipe (`Recipe`): The stage.
        model (`HealthGPTForConditionalGeneration`): Its dtype decides the mixed precision.
        output (`str` or `Path`): Folder of checkpoints and logs.
        per_device_batch_size (`int`, defaults to 1): Samples that a process takes at once. Gradients are accumulated until
            the recipe's batch is full.
        options: Options of `TrainingArguments`, also in place of those that the recipe says.

    Raises:
        HealthGPTError: if the recipe's batch is no multiple of what the processes take at once, or a CPU is to train float16.
    """
    if (model.device.type, model.lm_head.weight.dtype) == ("cpu", torch.float16):
        raise HealthGPTError("float16 is trained on a GPU only: on the CPU choose bfloat16 or float32.")
    at_once = per_device_batch_size * int(os.environ.get("WORLD_SIZE", 1))
    if recipe.batch_size % at_once:
        raise HealthGPTError(
            f"A batch of {recipe.batch_size} samples cannot be made of {at_once} at once: choose a divisor of it."
        )
    defaults = {
        "per_device_train_batch_size": per_device_batch_size,
        "per_device_eval_batch_size": per_device_batch_size,
        "gradient_accumulation_steps": recipe.batch_size // at_once,
        "learning_rate": max(recipe.learning_rates.values()),
        "weight_decay": 0.0,
        "lr_scheduler_type": recipe.schedule,
        "warmup_steps": 0.0 if recipe.schedule == "constant" else WARMUP,
        "bf16": model.lm_head.weight.dtype == torch.bfloat16,
        "fp16": model.lm_head.weight.dtype == torch.float16,
        "ddp_find_unused_parameters": True,  # a batch without pictures leaves the projector out
        "remove_unused_columns": False,
        "label_names": ["labels"],
    }
    return TrainingArguments(str(output), **defaults | options)


class HealthGPTTrainer(Trainer):
    """
    `Trainer` of the parts that a recipe names.

    Args:
        model (`HealthGPTForConditionalGeneration`): Its other parts are frozen, and the trained ones brought to float32.
        recipe (`Recipe`): Parts with their learning rates, and dropout.
        tasks (`list[str]`): Tasks whose parts are trained.
        kwargs: As in `Trainer`; [`TrainingCollator`] as `data_collator`.
    """

    def __init__(self, model, recipe: Recipe, tasks: list[str], **kwargs):
        model.requires_grad_(False)
        self.recipe = recipe
        self.parts = {part: parts_of(model, part, tasks) for part in recipe.learning_rates}
        for parameters in self.parts.values():
            for parameter in parameters:
                parameter.data = parameter.data.float()
                parameter.requires_grad_()
        for task in tasks:
            model.config.tasks[task].dropout = recipe.dropout
        for name, module in model.named_modules():
            if name.endswith(tuple(f".plugins.{task}" for task in tasks)):
                module.dropout.p = recipe.dropout
        # The Trainer asks quantised models for adapters of the peft library; H-LoRA are the model's own.
        model._hf_peft_config_loaded = True
        super().__init__(model, **kwargs)
        model._hf_peft_config_loaded = False

    def create_optimizer(self, model=None):
        kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        options.pop("lr")
        groups = [
            {"params": parameters, "lr": self.recipe.learning_rates[part]} for part, parameters in self.parts.items()
        ]
        self.optimizer = kind(groups, lr=self.args.learning_rate, weight_decay=self.args.weight_decay, **options)
        return self.optimizer

    def trained_state(self) -> dict[str, nn.Parameter]:
        return {name: value for name, value in self.model.named_parameters() if value.requires_grad}

    def _save(self, output_dir=None, state_dict=None):
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: value.data for name, value in self.trained_state().items()}, folder / TRAINED_NAME)
        torch.save(self.args, folder / "training_args.bin")

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        path, trained = Path(resume_from_checkpoint) / TRAINED_NAME, self.trained_state()
        with reading(path):
            saved = load_file(path)
        before, now = ({name: value.shape for name, value in state.items()} for state in (saved, trained))
        if before != now:
            raise HealthGPTError(f"{resume_from_checkpoint} is of a training of other parts, or of other sizes.")
        for name, value in trained.items():
            value.data.copy_(saved[name])

    def _load_optimizer_and_scheduler(self, checkpoint):
        with reading(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint):
        with reading(checkpoint):
            super()._load_rng_state(checkpoint)


def last_checkpoint(output: Path) -> str | None:
    """The newest checkpoint of a run that was finished by all of its processes: a kill may have left one after it that was not."""
    found = [path for path in output.glob("checkpoint-*") if is_finished(path)]
    return str(max(found, key=lambda path: int(path.name.split("-")[1]))) if found else None


def is_finished(checkpoint: Path) -> bool:
    processes = int(os.environ.get("WORLD_SIZE", 1))
    states = ["rng_state.pth"] if processes == 1 else [f"rng_state_{index}.pth" for index in range(processes)]
    if not all((checkpoint / name).is_file() for name in (TRAINER_STATE_NAME, *states)):
        return False
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_bytes())
    except ValueError:  # cut off
        return False
    return True
