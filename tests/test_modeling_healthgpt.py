"""The model beyond the golden numbers: batches, tasks side by side, threads, transformers' ways of generating."""

import copy
import threading

import pytest
import torch
from conftest import inputs_of
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TextIteratorStreamer,
)

from healthgpt import TaskConfig
from healthgpt.modeling_healthgpt import TRANSFORMERS_VERSION, HLoRALinear, route

old_transformers = pytest.mark.skipif(
    TRANSFORMERS_VERSION < (5, 18), reason="transformers before 5.18 cannot look up ids past the token tables"
)


def continuation(sequences, prompt_length, case):
    """The ids that one row wrote, without what follows its end in a batch."""
    return sequences[prompt_length:][: len(case["generated_ids"])].tolist()


def cases_of(checkpoint, *names):
    return [next(case for case in checkpoint.cases if case["name"] == name) for name in names]


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


def test_text_rows_of_a_mixed_batch_stop_at_their_own_limit(m3):
    checkpoint, model, processor = m3
    cases = [checkpoint.cases[0], checkpoint.cases[4]]
    inputs = inputs_of(processor, cases)
    length = inputs["input_ids"].shape[1]
    for limit in (
        {"max_new_tokens": 3},
        {"max_length": length + 3},
        {"generation_config": GenerationConfig(max_new_tokens=3)},
    ):
        sequences = model.generate(**inputs, task=["comprehension", "generation"], **limit)
        assert sequences[0, length:].tolist()[:3] == cases[0]["generated_ids"][:3]
        assert (sequences[0, length + 3 :] == model.generation_config.pad_token_id).all()
        assert sequences[1, length:].tolist() == cases[1]["generated_ids"]
        answers = model.generate(**inputs_of(processor, cases[:1] * 2), **limit)
        assert answers.shape[1] == (length if "max_length" in limit else inputs_length(processor, cases[0])) + 3


def inputs_length(processor, case):
    return inputs_of(processor, case)["input_ids"].shape[1]


def test_text_rows_of_a_mixed_batch_keep_their_least_length(m3):
    checkpoint, model, processor = m3
    cases = [checkpoint.cases[0], checkpoint.cases[4]]
    inputs = inputs_of(processor, cases)
    length = inputs["input_ids"].shape[1]
    third = cases[0]["generated_ids"][2]  # would end the answer if it may
    for least, ended in (({}, True), ({"min_new_tokens": 9}, False), ({"min_length": length + 9}, False)):
        sequences = model.generate(
            **inputs, task=["comprehension", "generation"], max_new_tokens=20, eos_token_id=third, **least
        )
        assert (third in sequences[0, length : length + 9]) is ended
        assert sequences[1, length:].tolist() == cases[1]["generated_ids"]


def test_embedded_prompts_of_a_mixed_batch(m3):
    checkpoint, model, processor = m3
    cases = cases_of(checkpoint, "comprehension/2", "generation/2")
    tasks = [case["task"] for case in cases]
    inputs = inputs_of(processor, cases)
    embeds = model.model.embed_tokens(inputs["input_ids"], tasks)
    new = model.generate(inputs_embeds=embeds, attention_mask=inputs["attention_mask"], task=tasks, max_new_tokens=3)
    assert new[0].tolist()[:3] == cases[0]["generated_ids"][:3]
    assert (new[0, 3:] == model.generation_config.pad_token_id).all()
    assert new[1].tolist() == cases[1]["generated_ids"]


@pytest.mark.parametrize("with_pictures", [True, False])
def test_a_kept_cache_with_pictures_is_continued(m3, with_pictures):
    checkpoint, model, processor = m3
    cases = cases_of(checkpoint, "comprehension/two_pictures", "comprehension/2")
    inputs = inputs_of(processor, cases)
    first = model.generate(**inputs, max_new_tokens=4, return_dict_in_generate=True, use_cache=True)
    more = torch.cat([first.sequences, torch.tensor([[7, 8, 9], [9, 8, 7]])], dim=1)
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, more.shape[1] - inputs["input_ids"].shape[1])], dim=1)
    pictures = {"pixel_values": inputs["pixel_values"]}
    whole = model.generate(more, attention_mask=mask, max_new_tokens=6, **pictures)
    continued = model.generate(
        more,
        attention_mask=mask,
        max_new_tokens=6,
        past_key_values=first.past_key_values,
        **(pictures if with_pictures else {}),
    )
    assert torch.equal(continued, whole)


