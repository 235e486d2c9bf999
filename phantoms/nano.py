"""
Builds the small HealthGPT from nothing: `python -m healthgpt.phantoms.nano WORK OUTPUT`.

    parts      language model, vision tower, VQGAN, as published files
    alignment  each task learns to read pictures          (stage 1)
    fusion     token tables with the image codes           (stage 2)
    instruction  questions; the five drawing tasks         (stage 3)
    export     back to the published files and through `hub_export` to one checkpoint
    card       what it makes of the test split, beside trivial answers

Every step leaves its result in WORK and is not done again when it is there. The stages are those of `healthgpt.training` with higher
learning rates and smaller batches than the published ones: a small model on a small machine. `--compare` also trains it in other ways (the
first stage alone, without the second, all in one mixed stage of as many steps) and puts them beside it in the card.
"""

import argparse
import json
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import datasets
import torch
import transformers
from datasets import Dataset
from torch import nn
from transformers import AutoModelForCausalLM

from .. import HealthGPTForConditionalGeneration, HealthGPTProcessor
from ..app.common import stoppable
from ..errors_healthgpt import HealthGPTError
from ..hub_export import ExportSources, export
from ..hub_export.atomic import write_json
from ..hub_export.card import CARD_NAME
from ..hub_export.plugins import extract_plugin
from ..refusals import files, memory, printable
from ..runs import running
from ..samples import read_samples
from ..training import (
    HealthGPTTrainer,
    Recipe,
    TrainingCollator,
    add_codes,
    start_fusion,
    training_arguments,
    typical_codes,
)
from ..training.trainer import TRAINED_NAME
from .card import nano_card
from .parts import Log, build_base, build_vision, build_vqgan
from .report import describe, draw_tasks, report_answers, report_findings, report_pictures
from .samples import write_samples

REAL = Path(__file__).parent.parent / "tests/golden/images"  # which a clone has, and an installed package has not
RANKS = {"comprehension": (16, 4), "generation": (64, 4)}
KINDS = {"comprehension": "text", "generation": "image"}
COMPREHENSION_SAMPLES, DRAWING_SAMPLES = 12000, 18000


@dataclass(frozen=True)
class Stage:
    """One training run: samples whose instruction it takes, parts with their rates, and how many steps."""

    name: str
    tasks: tuple[str, ...]
    instructions: tuple[str, ...]  # beginnings; empty takes all
    recipe: Recipe
    steps: int


REPORTS = ("Describe this picture.", "Write a short report.")
STAGES = (
    Stage("alignment_text", ("comprehension",), REPORTS, Recipe({"projector": 2e-3}, 16, 0.0, "cosine"), 300),
    Stage(
        "alignment_image",
        ("generation",),
        ("Reconstruct",),
        Recipe({"projector": 2e-3, "plugin": 2e-3}, 16, 0.0, "cosine"),
        150,
    ),
    Stage("fusion", ("comprehension", "generation"), (), Recipe({"token_tables": 5e-3}, 16, 0.0, "constant"), 400),
    Stage(
        "instruction_text", ("comprehension",), (), Recipe({"projector": 1e-3, "plugin": 2e-3}, 16, 0.0, "cosine"), 600
    ),
    Stage(
        "instruction_image", ("generation",), (), Recipe({"projector": 2e-3, "plugin": 3e-3}, 16, 0.0, "cosine"), 2000
    ),
)

MIXED = Recipe({"projector": 1e-3, "plugin": 2e-3, "token_tables": 5e-3}, 16, 0.0, "cosine")
WAYS = {
    "stage 1 alone": STAGES[:2],
    "without stage 2": STAGES[:2] + STAGES[3:],
    "one mixed stage": (
        Stage("mixed", ("comprehension", "generation"), (), MIXED, sum(stage.steps for stage in STAGES)),
    ),
}


