"""The commands as a user types them."""

import contextlib
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import termios
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version

import pytest
import torch
import transformers
import typer
from conftest import GOLDEN
from PIL import Image
from transformers import AutoProcessor
from typer.testing import CliRunner

from healthgpt.app.cli import app, main
from healthgpt.refusals import extras


@pytest.fixture(scope="module")
def folder(checkpoints):
    return checkpoints("m3").folder


def test_export_info_ask_and_draw(healthgpt, tmp_path, checkpoints):
    m3, folder = GOLDEN / "m3", tmp_path / "checkpoint"
    arguments = [
        "export",
        "--base",
        m3 / "base",
        "--vision",
        m3 / "vit",
        "--comprehension",
        m3 / "com_hlora_weights.bin",
    ]
    arguments += ["--generation", m3 / "gen_hlora_weights.bin", "--fusion", m3 / "fusion_layer_weights.bin"]
    arguments += ["--vqgan", m3 / "vqgan/last.ckpt", "--vqgan-config", m3 / "vqgan/model.yaml", "--output", folder]
    dry = healthgpt(*arguments, "--dry-run")
    assert dry.returncode == 0 and not folder.exists()
    assert "lm_head.weight [484, 64] -> lm_head.weight [538, 64], 137,728 bytes, by lm_head\\.weight\n" in dry.stdout
    assert "logit_scale [] dropped: CLIP's contrastive head is not used" in dry.stdout
    assert "tasks: comprehension (text), generation (image)" in dry.stdout
    plan = json.loads(healthgpt(*arguments, "--dry-run", "--json").stdout)
    assert plan["tensors"]["lm_head.weight"] == [538, 64] and "logit_scale" in plan["dropped"]
    result = healthgpt(*arguments, "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == {"output": str(folder)} and result.stderr == ""
    again = healthgpt(*arguments, "--dtype", "float16")
    assert again.returncode == 1 and "it holds another export" in again.stderr and "Traceback" not in again.stderr

    result = healthgpt("info", folder, "--json")
    content = json.loads(result.stdout)
    assert content["tasks"]["generation"] == {
        "kind": "image",
        "rank": 32,
        "alpha": 64,
        "num_experts": 4,
        "vision_layer": 1,
        "token_tables": "generation",
        "default_prompt": "Reconstruct the image.",
        "dropout": 0.0,
        "follows_input": True,
        "typical_codes": None,
    }
    assert content["parameters"]["plugin of generation"] == 53504 and content["token_rows"] == 538
    assert "comprehension" in healthgpt("info", folder).stdout

    checkpoint = checkpoints("m3")
    case = checkpoint.cases[3]
    pictures = [GOLDEN / f"images/{name}.png" for name in case["image"]]
    result = healthgpt("ask", "-c", folder, *pictures, case["question"])
    assert result.returncode == 0, result.stderr
    processor = AutoProcessor.from_pretrained(checkpoint.folder, trust_remote_code=True)
    assert result.stdout.rstrip("\n") == processor.decode(case["generated_ids"], skip_special_tokens=True).strip()

    for index in (0, 2):
        case = checkpoint.cases[4 + index]
        picture = [GOLDEN / f"images/{case['image']}.png"] if case["image"] else []
        result = healthgpt("draw", "-c", folder, *picture, case["question"], "-o", tmp_path / "out.png")
        assert result.returncode == 0, result.stderr
        drawn, published = Image.open(tmp_path / "out.png"), Image.open(GOLDEN / "m3" / case["decoded_png"])
        assert max(abs(a - b) for a, b in zip(drawn.tobytes(), published.tobytes(), strict=True)) <= 1


@pytest.fixture
def fails(monkeypatch, capsys):
    """The error of a command that ends with one, without the packages of some names."""

    def run(*arguments, without=()):
        for package in without:
            monkeypatch.setitem(sys.modules, package, None)
        monkeypatch.setattr(sys, "argv", ["healthgpt", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code == 1
        return capsys.readouterr().err

    return run


@pytest.mark.parametrize(
    ("package", "extra", "module", "arguments"),
    [
        ("matplotlib", "plot", "explain.plots", ("explain", "What?", "-o", "out")),
        ("nibabel", "dicom", "medical.nifti", ("ask", "volume.nii", "What?")),
    ],
)
def test_a_missing_package_is_named_with_its_extra(package, extra, module, arguments, fails, tmp_path, monkeypatch):
    (tmp_path / "volume.nii").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, f"healthgpt.{module}", raising=False)
    expected = f"Error: This needs {package}: pip install healthgpt[{extra}].\n"
    assert fails(*arguments, without=[package]) == expected


@pytest.mark.parametrize("packages", [("bitsandbytes",), ("accelerate",), ("bitsandbytes", "accelerate")])
def test_a_quantised_checkpoint_names_the_packages_that_it_lacks(packages, fails, tmp_path):
    config = {"model_type": "healthgpt", "quantization_config": {"quant_method": "bitsandbytes"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert fails("ask", "-c", tmp_path, "What?", without=packages) == (
        f"Error: {tmp_path} is quantised, and loading it needs {' and '.join(packages)}: "
        "pip install healthgpt[quantization].\n"
    )


def test_what_no_extra_brings_is_a_defect_and_raised():
    with pytest.raises(ModuleNotFoundError, match="No module named 'nowhere'"), extras():
        raise ModuleNotFoundError("No module named 'nowhere'", name="nowhere")


def test_too_little_memory_is_one_sentence_and_other_defects_are_raised(fails, monkeypatch):
    def generate(*arguments, **options):
        raise error

    monkeypatch.setattr(transformers.GenerationMixin, "generate", generate)
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    assert fails("ask", "What?").split("\n")[-2].startswith("Error: The device has too little memory for this: ")
    for defect in (RuntimeError, ValueError, OSError, KeyError, ModuleNotFoundError):
        error = defect("a defect")
        with pytest.raises(defect, match="a defect"):
            main()


def test_plugins_are_listed_taken_out_and_put_in(healthgpt, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "checkpoint")
    config = (folder / "config.json").read_text().replace("Reconstruct the image.", "日本語")
    (tmp_path / "checkpoint/config.json").write_text(config, encoding="utf-8")
    sizes = json.loads(healthgpt("plugin", "list", folder, "--json").stdout)
    assert sizes["comprehension"]["tensors"] == 28
    assert "comprehension" in healthgpt("plugin", "list", folder).stdout
    result = healthgpt("plugin", "extract", tmp_path / "checkpoint", "generation", "-o", tmp_path / "p", "--remove")
    assert result.returncode == 0, result.stderr
    result = healthgpt("plugin", "add", tmp_path / "checkpoint", tmp_path / "p", "--name", "ct_to_mri")
    assert result.returncode == 0, result.stderr
    content = healthgpt("info", tmp_path / "checkpoint", "--json").stdout
    assert (
        list(json.loads(content)["tasks"]) == ["comprehension", "ct_to_mri"]
        and '"default_prompt": "日本語"' in content
    )
    again = healthgpt("plugin", "add", tmp_path / "checkpoint", tmp_path / "p", "--name", "ct_to_mri")
    assert again.returncode == 1 and "has a task 'ct_to_mri' already" in again.stderr


def test_of_plugins_that_are_added_and_taken_out_at_once_none_is_lost(healthgpt, folder, tmp_path):
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(folder, checkpoint)
    assert healthgpt("plugin", "extract", folder, "generation", "-o", tmp_path / "plugin").returncode == 0
    commands = {name: ("add", checkpoint, tmp_path / "plugin", "--name", name) for name in ("one", "two", "three")} | {
        "generation": ("extract", checkpoint, "generation", "-o", tmp_path / "out", "--remove")
    }
    with ThreadPoolExecutor() as pool:
        results = dict(
            zip(commands, pool.map(lambda each: healthgpt("plugin", *each), commands.values()), strict=True)
        )
    done = {name for name, result in results.items() if result.returncode == 0}
    refused = [result.stderr for name, result in results.items() if name not in done]
    assert done and all(f"Error: Another command is changing {checkpoint}: " in text for text in refused), refused
    expected = {"comprehension"} | {name for name in results if (name in done) != (name == "generation")}
    listed = json.loads(healthgpt("plugin", "list", checkpoint, "--json").stdout)
    assert listed.keys() == expected and all(plugin["tensors"] for plugin in listed.values())
    record = json.loads((checkpoint / "healthgpt_export.json").read_text())
    assert set(record["files"]) == {path.name for path in checkpoint.iterdir()}
    assert {path.name for path in tmp_path.iterdir()} <= {"checkpoint", "plugin", "out"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ask", "-c", "FOLDER", "nowhere.png", "What?"], "There is no picture file 'nowhere.png'"),
        (["ask", "-c", "FOLDER", GOLDEN / "images/ct.png"], "is a file: add a question"),
        (["ask", "-c", "FOLDER", ""], "a question or instruction, is empty"),
        (["ask", "-c", "FOLDER", GOLDEN / "m3/cases.json", "What?"], "is not a picture that can be read"),
        (["ask", "-c", "FOLDER", "--task", "generation", "What?"], "no task 'generation' that answers in words"),
        (["ask", "-c", "nowhere", "What?"], "There is no folder nowhere, and a Hub repository is written user/name"),
        (["ask", "-c", "user/nowhere", "What?"], r"couldn't connect to .* Check your internet connection .*mode'\.$"),
        (["ask", "-c", "FOLDER", "--dtype", "int3", "What?"], "There is no dtype 'int3'"),
        (["ask", "-c", "FOLDER", "word " * 5000], "the model's window is 4096 tokens"),
        (["draw", "-c", "FOLDER", "Draw.", "-o", "picture.xyz"], "no ending of a picture format"),
        (["draw", "-c", "FOLDER", "Draw.", "-o", "nowhere/picture.png"], "The folder nowhere does not exist"),
        (["draw", "-c", "L14", "Draw.", "-o", "picture.png"], "no task 'generation' that draws; those that do: none"),
        (["ask", "-c", "FOLDER", "--device", "abacus", "What?"], "The device 'abacus' cannot be used here"),
        (["ask", "-c", GOLDEN, "What?"], "is no HealthGPT checkpoint: it has no config.json"),
        (["export", "--output", "out", "--preset", "m5"], "no preset 'm5'; choose one of m3, l14, xl32"),
        (["train", "nowhere.jsonl", "-c", "FOLDER", "-o", "out"], "Error: There is no file nowhere.jsonl.$"),
        (["export", "--output", "out", "--base", "x"], "The export needs --vision, or a --preset"),
        (
            ["export", "--output", "out", "--preset", "l14"],
            "repository microsoft/phi-4 cannot be used: the Hub cannot",
        ),
        (["info", GOLDEN / "m3/base"], "is no HealthGPT checkpoint: its config.json is that of a phi3 model"),
        (
            ["ask", "-c", "DAMAGED", "What?"],
            r"model-00001-of-00001\.safetensors cannot be read as safetensors",
        ),
        (["draw", "-c", "FOLDER", "Draw.", "-o", "picture.psd"], "no ending of a picture format"),
        (["draw", "-c", "FOLDER", "Draw.", "-o", "FOLDER"], "no ending of a picture format"),
        (["draw", "-c", "FOLDER", "Draw.", "-o", "NAMED"], "is a folder: name the picture in it"),
    ],
)
def test_mistakes_are_answered_in_one_sentence(
    arguments, message, fails, folder, checkpoints, tmp_path, tmp_path_factory, monkeypatch
):
    damaged, named = (tmp_path_factory.mktemp("other") / name for name in ("damaged", "folder.png"))
    named.mkdir()
    shutil.copytree(folder, damaged)
    weights = (damaged / "model-00001-of-00001.safetensors").read_bytes()
    (damaged / "model-00001-of-00001.safetensors").write_bytes(weights[: len(weights) // 2])
    names = {"FOLDER": folder, "L14": checkpoints("l14").folder, "DAMAGED": damaged, "NAMED": named}
    arguments = [names.get(argument, argument) if isinstance(argument, str) else argument for argument in arguments]
    monkeypatch.chdir(tmp_path)
    [error] = [line for line in fails(*arguments).split("\n") if line.startswith("Error: ")]
    assert re.search(message, error)
    assert not list(tmp_path.iterdir())


def commands(group, prefix=()):
    """Every command with the words that call it."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*prefix, name))
        else:
            yield (*prefix, name), command


def test_every_command_has_help_with_an_example_and_prints_json():
    found = dict(commands(typer.main.get_command(app)))
    assert ("plugin", "add") in found
    for words, command in found.items():
        examples = re.findall(r"^Example: (.*)", command.help, flags=re.MULTILINE)
        assert examples and all(example.startswith(f"healthgpt {' '.join(words)} ") for example in examples)
        if words != ("ui",):  # which prints no result
            assert "--json" in {name for parameter in command.params for name in parameter.opts}
        for option in command.params:
            if option.param_type_name == "option":
                assert option.help and not (option.required and isinstance(option.show_default, str))
        result = CliRunner().invoke(app, [*words, "--help"])
        assert result.exit_code == 0 and "Example:" in result.stdout
    for group in ([], ["eval"], ["plugin"]):
        result = CliRunner().invoke(app, [*group, "--help"])
        assert result.exit_code == 0 and " ".join(["Example: healthgpt", *group]) in result.stdout


@pytest.mark.parametrize(
    "arguments", [["ask"], ["draw", "Draw."], ["ask", "What?", "--frame", "x"], ["ask", "What?", "--loud"], ["sing"]]
)
def test_wrong_usage_has_a_code_of_its_own(arguments):
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2 and "Usage: " in result.stderr


def test_the_shell_completes_commands_and_options():
    script = "import sys; sys.argv[0] = 'healthgpt'; from healthgpt.app.cli import main; main()"

    def complete(instruction, **variables):
        environment = os.environ | {"_HEALTHGPT_COMPLETE": instruction} | variables
        command = [sys.executable, "-c", script]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300).stdout

    assert "_healthgpt_completion()" in complete("source_bash")
    assert complete("complete_bash", COMP_WORDS="healthgpt dr", COMP_CWORD="1").split() == ["draw"]
    options = complete("complete_bash", COMP_WORDS="healthgpt ask --max", COMP_CWORD="2")
    assert options.split() == ["--max-new-tokens"]


def test_a_mistake_leaves_no_traceback_and_help_needs_no_torch():
    def run(script, *arguments):
        command = [sys.executable, "-c", script, *arguments]
        return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=300)

    healthgpt = "from healthgpt.app.cli import main; main()"
    result = run(healthgpt, "ask", "-c", "nowhere", "What?")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == "Error: There is no folder nowhere, and a Hub repository is written user/name.\n"
    assert run(healthgpt, "--version").stdout == f"healthgpt {version('healthgpt')}\n"
    script = "import sys; from healthgpt.app import cli; print('torch' in sys.modules, 'transformers' in sys.modules)"
    assert run(script).stdout == "False False\n"


# The command, whose model takes a tenth of a second for every code that it writes.
SLOW = """
import sys, time
from torch.nn.modules.module import register_module_forward_pre_hook
register_module_forward_pre_hook(lambda module, _: time.sleep(0.1 * hasattr(module, "decode_image_tokens")))
sys.argv[0] = "healthgpt"
from healthgpt.app.cli import main
main()
"""


def test_a_terminal_shows_bars_and_ctrl_c_while_drawing_leaves_nothing(tmp_path):
    command = [sys.executable, "-c", SLOW, "draw", str(GOLDEN / "images/ct.png"), "Reconstruct the image."]
    ours, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 100))
    options = {"stdout": subprocess.PIPE, "stderr": terminal, "env": os.environ | {"TERM": "xterm"}, "text": True}
    with subprocess.Popen([*command, "-o", str(tmp_path / "out.png")], **options) as process:
        os.close(terminal)
        shown = b""
        while not re.search(rb"Drawing.*[1-9]\d?/64", shown):
            shown += os.read(ours, 2**16)
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(
            OSError
        ):  # the end, as Linux tells it; a terminal that nobody reads would stop the program
            while True:
                shown += os.read(ours, 2**16)
        output = process.communicate(timeout=300)[0]
    os.close(ours)
    assert (process.returncode, output) == (130, "") and not list(tmp_path.iterdir())
    assert b"Starting" in shown and b"Traceback" not in shown and re.search(rb"Loading weights: +100%", shown), shown
