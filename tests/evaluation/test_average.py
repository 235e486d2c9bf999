"""The paper's average over its benchmarks, from runs of all of them."""

import json
import shutil
from statistics import NormalDist

import pytest
from typer.testing import CliRunner

from healthgpt.app.cli import app
from healthgpt.evaluation import BENCHMARKS, Records, average_runs, summarise_answers, write_report
from healthgpt.hub_export.presets import PRESETS


def finish(folder, benchmark, closed, other, **changes):
    """A finished run: lists of which closed and which other questions were answered right."""
    facts = {"checkpoint": "m3", "checkpoint_state": None, "dtype": None, "task": "comprehension"}
    facts |= {"limit": None, "split": None} | changes
    rest = "choice" if benchmark in ("mmmu_med", "omnimedvqa") else "open"
    records = Records(folder, facts)
    records.add(
        [
            {"name": f"{kind} {number}", "kind": kind, "group": "", "recall": 0.0, "right": right}
            for kind, answers in (("closed", closed), (rest, other))
            for number, right in enumerate(answers)
        ]
    )
    write_report(folder, benchmark, summarise_answers(list(records.done.values())), facts)


@pytest.fixture
def runs(tmp_path):
    for number, name in enumerate(BENCHMARKS):
        plain = name in ("mmmu_med", "omnimedvqa")
        closed = [] if plain else [True] * 60 + [False] * 40
        finish(tmp_path / name, name, closed, [True] * (10 + number) + [False] * (90 - number))
    return [tmp_path / name for name in BENCHMARKS]


def test_the_published_average_is_the_mean_of_the_published_figures():
    for name in ("m3", "l14"):
        results = PRESETS[name].results
        figures = [value for benchmark in BENCHMARKS for value in results[benchmark].values()]
        assert len(figures) == 8 and abs(sum(figures) / 8 - results["average"]["all"]) <= 0.0501


def test_the_mean_of_eight_figures_and_its_interval(runs):
    summary, facts = average_runs(runs)
    assert list(summary) == [
        *(f"{name} {metric}" for name in ("vqa_rad", "path_vqa", "slake") for metric in ("closed", "all")),
        "mmmu_med all",
        "omnimedvqa all",
        "all",
    ]
    # 60 of 100 closed ones; over all (60 + 10 + number) of 200, or (10 + number) of 100
    figures = [60, 35, 60, 35.5, 60, 36, 13, 14]
    assert [figure["value"] for figure in summary.values()] == pytest.approx([*figures, sum(figures) / 8])
    assert summary["all"]["count"] == 3 * 200 + 2 * 100 and facts["checkpoint"] == "m3"
    # The variance of the mean: a closed question counts in two figures, 1/100 + 1/200, another in one.
    variance = 0
    for number in range(5):
        others, share = (10 + number) / 100, 100 if number > 2 else 200
        variance += 100 * others * (1 - others) / share**2
        variance += 100 * 0.6 * 0.4 * (1 / 100 + 1 / 200) ** 2 if number < 3 else 0
    half = 100 / 8 * variance**0.5 * NormalDist().inv_cdf(0.975)
    assert summary["all"]["high"] - summary["all"]["low"] == pytest.approx(2 * half, rel=0.1)
    assert summary["all"]["low"] < sum(figures) / 8 < summary["all"]["high"]


def test_the_command_puts_the_published_average_beside_it(runs, tmp_path):
    done = CliRunner().invoke(app, ["eval", "average", *map(str, runs), "-o", str(tmp_path / "all")])
    assert done.exit_code == 0, done.exception
    lines = (tmp_path / "all/results.md").read_text().splitlines()
    assert lines[0] == "| average | here | 95 % interval | number | HealthGPT-M3 | HealthGPT-L14 | HealthGPT-XL32 |"
    assert lines[2].startswith("| vqa_rad closed | 60.00 | ") and lines[2].endswith("| 100 | 73.7 | 77.7 |  |")
    assert lines[-1].startswith("| all | 39.19 | ") and lines[-1].endswith("| 800 | 61.3 | 66.4 | 70.4 |")
    again = CliRunner().invoke(app, ["eval", "average", *map(str, runs), "-o", str(tmp_path / "all"), "--json"])
    assert json.loads(again.stdout)["all"]["count"] == 800


def test_runs_that_cannot_be_averaged(runs, tmp_path):
    with pytest.raises(ValueError, match="there is no run of path_vqa, omnimedvqa"):
        average_runs([run for run in runs if run.name not in ("path_vqa", "omnimedvqa")])
    with pytest.raises(ValueError, match=r"vqa_rad and .*twice are both runs of vqa_rad"):
        shutil.copytree(runs[0], tmp_path / "twice")
        average_runs([*runs, tmp_path / "twice"])
    finish(tmp_path / "mine", "samples", [True], [])
    with pytest.raises(ValueError, match="mine is a run of 'samples'; the average is over vqa_rad, "):
        average_runs([tmp_path / "mine"])
    (tmp_path / "begun").mkdir()
    with pytest.raises(ValueError, match=r"begun/results.json does not exist"):
        average_runs([tmp_path / "begun"])
    (tmp_path / "begun/results.json").write_text('{"benchmark": "vqa_rad"}')
    with pytest.raises(ValueError, match=r"begun/results.json cannot be used: it lacks the entry 'checkpoint'"):
        average_runs([tmp_path / "begun"])
    for results in ({"all": 5}, ["all"], None, {"all": {"value": 1.0}}):
        content = {"benchmark": "vqa_rad", "checkpoint": "m3", "checkpoint_state": None, "dtype": None, "task": None}
        content |= {"limit": None, "split": None, "results": results}
        (tmp_path / "begun/results.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=r"begun/results.json cannot be used: "):
            average_runs([tmp_path / "begun"])
    finish(tmp_path / "short", "vqa_rad", [True], [True])
    (tmp_path / "short/records.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"records of .*short are not those of its 2 questions"):
        average_runs([tmp_path / "short"])
    finish(tmp_path / "other", "vqa_rad", [True], [], checkpoint="l14")
    with pytest.raises(ValueError, match="The runs are not of one task of one checkpoint in one precision"):
        average_runs([*runs[1:], tmp_path / "other"])
    finish(tmp_path / "part", "vqa_rad", [True], [], limit=1)
    with pytest.raises(ValueError, match="part is no run of the whole vqa_rad: it has the limit 1 and the split None"):
        average_runs([*runs[1:], tmp_path / "part"])
    finish(tmp_path / "train", "vqa_rad", [True], [], split="train")
    with pytest.raises(ValueError, match=r"train is no run of the whole vqa_rad: .* the split train"):
        average_runs([*runs[1:], tmp_path / "train"])
    finish(tmp_path / "open", "vqa_rad", [], [True])
    with pytest.raises(ValueError, match="open has no closed questions of vqa_rad"):
        average_runs([*runs[1:], tmp_path / "open"])
