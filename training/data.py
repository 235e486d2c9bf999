"""
Training samples: JSON lines of tasks, instructions, answers and pictures -> batches with labels.

    {"task": "comprehension", "instruction": "What is this?", "response": "A chest X-ray.", "input_image": "a.png"}
    {"task": "generation", "instruction": "Reconstruct the image.", "input_image": "a.png", "target_image": "a.png"}

`input_image` is a path, a list of paths or absent; paths start at the folder of the JSON file. The prompt of every sample is
written by the processor, hence the ids are those of inference; labels are the answer's ids and the end of the turn.
"""

import functools
import hashlib
import json
from pathlib import Path

import datasets
import torch
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from transformers import BatchFeature

FIELDS = ("task", "instruction", "response", "input_image", "target_image")
IGNORED = -100


def read_samples(path: Path, tasks: dict[str, str], default_task: str | None = None) -> Dataset:
    """
    Reads a file of samples and checks all of them.

    Args:
        path (`Path`): JSON lines.
        tasks (`dict[str, str]`): Kind of every task of the model.
        default_task (`str`, *optional*): Task of the samples that name none.

    Returns:
        `Dataset`: Columns `task`, `instruction`, `response` (`None` where a picture is drawn), `input_image` (a list of
        paths) and `target_image` (a path or `None`).

    Raises:
        ValueError: if a line is no sample, or a picture is missing; the sentence names the line.
    """
    rows = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                rows.append(check_sample(row, path.parent, tasks, default_task))
            except ValueError as error:
                raise ValueError(f"Line {number} of {path} is no sample: {error}") from error
    if not rows:
        raise ValueError(f"{path} has no samples.")
    return Dataset.from_list(rows)


def check_sample(row, folder: Path, tasks: dict[str, str], default_task: str | None) -> dict:
    if not isinstance(row, dict) or set(row) - set(FIELDS):
        raise ValueError(f"it must be an object with the fields {', '.join(FIELDS)} and no others.")
    task = row.get("task", default_task)
    if task not in tasks:
        raise ValueError(f"its task is {task!r}, but the tasks are {', '.join(tasks)}.")
    wanted, other = ("response", "target_image") if tasks[task] == "text" else ("target_image", "response")
    for field in ("instruction", wanted):
        if not isinstance(row.get(field), str) or not row[field].strip():
            raise ValueError(f"task {task!r} needs a text as its {field}.")
    if row.get(other) is not None:
        raise ValueError(f"task {task!r} has no {other}.")
    pictures = row.get("input_image") or []
    pictures = [pictures] if isinstance(pictures, str) else pictures
    target = row.get("target_image")
    for picture in [*pictures, *([target] if target else [])]:
        if not (folder / picture).is_file():
            raise ValueError(f"there is no picture {folder / picture}.")
    return {
        "task": task,
        "instruction": row["instruction"],
        "response": row.get("response"),
        "input_image": [str(folder / picture) for picture in pictures],
        "target_image": None if target is None else str(folder / target),
    }


def add_codes(samples: Dataset, model, processor, batch_size: int = 8) -> Dataset:
    """
    Adds a column `codes`: those of the target picture, from the VQGAN's encoder, or `None`.

    They are computed once for a set of samples and a VQGAN, and then come from the cache of the `datasets` library.
    """
    targets = list(samples["target_image"])
    if not any(targets):
        return samples.add_column("codes", [None] * len(samples))
    digest = hashlib.sha256(json.dumps(samples.to_list()).encode())
    for path in filter(None, dict.fromkeys(targets)):
        status = Path(path).stat()
        digest.update(f"{status.st_size} {status.st_mtime_ns}".encode())
    for tensor in model.model.vqgan.state_dict().values():
        digest.update(tensor.flatten()[:1000].float().cpu().numpy().tobytes())

    def encode(batch):
        codes = [None] * len(batch["target_image"])
        rows = [index for index, path in enumerate(batch["target_image"]) if path is not None]
        if rows:
            pixels = processor.process_target_images([batch["target_image"][index] for index in rows])
            for index, picture in zip(rows, model.encode_image(pixels).tolist(), strict=True):
                codes[index] = picture
        return {"codes": codes}

    cache = Path(datasets.config.HF_DATASETS_CACHE) / "healthgpt_codes"
    cache.mkdir(parents=True, exist_ok=True)
    return samples.map(
        encode,
        batched=True,
        batch_size=batch_size,
        cache_file_name=str(cache / f"{digest.hexdigest()}.arrow"),
        new_fingerprint=digest.hexdigest()[:32],
        desc="Encoding target pictures",
    )


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
        tasks = [sample["task"] for sample in samples]
        conversations = []
        for sample in samples:
            pictures = [{"type": "image", "image": path} for path in sample["input_image"]]
            content = [*pictures, {"type": "text", "text": sample["instruction"]}]
            conversations.append([{"role": "user", "content": content}])
        batch = self.processor.apply_chat_template(
            conversations, task=tasks, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        prompt_lengths = batch["attention_mask"].sum(dim=1).tolist()
        answers = [self._answer(*pair) for pair in zip(samples, prompt_lengths, strict=True)]
        ids = pad_sequence(answers, batch_first=True, padding_value=self.processor.tokenizer.pad_token_id)
        labels = pad_sequence(answers, batch_first=True, padding_value=IGNORED)
        batch["labels"] = torch.cat([torch.full_like(batch["input_ids"], IGNORED), labels], dim=1)
        batch["input_ids"] = torch.cat([batch["input_ids"], ids], dim=1)
        batch["attention_mask"] = torch.cat([batch["attention_mask"], (labels != IGNORED).long()], dim=1)
        batch["task"] = tasks
        return batch

    def _answer(self, sample, prompt_length) -> torch.LongTensor:
        """Ids of the answer and the end of the turn."""
        room = self.max_length - prompt_length
        if sample["codes"] is None:
            tokenize = functools.partial(self.processor.tokenizer.encode, add_special_tokens=False)
            answer = tokenize(self.header + sample["response"].strip() + self.ending)[len(tokenize(self.header)) :]
        else:
            answer = [self.first_code + code for code in sample["codes"]]
            answer += [self.end_of_picture, *self.processor.tokenizer.encode(self.ending, add_special_tokens=False)]
        needed = 1 if sample["codes"] is None else len(answer)
        if room < needed:
            raise ValueError(
                f"The sample {sample['instruction'][:80]!r} has a prompt of {prompt_length} tokens and needs {needed} "
                f"more, but samples may have {self.max_length}."
            )
        return torch.tensor(answer[:room])
