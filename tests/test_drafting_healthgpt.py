"""Drawing many codes a pass: code for code what one code a pass draws, by every way of generating, in fewer passes."""

import math
import threading

import pytest
import torch
from accelerate.utils import send_to_device
from conftest import cases_of, inputs_of, pictures_of
from PIL import Image
from scipy.stats import chi2
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CompileConfig,
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from healthgpt import HealthGPTError
from healthgpt.drafting_healthgpt import CoupledSampling, DraftedPasses, PassWidths, as_targets
from healthgpt.generation_healthgpt import CACHE_NAME, TRANSFORMERS_VERSION

WHOLE = 10**6  # a window of more than any image
drafts = pytest.mark.skipif(
    TRANSFORMERS_VERSION < (5, 24), reason="no cache of transformers before 5.24 can be cropped"
)


@pytest.fixture(scope="module", params=["m3", "made_m3"])
def drawing(request, checkpoints):
    """A checkpoint that draws, its model and its processor; the second one's layers see sliding windows only."""
    checkpoint = checkpoints(request.param)
    model = AutoModelForImageTextToText.from_pretrained(checkpoint.folder, trust_remote_code=True)
    return checkpoint, model, AutoProcessor.from_pretrained(checkpoint.folder, trust_remote_code=True)


@pytest.fixture
def passes(monkeypatch):
    """How many passes every drawing took."""
    counted = []
    finish = DraftedPasses.finish

    def count(self):
        counted.append(self.num_passes)
        finish(self)

    monkeypatch.setattr(DraftedPasses, "finish", count)
    return counted


def drawn_cases(checkpoint):
    return [case for case in checkpoint.cases if case["task"] == "generation"]


def codes_of(model, *cases):
    return torch.tensor([case["generated_ids"] for case in cases]) - model.config.image_code_offset


def generate(model, processor, cases, **options):
    """What the rows of a batch wrote, or all that `generate` gives."""
    inputs = inputs_of(processor, cases)
    outputs = model.generate(**inputs, task=[case["task"] for case in cases], **options)
    return outputs[:, inputs["input_ids"].shape[1] :] if isinstance(outputs, torch.Tensor) else outputs


class EndAt(StoppingCriteria):
    """Ends rows once they have so many ids."""

    def __init__(self, *lengths):
        self.lengths = torch.tensor(lengths)

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids.shape[1] >= self.lengths


def end_at(*lengths):
    return StoppingCriteriaList([EndAt(*lengths)])


class ForbidLast(LogitsProcessor):
    """Lets no token follow itself."""

    def __call__(self, input_ids, scores):
        return scores.scatter(1, input_ids[:, -1:], -torch.inf)


def test_every_drawing_is_the_golden_one(drawing):
    checkpoint, model, processor = drawing
    num_codes = model.config.vqgan_config.num_codes
    cases = drawn_cases(checkpoint)
    torch.manual_seed(0)
    for case in cases:
        true = codes_of(model, case)
        random = torch.randint(num_codes, true.shape)
        half = torch.where(torch.arange(true.shape[1]) % 2 == 0, true, random)
        for codes_per_pass in (None, 1, 2, 7, WHOLE) if case is cases[0] else (None,):
            [row] = generate(model, processor, [case], codes_per_pass=codes_per_pass).tolist()
            assert row == case["generated_ids"], codes_per_pass
        for codes, widths in ((true, [7]), (half, [7]), (random, [WHOLE])):
            for codes_per_pass in widths:
                [row] = generate(model, processor, [case], codes_per_pass=codes_per_pass, draft_codes=codes).tolist()
                assert row == case["generated_ids"], codes_per_pass


