"""The model card of an exported checkpoint, and that its snippet runs as written."""

import ast
import contextlib
import io
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import GOLDEN, refused, sources_of
from huggingface_hub import ModelCard

from healthgpt.configuration_healthgpt import HealthGPTConfig
from healthgpt.errors_healthgpt import HealthGPTError
from healthgpt.hub_export import CheckpointError, export
from healthgpt.hub_export.card import build_card
from healthgpt.hub_export.plugins import extract_plugin
from healthgpt.hub_export.presets import PRESETS


@pytest.fixture
def of_size(monkeypatch):
    """The golden M3 counts as the published one."""
    preset = replace(PRESETS["m3"], sizes=(2, 64))
    monkeypatch.setitem(PRESETS, "m3", preset)


def test_the_card_says_what_the_checkpoint_is_and_its_snippet_runs(tmp_path, monkeypatch, of_size):
    export(sources_of(GOLDEN / "m3"), tmp_path / "tiny", preset="m3")
    card = ModelCard.load(tmp_path / "tiny/README.md")
    assert card.data.pipeline_tag == "any-to-any" and card.data.library_name == "transformers"
    assert card.data.license == "mit" and card.data.base_model == "microsoft/Phi-3-mini-4k-instruct"
    assert "| `generation` | image | 32 | 64 | 4 | 1 |" in card.text
    assert "weights only reconstruct" in card.text and "not a medical device" in card.text
    assert "| VQA-RAD | closed / all | 73.7 / 55.9 |" in card.text
    assert card.text.count("com_hlora_weights.bin") == 1
    [snippet] = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(snippet, {})
    assert printed.getvalue().strip() and (tmp_path / "drawn.png").is_file()


def test_a_preset_is_claimed_only_for_files_of_its_size(tmp_path):
    message = "not those of HealthGPT-L14, whose language model has 40 layers of width 5120: this one has 2 of 64"
    with pytest.raises(CheckpointError, match=message):
        export(sources_of(GOLDEN / "m3"), tmp_path / "tiny", preset="l14")
    assert not list(tmp_path.iterdir())


def test_a_quantised_checkpoint_says_so(tmp_path):
    export(sources_of(GOLDEN / "m3"), tmp_path / "tiny", quantize="8bit", skip_forward=True)
    text = (tmp_path / "tiny/README.md").read_text()
    assert "It needs torch, transformers 5, accelerate, bitsandbytes and Pillow" in text
    assert "Then bitsandbytes stored the linears of the language model in 8 bits" in text


def test_without_a_preset_nothing_is_claimed(tmp_path):
    export(sources_of(GOLDEN / "l14"), tmp_path / "tiny")
    card = ModelCard.load(tmp_path / "tiny/README.md")
    assert card.data.license == "other" and card.data.base_model is None
    assert card.data.pipeline_tag == "image-text-to-text"
    assert "It cannot draw" in card.text and "Published results" not in card.text


NAMES = [
    'x"); print("run',
    "a\\",
    'a\\"',
    "a\nb\n```\n---\nlicense: mit\n---\n# New",
    "{name} {0}",
    "``` | `x` <b>&lt;",
    "\u202ex\u2028",
    "é 1",
]


def read_card(folder):
    """A card in its parts: front matter, the source of its snippet and the names that the snippet loads, headings, rows of sources."""
    card = ModelCard.load(folder / "README.md")
    [snippet] = re.findall(r"^```python\n(.*?)^```$", card.text, re.DOTALL | re.MULTILINE)
    calls = [node for node in ast.walk(ast.parse(snippet)) if isinstance(node, ast.Call)]
    calls = [call for call in calls if getattr(call.func, "attr", "") == "from_pretrained"]
    headings = re.findall(r"^#+ .*", card.text, re.MULTILINE)
    rows = [line for line in card.text.split("| source | bytes | SHA-256 |")[1].splitlines() if line.startswith("| ")]
    return card.data.to_dict(), [call.args[0].value for call in calls], headings, rows, snippet.splitlines()


@pytest.mark.parametrize("name", NAMES)
def test_no_name_of_a_folder_can_put_anything_into_the_card(tmp_path, name):
    shutil.copytree(GOLDEN / "m3", tmp_path / "m3")
    (tmp_path / "m3/base").rename(tmp_path / "m3" / name)
    sources = sources_of(GOLDEN / "m3")
    export(replace(sources, base=tmp_path / "m3" / name), tmp_path / name, skip_forward=True)
    export(sources, tmp_path / "plain", skip_forward=True)
    data, loaded, headings, rows, snippet = read_card(tmp_path / name)
    plain = read_card(tmp_path / "plain")
    assert data == plain[0] and loaded == [name, name] and plain[1] == ["plain", "plain"]
    assert len(snippet) == len(plain[4]) and headings[1:] == plain[2][1:]
    unescaped = [re.sub(r"\\[\\`*|<>&~#!$\[\]]", "", row) for row in rows]
    assert len(rows) == len(plain[3]) and all(row.count("|") == 4 and row.count("`") == 2 for row in unescaped)
    assert not re.search(r"(?<!\\)[<`]", headings[0].replace("\\\\", ""))

    # What a record says later gets no further.
    file = tmp_path / name / "healthgpt_export.json"
    record = json.loads(file.read_text())
    spoilt = {"base_model": f"x\n---\n{name}", "versions": {name: f"1 {name}"}, "name": name}
    file.write_text(json.dumps(record | spoilt))
    (tmp_path / name / "README.md").write_text(
        build_card(HealthGPTConfig.from_pretrained(tmp_path / name), record | spoilt)
    )
    extract_plugin(tmp_path / name, "generation", tmp_path / "plugin", remove=True)
    data, loaded, headings, rows, _ = read_card(tmp_path / name)
    assert data == plain[0] | {"pipeline_tag": "image-text-to-text"}
    assert loaded == [name, name] and headings[1:] == plain[2][1:]
    assert len(rows) == len(plain[3]) - 2  # without those of the plugin


def test_names_too_long_for_the_file_system(files):
    sources, output = files
    for path in (output.with_name("x" * 250), output.with_name("x" * 300), output.joinpath(*["x" * 200] * 30)):
        with pytest.raises(HealthGPTError, match=r"(?i)name too long"):
            export(sources, path)
    for changes in ({"base": "y" * 300}, {"comprehension": "y" * 300}, {"vqgan_config": "y" * 300}):
        refused(replace(sources, **changes), output, "yyyy")


def test_a_folder_that_nothing_can_be_written_to(files, checkpoints):
    with pytest.raises(HealthGPTError, match="/proc/out could not be written"):
        export(files[0], "/proc/out")
    with pytest.raises(HealthGPTError, match="/proc/out could not be written"):
        extract_plugin(checkpoints("m3").folder, "generation", Path("/proc/out"))