def test_a_new_picture_is_added_to_a_kept_cache(m3):
    checkpoint, model, processor = m3
    inputs = inputs_of(processor, cases_of(checkpoint, "comprehension/two_pictures"))
    ids, pixels = inputs["input_ids"], inputs["pixel_values"]
    whole = model.generate(ids, pixel_values=pixels, max_new_tokens=6)
    between = int((ids[0] == model.config.image_token_id).nonzero()[model.config.num_image_patches])
    for pictures, message in ((pixels, None), (None, "16 picture positions, but 0 pictures")):
        cache = model(ids[:, :between], pixel_values=pixels[:1], use_cache=True).past_key_values
        if message is None:
            assert torch.equal(
                model.generate(ids, pixel_values=pictures, past_key_values=cache, max_new_tokens=6), whole
            )
        else:
            with pytest.raises(ValueError, match=message):
                model.generate(ids, past_key_values=cache)
    cache = model(ids[:, :between], pixel_values=pixels[:1], use_cache=True).past_key_values
    cache.crop(-(between - int((ids[0] == model.config.image_token_id).nonzero()[3])))
    with pytest.raises(ValueError, match="The cache ends within a picture"):
        model.generate(ids, pixel_values=pixels, past_key_values=cache)


def test_rows_that_continue_a_cache_are_not_moved(m3):
    checkpoint, model, processor = m3
    cases, tasks = [checkpoint.cases[0], checkpoint.cases[4]], ["comprehension", "generation"]
    inputs = inputs_of(processor, cases)
    first = model.generate(**inputs, task=tasks, min_new_tokens=64, return_dict_in_generate=True)
    start = model.config.image_start_token_id
    for ends in (torch.tensor([[7, 8], [9, start]]), torch.tensor([[7, 8], [9, 8]])):
        more = torch.cat([first.sequences, ends], dim=1)
        mask = torch.cat(
            [inputs["attention_mask"], torch.ones(2, more.shape[1] - inputs["input_ids"].shape[1])], dim=1
        )
        call = dict(attention_mask=mask, task=tasks, max_new_tokens=6)
        if ends[1, 1] == start:
            whole = model.generate(more, pixel_values=inputs["pixel_values"], **call)
            cache = copy.deepcopy(first.past_key_values)
            assert torch.equal(model.generate(more, past_key_values=cache, **call), whole)
        else:
            with pytest.raises(ValueError, match="Rows that continue a cache cannot be moved"):
                model.generate(more, past_key_values=first.past_key_values, **call)


def test_offloaded_parts_draw_and_read_pictures(m3, checkpoints, tmp_path):
    checkpoint, model, processor = m3
    offloaded = AutoModelForImageTextToText.from_pretrained(
        checkpoint.folder,
        trust_remote_code=True,
        device_map="auto",
        max_memory={"cpu": model.get_memory_footprint() - 10**6},
        offload_folder=tmp_path,
    )
    assert offloaded.model.vqgan.quantize.embed.weight.is_meta
    inputs = inputs_of(processor, checkpoint.cases[4])
    sequences = offloaded.generate(**inputs, task="generation")
    pixels = model.decode_image_tokens(sequences)
    assert torch.equal(offloaded.decode_image_tokens(sequences), pixels)
    assert torch.equal(offloaded.encode_image(pixels), model.encode_image(pixels))


def test_the_mode_names_the_task_in_forward_too(m3):
    _, model, _ = m3
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        expected = model(ids, task="generation").logits
        assert torch.equal(model(ids, generation_mode="image").logits, expected)
        assert not torch.equal(model(ids, task=None).logits, expected)
        hidden = model.model(ids, generation_mode="image").last_hidden_state
        assert torch.equal(model.token_heads["generation"](hidden), expected)


def test_an_answer_never_holds_the_picture_placeholder(checkpoints):
    folder = checkpoints("xl32").folder
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    placeholder = model.config.image_token_id
    assert placeholder < model.lm_head.out_features
    with torch.no_grad():  # a head that likes the placeholder best
        model.lm_head.weight[placeholder] = 100 * model.model(torch.tensor([[1, 2, 3]])).last_hidden_state[0, -1]
        assert model(torch.tensor([[1, 2, 3]])).logits[0, -1].argmax() == placeholder
    for use_cache in (True, False):
        sequences = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, use_cache=use_cache)
        assert (sequences != placeholder).all()


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