@drafts
def test_passes_fall_with_what_is_right_in_the_draft(drawing, passes):
    checkpoint, model, processor = drawing
    length = model.config.num_image_codes
    for case in drawn_cases(checkpoint):
        true = codes_of(model, case)
        for codes_per_pass, expected in ((WHOLE, 1), (length, 1), (7, math.ceil((length - 8) / 7) + 1), (1, None)):
            passes.clear()
            generate(model, processor, [case], codes_per_pass=codes_per_pass, draft_codes=true)
            assert passes == ([] if expected is None else [expected])
        begun = true.clone()
        begun[:, length // 2] = (begun[:, length // 2] + 1) % model.config.vqgan_config.num_codes
        passes.clear()
        generate(model, processor, [case], codes_per_pass=WHOLE, draft_codes=begun)
        assert 2 <= passes[0] <= length // 2 + 1


def test_rows_of_a_batch_draw_what_they_draw_alone(drawing, passes):
    checkpoint, model, processor = drawing
    cases = drawn_cases(checkpoint)
    for case in cases:
        generate(model, processor, [case], codes_per_pass=WHOLE)
    alone = list(passes)
    passes.clear()
    rows = generate(model, processor, cases, codes_per_pass=WHOLE)
    assert rows.tolist() == [case["generated_ids"] for case in cases]
    assert passes == ([max(alone)] if alone else [])


@drafts
def test_a_batch_of_true_and_false_drafts_keeps_the_true_ones(drawing, passes):
    checkpoint, model, processor = drawing
    cases = drawn_cases(checkpoint)[:2]
    true = codes_of(model, *cases)
    false = torch.stack([true[0], (true[1] + 1) % model.config.vqgan_config.num_codes])
    generate(model, processor, cases[1:], codes_per_pass=WHOLE, draft_codes=false[1:])
    rows = generate(model, processor, cases, codes_per_pass=WHOLE, draft_codes=false)
    assert rows.tolist() == [case["generated_ids"] for case in cases]
    assert passes[0] == passes[1] > 1


@pytest.mark.parametrize("longer", [-1, 9])
def test_answers_and_drawings_in_one_batch(m3, longer):
    checkpoint, model, processor = m3
    cases = cases_of(checkpoint, "comprehension/0", "generation/0", "comprehension/1", "generation/1")
    limit = model.config.num_image_codes + longer if longer > 0 else 5
    options = dict(max_new_tokens=limit, min_new_tokens=limit if longer > 0 else None)
    alone = [generate(model, processor, [case], codes_per_pass=1, **options)[0].tolist() for case in cases]
    assert {len(row) for row in alone[::2]} == {limit} or longer < 0
    for codes_per_pass in (None, 7, WHOLE):
        rows = generate(model, processor, cases, codes_per_pass=codes_per_pass, **options)
        for row, expected in zip(rows.tolist(), alone, strict=True):
            assert row[: len(expected)] == expected
            assert set(row[len(expected) :]) <= {model.generation_config.pad_token_id}


@drafts
def test_rows_that_have_ended_cost_no_passes(m3, passes):
    checkpoint, model, processor = m3
    cases = cases_of(checkpoint, "comprehension/1", "generation/0")
    codes = codes_of(model, cases[1]).expand(2, -1)
    generate(model, processor, cases, codes_per_pass=WHOLE, draft_codes=codes)
    answer = len(cases[0]["generated_ids"])
    assert passes[0] <= answer + 2 < model.config.num_image_codes


def test_a_streamer_gets_ids_one_by_one(m3):
    checkpoint, model, processor = m3
    [case] = cases_of(checkpoint, "generation/1")

    class Streamer(BaseStreamer):
        def __init__(self):
            self.got, self.ended = [], False

        def put(self, value):
            self.got.append(value.flatten().tolist())

        def end(self):
            self.ended = True

    streamer = Streamer()
    generate(model, processor, [case], codes_per_pass=WHOLE, streamer=streamer)
    assert streamer.got == [
        inputs_of(processor, [case])["input_ids"][0].tolist(),
        *([id] for id in case["generated_ids"]),
    ]
    assert streamer.ended


def test_own_criteria_end_drawings_early(drawing):
    checkpoint, model, processor = drawing
    cases = drawn_cases(checkpoint)[:2]
    length = inputs_of(processor, cases)["input_ids"].shape[1]
    for codes_per_pass in (1, 3, WHOLE):
        options = dict(codes_per_pass=codes_per_pass, draft_codes=codes_of(model, *cases))
        rows = generate(model, processor, cases, stopping_criteria=end_at(length + 5, length + 9), **options)
        pad = model.generation_config.pad_token_id
        assert rows.tolist() == [cases[0]["generated_ids"][:5] + [pad] * 4, cases[1]["generated_ids"][:9]]
        rows = generate(model, processor, cases, max_time=0.0, **options)
        assert rows.tolist() == [case["generated_ids"][:1] for case in cases]


@pytest.mark.parametrize("written", [0, 1, 7])
def test_a_callers_cache_holds_no_draft_where_a_streamer_raised(drawing, written):
    checkpoint, model, processor = drawing
    [case] = cases_of(checkpoint, "generation/0")
    caches = []
    for codes_per_pass in (1, WHOLE):
        streamer, values = BaseStreamer(), []
        streamer.put = lambda value, values=values: values.append(value) if len(values) <= written else {}["full"]
        caches.append(DynamicCache(config=model.config.text_config))
        with pytest.raises(KeyError, match="full"):
            options = {CACHE_NAME: caches[-1], "draft_codes": codes_of(model, case)}
            generate(model, processor, [case], codes_per_pass=codes_per_pass, streamer=streamer, **options)
    one, many = caches
    assert (
        many.get_seq_length() == one.get_seq_length() == inputs_of(processor, [case])["input_ids"].shape[1] + written
    )
    for layer, expected in zip(many.layers, one.layers, strict=True):
        torch.testing.assert_close(layer.keys, expected.keys)


@pytest.mark.parametrize("at", [1, 2])
def test_no_layer_of_a_callers_cache_loses_the_prompt_where_a_pass_was_interrupted(drawing, at):
    checkpoint, model, processor = drawing
    [case] = cases_of(checkpoint, "generation/0")
    cache, calls = DynamicCache(config=model.config.text_config), []

    def interrupt(*call):
        calls.append(call)
        if len(calls) == at:
            raise KeyboardInterrupt

    handle = model.model.language_model.layers[0].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        generate(model, processor, [case], codes_per_pass=5, **{CACHE_NAME: cache})
    handle.remove()
    prompt = inputs_of(processor, [case])["input_ids"].shape[1]
    lengths = [int(layer.get_seq_length()) for layer in cache.layers]
    if at == 1:
        assert set(lengths) == {0}
    else:
        assert lengths[0] >= prompt and set(lengths[1:]) <= {lengths[0]} | set(range(prompt, lengths[0]))


@pytest.mark.parametrize("end", [None, 6])
def test_scores_and_caches_are_those_of_one_code_a_pass(drawing, end):
    checkpoint, model, processor = drawing
    cases = drawn_cases(checkpoint)[:2]
    length = inputs_of(processor, cases)["input_ids"].shape[1]
    half_right = codes_of(model, *cases)
    half_right[:, half_right.shape[1] // 2 :] = 0
    for own_cache in (False, True) if end is not None else (False,):
        outputs = []
        for codes_per_pass in (1, WHOLE):
            options = {CACHE_NAME: DynamicCache(config=model.config.text_config)} if own_cache else {}
            outputs.append(
                generate(
                    model,
                    processor,
                    cases,
                    codes_per_pass=codes_per_pass,
                    return_dict_in_generate=True,
                    output_scores=True,
                    output_logits=True,
                    draft_codes=half_right,
                    stopping_criteria=None if end is None else end_at(length + end, length + end),
                    **options,
                )
            )
        one, many = outputs
        assert torch.equal(one.sequences, many.sequences)
        for name in ("scores", "logits"):
            torch.testing.assert_close(getattr(many, name), getattr(one, name), atol=1e-4, rtol=0)
        one, many = one[CACHE_NAME], many[CACHE_NAME]
        assert many.get_seq_length() == one.get_seq_length() == outputs[0].sequences.shape[1] - 1
        for ours, theirs in zip(many.layers, one.layers, strict=True):
            torch.testing.assert_close(ours.keys, theirs.keys, atol=1e-4, rtol=0)
            torch.testing.assert_close(ours.values, theirs.values, atol=1e-4, rtol=0)
            assert getattr(ours, "record_past", None) == getattr(theirs, "record_past", None)


def test_a_cache_that_came_back_is_continued(drawing):
    checkpoint, model, processor = drawing
    [case] = cases_of(checkpoint, "generation/0")
    inputs = inputs_of(processor, [case])
    options = dict(return_dict_in_generate=True, draft_codes=codes_of(model, case))
    first = generate(model, processor, [case], codes_per_pass=WHOLE, **options).sequences
    more = torch.cat([first, torch.tensor([[7, 8, model.config.image_start_token_id]])], dim=1)
    call = dict(attention_mask=torch.ones_like(more), task="generation")
    whole = model.generate(more, pixel_values=inputs["pixel_values"], codes_per_pass=1, **call)
    for pixel_values in (None, inputs["pixel_values"]):
        cache = generate(model, processor, [case], codes_per_pass=WHOLE, **options)[CACHE_NAME]
        kept = {CACHE_NAME: cache, "pixel_values": pixel_values}
        assert torch.equal(model.generate(more, codes_per_pass=5, **call, **kept), whole)
        assert cache.get_seq_length() == whole.shape[1] - 1


def test_only_the_new_ids_of_a_kept_cache(m3):
    checkpoint, model, processor = m3
    [case] = cases_of(checkpoint, "generation/2")
    ids = inputs_of(processor, [case])["input_ids"]
    for codes_per_pass in (1, 5, WHOLE):
        cache = model(ids[:, :-3], task="generation", use_cache=True)[CACHE_NAME]
        rows = model.generate(
            ids[:, -3:],
            attention_mask=torch.ones_like(ids),
            task="generation",
            codes_per_pass=codes_per_pass,
            **{CACHE_NAME: cache},
        )
        assert rows[0, 3:].tolist() == case["generated_ids"]


class Uncroppable(DynamicCache):
    is_croppable = False


@pytest.mark.parametrize(
    "options",
    [
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"num_beams": 2},
        {"repetition_penalty": 1.7},
        {"logits_processor": LogitsProcessorList([ForbidLast()])},
        {"prefill_chunk_size": 8},
        {"cache": Uncroppable},
    ],
    ids=["no_cache", "static_cache", "beams", "repetition", "own_processor", "chunks", "uncroppable"],
)
@drafts
def test_ways_of_generating_draw_what_one_code_a_pass_draws(m3, options):
    _, model, processor = m3
    checkpoint = m3[0]
    options = dict(options)
    own_cache = options.pop("cache", None)
    cases = cases_of(checkpoint, "generation/2") if "prefill_chunk_size" in options else drawn_cases(checkpoint)[:2]
    rows = [
        generate(
            model,
            processor,
            cases,
            codes_per_pass=codes_per_pass,
            **options | ({} if own_cache is None else {CACHE_NAME: own_cache()}),
        )
        for codes_per_pass in (1, 5, WHOLE)
    ]
    assert torch.equal(rows[0], rows[1]) and torch.equal(rows[0], rows[2])
    changed = {"num_beams", "repetition_penalty", "logits_processor"} & options.keys()
    assert changed or rows[0].tolist() == [case["generated_ids"] for case in cases]


def test_hidden_states_and_attentions_are_those_of_every_code(m3):
    checkpoint, model, processor = m3
    cases = cases_of(checkpoint, "generation/1")
    shapes = []
    model.set_attn_implementation("eager")
    try:
        for codes_per_pass in (1, WHOLE):
            outputs = generate(
                model,
                processor,
                cases,
                codes_per_pass=codes_per_pass,
                return_dict_in_generate=True,
                output_hidden_states=True,
                output_attentions=True,
            )
            steps = [*outputs.hidden_states, *outputs.attentions]
            shapes.append([tuple(layer.shape) for step in steps for layer in step])
    finally:
        model.set_attn_implementation("sdpa")
    assert shapes[0] == shapes[1]


def test_embedded_prompts_and_several_sequences(m3):
    checkpoint, model, processor = m3
    cases = drawn_cases(checkpoint)[:2]
    for case in cases_of(checkpoint, "generation/2"):
        embeds = model.model.embed_tokens(inputs_of(processor, [case])["input_ids"], ["generation"])
        for codes_per_pass in (5, WHOLE):
            rows = model.generate(inputs_embeds=embeds, task="generation", codes_per_pass=codes_per_pass)
            assert rows[0].tolist() == case["generated_ids"]
    torch.manual_seed(0)
    options = dict(num_return_sequences=2, do_sample=True, top_k=1, draft_codes=codes_of(model, *cases))
    rows = generate(model, processor, cases, codes_per_pass=WHOLE, **options)
    assert rows.tolist() == [case["generated_ids"] for case in cases for _ in range(2)]


def test_compiled_passes_are_of_one_width(m3, monkeypatch):
    checkpoint, model, processor = m3
    [case] = cases_of(checkpoint, "generation/1")
    config = CompileConfig()
    config._compile_all_devices = True
    for codes_per_pass in (7, WHOLE):
        widths = []

        def compiled(**inputs):
            widths.append(inputs["input_ids"].shape[1])  # noqa: B023 the call is over before the next one
            return model(**inputs)

        monkeypatch.setattr(model, "get_compiled_call", lambda config: compiled)
        options = dict(cache_implementation="static", compile_config=config)
        [row] = generate(model, processor, [case], codes_per_pass=codes_per_pass, **options).tolist()
        assert row == case["generated_ids"]
        assert set(widths) == {min(codes_per_pass, model.config.num_image_codes)}


def test_offloaded_models_draw_many_codes_a_pass(m3, tmp_path):
    checkpoint, _, processor = m3
    offloaded = AutoModelForImageTextToText.from_pretrained(
        checkpoint.folder,
        trust_remote_code=True,
        device_map="auto",
        max_memory={"cpu": 0},
        offload_folder=tmp_path / "offloaded",
    )
    [case] = cases_of(checkpoint, "generation/1")
    for options in ({}, {"draft_codes": codes_of(offloaded, case)}):
        [row] = generate(offloaded, processor, [case], codes_per_pass=WHOLE, **options).tolist()
        assert row == case["generated_ids"]


def test_threads_draw_and_answer_at_once(m3):
    checkpoint, model, processor = m3
    model.__dict__.pop("_pass_seconds", None)  # all of them measure
    cases = cases_of(checkpoint, "generation/0", "comprehension/0", "generation/1", "comprehension/two_pictures")
    inputs = [inputs_of(processor, [case]) for case in cases]
    got = [[] for _ in cases]

    def work(index):
        for codes_per_pass in (None, 3):
            ids = model.generate(
                **send_to_device(inputs[index], "cpu"),
                task=cases[index]["task"],
                max_new_tokens=24,
                codes_per_pass=codes_per_pass,
            )
            got[index].append(ids[0, inputs[index]["input_ids"].shape[1] :].tolist())

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(cases))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == [[case["generated_ids"]] * 2 for case in cases]


