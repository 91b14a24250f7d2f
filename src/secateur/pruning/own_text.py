"""Calibration on the model's own text: the dense model answers prompts, and is calibrated on both.

What a pruned model will see at work is what it said itself, not a corpus: reasoning models that
were calibrated on their own chains of thought keep more (RAC, arXiv:2509.12464). Prompts are
answered in an order by the seed, batch by batch, until there are tokens enough; a batch is safe on
disk when the next begins, so a run that died goes on with the same tokens.
"""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from secateur.checkpoints.journal import Journal, differences
from secateur.data.prompts import PREFIX, Prompt, prompt_files, read_prompts
from secateur.data.reader import Reader
from secateur.data.windows import Windows
from secateur.errors import ConditionsDiffer, Interrupted, NotEnoughText, UnsupportedModel
from secateur.models.context import context
from secateur.models.generate import Drawing, answers, on_device, stop_tokens
from secateur.models.replay import LanguageModel
from secateur.pruning.planning.drawing import Speech, fitting_batch
from secateur.pruning.planning.outline import build
from secateur.system.devices import Resources
from secateur.system.files import disk_errors, file_sha256
from secateur.system.machine import versions
from secateur.system.progress import Progress
from secateur.system.settings import CalibrationText

BATCH = "batch"


@dataclass(frozen=True)
class Workplace:
    """Where a run keeps what it has generated, on what it runs, and what it shows.

    `weights` gives the digests of the model's shards; `restart`: what lies in `file` is discarded.
    """

    file: Path
    weights: Callable[[], dict[str, str]]
    resources: Resources
    progress: Progress
    restart: bool = False


def own_file(out: Path) -> Path:
    """Where a run that writes `out` keeps what its model said, until it is done."""
    out = out.resolve()
    return out.with_name(f".{out.name}.self")


def own_windows(
    language_model: LanguageModel,
    reader: Reader,
    text: CalibrationText,
    length: int,
    place: Workplace,
) -> Windows:
    """`text.samples` windows of `length` tokens of prompts and the dense model's answers.

    Raises BadText; NotEnoughText where the prompts end too soon; ConditionsDiffer, OutputRefused.
    """
    source, model = str(text.calibration), language_model.model
    drawing = Drawing(
        text.self_temperature, text.self_tokens, stop_tokens(model, reader.tokenizer), text.seed
    )
    longest = (context(model.config) or 2**20) - text.self_tokens
    prompts = read_prompts(reader.tokenizer, source, longest=longest, seed=text.seed)
    batch_size = _batch_size(language_model, prompts, drawing.tokens, place.resources)
    conditions = {
        "model": place.weights(),
        "prompts": [file_sha256(file) for file in prompt_files(source)],
        "template": hashlib.sha256(str(reader.tokenizer.chat_template).encode()).hexdigest(),
        "temperature": drawing.temperature,
        "tokens": drawing.tokens,
        "stop": list(drawing.stop),
        "seed": text.seed,
        "batch_size": batch_size,
        "device": place.resources.devices[0].type,
        "versions": versions(),
    }
    journal = _journal(place.file)
    try:
        _taken_up(journal, conditions, place)
        wanted = text.samples * length
        batches = [prompts[at : at + batch_size] for at in range(0, len(prompts), batch_size)]
        said = _generated(language_model, batches, drawing, (journal, wanted), place)
    except KeyboardInterrupt as error:
        raise Interrupted(
            f"Interrupted. The same command goes on after the {len(journal.of(BATCH))} batches of "
            f"answers that are kept in {place.file}."
        ) from error
    finally:
        journal.close()
    facts = {"temperature": drawing.temperature, "tokens": drawing.tokens, **_facts(said)}

    def draw(reading: Any, inner: int) -> Windows:
        """The first windows of the stream, whose documents are in a random order already."""
        stream = _stream(reader, said)
        needed = text.samples * inner
        if len(stream) < needed:
            raise NotEnoughText(
                f"{text.samples} samples of {length} tokens need {needed:,} tokens; {len(said)} "
                f"prompts of {source} and their answers have {len(stream):,}. Use more prompts, "
                "greater --self-tokens, or fewer --samples."
            )
        ids = stream[:needed].view(text.samples, inner)
        return Windows(ids, source, "self", text.seed, len(stream), generated=facts)

    return reader.windows(length, draw)


