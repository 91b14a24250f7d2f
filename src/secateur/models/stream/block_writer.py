"""A result that is written block by block, and goes on where a run died.

    with block_writer(source, language_model, destination, trust, conditions) as writer:
        for step in stream(run, finished=writer.finished()):
            tensors, entry = …                               # what the block has become
            writer.commit(tensors, entry, last=step.last)    # its bytes, then the journal
        writer.finish(record)                                # the result has its name

Zeros, structures and recovery by blocks are written by it. With several ranks the first writes.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from secateur.checkpoints.folder import Checkpoint
from secateur.checkpoints.result import BLOCK, Output
from secateur.checkpoints.result_folder import output
from secateur.errors import Interrupted
from secateur.models.context import width
from secateur.models.load import load_blocks
from secateur.models.mapped_tensors import hidden_bytes
from secateur.models.replay import LanguageModel
from secateur.models.source import check_dtypes, check_loaded, checkpoint_tensors
from secateur.models.stream.distributed import ALONE, Ranks
from secateur.models.stream.forward import BlockRun
from secateur.system.interrupt import asked_to_stop
from secateur.system.memory import available_bytes
from secateur.system.settings import Destination, Trust

STOPPING = "after the block or step at hand"
"""What Ctrl-C says; a step is one of +distil."""


class BlockWriter:
    """A result and what is finished of it; made by `block_writer`.

    `entries` holds what was recorded with every finished block, in order; those of this run are
    added. `result` is None on all ranks but the first. `done`: the result was sealed already by a
    run that died as it tidied up, so that only `finish` is left to do.
    """

    def __init__(
        self,
        language_model: LanguageModel,
        result: Output | None,
        trust: Trust,
        ranks: Ranks,
        stopping: Callable[[], bool],
    ) -> None:
        self.language_model, self.result, self.ranks = language_model, result, ranks
        self._trust, self._stopping = trust, stopping
        self.entries: list[Any] = self._asked(lambda result: result.recorded(BLOCK))
        self.folder: Path = self._asked(lambda result: result.partial)
        self.done: bool = self._asked(lambda result: result.done)

    def _asked(self, question: Callable[[Output], Any]) -> Any:
        """What the first rank knows of the result, on all ranks."""
        return self.ranks.same(lambda: question(self.result) if self.result else None)

    def recorded(self, kind: str) -> list[Any]:
        """What this run, or the one that died, has recorded of a kind."""
        return self._asked(lambda result: result.recorded(kind))

    @property
    def stopping(self) -> bool:
        """Whether the user has asked to stop."""
        return self.ranks.same(self._stopping)

    def once(self, kind: str, decide: Callable[[], Any]) -> Any:
        """What `decide()` gives, as JSON can hold it, or has given to the run that died."""
        if recorded := self.recorded(kind):
            return recorded[0]
        decided = self.ranks.same(decide)
        if self.result:
            self.result.record(kind, decided)
        return decided

    def finished(self) -> list[nn.Module]:
        """The blocks that are finished already, read from the result."""
        if not self.entries:
            return []
        if self.result:
            self.result.settle()
        spill = self.folder.parent if self.language_model.spilled else None
        trusted = self._trust.trust_remote_code
        return load_blocks(self.folder, trust_remote_code=trusted, spill=spill)[: len(self.entries)]

    def commit(
        self,
        tensors: Mapping[str, Tensor],
        entry: Any,
        *,
        last: bool,
        stored: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Write a finished block while the caller goes on, and record `entry`, as JSON can hold it.

        `tensors` are the parameters that changed, by their name in the model; `stored`: what they
        are in the result, where it has other names. Raises Interrupted where the user has asked to
        stop and this is not the `last` block; an error in writing comes with the next call.
        """
        if self.result:
            if stored is None:
                places = self.result.source.places
                stored = checkpoint_tensors(self.language_model, tensors, places)
            self.result.commit(stored, entry)
        self.entries.append(entry)
        if self.stopping and not last:
            raise Interrupted("Stopped.")

    def rewrite(self, tensors: Mapping[str, Tensor]) -> None:
        """Write parameters of finished blocks once more, by their name in the model."""
        if self.result:
            places = self.result.source.places
            self.result.write(checkpoint_tensors(self.language_model, tensors, places))
            self.result.sync()

    def finish(self, record: dict[str, Any]) -> None:
        """Write the record and give the result its name; no rank goes on before it has it."""
        if self.result:
            self.result.finish(record)
        self.ranks.together(lambda: None)


@contextmanager
def block_writer(
    source: Checkpoint,
    language_model: LanguageModel,
    destination: Destination,
    trust: Trust,
    conditions: Mapping[str, Any],
    ranks: Ranks = ALONE,
    other_weights: int | None = None,
) -> Iterator[BlockWriter]:
    """Open the result of a run, or take up what a run under the same `conditions` left.

    While open, Ctrl-C stops after the block, or the step of tuning, at hand. `other_weights`: see
    `result.output`. Raises UnsupportedModel or BadCheckpoint where the model is not what the source
    holds, OutputRefused, DiskFull, ConditionsDiffer.
    """
    check_dtypes(source, language_model)
    opening = output(
        source,
        Path(destination.out),
        overwrite=destination.overwrite,
        other_weights=other_weights,
        run=conditions,
        restart=destination.restart,
    )
    with ranks.on_first(opening) as result, asked_to_stop(STOPPING) as stopping:
        # From its opening on the result sees whether its source changes; it may have before.
        ranks.same(lambda: result and check_loaded(result.source, language_model))
        yield BlockWriter(language_model, result, trust, ranks, stopping)


def with_room(run: BlockRun, folder: Path, streams: int, limit: int | None = None) -> BlockRun:
    """The run, with its hidden states in a file if they take half of `limit` or of free memory."""
    dtype = run.dtype or run.language_model.model.dtype
    size = streams * hidden_bytes(run.tokens.shape, width(run.language_model), dtype)
    room = available_bytes(run.devices[0]) if limit is None else limit
    return replace(run, spill=folder if size > room / 2 else None)
