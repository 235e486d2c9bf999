"""Streamers for `generate`: what the model writes, shown while it writes."""

import itertools
import re
from collections.abc import Callable

import torch
from transformers.generation.streamers import BaseStreamer

BYTE = re.compile(r"<0x[0-9A-F]{2}>")


class AnswerStreamer(BaseStreamer):
    """
    Passes on an answer as it is written: in the end the very text that decoding all of it gives, without spaces around it.

    Args:
        processor: Decodes the ids.
        write (`Callable`): Called with every new piece of text, which later ids do not change any more.
    """

    def __init__(self, processor, write: Callable[[str], None]):
        self.processor, self.write = processor, write
        self.ids, self.text, self.written = None, "", 0

    def put(self, value: torch.LongTensor) -> None:
        if self.ids is None:  # the prompt comes first
            self.ids = []
            return
        self.ids += value.flatten().tolist()
        if BYTE.fullmatch(self.processor.tokenizer.convert_ids_to_tokens(self.ids[-1]) or ""):
            return  # SentencePiece: what a run of bytes stands for depends on the whole run
        before, self.text = self.text, self._decode()
        # What the last two texts share; a character of several bytes is a replacement character until it is whole.
        shared = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(before, self.text, strict=False))
        self._write("".join(new for _, new in shared).rstrip("\ufffd"))

    def end(self) -> None:
        self._write(self._decode())

    def _decode(self) -> str:
        return self.processor.decode(self.ids, skip_special_tokens=True).strip()

    def _write(self, text: str) -> None:
        if len(text) > self.written:
            self.write(text[self.written :])
            self.written = len(text)


class CodeCounter(BaseStreamer):
    """
    Counts the codes of a picture.

    Args:
        advance (`Callable`): Called with the number of codes that are new.
    """

    def __init__(self, advance: Callable[[int], None]):
        self.advance, self.started = advance, False

    def put(self, value: torch.LongTensor) -> None:
        if self.started:  # the prompt comes first
            self.advance(value.numel())
        self.started = True

    def end(self) -> None:
        pass
