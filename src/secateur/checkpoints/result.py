"""The bytes of a result: the source folder again, shard for shard, with the pruned tensors
overwritten in place.

Their unchanged shape and dtype allow that. So headers, tensor order, sharding and every tensor that
was not pruned stay byte for byte as they were, and memory never holds more than a block.

`Output` works in a hidden folder beside the result (`result_folder`) and renames it at the end;
until then nothing has the final name. A finished block is on disk before the journal (`journal`)
says so, and the journal is what a later run believes: after `kill -9` or a power cut the same
command takes up the blocks that it names and does the others again.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from torch import Tensor

from secateur.checkpoints.folder import FLOATS, RECORD, Checkpoint
from secateur.checkpoints.journal import Journal
from secateur.checkpoints.output_folder import refuse_output
from secateur.errors import BadCheckpoint, OutputRefused
from secateur.system.files import disk_errors, file_sha256, sync
from secateur.system.json_files import write_json

BLOCK, DONE = "block", "done"


class Output:
    """A result being written in `partial`, a folder beside `out` that `finish` gives that name."""

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
                    f"{self.source.folder / name} was changed while it was read, so the result "
                    "would be of neither. "
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


def stamps(source: Checkpoint) -> dict[str, list[int]]:
    """Size and time of change of the files that a run reads: what tells whether they are still the
    same.
    """
    files = {name: (source.folder / name).stat() for name in ("config.json", *source.shards)}
    return {name: [found.st_size, found.st_mtime_ns] for name, found in files.items()}
