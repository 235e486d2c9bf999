"""
Makes checkpoints in the published file formats with other sizes than the golden ones, and says what they must give.

Weights are random and seeded; the expectations come from the restatement in `published.py`. The folders look like those in
`tests/golden`, hence the same tests run on both.
"""

import io
import json
import sys
import types
from pathlib import Path

import torch
import yaml
from conftest import GOLDEN, pictures_of
from published import Published, build_prompt, prompt_ids, to_uint8
from safetensors.torch import save_file
from sentencepiece import SentencePieceTrainer
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

CORPUS = (Path(__file__).parent.parent / "LICENSE").read_text().split("\n")
MAKES = {
    "made_m3": dict(
        template="phi3_instruct",
        seed=11,
        vocab=390,
        padding=9,
        text=dict(
            hidden_size=48, intermediate_size=72, layers=3, heads=3, groups=1, rope_theta=5000.0, sliding_window=20
        ),
        vision=dict(hidden_size=24, intermediate_size=40, layers=4, heads=3, image_size=42, patch_size=14),
        plugins={"comprehension": (12, 30, 3), "generation": (10, 5, 5)},
        vqgan=dict(n_embed=96, z_channels=24, resolution=24, ch=32, ch_mult=[1, 2], num_res_blocks=2, attn=[12, 24]),
    ),
    "made_l14": dict(
        template="phi4_instruct",
        seed=11,
        vocab=330,
        padding=5,
        text=dict(hidden_size=40, intermediate_size=56, layers=1, heads=5, groups=5, rope_theta=250000.0),
        vision=dict(hidden_size=32, intermediate_size=48, layers=2, heads=4, image_size=48, patch_size=12),
        plugins={"comprehension": (9, 18, 3)},
        num_codes=33,
    ),
    "made_xl32": dict(
        template="qwen_2",
        seed=13,
        vocab=310,
        padding=0,
        text=dict(hidden_size=56, intermediate_size=64, layers=3, heads=7, groups=7, rope_theta=100000.0),
        vision=dict(hidden_size=40, intermediate_size=64, layers=5, heads=5, image_size=45, patch_size=9),
        plugins={"comprehension": (14, 7, 7)},
    ),
    "made_wide": dict(  # sizes that 4-bit kernels of a CPU take
        template="phi3_instruct",
        seed=17,
        vocab=390,
        padding=0,
        text=dict(hidden_size=64, intermediate_size=128, layers=2, heads=4, groups=2, rope_theta=10000.0),
        vision=dict(hidden_size=24, intermediate_size=40, layers=3, heads=3, image_size=42, patch_size=14),
        plugins={"comprehension": (8, 16, 4), "generation": (8, 16, 4)},
        vqgan=dict(n_embed=64, z_channels=24, resolution=24, ch=32, ch_mult=[1, 2], num_res_blocks=1, attn=[12]),
    ),
}
CASES = {
    "comprehension": [
        ("retina", "Is there 1 lesion or 22?"),
        (None, "Name  the organ. "),
        (["ct", "cell"], "Compare\nthem!"),
    ],
    "generation": [("mr", "Sharpen the picture."), (None, "Draw a normal chest, 35 years old.")],
}
TOKENIZERS = {
    "phi3_instruct": (
        "LlamaTokenizer",
        ["<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>"],
        {"lstrip": False, "rstrip": True},
    ),
    "phi4_instruct": (
        "GPT2Tokenizer",
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|im_sep|>", "<|dummy|>"],
        {"lstrip": True, "rstrip": True},
    ),
    "qwen_2": ("Qwen2Tokenizer", ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], {"lstrip": False, "rstrip": False}),
}


