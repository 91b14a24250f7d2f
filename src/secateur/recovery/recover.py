"""The program for recovery: a pruned checkpoint and some text in, the same checkpoint with better
weights out.

    the mask is read from the weights, and must be what pruning.json says
    → windows of text, none seen before
    → trained under the mask: all of the model at once (`finetune`), or block by block (`blocks`)
    → rounded as stored, zeros where zeros were → the mask of what was written is compared with the
    first, weight by weight, before it gets its name

Whatever the way, the mask at the end is the mask at the beginning. A structured result has no mask;
it is trained as the dense model that it is.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.checkpoints.folder import open_checkpoint, stored_dtype
from secateur.checkpoints.output_folder import check_output_folder
from secateur.data.bos import readable
from secateur.data.calibration import calibration_windows
from secateur.data.overlap import RUN
from secateur.data.reader import Reader
from secateur.data.tokenizer import load_tokenizer
from secateur.data.windows import Windows, evaluation_windows
from secateur.errors import SecateurError
from secateur.models.context import check_windows, default_length, reader_of, width
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
    refuse_values,
)
from secateur.recovery.job import Dense, Job, Pruned, Recovery
from secateur.recovery.text import recovery_windows
from secateur.system.devices import find_devices, training_dtype
from secateur.system.progress import Progress
from secateur.system.settings import Destination, Training, TrainingText, Trust, taken

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
    bos: str = TrainingText.bos,
    avoid: Sequence[Tensor] = (),
    overwrite: bool = Destination.overwrite,
    restart: bool = Destination.restart,
    trust_remote_code: bool = Trust.trust_remote_code,
    revision: str | None = Trust.revision,
    command: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> Recovery:
    """Fine-tune a pruned checkpoint so that its zeros stay, and write it to `out`.

    `apart`: nothing of calibration, `evaluation` or `avoid` is trained on. Raises SecateurError.
    """
    training, texts = taken(Training, locals()), readable(taken(TrainingText, locals()))
    destination, trust = taken(Destination, locals()), taken(Trust, locals())
    check_way(training, dense)
    with joined(device) as (ranks, device):
        progress = (progress if ranks.first else None) or Progress()
        check_numbers(training, chosen := find_devices(device)[0])
        pruned = _pruned(model, way, destination, trust, progress)
        target = None if dense is None else _dense(dense, pruned, trust)
        progress.begin("reading text")
        windows, apart = _windows(pruned, texts, training, ranks.size, avoid, trust)
        job = Job(
            training=training,
            rate=rate or rate_of(way, pruned.language_model),
            dtype=ranks.same(lambda: dtype_of(way, dtype, chosen, stored_dtype(pruned.source))),
            pruned=pruned,
            dense=target,
            windows=windows,
            destination=destination,
            trust=trust,
            device=chosen,
            progress=progress,
            ranks=ranks,
            apart=apart,
        )
        recovery = run(job)
        progress.end()
    return recovery


def run(job: Job) -> Recovery:
    """Train and write; for a job whose models are loaded and whose text is drawn already."""
    if job.training.way == "blocks":
        return recover_blocks(job)
    from secateur.recovery.finetune import finetune  # needs packages that not everybody has

    return finetune(job)


def rate_of(way: str, pruned: LanguageModel) -> float:
    """The highest rate of a way where none is asked for; that of blocks is relative (`refine`)."""
    if way == "blocks":
        return RATE
    kind = "lora" if way.startswith("lora") else "distill" if way.endswith("distill") else "masked"
    return RATES[kind] / width(pruned)


def dtype_of(way: str, dtype: str, device: torch.device, stored: torch.dtype) -> str:
    """What is multiplied in training; blocks are trained in float32. Raises UnknownName."""
    return "float32" if way == "blocks" else training_dtype(dtype, device, stored)


def _pruned(
    model: str | Path, way: str, destination: Destination, trust: Trust, progress: Progress
) -> Pruned:
    """The pruned model, which is what its record says. Raises SecateurError."""
    folder = resolve(model, trust, progress=progress)
    source = open_checkpoint(folder)
    check_output_folder(source, Path(destination.out), overwrite=destination.overwrite)
    record = pruning_record(source)
    progress.begin(f"loading {model}")
    pruned = Pruned(source, record, load(folder, trust_remote_code=trust.trust_remote_code))
    refuse_dropout(pruned)
    refuse_values(pruned, way)
    refuse_other_weights(pruned)
    return pruned


def _dense(model: str | Path, pruned: Pruned, trust: Trust) -> Dense:
    """The model that was pruned. Raises SecateurError."""
    folder = resolve(model, replace(trust, revision=None))
    dense = Dense(folder, load(folder, trust_remote_code=trust.trust_remote_code))
    refuse_other_model(pruned, dense, trust)
    return dense


def _windows(
    pruned: Pruned,
    texts: TrainingText,
    training: Training,
    processes: int,
    avoid: Sequence[Tensor],
    trust: Trust,
) -> tuple[Windows, bool]:
    """The windows to train on, and whether it is sure that none was calibrated on."""
    source, record, language_model = pruned
    local = Path(texts.data_dir) if texts.data_dir else None
    tokenizer = load_tokenizer(source.folder, trust_remote_code=trust.trust_remote_code)
    calibration = record.get("calibration")
    # the parts of the demo's text do not overlap
    demo = isinstance(calibration, dict) and calibration.get("source") == "demo"
    calibrated = None if demo else _calibrated(calibration, tokenizer, local)
    seen = [*avoid, *([calibrated.ids] if calibrated else [])]
    if texts.evaluation:  # in windows so short that nearly all of it is there
        judged = evaluation_windows(tokenizer, texts.evaluation, length=RUN, data_dir=local)
        seen.append(judged.ids)
    windows = reader_of(language_model, tokenizer, texts.bos).windows(
        texts.seq_len or default_length(language_model),
        lambda reading, length: recovery_windows(
            reading,
            texts.text or ("demo" if demo else "c4"),
            count=training.steps * training.batch_size * training.accumulate * processes,
            length=length,
            seed=training.seed,
            avoid=seen,
            data_dir=local,
        ),
    )
    check_windows(language_model, windows, training.batch_size)
    return windows, demo or calibrated is not None


def _calibrated(calibration: Any, tokenizer: Any, data_dir: Path | None) -> Windows | None:
    """The windows that a record says were calibrated on; None where they cannot be drawn again."""
    if not isinstance(calibration, dict):
        return None
    try:
        reader = Reader(
            tokenizer, str(calibration.get("bos", "stream")), str(calibration.get("counted", "all"))
        )
        windows = reader.windows(
            int(calibration["length"]),
            lambda reading, length: calibration_windows(
                reading,
                str(calibration["source"]),
                samples=int(calibration["samples"]),
                length=length,
                seed=int(calibration["seed"]),
                data_dir=data_dir,
            ),
        )
    except (SecateurError, KeyError, TypeError, ValueError):
        return None
    return windows if windows.fingerprint()["sha256"] == calibration.get("sha256") else None
