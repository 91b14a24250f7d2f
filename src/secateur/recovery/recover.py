"""The program for recovery: a pruned checkpoint and some text in, the same checkpoint with better
weights out.

    the mask is read from the weights, and must be what pruning.json says → windows of text, none seen before
    → trained under the mask: all of the model at once (`whole`), or block by block (`blocks`)
    → rounded as stored, zeros where zeros were → the mask of what was written is compared with the first, weight by
    weight, before it gets its name

Whatever the way, the mask at the end is the mask at the beginning. A structured result has no mask;
it is trained as the dense model that it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.checkpoints.folder import open_checkpoint, stored_dtype
from secateur.checkpoints.result import check_output_folder
from secateur.data.windows import Windows, calibration_windows, evaluation_windows, load_tokenizer
from secateur.errors import SecateurError
from secateur.models.context import check_windows, default_length, width
from secateur.models.load import load, resolve
from secateur.models.replay import LanguageModel
from secateur.models.stream.distributed import joined
from secateur.models.stream.refine import RATE
from secateur.recovery.blocks import recover_blocks
from secateur.recovery.checks import (
    check_numbers,
    check_way,
    pruning_record,
    refuse_dropout,
    refuse_other_model,
    refuse_other_weights,
)
from secateur.recovery.job import Job, Recovery, Schedule
from secateur.recovery.text import RUN, recovery_windows
from secateur.system.devices import find_devices, training_dtype
from secateur.system.machine import typed_command
from secateur.system.progress import Progress
from secateur.system.settings import Destination, Training, TrainingText, Trust

RATES = {"lora": 0.2, "masked": 0.02, "distill": 0.14}
"""Of the ways, to be divided by the width of the model: Adam's rate for matrices falls as their
inputs grow (Yang et al. 2022, arXiv:2203.03466, table 3). The demo model, 192 wide, was tried with
several of each (docs/recovery.md).
"""


def recover(
    model: str | Path,
    *,
    out: str | Path,
    dense: str | Path | None = None,
    way: str = Training.way,
    text: str | None = TrainingText.text,
    evaluation: str | None = TrainingText.evaluation,
    steps: int = Training.steps,
    seq_len: int | None = TrainingText.seq_len,
    batch_size: int = Training.batch_size,
    accumulate: int = Training.accumulate,
    rate: float | None = Training.rate,
    rank: int = Training.rank,
    save_every: int = Training.save_every,
    gradient_checkpointing: bool = Training.gradient_checkpointing,
    seed: int = Training.seed,
    device: str = Training.device,
    dtype: str = Training.dtype,
    data_dir: str | Path | None = TrainingText.data_dir,
    avoid: Sequence[Tensor] = (),
    overwrite: bool = Destination.overwrite,
    restart: bool = Destination.restart,
    trust_remote_code: bool = Trust.trust_remote_code,
    command: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> Recovery:
    """Fine-tune a pruned checkpoint so that its zeros stay, and write it to `out`; returns what was
    done.

    `way`: a key of `WAYS`; those that distill, and blocks, want `dense`, the model that was pruned.
    `text` names a corpus or files (default: c4, the demo's training text for the demo model); every
    step sees `accumulate` × `batch_size` windows of `seq_len` tokens in each process, none twice,
    none that was calibrated on, and none that overlaps the corpus or files `evaluation` or windows
    in `avoid` `[windows, length]`; where the calibration text is not to be had any more, the result
    says so (`apart`). `rank` is that of the adapters. Weights are trained in float32; `dtype`
    bfloat16 multiplies under autocast, which `auto` does where they are stored in 16 bits and the
    device multiplies bfloat16. A checkpoint of the training is kept every `save_every` steps, of
    `blocks` after each block: the same call goes on after it. Raises SecateurError; NonFinite where
    the loss is NaN, and then the last checkpoint is kept.
    """
    check_way(way, dense, accumulate=accumulate, checkpointing=gradient_checkpointing, dtype=dtype)
    local = Path(data_dir) if data_dir else None
    with joined(device) as (ranks, device):
        progress = (progress if ranks.first else None) or Progress()
        chosen = find_devices(device)[0]
        check_numbers(rate, seed, chosen)
        folder = resolve(model)
        source = open_checkpoint(folder)
        check_output_folder(source, Path(out), overwrite=overwrite)
        record = pruning_record(source)
        progress.begin(f"loading {model}")
        pruned = load(folder, trust_remote_code=trust_remote_code)
        refuse_dropout(source, pruned)
        refuse_other_weights(source, pruned, record)
        reference, other = None, None if dense is None else resolve(dense)
        if other:
            reference = load(other, trust_remote_code=trust_remote_code)
            refuse_other_model(
                pruned,
                reference,
                folder,
                other,
                smaller=record.get("kind") == "structured",
                trust_remote_code=trust_remote_code,
            )
        schedule = Schedule(
            steps,
            batch_size,
            accumulate,
            rate or rate_of(way, pruned),
            save_every,
            seed,
            gradient_checkpointing,
            ranks.size,
            ranks.same(lambda: dtype_of(way, dtype, chosen, stored_dtype(source))),
        )
        progress.begin("reading text")
        tokenizer, length = (
            load_tokenizer(folder, trust_remote_code=trust_remote_code),
            default_length(pruned),
        )
        seen = list(avoid)
        if calibrated := _calibrated(record, tokenizer, local):
            seen.append(calibrated.ids)
        if evaluation:
            seen.append(
                evaluation_windows(tokenizer, evaluation, length=RUN, data_dir=local).ids
            )  # nearly all of it
        windows = recovery_windows(
            tokenizer,
            text or ("demo" if _is_demo(record) else "c4"),
            count=schedule.windows,
            length=seq_len or length,
            seed=seed,
            avoid=seen,
            data_dir=local,
        )
        check_windows(pruned, windows, batch_size)
        job = Job(
            way,
            source,
            record,
            pruned,
            reference,
            windows,
            schedule,
            rank,
            chosen,
            Path(out),
            overwrite,
            restart,
            typed_command(command),
            progress,
            ranks,
            other,
            trust_remote_code,
            calibrated is not None or _is_demo(record),
        )
        done = carry_out(job)
        progress.end()
    return done


def carry_out(job: Job) -> Recovery:
    """Train and write; for a job whose model is loaded and whose text is drawn already."""
    if job.way == "blocks":
        return recover_blocks(job)
    from secateur.recovery.finetune import recover_whole  # needs packages that not everybody has

    return recover_whole(job)


def rate_of(way: str, pruned: LanguageModel) -> float:
    """The highest rate of a way where none is asked for; that of blocks is relative, as `refine`
    says.
    """
    if way == "blocks":
        return RATE
    kind = "lora" if way.startswith("lora") else "distill" if way.endswith("distill") else "masked"
    return RATES[kind] / width(pruned)


def dtype_of(way: str, dtype: str, device: torch.device, stored: torch.dtype) -> str:
    """What is multiplied in training; blocks are trained in float32. Raises UnknownName."""
    return "float32" if way == "blocks" else training_dtype(dtype, device, stored)


def _is_demo(record: Mapping[str, Any]) -> bool:
    calibration = record.get("calibration")
    return isinstance(calibration, dict) and calibration.get("source") == "demo"


def _calibrated(record: Mapping[str, Any], tokenizer: Any, data_dir: Path | None) -> Windows | None:
    """The windows that the model was calibrated on, drawn again; None where their text is not to be
    had.
    """
    said = record.get("calibration")
    if not isinstance(said, dict) or _is_demo(record):  # the demo's parts do not overlap
        return None
    try:
        windows = calibration_windows(
            tokenizer,
            str(said["source"]),
            samples=int(said["samples"]),
            length=int(said["length"]),
            seed=int(said["seed"]),
            data_dir=data_dir,
        )
    except (SecateurError, KeyError, TypeError, ValueError):
        return None
    return windows if windows.fingerprint()["sha256"] == said.get("sha256") else None
