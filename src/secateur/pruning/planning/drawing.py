"""What the calibration text takes before the first block: text that is drawn, or that the dense
model makes itself.

Of drawn text there are the text at hand, the ids of all tokens of a small corpus, and what
tokenising takes. A model that answers prompts holds the keys and values of a batch of them; they
are counted on the meta device, and batches are as small as a limit wants them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from secateur.data.calibration import drawing_bytes
from secateur.data.prompts import PREFIX, prompt_characters
from secateur.errors import UnsupportedModel, in_one_line
from secateur.models.context import default_corpus, vocabulary_size
from secateur.models.replay import LanguageModel
from secateur.pruning.planning.memory import ALLOCATOR_BYTES, PROCESS_BYTES, Moment, Parts
from secateur.pruning.planning.meta import META, without_numbers
from secateur.pruning.planning.outline import build, outline
from secateur.pruning.planning.passes import Workload
from secateur.system.clock import best_seconds
from secateur.system.devices import Resources
from secateur.system.settings import CalibrationText

TOKENISING_BYTES = 10**8
"""Pieces of text and what the tokenizer makes of them: 41 to 91 MB in bench/results/text.json."""
CHARACTERS_A_TOKEN = 3
"""Of a prompt, fewer than most text has."""
OF_LOGITS = 6
"""Arrays of a batch's logits, in float32, of which a token is drawn: they, scaled, and noise."""


@dataclass(frozen=True)
class TextForecast:
    """What the calibration text takes. Of text that the model makes itself also: prompts in a
    batch, the most tokens that it says, and seconds, None where nothing was measured.
    """

    memory: Moment
    batch_size: int | None = None
    tokens: int | None = None
    seconds: float | None = None


class Speech(NamedTuple):
    """A model, in the dtype in which it is stored, that answers prompts of at most `prompt` tokens
    with at most `answer` tokens.
    """

    built: LanguageModel
    prompt: int
    answer: int
    on_host: bool

    def parts(self, batch: int) -> Parts:
        """Bytes that are alive by name while a batch is answered. Raises UnsupportedModel."""
        model, itemsize = self.built.model, self.built.model.dtype.itemsize
        kept = _cache_bytes(self.built, self.prompt + self.answer)
        seen = outline(self.built, batch, self.prompt)
        logits = batch * vocabulary_size(model)
        return {
            "process": PROCESS_BYTES,
            "allocator": ALLOCATOR_BYTES,
            # what grows is copied, a layer at a time
            "keys and values": batch * (sum(kept) + max(kept, default=0)),
            "logits": logits * (itemsize + 4 * OF_LOGITS),
            "activations": max(kind.peak_bytes for kind in seen.kinds) + 2 * seen.hidden_bytes,
            "weights": 0 if self.on_host else sum(p.numel() for p in model.parameters()) * itemsize,
        }

    def operations(self, batch: int, tokens: int) -> float:
        """Of a pass of a batch through the model, with the logits of the last of its `tokens`."""
        model = self.built.model
        blocks = sum(kind.flops * kind.count for kind in outline(self.built, batch, tokens).kinds)
        embedded: Any = model.get_input_embeddings().weight
        return blocks + 2 * batch * embedded.numel()


def fitting_batch(speech: Speech, resources: Resources) -> int:
    """How many prompts are answered at once: as many as asked for, or as fit into the limit."""
    size, limit = resources.batch_size, resources.limit
    while limit is not None and size > 1 and sum(speech.parts(size).values()) > limit:
        size //= 2
    return size


def text_forecast(
    work: Workload,
    text: CalibrationText,
    model: str | Path | None,
    resources: Resources,
    *,
    measure: bool,
) -> TextForecast:
    """What the calibration text takes; seconds where rates are to be measured. Raises BadText,
    UnknownName; and UnsupportedModel for a model whose keys and values are not known without
    numbers.
    """
    source = default_corpus(model, text.calibration, "c4")
    if source.startswith(PREFIX):
        characters = prompt_characters(source)
        speech = _speech(work, text, characters)
        batch = fitting_batch(speech, resources)
        said = _answered(characters, work.samples * work.length, text.self_tokens)
        moment = _moment("answering prompts", speech.parts(batch), work.on_host)
        seconds = (
            ceil(said / batch) * _seconds(work, speech, characters, batch) if measure else None
        )
        return TextForecast(moment, batch, said * text.self_tokens, seconds)
    folder = Path(text.data_dir) if text.data_dir else None
    held = drawing_bytes(source, samples=work.samples, length=work.length, data_dir=folder)
    parts: Parts = {"process": PROCESS_BYTES, "tokenising": TOKENISING_BYTES, **held}
    parts["calibration tokens"] = 8 * work.samples * work.length
    return TextForecast(_moment("drawing the calibration text", parts, True))


def _seconds(work: Workload, speech: Speech, characters: Sequence[int], batch: int) -> float:
    """How long a model takes to answer a batch of prompts: a pass a token, at the rate of products
    of so few rows, and one for the prompts.
    """
    prompt = max(sum(characters) // len(characters) // CHARACTERS_A_TOKEN, 1)
    few, many = (_rate(work, rows) for rows in (batch, batch * prompt))
    read, step = speech.operations(batch, prompt) / many, speech.operations(batch, 1) / few
    return read + speech.answer * step


def _speech(work: Workload, text: CalibrationText, characters: Sequence[int]) -> Speech:
    longest = max(characters) // CHARACTERS_A_TOKEN + 1
    built = work.built
    if built.model.dtype != work.stored:
        built = build(built.model.config, work.stored)
    return Speech(built, longest, text.self_tokens, work.on_host)


def _answered(characters: Sequence[int], wanted: int, answer: int) -> int:
    """How many prompts are answered until there are `wanted` tokens, if each answer is that long"""
    mean = sum(characters) / len(characters) / CHARACTERS_A_TOKEN
    return min(ceil(wanted / (mean + answer)), len(characters))


def _moment(when: str, parts: Parts, on_host: bool) -> Moment:
    sizes = {name: int(size) for name, size in parts.items() if size}
    total = sum(sizes.values())
    in_host = sum(sizes.get(name, 0) for name in ("process", "allocator"))
    return Moment(when, sizes, total, 0 if on_host else total - in_host)


@torch.no_grad()
def _cache_bytes(built: LanguageModel, length: int) -> list[int]:
    """The bytes that each layer keeps of a sequence of so many tokens.

    Raises UnsupportedModel where that cannot be told without numbers.
    """
    try:
        with without_numbers(built.model):
            ids = torch.zeros(1, length, dtype=torch.long, device=META)
            cache: Any = built.model(ids, use_cache=True).past_key_values
            layers = [vars(layer).values() for layer in cache.layers]
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        raise UnsupportedModel(
            f"What {type(built.model).__name__} keeps of a text is not known before it runs: "
            f"{in_one_line(error)}."
        ) from error
    return [sum(one.nbytes for one in layer if isinstance(one, Tensor)) for layer in layers]


def _rate(work: Workload, rows: int) -> float:
    """Operations a second of products of `rows` by a matrix that no cache holds, measured now."""
    device, side = work.devices[0], 4096
    x = torch.randn(rows, side, dtype=work.stored, device=device)
    weight = torch.randn(2 * side, side, dtype=work.stored, device=device)
    seconds = best_seconds(lambda: torch.mm(x, weight.T), device)
    return 2 * rows * weight.numel() / seconds
