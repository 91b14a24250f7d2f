"""Names of tensors before and after whole blocks have left a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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
        state = {
            f"{language_model.block_name(0)}.{n}": t
            for n, t in language_model.blocks[0].named_parameters()
        }
        first = next(iter(checkpoint_tensors(language_model, state, source.places)))
        self.stem = (
            f"{first.partition('.0.')[0]}."  # what the source writes before the number of a block
        )

    def of_block(self, position: int, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a block of the smaller model, by checkpoint name."""
        return self._stored(self.smaller, position, self.kept[position], state)

    def places(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """For every tensor of the smaller checkpoint the source's tensor that it comes from, and
        its own shape.
        """
        inside: set[str] = set()
        for index, block in enumerate(self.dense.blocks):
            inside |= self._stored(self.dense, index, index, block.state_dict()).keys()
        found = {
            name: (name, place.shape)
            for name, place in self.source.places.items()
            if name not in inside and not name.startswith(self.stem)
        }
        for position, block in enumerate(self.smaller.blocks):
            old = _Old(self.source, f"{self.stem}{position}.", f"{self.stem}{self.kept[position]}.")
            for name, tensor in self.of_block(position, block.state_dict()).items():
                found[name] = old.name(name), tuple(tensor.shape)
        return found

    def _stored(
        self, model: LanguageModel, position: int, index: int, state: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        start = model.block_name(position)
        buffers = {f"{start}.{name}" for name, _ in model.blocks[position].named_buffers()}
        tensors = {f"{start}.{name}": tensor for name, tensor in state.items()}
        known = _Old(self.source, f"{self.stem}{position}.", f"{self.stem}{index}.")
        return checkpoint_tensors(model, tensors, known, buffers)


@dataclass(frozen=True)
class _Old:
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
