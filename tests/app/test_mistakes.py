"""What users do wrong, command by command: one sentence that names the value, exit code 1, nothing left behind; and Ctrl-C."""

import contextlib
import json
import os
import pty
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import GOLDEN, full_disk
from PIL import Image

from healthgpt import HealthGPTConfig
from healthgpt.app.cli import main
from healthgpt.app.common import NANO, split_arguments
from healthgpt.configuration_healthgpt import TaskConfig
from healthgpt.errors_healthgpt import HealthGPTError
from healthgpt.evaluation import answers as evaluation_answers
from healthgpt.hub_export import merge
from healthgpt.hub_export.confine import reading
from healthgpt.locks import alone
from healthgpt.modeling_healthgpt import group_by_task
from healthgpt.refusals import compiling, loading, memory
from healthgpt.training import HealthGPTTrainer

CT = GOLDEN / "images/ct.png"
LONG = "a" * 300


@pytest.fixture
def ends(monkeypatch, capsys, tmp_path):
    """Runs a command in a folder with some files; its exit code, what it printed, and what it said on stderr."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(CT, "ct.png")
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    (tmp_path / "study").mkdir()
    shutil.copy(CT, "study/ct.png")
    (tmp_path / "loop").symlink_to("loop")
    sample = {"task": "comprehension", "instruction": "What is this?", "response": "A CT.", "input_image": "ct.png"}
    (tmp_path / "answers.jsonl").write_text(f"{json.dumps(sample)}\n" * 3)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["healthgpt", *map(str, arguments)])
        try:
            main()
        except SystemExit as end:
            return end.code, *capsys.readouterr()
        return 0, *capsys.readouterr()

    return run


@pytest.mark.parametrize(
    ("command", "value"),
    [
        ("ask chest.png", "chest.png"),
        ("ask questions.csv", "questions.csv"),
        ("ask scan.nii.gz", "scan.nii.gz"),
        ("ask SCAN.DCM", "SCAN.DCM"),
        ("ask chest.heic", "chest.heic"),
        ("ask scan.hdr", "scan.hdr"),
        ("ask scan.mgz", "scan.mgz"),
        ("ask scan.nii.gz.bak", "scan.nii.gz.bak"),
        ("ask stack.czi", "stack.czi"),
        ("ask 1.2.840.10008.1.7", "1.2.840.10008.1.7"),
        ("ask studies/one", "studies/one"),
        ("ask ./one", "./one"),
        ("ask one/", "one/"),
        ("ask C:\\scans\\one", "scans"),
        ("ask ct.png prior.png", "prior.png"),
        ("ask http://example.org/a.png", "http://example.org/a.png"),
        ("ask https://example.org/a.png What?", "https://example.org/a.png"),
        ("ask file:///a.png What?", "file:///a.png"),
        ("draw chest.png -o out.png", "chest.png"),
        ("draw http://example.org/a.png Draw. -o out.png", "http://example.org/a.png"),
        ("explain chest.png -o out", "chest.png"),
        ("explain http://example.org/a.png What? -o out", "http://example.org/a.png"),
        (f"ask -c {LONG} What?", LONG),
        (f"ask {LONG}.png What?", LONG),
        (f"ask study What? -o {LONG}.csv", LONG),
        ("ask study What? -o file/a.csv", "file"),
        ("ask study What? -o loop/a.csv", "loop"),
        ("ask What? --device meta", "meta"),
        ("ask What? --compile --device cpu", "cpu"),
        ("draw Draw. -o out.png --compile --device cpu", "cpu"),
        ("ask What? --openvino --device cuda", "--device is cuda"),
        (f"draw Draw. -o {LONG}.png", LONG),
        ("draw loop Draw. -o out.png", "loop"),
        (f"draw Draw. -o out.png --sheet {LONG}.png", LONG),
        ("draw Draw. -o /proc/out.png", "/proc/out.png"),
        (f"explain What? -o {LONG}", LONG),
        ("explain What? -o file/out", "file/out"),
        ("explain What? -o loop", "loop"),
        (f"info {LONG}", LONG),
        ("info full", "full"),
        (f"train {LONG} -c nano -o out", LONG),
        (f"train answers.jsonl -c nano -o {LONG}", LONG),
        ("train answers.jsonl -c nano -o file/out", "file/out"),
        (f"eval answers slake {LONG} -c nano -o out", LONG),
        (f"eval answers samples answers.jsonl -c nano -o {LONG}", LONG),
        ("eval answers samples answers.jsonl -c nano -o file/out", "file/out"),
        (f"eval draw {LONG} -c nano -o out", LONG),
        (f"eval pictures {LONG} study -o out", LONG),
        (f"eval pictures study study -o {LONG}", LONG),
        (f"eval average {LONG} -o out", LONG),
        (f"bench -c {LONG}", LONG),
        (f"export --base full --vision full --comprehension file --output {LONG}", LONG),
        (f"export --base {LONG} --vision full --comprehension file --output out", LONG),
        ("export --base full --vision full --comprehension file --output full", "full"),
        ("export --base full --vision full --comprehension file --output nowhere/out", "nowhere"),
        ("export --base full --vision full --comprehension file --output loop", "loop"),
        (f"plugin list {LONG}", LONG),
        (f"plugin extract {LONG} generation -o out", LONG),
        ("plugin extract nano generation -o full --remove", "nano"),
        (f"plugin add full {LONG}", "full"),
        (f"push {LONG} user/name", LONG),
        (f"ui --host {LONG}", LONG),
        ("ask -c ./nowhere What?", "There is no folder ./nowhere, "),
        ("draw -c ../nowhere Draw. -o out.png", "There is no folder ../nowhere, "),
        ("explain -c ~/nowhere What? -o out", "There is no folder ~/nowhere, "),
        ("info no/where/", "There is no folder no/where/, "),
        ("info nowhere/", "There is no folder nowhere/, "),
        ("bench -c /nowhere", "There is no folder /nowhere, "),
        ("train answers.jsonl -c ./nowhere -o out", "There is no folder ./nowhere, "),
        ("eval answers samples answers.jsonl -c ./nowhere -o out", "There is no folder ./nowhere, "),
        ("eval draw answers.jsonl -c ./nowhere -o out", "There is no folder ./nowhere, "),
        ("export --base ./nowhere --vision full --comprehension file --output out", "There is no folder ./nowhere, "),
        ("export --base full --vision nowhere/ --comprehension file --output out", "There is no folder nowhere/, "),
        (
            "export --base ./nowhere@main --vision full --comprehension file --output out",
            "There is no folder ./nowhere",
        ),
        ("plugin list ./nowhere", "The folder nowhere does not exist"),
        ("plugin extract ./nowhere generation -o out", "The folder nowhere does not exist"),
        ("plugin add ./nowhere full", "The folder nowhere does not exist"),
        (f"plugin add {NANO} ./nowhere", "The folder nowhere does not exist"),
        ("push ./nowhere user/name", "The folder nowhere does not exist"),
        (f"ui -c {LONG} --port 7999", LONG),
    ],
)
def test_a_mistake_is_one_sentence_that_names_it(command, value, ends, tmp_path):
    before = set(tmp_path.rglob("*"))
    code, printed, said = ends(*command.split(" "))
    [error] = [line for line in said.splitlines() if line.startswith("Error: ")]
    assert (code, printed) == (1, "") and value in error and set(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("held", "command"),
    [
        ("answers.csv", "ask -c nano study What? -o answers.csv"),
        ("out", "eval answers samples answers.jsonl -c nano -o out"),
        ("out", "eval draw pairs.jsonl -c nano -o out"),
        ("out", "eval pictures study study -o out"),
        ("out", "train answers.jsonl -c nano -o out"),
        ("out", "plugin extract copy generation -o out"),
        ("copy", "plugin extract copy generation -o out --remove"),
        ("copy", "plugin add copy plugin"),
        ("copy", "push copy user/name"),
        ("out", "export --base base --vision vision --comprehension plugin --output out"),
    ],
)
def test_what_another_command_changes_is_not_changed_and_that_is_told(held, command, ends, tmp_path):
    shutil.copytree(NANO, "copy")
    os.mkdir("out")  # where it is no mistake
    if "extract" in command:
        os.rmdir("out")
    sample = {"task": "generation", "instruction": "Draw.", "target_image": "ct.png"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(sample))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with alone(held):
        code, printed, said = ends(*command.split(" "))
    [error] = [line for line in said.splitlines() if line.startswith("Error: ")]
    assert (code, printed) == (1, "") and f"{held}: wait until it has ended" in error
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


QUESTIONS = (
    "What is a CT?",
    "Is this T1/T2 weighted?",
    "Compare CT/MRI.",
    "T1/T2?",
    "Describe.",
    "Diagnosis",
    "Diagnosis...",
    "Describe.Why?",
    "Which formats are better, .png or .jpg?",
    "What does scan.nii.gz show?",
    "Describe the file chest.png.",
    "What is 3.5 cm, e.g. here, w/o contrast",
    "请描述CT/MRI图像",
    "これはCT/MRIですか？",  # noqa: RUF001
)


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_question_alone_is_a_question(question):
    assert split_arguments([question]) == ([], question)


def test_a_question_alone_is_answered_and_nano_is_known_everywhere(ends):
    code, printed, _ = ends("ask", "-c", "nano", "Compare CT/MRI.", "--max-new-tokens", 1)
    assert code == 0 and printed.endswith("\n")
    code, printed, _ = ends("info", "nano", "--json")
    assert code == 0 and "comprehension" in json.loads(printed)["tasks"]
    code, printed, _ = ends("plugin", "list", "nano", "--json")
    assert code == 0 and "comprehension" in json.loads(printed)
    assert ends("plugin", "extract", "nano", "generation", "-o", "taken")[0] == 0 and os.path.isdir("taken")
    code, _, said = ends("plugin", "extract", "nano", "generation", "-o", "taken", "--remove")  # of the package
    assert code == 1 and "nano does not exist" in said
    os.mkdir("nano")
    assert ends("info", "nano", "--json")[0] == 0
    Path("nano/config.json").write_text('{"model_type": "llama"}')  # a checkpoint of this name goes first
    code, _, said = ends("ask", "-c", "nano", "What?")
    assert code == 1 and "nano is no HealthGPT checkpoint: its config.json is that of a llama model" in said


def test_names_of_files_give_a_terminal_no_orders(ends, tmp_path):
    names = ("red\x1b[31m.png", "two\nlines.png", "right\u202eleft.png", "c1\x9b31m.png")
    for name in names:
        (tmp_path / "study" / name).write_text("no image")
    hostile = f"ct{names[0]}"
    shutil.copy(CT, hostile)
    texts = [
        *ends("ask", "-c", "nano", "study", "What?", "-o", "a\x1b[2J.csv", "--max-new-tokens", 1)[1:],
        *ends("ask", "-c", "nano", hostile, "What?", "--json", "--max-new-tokens", 1)[1:],
        *ends("ask", names[1], "What?")[1:],
        *ends("ask", "-c", names[0], "What?")[1:],
        *ends("draw", hostile, "Draw.", "-o", f"{names[2]}.xyz")[1:],
        *ends("train", names[3], "-c", "nano", "-o", "out")[1:],
    ]
    for text in texts:
        assert all(letter.isprintable() or letter == "\n" for letter in text), text
    assert "two\\nlines.png" in texts[1] and "right\\u202eleft.png" in texts[1]
    assert json.loads(texts[2])["files"] == [hostile]


def test_the_bars_of_a_terminal_take_no_name_for_markup(ends, monkeypatch, tmp_path):
    name = "[bold]a\x1b[31m[red].jsonl"
    (tmp_path / "answers.jsonl").rename(tmp_path / name)
    terminal, end = pty.openpty()
    with open(end, "w") as file, monkeypatch.context() as patch:
        patch.setenv("TERM", "xterm")
        patch.setattr(sys, "stderr", file)
        code, _, _ = ends("eval", "answers", "samples", name, "-c", "nano", "-o", "out", "--limit", 1)
    shown = os.read(terminal, 2**20)
    os.close(terminal)
    assert code == 0 and b"Reading [bold]a\\x1b[31m[red].jsonl" in shown


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", "[1]"),
        ("config.json", '{"model_type": "healthgpt", "text_config": 3}'),
        ("config.json", '{"model_type": "healthgpt", "text_config": {"hidden_size": "a"}}'),
        ("config.json", '{"model_type": "healthgpt", "vqgan_config": {"embed_dim": []}}'),
        ("config.json", '{"model_type": "healthgpt", "tasks": [1]}'),
        ("config.json", '{"model_type": "healthgpt", "image_code_offset": ""}'),
        ("processor_config.json", '{"tasks": 3.5}'),
        ("processor_config.json", '{"tasks": {"comprehension": {"kind": 1}}}'),
        ("processor_config.json", '{"image_processor": {"crop_size": [1]}}'),
        ("processor_config.json", '{"image_processor": {"image_processor_type": 7}}'),
        ("processor_config.json", "[1]"),
        ("processor_config.json", None),
        ("tokenizer.json", "[1]"),
        ("tokenizer.json", "{}"),
        ("tokenizer.json", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        ("tokenizer_config.json", "{}"),
        ("model.safetensors.index.json", "{}"),
        ("model.safetensors.index.json", '{"weight_map"'),
    ],
)
def test_a_damaged_checkpoint_is_named(name, content, ends, checkpoints, tmp_path):
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for path in checkpoints("m3").folder.iterdir():
        if path.name != name:
            (damaged / path.name).symlink_to(path)
    if content is not None:
        (damaged / name).write_text(content)
    code, printed, said = ends("ask", "-c", damaged, "What?")
    assert (code, printed) == (1, "") and "damaged" in said.splitlines()[-1]


def test_a_full_disk_is_told(ends, tmp_path):
    with full_disk(2000):
        code, _, said = ends("ask", "-c", "nano", "study", "What?", "-o", "a.csv", "--max-new-tokens", 1)
        assert code == 0
        code, _, said = ends("draw", "-c", "nano", "Draw.", "-o", "out.bmp")
        assert code == 1 and "out.bmp cannot be written: File too large." in said
        code, _, said = ends("train", "answers.jsonl", "-c", "nano", "-o", "out", "--batch-size", 1, "--max-steps", 1)
        assert code == 1 and "Error: out cannot be written: " in said


def test_a_result_that_cannot_be_printed_is_told(ends):
    full = os.fdopen(os.open("/dev/full", os.O_WRONLY), "w")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", full)
        for command in ("info nano", "info nano --json", "plugin list nano", "ask -c nano What? --max-new-tokens 1"):
            words = [NANO if word == "nano" else word for word in command.split(" ")]
            code, _, said = ends(*words)
            assert code == 1 and "Error: The result cannot be printed: No space left on device." in said
    with contextlib.suppress(OSError):  # it still tries to write
        full.close()


def test_debug_shows_where_an_error_comes_from(ends):
    with pytest.raises(HealthGPTError, match=r"There is no picture file 'nowhere\.png'"):
        ends("--debug", "ask", "nowhere.png", "What?")


@pytest.mark.parametrize("defect", [KeyError, ValueError, TypeError, OSError, IndexError])
def test_a_mistake_of_programming_is_raised(defect, ends, monkeypatch):
    def fails(*arguments, **options):
        raise defect("a defect")

    monkeypatch.setattr("healthgpt.app.ask.prepare", fails)
    with pytest.raises(defect, match="a defect"):
        ends("ask", "-c", "nano", "What?")


def test_only_what_users_can_do_about_it_becomes_a_sentence():
    with pytest.raises(RuntimeError, match="a defect"), memory():
        raise RuntimeError("a defect")
    for error, context in (
        (Exception("expected value at line 1"), loading("checkpoint")),  # as tokenizers raises it
        (MemoryError(), memory()),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), memory()),
    ):
        with pytest.raises(HealthGPTError), context:
            raise error


@pytest.mark.parametrize("context", [loading, reading])
def test_errors_of_the_code_of_checkpoints_are_no_damage_of_one(context):
    task = TaskConfig("text", 4, 8.0, 2, -2)
    with pytest.raises(AttributeError), context("checkpoint"):
        HealthGPTConfig.validate_task(None, "new", task)
    with pytest.raises(TypeError), context("checkpoint"):
        group_by_task(None, torch.device("cpu"))
    for damage in (lambda: torch.nn.Conv2d(1, "a", 3), lambda: {}["weight_map"], lambda: Path("nowhere").stat()):
        with pytest.raises(HealthGPTError, match=r"^checkpoint cannot be (loaded|used): "), context("checkpoint"):
            damage()


def interrupted_at(call, function):
    """The function, which from a call on is interrupted as by Ctrl-C."""
    calls = iter(range(1, 10**6))

    def run(*arguments, **options):
        if next(calls) >= call:
            raise KeyboardInterrupt
        return function(*arguments, **options)

    return run


TRAIN = ["train", "answers.jsonl", "-c", "nano", "-o", "out", "--batch-size", 1, "--max-steps", 4, "--save-steps", 1]


def test_a_machine_without_a_compiler_is_named():
    compiler = "/nowhere/c++"
    with (
        torch._inductor.config.patch({"cpp.cxx": (compiler,)}),
        pytest.raises(HealthGPTError, match=compiler) as error,
        compiling(),
    ):
        torch.compile(lambda number: number.sin() + 1, dynamic=False)(torch.ones(7))
    assert "\n" not in str(error.value)
    with pytest.raises(RuntimeError, match="defect"), compiling():
        raise RuntimeError("defect")


def test_ctrl_c_while_training_says_what_is_kept_and_resume_goes_on(ends, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(HealthGPTTrainer, "training_step", interrupted_at(3, HealthGPTTrainer.training_step))
        code, printed, said = ends(*TRAIN)
    assert (code, printed) == (130, "") and "out/checkpoint-2 is kept; the same command with --resume" in said
    code, printed, _ = ends(*TRAIN, "--resume")
    assert (code, printed) == (0, "out/comprehension\n")


def test_ctrl_c_before_anything_was_written_says_so(ends, monkeypatch, tmp_path):
    monkeypatch.setattr("healthgpt.app.train.load", interrupted_at(1, None))
    before = set(tmp_path.iterdir())
    code, _, said = ends(*TRAIN)
    assert code == 130 and "Nothing was written" in said and set(tmp_path.iterdir()) == before


def test_ctrl_c_while_answers_are_scored_says_what_is_kept(ends, monkeypatch):
    command = ["eval", "answers", "samples", "answers.jsonl", "-c", "nano", "-o", "out", "--batch-size", 1]
    with monkeypatch.context() as patch:
        patch.setattr(evaluation_answers, "answer_batch", interrupted_at(3, evaluation_answers.answer_batch))
        code, printed, said = ends(*command)
    assert (code, printed) == (130, "") and "2 answers are kept in out; the same command goes on" in said
    monkeypatch.setattr(evaluation_answers, "answer_batch", interrupted_at(2, evaluation_answers.answer_batch))
    assert ends(*command)[0] == 0  # one is left


def test_ctrl_c_while_exporting_says_how_to_go_on(ends, monkeypatch):
    m3 = GOLDEN / "m3"
    command = ["export", "--base", m3 / "base", "--vision", m3 / "vit", "--output", "out", "--skip-forward"]
    command += ["--comprehension", m3 / "com_hlora_weights.bin"]
    with monkeypatch.context() as patch:
        patch.setattr(merge, "write_index", interrupted_at(1, None))
        code, printed, said = ends(*command)
    assert (code, printed) == (130, "") and "out is not finished." in said and "the same command goes on" in said
    monkeypatch.setattr(merge, "write_shard", None)  # nothing is left to write
    assert ends(*command)[:2] == (0, "out\n")


def test_ctrl_c_while_measuring_says_that_nothing_is_kept(ends, monkeypatch):
    monkeypatch.setattr("healthgpt.benchmarks.memory.measure", interrupted_at(1, None))
    code, _, said = ends("bench", "-c", "nano", "--precisions", "float32")
    assert code == 130 and "Nothing is kept" in said


def test_where_no_system_tells_the_memory_that_is_said(ends, monkeypatch, tmp_path):
    monkeypatch.setattr("healthgpt.benchmarks.memory.STATUS", tmp_path / "proc/self/status")
    code, printed, said = ends("bench", "-c", "nano", "--precisions", "float32")
    assert (code, printed) == (1, "") and str(tmp_path / "proc/self/status") in said


def test_an_image_that_is_too_large_is_one_sentence_and_no_warning(healthgpt, tmp_path):
    """Of a size of which Pillow warns and does not refuse it."""
    Image.new("1", (9500, 9500)).save(tmp_path / "large.png")
    result = healthgpt("ask", tmp_path / "large.png", "What is this?")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.count("\n") == 1, result.stderr
    assert "9500 x 9500" in result.stderr and "HEALTHGPT_MAX_IMAGE_PIXELS" in result.stderr
