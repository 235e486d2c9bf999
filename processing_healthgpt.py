# Copyright 2026 The HealthGPT package authors.
# Licensed under the Apache License, Version 2.0 (see the file LICENSE).
"""Processor of HealthGPT: pictures and chat to tensors, tensors to text or pictures."""

import base64
import binascii
import os
from io import BytesIO
from pathlib import Path
from urllib.request import urlopen

import torch
from PIL import Image, UnidentifiedImageError
from transformers import BatchFeature, ProcessorMixin
from transformers.image_transforms import to_pil_image
from transformers.image_utils import to_numpy_array
from transformers.processing_utils import ProcessingKwargs

from .configuration_healthgpt import task_from_mode
from .errors_healthgpt import HealthGPTError

try:
    from transformers import CLIPImageProcessorPil
except ImportError:  # transformers before 5.4, whose CLIPImageProcessor is the one that resizes with Pillow
    from transformers import CLIPImageProcessor as CLIPImageProcessorPil


class HealthGPTProcessorKwargs(ProcessingKwargs, total=False):
    _defaults = {"text_kwargs": {"padding": True}}


class HealthGPTProcessor(ProcessorMixin):
    """
    Turns pictures and chat into model inputs exactly as the published scripts do, and model outputs into text or pictures.

    Args:
        image_processor (`CLIPImageProcessor`): CLIP's preprocessing; always run with Pillow, since torchvision's resizing
            differs from the published one.
        tokenizer (`PreTrainedTokenizerFast`): Gives the ids of the published slow tokenizer, text chunk by text chunk.
        chat_template (`str`, *optional*): Jinja template of the language model's family.
        tasks (`dict[str, dict]`, *optional*): `kind` (`"text"` or `"image"`) and `default_prompt` (`str` or `None`) of
            every task of the checkpoint.
        num_image_patches (`int`, defaults to 576): Positions that a picture takes in the prompt.
        prefix_space (`bool`, defaults to `False`): Whether every text chunk starts with a space, as SentencePiece adds it.
        picture_size (`int`, *optional*): Height and width in pixels of the pictures that the VQGAN reads and draws.
    """

    valid_processor_kwargs = HealthGPTProcessorKwargs
    image_token = "<image>"
    image_start_token = "<start_index>"

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        chat_template=None,
        tasks=None,
        num_image_patches=576,
        prefix_space=False,
        picture_size=None,
        **kwargs,
    ):
        if not isinstance(image_processor, CLIPImageProcessorPil):
            settings = image_processor.to_dict()
            settings.pop("image_processor_type", None)
            image_processor = CLIPImageProcessorPil(**settings)
        self.tasks = dict(tasks or {})
        self.num_image_patches = num_image_patches
        self.prefix_space = prefix_space
        self.picture_size = picture_size
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def __call__(self, images=None, text=None, **kwargs) -> BatchFeature:
        """
        Args:
            images (picture or nested list of pictures, *optional*): PIL pictures, arrays, paths or URLs, as many as
                `<image>` in `text`.
            text (`str` or `list[str]`): Prompts as `apply_chat_template(tokenize=False)` writes them.
            kwargs: Options of the tokenizer and image processor. `padding` is on by default, on the left.

        Returns:
            `BatchFeature`: `input_ids` and `attention_mask` `(batch, length)`, and with pictures `pixel_values`
            `(num_images, 3, height, width)`.

        Raises:
            HealthGPTError: if there is no text, a picture cannot be used, or pictures and prompts do not fit each other.
        """
        prompts = list(text) if isinstance(text, (list, tuple)) else [text]
        if not prompts or not all(isinstance(prompt, str) and prompt.strip() for prompt in prompts):
            raise HealthGPTError("HealthGPT needs prompts that are not empty: text is a string or a list of strings.")
        merged = self._merge_kwargs(
            HealthGPTProcessorKwargs, tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs
        )
        pictures = [load_picture(image, self.image_size) for image in _flatten(images)]
        placeholders = [prompt.count(self.image_token) for prompt in prompts]
        if sum(placeholders) != len(pictures):
            raise HealthGPTError(
                f"The prompts have {sum(placeholders)} {self.image_token} but {len(pictures)} pictures were given."
            )
        is_nested = isinstance(images, (list, tuple)) and any(isinstance(item, (list, tuple)) for item in images)
        if is_nested and placeholders != [len(_flatten(item)) for item in images]:
            raise HealthGPTError(
                f"The prompts have {placeholders} {self.image_token} but {[len(_flatten(item)) for item in images]} pictures "
                "were given for them."
            )

        space = " " if self.prefix_space else ""
        image_positions = self.image_token * self.num_image_patches + space
        prompts = [space + prompt.replace(self.image_token, image_positions) for prompt in prompts]
        text_kwargs = merged["text_kwargs"]
        return_tensors = text_kwargs.pop("return_tensors", None)
        data = dict(self.tokenizer(prompts, **text_kwargs))
        kept = sum(list(ids).count(self.image_token_id) for ids in data["input_ids"])
        if kept != len(pictures) * self.num_image_patches:
            raise HealthGPTError(
                f"Truncation to {text_kwargs.get('max_length')} tokens cuts a picture, which takes "
                f"{self.num_image_patches} tokens: shorten the prompt or allow more."
            )
        if pictures:
            images_kwargs = {**merged["images_kwargs"], "return_tensors": return_tensors}
            pictures = [self._pad_to_square(picture) for picture in pictures]
            data.update(self.image_processor(pictures, **images_kwargs))
        return BatchFeature(data, tensor_type=return_tensors)

    def apply_chat_template(self, conversation, chat_template=None, *, task=None, generation_mode=None, **kwargs):
        """
        Writes the published prompt of a task around one conversation or a list of them.

        Args:
            conversation (`list[dict]` or `list[list[dict]]`): Messages; a content is a string or a list of `{"type":
                "image", "image": ...}` and `{"type": "text", "text": ...}`. Pictures stand before the text.
            chat_template (`str`, *optional*): Another template than the checkpoint's.
            task (`str` or `list[str]`, *optional*, defaults to `"comprehension"`): One name for all conversations or one
                for each. With `add_generation_prompt` a task that draws ends its prompt with `<start_index>`.
            generation_mode (`str`, *optional*): `"text"` means task `"comprehension"`, `"image"` task `"generation"`.
            kwargs: As in `ProcessorMixin.apply_chat_template`.

        Raises:
            HealthGPTError: if a task is unknown or a conversation's last message has no text and its task no default prompt.
        """
        processor_kwargs = dict(kwargs.pop("processor_kwargs", None) or {})
        named, mode = processor_kwargs.pop("task", None), processor_kwargs.pop("generation_mode", None)
        task = task_from_mode(named if task is None else task, mode if generation_mode is None else generation_mode)
        if processor_kwargs:
            kwargs["processor_kwargs"] = processor_kwargs
        is_batched = isinstance(conversation, (list, tuple)) and isinstance(
            next(iter(conversation), None), (list, tuple)
        )
        conversations = conversation if is_batched else [conversation]
        tasks = list(task) if isinstance(task, (list, tuple)) else [task] * len(conversations)
        if len(tasks) != len(conversations):
            raise HealthGPTError(
                f"Got {len(tasks)} tasks for {len(conversations)} conversations: give one, or one for each."
            )
        conversations = [self._prepare(*pair) for pair in zip(conversations, tasks, strict=True)]
        return super().apply_chat_template(conversations if is_batched else conversations[0], chat_template, **kwargs)

    def _prepare(self, conversation, task):
        """A copy of the conversation with contents as lists, the default prompt if it is needed, and the mode."""
        if task not in self.tasks:
            raise HealthGPTError(f"This checkpoint has no task {task!r}; it has {', '.join(self.tasks) or 'none'}.")
        if not isinstance(conversation, (list, tuple)) or not conversation:
            raise HealthGPTError(f"A conversation is a list of at least one message, got {str(conversation)[:200]!r}.")
        messages = [_with_parts(message) for message in conversation]
        last = messages[-1]
        if not any(part["type"] == "text" and part["text"].strip() for part in last["content"]):
            pictures = [part for part in last["content"] if part["type"] != "text"]
            default_prompt = self.tasks[task].get("default_prompt")
            if default_prompt is None or not pictures:
                raise HealthGPTError(f"The last message has no text, which task {task!r} needs.")
            last["content"] = [*pictures, {"type": "text", "text": default_prompt}]
        last["generation_mode"] = self.tasks[task]["kind"]  # read by the chat template
        return messages

    @property
    def image_size(self) -> int:
        """Height and width in pixels of the pictures that the vision tower reads."""
        return self.image_processor.crop_size["height"]

    def _pad_to_square(self, picture):
        """Centres the picture on a square of CLIP's mean colour."""
        side = max(picture.size)
        colour = tuple(int(255 * mean) for mean in self.image_processor.image_mean)
        square = Image.new("RGB", (side, side), colour)
        square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
        return square

    def process_target_images(self, images) -> torch.FloatTensor:
        """
        Prepares pictures for `encode_image`: stretched to the VQGAN's size (Lanczos), in [-1, 1].

        Args:
            images (picture or nested list of pictures): PIL pictures, arrays, paths or URLs.

        Returns:
            `torch.FloatTensor` of shape `(num_images, 3, picture_size, picture_size)`.

        Raises:
            HealthGPTError: if the checkpoint has no VQGAN, a picture cannot be used, or there is none.
        """
        if self.picture_size is None:
            raise HealthGPTError(
                "This checkpoint has no VQGAN: it was exported without one and cannot handle image codes."
            )
        if not _flatten(images):
            raise HealthGPTError("There is no picture to prepare: the list is empty.")
        size = (self.picture_size, self.picture_size)
        pictures = [
            load_picture(image, self.image_size).resize(size, Image.Resampling.LANCZOS) for image in _flatten(images)
        ]
        pixels = [torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8) for picture in pictures]
        return torch.stack(pixels).view(-1, *size, 3).permute(0, 3, 1, 2) / 255 * 2 - 1

    def post_process_multimodal_output(
        self, generated_outputs, skip_special_tokens=True, generation_mode=None, **kwargs
    ) -> list[str] | list[Image.Image]:
        """
        Turns what the model put out into text or pictures.

        Args:
            generated_outputs (`torch.Tensor`): Ids `(batch, length)`, or for pictures the pixels `(batch, 3, height, width)`
                in [-1, 1] of `decode_image_tokens`.
            skip_special_tokens (`bool`, defaults to `True`): Whether to leave special tokens out of the text.
            generation_mode (`str`, *optional*, defaults to `"text"`): `"text"` or `"image"`.
            kwargs: Options of the tokenizer's decoding.

        Raises:
            HealthGPTError: if the mode is neither.
        """
        if generation_mode != "image":
            return super().post_process_multimodal_output(
                generated_outputs, skip_special_tokens=skip_special_tokens, generation_mode=generation_mode, **kwargs
            )
        levels = (generated_outputs.float().clamp(-1, 1) + 1) / 2 * 255
        pixels = levels.to(torch.uint8).permute(0, 2, 3, 1)  # truncated, as published
        return [Image.fromarray(picture.numpy()) for picture in pixels.cpu()]


