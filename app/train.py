"""`healthgpt train`: one stage of training, from a checkpoint and JSON lines to a plugin or a checkpoint."""

import contextlib
import importlib
import math
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated

import typer

from ..errors_healthgpt import HealthGPTError
from ..refusals import files, memory, printable
from .common import (
    AsJson,
    Device,
    Dtype,
    RequiredCheckpoint,
    bars,
    load,
    print_result,
    read,
    require_file,
    starting,
    stoppable,
)

# What may change when a run goes on: it may be longer, keep other checkpoints, and run on other hardware.
MAY_CHANGE = {"output", "epochs", "max_steps", "save_total_limit", "workers", "gradient_checkpointing", "resume"}
MAY_CHANGE |= {"as_json", "device"}


def train(
    context: typer.Context,
    data: Annotated[Path, typer.Argument(help="JSON lines: task, instruction, response, input_image, target_image.")],
    checkpoint: RequiredCheckpoint,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the plugin, logs and checkpoints.")],
    stage: Annotated[str, typer.Option(help="alignment, fusion or instruction.")] = "instruction",
    task: Annotated[
        str | None, typer.Option(help="Task of the samples that name none; a new one needs --kind or --init-from.")
    ] = None,
    kind: Annotated[str | None, typer.Option(help="text or image: what the new task puts out.")] = None,
    init_from: Annotated[
        str | None, typer.Option(help="Task with whose settings and weights the new one starts.")
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(min=1, help="Total rank of the new task; that of its kind, else 64 for text, 256 for image."),
    ] = None,
    experts: Annotated[int | None, typer.Option(min=1, help="Experts of the new task; 4 as published.")] = None,
    alpha: Annotated[float | None, typer.Option(help="H-LoRA alpha of the new task; twice its rank.")] = None,
    eval_data: Annotated[Path | None, typer.Option(help="JSON lines whose loss is logged after every epoch.")] = None,
    epochs: Annotated[float, typer.Option(help="Passes over the data.")] = 1.0,
    max_steps: Annotated[int | None, typer.Option(min=1, help="Optimiser steps, in place of --epochs.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Samples of a step, over all processes.")] = None,
    per_device_batch_size: Annotated[int, typer.Option(min=1, help="Samples that a process takes at once.")] = 1,
    learning_rate: Annotated[
        float | None, typer.Option(min=0, help="Of plugin or token tables; those of the projector are scaled with it.")
    ] = None,
    dropout: Annotated[float | None, typer.Option(min=0, max=1, help="Dropout of H-LoRA.")] = None,
    max_length: Annotated[int, typer.Option(min=1, help="Tokens of the longest sample.")] = 2048,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Compute activations again instead of keeping them.")
    ] = False,
    save_steps: Annotated[int, typer.Option(min=1, help="Steps between two checkpoints.")] = 500,
    save_total_limit: Annotated[
        int | None, typer.Option(min=1, help="Checkpoints that are kept, the newest; by default all.")
    ] = None,
    logging_steps: Annotated[int, typer.Option(min=1, help="Steps between two lines of the log.")] = 10,
    workers: Annotated[int, typer.Option(min=0, help="Processes that prepare batches.")] = 0,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of order, dropout and new weights.")] = 0,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --output: the same command as before.")
    ] = False,
    as_json: AsJson = False,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """
    Trains one stage of a checkpoint: plugin and projector of the tasks in the data, or token tables for all of them.

    Writes a folder for `healthgpt plugin add` for each task: of --stage fusion, for each task that draws, with its tables.
    Several processes: torchrun --nproc-per-node 2 -m healthgpt train ...

    Example: healthgpt train pairs.jsonl -c HealthGPT-M3 -o ct-to-mri --task ct_to_mri --init-from generation
    """
    from ..runs import RUN_NAME, require_same, state_of
    from ..training.recipes import STAGES

    for path in filter(None, (data, eval_data)):
        require_file(path)
    if not 0 < epochs < math.inf:
        raise HealthGPTError(f"--epochs is a number above 0, not {epochs}.")
    if stage not in STAGES:
        raise HealthGPTError(f"There is no stage {stage!r}; choose one of {', '.join(STAGES)}.")
    settings = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in context.params.items()
        if name not in MAY_CHANGE
    }
    settings["processes"] = int(os.environ.get("WORLD_SIZE", 1))
    for name in ("checkpoint", "data", "eval_data"):
        if settings[name] is not None:
            settings[f"{name}_state"] = state_of(settings[name])
    with files(output):
        is_taken = output.exists() and (not output.is_dir() or any(output.iterdir()))
    if not resume and is_taken:
        raise HealthGPTError(f"{output} exists and is not an empty folder; --resume goes on with the run in it.")
    if resume and not (output / RUN_NAME).is_file():
        raise HealthGPTError(f"{output} holds no run that could go on: start one without --resume.")
    if resume:
        require_same(output, settings)
    with starting():
        for package in (
            "accelerate",
            "tensorboard",
            "datasets",
        ):  # which are imported late, or missed with other errors
            importlib.import_module(package)
    with stoppable(lambda: kept(output)), memory():
        folders = run_stage(SimpleNamespace(**context.params), settings)
    written = list(map(str, folders))
    if folders:
        print_result(as_json, "\n".join(map(printable, written)), {"plugins": written})


