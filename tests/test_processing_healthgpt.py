"""Prompts, their ids, and pictures of every kind."""

import base64
import json
from pathlib import Path

import pytest
import torch
from conftest import GOLDEN
from PIL import Image
from transformers import AutoProcessor

from healthgpt import HealthGPTProcessor
from healthgpt.hub_export.families import FAMILIES, add_image_placeholder, add_image_tokens, build_tokenizer
from healthgpt.processing_healthgpt import load_picture

PHI3 = Path(__file__).parent.parent.parent / "shared" / "golden" / "phi3_tokenization"


@pytest.fixture(scope="module")
def processor(checkpoints):
    return AutoProcessor.from_pretrained(checkpoints("m3").folder, trust_remote_code=True)


@pytest.mark.skipif(
    not PHI3.exists(),
    reason="needs Microsoft's tokenizer.model of Phi-3 beside the repository; the golden m3 shows the same with a small one",
)
def test_true_phi3_vocabulary_gives_the_published_ids(processor):
    content = json.loads((PHI3 / "prompts.json").read_text())
    tokenizer = build_tokenizer(PHI3 / "tokenizer")
    add_image_tokens(tokenizer, 8192)
    assert len(tokenizer) == content["len_tokenizer"]
    image_token_id = add_image_placeholder(tokenizer)
    family = FAMILIES["phi3", "LlamaTokenizer"]
    phi3 = HealthGPTProcessor(
        processor.image_processor,
        tokenizer,
        chat_template=family.chat_template,
        tasks=processor.tasks,
        num_image_patches=576,
        prefix_space=family.prefix_space,
    )
    assert len(content["cases"]) == 24
    for case in content["cases"]:
        picture = [{"type": "image", "image": Image.new("RGB", (8, 8))}] if case["with_image"] else []
        messages = [{"role": "user", "content": [*picture, {"type": "text", "text": case["question"]}]}]
        arguments = dict(task=case["task"], add_generation_prompt=True)
        prompt = phi3.apply_chat_template(messages, **arguments)
        assert prompt == "<s> " + case["prompt"].replace("<image>", "<image> ")
        inputs = phi3.apply_chat_template(messages, tokenize=True, return_dict=True, **arguments)
        expected = [part for id in case["input_ids"] for part in ([image_token_id] * 576 if id == -200 else [id])]
        assert list(inputs["input_ids"][0]) == expected


def chat(*content):
    return [{"role": "user", "content": list(content)}]


PICTURE = {"type": "image", "image": str(GOLDEN / "images/ct.png")}


def test_default_prompt_stands_in_for_missing_text(processor):
    prompt = processor.apply_chat_template(chat(PICTURE), task="generation", add_generation_prompt=True)
    assert "<image> \nReconstruct the image.<|end|>" in prompt and prompt.endswith("<start_index>")


def test_a_conversation_keeps_its_turns_and_its_own_system_prompt(processor):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "What is this?"}, PICTURE]},
        {"role": "assistant", "content": "A CT."},
        {"role": "user", "content": "Of what?"},
    ]
    assert processor.apply_chat_template(messages, add_generation_prompt=True) == (
        "<s> <|system|>\nBe brief.<|end|>\n<|user|>\n<image> \nWhat is this?<|end|>\n<|assistant|>\nA CT.<|end|>\n"
        "<|user|>\nOf what?<|end|>\n<|assistant|>\n"
    )


def test_paths_urls_arrays_and_pictures_are_the_same_picture(processor):
    picture = Image.open(GOLDEN / "images/retina.png").convert("RGB")
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(picture.height, picture.width, 3)
    inputs = [
        processor.apply_chat_template(
            chat({"type": "image", "image": image}, {"type": "text", "text": "?"}),
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )["pixel_values"]
        for image in (
            picture,
            str(GOLDEN / "images/retina.png"),
            base64.b64encode((GOLDEN / "images/retina.png").read_bytes()).decode(),
            "data:image/png;base64," + base64.b64encode((GOLDEN / "images/retina.png").read_bytes()).decode(),
            pixels.numpy(),
            pixels,
            picture.convert("RGBA"),
            pixels.permute(2, 0, 1).numpy(),
        )
    ]
    assert all(torch.equal(inputs[0], other) for other in inputs[1:])


