"""A result folder begun, taken up where a run died, or given up."""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from secateur.checkpoints.copied import belonging_files
from secateur.checkpoints.folder import Checkpoint
from secateur.checkpoints.journal import Journal, differences
from secateur.checkpoints.output_folder import check_output_folder, journal_of, refuse_output
from secateur.checkpoints.quantised.unpack import SOURCE
from secateur.checkpoints.result import BLOCK, Output
from secateur.errors import (
    BadCheckpoint,
    ConditionsDiffer,
    DiskFull,
    Interrupted,
    OutputRefused,
    RankLost,
    SecateurError,
)
from secateur.system.files import disk_errors, sync
from secateur.system.json_files import json_object, write_json
from secateur.system.sizes import in_words


@contextmanager
def output(
    source: Checkpoint,
    out: Path,
    *,
    overwrite: bool,
    other_weights: int | None = None,
    run: Mapping[str, Any] | None = None,
    restart: bool = False,
) -> Iterator[Output]:
    """A result folder beside `out` with a copy of the source; removed unless it is finished.

    With `other_weights` the shards are left to whoever makes others of so many bytes
    (`shards.resized`). With the conditions of a `run`, it is kept when the run dies with blocks
    finished, and taken up by the next with the same conditions; `restart` discards it. Raises
    OutputRefused where `out` holds something already, DiskFull where the result cannot fit,
    ConditionsDiffer where a half-finished run has other conditions.
    """
    out = out.resolve()  # a link is followed, so that the result lies where it points
    check_output_folder(source, out, overwrite=overwrite)
    partial, file = _partial(out), journal_of(out)
    made = [folder for folder in out.parents if not folder.exists()]
    result = None
    try:
        with disk_errors(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            result = Output(source, out, partial, overwrite, None if run is None else Journal(file))
            conditions = {**(run or {}), "files": result.stamps}
            if not _taken_up(result, conditions, restart):
                refuse_output(out, overwrite=overwrite, strict=True)
                _copy(source, out, partial, other_weights)
                if result.journal:
                    result.journal.begin(conditions)
        yield result
        result.settle()
    except BaseException as error:
        if (ended := _ended(error, result, made)) is error:
            raise
        raise ended from error
    finally:
        if result:
            result._close()
            if result.journal is None or not file.exists():
                shutil.rmtree(partial, ignore_errors=True)


def _taken_up(result: Output, conditions: Mapping[str, Any], restart: bool) -> bool:
    """Whether a run with these conditions died here and can go on. Raises ConditionsDiffer."""
    journal = result.journal
    if journal is None or journal.conditions is None or restart:
        return False
    if differing := differences(journal.conditions, conditions):
        if result.done or not journal.entries:
            return False
        raise ConditionsDiffer(
            f"A half-finished run for {result.out} has other conditions: {'; '.join(differing)}. "
            "Give the same to go on, choose another --out, or discard it with --restart."
        )
    return result.done or result.partial.is_dir()


def _copy(source: Checkpoint, out: Path, partial: Path, other_weights: int | None) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    copied = [file for file in belonging_files(source) if file.name != SOURCE]
    size = source.bytes if other_weights is None else other_weights
    refuse_full(out, size + sum(file.stat().st_size for file in copied))
    partial.mkdir()
    if other_weights is None:
        copied += [source.folder / shard for shard in source.shards]
    for file in copied:
        copy = partial / file.relative_to(source.folder)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, copy)
        sync(copy)
    sync(partial)


def refuse_full(out: Path, size: int) -> None:
    """Raise DiskFull where a result of `size` bytes does not fit, beside what of it is there."""
    partial = _partial(out)
    there = sum(file.stat().st_size for file in partial.rglob("*") if file.is_file())
    folder = next(folder for folder in out.parents if folder.exists())
    if (free := shutil.disk_usage(folder).free) < size - there:
        counts = size - there, free
        needed, left = (in_words(count, ("GiB", "MiB"), least=1 / 8) for count in counts)
        raise DiskFull(f"{out} needs {needed}, the disk has {left} free.")


def _partial(out: Path) -> Path:
    """Where a result lies that is not finished."""
    return out.with_name(f".{out.name}.partial")


def _ended(error: BaseException, result: Output | None, made: list[Path]) -> BaseException:
    """What to raise for an error that ended a run; finished blocks are kept if that can help."""
    with suppress(Exception):
        if result:
            result.settle()
    finished = len(result.recorded(BLOCK)) if result else 0
    passing = (DiskFull, OutputRefused, Interrupted, RankLost)
    mended = not isinstance(error, SecateurError) or isinstance(error, passing)
    other = isinstance(error, ConditionsDiffer)  # what lies there is not ours
    if result and result.journal and not other and not (finished and mended):
        result.journal.remove()
        shutil.rmtree(result.partial, ignore_errors=True)
    with suppress(OSError):  # what is not empty stays
        for folder in made:
            folder.rmdir()
    if finished and mended and result and result.partial.exists():
        text = (
            f"{str(error) or 'Interrupted.'} The same command goes on after the {finished} blocks "
            "that are finished."
        )
        if isinstance(error, KeyboardInterrupt):
            return Interrupted(text)
        if isinstance(error, SecateurError):
            return type(error)(text)
    if isinstance(error, DiskFull) and error.__cause__:
        return DiskFull(f"{str(error).rstrip('.')}; nothing was left behind.")
    return error


def configure(
    result: Output, changes: Mapping[str, Any], text: Mapping[str, Any], path: Sequence[str] = ()
) -> None:
    """Change fields of `config.json`, in the part for the text: at the end of the path, where a
    file that has its fields elsewhere (Qwen2.5-VL on the hub) gets the `text` part whole, or
    without a path the first of the same type.
    """
    file = result.partial / "config.json"
    config = part = json_object(file)
    for number, name in enumerate(path, 1):
        if not isinstance(part.get(name), dict):
            part[name] = dict(text) if number == len(path) else {}
        part = part[name]
    if not path:
        parts = [one for one in (config, *config.values()) if isinstance(one, dict)]
        parts = [one for one in parts if one.get("model_type") == text["model_type"]]
        if not parts:
            raise BadCheckpoint(
                f"{result.source.folder / 'config.json'} has no part for a {text['model_type']!r} "
                "model."
            )
        part = parts[0]
    part.update(changes)
    with disk_errors(result.out):
        write_json(file, config, 2)