def load_picture(image, image_size: int | None = None) -> Image.Image:
    """
    Reads a picture of any kind as 8-bit RGB.

    Alpha is dropped as in the published scripts, palettes are resolved, and 16-bit greys keep their upper 8 bits.

    Args:
        image: PIL picture, array, tensor, path, URL or base64 string.
        image_size (`int`, *optional*): Pixels per side that the vision tower sees, which limits how narrow a picture may be;
            by default it may be of any shape.

    Raises:
        HealthGPTError: if it is no picture, is empty, or has a side that would vanish.
    """
    image = _open_picture(image)
    width, height = image.size
    if width == 0 or height == 0:
        raise HealthGPTError(f"The picture is empty: it has {width} x {height} pixels.")
    if image_size is not None and max(width, height) > image_size * min(width, height):
        raise HealthGPTError(
            f"The picture is too narrow: of its {width} x {height} pixels the shorter side would vanish when the longer "
            f"one is brought to {image_size}."
        )
    if image.mode in ("I", "F"):
        return _rescale_grey(image)
    if image.mode.startswith("I;16"):
        return _rescale_grey(image.convert("I"))
    if image.mode in ("La", "RGBa"):  # colours multiplied by alpha, from which Pillow finds no way to RGB
        image = image.convert(image.mode.upper())
    return image.convert("RGB")


