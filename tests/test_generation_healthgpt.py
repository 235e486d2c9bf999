"""`generate`: mixed batches, kept caches, and transformers' ways of generating, which all give the same."""

import copy

import pytest
import torch
from conftest import cases_of, continuation, inputs_of
from transformers import (
    AutoModelForImageTextToText,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TextIteratorStreamer,
)

from healthgpt import HealthGPTError
from healthgpt.generation_healthgpt import TRANSFORMERS_VERSION

old_transformers = pytest.mark.skipif(
    TRANSFORMERS_VERSION < (5, 18), reason="transformers before 5.18 cannot look up ids past the token tables"
)


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
    for pictures, message in ((pixels, None), (None, "16 image positions, but 0 images")):
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
    reason="from 5.18 on transformers does what this refusal is about: make test-lowest runs it on an older one",
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


@pytest.mark.parametrize("option", [{"encoder_repetition_penalty": 1.5}, {"assistant_early_exit": 1}])
@pytest.mark.parametrize("task", ["comprehension", "generation"])
def test_options_that_cannot_be_are_refused(m3, task, option):
    _, model, _ = m3
    with pytest.raises(HealthGPTError, match=next(iter(option))):
        model.generate(torch.tensor([[1, 2, 3]]), task=task, **option)
    with pytest.raises(HealthGPTError, match=next(iter(option))):
        model.generate(torch.tensor([[1, 2, 3]]), task=task, generation_config=GenerationConfig(**option))
