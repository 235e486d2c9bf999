"""
Samples -> batches with labels.

The prompt of every sample is written by the processor, hence the ids are those of inference; labels are the answer's ids and the end
of the turn.
"""

import copy
import functools
import hashlib
from collections.abc import Iterable
from pathlib import Path

import datasets
import pyarrow
import pyarrow.compute
import torch
from datasets import Dataset, Features, List, Value
from PIL import Image
from torch.nn.utils.rnn import pad_sequence
from transformers import BatchFeature

from ..conversations import conversation, prepare
from ..errors_healthgpt import HealthGPTError
from ..medical import open_picture
from ..processing_healthgpt import image_as_text
from ..refusals import files

IGNORED = -100


def add_codes(samples: Dataset, model, processor, batch_size: int = 8) -> Dataset:
    """
    Gives samples with a target picture their `target_codes`, from the VQGAN's encoder in float32.

    They are computed once for a set of pictures and a VQGAN, and then come from the cache of the `datasets` library.

    Raises:
        HealthGPTError: if a picture cannot be read, or the cache not written.
    """
    paths = samples["target_image"]
    targets = list(dict.fromkeys(filter(None, paths)))
    if not targets:
        return samples
    digest = hashlib.sha256()
    for path in targets:
        with files(path):
            status = Path(path).stat()
        digest.update(f"{Path(path).resolve()} {status.st_size} {status.st_mtime_ns} ".encode())
    vqgan = copy.deepcopy(model.model.vqgan).float()
    for tensor in vqgan.state_dict().values():
        digest.update(tensor.cpu().numpy().tobytes())

    def encode(batch):
        pixels = processor.process_target_images([open_picture(path) for path in batch["path"]])
        return {"codes": vqgan.encode(pixels.to(model.device)).tolist()}

    cache = Path(datasets.config.HF_DATASETS_CACHE) / "healthgpt_codes"
    with files(cache, "written"):
        cache.mkdir(parents=True, exist_ok=True)
        encoded = Dataset.from_dict({"path": targets}).map(
            encode,
            batched=True,
            batch_size=batch_size,
            features=Features({"path": Value("string"), "codes": List(Value("int32"))}),
            cache_file_name=str(cache / f"{digest.hexdigest()}.arrow"),
            new_fingerprint=digest.hexdigest()[:32],
            desc="Encoding target images",
        )
    # As Arrow: the codes of half a million pictures are 2 GB there, and 20 GB as lists of Python. Rows, not paths, join them: the
    # cache may name pictures by other paths.
    rows = {path: row for row, path in enumerate(targets)}
    drawn = encoded.with_format("arrow")[:]["codes"].take(pyarrow.array([rows.get(path) for path in paths]))
    own = samples.with_format("arrow")[:]["target_codes"]
    column = pyarrow.compute.coalesce(own, drawn)
    return samples.remove_columns("target_codes").add_column(
        "target_codes", column, feature=samples.features["target_codes"]
    )


def typical_codes(samples: Dataset, task: str) -> list[int] | None:
    """
    The code that most targets of a task have at each place of the image, which is what its drawings are drafted from where there is
    no input image (`TaskConfig.typical_codes`).

    Args:
        samples (`Dataset`): As `add_codes` gives them; the first 1000 that count are looked at.
        task (`str`): The task.

    Returns:
        `list[int]`: As many codes as an image has, from 0; `None` if all samples of the task have input images.
    """
    rows = [
        row
        for row, (name, images) in enumerate(zip(samples["task"], samples["input_image"], strict=True))
        if name == task and not images
    ]
    if not rows:
        return None
    return torch.tensor(samples.select(rows[:1000])["target_codes"][:]).mode(dim=0).values.tolist()


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
            HealthGPTError: if a prompt, or a prompt with the picture to draw, is longer than `max_length`.
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

    def check(self, samples: Iterable[dict], path: Path, needs_pictures: bool = False) -> None:
        """
        Makes every sample ready once, with blank pictures, as training will.

        Args:
            samples (`Iterable[dict]`): Samples of one file, one a line.
            path (`Path`): The file.
            needs_pictures (`bool`, defaults to `False`): Whether samples without an input picture teach nothing.

        Raises:
            HealthGPTError: if one is too long or lacks a picture; the sentence names its line.
        """
        blank = Image.new("RGB", (1, 1))
        for number, sample in enumerate(samples, 1):
            try:
                if needs_pictures and not sample["input_image"]:
                    raise HealthGPTError("only the projector is trained, and it has no input_image for it.")
                self._collate([sample | {"input_image": [blank] * len(sample["input_image"])}])
            except HealthGPTError as error:
                raise HealthGPTError(f"Line {number} of {path} cannot be trained on: {error}") from error

    def _answer(self, sample, prompt_length) -> torch.LongTensor:
        """Ids of the answer and the end of the turn."""
        room = self.max_length - prompt_length
        if sample["target_codes"] is None:
            tokenize = functools.partial(self.processor.tokenizer.encode, add_special_tokens=False)
            response = image_as_text(sample["response"].strip())
            answer = tokenize(self.header + response + self.ending)[len(tokenize(self.header)) :]
        else:
            answer = [self.first_code + code for code in sample["target_codes"]]
            answer += [self.end_of_picture, *self.processor.tokenizer.encode(self.ending, add_special_tokens=False)]
        needed = 1 if sample["target_codes"] is None else len(answer)
        if room < needed:
            raise HealthGPTError(
                f"The sample {sample['instruction'][:80]!r} has a prompt of {prompt_length} tokens and needs {needed} "
                f"more, but samples may have {self.max_length}."
            )
        return torch.tensor(answer[:room])
