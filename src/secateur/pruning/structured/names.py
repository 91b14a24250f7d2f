"""Names of tensors before and after whole blocks have left a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from secateur.checkpoints.folder import Checkpoint
from secateur.models.replay import LanguageModel
from secateur.models.stored import checkpoint_tensors


class Names:
    """Which tensors the smaller checkpoint has, by the names that the source has, or would have,
    for them.
    """

    def __init__(
        self,
        source: Checkpoint,
        language_model: LanguageModel,
        smaller: LanguageModel,
        kept: Sequence[int],
    ) -> None:
        self.source, self.dense, self.smaller, self.kept = source, language_model, smaller, kept
        start = language_model.block_name(0)
        state = {f"{start}.{n}": t for n, t in language_model.blocks[0].named_parameters()}
        first = next(iter(checkpoint_tensors(language_model, state, source.places)))
        # what the source writes before the number of a block
        self.stem = f"{first.partition('.0.')[0]}."

    def of_block(self, position: int, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a block of the smaller model, by checkpoint name."""
        return self._stored(self.smaller, position, self.kept[position], state)

    @cached_property
    def places(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """For every tensor of the smaller checkpoint the source's tensor that it comes from, and
        its own shape.
        """
        inside: set[str] = set()
        for index, block in enumerate(self.dense.blocks):
            inside |= self._stored(self.dense, index, index, block.state_dict()).keys()
        places = {
            name: (name, place.shape)
            for name, place in self.source.places.items()
            if name not in inside and not name.startswith(self.stem)
        }
        for position, block in enumerate(self.smaller.blocks):
            moved = self._moved(position, self.kept[position])
            for name, tensor in self.of_block(position, block.state_dict()).items():
                places[name] = moved.name(name), tuple(tensor.shape)
        return places

    def _moved(self, position: int, index: int) -> _Moved:
        return _Moved(self.source, f"{self.stem}{position}.", f"{self.stem}{index}.")

    def _stored(
        self, model: LanguageModel, position: int, index: int, state: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        start = model.block_name(position)
        buffers = {f"{start}.{name}" for name, _ in model.blocks[position].named_buffers()}
        tensors = {f"{start}.{name}": tensor for name, tensor in state.items()}
        return checkpoint_tensors(model, tensors, self._moved(position, index), buffers)


@dataclass(frozen=True)
class _Moved:
    """The names of a block's tensors where the block has moved; the source has those that are in
    it.
    """

    source: Checkpoint
    now: str
    before: str

    def name(self, name: str) -> str:
        return self.before + name.removeprefix(self.now) if name.startswith(self.now) else name

    def __contains__(self, name: object) -> bool:
        return self.name(str(name)) in self.source.places
