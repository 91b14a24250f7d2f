"""What a run has finished, and under which conditions, so that the same command can go on.

Of a `Journal` the first line holds the conditions of the run, each later one something that is done
and safe on disk. Every line has a checksum in front: a line that was cut short, and all behind it,
never happened. While a run is going on, it holds the lock of its journal. What is done alone and
may be deleted alone, such as a row of a comparison, is `Finished`, in a file of its own.
"""

import fcntl
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self
from zlib import crc32

from secateur.errors import OutputRefused
from secateur.system.files import write_whole
from secateur.system.json_files import read_json
from secateur.system.typed import read_as

SCHEMA = "secateur.run/2"


@dataclass(frozen=True)
class Finished:
    """One thing that is done, with its conditions; a subclass adds what it is as further fields."""

    conditions: dict[str, Any]

    @classmethod
    def read(cls, file: Path) -> Self:
        """What a JSON file holds. Raises ValueError where it is not that, OSError."""
        return read_as(cls, read_json(file, finite=True))

    def write(self, file: Path) -> None:
        """Write it as JSON, whole or not at all; arrays become lists. Raises OSError."""
        text = json.dumps(asdict(self), allow_nan=False, default=lambda array: array.tolist())
        write_whole(file, text)


class Journal:
    """The journal in `file`, made if it is not there. Raises OutputRefused if another run holds it.

    `conditions` are None, and `entries` of (kind, value) empty, unless a run has begun.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._stream = file.open("a+b")
        try:
            fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._stream.close()
            raise OutputRefused(
                f"Another run is writing there: it holds {file}. Wait for it."
            ) from error
        lines, end = _lines(self._stream)
        self._stream.truncate(end)
        self.conditions: dict[str, Any] | None = None
        self.entries: list[tuple[str, Any]] = []
        if lines and lines[0][0] == SCHEMA and isinstance(lines[0][1], dict):
            self.conditions, self.entries = lines[0][1], lines[1:]

    def begin(self, conditions: Mapping[str, Any]) -> None:
        """Forget what was there; a new run begins under `conditions`."""
        self._stream.truncate(0)
        self.conditions, self.entries = dict(conditions), []
        self._write(SCHEMA, conditions)

    def add(self, kind: str, value: Any) -> None:
        """Something is done; it is on disk when this returns."""
        self._write(kind, value)
        self.entries.append((kind, value))

    def of(self, kind: str) -> list[Any]:
        """The values of the entries of one kind."""
        return [value for other, value in self.entries if other == kind]

    def close(self) -> None:
        self._stream.close()

    def remove(self) -> None:
        """The run is over: nothing is left to go on from."""
        self.file.unlink(missing_ok=True)
        self.close()

    def _write(self, kind: str, value: Any) -> None:
        text = json.dumps([kind, value], separators=(",", ":"), allow_nan=False).encode()
        self._stream.write(b"%08x %s\n" % (crc32(text), text))
        self._stream.flush()
        os.fsync(self._stream.fileno())


def _lines(stream: Any) -> tuple[list[tuple[str, Any]], int]:
    """The sound lines at the start of a journal, and where they end."""
    stream.seek(0)
    entries, end = [], 0
    for line in stream:
        checksum, _, text = line.rstrip(b"\n").partition(b" ")
        if not line.endswith(b"\n") or checksum != b"%08x" % crc32(text):
            break
        kind, value = json.loads(text)
        entries.append((kind, value))
        end += len(line)
    return entries, end


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What two runs differ in, in words: "calibration.seed was 0, now 1"."""
    before, now = json.loads(json.dumps(before)), json.loads(json.dumps(now))
    words: list[str] = []
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            words += [f"{key}.{inside}" for inside in differences(old, new)]
        elif old != new:
            words.append(f"{key} was {_shown(old)}, now {_shown(new)}")
    return words


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= 80 else f"{text[:78]} …"
