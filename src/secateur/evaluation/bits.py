"""Bits a byte: perplexity without the tokenizer in it, so that vocabularies do not matter.

The nats of all predicted tokens, divided by ln 2 and by the UTF-8 bytes of the text they stand for.
"""

import math
from typing import Any

from torch import Tensor

from secateur.system.intervals import Floats


def text_bytes(tokenizer: Any, ids: Tensor) -> int:
    """The UTF-8 bytes of what the predicted tokens of windows `[windows, length]` stand for.

    That is all of a window but its first token. Special tokens have none, and a character that a
    window's border cuts through counts as the three bytes of its stand-in.
    """
    return sum(_bytes(tokenizer, one) - _bytes(tokenizer, one[:1]) for one in ids.tolist())


def _bytes(tokenizer: Any, ids: list[int]) -> int:
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return len(text.encode())


def bits_per_byte(loss: Floats, length: int, size: int) -> float | None:
    """Bits a byte of mean losses `[windows]` in nats, over windows of `length` tokens whose
    predicted ones stand for `size` bytes; None where there are none.
    """
    return float(loss.sum()) * (length - 1) / math.log(2) / size if size else None