def kept(output: Path) -> str:
    """What a training that is stopped leaves, and how to go on."""
    from ..runs import RUN_NAME
    from ..training import last_checkpoint

    if not (output / RUN_NAME).is_file():
        return "Nothing was written; the same command starts again."
    reached = last_checkpoint(output)
    if reached is None:
        return f"{output} holds no checkpoint yet; the same command with --resume starts from the first step."
    return f"{reached} is kept; the same command with --resume goes on from there."


def run_stage(options: SimpleNamespace, settings: dict) -> list[Path]:
    """Trains as the options of `train` say and returns the folders of the plugins; none in other processes than the first."""
    import transformers

    from ..runs import require_same, running, state_of_files
    from ..samples import pictures_of
    from ..training import add_task, last_checkpoint, save_plugin, typical_codes

    output = options.output
    model, processor = load(options.checkpoint, options.device, options.dtype)
    transformers.set_seed(options.seed)
    tasks = model.config.tasks
    chosen = {name: getattr(options, name) for name in ("kind", "rank", "experts", "alpha")}
    if options.task is not None and options.task not in tasks:
        chosen["num_experts"] = chosen.pop("experts")
        new = new_settings(tasks, options.task, options.init_from, chosen)
        add_task(model, processor, options.task, new, options.init_from)
    elif any(option is not None for option in (options.init_from, *chosen.values())):
        raise HealthGPTError("--kind, --init-from, --rank, --experts and --alpha are for a --task that is new.")
    samples = read(options.data, model, processor, options.task)
    held_out = None if options.eval_data is None else read(options.eval_data, model, processor, options.task)
    pictures = pictures_of(samples) | (set() if held_out is None else pictures_of(held_out))
    with files("An image of the samples"):
        settings["pictures_state"] = state_of_files(pictures)
    if options.resume:
        require_same(output, settings)  # with the pictures, before anything takes long
    trained = sorted(set(samples["task"]))
    if options.stage != "fusion" and len({tasks[name].kind for name in trained}) > 1:
        raise HealthGPTError(
            f"{options.data} has tasks of both kinds, {', '.join(trained)}; this stage trains one kind at a time."
        )
    trainer, answering = trainer_of(options, model, processor, samples, held_out, trained)
    steps = math.ceil(len(samples) / trainer.recipe.batch_size)  # of a pass
    with running(output, settings) if trainer.is_world_process_zero() else contextlib.nullcontext():
        with (
            files(output, "written"),
            contextlib.redirect_stdout(sys.stderr),
        ):  # where progress goes; the Trainer prints its losses
            reached = last_checkpoint(output) if options.resume else None
            if reached is not None and int(reached.rpartition("-")[2]) >= (
                options.max_steps or math.ceil(options.epochs * steps)
            ):
                trainer._load_from_checkpoint(reached)  # the Trainer would take a step more
            else:
                trainer.train(resume_from_checkpoint=reached)
        if not trainer.is_world_process_zero():
            return []
        for name, tables in answering.items():
            model.use_token_tables(tables, [name])
        for name in set(trained) - set(answering):
            if tasks[name].kind == "image":
                tasks[name].typical_codes = typical_codes(trainer.train_dataset, name) or tasks[name].typical_codes
        folders = [output / name for name in trained if name not in answering]
        for folder in folders:
            save_plugin(model, folder.name, folder, with_tables=options.stage == "fusion")
    return folders