@pytest.mark.parametrize("options", [{}, {"temperature": 1.7, "top_k": 7, "top_p": 0.8}], ids=["plain", "warped"])
def test_a_seed_draws_the_same_image_however_many_codes_a_pass_reads(m3, options):
    checkpoint, model, processor = m3
    cases = cases_of(checkpoint, "generation/0", "comprehension/0", "generation/1")
    drawn = []
    for seed, codes_per_pass in ((3, 1), (3, 5), (3, WHOLE), (4, WHOLE)):
        torch.manual_seed(seed)
        rows = generate(
            model, processor, cases, codes_per_pass=codes_per_pass, do_sample=True, max_new_tokens=9, **options
        )
        drawn.append(rows.tolist())
    assert drawn[0] == drawn[1] == drawn[2] != drawn[3]


ROWS = 3000
WARPS = [{"temperature": 4.0}, {"top_k": 4, "temperature": 3.0}, {"top_p": 0.7, "temperature": 3.0}]


def exact_pairs(model, ids, temperature=1.0, top_k=None, top_p=None):
    """Probabilities `(codes, codes)` of the first two codes, with the options as their papers say."""
    codes = slice(model.config.image_code_offset, model.config.image_code_offset + model.config.vqgan_config.num_codes)

    def probabilities(ids):
        with torch.no_grad():
            scores = model(ids, task="generation", logits_to_keep=1).logits[:, -1, codes].double() / temperature
        probs = scores.softmax(-1)
        order = probs.argsort(dim=-1, descending=True)
        ranked = probs.gather(1, order)
        keep = torch.ones_like(ranked, dtype=torch.bool)
        if top_k is not None:
            keep[:, top_k:] = False
        if top_p is not None:
            keep &= ranked.cumsum(-1) - ranked < top_p
        probs = torch.zeros_like(probs).scatter(1, order, ranked * keep)
        return probs / probs.sum(-1, keepdim=True)

    first = probabilities(ids)[0]
    nexts = torch.arange(codes.start, codes.stop)[:, None]
    second = probabilities(torch.cat([ids.expand(len(nexts), -1), nexts], dim=1))
    return first[:, None] * second


