"""
Exports the golden M3 from randomly spoilt files and counts what happens: `python tests/fuzz_export.py SEED COUNT`.

Of ten seeds six spoil what files hold, one where the files of the sources lead, one a setting of an exported checkpoint that is then
loaded, and two such a checkpoint and a plugin on which the plugin commands then run. Next to them is a folder that nobody may touch:
it stays as it was, and what it holds gets nowhere.

Each spoilt export must end in one of three ways: one clear sentence and nothing written; the same checkpoint as from the
files in order (a byte was hit that nobody reads); or, where a file format has no checksum, a checkpoint that holds exactly the
tensors that the spoilt file says. Anything else stops the run with the seed that leads there.
"""

import collections
import functools
import json
import os
import random
import shutil
import sys
import tempfile
import zipfile
from dataclasses import replace
from pathlib import Path

import torch
from conftest import GOLDEN, sources_of, weights_of
from safetensors.torch import load_file, save_file

from healthgpt.app.common import load
from healthgpt.errors_healthgpt import HealthGPTError
from healthgpt.hub_export import CheckpointError, export, push
from healthgpt.hub_export.checkpoint import list_plugins
from healthgpt.hub_export.plugins import add_plugin, extract_plugin

FILES = ["base/model.safetensors", "vit/model.safetensors", "com_hlora_weights.bin", "gen_hlora_weights.bin"]
FILES += ["fusion_layer_weights.bin", "vqgan/last.ckpt"]
SETTINGS = ["base/config.json", "base/tokenizer_config.json", "vit/config.json", "vit/preprocessor_config.json"]
SETTINGS += ["vqgan/model.yaml", "base/tokenizer.model"]
SETTINGS_OF_CHECKPOINTS = ["generation_config.json", "processor_config.json", "tokenizer_config.json"]


class Attack:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (self.mark,)


def flip(path, dice):
    data = bytearray(path.read_bytes())
    for _ in range(dice.randint(1, 8)):
        data[dice.randrange(len(data))] ^= dice.randint(1, 255)
    path.write_bytes(data)


def flip_in_the_head(path, dice):
    data = bytearray(path.read_bytes())
    data[dice.randrange(min(3000, len(data)))] ^= dice.randint(1, 255)
    path.write_bytes(data)


def truncate(path, dice):
    data = path.read_bytes()
    path.write_bytes(data[: dice.randrange(len(data))])


def change_tensors(path, dice):
    tensors = read_whole(path)
    name = dice.choice(sorted(tensors))
    tensor = tensors[name]
    change = dice.choice(["rename", "drop", "extra", "shape", "dtype", "nan"])
    if change == "rename":
        tensors[name.replace(dice.choice(name), "x", 1)] = tensors.pop(name)
    elif change == "drop":
        del tensors[name]
    elif change == "extra":
        tensors[f"{name}.more"] = tensor.clone()
    elif change == "shape":
        tensors[name] = tensor.flatten()[: dice.randint(0, tensor.numel())].clone()
    elif change == "dtype":
        tensors[name] = tensor.to(dice.choice([torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.bool]))
    elif tensor.numel() and tensor.is_floating_point():
        tensors[name] = tensor.clone()
        tensors[name].view(-1)[dice.randrange(tensor.numel())] = dice.choice([torch.nan, torch.inf, -torch.inf])
    save_file(tensors, path) if path.suffix == ".safetensors" else torch.save(tensors, path)


def splice(path, dice):
    """Another pickle in place of the file's own: one that runs code, one of another file, or one cut and joined."""
    if path.suffix == ".safetensors":
        return flip_in_the_head(path, dice)
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    [name] = [name for name in parts if name.endswith("data.pkl")]
    kind = dice.choice(["attack", "other", "joined"])
    attack = path.with_name("attack.bin")
    torch.save({"state_dict": {"x": Attack(str(MARK))}}, attack)
    with zipfile.ZipFile(GOLDEN / "m3/gen_hlora_weights.bin" if kind == "other" else attack) as archive:
        other = archive.read(next(part for part in archive.namelist() if part.endswith("data.pkl")))
    cut = dice.randrange(len(parts[name]))
    parts[name] = parts[name][:cut] + other[2:] if kind == "joined" else other
    with zipfile.ZipFile(path, "w") as archive:
        for part, data in parts.items():
            archive.writestr(part, data)


