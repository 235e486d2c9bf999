"""Results as one JSON file and one Markdown table beside the published figures."""

from pathlib import Path

from ..hub_export.presets import PRESETS
from ..hub_export.write import write_json


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
    write_json(folder / "results.json", content)
    published = {preset.name: preset.results[benchmark] for preset in PRESETS.values() if benchmark in preset.results}
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
    table = "\n".join(lines) + "\n"
    (folder / "results.md").write_text(table)
    return table
