"""
What an export will write, decided from configurations and tensor headers alone, before the first byte is written.

    base, vision tower, plugins, fusion layer, VQGAN --rules--> transfers: source tensor -> tensor of the checkpoint
    their configurations ------------------------------------> config, processor, generation settings

Strict both ways: each source tensor is used or dropped by a written rule, each tensor of the model is filled.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml
from transformers import AutoConfig, GenerationConfig

from ..configuration_healthgpt import HealthGPTConfig, HealthGPTVQGANConfig, TaskConfig
from ..modeling_healthgpt import HealthGPTForConditionalGeneration
from ..processing_healthgpt import CLIPImageProcessorPil, HealthGPTProcessor
from . import rules
from .confine import CheckpointError, read_json, reading, require_confined
from .families import Family, add_image_placeholder, add_image_tokens, build_tokenizer, family_of
from .sources import LazyTensor, read_directory, read_file

KINDS = {"comprehension": "text", "generation": "image"}  # what the published plugins put out
PUBLISHED_NUM_CODES = 8192
MAX_CODES = 2**17  # each is a token
PIECE_BYTES = 64 * 2**20  # tensors are read and converted in pieces of about this size
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class ExportSources:
    """
    The published files of one checkpoint, here or on the Hub.

    Args:
        base, vision (`Path` or `str`): Directories of the language model and the CLIP model, or their repositories on
            the Hub: `user/name` or `user/name@revision`. All others are files: a path, or `hf://user/name/file`, with
            a revision `hf://user/name@revision/file`.
        comprehension, generation (`Path`, *optional*): The plugins; at least one is needed.
        comprehension_alpha, generation_alpha (`float`, *optional*, defaults to twice the rank): H-LoRA alphas.
        fusion (`Path`, *optional*): Token tables of the generation task; without it that task uses the base's.
        vqgan, vqgan_config (`Path`, *optional*): `last.ckpt` and `model.yaml`; needed to draw.
        num_codes (`int`, *optional*): Image codes in the vocabulary when there is no VQGAN to tell; by default the
            published 8192.
    """

    base: Path | str
    vision: Path | str
    comprehension: Path | str | None = None
    comprehension_alpha: float | None = None
    generation: Path | str | None = None
    generation_alpha: float | None = None
    fusion: Path | str | None = None
    vqgan: Path | str | None = None
    vqgan_config: Path | str | None = None
    num_codes: int | None = None

    def __post_init__(self):
        if self.comprehension is None and self.generation is None:
            raise CheckpointError("There is no plugin to export: give a comprehension or a generation file.")
        if (self.vqgan is None) != (self.vqgan_config is None):
            raise CheckpointError("A VQGAN is two files: its weights and its model.yaml; only one was given.")
        if self.generation is not None and self.vqgan is None:
            raise CheckpointError("The generation plugin writes codes that only a VQGAN can draw: give its two files.")
        if self.fusion is not None and self.generation is None:
            raise CheckpointError(
                "The fusion layer holds the generation task's token tables: give the generation file."
            )
        if self.num_codes is not None and self.vqgan is not None:
            raise CheckpointError("The number of codes follows from the VQGAN: give only one of the two.")
        if self.num_codes is not None and not 1 <= self.num_codes <= MAX_CODES:
            raise CheckpointError(f"The number of codes must be from 1 to {MAX_CODES}, got {self.num_codes}.")


@dataclass(frozen=True)
class Transfer:
    """One tensor of the checkpoint: where it comes from and what happens on the way."""

    target: str
    name: str
    tensor: LazyTensor
    rule: rules.Rule
    rows: tuple[int, int] | None = None  # (rows kept, rows after the mean rows are appended)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape if self.rows is None else (self.rows[1], *self.tensor.shape[1:])

    @property
    def origin(self) -> str:
        return f"{self.name} in {self.tensor.origin}"

    def pieces(self, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        """
        The tensor as it is written, cut along its rows so that only a piece of it is ever in memory.

        Raises:
            CheckpointError: if it has values that are no finite numbers, here or after the conversion.
        """
        kept, total = self.rows or (self.shape[0], self.shape[0])
        row_sums = 0
        for piece in self.tensor.pieces(PIECE_BYTES, kept):
            if not is_finite(piece):
                raise CheckpointError(f"{self.origin} has values that are NaN or infinite.")
            if total > kept:
                row_sums += piece.sum(dim=0, keepdim=True, dtype=torch.float64)
            yield self._convert(piece, dtype)
        if total > kept:  # rows of new tokens start as the mean of the others
            mean = (row_sums / kept).to(self.tensor.dtype)
            yield self._convert(mean, dtype).expand(total - kept, -1).contiguous()

    def read(self, dtype: torch.dtype) -> torch.Tensor:
        """The whole tensor as it is written; see `pieces`."""
        tensor, start = torch.empty(self.shape, dtype=dtype), 0
        for piece in self.pieces(dtype):
            tensor[start : start + len(piece)] = piece
            start += len(piece)
        return tensor

    def _convert(self, piece, dtype):
        converted = piece.to(dtype)
        if converted.dtype != piece.dtype and not is_finite(converted):
            raise CheckpointError(f"{self.origin} has values too large for {dtype}.")
        return converted


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite: the sum, which is forty times as fast, tells unless it overflows itself."""
    return bool(torch.isfinite(tensor.sum()) or torch.isfinite(tensor).all())


