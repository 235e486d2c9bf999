"""
Training samples: JSON lines of tasks, instructions, answers and pictures -> batches with labels.

    {"task": "comprehension", "instruction": "What is this?", "response": "A chest X-ray.", "input_image": "a.png"}
    {"task": "generation", "instruction": "Reconstruct the image.", "input_image": "a.png", "target_image": "a.png"}

`input_image` is a path, a list of paths or absent; paths start at the folder of the JSON file. `target_codes`, a list of numbers,
may stand in place of `target_image`. The prompt of every sample is written by the processor, hence the ids are those of inference;
labels are the answer's ids and the end of the turn.
"""

import copy
import functools
import hashlib
import json
from pathlib import Path

import datasets
import torch
from datasets import Dataset, Features, List, Value
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from transformers import BatchFeature

from ..conversations import conversation, prepare
from ..medical import open_picture
from ..processing_healthgpt import load_picture

FIELDS = ("task", "instruction", "response", "input_image", "target_image", "target_codes")
IGNORED = -100
FEATURES = Features(
    {field: Value("string") for field in ("task", "instruction", "response", "target_image")}
    | {"input_image": List(Value("string")), "target_codes": List(Value("int64"))}
)


def read_samples(path: Path, config, default_task: str | None = None) -> Dataset:
    """
    Reads a file of samples and checks all of them.

    Args:
        path (`Path`): JSON lines.
        config (`HealthGPTConfig`): Of the model that is to learn them: its tasks, and the codes of its pictures.
        default_task (`str`, *optional*): Task of the samples that name none.

    Returns:
        `Dataset`: Columns `task`, `instruction`, `response` (`None` where a picture is drawn), `input_image` (a list of
        paths), `target_image` (a path or `None`) and `target_codes` (a list or `None`).

    Raises:
        ValueError: if a line is no sample, or a picture is missing or none; the sentence names the line.
    """
    rows, seen = [], set()
    with open(path, "rb") as file:  # what is no UTF-8 belongs to a line too
        for number, line in enumerate(file, 1):
            try:
                rows.append(check_sample(json.loads(line), path.parent, config, default_task))
                for picture in {*rows[-1]["input_image"], rows[-1]["target_image"]} - {None, *seen}:
                    load_picture(open_picture(picture), config.vision_config.image_size)
                    seen.add(picture)
            except ValueError as error:
                raise ValueError(f"Line {number} of {path} is no sample: {error}") from error
    if not rows:
        raise ValueError(f"{path} has no samples.")
    return Dataset.from_list(rows, features=FEATURES)


def check_sample(row, folder: Path, config, default_task: str | None) -> dict:
    if not isinstance(row, dict) or set(row) - set(FIELDS):
        raise ValueError(f"it must be an object with the fields {', '.join(FIELDS)} and no others.")
    row = {field: value for field, value in row.items() if value is not None}
    task = row.get("task", default_task)
    if not isinstance(task, str) or task not in config.tasks:
        raise ValueError(f"its task is {task!r}, but the tasks are {', '.join(config.tasks)}.")
    targets = ["response"] if config.tasks[task].kind == "text" else ["target_image", "target_codes"]
    given = [field for field in ("response", "target_image", "target_codes") if field in row]
    if len(given) != 1 or given[0] not in targets:
        raise ValueError(f"task {task!r} needs a {' or a '.join(targets)} and nothing else to learn.")
    for field in ("instruction", "response", "target_image"):
        if field in ("instruction", *given) and not (isinstance(row.get(field), str) and row[field].strip()):
            raise ValueError(f"task {task!r} needs a text as its {field}.")
    if "target_codes" in row:
        count, number = config.num_image_codes, config.vqgan_config.num_codes
        codes = row["target_codes"]
        if not (isinstance(codes, list) and len(codes) == count and all(code in range(number) for code in codes)):
            raise ValueError(f"target_codes must be a list of {count} whole numbers from 0 to {number - 1}.")
    for field in ("instruction", "response"):
        if "<image>" in row.get(field, ""):
            raise ValueError(
                f"its {field} has the token <image>, which the processor writes itself for every picture."
            )
    pictures = row.get("input_image", [])
    pictures = [pictures] if isinstance(pictures, str) else pictures
    if not (isinstance(pictures, list) and all(isinstance(picture, str) for picture in pictures)):
        raise ValueError("input_image must be a path or a list of paths.")
    return {
        "task": task,
        "instruction": row["instruction"],
        "response": row.get("response"),
        "input_image": [str(folder / picture) for picture in pictures],
        "target_image": str(folder / row["target_image"]) if "target_image" in row else None,
        "target_codes": row.get("target_codes"),
    }


