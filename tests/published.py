"""
A plain restatement of the published computation, one sequence at a time, in nothing but tensor operations.

It shares no code with the package: it reads the published files itself and knows their names, so that it can say what any
checkpoint of that kind has to give. `test_published.py` holds it to the golden files; `make_checkpoint.py` uses it to
write the expectations of other checkpoints.
"""

import itertools
import json
import math
import zipfile
from pathlib import Path

import regex
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from safetensors.torch import load_file
from sentencepiece import SentencePieceProcessor

IMAGE = -200
PROMPTS = {
    "phi3_instruct": ("<|system|>\nYou are a helpful AI assistant.<|end|>\n<|user|>\n{}<|end|>\n<|assistant|>\n"),
    "phi4_instruct": (
        "<|im_start|>system<|im_sep|>\nYou are a medieval knight and must provide explanations to modern people.<|im_end|>"
        "\n<|im_start|>user<|im_sep|>\n{}<|im_end|>\n<|im_start|>assistant<|im_sep|>\n"
    ),
    "qwen_2": (
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    ),
}
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def load_bin(path):
    return {name: tensor.float() for name, tensor in torch.load(path, weights_only=True).items()}


def load_base(folder):
    if (folder / "pytorch_model.bin").exists():
        return load_bin(folder / "pytorch_model.bin")
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


class SlowTokenizer:
    """The slow tokenizers of 2024: split at added tokens, strip what they ask for, tokenise the pieces on their own."""

    def __init__(self, folder):
        config = json.loads((folder / "tokenizer_config.json").read_text())
        self.kind = config["tokenizer_class"]
        self.added = {token["content"]: (int(id), token) for id, token in config["added_tokens_decoder"].items()}
        self.bos = self.added[config["bos_token"]][0] if config.get("add_bos_token") else None
        if self.kind == "LlamaTokenizer":
            self.pieces = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
            size = len(self.pieces)
        else:
            self.vocab = json.loads((folder / "vocab.json").read_text())
            merges = (folder / "merges.txt").read_text().split("\n")[1:]
            self.ranks = {tuple(merge.split()): rank for rank, merge in enumerate(merges) if merge}
            size = len(self.vocab)
        self.size = max(size, 1 + max(id for id, _ in self.added.values()))

    def add(self, names):
        for name in names:
            self.added[name] = (self.size, {"lstrip": False, "rstrip": False})
            self.size += 1

    def __call__(self, text):
        if self.kind == "LlamaTokenizer" and text:
            text = "▁" + text.replace("▁", " ")
        names = sorted(self.added, key=len, reverse=True)
        parts = regex.split("(" + "|".join(map(regex.escape, names)) + ")", text)
        for index in range(1, len(parts), 2):
            token = self.added[parts[index]][1]
            if token["rstrip"]:
                parts[index + 1] = parts[index + 1].lstrip()
            if token["lstrip"]:
                parts[index - 1] = parts[index - 1].rstrip()
        ids = [] if self.bos is None else [self.bos]
        for index, part in enumerate(parts):
            ids += [self.added[part][0]] if index % 2 else self.encode(part)
        return ids

    def encode(self, text):
        if not text:
            return []
        if self.kind == "LlamaTokenizer":
            skip = len(self._encode_pieces("<unk>"))
            return self._encode_pieces("<unk>" + text)[skip:] if text[0] in "▁ " else self._encode_pieces(text)
        pattern = QWEN2_PATTERN if self.kind == "Qwen2Tokenizer" else GPT2_PATTERN
        return [self.vocab[piece] for word in regex.findall(pattern, text) for piece in self._merge(word)]

    def _encode_pieces(self, text):
        prefix = "\n"  # keeps SentencePiece from adding its own space in front, which legacy=False switches off
        ids = self.pieces.encode(prefix + text)
        start = self.pieces.encode(prefix)
        assert ids[: len(start)] == start
        return ids[len(start) :]

    def _merge(self, word):
        pieces = [BYTES[byte] for byte in word.encode()]
        while True:
            pairs = [(self.ranks.get(pair, math.inf), i) for i, pair in enumerate(itertools.pairwise(pieces))]
            rank, i = min(pairs, default=(math.inf, 0))
            if rank == math.inf:
                return pieces
            pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]


def _byte_alphabet():
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {**{byte: chr(byte) for byte in printable}, **{byte: chr(256 + i) for i, byte in enumerate(others)}}


BYTES = _byte_alphabet()


def build_prompt(template, question, num_images, draws):
    return PROMPTS[template].format("<image>\n" * num_images + question) + ("<start_index>" if draws else "")


