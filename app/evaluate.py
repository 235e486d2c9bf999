"""`healthgpt eval`: answers scored on benchmarks, pictures compared with true ones."""

import itertools
from pathlib import Path
from typing import Annotated

import typer

from .common import (
    AnswerTask,
    AsJson,
    Device,
    Dtype,
    MaxNewTokens,
    RequiredCheckpoint,
    bars,
    load,
    print_result,
    require_kind,
    working,
)

evaluation = typer.Typer(
    help="Scores answers on benchmarks and drawn pictures against true ones.\n\n"
    "Example: healthgpt eval answers vqa_rad vqa-rad -c HealthGPT-M3 -o results/vqa_rad",
    no_args_is_help=True,
)

Output = Annotated[
    Path, typer.Option("--output", "-o", help="Folder of records and tables; a killed run goes on there.")
]
Batch = Annotated[int, typer.Option(min=1, help="Samples done at once.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Take only the first so many.")]
Lpips = Annotated[bool, typer.Option("--lpips", help="LPIPS too; needs torchvision.")]


@evaluation.command("answers")
def answers(
    benchmark: Annotated[str, typer.Argument(help="vqa_rad, path_vqa, slake, mmmu_med, omnimedvqa or samples.")],
    data: Annotated[Path, typer.Argument(help="Its local copy, as the Hub has it; for samples, JSON lines.")],
    checkpoint: RequiredCheckpoint,
    output: Output,
    split: Annotated[str | None, typer.Option(help="By default test, and validation for mmmu_med.")] = None,
    task: AnswerTask = "comprehension",
    batch_size: Batch = 8,
    limit: Limit = None,
    max_new_tokens: MaxNewTokens = 64,
    as_json: AsJson = False,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """
    Answers a benchmark's questions and scores the answers: accuracy with its interval, beside the published figures.

    Example: healthgpt eval answers vqa_rad vqa-rad -c HealthGPT-M3 -o results/vqa_rad
    """
    with working("Starting"):
        from ..evaluation import Records, answer_items, read_benchmark, state_of, summarise_answers, write_report

    with working("Reading the questions"):
        items = list(itertools.islice(read_benchmark(benchmark, data, split), limit))
    if not items:
        raise ValueError(f"{data} has no questions.")
    settings = {"checkpoint": checkpoint, "benchmark": benchmark, "data": str(data), "split": split, "task": task}
    settings |= {"limit": limit, "max_new_tokens": max_new_tokens, "dtype": dtype}
    settings |= {"checkpoint_state": state_of(checkpoint), "data_state": state_of(data)}
    model, processor = load(checkpoint, device, dtype)
    require_kind(model, task, "text")
    records = Records(output, settings)
    with bars() as progress:
        bar = progress.add_task("Answering", total=len(items))
        scored = answer_items(
            model, processor, items, records, task, batch_size, max_new_tokens, lambda n: progress.advance(bar, n)
        )
    summary = summarise_answers(scored)
    print_result(as_json, write_report(output, benchmark, summary, settings), summary)


@evaluation.command("draw")
def draw(
    data: Annotated[Path, typer.Argument(help="JSON lines as for train; samples with a target_image.")],
    checkpoint: RequiredCheckpoint,
    output: Output,
    name: Annotated[str, typer.Option(help="Benchmark in the table, for example super_resolution.")] = "pictures",
    task: Annotated[str, typer.Option(help="Task of the samples that name none.")] = "generation",
    batch_size: Batch = 8,
    limit: Limit = None,
    lpips: Lpips = False,
    as_json: AsJson = False,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """
    Draws what samples ask for and compares the pictures with their targets: SSIM, PSNR, MSE.

    Targets are brought to the size that the checkpoint draws.

    Example: healthgpt eval draw pairs.jsonl -c HealthGPT-M3 -o results/ct_to_mri --name ct_to_mri_brain
    """
    with working("Starting"):
        from ..evaluation import Records, draw_samples, load_lpips, state_of
        from ..training import read_samples

        measure = load_lpips() if lpips else None
    settings = {"checkpoint": checkpoint, "data": str(data), "task": task, "limit": limit, "dtype": dtype}
    settings |= {"checkpoint_state": state_of(checkpoint), "data_state": state_of(data)}
    model, processor = load(checkpoint, device, dtype)
    with working("Reading the samples"):
        samples = read_samples(data, model.config, task)
    samples = [sample for sample in samples if sample["target_image"] is not None][:limit]
    if not samples:
        raise ValueError(f"{data} has no samples with a target_image.")
    records = Records(output, settings)
    with bars() as progress:
        bar = progress.add_task("Drawing", total=len(samples))
        draw_samples(
            model, processor, samples, output / "drawn", records, batch_size, lambda n: progress.advance(bar, n)
        )
    pairs = [(output / f"drawn/{number}.png", sample["target_image"]) for number, sample in enumerate(samples)]
    report_pairs(pairs, output, name, settings, measure, as_json, resize=True)


@evaluation.command("pictures")
def pictures(
    drawn: Annotated[Path, typer.Argument(help="Folder of drawn pictures.")],
    true: Annotated[Path, typer.Argument(help="Folder of true pictures with the same names.")],
    output: Output,
    name: Annotated[str, typer.Option(help="Benchmark in the table, for example super_resolution.")] = "pictures",
    lpips: Lpips = False,
    as_json: AsJson = False,
) -> None:
    """
    Compares the pictures of two folders by name: SSIM, PSNR, MSE.

    Example: healthgpt eval pictures drawn true -o results/ct_to_mri --name ct_to_mri_brain
    """
    with working("Starting"):
        from ..evaluation import load_lpips, pair_folders

        measure = load_lpips() if lpips else None
    settings = {"drawn": str(drawn), "true": str(true)}
    report_pairs(pair_folders(drawn, true), output, name, settings, measure, as_json, resize=False)


def report_pairs(pairs, output: Path, name: str, settings: dict, lpips, as_json: bool, resize: bool) -> None:
    """
    Compares pairs of files, also by LPIPS if that is given; `resize` brings true pictures to the size of the drawn ones, which else
    must be theirs.
    """
    from PIL import Image

    from ..evaluation import Records, compare_pictures, summarise_pictures, write_report
    from ..medical import open_picture

    scores = []
    with bars() as progress:
        for paths in progress.track(pairs, description="Comparing"):
            drawn, true = (open_picture(path) for path in paths)
            if resize and true.size != drawn.size:
                true = true.resize(drawn.size, Image.Resampling.LANCZOS)
            elif true.size != drawn.size:
                left, right = paths
                raise ValueError(f"{left} has {drawn.size} pixels and {right} {true.size}: they cannot be compared.")
            score = compare_pictures(drawn, true)
            scores.append(score if lpips is None else score | {"LPIPS": lpips(drawn, true)})
    Records(output, settings)  # makes the folder, and refuses that of another run
    summary = summarise_pictures(scores)
    print_result(as_json, write_report(output, name, summary, settings), summary)
