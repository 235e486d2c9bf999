"""The parts of a loaded model that belong to a task: put in, found by name, saved alone."""

from dataclasses import asdict
from pathlib import Path

import torch

from ..hub_export.plugins import write_plugin
from ..hub_export.write import task_of


def add_task(model, processor, name: str, settings: dict, init_from: str | None = None) -> None:
    """
    Gives a loaded model and its processor a further task.

    Args:
        model (`HealthGPTForConditionalGeneration`): Changed in place.
        processor (`HealthGPTProcessor`): Changed in place.
        name, settings, init_from: As in `HealthGPTForConditionalGeneration.add_task`.
    """
    model.add_task(name, settings, init_from)
    task = model.config.tasks[name]
    processor.tasks[name] = {"kind": task.kind, "default_prompt": task.default_prompt}


def parts_of(model, part: str, tasks: list[str]) -> list[torch.nn.Parameter]:
    """Parameters of a part (see `Recipe`) that belong to some tasks."""
    if part == "token_tables":
        tables = dict.fromkeys(model.config.tasks[task].token_tables for task in tasks)
        prefixes = [f"{owner}.{name}." for name in tables for owner in ("model.token_embeddings", "token_heads")]
    elif part == "projector":
        prefixes = [f"model.projectors.{task}." for task in tasks]
    else:
        prefixes = [f".plugins.{task}." for task in tasks]
    return [value for name, value in model.named_parameters() if any(prefix in name for prefix in prefixes)]


def save_plugin(model, task: str, folder: Path) -> None:
    """
    Saves what a task owns, in the dtype of the model, into a folder that `healthgpt plugin add` takes.

    Args:
        model (`HealthGPTForConditionalGeneration`): The model.
        task (`str`): The task.
        folder (`Path`): Folder to write into.
    """
    dtype = model.lm_head.weight.dtype
    owned = {name: value for name, value in model.state_dict().items() if task_of(name, model.config) == task}
    tensors = {name: value.to("cpu", dtype).contiguous() for name, value in owned.items()}
    write_plugin(folder, task, asdict(model.config.tasks[task]), tensors)
