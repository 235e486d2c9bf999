"""The package as a user installs it, from a clean clone and from a wheel, beside its core dependencies and nothing else."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from importlib.metadata import distribution, packages_distributions, version
from pathlib import Path

import pytest
from conftest import GOLDEN
from packaging.requirements import Requirement
from PIL import Image
from pydicom.data import get_testdata_file

ROOT = Path(__file__).parent.parent
PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
PACKAGES = [path.parent.name for path in ROOT.glob("*/__init__.py")]
M3 = [*("export", "--base", GOLDEN / "m3/base", "--vision", GOLDEN / "m3/vit"), "--output", "out"]
M3 += ["--comprehension", GOLDEN / "m3/com_hlora_weights.bin"]
# Several commands in one process: the first import of torch is the long one.
CALLS = """
import ast, sys
from healthgpt.app.cli import main
for arguments in ast.literal_eval(sys.argv[1]):
    sys.argv = ["healthgpt", *arguments]
    try:
        main()
    except SystemExit as end:
        assert not end.code or arguments[0] not in ('draw', 'info')
"""


def run(*command, folder):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return result


def needed(name: str, found: set[str]) -> set[str]:
    """Names of the installed packages that one needs, itself among them, without its extras."""
    if name in found:
        return found
    found.add(name)
    for requirement in map(Requirement, distribution(name).requires or []):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            needed(requirement.name, found)
    return found


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """What git has, without leftovers of builds."""
    folder = tmp_path_factory.mktemp("package") / "clone"
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", folder=ROOT).stdout.splitlines()
    for name in filter(os.path.isfile, listed):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """A virtual environment with links to the installed core dependencies; what only an extra brings is not there."""
    folder = tmp_path_factory.mktemp("fresh")
    run(sys.executable, "-m", "venv", "--without-pip", folder, folder=folder)
    [packages] = folder.glob("lib/python*/site-packages")
    for name in needed("healthgpt", set()) - {"healthgpt"}:
        for part in {path.parts[0] for path in distribution(name).files if path.parts[0] not in ("..", "__pycache__")}:
            if not (packages / part).exists():
                (packages / part).symlink_to(distribution(name).locate_file(part))
    return folder


def test_a_clean_clone_and_a_wheel_install_and_work_with_the_core_dependencies(clone, fresh, tmp_path):
    install = [*PIP, "--python", fresh / "bin/python", "install", "--no-deps"]
    run(*install, clone, folder=tmp_path)
    run(*PIP, "wheel", "--no-deps", "--wheel-dir", tmp_path, clone, folder=tmp_path)
    [wheel] = tmp_path.glob("healthgpt-*.whl")
    [package] = fresh.glob("lib/python*/site-packages/healthgpt")
    of_clone = {path.relative_to(package) for path in package.rglob("*.*") if path.suffix != ".pyc"}
    run(*install, "--no-index", "--force-reinstall", wheel, folder=tmp_path)
    assert {path.relative_to(package) for path in package.rglob("*.*") if path.suffix != ".pyc"} == of_clone
    in_git = {path.parent.relative_to(clone) for path in clone.glob("*/__init__.py")}
    assert in_git <= of_clone | {path.parent for path in of_clone}, "setup.cfg does not list all packages"

    healthgpt = fresh / "bin/healthgpt"
    assert run(healthgpt, "--version", folder=tmp_path).stdout == f"healthgpt {version('healthgpt')}\n"
    picture = GOLDEN / "images/retina.png"
    assert run(healthgpt, "ask", picture, "What imaging modality is this?", folder=tmp_path).stdout == "fundus\n"
    calls = [["draw", picture, "Reconstruct the image.", "-o", "out.png"], ["info", package / "nano"]]
    calls += [["train", "pairs.jsonl", "-c", "user/model", "-o", "out"], ["eval", "pictures", ".", ".", "-o", "out"]]
    calls += [M3, [*M3, "--quantize", "8bit"], ["ui"], ["explain", picture, "What?", "-o", "out"]]
    calls += [["ask", get_testdata_file("MR_small.dcm", download=False), "What?"], ["ask", "-c", "quantised", "What?"]]
    calls += [["bench"], ["ask", "--openvino", "What?"]]
    (tmp_path / "pairs.jsonl").touch()
    (tmp_path / "quantised").mkdir()
    config = {"model_type": "healthgpt", "quantization_config": {"quant_method": "bitsandbytes"}}
    (tmp_path / "quantised/config.json").write_text(json.dumps(config))
    calls = str([[str(argument) for argument in arguments] for arguments in calls])
    result = run(fresh / "bin/python", "-c", CALLS, calls, folder=tmp_path)
    assert Image.open(tmp_path / "out.png").size == (64, 64) and "plugin of generation" in result.stdout
    extras = re.findall(r"pip install healthgpt\[(\w+)\]", result.stderr)
    assert extras == [
        "train",
        "eval",
        "export",
        "quantization",
        "ui",
        "plot",
        "dicom",
        "quantization",
        "eval",
        "openvino",
    ], result.stderr
    assert "quantised is quantised, and loading it needs bitsandbytes and accelerate: pip install" in result.stderr
    assert not (tmp_path / "out").exists()


def test_everything_that_is_imported_is_named_in_setup_cfg():
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    lists = [setup["options"]["install_requires"], *setup["options.extras_require"].values()]
    named = {Requirement(line).name.lower() for lines in lists for line in lines.split("\n") if line}
    distributions, imported = packages_distributions(), set()
    for file in (path for folder in ("", *PACKAGES) for path in (ROOT / folder).glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                imported.add(node.module)
    imported = {name.split(".")[0] for name in imported} - sys.stdlib_module_names
    assert "torch" in imported
    assert not {name for name in imported if not named & {found.lower() for found in distributions[name]}}
