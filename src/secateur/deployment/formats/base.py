"""What a format is, how a dense checkpoint is written in another form, and what formats share."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from secateur.checkpoints.folder import INDEX, Checkpoint
from secateur.checkpoints.shards import save, write_index
from secateur.errors import BadCheckpoint, NonFinite


class Format(NamedTuple):
    """A form in which a checkpoint can be written, and perhaps read back.

    `write(source, folder, **options)` puts the weights of a dense checkpoint into `folder`, which
    holds the source's other files (config.json, tokenizer) already and gets its final name
    afterwards; it may change those files. It gives a sentence where the user should know more than
    that it is done, and raises SecateurError, naming the matrix, where the weights do not fit the
    format. `loaded_by` says what loads the result, by version. `options` are
    the keywords that `write` takes. `holds(folder)` tells whether a folder is in this format; None
    where it is for other programs only. Where it is not, it can be made dense: `restore(folder,
    target)` writes the dense shards where they can be had byte for byte, else `read(folder)` gives
    its tensors densely by their names in the dense checkpoint. `foreign` are the keys of
    config.json that a dense checkpoint has none of. `packages` are those whose versions `doctor`
    shows.
    """

    write: Callable[..., str | None]
    loaded_by: str
    options: frozenset[str] = frozenset()
    holds: Callable[[Path], bool] | None = None
    read: Callable[[Path], Iterator[tuple[str, Tensor]]] | None = None
    restore: Callable[[Path, Path], None] | None = None
    foreign: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()


def head_size(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def tensors_of(source: Checkpoint, shard: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors of one shard by name, read one at a time."""
    for name, place in source.places.items():
        if place.shard == shard:
            yield name, source.tensor(name)


def write_shards(
    source: Checkpoint, folder: Path, parts: Callable[[str, Tensor], dict[str, Tensor]]
) -> None:
    """Write the source's shards, and their index where there is one, with what `parts(name,
    tensor)` gives in the place of each tensor. A shard is in memory at a time.
    """
    size = 0
    shard_of: dict[str, str] = {}
    for shard in source.shards:
        tensors: dict[str, Tensor] = {}
        for name, tensor in tensors_of(source, shard):
            tensors |= parts(name, tensor)
        save(tensors, folder / shard)
        size += sum(tensor.nbytes for tensor in tensors.values())
        shard_of |= dict.fromkeys(tensors, shard)
    if (folder / INDEX).exists():
        write_index(folder, dict(sorted(shard_of.items())), size)


def refuse_non_finite(name: str, weight: Tensor) -> None:
    """Raise NonFinite for NaN or Inf."""
    if not weight.isfinite().all():
        raise NonFinite(f"{name} holds NaN or Inf. Prune the dense model again, or mend it first.")


def refuse_odd_values(name: str, weight: Tensor, wanted_by: str) -> None:
    """Raise NonFinite for NaN or Inf, BadCheckpoint for -0.0, which sparse kernels get wrong."""
    refuse_non_finite(name, weight)
    if (weight.signbit() & (weight == 0)).any():
        raise BadCheckpoint(
            f"{name} holds -0.0, which {wanted_by} loses. Prune again, which writes +0.0."
        )
