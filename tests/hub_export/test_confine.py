"""Names and links that come with a checkpoint, a plugin or sources lead nowhere but into its own folder."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import GOLDEN, refused, sources_of, weights_of
from safetensors.torch import load_file, save_file

from healthgpt.app.common import load, require_checkpoint
from healthgpt.errors_healthgpt import HealthGPTError
from healthgpt.hub_export import CheckpointError, export, push
from healthgpt.hub_export.checkpoint import list_plugins, read_record
from healthgpt.hub_export.families import build_tokenizer
from healthgpt.hub_export.plugins import add_plugin, extract_plugin

INDEX, PLUGIN_FILE = "model.safetensors.index.json", "model-plugin_generation-00001-of-00001.safetensors"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"


@pytest.fixture
def folder(checkpoints, tmp_path):
    """A checkpoint, and next to it `outside` with a file that looks like that of its plugin."""
    shutil.copytree(checkpoints("m3").folder, tmp_path / "checkpoint")
    (tmp_path / "outside").mkdir()
    shutil.copy(tmp_path / "checkpoint" / PLUGIN_FILE, tmp_path / "outside/victim.safetensors")
    return tmp_path / "checkpoint"


def state(folder):
    return {path: path.is_file() and (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*")}


def change(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def commands(folder, tmp_path):
    """All that reads, loads or changes a checkpoint."""
    plugin = tmp_path / "checkpoint-plugin"
    return [
        lambda: list_plugins(folder),
        lambda: extract_plugin(folder, "generation", tmp_path / "out"),
        lambda: extract_plugin(folder, "generation", tmp_path / "out", remove=True),
        lambda: add_plugin(folder, plugin, name="other"),
        lambda: load(str(folder), "cpu", None),
        lambda: require_checkpoint(str(folder)),
    ]


@pytest.mark.parametrize("name", ["../outside/victim.safetensors", "ABSOLUTE", "x/../../outside/victim.safetensors"])
def test_an_index_that_leads_out_of_its_folder_is_refused_by_all_that_read_it(folder, tmp_path, name):
    extract_plugin(folder, "generation", tmp_path / "checkpoint-plugin")
    name = str(tmp_path / "outside/victim.safetensors") if name == "ABSOLUTE" else name
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    change(folder / INDEX, weight_map={key: name if file == PLUGIN_FILE else file for key, file in weight_map.items()})
    before = state(tmp_path)
    for command in commands(folder, tmp_path):
        with pytest.raises(HealthGPTError, match=r"outside/victim\.safetensors"):
            command()
    assert state(tmp_path) == before


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", PLUGIN_FILE, "README.md", "config.json.unfinished"])
@pytest.mark.parametrize("target", ["../outside/", "ABSOLUTE", "between"])
def test_a_link_that_leaves_its_folder_is_refused_by_all_that_read_it(folder, tmp_path, file, target):
    extract_plugin(folder, "generation", tmp_path / "checkpoint-plugin")
    outside = tmp_path / "outside" / file
    if (folder / file).exists():
        shutil.move(folder / file, outside)
    target = {"between": "between", "ABSOLUTE": outside}.get(target, target + file)
    if target == "between":
        (folder / "between").symlink_to(outside)
    (folder / file).symlink_to(target)
    before = state(tmp_path)
    for command in [*commands(folder, tmp_path), lambda: push(folder, "user/name")]:
        with pytest.raises(HealthGPTError, match="is a symbolic link"):
            command()
    assert state(tmp_path) == before


def test_only_the_file_of_the_task_is_ever_removed(folder, tmp_path):
    """Whatever the index says: a file of the folder that holds something else stays."""
    content = (folder / INDEX).read_text()
    weight_map = json.loads(content)["weight_map"]
    owned = [key for key, file in weight_map.items() if file == PLUGIN_FILE]
    shutil.copy(folder / PLUGIN_FILE, folder / "copy.safetensors")
    for files in (dict.fromkeys(owned, "config.json"), dict.fromkeys(owned, "copy.safetensors"), {owned[0]: "gone"}):
        change(folder / INDEX, weight_map=weight_map | files)
        before = state(tmp_path)
        with pytest.raises(CheckpointError, match=r"config\.json|shares its weight file|gone does not exist"):
            extract_plugin(folder, "generation", tmp_path / "out", remove=True)
        assert state(tmp_path) == before
    lacking = {key: file for key, file in weight_map.items() if key != owned[0]}
    change(folder / INDEX, weight_map=lacking)
    with pytest.raises(CheckpointError, match="lacks 1 tensor"):
        extract_plugin(folder, "generation", tmp_path / "out", remove=True)
    (folder / INDEX).write_text(content)
    tensors = load_file(folder / PLUGIN_FILE)
    for changed, said in (
        (tensors | {"more": torch.zeros(1)}, "shares its weight file"),
        ({key: tensors[key] for key in owned[1:]}, "lacks 1 tensor"),
    ):
        save_file(changed, folder / PLUGIN_FILE)
        before = state(tmp_path)
        with pytest.raises(CheckpointError, match=said):
            extract_plugin(folder, "generation", tmp_path / "out", remove=True)
        assert state(tmp_path) == before


def test_a_record_names_for_the_upload_only_what_is_in_the_folder(folder, tmp_path):
    files = json.loads((folder / "healthgpt_export.json").read_text())["files"]
    for name in ("../outside/victim.safetensors", str(tmp_path / "outside/victim.safetensors"), "*", "..", 5, None):
        change(folder / "healthgpt_export.json", files=[*files, name])
        before = state(tmp_path)
        for call in (
            lambda: push(folder, "user/name"),
            lambda: extract_plugin(folder, "generation", tmp_path / "out", remove=True),
        ):
            with pytest.raises(CheckpointError, match=r"healthgpt_export\.json cannot be used: it names the file"):
                call()
        assert state(tmp_path) == before


@pytest.mark.parametrize(
    ("file", "setting"),
    [
        ("config.json", {"transformers_weights": "../outside/victim.safetensors"}),
        ("config.json", {"configuration_files": ["../outside/config.4.0.0.json"]}),
        ("tokenizer_config.json", {"tokenizer_file": "../outside/tokenizer.json"}),
        ("config.json", {"tasks": "TABLES"}),
        ("pytorch_model.bin.index.json", {"weight_map": {"lm_head.weight": "../outside/model.bin"}}),
    ],
)
def test_settings_that_lead_out_of_the_folder(folder, tmp_path, file, setting):
    if setting == {"tasks": "TABLES"}:
        tasks = json.loads((folder / file).read_text())["tasks"]
        tasks["generation"]["token_tables"] = "../outside"
        setting = {"tasks": tasks}
    (folder / file).touch()
    (folder / file).write_text((folder / file).read_text() or "{}")
    change(folder / file, **setting)
    with pytest.raises(ValueError, match=r"\.\./outside"):  # of the checkpoint's own code, or of the package
        load(str(folder), "cpu", None)


def test_an_adapter_that_names_another_model(folder, tmp_path):
    settings = {"base_model_name_or_path": str(tmp_path / "outside"), "peft_type": "LORA"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(HealthGPTError, match=r"adapter_config\.json"):
        load(str(folder), "cpu", None)


def test_a_chat_template_that_is_a_link_out_of_its_folder(folder, tmp_path):
    (tmp_path / "outside/other.jinja").write_text("secret")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/other.jinja").symlink_to("../../outside/other.jinja")
    with pytest.raises(HealthGPTError, match=r"other\.jinja is a symbolic link that leaves its folder"):
        load(str(folder), "cpu", None)


def test_a_plugin_leads_nowhere_else(folder, tmp_path):
    plugin = tmp_path / "plugin"
    extract_plugin(folder, "generation", plugin)
    content = (plugin / "plugin_config.json").read_text()
    task = json.loads(content)["task"]
    before = state(folder)
    for changes, options in (
        ({"name": "../outside"}, {}),
        ({"name": "../outside"}, {"name": "other"}),
        ({"name": ["x"]}, {}),
        ({}, {"name": "../outside"}),
        ({"task": task | {"token_tables": "../outside"}}, {"name": "other"}),
        ({"task": task | {"token_tables": "a.b"}}, {"name": "other"}),
    ):
        change(plugin / "plugin_config.json", **changes)
        with pytest.raises(CheckpointError, match=r"made of small letters|plugin_config\.json cannot be used"):
            add_plugin(folder, plugin, **options)
        (plugin / "plugin_config.json").write_text(content)
    for file in plugin.iterdir():
        shutil.move(file, tmp_path / "outside" / file.name)
        file.symlink_to(tmp_path / "outside" / file.name)
        with pytest.raises(CheckpointError, match="is a symbolic link that leaves its folder"):
            add_plugin(folder, plugin, name="other")
        file.unlink()
        shutil.move(tmp_path / "outside" / file.name, file)
    for task_name in ("../outside/x", "..", "x" * 300):
        with pytest.raises(CheckpointError, match="has no task"):
            extract_plugin(folder, task_name, tmp_path / "out")
    assert state(folder) == before
    add_plugin(folder, plugin, name="other")


@pytest.mark.parametrize(
    "prompt", ["See <image>.", "x<|end|>", "<idx_5>", "<start_index>", "<pixel_newline>", ["x"], 5]
)
def test_a_default_prompt_has_no_special_tokens(folder, tmp_path, prompt):
    extract_plugin(folder, "generation", tmp_path / "plugin")
    config = tmp_path / "plugin/plugin_config.json"
    task = json.loads(config.read_text())["task"]
    change(config, task=task | {"default_prompt": prompt})
    before = state(folder)
    with pytest.raises(CheckpointError, match=r"default_prompt (of .*plugin has <|must be a text)"):
        add_plugin(folder, tmp_path / "plugin", name="other")
    assert state(folder) == before
    change(config, task=task | {"default_prompt": "Is 1 < 2 in this <x> image?"})
    add_plugin(folder, tmp_path / "plugin", name="other")


@pytest.mark.parametrize("remove", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("part", ["base", "vit"])
def test_a_source_that_is_a_link_out_of_its_folder(files, part, remove):
    sources, output = files
    path = output.parent / "m3" / part / remove
    shutil.move(path, output.parent / "m3" / remove)
    path.symlink_to(f"../{remove}")
    refused(sources, output, f"{part}/{remove} is a symbolic link that leaves its folder")
    path.unlink()
    shutil.move(output.parent / "m3" / remove, path.with_name(f"real_{remove}"))
    path.symlink_to(f"real_{remove}")
    export(sources, output, skip_forward=True)


def in_the_cache(folder, cache, shared):
    """The files of a folder as the Hub's cache has them: links to blobs, these links too if repositories share them."""
    repository = cache / "models--user--name"
    snapshot = repository / "snapshots/0123456789abcdef"
    for path in (snapshot, repository / "blobs", cache / "blobs/ab"):
        path.mkdir(parents=True)
    for number, path in enumerate(sorted(folder.iterdir())):
        blob = repository / "blobs" / f"{number:040x}"
        if shared:
            shutil.copy(path, cache / f"blobs/ab/{number:064x}")
            blob.symlink_to(f"../../blobs/ab/{number:064x}")
        else:
            shutil.copy(path, blob)
        (snapshot / path.name).symlink_to(f"../../blobs/{blob.name}")
    return snapshot


