# Copyright 2026 The HealthGPT package authors.
# Licensed under the Apache License, Version 2.0 (see the file LICENSE).
"""
HealthGPT (arXiv 2502.09838): one frozen language model that answers questions about medical pictures and draws them.

A checkpoint holds everything once: language model, CLIP tower and VQGAN are shared, and each task adds its plugin (an
H-LoRA on every decoder linear), its projector and, if it was published so, its own token tables. Which task a row of a
batch runs with is an argument of `forward` and `generate`; nothing of it stays in the model afterwards.
"""

import copy
import json
import math
import re
import threading
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModel, PreTrainedModel, initialization
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.modeling_utils import safe_open
from transformers.processing_utils import Unpack
from transformers.utils import CONFIG_NAME, TransformersKwargs, cached_file, can_return_tuple
from transformers.utils.deprecation import deprecate_kwarg

from .configuration_healthgpt import HealthGPTConfig, TaskConfig, is_pointer, task_from_mode
from .drafting_healthgpt import CACHE_NAME
from .errors_healthgpt import HealthGPTError
from .generation_healthgpt import HealthGPTGenerationMixin
from .precision_healthgpt import call_linear, compute, is_widened, linear
from .quantization_healthgpt import UnquantizedLinear, keep_scales, keep_unquantized, require_kernel
from .vqgan_decoder import HealthGPTVQGAN

if TYPE_CHECKING:
    # config.json names this class for "any-to-any"; transformers carries along the files that a file imports from.
    from .pipeline_healthgpt import HealthGPTPipeline  # noqa: F401

# The rows of a batch that run with one task: its name, and None for all rows, a slice of neighbours or else their indices.
TaskGroup = tuple[str, slice | torch.LongTensor | None]


def group_by_task(tasks: list[str], device: torch.device) -> list[TaskGroup]:
    """Groups the rows of a batch by their tasks (one name per row)."""
    names = list(dict.fromkeys(tasks))
    if len(names) == 1:
        return [(names[0], None)]
    groups = []
    for name in names:
        rows = [row for row, task in enumerate(tasks) if task == name]
        neighbours = slice(rows[0], rows[-1] + 1)
        is_run = neighbours.stop - neighbours.start == len(rows)
        groups.append((name, neighbours if is_run else torch.tensor(rows, device=device)))
    return groups


def run_per_task(groups: list[TaskGroup], function: Callable, inputs: torch.Tensor) -> torch.Tensor:
    """Runs `function(task, rows of inputs)` for every group and returns its results in the order of the batch."""
    if len(groups) == 1:
        return function(groups[0][0], inputs)
    output = None
    for task, rows in groups:
        rows = rows if isinstance(rows, slice) else rows.to(inputs.device)
        part = function(task, inputs[rows])
        output = part.new_empty((len(inputs), *part.shape[1:])) if output is None else output
        output[rows] = part
    return output


class _Routing(threading.local):
    def __init__(self):  # runs in every thread; torch.compile would take a value of the class for a constant
        self.groups: list[TaskGroup] = []


# What the H-LoRA linears of the running forward pass read. The language model's own layers call their linears with one
# tensor, so the tasks cannot come as an argument; a value per thread keeps concurrent forward passes apart.
_routing = _Routing()


@contextmanager
def route(groups: list[TaskGroup]):
    """Sets which task each row of the batch runs with, for all H-LoRA linears called in this thread meanwhile."""
    outer = _routing.groups
    _routing.groups = groups
    try:
        yield
    finally:
        _routing.groups = outer


# The library's own way of giving a cache its new name, from the version on that has one.
accept_past_key_values = (
    deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    if CACHE_NAME == "cache"
    else lambda function: function
)


class PluginMatrix(nn.Module):
    """
    A matrix product of a plugin, `(tokens, in_features)` to `(tokens, out_features)`, without a bias.

    It is not an `nn.Linear`, which is what quantisers and PEFT's `"all-linear"` look for: plugins keep their dtype, and
    adapters on top of the model are adapters of the base.
    """

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def forward(self, hidden_states):
        if is_widened(hidden_states, self.weight):
            return linear(hidden_states, self.weight)
        return torch.mm(hidden_states, self.weight.t())  # in fewer calls than torch's own linear

    def extra_repr(self):
        return f"in_features={self.in_features}, out_features={self.out_features}"


