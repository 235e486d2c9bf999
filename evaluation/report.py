"""Results as one JSON file and one Markdown table beside the published figures."""

from pathlib import Path

from ..hub_export.atomic import write_json
from ..hub_export.presets import PRESETS
from ..refusals import files, printable
from .benchmarks import BENCHMARKS

RESULTS_NAME = "results.json"


def write_report(folder: Path, benchmark: str, summary: dict[str, dict], facts: dict) -> str:
    """
    Writes `results.json` and `results.md`.

    Args:
        folder (`Path`): Folder of the run.
        benchmark (`str`): Its name; one of `hub_export.presets.BENCHMARKS` has published figures.
        summary (`dict`): `value`, `low`, `high` and `count` by metric.
        facts (`dict`): What the run was made with.

    Returns:
        `str`: The table.
    """
    content = {"benchmark": benchmark, **facts, "results": summary}
    write_json(folder / RESULTS_NAME, content)
    published = published_figures(benchmark)
    lines = [f"| {benchmark} | here | 95 % interval | number | {' | '.join(published)}".rstrip(" |") + " |"]
    lines.append("|---" * (4 + len(published)) + "|")
    for metric, result in summary.items():
        cells = [
            metric,
            f"{result['value']:.2f}",
            f"{result['low']:.2f} to {result['high']:.2f}",
            f"{result['count']}",
        ]
        cells += [str(figures.get(metric, "")) for figures in published.values()]
        lines.append(f"| {' | '.join(cells)} |")
    table = "\n".join(map(printable, lines)) + "\n"
    with files(folder / "results.md", "written"):
        (folder / "results.md").write_text(table, encoding="utf-8")
    return table


def published_figures(benchmark: str) -> dict[str, dict[str, float]]:
    """What the paper reports of a benchmark, by model and metric; of the average also the figures that it is of."""
    found = {}
    for preset in PRESETS.values():
        figures = dict(preset.results.get(benchmark, {}))
        for name in BENCHMARKS if benchmark == "average" else ():
            figures |= {f"{name} {metric}": value for metric, value in preset.results.get(name, {}).items()}
        if figures:
            found[preset.name] = figures
    return found