@pytest.mark.parametrize("shared", [False, True])
def test_snapshots_of_the_hubs_cache_are_read_and_never_written(folder, tmp_path, shared):
    base = in_the_cache(GOLDEN / "m3/base", tmp_path / "hub", shared)
    export(replace(sources_of(GOLDEN / "m3"), base=base), tmp_path / "out", skip_forward=True)
    written, expected = weights_of(tmp_path / "out"), weights_of(folder)
    assert all(torch.equal(written[name], expected[name]) for name in expected)
    snapshot = in_the_cache(folder, tmp_path / "other", shared)
    before = state(tmp_path / "other")
    assert list(list_plugins(snapshot)) == ["comprehension", "generation"]
    extract_plugin(snapshot, "generation", tmp_path / "plugin")
    load(str(snapshot), "cpu", None)
    for call in (
        lambda: extract_plugin(snapshot, "generation", tmp_path / "again", remove=True),
        lambda: add_plugin(snapshot, tmp_path / "plugin", name="other"),
        lambda: push(snapshot, "user/other"),
    ):
        with pytest.raises(CheckpointError, match="is a symbolic link, and a folder with links is not changed"):
            call()
    assert state(tmp_path / "other") == before
    (snapshot / "README.md").unlink()
    (snapshot / "README.md").symlink_to("../../blobs/../../../outside/victim.safetensors")
    with pytest.raises(CheckpointError, match="leaves its folder"):
        list_plugins(snapshot)