def _open_picture(image):
    """A PIL picture, read whole, of a PIL picture, array, tensor, path, URL or base64 string."""
    is_name = isinstance(image, (str, Path))
    try:
        if is_name:
            picture = Image.open(_file_of(str(image)))
        elif isinstance(image, Image.Image):
            picture = image
        else:
            array = to_numpy_array(image)
            # transformers' to_pil_image wants a dimension of one or three channels.
            plain = array.ndim == 2 or array.shape[-1] == 4
            picture = Image.fromarray(array) if plain else to_pil_image(array)
        picture.load()
        return picture
    except Exception as error:  # Pillow's readers and urllib raise a dozen types for what they cannot read
        reason = (str(error) or type(error).__name__).split("\n")[0].rstrip(".")
        name = repr(str(image)[:200]) if is_name else f"An object of type {type(image).__name__}"
        if isinstance(error, (binascii.Error, UnidentifiedImageError)):
            reason = "it is no file, URL or base64 data of a picture format that Pillow knows"
        raise HealthGPTError(f"{name} is not a picture that can be read: {reason}.") from error


def _file_of(name):
    """What `Image.open` reads for a path, URL or base64 string: not transformers' `load_image`, which clips 16 bits to 8."""
    if name.startswith(("http://", "https://", "data:")):
        with urlopen(name, timeout=60) as response:
            return BytesIO(response.read())
    return name if os.path.isfile(name) else BytesIO(base64.b64decode(name, validate=True))


