"""Conversations of one message, their model inputs, and answers to many at once: what all parts of the package share."""


def conversation(pictures: list, text: str) -> list[dict]:
    """One message of pictures and a question or instruction, as `apply_chat_template` takes it."""
    content = [{"type": "image", "image": picture} for picture in pictures]
    return [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]


def prepare(processor, messages: list, task: str | list[str]):
    """
    Model inputs of one conversation or of a batch of them.

    Args:
        processor (`HealthGPTProcessor`): Writes the prompts.
        messages (`list[dict]` or `list[list[dict]]`): One conversation, or a list of them.
        task (`str` or `list[str]`): One name for all conversations, or one for each.

    Returns:
        `BatchFeature`: `input_ids` and `attention_mask` `(batch, length)`, padded on the left, and with pictures
        `pixel_values` `(num_images, 3, height, width)`; all on the CPU.

    Raises:
        HealthGPTError: if a task is unknown or a conversation cannot be used.
    """
    return processor.apply_chat_template(
        messages, task=task, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )


def answer_batch(
    model,
    processor,
    questions: list[tuple[list, str]],
    task: str | list[str] = "comprehension",
    max_new_tokens: int = 1024,
    **options,
) -> list[str]:
    """
    Answers questions greedily. In float32 the answers are those that each question gets alone.

    Args:
        model, processor: As `from_pretrained` loads them.
        questions (`list[tuple[list, str]]`): Pictures, of any kind that the processor takes, and the question about them.
        task (`str` or `list[str]`, defaults to `"comprehension"`): A task of the model that answers in words, or one for each
            question.
        max_new_tokens (`int`, defaults to 1024): Longest answer.
        options: Further arguments of `generate`.

    Returns:
        `list[str]`: An answer for each question, without spaces around it.
    """
    inputs = prepare(processor, [conversation(*question) for question in questions], task).to(model.device)
    sequences = model.generate(**inputs, task=task, do_sample=False, max_new_tokens=max_new_tokens, **options)
    answers = processor.batch_decode(sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [answer.strip() for answer in answers]
