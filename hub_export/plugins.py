"""
Plugins of an exported checkpoint, each in a weight file of its own: listed, copied out, taken out, put in.

A plugin alone is a folder with `plugin.safetensors`, whose tensors have the names of the checkpoint, and
`plugin_config.json` with its task's name and settings. The shared weight files are never rewritten.
"""

import hashlib
import shutil
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from ..configuration_healthgpt import HealthGPTConfig, TaskConfig
from ..modeling_healthgpt import HealthGPTForConditionalGeneration
from . import rules
from .card import rewrite_card
from .families import read_json
from .plan import KINDS, checkpoint_name, is_finite, list_names, task_config, transfers_of
from .sources import CheckpointError, read_file, reading
from .write import INDEX_NAME, RECORD_NAME, plugin_file, save_tensors, task_of, write_json, writing

WEIGHTS_NAME, CONFIG_NAME = "plugin.safetensors", "plugin_config.json"
SINGLE_NAME, NUMBERED_NAME = "model.safetensors", "model-00001-of-00001.safetensors"


def list_plugins(checkpoint: Path) -> dict[str, dict[str, int]]:
    """Number and bytes of the tensors that each task of a checkpoint owns."""
    config, weight_map = read_checkpoint(checkpoint)
    found = {task: {"tensors": 0, "bytes": 0} for task in config.tasks}
    for file in set(weight_map.values()):
        for name, tensor in read_file(checkpoint / file).items():
            task = task_of(name, config)
            if task is not None:
                found[task]["tensors"] += 1
                found[task]["bytes"] += torch.Size(tensor.shape).numel() * tensor.dtype.itemsize
    return found