def is_surprising(pairs, exact):
    """Whether counts of pairs lie where exact probabilities put them once in 10^9 times; rare pairs count together."""
    counts, expected = pairs.flatten().double(), exact.flatten() * pairs.sum()
    if (counts[expected == 0] > 0).any():
        return True
    often = expected >= 5
    counts, expected = (torch.cat([part[often], part[~often].sum()[None]]) for part in (counts, expected))
    counts, expected = counts[expected > 0], expected[expected > 0]
    statistic = ((counts - expected) ** 2 / expected).sum().item()
    assert len(counts) > 4
    return statistic > chi2.isf(1e-9, len(counts) - 1)


def sampled_pairs(model, ids, **options):
    torch.manual_seed(0)
    rows = model.generate(
        ids,
        task="generation",
        codes_per_pass=3,
        do_sample=True,
        num_return_sequences=ROWS,
        stopping_criteria=end_at(*[ids.shape[1] + 2] * ROWS),
        **{"top_k": 0} | options,
    )
    first, second = (rows[:, ids.shape[1] :] - model.config.image_code_offset).T
    num_codes = model.config.vqgan_config.num_codes
    return torch.bincount(first * num_codes + second, minlength=num_codes**2).view(num_codes, num_codes)


@pytest.fixture
def short_prompt(m3):
    """A prompt of few ids, so that thousands of rows are drawn in no time."""
    return torch.tensor([[1, 5, 9, m3[1].config.image_start_token_id]])


