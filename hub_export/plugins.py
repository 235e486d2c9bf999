"""
Plugins of an exported checkpoint, each in a weight file of its own: copied out, taken out, put in.

A plugin alone is a folder with `plugin.safetensors`, whose tensors have the names of the checkpoint, and
`plugin_config.json` with its task's name, settings and, if they are known, sources. The shared weight files are never rewritten.
"""

import hashlib
import os
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import safe_open
from tokenizers import Tokenizer

from ..configuration_healthgpt import HealthGPTConfig, TaskConfig
from ..locks import alone
from ..modeling_healthgpt import HealthGPTForConditionalGeneration
from ..processing_healthgpt import reserved_token
from . import rules
from .atomic import discard, write_json, writing
from .card import build_card, rewrite_card
from .checkpoint import (
    RECORD_NAME,
    SINGLE_NAME,
    plugin_file,
    read_record,
    read_settings,
    read_weight_map,
    task_of,
)
from .confine import (
    CheckpointError,
    inside,
    read_json,
    reading,
    require_confined,
    require_no_links,
    require_no_pointer,
)
from .merge import name_of
from .plan import KINDS, checkpoint_name, is_finite, list_names, task_config, transfers_of
from .sources import read_file
from .write import save_tensors, write_index

WEIGHTS_NAME, CONFIG_NAME = "plugin.safetensors", "plugin_config.json"
PUBLISHED_NAME, FUSION_NAME = "hlora_weights.bin", "fusion_layer_weights.bin"
NUMBERED_NAME = "model-00001-of-00001.safetensors"
PROCESSOR_NAME = "processor_config.json"


def extract_plugin(checkpoint: Path, task: str, output: Path, remove: bool = False, published: bool = False) -> None:
    """
    Copies a task's plugin into a folder of its own.

    Args:
        checkpoint (`Path`): An exported folder.
        task (`str`): Its task.
        output (`Path`): Folder to make. With `remove` it may exist if it holds this very plugin: so the same call finishes what
            was interrupted.
        remove (`bool`, defaults to `False`): Whether the checkpoint then loses the task; only once the output is complete.
        published (`bool`, defaults to `False`): Whether to write the files and names that HealthGPT was published with:
            `hlora_weights.bin`, and `fusion_layer_weights.bin` if the task has token tables of its own.

    Raises:
        HealthGPTError: if another command changes the checkpoint or writes the output, or the folder around it does not exist.
        CheckpointError: if there is no such task, it cannot be taken out, a tensor of it is missing, or the output exists or
            cannot be made. In both cases the checkpoint is as it was.
    """
    with alone(checkpoint) if remove else nullcontext():
        config, weight_map = read_checkpoint(checkpoint)
        with writing(output):
            exists = os.path.lexists(output)
        if remove:
            require_changeable(checkpoint, config, set(weight_map.values()) - {plugin_file(task)})
        if task not in config.tasks:
            if not (remove and exists and is_begun(checkpoint, task, output, config)):
                raise CheckpointError(f"{checkpoint} has no task {task!r}; it has {', '.join(config.tasks)}.")
            take_out(checkpoint, task, config, weight_map)
            return
        if exists and not remove:
            raise CheckpointError(f"{output} exists already.")
        copied = names_of_plugin(checkpoint, task, config, weight_map, published)
        if remove:
            require_separate(checkpoint, task, config, weight_map)
        tensors = {}
        for file in {weight_map[name] for name in copied}:
            tensors |= read_whole(checkpoint / file, [name for name in copied if weight_map[name] == file])
        if not exists:
            save_plugin(output, task, config.tasks[task], tensors, sources_of(checkpoint, task), published)
        elif not is_kept(output, task, tensors):
            raise CheckpointError(f"{output} exists already and holds something else than this plugin.")
        if remove:
            take_out(checkpoint, task, config, weight_map)


def names_of_plugin(
    checkpoint: Path, task: str, config: HealthGPTConfig, weight_map: dict[str, str], published: bool
) -> set[str]:
    """
    Names of the tensors that a plugin is made of: what its task owns, and if it is published token tables that others use too.

    Raises:
        CheckpointError: if the index lacks one of them.
    """
    names, tables = set(parts_of_task(config, task)), config.tasks[task].token_tables
    if published and tables is not None:
        names |= {f"model.token_embeddings.{tables}.weight", f"token_heads.{tables}.weight"}
    missing = sorted(names - weight_map.keys())
    if missing:
        raise CheckpointError(f"The index of {checkpoint} lacks {list_names(missing)} of task {task!r}.")
    return names


