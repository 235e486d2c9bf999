"""Plugins listed, copied out, taken out and put into checkpoints."""

import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import GOLDEN, full_disk, inputs_of, sources_of, weights_of
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from healthgpt.errors_healthgpt import HealthGPTError
from healthgpt.hub_export import CheckpointError, export
from healthgpt.hub_export.checkpoint import list_plugins
from healthgpt.hub_export.plugins import add_plugin, extract_plugin


@pytest.fixture
def folder(checkpoints, tmp_path):
    shutil.copytree(checkpoints("m3").folder, tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def answers(folder, case, task):
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    inputs = inputs_of(processor, {**case, "task": task})
    sequences = model.generate(**inputs, task=task, max_new_tokens=case["max_new_tokens"])
    return sequences[0, inputs["input_ids"].shape[1] :].tolist() == case["generated_ids"]


def test_a_plugin_taken_out_and_put_in_again_under_another_name(folder, tmp_path):
    cases = json.loads((GOLDEN / "m3/cases.json").read_text())["cases"]
    before = weights_of(folder)
    shared = (folder / "model-00001-of-00001.safetensors").stat()
    sources = json.loads((folder / "healthgpt_export.json").read_text())["sources"]
    sizes = list_plugins(folder)
    assert sizes["comprehension"]["bytes"] < sizes["generation"]["bytes"]

    extract_plugin(folder, "generation", tmp_path / "plugin", remove=True)
    modes = {path.stat().st_mode for path in (tmp_path / "plugin").iterdir()}
    assert modes == {(folder / "config.json").stat().st_mode}  # private files could not be shared
    assert list(list_plugins(folder)) == ["comprehension"]
    assert "gen_hlora" not in (folder / "README.md").read_text()
    assert answers(folder, cases[1], "comprehension")
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    with pytest.raises(ValueError, match="has no task 'generation'; it has comprehension"):
        model.generate(torch.tensor([[1]]), task="generation")

    add_plugin(folder, tmp_path / "plugin", name="ct_to_mri")
    assert answers(folder, cases[4], "ct_to_mri") and answers(folder, cases[1], "comprehension")
    assert list_plugins(folder)["ct_to_mri"] == sizes["generation"]
    after = weights_of(folder)
    renamed = {name.replace("generation", "ct_to_mri"): tensor for name, tensor in before.items()}
    assert after.keys() == renamed.keys() and all(torch.equal(after[name], renamed[name]) for name in after)
    again = (folder / "model-00001-of-00001.safetensors").stat()
    assert (again.st_ino, again.st_mtime_ns) == (shared.st_ino, shared.st_mtime_ns)
    assert not list(folder.glob("*.unfinished"))

    record = json.loads((folder / "healthgpt_export.json").read_text())
    assert set(record["files"]) == {path.name for path in folder.iterdir()}  # `push` takes all of it
    renamed = [{**source, "tasks": ["ct_to_mri"]} for source in sources if source["tasks"] == ["generation"]]
    assert [source["file"] for source in renamed] == ["m3/gen_hlora_weights.bin", "m3/fusion_layer_weights.bin"]
    assert record["sources"] == [source for source in sources if source["tasks"] != ["generation"]] + renamed
    card = (folder / "README.md").read_text()
    assert "| `ct_to_mri` | image |" in card and "| `generation` |" not in card and 'task="ct_to_mri"' in card
    with pytest.raises(CheckpointError, match="it holds another export"):
        export(sources_of(GOLDEN / "m3"), folder)


def test_sources_that_a_plugin_or_a_record_says_are_checked_before_anything_changes(folder, tmp_path):
    plugin = tmp_path / "plugin"
    extract_plugin(folder, "generation", plugin)
    content, record = (
        json.loads(path.read_text()) for path in (plugin / "plugin_config.json", folder / "healthgpt_export.json")
    )
    before = files_of(folder)
    [first, _] = content["sources"]
    for spoilt in ("x", 1, [1], [{}], [first | {"bytes": "many"}], [first | {"bytes": float("inf")}]):
        (plugin / "plugin_config.json").write_text(json.dumps(content | {"sources": spoilt}))
        with pytest.raises(CheckpointError, match=r"plugin_config\.json cannot be used: "):
            add_plugin(folder, plugin, name="other")
        assert files_of(folder) == before
    hostile = first | {"file": "a | b\n# New", "tasks": [[1]]}
    (plugin / "plugin_config.json").write_text(json.dumps(content | {"sources": [hostile]}))
    for tasks in (5, [[1]]):
        spoilt = record | {"sources": [record["sources"][0] | {"tasks": tasks}]}
        (folder / "healthgpt_export.json").write_text(json.dumps(spoilt))
        before = files_of(folder)
        for call in (
            lambda: add_plugin(folder, plugin, name="other"),
            lambda: extract_plugin(folder, "generation", tmp_path / "out", remove=True),
        ):
            with pytest.raises(CheckpointError, match=r"healthgpt_export\.json cannot be used: "):
                call()
        assert files_of(folder) == before and not (tmp_path / "out").exists()
    (folder / "healthgpt_export.json").write_text(json.dumps(record))
    add_plugin(folder, plugin, name="other")
    assert "| a \\| b\\\\n\\# New |" in (folder / "README.md").read_text()
    (plugin / "plugin_config.json").write_text(json.dumps({key: content[key] for key in ("name", "task")}))
    add_plugin(folder, plugin, name="other", replace=True)  # of a trained plugin nothing but itself is known
    added = json.loads((folder / "healthgpt_export.json").read_text())["sources"]
    assert added[:-1] == record["sources"] and added[-1]["file"] == "plugin/plugin.safetensors"


def test_a_published_file_put_in(folder, tmp_path):
    case = json.loads((GOLDEN / "m3/cases.json").read_text())["cases"][4]
    m3, before = GOLDEN / "m3", weights_of(folder)
    extract_plugin(folder, "generation", tmp_path / "plugin", remove=True)
    file, fusion = m3 / "gen_hlora_weights.bin", m3 / "fusion_layer_weights.bin"
    add_plugin(folder, file, "ct_to_mri", kind="image", fusion=fusion)
    assert answers(folder, case, "ct_to_mri")
    after = weights_of(folder)
    renamed = {name.replace("generation", "ct_to_mri"): tensor for name, tensor in before.items()}
    assert after.keys() == renamed.keys() and all(torch.equal(after[name], renamed[name]) for name in after)
    record = json.loads((folder / "healthgpt_export.json").read_text())
    assert [source["file"] for source in record["sources"][-2:]] == [f"m3/{file.name}", f"m3/{fusion.name}"]

    add_plugin(folder, file, "of_the_base", kind="image", alpha=3.0)
    task = json.loads((folder / "config.json").read_text())["tasks"]["of_the_base"]
    assert (task["alpha"], task["token_tables"]) == (3.0, None)
    for plugin, options, message in (
        (file, {"kind": "image"}, r"does not say what it is: give the name of its task \(--name\) and its kind"),
        (file, {"name": "again"}, "does not say what it is"),
        (file, {"name": "again", "kind": "sound"}, "does not say what it is"),
        (fusion, {"name": "again", "kind": "image"}, "is no H-LoRA plugin"),
        (file, {"name": "again", "kind": "image", "fusion": file}, r"tensors .* that no rule covers"),
        (tmp_path / "plugin", {"name": "again", "alpha": 2.0}, "go with a published file"),
        (GOLDEN / "l14/com_hlora_weights.bin", {"name": "again", "kind": "text"}, r"lacks|has the shape|has besides"),
    ):
        with pytest.raises(CheckpointError, match=message):
            add_plugin(folder, plugin, **options)
    assert list(list_plugins(folder)) == ["comprehension", "ct_to_mri", "of_the_base"]


def files_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def kill_before_change(monkeypatch, number, call):
    """Calls, and ends the call before it renames or removes something for the so-manieth time; whether it came so far."""
    count = itertools.count()

    def counted(method):
        def change(path, *arguments, **options):
            if path.suffix != ".lock" and next(count) == number:  # a lock stops nobody once its holder is killed
                raise KeyboardInterrupt
            return method(path, *arguments, **options)

        return change

    with monkeypatch.context() as patch:
        for name in ("rename", "unlink"):
            patch.setattr(Path, name, counted(getattr(Path, name)))
        try:
            call()
        except KeyboardInterrupt:
            return True
    return False


@pytest.mark.parametrize("published", [False, True])
def test_a_plugin_taken_out_by_an_interrupted_call_is_taken_out_by_the_same_call_again(
    folder, tmp_path, monkeypatch, published
):
    whole = files_of(folder)

    def take_out():
        extract_plugin(folder, "generation", tmp_path / "plugin", remove=True, published=published)

    take_out()
    taken_out, plugin = files_of(folder), files_of(tmp_path / "plugin")
    assert taken_out.keys() == whole.keys() - {"model-plugin_generation-00001-of-00001.safetensors"}
    for number in itertools.count():
        for place in (folder, tmp_path / "plugin"):
            shutil.rmtree(place)
        folder.mkdir()
        for name, content in whole.items():
            (folder / name).write_bytes(content)
        if not kill_before_change(monkeypatch, number, take_out):
            break
        if "model-plugin_generation-00001-of-00001.safetensors" not in files_of(folder):
            assert files_of(tmp_path / "plugin") == plugin
        take_out()
        assert (files_of(folder), files_of(tmp_path / "plugin")) == (taken_out, plugin), number
        assert {path.name for path in tmp_path.iterdir()} == {"checkpoint", "plugin"}
    assert number > 5
    with pytest.raises(CheckpointError, match="no task 'generation'; it has comprehension"):
        take_out()


def test_a_plugin_added_by_an_interrupted_call_is_added_by_the_same_call_again(folder, tmp_path, monkeypatch):
    extract_plugin(folder, "generation", tmp_path / "plugin")
    whole = files_of(folder)

    def add():
        add_plugin(folder, tmp_path / "plugin", name="other")

    add()
    added = files_of(folder)
    for number in itertools.count():
        shutil.rmtree(folder)
        folder.mkdir()
        for name, content in whole.items():
            (folder / name).write_bytes(content)
        if not kill_before_change(monkeypatch, number, add):
            break
        add()
        assert files_of(folder) == added, number
    assert number > 4


def test_the_size_in_the_index_is_that_of_all_tensors_whatever_is_taken_out_and_put_back(folder, tmp_path):
    def index():
        return json.loads((folder / "model.safetensors.index.json").read_text())

    def expected():
        return sum(tensor.nbytes for tensor in weights_of(folder).values())

    before = index()
    assert before["metadata"]["total_size"] == expected()
    extract_plugin(folder, "generation", tmp_path / "plugin", remove=True)
    assert index()["metadata"]["total_size"] == expected() < before["metadata"]["total_size"]
    add_plugin(folder, tmp_path / "plugin")
    assert index() == before
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    model.save_pretrained(tmp_path / "saved", max_shard_size="500KB")
    saved = json.loads((tmp_path / "saved/model.safetensors.index.json").read_text())
    assert saved["metadata"]["total_size"] == before["metadata"]["total_size"]


def test_a_plugin_goes_back_to_the_published_files(folder, tmp_path):
    for task, files in (("comprehension", ["com_"]), ("generation", ["gen_", "fusion_layer_weights.bin"])):
        extract_plugin(folder, task, tmp_path / task, published=True)
        names = [f"{name}hlora_weights.bin" if name.endswith("_") else name for name in files]
        assert {path.name for path in (tmp_path / task).iterdir()} == {name.removeprefix(files[0]) for name in names}
        for name in names:
            expected = torch.load(GOLDEN / "m3" / name, weights_only=True)
            written = torch.load(tmp_path / task / name.removeprefix(files[0]), weights_only=True)
            assert written.keys() == expected.keys()
            assert all(torch.equal(written[key], expected[key].to(written[key].dtype)) for key in expected)


def test_a_plugin_takes_the_place_of_another_only_when_asked(folder, tmp_path):
    case = json.loads((GOLDEN / "m3/cases.json").read_text())["cases"][4]
    extract_plugin(folder, "generation", tmp_path / "plugin")
    tensors = load_file(tmp_path / "plugin/plugin.safetensors")
    changed = {name: tensor * 2 if "lora_B" in name else tensor for name, tensor in tensors.items()}
    save_file(changed, tmp_path / "plugin/plugin.safetensors")
    with pytest.raises(
        CheckpointError, match=r"give the plugin another name \(--name\), or let it take its place \(--replace\)"
    ):
        add_plugin(folder, tmp_path / "plugin")
    add_plugin(folder, tmp_path / "plugin", replace=True)
    written = weights_of(folder)
    assert all(torch.equal(written[name], tensor) for name, tensor in changed.items())
    assert not answers(folder, case, "generation")
    save_file(tensors, tmp_path / "plugin/plugin.safetensors")
    add_plugin(folder, tmp_path / "plugin", replace=True)
    assert answers(folder, case, "generation")


def test_a_card_that_somebody_wrote_stays(folder, tmp_path):
    (folder / "README.md").write_text("Ours.")
    extract_plugin(folder, "generation", tmp_path / "plugin", remove=True)
    assert (folder / "README.md").read_text() == "Ours."


def test_a_plugin_beside_the_others_and_in_a_checkpoint_saved_as_one_file(folder, tmp_path):
    case = json.loads((GOLDEN / "m3/cases.json").read_text())["cases"][4]
    extract_plugin(folder, "generation", tmp_path / "plugin")
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    model.save_pretrained(tmp_path / "one")
    processor.save_pretrained(tmp_path / "one")
    assert (tmp_path / "one/model.safetensors").is_file()
    with pytest.raises(CheckpointError, match="shares its weight file with other parts"):
        extract_plugin(tmp_path / "one", "generation", tmp_path / "out", remove=True)
    extract_plugin(tmp_path / "one", "generation", tmp_path / "same")
    assert (
        load_file(tmp_path / "same/plugin.safetensors").keys()
        == load_file(tmp_path / "plugin/plugin.safetensors").keys()
    )
    add_plugin(tmp_path / "one", tmp_path / "plugin", name="reconstruction")
    assert list(list_plugins(tmp_path / "one")) == ["comprehension", "generation", "reconstruction"]
    assert answers(tmp_path / "one", case, "reconstruction") and answers(tmp_path / "one", case, "generation")


def test_what_does_not_fit_leaves_the_checkpoint_as_it_was(folder, tmp_path, checkpoints):
    plugin = tmp_path / "plugin"
    extract_plugin(folder, "generation", plugin)
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    tensors = load_file(plugin / "plugin.safetensors")
    first = sorted(tensors)[0]
    for change, message in (
        ({first: None}, r"does not fit the \d+ layers of .*: it lacks 1 tensor"),
        (
            {"model.projectors.generation.9.bias": torch.zeros(2)},
            r"does not fit the \d+ layers of .*: it has besides 1 tensor",
        ),
        ({first: torch.zeros(2, 2)}, r"has the shape \[2, 2\], but"),
        ({first: tensors[first] * torch.nan}, "NaN or infinite"),
        ({first: tensors[first].long()}, "holds torch.int64 instead of floating point numbers"),
    ):
        changed = {name: tensor for name, tensor in {**tensors, **change}.items() if tensor is not None}
        save_file(changed, plugin / "plugin.safetensors")
        with pytest.raises(CheckpointError, match=message):
            add_plugin(folder, plugin, name="other")
    save_file(tensors, plugin / "plugin.safetensors")
    for call, message in (
        (lambda: add_plugin(folder, plugin), "has a task 'generation' already"),
        (lambda: add_plugin(folder, plugin, name="CT to MRI"), "task's name is made of small letters"),
        (lambda: add_plugin(checkpoints("l14").folder, plugin), "no VQGAN"),
        (lambda: add_plugin(folder, tmp_path), "is no plugin: it has no plugin_config.json"),
        (
            lambda: extract_plugin(folder, "segmentation", tmp_path / "x"),
            "no task 'segmentation'; it has comprehension",
        ),
        (lambda: extract_plugin(GOLDEN / "m3/base", "generation", tmp_path / "x"), "is no HealthGPT checkpoint"),
        (lambda: list_plugins(plugin), "is no HealthGPT checkpoint: it has no config.json"),
    ):
        with pytest.raises(CheckpointError, match=message):
            call()
    with pytest.raises(CheckpointError, match="exists already"):
        extract_plugin(folder, "generation", plugin)
    for output, message in (("nowhere/x", r"The folder .*nowhere does not exist\.$"), ("x" * 300, "name too long")):
        with pytest.raises(HealthGPTError, match=message):
            extract_plugin(folder, "generation", tmp_path / output)
    for name in ("x" * 300, "x" * 240):
        with pytest.raises(CheckpointError, match="name too long"):
            add_plugin(folder, plugin, name=name)
    for call in (
        lambda: add_plugin(folder, plugin, name="other"),
        lambda: extract_plugin(folder, "generation", tmp_path / "x"),
        lambda: extract_plugin(folder, "generation", tmp_path / "x", published=True),
    ):
        with full_disk(1000), pytest.raises(CheckpointError, match="could not be written, and nothing was kept"):
            call()
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint", "plugin"}
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before