@pytest.mark.parametrize("options", WARPS, ids=["temperature", "top_k", "top_p"])
def test_codes_are_drawn_with_their_probabilities(m3, short_prompt, options):
    _, model, _ = m3
    assert not is_surprising(
        sampled_pairs(model, short_prompt, **options), exact_pairs(model, short_prompt, **options)
    )


@drafts
@pytest.mark.parametrize("fault", ["noise of one place for all", "noise half as strong", "noise of one row for all"])
def test_a_wrong_coupling_is_found(m3, short_prompt, monkeypatch, fault):
    _, model, _ = m3
    make = CoupledSampling.__init__

    def faulty(self, *arguments):
        make(self, *arguments)
        if "place" in fault:
            self.noise[:] = self.noise[:, :1].clone()
        elif "half" in fault:
            self.noise /= 2
        else:
            self.noise[:] = self.noise[:1].clone()

    monkeypatch.setattr(CoupledSampling, "__init__", faulty)
    options = {"temperature": 4.0}
    assert is_surprising(sampled_pairs(model, short_prompt, **options), exact_pairs(model, short_prompt, **options))


@pytest.mark.parametrize("size", [(64, 64), (120, 70), (60, 90)], ids=["square", "wide", "tall"])
def test_targets_of_what_the_model_sees_are_those_of_the_image(m3, size):
    checkpoint, model, processor = m3
    picture = pictures_of(checkpoint.cases[4])[0].convert("RGB").resize((8, 8)).resize(size, Image.Resampling.BICUBIC)
    inputs = processor([picture], "<image>", return_tensors="pt")["pixel_values"]
    resolution = model.config.vqgan_config.resolution
    targets = as_targets(inputs, resolution)
    expected = processor.process_target_images(picture)
    assert targets.shape == expected.shape == (1, 3, resolution, resolution)
    assert targets.min() >= -1 and targets.max() <= 1
    assert (targets - expected).abs().mean() < 0.06 < (targets.flip(3) - expected).abs().mean()