def make(folder: Path, name: str) -> None:
    """Writes the checkpoint `name` of `MAKES` with its cases and expectations into `folder`."""
    make = MAKES[name]
    torch.manual_seed(make["seed"])
    for part in ("base", "vit"):
        (folder / part).mkdir(parents=True)
    num_tokens, end = make_tokenizer(folder / "base", make["template"], make["vocab"])
    make_base(folder / "base", make, num_tokens, end)
    make_vision(folder / "vit", **make["vision"])
    for task, (rank, _, experts) in make["plugins"].items():
        make_plugin(folder, task, rank, experts, make)
    num_codes = make.get("num_codes", 0)
    if "vqgan" in make:
        num_codes = make["vqgan"]["n_embed"]
        make_vqgan(folder / "vqgan", **make["vqgan"])
        rows, hidden = num_tokens + num_codes + 3, make["text"]["hidden_size"]
        keys = ("base_model.model.model.embed_tokens.weight", "base_model.model.lm_head.weight")
        torch.save(
            {key: (0.5 * torch.randn(rows, hidden)).half() for key in keys}, folder / "fusion_layer_weights.bin"
        )
    make_expectations(folder, make, num_codes, end)


def make_tokenizer(folder, template, vocab_size):
    kind, names, strip = TOKENIZERS[template]
    config = {"tokenizer_class": kind, "model_max_length": 512, "eos_token": names[-2], "pad_token": names[0]}
    added = {}
    if kind == "LlamaTokenizer":
        model = io.BytesIO()
        SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            minloglevel=2,
        )
        (folder / "tokenizer.model").write_bytes(model.getvalue())
        config |= {"bos_token": "<s>", "unk_token": "<unk>", "add_bos_token": True, "legacy": False}
        added = {index: token(name) for index, name in enumerate(["<unk>", "<s>", "</s>"])}
    else:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
        tokenizer.train_from_iterator(CORPUS, trainer)
        tokenizer.model.save(str(folder))
        vocab_size = tokenizer.get_vocab_size()
    added |= {vocab_size + index: token(name, **strip) for index, name in enumerate(names)}
    added[vocab_size] |= {"rstrip": False, "lstrip": False}
    config["added_tokens_decoder"] = {str(key): value for key, value in added.items()}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    end = [vocab_size + index for index, name in enumerate(names) if name in ("<|end|>", "<|im_end|>")]
    return vocab_size + len(names), end


def token(content, lstrip=False, rstrip=False):
    return dict(content=content, lstrip=lstrip, rstrip=rstrip, normalized=False, single_word=False, special=True)


def random(*shape, scale=1.0):
    return torch.randn(*shape) * scale / shape[-1] ** 0.5 if len(shape) > 1 else 1 + 0.1 * torch.randn(*shape)


def linears(text, template):
    """(name, out, in) of every decoder linear."""
    hidden, inner, width = text["hidden_size"], text["intermediate_size"], text["hidden_size"] // text["heads"]
    query, key = text["heads"] * width, text["groups"] * width
    if template == "qwen_2":
        shapes = [("self_attn.q_proj", query, hidden), ("self_attn.k_proj", key, hidden)]
        shapes += [("self_attn.v_proj", key, hidden), ("mlp.gate_proj", inner, hidden), ("mlp.up_proj", inner, hidden)]
    else:
        shapes = [("self_attn.qkv_proj", query + 2 * key, hidden), ("mlp.gate_up_proj", 2 * inner, hidden)]
    shapes += [("self_attn.o_proj", hidden, query), ("mlp.down_proj", hidden, inner)]
    return [(f"model.layers.{i}.{name}", *shape) for i in range(text["layers"]) for name, *shape in shapes]


