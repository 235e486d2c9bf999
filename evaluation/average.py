"""The paper's average over its five benchmarks of comprehension, from runs of all of them."""

import json
from pathlib import Path

import torch

from ..errors_healthgpt import HealthGPTError
from ..hub_export.confine import read_json, reading
from ..hub_export.presets import PRESETS
from .benchmarks import BENCHMARKS, DEFAULT_SPLITS
from .records import RECORDS_NAME
from .report import RESULTS_NAME

FIGURES = [(name, metric) for name in BENCHMARKS for metric in PRESETS["m3"].results[name]]


def average_runs(folders: list[Path]) -> tuple[dict[str, dict], dict]:
    """
    The mean of the eight accuracies that the paper reports (table 1): over the closed and over all questions of VQA-RAD, SLAKE and
    PathVQA, and over all of MMMU-Med and OmniMedVQA.

    Args:
        folders (`list[Path]`): Folders of finished `healthgpt eval answers`, one for each key of `BENCHMARKS`.

    Returns:
        `tuple[dict, dict]`: The eight and, as `"all"`, their mean, each with `value`, `low`, `high` and `count`; and what the runs
        have in common. The interval of the mean is a percentile bootstrap (Efron 1979): closed and other questions of every
        benchmark are drawn again a thousand times, from a fixed seed.

    Raises:
        HealthGPTError: if a run is not finished, of no benchmark or only a part of it, there twice, lacking or of another checkpoint.
    """
    runs, folder_of, answers, common = {}, {}, {}, []
    for folder in folders:
        with reading(folder / RESULTS_NAME):
            content = read_json(folder / RESULTS_NAME)
            name = str(content["benchmark"])
        if name not in BENCHMARKS:
            raise HealthGPTError(f"{folder} is a run of {name!r}; the average is over {', '.join(BENCHMARKS)}.")
        if name in runs:
            raise HealthGPTError(f"{folder_of[name]} and {folder} are both runs of {name}.")
        with reading(folder / RESULTS_NAME):
            common.append({key: content[key] for key in ("checkpoint", "checkpoint_state", "dtype", "task")})
            limit, split = content["limit"], content["split"]
            runs[name] = {
                metric: {key: float(figure[key]) for key in ("value", "low", "high")} | {"count": int(figure["count"])}
                for metric, figure in content["results"].items()
            }
            count = runs[name]["all"]["count"]
        if limit is not None or split not in (None, DEFAULT_SPLITS.get(name, "test")):
            raise HealthGPTError(
                f"{folder} is no run of the whole {name}: it has the limit {limit} and the split {split}."
            )
        folder_of[name], answers[name] = folder, read_answers(folder)
        if sum(map(len, answers[name].values())) != count:
            raise HealthGPTError(f"The records of {folder} are not those of its {count} questions.")
    lacking = [name for name in BENCHMARKS if name not in runs]
    if lacking:
        raise HealthGPTError(f"The average is over {', '.join(BENCHMARKS)}: there is no run of {', '.join(lacking)}.")
    if any(facts != common[0] for facts in common):
        raise HealthGPTError(f"The runs are not of one task of one checkpoint in one precision: {json.dumps(common)}.")
    summary = {}
    for name, metric in FIGURES:
        if metric not in runs[name]:
            raise HealthGPTError(f"{folder_of[name]} has no {metric} questions of {name}.")
        summary[f"{name} {metric}"] = runs[name][metric]
    values = torch.tensor(resampled_means(answers), dtype=torch.float64)
    low, high = values.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    summary["all"] = {
        "value": sum(figure["value"] for figure in summary.values()) / len(FIGURES),
        "low": low,
        "high": high,
        "count": sum(runs[name]["all"]["count"] for name in runs),
    }
    return summary, common[0] | {"runs": list(map(str, folders))}


def read_answers(folder: Path) -> dict[bool, torch.Tensor]:
    """Which closed (`True`) and which other (`False`) questions of a run were answered right, `float64` of shape `(count,)`."""
    path = folder / RECORDS_NAME
    with reading(path):
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return {
            closed: torch.tensor(
                [record["right"] for record in records if (record["kind"] == "closed") == closed], dtype=torch.float64
            )
            for closed in (True, False)
        }


def resampled_means(answers: dict[str, dict[bool, torch.Tensor]]) -> list[float]:
    """The mean of the eight, in percent, of a thousand resamples."""
    generator = torch.Generator().manual_seed(0)
    means = []
    for _ in range(1000):
        figures = {}
        for name, parts in answers.items():
            drawn = {
                closed: part[torch.randint(len(part), (len(part),), generator=generator)] if len(part) else part
                for closed, part in parts.items()
            }
            figures[name, "closed"] = drawn[True].mean().item()
            figures[name, "all"] = torch.cat([drawn[True], drawn[False]]).mean().item()
        means.append(100 * sum(figures[key] for key in FIGURES) / len(FIGURES))
    return means