def test_a_target_of_nothing_but_padding_is_its_colour(m3):
    processor = m3[2]
    colour = tuple(round(255 * mean) for mean in processor.image_processor.image_mean)
    picture = Image.new("RGB", (50, 30), colour)
    targets = as_targets(processor([picture], "<image>", return_tensors="pt")["pixel_values"], 32)
    expected = torch.tensor(colour)[None, :, None, None] / 127.5 - 1
    torch.testing.assert_close(targets, expected.expand(1, 3, 32, 32), atol=0.02, rtol=0)


def test_drafts_that_are_none_are_refused(m3):
    checkpoint, model, processor = m3
    [case] = cases_of(checkpoint, "generation/2")
    true = codes_of(model, case)
    num_codes = model.config.vqgan_config.num_codes
    for codes in (true[0], true[:, :-1], true.expand(2, -1)):
        with pytest.raises(HealthGPTError) as error:
            generate(model, processor, [case], draft_codes=codes)
        assert str(tuple(codes.shape)) in str(error.value) and "(1, 64)" in str(error.value)
    for codes in (true.float(), true > 3, true - true.max() - 1, true - true.min() + num_codes):
        with pytest.raises(HealthGPTError, match=f"draft_codes .*{num_codes - 1}"):
            generate(model, processor, [case], draft_codes=codes)
    for codes_per_pass in (0, -1, 1.5, "a", True):
        for options in ({}, {"num_beams": 2}):
            with pytest.raises(HealthGPTError, match=f"codes_per_pass .*{codes_per_pass!r}"):
                generate(model, processor, [case], codes_per_pass=codes_per_pass, **options)