@pytest.mark.parametrize(
    "options",
    [
        {"use_cache": False},
        {"cache_implementation": "static"},
        pytest.param({"prompt_lookup_num_tokens": 3}, marks=old_transformers),
        {"num_beams": 1, "num_return_sequences": 1, "return_dict_in_generate": True, "output_scores": True},
        {"attn_implementation": "eager"},
    ],
    ids=["no_cache", "static_cache", "prompt_lookup", "dict", "eager"],
)
@pytest.mark.parametrize("name", ["comprehension/0", "comprehension/two_pictures", "generation/1"])
def test_ways_of_generating_agree(name, options, m3):
    checkpoint, model, processor = m3
    [case] = cases_of(checkpoint, name)
    inputs = inputs_of(processor, case)
    options = dict(options)
    attention = options.pop("attn_implementation", model.config._attn_implementation)
    before = model.config._attn_implementation
    model.set_attn_implementation(attention)
    try:
        outputs = model.generate(**inputs, task=case["task"], max_new_tokens=24, **options)
    finally:
        model.set_attn_implementation(before)
    sequences = outputs if isinstance(outputs, torch.Tensor) else outputs.sequences
    assert sequences[0, inputs["input_ids"].shape[1] :].tolist() == case["generated_ids"]


def test_compiled_and_assisted_decoding_agree(m3):
    checkpoint, _, processor = m3
    model, assistant = (
        AutoModelForImageTextToText.from_pretrained(checkpoint.folder, trust_remote_code=True) for _ in range(2)
    )
    cases = cases_of(checkpoint, "comprehension/0", "generation/0", "generation/2")
    for way in ({"assistant_model": assistant}, {"cache_implementation": "static"}):
        if "assistant_model" not in way:
            model.forward = torch.compile(model.forward, fullgraph=True, backend="eager")
        for case in cases:
            inputs = inputs_of(processor, case)
            sequences = model.generate(**inputs, task=case["task"], max_new_tokens=24, **way)
            assert sequences[0, inputs["input_ids"].shape[1] :].tolist() == case["generated_ids"]