@dataclass
class Plan:
    """Everything an export will write: configuration, processor and the way of every tensor."""

    config: HealthGPTConfig
    processor: HealthGPTProcessor
    generation_config: GenerationConfig
    transfers: list[Transfer] = field(default_factory=list)
    dropped: list[tuple[str, LazyTensor, rules.Rule]] = field(default_factory=list)  # by the name in its source

    def add(self, tensors: dict[str, LazyTensor], table: list[rules.Rule], origin, rows=None) -> None:
        """Adds one source; see `transfers_of`."""
        transfers, dropped = transfers_of(tensors, table, origin, rows)
        self.transfers += transfers
        self.dropped += dropped

    def nbytes(self, transfer: Transfer) -> int:
        """Size of a tensor of the checkpoint."""
        return math.prod(transfer.shape) * self.config.dtype.itemsize

    @property
    def total_bytes(self) -> int:
        return sum(map(self.nbytes, self.transfers))

    @property
    def origins(self) -> list[Path]:
        """The files that tensors come from."""
        tensors = [transfer.tensor for transfer in self.transfers] + [tensor for _, tensor, _ in self.dropped]
        return list(dict.fromkeys(tensor.origin for tensor in tensors))


def build_plan(sources: ExportSources, dtype: str | None = None) -> Plan:
    """
    Decides where every tensor goes.

    Args:
        sources (`ExportSources`): The published files.
        dtype (`str`, *optional*, defaults to the base's): `"float32"`, `"bfloat16"` or `"float16"`.

    Raises:
        CheckpointError: if a source cannot be used, or the sources do not belong together.
    """
    if dtype is not None and dtype not in DTYPES:
        raise CheckpointError(f"There is no dtype {dtype!r}; choose one of {', '.join(DTYPES)}.")
    base, vision = Path(sources.base), Path(sources.vision)
    family = family_of(base)
    plugins = {
        name: read_file(path)
        for name, path in (("comprehension", sources.comprehension), ("generation", sources.generation))
        if path is not None
    }
    vqgan_config = None if sources.vqgan_config is None else read_vqgan_config(Path(sources.vqgan_config))
    vqgan = {} if sources.vqgan is None else read_file(sources.vqgan)
    if "quantize.embed.weight" in vqgan and vqgan["quantize.embed.weight"].shape[:1] != (vqgan_config.num_codes,):
        raise CheckpointError(
            f"quantize.embed.weight in {sources.vqgan} has the shape {list(vqgan['quantize.embed.weight'].shape)}, but "
            f"{sources.vqgan_config} says {vqgan_config.num_codes} codes: the files do not belong together."
        )

    tokenizer = build_tokenizer(base)
    base_rows = len(tokenizer)
    base_tensors = read_directory(base)
    text_config = read_text_config(base)
    adds_tokens = family.always_adds_image_tokens or "generation" in plugins
    image_start_token_id = image_code_offset = None
    if adds_tokens:
        num_codes = vqgan_config.num_codes if vqgan_config is not None else sources.num_codes or PUBLISHED_NUM_CODES
        image_start_token_id, image_code_offset = base_rows, base_rows + 1
        add_image_tokens(tokenizer, num_codes)
        table_rows = len(tokenizer)
        text_config.vocab_size = table_rows
    image_token_id = add_image_placeholder(tokenizer)

    vision_config = read_vision_config(vision)
    alphas = {"comprehension": sources.comprehension_alpha, "generation": sources.generation_alpha}
    tasks = {name: task_config(name, KINDS[name], tensors, alphas[name]) for name, tensors in plugins.items()}
    if sources.fusion is not None:
        tasks["generation"].token_tables = "generation"
    config = HealthGPTConfig(
        text_config=text_config,
        vision_config=vision_config,
        vqgan_config=vqgan_config,
        tasks=tasks,
        image_token_id=image_token_id,
        image_start_token_id=image_start_token_id,
        image_code_offset=image_code_offset,
        architectures=["HealthGPTForConditionalGeneration"],
    )

    plan = Plan(
        config=config,
        processor=build_processor(family, tokenizer, vision, config),
        generation_config=build_generation_config(base, config),
    )
    if config.tie_word_embeddings:
        drop_tied_head(plan, base_tensors)
    resize = (base_rows, config.text_config.vocab_size) if adds_tokens else None
    tables = {"model.embed_tokens.weight": resize, "lm_head.weight": resize}
    plan.add(base_tensors, rules.BASE, base, rows=tables)
    plan.add(read_directory(vision), rules.VISION, vision)
    for name, tensors in plugins.items():
        plan.add(tensors, rules.plugin(name), getattr(sources, name))
    if sources.fusion is not None:
        plan.add(read_file(sources.fusion), rules.fusion("generation"), sources.fusion)
    if sources.vqgan is not None:
        plan.add(vqgan, rules.VQGAN, sources.vqgan)
    check_targets(plan)
    config.dtype = DTYPES[dtype] if dtype is not None else base_tensors["model.embed_tokens.weight"].dtype
    if config.dtype not in DTYPES.values():
        raise CheckpointError(
            f"The base {base} is stored in {config.dtype}: choose a dtype, one of {', '.join(DTYPES)}."
        )
    return plan