def make_base(folder, make, num_tokens, end):
    text, template = make["text"], make["template"]
    rows, hidden = num_tokens + make["padding"], text["hidden_size"]
    tensors = {
        "model.embed_tokens.weight": torch.randn(rows, hidden),
        "lm_head.weight": torch.randn(rows, hidden) * 0.5,
    }
    for name, *shape in linears(text, template):
        tensors[name + ".weight"] = random(*shape)
        if template == "qwen_2" and name.split(".")[-1] in ("q_proj", "k_proj", "v_proj"):
            tensors[name + ".bias"] = random(shape[0]) - 1
    for index in range(text["layers"]):
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{index}.{name}.weight"] = random(hidden)
    tensors["model.norm.weight"] = random(hidden)
    config = {
        "model_type": "qwen2" if template == "qwen_2" else "phi3",
        "vocab_size": rows,
        "hidden_size": hidden,
        "intermediate_size": text["intermediate_size"],
        "num_hidden_layers": text["layers"],
        "num_attention_heads": text["heads"],
        "num_key_value_heads": text["groups"],
        "rope_theta": text["rope_theta"],
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 512,
        "original_max_position_embeddings": 512,
        "sliding_window": text.get("sliding_window"),
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": end[0],
        "pad_token_id": num_tokens - 1,
        "torch_dtype": "float32",
    }
    if template == "qwen_2":
        config |= {"use_sliding_window": False, "sliding_window": 16, "max_window_layers": 2}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": end, "pad_token_id": num_tokens - 1}))
    if template == "phi4_instruct":  # sharded, as large models are
        names = sorted(tensors)
        shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
        for file, part in shards.items():
            save_file({name: tensors[name] for name in part}, folder / file)
        weight_map = {name: file for file, part in shards.items() for name in part}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    elif template == "qwen_2":  # as older repositories have it
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file(tensors, folder / "model.safetensors")


def make_vision(folder, hidden_size, intermediate_size, layers, heads, image_size, patch_size):
    prefix, positions = "vision_model.", (image_size // patch_size) ** 2 + 1
    tensors = {
        prefix + "embeddings.class_embedding": torch.randn(hidden_size),
        prefix + "embeddings.patch_embedding.weight": torch.randn(hidden_size, 3, patch_size, patch_size) * 0.1,
        prefix + "embeddings.position_embedding.weight": torch.randn(positions, hidden_size),
        prefix + "embeddings.position_ids": torch.arange(positions)[None],  # as files of old versions have it
        "logit_scale": torch.tensor(2.6592),
        "visual_projection.weight": random(8, hidden_size),
    }
    norms = ["pre_layrnorm", "post_layernorm"]
    for index in range(layers):
        layer = f"encoder.layers.{index}."
        norms += [layer + "layer_norm1", layer + "layer_norm2"]
        shapes = {f"self_attn.{part}_proj": (hidden_size, hidden_size) for part in ("q", "k", "v", "out")}
        shapes |= {"mlp.fc1": (intermediate_size, hidden_size), "mlp.fc2": (hidden_size, intermediate_size)}
        for name, shape in shapes.items():
            tensors[f"{prefix}{layer}{name}.weight"] = random(*shape)
            tensors[f"{prefix}{layer}{name}.bias"] = random(shape[0]) - 1
    for name in norms:
        tensors |= {f"{prefix}{name}.weight": random(hidden_size), f"{prefix}{name}.bias": random(hidden_size) - 1}
    save_file(tensors, folder / "model.safetensors")
    vision_config = dict(
        model_type="clip_vision_model",
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        image_size=image_size,
        patch_size=patch_size,
    )
    (folder / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": vision_config}))
    settings = json.loads((GOLDEN / "m3/vit/preprocessor_config.json").read_text())
    settings |= {"size": {"shortest_edge": image_size}, "crop_size": {"height": image_size, "width": image_size}}
    settings |= {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.3, 0.2, 0.25]}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))


