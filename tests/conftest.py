"""Checkpoints for the tests: the golden ones and a second set of other sizes, each exported once per run."""

import json
import os
import resource
import shutil
import signal
import subprocess
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor
from warm import programs

from healthgpt.benchmarks.gpu import sources_of
from healthgpt.hub_export import CheckpointError, export

GOLDEN = Path(__file__).parent / "golden"
CHECKPOINTS = ["m3", "l14", "xl32", "made_m3", "made_l14", "made_xl32"]


def pictures_of(case):
    names = case["image"] or []
    return [Image.open(GOLDEN / f"images/{name}.png") for name in ([names] if isinstance(names, str) else names)]


@dataclass
class Checkpoint:
    """A checkpoint in the published files, what it must give, and the exported folder."""

    name: str
    source: Path
    folder: Path

    def __post_init__(self):
        self.content = json.loads((self.source / "cases.json").read_text())
        self.cases = self.content["cases"]
        self.expected = load_file(self.source / "expected.safetensors")


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """Checkpoints by name, made and exported when first asked for."""
    made = {}

    def get(name: str) -> Checkpoint:
        if name not in made:
            source = GOLDEN / name
            if not source.exists():
                from make_checkpoint import make

                source = tmp_path_factory.mktemp("made") / name
                make(source, name)
            folder = tmp_path_factory.mktemp("exported") / name
            export(sources_of(source), folder)
            made[name] = Checkpoint(name, source, folder)
        return made[name]

    return get


@pytest.fixture(scope="session")
def healthgpt(tmp_path_factory):
    """Runs a command as a user types it, without the time of its imports."""
    folder = tmp_path_factory.mktemp("programs")

    def run(*arguments) -> subprocess.CompletedProcess:
        command = [folder / "healthgpt", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=300)

    with programs(folder, dict(os.environ)):
        yield run


@pytest.fixture(scope="module")
def m3(checkpoints):
    """The golden M3 checkpoint, its model and its processor, loaded as a user loads them."""
    checkpoint = checkpoints("m3")
    model = AutoModelForImageTextToText.from_pretrained(checkpoint.folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(checkpoint.folder, trust_remote_code=True)
    return checkpoint, model, processor


def continuation(sequences, prompt_length, case):
    """The ids that one row wrote, without what follows its end in a batch."""
    return sequences[prompt_length:][: len(case["generated_ids"])].tolist()


def cases_of(checkpoint, *names):
    return [next(case for case in checkpoint.cases if case["name"] == name) for name in names]


@pytest.fixture
def files(tmp_path):
    """A copy of the golden M3 files that a test may spoil, and where to export them."""
    shutil.copytree(GOLDEN / "m3", tmp_path / "m3")
    return sources_of(tmp_path / "m3"), tmp_path / "out"


def refused(sources, output, message, **options):
    """Exports, expects one clear sentence, and that nothing was written beside the sources."""
    before = {path for path in output.parent.rglob("*") if "m3" not in path.parts}
    with pytest.raises(CheckpointError, match=message) as error:
        export(sources, output, **options)
    assert "\n" not in str(error.value)
    assert {path for path in output.parent.rglob("*") if "m3" not in path.parts} == before


@contextmanager
def full_disk(nbytes: int = 2**20):
    """Meanwhile writing a file past so many bytes fails as on a full disk."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, whatever files they lie in."""
    return {
        name: tensor for path in sorted(folder.glob("model*.safetensors")) for name, tensor in load_file(path).items()
    }


def messages_of(case):
    pictures = [{"type": "image", "image": picture} for picture in pictures_of(case)]
    return [{"role": "user", "content": [*pictures, {"type": "text", "text": case["question"]}]}]


def inputs_of(processor, case):
    """Model inputs of one case, or of a list of cases as one batch."""
    cases = case if isinstance(case, list) else [case]
    tasks = [case["task"] for case in cases]
    messages = [messages_of(case) for case in cases]
    return processor.apply_chat_template(
        messages if isinstance(case, list) else messages[0],
        task=tasks if isinstance(case, list) else tasks[0],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


SAMPLES = [
    {"task": "comprehension", "instruction": "What is this?", "response": "A head CT.", "input_image": "ct.png"},
    {
        "task": "comprehension",
        "instruction": "Name both!",
        "response": " CT, MR ",
        "input_image": ["ct.png", "mr.png"],
    },
    {"task": "generation", "instruction": "Reconstruct.", "input_image": "ct.png", "target_image": "mr.png"},
    {"task": "generation", "instruction": "Draw a normal chest.", "target_image": "retina.png"},
]


@pytest.fixture
def data(tmp_path):
    """A folder with pictures and `both.jsonl`, `comprehension.jsonl`, `generation.jsonl`."""
    for name in ("ct", "mr", "retina"):
        shutil.copy(GOLDEN / f"images/{name}.png", tmp_path)
    for name in ("both", "comprehension", "generation"):
        lines = [json.dumps(sample) for sample in SAMPLES if name in ("both", sample["task"])]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


@pytest.fixture
def load(checkpoints):
    """Loads a fresh model and its processor by the name of a checkpoint."""

    def get(name="m3", **options):
        folder = checkpoints(name).folder
        model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, **options)
        return model, AutoProcessor.from_pretrained(folder, trust_remote_code=True)

    return get


def pytest_report_header():
    return f"transformers {transformers.__version__}, torch {torch.__version__}"
