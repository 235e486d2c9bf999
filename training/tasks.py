"""The parts of a loaded model that belong to a task: put in, found by name, saved alone."""

from dataclasses import asdict
from pathlib import Path

import torch

from ..errors_healthgpt import HealthGPTError
from ..hub_export.checkpoint import task_of
from ..hub_export.plan import is_finite
from ..hub_export.plugins import write_plugin
from ..refusals import files


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


def start_fusion(model, tasks: list[str]) -> dict[str, str | None]:
    """
    Lets tasks use the token tables with the image codes: those of the tasks that draw, or if these have none of their own,
    new ones that start as copies of the base's.

    Args:
        model (`HealthGPTForConditionalGeneration`): Changed in place.
        tasks (`list[str]`): The tasks of the samples.

    Returns:
        `dict[str, str | None]`: The tables that the tasks that answer had, to be given back to them afterwards: as published,
        fused tables belong to drawing.

    Raises:
        HealthGPTError: if no task draws, or those that do have several pairs of tables.
    """
    settings = model.config.tasks
    drawing = [name for name in tasks if settings[name].kind == "image"]
    if not drawing:
        raise HealthGPTError(
            "The fusion stage trains the token tables of tasks that draw, and there are samples of none."
        )
    own = {settings[name].token_tables for name in drawing}
    if len(own) > 1:
        raise HealthGPTError(f"The tasks {', '.join(drawing)} have different token tables: fusion trains one pair.")
    answering = {name: settings[name].token_tables for name in tasks if name not in drawing}
    model.use_token_tables(own.pop() or drawing[0], tasks)
    return answering


def save_plugin(model, task: str, folder: Path, with_tables: bool = False) -> None:
    """
    Saves what a task owns, in the dtype of the model, into a folder that `healthgpt plugin add` takes.

    Args:
        model (`HealthGPTForConditionalGeneration`): The model.
        task (`str`): The task.
        folder (`Path`): Folder to write into; made if it does not exist.
        with_tables (`bool`, defaults to `False`): Whether to save token tables too that it shares with other tasks; they
            are its own then.

    Raises:
        HealthGPTError: if its weights are no finite numbers any more, or the folder cannot be written.
    """
    dtype, settings = model.lm_head.weight.dtype, asdict(model.config.tasks[task])
    owned = {name: value for name, value in model.state_dict().items() if task_of(name, model.config.tasks) == task}
    if with_tables:
        tables = settings["token_tables"]
        owned[f"model.token_embeddings.{task}.weight"] = model.model.token_embeddings[tables].weight
        owned[f"token_heads.{task}.weight"] = model.token_heads[tables].weight
        settings["token_tables"] = task
    tensors = {name: value.detach().to("cpu", dtype).contiguous() for name, value in owned.items()}
    if not all(is_finite(tensor) for tensor in tensors.values()):
        raise HealthGPTError(f"The training of {task!r} diverged, and nothing was saved: lower the learning rate.")
    with files(folder, "written"):
        folder.mkdir(parents=True, exist_ok=True)
        write_plugin(folder, task, settings, tensors)
