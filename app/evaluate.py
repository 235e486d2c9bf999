"""`healthgpt eval`: answers scored on benchmarks, pictures compared with true ones."""

import itertools
from pathlib import Path
from typing import Annotated

import typer

from ..errors_healthgpt import HealthGPTError
from ..refusals import memory
from .common import (
    AsJson,
    Device,
    Dtype,
    MaxNewTokens,
    RequiredCheckpoint,
    bars,
    load,
    print_result,
    read,
    require_file,
    same_file,
    starting,
    stoppable,
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
TableOutput = Annotated[Path, typer.Option("--output", "-o", help="Folder of the tables.")]
Batch = Annotated[int, typer.Option(min=1, help="Samples done at once.")]
Limit = Annotated[int | None, typer.Option(min=1, help="Take only the first so many.")]
Name = Annotated[
    str,
    typer.Option(
        help="Name in the table; those with published figures are ct_to_mri_brain, ct_to_mri_pelvis, mri_to_ct_brain, "
        "mri_to_ct_pelvis, super_resolution and reconstruction."
    ),
]
Lpips = Annotated[bool, typer.Option("--lpips", help="LPIPS too; needs torchvision.")]


@evaluation.command("answers")
def answers(
    benchmark: Annotated[str, typer.Argument(help="vqa_rad, path_vqa, slake, mmmu_med, omnimedvqa or samples.")],
    data: Annotated[Path, typer.Argument(help="Its local copy, as the Hub has it; for samples, JSON lines.")],
    checkpoint: RequiredCheckpoint,
    output: Output,
    split: Annotated[
        str | None, typer.Option(help="Of a benchmark; by default test, and validation for mmmu_med.")
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(help="Task that answers; comprehension unless given, and of samples the one that they name."),
    ] = None,
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
    if benchmark == "samples":
        if split is not None:
            raise HealthGPTError("--split is for benchmarks that have splits; samples are one file.")
        require_file(data)
    with starting():
        from ..evaluation import Records, answer_items, items_of, read_benchmark, summarise_answers, write_report
        from ..runs import running, state_of, state_of_files
        from ..samples import pictures_of

    items = []
    if benchmark != "samples":
        with working("Reading the questions"):
            items = list(itertools.islice(read_benchmark(benchmark, data, split), limit))
    settings = {"checkpoint": checkpoint, "benchmark": benchmark, "data": str(data), "split": split, "task": task}
    settings |= {"limit": limit, "max_new_tokens": max_new_tokens, "dtype": dtype}
    settings |= {"checkpoint_state": state_of(checkpoint), "data_state": state_of(data)}
    model, processor = load(checkpoint, device, dtype, task or "comprehension")
    if benchmark == "samples":
        samples = read(data, model, processor, task, "comprehension")
        settings["pictures_state"] = state_of_files(pictures_of(samples))
        items = items_of(samples)[:limit]
    if not items:
        raise HealthGPTError(f"{data} has no questions.")
    with running(output, settings):
        records = Records(output, settings)
        kept = stoppable(
            lambda: f"{len(records.done)} answers are kept in {output}; the same command goes on from there."
        )
        with kept, bars() as progress, memory():
            bar = progress.add_task("Answering", total=len(items))
            scored = answer_items(
                model,
                processor,
                items,
                records,
                task or "comprehension",
                batch_size,
                max_new_tokens,
                lambda n: progress.advance(bar, n),
            )
        summary = summarise_answers(scored)
        table = write_report(output, benchmark, summary, settings)
    print_result(as_json, table, summary)


@evaluation.command("average")
def average(
    runs: Annotated[list[Path], typer.Argument(help="Folders of finished `eval answers`, one of each benchmark.")],
    output: TableOutput,
    as_json: AsJson = False,
) -> None:
    """
    Joins the runs of all five benchmarks to the paper's average, beside the published one.

    Example: healthgpt eval average results/vqa_rad results/slake results/path_vqa results/mmmu_med results/omnimedvqa -o results/all
    """
    with starting("Averaging"):
        from ..evaluation import average_runs, write_report
        from ..runs import running

        summary, facts = average_runs(runs)
        with running(output, facts):
            table = write_report(output, "average", summary, facts)
    print_result(as_json, table, summary)


@evaluation.command("draw")
def draw(
    data: Annotated[Path, typer.Argument(help="JSON lines as for train; samples with a target_image.")],
    checkpoint: RequiredCheckpoint,
    output: Output,
    name: Name = "pictures",
    task: Annotated[
        str | None, typer.Option(help="Task of the samples that name none; generation unless given.")
    ] = None,
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
    require_file(data)
    with starting():
        from ..evaluation import Records, draw_samples, load_lpips, write_report
        from ..runs import running, state_of, state_of_files
        from ..samples import pictures_of

        measure = load_lpips() if lpips else None
    settings = {"checkpoint": checkpoint, "data": str(data), "task": task, "limit": limit, "dtype": dtype}
    settings |= {"checkpoint_state": state_of(checkpoint), "data_state": state_of(data)}
    model, processor = load(checkpoint, device, dtype, task, "image")
    samples = read(data, model, processor, task, "generation")
    settings["pictures_state"] = state_of_files(pictures_of(samples))
    samples = [sample for sample in samples if sample["target_image"] is not None][:limit]
    if not samples:
        raise HealthGPTError(f"{data} has no samples with a target_image.")
    with running(output, settings):
        records = Records(output, settings)
        kept = stoppable(
            lambda: f"{len(records.done)} drawings are kept in {output}; the same command goes on from there."
        )
        with kept, bars() as progress, memory():
            bar = progress.add_task("Drawing", total=len(samples))
            draw_samples(
                model, processor, samples, output / "drawn", records, batch_size, lambda n: progress.advance(bar, n)
            )
        pairs = [(output / f"drawn/{number}.png", sample["target_image"]) for number, sample in enumerate(samples)]
        summary = compare_pairs(pairs, measure, resize=True)
        table = write_report(output, name, summary, settings)
    print_result(as_json, table, summary)


@evaluation.command("pictures")
def pictures(
    drawn: Annotated[Path, typer.Argument(help="Folder of drawn pictures.")],
    true: Annotated[Path, typer.Argument(help="Folder of true pictures with the same names.")],
    output: TableOutput,
    name: Name = "pictures",
    lpips: Lpips = False,
    as_json: AsJson = False,
) -> None:
    """
    Compares the pictures of two folders by name: SSIM, PSNR, MSE.

    Example: healthgpt eval pictures drawn true -o results/ct_to_mri --name ct_to_mri_brain
    """
    if same_file(output, drawn) or same_file(output, true):
        raise HealthGPTError(f"{output} holds the pictures: name another folder for the tables.")
    with starting():
        from ..evaluation import load_lpips, pair_folders, write_report
        from ..runs import running, state_of_files

        measure = load_lpips() if lpips else None
    pairs = pair_folders(drawn, true)
    settings = {"drawn": str(drawn), "true": str(true)}
    settings["pictures_state"] = state_of_files(path for pair in pairs for path in pair)
    summary = compare_pairs(pairs, measure, resize=False)
    with running(output, settings):
        table = write_report(output, name, summary, settings)
    print_result(as_json, table, summary)


def compare_pairs(pairs, lpips, resize: bool) -> dict[str, dict]:
    """
    Metrics of pairs of files, also LPIPS if that is given; `resize` brings true pictures to the size of the drawn ones, which else
    must be theirs.
    """
    from PIL import Image

    from ..evaluation import compare_pictures, summarise_pictures
    from ..medical import open_picture

    scores = []
    with stoppable(lambda: "No table was written; the same command starts again."), bars() as progress, memory():
        for paths in progress.track(pairs, description="Comparing"):
            drawn, true = (open_picture(path) for path in paths)
            if resize and true.size != drawn.size:
                true = true.resize(drawn.size, Image.Resampling.LANCZOS)
            elif true.size != drawn.size:
                left, right = paths
                sizes = (f"{picture.width} x {picture.height} pixels" for picture in (drawn, true))
                raise HealthGPTError(f"{left} has {next(sizes)} and {right} {next(sizes)}: they cannot be compared.")
            score = compare_pictures(drawn, true)
            scores.append(score if lpips is None else score | {"LPIPS": lpips(drawn, true)})
    return summarise_pictures(scores)
