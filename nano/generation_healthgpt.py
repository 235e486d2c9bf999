# Copyright 2026 The HealthGPT package authors.
# Licensed under the Apache License, Version 2.0 (see the file LICENSE).
"""
Answering and drawing: transformers' `generate` with the task of every row and the grammar of pictures.

A row that draws writes as many image codes as its picture has and nothing else; a row that answers ends as anywhere. Both may
stand in one batch.
"""

import copy
import math

import torch
from transformers import GenerationConfig, GenerationMixin
from transformers.cache_utils import Cache, StaticLayer
from transformers.generation import (
    EosTokenCriteria,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
    SuppressTokensLogitsProcessor,
)

from .configuration_healthgpt import require_codes, task_from_mode
from .drafting_healthgpt import (
    CACHE_NAME,
    TRANSFORMERS_VERSION,
    CoupledSampling,
    DraftedPasses,
    PassWidths,
    as_targets,
)
from .errors_healthgpt import HealthGPTError


class ImageTokenLogitsProcessor(LogitsProcessor):
    """
    The grammar of a picture: rows that draw may write image codes and nothing else.

    Args:
        draws (`torch.BoolTensor` of shape `(batch,)`): Which rows draw.
        code_offset (`int`): Id of code 0.
        num_codes (`int`): Number of codes.
    """

    def __init__(self, draws: torch.BoolTensor, code_offset: int, num_codes: int):
        self.draws = draws
        self.codes = slice(code_offset, code_offset + num_codes)
        self.forbidden = None

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if self.forbidden is None or self.forbidden.device != scores.device:
            draws = self.draws.to(scores.device).repeat_interleave(len(scores) // len(self.draws))
            self.forbidden = draws.unsqueeze(1).repeat(1, scores.shape[-1])
            self.forbidden[:, self.codes] = False
        return scores.masked_fill(self.forbidden, -math.inf)


def cached_length(cache: Cache | None) -> int:
    """Number of positions that a cache, kept from an earlier call, holds already."""
    return 0 if cache is None else int(cache.get_seq_length())


class RowLengthCriteria(StoppingCriteria):
    """
    Ends every row after its own number of new tokens.

    Args:
        prompt_length (`int`): Length of the prompts with their padding.
        limits (`torch.LongTensor` of shape `(batch,)`): New tokens of each row.
    """

    def __init__(self, prompt_length: int, limits: torch.LongTensor):
        self.prompt_length = prompt_length
        self.limits = limits

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs) -> torch.BoolTensor:
        limits = self.limits.to(input_ids.device).repeat_interleave(len(input_ids) // len(self.limits))
        return input_ids.shape[1] - self.prompt_length >= limits


class HealthGPTGenerationMixin(GenerationMixin):
    """`generate` of [`HealthGPTForConditionalGeneration`]."""

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.LongTensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        *,
        task: str | list[str] | None = None,
        generation_mode: str | None = None,
        constrain_image_tokens: bool = True,
        draft_codes: torch.LongTensor | None = None,
        codes_per_pass: int | None = None,
        **kwargs,
    ):
        """
        Answers or draws; transformers' `generate` with the task of every row. On a GPU `cache_implementation="static"` compiles the
        passes after the prompt's.

        A row that draws gets `<start_index>` appended if its prompt lacks it, and writes exactly one whole picture of
        codes, whatever length is asked for: length arguments hold for rows that answer. Only a stopping criterion of the
        caller's own (`max_time`, `stop_strings`) ends a picture early. With `past_key_values` of an earlier call, the
        pictures that it holds may be given again or left out. Prompts given as `inputs_embeds` have to end with the embedding
        of `<start_index>` themselves.

        Args:
            inputs, generation_config, logits_processor, stopping_criteria, kwargs: As in `GenerationMixin.generate`.
            task (`str` or `list[str]`, *optional*, defaults to `"comprehension"`): One name in `config.tasks`, or one
                per row.
            generation_mode (`str`, *optional*): `"text"` means task `"comprehension"`, `"image"` task `"generation"`.
            constrain_image_tokens (`bool`, defaults to `True`): Whether drawing rows are held to image codes. `False`
                lets the model write what it likes, by default for one picture of tokens, as the published scripts do.
            draft_codes (`torch.LongTensor` of shape `(batch, num_image_codes)`, *optional*): Codes, from 0, that the images
                are expected to be near to; rows that answer ignore theirs. They change how many passes a drawing takes,
                never the drawing. By default those of the input image where the task follows it
                (`TaskConfig.follows_input`).
            codes_per_pass (`int`, *optional*, defaults to `model.generation_config.codes_per_pass` if that is set): How many codes
                a pass reads at most; 1 is one after another. By default the number that this device draws fastest with,
                measured by the first passes (see `PassWidths`), or 128 in all rows if the passes are compiled, which then all
                read as many.

        Returns:
            As `GenerationMixin.generate`: ids of prompt and continuation, `(batch * num_return_sequences, length)`.

        Raises:
            HealthGPTError: if a task is unknown, a prompt does not fit into the model's window, or an option of `generate`
                cannot be used for drawing.
        """
        task = task_from_mode(task, generation_mode)
        input_ids = kwargs.pop("input_ids", None) if inputs is None else inputs
        prompt = kwargs.get("inputs_embeds") if input_ids is None else input_ids
        if prompt is None or prompt.ndim < 2 or 0 in prompt.shape[:2]:
            raise HealthGPTError(
                "generate needs a prompt: input_ids (batch, length) or inputs_embeds (batch, length, hidden), not empty."
            )
        inputs_embeds = kwargs.get("inputs_embeds")
        if inputs_embeds is not None and kwargs.get("pixel_values") is not None:
            raise HealthGPTError(
                "pixel_values cannot be given with inputs_embeds, which hold image features already: give input_ids alone."
            )
        if inputs_embeds is not None and input_ids is not None and inputs_embeds.shape[:2] != input_ids.shape:
            raise HealthGPTError(
                f"input_ids of shape {tuple(input_ids.shape)} are not the ids of inputs_embeds of shape "
                f"{tuple(inputs_embeds.shape)}: leave them out, or give one id for each embedding."
            )
        tasks = self.model.tasks_of_rows(task, len(prompt))
        draws = torch.tensor([self.config.tasks[name].kind == "image" for name in tasks], device=prompt.device)
        cached = cached_length(kwargs.get("cache", kwargs.get("past_key_values")))
        if input_ids is not None and draws.any():
            input_ids, attention_mask = self._append_image_start(
                input_ids, kwargs.get("attention_mask"), draws, cached, inputs_embeds is not None
            )
            kwargs["attention_mask"] = attention_mask
            prompt = input_ids
        if input_ids is not None:
            if inputs_embeds is None:
                # Images that a kept cache holds need not be given again.
                pixel_values = kwargs.get("pixel_values")
                self.model.get_placeholder_mask(input_ids[:, cached if pixel_values is None else 0 :], pixel_values)
            if (~draws & (input_ids[:, -1] == self.config.image_start_token_id)).any():
                raise HealthGPTError(
                    "A prompt ends with <start_index>, as prompts for drawing do, but its task answers in words."
                )
        self._check_generation(prompt.shape[1], draws, kwargs, generation_config, codes_per_pass)

        logits_processor = LogitsProcessorList(logits_processor or [])
        if self.config.image_token_id < self.lm_head.out_features:
            # Qwen's padded rows have one for <image>, which stands for given pictures and is never an answer.
            logits_processor.append(SuppressTokensLogitsProcessor([self.config.image_token_id], device=prompt.device))
        limit = asked = self._pop_max_new_tokens(prompt.shape[1], kwargs, generation_config)
        if draws.any():
            drawing_limit = self.config.num_image_codes
            if constrain_image_tokens:
                logits_processor.append(
                    ImageTokenLogitsProcessor(draws, self.config.image_code_offset, self.config.vqgan_config.num_codes)
                )
            elif asked is not None:
                drawing_limit = asked
            text_limit = self.generation_config.max_new_tokens or 20 if asked is None else asked
            limits = torch.where(draws, drawing_limit, text_limit)
            if not draws.all():
                stopping_criteria = StoppingCriteriaList(stopping_criteria or [])
                stopping_criteria.append(RowLengthCriteria(0 if input_ids is None else prompt.shape[1], limits))
            limit = int(limits.max())
            if constrain_image_tokens:
                if draft_codes is not None:
                    num_codes, range_of_codes = self.config.num_image_codes, self.config.vqgan_config.num_codes
                    if draft_codes.shape != (len(prompt), num_codes):
                        raise HealthGPTError(
                            f"draft_codes have the shape (batch, codes of an image), here {(len(prompt), num_codes)}, got "
                            f"{tuple(draft_codes.shape)}."
                        )
                    for row in draft_codes.tolist():
                        require_codes(row, num_codes, range_of_codes, "The rows of draft_codes")
                kwargs["draft_codes"] = draft_codes
                if codes_per_pass is not None:
                    kwargs["codes_per_pass"] = codes_per_pass
        if limit is not None and generation_config is None:
            kwargs["max_new_tokens"] = limit
        elif limit is not None:
            generation_config = copy.deepcopy(generation_config)
            generation_config.max_new_tokens = limit

        return super().generate(
            input_ids,
            generation_config=generation_config,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            task=tasks[0] if len(set(tasks)) == 1 else tasks,
            **kwargs,
        )

    def _sample(
        self,
        input_ids,
        logits_processor,
        stopping_criteria,
        generation_config,
        synced_gpus=False,
        draft_codes=None,
        codes_per_pass=None,
        **kwargs,
    ):
        """Greedy search and sampling, where images are drawn with several codes a pass."""
        model = self
        if codes_per_pass is None:
            codes_per_pass = getattr(generation_config, "codes_per_pass", None)
        grammar = next((item for item in logits_processor if isinstance(item, ImageTokenLogitsProcessor)), None)
        can_draft = (
            grammar is not None
            and (codes_per_pass != 1 or generation_config.do_sample)
            and getattr(kwargs.get(CACHE_NAME), "is_croppable", False)  # no cache of transformers before 5.24 is
            and not (synced_gpus or getattr(generation_config, "is_assistant", False))
            and not (generation_config.output_attentions or generation_config.output_hidden_states)
        )
        if can_draft:
            draws = grammar.draws.repeat_interleave(len(input_ids) // len(grammar.draws))
            if draft_codes is None:
                draft_codes = self._expected_codes(input_ids, draws, kwargs)
            drafts = input_ids.new_zeros((len(input_ids), generation_config.max_length - input_ids.shape[1]))
            drafts[:, : draft_codes.shape[1]] = draft_codes + grammar.codes.start
            sampling = None
            if generation_config.do_sample and not generation_config.output_scores:
                temperature = generation_config.temperature or 1.0
                sampling = CoupledSampling(draws, grammar.codes, input_ids.shape[1], draft_codes.shape[1], temperature)
                logits_processor.append(sampling)
            forbids = logits_processor[0] is grammar and not generation_config.output_logits
            if forbids:  # once for all codes of a pass
                logits_processor = LogitsProcessorList(logits_processor[1:])
            if draws.all() and all(
                isinstance(item, (EosTokenCriteria, MaxLengthCriteria)) for item in stopping_criteria
            ):  # image codes end nothing
                stopping_criteria = StoppingCriteriaList(
                    item for item in stopping_criteria if not isinstance(item, EosTokenCriteria)
                )
            seconds = self.__dict__.setdefault("_pass_seconds", {})
            widths = PassWidths(seconds.setdefault((self.device, self.dtype, len(input_ids)), {}), codes_per_pass)
            pad_token_id = generation_config._pad_token_tensor
            model = DraftedPasses(self, grammar.codes, draws, drafts, widths, pad_token_id, sampling, forbids)
        try:
            return GenerationMixin._sample(
                model, input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus, **kwargs
            )
        finally:
            if can_draft:
                model.finish()

    def _prepare_static_cache(self, *args, **kwargs):
        """
        A static cache that keeps what has left a sliding window, which the masks hide: a layer that slides counts in Python, so
        that compiled passes would need a CUDA graph for every place.
        """
        cache = super()._prepare_static_cache(*args, **kwargs)
        if any(cache.is_sliding):
            cache.layers = [StaticLayer(self._previous_max_cache_length) for _ in cache.layers]
        return cache

    def _expected_codes(self, input_ids, draws, kwargs):
        """The draft of every row that draws: the codes of its first input image if its task follows it, or typical ones."""
        codes = input_ids.new_zeros((len(input_ids), self.config.num_image_codes))
        tasks = [self.config.tasks[name] for name in self.model.tasks_of_rows(kwargs["task"], len(input_ids))]
        for row, task in enumerate(tasks):
            if task.typical_codes is not None:
                codes[row] = codes.new_tensor(task.typical_codes)
        pixel_values = kwargs.get("pixel_values")
        images = (input_ids == self.config.image_token_id).sum(dim=1) // self.config.num_image_patches
        if (
            pixel_values is None or self.model.vqgan is None or images.sum() != len(pixel_values)
        ):  # a kept cache has some
            return codes
        follows = torch.tensor([task.follows_input for task in tasks], device=images.device)
        rows = (draws & follows & (images > 0)).nonzero()[:, 0]
        if len(rows) > 0:
            first = (images.cumsum(0) - images)[rows]
            targets = as_targets(pixel_values[first].float(), self.config.vqgan_config.resolution)
            codes[rows] = self.encode_image(targets).to(codes.device)
        return codes

    def _append_image_start(self, input_ids, attention_mask, draws, cached, is_embedded):
        """Appends `<start_index>` to drawing rows that lack it; the other rows get one more pad on the left."""
        lacking = draws & (input_ids[:, -1] != self.config.image_start_token_id)
        if not lacking.any():
            return input_ids, attention_mask
        if is_embedded:
            raise HealthGPTError(
                "Prompts for drawing that are given as inputs_embeds have to end with <start_index> and its embedding."
            )
        if cached > 0 and not lacking.all():
            raise HealthGPTError(
                "Rows that continue a cache cannot be moved: end the prompts of all rows that draw with <start_index>, as "
                "apply_chat_template(add_generation_prompt=True) does."
            )
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if (attention_mask[:, -1] == 0).any():
            raise HealthGPTError("Prompts of different lengths must be padded on the left.")

        def shift(tensor, left, right):
            edge = tensor.new_ones((len(tensor), 1))
            appended = torch.cat([tensor, edge * right], dim=1)
            padded = torch.cat([edge * left, tensor], dim=1)
            return torch.where(lacking.unsqueeze(1), appended, padded)

        pad = self.config.text_config.pad_token_id or 0
        return shift(input_ids, pad, self.config.image_start_token_id), shift(attention_mask, 0, 1)

    def _check_generation(self, prompt_length, draws, kwargs, generation_config, codes_per_pass):
        window = self.config.text_config.max_position_embeddings
        new_tokens = self.config.num_image_codes if draws.any() else 1
        if prompt_length + new_tokens > window:
            raise HealthGPTError(
                f"The prompt has {prompt_length} tokens and needs room for {new_tokens} more, but the model's window is "
                f"{window} tokens."
            )

        def option(name):
            return kwargs.get(name, getattr(generation_config or self.generation_config, name, None))

        looks_up_ids = (option("repetition_penalty") or 1) != 1 or option("prompt_lookup_num_tokens")
        if looks_up_ids and self.config.image_token_id >= self.lm_head.out_features and TRANSFORMERS_VERSION < (5, 18):
            raise HealthGPTError(
                "repetition_penalty and prompt_lookup_num_tokens need transformers 5.18 or newer, since the id that stands "
                "for pictures lies past the token tables."
            )
        for number in (codes_per_pass, option("codes_per_pass")):
            if number is not None and not (type(number) is int and number >= 1):
                raise HealthGPTError(f"codes_per_pass is a whole number from 1 on, got {number!r}.")
        if draws.any() and option("forced_eos_token_id") is not None:
            raise HealthGPTError("forced_eos_token_id would take the place of a picture's last code: draw without it.")
        if (option("encoder_repetition_penalty") or 1) != 1:
            raise HealthGPTError(
                "encoder_repetition_penalty is not supported: the prompt's ids, which it favours, are those of images too."
            )
        if option("assistant_early_exit") is not None:
            raise HealthGPTError(
                "assistant_early_exit is not supported: the first layers' drafts would lack the task's head. Give an "
                "assistant_model instead."
            )
        if (option("guidance_scale") or 1) != 1:
            raise HealthGPTError(
                "guidance_scale is not supported: its second pass would run without picture and task."
            )
        if draws.any() and not draws.all() and (option("num_beams") or 1) > 1:
            raise HealthGPTError("Beam search needs rows that all answer or all draw; this batch mixes both.")

    def _pop_max_new_tokens(self, prompt_length, kwargs, generation_config):
        """How many new tokens the caller asked for, if they did; takes the arguments that say so out of `kwargs`."""
        asked = GenerationConfig(**{name: kwargs.pop(name, None) for name in ("max_new_tokens", "max_length")})
        for config in (asked, generation_config):
            if config is not None and config.max_new_tokens is not None:
                return config.max_new_tokens
            if config is not None and config.max_length is not None:
                return max(config.max_length - prompt_length, 1)
        return None

    def prepare_inputs_for_generation(
        self,
        input_ids,
        pixel_values=None,
        inputs_embeds=None,
        is_first_iteration=False,
        draft_codes=None,  # these two are for `_sample`
        codes_per_pass=None,
        **kwargs,
    ):
        model_inputs = super().prepare_inputs_for_generation(
            input_ids,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        if pixel_values is not None and (is_first_iteration or not kwargs.get("use_cache", True)):
            starts = (input_ids == self.config.image_token_id).nonzero()[:: self.config.num_image_patches, 1]
            cached = cached_length(kwargs.get(CACHE_NAME))
            if ((starts < cached) & (cached < starts + self.config.num_image_patches)).any():
                raise HealthGPTError("The cache ends within a picture: crop it before or after.")
            pixel_values = pixel_values[starts >= cached]
            model_inputs["pixel_values"] = pixel_values if len(pixel_values) > 0 else None
        return model_inputs

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        """Repeats every row `expand_size` times, with its task and its pictures: a row may have none or several."""
        if isinstance(model_kwargs["task"], list):
            model_kwargs["task"] = [name for name in model_kwargs["task"] for _ in range(expand_size)]
        pixel_values = model_kwargs.pop("pixel_values", None)
        if pixel_values is not None and expand_size > 1:
            image_mask = self.model.get_placeholder_mask(input_ids, pixel_values)
            images_per_row = (image_mask.sum(dim=1) // self.config.num_image_patches).tolist()
            pixel_values = torch.cat(
                [images.repeat(expand_size, 1, 1, 1) for images in pixel_values.split(images_per_row)]
            )
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        model_kwargs["pixel_values"] = pixel_values
        return input_ids, model_kwargs