def test_grey_and_transparent_arrays_are_pictures():
    grey = torch.arange(12, dtype=torch.uint8).view(3, 4)
    deep = (grey.numpy().astype("uint16") * 256) + 255
    transparent = torch.stack([grey, grey, grey, grey], dim=-1)
    for array in (grey, grey.numpy(), deep, transparent.numpy()):
        assert load_picture(array, 56).tobytes() == bytes(grey.flatten().repeat_interleave(3).tolist())


def test_what_cannot_be_used_is_said_in_one_sentence(processor, tmp_path, monkeypatch):
    text = {"type": "text", "text": "What is this?"}
    not_a_picture = tmp_path / "notes.png"
    not_a_picture.write_text("no picture")
    cut_off = tmp_path / "cut.png"
    cut_off.write_bytes((GOLDEN / "images/retina.png").read_bytes()[:2000])
    empty = tmp_path / "empty.png"
    empty.write_bytes(b"")
    deep = tmp_path / "deep.tif"
    Image.frombytes("I;16", (64, 64), bytes(64 * 64 * 2)).save(deep)
    deep.write_bytes(deep.read_bytes()[:5000])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3000)
    nothing_known = "no file, URL or base64 data of a picture format that Pillow knows"
    for image, message in (
        (str(deep), "deep.tif' is not a picture that can be read"),
        (Image.open(deep), "is not a picture that can be read"),
        (str(GOLDEN / "images/retina.png"), "could be decompression bomb DOS attack"),
        ("scan", f"^'scan' is not a picture that can be read: it is {nothing_known}"),
        (str(tmp_path), nothing_known),
        ("http://[::1", "Invalid IPv6 URL"),
        ("http://a b/c", "control characters"),
        (torch.zeros(2, 2, 2, 2), "is not a picture that can be read"),
        (str(not_a_picture), "is not a picture that can be read"),
        (str(cut_off), "cannot be read|is not a picture that can be read"),
        (str(empty), "is not a picture that can be read"),
        (str(tmp_path / "missing.png"), "is not a picture that can be read"),
        (object(), "An object of type object is not a picture"),
        (Image.new("RGB", (0, 7)), "The picture is empty: it has 0 x 7 pixels"),
        (Image.new("RGB", (1, 10000)), "of its 1 x 10000 pixels the shorter side would vanish"),
        (Image.new("F", (9, 9)), "in Pillow mode F; scale them"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            processor.apply_chat_template(chat({"type": "image", "image": image}, text), tokenize=True)
        assert "\n" not in str(error.value)
    user = {"role": "user"}
    for arguments, message in (
        (dict(conversation={**user, "content": "?"}), "conversation is a list of at least one message, got"),
        (dict(conversation="What is this?"), "conversation is a list of at least one message, got"),
        (dict(conversation=["What is this?"]), "message is a dictionary with role and content, got 'What is this"),
        (dict(conversation=[{"content": "?"}]), "message is a dictionary with role and content"),
        (dict(conversation=[user]), "content is a string or a list of .*, got 'None'"),
        (dict(conversation=[{**user, "content": None}]), "content is a string or a list of"),
        (dict(conversation=[{**user, "content": ["?"]}]), "content is a string or a list of"),
        (dict(conversation=chat({"text": "?"})), "content is a string or a list of"),
        (dict(conversation=chat({"type": "text"})), "content is a string or a list of"),
        (dict(conversation=chat({"type": "text", "text": None})), "content is a string or a list of"),
        (dict(conversation=chat({"type": "video", "video": "x.mp4"}, text)), "content is a string .* 'video'"),
        (dict(conversation=chat({"type": "text", "text": "  "})), "no text, which task 'comprehension' needs"),
        (dict(conversation=chat(PICTURE)), "no text, which task 'comprehension' needs"),
        (dict(conversation=chat({"type": "text", "text": ""}), task="generation"), "no text, which task 'generation'"),
        (dict(conversation=chat(text), task="x_ray"), "no task 'x_ray'; it has comprehension, generation"),
        (dict(conversation=[chat(text)] * 2, task=["comprehension"]), "1 tasks for 2 conversations"),
        (dict(conversation=chat(text), task=""), "no task ''; it has"),
        (dict(conversation=chat(text), task=[]), "0 tasks for 1 conversations"),
        (dict(conversation=[[]]), "conversation is a list of at least one message"),
        (dict(conversation=chat(text), generation_mode="video"), "generation_mode is 'text' or 'image'"),
    ):
        with pytest.raises(ValueError, match=message):
            processor.apply_chat_template(**arguments)
    for arguments, message in (
        (dict(), "needs prompts that are not empty"),
        (dict(text=""), "needs prompts that are not empty"),
        (dict(text=["a", " "]), "needs prompts that are not empty"),
        (dict(text=()), "needs prompts that are not empty"),
        (dict(text=[]), "needs prompts that are not empty"),
        (dict(text=5), "needs prompts that are not empty"),
        (dict(text="<image> and <image>?", images=[Image.new("RGB", (9, 9))]), "have 2 <image> but 1 pictures"),
        (
            dict(text=["<image> a", "b"], images=[[], [Image.new("RGB", (9, 9))]]),
            r"have \[1, 0\] <image> but \[0, 1\] pictures",
        ),
        (
            dict(text=["<image> a", "<image> b"], images=[[Image.new("RGB", (9, 9))] * 2, None]),
            r"have \[1, 1\] <image> but \[2, 0\] pictures",
        ),
        (dict(text="no place", images=[Image.new("RGB", (9, 9))]), "have 0 <image> but 1 pictures"),
        (
            dict(text="<image>", images=[Image.new("RGB", (9, 9))], truncation=True, max_length=9),
            "Truncation to 9 tokens cuts a picture",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            processor(**arguments)
    assert processor(text="No picture.", images=[]) == processor(text="No picture.")


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "HSV"]
)
def test_every_8_bit_mode_becomes_rgb(mode):
    source = Image.new("L", (2, 1), 255)
    source.putpixel((1, 0), 0)
    opaque = {"La": "LA", "RGBa": "RGBA", "PA": "P"}.get(mode, mode)
    source = source.convert("RGB").convert(opaque).convert(mode)
    result = load_picture(source, 56)
    assert result.mode == "RGB" and result.size == (2, 1)
    assert min(result.getpixel((0, 0))) >= 254 and max(result.getpixel((1, 0))) <= 1


def test_palette_and_alpha_keep_their_colours():
    picture = Image.new("RGB", (4, 1))
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (9, 99, 199)]
    for x, colour in enumerate(colours):
        picture.putpixel((x, 0), colour)
    transparent = picture.copy()
    transparent.putalpha(0)
    for source in (picture.quantize(4), transparent):
        result = load_picture(source, 56)
        assert [result.getpixel((x, 0)) for x in range(4)] == colours


def test_16_bit_greys_keep_their_upper_8_bits(tmp_path):
    values = [0, 255, 256, 32768, 65535]
    data = b"".join(value.to_bytes(2, "little") for value in values)
    picture = Image.frombytes("I;16", (5, 1), data)
    picture.save(tmp_path / "16.png")
    for source in (picture, picture.convert("I"), str(tmp_path / "16.png")):
        result = load_picture(source, 56)
        assert [result.getpixel((x, 0)) for x in range(5)] == [(v // 256,) * 3 for v in values]
    with pytest.raises(ValueError, match="from -5 to -5 in Pillow mode I"):
        load_picture(Image.new("I", (3, 3), -5), 56)


def test_a_picture_may_be_of_any_shape_where_no_tower_sees_it():
    with pytest.raises(ValueError, match="too narrow: of its 1 x 57 pixels"):
        load_picture(Image.new("L", (1, 57)), 56)
    assert load_picture(Image.new("L", (1, 57))).size == (1, 57)


def test_target_pictures_are_stretched_to_the_vqgan(processor):
    pixels = processor.process_target_images([Image.open(GOLDEN / "images/retina.png"), Image.new("L", (9, 30), 255)])
    assert pixels.shape == (2, 3, 32, 32)
    assert -1 <= pixels.min() < pixels[0].max() <= 1 and (pixels[1] == 1).all()
    with pytest.raises(ValueError, match="no picture to prepare"):
        processor.process_target_images([])
    expected = Image.open(GOLDEN / "images/retina.png").convert("RGB").resize((32, 32), Image.Resampling.LANCZOS)
    assert ((pixels[0, :, 3, 5] + 1) / 2 * 255).round().int().tolist() == list(expected.getpixel((5, 3)))


def test_pixels_become_pictures_by_truncation(processor):
    levels = torch.tensor([-1.5, -1.0, 0.0, 0.999, 1.0, 3.0])
    [picture] = processor.post_process_multimodal_output(
        levels.view(1, 1, 1, 6).expand(1, 3, 1, 6), generation_mode="image"
    )
    assert [picture.getpixel((x, 0))[0] for x in range(6)] == [0, 0, 127, 254, 255, 255]
    with pytest.raises(ValueError, match="generation_mode=audio"):
        processor.post_process_multimodal_output(levels, generation_mode="audio")
