"""Names of tensors before and after whole blocks have left a model."""

from collections.abc import Collection, Mapping
from functools import cached_property

from torch import Tensor

from secateur.checkpoints.folder import Checkpoint
from secateur.models.replay import LanguageModel
from secateur.models.source import checkpoint_tensors
from secateur.pruning.structured.feasibility import Removal


class Names:
    """The tensors of the smaller checkpoint, by the names that the source has for such tensors."""

    def __init__(
        self,
        source: Checkpoint,
        dense: LanguageModel,
        removal: Removal,
        left_out: Collection[str] = (),
    ) -> None:
        self.source, self.dense, self.left_out = source, dense, left_out
        self.kept, self.smaller = removal.kept, removal.smaller
        start = dense.block_name(0)
        state = {f"{start}.{n}": t for n, t in dense.blocks[0].named_parameters()}
        first = next(iter(checkpoint_tensors(dense, state, source.places)))
        # what the source writes before the number of a block
        self.stem = f"{first.partition('.0.')[0]}."

    def of_block(self, position: int, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a block of the smaller model, by checkpoint name."""
        return self._stored(self.smaller, position, self.kept[position], state)

    @cached_property
    def places(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """For every tensor of the smaller checkpoint the source's name of it, and its shape."""
        inside: set[str] = set()
        for index, block in enumerate(self.dense.blocks):
            inside |= self._stored(self.dense, index, index, block.state_dict()).keys()
        places = {
            name: (name, place.shape)
            for name, place in self.source.places.items()
            if name not in inside and not name.startswith(self.stem) and name not in self.left_out
        }
        for position, block in enumerate(self.smaller.blocks):
            moved = self._moved(position, self.kept[position])
            for name, tensor in self.of_block(position, block.state_dict()).items():
                places[name] = moved[name], tuple(tensor.shape)
        return places

    def _moved(self, position: int, index: int) -> dict[str, str]:
        """What the source calls the tensors of its block `index`, by their names at `position`."""
        now, before = f"{self.stem}{position}.", f"{self.stem}{index}."
        names = (name for name in self.source.places if name.startswith(before))
        return {now + name.removeprefix(before): name for name in names}

    def _stored(
        self, model: LanguageModel, position: int, index: int, state: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        start = model.block_name(position)
        buffers = {f"{start}.{name}" for name, _ in model.blocks[position].named_buffers()}
        tensors = {f"{start}.{name}": tensor for name, tensor in state.items()}
        return checkpoint_tensors(model, tensors, self._moved(position, index), buffers)
