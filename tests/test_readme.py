"""Every snippet of the README runs as it is printed, in order, in a folder that holds the files it names."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from conftest import GOLDEN
from datasets import Dataset, Features, Value
from PIL import Image
from pydicom.data import get_testdata_file

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
    (folder / "study").mkdir()
    shutil.copy(get_testdata_file("MR_small.dcm", download=False), folder / "study/IM0001")
    pair = {"instruction": "Turn this CT into an MRI.", "input_image": "ct.png", "target_image": "ct.png"}
    answer = {"task": "comprehension", "instruction": "What is this?", "response": "A CT.", "input_image": "ct.png"}
    for name, rows in (("pairs", [pair] * 2), ("both", [answer, pair | {"task": "generation"}])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    question = {"image": str(folder / "ct.png"), "question": "Is it normal?", "answer": "no"}
    features = Features({"image": datasets.Image(), "question": Value("string"), "answer": Value("string")})
    (folder / "vqa-rad/data").mkdir(parents=True)
    rows = Dataset.from_list([question] * 2, features=features)
    rows.to_parquet(folder / "vqa-rad/data/test-00000-of-00001.parquet")
    (folder / "true").mkdir()
    for number in range(2):
        Image.new("RGB", (32, 32)).save(folder / f"true/{number}.png")
    return folder


def test_shell_then_python(folder):
    shell = snippets("bash")
    assert len(shell) == 6
    program = f"{sys.executable} -c 'from healthgpt.app.cli import main; main()'"
    for script in shell:
        start = f'set -e\nhealthgpt() {{ {program} "$@"; }}\ntorchrun() {{ {sys.executable} -m torch.distributed.run "$@"; }}'
        script = f"{start}\n{script}"
        result = subprocess.run(["bash", "-c", script], cwd=folder, capture_output=True, text=True, timeout=600)
        assert result.returncode == 0, result.stderr
    assert Image.open(folder / "out.png").size == (32, 32)
    assert {path.name for path in (folder / "explained").iterdir()} == {"routing.png", "attention_0.png"}
    assert Image.open(folder / "sheet.png").height > 500
    assert (folder / "answers.csv").read_text().splitlines()[1].startswith("IM0001,Is there a pleural effusion?,")
    assert "| SSIM |" in (folder / "results/folders/results.md").read_text()
    python = snippets("python")
    assert len(python) == 7
    script = "\n".join([*python, "assert pixels.shape == (2, 3, 32, 32)"])
    result = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    for name in ("reconstruction.png", "drawn.png"):
        assert Image.open(folder / name).size == (32, 32)
    for name in ("routing.png", "attention.png"):
        assert (folder / name).is_file()


def test_every_link_inside_the_repository_leads_somewhere():
    for document in Path(__file__).parent.parent.glob("*.md"):
        for link in re.findall(r"\]\((?!https?://)([^)#]+)\)", document.read_text()):
            assert (document.parent / link).exists(), f"{document.name}: {link}"