def transfers_of(
    tensors: dict[str, LazyTensor], table: list[rules.Rule], origin: str | Path, rows: dict | None = None
) -> tuple[list[Transfer], list[tuple[str, LazyTensor, rules.Rule]]]:
    """
    Where the tensors of one source go and which are dropped, each by the rule that covers it.

    Args:
        tensors: By their names in the source.
        table: The rules.
        origin: The source's name in messages.
        rows: What happens to the rows of a tensor, by its name; see `Transfer`.

    Raises:
        CheckpointError: if no rule covers a tensor, or it holds no floating point numbers.
    """
    transfers, dropped, unknown = [], [], []
    for name, tensor in tensors.items():
        rule = rules.find(table, name)
        if rule is None:
            unknown.append(name)
        elif rule.target is None:
            dropped.append((name, tensor, rule))
        elif tensor.dtype not in (*DTYPES.values(), torch.float64):
            raise CheckpointError(
                f"{name} in {tensor.origin} holds {tensor.dtype} instead of floating point numbers of 16, 32 or 64 bits."
            )
        else:
            transfers.append(Transfer(rule.rename(name), name, tensor, rule, (rows or {}).get(name)))
    if unknown:
        raise CheckpointError(f"{origin} has {list_names(unknown)} that no rule covers.")
    return transfers, dropped