CALLBACKS = ["pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"]
CORRUPTIONS = [flip, flip_in_the_head, truncate, change_tensors, splice]
MARK = Path(tempfile.gettempdir()) / "code_was_run"


def read_whole(path):
    """All tensors of a file, as the library that wrote it reads them."""
    if path.suffix == ".safetensors":
        return load_file(path)
    with torch.serialization.safe_globals([(object, name) for name in CALLBACKS]):
        tensors = torch.load(path, weights_only=True)
    return tensors.get("state_dict", tensors)


def is_faithful(plan, folder):
    """Whether every tensor is, bit for bit, what the spoilt file holds."""
    written = weights_of(folder)
    sources = {path: read_whole(path) for path in plan.origins}
    for transfer in plan.transfers:
        source = sources[transfer.tensor.origin][transfer.name]
        kept = source[: transfer.rows[0]] if transfer.rows else source
        if not torch.equal(written[transfer.target][: len(kept)], kept.to(plan.config.dtype)):
            return False
    return True


def spoil_and_export(number, clean):
    """The corruption that a seed stands for, and what becomes of it beside the weights of the clean export."""
    dice = random.Random(number)
    with tempfile.TemporaryDirectory() as folder:
        m3 = Path(folder) / "m3"
        shutil.copytree(GOLDEN / "m3", m3)
        corrupt, path = dice.choice(CORRUPTIONS), m3 / dice.choice(FILES)
        if number % 10 == 8:
            corrupt, path = dice.choice([flip, truncate]), m3 / dice.choice(SETTINGS)
        corrupt(path, dice)
        output = Path(folder) / "out"
        try:
            plan = export(sources_of(m3), output, skip_forward=True)
        except CheckpointError as error:
            assert "\n" not in str(error) and len(os.listdir(folder)) == 1, (number, str(error))
            outcome = "refused"
        else:
            written = weights_of(output)
            same = all(torch.equal(tensor, clean[name]) for name, tensor in written.items())
            outcome = "identical" if same else "faithful"
            assert same or is_faithful(plan, output), (number, corrupt.__name__, path.name)
    assert not MARK.exists(), f"seed {number} ran code"
    return corrupt.__name__, outcome


CANARY = 12345.678  # value of all tensors of the folder that nobody may touch
SECRET = b"what is outside stays outside"
OUTSIDE = ("model.safetensors", "config.json", "tokenizer.model", "secret.txt")
NAMES = ["../outside/model.safetensors", "x/../../outside/model.safetensors", "{}/outside/model.safetensors", "..", ""]
NAMES += ["../outside/config.json", "x\0", "x" * 300, "a\nb", ".", None, 5, ["x"], "*", "../checkpoint/config.json"]


def make_outside(folder, like):
    """A folder that nobody may touch: files that look like those of a checkpoint."""
    folder.mkdir()
    tensors = {name: torch.full_like(tensor, CANARY) for name, tensor in load_file(like).items()}
    save_file(tensors, folder / "model.safetensors")
    for name in OUTSIDE[1:]:
        (folder / name).write_bytes(b'{"model_type": "phi3", "x": "%s"}' % SECRET)


def state(folder):
    """What a folder holds: content and time of its files, and the targets of its links."""
    return {
        path.relative_to(folder).as_posix(): os.readlink(path)
        if path.is_symlink()
        else (path.stat().st_mtime_ns, path.is_file() and path.read_bytes())
        for path in sorted(folder.rglob("*"))
    }


def has_leaked(folder):
    """Whether a file anywhere but outside holds what is outside."""
    files = [path for path in folder.rglob("*") if not path.is_symlink() and path.is_file()]
    files = [path for path in files if "outside" not in path.relative_to(folder).parts]
    canary = torch.full((16,), CANARY).numpy().tobytes()
    return any(mark in path.read_bytes() for path in files for mark in (canary, SECRET))


def link(path, dice):
    """A symbolic link in the place of a file, or of one that may be written: out of its folder, straight or by another link."""
    path = path.with_name(dice.choice([path.name, f"{path.name}.unfinished", "model-new.safetensors", path.name]))
    target = dice.choice([*OUTSIDE, path.name, "new"])
    target = (
        dice.choice([Path("../outside"), Path("../../outside"), path.parent.parent.absolute() / "outside"]) / target
    )
    path.unlink(missing_ok=True)
    if dice.random() < 0.3:
        path.with_name("between").symlink_to(target)
        target = Path("between")
    path.symlink_to(target)