def build(work: Path, output: Path, scale: float = 1.0, compare: bool = False) -> None:
    """
    Builds the checkpoint.

    Args:
        work (`Path`): Folder of intermediate results.
        output (`Path`): Folder to make; what was there goes once the new one is complete.
        scale (`float`, defaults to 1.0): Share of steps and samples; a small one only shows that everything runs.
        compare (`bool`, defaults to `False`): Whether to train and measure the `WAYS` too.
    """
    start = time.perf_counter()

    def log(text):
        print(f"{time.perf_counter() - start:7.0f} s  {text}", flush=True)

    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    with running(work, {"scale": scale, "stages": [repr(stage) for stage in STAGES]}):
        build_parts(work, scale, log)
        model, processor = run_stages(work, work / "stages", STAGES, scale, log)
        publish(model, processor, work)
        log("export")
        exported = work / "exported" / output.name  # a checkpoint remembers the name of its folder
        exported.parent.mkdir(exist_ok=True)
        shutil.rmtree(exported, ignore_errors=True)
        export(sources_of(work, work / "trained"), exported)
        add_typical_codes(exported, work / "data/generation.jsonl")
        model, processor = load(exported)
        own = measure(model, processor, work / "report.json", scale, log)
        (work / "compared").mkdir(exist_ok=True)
        for way, stages in WAYS.items() if compare else ():
            log(way)
            trained = run_stages(work, work / "stages", stages, scale, log)
            measure(*trained, work / f"compared/{way}.json", scale, log)
        compared = {way: work / f"compared/{way}.json" for way in WAYS}
        compared = {way: json.loads(path.read_text()) for way, path in compared.items() if path.exists()}
        card = nano_card(output.name, model.num_parameters(), own, compared, describe(model, processor, REAL))
        (exported / CARD_NAME).write_text(card, encoding="utf-8")
        shutil.rmtree(output, ignore_errors=True)
        shutil.copytree(exported, output)
        log(f"{output}: {sum(path.stat().st_size for path in output.iterdir()) / 1e6:.1f} MB")