def drop_tied_head(plan: Plan, base_tensors: dict[str, LazyTensor]) -> None:
    """A base whose configuration ties its head to the embeddings may store both, if they are the same."""
    if not {"lm_head.weight", "model.embed_tokens.weight"} <= base_tensors.keys():
        return
    head, embeddings = base_tensors.pop("lm_head.weight"), base_tensors["model.embed_tokens.weight"]
    pairs = zip(head.pieces(PIECE_BYTES), embeddings.pieces(PIECE_BYTES), strict=False)
    if head.shape != embeddings.shape or not all(torch.equal(left, right) for left, right in pairs):
        raise CheckpointError(
            f"lm_head.weight in {head.origin} differs from the embeddings, to which the base's config.json ties it."
        )
    plan.dropped.append(("lm_head.weight", head, rules.TIED_HEAD))


def check_targets(plan: Plan) -> None:
    """Every tensor of the model must be filled, once, in its shape, and nothing else."""
    for prefix, settings in (
        ("model.language_model.layers.", plan.config.text_config),
        ("model.vision_tower.vision_model.encoder.layers.", plan.config.vision_config),
    ):
        names = [
            transfer.target.removeprefix(prefix) for transfer in plan.transfers if transfer.target.startswith(prefix)
        ]
        count = len({name.split(".")[0] for name in names})
        if settings.num_hidden_layers > count:
            raise CheckpointError(
                f"The {settings.model_type} configuration says {settings.num_hidden_layers} layers, but the files have {count}."
            )
    with reading("The configuration of the base, the vision tower or the VQGAN"), torch.device("meta"):
        model = HealthGPTForConditionalGeneration(plan.config)
    expected = {checkpoint_name(name): tuple(value.shape) for name, value in model.state_dict().items()}
    if plan.config.tie_word_embeddings:
        del expected["lm_head.weight"]
    found = {transfer.target: transfer for transfer in plan.transfers}
    extra = [transfer for name, transfer in found.items() if name not in expected]
    if extra:
        names = list_names([transfer.name for transfer in extra])
        raise CheckpointError(
            f"{extra[0].tensor.origin} has {names} that a model of this configuration has no place for."
        )
    missing = [name for name in expected if name not in found]
    if missing:
        raise CheckpointError(f"The sources lack {list_names(missing)} of the checkpoint.")
    for name, shape in expected.items():
        transfer = found[name]
        if transfer.rows is not None and transfer.tensor.shape and transfer.tensor.shape[0] < transfer.rows[0]:
            raise CheckpointError(
                f"{transfer.name} in {transfer.tensor.origin} has {transfer.tensor.shape[0]} rows, but the tokenizer has "
                f"{transfer.rows[0]} tokens."
            )
        if transfer.shape != shape:
            raise CheckpointError(
                f"{transfer.name} in {transfer.tensor.origin} has the shape {list(transfer.shape)}, but the checkpoint needs "
                f"{list(shape)}: the files do not belong together."
            )


def checkpoint_name(name: str) -> str:
    """The stored name of a parameter: CLIP's in the layout that every transformers version reads."""
    prefix = "model.vision_tower."
    if name.startswith(prefix) and not name.startswith(prefix + "vision_model."):
        return prefix + "vision_model." + name.removeprefix(prefix)
    return name


def list_names(names: list[str]) -> str:
    shown = ", ".join(names[:5])
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''} ({shown}{more})"


def task_config(name: str, kind: str, tensors: dict[str, LazyTensor], alpha: float | None) -> TaskConfig:
    """Settings of a plugin, rank and number of experts from the shapes of its tensors."""
    sizes = {}
    for factor in ("lora_A", "lora_route"):
        shapes = {
            tensor.shape[0] for key, tensor in tensors.items() if f".{factor}." in key and len(tensor.shape) == 2
        }
        origin = next(iter(tensors.values())).origin if tensors else f"The {name} plugin"
        if len(shapes) != 1:
            raise CheckpointError(
                f"{origin} is no H-LoRA plugin: its {factor} tensors have {sorted(shapes) or 'no'} rows."
            )
        sizes[factor] = shapes.pop()
    rank, num_experts = sizes["lora_A"], sizes["lora_route"]
    alpha = 2 * rank if alpha is None else alpha
    try:
        if kind == "text":
            return TaskConfig("text", rank, alpha, num_experts, vision_layer=-2)
        return TaskConfig("image", rank, alpha, num_experts, vision_layer=1, default_prompt="Reconstruct the image.")
    except ValueError as error:
        raise CheckpointError(f"{origin} cannot be used: {error}") from error