def test_several_sequences_per_row_keep_their_pictures_and_tasks(m3):
    checkpoint, model, processor = m3
    cases = cases_of(checkpoint, "comprehension/two_pictures", "generation/0", "comprehension/2")
    inputs = inputs_of(processor, cases)
    torch.manual_seed(0)
    sequences = model.generate(
        **inputs,
        task=[case["task"] for case in cases],
        max_new_tokens=8,
        num_return_sequences=2,
        do_sample=True,
        top_k=1,
    )
    assert len(sequences) == 6
    for index, sequence in enumerate(sequences):
        case, length = cases[index // 2], inputs["input_ids"].shape[1]
        limit = model.config.num_image_codes if case["task"] == "generation" else 8
        assert continuation(sequence, length, case)[:limit] == case["generated_ids"][:limit]


def test_beam_search_draws_whole_pictures(m3):
    checkpoint, model, processor = m3
    cases = cases_of(checkpoint, "generation/0", "generation/2")
    inputs = inputs_of(processor, cases)
    sequences = model.generate(**inputs, task="generation", num_beams=3)
    assert model.decode_image_tokens(sequences).shape == (2, 3, 32, 32)
    mixed = [*cases[:1], *cases_of(checkpoint, "comprehension/0")]
    with pytest.raises(ValueError, match="Beam search needs rows that all answer or all draw"):
        model.generate(**inputs_of(processor, mixed), task=["generation", "comprehension"], num_beams=2)


def test_sampling_draws_whole_pictures_whatever_lengths_are_asked_for(m3):
    checkpoint, model, processor = m3
    [case] = cases_of(checkpoint, "generation/2")
    inputs = inputs_of(processor, case)
    for seed, options in enumerate(
        [{}, {"max_new_tokens": 3}, {"max_length": 5}, {"min_new_tokens": 99999}, {"top_k": 5}]
    ):
        torch.manual_seed(seed)
        sequences = model.generate(**inputs, task="generation", do_sample=True, temperature=5.0, **options)
        codes = sequences[0, inputs["input_ids"].shape[1] :] - model.config.image_code_offset
        assert len(codes) == model.config.num_image_codes
        assert codes.min() >= 0 and codes.max() < model.config.vqgan_config.num_codes


@old_transformers
def test_repetition_penalty_lowers_what_was_said(m3):
    checkpoint, model, processor = m3
    [case] = cases_of(checkpoint, "comprehension/0")
    inputs = inputs_of(processor, case)
    outputs = [
        model.generate(
            **inputs, max_new_tokens=1, repetition_penalty=penalty, output_scores=True, return_dict_in_generate=True
        ).scores[0][0]
        for penalty in (1.0, 2.0)
    ]
    said = inputs["input_ids"][0].unique()
    said = said[said < model.config.text_config.vocab_size]
    plain = outputs[0][said]
    torch.testing.assert_close(outputs[1][said], torch.where(plain < 0, plain * 2, plain / 2))


@pytest.mark.skipif(
    TRANSFORMERS_VERSION >= (5, 18),
    reason="the refusal under test is for transformers before 5.18, which is older than this one",
)
def test_old_transformers_refuse_what_they_cannot_do(m3):
    checkpoint, model, processor = m3
    inputs = inputs_of(processor, checkpoint.cases[0])
    for options in ({"repetition_penalty": 1.5}, {"prompt_lookup_num_tokens": 3}):
        with pytest.raises(ValueError, match=r"need transformers 5\.18"):
            model.generate(**inputs, **options)


def test_streamer_and_own_processors_work(m3):
    checkpoint, model, processor = m3
    [case] = cases_of(checkpoint, "comprehension/0")
    inputs = inputs_of(processor, case)
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    model.generate(**inputs, max_new_tokens=24, streamer=streamer)
    assert "".join(streamer) == processor.decode(case["generated_ids"], skip_special_tokens=True)

    class Forbid(LogitsProcessor):
        def __call__(self, input_ids, scores):
            scores[:, case["generated_ids"][0]] = -torch.inf
            return scores

    sequences = model.generate(**inputs, max_new_tokens=2, logits_processor=LogitsProcessorList([Forbid()]))
    assert sequences[0, inputs["input_ids"].shape[1]] != case["generated_ids"][0]


def test_start_of_the_picture_is_appended_where_it_lacks(m3):
    checkpoint, model, processor = m3
    cases = cases_of(checkpoint, "generation/0", "comprehension/2", "generation/2")
    tasks = [case["task"] for case in cases]
    inputs = inputs_of(processor, [{**case, "task": "comprehension"} for case in cases])
    assert (inputs["input_ids"] != model.config.image_start_token_id).all()
    sequences = model.generate(**inputs, task=tasks, max_new_tokens=24)
    for sequence, case in zip(sequences, cases, strict=True):
        assert continuation(sequence, inputs["input_ids"].shape[1] + 1, case) == case["generated_ids"]

    alone = inputs_of(processor, {**cases[2], "task": "comprehension"})
    alone.pop("attention_mask")
    sequences = model.generate(**alone, generation_mode="image")
    assert sequences[0, alone["input_ids"].shape[1] + 1 :].tolist() == cases[2]["generated_ids"]

    inputs["attention_mask"][1, -1] = 0
    with pytest.raises(ValueError, match="padded on the left"):
        model.generate(**inputs, task=tasks)


def test_embeddings_as_prompt(m3):
    checkpoint, model, processor = m3
    for case in cases_of(checkpoint, "comprehension/2", "generation/2"):
        inputs = inputs_of(processor, case)
        embeds = model.model.embed_tokens(inputs["input_ids"], [case["task"]])
        new = model.generate(inputs_embeds=embeds, task=case["task"], max_new_tokens=24)
        assert new[0].tolist() == case["generated_ids"]


def test_unconstrained_generation_is_the_published_one(m3):
    checkpoint, model, processor = m3
    [case] = cases_of(checkpoint, "generation/1")
    inputs = inputs_of(processor, case)
    sequences = model.generate(**inputs, task="generation", constrain_image_tokens=False)
    assert sequences[0, inputs["input_ids"].shape[1] :].tolist() == case["generated_ids"]
    short = model.generate(**inputs, task="generation", constrain_image_tokens=False, max_new_tokens=9)
    assert short[0, inputs["input_ids"].shape[1] :].tolist() == case["generated_ids"][:9]
    for length in (
        {"max_length": inputs["input_ids"].shape[1] + 9},
        {"generation_config": GenerationConfig(max_new_tokens=9)},
    ):
        again = model.generate(**inputs, task="generation", constrain_image_tokens=False, **length)
        assert torch.equal(again, short)
    torch.manual_seed(0)
    sequences = model.generate(
        **inputs, task="generation", constrain_image_tokens=False, do_sample=True, temperature=9.0
    )
    with pytest.raises(ValueError, match=r"Row 0 holds \d+ image codes, but a picture is made of exactly 64"):
        model.decode_image_tokens(sequences)


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
    with pytest.raises(ValueError, match="16 picture positions, but 2 pictures of 16 patches"):
        model(inputs["input_ids"], inputs["pixel_values"].repeat(2, 1, 1, 1))
    drawing = inputs_of(processor, checkpoint.cases[4])
    with pytest.raises(ValueError, match="ends with <start_index>, as prompts for drawing do, but its task answers"):
        model.generate(**drawing, task="comprehension")
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="16 picture positions, but 0 pictures of 16 patches"):
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
