"""The exporter: what it writes, and that it writes nothing when a source cannot be used."""

import json
import os
import shutil
import types
from dataclasses import replace

import psutil
import pytest
import torch
from conftest import GOLDEN, refused, sources_of, weights_of
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from healthgpt.errors_healthgpt import HealthGPTError
from healthgpt.hub_export import CheckpointError, ExportSources, export
from healthgpt.hub_export.plan import build_plan


def change_bin(path, change):
    tensors = torch.load(path, weights_only=True)
    change(tensors)
    torch.save(tensors, path)


LAYER = "base_model.model.model.layers.1.mlp.down_proj"


def test_every_tensor_is_used_or_dropped_for_a_reason(files):
    sources, output = files
    plan = export(sources, output)
    written = weights_of(output)
    assert written.keys() == {transfer.target for transfer in plan.transfers}
    sizes = [len(load_file(folder / "model.safetensors")) for folder in (sources.base, sources.vision)]
    sizes += [
        len(torch.load(path, weights_only=True))
        for path in (sources.comprehension, sources.generation, sources.fusion)
    ]
    with torch.serialization.safe_globals([(object, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint")]):
        sizes.append(len(torch.load(sources.vqgan, weights_only=True)["state_dict"]))
    assert len(plan.transfers) + len(plan.dropped) == sum(sizes)
    assert all(rule.reason for _, _, rule in plan.dropped)
    fusion = torch.load(sources.fusion, weights_only=True)["base_model.model.lm_head.weight"]
    assert torch.equal(written["token_heads.generation.weight"], fusion.float())
    base = load_file(sources.base / "model.safetensors")["lm_head.weight"]
    assert torch.equal(written["lm_head.weight"][:471], base[:471])
    assert torch.allclose(written["lm_head.weight"][471:], base[:471].mean(0))


def test_shards_are_split_by_size(files, monkeypatch):
    sources, output = files
    monkeypatch.setattr("healthgpt.hub_export.merge.MAX_SHARD_BYTES", 10**6)
    export(sources, output)
    index = json.loads((output / "model.safetensors.index.json").read_text())
    shards = sorted(output.glob("model-*.safetensors"))
    assert len(shards) == len(set(index["weight_map"].values())) > 2
    assert sum(path.stat().st_size > 1.2 * 10**6 for path in shards if "plugin" not in path.name) == 0
    assert sum(len(load_file(path)) for path in shards) == len(index["weight_map"])


def test_dtype_is_the_bases_unless_told(files):
    sources, output = files
    assert build_plan(sources).config.dtype == torch.float32
    export(sources, output, dtype="bfloat16")
    tensors = weights_of(output)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert json.loads((output / "config.json").read_text())["dtype"] == "bfloat16"


def test_an_empty_output_folder_is_used_and_a_full_one_refused(files):
    sources, output = files
    output.mkdir()
    export(sources, output)
    before = {path: path.stat().st_mtime_ns for path in output.iterdir()}
    export(sources, output)  # the same export again has nothing to do
    with pytest.raises(CheckpointError, match="is not an empty folder: it holds another export"):
        export(sources, output, dtype="bfloat16")
    assert {path: path.stat().st_mtime_ns for path in output.iterdir()} == before
    (output.parent / "other").mkdir()
    (output.parent / "other/notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="is not an empty folder"):
        export(sources, output.parent / "other")


def test_tensors_written_in_pieces_are_the_same(files, monkeypatch):
    sources, output = files
    export(sources, output)
    monkeypatch.setattr("healthgpt.hub_export.plan.PIECE_BYTES", 1000)
    export(sources, output.parent / "m3/pieces")
    whole, pieces = weights_of(output), weights_of(output.parent / "m3/pieces")
    assert all(torch.equal(tensor, pieces[name]) for name, tensor in whole.items())


def test_alpha_defaults_to_twice_the_rank_and_can_be_given(files):
    sources, _ = files
    plan = build_plan(replace(sources, comprehension_alpha=None, generation_alpha=7.5))
    assert plan.config.tasks["comprehension"].alpha == 32 and plan.config.tasks["generation"].alpha == 7.5


def test_vocabulary_without_a_vqgan_is_the_published_one(tmp_path):
    sources = replace(sources_of(GOLDEN / "l14"), num_codes=None)
    plan = build_plan(sources)
    assert plan.config.text_config.vocab_size == 411 + 8195
    assert build_plan(replace(sources_of(GOLDEN / "xl32"))).config.text_config.vocab_size == 422


def test_sources_that_cannot_go_together():
    m3 = sources_of(GOLDEN / "m3")
    for change, message in (
        (dict(comprehension=None, generation=None, fusion=None, vqgan=None, vqgan_config=None), "no plugin to export"),
        (dict(vqgan_config=None), "A VQGAN is two files"),
        (dict(vqgan=None, vqgan_config=None), "only a VQGAN can draw"),
        (dict(generation=None), "fusion layer holds the generation task's"),
        (dict(num_codes=64), "follows from the VQGAN"),
        (
            dict(num_codes=0, vqgan=None, vqgan_config=None, generation=None, fusion=None),
            "must be from 1 to 131072, got 0",
        ),
    ):
        with pytest.raises(CheckpointError, match=message):
            replace(m3, **change)


@pytest.mark.parametrize("alpha", [0, -3.0, float("nan"), float("inf")])
def test_alphas_that_mean_nothing(files, alpha):
    sources, output = files
    refused(
        replace(sources, comprehension_alpha=alpha),
        output,
        "com_hlora_weights.bin cannot be used: A task's alpha must be a positive number",
    )


def test_plugin_of_another_base(files):
    sources, output = files
    for other, message in (
        (
            "l14",
            r"mm_projector\.0\.weight in .*l14/com_hlora_weights\.bin has the shape \[60, 32\], but the checkpoint needs",
        ),
        ("xl32", r"xl32/com_hlora_weights\.bin has \d+ tensors \(base_model\.model\.model\.layers\..* no place for"),
    ):
        refused(replace(sources, comprehension=GOLDEN / other / "com_hlora_weights.bin"), output, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.pop(LAYER + ".lora_B.weight"),
            r"lack 1 tensor \(model\.language_model\.layers\.1\.mlp\.down_proj\.plugins\.comprehension\.lora_B\.weight\)",
        ),
        (lambda t: [t.pop(k) for k in list(t) if ".layers.1." in k], "lack 12 tensors"),
        (lambda t: t.update({LAYER + ".lora_C.weight": torch.zeros(2, 2)}), "1 tensor .* that no rule covers"),
        (lambda t: t.update({k.replace("s.1.", "s.2."): v for k, v in list(t.items())}), "has no place for"),
        (
            lambda t: t.update({LAYER + ".lora_A.weight": torch.zeros(16, 95)}),
            r"has the shape \[16, 95\], but .* \[16, 96\]",
        ),
        (
            lambda t: t.update({LAYER + ".lora_A.weight": torch.zeros(15, 96)}),
            r"no H-LoRA plugin: its lora_A .* \[15, 16\] rows",
        ),
        (
            lambda t: t[LAYER + ".lora_A.weight"].view(-1).__setitem__(7, torch.nan),
            "has values that are NaN or infinite",
        ),
        (
            lambda t: t[LAYER + ".lora_B.weight"].view(-1).__setitem__(7, torch.inf),
            "has values that are NaN or infinite",
        ),
        (
            lambda t: t.update({LAYER + ".lora_A.weight": torch.zeros(16, 96).int()}),
            "instead of floating point numbers",
        ),
        (lambda t: t.update({LAYER + ".lora_A.weight": "text"}), "something else than tensors"),
        (lambda t: t.clear(), "is no H-LoRA plugin"),
    ],
)
def test_spoilt_plugins(files, change, message):
    sources, output = files
    change_bin(sources.comprehension, change)
    refused(sources, output, message)


def test_values_too_large_for_the_dtype(files):
    sources, output = files
    path = sources.base / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][0] = 1e30
    save_file(tensors, path)
    refused(sources, output, r"model\.norm\.weight in .* too large for torch\.float16", dtype="float16")
    refused(sources, output, "There is no dtype 'int8'", dtype="int8")


@pytest.mark.parametrize("name", ["comprehension", "fusion", "vqgan"])
@pytest.mark.parametrize("size", [0, 10, 0.5, 0.999])
def test_truncated_files(files, name, size):
    sources, output = files
    path = getattr(sources, name)
    data = path.read_bytes()
    path.write_bytes(data[: int(size if size >= 1 else size * len(data))])
    refused(
        sources, output, "zero bytes" if size == 0 else "is no PyTorch file|cannot be read as a PyTorch checkpoint"
    )


@pytest.mark.parametrize("name", ["comprehension", "vqgan"])
def test_a_flipped_bit_in_a_pickle_is_noticed(files, name):
    sources, output = files
    path = getattr(sources, name)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    refused(sources, output, "does not have the checksum stored with it")


@pytest.mark.parametrize("size", [0, 5, 0.5, 0.999])
def test_truncated_safetensors(files, size):
    sources, output = files
    path = sources.base / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(size if size >= 1 else size * len(data))])
    refused(sources, output, "zero bytes" if size == 0 else "cannot be read as safetensors")