def build_parts(work: Path, scale: float, log: Log) -> None:
    """The frozen parts, the samples, and the checkpoint that training starts from."""
    count = max(round(12000 * scale), 600)
    for name, make in (
        ("base", lambda folder: build_base(folder, log, share(750, scale), share(1500, scale), count // 2)),
        ("vision", lambda folder: build_vision(folder, log, share(4000, scale), count)),
        ("vqgan", lambda folder: build_vqgan(folder, log, share(1300, scale), count)),
        ("data", lambda folder: write_data(folder, scale)),
    ):
        if not (work / name).exists():
            log(name)
            shutil.rmtree(work / "making", ignore_errors=True)
            make(work / "making")
            (work / "making").rename(work / name)
    if not (work / "start").exists():
        torch.manual_seed(0)
        for task, sizes in RANKS.items():
            write_fresh_plugin(work, task, *sizes)
        export(sources_of(work, work), work / "start", skip_forward=True)


def share(steps: int, scale: float) -> int:
    return max(round(steps * scale), 20)  # fewer have no warm-up


def run_stages(work: Path, folder: Path, stages: tuple[Stage, ...], scale: float, log: Log):
    """Trains the stages one after the other, with results in `folder`, and returns model and processor."""
    model, processor = load(work / "start")
    samples = {task: read_samples(work / f"data/{task}.jsonl", model.config, processor) for task in KINDS}
    samples = {task: add_codes(rows, model, processor, batch_size=64) for task, rows in samples.items()}
    for stage in stages:
        log(stage.name)
        folder = folder / stage.name  # the results of the stages before it decide what comes out
        train(model, processor, stage, samples, folder, share(stage.steps, scale))
    return model.eval(), processor


def measure(model, processor, path: Path, scale: float, log: Log) -> dict:
    """What the model makes of the test split, from the file if that is known."""
    if not path.exists():
        answers = report_answers(model, processor, share(200, scale), log)
        drawings = draw_tasks(model, processor, share(100, scale))
        pictures = report_pictures(drawings, log)
        findings = report_findings(model, processor, drawings, log)
        write_json(path, {"answers": answers, "pictures": pictures, "findings": findings})
    return json.loads(path.read_text())


def write_data(folder: Path, scale: float) -> None:
    counts = [max(round(count * scale), 64) for count in (COMPREHENSION_SAMPLES, DRAWING_SAMPLES)]
    write_samples(folder, "train", *counts)


def add_typical_codes(checkpoint: Path, data: Path) -> None:
    """What the task that draws draws without an input image, which the published formats of files have no place for."""
    model, processor = load(checkpoint)
    samples = add_codes(read_samples(data, model.config, processor), model, processor)
    model.config.tasks["generation"].typical_codes = typical_codes(samples, "generation")
    model.config.save_pretrained(checkpoint)


def sources_of(work: Path, plugins: Path) -> ExportSources:
    fusion = plugins / "generation/fusion_layer_weights.bin"
    return ExportSources(
        work / "base",
        work / "vision",
        comprehension=plugins / "comprehension/hlora_weights.bin",
        generation=plugins / "generation/hlora_weights.bin",
        fusion=fusion if fusion.exists() else None,
        vqgan=work / "vqgan/last.ckpt",
        vqgan_config=work / "vqgan/model.yaml",
    )


def write_fresh_plugin(work: Path, task: str, rank: int, experts: int) -> None:
    """A plugin that changes nothing yet, with the published names."""
    base = AutoModelForCausalLM.from_pretrained(work / "base")
    vision_width = json.loads((work / "vision/config.json").read_text())["hidden_size"]
    tensors = {}
    for name, linear in base.named_modules():
        if type(linear) is nn.Linear and name != "lm_head":
            name = f"base_model.model.{name}"
            tensors[f"{name}.lora_route.weight"] = nn.Linear(linear.in_features, experts).weight
            tensors[f"{name}.lora_A.weight"] = nn.Linear(linear.in_features, rank).weight
            tensors[f"{name}.lora_B.weight"] = torch.zeros(linear.out_features, rank)
    width = base.config.hidden_size
    for index, linear in ((0, nn.Linear(vision_width, width)), (2, nn.Linear(width, width))):
        tensors[f"base_model.model.model.mm_projector.{index}.weight"] = linear.weight
        tensors[f"base_model.model.model.mm_projector.{index}.bias"] = linear.bias
    (work / task).mkdir(exist_ok=True)
    torch.save({name: tensor.detach() for name, tensor in tensors.items()}, work / task / "hlora_weights.bin")


def load(folder: Path):
    model = HealthGPTForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    return model, HealthGPTProcessor.from_pretrained(folder)


def train(model, processor, stage: Stage, samples: dict[str, Dataset], folder: Path, steps: int) -> None:
    """Runs one stage, or takes its result from an earlier run."""
    rates = stage.recipe.learning_rates
    answering = start_fusion(model, list(stage.tasks)) if "token_tables" in rates else {}
    rows = [row for task in stage.tasks for row in select(samples[task], stage.instructions)]
    arguments = training_arguments(
        stage.recipe,
        model,
        folder,
        stage.recipe.batch_size,
        max_steps=steps,
        logging_steps=max(steps // 10, 1),
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        max_grad_norm=1.0,
        seed=0,
    )
    trainer = HealthGPTTrainer(
        model,
        stage.recipe,
        list(stage.tasks),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        data_collator=TrainingCollator(processor, 512),
    )
    if (folder / TRAINED_NAME).exists():
        trainer._load_from_checkpoint(folder)
    else:
        trainer.train()
        trainer.save_model(folder)
    if "plugin" not in rates:  # else a task keeps the tables that its plugin was trained with
        for task, tables in answering.items():
            model.use_token_tables(tables, [task])


def select(rows: Dataset, beginnings: tuple[str, ...]) -> Dataset:
    return rows.filter(lambda row: not beginnings or row["instruction"].startswith(beginnings))


def publish(model, processor, work: Path) -> None:
    """Writes the trained plugins and tables with the published names, in the dtype of the base."""
    shutil.rmtree(work / "trained", ignore_errors=True)
    shutil.rmtree(work / "merged", ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(work / "merged")
    processor.save_pretrained(work / "merged")
    (work / "trained").mkdir()
    for task in KINDS:
        extract_plugin(work / "merged", task, work / "trained" / task, published=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder of intermediate results")
    parser.add_argument("output", type=Path, help="checkpoint to make")
    parser.add_argument("--scale", type=float, default=1.0, help="share of steps and samples")
    parser.add_argument("--compare", action="store_true", help="train it in other ways too and put them beside it")
    arguments = parser.parse_args()
    kept = f"What is finished is kept in {arguments.work}; the same command goes on from there."
    try:
        with stoppable(lambda: kept), memory(), files(arguments.work, "used"):
            build(arguments.work, arguments.output, arguments.scale, arguments.compare)
    except HealthGPTError as error:
        sys.exit(f"Error: {printable(str(error))}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
