"""The package beside transformers: its classes are those that the Auto classes load, and what it saves stands alone."""

import json
import shutil
import subprocess
import sys

import pytest
from test_checkpoint import run_elsewhere
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor

import healthgpt
from healthgpt.configuration_healthgpt import CODE_VERSION

LOAD = """
import sys
{imports}
folder = sys.argv[1]
config, processor = AutoConfig.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
model = AutoModelForImageTextToText.from_pretrained(folder)
assert type(config) is healthgpt.HealthGPTConfig
assert type(processor) is healthgpt.HealthGPTProcessor
assert type(model) is healthgpt.HealthGPTForConditionalGeneration
"""
AUTO_CLASSES = "from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor"


@pytest.mark.parametrize(
    "imports",
    [
        f"import healthgpt\nassert 'torch' not in sys.modules\n{AUTO_CLASSES}",
        f"from healthgpt import HealthGPTForConditionalGeneration\nimport healthgpt\n{AUTO_CLASSES}",
    ],
    ids=["before transformers", "by a class"],
)
def test_whatever_is_imported_first_the_classes_are_registered(imports, checkpoints):
    command = [sys.executable, "-c", LOAD.format(imports=imports), checkpoints("l14").folder]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("trust", [None, True])
def test_checkpoints_run_with_the_code_of_the_package(checkpoints, tmp_path, trust):
    """A fix of the package reaches checkpoints that carry older code."""
    folder = tmp_path / "older"
    shutil.copytree(checkpoints("l14").folder, folder)
    for file in folder.glob("*.py"):
        file.write_text("raise AssertionError('the older code ran')\n")
    assert type(AutoConfig.from_pretrained(folder, trust_remote_code=trust)) is healthgpt.HealthGPTConfig
    assert isinstance(AutoProcessor.from_pretrained(folder, trust_remote_code=trust), healthgpt.HealthGPTProcessor)
    for auto_class in (AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM):
        model = auto_class.from_pretrained(folder, trust_remote_code=trust)
        assert isinstance(model, healthgpt.HealthGPTForConditionalGeneration)


def test_what_the_package_saves_loads_without_it(checkpoints, tmp_path):
    """Also of a model that never was a checkpoint."""
    folder = checkpoints("m3").folder
    processor = healthgpt.HealthGPTProcessor.from_pretrained(folder)
    model = healthgpt.HealthGPTForConditionalGeneration(healthgpt.HealthGPTConfig.from_pretrained(folder))
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    script = """
        import sys
        from transformers import AutoProcessor, pipeline
        draw = pipeline("any-to-any", sys.argv[1], trust_remote_code=True)
        print(draw(text=[{"role": "user", "content": [{"type": "text", "text": "Draw."}]}], generation_mode="image"))
    """
    result = run_elsewhere(script, tmp_path / "saved", tmp_path)
    assert result.returncode == 0 and "PIL.Image" in result.stdout, result.stderr


@pytest.mark.parametrize(
    "auto_class, name",
    [(AutoConfig, "config.json"), (AutoModel, "config.json"), (AutoProcessor, "processor_config.json")],
)
def test_a_checkpoint_with_newer_code_is_refused(checkpoints, tmp_path, auto_class, name):
    folder = tmp_path / "newer"
    shutil.copytree(checkpoints("l14").folder, folder)
    content = json.loads((folder / name).read_text())
    assert content["code_version"] == CODE_VERSION
    (folder / name).write_text(json.dumps(content | {"code_version": CODE_VERSION + 1}))
    with pytest.raises(healthgpt.HealthGPTError, match=f"version {CODE_VERSION + 1} .* is version {CODE_VERSION}"):
        auto_class.from_pretrained(folder)
    for version in ("x", None, 1.5):
        (folder / name).write_text(json.dumps(content | {"code_version": version}))
        with pytest.raises(healthgpt.HealthGPTError, match="code_version"):
            auto_class.from_pretrained(folder)
    del content["code_version"]  # as the first exports
    (folder / name).write_text(json.dumps(content))
    loaded = auto_class.from_pretrained(folder)
    settings = loaded.config if auto_class is AutoModel else loaded
    assert settings.to_dict()["code_version"] == CODE_VERSION
