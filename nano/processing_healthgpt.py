# Copyright 2026 The HealthGPT package authors.
# Licensed under the Apache License, Version 2.0 (see the file LICENSE).
"""Processor of HealthGPT: pictures and chat to tensors, tensors to text or pictures."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from PIL import Image
from transformers import BatchFeature, ProcessorMixin
from transformers.processing_utils import MultiModalData, ProcessingKwargs

from .configuration_healthgpt import (
    CODE_VERSION,
    is_pointer,
    is_whole,
    require_code_version,
    require_setting,
    task_from_mode,
)
from .errors_healthgpt import HealthGPTError
from .images_healthgpt import channels_last, check_pixels, check_size, flatten, is_floats, load_picture, reading

try:
    from transformers import CLIPImageProcessorPil
except ImportError:  # transformers before 5.4, whose CLIPImageProcessor is the one that resizes with Pillow
    from transformers import CLIPImageProcessor as CLIPImageProcessorPil


# Not what a user wrote: transformers (`sanitize_control_tokens`, since 5.23) puts this character before a token in a user's text.
PLACEHOLDER = re.compile("(?<!\U000f0000)<image>")
# `<image>` of a user's text, which is no placeholder: the tokenizer takes the noncharacter out again. Chat templates do the same.
IMAGE_AS_TEXT = "<\ufdd0image>"
# Files that are read for a processor.
FILES = ("config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
# What is read of messages, and of the parts of their contents, that are objects with attributes.
ATTRIBUTES = ("role", "content", "type", "text", "image", "image_url", "url", "path", "base64")


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
        code_version (`int`, defaults to this code's): As in [`HealthGPTConfig`].

    Raises:
        HealthGPTError: if a setting is not of its kind, or the checkpoint was written with newer code.
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
        code_version=CODE_VERSION,
        **kwargs,
    ):
        require_code_version(code_version)
        if not isinstance(image_processor, CLIPImageProcessorPil):
            settings = image_processor.to_dict()
            settings.pop("image_processor_type", None)
            image_processor = CLIPImageProcessorPil(**settings)
        require_tasks(tasks or {})
        fits = is_whole(num_image_patches, 1)
        require_setting("A processor", "num_image_patches", num_image_patches, "a whole number from 1 on", fits)
        require_setting("A processor", "prefix_space", prefix_space, "True or False", isinstance(prefix_space, bool))
        fits = picture_size is None or is_whole(picture_size, 1)
        require_setting("A processor", "picture_size", picture_size, "a number of pixels or None", fits)
        self.tasks = dict(tasks or {})
        self.num_image_patches = num_image_patches
        self.prefix_space = prefix_space
        self.picture_size = picture_size
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def __call__(self, images=None, text=None, **kwargs) -> BatchFeature:
        """
        A prompt that does not begin with the `<s>` of the chat template, if that has one, is taken as the published scripts write
        it: it gets its `<s>` and a space before every text chunk. With `add_special_tokens=False` all text is taken as it stands.

        Args:
            images (image or nested list of images, *optional*): As many as `<image>` in `text`, each of a kind that
                [`load_picture`] takes; arrays and tensors of four dimensions hold several.
            text (`str` or `list[str]`): Prompts as `apply_chat_template(tokenize=False)` writes them.
            kwargs: Options of the tokenizer and image processor. `padding` is on by default, on the left. Images are squares,
                padded with CLIP's mean colour, before the options of the image processor apply. `return_offsets_mapping`
                refers to `text`, or together with `return_text_replacement_offsets` to the text with expanded images.

        Returns:
            `BatchFeature`: `input_ids` and `attention_mask` `(batch, length)`, and with images `pixel_values`
            `(num_images, 3, height, width)`; with `return_mm_token_type_ids` also `mm_token_type_ids` `(batch, length)`, 1 for
            every position of an image.

        Raises:
            HealthGPTError: if there is no text, an image cannot be used, or images and prompts do not fit each other.
        """
        prompts = list(text) if isinstance(text, (list, tuple)) else [text]
        if not prompts or not all(isinstance(prompt, str) and prompt.strip() for prompt in prompts):
            raise HealthGPTError("HealthGPT needs prompts that are not empty: text is a string or a list of strings.")
        merged = self._merge_kwargs(
            HealthGPTProcessorKwargs, tokenizer_init_kwargs=self.tokenizer.init_kwargs, **kwargs
        )
        text_kwargs = merged["text_kwargs"]
        return_tensors = text_kwargs.pop("return_tensors", None)
        return_types, return_replacements = (
            text_kwargs.pop(name, merged.get(name, False))  # an option of the text before transformers 5.23
            for name in ("return_mm_token_type_ids", "return_text_replacement_offsets")
        )
        pixel_values = self._pixel_values(flatten(images), merged["images_kwargs"])
        self._check_placeholders(prompts, images)

        replacements = [self.replace_image_token({}, index) for index in range(len(pixel_values))]
        begin = ""
        if self.prefix_space and text_kwargs.get("add_special_tokens", True):
            begin = f"{self.tokenizer.bos_token} "
            text_kwargs["add_special_tokens"] = False
        prompts, edits = self.get_text_with_replacements(prompts, replacements, begin=begin)
        data = dict(self.tokenizer(prompts, **text_kwargs))
        is_image = [[int(index == self.image_token_id) for index in ids] for ids in data["input_ids"]]
        if sum(map(sum, is_image)) != len(pixel_values) * self.num_image_patches:
            raise HealthGPTError(
                f"Truncation to {text_kwargs.get('max_length')} tokens cuts a picture, which takes "
                f"{self.num_image_patches} tokens: shorten the prompt or allow more."
            )
        if return_types:
            data["mm_token_type_ids"] = is_image
        if "offset_mapping" in data and not return_replacements:
            data["offset_mapping"] = [_before_edits(*pair) for pair in zip(data["offset_mapping"], edits, strict=True)]
        if pixel_values:
            data["pixel_values"] = pixel_values
        batch = BatchFeature(data, tensor_type=return_tensors)
        if return_replacements:
            batch["text_replacement_offsets"] = edits
        return batch

    def _check_placeholders(self, prompts, images):
        """Refuses images that are not as many as the prompts have places for them."""
        placeholders = [len(PLACEHOLDER.findall(prompt)) for prompt in prompts]
        given = len(flatten(images))
        if sum(placeholders) != given:
            raise HealthGPTError(
                f"The prompts have {sum(placeholders)} {self.image_token} but {given} pictures were given."
            )
        is_nested = isinstance(images, (list, tuple)) and any(isinstance(item, (list, tuple)) for item in images)
        if is_nested and placeholders != [len(flatten(item)) for item in images]:
            raise HealthGPTError(
                f"The prompts have {placeholders} {self.image_token} but {[len(flatten(item)) for item in images]} pictures "
                "were given for them."
            )

    def to_dict(self):
        auto_map = {"AutoProcessor": "processing_healthgpt.HealthGPTProcessor"}
        return super().to_dict() | {"auto_map": auto_map, "code_version": CODE_VERSION}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """
        Loads the processor of a checkpoint.

        Raises:
            HealthGPTError: if a file of the checkpoint's folder is only git-lfs's pointer to it, or was written with newer code.
        """
        for name in FILES:
            path = Path(pretrained_model_name_or_path, name)  # of a name on the Hub there is none
            if path.is_file() and is_pointer(path):
                raise HealthGPTError(f"{path} is only git-lfs's pointer to the file, which git lfs pull gets.")
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    def _pixel_values(self, images, options):
        """What the vision tower reads of each image; one at a time, so that only one is in memory in its own size."""
        options, stock = {**options, "return_tensors": None}, self.image_processor
        layout = options.pop("input_data_format", None)
        rescales = options.get("do_rescale")
        rescales = stock.do_rescale if rescales is None else rescales
        # Resizing here what the image processor would resize gives the same without its copies of a large image.
        resizes = stock.do_resize and options.keys().isdisjoint({"do_resize", "size", "resample"})
        side = stock.size.get("shortest_edge") if resizes else None
        values = []
        for image in images:
            if rescales or not is_floats(image):
                square = self._pad_to_square(load_picture(image, self.image_size, layout))
                square = square.resize((side, side), stock.resample) if side else square
                values += stock([square], **options)["pixel_values"]
            else:  # floats that are to stay what they are, which no image of 8 bits can hold
                with reading(image):
                    square = self._pad_floats(channels_last(image, layout))
                    values += stock([square], input_data_format="channels_last", **options)["pixel_values"]
        return values

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        """What stands for an image in the text that is tokenised: one placeholder for each of its positions."""
        return self.image_token * self.num_image_patches

    def get_text_with_replacements(
        self, text, images_replacements=(), videos_replacements=(), audio_replacements=(), begin=""
    ) -> tuple[list[str], list[list[dict]]]:
        """
        Prompts with their images expanded, and how each was edited, as in `ProcessorMixin`.

        Args:
            text (`list[str]`): Prompts.
            images_replacements (`list[str]`): What stands for each image.
            videos_replacements, audio_replacements: Nothing, as HealthGPT reads neither.
            begin (`str`, defaults to `""`): What a prompt without the chat template's `<s>` begins with; if there is something,
                such a prompt also gets a space after every image.

        Returns:
            `tuple[list[str], list[list[dict]]]`: The prompts, and for each its edits in order: `type`, `span` before and `new_span`
            after all edits in characters, the `text` that stood there and its `replacement`.
        """
        replacements = iter(images_replacements)
        expanded, edits = [], []
        for prompt in text:
            is_published = bool(begin) and not prompt.startswith(self.tokenizer.bos_token)
            found = [("text", (0, 0), begin)] if is_published else []
            found += [
                ("image", match.span(), next(replacements) + " " * is_published)
                for match in PLACEHOLDER.finditer(prompt)
            ]
            result, end, own = "", 0, []
            for kind, span, replacement in found:
                result += prompt[end : span[0]]
                new_span = (len(result), len(result) + len(replacement))
                edit = {"type": kind, "span": span, "new_span": new_span}
                own.append(edit | {"text": prompt[slice(*span)], "replacement": replacement})
                result, end = result + replacement, span[1]
            expanded.append(result + prompt[end:])
            edits.append(own)
        return expanded, edits

    def _get_num_multimodal_tokens(self, image_sizes=None, **kwargs) -> MultiModalData:
        """Positions of images of `image_sizes` `(height, width)` in the prompt, which do not depend on the size; vLLM asks."""
        if image_sizes is None:
            return MultiModalData()
        return MultiModalData(
            num_image_tokens=[self.num_image_patches] * len(image_sizes), num_image_patches=[1] * len(image_sizes)
        )

    def apply_chat_template(self, conversation, chat_template=None, *, task=None, generation_mode=None, **kwargs):
        """
        Writes the published prompt of a task around one conversation or a list of them.

        Args:
            conversation (`list[dict]` or `list[list[dict]]`): Messages, as dictionaries or as objects (also pydantic models and
                dataclasses) with attributes of the same names; a content is a string or a list of `{"type": "image", "image": ...}` and `{"type": "text",
                "text": ...}`. Images stand before the text. `<image>` in a text is text.
            chat_template (`str`, *optional*): Another template than the checkpoint's.
            task (`str` or `list[str]`, *optional*, defaults to `"comprehension"`): One name for all conversations or one
                for each. With `add_generation_prompt` a task that draws ends its prompt with `<start_index>`.
            generation_mode (`str`, *optional*): `"text"` means task `"comprehension"`, `"image"` task `"generation"`.
            kwargs: As in `ProcessorMixin.apply_chat_template`.

        Raises:
            HealthGPTError: if a task is unknown, or a conversation's last message has no text and its task no default prompt, or
                one that is no text or has special tokens.
        """
        processor_kwargs = dict(kwargs.pop("processor_kwargs", None) or {})
        named, mode = processor_kwargs.pop("task", None), processor_kwargs.pop("generation_mode", None)
        task = task_from_mode(named if task is None else task, mode if generation_mode is None else generation_mode)
        if processor_kwargs:
            kwargs["processor_kwargs"] = processor_kwargs
        first = next(iter(conversation), None) if isinstance(conversation, (list, tuple)) else None
        is_batched = isinstance(first, (list, tuple)) or hasattr(first, "messages")
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
        conversation = _plain(getattr(conversation, "messages", conversation))
        if not isinstance(conversation, (list, tuple)) or not conversation:
            raise HealthGPTError(f"A conversation is a list of at least one message, got {str(conversation)[:200]!r}.")
        messages = [_with_parts(message) for message in conversation]
        for part in (part for message in messages for part in message["content"] if part["type"] == "text"):
            part["text"] = image_as_text(part["text"])
        last = messages[-1]
        if not any(part["type"] == "text" and part["text"].strip() for part in last["content"]):
            pictures = [part for part in last["content"] if part["type"] != "text"]
            default_prompt = self.tasks[task].get("default_prompt")
            if default_prompt is None or not pictures:
                raise HealthGPTError(f"The last message has no text, which task {task!r} needs.")
            tokenizer = self.tokenizer.backend_tokenizer
            if reserved_token(tokenizer, default_prompt) is not None:
                raise HealthGPTError(
                    f"The default prompt of task {task!r} has special tokens, {default_prompt!r:.100}: "
                    "give a text of your own."
                )
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
        if picture.size == (side, side):
            return picture
        check_pixels(side, side, "The image, padded to a square,")
        square = Image.new("RGB", (side, side), self._colour)
        square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
        return square

    def _pad_floats(self, array):
        """Centres floats `(height, width, 3)` from 0 to 1 on a square of CLIP's mean colour."""
        height, width = array.shape[:2]
        check_pixels(width, height)
        check_size(width, height, self.image_size)
        side = max(height, width)
        check_pixels(side, side, "The image, padded to a square,")
        pixels = torch.from_numpy(array.copy())
        square = (torch.tensor(self._colour) / 255).to(pixels).expand(side, side, 3).clone()
        top, left = (side - height) // 2, (side - width) // 2
        square[top : top + height, left : left + width] = pixels
        return square.numpy()

    @property
    def _colour(self):
        return tuple(int(255 * mean) for mean in self.image_processor.image_mean)

    def process_target_images(self, images) -> torch.FloatTensor:
        """
        Prepares pictures for `encode_image`: stretched to the VQGAN's size (Lanczos), in [-1, 1].

        Args:
            images (image or nested list of images): Of the kinds that [`load_picture`] takes.

        Returns:
            `torch.FloatTensor` of shape `(num_images, 3, picture_size, picture_size)`.

        Raises:
            HealthGPTError: if the checkpoint has no VQGAN, a picture cannot be used, or there is none.
        """
        if self.picture_size is None:
            raise HealthGPTError(
                "This checkpoint has no VQGAN: it was exported without one and cannot handle image codes."
            )
        if not flatten(images):
            raise HealthGPTError("There is no picture to prepare: the list is empty.")
        size = (self.picture_size, self.picture_size)
        pictures = [
            load_picture(image, self.image_size).resize(size, Image.Resampling.LANCZOS) for image in flatten(images)
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


def image_as_text(text: str) -> str:
    """A text for a prompt in which `<image>` is what somebody wrote, and no place of an image."""
    return text.replace(HealthGPTProcessor.image_token, IMAGE_AS_TEXT)


def reserved_token(tokenizer, text: str) -> str | None:
    """
    The first token in a text that only the processor may write, such as `<image>`, or `None` if there is none.

    Args:
        tokenizer (`tokenizers.Tokenizer`): The vocabulary; of a processor `processor.tokenizer.backend_tokenizer`.
        text (`str`): What a person, a sample or a plugin says.
    """
    reserved = {index: token.content for index, token in tokenizer.get_added_tokens_decoder().items()}
    found = (reserved.get(index) for index in tokenizer.encode(text, add_special_tokens=False).ids)
    return next((token for token in found if token is not None and token in text), None)


def _plain(value):
    """Messages that are objects, and what they hold, as dictionaries and lists; all else, such as images, as it is."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if callable(getattr(value, "model_dump", None)):
        return _plain(value.model_dump())
    named = any(isinstance(getattr(value, name, None), str) for name in ("role", "type", "url"))
    if not named or hasattr(value, "read"):  # answers of a server are images, though they have an address
        return value
    return {name: _plain(getattr(value, name)) for name in ATTRIBUTES if hasattr(value, name)}


def _with_parts(message):
    """A copy of a chat message, checked, whose content is a list of its pictures and texts, without fields that are `None`."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise HealthGPTError(f"A message is a dictionary with role and content, got {str(message)[:200]!r}.")
    content = message.get("content")
    message = {key: value for key, value in message.items() if value is not None}
    if isinstance(content, str):
        return {**message, "content": [{"type": "text", "text": content}]}
    for part in content if isinstance(content, list) else [content]:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("image", "image_url", "text") or (kind == "text" and not isinstance(part.get("text"), str)):
            raise HealthGPTError(
                "A message's content is a string or a list of {'type': 'image', 'image': ...} and {'type': 'text', 'text': "
                f"...}}, got {str(part)[:200]!r}."
            )
    parts = [{key: value for key, value in part.items() if value is not None} for part in content]
    return {**message, "content": parts}


def _before_edits(offsets, edits):
    """Where tokens of an edited text stand in the text before; those of a replacement stand where it was put in."""

    def before(position, is_end):
        gained = 0
        for edit in edits:
            (first, last), (start, end) = edit["span"], edit["new_span"]
            if position < start + is_end:
                break
            if position < end + is_end:
                return last if is_end else first
            gained = end - last
        return position - gained

    return [(before(start, False), before(end, True)) for start, end in offsets]


def require_tasks(tasks: dict[str, dict]) -> None:
    """
    Raises:
        HealthGPTError: if they are not the settings of tasks by name, as a processor knows them.
    """
    fits = isinstance(tasks, dict) and all(isinstance(task, dict) for task in tasks.values())
    require_setting("A processor", "tasks", tasks, "settings of every task by its name", fits)
    for name, task in tasks.items():
        kind, prompt = task.get("kind"), task.get("default_prompt")
        require_setting(f"Task {name!r:.100}", "kind", kind, "'text' or 'image'", kind in ("text", "image"))
        fits = prompt is None or isinstance(prompt, str)
        require_setting(f"Task {name!r:.100}", "default_prompt", prompt, "a text or None", fits)


__all__ = ["HealthGPTProcessor"]