def test_codes_per_pass_of_the_model_and_of_a_configuration(m3, passes, monkeypatch):
    checkpoint, model, processor = m3
    [case] = cases_of(checkpoint, "generation/1")
    monkeypatch.setattr(model.generation_config, "codes_per_pass", 1, raising=False)
    generate(model, processor, [case])
    generate(model, processor, [case], generation_config=GenerationConfig())
    assert passes == []
    generate(model, processor, [case], codes_per_pass=WHOLE)
    generate(model, processor, [case], generation_config=GenerationConfig(codes_per_pass=WHOLE))
    assert len(passes) == (2 if TRANSFORMERS_VERSION >= (5, 24) else 0) and len(set(passes)) <= 1
    monkeypatch.setattr(model.generation_config, "codes_per_pass", 0)
    with pytest.raises(HealthGPTError, match=r"codes_per_pass .*0"):
        generate(model, processor, [case])


def test_typical_codes_that_are_none_are_refused(m3):
    _, model, _ = m3
    length, num_codes = model.config.num_image_codes, model.config.vqgan_config.num_codes
    for codes in ([0] * (length - 1), [0] * (length - 1) + [num_codes], [-1] * length, [1.0] * length, "0" * length):
        content = model.config.to_dict()
        content["tasks"]["generation"]["typical_codes"] = codes
        with pytest.raises(HealthGPTError, match=f"'generation' .*{length}.*{num_codes - 1}"):
            type(model.config).from_dict(content)
    content = model.config.to_dict()
    content["tasks"]["comprehension"]["typical_codes"] = [0] * length
    with pytest.raises(HealthGPTError, match=r"'comprehension'.*typical_codes"):
        type(model.config).from_dict(content)


