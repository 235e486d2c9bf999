"""Every snippet of the README runs as it is printed, in order, in a folder that holds the files it names."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import GOLDEN
from PIL import Image

README = (Path(__file__).parent.parent / "README.md").read_text()


def snippets(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The published files under the names that the README gives them."""
    folder = tmp_path_factory.mktemp("readme")
    names = {"base": "Phi-3-mini-4k-instruct", "vit": "clip-vit-large-patch14-336", "vqgan/last.ckpt": "last.ckpt"}
    names |= {f"{name}_weights.bin": f"{name}_weights.bin" for name in ("com_hlora", "gen_hlora", "fusion_layer")}
    for source, name in (names | {"vqgan/model.yaml": "model.yaml"}).items():
        source = GOLDEN / "m3" / source
        (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / name)
    for name in ("ct.png", "retina.png"):
        shutil.copy(GOLDEN / "images" / name, folder / name)
    return folder


def test_shell_then_python(folder):
    shell = snippets("bash")
    assert len(shell) == 3
    program = f"{sys.executable} -c 'from healthgpt.app.cli import main; main()'"
    for script in shell:
        script = f'set -e\nhealthgpt() {{ {program} "$@"; }}\n{script}'
        result = subprocess.run(["bash", "-c", script], cwd=folder, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr
    assert Image.open(folder / "out.png").size == (32, 32)
    python = snippets("python")
    assert len(python) == 5
    script = "\n".join([*python, "assert pixels.shape == (2, 3, 32, 32)"])
    result = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    for name in ("reconstruction.png", "drawn.png"):
        assert Image.open(folder / name).size == (32, 32)


def test_every_link_inside_the_repository_leads_somewhere():
    for document in Path(__file__).parent.parent.glob("*.md"):
        for link in re.findall(r"\]\((?!https?://)([^)#]+)\)", document.read_text()):
            assert (document.parent / link).exists(), f"{document.name}: {link}"