def read_text_config(base: Path):
    """The language model's configuration, in today's terms."""
    settings = read_json(base / "config.json")
    for key in ("auto_map", "architectures", "_name_or_path", "transformers_version", "torch_dtype"):
        settings.pop(key, None)
    with reading(base / "config.json"):
        config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    if config.sliding_window is not None:
        # transformers 4.41, which the weights were published with, lets a token see `sliding_window` tokens before
        # itself; transformers 5 counts the token among them.
        config.sliding_window += 1
    return config


def read_vision_config(vision: Path):
    require_confined(vision)
    settings = read_json(vision / "config.json")
    settings = settings.get("vision_config", settings)
    with reading(vision / "config.json"):
        settings = {k: value for k, value in settings.items() if k not in ("torch_dtype", "transformers_version")}
        if settings.pop("model_type", None) != "clip_vision_model":
            raise CheckpointError(f"{vision / 'config.json'} is not the configuration of a CLIP model.")
        return AutoConfig.for_model("clip_vision_model", **settings)


def read_vqgan_config(path: Path) -> HealthGPTVQGANConfig:
    """The VQGAN's shape from a taming-transformers `model.yaml`."""
    with reading(path):
        params = yaml.safe_load(path.read_text())["model"]["params"]
        shape = params["ddconfig"]
        return HealthGPTVQGANConfig(
            num_codes=int(params["n_embed"]),
            embed_dim=params["embed_dim"],
            latent_channels=shape["z_channels"],
            resolution=shape["resolution"],
            in_channels=shape["in_channels"],
            out_channels=shape["out_ch"],
            base_channels=shape["ch"],
            channel_multipliers=shape["ch_mult"],
            num_res_blocks=shape["num_res_blocks"],
            attention_resolutions=shape["attn_resolutions"],
        )


def build_processor(family: Family, tokenizer, vision: Path, config: HealthGPTConfig) -> HealthGPTProcessor:
    settings = read_json(vision / "preprocessor_config.json")
    keys = ("do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale", "rescale_factor")
    keys += ("do_normalize", "image_mean", "image_std", "do_convert_rgb")
    with reading(vision / "preprocessor_config.json"):
        image_processor = CLIPImageProcessorPil(**{key: settings[key] for key in keys if key in settings})
        crop_size = image_processor.crop_size["height"]
    if crop_size != config.vision_config.image_size:
        raise CheckpointError(
            f"{vision / 'preprocessor_config.json'} makes pictures of {crop_size} pixels, but the "
            f"vision tower reads {config.vision_config.image_size}."
        )
    processor = HealthGPTProcessor(
        image_processor,
        tokenizer,
        chat_template=family.chat_template,
        tasks={
            name: {"kind": task.kind, "default_prompt": task.default_prompt} for name, task in config.tasks.items()
        },
        num_image_patches=config.num_image_patches,
        prefix_space=family.prefix_space,
        picture_size=None if config.vqgan_config is None else config.vqgan_config.resolution,
    )
    return processor


def build_generation_config(base: Path, config: HealthGPTConfig) -> GenerationConfig:
    """Greedy decoding up to the published 1024 tokens, with the base's special tokens."""
    path = base / "generation_config.json"
    settings = read_json(path) if path.is_file() else read_json(base / "config.json")
    tokens = {key: settings.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if tokens["pad_token_id"] is None:
        tokens["pad_token_id"] = config.text_config.pad_token_id
    with reading(path):
        return GenerationConfig(**tokens, do_sample=False, max_new_tokens=1024)
