"""A run on a tiny slice: every format, task and number of tokens once, in one run."""

import json
import subprocess
import sys

import pytest
import torch

from healthgpt.benchmarks import cpu


def test_a_run_measures_every_format():
    command = [
        sys.executable,
        "-m",
        "healthgpt.benchmarks.cpu",
        "--hidden-size",
        "96",
        "--layers",
        "1",
        "--rounds",
        "1",
    ]
    result = subprocess.run([*command, "--tokens", "1", "17"], capture_output=True, text=True, timeout=300, check=True)
    found = json.loads(result.stdout.splitlines()[-1])
    rows = {(row["format"], row["task"], row["tokens"]): row for row in found["rows"]}
    tasks = ("comprehension", "generation")
    assert set(rows) == {
        (name, task, tokens) for name in (cpu.OWN, cpu.WIDENED, cpu.OPENVINO) for task in tasks for tokens in (1, 17)
    }
    for (_, task, tokens), row in rows.items():
        assert row["speedup"] == pytest.approx(rows[cpu.OWN, task, tokens]["seconds"] / row["seconds"])


def test_the_model_is_that_of_its_configuration():
    model = cpu.random_model(96, 1)
    frequencies = model.model.language_model.rotary_emb.inv_freq
    torch.testing.assert_close(frequencies, 10000 ** -(torch.arange(0, 96, 2) / 96))
    with torch.no_grad():
        logits = model(input_ids=torch.arange(1, 20)[None], task="generation").logits
    assert logits.shape == (1, 19, 40206) and logits.isfinite().any()
