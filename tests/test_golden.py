"""
Every number of every published case, through the public face only: exported folder, `trust_remote_code=True`.

The same tests run on the golden checkpoints and on a second set with other shapes, ranks, alphas, experts and grids.
"""

import pytest
import torch
from conftest import CHECKPOINTS, inputs_of, messages_of, pictures_of
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from healthgpt.hub_export import rules


@pytest.fixture(scope="module", params=CHECKPOINTS)
def loaded(request, checkpoints):
    checkpoint = checkpoints(request.param)
    model = AutoModelForImageTextToText.from_pretrained(checkpoint.folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(checkpoint.folder, trust_remote_code=True)
    return checkpoint, model, processor


def close(actual, expected, tolerance):
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=0)


def test_prompts_and_their_ids(loaded):
    checkpoint, model, processor = loaded
    patches = [processor.image_token_id] * processor.num_image_patches
    assert model.config.image_token_id == processor.image_token_id
    for case in checkpoint.cases:
        prompt = processor.apply_chat_template(messages_of(case), task=case["task"], add_generation_prompt=True)
        expected = [part for id in case["input_ids"] for part in (patches if id == -200 else [id])]
        assert inputs_of(processor, case)["input_ids"].tolist() == [expected]
        # Where the vocabulary is SentencePiece's, the template writes <s> and the space before a text chunk, which the published
        # scripts left to the tokenizer; a prompt as they write it gives the same.
        published = prompt
        if processor.prefix_space:
            assert prompt.startswith("<s> ")
            published = prompt.removeprefix("<s> ").replace("<image> \n", "<image>\n")
        assert published == case["prompt"]
        for text in (prompt, published):
            assert processor(pictures_of(case), text)["input_ids"] == [expected]


def test_the_tokenizer_alone_gives_the_published_ids(loaded):
    checkpoint, _, _ = loaded
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder)
    image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    for case in checkpoint.cases:
        messages = messages_of(case)
        messages[-1]["generation_mode"] = "image" if case["task"] == "generation" else "text"
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        assert ids == [image_token_id if id == -200 else id for id in case["input_ids"]]


PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message.role }}:\n{% if message.role == 'assistant' %}{% generation %}"
    "{{ message.content[0].text }}{% endgeneration %}{% else %}{% for part in message.content %}"
    "{{ '<image>' if part.type == 'image' else part.text }}{% endfor %}{% endif %}\n{% endfor %}"
)


@pytest.mark.parametrize("num_images", [0, 1, 2])
def test_masks_mark_the_answers_and_no_more(loaded, num_images):
    checkpoint, _, processor = loaded
    end = {"phi3_instruct": "<|end|>"}.get(checkpoint.content["template"], "<|im_end|>")
    picture = {"type": "image", "image": Image.new("RGB", (9, 9))}
    messages = [
        {"role": "user", "content": [*[picture] * num_images, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": "A CT."},
        {"role": "user", "content": [picture, {"type": "text", "text": "And this?"}]},
        {"role": "assistant", "content": "An MR."},
    ]
    for template, answers in ((None, f"A CT.{end}An MR.{end}"), (PLAIN_TEMPLATE, "A CT.An MR.")):
        inputs = processor.apply_chat_template(
            [messages, messages[2:]],
            template,
            task="comprehension",
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            return_assistant_tokens_mask=True,
            return_mm_token_type_ids=True,
        )
        assert inputs["pixel_values"].shape[0] == num_images + 2
        assert not {"offset_mapping", "text_replacement_offsets"} & inputs.keys()
        is_image = inputs["input_ids"] == processor.image_token_id
        assert torch.equal(inputs["mm_token_type_ids"], is_image.long())
        assert is_image.sum(dim=1).tolist() == [count * processor.num_image_patches for count in (num_images + 1, 1)]
        marked = inputs["assistant_masks"].bool()
        texts = [processor.decode(ids[mask]) for ids, mask in zip(inputs["input_ids"], marked, strict=True)]
        assert texts == [answers, answers[answers.index("An MR") :]]


def test_pictures_features_and_projections(loaded):
    checkpoint, model, processor = loaded
    for case in checkpoint.cases:
        if case["image"] is None:
            continue
        pixel_values = inputs_of(processor, case)["pixel_values"]
        close(pixel_values, checkpoint.expected[case["name"] + "/pixel_values"], 1e-5)
        if case["name"] + "/projected" in checkpoint.expected:
            features = model.get_image_features(pixel_values, task=case["task"])
            close(features.last_hidden_state, checkpoint.expected[case["name"] + "/vision_features"], 1e-5)
            close(features.pooler_output, checkpoint.expected[case["name"] + "/projected"], 1e-5)


def test_logits(loaded):
    checkpoint, model, processor = loaded
    for case in checkpoint.cases:
        with torch.no_grad():
            logits = model(**inputs_of(processor, case), task=case["task"]).logits
        close(logits[0], checkpoint.expected[case["name"] + "/logits"], 1e-4)


def test_greedy_ids_and_pictures(loaded):
    checkpoint, model, processor = loaded
    for case in checkpoint.cases:
        inputs = inputs_of(processor, case)
        sequences = model.generate(**inputs, task=case["task"], max_new_tokens=case["max_new_tokens"])
        assert sequences[0, inputs["input_ids"].shape[1] :].tolist() == case["generated_ids"]
        if "decoded_png" in case:
            pixels = model.decode_image_tokens(sequences)
            close(pixels, checkpoint.expected[case["name"] + "/decoded"].clamp(-1, 1), 1e-4)
            [picture] = processor.post_process_multimodal_output(pixels, generation_mode="image")
            published = Image.open(checkpoint.source / case["decoded_png"])
            assert picture.size == published.size
            differences = zip(picture.tobytes(), published.tobytes(), strict=True)
            assert max(abs(left - right) for left, right in differences) <= 1


def test_training_loss_and_gradients(loaded):
    checkpoint, model, processor = loaded
    for case in checkpoint.cases:
        if "loss" not in case:
            continue
        inputs = inputs_of(processor, case)
        prompt_length = inputs["input_ids"].shape[1]
        input_ids = torch.cat([inputs["input_ids"], torch.tensor([case["generated_ids"]])], dim=1)
        labels = input_ids.clone()
        labels[:, :prompt_length] = -100
        model.zero_grad()
        outputs = model(input_ids, inputs.get("pixel_values"), labels=labels, task=case["task"])
        outputs.loss.backward()
        assert abs(outputs.loss.item() - case["loss"]) < 1e-4
        parameters = dict(model.named_parameters())
        for name, norm in case["gradient_norms"].items():
            parameter = parameters[rules.find(rules.plugin(case["task"]), name).rename(name)]
            assert parameter.grad.norm().item() == pytest.approx(norm, rel=1e-3)


def test_vqgan_encoder(loaded):
    checkpoint, model, _ = loaded
    if model.model.vqgan is None:
        assert "generation" not in model.config.tasks
        return
    pixels, codes = checkpoint.expected["vqgan/input"], checkpoint.expected["vqgan/codes"]
    with torch.no_grad():
        close(model.model.vqgan.code_logits(pixels), checkpoint.expected["vqgan/code_logits"], 1e-4)
    assert model.encode_image(pixels).tolist() == [codes.tolist()]
    sequences = codes[None] + model.config.image_code_offset
    close(model.decode_image_tokens(sequences), checkpoint.expected["vqgan/reconstruction"].clamp(-1, 1), 1e-4)