def prompt_ids(tokenizer, prompt):
    chunks = [tokenizer(chunk) for chunk in prompt.split("<image>")]
    skip = 0 if tokenizer.bos is None else 1
    ids = chunks[0]
    for chunk in chunks[1:]:
        ids = [*ids, IMAGE, *chunk[skip:]]
    return ids


def norm(x, weight, eps):
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))


def attention(query, key, value, mask=None):
    """(heads, length, width) each."""
    scores = query @ key.transpose(1, 2) / math.sqrt(query.shape[-1])
    return (scores if mask is None else scores + mask).softmax(-1) @ value


class Published:
    """One checkpoint in the published files: a folder as those in `tests/golden`."""

    def __init__(self, folder, template):
        self.folder, self.template = Path(folder), template
        self.config = json.loads((self.folder / "base/config.json").read_text())
        self.base = load_base(self.folder / "base")
        self.vision = load_file(self.folder / "vit/model.safetensors")
        self.vision_config = json.loads((self.folder / "vit/config.json").read_text())["vision_config"]
        self.tokenizer = SlowTokenizer(self.folder / "base")
        self.plugins = {"comprehension": load_bin(self.folder / "com_hlora_weights.bin")}
        if (self.folder / "gen_hlora_weights.bin").exists():
            self.plugins["generation"] = load_bin(self.folder / "gen_hlora_weights.bin")
        self.alphas = {name: 2 * self._rows(name, "lora_A") for name in self.plugins}
        if (self.folder / "vqgan").exists():
            self.vqgan = VQGAN(self.folder / "vqgan")

    def _rows(self, task, factor):
        return next(tensor.shape[0] for name, tensor in self.plugins[task].items() if factor in name)

    def add_image_tokens(self, num_codes):
        """Adds the tokens of a picture; the tables lose their padded rows and get the mean of the others."""
        rows = self.tokenizer.size
        self.tokenizer.add(
            ["<start_index>", *(f"<idx_{i}>" for i in range(num_codes)), "<end_index>", "<pixel_newline>"]
        )
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            table = self.base[name][:rows]
            self.base[name] = torch.cat([table, table.mean(0, keepdim=True).expand(self.tokenizer.size - rows, -1)])

    def tables(self, task):
        if task == "generation" and (self.folder / "fusion_layer_weights.bin").exists():
            fusion = load_bin(self.folder / "fusion_layer_weights.bin")
            return fusion["base_model.model.model.embed_tokens.weight"], fusion["base_model.model.lm_head.weight"]
        return self.base["model.embed_tokens.weight"], self.base["lm_head.weight"]

    def pixel_values(self, picture):
        """Pad to a square of the mean colour, bicubic resize, normalise."""
        settings = json.loads((self.folder / "vit/preprocessor_config.json").read_text())
        mean, std = (torch.tensor(settings[name]).view(3, 1, 1) for name in ("image_mean", "image_std"))
        side, picture = max(picture.size), picture.convert("RGB")
        square = Image.new("RGB", (side, side), tuple(int(255 * channel) for channel in settings["image_mean"]))
        square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
        size = settings["crop_size"]["height"]
        pixels = torch.tensor(list(square.resize((size, size), Image.Resampling.BICUBIC).tobytes()))
        return (pixels.view(size, size, 3).permute(2, 0, 1) / 255 - mean) / std

    def vision_features(self, pixels, task):
        """Patches (patches, hidden) after all blocks but one (comprehension) or after the first (generation)."""
        config, weights = self.vision_config, {k.removeprefix("vision_model."): v for k, v in self.vision.items()}
        patches = F.conv2d(pixels[None], weights["embeddings.patch_embedding.weight"], stride=config["patch_size"])
        x = torch.cat([weights["embeddings.class_embedding"][None], patches[0].flatten(1).T])
        x = x + weights["embeddings.position_embedding.weight"]

        def layer_norm(x, name):
            return F.layer_norm(x, x.shape[-1:], weights[name + ".weight"], weights[name + ".bias"], eps=1e-5)

        def linear(x, name):
            return x @ weights[name + ".weight"].T + weights[name + ".bias"]

        x = layer_norm(x, "pre_layrnorm")
        for index in range(config["num_hidden_layers"] - 1 if task == "comprehension" else 1):
            name, heads = f"encoder.layers.{index}", config["num_attention_heads"]
            h = layer_norm(x, name + ".layer_norm1")
            query, key, value = (
                linear(h, f"{name}.self_attn.{part}_proj").unflatten(1, (heads, -1)).transpose(0, 1) for part in "qkv"
            )
            x = x + linear(attention(query, key, value).transpose(0, 1).flatten(1), name + ".self_attn.out_proj")
            h = linear(layer_norm(x, name + ".layer_norm2"), name + ".mlp.fc1")
            x = x + linear(h * torch.sigmoid(1.702 * h), name + ".mlp.fc2")
        return x[1:]

    def projected(self, features, task):
        weights = {name.split("mm_projector.")[-1]: tensor for name, tensor in self.plugins[task].items()}
        hidden = F.gelu(features @ weights["0.weight"].T + weights["0.bias"])
        return hidden @ weights["2.weight"].T + weights["2.bias"]

    def linear(self, x, name, task):
        """y = W x + b + B (repeat_interleave(softmax(R x), r / n) * (A x * alpha / r * n))"""
        y = x @ self.base[name + ".weight"].T + self.base.get(name + ".bias", 0)
        route, a, b = (
            self.plugins[task][f"base_model.model.{name}.{factor}.weight"]
            for factor in ("lora_route", "lora_A", "lora_B")
        )
        rank, experts = a.shape[0], route.shape[0]
        weights = (x @ route.T).softmax(-1).repeat_interleave(rank // experts, dim=-1)
        return y + (weights * (x @ a.T * (self.alphas[task] / rank * experts))) @ b.T

    def hidden_states(self, x, task):
        """Embeddings (length, hidden) -> what the head reads."""
        config = self.config
        heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
        width, length = config["hidden_size"] // heads, len(x)
        frequencies = config["rope_theta"] ** -(torch.arange(0, width, 2) / width)
        angles = torch.outer(torch.arange(length), frequencies).repeat(1, 2)
        distance = torch.arange(length)[:, None] - torch.arange(length)
        hidden = distance < 0
        if config.get("sliding_window") and config.get("use_sliding_window", True):
            hidden = hidden | (distance > config["sliding_window"])
        mask = torch.zeros(length, length).masked_fill(hidden, -math.inf)

        def rotate(x):
            left, right = x.chunk(2, dim=-1)
            return x * angles.cos() + torch.cat([-right, left], dim=-1) * angles.sin()

        for index in range(config["num_hidden_layers"]):
            name = f"model.layers.{index}"
            h = norm(x, self.base[name + ".input_layernorm.weight"], config["rms_norm_eps"])
            if config["model_type"] == "phi3":
                qkv = self.linear(h, name + ".self_attn.qkv_proj", task)
            else:
                qkv = torch.cat([self.linear(h, f"{name}.self_attn.{part}_proj", task) for part in "qkv"], dim=-1)
            qkv = qkv.unflatten(1, (heads + 2 * groups, width)).transpose(0, 1)
            query, key, value = qkv.split([heads, groups, groups])
            key, value = (part.repeat_interleave(heads // groups, dim=0) for part in (key, value))
            h = attention(rotate(query), rotate(key), value, mask).transpose(0, 1).flatten(1)
            x = x + self.linear(h, name + ".self_attn.o_proj", task)
            h = norm(x, self.base[name + ".post_attention_layernorm.weight"], config["rms_norm_eps"])
            if config["model_type"] == "phi3":
                gate, up = self.linear(h, name + ".mlp.gate_up_proj", task).chunk(2, dim=-1)
            else:
                gate, up = (self.linear(h, f"{name}.mlp.{part}_proj", task) for part in ("gate", "up"))
            x = x + self.linear(F.silu(gate) * up, name + ".mlp.down_proj", task)
        return norm(x, self.base["model.norm.weight"], config["rms_norm_eps"])

    def logits(self, ids, pictures, task):
        """Ids with IMAGE for every picture -> logits (positions, rows of the tables)."""
        embeddings, head = self.tables(task)
        parts, pictures = [], iter(pictures)
        for id in ids:
            if id == IMAGE:
                features = self.vision_features(self.pixel_values(next(pictures)), task)
                parts.append(self.projected(features, task))
            else:
                parts.append(embeddings[id][None])
        return self.hidden_states(torch.cat(parts), task) @ head.T

    @torch.no_grad()
    def generate(self, ids, pictures, task, max_new_tokens, eos, allowed=None):
        """Greedy ids, of those that are allowed."""
        new = []
        while len(new) < max_new_tokens and not (new and new[-1] in eos):
            logits = self.logits([*ids, *new], pictures, task)[-1]
            if allowed is not None:
                logits = logits[allowed.start : allowed.stop]
            best = logits.topk(2)
            assert best.values[0] - best.values[1] > 1e-4, "too close to call: use another seed"
            new.append(int(best.indices[0]) + (allowed.start if allowed is not None else 0))
        return new

    def loss(self, ids, pictures, new, task):
        logits = self.logits([*ids, *new], pictures, task)
        return F.cross_entropy(logits[-len(new) - 1 : -1], torch.tensor(new))


class VQGAN:
    """The Gumbel VQGAN of taming-transformers, from `last.ckpt` and `model.yaml`."""

    def __init__(self, folder):
        params = yaml.safe_load((folder / "model.yaml").read_text())["model"]["params"]
        self.config, self.num_codes = params["ddconfig"], params["n_embed"]
        self.grid = self.config["resolution"] // 2 ** (len(self.config["ch_mult"]) - 1)
        with torch.serialization.safe_globals([(object, name) for name in unsafe_globals(folder / "last.ckpt")]):
            self.weights = torch.load(folder / "last.ckpt", weights_only=True)["state_dict"]

    def conv(self, x, name, **kwargs):
        weight = self.weights[name + ".weight"]
        return F.conv2d(x, weight, self.weights[name + ".bias"], **{"padding": weight.shape[-1] // 2, **kwargs})

    def norm(self, x, name):
        return F.group_norm(x, 32, self.weights[name + ".weight"], self.weights[name + ".bias"], eps=1e-6)

    def residual(self, x, name):
        h = self.conv(F.silu(self.norm(x, name + ".norm1")), name + ".conv1")
        h = self.conv(F.silu(self.norm(h, name + ".norm2")), name + ".conv2")
        return h + (self.conv(x, name + ".nin_shortcut") if name + ".nin_shortcut.weight" in self.weights else x)

    def attend(self, x, name):
        if name + ".q.weight" not in self.weights:
            return x
        h = self.norm(x, name + ".norm")
        query, key, value = (self.conv(h, f"{name}.{part}").flatten(2).transpose(1, 2) for part in "qkv")
        h = attention(query, key, value).transpose(1, 2).reshape(x.shape)
        return x + self.conv(h, name + ".proj_out")

    def middle(self, x, name):
        x = self.attend(self.residual(x, name + ".mid.block_1"), name + ".mid.attn_1")
        return self.residual(x, name + ".mid.block_2")

    def finish(self, x, name):
        return self.conv(F.silu(self.norm(x, name + ".norm_out")), name + ".conv_out")

    def decode(self, codes):
        """Codes (grid * grid) -> pixels (1, 3, resolution, resolution), not yet clamped."""
        x = self.weights["quantize.embed.weight"][codes].view(1, self.grid, self.grid, -1).permute(0, 3, 1, 2)
        x = self.middle(self.conv(self.conv(x, "post_quant_conv"), "decoder.conv_in"), "decoder")
        for level in reversed(range(len(self.config["ch_mult"]))):
            for block in range(self.config["num_res_blocks"] + 1):
                x = self.residual(x, f"decoder.up.{level}.block.{block}")
                x = self.attend(x, f"decoder.up.{level}.attn.{block}")
            if level > 0:
                x = self.conv(F.interpolate(x, scale_factor=2.0), f"decoder.up.{level}.upsample.conv")
        return self.finish(x, "decoder")

    def code_logits(self, pixels):
        x = self.conv(pixels, "encoder.conv_in")
        for level in range(len(self.config["ch_mult"])):
            for block in range(self.config["num_res_blocks"]):
                x = self.residual(x, f"encoder.down.{level}.block.{block}")
                x = self.attend(x, f"encoder.down.{level}.attn.{block}")
            if level < len(self.config["ch_mult"]) - 1:
                x = self.conv(F.pad(x, (0, 1, 0, 1)), f"encoder.down.{level}.downsample.conv", stride=2, padding=0)
        x = self.finish(self.middle(x, "encoder"), "encoder")
        return self.conv(self.conv(x, "quant_conv"), "quantize.proj")


def unsafe_globals(path):
    """Names of the classes that a checkpoint's pickle refers to beside torch's own."""
    assert zipfile.is_zipfile(path)
    return torch.serialization.get_unsafe_globals_in_checkpoint(path)


def to_uint8(pixels):
    """(1, 3, height, width) -> (height, width, 3), by truncation."""
    return ((pixels[0].clamp(-1, 1) + 1) / 2 * 255).to(torch.uint8).permute(1, 2, 0)
