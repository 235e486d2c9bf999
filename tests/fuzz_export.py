"""
Exports the golden M3 from randomly spoilt files and counts what happens: `python tests/fuzz_export.py SEED COUNT`.

Each spoilt export must end in one of three ways: one clear sentence and nothing written; the same checkpoint as from the
files in order (a byte was hit that nobody reads); or, where a file format has no checksum, a checkpoint that holds exactly the
tensors that the spoilt file says. Anything else stops the run with the seed that leads there.
"""

import collections
import os
import random
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from conftest import GOLDEN, sources_of, weights_of
from safetensors.torch import load_file, save_file

from healthgpt.hub_export import CheckpointError, export

FILES = ["base/model.safetensors", "vit/model.safetensors", "com_hlora_weights.bin", "gen_hlora_weights.bin"]
FILES += ["fusion_layer_weights.bin", "vqgan/last.ckpt"]
SETTINGS = ["base/config.json", "base/tokenizer_config.json", "vit/config.json", "vit/preprocessor_config.json"]
SETTINGS += ["vqgan/model.yaml", "base/tokenizer.model"]


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


def main(seed, count):
    with tempfile.TemporaryDirectory() as folder:
        export(sources_of(GOLDEN / "m3"), Path(folder) / "out", skip_forward=True)
        clean = weights_of(Path(folder) / "out")
    outcomes = collections.Counter()
    for number in range(seed, seed + count):
        try:
            corruption, outcome = spoil_and_export(number, clean)
        except BaseException:
            print(f"seed {number} leads here:")
            raise
        outcomes[f"{corruption}: {outcome}"] += 1
        outcomes[outcome] += 1
    for outcome, number in sorted(outcomes.items()):
        print(f"{number:6} {outcome}")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
