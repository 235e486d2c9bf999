"""
The three frozen parts of a small HealthGPT, trained from nothing on phantoms and written as the published files are.

    base     a Phi3 that answers questions from a written report and repeats what it is told
    vision   a CLIP tower whose patches tell findings (late blocks) and pixels (first block)
    vqgan    a Gumbel VQGAN
"""

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import save_file
from sentencepiece import SentencePieceTrainer
from torch import nn
from transformers import AutoModelForCausalLM, CLIPVisionConfig, CLIPVisionModel
from transformers.models.phi3 import Phi3Config

from ..configuration_healthgpt import HealthGPTVQGANConfig
from ..hub_export.families import build_tokenizer
from ..vqgan_decoder import HealthGPTVQGAN
from .anatomy import FINDINGS, MODALITIES, draw_case
from .samples import INSTRUCTIONS, QUESTIONS, comprehension_sample, seed_of
from .shapes import SIZE

PATCH = 8
GRID = SIZE // PATCH
NUM_CODES = 512
PIECES = 576  # of the vocabulary, before the special tokens
SYSTEM = "You are a helpful AI assistant."
SPECIAL = ["<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>"]
MEAN, DEVIATION = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
Log = Callable[[str], None]


def optimise(module: nn.Module, loss_of: Callable[[], torch.Tensor], steps: int, rate: float, log: Log) -> None:
    """AdamW with one cycle of the learning rate."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, betas=(0.9, 0.99), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    for number in range(1, steps + 1):
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        if number % (steps // 10) == 0:
            log(f"step {number} of {steps}, loss {loss.item():.4f}")


def draw_pictures(subject: str, count: int) -> tuple[torch.Tensor, torch.LongTensor]:
    """Pictures `(count, 3, SIZE, SIZE)` in [0, 1] of the training split, and numbers of what they show."""
    pictures, labels = [], []
    names = [f"{modality}, {finding}" for modality in MODALITIES for finding in (None, *FINDINGS[modality])]
    for number in range(count):
        # Half of them are the kinds that drawing is about.
        modality = ("X-ray", "CT", "MRI", None, None, None)[number % 6]
        case = draw_case(np.random.default_rng(seed_of("train", number, subject)), modality)
        pictures.append(np.asarray(case.picture))
        labels.append((names.index(f"{case.modality}, {case.finding}"), {None: 0, "left": 1, "right": 2}[case.side]))
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) / 255, torch.tensor(labels)


def build_vqgan(folder: Path, log: Log, steps: int, count: int) -> None:
    """
    Trains the VQGAN: first without a codebook, then with one that follows the latents (k-means by running means, unused codes
    drawn anew). Its `proj` scores a code by its distance, so that the published argmax picks the nearest. In place of a
    discriminator, edges are compared.
    """
    torch.manual_seed(0)
    config = HealthGPTVQGANConfig(
        num_codes=NUM_CODES,
        embed_dim=64,
        latent_channels=64,
        resolution=SIZE,
        base_channels=32,
        channel_multipliers=[1, 1, 2, 4],
        num_res_blocks=1,
        attention_resolutions=[GRID],
    )
    model = HealthGPTVQGAN(config)
    codebook = Codebook(model.quantize.embed.weight.data)
    model.quantize.requires_grad_(False)
    pictures, _ = draw_pictures("vqgan", count)
    numbers = iter(range(steps))

    def latents_of(rows):
        batch = pictures[torch.randint(count, (rows,))] * 2 - 1
        return batch, model.quant_conv(model.encoder(batch))

    def loss_of():
        number = next(numbers)
        batch, latents = latents_of(16)
        commitment = 0
        if number == steps // 5:
            with torch.no_grad():
                codebook.fit(torch.cat([latents_of(64)[1].movedim(1, -1).flatten(0, 2) for _ in range(8)]))
        if number >= steps // 5:
            nearest = codebook.follow(latents.detach().movedim(1, -1), renew=number < 0.8 * steps).movedim(-1, 1)
            commitment = (latents - nearest).square().mean()
            latents = latents + (nearest - latents).detach()
        difference = model.decoder(model.post_quant_conv(latents)) - batch
        loss = difference.abs().mean() + 2 * difference.square().mean() + commitment / 4
        return loss + difference.diff(dim=2).abs().mean() + difference.diff(dim=3).abs().mean()

    optimise(model, loss_of, steps, 1e-3, log)
    codes = model.quantize.embed.weight
    model.quantize.proj.weight.data = 2 * codes[:, :, None, None]  # 2 x.c - c.c: largest where |x - c| is least
    model.quantize.proj.bias.data = -codes.square().sum(dim=1)
    folder.mkdir(parents=True)
    torch.save({"state_dict": model.state_dict()}, folder / "last.ckpt")
    shape = dict(z_channels=64, resolution=SIZE, in_channels=3, out_ch=3, ch=32, ch_mult=[1, 1, 2, 4])
    shape |= dict(num_res_blocks=1, attn_resolutions=[GRID])
    params = {"embed_dim": 64, "n_embed": NUM_CODES, "ddconfig": shape}
    (folder / "model.yaml").write_text(yaml.safe_dump({"model": {"params": params}}))


class Codebook:
    """
    Codes that follow the latents they stand for.

    Args:
        codes (`torch.Tensor` of shape `(codes, width)`): Changed in place.
    """

    def __init__(self, codes: torch.Tensor):
        self.codes = codes

    def fit(self, latents: torch.Tensor) -> None:
        """K-means over latents `(count, width)`."""
        self.codes.copy_(latents[torch.randperm(len(latents))[: len(self.codes)]])
        for _ in range(10):
            number, total = self._members(latents)
            others = latents[torch.randint(len(latents), (len(self.codes),))]
            self.codes.copy_(torch.where(number > 0, total / number.clamp(min=1), others))
        self.number, self.total = torch.ones(len(self.codes), 1), self.codes.clone()

    def follow(self, latents: torch.Tensor, renew: bool) -> torch.Tensor:
        """The nearest codes of latents `(..., width)`, after they have moved; `renew` puts unused ones onto latents."""
        flat = latents.flatten(0, -2)
        number, total = self._members(flat)
        self.number.lerp_(number, 0.02)
        self.total.lerp_(total, 0.02)
        self.codes.copy_(self.total / self.number.clamp(min=1e-3))
        unused = self.number[:, 0] < 0.02
        if renew and unused.any():
            self.codes[unused] = flat[torch.randint(len(flat), (int(unused.sum()),))]
            self.number[unused] = 0.2
            self.total[unused] = 0.2 * self.codes[unused]
        return self.codes[torch.cdist(flat, self.codes).argmin(dim=1)].view_as(latents)

    def _members(self, latents):
        """How many latents every code is nearest to, `(codes, 1)`, and their sum `(codes, width)`."""
        nearest = torch.cdist(latents, self.codes).argmin(dim=1)
        number = nearest.bincount(minlength=len(self.codes)).float().unsqueeze(1)
        return number, torch.zeros_like(self.codes).index_add_(0, nearest, latents)


def build_vision(folder: Path, log: Log, steps: int, count: int) -> None:
    """Trains the tower: its late patches tell finding and side, those of its first block the pixels."""
    torch.manual_seed(1)
    config = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=PATCH,
    )
    model = nn.ModuleDict(
        {
            "tower": CLIPVisionModel(config),
            "finding": nn.Linear(128, sum(len(findings) + 1 for findings in FINDINGS.values())),
            "side": nn.Linear(128, 3),
            "pixels": nn.Linear(128, 3 * PATCH * PATCH),
        }
    )
    pictures, labels = draw_pictures("vision", count)
    mean, deviation = torch.tensor(MEAN)[:, None, None], torch.tensor(DEVIATION)[:, None, None]

    def loss_of():
        rows = torch.randint(count, (32,))
        batch = (pictures[rows] - mean) / deviation
        states = model["tower"](batch, output_hidden_states=True).hidden_states
        late = states[-2][:, 1:].mean(dim=1)
        patches = F.unfold(batch, PATCH, stride=PATCH).transpose(1, 2)
        loss = F.cross_entropy(model["finding"](late), labels[rows, 0])
        loss = loss + F.cross_entropy(model["side"](late), labels[rows, 1])
        return loss + F.mse_loss(model["pixels"](states[1][:, 1:]), patches)

    optimise(model, loss_of, steps, 1e-3, log)
    folder.mkdir(parents=True)
    model["tower"].config.save_pretrained(folder)
    tensors = {
        f"vision_model.{name.removeprefix('vision_model.')}": t for name, t in model["tower"].state_dict().items()
    }
    save_file(tensors, folder / "model.safetensors")  # published names, whatever transformers calls them
    settings = {"size": {"shortest_edge": SIZE}, "crop_size": {"height": SIZE, "width": SIZE}}
    settings |= {"image_mean": MEAN, "image_std": DEVIATION}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))


def build_base(folder: Path, log: Log, question_steps: int, steps: int, count: int) -> None:
    """Trains the language model on reports with questions, then also on repeating what stands in the prompt."""
    torch.manual_seed(2)
    folder.mkdir(parents=True)
    # Whether the finding asked for is the one reported is learned last: half of the questions are only about that.
    texts = [comprehension_sample("train", number, "closed" if number % 2 else None) for number in range(count)]
    spoken = sorted({text for s in texts for text in (s["report"], s["instruction"], s["response"])})
    orders = [text.format(report="") for text in INSTRUCTIONS.values()]
    questions = [text.format(finding="") for texts in QUESTIONS.values() for text in texts]
    write_tokenizer(folder, spoken + 100 * [SYSTEM, *orders, *questions])  # what many prompts share counts more
    tokenizer = build_tokenizer(folder)
    config = Phi3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        original_max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=tokenizer.convert_tokens_to_ids("<|end|>"),
        pad_token_id=tokenizer.pad_token_id,
    )
    model = AutoModelForCausalLM.from_config(config)
    middle, end = (
        tokenizer.encode(text, add_special_tokens=False) for text in ("<|end|>\n<|assistant|>\n", "<|end|>")
    )
    asked = [tokenizer.encode(f"\n{s['instruction']}", add_special_tokens=False) for s in texts]
    reports = [tokenizer.encode(s["report"], add_special_tokens=False) for s in texts]
    answers = [tokenizer.encode("<|assistant|>" + s["response"], add_special_tokens=False)[1:] for s in texts]
    before, *after = around_picture(tokenizer, orders)
    start_of_picture = tokenizer.encode("\n", add_special_tokens=False)  # a drawing begins with a token of its own
    rng = np.random.default_rng(0)

    def sequence(repeating: float):
        if rng.random() >= repeating:
            row = rng.integers(len(texts))
            prompt, answer = [*before, *reports[row], *asked[row], *middle], answers[row]
        else:  # few different tokens, so that only their place tells which comes next, at the places of a drawing
            few = rng.integers(3, 259, rng.integers(4, 64))
            codes = rng.choice(few, GRID * GRID).tolist()
            prompt, answer = [*before, *codes, *after[rng.integers(len(after))]], [*start_of_picture, *codes]
        return prompt, [*answer, *end]

    def loss_of(repeating: float):
        pairs = [sequence(repeating) for _ in range(16)]
        length = max(len(prompt) + len(answer) for prompt, answer in pairs)
        ids = torch.full((len(pairs), length), tokenizer.pad_token_id)
        labels = torch.full((len(pairs), length), -100)
        for row, (prompt, answer) in enumerate(pairs):
            ids[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
            labels[row, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
        return model(input_ids=ids, attention_mask=(ids != tokenizer.pad_token_id).long(), labels=labels).loss

    optimise(model, lambda: loss_of(0), question_steps, 2e-3, log)  # among codes their words hardly count
    optimise(model, lambda: loss_of(0.6), steps, 2e-3, log)
    model.to(torch.bfloat16).save_pretrained(folder)


def around_picture(tokenizer, orders: list[str]) -> list[list[int]]:
    """Ids before a picture in the prompt of a drawing, then those after it for each order."""
    texts = [f" <|system|>\n{SYSTEM}<|end|>\n<|user|>\n", *(f" \n{order}<|end|>\n<|assistant|>\n" for order in orders)]
    before, *after = (tokenizer.encode(text, add_special_tokens=False) for text in texts)
    return [[1, *before], *after]


def write_tokenizer(folder: Path, texts: list[str]) -> None:
    """A SentencePiece vocabulary of the texts' words, the frequent ones first, with Phi-3's special tokens after it."""
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        vocab_size=PIECES,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    added = {index: token(name) for index, name in enumerate(["<unk>", "<s>", "</s>"])}
    for index, name in enumerate(SPECIAL):
        added[PIECES + index] = token(name) | {"rstrip": index > 0}
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "model_max_length": 512,
        "bos_token": "<s>",
        "eos_token": "<|end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": "<unk>",
        "add_bos_token": True,
        "legacy": False,
        "added_tokens_decoder": added,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def token(content: str) -> dict:
    return dict(content=content, lstrip=False, rstrip=False, normalized=False, single_word=False, special=True)
