# Copyright 2026 The HealthGPT package authors.
# Licensed under the Apache License, Version 2.0 (see the file LICENSE).
"""
Drawing many codes a pass, code for code the same.

The loop of `generate` asks for the scores of one next token after another. [`DraftedPasses`] answers it from passes over many
codes: what an image is expected to be (its draft) is read in one pass, and the scores after every code that proves to be the
drawn one are as good as those of a pass of its own. The first wrong code starts the next pass, whose draft is what the last one
predicted (Jacobi decoding, arXiv 2305.10427). As the loop picks every token itself, from true scores, its processors, streamers
and stopping criteria work as ever, and greedy drawings are those of one code a pass (in float32: a pass over many codes rounds
otherwise than one over a single code, and bfloat16 has codes that tie).
"""

import math
import time

import torch
import torch.nn.functional as F
import transformers
from transformers.generation import LogitsProcessor
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.modeling_outputs import CausalLMOutputWithPast

TRANSFORMERS_VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
CACHE_NAME = "cache" if TRANSFORMERS_VERSION >= (5, 24) else "past_key_values"
COMPILED_TOKENS = 128  # of a pass: a GPU that reads weights of 2 bytes computes with so many in about the same time
PADDING = 0.02  # how far padding, whose colour is a whole number of 255, may be from CLIP's mean, in deviations


