"""The cost model of decoding by hand, the formula restated, and what a run says of equal and of wrong drawings."""

import argparse
import json
import shutil
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

import healthgpt
from healthgpt import HealthGPTModel, TaskConfig
from healthgpt.benchmarks import decoding
from healthgpt.errors_healthgpt import HealthGPTError
from healthgpt.modeling_healthgpt import HLoRALinear, route

PACKAGE = Path(healthgpt.__file__).parent


def test_the_cost_model_by_hand():
    config = decoding.published_config(hidden_size=96, layers=1)
    shapes = [(96, 3 * 96), (96, 96), (96, 2 * 256), (256, 96)]  # queries, keys, values; their output; MLP in; MLP out
    base = sum(inputs * outputs for inputs, outputs in shapes) + 3 * 96  # three norms
    for task, rank, context in (("comprehension", 64, 24 * 24), ("generation", 256, 24 * 24 + 32 * 32 // 2)):
        plugin = sum(rank * (inputs + outputs) + 4 * inputs for inputs, outputs in shapes)
        cost = decoding.cost_of(config, task)
        assert cost == decoding.Cost(base, plugin, head=40206 * 96, cache=2 * 96 * context)
        assert cost.operations() == 2 * (base + plugin + 40206 * 96 + 2 * 96 * context)
        assert cost.bytes(batch=3, itemsize=2) == 2 * (base + plugin + 40206 * 96 + 3 * 2 * 96 * context)


def test_the_floor_is_the_slower_of_reading_and_multiplying():
    cost = decoding.Cost(base=60, plugin=20, head=10, cache=10)
    reader = decoding.Machine(bandwidth=10, speed=1e9)
    assert cost.floor(reader, passes=3, tokens=64, batch=1, itemsize=4) == pytest.approx(3 * 100 * 4 / 10)
    assert cost.floor(reader, passes=3, tokens=64, batch=2, itemsize=2) == pytest.approx(3 * 110 * 2 / 10)
    multiplier = decoding.Machine(bandwidth=1e9, speed=50)
    assert cost.floor(multiplier, passes=3, tokens=64, batch=2, itemsize=4) == pytest.approx(64 * 2 * 200 / 50)
    config = decoding.published_config(hidden_size=96, layers=1)
    machine = decoding.Machine(bandwidth=1e6, speed=8e6)
    words, drawing = decoding.floors(config, torch.bfloat16, machine, "tiny")
    assert words["head_bytes"] == 2 * 40206 * 96 and "image_seconds" not in words
    # Two bytes and two operations for every weight: while it is read, eight tokens are multiplied.
    assert drawing["free_tokens"] == pytest.approx(8)
    assert drawing["image_seconds"] == pytest.approx(1024 * drawing["token_seconds"])
    assert drawing["image_seconds_in_one_pass"] == pytest.approx(drawing["image_seconds"] / 8)


def test_the_published_formula_expert_by_expert():
    torch.manual_seed(0)
    base, n, rank = torch.nn.Linear(6, 5), 3, 12
    linear = HLoRALinear(base, {"task": TaskConfig("text", rank, alpha=7, num_experts=n, vision_layer=-2)})
    plugin = linear.plugins["task"]
    formula = decoding.PublishedLinear(base, plugin)
    x = torch.randn(2, 4, 6)
    weights = (x @ plugin.lora_route.weight.T).softmax(dim=-1)
    expected = base(x)
    for index, rows in enumerate(torch.arange(rank).view(n, -1)):
        expert = x @ plugin.lora_A.weight[rows].T @ plugin.lora_B.weight[:, rows].T
        expected = expected + weights[..., index, None] * expert * (7 / rank * n)
    torch.testing.assert_close(formula(x), expected)
    with route([("task", None)]):
        torch.testing.assert_close(linear(x), expected)


def test_language_models_that_share_their_weights():
    model = HealthGPTModel(decoding.published_config(hidden_size=96, layers=1))
    bare = decoding.with_linears(model.language_model, lambda linear: linear.base_layer)
    assert not any(isinstance(module, HLoRALinear) for module in bare.modules())
    assert sum(isinstance(module, HLoRALinear) for module in model.modules()) == 4
    own = {id(weight) for name, weight in model.language_model.named_parameters() if ".plugins." not in name}
    assert {id(weight) for weight in bare.parameters()} == own


def test_calls_are_counted():
    one, other = torch.ones(2, 2), torch.ones(2, 2)
    assert decoding.count_calls(lambda: None) == 0
    assert decoding.count_calls(lambda: (one + other).add_(one)) == 2


def answer(ids, seconds, **changes):
    given = {"ids": ids, "seconds": seconds, "first_seconds": 1.0, "passes": 3, "tokens_read": 2}
    return given | {"peak_gigabytes": 0.5} | changes


def test_what_a_kind_needs():
    found = {
        decoding.ONE: [answer([[1, 2, 3], [4, 5, 6]], 5.0), answer([[7, 8, 9], [1, 1, 1]], 3.0)],
        decoding.MANY: [
            answer([[1, 2, 3], [4, 5, 0]], 2.0, passes=1, tokens_read=4),
            answer([[7, 8, 9], [1, 1, 1]], 1.8, passes=2, peak_gigabytes=0.6),
        ],
    }
    row = decoding.summarise(found, decoding.MANY, batch=2)
    assert row == pytest.approx(
        {
            "passes": 1.5,
            "tokens_read": 3,
            "first_seconds": 1,
            "token_seconds": (1.0 / 2 + 0.8 / 2) / 2,
            "seconds": 1.9 / 2,
            "ratio": (2 / 5 + 1.8 / 3) / 2,
            "peak_ratio": 0.6 / 0.5,
            "peak_gigabytes": 0.6,
            "equal": 3,
            "compared": 4,
        }
    )
    found[decoding.OTHER] = [answer([[1, 2, 3], [4, 5, 6]], 4.0), answer([[7, 8, 9], [1, 1, 1]], 2.0)]
    beside = decoding.summarise(found, decoding.MANY, batch=2)
    assert beside["ratio"] == pytest.approx((2 / 4 + 1.8 / 2) / 2) and beside["equal"] == 3
    images = [row | {"dtype": dtype, "batch": 2, "subject": "x", "kind": "k"} for dtype in ("float32", "bfloat16")]
    layers = [{"dtype": "float32", "task": "t", "batch": 1, "tokens": 1, "error": error} for error in (0.1, 1e-7)]
    assert len(decoding.failures_of([], images)) == len(decoding.failures_of(layers, [])) == 1
    assert "3 of 4" in decoding.failures_of([], images)[0]


def run(monkeypatch, capsys, *arguments):
    """The exit code, what was printed, and its last line read as JSON."""
    monkeypatch.setattr(sys, "argv", ["decoding", "--quick", *map(str, arguments)])
    code = decoding.main()
    text = capsys.readouterr().out
    return code, text, json.loads(text.splitlines()[-1])


def test_a_quick_run(monkeypatch, capsys):
    code, text, result = run(monkeypatch, capsys)
    assert code == 0 and result["failures"] == []
    titles = ["The least that ", "A pass through ", "Images and answers "]
    assert sorted(titles, key=text.index) == titles
    assert [(row["model"], row["task"]) for row in result["costs"]] == [
        (model, task) for model in ("M3", "nano") for task in ("comprehension", "generation")
    ]
    # The published base is 7.64 GB in bfloat16, with an embedding table and a head of 32064 rows each.
    assert result["costs"][0]["base_bytes"] / 2 == pytest.approx(7.64e9 - 2 * 2 * 32064 * 3072, rel=0.002)
    for row in result["layers"]:
        if row["kind"] == decoding.BARE:
            assert (row["ratio"], row["calls_a_linear"]) == (1, 0)
        else:
            assert row["ratio"] > 0 and row["calls_a_linear"] > 0
    assert {(row["batch"], row["tokens"]) for row in result["layers"]} == {(2, 1), (1, 4)}
    passes = {(row["subject"], row["kind"]): row["passes"] for row in result["images"]}
    assert len(passes) == 6 * 2 and all(row["equal"] == row["compared"] == 2 for row in result["images"])
    assert passes["reconstruction", decoding.ONE] == 64 > 2 * passes["reconstruction", decoding.MANY]
    assert passes["answer", decoding.ONE] == passes["answer", decoding.MANY] == decoding.ANSWER_TOKENS
    for row in result["images"]:
        assert 0 < row["first_seconds"] < row["batch"] * row["seconds"] and row["peak_gigabytes"] > 0.1


@pytest.mark.parametrize("wrong", [False, True])
def test_another_checkout_draws_the_same_or_the_run_fails(wrong, tmp_path, monkeypatch, capsys):
    other = tmp_path / "another-name"
    shutil.copytree(PACKAGE, other, ignore=shutil.ignore_patterns("tests", "docs", ".*", "build", "__pycache__"))
    if wrong:
        path = other / "modeling_healthgpt.py"
        right = "logits = run_per_task("
        assert path.read_text().count(right) == 1
        path.write_text(path.read_text().replace(right, "logits = -run_per_task("))
    monkeypatch.setattr(decoding, "INSTRUCTIONS", ["ct_to_mri"])
    code, text, result = run(monkeypatch, capsys, "--parts", "images", "--against", other)
    equal = {(row["subject"], row["kind"]): row["equal"] for row in result["images"]}
    assert len(equal) == 2 * 3 and result["layers"] == []
    for (_, kind), count in equal.items():
        assert count == (0 if wrong and kind == decoding.OTHER else 2)
    assert code == int(wrong) and len(result["failures"]) == 2 * wrong
    assert all(decoding.OTHER in failure and failure in text for failure in result["failures"])


def test_a_package_that_cannot_draw_is_named(tmp_path):
    (tmp_path / "__init__.py").write_text("raise SystemExit")
    with ExitStack() as stack, pytest.raises(HealthGPTError, match=str(tmp_path)):
        worker = decoding.Worker(tmp_path, "float32", {}, str(tmp_path), stack)
        worker.ask({"task": "generation", "texts": [], "images": [], "settings": {}})


@pytest.mark.parametrize(
    "arguments",
    [("--against", "nowhere"), ("--dtypes", "int3"), ("--hidden-size", "100"), ("--batches", "0")],
    ids=lambda arguments: arguments[0],
)
def test_mistakes_are_named_before_anything_is_measured(arguments, monkeypatch, capsys):
    monkeypatch.delattr(decoding, "measure_machine")
    monkeypatch.setattr(sys, "argv", ["decoding", *arguments])
    with pytest.raises(SystemExit) as end:
        decoding.main()
    assert end.value.code == 2
    assert f"argument {arguments[0]}: " in (printed := capsys.readouterr().err) and arguments[1] in printed


def test_a_checkout_with_another_small_model_is_refused(tmp_path):
    shutil.copytree(PACKAGE / "nano", tmp_path / "nano")
    (tmp_path / "__init__.py").touch()
    assert decoding.checkout(str(tmp_path)) == tmp_path
    path = next(tmp_path.glob("nano/*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(argparse.ArgumentTypeError, match=str(tmp_path)):
        decoding.checkout(str(tmp_path))