def test_typical_codes_travel_with_the_checkpoint_and_save_passes(checkpoints, load, tmp_path, passes):
    model, processor = load("m3")
    for follows_input, name in ((True, "generation/2"), (False, "generation/0")):
        [case] = cases_of(checkpoints("m3"), name)
        model.config.tasks["generation"].typical_codes = codes_of(model, case)[0].tolist()
        model.config.tasks["generation"].follows_input = follows_input
        model.save_pretrained(tmp_path)
        again = AutoModelForImageTextToText.from_pretrained(tmp_path, trust_remote_code=True)
        assert again.config.tasks["generation"] == model.config.tasks["generation"]
        passes.clear()
        [row] = generate(again, processor, [case], codes_per_pass=WHOLE).tolist()
        assert row == case["generated_ids"]
        assert passes == ([1] if TRANSFORMERS_VERSION >= (5, 24) else [])


def run_widths(widths, seconds, length, accept):
    """Widths of the passes of a drawing, where passes take `seconds(width)` and `accept(width)` codes prove right."""
    place, taken = 0, []
    while place < length:
        width = widths.next(length - place)
        taken.append(width)
        widths.add(width, seconds(width))
        drawn = min(accept(width), length - place)
        widths.learn(width, drawn)
        place += drawn
    return taken


def flat(width):
    return 1.0


def linear(width):
    return float(width)


def affine(width):
    return 10 + 0.1 * width


def quadratic(width):
    return float(width**2)


def test_where_width_costs_nothing_passes_get_as_wide_as_the_image():
    seconds = {}
    assert run_widths(PassWidths(seconds), flat, 1024, lambda width: 1)[:6] == [1, 1, 16, 16, 256, 256]
    assert max(seconds) > 256 and all(len(times) <= 2 for times in seconds.values())
    for width in (max(seconds), 1024, 1024):
        assert run_widths(PassWidths(seconds), flat, 1024, lambda width: width)[0] == width


@pytest.mark.parametrize("cost", [linear, quadratic])
def test_where_width_costs_what_it_brings_passes_read_one_code(cost):
    seconds = {}
    assert run_widths(PassWidths(seconds), cost, 40, lambda width: 1)[:6] == [1, 1, 16, 16, 1, 1]
    assert set(run_widths(PassWidths(seconds), cost, 40, lambda width: 1)) == {1}


def test_widths_are_those_that_draw_most_in_a_time():
    seconds = {}
    run_widths(PassWidths(seconds), affine, 5000, lambda width: round(width**PassWidths.EXPONENT))
    widths = PassWidths(seconds)
    taken = run_widths(widths, affine, 2000, lambda width: round(width**PassWidths.EXPONENT))
    rates = {width: width**PassWidths.EXPONENT / affine(width) for width in range(1, 1025)}
    best = max(rates, key=rates.get)
    assert 100 < best < 200
    assert all(abs(width - best) < 0.1 * best for width in taken[:-1] if width < 2000 - sum(taken[:-1]))


def test_widths_narrow_where_nothing_is_right_and_widen_where_all_is():
    seconds = {1: [affine(1)] * 2, 256: [affine(256)] * 2}
    narrowed = run_widths(PassWidths(seconds), affine, 60, lambda width: 1)
    assert narrowed == sorted(narrowed, reverse=True) and narrowed[0] > 50 and narrowed[20] == 1
    widths = PassWidths(seconds)
    before = widths.best()
    for _ in range(50):
        widths.learn(100, 100)
    assert before < widths.best() < math.inf
    widths = PassWidths(seconds)
    widths.learn(1, 1)  # tells nothing
    assert widths.best() == before


def test_a_fixed_width_measures_nothing():
    seconds = {}
    assert run_widths(PassWidths(seconds, 7), quadratic, 20, lambda width: width) == [7, 7, 6]
    assert seconds == {} and PassWidths(seconds, 7).best() == 7


def test_the_shortest_times_are_kept():
    widths = PassWidths({})
    for width, seconds in ((1, 3.0), (1, 2.0), (1, 1.0), (16, 5.0), (4, 1.0), (1, 0.5)):
        widths.add(width, seconds)
    assert widths.seconds == {1: [0.5, 1.0], 16: [5.0], 4: [1.0]}
    assert widths.next(100) == 16 and widths.next(9) == 9
