"""Whether a model is judged on text that it was made with, as far as its own record tells."""

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from secateur.checkpoints.folder import RECORD
from secateur.checkpoints.record import record_of
from secateur.data.overlap import Marks
from secateur.errors import BadCheckpoint
from secateur.system.typed import Fields, read_as


class _Text(Fields):
    source: str = "a text"
    marks: Marks | None = None


class _Recovery(Fields):
    text: _Text | None = None


class _Record(Fields):
    calibration: _Text | None = None
    recovery: tuple[_Recovery, ...] = ()


def seen_in_words(folder: Path, windows: Tensor) -> str:
    """A sentence for each text that the model in a folder was calibrated or trained on and that the
    evaluation windows `[windows, length]` share tokens with; empty where there is none.

    Raises BadCheckpoint for a record that is none.
    """
    if (record := record_of(folder)) is None:
        return ""
    try:
        texts = read_as(_Record, record)
    except ValueError as error:
        raise BadCheckpoint(
            f"{folder / RECORD} is no record of a pruning run: {error}. Delete it, or prune again."
        ) from error
    return " ".join(_sentences(texts, windows))


def _sentences(record: _Record, windows: Tensor) -> Iterator[str]:
    trained = [("trained", one.text) for one in record.recovery]
    for done, text in (("calibrated", record.calibration), *trained):
        if text and text.marks and (count := text.marks.met(windows)):
            yield (
                f"At least {count} of {len(windows)} evaluation windows share {text.marks.run} "
                f"tokens in a row with {text.source}, on which the model was {done}."
            )