def _journal(file: Path) -> Journal:
    """What was said before, where something was. Raises OutputRefused, DiskFull."""
    with disk_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        return Journal(file)


def _batch_size(
    language_model: LanguageModel, prompts: list[Prompt], tokens: int, resources: Resources
) -> int:
    """How many prompts are answered at once, by the options alone: a run that died goes on so."""
    if resources.limit is None:
        return resources.batch_size
    model, longest = language_model.model, max(len(prompt.ids) for prompt in prompts)
    on_host = resources.devices[0].type == "cpu"
    try:
        speech = Speech(build(model.config, model.dtype), longest, tokens, on_host)
        return fitting_batch(speech, resources)
    except UnsupportedModel:  # its keys and values are not known without numbers
        return resources.batch_size


def _taken_up(journal: Journal, conditions: dict[str, Any], place: Workplace) -> None:
    """Begin the journal, or go on with it. Raises ConditionsDiffer where that cannot be."""
    if journal.conditions is not None and not place.restart:
        differing = differences(journal.conditions, conditions)
        if not differing:
            return
        if journal.entries:
            raise ConditionsDiffer(
                f"What the model said before, in {place.file}, has other conditions: "
                f"{'; '.join(differing)}. Give the same to go on, or discard it with --restart."
            )
    journal.begin(conditions)


def _generated(
    language_model: LanguageModel,
    batches: list[list[Prompt]],
    drawing: Drawing,
    kept: tuple[Journal, int],
    place: Workplace,
) -> list[tuple[list[int], list[int]]]:
    """(prompt, answer) of as many prompts as make `wanted` tokens; made where they are not kept."""
    journal, wanted = kept
    place.progress.begin("the dense model answers prompts")
    said: list[tuple[list[int], list[int]]] = []
    model, done, recorded = None, 0, journal.of(BATCH)
    for number, batch in enumerate(batches):
        if done >= wanted:
            break
        if number < len(recorded):
            answered = recorded[number]
        else:
            model = model or on_device(language_model.model, place.resources.devices[0])

            def advance(step: int, done: int = done, rows: int = len(batch)) -> None:
                place.progress.advance("tokens", min(done + step * rows, wanted - 1), wanted)

            answered = answers(model, batch, drawing, advance)
            journal.add(BATCH, answered)
        said += [(prompt.ids, answer) for prompt, answer in zip(batch, answered, strict=True)]
        done = sum(len(prompt) + len(answer) for prompt, answer in said)
    place.progress.advance("tokens", wanted, wanted)
    return said


def _facts(said: Iterable[tuple[list[int], list[int]]]) -> dict[str, Any]:
    """How many prompts were answered, and in how many tokens."""
    counts = [len(answer) for _, answer in said]
    return {"prompts": len(counts), "answer_tokens": sum(counts)}


def _stream(reader: Reader, said: Iterable[tuple[list[int], list[int]]]) -> torch.Tensor:
    """Prompts and answers as one stream; where answers alone count, prompts as complements."""
    ids: list[int] = []
    for prompt, answer in said:
        read = reader.read(prompt)
        ids += ([~one for one in read] if reader.counted == "assistant" else read) + answer
    return torch.tensor(ids, dtype=torch.int64)


def refuse_ranks(text: CalibrationText, ranks: int) -> None:
    """Raise UnsupportedModel where several processes would each generate the text."""
    if ranks > 1 and str(text.calibration).startswith(PREFIX):
        raise UnsupportedModel(
            f"{text.calibration} is generated by one process; found {ranks}. Run it in one."
        )