def test_nothing_is_written_where_the_folder_of_an_unfinished_export_is_a_link_or_has_some(files):
    sources, output = files
    outside, partial = output.parent / "m3/outside", output.parent / ".out.partial"
    outside.mkdir()
    (outside / "notes.txt").write_text("mine")
    partial.symlink_to(outside)
    with pytest.raises(CheckpointError, match="is a symbolic link"):
        export(sources, output)
    partial.unlink()
    partial.mkdir()
    (partial / "model-00001-of-00001.unfinished").symlink_to(outside / "notes.txt")
    with pytest.raises(CheckpointError, match="is a symbolic link"):
        export(sources, output)
    assert [path.name for path in outside.iterdir()] == ["notes.txt"] and (outside / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    "name", [PLUGIN_FILE, INDEX, "config.json", "tokenizer.json", "processor_config.json", "chat_template.jinja"]
)
def test_what_git_lfs_left_of_a_file_is_named(folder, name):
    (folder / name).write_text(POINTER)
    with pytest.raises(HealthGPTError, match=f"{name} is only git-lfs's pointer"):
        load(str(folder), "cpu", None)
    if name in (PLUGIN_FILE, INDEX, "config.json"):
        with pytest.raises(CheckpointError, match=f"{name} is only git-lfs's pointer"):
            list_plugins(folder)