def require_separate(checkpoint: Path, task: str, config: HealthGPTConfig, weight_map: dict[str, str]) -> None:
    """
    Raises:
        CheckpointError: if a task cannot be taken out, since its weights are not in a file of their own or it is the last.
    """
    owned = parts_of_task(config, task).keys()
    files = {weight_map[name] for name in owned}
    if files != {plugin_file(task)} or read_file(checkpoint / plugin_file(task)).keys() - owned:
        raise CheckpointError(
            f"Task {task!r} shares its weight file with other parts of {checkpoint} and cannot be taken out of it; only "
            "what `healthgpt export` or `plugin add` wrote has a file for each task."
        )
    if len(config.tasks) == 1:
        raise CheckpointError(f"Task {task!r} is the only one of {checkpoint} and cannot be taken out.")


def save_plugin(
    output: Path,
    task: str,
    settings: TaskConfig,
    tensors: dict[str, torch.Tensor],
    sources: list[dict],
    published: bool,
) -> None:
    """Makes the folder of a plugin, which has its name only once it is whole."""
    partial = output.with_name(f".{output.name}.partial")
    with alone(output), writing(output, partial):
        discard(partial)
        partial.mkdir()
        if published:
            for file, content in published_files(task, settings.token_tables, tensors).items():
                torch.save(content, partial / file)
        else:
            write_plugin(partial, task, asdict(settings), tensors, sources)
        partial.rename(output)


def is_begun(checkpoint: Path, task: str, output: Path, config: HealthGPTConfig) -> bool:
    """Whether an interrupted call has begun to take out a task: its file is there, is needed by no other and is kept in full."""
    file = inside(checkpoint, plugin_file(task), checkpoint)
    if not os.path.isfile(file):
        return False
    tensors = read_whole(file)
    return shapes_of(config).keys().isdisjoint(tensors) and is_kept(output, task, tensors)


def is_kept(folder: Path, task: str, tensors: dict[str, torch.Tensor]) -> bool:
    """Whether the folder of a plugin, in either form, holds these tensors of a task, bit for bit."""
    if (folder / CONFIG_NAME).is_file():
        require_confined(folder)
        kept = read_whole(folder / WEIGHTS_NAME) if read_json(folder / CONFIG_NAME).get("name") == task else {}
    else:
        tables = next((name.split(".")[1] for name in tensors if name.startswith("token_heads.")), task)
        transfers = []
        for file, table in ((PUBLISHED_NAME, rules.plugin(task)), (FUSION_NAME, rules.fusion(tables))):
            if (folder / file).is_file():
                transfers += transfers_of(read_file(folder / file), table, folder / file)[0]
        kept = {transfer.target: transfer.read(transfer.tensor.dtype) for transfer in transfers}
    return all(name in kept and torch.equal(kept[name], tensor) for name, tensor in tensors.items())


