"""Result folders: written beside, resumed where a run died, and given their name last.

A result is the source folder again, shard for shard: each shard is copied and the bytes of the
pruned tensors are overwritten in place, which their unchanged shape and dtype allow. So headers,
tensor order, sharding and every tensor that was not pruned stay byte for byte as they were, and
memory never holds more than a block.

`Output` works in a hidden folder beside the result and renames it at the end; until then nothing
has the final name. A finished block is on disk before the journal (`journal`) says so, and the
journal is what a later run believes: after `kill -9` or a power cut the same command takes up the
blocks that it names and does the others again.

A result may lie in a folder of its own, or over a checkpoint that may be replaced
(`refuse_output`).
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from torch import Tensor

from secateur.checkpoints.folder import FLOATS, RECORD, Checkpoint
from secateur.checkpoints.journal import Journal, differences
from secateur.errors import (
    BadCheckpoint,
    ConditionsDiffer,
    DiskFull,
    Interrupted,
    OutputRefused,
    RankLost,
    SecateurError,
)
from secateur.system.files import disk_errors, file_sha256, refuse_links_out, sync
from secateur.system.json_files import json_object, write_json
from secateur.system.sizes import in_words

_OTHER_WEIGHTS = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".h5",
    ".msgpack",
    ".gguf",
    ".onnx",
)
BLOCK, DONE = "block", "done"


class Output:
    """A result folder being written. Use `with output(...) as result:`; `finish` gives it its
    name.
    """

    def __init__(
        self,
        source: Checkpoint,
        out: Path,
        partial: Path,
        overwrite: bool,
        journal: Journal | None = None,
    ) -> None:
        self.source, self.out, self.partial, self.overwrite = source, out, partial, overwrite
        self.places = source.places
        self.journal = journal
        self.stamps = stamps(source)
        self._writer = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None

    def recorded(self, kind: str) -> list[Any]:
        """What this run, before it died, has recorded of a kind; empty for a run that begins."""
        return self.journal.of(kind) if self.journal else []

    def record(self, kind: str, value: Any) -> None:
        """Keep something that was found, as JSON can hold it, for the case that the run dies."""
        if self.journal:
            with disk_errors(self.out):
                self.journal.add(kind, value)

    def configure(self, changes: Mapping[str, Any], model_type: str) -> None:
        """Change fields of `config.json`, in the part that describes a model of that type. Raises
        BadCheckpoint.
        """
        file = self.partial / "config.json"
        held = json_object(file)
        parts = [
            part
            for part in (held, *held.values())
            if isinstance(part, dict) and part.get("model_type") == model_type
        ]
        if not parts:
            raise BadCheckpoint(
                f"{self.source.folder / 'config.json'} has no part for a {model_type!r} model."
            )
        parts[0].update(changes)
        with disk_errors(self.out):
            write_json(file, held, 2)

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Overwrite tensors by checkpoint name; shapes as in `places`, cast to the dtype stored
        there, zeros +0.0.

        Raises DiskFull or OutputRefused.
        """
        with disk_errors(self.out):
            for name, tensor in tensors.items():
                place = self.places[name]
                stored = (
                    tensor.detach().cpu().to(FLOATS[place.dtype]).contiguous() + 0.0
                )  # -0.0 becomes +0.0
                if tuple(stored.shape) != place.shape:
                    raise AssertionError(
                        f"{name} has shape {tuple(stored.shape)}, stored {place.shape}"
                    )
                with (self.partial / place.shard).open("r+b") as stream:
                    stream.seek(place.offset)
                    stream.write(stored.flatten().view(torch.uint8).numpy().data)

    def commit(self, tensors: Mapping[str, Tensor], block: Any) -> None:
        """`write` and then record a finished block, while the caller goes on; errors come with the
        next call.
        """
        self.settle()
        self._writing = self._writer.submit(self._commit, dict(tensors), block)

    def settle(self) -> None:
        """Wait until what was committed is on disk."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def _commit(self, tensors: Mapping[str, Tensor], block: Any) -> None:
        self.write(tensors)
        with disk_errors(self.out):
            for shard in sorted({self.places[name].shard for name in tensors}):
                sync(self.partial / shard)
        self.record(BLOCK, block)

    @property
    def done(self) -> bool:
        """Whether the run had ended already, and died as it tidied up."""
        return bool(self.recorded(DONE)) and not self.partial.exists() and self.out.exists()

    def finish(self, record: dict[str, Any]) -> None:
        """Write `pruning.json`, sync everything to disk, and rename the folder into place.

        Raises BadCheckpoint where the source has changed since the run began.
        """
        self.settle()
        with disk_errors(self.out):
            if not self.done:
                self._seal(record)
                self.record(DONE, True)
                self._rename()
            shutil.rmtree(self._aside, ignore_errors=True)
            sync(self.out.parent)
            if self.journal:
                self.journal.remove()

    def _seal(self, record: dict[str, Any]) -> None:
        record["shards"] = {
            shard: {"source_sha256": digest, "sha256": file_sha256(self.partial / shard)}
            for shard, digest in self.source.sha256().items()
            if (self.partial / shard).exists()
        }
        for name, stamp in stamps(self.source).items():
            if stamp != self.stamps[name]:
                raise BadCheckpoint(
                    f"{self.source.folder / name} was changed while it was read, so the result would be of neither. "
                    "Run again."
                )
        write_json(self.partial / RECORD, record, finite=True)
        self.sync()

    def sync(self) -> None:
        """Return when everything that was written is on disk."""
        with disk_errors(self.out):
            for file in self.partial.iterdir():
                sync(file)
            sync(self.partial)

    @property
    def _aside(self) -> Path:
        return self.partial.with_name(f".{self.out.name}.replaced")

    def _rename(self) -> None:
        try:
            refuse_output(self.out, overwrite=self.overwrite)
        except OutputRefused as error:
            kept = Path(mkdtemp(prefix=f"{self.out.name}.", dir=self.out.parent))
            self.partial.rename(kept)
            if self.journal:
                self.journal.remove()
            raise OutputRefused(
                f"{error} That came about during the run, so the result is in {kept}."
            ) from error
        if not self.out.exists():
            self.partial.rename(self.out)
            return
        shutil.rmtree(self._aside, ignore_errors=True)
        self.out.rename(self._aside)
        try:
            self.partial.rename(self.out)
        except OSError:
            self._aside.rename(self.out)
            raise

    def _close(self) -> None:
        self._writer.shutdown()
        if self.journal:
            self.journal.close()


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
    """A result folder beside `out`, holding a copy of the source; removed again unless it is
    finished.

    With `other_weights` the shards are left to whoever makes others of so many bytes
    (`shards.resized`). With the conditions of a `run`, it is kept when the run dies with blocks
    finished, and taken up by the next with the same conditions; `restart` discards it. Raises
    OutputRefused where `out` holds something already, DiskFull where the result cannot fit,
    ConditionsDiffer where a half-finished run has other conditions.
    """
    out = out.resolve()  # a link is followed, so that the result lies where it points
    check_output_folder(source, out, overwrite=overwrite)
    partial, file = out.with_name(f".{out.name}.partial"), journal_of(out)
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
            f"A half-finished run for {result.out} has other conditions: {'; '.join(differing)}. Give the same to go "
            "on, choose another --out, or discard it with --restart."
        )
    return result.done or result.partial.is_dir()


def _copy(source: Checkpoint, out: Path, partial: Path, other_weights: int | None) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    copied = [
        file
        for file in sorted(source.folder.iterdir())
        if file.is_file()
        and file.name not in (RECORD, *source.shards)
        and not file.name.endswith(_OTHER_WEIGHTS)
    ]
    free = shutil.disk_usage(out.parent).free
    size = source.bytes if other_weights is None else other_weights
    if free < (size := size + sum(file.stat().st_size for file in copied)):
        raise DiskFull(f"{out} needs {_size(size)}, the disk has {_size(free)} free.")
    partial.mkdir()
    for file in [
        *copied,
        *(source.folder / shard for shard in source.shards if other_weights is None),
    ]:
        shutil.copyfile(file, partial / file.name)
        sync(partial / file.name)
    sync(partial)


def _ended(error: BaseException, result: Output | None, made: list[Path]) -> BaseException:
    """What to raise for an error that ended a run: finished blocks are kept, unless they would only
    fail again.
    """
    with suppress(Exception):
        if result:
            result.settle()
    finished = len(result.recorded(BLOCK)) if result else 0
    mended = not isinstance(error, SecateurError) or isinstance(
        error, (DiskFull, OutputRefused, Interrupted, RankLost)
    )
    other = isinstance(error, ConditionsDiffer)  # what lies there is not ours
    if result and result.journal and not other and not (finished and mended):
        result.journal.remove()
        shutil.rmtree(result.partial, ignore_errors=True)
    with suppress(OSError):  # what is not empty stays
        for folder in made:
            folder.rmdir()
    if finished and mended and result and result.partial.exists():
        text = f"{str(error) or 'Interrupted.'} The same command goes on after the {finished} blocks that are finished."
        if isinstance(error, KeyboardInterrupt):
            return Interrupted(text)
        if isinstance(error, SecateurError):
            return type(error)(text)
    if isinstance(error, DiskFull) and error.__cause__:
        return DiskFull(f"{str(error).rstrip('.')}; nothing was left behind.")
    return error


def stamps(source: Checkpoint) -> dict[str, list[int]]:
    """Size and time of change of the files that a run reads: what tells whether they are still the
    same.
    """
    files = {name: (source.folder / name).stat() for name in ("config.json", *source.shards)}
    return {name: [found.st_size, found.st_mtime_ns] for name, found in files.items()}


def _size(count: int) -> str:
    return in_words(count, ("GiB", "MiB"), least=1 / 8)


def journal_of(out: Path) -> Path:
    """The journal of the run that writes `out`."""
    return out.with_name(f".{out.name}.journal")


def check_output_folder(source: Checkpoint, out: Path, *, overwrite: bool) -> None:
    """Raise OutputRefused where `out` cannot hold a result made of `source`, BadCheckpoint for
    links out of that.
    """
    out, model = out.resolve(), source.folder.resolve()
    if out == model:
        raise OutputRefused(f"{out} is the model itself. Choose another folder.")
    if model in out.parents or out in model.parents:
        raise OutputRefused(
            f"One of {out} and the model's folder {model} lies inside the other. Choose another folder."
        )
    refuse_output(out, overwrite=overwrite)
    refuse_links_out(model)


def refuse_output(out: Path, *, overwrite: bool, strict: bool = False) -> None:
    """Raise OutputRefused where `out` holds something that may not be replaced.

    Unless `strict`, what a run may have left that died when it had renamed its result is let
    through.
    """
    if (
        not strict
        and journal_of(out).is_file()
        and not out.with_name(f".{out.name}.partial").exists()
    ):
        return
    if out.exists() and not out.is_dir():
        raise OutputRefused(f"{out} is a file; a folder was wanted.")
    if out.resolve() == Path.cwd():
        raise OutputRefused(f"{out} is the current folder. Name a folder inside it.")
    if out.is_mount():
        raise OutputRefused(
            f"{out} is a mount point, which cannot be replaced at once. Name a folder inside it."
        )
    if out.is_dir() and any(out.iterdir()):
        if not overwrite:
            raise OutputRefused(
                f"{out} exists already. Choose another --out, or replace it with --overwrite."
            )
        if not (out / "config.json").is_file() or not any(out.glob("*.safetensors")):
            raise OutputRefused(
                f"{out} is no checkpoint folder, so --overwrite does not replace it."
            )
        if folders := sorted(path.name for path in out.iterdir() if path.is_dir()):
            raise OutputRefused(
                f"{out} holds other folders ({folders[0]}), so --overwrite does not replace it. Delete it yourself."
            )