class HLoRA(nn.Module):
    """The plugin of one task at one linear; see [`HLoRALinear`] for the mathematics."""

    def __init__(self, task: TaskConfig, in_features: int, out_features: int):
        super().__init__()
        self.num_experts = task.num_experts
        self.scaling = task.alpha / task.rank * task.num_experts
        self.dropout = nn.Dropout(task.dropout)
        self.lora_route = PluginMatrix(in_features, task.num_experts)
        self.lora_A = PluginMatrix(in_features, task.rank)
        self.lora_B = PluginMatrix(task.rank, out_features)

    def forward(self, hidden_states):
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        weights = self.lora_route(tokens).softmax(dim=-1, dtype=torch.float32).to(tokens.dtype)
        factors = self.lora_A(self.dropout(tokens))
        weighted = factors.view(len(tokens), self.num_experts, -1) * weights.view(len(tokens), -1, 1)
        return self.lora_B(weighted.view(factors.shape)).view(*hidden_states.shape[:-1], -1)


class HLoRALinear(nn.Module):
    r"""
    A frozen linear with one H-LoRA plugin per task (HealthGPT paper, section 4.2).

    H-LoRA is a mixture of n low-rank experts whose factors lie side by side in two matrices, so that all experts cost
    two matrix products. With W x + b the frozen linear, r the total rank and alpha the scaling of the plugin:

        w = softmax(R x)                                     (n)   router: per token, dense, no top-k
        s = alpha / r * n
        y = W x + b + s * B (repeat_interleave(w, r / n) * A x)

                 +---------------- W, b (frozen) -----------------+
        x (in) --+-- A (r x in) --> n blocks of r / n --*-- B ----+--> y (out)
                 +-- R (n x in) --> softmax ------------+

    Expert i owns rows i * r / n ... of A and the same columns of B. The router depends on x, therefore a plugin can
    never be merged into W. For training, A and R start Kaiming-uniform (a = sqrt 5) and B at zero.

    Args:
        base_layer (`nn.Linear`): The linear of the language model.
        tasks (`dict[str, TaskConfig]`): The tasks of the checkpoint.
    """

    def __init__(self, base_layer: nn.Linear, tasks: dict[str, TaskConfig]):
        super().__init__()
        self.base_layer = base_layer
        self.plugins = nn.ModuleDict(
            {name: HLoRA(task, base_layer.in_features, base_layer.out_features) for name, task in tasks.items()}
        )

    def forward(self, hidden_states):
        output = call_linear(self.base_layer, hidden_states)
        for task, rows in _routing.groups:
            plugin = self.plugins[task]
            if rows is None:
                output.add_(plugin(hidden_states), alpha=plugin.scaling)
            elif isinstance(rows, slice):
                output[rows].add_(plugin(hidden_states[rows]), alpha=plugin.scaling)
            else:
                rows = rows.to(output.device)
                added = plugin(hidden_states[rows]).to(output.dtype)
                output.index_add_(0, rows, added, alpha=plugin.scaling)
        return output

    def unload_and_optionally_merge_module(self, **kwargs) -> "HLoRALinear":
        """
        What PEFT's `merge_and_unload` and `unload` leave in place of this module: itself.

        PEFT takes every module with a `base_layer` for one of its own. Its adapters are inside, around `base_layer`, and
        it merges them there.
        """
        return self


def shard_plugins(plan: dict[str, str], tasks: dict[str, TaskConfig]) -> dict[str, str]:
    """
    The language model's plan of tensor parallelism, for its wrapped linears and their plugins.

    A linear that is split by its outputs splits B with it, one that is split by its inputs A and the router; all of them
    take and give whole activations.
    """
    found = {}
    for name, style in plan.items():
        if style.startswith("colwise"):
            parts, style = ("lora_B",), {"colwise": "colwise_gather_output"}.get(style, style)
        elif style.startswith("rowwise"):
            parts, style = ("lora_A", "lora_route"), {"rowwise": "rowwise_split_input"}.get(style, style)
        else:
            found[name] = style
            continue
        found[f"{name}.base_layer"] = style
        for task in tasks:
            wildcard = re.sub(r"\d+", "*", task)  # as transformers writes the names that it looks up
            found |= {f"{name}.plugins.{wildcard}.{part}": style for part in parts}
    return found


class HealthGPTProjector(nn.Sequential):
    """`mlp2x_gelu`: vision features (..., vision hidden) -> token embeddings (..., hidden), with the exact GELU."""

    def __init__(self, vision_hidden_size: int, hidden_size: int):
        super().__init__(
            UnquantizedLinear(vision_hidden_size, hidden_size), nn.GELU(), UnquantizedLinear(hidden_size, hidden_size)
        )