def add_codes(samples: Dataset, model, processor, batch_size: int = 8) -> Dataset:
    """
    Gives samples with a target picture their `target_codes`, from the VQGAN's encoder in float32.

    They are computed once for a set of pictures and a VQGAN, and then come from the cache of the `datasets` library.
    """
    targets = list(dict.fromkeys(filter(None, samples["target_image"])))
    if not targets:
        return samples
    digest = hashlib.sha256()
    for path in targets:
        status = Path(path).stat()
        digest.update(f"{Path(path).resolve()} {status.st_size} {status.st_mtime_ns} ".encode())
    vqgan = copy.deepcopy(model.model.vqgan).float()
    for tensor in vqgan.state_dict().values():
        digest.update(tensor.flatten()[:1000].cpu().numpy().tobytes())

    def encode(batch):
        pixels = processor.process_target_images([open_picture(path) for path in batch["path"]])
        return {"codes": vqgan.encode(pixels.to(model.device)).tolist()}

    cache = Path(datasets.config.HF_DATASETS_CACHE) / "healthgpt_codes"
    cache.mkdir(parents=True, exist_ok=True)
    encoded = Dataset.from_dict({"path": targets}).map(
        encode,
        batched=True,
        batch_size=batch_size,
        cache_file_name=str(cache / f"{digest.hexdigest()}.arrow"),
        new_fingerprint=digest.hexdigest()[:32],
        desc="Encoding target pictures",
    )
    codes = dict(zip(targets, encoded["codes"], strict=True)) | {None: None}  # the cache may name them by other paths
    given = zip(samples["target_image"], samples["target_codes"], strict=True)
    column = [codes[path] if own is None else own for path, own in given]
    return samples.remove_columns("target_codes").add_column("target_codes", column, feature=FEATURES["target_codes"])


class TrainingCollator:
    """
    Turns samples into one padded batch with labels.

        left padding | prompt, as at inference | answer, end of the turn | right padding
        -100           -100                      labels                    -100

    Args:
        processor (`HealthGPTProcessor`): Writes the prompts.
        max_length (`int`, defaults to 2048): Tokens of the longest sample; a longer answer in words is cut.
    """

    def __init__(self, processor, max_length: int = 2048):
        self.processor = processor
        self.max_length = max_length
        self.first_code, self.end_of_picture = processor.tokenizer.convert_tokens_to_ids(["<idx_0>", "<end_index>"])
        # What the chat template writes around an answer, which a fast tokenizer needs to see with it.
        question = [{"role": "user", "content": "?"}]
        render = functools.partial(processor.apply_chat_template, task=next(iter(processor.tasks)), tokenize=False)
        prompt = render(question, add_generation_prompt=True).removesuffix(processor.image_start_token)
        self.header = prompt.removeprefix(render(question))
        answered = render([*question, {"role": "assistant", "content": "?"}])
        self.ending = answered.removeprefix(f"{prompt}?").strip()

    def __call__(self, samples: list[dict]) -> BatchFeature:
        """
        Returns:
            `BatchFeature`: `input_ids`, `attention_mask`, `labels` `(batch, length)`, `pixel_values` `(num_images, 3,
            height, width)` if there are pictures, and `task`, a name per row.

        Raises:
            ValueError: if a prompt, or a prompt with the picture to draw, is longer than `max_length`.
        """
        return self._collate(
            [sample | {"input_image": [open_picture(path) for path in sample["input_image"]]} for sample in samples]
        )

    def _collate(self, samples: list[dict]) -> BatchFeature:
        """The batch of samples whose pictures are open."""
        tasks = [sample["task"] for sample in samples]
        asked = [conversation(sample["input_image"], sample["instruction"]) for sample in samples]
        batch = prepare(self.processor, asked, tasks)
        prompt_lengths = batch["attention_mask"].sum(dim=1).tolist()
        answers = [self._answer(*pair) for pair in zip(samples, prompt_lengths, strict=True)]
        ids = pad_sequence(answers, batch_first=True, padding_value=self.processor.tokenizer.pad_token_id)
        labels = pad_sequence(answers, batch_first=True, padding_value=IGNORED)
        batch["labels"] = torch.cat([torch.full_like(batch["input_ids"], IGNORED), labels], dim=1)
        batch["input_ids"] = torch.cat([batch["input_ids"], ids], dim=1)
        batch["attention_mask"] = torch.cat([batch["attention_mask"], (labels != IGNORED).long()], dim=1)
        batch["task"] = tasks
        return batch

    def check(self, samples: Dataset, needs_pictures: bool = False) -> None:
        """
        Makes every sample ready once, with blank pictures, as training will.

        Args:
            samples (`Dataset`): Samples of one file, one a line.
            needs_pictures (`bool`, defaults to `False`): Whether samples without an input picture teach nothing.

        Raises:
            ValueError: if one is too long or lacks a picture; the sentence names its line.
        """
        blank = Image.new("RGB", (1, 1))
        for number, sample in enumerate(samples, 1):
            try:
                if needs_pictures and not sample["input_image"]:
                    raise ValueError("only the projector is trained, and it has no input_image for it.")
                self._collate([sample | {"input_image": [blank] * len(sample["input_image"])}])
            except ValueError as error:
                raise ValueError(f"Line {number} cannot be trained on: {error}") from error

    def _answer(self, sample, prompt_length) -> torch.LongTensor:
        """Ids of the answer and the end of the turn."""
        room = self.max_length - prompt_length
        if sample["target_codes"] is None:
            tokenize = functools.partial(self.processor.tokenizer.encode, add_special_tokens=False)
            answer = tokenize(self.header + sample["response"].strip() + self.ending)[len(tokenize(self.header)) :]
        else:
            answer = [self.first_code + code for code in sample["target_codes"]]
            answer += [self.end_of_picture, *self.processor.tokenizer.encode(self.ending, add_special_tokens=False)]
        needed = 1 if sample["target_codes"] is None else len(answer)
        if room < needed:
            raise ValueError(
                f"The sample {sample['instruction'][:80]!r} has a prompt of {prompt_length} tokens and needs {needed} "
                f"more, but samples may have {self.max_length}."
            )
        return torch.tensor(answer[:room])
