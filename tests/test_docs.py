"""Every snippet of the README and of the documentation runs as it is printed, and the site can be built."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import datasets
import nbformat
import pytest
from conftest import GOLDEN
from datasets import Dataset, Features, Value
from hub_server import TOKEN
from hub_server import serve as serve_hub
from nbclient import NotebookClient
from PIL import Image
from pydicom.data import get_testdata_file
from snippets import read_snippets
from transformers.utils import is_torchao_available
from warm import programs

from healthgpt.app.common import EXTRA_OF
from healthgpt.samples import FIELDS

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
TEXTS = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
PAGES = [page for page in TEXTS if read_snippets(page)]
# The lines of blocks labelled `console`, which are not run: they install, start these tests, or serve until Ctrl-C.
NOT_RUN = {"make demo", "make test", "make docs", "pip install .", "pip install .[export]", "pip install .[ui]"}
NOT_RUN |= {"healthgpt ui -c HealthGPT-M3"}
NOT_RUN |= {  # these need a GPU
    'healthgpt draw -c HealthGPT-M3 slice.png "Reconstruct the image." -o out.png --compile',
    'healthgpt draw -c HealthGPT-M3 slice.png "Reconstruct the image." -o out.png --openvino',
    'healthgpt ask -c HealthGPT-M3 study "Is there a pleural effusion?" -o answers.csv --compile',
    'healthgpt ask -c HealthGPT-M3 study "Is there a pleural effusion?" -o answers.csv --openvino',
}


def marked(page):
    apart = page.stem == "torchao" and not is_torchao_available()
    reason = "torchao stands apart: make test-torchao"
    return pytest.param(page, id=page.stem, marks=pytest.mark.skipif(apart, reason=reason))


# What the snippets of a page leave behind.
MADE = {
    "README": (
        "out.png",
        "reconstruction.png",
        "drawn.png",
        "sheet.png",
        "answers.csv",
        "explained/routing.png",
        "explained/attention_0.png",
        "results/folders/results.md",
        "fused/generation/plugin.safetensors",
    ),
    "draw": ("drawn.png", "chest.png"),
    "export": (
        "HealthGPT-tiny/README.md",
        "HealthGPT-tiny-answers/config.json",
        "generation-plugin/plugin.safetensors",
    ),
    "quantise": ("nano-8bit/config.json", "HealthGPT-tiny-8bit/config.json"),
    "train": ("drawn.png", "more/mri_to_ct/plugin.safetensors"),
    "evaluate": ("results/answers/results.md", "results/drawing/results.md", "results/folders/results.json"),
}


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Environment in which snippets run: commands that start at once, and a Hub on loopback."""
    folder = tmp_path_factory.mktemp("programs")
    with serve_hub() as hub:
        environment = os.environ | {
            "HF_ENDPOINT": hub.url,
            "HF_TOKEN": TOKEN,
            "HF_HOME": str(folder / "hub"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "PATH": f"{folder}:{os.environ['PATH']}",
            "COLUMNS": "120",
        }
        del environment["HF_HUB_OFFLINE"]
        with programs(folder, environment):
            yield environment


@pytest.fixture
def folder(tmp_path):
    """What lies in a clone, the published files under the names that the README gives them, and data of each form."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "nano").symlink_to(ROOT / "nano")
    (tmp_path / "tests/golden").symlink_to(GOLDEN)
    names = {"base": "Phi-3-mini-4k-instruct", "vit": "clip-vit-large-patch14-336", "vqgan/last.ckpt": "last.ckpt"}
    names |= {f"{name}_weights.bin": f"{name}_weights.bin" for name in ("com_hlora", "gen_hlora", "fusion_layer")}
    for source, name in (names | {"vqgan/model.yaml": "model.yaml"}).items():
        (tmp_path / name).symlink_to(GOLDEN / "m3" / source)
    for name in ("ct.png", "retina.png"):
        shutil.copy(GOLDEN / "images" / name, tmp_path / name)
    (tmp_path / "study").mkdir()
    shutil.copy(get_testdata_file("MR_small.dcm", download=False), tmp_path / "study/IM0001")
    pair = {"instruction": "Turn this CT into an MRI.", "input_image": "ct.png", "target_image": "ct.png"}
    answer = {"task": "comprehension", "instruction": "What is this?", "response": "A CT.", "input_image": "ct.png"}
    for name, rows in (("pairs", [pair] * 2), ("both", [answer, pair | {"task": "generation"}])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    question = {"image": str(tmp_path / "ct.png"), "question": "Is it normal?", "answer": "no"}
    features = Features({"image": datasets.Image(), "question": Value("string"), "answer": Value("string")})
    (tmp_path / "vqa-rad/data").mkdir(parents=True)
    rows = Dataset.from_list([question] * 2, features=features)
    rows.to_parquet(tmp_path / "vqa-rad/data/test-00000-of-00001.parquet")
    (tmp_path / "true").mkdir()
    for number in range(2):
        Image.new("RGB", (32, 32)).save(tmp_path / f"true/{number}.png")
    return tmp_path


@pytest.mark.parametrize("page", [marked(page) for page in PAGES])
def test_snippets_run_as_printed(page, folder, environment):
    command = ["python", Path(__file__).parent / "snippets.py", page]
    with subprocess.Popen(
        command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True, process_group=0
    ) as run:
        try:
            errors = run.communicate(timeout=300)[1]
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(run.pid, signal.SIGKILL)  # what a page left running in the background
    assert run.returncode == 0, errors
    for name in MADE.get(page.stem, ()):
        assert (folder / name).is_file(), name
    for picture in folder.glob("*.png"):
        assert Image.open(picture).getbbox() is not None, f"{picture.name} is empty"


def test_no_snippet_is_passed_over():
    console = set()
    for page in TEXTS:
        text = page.read_text()
        fences = re.findall(r"^ *(?:```|~~~) *(\w*)", text, flags=re.MULTILINE)
        languages, ends = fences[::2], fences[1::2]
        assert set(languages) <= {"bash", "console", "json", "python", "text"} and not any(ends), page
        assert len(read_snippets(page)) == languages.count("bash") + languages.count("python"), page
        for language, code in re.findall(
            r"^ *``` *(console|json)\n(.*?)^ *```$", text, flags=re.DOTALL | re.MULTILINE
        ):
            if language == "json":  # samples
                assert all(set(json.loads(line)) <= set(FIELDS) for line in code.splitlines()), page
            else:
                console |= {line.split("#")[0].strip() for line in code.splitlines()}
    assert console == NOT_RUN


def test_every_extra_that_is_named_exists():
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    extras = set(setup["options.extras_require"])
    named = {page: set(re.findall(r"pip install [\w.]+\[(\w+)\]", page.read_text())) for page in TEXTS}
    assert set().union(EXTRA_OF.values(), *named.values()) <= extras
    index = re.findall(r"^\| `pip install \.\[(\w+)\]`", (DOCS / "index.md").read_text(), flags=re.MULTILINE)
    assert set(index) == extras - {"dev"}


@pytest.mark.parametrize(
    ("name", "check"),
    [("ask", "assert answer == 'CT' and right >= 15"), ("draw", "assert similarity['SSIM'] > 85 and chest.getbbox()")],
)
def test_notebooks_run_and_are_stored_without_output(name, check, tmp_path):
    notebook = nbformat.read(DOCS / f"notebooks/{name}.ipynb", as_version=4)
    assert not any(cell.outputs for cell in notebook.cells if cell.cell_type == "code")
    notebook.cells.append(nbformat.v4.new_code_cell(check))
    NotebookClient(notebook, timeout=300, startup_timeout=300, resources={"metadata": {"path": tmp_path}}).execute()


def test_the_site_is_built_without_a_warning_and_loads_nothing_from_elsewhere(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    pages = {page.relative_to(tmp_path): page.read_text(encoding="utf-8") for page in tmp_path.rglob("*.html")}
    assert not [name for name, text in pages.items() if re.search(r'(?:src|<link[^>]* href)="?(?:https?:)?//', text)]
    assert 'id="healthgpt.training.trainer.HealthGPTTrainer"' in pages[Path("reference/training/index.html")]


def test_every_link_of_the_front_pages_leads_somewhere():
    for document in ROOT.glob("*.md"):
        for link in re.findall(r"\]\((?!https?://)([^)#]+)\)", document.read_text()):
            assert (document.parent / link).exists(), f"{document.name}: {link}"
