"""The benchmark of GPUs, all of it with a tiny model on the CPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks/gpu.sh"


def run(*arguments, folder, python=sys.executable):
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": str(python), "OMP_NUM_THREADS": "1"}
    command = ["bash", str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, timeout=290)


def test_all_of_it_runs_and_the_last_line_is_json(tmp_path):
    done = run("--tiny", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["complete"] and result["device"] == "cpu"
    assert result["golden"]["wrong_ids"] == [] and result["golden"]["largest_difference"] < 1e-4
    ways = {"answer_eager", "answer_compiled"}
    ways |= {f"drawing_{way}_{many}" for way in ("eager", "compiled") for many in ("one", "many")}
    assert ways < result.keys()
    for way in ways:
        assert result[way]["share_of_bandwidth"] > 0
    assert result["drawing_compiled_many"]["codes_per_pass"] > 4
    assert result["drawing_compiled_one"]["codes_per_pass"] == 1
    assert result["graphs"] == 5 and result["graph_breaks"] == 0  # two of the golden model, three of the random one


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path):
    done = run(folder=tmp_path)
    assert done.returncode == 1 and "--tiny" in done.stderr


def test_what_is_missing_is_named(tmp_path):
    """An interpreter without torch: the one that virtual environments are made of, isolated."""
    (tmp_path / "python").write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    (tmp_path / "python").chmod(0o755)
    done = run("--tiny", folder=tmp_path, python=tmp_path / "python")
    assert done.returncode == 1 and "pip install torch transformers Pillow" in done.stderr
