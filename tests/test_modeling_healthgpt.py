"""The model beyond the golden numbers: batches, tasks side by side, threads, tasks added."""

import threading

import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin
from conftest import cases_of, continuation, inputs_of, sources_of, weights_of
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
)

from healthgpt import HealthGPTError, TaskConfig
from healthgpt.generation_healthgpt import TRANSFORMERS_VERSION
from healthgpt.hub_export import export
from healthgpt.modeling_healthgpt import HLoRALinear, group_by_task, route


def test_hlora_linear_is_its_equation():
    torch.manual_seed(0)
    layer = HLoRALinear(
        torch.nn.Linear(10, 7), {"a": TaskConfig("text", 6, 5.0, 3, -2), "b": TaskConfig("text", 4, 8, 2, 1)}
    )
    x = torch.randn(2, 5, 10)
    expected = []
    for row, (task, rank, alpha, n) in zip(x, [("b", 4, 8, 2), ("a", 6, 5.0, 3)], strict=True):
        plugin = layer.plugins[task]
        gates = torch.softmax(row @ plugin.lora_route.weight.T, dim=-1)
        delta = torch.zeros(5, 7)
        for i in range(n):  # the sum over experts that the two wide factors stand for
            block = slice(i * rank // n, (i + 1) * rank // n)
            expert = row @ plugin.lora_A.weight[block].T @ plugin.lora_B.weight[:, block].T
            delta += gates[:, i, None] * expert * alpha / rank * n
        expected.append(layer.base_layer(row) + delta)
    with route([("b", torch.tensor([0])), ("a", torch.tensor([1]))]):
        torch.testing.assert_close(layer(x), torch.stack(expected))
    torch.testing.assert_close(layer(x), layer.base_layer(x))


TASKS_OF_ROWS = {  # rows of one task as neighbours, and not
    "neighbours": ["a", "a", "b", "b", "b"],
    "mixed": ["a", "b", "a", "b", "b"],
    "one task": ["b"] * 5,
}


@pytest.fixture(params=TASKS_OF_ROWS.values(), ids=TASKS_OF_ROWS.keys())
def mixed_rows(request):
    """An H-LoRA linear, what it reads and the tasks of the rows."""
    torch.manual_seed(0)
    tasks = {"a": TaskConfig("text", 6, 5.0, 3, -2), "b": TaskConfig("text", 4, 8, 2, 1)}
    return HLoRALinear(torch.nn.Linear(10, 7), tasks), torch.randn(5, 3, 10), request.param


def run_rows(layer, x, tasks):
    with route(group_by_task(tasks, x.device)):
        return layer(x)


def gradients(layer, x, output):
    leaves = [x, *layer.plugins.parameters()]
    return torch.autograd.grad((output.float() ** 2).sum(), leaves, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_rows_of_mixed_batches_learn_what_they_learn_alone(mixed_rows, autocast):
    layer, x, tasks = mixed_rows
    layer.base_layer.requires_grad_(False)
    x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        together = run_rows(layer, x, tasks)
        alone = torch.cat([run_rows(layer, row, [task]) for row, task in zip(x.split(1), tasks, strict=True)])
    assert together.dtype == (torch.bfloat16 if autocast else torch.float32)
    tolerance = dict(atol=0.05, rtol=0.05) if autocast else {}
    torch.testing.assert_close(together, alone, **tolerance)
    assert not torch.allclose(together, layer.base_layer(x).to(together.dtype), atol=0.1)
    for ours, expected in zip(gradients(layer, x, together), gradients(layer, x, alone), strict=True):
        torch.testing.assert_close(ours, expected, **tolerance)


def test_a_base_in_another_dtype_than_its_plugins(mixed_rows):
    layer, x, tasks = mixed_rows
    expected = run_rows(layer, x, tasks)

    class Widened(torch.nn.Linear):  # gives float32 under autocast, as bitsandbytes' linears do
        def forward(self, x):
            return super().forward(x).float()

    layer.base_layer.__class__ = Widened
    with torch.autocast("cpu", torch.bfloat16):
        output = run_rows(layer, x, tasks)
    assert output.dtype == torch.float32
    torch.testing.assert_close(output, expected, atol=0.05, rtol=0.05)


def test_compiled_rows_of_mixed_batches(mixed_rows):
    layer, x, tasks = mixed_rows
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    with route(group_by_task(tasks, x.device)):
        torch.testing.assert_close(compiled(x), layer(x))
    x.requires_grad_()
    for ours, expected in zip(
        gradients(layer, x, run_rows(compiled, x, tasks)), gradients(layer, x, run_rows(layer, x, tasks)), strict=True
    ):
        torch.testing.assert_close(ours, expected)


def test_dropout_zeroes_inputs_of_a_alone():
    torch.manual_seed(0)
    layer = HLoRALinear(torch.nn.Linear(10, 7), {"a": TaskConfig("text", 6, 5.0, 3, -2, dropout=0.5)})
    x = torch.randn(4, 3, 10)
    plugin = layer.plugins["a"]
    torch.manual_seed(1)
    output = run_rows(layer, x, ["a"] * 4)
    torch.manual_seed(1)
    tokens = x.flatten(0, 1)
    dropped = torch.nn.functional.dropout(tokens, 0.5)
    gates = (tokens @ plugin.lora_route.weight.T).softmax(-1).repeat_interleave(2, dim=-1)
    added = 5.0 / 6 * 3 * (gates * (dropped @ plugin.lora_A.weight.T)) @ plugin.lora_B.weight.T
    torch.testing.assert_close(output, layer.base_layer(x) + added.view(4, 3, 7))
    layer.eval()
    assert torch.equal(run_rows(layer, x, ["a"] * 4), run_rows(layer, x, ["a"] * 4))
    assert not torch.allclose(run_rows(layer, x, ["a"] * 4), output)


@pytest.mark.parametrize("name", ["m3", "l14", "xl32", "made_m3"])
def test_padded_batch_gives_each_row_what_it_gives_alone(name, checkpoints):
    checkpoint = checkpoints(name)
    model = AutoModelForImageTextToText.from_pretrained(checkpoint.folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(checkpoint.folder, trust_remote_code=True)
    for task in model.config.tasks:
        cases = [case for case in checkpoint.cases if case["task"] == task]
        inputs = inputs_of(processor, cases)
        assert (inputs["attention_mask"] == 0).any()
        sequences = model.generate(**inputs, task=task, max_new_tokens=cases[0]["max_new_tokens"])
        for sequence, case in zip(sequences, cases, strict=True):
            assert continuation(sequence, inputs["input_ids"].shape[1], case) == case["generated_ids"]


def test_rows_of_one_batch_run_with_their_own_tasks(m3):
    checkpoint, model, processor = m3
    cases = [checkpoint.cases[index] for index in (4, 0, 6, 3, 5, 2)]
    tasks = [case["task"] for case in cases]
    assert len(set(tasks)) == 2
    inputs = inputs_of(processor, cases)
    with torch.no_grad():
        logits = model(**inputs, task=tasks).logits
    for row, mask, case in zip(logits, inputs["attention_mask"], cases, strict=True):
        expected = checkpoint.expected[case["name"] + "/logits"]
        torch.testing.assert_close(row[mask.bool()], expected, atol=1e-4, rtol=0)

    sequences = model.generate(**inputs, task=tasks, max_new_tokens=24)
    length = inputs["input_ids"].shape[1]
    assert sequences.shape[1] == length + model.config.num_image_codes
    for sequence, case in zip(sequences, cases, strict=True):
        assert continuation(sequence, length, case) == case["generated_ids"]
        rest = sequence[length:][len(case["generated_ids"]) :]
        assert (rest == model.generation_config.pad_token_id).all()
    drawing = torch.tensor([task == "generation" for task in tasks])
    expected = [checkpoint.expected[case["name"] + "/decoded"][0] for case in cases if case["task"] == "generation"]
    pixels = model.decode_image_tokens(sequences[drawing])
    torch.testing.assert_close(pixels, torch.stack(expected).clamp(-1, 1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("offloaded_bytes", [10**6, None])
def test_offloaded_parts_do_what_they_do_in_memory(m3, checkpoints, tmp_path, offloaded_bytes):
    """On the disk lie the last million bytes, the VQGAN among them, or everything."""
    checkpoint, model, processor = m3
    memory = 0 if offloaded_bytes is None else model.get_memory_footprint() - offloaded_bytes
    offloaded = AutoModelForImageTextToText.from_pretrained(
        checkpoint.folder,
        trust_remote_code=True,
        device_map="auto",
        max_memory={"cpu": memory},
        offload_folder=tmp_path / "offloaded",
    )
    assert offloaded.model.vqgan.quantize.embed.weight.is_meta
    assert offloaded.get_input_embeddings().weight.is_meta == (offloaded_bytes is None)
    for case in checkpoint.cases:
        inputs = inputs_of(processor, case)
        sequences = offloaded.generate(**inputs, task=case["task"], max_new_tokens=case["max_new_tokens"])
        assert sequences[0, inputs["input_ids"].shape[1] :].tolist() == case["generated_ids"]
        if case["task"] == "generation":
            pixels = model.decode_image_tokens(sequences)
            assert torch.equal(offloaded.decode_image_tokens(sequences), pixels)
            assert torch.equal(offloaded.encode_image(pixels), model.encode_image(pixels))
    offloaded.save_pretrained(tmp_path / "again")
    before, after = weights_of(checkpoint.folder), weights_of(tmp_path / "again")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("stored, asked", [("bfloat16", "float16"), ("bfloat16", "float32"), ("float32", "bfloat16")])
def test_a_checkpoint_of_one_dtype_loads_in_another(checkpoints, tmp_path, stored, asked):
    export(sources_of(checkpoints("m3").source), tmp_path / "stored", stored)
    whole = weights_of(tmp_path / "stored")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "stored", trust_remote_code=True, dtype=asked)
    model.save_pretrained(tmp_path / "again")
    again = weights_of(tmp_path / "again")
    assert again.keys() == whole.keys()
    assert all(torch.equal(again[name], whole[name].to(getattr(torch, asked))) for name in whole)
    if asked != "float16":  # which some processors cannot multiply
        picture = model.generate(torch.tensor([[1, 2, 3]]), task="generation")
        assert model.decode_image_tokens(picture).isfinite().all()


def test_the_mode_names_the_task_in_forward_too(m3):
    _, model, _ = m3
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        expected = model(ids, task="generation").logits
        assert torch.equal(model(ids, generation_mode="image").logits, expected)
        assert not torch.equal(model(ids, task=None).logits, expected)
        hidden = model.model(ids, generation_mode="image").last_hidden_state
        assert torch.equal(model.token_heads["generation"](hidden), expected)


def test_two_threads_generate_with_different_tasks(m3):
    checkpoint, model, processor = m3
    cases = [*cases_of(checkpoint, "comprehension/0", "generation/0", "comprehension/2", "generation/2")]
    inputs = [inputs_of(processor, case) for case in cases]
    results = {}
    barrier = threading.Barrier(len(cases))

    def run(index):
        case = cases[index]
        barrier.wait()
        results[index] = [model.generate(**inputs[index], task=case["task"], max_new_tokens=24) for _ in range(3)]

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(cases))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    for index, case in enumerate(cases):
        for sequences in results[index]:
            assert sequences[0, inputs[index]["input_ids"].shape[1] :].tolist() == case["generated_ids"]


def test_gradient_checkpointing_gives_the_same_gradients_for_mixed_tasks(m3):
    checkpoint, model, processor = m3
    cases = cases_of(checkpoint, "comprehension/0", "generation/0")
    inputs = inputs_of(processor, cases)
    plugins = {name: tensor for name, tensor in model.named_parameters() if ".plugins." in name}

    def gradients():
        model.zero_grad()
        labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == model.config.image_token_id, -100)
        model(**inputs, labels=labels, task=["comprehension", "generation"]).loss.backward()
        return {name: tensor.grad.clone() for name, tensor in plugins.items()}

    expected = gradients()
    assert all(gradient.abs().sum() > 0 for gradient in expected.values())
    model.requires_grad_(False)
    for tensor in plugins.values():
        tensor.requires_grad_(True)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        for name, gradient in gradients().items():
            torch.testing.assert_close(gradient, expected[name], msg=name)
    finally:
        model.gradient_checkpointing_disable()
        model.eval()
        model.requires_grad_(True)


def test_only_the_parts_asked_for_learn(m3):
    checkpoint, model, processor = m3
    inputs = inputs_of(processor, checkpoint.cases[0])
    model.requires_grad_(False)
    model.model.projectors["comprehension"].requires_grad_(True)
    model.zero_grad(set_to_none=True)
    model(**inputs, labels=inputs["input_ids"].masked_fill(inputs["input_ids"] == 538, -100)).loss.backward()
    learnt = {name for name, tensor in model.named_parameters() if tensor.grad is not None}
    model.requires_grad_(True)
    assert learnt == {
        f"model.projectors.comprehension.{part}" for part in ("0.weight", "0.bias", "2.weight", "2.bias")
    }


def test_fresh_plugins_leave_the_base_as_it_is(m3):
    _, model, _ = m3
    torch.manual_seed(0)
    fresh = type(model)(model.config)
    plugins = [module for module in fresh.modules() if type(module).__name__ == "HLoRA"]
    assert len(plugins) == 2 * 2 * 4
    for module in plugins:
        bound = (1 / module.lora_A.in_features) ** 0.5
        assert module.lora_B.weight.abs().max() == 0
        assert 0.5 * bound < module.lora_A.weight.abs().max() <= bound
        assert 0.5 * bound < module.lora_route.weight.abs().max() <= bound


def test_what_cannot_be_done_is_said(m3, checkpoints):
    checkpoint, model, processor = m3
    inputs = inputs_of(processor, checkpoint.cases[0])
    l14 = AutoModelForImageTextToText.from_pretrained(checkpoints("l14").folder, trust_remote_code=True)
    ids = torch.tensor([[1, 2, 3]])
    with pytest.raises(ValueError, match="has no task 'segmentation'; it has comprehension, generation"):
        model.generate(**inputs, task="segmentation")
    with pytest.raises(ValueError, match="has no task 'generation'; it has comprehension"):
        l14.generate(ids, generation_mode="image")
    with pytest.raises(ValueError, match="has no task 'generation'; it has comprehension"):
        l14(ids, task="generation")
    with pytest.raises(ValueError, match="has no VQGAN"):
        l14.decode_image_tokens(ids)
    with pytest.raises(ValueError, match="has no VQGAN"):
        l14.encode_image(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match="2 tasks for a batch of 1 rows"):
        model(ids, task=["comprehension", "generation"])
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="2 tasks for a batch of 4 rows"):
            call(ids.repeat(4, 1), task=["comprehension", "generation"])
    with pytest.raises(ValueError, match="has no task 3; it has comprehension, generation"):
        model(ids, task=3)
    for nothing in (ids[:, :0], ids[:0], ids[0]):
        with pytest.raises(ValueError, match=r"needs a prompt: input_ids \(batch, length\)"):
            model.generate(nothing)
    with pytest.raises(ValueError, match=r"reads pictures of shape \(batch, 3, 32, 32\), got \(1, 3, 64, 32\)"):
        model.encode_image(torch.zeros(1, 3, 64, 32))
    with pytest.raises(ValueError, match="generation_mode is 'text' or 'image', got 'audio'"):
        model.generate(ids, generation_mode="audio")
    with pytest.raises(ValueError, match="means task 'generation', but task='comprehension'"):
        model.generate(ids, generation_mode="image", task="comprehension")
    with pytest.raises(ValueError, match="16 image positions, but 2 images of 16 patches"):
        model(inputs["input_ids"], inputs["pixel_values"].repeat(2, 1, 1, 1))
    drawing = inputs_of(processor, checkpoint.cases[4])
    with pytest.raises(ValueError, match="ends with <start_index>, as prompts for drawing do, but its task answers"):
        model.generate(**drawing, task="comprehension")
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="16 image positions, but 0 images of 16 patches"):
            call(inputs["input_ids"])
    with pytest.raises(ValueError, match="The labels hold the id of <image>"):
        model(**inputs, labels=inputs["input_ids"])
    with pytest.raises(ValueError, match="forced_eos_token_id would take the place of a picture's last code"):
        model.generate(**drawing, task="generation", forced_eos_token_id=2)
    with pytest.raises(ValueError, match="guidance_scale is not supported"):
        model.generate(ids, guidance_scale=3.0)
    with pytest.raises(ValueError, match=r"4096 tokens and needs room for 1 more, .* window is 4096"):
        model.generate(torch.ones(1, 4096, dtype=torch.long))
    with pytest.raises(ValueError, match=r"4050 tokens and needs room for 64 more"):
        model.generate(torch.full((1, 4050), model.config.image_start_token_id), task="generation")
    with pytest.raises(ValueError, match="needs a prompt"):
        model.generate(task="comprehension")
    with pytest.raises(ValueError, match="Give either input_ids or inputs_embeds"):
        model()