def link_within(path, dice):
    """The file stays in its folder, or is where the Hub's cache would have it, and a link leads to it."""
    folder, content = path.parent, path.read_bytes()
    if dice.random() < 0.5:
        path.rename(path.with_name("real"))
        path.symlink_to("real")
        return folder
    repository = folder.parent / "models--user--name"
    shutil.move(folder, repository / "snapshots/0123")
    place = dice.choice([repository / "blobs/0123", folder.parent / f"blobs/ab/{'ab' * 32}"])
    for blob in {place, repository / "blobs/0123"}:
        blob.parent.mkdir(parents=True)
    place.write_bytes(content)
    if place != repository / "blobs/0123":
        (repository / "blobs/0123").symlink_to(f"../../blobs/ab/{place.name}")
    (repository / "snapshots/0123" / path.name).unlink()
    (repository / "snapshots/0123" / path.name).symlink_to("../../blobs/0123")
    return repository / "snapshots/0123"


def bad_name(path, dice):
    name = dice.choice(NAMES)
    return name.format(path.parent.parent.absolute()) if isinstance(name, str) else name


def lead_elsewhere_and_export(number, clean):
    """Sources whose index or links lead elsewhere: refused, or the clean checkpoint if it is still in the folder."""
    dice = random.Random(number)
    with tempfile.TemporaryDirectory() as folder:
        m3, output = Path(folder) / "m3", Path(folder) / "out"
        shutil.copytree(GOLDEN / "m3", m3)
        make_outside(m3 / "outside", m3 / "base/model.safetensors")
        part, kind = dice.choice(["base", "vit"]), dice.choice(["index", "index", "link", "link", "link within"])
        path = dice.choice(sorted(path for path in (m3 / part).iterdir() if path.name != "model.safetensors"))
        path = dice.choice([path, m3 / part / "model.safetensors"])
        moved = m3 / part
        if kind == "index":
            names = list(load_file(m3 / part / "model.safetensors"))
            (m3 / part / "model.safetensors").rename(m3 / part / "shard.safetensors")
            weight_map = dict.fromkeys(names, "shard.safetensors")
            weight_map |= dict.fromkeys(dice.sample(names, dice.randint(1, len(names))), bad_name(path, dice))
            (m3 / part / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        elif kind == "link":
            link(path, dice)
        else:
            moved = link_within(path, dice)
        before = state(m3)
        sources = replace(sources_of(m3), **{"base" if part == "base" else "vision": moved})
        try:
            export(sources, output, skip_forward=True)
            outcome, written = "identical", weights_of(output)
            assert kind == "link within" and all(torch.equal(written[name], clean[name]) for name in clean), number
        except CheckpointError as error:
            outcome = "refused"
            assert kind != "link within" and "\n" not in str(error) and not output.exists(), (number, str(error))
            assert SECRET.decode() not in str(error), (number, str(error))
        assert state(m3) == before and not has_leaked(Path(folder)), number
    return kind, outcome


def spoil_checkpoint(checkpoint, plugin, dice):
    """Spoils an exported checkpoint or a plugin; the kind of the corruption."""
    kind = dice.choice(["index", "index", "link", "link", "record", "task", "plugin", "plugin link", "bytes"])
    path = dice.choice(sorted(checkpoint.iterdir()))
    if kind == "link":
        link(path, dice)
    elif kind == "plugin link":
        link(dice.choice(sorted(plugin.iterdir())), dice)
    elif kind == "bytes":
        dice.choice([flip, flip_in_the_head, truncate])(path, dice)
    else:
        names = {"index": "model.safetensors.index.json", "record": "healthgpt_export.json", "task": "config.json"}
        file = checkpoint / names[kind] if kind in names else plugin / "plugin_config.json"
        content, name = json.loads(file.read_text()), bad_name(path, dice)
        if kind == "index":
            name = dice.choice([name, path.name])
            chosen = [key for key in content["weight_map"] if "generation" in key or dice.random() < 0.1]
            content["weight_map"] |= dict.fromkeys(dice.sample(chosen, dice.randint(1, len(chosen))), name)
        elif kind == "record":
            content["files"].insert(dice.randrange(len(content["files"])), name)
        elif kind == "task":
            settings = content["tasks"].pop("generation")
            settings["token_tables"] = dice.choice([settings["token_tables"], name])
            content["tasks"][dice.choice(["generation", str(name)])] = settings
        else:
            prompt = dice.choice(["See <image>.", "<|end|>", "a<idx_5>", "<start_index>", name])
            setting, value = dice.choice([("token_tables", name), ("default_prompt", prompt), ("kind", name)])
            content["task"][setting] = value
            content["name"] = dice.choice(["generation", name])
        file.write_text(json.dumps(content))
    return kind


def spoil_and_change(number, exported):
    """The plugin commands on a spoilt checkpoint: each is refused and changes nothing, or does it and touches nothing else."""
    dice = random.Random(number)
    outcomes = []
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, plugin, taken = (Path(folder) / name for name in ("checkpoint", "plugin", "taken"))
        shutil.copytree(exported, checkpoint)
        extract_plugin(checkpoint, "generation", plugin)
        make_outside(Path(folder) / "outside", checkpoint / "model-plugin_generation-00001-of-00001.safetensors")
        kind = spoil_checkpoint(checkpoint, plugin, dice)
        commands = {
            "list": functools.partial(list_plugins, checkpoint),
            "add": functools.partial(add_plugin, checkpoint, plugin, name="other"),
            "replace": functools.partial(add_plugin, checkpoint, plugin, replace=True),
            "remove": functools.partial(extract_plugin, checkpoint, "generation", taken, remove=True),
            "push": functools.partial(push, checkpoint, "user/name"),  # to a Hub that cannot be reached
        }
        for name in dice.sample(sorted(commands), 3):
            before = state(Path(folder))
            try:
                commands[name]()
                outcomes.append(f"{name} done")
            except CheckpointError as error:
                outcomes.append(f"{name} refused")
                assert "\n" not in str(error) and SECRET.decode() not in str(error), (number, str(error))
                assert name == "push" or state(Path(folder)) == before, (number, name, str(error))
            after = state(Path(folder))
            gone = before.keys() - after.keys()
            assert gone <= {"checkpoint/model-plugin_generation-00001-of-00001.safetensors"}, (number, gone)
            assert not gone or (taken / "plugin.safetensors").is_file(), number
            for place in ("outside", "plugin"):
                is_there = [path for path in before if path.startswith(place)]
                assert all(before[path] == after[path] for path in is_there), (number, name)
            assert not any(path.startswith("outside") for path in after.keys() - before.keys()), (number, name)
            assert not has_leaked(Path(folder)), (number, name)
    return kind, outcomes


def places(content, place=()):
    """The way to every value of a JSON file."""
    if place:
        yield place
    pairs = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in pairs:
        yield from places(value, (*place, key))


VALUES = [None, -1, 0, 1, 7, 3.5, 1e30, 2**40, float("nan"), True, "", "abc", [], [1], ["a"], {}, {"a": 1}]


def spoil_and_load(number, exported):
    """One value of a checkpoint's settings is another or gone: loading it is refused in a sentence, or works."""
    dice = random.Random(number)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "checkpoint"
        shutil.copytree(exported, checkpoint)
        name = dice.choice(["config.json", "config.json", "config.json", *SETTINGS_OF_CHECKPOINTS])
        content = json.loads((checkpoint / name).read_text())
        *way, key = dice.choice(list(places(content)))
        node = content
        for step in way:
            node = node[step]
        if isinstance(node, dict) and dice.random() < 0.3:
            del node[key]
        else:
            node[key] = dice.choice(VALUES)
        (checkpoint / name).write_text(json.dumps(content))
        try:
            load(str(checkpoint), "cpu", None)
        except HealthGPTError as error:
            assert "\n" not in str(error), (number, str(error))
            return "setting", "refused"
        return "setting", "loaded"


def main(seed, count):
    outcomes = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        exported = Path(folder) / "out"
        export(sources_of(GOLDEN / "m3"), exported, skip_forward=True)
        clean = weights_of(exported)
        for number in range(seed, seed + count):
            try:
                if number % 10 in (5, 6):
                    corruption, ended = spoil_and_change(number, exported)
                else:
                    spoil = {4: spoil_and_load, 7: lead_elsewhere_and_export}.get(number % 10, spoil_and_export)
                    corruption, outcome = spoil(number, exported if spoil is spoil_and_load else clean)
                    ended = [outcome]
            except BaseException:
                print(f"seed {number} leads here:")
                raise
            outcomes.update([f"{corruption}: {outcome}" for outcome in ended] + ended)
    for outcome, number in sorted(outcomes.items()):
        print(f"{number:6} {outcome}")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