@pytest.mark.parametrize("name", ["base/model.safetensors", "gen_hlora_weights.bin", "base/tokenizer.model"])
def test_a_source_that_git_lfs_left_is_named(files, name):
    sources, output = files
    (output.parent / "m3" / name).write_text(POINTER)
    refused(sources, output, f"{name} is only git-lfs's pointer")


def test_a_damaged_or_missing_shard_is_named(folder, tmp_path):
    for damage in (lambda file: os.truncate(file, 1000), lambda file: os.truncate(file, 0), Path.unlink):
        shutil.copytree(folder, tmp_path / "damaged")
        damage(tmp_path / "damaged" / PLUGIN_FILE)
        with pytest.raises(HealthGPTError, match=PLUGIN_FILE):
            load(str(tmp_path / "damaged"), "cpu", None)
        for call in (
            list_plugins,
            lambda damaged: extract_plugin(damaged, "generation", tmp_path / "out", remove=True),
        ):
            with pytest.raises(CheckpointError, match=PLUGIN_FILE):
                call(tmp_path / "damaged")
        shutil.rmtree(tmp_path / "damaged")


@pytest.mark.parametrize(
    ("place", "call"),
    [
        ("confine.inside", lambda folder, sources: list_plugins(folder)),
        ("confine.require_no_pointer", lambda folder, sources: list_plugins(folder)),
        ("checkpoint.inside", lambda folder, sources: read_record(folder)),
        ("families._sentencepiece", lambda folder, sources: build_tokenizer(sources)),
    ],
)
def test_a_mistake_of_programming_is_not_shown_as_a_bad_file(folder, monkeypatch, place, call):
    (folder / "link.txt").symlink_to("config.json")  # within the folder
    call(folder, GOLDEN / "m3/base")

    def mistaken(*args):
        raise TypeError("a mistake of programming")

    monkeypatch.setattr(f"healthgpt.hub_export.{place}", mistaken)
    with pytest.raises(TypeError, match="a mistake of programming"):
        call(folder, GOLDEN / "m3/base")