def take_out(checkpoint: Path, task: str, config: HealthGPTConfig, weight_map: dict[str, str]) -> None:
    """Removes a task, whose plugin is kept elsewhere, from a checkpoint: its weight file goes last."""
    files = set(weight_map.values()) - {plugin_file(task)}
    with writing(checkpoint):
        update(checkpoint, files, {name: asdict(kept) for name, kept in config.tasks.items() if name != task})
        (checkpoint / plugin_file(task)).unlink()


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
        HealthGPTError: if another command changes the checkpoint.
        CheckpointError: if the plugin does not fit the checkpoint, or there is a task of that name. In both cases the checkpoint
            is as it was.
    """
    with alone(checkpoint):
        config, weight_map = read_checkpoint(checkpoint)
        if os.path.isfile(plugin):
            name, task, tensors = read_published(plugin, name, kind, alpha, fusion, config)
            sources = [as_source(path, name) for path in (plugin, fusion) if path is not None]
        elif (kind, alpha, fusion) != (None, None, None):
            raise CheckpointError(
                "A kind, an alpha and a fusion layer go with a published file: a folder has its own."
            )
        else:
            name, task, tensors, sources = read_plugin(plugin, name, config)
        if name in config.tasks and not replace:
            raise CheckpointError(
                f"{checkpoint} has a task {name!r} already: give the plugin another name (--name), or let it take its place (--replace)."
            )
        replaced = {key for key in weight_map if task_of(key, config.tasks) == name}
        if any(weight_map[key] != plugin_file(name) for key in replaced):
            raise CheckpointError(
                f"Task {name!r} shares its weight file with other parts of {checkpoint} and cannot be replaced."
            )
        with reading(plugin):
            grown = HealthGPTConfig.from_dict(
                {**config.to_dict(), "tasks": {**config.to_dict()["tasks"], name: asdict(task)}}
            )
            expected = parts_of_task(grown, name)
        require_fitting(plugin, checkpoint, tensors, expected, grown.text_config.num_hidden_layers)
        require_plain_prompt(plugin, checkpoint, task)
        others = set(weight_map.values()) - {plugin_file(name)}
        require_changeable(checkpoint, config, others)
        # Token tables of the old plugin that other tasks use by now stay where they are.
        kept = [key for key, file in weight_map.items() if file == plugin_file(name) and key not in replaced]
        tensors |= read_whole(checkpoint / plugin_file(name), kept) if kept else {}
        unfinished = checkpoint / f"{plugin_file(name)}.unfinished"
        with writing(checkpoint, unfinished):
            save_tensors(tensors, unfinished)
            unfinished.rename(checkpoint / plugin_file(name))
            tasks = {key: asdict(value) for key, value in grown.tasks.items()}
            update(checkpoint, others | {plugin_file(name)}, tasks, sources)


def shapes_of(config: HealthGPTConfig) -> dict[str, torch.Size]:
    """Names and shapes of the tensors of a checkpoint."""
    with torch.device("meta"):
        model = HealthGPTForConditionalGeneration(config)
    return {checkpoint_name(name): value.shape for name, value in model.state_dict().items()}


def parts_of_task(config: HealthGPTConfig, task: str) -> dict[str, torch.Size]:
    """Names and shapes of the tensors that a task of a checkpoint owns."""
    return {name: shape for name, shape in shapes_of(config).items() if task_of(name, config.tasks) == task}


def require_fitting(
    plugin: Path,
    checkpoint: Path,
    tensors: dict[str, torch.Tensor],
    expected: dict[str, torch.Size],
    num_layers: int,
) -> None:
    """
    Raises:
        CheckpointError: if a plugin's tensors are not those that the checkpoint expects, or are not finite.
    """
    for problem, keys in (
        ("lacks", expected.keys() - tensors.keys()),
        ("has besides", tensors.keys() - expected.keys()),
    ):
        if keys:
            raise CheckpointError(
                f"{plugin} does not fit the {num_layers} layers of {checkpoint}: it {problem} {list_names(sorted(keys))}."
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


def require_plain_prompt(plugin: Path, checkpoint: Path, task: TaskConfig) -> None:
    """
    Raises:
        CheckpointError: if a plugin's default prompt has a special token of the checkpoint's vocabulary.
    """
    if task.default_prompt is None:
        return
    file = inside(checkpoint, "tokenizer.json", checkpoint)
    require_no_pointer(file)
    with reading(file):
        token = reserved_token(Tokenizer.from_file(str(file)), task.default_prompt)
    if token is not None:
        raise CheckpointError(f"The default_prompt of {plugin} has {token}, a token that only the processor writes.")


def read_plugin(
    folder: Path, name: str | None, config: HealthGPTConfig
) -> tuple[str, TaskConfig, dict[str, torch.Tensor], list[dict]]:
    """Name, settings, tensors and sources of a plugin that lies alone, under the new name if there is one."""
    require_confined(folder)
    if not os.path.isfile(folder / CONFIG_NAME):
        raise CheckpointError(f"{folder} is no plugin: it has no {CONFIG_NAME}.")
    content = read_json(folder / CONFIG_NAME)
    with reading(folder / CONFIG_NAME):
        old, task = content["name"], TaskConfig(**content["task"])
        config.validate_task(old, task)
    name = old if name is None else name
    tensors = read_whole(folder / WEIGHTS_NAME)
    names = {f".plugins.{old}.": f".plugins.{name}.", f".projectors.{old}.": f".projectors.{name}."}
    if f"token_heads.{task.token_tables}.weight" in tensors:
        tables = free_tables(name, config)
        names |= {f"{kind}.{task.token_tables}.": f"{kind}.{tables}." for kind in ("token_embeddings", "token_heads")}
        task.token_tables = tables
    for before, after in names.items():
        tensors = {key.replace(before, after): tensor for key, tensor in tensors.items()}
    with reading(folder / CONFIG_NAME):
        sources = [
            {
                "file": str(source["file"]),
                "bytes": int(source["bytes"]),
                "sha256": str(source["sha256"]),
                "tasks": [name],
            }
            for source in content.get("sources", ())
        ]
    return name, task, tensors, sources or [as_source(folder / WEIGHTS_NAME, name)]


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
    return {PUBLISHED_NAME: plugin} | ({FUSION_NAME: fusion} if fusion else {})


def write_plugin(
    folder: Path, name: str, task: dict, tensors: dict[str, torch.Tensor], sources: list[dict] | None = None
) -> None:
    """Writes the two files of a plugin that lies alone, with its sources if they are known."""
    save_tensors(tensors, folder / WEIGHTS_NAME)
    known = {"sources": sources} if sources else {}
    write_json(folder / CONFIG_NAME, {"name": name, "task": task, **known})


def read_whole(file: Path, names: list[str] | None = None) -> dict[str, torch.Tensor]:
    """
    The tensors of a safetensors file, all or those named.

    Raises:
        CheckpointError: if it is missing, damaged, or lacks one of them.
    """
    missing = sorted(set(names or []) - read_file(file).keys())
    if missing:
        raise CheckpointError(f"{file} lacks {list_names(missing)} that the index says it has.")
    with reading(file), safe_open(file, framework="pt") as opened:
        return {name: opened.get_tensor(name) for name in (opened.keys() if names is None else names)}


def read_checkpoint(checkpoint: Path) -> tuple[HealthGPTConfig, dict[str, str]]:
    """Configuration of a checkpoint and the file that each of its tensors lies in."""
    settings = read_settings(checkpoint)
    with reading(checkpoint / "config.json"):
        config = HealthGPTConfig.from_dict(settings)
    return config, read_weight_map(checkpoint)


def require_changeable(checkpoint: Path, config: HealthGPTConfig, files: set[str]) -> None:
    """
    Looks at all that a change will read, before anything is written.

    Raises:
        CheckpointError: if there are links, or one of the weight files, the processor's settings or the record cannot be used.
    """
    require_no_links(checkpoint)
    for file in files:
        read_file(checkpoint / file)
    read_json(checkpoint / PROCESSOR_NAME)
    if (checkpoint / RECORD_NAME).is_file():
        record = read_record(checkpoint)
        with reading(checkpoint / RECORD_NAME):
            build_card(config, record)
            for source in record["sources"]:
                set(source.get("tasks", ()))


def update(checkpoint: Path, files: set[str], tasks: dict[str, dict], added: list[dict] | None = None) -> None:
    """
    Makes index, processor, configuration, record and card say the same, of weight files that are there.

    `config.json` names the tasks; the record and the card follow from it. It is written last when a task is added, and right
    after these two when one is taken out, so that after a kill in between the same call, or `add_plugin` with the plugin that
    was taken out, puts everything right.

    Args:
        checkpoint (`Path`): The checkpoint.
        files (`set[str]`): Its weight files from now on.
        tasks (`dict[str, dict]`): Its tasks from now on.
        added (`list[dict]`, *optional*): If a task is added, the sources of its plugin as the record has them.
    """
    config, processor = read_json(checkpoint / "config.json"), read_json(checkpoint / PROCESSOR_NAME)
    old, renamed = HealthGPTConfig.from_dict(config), {SINGLE_NAME: NUMBERED_NAME}
    config |= {"tasks": tasks}
    if added is None:
        update_record(checkpoint, old, HealthGPTConfig.from_dict(config), files, [])
        write_json(checkpoint / "config.json", config)
    keys = ("kind", "default_prompt")
    processor["tasks"] = {name: {key: task[key] for key in keys} for name, task in tasks.items()}
    write_json(checkpoint / PROCESSOR_NAME, processor)
    write_index(checkpoint, sorted(files), renamed)
    if SINGLE_NAME in files:  # of one file of all weights the index would not be read
        (checkpoint / SINGLE_NAME).rename(checkpoint / NUMBERED_NAME)
    if added is not None:
        weights = {renamed.get(file, file) for file in files}
        update_record(checkpoint, old, HealthGPTConfig.from_dict(config), weights, added)
        write_json(checkpoint / "config.json", config)


def update_record(
    checkpoint: Path, old: HealthGPTConfig, new: HealthGPTConfig, weights: set[str], added: list[dict]
) -> None:
    """
    Brings record and model card, if there are some, up to date; a card that somebody else has written stays as it is.

    Sources that belong to none but tasks that are gone, or that the added plugin takes the place of, go.
    """
    if not (checkpoint / RECORD_NAME).is_file():
        return
    before = read_record(checkpoint)
    others = {file for file in before["files"] if not file.endswith(".safetensors")}
    gone = {task for source in added for task in source["tasks"]} | (old.tasks.keys() - new.tasks.keys())
    kept = [source for source in before["sources"] if not source.get("tasks") or not gone.issuperset(source["tasks"])]
    record = before | {"fingerprint": None, "files": sorted(others | weights), "sources": kept + added}
    rewrite_card(checkpoint, (old, before), (new, record))
    write_json(checkpoint / RECORD_NAME, record)


def sources_of(checkpoint: Path, task: str) -> list[dict]:
    """What the record of a checkpoint, if there is one, has as sources of a task's plugin."""
    if not (checkpoint / RECORD_NAME).is_file():
        return []
    record = read_record(checkpoint)
    with reading(checkpoint / RECORD_NAME):
        return [source for source in record["sources"] if task in source.get("tasks", ())]


def as_source(path: Path, task: str) -> dict:
    """A file that a plugin was put in from, as the record of an export has its sources."""
    content = path.read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    return {"file": name_of(path), "bytes": len(content), "sha256": sha256, "tasks": [task]}