def trainer_of(options: SimpleNamespace, model, processor, samples, held_out, trained: list[str]):
    """The trainer of a stage, once every sample was tried; and the tables that tasks that answer get back after fusion."""
    from ..training import (
        HealthGPTTrainer,
        TrainingCollator,
        add_codes,
        recipe_of,
        start_fusion,
        training_arguments,
    )

    kind = model.config.tasks[trained[0]].kind
    recipe = changed(
        recipe_of(options.stage, kind, model.config), options.batch_size, options.learning_rate, options.dropout
    )
    answering = start_fusion(model, trained) if options.stage == "fusion" else {}
    arguments = training_arguments(
        recipe,
        model,
        options.output,
        options.per_device_batch_size,
        num_train_epochs=options.epochs,
        max_steps=options.max_steps or -1,
        save_steps=options.save_steps,
        save_total_limit=options.save_total_limit,
        logging_steps=options.logging_steps,
        # By steps: what is logged "by epoch" comes after the checkpoint of the epoch's last step, and a run that goes on there lacks it.
        eval_strategy="no" if held_out is None else "steps",
        eval_steps=math.ceil(len(samples) / recipe.batch_size),
        dataloader_num_workers=options.workers,
        seed=options.seed,
        use_cpu=model.device.type == "cpu",
        report_to="tensorboard",
        disable_tqdm=False,
        **({"gradient_checkpointing": True} if options.gradient_checkpointing else {}),
    )
    if arguments.n_gpu > 1:
        raise HealthGPTError(
            f"One process trains on one GPU and sees {arguments.n_gpu}: start torchrun --nproc-per-node {arguments.n_gpu} "
            "-m healthgpt train ..., or set CUDA_VISIBLE_DEVICES."
        )
    with arguments.main_process_first():
        samples = add_codes(samples, model, processor)
        held_out = None if held_out is None else add_codes(held_out, model, processor)
    collator = TrainingCollator(processor, options.max_length)
    needs_pictures = set(recipe.learning_rates) == {"projector"}
    with bars() as progress:
        for path, rows in ((options.data, samples), (options.eval_data, held_out)):
            if rows is not None:
                collator.check(progress.track(rows, description="Trying every line"), path, needs_pictures)
    with files(options.output, "made"):
        trainer = HealthGPTTrainer(
            model,
            recipe,
            trained,
            args=arguments,
            train_dataset=samples,
            eval_dataset=held_out,
            data_collator=collator,
        )
    return trainer, answering


def changed(recipe, batch_size: int | None, learning_rate: float | None, dropout: float | None):
    """A recipe with what was chosen in place of the published figures; all its rates are scaled as its highest one."""
    rates = recipe.learning_rates
    if learning_rate is not None:
        rates = {part: rate * learning_rate / max(rates.values()) for part, rate in rates.items()}
    return replace(
        recipe,
        learning_rates=rates,
        batch_size=batch_size or recipe.batch_size,
        dropout=recipe.dropout if dropout is None else dropout,
    )


def new_settings(tasks, name: str, init_from: str | None, chosen: dict) -> dict:
    """Settings of a new task: those of the one it starts from, or as the checkpoint's own or HealthGPT-M3's of its kind, and what was chosen."""
    chosen = {key: value for key, value in chosen.items() if value is not None}
    if init_from is not None and init_from not in tasks:
        raise HealthGPTError(f"There is no task {init_from!r} to start from; there are {', '.join(tasks)}.")
    if init_from is not None:
        settings = asdict(tasks[init_from])
        if chosen.get("kind", settings["kind"]) != settings["kind"]:
            raise HealthGPTError(
                f"A task of the kind {chosen['kind']} cannot start from {init_from!r}, which is of the kind {settings['kind']}."
            )
        return settings | chosen
    if "kind" not in chosen:
        raise HealthGPTError(
            f"Task {name!r} is new: say its --kind, text or image, or a task of this checkpoint to --init-from."
        )
    draws = chosen["kind"] == "image"
    ranks = [settings.rank for settings in tasks.values() if settings.kind == chosen["kind"]]
    rank = chosen.get("rank", ranks[0] if ranks else 256 if draws else 64)
    settings = {"rank": rank, "alpha": 2 * rank, "num_experts": 4, "vision_layer": 1 if draws else -2}
    tables = [settings.token_tables for settings in tasks.values() if settings.kind == chosen["kind"]]
    return settings | {"token_tables": tables[0] if tables else None} | chosen