def make_plugin(folder, task, rank, experts, make):
    tensors = {}
    for name, out, width in linears(make["text"], make["template"]):
        name = f"base_model.model.{name}"
        tensors[name + ".lora_route.weight"] = random(experts, width, scale=2)
        tensors[name + ".lora_A.weight"] = random(rank, width)
        tensors[name + ".lora_B.weight"] = random(out, rank, scale=0.1)
    hidden = make["text"]["hidden_size"]
    for index, width in ((0, make["vision"]["hidden_size"]), (2, hidden)):
        tensors[f"base_model.model.model.mm_projector.{index}.weight"] = random(hidden, width)
        tensors[f"base_model.model.model.mm_projector.{index}.bias"] = random(hidden) - 1
    path = folder / f"{task[:3]}_hlora_weights.bin"
    torch.save({name: tensor.half() for name, tensor in tensors.items()}, path)


def make_vqgan(folder, n_embed, z_channels, resolution, ch, ch_mult, num_res_blocks, attn):
    """`last.ckpt` as Lightning writes it, with a callback's class and the losses, and `model.yaml`."""
    folder.mkdir()
    tensors = {}

    def conv(name, out, width, size=3):
        tensors[name + ".weight"] = torch.randn(out, width, size, size) / (width * size * size) ** 0.5
        tensors[name + ".bias"] = 0.1 * torch.randn(out)

    def norm(name, width):
        tensors.update({name + ".weight": random(width), name + ".bias": random(width) - 1})

    def residual(name, width, out):
        norm(name + ".norm1", width)
        conv(name + ".conv1", out, width)
        norm(name + ".norm2", out)
        conv(name + ".conv2", out, out)
        if width != out:
            conv(name + ".nin_shortcut", out, width, 1)

    def attend(name, width):
        norm(name + ".norm", width)
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{name}.{part}", width, width, 1)

    def ends(name, width, channels_in, channels_out, channels_first):
        conv(name + ".conv_in", channels_first, channels_in)
        residual(name + ".mid.block_1", width, width)
        attend(name + ".mid.attn_1", width)
        residual(name + ".mid.block_2", width, width)
        conv(name + ".conv_out", channels_out, width if name == "encoder" else ch * ch_mult[0])
        norm(name + ".norm_out", width if name == "encoder" else ch * ch_mult[0])

    widths = [ch * factor for factor in ch_mult]
    ends("encoder", widths[-1], 3, z_channels, ch)
    ends("decoder", widths[-1], z_channels, 3, widths[-1])
    for level, width in enumerate(widths):
        before, after = [ch, *widths][level], [*widths, widths[-1]][level + 1]
        for block in range(num_res_blocks):
            residual(f"encoder.down.{level}.block.{block}", before if block == 0 else width, width)
        for block in range(num_res_blocks + 1):
            residual(f"decoder.up.{level}.block.{block}", after if block == 0 else width, width)
        if resolution // 2**level in attn:
            for block in range(num_res_blocks):
                attend(f"encoder.down.{level}.attn.{block}", width)
            for block in range(num_res_blocks + 1):
                attend(f"decoder.up.{level}.attn.{block}", width)
        if level < len(widths) - 1:
            conv(f"encoder.down.{level}.downsample.conv", width, width)
        if level > 0:
            conv(f"decoder.up.{level}.upsample.conv", width, width)
    conv("quant_conv", z_channels, z_channels, 1)
    conv("post_quant_conv", z_channels, z_channels, 1)
    conv("quantize.proj", n_embed, z_channels, 1)
    tensors["quantize.embed.weight"] = torch.randn(n_embed, z_channels)
    tensors["loss.discriminator.main.0.weight"] = torch.randn(4, 3, 4, 4)
    module = types.ModuleType("pytorch_lightning_callbacks")
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": module.__name__})
    sys.modules[module.__name__] = module
    content = {
        "epoch": 1,
        "state_dict": tensors,
        "callbacks": {module.ModelCheckpoint: {"best": module.ModelCheckpoint()}},
    }
    torch.save(content, folder / "last.ckpt")
    del sys.modules[module.__name__]
    shape = dict(z_channels=z_channels, resolution=resolution, in_channels=3, out_ch=3, ch=ch, ch_mult=ch_mult)
    shape |= dict(num_res_blocks=num_res_blocks, attn_resolutions=attn, double_z=False, dropout=0.0)
    params = {"embed_dim": z_channels, "n_embed": n_embed, "ddconfig": shape}
    (folder / "model.yaml").write_text(yaml.safe_dump({"model": {"target": "GumbelVQ", "params": params}}))