class Attack:
    """Pickles as a call that leaves a mark when it is carried out."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("function", [os.system, eval, exec, os.mkdir, __import__])
@pytest.mark.parametrize("name", ["comprehension", "vqgan"])
def test_pickles_that_try_to_run_code_run_none(files, tmp_path, name, function):
    sources, output = files
    mark = tmp_path / "m3" / "mark"
    argument = {os.system: f"touch {mark}", os.mkdir: str(mark), __import__: "antigravity"}.get(
        function, f"open({str(mark)!r}, 'w')"
    )
    path = getattr(sources, name)
    with torch.serialization.safe_globals([(object, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint")]):
        content = torch.load(path, weights_only=True)
    if name == "vqgan":  # beside the state, where Lightning keeps whatever it likes: inert, hence harmless
        torch.save({"state_dict": content["state_dict"], "callbacks": Attack(function, argument)}, path)
        try:
            export(sources, output)
        except CheckpointError as error:
            assert "cannot be read as a PyTorch checkpoint" in str(error)
            assert not output.exists()
    else:
        content[LAYER + ".lora_A.weight"] = Attack(function, argument)
        torch.save(content, path)
        refused(
            sources, output, "cannot be read as a PyTorch checkpoint: .*(GLOBAL|global|Global)|something else than"
        )
    assert not mark.exists()


def test_sources_that_are_missing_or_something_else(files, tmp_path):
    sources, output = files
    text = tmp_path / "m3" / "text.bin"
    text.write_text("no weights")
    yaml = tmp_path / "m3" / "other.yaml"
    yaml.write_text("model: {params: {n_embed: 3}}")
    for change, message in (
        (dict(comprehension=tmp_path / "m3" / "absent.bin"), "absent.bin does not exist"),
        (dict(comprehension=text), "is no PyTorch file"),
        (dict(base=tmp_path / "m3" / "vit"), "tokenizer_config.json does not exist"),
        (dict(vision=tmp_path / "m3" / "base"), "is not the configuration of a CLIP model"),
        (dict(vqgan_config=yaml), "lacks the entry"),
        (dict(vqgan_config=text), "text.bin cannot be used: "),
        (dict(generation=GOLDEN / "m3/fusion_layer_weights.bin"), "is no H-LoRA plugin"),
    ):
        refused(replace(sources, **change), output, message)
    (sources.base / "config.json").write_text('{"model_type": "llama"}')
    refused(sources, output, "is a llama with LlamaTokenizer; HealthGPT has bases of phi3")
    (sources.base / "config.json").write_text("{")
    refused(sources, output, "is no JSON")


@pytest.mark.parametrize(
    ("folder", "name", "change", "message"),
    [
        (
            "base",
            "config.json",
            {"num_hidden_layers": "two"},
            r"base/config\.json cannot be used: .*num_hidden_layers",
        ),
        (
            "base",
            "config.json",
            {"num_hidden_layers": 10**8},
            "phi3 configuration says 100000000 layers, but .* have 2",
        ),
        ("base", "config.json", {"model_type": []}, r"is a \[\] with LlamaTokenizer; HealthGPT has bases of"),
        ("base", "config.json", {"hidden_size": -4}, "configuration of the base, .* cannot be used: .*negative"),
        (
            "base",
            "tokenizer_config.json",
            {"added_tokens_decoder": {"one": {}}},
            "tokenizer_config.json cannot be used",
        ),
        ("base", "tokenizer_config.json", {"added_tokens_decoder": []}, "tokenizer_config.json cannot be used"),
        ("base", "tokenizer_config.json", {"bos_token": 7}, "tokenizer_config.json cannot be used"),
        ("vit", "config.json", {"model_type": "siglip", "vision_config": {}}, "not the configuration of a CLIP model"),
        ("vit", "preprocessor_config.json", {"crop_size": {"height": 99, "width": 99}}, "makes pictures of 99 pixels"),
        ("vit", "preprocessor_config.json", {"crop_size": "large"}, "preprocessor_config.json cannot be used"),
    ],
)
def test_spoilt_configurations(files, folder, name, change, message):
    sources, output = files
    path = output.parent / "m3" / folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    refused(sources, output, message)


@pytest.mark.parametrize("old, new", [("n_embed: 64", "n_embed: []"), ("n_embed: 64", "n_embed: 100000000")])
def test_spoilt_vqgan_configurations(files, old, new):
    sources, output = files
    text = sources.vqgan_config.read_text()
    assert old in text
    sources.vqgan_config.write_text(text.replace(old, new))
    refused(sources, output, "model.yaml (cannot be used: int|says 100000000 codes: the files do not belong together)")


@pytest.mark.parametrize("weight_map", [{"a": 1}, None, {"a": "../x"}, {"a": ""}, {"a": "\0"}])
def test_an_index_that_names_no_files(files, weight_map):
    sources, output = files
    (sources.base / "model.safetensors").unlink()
    (sources.base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    refused(sources, output, "model.safetensors.index.json (is no index of shards|cannot be used)")


def test_bases_with_unusual_tensors(files):
    sources, output = files
    path = sources.base / "model.safetensors"
    tensors = load_file(path)
    save_file({name: tensor.double() for name, tensor in tensors.items()}, path)
    refused(sources, output, "is stored in torch.float64: choose a dtype, one of float32, bfloat16, float16")
    assert build_plan(sources, "float32").config.dtype == torch.float32
    save_file(tensors | {"model.embed_tokens.weight": torch.tensor(1.0)}, path)
    refused(sources, output, "model.embed_tokens.weight in .* has the shape")
    settings = sources.base / "config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"tie_word_embeddings": True}))
    save_file({name: tensor for name, tensor in tensors.items() if name != "model.embed_tokens.weight"}, path)
    refused(sources, output, "lack 1 tensor|has 1 tensor")


def test_a_tensor_beside_a_state_dict(files):
    sources, output = files
    tensors = torch.load(sources.comprehension, weights_only=True)
    torch.save({"state_dict": tensors, "stray": torch.zeros(3)}, sources.comprehension)
    refused(sources, output, "com_hlora_weights.bin has tensors beside its state_dict: stray")


def test_tokenizer_settings_that_older_files_leave_out_or_spell_out(files):
    sources, _ = files
    path = sources.base / "tokenizer_config.json"
    before = build_plan(sources).processor.tokenizer
    settings = json.loads(path.read_text())
    settings["bos_token"] = {"content": settings["bos_token"], "special": True}
    del settings["model_max_length"]
    path.write_text(json.dumps(settings))
    after = build_plan(sources).processor.tokenizer
    assert after("a <|user|> b").input_ids == before("a <|user|> b").input_ids and after.bos_token == before.bos_token


def test_a_tied_base_may_store_its_head_if_it_is_the_same(files):
    sources, output = files
    config = sources.base / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "tie_word_embeddings": True}))
    refused(sources, output, r"lm_head\.weight in .* differs from the embeddings")
    path = sources.base / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, path)
    plan = export(sources, output)
    assert ("lm_head.weight", "the same as the embeddings, to which it is tied") in [
        (name, rule.reason) for name, _, rule in plan.dropped
    ]
    model = AutoModelForImageTextToText.from_pretrained(output, trust_remote_code=True)
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_the_output_folder_may_be_a_dot_or_a_link_but_not_in_a_missing_folder(files, monkeypatch):
    sources, output = files
    with pytest.raises(HealthGPTError, match=r"The folder .*b does not exist\."):
        export(sources, output.parent / "a" / "b" / "out")
    assert [path.name for path in output.parent.iterdir()] == ["m3"]
    for name in ("here", "there"):
        (output.parent / name).mkdir()
    (output.parent / "link").symlink_to(output.parent / "there")
    export(sources, output.parent / "link")
    assert (output.parent / "there/config.json").is_file() and (output.parent / "link").is_symlink()
    monkeypatch.chdir(output.parent / "here")
    export(sources, ".")
    assert (output.parent / "here/config.json").is_file()


def test_missing_shard(files, checkpoints, tmp_path):
    source = checkpoints("made_l14").source
    shutil.copytree(source, tmp_path / "m3" / "sharded")
    (tmp_path / "m3/sharded/base/model-00002-of-00002.safetensors").unlink()
    refused(sources_of(tmp_path / "m3/sharded"), tmp_path / "out", "model-00002-of-00002.safetensors does not exist")


def test_tokenizer_with_other_ids(files):
    sources, output = files
    path = sources.base / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["added_tokens_decoder"]["480"] = config["added_tokens_decoder"].pop("470")
    path.write_text(json.dumps(config))
    refused(sources, output, r"gives '<\|user\|>' the id 480, but the vocabulary leads to 470")


def test_sources_may_be_given_as_strings(tmp_path):
    m3 = GOLDEN / "xl32"
    export(ExportSources(str(m3 / "base"), str(m3 / "vit"), str(m3 / "com_hlora_weights.bin")), str(tmp_path / "out"))
    assert (tmp_path / "out/config.json").exists()


def test_a_forward_that_memory_does_not_allow_is_left_out_and_said(files, monkeypatch, caplog):
    sources, output = files
    monkeypatch.setattr(psutil, "virtual_memory", lambda: types.SimpleNamespace(available=10**6))
    export(sources, output)
    assert "No task was tried" in caplog.text and output.is_dir()