def extract_plugin(checkpoint: Path, task: str, output: Path, remove: bool = False, published: bool = False) -> None:
    """
    Copies a task's plugin into a folder of its own.

    Args:
        checkpoint (`Path`): An exported folder.
        task (`str`): Its task.
        output (`Path`): Folder to make.
        remove (`bool`, defaults to `False`): Whether the checkpoint then loses the task.
        published (`bool`, defaults to `False`): Whether to write the files and names that HealthGPT was published with:
            `hlora_weights.bin`, and `fusion_layer_weights.bin` if the task has token tables of its own.

    Raises:
        CheckpointError: if there is no such task, or it cannot be taken out.
        FileExistsError: if the output exists.
        FileNotFoundError: if the folder that it shall lie in does not.
    """
    config, weight_map = read_checkpoint(checkpoint)
    if task not in config.tasks:
        raise CheckpointError(f"{checkpoint} has no task {task!r}; it has {', '.join(config.tasks)}.")
    if output.exists():
        raise FileExistsError(f"{output} exists already.")
    if not output.parent.is_dir():
        raise FileNotFoundError(f"The folder {output.parent} does not exist.")
    owned = {name for name in weight_map if task_of(name, config) == task}
    copied, tables = owned, config.tasks[task].token_tables
    if published and tables is not None:  # other tasks may use them too
        copied = owned | {f"model.token_embeddings.{tables}.weight", f"token_heads.{tables}.weight"}
    files = {weight_map[name] for name in owned}
    others = {name for name, file in weight_map.items() if file in files} - owned
    if remove and others:
        raise CheckpointError(
            f"Task {task!r} shares its weight file with other parts of {checkpoint} and cannot be taken out of it; only "
            "what `healthgpt export` or `plugin add` wrote has a file for each task."
        )
    if remove and len(config.tasks) == 1:
        raise CheckpointError(f"Task {task!r} is the only one of {checkpoint} and cannot be taken out.")
    tensors = {}
    for file in {weight_map[name] for name in copied}:
        with safe_open(checkpoint / file, framework="pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys() if name in copied}
    partial = output.with_name(f".{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with writing(output, partial):
        partial.mkdir()
        if published:
            for file, content in published_files(task, tables, tensors).items():
                torch.save(content, partial / file)
        else:
            write_plugin(partial, task, asdict(config.tasks[task]), tensors)
        partial.rename(output)
    if remove:
        weight_map = {name: file for name, file in weight_map.items() if name not in owned}
        with writing(checkpoint):
            update(checkpoint, weight_map, {name: asdict(kept) for name, kept in config.tasks.items() if name != task})
            for file in files:
                (checkpoint / file).unlink()


def add_plugin(
    checkpoint: Path,
    plugin: Path,
    name: str | None = None,
    replace: bool = False,
    kind: str | None = None,
    alpha: float | None = None,
    fusion: Path | None = None,
) -> None:
    """
    Puts a plugin that lies alone into a checkpoint.

    Args:
        checkpoint (`Path`): An exported folder.
        plugin (`Path`): Folder of the plugin, as [`extract_plugin`] makes it, or a published file such as
            `gen_hlora_weights.bin`.
        name (`str`, *optional*, defaults to its own): Name of the task in this checkpoint; needed for a published file.
        replace (`bool`, defaults to `False`): Whether it may take the place of a task of that name.
        kind (`str`, *optional*): `"text"` or `"image"`; of a published file, which does not say, and of no other.
        alpha (`float`, *optional*, defaults to twice the rank): H-LoRA's alpha, of a published file too.
        fusion (`Path`, *optional*): `fusion_layer_weights.bin` with token tables of its own, for a published file too.

    Raises:
        CheckpointError: if the plugin does not fit the checkpoint, or there is a task of that name; then the checkpoint
            is as it was.
    """
    config, weight_map = read_checkpoint(checkpoint)
    if plugin.is_file():
        name, task, tensors = read_published(plugin, name, kind, alpha, fusion, config)
        sources = [plugin] if fusion is None else [plugin, fusion]
    elif (kind, alpha, fusion) != (None, None, None):
        raise CheckpointError("A kind, an alpha and a fusion layer go with a published file: a folder has its own.")
    else:
        name, task, tensors = read_plugin(plugin, name, config)
        sources = [plugin / WEIGHTS_NAME]
    if name in config.tasks and not replace:
        raise CheckpointError(
            f"{checkpoint} has a task {name!r} already: give the plugin another name (--name), or let it take its place (--replace)."
        )
    replaced = {key for key in weight_map if task_of(key, config) == name}
    if any(weight_map[key] != plugin_file(name) for key in replaced):
        raise CheckpointError(
            f"Task {name!r} shares its weight file with other parts of {checkpoint} and cannot be replaced."
        )
    with reading(plugin):
        grown = HealthGPTConfig.from_dict(
            {**config.to_dict(), "tasks": {**config.to_dict()["tasks"], name: asdict(task)}}
        )
    with torch.device("meta"):
        model = HealthGPTForConditionalGeneration(grown)
    expected = {checkpoint_name(key): value.shape for key, value in model.state_dict().items()}
    expected = {key: shape for key, shape in expected.items() if task_of(key, grown) == name}
    for problem, keys in (
        ("lacks", expected.keys() - tensors.keys()),
        ("has besides", tensors.keys() - expected.keys()),
    ):
        if keys:
            raise CheckpointError(
                f"{plugin} does not fit the {grown.text_config.num_hidden_layers} layers of {checkpoint}: it {problem} "
                f"{list_names(sorted(keys))}."
            )
    for key, tensor in tensors.items():
        if tensor.shape != expected[key]:
            raise CheckpointError(
                f"{key} in {plugin} has the shape {list(tensor.shape)}, but {checkpoint} needs {list(expected[key])}."
            )
        if not tensor.is_floating_point():
            raise CheckpointError(f"{key} in {plugin} holds {tensor.dtype} instead of floating point numbers.")
        if not is_finite(tensor):
            raise CheckpointError(f"{key} in {plugin} has values that are NaN or infinite.")
    # Token tables of the old plugin that other tasks use by now stay where they are.
    kept = {key for key, file in weight_map.items() if file == plugin_file(name)} - replaced
    if kept:
        with safe_open(checkpoint / plugin_file(name), framework="pt") as file:
            tensors |= {key: file.get_tensor(key) for key in kept}
    unfinished = checkpoint / f"{plugin_file(name)}.unfinished"
    weight_map = {key: file for key, file in weight_map.items() if key not in replaced}
    weight_map |= dict.fromkeys(tensors, plugin_file(name))
    with writing(checkpoint, unfinished):
        save_tensors(tensors, unfinished)
        unfinished.rename(checkpoint / plugin_file(name))
        tasks = {key: asdict(value) for key, value in grown.tasks.items()}
        update(checkpoint, weight_map, tasks, sources)


def read_plugin(
    folder: Path, name: str | None, config: HealthGPTConfig
) -> tuple[str, TaskConfig, dict[str, torch.Tensor]]:
    """Name, settings and tensors of a plugin that lies alone, under the new name if there is one."""
    if not (folder / CONFIG_NAME).is_file():
        raise CheckpointError(f"{folder} is no plugin: it has no {CONFIG_NAME}.")
    content = read_json(folder / CONFIG_NAME)
    with reading(folder / CONFIG_NAME):
        old, task = content["name"], TaskConfig(**content["task"])
    name = old if name is None else name
    read_file(folder / WEIGHTS_NAME)
    tensors = load_file(folder / WEIGHTS_NAME)
    names = {f".plugins.{old}.": f".plugins.{name}.", f".projectors.{old}.": f".projectors.{name}."}
    if f"token_heads.{task.token_tables}.weight" in tensors:
        tables = free_tables(name, config)
        names |= {f"{kind}.{task.token_tables}.": f"{kind}.{tables}." for kind in ("token_embeddings", "token_heads")}
        task.token_tables = tables
    for before, after in names.items():
        tensors = {key.replace(before, after): tensor for key, tensor in tensors.items()}
    return name, task, tensors


def read_published(
    file: Path, name: str | None, kind: str | None, alpha: float | None, fusion: Path | None, config: HealthGPTConfig
) -> tuple[str, TaskConfig, dict[str, torch.Tensor]]:
    """Name, settings and tensors of a published plugin; see [`add_plugin`]."""
    if name is None or kind not in KINDS.values():
        raise CheckpointError(
            f"{file} does not say what it is: give the name of its task (--name) and its kind (--kind), text or image."
        )
    tensors = read_file(file)
    task = task_config(name, kind, tensors, alpha)
    transfers, _ = transfers_of(tensors, rules.plugin(name), file)
    if fusion is not None:
        task.token_tables = free_tables(name, config)
        transfers += transfers_of(read_file(fusion), rules.fusion(task.token_tables), fusion)[0]
    return name, task, {transfer.target: transfer.read(config.dtype) for transfer in transfers}


def free_tables(name: str, config: HealthGPTConfig) -> str:
    """A name for token tables that a task brings along: its own, unless other tasks share tables of that name."""
    others = {settings.token_tables for task, settings in config.tasks.items() if task != name}
    return f"{name}_own" if name in others else name


def published_files(task: str, tables: str | None, tensors: dict) -> dict[str, dict[str, torch.Tensor]]:
    """Tensors by published file and name: the rules `plugin` and `fusion` backwards."""
    plugin, fusion = {}, {}
    for key, tensor in tensors.items():
        if key == f"model.token_embeddings.{tables}.weight":
            fusion["base_model.model.model.embed_tokens.weight"] = tensor
        elif key == f"token_heads.{tables}.weight":
            fusion["base_model.model.lm_head.weight"] = tensor
        else:
            name = key.removeprefix("model.").removeprefix("language_model.")
            name = name.replace(f".plugins.{task}.", ".").replace(f"projectors.{task}.", "mm_projector.")
            plugin[f"base_model.model.model.{name}"] = tensor
    return {"hlora_weights.bin": plugin} | ({"fusion_layer_weights.bin": fusion} if fusion else {})


def write_plugin(folder: Path, name: str, task: dict, tensors: dict[str, torch.Tensor]) -> None:
    """Writes the two files of a plugin that lies alone."""
    save_tensors(tensors, folder / WEIGHTS_NAME)
    write_json(folder / CONFIG_NAME, {"name": name, "task": task})


def read_checkpoint(checkpoint: Path) -> tuple[HealthGPTConfig, dict[str, str]]:
    """Configuration of a checkpoint and the file that each of its tensors lies in."""
    if not (checkpoint / "config.json").is_file():
        raise CheckpointError(f"{checkpoint} is no HealthGPT checkpoint: it has no config.json.")
    settings = read_json(checkpoint / "config.json")
    if settings.get("model_type") != HealthGPTConfig.model_type:
        raise CheckpointError(f"{checkpoint} is no HealthGPT checkpoint.")
    with reading(checkpoint / "config.json"):
        config = HealthGPTConfig.from_dict(settings)
    if (checkpoint / SINGLE_NAME).is_file():  # transformers too looks for it first
        return config, dict.fromkeys(read_file(checkpoint / SINGLE_NAME), SINGLE_NAME)
    index = read_json(checkpoint / INDEX_NAME)
    with reading(checkpoint / INDEX_NAME):
        return config, dict(index["weight_map"])


def update(
    checkpoint: Path, weight_map: dict[str, str], tasks: dict[str, dict], added: list[Path] | None = None
) -> None:
    """
    Makes index, processor, configuration, record and card say the same.

    `config.json` names the tasks. It is written last when a task is added and first when one is taken out, so that after
    a kill in between `add_plugin` (with the plugin that was taken out) puts everything right.
    """
    config, processor = read_json(checkpoint / "config.json"), read_json(checkpoint / "processor_config.json")
    old = HealthGPTConfig.from_dict(config)
    config |= {"tasks": tasks}
    if added is None:
        write_json(checkpoint / "config.json", config)
    keys = ("kind", "default_prompt")
    processor["tasks"] = {name: {key: task[key] for key in keys} for name, task in tasks.items()}
    write_json(checkpoint / "processor_config.json", processor)
    total = sum((checkpoint / file).stat().st_size for file in set(weight_map.values()))
    weight_map = {name: NUMBERED_NAME if file == SINGLE_NAME else file for name, file in weight_map.items()}
    write_json(checkpoint / INDEX_NAME, {"metadata": {"total_size": total}, "weight_map": weight_map})
    if (checkpoint / SINGLE_NAME).exists():  # of one file of all weights the index would not be read
        (checkpoint / SINGLE_NAME).rename(checkpoint / NUMBERED_NAME)
    if (checkpoint / RECORD_NAME).is_file():
        update_record(checkpoint, old, HealthGPTConfig.from_dict(config), set(weight_map.values()), added)
    if added is not None:
        write_json(checkpoint / "config.json", config)


def update_record(checkpoint: Path, old: HealthGPTConfig, new: HealthGPTConfig, weights: set[str], added) -> None:
    """Brings record and model card up to date; a card that somebody else has written stays as it is."""
    before = read_json(checkpoint / RECORD_NAME)
    record = dict(before)
    others = {file for file in record["files"] if not file.endswith(".safetensors")}
    record |= {"fingerprint": None, "files": sorted(others | weights)}
    for path in added or []:
        content = path.read_bytes()
        source = {"file": path.name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        record["sources"] = [other for other in record["sources"] if other != source] + [source]
    rewrite_card(checkpoint, (old, before), (new, record))
    write_json(checkpoint / RECORD_NAME, record)
