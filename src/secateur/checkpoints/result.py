"""The bytes of a result: the source folder again, the pruned tensors overwritten in place.

Headers, tensor order, sharding and every tensor that was not pruned stay byte for byte as they
were, and memory never holds more than a block.

`Output` works in a hidden folder beside the result (`result_folder`) and renames it at the end;
until then nothing has the final name. A finished block is on disk before the journal (`journal`)
says so, and the journal is what a later run believes: after `kill -9` or a power cut the same
command takes up the blocks that it names and does the others again.
"""

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.checkpoints.folder import FLOATS, Checkpoint
from secateur.checkpoints.journal import Journal
from secateur.checkpoints.seal import discard_replaced, give_name, seal, stamps
from secateur.errors import OutputRefused
from secateur.system.files import disk_errors, sync

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
        self.places, self.journal, self.stamps = source.places, journal, stamps(source)
        self._writer = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None

    def recorded(self, kind: str) -> list[Any]:
        """What this run has recorded of a kind before it died; empty for a run that begins."""
        return self.journal.of(kind) if self.journal else []

    def record(self, kind: str, value: Any) -> None:
        """Keep a value that JSON can hold, for the case that the run dies."""
        if self.journal:
            with disk_errors(self.out):
                self.journal.add(kind, value)

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Overwrite tensors by name, cast as stored, zeros +0.0. Raises DiskFull, OutputRefused."""
        with disk_errors(self.out):
            for name, tensor in tensors.items():
                place = self.places[name]
                stored = tensor.detach().cpu().to(FLOATS[place.dtype]).contiguous() + 0.0  # no -0.0
                if (shape := tuple(stored.shape)) != place.shape:
                    raise AssertionError(f"{name} has shape {shape}, stored {place.shape}")
                with (self.partial / place.shard).open("r+b") as stream:
                    stream.seek(place.offset)
                    stream.write(stored.flatten().view(torch.uint8).numpy().data)

    def commit(self, tensors: Mapping[str, Tensor], block: Any) -> None:
        """`write` a finished block and record it in a thread; errors come with the next call."""
        self.settle()
        self._writing = self._writer.submit(self._commit, dict(tensors), block)

    def settle(self) -> None:
        """Wait until what was committed is on disk."""
        writing, self._writing = self._writing, None
        if writing:
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
                seal(self.source, self.stamps, self.partial, record)
                self.sync()
                self.record(DONE, True)
                try:
                    give_name(self.partial, self.out, overwrite=self.overwrite)
                except OutputRefused:  # the result has another name
                    if self.journal:
                        self.journal.remove()
                    raise
            discard_replaced(self.out)
            if self.journal:
                self.journal.remove()

    def sync(self) -> None:
        """Return when everything that was written is on disk."""
        with disk_errors(self.out):
            for file in self.partial.iterdir():
                sync(file)
            sync(self.partial)

    def _close(self) -> None:
        self._writer.shutdown()
        if self.journal:
            self.journal.close()