def test_a_task_added_to_a_loaded_model(checkpoints, tmp_path):
    """Its weights start as the class says, or as those of another task; the model saves and loads with it."""
    folder = checkpoints("m3").folder
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    settings = {"kind": "image", "rank": 32, "alpha": 64, "num_experts": 4, "vision_layer": 1}
    model.add_task("fresh", settings)
    model.add_task("copied", settings | {"token_tables": "generation"}, init_from="generation")
    inputs = {"input_ids": torch.tensor([[1, 5, 9]])}
    linear = model.model.language_model.layers[0].mlp.down_proj
    states = torch.randn(2, 3, linear.base_layer.in_features)
    assert linear.plugins["fresh"](states).abs().max() == 0
    bound = linear.base_layer.in_features**-0.5
    for weight in (linear.plugins["fresh"].lora_A.weight, linear.plugins["fresh"].lora_route.weight):
        assert 0.8 * bound < weight.abs().max() <= bound  # Kaiming-uniform with a = sqrt 5
    with torch.no_grad():
        expected = model(**inputs, task="generation").logits
        assert torch.equal(model(**inputs, task="copied").logits, expected)
        model.save_pretrained(tmp_path)
        again = AutoModelForImageTextToText.from_pretrained(tmp_path, trust_remote_code=True)
        assert torch.equal(again(**inputs, task="copied").logits, expected)
        assert torch.equal(again(**inputs, task="fresh").logits, model(**inputs, task="fresh").logits)

    for call, message in (
        (lambda: model.add_task("fresh", settings), "There is a task 'fresh' already"),
        (lambda: model.add_task("other", settings, "nothing"), "no task 'nothing' to start from; there are"),
        (lambda: model.add_task("other", settings, "comprehension"), "has rank 16 and 4 experts; to start from it"),
        (lambda: model.add_task("Other", settings), "A task's name is made of small letters"),
        (lambda: model.add_task(5, settings), "A task's name is made of small letters"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert "other" not in model.config.tasks


def test_token_tables_shared_by_tasks(checkpoints, tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(checkpoints("m3").folder, trust_remote_code=True)
    inputs = {"input_ids": torch.tensor([[1, 5, 9]])}
    with torch.no_grad():
        expected = model(**inputs, task="comprehension").logits
        model.use_token_tables("fusion", ["comprehension", "generation"])
        assert model.config.token_tables == ["fusion"] == list(model.token_heads)
        assert torch.equal(model(**inputs, task="comprehension").logits, expected)
        model.token_heads["fusion"].weight += 1
        assert not torch.equal(model(**inputs, task="comprehension").logits, expected)
        model.use_token_tables(None, ["comprehension", "generation"])
        assert torch.equal(model(**inputs, task="comprehension").logits, expected)
        model.save_pretrained(tmp_path)
    AutoModelForImageTextToText.from_pretrained(tmp_path, trust_remote_code=True)


@pytest.mark.parametrize(("rows", "multiple"), [(None, None), (None, 64), (7, 128)], ids=["idiom", "pad", "both"])
@pytest.mark.parametrize("name", ["m3", "made_m3"])
def test_all_token_tables_are_resized_together(name, rows, multiple, load, checkpoints, tmp_path):
    model, processor = load(name)
    checkpoint = checkpoints(name)
    before = model.config.text_config.vocab_size
    rows = None if (rows, multiple) == (None, 64) else len(processor.tokenizer) + (rows or 0)
    embeddings = model.resize_token_embeddings(rows, pad_to_multiple_of=multiple)
    rows = before if rows is None else rows
    rows = rows if multiple is None else -(-rows // multiple) * multiple
    assert rows > model.config.image_token_id >= before, "the id of <image> gets a row"
    sizes = {embeddings.num_embeddings, model.config.text_config.vocab_size, model.lm_head.out_features}
    sizes |= {table.num_embeddings for table in model.model.token_embeddings.values()}
    assert sizes | {head.out_features for head in model.token_heads.values()} == {rows}
    with torch.no_grad():  # a head that likes <image> best
        for head in (model.lm_head, *model.token_heads.values()):
            head.weight[model.config.image_token_id] = head.weight.abs().max() * 100
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    cases = [next(case for case in checkpoint.cases if case["task"] == task) for task in model.config.tasks]
    inputs = inputs_of(processor, cases)
    tasks = [case["task"] for case in cases]
    sequences = again.generate(**inputs, task=tasks, max_new_tokens=cases[0]["max_new_tokens"])
    drawing = tasks.index("generation")
    assert (
        continuation(sequences[drawing], inputs["input_ids"].shape[1], cases[drawing])
        == cases[drawing]["generated_ids"]
    )
    assert (sequences[:, inputs["input_ids"].shape[1] :] != model.config.image_token_id).all()
    for row, case in zip(sequences, cases, strict=True):
        assert continuation(row, inputs["input_ids"].shape[1], case) == case["generated_ids"]


def test_tables_keep_the_rows_of_image_codes(load):
    model, _ = load("m3")
    end = model.config.image_code_offset + model.config.vqgan_config.num_codes
    before = model.config.text_config.vocab_size
    with pytest.raises(HealthGPTError, match=f"at least {end} "):
        model.resize_token_embeddings(end - 1)
    assert model.config.text_config.vocab_size == model.lm_head.out_features == before
    model.resize_token_embeddings(end)
    assert model.generate(torch.tensor([[1, 2, 3]]), task="generation").max() < end


@pytest.mark.parametrize("rows", [0, -3, 300.5])
def test_numbers_of_rows_that_mean_nothing_are_refused(rows, checkpoints):
    for name in ("l14", "xl32"):
        model = AutoModelForImageTextToText.from_pretrained(checkpoints(name).folder)
        before = model.config.text_config.vocab_size
        with pytest.raises(HealthGPTError, match=str(rows)):
            model.resize_token_embeddings(rows)
        if model.config.image_code_offset is not None:  # there are image codes, although nothing here draws them
            with pytest.raises(HealthGPTError, match="10"):
                model.resize_token_embeddings(10)
        assert model.config.text_config.vocab_size == model.lm_head.out_features == before


@pytest.mark.parametrize("name", ["keys", "pop", "forward", "type", "training"])
def test_names_that_modules_have_a_use_for_are_refused(name, load):
    model, _ = load("m3")
    settings = {"kind": "text", "rank": 4, "alpha": 8, "num_experts": 2, "vision_layer": -2}
    with pytest.raises(HealthGPTError, match=name):
        model.add_task(name, settings)
    with pytest.raises(HealthGPTError, match=name):
        model.add_task("fresh", settings | {"token_tables": name})
    assert list(model.config.tasks) == ["comprehension", "generation"]


def test_outputs_carry_the_features_of_the_images(m3):
    checkpoint, model, processor = m3
    case = checkpoint.cases[0]
    inputs = inputs_of(processor, case)
    with torch.no_grad():
        outputs = model(**inputs, output_hidden_states=True)
        alone = model.get_image_features(inputs["pixel_values"])
        states = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states
        as_tuple = model.get_image_features(inputs["pixel_values"], return_dict=False)
        assert model(inputs["input_ids"][:, :1] * 0 + 1).image_outputs is None
    expected = checkpoint.expected[case["name"] + "/projected"]
    torch.testing.assert_close(outputs.image_outputs.pooler_output, expected, atol=1e-5, rtol=0)
    assert torch.equal(alone.pooler_output, outputs.image_outputs.pooler_output) and alone.hidden_states is None
    assert isinstance(as_tuple, tuple) and torch.equal(as_tuple[1], alone.pooler_output)
    assert len(outputs.image_outputs.hidden_states) == model.config.vision_config.num_hidden_layers + 1
    for state, own in zip(states, outputs.image_outputs.hidden_states, strict=True):
        assert torch.equal(state, own)
    torch.testing.assert_close(states[-2][:, 1:], alone.last_hidden_state)
    model.set_attn_implementation("eager")
    attentions = model.get_image_features(inputs["pixel_values"], output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    assert len(attentions) == model.config.vision_config.num_hidden_layers
    torch.testing.assert_close(attentions[0].sum(-1), torch.ones_like(attentions[0].sum(-1)))


def test_layers_compiled_before_a_task_is_given_run_with_it(m3):
    """A thread's first call decides nothing: compiled without a task, a layer has its plugin when one comes."""
    _, model, _ = m3
    layer = model.model.language_model.layers[0].mlp.down_proj
    states = torch.randn(1, 3, layer.base_layer.in_features)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(states), layer.base_layer(states))
        for task in model.config.tasks:
            with route([(task, None)]):
                expected = layer(states)
                assert not torch.equal(expected, layer.base_layer(states))
                assert torch.equal(compiled(states), expected)


def test_a_compiled_forward_refuses_surplus_images(checkpoints, load):
    checkpoint = checkpoints("m3")
    model, processor = load("m3")
    with torch.no_grad():
        model(torch.tensor([[1, 2, 3]]), output_hidden_states=True)  # installs hooks of transformers that stay
    inputs = inputs_of(processor, checkpoint.cases[0])
    torch._dynamo.reset()
    compiled = torch.compile(model.forward, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits)
        for images in (inputs["pixel_values"].repeat(2, 1, 1, 1), None):
            with pytest.raises((RuntimeError, ValueError), match="image positions"):
                compiled(inputs["input_ids"], images)


def test_every_class_that_must_not_be_split_is_there(m3, checkpoints):
    """FSDP's `transformer_based_wrap` looks for each of them."""
    _, model, _ = m3
    l14 = AutoModelForImageTextToText.from_pretrained(checkpoints("l14").folder)
    for loaded, drawing in ((model, {"HealthGPTVQGAN"}), (l14, set())):
        present = {type(module).__name__ for module in loaded.modules()}
        assert loaded._no_split_modules <= present
        assert {"Phi3DecoderLayer", "CLIPEncoderLayer"} | drawing <= loaded._no_split_modules
        plugin = FullyShardedDataParallelPlugin(
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=list(loaded._no_split_modules),
        )
        plugin.set_auto_wrap_policy(loaded)


@pytest.mark.skipif(TRANSFORMERS_VERSION < (5, 24), reason="until 5.24 past_key_values is the name")
def test_a_cache_by_its_old_name_is_the_librarys_deprecation(m3):
    _, model, _ = m3
    ids = torch.tensor([[1, 5, 9, 4]])
    with torch.no_grad():
        expected = model(ids).logits[:, -1:]
        for call in (model, model.model):
            cache = call(ids[:, :3], use_cache=True).cache
            with pytest.warns(FutureWarning, match="past_key_values"):
                outputs = call(ids[:, 3:], past_key_values=cache)
            assert outputs.cache is cache and cache.get_seq_length() == 4
        cache = model(ids[:, :3], use_cache=True).cache
        torch.testing.assert_close(model(ids[:, 3:], cache=cache).logits, expected)


def test_embeddings_in_place_of_ids(m3):
    checkpoint, model, processor = m3
    case = checkpoint.cases[0]
    inputs = inputs_of(processor, case)
    ids, pixels = inputs["input_ids"], inputs["pixel_values"]
    embeddings = model.model.embed_tokens(ids, ["comprehension"])
    for call in (
        lambda: model(inputs_embeds=embeddings, pixel_values=pixels),
        lambda: model.generate(inputs_embeds=embeddings, pixel_values=pixels),
        lambda: model.generate(ids, inputs_embeds=embeddings, pixel_values=pixels),
    ):
        with pytest.raises(HealthGPTError, match=r"pixel_values .*inputs_embeds"):
            call()
    # with the images' features in them, embeddings are prompts like others
    features = model.get_image_features(pixels).pooler_output
    whole = embeddings.masked_scatter((ids == model.config.image_token_id).unsqueeze(-1), features)
    options = {"max_new_tokens": case["max_new_tokens"], "attention_mask": inputs["attention_mask"]}
    assert model.generate(inputs_embeds=whole, **options)[0].tolist() == case["generated_ids"]
    both = model.generate(ids, inputs_embeds=whole, **options)
    assert both[0, : ids.shape[1]].tolist() == ids[0].tolist()
    assert both[0, ids.shape[1] :].tolist() == case["generated_ids"]
    with pytest.raises(HealthGPTError, match=r"\(1, 3\) .*\(1, 2, 64\)"):
        model.generate(ids[:, :3], inputs_embeds=whole[:, :2])
    with pytest.raises(HealthGPTError, match="end with <start_index>"):
        model.generate(ids, inputs_embeds=whole, task="generation")
