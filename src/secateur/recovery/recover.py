"""The program for recovery: a pruned checkpoint and some text in, the same checkpoint with better weights out.

    the mask is read from the weights, and must be what pruning.json says → windows of text, none calibrated on
    → adapters, or the weights themselves, are trained under the mask → rounded as stored, zeros where zeros were
    → the mask of what was written is compared with the first, weight by weight, before it gets its name

Whatever the way, the mask at the end is the mask at the beginning. A structured result has no mask; it is trained as
the dense model that it is.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from secateur.checkpoint import RECORD, Checkpoint, open_checkpoint, resolve
from secateur.data import Windows, calibration_windows, load_tokenizer
from secateur.errors import (
    BadCheckpoint,
    ConditionsDiffer,
    Interrupted,
    SecateurError,
    UnknownName,
    UnsupportedModel,
)
from secateur.files import fits, read_json
from secateur.inspection import record_of
from secateur.interrupt import asked_to_stop
from secateur.journal import differences
from secateur.machine import versions
from secateur.model import load
from secateur.options import check_windows, default_length, find_devices
from secateur.output import output, refuse_output, stamps
from secateur.progress import Progress
from secateur.recovery.text import recovery_windows
from secateur.recovery.write import masks, refuse_other_masks, written
from secateur.replay import LanguageModel
from secateur.sites import sites

WAYS = {
    "lora": "adapters on every linear layer, merged under the mask",
    "masked": "all weights, what is zero stays zero",
    "distill": "all weights, towards what the dense model says next; the same as masked+distill",
    "lora+distill": "adapters, towards what the dense model says next",
    "masked+distill": "all weights, towards what the dense model says next",
}
RATES = {"lora": 1e-3, "masked": 3e-4}
"""Of the ways; the demo model was tried with three each (docs/recovery.md)."""
PACKAGES = ("peft", "accelerate")
WORDS = "A model is pruned.\ndef f(x):\n    return x + 1  # Zürich 東京 0123456789"


@dataclass(frozen=True)
class Recovery:
    """What a recovery did: by which way, on how much text, in how many seconds over all runs, and the loss by step."""

    way: str
    steps: int
    tokens: int
    seconds: float
    rate: float
    seed: int
    text: dict[str, Any]
    sparsity: float
    loss: list[tuple[int, float]] = field(repr=False)
    dense: str | None = None
    rank: int | None = None
    out: Path | None = None


def recover(
    model: str | Path,
    *,
    out: str | Path,
    dense: str | Path | None = None,
    way: str = "lora",
    text: str | None = None,
    steps: int = 500,
    seq_len: int | None = None,
    batch_size: int = 8,
    accumulate: int = 1,
    rate: float | None = None,
    rank: int = 16,
    save_every: int = 100,
    gradient_checkpointing: bool = False,
    seed: int = 0,
    device: str = "auto",
    data_dir: str | Path | None = None,
    avoid: Sequence[Tensor] = (),
    overwrite: bool = False,
    restart: bool = False,
    trust_remote_code: bool = False,
    command: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> Recovery:
    """Fine-tune a pruned checkpoint so that its zeros stay, and write it to `out`; returns what was done.

    `way`: a key of `WAYS`; those that distill want `dense`, the model that was pruned. `text` names a corpus or files
    (default: c4, the demo's training text for the demo model); every step sees `accumulate` × `batch_size` windows of
    `seq_len` tokens, none twice, none that was calibrated on, and none that overlaps windows in `avoid`
    `[windows, length]`. `rank` is that of the adapters. The arithmetic is float32, on GPUs under bfloat16 autocast. A
    checkpoint of the training is kept every `save_every` steps: the same call goes on after it. Raises SecateurError;
    NonFinite where the loss is NaN, and then the last checkpoint is kept.
    """
    progress, started, out = progress or Progress(), perf_counter(), Path(out)
    check_way(way, dense)
    refuse_output(out, overwrite=overwrite)
    chosen = find_devices(device)[0]
    folder = resolve(model)
    source = open_checkpoint(folder)
    record = _record(source)
    progress.begin(f"loading {model}")
    language_model = load(folder, trust_remote_code=trust_remote_code)
    kept = masks(language_model)
    _refuse_other_record(source, language_model, record)
    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    reference = None
    if dense is not None:
        reference = load(resolve(dense), trust_remote_code=trust_remote_code)
        _refuse_stranger(language_model, reference, folder, resolve(dense), smaller=record.get("kind") == "structured")
    trained = "lora" if way.startswith("lora") else "masked"
    from secateur.recovery.training import Schedule, train

    schedule = Schedule(
        steps, batch_size, accumulate, rate or RATES[trained], save_every, seed, checkpointing=gradient_checkpointing
    )
    length = seq_len or default_length(language_model)
    local = Path(data_dir) if data_dir else None
    progress.begin("reading text")
    windows = recovery_windows(
        tokenizer, text or ("demo" if _is_demo(record) else "c4"), count=schedule.windows, length=length, seed=seed,
        avoid=[*avoid, *_calibrated(record, tokenizer, local)], data_dir=local,
    )  # fmt: skip
    check_windows(language_model, windows, batch_size)
    conditions = {
        "way": way, **asdict(schedule), "rank": rank, "text": windows.fingerprint(), "device": chosen.type,
        "versions": versions(), "files": stamps(source),
    }  # fmt: skip
    place = out.resolve().with_name(f".{out.name}.recovery")
    spent = _taken_up(place, conditions, restart)
    adapted: Any = language_model.model.float()
    language_model.model.requires_grad_(True)
    if trained == "lora":
        from secateur.recovery.lora import with_adapters

        adapted = with_adapters(language_model.model, _linear(language_model), rank, seed)
    else:
        _hold(language_model, kept)
    progress.begin(f"recovering with {way}")
    try:
        with asked_to_stop("after this step") as stopping:
            loss = train(
                adapted, windows.ids, schedule, place, device=chosen, progress=progress, stopping=stopping,
                dense=reference.model.float() if reference and way.endswith("distill") else None,
            )  # fmt: skip
    finally:
        spent += perf_counter() - started
        (place / "seconds.json").write_text(json.dumps(spent))
    if not loss or loss[-1][0] < steps:
        raise Interrupted(f"Stopped after step {loss[-1][0] if loss else 0}. The same command goes on from there.")
    if trained == "lora":
        adapted.merge_and_unload()
    language_model.model.to(torch.device("cpu")).requires_grad_(False)  # type: ignore[arg-type]
    done = Recovery(
        way, steps, windows.ids.numel(), spent, schedule.rate, seed, windows.fingerprint(), float(record["sparsity"]),
        loss, str(dense) if dense else None, rank if trained == "lora" else None, out,
    )  # fmt: skip
    progress.begin("writing")
    with output(source, out, overwrite=overwrite) as result:
        for tensors in written(language_model, source, kept, only_sites=trained == "lora"):
            result.write(tensors)
        refuse_other_masks(source, open_checkpoint(result.partial), language_model)
        kept_record = {key: value for key, value in asdict(done).items() if key != "out"}
        typed = list(command) if command is not None else [Path(sys.argv[0]).name, *sys.argv[1:]]
        earlier = [*record.get("recovery", []), {**kept_record, "command": typed, "versions": versions()}]
        result.finish({**record, "recovery": earlier})
    shutil.rmtree(place, ignore_errors=True)
    progress.end()
    return done


def check_way(way: str, dense: str | Path | None) -> None:
    """Raise UnknownName or UnsupportedModel for a way that is not there, or that lacks what it needs."""
    if way not in WAYS:
        raise UnknownName("way to recover", way, WAYS)
    if way.endswith("distill") and dense is None:
        raise UnsupportedModel(f"{way} aims at what the dense model says; name it with --dense.")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UnsupportedModel("Recovery runs in one process; it was started in several. Start it without torchrun.")
    if absent := [name for name in PACKAGES if find_spec(name) is None]:
        raise UnsupportedModel(
            f"Recovery needs the package {' and '.join(absent)}. Install it: pip install 'secateur[recover]'."
        )


def _record(source: Checkpoint) -> dict[str, Any]:
    """What pruning.json says. Raises BadCheckpoint where there is none."""
    record = record_of(source.folder)
    if record is None:
        raise BadCheckpoint(f"{source.folder} has no {RECORD}; a folder that 'secateur prune' wrote is wanted.")
    earlier = fits(record.get("recovery", []), list[dict[str, Any]])
    if not earlier or not fits(record.get("sparsity"), float) or not fits(record.get("sites"), list[Any]):
        raise BadCheckpoint(f"{source.folder / RECORD} is no record of a pruning run. Prune again.")
    return record


def _refuse_other_record(source: Checkpoint, language_model: LanguageModel, record: Mapping[str, Any]) -> None:
    """Raise BadCheckpoint where the zeros of a site are not as many as pruning.json says."""
    if record.get("kind") == "structured":
        return
    said = {
        site["site"]: site["sparsity"] for site in record["sites"] if fits(site, dict[str, Any])
        and isinstance(site.get("site"), str) and fits(site.get("sparsity"), float)
    }  # fmt: skip
    for index, block in enumerate(language_model.blocks):
        for name, site in sites(block).items():
            full = f"{language_model.block_name(index)}.{name}"
            zeros = (site.weight == 0).sum().item() / site.weight.numel()
            if full not in said or abs(zeros - said[full]) * site.weight.numel() > 0.5:
                raise BadCheckpoint(
                    f"{full} has {zeros:.2%} zeros, and {source.folder / RECORD} says {said.get(full)}. The folder was "
                    "changed after it was pruned; prune again."
                )


def _refuse_stranger(
    model: LanguageModel, dense: LanguageModel, folder: Path, other: Path, *, smaller: bool
) -> None:  # fmt: skip
    """Raise UnsupportedModel where the dense model has another architecture, vocabulary or tokenizer.

    A `smaller` model may be carried by another architecture than the dense one, as Llama by Mistral.
    """
    one, two = (language_model.model.config.get_text_config() for language_model in (model, dense))
    if type(model.model).__name__ != type(dense.model).__name__ and not smaller:
        raise UnsupportedModel(
            f"{folder} is a {type(model.model).__name__}, {other} a {type(dense.model).__name__}. Name the dense model "
            "that was pruned."
        )
    if (one.hidden_size, one.vocab_size) != (two.hidden_size, two.vocab_size):
        raise UnsupportedModel(
            f"{folder} has width {one.hidden_size} and {one.vocab_size} tokens, {other} {two.hidden_size} and "
            f"{two.vocab_size}. Name the dense model that was pruned."
        )
    ours, theirs = load_tokenizer(folder), load_tokenizer(other)
    if ours.get_vocab() != theirs.get_vocab() or ours.encode(WORDS) != theirs.encode(WORDS):
        raise UnsupportedModel(f"{folder} and {other} have different tokenizers. Name the dense model that was pruned.")


def _is_demo(record: Mapping[str, Any]) -> bool:
    calibration = record.get("calibration")
    return isinstance(calibration, dict) and calibration.get("source") == "demo"


def _calibrated(record: Mapping[str, Any], tokenizer: Any, data_dir: Path | None) -> list[Tensor]:
    """The windows that the model was calibrated on, drawn again; nothing where their text is not to be had."""
    said = record.get("calibration")
    if not isinstance(said, dict) or said.get("source") == "demo":  # the demo's parts do not overlap
        return []
    try:
        windows: Windows = calibration_windows(
            tokenizer, str(said["source"]), samples=int(said["samples"]), length=int(said["length"]),
            seed=int(said["seed"]), data_dir=data_dir,
        )  # fmt: skip
    except (SecateurError, KeyError, TypeError, ValueError):
        return []
    return [windows.ids]


def _taken_up(place: Path, conditions: Mapping[str, Any], restart: bool) -> float:
    """The seconds that a run which died here has taken already. Raises ConditionsDiffer where it was another."""
    if restart:
        shutil.rmtree(place, ignore_errors=True)
    wanted = json.loads(json.dumps(conditions))
    file = place / "conditions.json"
    if not file.exists():
        place.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(wanted))
        return 0.0
    if differing := differences(read_json(file), wanted):
        raise ConditionsDiffer(
            f"A half-finished recovery in {place} has other conditions: {'; '.join(differing)}. Give the same to go "
            "on, choose another --out, or discard it with --restart."
        )
    seconds = place / "seconds.json"
    return float(read_json(seconds)) if seconds.exists() else 0.0


def _linear(language_model: LanguageModel) -> list[str]:
    """The full names of the linear layers that are sites; stacks of experts have no place for an adapter."""
    found = [
        f"{language_model.block_name(index)}.{name}"
        for index, block in enumerate(language_model.blocks)
        for name, site in sites(block).items()
        if not site.expert
    ]
    if not found:
        raise UnsupportedModel("No linear layer here can have an adapter. Recover with --with masked.")
    return found


def _hold(language_model: LanguageModel, kept: Mapping[str, Tensor]) -> None:
    """Let no gradient reach a weight that is zero: Adam then moves it by nothing."""
    for name, mask in kept.items():
        parameter = language_model.model.get_parameter(name)
        parameter.register_hook(lambda gradient, mask=mask: gradient * mask.to(gradient.device))