def require_own_files(checkpoint: str) -> None:
    """
    Raises:
        HealthGPTError: if the index of a checkpoint's folder names files outside of it, which the library would read.
    """
    for index in Path(checkpoint).glob("*.index.json"):  # of a name on the Hub there are none
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise HealthGPTError(f"{index} cannot be used: it has no weight_map of names of files.") from error
        for name in names:
            if not isinstance(name, str) or not re.fullmatch(r"[\w.-]*\w[\w.-]*", name):
                raise HealthGPTError(
                    f"{index} names the file {name!r:.100}, but may only name files in its own folder."
                )


def require_whole_files(checkpoint: str, **where) -> None:
    """
    Finds the file over which the library failed without naming it.

    Args:
        checkpoint (`str`): Folder or name on the Hub.
        where: `revision` and `cache_dir`, as in `from_pretrained`.

    Raises:
        HealthGPTError: if a weight file is damaged, or only git-lfs's pointer to it.
    """
    folder = Path(cached_file(checkpoint, CONFIG_NAME, local_files_only=True, **where)).parent
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                pass
        except Exception as error:  # a SafetensorError, or an OSError
            reason = "it is only git-lfs's pointer to the file, which git lfs pull gets" if is_pointer(path) else error
            raise HealthGPTError(f"{path} cannot be read as safetensors: {reason}.") from error


class _WithImageOutputs:
    """What the outputs of the model have beyond those of a language model, as the library's multimodal outputs."""

    def to_tuple(self) -> tuple:
        return tuple(self.image_outputs.to_tuple() if key == "image_outputs" else self[key] for key in self.keys())


@dataclass
class HealthGPTModelOutputWithPast(_WithImageOutputs, BaseModelOutputWithPast):
    """
    Args:
        image_outputs (`BaseModelOutputWithPooling`, *optional*): What [`HealthGPTModel.get_image_features`] gave for the
            input images; `None` without any.
    """

    image_outputs: BaseModelOutputWithPooling | None = None


@dataclass
class HealthGPTCausalLMOutputWithPast(_WithImageOutputs, CausalLMOutputWithPast):
    """
    Args:
        image_outputs (`BaseModelOutputWithPooling`, *optional*): What [`HealthGPTModel.get_image_features`] gave for the
            input images; `None` without any.
    """

    image_outputs: BaseModelOutputWithPooling | None = None


