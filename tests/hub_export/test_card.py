"""The model card of an exported checkpoint, and that its snippet runs as written."""

import contextlib
import io
import re
from dataclasses import replace

import pytest
from conftest import GOLDEN, sources_of
from huggingface_hub import ModelCard

from healthgpt.hub_export import CheckpointError, export
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
