"""Rows that are fine-tuned after they were pruned: all with the same steps, on the same text, seen
nowhere else.
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from secateur.checkpoints.folder import open_checkpoint, stored_dtype
from secateur.checkpoints.record import record_of
from secateur.data.reader import Reader
from secateur.data.windows import Windows
from secateur.errors import BadCheckpoint, ConditionsDiffer, NonFinite, UnsupportedModel
from secateur.evaluation.comparison.options import Comparison
from secateur.evaluation.comparison.row_store import CHECKPOINTS, file_name
from secateur.evaluation.comparison.rows import ComparisonContext
from secateur.evaluation.results.schema import Recovered, Row
from secateur.models.context import check_windows, default_corpus
from secateur.models.load import load
from secateur.models.replay import LanguageModel
from secateur.recovery.checks import pruning_record, refuse_values
from secateur.recovery.job import Dense, Job, Pruned
from secateur.recovery.recover import dtype_of, rate_of
from secateur.recovery.recover import run as run_recovery
from secateur.recovery.text import recovery_windows
from secateur.system.settings import Training


def training_windows(
    asked: Comparison, language_model: LanguageModel, reader: Reader, avoid: Sequence[Windows]
) -> Windows | None:
    """The text that rows are fine-tuned on, apart from what is to avoid: the evaluation windows
    and those of the draws. None where no row is. Raises NotEnoughText.
    """
    if not asked.recovered.recover:
        return None
    windows = reader.windows(
        avoid[0].ids.shape[1],
        lambda reading, length: recovery_windows(
            reading,
            default_corpus(asked.model, asked.recovered.recover_text, "c4"),
            count=asked.recovered.recover_steps * Training.batch_size,
            length=length,
            seed=avoid[1].seed or 0,
            avoid=[known.ids for known in avoid],
            data_dir=asked.data_dir,
        ),
    )
    check_windows(language_model, windows, Training.batch_size)
    return windows


def recovered_rows(context: ComparisonContext, pruned: Row, refused: dict[str, str]) -> list[Row]:
    """The rows of a pruned checkpoint after it was fine-tuned in each way; of those that cannot be,
    the reason is put into `refused`.
    """
    rows: list[Row] = []
    for way in dict.fromkeys(context.asked.recovered.recover):
        row = replace(pruned, recovered=_planned(context, way), latency=[], sites=[])
        try:
            rows.append(_recovered_row(context, row, context.out / str(pruned.checkpoint)))
        except (UnsupportedModel, NonFinite) as error:
            # adapters for experts, blocks that are gone, a loss of NaN
            refused[row.name] = str(error)
    return rows


def _planned(context: ComparisonContext, way: str) -> Recovered:
    """What a row says of a way, apart from the seconds that it took."""
    asked, windows = context.asked, context.training
    assert windows is not None
    return Recovered(
        way,
        asked.recovered.recover_steps,
        windows.ids.numel(),
        rate_of(way, context.dense.language_model),
        dtype_of(way, Training.dtype, asked.device, stored_dtype(context.source)),
        windows.seed or 0,
        windows.fingerprint(),
    )


def _recovered_row(context: ComparisonContext, row: Row, pruned: Path) -> Row:
    """The row that is planned, from the store or made by fine-tuning a checkpoint.

    Raises ConditionsDiffer where the one in the store was recovered on other text, or otherwise.
    """
    assert row.recovered is not None
    conditions = {key: value for key, value in asdict(row.recovered).items() if key != "seconds"}
    if kept := context.store.get(row.name, row.calibration):
        for key, value in conditions.items():
            if (before := getattr(kept.recovered, key)) != value:
                raise ConditionsDiffer(
                    f"{row.name} was recovered with {key} {before}, now it is {value}. Rows of "
                    "different conditions do not go into one table: choose another --out, or "
                    "delete that row."
                )
        return kept
    place = context.out / CHECKPOINTS / file_name(row.name)
    seconds = _seconds_of(pruned, place, conditions)
    if seconds is None:
        seconds = _fine_tune(context, row.recovered, pruned, place)
    context.asked.progress.begin(f"evaluating {row.name}")
    return context.keep(
        replace(
            row,
            recovered=replace(row.recovered, seconds=seconds),
            seconds={**row.seconds, "recover": seconds},
            checkpoint=str(place.relative_to(context.out)),
            **context.quality(place),
        )
    )


def _fine_tune(context: ComparisonContext, planned: Recovered, pruned: Path, place: Path) -> float:
    """Recover a checkpoint to `place`; the seconds that it took, over all runs."""
    asked, source, dense = context.asked, open_checkpoint(pruned), context.source.folder
    assert context.training is not None
    asked.progress.begin(f"loading {pruned.name}")
    models = [
        load(folder, trust_remote_code=asked.trust.trust_remote_code) for folder in (pruned, dense)
    ]
    model = Pruned(source, pruning_record(source), models[0])
    refuse_values(model, planned.way)
    job = Job(
        training=Training(way=planned.way, steps=planned.steps, seed=planned.seed),
        rate=planned.rate,
        dtype=planned.dtype,
        pruned=model,
        dense=Dense(dense, models[1]),
        windows=context.training,
        destination=replace(asked.destination, out=place),
        trust=asked.trust,
        device=asked.device,
        progress=asked.progress,
    )
    return run_recovery(job).seconds


def _seconds_of(pruned: Path, place: Path, conditions: dict[str, Any]) -> float | None:
    """The seconds of a recovery of these very weights that had ended when a run died before its
    row was kept; None where there is none.
    """
    try:
        before, after = record_of(pruned), record_of(place)
        if not before or not after:
            return None
        recovery = after["recovery"][-1]
        sources = {name: shard["source_sha256"] for name, shard in after["shards"].items()}
        pruned_shards = {name: shard["sha256"] for name, shard in before["shards"].items()}
        recovery["text"].pop("marks", None)  # follow from the text
        alike = all(recovery[key] == value for key, value in conditions.items())
        return float(recovery["seconds"]) if sources == pruned_shards and alike else None
    except (BadCheckpoint, KeyError, TypeError, ValueError, IndexError, AttributeError):
        return None