def make_expectations(folder, make, num_codes, end):
    """`cases.json`, `expected.safetensors` and the pictures, as beside the golden checkpoints."""
    published = Published(folder, make["template"])
    published.alphas = {task: alpha for task, (_, alpha, _) in make["plugins"].items()}
    if num_codes:
        published.add_image_tokens(num_codes)
    first_code = published.tokenizer.size - num_codes - 2
    cases, expected = [], {}
    for task in make["plugins"]:
        for index, (image, question) in enumerate(CASES[task]):
            case = {"name": f"{task}/{index}", "task": task, "question": question, "image": image}
            pictures, draws = pictures_of(case), task == "generation"
            case["prompt"] = build_prompt(make["template"], question, len(pictures), draws)
            case["input_ids"] = ids = prompt_ids(published.tokenizer, case["prompt"])
            case["max_new_tokens"] = published.vqgan.grid**2 if draws else 12
            allowed = range(first_code, first_code + num_codes) if draws else None
            new = published.generate(ids, pictures, task, case["max_new_tokens"], end, allowed)
            case["generated_ids"] = new
            add_expectations(published, case, pictures, expected)
            if index == 0:
                case["loss"], case["gradient_norms"] = loss_and_gradients(published, ids, pictures, new, task)
            if draws:
                pixels = published.vqgan.decode(torch.tensor(new) - first_code)
                expected[case["name"] + "/decoded"] = pixels
                case["decoded_png"] = f"gen_{index}.png"
                write_png(pixels, folder / case["decoded_png"])
            cases.append(case)
    if "vqgan" in make:
        pixels = torch.rand(1, 3, make["vqgan"]["resolution"], make["vqgan"]["resolution"]) * 2 - 1
        logits = published.vqgan.code_logits(pixels)
        codes = logits.argmax(1).flatten()
        expected |= {"vqgan/input": pixels, "vqgan/code_logits": logits, "vqgan/codes": codes}
        expected["vqgan/reconstruction"] = published.vqgan.decode(codes)
    save_file(
        {name: tensor.detach().contiguous() for name, tensor in expected.items()}, folder / "expected.safetensors"
    )
    plugins = {task: dict(zip(("r", "alpha", "n"), sizes, strict=True)) for task, sizes in make["plugins"].items()}
    content = {"template": make["template"], "plugins": plugins, "cases": cases, "num_codes": num_codes}
    (folder / "cases.json").write_text(json.dumps(content))


def add_expectations(published, case, pictures, expected):
    name, task = case["name"], case["task"]
    expected[name + "/logits"] = published.logits(case["input_ids"], pictures, task)
    if pictures:
        pixels = [published.pixel_values(picture) for picture in pictures]
        features = [published.vision_features(picture, task) for picture in pixels]
        expected[name + "/pixel_values"] = torch.stack(pixels)
        expected[name + "/vision_features"] = torch.stack(features)
        expected[name + "/projected"] = torch.stack([published.projected(part, task) for part in features])


def loss_and_gradients(published, ids, pictures, new, task):
    plugin = published.plugins[task]
    for tensor in plugin.values():
        tensor.requires_grad_()
    loss = published.loss(ids, pictures, new, task)
    gradients = torch.autograd.grad(loss, list(plugin.values()), allow_unused=True, materialize_grads=True)
    published.plugins[task] = {name: tensor.detach() for name, tensor in plugin.items()}
    return loss.item(), {name: gradient.norm().item() for name, gradient in zip(plugin, gradients, strict=True)}


def write_png(pixels, path):
    from PIL import Image

    Image.fromarray(to_uint8(pixels).numpy()).save(path)
