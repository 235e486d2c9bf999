"""The commands as a user types them."""

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import version

import pytest
import typer
from conftest import GOLDEN
from PIL import Image
from transformers import AutoProcessor
from typer.testing import CliRunner

from healthgpt.app.cli import app, main


def healthgpt(*arguments):
    script = "from healthgpt.app.cli import main; main()"
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=300)


@pytest.fixture(scope="module")
def folder(checkpoints):
    return checkpoints("m3").folder


def test_export_info_ask_and_draw(tmp_path, checkpoints):
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


def test_a_missing_package_is_named_with_its_extra(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "healthgpt.explain.plots", raising=False)
    monkeypatch.setattr(sys, "argv", ["healthgpt", "explain", "-c", str(folder), "What?", "-o", str(tmp_path / "out")])
    with pytest.raises(SystemExit):
        main()
    assert capsys.readouterr().err == "Error: this needs matplotlib: pip install healthgpt[plot].\n"


def test_plugins_are_listed_taken_out_and_put_in(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "checkpoint")
    sizes = json.loads(healthgpt("plugin", "list", folder, "--json").stdout)
    assert sizes["comprehension"]["tensors"] == 28
    assert "comprehension" in healthgpt("plugin", "list", folder).stdout
    result = healthgpt("plugin", "extract", tmp_path / "checkpoint", "generation", "-o", tmp_path / "p", "--remove")
    assert result.returncode == 0, result.stderr
    result = healthgpt("plugin", "add", tmp_path / "checkpoint", tmp_path / "p", "--name", "ct_to_mri")
    assert result.returncode == 0, result.stderr
    assert list(json.loads(healthgpt("info", tmp_path / "checkpoint", "--json").stdout)["tasks"]) == [
        "comprehension",
        "ct_to_mri",
    ]
    again = healthgpt("plugin", "add", tmp_path / "checkpoint", tmp_path / "p", "--name", "ct_to_mri")
    assert again.returncode == 1 and "has a task 'ct_to_mri' already" in again.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ask", "-c", "FOLDER", "nowhere.png", "What?"], "There is no picture file 'nowhere.png'"),
        (["ask", "-c", "FOLDER", GOLDEN / "images/ct.png"], "is a file: add a question"),
        (["ask", "-c", "FOLDER", ""], "has no text"),
        (["ask", "-c", "FOLDER", GOLDEN / "m3/cases.json", "What?"], "is not a picture that can be read"),
        (["ask", "-c", "FOLDER", "--task", "generation", "What?"], "no task 'generation' that answers in words"),
        (["ask", "-c", "nowhere", "What?"], "nowhere is neither a folder nor a Hub repository"),
        (["ask", "-c", "FOLDER", "--dtype", "int3", "What?"], "There is no dtype 'int3'"),
        (["ask", "-c", "FOLDER", "word " * 5000], "the model's window is 4096 tokens"),
        (["draw", "-c", "FOLDER", "Draw.", "-o", "picture.xyz"], "no ending of a picture format"),
        (["draw", "-c", "FOLDER", "Draw.", "-o", "nowhere/picture.png"], "The folder nowhere does not exist"),
        (["draw", "-c", "L14", "Draw.", "-o", "picture.png"], "no task 'generation' that draws; those that do: none"),
        (["ask", "-c", "FOLDER", "--device", "abacus", "What?"], "The device 'abacus' cannot be used here"),
        (["ask", "-c", GOLDEN, "What?"], "is no HealthGPT checkpoint: it has no config.json"),
        (["export", "--output", "out", "--preset", "m5"], "no preset 'm5'; choose one of m3, l14, xl32"),
        (["export", "--output", "out", "--base", "x"], "The export needs --vision, or a --preset"),
        (
            ["export", "--output", "out", "--preset", "l14"],
            "repository microsoft/phi-4 cannot be used: the Hub cannot",
        ),
        (["info", GOLDEN / "m3/base"], "is no HealthGPT checkpoint: its config.json is that of a phi3 model"),
        (["ask", "-c", "DAMAGED", "What?"], "The weights of .* are damaged"),
        (["draw", "-c", "FOLDER", "Draw.", "-o", "picture.psd"], "no ending of a picture format"),
        (["draw", "-c", "FOLDER", "Draw.", "-o", "FOLDER"], "no ending of a picture format"),
        (["draw", "-c", "FOLDER", "Draw.", "-o", "NAMED"], "is a folder: name the picture in it"),
    ],
)
def test_mistakes_are_answered_in_one_sentence(
    arguments, message, folder, checkpoints, tmp_path, tmp_path_factory, monkeypatch, capsys
):
    damaged, named = (tmp_path_factory.mktemp("other") / name for name in ("damaged", "folder.png"))
    named.mkdir()
    shutil.copytree(folder, damaged)
    weights = (damaged / "model-00001-of-00001.safetensors").read_bytes()
    (damaged / "model-00001-of-00001.safetensors").write_bytes(weights[: len(weights) // 2])
    names = {"FOLDER": folder, "L14": checkpoints("l14").folder, "DAMAGED": damaged, "NAMED": named}
    arguments = [names.get(argument, argument) if isinstance(argument, str) else argument for argument in arguments]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["healthgpt", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 1
    [error] = [line for line in capsys.readouterr().err.split("\n") if line.startswith("Error: ")]
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
        assert all(option.help for option in command.params if option.param_type_name == "option")
        result = CliRunner().invoke(app, [*words, "--help"])
        assert result.exit_code == 0 and "Example:" in result.stdout


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


def test_what_is_not_installed_is_named_with_its_extra(tmp_path):
    """Without the packages of the extra, in a process that cannot find them."""
    (tmp_path / "volume.nii").touch()
    script = "import sys; sys.modules['nibabel'] = None; from healthgpt.app.cli import main; main()"
    command = [sys.executable, "-c", script, "ask", str(tmp_path / "volume.nii"), "What?"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 1
    assert result.stderr == "Error: this needs nibabel: pip install healthgpt[dicom].\n"


def test_a_mistake_leaves_no_traceback_and_help_needs_no_torch(tmp_path):
    result = healthgpt("ask", "-c", "nowhere", "What?")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == "Error: nowhere is neither a folder nor a Hub repository, which is written user/name.\n"
    assert healthgpt("--version").stdout == f"healthgpt {version('healthgpt')}\n"
    script = "import sys; from healthgpt.app import cli; print('torch' in sys.modules, 'transformers' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert result.stdout == "False False\n"
