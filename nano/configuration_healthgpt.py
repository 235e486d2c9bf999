# Copyright 2026 The HealthGPT package authors.
# Licensed under the Apache License, Version 2.0 (see the file LICENSE).
"""Configuration of HealthGPT: one language model, one vision tower, one image tokenizer and any number of tasks."""

import re
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path

from torch import nn
from transformers import AutoConfig, PreTrainedConfig

from .errors_healthgpt import HealthGPTError

# Raised with every change of the code that travels with checkpoints after which older code cannot load them.
CODE_VERSION = 2

GIT_LFS = b"version https://git-lfs"  # how git-lfs's pointers begin

# Modules are kept by the names of their tasks, among what a ModuleDict has already.
RESERVED_NAMES = frozenset(dir(nn.ModuleDict()))

AUTO_MAP = {
    "AutoConfig": "configuration_healthgpt.HealthGPTConfig",
    "AutoModel": "modeling_healthgpt.HealthGPTForConditionalGeneration",
    "AutoModelForImageTextToText": "modeling_healthgpt.HealthGPTForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_healthgpt.HealthGPTForConditionalGeneration",
}
CUSTOM_PIPELINES = {
    "any-to-any": {
        "impl": "pipeline_healthgpt.HealthGPTPipeline",
        "pt": ["AutoModelForMultimodalLM"],
        "type": "multimodal",
    }
}


def require_codes(codes: list, length: int, num_codes: int, name: str) -> None:
    """
    Raises:
        HealthGPTError: if they are not so many whole numbers from 0 on below `num_codes`; the sentence begins with `name`.
    """
    valid = isinstance(codes, list) and all(type(code) is int and code in range(num_codes) for code in codes)
    if not (valid and len(codes) == length):
        raise HealthGPTError(f"{name} are the {length} codes of an image, whole numbers from 0 to {num_codes - 1}.")


def require_setting(owner: str, name: str, value, accepted: str, fits: bool) -> None:
    """
    Raises:
        HealthGPTError: if a setting's value does not fit; the sentence names the setting, what is accepted, and the value.
    """
    if not fits:
        raise HealthGPTError(f"{owner}'s {name} must be {accepted}, got {value!r:.100}.")


def is_whole(value, least: int | None = None) -> bool:
    """Whether a value is a whole number, at least `least` if that is given; truth values are none."""
    return type(value) is int and (least is None or value >= least)