class HealthGPTPreTrainedModel(PreTrainedModel):
    config_class = HealthGPTConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    output_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["HealthGPTVQGAN"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def post_init(self):
        super().post_init()
        # CLIP lists the text tower's classes too, and FSDP looks for every class that is listed.
        self._no_split_modules = {type(module).__name__ for module in self.modules()} & set(self._no_split_modules)

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """
        Gives every pair of token tables, those of the tasks too, another number of rows; image codes keep their ids.

        Args:
            new_num_tokens, pad_to_multiple_of, mean_resizing: As in `PreTrainedModel.resize_token_embeddings`.

        Returns:
            `nn.Embedding`: The base's embedding table.

        Raises:
            HealthGPTError: if the tables would lose rows of image codes.
        """
        needed = 1
        if self.config.image_code_offset is not None:
            vqgan_config = self.config.vqgan_config
            needed = self.config.image_code_offset + (1 if vqgan_config is None else vqgan_config.num_codes)
        if new_num_tokens is not None and not (isinstance(new_num_tokens, int) and new_num_tokens >= needed):
            raise HealthGPTError(
                f"The token tables need a whole number of rows, at least {needed} with those of image codes, got "
                f"{new_num_tokens!r}."
            )
        embeddings = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        num_rows, tables = self.config.text_config.vocab_size, self.base_model.token_embeddings
        for name, table in tables.items():
            learns = table.weight.requires_grad
            table = self._get_resized_embeddings(table, num_rows, mean_resizing=mean_resizing)
            tables[name] = table.requires_grad_(learns)
        return embeddings

    def initialize_weights(self):
        """Initialises what no checkpoint filled; plugins by their own rule, not that of the language model around them."""
        super().initialize_weights()
        for module in self.modules():
            if isinstance(module, HLoRA):
                initialization.kaiming_uniform_(module.lora_route.weight, a=math.sqrt(5))
                initialization.kaiming_uniform_(module.lora_A.weight, a=math.sqrt(5))
                initialization.zeros_(module.lora_B.weight)

    def _set_gradient_checkpointing(self, enable=True, gradient_checkpointing_func=checkpoint, **kwargs):
        """A checkpointed layer runs again during the backward pass: then it needs the tasks it first ran with."""

        def checkpoint_with_tasks(function, *args):
            groups = _routing.groups

            def routed(*args):
                with route(groups):
                    return function(*args)

            return gradient_checkpointing_func(routed, *args)

        super()._set_gradient_checkpointing(enable, checkpoint_with_tasks, **kwargs)

    @classmethod
    def from_pretrained(cls, *args, output_loading_info=False, **kwargs):
        """
        Loads a checkpoint whole, or not at all.

        Raises:
            HealthGPTError: if the checkpoint lacks a tensor, or has one of another shape or that this model has no place for; if a
                weight file is damaged; or if this processor's 4-bit kernel does not take its sizes.
        """
        kwargs["ignore_mismatched_sizes"] = True  # they are refused here, by name
        if kwargs.get("quantization_config") is not None:
            kwargs["quantization_config"] = keep_unquantized(kwargs["quantization_config"])
        checkpoint = args[0] if args else kwargs["pretrained_model_name_or_path"]
        if checkpoint is not None:  # else there is a state_dict in its place
            require_own_files(checkpoint)
        try:
            model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        except Exception as error:
            if type(error).__name__ == "SafetensorError":  # the class is of a library that Hub files do not import
                where = {name: kwargs[name] for name in ("revision", "cache_dir") if name in kwargs}
                require_whole_files(checkpoint, **where)
            raise
        for problem, keys in (
            ("lacks tensors of the model", info["missing_keys"]),
            ("has tensors that the model has no place for", info["unexpected_keys"]),
            ("has tensors of another shape than its configuration says", {key for key, *_ in info["mismatched_keys"]}),
        ):
            if keys:
                raise HealthGPTError(f"The checkpoint {problem}, {len(keys)} in all: {', '.join(sorted(keys))}.")
        for name, module in model.named_modules():
            if type(module).__name__ == "Linear4bit":
                require_kernel(name, module)
                keep_scales(module)
        return (model, info) if output_loading_info else model


class HealthGPTModel(HealthGPTPreTrainedModel):
    """
    HealthGPT without its heads: vision tower, projectors, language model with H-LoRA plugins, token tables, VQGAN.

    Args:
        config (`HealthGPTConfig`): Shapes of all parts and the tasks.
    """

    # A whole checkpoint loads into this class too: the heads are what it is meant to leave out.
    _keys_to_ignore_on_load_unexpected = [r"^lm_head\.", r"^token_heads\."]

    def __init__(self, config: HealthGPTConfig):
        super().__init__(config)
        hidden_size = config.text_config.hidden_size
        self.vision_tower = AutoModel.from_config(config.vision_config)
        for module in self.vision_tower.modules():
            if type(module) is nn.Linear:
                module.__class__ = UnquantizedLinear
        self.projectors = nn.ModuleDict(
            {name: HealthGPTProjector(config.vision_config.hidden_size, hidden_size) for name in config.tasks}
        )
        self.language_model = AutoModel.from_config(config.text_config)
        for parent in list(self.language_model.modules()):
            for name, child in list(parent.named_children()):
                if type(child) is nn.Linear:
                    setattr(parent, name, HLoRALinear(child, config.tasks))
        self.language_model._tp_plan = shard_plugins(self.language_model._tp_plan or {}, config.tasks)
        self.token_embeddings = nn.ModuleDict(
            {name: nn.Embedding(config.text_config.vocab_size, hidden_size) for name in config.token_tables}
        )
        self.vqgan = HealthGPTVQGAN(config.vqgan_config) if config.vqgan_config is not None else None
        self.post_init()

    def get_input_embeddings(self):
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.language_model.set_input_embeddings(value)

    def tasks_of_rows(self, task: str | list[str], batch_size: int) -> list[str]:
        """
        The task of every row of a batch.

        Args:
            task (`str` or `list[str]`): One name for all rows or one per row.
            batch_size (`int`): Number of rows.

        Raises:
            HealthGPTError: if the checkpoint lacks a task, or the names do not fit the number of rows.
        """
        names = list(task) if isinstance(task, (list, tuple)) else [task]
        for name in names:
            if name not in self.config.tasks:
                raise HealthGPTError(
                    f"This checkpoint has no task {name!r}; it has {', '.join(self.config.tasks) or 'none'}."
                )
        if len(names) not in (1, batch_size):
            raise HealthGPTError(
                f"Got {len(names)} tasks for a batch of {batch_size} rows: give one name, or one per row."
            )
        return names if len(names) == batch_size else names * batch_size

    def get_vision_features(self, pixel_values: torch.FloatTensor, vision_layer: int) -> torch.FloatTensor:
        """
        Patch features of the vision tower, without its class token.

        Args:
            pixel_values (`torch.FloatTensor` of shape `(num_images, channels, height, width)`): Normalised images.
            vision_layer (`int`): Index into the tower's hidden states; blocks after it do not run.

        Returns:
            `torch.FloatTensor` of shape `(num_images, patches, vision hidden)`.
        """
        num_blocks = vision_layer % (self.config.vision_config.num_hidden_layers + 1)
        return self._vision_states(pixel_values, num_blocks)[-1][:, 1:]

    def _vision_states(self, pixel_values, num_blocks, keep=False):
        """The vision tower's hidden states after so many blocks, as a list: the last alone, or all."""
        # Older versions of transformers 5 keep the tower's modules one level deeper.
        tower = getattr(self.vision_tower, "vision_model", self.vision_tower)
        states = [compute(tower.pre_layrnorm, compute(tower.embeddings, pixel_values))]
        for block in tower.encoder.layers[:num_blocks]:
            hidden_states = compute(block, states[-1], attention_mask=None)
            states = [*states, hidden_states] if keep else [hidden_states]
        return states

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.FloatTensor,
        task: str | list[str] = "comprehension",
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> BaseModelOutputWithPooling:
        """
        Features of input images at the level of their task (hierarchical visual perception, paper section 4.1).

        Args:
            pixel_values (`torch.FloatTensor` of shape `(num_images, channels, height, width)`): Normalised images.
            task (`str` or `list[str]`, defaults to `"comprehension"`): One name, or one per image.
            output_hidden_states (`bool`, *optional*, defaults to `config.vision_config.output_hidden_states`): Whether to
                return all hidden states of the vision tower, which then runs whole.
            output_attentions (`bool`, *optional*, defaults to `config.vision_config.output_attentions`): The same for its
                attention weights (`"eager"` attention only).
            return_dict (`bool`, defaults to `True`): Whether to return an object; otherwise a tuple.

        Returns:
            `BaseModelOutputWithPooling`: `last_hidden_state`, the tower's patch features `(num_images, patches, vision
            hidden)`, and `pooler_output`, the token embeddings `(num_images, patches, hidden)` that the prompt gets;
            `hidden_states` and `attentions` of the tower, its class token included, if they were asked for.

        Raises:
            HealthGPTError: if a task is unknown, or there are more or fewer than images.
        """
        groups = group_by_task(self.tasks_of_rows(task, len(pixel_values)), pixel_values.device)
        features = run_per_task(
            groups,
            lambda name, rows: self.get_vision_features(rows, self.config.tasks[name].vision_layer),
            pixel_values,
        )
        projected = run_per_task(groups, lambda name, rows: compute(self.projectors[name], rows), features)
        outputs = BaseModelOutputWithPooling(
            last_hidden_state=features.to(self.dtype), pooler_output=projected.to(self.dtype)
        )
        vision_config = self.config.vision_config
        if vision_config.output_hidden_states if output_hidden_states is None else output_hidden_states:
            states = self._vision_states(pixel_values, vision_config.num_hidden_layers, keep=True)
            outputs.hidden_states = tuple(state.to(self.dtype) for state in states)
        if vision_config.output_attentions if output_attentions is None else output_attentions:
            outputs.attentions = self.vision_tower(pixel_values, output_attentions=True).attentions
        return outputs

    def get_placeholder_mask(
        self, input_ids: torch.LongTensor, pixel_values: torch.FloatTensor | None
    ) -> torch.BoolTensor:
        """
        Where images are in the prompt: a mask `(batch, length)`.

        Raises:
            HealthGPTError: if the positions are not those of all images (a `RuntimeError` where this is compiled).
        """
        mask = input_ids == self.config.image_token_id
        num_images = 0 if pixel_values is None else len(pixel_values)
        if torch.compiler.is_compiling():
            torch._assert_async(
                mask.sum() == num_images * self.config.num_image_patches,
                "The prompts have another number of image positions than the given images have patches.",
            )
        elif mask.sum() != num_images * self.config.num_image_patches:
            raise HealthGPTError(
                f"The prompts have {mask.sum()} image positions, but {num_images} images of "
                f"{self.config.num_image_patches} patches were given."
            )
        return mask

    def embed_tokens(self, input_ids: torch.LongTensor, tasks: list[str]) -> torch.FloatTensor:
        """Embeds ids `(batch, length)` with the tables of each row's task; picture positions get any row."""
        if self.config.image_token_id >= self.config.text_config.vocab_size:
            input_ids = input_ids.masked_fill(input_ids == self.config.image_token_id, 0)

        def embed(name, ids):
            tables = self.config.tasks[name].token_tables
            return self.get_input_embeddings()(ids) if tables is None else self.token_embeddings[tables](ids)

        return run_per_task(group_by_task(tasks, input_ids.device), embed, input_ids)

    @can_return_tuple
    @accept_past_key_values
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        task: str | list[str] | None = None,
        generation_mode: str | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> HealthGPTModelOutputWithPast:
        """
        Args:
            input_ids (`torch.LongTensor` of shape `(batch, length)`, *optional*): Prompts; `config.image_token_id` stands
                for one patch of a picture.
            pixel_values (`torch.FloatTensor` of shape `(num_images, channels, height, width)`, *optional*): The
                pictures of all rows, in order.
            attention_mask (`torch.Tensor` of shape `(batch, length)`, *optional*): 0 where a row is padding.
            position_ids, cache, inputs_embeds: As in the language model. Images need `input_ids`.
            task (`str` or `list[str]`, *optional*, defaults to `"comprehension"`): One name in `config.tasks`, or one per
                row.
            generation_mode (`str`, *optional*): `"text"` means task `"comprehension"`, `"image"` task `"generation"`.
            past_key_values (`Cache`, *optional*): The name of `cache` before transformers 5.24.
            kwargs: Of the language model.

        Returns:
            `HealthGPTModelOutputWithPast`: The language model's outputs, and `image_outputs` of the input images.

        Raises:
            HealthGPTError: if a task is unknown, or prompts and images do not fit each other.
        """
        cache = past_key_values if cache is None else cache
        if (input_ids is None) == (inputs_embeds is None):
            raise HealthGPTError("Give either input_ids or inputs_embeds.")
        if pixel_values is not None and input_ids is None:
            raise HealthGPTError(
                "pixel_values need input_ids, which say where the images are: inputs_embeds hold image features already."
            )
        batch_size = len(input_ids) if inputs_embeds is None else len(inputs_embeds)
        tasks = self.tasks_of_rows(task_from_mode(task, generation_mode), batch_size)

        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids, tasks)
        image_outputs = None
        if pixel_values is not None:
            image_mask = self.get_placeholder_mask(input_ids, pixel_values)
            image_tasks = tasks[0]
            if len(set(tasks)) > 1:
                images_per_row = (image_mask.sum(dim=1) // self.config.num_image_patches).tolist()
                image_tasks = [name for name, count in zip(tasks, images_per_row, strict=True) for _ in range(count)]
            image_outputs = self.get_image_features(
                pixel_values,
                image_tasks,
                output_hidden_states=kwargs.get("output_hidden_states"),
                output_attentions=kwargs.get("output_attentions"),
            )
            features = image_outputs.pooler_output.to(inputs_embeds.device, inputs_embeds.dtype)
            image_mask = image_mask.unsqueeze(-1).to(inputs_embeds.device)
            inputs_embeds = inputs_embeds.masked_scatter(image_mask, features)
        elif input_ids is not None and cache is None:
            self.get_placeholder_mask(input_ids, None)

        with route(group_by_task(tasks, inputs_embeds.device)):
            outputs = self.language_model(
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                position_ids=position_ids,
                **{CACHE_NAME: cache},
                **kwargs,
            )
        return HealthGPTModelOutputWithPast(**outputs, image_outputs=image_outputs)


class HealthGPTForConditionalGeneration(HealthGPTPreTrainedModel, HealthGPTGenerationMixin):
    """
    HealthGPT with its heads: answers with `generate(task="comprehension")`, draws with `generate(task="generation")`.

    Args:
        config (`HealthGPTConfig`): Shapes of all parts and the tasks.
    """

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: HealthGPTConfig):
        super().__init__(config)
        self.model = HealthGPTModel(config)
        text_config = config.text_config
        self.lm_head = UnquantizedLinear(text_config.hidden_size, text_config.vocab_size, bias=False)
        self.token_heads = nn.ModuleDict(
            {
                name: UnquantizedLinear(text_config.hidden_size, text_config.vocab_size, bias=False)
                for name in config.token_tables
            }
        )
        self.post_init()

    def get_input_embeddings(self):
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, value):
        self.lm_head = value

    def get_image_features(
        self, pixel_values: torch.FloatTensor, task: str | list[str] = "comprehension", **kwargs
    ) -> BaseModelOutputWithPooling:
        """See [`HealthGPTModel.get_image_features`]."""
        return self.model.get_image_features(pixel_values, task, **kwargs)

    @can_return_tuple
    @accept_past_key_values
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.FloatTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        task: str | list[str] | None = None,
        generation_mode: str | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        past_key_values: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> HealthGPTCausalLMOutputWithPast:
        """
        Arguments as in [`HealthGPTModel.forward`], and:

        Args:
            labels (`torch.LongTensor` of shape `(batch, length)`, *optional*): Ids to learn; -100 is ignored.
            logits_to_keep (`int` or `torch.Tensor`, defaults to 0): Compute the last that many logits (0: all), or
                those at the given positions.

        Returns:
            `HealthGPTCausalLMOutputWithPast`: `logits` of shape `(batch, length, rows of the token tables)`, with `labels`
            the mean cross-entropy of the next token as `loss`, and `image_outputs` of the input images.

        Raises:
            HealthGPTError: as in [`HealthGPTModel.forward`], or if `labels` hold the id that stands for pictures.
        """
        task = task_from_mode(task, generation_mode)
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=past_key_values if cache is None else cache,
            inputs_embeds=inputs_embeds,
            task=task,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        hidden_states = hidden_states[:, kept]

        def head(name, rows):
            tables = self.config.tasks[name].token_tables
            return self.lm_head(rows) if tables is None else self.token_heads[tables](rows)

        tasks = self.model.tasks_of_rows(task, len(hidden_states))
        logits = run_per_task(group_by_task(tasks, hidden_states.device), head, hidden_states)

        loss = None
        if labels is not None:
            if not torch.compiler.is_compiling() and (labels == self.config.image_token_id).any():
                raise HealthGPTError(
                    "The labels hold the id of <image>, which nobody writes: set those positions to -100."
                )
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size, **kwargs
            )
        return HealthGPTCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **{CACHE_NAME: getattr(outputs, CACHE_NAME)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_outputs=outputs.image_outputs,
        )

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """See [`HealthGPTPreTrainedModel.resize_token_embeddings`]; the heads change with their tables."""
        embeddings = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        self.lm_head.__class__ = UnquantizedLinear  # transformers makes a plain one
        for name, head in self.token_heads.items():
            learns = head.weight.requires_grad
            head = self._get_resized_lm_head(head, self.config.text_config.vocab_size, mean_resizing=mean_resizing)
            head.__class__ = UnquantizedLinear
            self.token_heads[name] = head.requires_grad_(learns)
        return embeddings

    def add_task(self, name: str, settings: dict, init_from: str | None = None) -> None:
        """
        Gives the model a further task, with a plugin and a projector of its own.

        Args:
            name (`str`): Name of the task.
            settings (`dict`): Fields of `TaskConfig`. Token tables that the model lacks start as copies of the base's.
            init_from (`str`, *optional*): Task whose plugin and projector it starts with. Without one they start as
                [`HLoRALinear`] says.

        Raises:
            HealthGPTError: if there is such a task already, or its settings do not fit the model or `init_from`.
        """
        tasks = self.config.tasks
        if name in tasks:
            raise HealthGPTError(f"There is a task {name!r} already: give the new one another name.")
        if init_from is not None and init_from not in tasks:
            raise HealthGPTError(f"There is no task {init_from!r} to start from; there are {', '.join(tasks)}.")
        task = TaskConfig(**settings)
        self.config.validate_task(name, task)
        if init_from is not None and (task.rank, task.num_experts) != (
            tasks[init_from].rank,
            tasks[init_from].num_experts,
        ):
            raise HealthGPTError(
                f"Task {init_from!r} has rank {tasks[init_from].rank} and {tasks[init_from].num_experts} experts; to start "
                f"from it {name!r} needs the same."
            )
        tasks[name] = task
        weight = self.lm_head.weight
        projector = HealthGPTProjector(self.config.vision_config.hidden_size, self.config.text_config.hidden_size)
        self.model.projectors[name] = projector.to(weight)
        owners = [self.model.projectors]
        for module in self.modules():
            if isinstance(module, HLoRALinear):
                plugin = HLoRA(task, module.base_layer.in_features, module.base_layer.out_features)
                nn.init.zeros_(plugin.lora_B.weight)  # A and R are Kaiming-uniform as every new linear
                module.plugins[name] = plugin.to(weight)
                owners.append(module.plugins)
        if init_from is not None:
            for modules in owners:
                modules[name].load_state_dict(modules[init_from].state_dict())
        self.use_token_tables(task.token_tables, [name])

    def use_token_tables(self, tables: str | None, tasks: list[str]) -> None:
        """
        Lets tasks use a pair of token tables; a pair that the model lacks starts as a copy of the base's, and one that no
        task uses any more is dropped.

        Args:
            tables (`str`, *optional*): Name of the tables; `None` means the base's.
            tasks (`list[str]`): The tasks.
        """
        if tables is not None and tables not in self.token_heads:
            embeddings = copy.deepcopy(self.get_input_embeddings())
            self.model.token_embeddings[tables] = embeddings
            self.token_heads[tables] = copy.deepcopy(self.lm_head)
        for task in tasks:
            self.config.tasks[task].token_tables = tables
        for unused in self.token_heads.keys() - set(self.config.token_tables):
            del self.token_heads[unused], self.model.token_embeddings[unused]

    @torch.no_grad()
    def decode_image_tokens(self, sequences: torch.LongTensor) -> torch.FloatTensor:
        """
        Draws the pictures whose codes `generate` wrote.

        Args:
            sequences (`torch.LongTensor` of shape `(batch, length)`): Ids with one picture of codes per row, after the
                last `<start_index>` if there is one; other ids among them are passed over.

        Returns:
            `torch.FloatTensor` of shape `(batch, 3, height, width)`: Pixels in [-1, 1].

        Raises:
            HealthGPTError: if the checkpoint has no VQGAN, or a row does not hold exactly one picture of codes.
        """
        vqgan = self._require_vqgan()
        codes = []
        for index, row in enumerate(sequences.unsqueeze(0) if sequences.ndim == 1 else sequences):
            starts = (row == self.config.image_start_token_id).nonzero()
            row = row[starts[-1] + 1 :] if len(starts) > 0 else row
            row = row - self.config.image_code_offset
            row = row[(row >= 0) & (row < vqgan.config.num_codes)]
            if len(row) != self.config.num_image_codes:
                raise HealthGPTError(
                    f"Row {index} holds {len(row)} image codes, but a picture is made of exactly "
                    f"{self.config.num_image_codes}."
                )
            codes.append(row)
        weight = vqgan.quantize.embed.weight
        # What accelerate has offloaded is on the meta device, and its input is moved by accelerate's hooks.
        return vqgan.decode(torch.stack(codes).to(None if weight.is_meta else weight.device)).float()

    @torch.no_grad()
    def encode_image(self, pixels: torch.FloatTensor) -> torch.LongTensor:
        """
        Turns pictures into the codes that `generate` would have to write for them.

        Args:
            pixels (`torch.FloatTensor` of shape `(batch, 3, resolution, resolution)`): Pixels in [-1, 1], from
                `HealthGPTProcessor.process_target_images`.

        Returns:
            `torch.LongTensor` of shape `(batch, num_image_codes)`: Codes from 0, row by row of the picture. The id of
            code `i` is `config.image_code_offset + i`.

        Raises:
            HealthGPTError: if the checkpoint has no VQGAN or the pictures have another size.
        """
        vqgan = self._require_vqgan()
        expected = (vqgan.config.in_channels, vqgan.config.resolution, vqgan.config.resolution)
        if pixels.shape[1:] != expected:
            raise HealthGPTError(
                f"The VQGAN reads pictures of shape (batch, {', '.join(map(str, expected))}), got {tuple(pixels.shape)}."
            )
        weight = vqgan.quantize.embed.weight
        return vqgan.encode(pixels.to(None if weight.is_meta else weight.device, weight.dtype))

    def _require_vqgan(self):
        if self.model.vqgan is None:
            raise HealthGPTError(
                "This checkpoint has no VQGAN: it was exported without one and cannot handle image codes."
            )
        return self.model.vqgan


__all__ = ["HealthGPTForConditionalGeneration", "HealthGPTModel", "HealthGPTPreTrainedModel"]