def _with_parts(message):
    """A copy of a chat message, checked, whose content is a list of its pictures and texts."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise HealthGPTError(f"A message is a dictionary with role and content, got {str(message)[:200]!r}.")
    content = message.get("content")
    if isinstance(content, str):
        return {**message, "content": [{"type": "text", "text": content}]}
    for part in content if isinstance(content, (list, tuple)) else [content]:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("image", "image_url", "text") or (kind == "text" and not isinstance(part.get("text"), str)):
            raise HealthGPTError(
                "A message's content is a string or a list of {'type': 'image', 'image': ...} and {'type': 'text', 'text': "
                f"...}}, got {str(part)[:200]!r}."
            )
    return {**message, "content": list(content)}


def _rescale_grey(image):
    """A picture of 16-bit greys, which Pillow keeps as 32-bit integers, as RGB."""
    low, high = image.getextrema()
    if image.mode == "F" or low < 0 or high > 65535:
        raise HealthGPTError(
            f"The picture's values go from {low} to {high} in Pillow mode {image.mode}; scale them to 8 or 16 bits first."
        )
    return image.point(lambda value: value * (1 / 256) + 0).convert("L").convert("RGB")


def _flatten(images):
    if images is None:
        return []
    if isinstance(images, (list, tuple)):
        return [picture for item in images for picture in _flatten(item)]
    return [images]


__all__ = ["HealthGPTProcessor"]