def as_targets(pixel_values: torch.FloatTensor, resolution: int) -> torch.FloatTensor:
    """
    Input images as the VQGAN reads images: without the padding that made them square, stretched, in [-1, 1].

    Args:
        pixel_values (`torch.FloatTensor` of shape `(num_images, 3, height, width)`): As the vision tower reads them, with
            CLIP's mean and deviation.
        resolution (`int`): Height and width of the VQGAN's images.

    Returns:
        `torch.FloatTensor` of shape `(num_images, 3, resolution, resolution)`.
    """
    mean, std = (pixel_values.new_tensor(values)[:, None, None] for values in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    targets = []
    for image in pixel_values:
        for side in (1, 2):
            content = (image.abs() > PADDING).any(dim=0).any(dim=2 - side).nonzero()
            if len(content) > 0:
                image = image.narrow(side, int(content[0]), int(content[-1] - content[0]) + 1)
        targets.append(F.interpolate(image[None], (resolution, resolution), mode="bicubic", antialias=True))
    return (torch.cat(targets) * std + mean).clamp(0, 1) * 2 - 1


class CoupledSampling(LogitsProcessor):
    """
    Samples the codes of rows that draw by Gumbel noise that stays with its place in the image (the Gumbel-max trick): a draft
    made with the same noise agrees with what is drawn wherever their distributions are close (arXiv 2510.24211), and a seed
    draws the same image however many codes a pass reads.

    Args:
        draws (`torch.BoolTensor` of shape `(batch,)`): Which rows draw.
        codes (`slice`): Ids of the image codes.
        prompt_length (`int`): Ids before the first code.
        num_image_codes (`int`): Codes of an image.
        temperature (`float`): What the scores of a draft are divided by, as those of the loop are.
    """

    def __init__(
        self, draws: torch.BoolTensor, codes: slice, prompt_length: int, num_image_codes: int, temperature: float
    ):
        self.draws = draws
        self.codes = codes
        self.prompt_length = prompt_length
        self.temperature = temperature
        shape = (len(draws), num_image_codes, codes.stop - codes.start)
        self.noise = torch.empty(shape, device=draws.device).exponential_().log_().neg_()

    def choose(self, scores: torch.FloatTensor, first: int) -> torch.LongTensor:
        """The codes `(batch, count)`, from 0, that scores `(batch, count, num_codes)` and the noise from place `first` on pick."""
        return (scores + self.noise[:, first : first + scores.shape[1]].to(scores.device)).argmax(dim=-1)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        place = input_ids.shape[1] - self.prompt_length
        if place >= self.noise.shape[1]:
            return scores
        chosen = self.choose(scores[:, None, self.codes], place) + self.codes.start
        draws = self.draws.to(scores.device).unsqueeze(1)
        others = torch.ones_like(scores, dtype=torch.bool).scatter_(1, chosen, False)
        return scores.masked_fill(draws & others, -torch.inf)


class DraftedPasses:
    """
    A model as the loop of `generate` sees it while rows draw: it takes the loop's calls and answers from passes over many codes.

    Rows advance on their own: a pass reads every row from the first code that one of them lacks, and what a row has been found
    to draw beyond is kept. Rows that answer in words are drafted by what passes predict for them, and by padding once they end.

    Args:
        model (`HealthGPTForConditionalGeneration`): The model.
        codes (`slice`): Ids of the image codes.
        draws (`torch.BoolTensor` of shape `(batch,)`): Which rows draw.
        drafts (`torch.LongTensor` of shape `(batch, horizon)`): Ids that are expected after the prompt; the loop writes at most
            `horizon` tokens.
        widths (`PassWidths`): How many codes a pass reads.
        pad_token_id (`int`, *optional*): What rows that have ended go on with.
        sampling (`CoupledSampling`, *optional*): What samples the codes; drafts are greedy without it.
        forbids (`bool`, defaults to `False`): Whether to take all tokens but image codes from rows that draw, which is else left
            to the loop.
    """

    def __init__(self, model, codes, draws, drafts, widths, pad_token_id=None, sampling=None, forbids=False):
        self.model = model
        self.codes = codes
        self.draws = draws
        self.drafts = drafts
        self.widths = widths
        self.pad_token_id = pad_token_id
        self.sampling = sampling
        self.forbids = forbids
        self.forward = model
        self.is_compiled = False
        self.num_passes = 0
        self.cache = None
        self.place = None  # that of the token which the loop was last told the scores of, counted from the prompt

    def __getattr__(self, name):
        return getattr(self.model, name)

    def get_compiled_call(self, compile_config):
        """A model is compiled anew for each width, so that all passes have one."""
        self.forward, self.is_compiled = self.model.get_compiled_call(compile_config), True
        if self.widths.fixed is None:
            self.widths.fixed = max(1, COMPILED_TOKENS // len(self.draws))
        return self

    def _prefill(self, input_ids, generation_config, model_kwargs, **kwargs):
        """The prompt and the beginning of the draft in one pass."""
        self.prompt_length = input_ids.shape[1]
        self.cache = model_kwargs[CACHE_NAME]
        self.first_length = int(self.cache.get_seq_length())
        self.cache.activate_past_recording()  # sliding windows keep what a crop goes back to
        can_draft = model_kwargs.get("inputs_embeds") is None and generation_config.prefill_chunk_size is None
        width = min(self.widths.best(), self.drafts.shape[1] - 1) if can_draft else 1
        width = int(width) if width > 1 else 0
        read = torch.cat([input_ids, self.drafts[:, :width]], dim=1)
        if model_kwargs.get("attention_mask") is None:  # a mask of ones, of which the loop keeps the length
            generation_config._mask_length += width
        self._keep(
            self.model._prefill(read, generation_config, self._extend(model_kwargs, width, width + 1), **kwargs),
            read,
            first=0,
        )
        self.offset = int(self.cache.get_seq_length()) - read.shape[1]  # places of the cache that input_ids lack
        return self._outputs_of(0)

    def prepare_inputs_for_generation(self, input_ids, next_sequence_length=None, **model_kwargs):
        return {"input_ids": input_ids, "model_kwargs": model_kwargs}

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, is_encoder_decoder=False):
        """They stay those of the prompt: what is written since is added when a pass needs it."""
        return model_kwargs | {CACHE_NAME: self.cache}

    def __call__(self, input_ids, model_kwargs, return_dict=True):
        place = input_ids.shape[1] - self.prompt_length
        is_known = place - self.first < self.logits.shape[1] and torch.equal(
            input_ids[:, -1], self.read[:, place - self.first - 1]
        )
        if not is_known:
            self._pass(input_ids, place, model_kwargs)
        return self._outputs_of(place)

    def _pass(self, input_ids, place, model_kwargs):
        """Reads the draft from the last known token on."""
        self.widths.learn(self.logits.shape[1], place - self.first)
        if self.pad_token_id is not None:
            self.drafts[input_ids[:, -1] == self.pad_token_id, place:] = self.pad_token_id
        horizon = self.drafts.shape[1]
        width = self.widths.next(horizon if self.is_compiled else horizon - place)
        first = min(place, horizon - width)
        ids = torch.cat([input_ids, self.drafts[:, place:]], dim=1)[:, : self.prompt_length + first + width - 1]
        added = ids.shape[1] - self.prompt_length
        known = self.offset + self.prompt_length + first - 1
        self.cache.crop(known - int(self.cache.get_seq_length()))
        start = time.perf_counter()
        inputs = self.model.prepare_inputs_for_generation(
            ids, next_sequence_length=width, **self._extend(model_kwargs, added, width)
        )
        self._keep(self.forward(**inputs, return_dict=True), ids, first)
        self.drafts[0, -1].item()  # waits for the device
        self.widths.add(width, self._agreed(time.perf_counter() - start))

    def _agreed(self, seconds):
        """The time that all processes go by which share the model, so that their passes stay the same."""
        if self.model.tp_size is None:
            return seconds
        seconds = torch.tensor(seconds, device=self.model.device)
        torch.distributed.broadcast(seconds, src=0)
        return seconds.item()

    def _extend(self, model_kwargs, added, width):
        """The loop's arguments for so many further tokens, and scores of the last ones."""
        extended = model_kwargs | {"logits_to_keep": width}
        if added > 0:
            extended = self.model._update_model_kwargs_for_generation({}, extended, num_new_tokens=added)
        return extended

    def _keep(self, outputs, read, first):
        """Keeps what a pass gave from place `first` on, and drafts by it what follows."""
        self.num_passes += 1
        self.cache, self.first = outputs[CACHE_NAME], first
        self.read = read[:, self.prompt_length + first :].clone()
        self.logits = outputs.logits[:, -1 - self.read.shape[1] :].to(torch.float32, copy=True)
        predicted = self._predict(self.logits[..., self.codes], first) + self.codes.start
        if not self.draws.all():
            predicted = torch.where(self.draws.unsqueeze(1), predicted, self.logits.argmax(dim=-1))
        if self.forbids:
            for others in (slice(self.codes.start), slice(self.codes.stop, None)):
                self.logits[self.draws, :, others] = -math.inf
        self.drafts[:, first : first + predicted.shape[1]] = predicted.to(self.drafts.device)

    def _predict(self, scores, first):
        if self.sampling is None:
            return scores.argmax(dim=-1)
        return self.sampling.choose(scores / self.sampling.temperature, first)

    def _outputs_of(self, place):
        """What a pass over the last token alone would have given."""
        self.place = place
        return CausalLMOutputWithPast(logits=self.logits[:, place - self.first].unsqueeze(1))

    def finish(self) -> None:
        """
        Leaves the cache as the loop would have, wherever it stopped: without the last token and what follows it. If the prompt's
        pass was interrupted it is as it was before, and of a later pass no layer keeps anything.
        """
        if self.cache is None:
            return
        length = self.first_length if self.place is None else self.offset + self.prompt_length + self.place
        for layer in self.cache.layers:
            held = int(layer.get_seq_length())
            # Of an interrupted pass not all layers have read; a sliding one drops what it recorded, be it for nothing.
            if held > 0 and held >= length:
                layer.crop(length - held)
            if hasattr(layer, "record_past"):
                layer.record_past = False


class PassWidths:
    """
    How many codes a pass reads: the width that draws fastest on this device, by the time that passes took.

    A pass takes a constant time and a time for each code, told from passes over one code and over many. A pass over w codes
    draws about as many as a power of w, whose exponent is what the drawing's own passes show. The first passes of a model
    measure times; they draw like all others.

    Args:
        seconds (`dict[int, list[float]]`): Times of passes by their width, of this model on this device; gets those measured.
        fixed (`int`, *optional*): The width of all passes. Then nothing is measured.
    """

    EXPONENT = 0.57  # before a drawing's first pass: the small model's from input images (docs/EXPERIMENTS.md)
    MEMORY = 0.7  # how much of the exponent so far the next pass leaves
    RUNG = 16  # so many times wider is the next width measured
    TIMES = 2  # the first pass of a width includes what is set up once

    def __init__(self, seconds: dict[int, list[float]], fixed: int | None = None):
        self.seconds = seconds
        self.fixed = fixed
        self.exponent = self.EXPONENT

    def best(self) -> float:
        """The width that draws the most codes in a time."""
        if self.fixed is not None:
            return self.fixed
        seconds = self.seconds.copy()  # other threads add to it
        if len(seconds) < 2:
            return 1
        one, widest = min(seconds[1]), max(seconds)
        wide = [width for width in seconds if width > 1 and width >= widest / 4]
        slope = min((min(seconds[width]) - one) / (width - 1) for width in wide)
        # The largest w**exponent / (constant + slope * w)
        return max(1, self.exponent / (1 - self.exponent) * (one - slope) / slope) if slope > 0 else math.inf

    def next(self, remaining: int) -> int:
        """The width of the next pass, which has `remaining` codes left to read."""
        wanted, seconds = self.best(), self.seconds.copy()
        widest = max(seconds, default=1)
        if self.fixed is None:
            if len(seconds.get(widest, ())) < self.TIMES:
                wanted = widest
            elif widest == 1 or wanted > widest:
                wanted = self.RUNG * widest
        return int(min(wanted, remaining))

    def add(self, width: int, seconds: float) -> None:
        """Keeps the time of a pass if it is among the shortest: a device that does other work meanwhile takes longer."""
        if self.fixed is None:
            self.seconds[width] = sorted([*self.seconds.get(width, ()), seconds])[: self.TIMES]

    def learn(self, width: int, drawn: int) -> None:
        """Learns from a pass over so many codes how many of them were drawn."""
        if width > 1:
            seen = min(math.log(drawn) / math.log(width), 0.95)
            self.exponent = self.MEMORY * self.exponent + (1 - self.MEMORY) * seen
