"""Conversations of one message, and answers to many of them at once: what the command line, training and evaluation share."""


def conversation(pictures: list, text: str) -> list[dict]:
    """One message of pictures and a question or instruction, as `apply_chat_template` takes it."""
    content = [{"type": "image", "image": picture} for picture in pictures]
    return [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]


def answer_batch(
    model, processor, questions: list[tuple[list, str]], task: str = "comprehension", max_new_tokens: int = 1024
) -> list[str]:
    """
    Answers questions greedily. In float32 the answers are those that each question gets alone.

    Args:
        model, processor: As `from_pretrained` loads them.
        questions (`list[tuple[list, str]]`): Pictures, of any kind that the processor takes, and the question about them.
        task (`str`, defaults to `"comprehension"`): A task of the model that answers in words.
        max_new_tokens (`int`, defaults to 1024): Longest answer.

    Returns:
        `list[str]`: An answer for each question, without spaces around it.
    """
    inputs = processor.apply_chat_template(
        [conversation(*question) for question in questions],
        task=task,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    sequences = model.generate(**inputs.to(model.device), task=task, do_sample=False, max_new_tokens=max_new_tokens)
    answers = processor.batch_decode(sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [answer.strip() for answer in answers]