def is_number(value) -> bool:
    """Whether a value is a number; truth values are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


@dataclass
class TaskConfig:
    """
    One task of a checkpoint: what it puts out and which weights it runs with.

    A task owns a plugin (one H-LoRA per decoder linear, see `HLoRALinear`) and a projector, both stored under the
    task's name. Hyper-parameters are those of the HealthGPT paper (arXiv 2502.09838, section 4).

    Args:
        kind (`str`): `"text"` if the task answers in words, `"image"` if it draws a picture.
        rank (`int`): Total rank r of the H-LoRA factors, a multiple of `num_experts`.
        alpha (`float`): H-LoRA alpha; the factors' product is scaled by `alpha / rank * num_experts`.
        num_experts (`int`): Number of experts n that the router weighs.
        vision_layer (`int`): Index into the vision tower's hidden states (0 is the embeddings' output); -2 is the
            abstract level of comprehension, 1 the concrete level of generation.
        token_tables (`str`, *optional*): Name of the embedding table and head of the task. `None` means the base's.
        default_prompt (`str`, *optional*): Instruction used when a message brings a picture but no text.
        dropout (`float`, defaults to 0.0): Share of the inputs of A that is zeroed during training.
        follows_input (`bool`, defaults to `True`): Whether what is drawn shows, place by place, what the input image shows:
            then the codes of that image are what a drawing is expected to be near to, which saves passes and changes nothing
            else.
        typical_codes (`list[int]`, *optional*): What is drawn most often, place by place, as codes from 0: the same for
            prompts without an input image.

    Raises:
        HealthGPTError: if a value is none that the model can be built with; the sentence names it.
    """

    kind: str
    rank: int
    alpha: float
    num_experts: int
    vision_layer: int
    token_tables: str | None = None
    default_prompt: str | None = None
    dropout: float = 0.0
    follows_input: bool = True
    typical_codes: list[int] | None = None

    def __post_init__(self):
        if self.kind not in ("text", "image"):
            raise HealthGPTError(f"A task's kind is 'text' or 'image', got {self.kind!r}.")
        for name, accepted, fits in (
            ("rank", "a whole number", is_whole(self.rank)),
            ("num_experts", "a whole number", is_whole(self.num_experts)),
            ("alpha", "a positive number", is_number(self.alpha) and 0 < self.alpha < float("inf")),
            ("vision_layer", "a whole number", is_whole(self.vision_layer)),
            ("default_prompt", "a text or None", isinstance(self.default_prompt, str | None)),
            (
                "dropout",
                "a number from 0 on, less than 1",
                is_number(self.dropout) and 0 <= self.dropout < 1,
            ),
            ("follows_input", "True or False", isinstance(self.follows_input, bool)),
        ):
            require_setting("A task", name, getattr(self, name), accepted, fits)
        if self.num_experts < 1 or self.rank < 1 or self.rank % self.num_experts:
            raise HealthGPTError(
                f"An H-LoRA's rank must be a positive multiple of its number of experts, got rank {self.rank} "
                f"and {self.num_experts} experts."
            )


class HealthGPTVQGANConfig(PreTrainedConfig):
    """
    Configuration of the Gumbel VQGAN that turns codes into pictures and pictures into codes.

    Names follow the published `model.yaml` (taming-transformers `ddconfig`); defaults are the published
    "OpenImages f=8, 8192 codes" model.

    Args:
        num_codes (`int`, defaults to 8192): Entries of the codebook (`n_embed`).
        embed_dim (`int`, defaults to 256): Width of a codebook entry.
        latent_channels (`int`, defaults to 256): Channels between encoder and quantiser (`z_channels`).
        resolution (`int`, defaults to 256): Height and width of a picture in pixels.
        in_channels, out_channels (`int`, defaults to 3): Colour channels read and written (`out_ch`).
        base_channels (`int`, defaults to 128): Channels at full resolution (`ch`).
        channel_multipliers (`list[int]`, defaults to `[1, 1, 2, 4]`): Channels per level, in `base_channels`;
            every level after the first halves the resolution.
        num_res_blocks (`int`, defaults to 2): Residual blocks per level.
        attention_resolutions (`list[int]`, defaults to `[32]`): Feature map sizes that get self-attention.

    Raises:
        HealthGPTError: if a value is none that the model can be built with; the sentence names it.
    """

    model_type = "healthgpt_vqgan"

    def __init__(
        self,
        num_codes=8192,
        embed_dim=256,
        latent_channels=256,
        resolution=256,
        in_channels=3,
        out_channels=3,
        base_channels=128,
        channel_multipliers=(1, 1, 2, 4),
        num_res_blocks=2,
        attention_resolutions=(32,),
        **kwargs,
    ):
        self.num_codes = num_codes
        self.embed_dim = embed_dim
        self.latent_channels = latent_channels
        self.resolution = resolution
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.base_channels = base_channels
        self.channel_multipliers = channel_multipliers
        self.num_res_blocks = num_res_blocks
        self.attention_resolutions = attention_resolutions
        self.validate_shape()
        super().__init__(**kwargs)

    def validate_shape(self) -> None:
        """
        Raises:
            HealthGPTError: if a value is none that the model can be built with.
        """
        owner, accepted = "A VQGAN", "a whole number from 1 on"
        numbers = ("num_codes", "embed_dim", "latent_channels", "resolution", "in_channels", "out_channels")
        for name in (*numbers, "base_channels", "num_res_blocks"):
            require_setting(owner, name, getattr(self, name), accepted, is_whole(getattr(self, name), 1))
        for name in ("channel_multipliers", "attention_resolutions"):
            value = getattr(self, name)
            fits = isinstance(value, (list, tuple)) and all(is_whole(number, 1) for number in value)
            require_setting(owner, name, value, "a list of whole numbers from 1 on", fits)
            setattr(self, name, list(value))
        levels = self.channel_multipliers
        fits = bool(levels) and self.resolution % 2 ** (len(levels) - 1) == 0
        accepted = f"a list of levels that halve {self.resolution} pixels without a remainder"
        require_setting(owner, "channel_multipliers", levels, accepted, fits)

    @property
    def grid_size(self) -> int:
        """Codes along one side of a picture."""
        return self.resolution // 2 ** (len(self.channel_multipliers) - 1)


class HealthGPTConfig(PreTrainedConfig):
    """
    Configuration of [`HealthGPTForConditionalGeneration`].

    Args:
        text_config (`PreTrainedConfig` or `dict`): The language model (Phi3 or Qwen2). Its `vocab_size` is the number of
            rows of every token table.
        vision_config (`PreTrainedConfig` or `dict`): The CLIP vision tower.
        vqgan_config (`HealthGPTVQGANConfig` or `dict`, *optional*): The image tokenizer; `None` if the checkpoint
            cannot draw.
        tasks (`dict[str, TaskConfig or dict]`): What the checkpoint can do, by name.
        image_token_id (`int`): Id that stands for one patch of an input picture. It may lie past the token tables.
        image_start_token_id (`int`, *optional*): Id of `<start_index>`, after which a picture's codes begin.
        image_code_offset (`int`, *optional*): Id of `<idx_0>`; code `i` has the id `image_code_offset + i`.
        code_version (`int`, defaults to this code's): Version of the code that the checkpoint was written with. Until
            version 1 checkpoints did not name it.

    Raises:
        HealthGPTError: if a task's name or settings do not fit the rest of the configuration, or the checkpoint was written
            with newer code.
    """

    model_type = "healthgpt"
    sub_configs = {"text_config": AutoConfig, "vision_config": AutoConfig, "vqgan_config": HealthGPTVQGANConfig}

    def __init__(
        self,
        text_config=None,
        vision_config=None,
        vqgan_config=None,
        tasks=None,
        image_token_id=None,
        image_start_token_id=None,
        image_code_offset=None,
        code_version=CODE_VERSION,
        **kwargs,
    ):
        require_code_version(code_version)
        self.text_config = _sub_config(text_config, default_model_type="phi3")
        self.vision_config = _sub_config(vision_config, default_model_type="clip_vision_model")
        self.vqgan_config = HealthGPTVQGANConfig(**vqgan_config) if isinstance(vqgan_config, dict) else vqgan_config
        fits = isinstance(self.vqgan_config, PreTrainedConfig | None)  # of any copy of this code
        require_setting("A checkpoint", "vqgan_config", vqgan_config, "settings by name or None", fits)
        require_setting("A checkpoint", "tasks", tasks, "settings of tasks by name", isinstance(tasks, dict | None))
        for name in ("image_size", "patch_size"):
            size = getattr(self.vision_config, name, None)
            require_setting("A vision tower", name, size, "a number of pixels", is_whole(size, 1))
        ids = {"image_token_id": image_token_id, "image_start_token_id": image_start_token_id}
        for name, token in (ids | {"image_code_offset": image_code_offset}).items():
            require_setting("A checkpoint", name, token, "a token's id or None", token is None or is_whole(token, 0))
        self.tasks = {name: _task_config(task) for name, task in (tasks or {}).items()}
        self.image_token_id = image_token_id
        self.image_start_token_id = image_start_token_id
        self.image_code_offset = image_code_offset
        for name, task in self.tasks.items():
            self.validate_task(name, task)
        kwargs["tie_word_embeddings"] = self.text_config.tie_word_embeddings
        kwargs = {"auto_map": dict(AUTO_MAP), "custom_pipelines": CUSTOM_PIPELINES, **kwargs}
        super().__init__(**kwargs)

    def validate_task(self, name: str, task: TaskConfig) -> None:
        """
        Raises:
            HealthGPTError: if the name is none, or the task does not fit the rest of the configuration.
        """
        for field, value in (("name", name), ("token_tables", task.token_tables)):
            if value is not None and not (isinstance(value, str) and re.fullmatch(r"[a-z][a-z0-9_]*", value)):
                raise HealthGPTError(
                    f"A task's {field} is made of small letters, digits and underscores, got {value!r:.100}."
                )
            if value in RESERVED_NAMES:
                raise HealthGPTError(f"A task's {field} cannot be {value!r}, which torch's ModuleDict has a use for.")
        needed = (self.vqgan_config, self.image_code_offset, self.image_start_token_id)
        if task.kind == "image" and None in needed:
            raise HealthGPTError(
                f"Task {name!r} draws pictures, but the configuration has no VQGAN, no image codes or no token that starts them."
            )
        if task.kind == "image" and self.image_code_offset + self.vqgan_config.num_codes > self.text_config.vocab_size:
            raise HealthGPTError(
                f"Task {name!r} draws pictures, but the token tables have {self.text_config.vocab_size} rows, and the image codes "
                f"end at {self.image_code_offset + self.vqgan_config.num_codes}."
            )
        if self.image_token_id is None:
            raise HealthGPTError(f"Task {name!r} reads pictures, but the configuration has no image_token_id.")
        if task.typical_codes is not None:
            if task.kind == "text":
                raise HealthGPTError(f"Task {name!r} answers in words, so that it has no typical_codes.")
            require_codes(
                task.typical_codes, self.num_image_codes, self.vqgan_config.num_codes, f"typical_codes of {name!r}"
            )
        num_states = self.vision_config.num_hidden_layers + 1
        if not -num_states <= task.vision_layer < num_states:
            raise HealthGPTError(
                f"Task {name!r} reads layer {task.vision_layer} of a vision tower with {num_states} hidden states."
            )

    @property
    def token_tables(self) -> list[str]:
        """Names of the token tables that tasks bring beside the base's."""
        return list(dict.fromkeys(task.token_tables for task in self.tasks.values() if task.token_tables is not None))

    @property
    def num_image_patches(self) -> int:
        """Positions that one input picture takes in the prompt."""
        return (self.vision_config.image_size // self.vision_config.patch_size) ** 2

    @property
    def num_image_codes(self) -> int:
        """Codes that make one drawn picture."""
        return self.vqgan_config.grid_size**2

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        # A processor's `num_image_patches` gets here through AutoTokenizer; in the configuration it follows from the rest.
        kwargs.pop("num_image_patches", None)
        return super().from_dict(config_dict, **kwargs)

    def to_dict(self):
        output = super().to_dict()
        output["tasks"] = {name: asdict(task) for name, task in self.tasks.items()}
        output["code_version"] = CODE_VERSION
        return output


def require_code_version(version: int) -> None:
    """
    Raises:
        HealthGPTError: if it is no version, or one of newer code than this.
    """
    if type(version) is not int:
        raise HealthGPTError(f"A checkpoint's code_version is a whole number, got {version!r:.100}.")
    if version > CODE_VERSION:
        raise HealthGPTError(
            f"The checkpoint was written with version {version} of HealthGPT's code, and this is version "
            f"{CODE_VERSION}: update the package healthgpt, or load the checkpoint's own code with trust_remote_code=True "
            "where the package is not imported."
        )


def is_pointer(path: Path) -> bool:
    """Whether a file is only what git-lfs leaves of it until `git lfs pull`."""
    with open(path, "rb") as file:
        return file.read(len(GIT_LFS)) == GIT_LFS


def task_from_mode(task: str | list[str] | None, generation_mode: str | None) -> str | list[str]:
    """The task that `task` and `generation_mode` name together; `"comprehension"` if neither is given."""
    if generation_mode is None:
        return "comprehension" if task is None else task
    if generation_mode not in ("text", "image"):
        raise HealthGPTError(f"generation_mode is 'text' or 'image', got {generation_mode!r}.")
    named = "comprehension" if generation_mode == "text" else "generation"
    if task is not None and task != named:
        raise HealthGPTError(
            f"generation_mode={generation_mode!r} means task {named!r}, but task={task!r} was given too."
        )
    return named


def _sub_config(config, default_model_type):
    if isinstance(config, PreTrainedConfig):
        return config
    fits = isinstance(config, dict | None)
    require_setting("A checkpoint", f"configuration of a {default_model_type} model", config, "settings by name", fits)
    config = dict(config or {})
    return AutoConfig.for_model(config.pop("model_type", default_model_type), **config)


def _task_config(task):
    if isinstance(task, TaskConfig):
        return task
    require_setting("A checkpoint", "task", task, "settings by name", isinstance(task, dict))
    unknown = set(task) - {field.name for field in fields(TaskConfig)}
    if unknown:
        raise HealthGPTError(f"A task has no setting {', '.join(sorted(unknown))}.")
    lacking = [field.name for field in fields(TaskConfig) if field.default is MISSING and field.name not in task]
    if lacking:
        raise HealthGPTError(f"A task lacks the setting {', '.join(lacking)}.")
    return TaskConfig(**task)


__all__ = ["HealthGPTConfig", "HealthGPTVQGANConfig", "TaskConfig"]
