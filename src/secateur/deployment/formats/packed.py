"""Packed checkpoints: a bit for every weight and the kept values; unpacked, the same bytes again.

For every shard of the dense checkpoint there is a safetensors file `packed-<shard>`. A weight
matrix with enough zeros is in it

    <tensor>.bitmap   int64 [rows, words]   bit j of word k: is the weight in column 64 k + j kept?
    <tensor>.scales   with int8 values float32 [rows]: weight = value * its row's scale; with fewer
                      bits bfloat16 [rows, groups], each for as many consecutive columns
    <tensor>.values   [kept + slack]        the kept weights, row by row, then 64 bytes of zeros;
                      int4, int3, int2: uint8, integers with a sign side by side from the lowest
                      bit on, those of every word from a whole byte on

and everything else as it was. The file's metadata hold one entry, `secateur.packed`, a JSON object:
`layout` 1, `values`, `exact`, `columns` by tensor, and of the dense shard its `header` and
`sha256`, from which it is restored as it was. With 16 bits half of the weights take 56 % of the
bytes, 30 % of them 36 %; with four bits 20 % and 15 %, with three 17 % and 13 %. Integers
are `exact` where the weights lie on their grid; other weights are rounded, and come back as
float32.

A matrix is packed some rows at a time and written before the next one is read, so that little more
than a packed matrix is in memory.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from secateur.checkpoints.folder import DTYPES, FLOATS, INDEX, Checkpoint
from secateur.checkpoints.shards import ShardWriter, bytes_of
from secateur.deployment.formats.base import Format, refuse_odd_values
from secateur.deployment.formats.codes import rounding_note, values_of
from secateur.deployment.packed_loading import ModuleOf, Read, load_packing
from secateur.deployment.packing import (
    LEAST,
    can_pack,
    check_groups,
    enough_zeros,
    pack_rows,
    packed_values,
    rows_of,
)
from secateur.errors import BadCheckpoint, BadPattern, UnsupportedModel, in_one_line
from secateur.kernels.packed import LEVELS, SLACK, Packed, check, row_starts
from secateur.methods.values import AS_STORED, Values
from secateur.models.stored import stored_matrices
from secateur.system.files import file_sha256, refuse_odd_files

KEY, PREFIX, PACKED_INDEX = "secateur.packed", "packed-", "packed.index.json"
PARTS = ("bitmap", "scales", "values")
WIDEST = 10**12
"""More columns than a matrix has."""
ROWS = 1024
"""How many rows of a matrix are unpacked at a time."""


def write(
    source: Checkpoint, folder: Path, *, values: str | None = None, trust_remote_code: bool = False
) -> str | None:
    """Put the packed shards into `folder`; gives a sentence where weights were rounded.

    `values` as packing.py reads them; by default those that the checkpoint was pruned with, where
    there are packed products for them, else as stored.
    Matrices that lie `[in, out]` stay as stored where values have groups of inputs. Raises
    BadPattern for other values, UnsupportedModel where no matrix has enough zeros, BadCheckpoint
    for -0.0, NonFinite for NaN and Inf.
    """
    wanted = packed_values(values) if values else _values_of(source.folder)
    stored, _ = stored_matrices(source, trust_remote_code=trust_remote_code)
    places = {name: source.places[name] for name in stored}
    packable = {n for n, place in places.items() if len(place.shape) == 2 and place.dtype in FLOATS}
    rounded, matrices = list[str](), 0
    for shard in source.shards:
        with (source.folder / shard).open("rb") as stream:
            header = stream.read(int.from_bytes(stream.read(8), "little")).decode()
        digest = file_sha256(source.folder / shard)
        description: dict[str, Any] = {"layout": 1, "values": str(wanted or AS_STORED)}
        description |= {"exact": False, "header": header, "sha256": digest}
        inside = [name for name, place in source.places.items() if place.shard == shard]
        longest = description | {"columns": dict.fromkeys(inside, WIDEST)}
        names = [*inside, *(f"{name}.{part}" for name in inside for part in PARTS)]
        with ShardWriter(folder / f"{PREFIX}{shard}", names, {KEY: json.dumps(longest)}) as file:
            columns: dict[str, int] = {}
            description["exact"] = True
            for name in _aligned(source, inside):
                if name not in packable or not enough_zeros(source, name):
                    file.add(name, source.places[name].shape, [source.tensor(name)])
                    continue
                for part in rows_of(source, name):
                    refuse_odd_values(name, part, "the packed format")
                whole = None if stored[name].transposed else wanted
                check_groups(whole, source.places[name].shape[1], name)
                matrix, exact = pack_rows(rows_of(source, name), whole)
                columns[name] = matrix.columns
                description["exact"] &= exact
                rounded += [name.removesuffix(".weight")] * (not exact)
                _add(file, name, matrix)
            file.finish({KEY: json.dumps(description | {"columns": columns})})
        matrices += len(columns)
    if not matrices:
        raise UnsupportedModel(
            f"{source.folder} has no matrix with {LEAST:.0%} zeros or more: "
            "there is nothing to pack."
        )
    if (folder / INDEX).exists():
        (folder / INDEX).rename(folder / PACKED_INDEX)
    return wanted and rounding_note(wanted, rounded, matrices)


def _values_of(folder: Path) -> Values | None:
    """The values that a checkpoint was pruned with, None where no packed products have them."""
    pruned = values_of(folder)
    return packed_values(str(pruned)) if pruned is not None and can_pack(pruned) else None


def _aligned(source: Checkpoint, names: list[str]) -> list[str]:
    """The order in which every tensor begins at a multiple of the size of its numbers."""
    size = {name: DTYPES[source.places[name].dtype].itemsize for name in names}
    return sorted(names, key=lambda name: (source.places[name].bytes % 8 != 0, -size[name]))


def _add(file: ShardWriter, name: str, matrix: Packed) -> None:
    """Write a packed matrix, with so much more slack that what follows begins at eight bytes."""
    scales, values = matrix.scales, matrix.values
    size = values.nbytes + (0 if scales is None else scales.nbytes)
    slack = torch.zeros(-size % 8 // values.element_size(), dtype=values.dtype)
    file.add(f"{name}.bitmap", matrix.bitmap.shape, [matrix.bitmap])
    if scales is not None:
        file.add(f"{name}.scales", scales.shape, [scales])
    file.add(f"{name}.values", [len(values) + len(slack)], [values, slack])


Parts = Iterator[Tensor]


@dataclass(frozen=True)
class Shard:
    """A packed shard: its file, what its metadata say, and the dense tensors in it by name."""

    file: Path
    description: dict[str, Any]
    names: tuple[str, ...]

    @property
    def bits(self) -> int | None:
        """The bits of its integers, None where values are as stored."""
        values = packed_values(self.description["values"])
        return values and values.grid.bits

    @property
    def exact(self) -> bool:
        """Whether what was packed comes back to the bit."""
        return self.description.get("exact", self.description["values"] == AS_STORED)

    def dense(self, name: str, dtype: torch.dtype | None = None) -> tuple[list[int], Parts]:
        """The shape of a dense tensor by name, and some rows of it at a time, of packed integers in
        `dtype`, None for float32.
        """
        stored = self.tensor(name)
        if isinstance(stored, Tensor):
            return list(stored.shape), iter([stored])
        wanted = None if stored.scales is None else dtype
        parts = (
            stored.dense(start, min(start + ROWS, stored.rows), wanted)
            for start in range(0, max(stored.rows, 1), ROWS)
        )
        return [stored.rows, stored.columns], parts

    def tensor(self, name: str) -> Tensor | Packed:
        """A dense tensor by name, packed where it is, after `check`."""
        where = f"{name} in {self.file}"
        try:
            with safe_open(self.file, framework="pt") as file:
                if name not in self.description["columns"]:
                    return file.get_tensor(name)
                bitmap, values = (
                    file.get_tensor(f"{name}.{part}") for part in ("bitmap", "values")
                )
                scaled = f"{name}.scales" in file.keys()  # noqa: SIM118
                scales = file.get_tensor(f"{name}.scales") if scaled else None
        except (SafetensorError, AttributeError) as error:  # a dtype that torch or it lacks
            raise BadCheckpoint(f"{where} cannot be read: {in_one_line(error)}.") from error
        if bitmap.dtype != torch.int64 or bitmap.dim() != 2:
            raise BadCheckpoint(f"{where} has a bitmap of {bitmap.dtype} {list(bitmap.shape)}.")
        columns = self.description["columns"][name]
        bits = self.bits if values.dtype == LEVELS else None
        packed = Packed(bitmap, values, row_starts(bitmap, bits), columns, scales, bits)
        check(packed, where)
        return packed


ODD = (
    SafetensorError,
    BadPattern,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    RecursionError,
)
"""What reading the description of a shard that was altered may fail with."""


def shards(folder: Path) -> list[Shard]:
    """The packed shards of a folder. Raises BadCheckpoint where one is not sound."""
    packed_shards = []
    for path in sorted(folder.glob(f"{PREFIX}*.safetensors")):
        try:
            packed_shards.append(_shard(path))
        except ODD as error:
            raise BadCheckpoint(
                f"{path} is no packed shard ({in_one_line(error)}). Pack the model again."
            ) from error
    if not packed_shards:
        raise BadCheckpoint(f"{folder} holds no packed shards ({PREFIX}*.safetensors).")
    return packed_shards


def _shard(path: Path) -> Shard:
    """Raises one of `ODD` where a file is no packed shard, or its parts do not agree."""
    with safe_open(path, framework="pt") as file:
        description, stored = json.loads((file.metadata() or {})[KEY]), set(file.keys())
    columns, header = description["columns"], json.loads(description["header"])
    packed_values(description["values"])
    names = [name for name in header if name != "__metadata__"]
    wanted = {f"{name}.{part}" for name in columns for part in ("bitmap", "values")}
    wanted |= set(names) - set(columns)
    sound = (
        description["layout"] == 1
        and all(type(count) is int for count in columns.values())
        and type(description.get("exact", True)) is bool
        and isinstance(description["sha256"], str)
        and _adjoin([header[name]["data_offsets"] for name in names])
        and wanted <= stored
        and set(columns) <= set(names)
    )
    if not sound:
        raise ValueError("tensors are missing, or the layout is another")
    return Shard(path, description, tuple(names))


def _adjoin(offsets: list[list[int]]) -> bool:
    """Whether tensors lie one after the other, as they must."""
    starts, stops = [start for start, _ in sorted(offsets)], [stop for _, stop in sorted(offsets)]
    whole = all(type(place) is int for place in (*starts, *stops))
    return whole and starts == [0, *stops][: len(starts)]


def holds(folder: Path) -> bool:
    """Whether a folder holds packed shards."""
    return any(folder.glob(f"{PREFIX}*.safetensors"))


def restore(folder: Path, target: Path) -> None:
    """Write into `target` the dense shards that were packed; of rounded values, what they stand
    for.

    Raises BadCheckpoint where a shard does not come out byte for byte as it was.
    """
    for shard in shards(folder):
        out = target / shard.file.name.removeprefix(PREFIX)
        if not shard.exact:
            _restore_values(shard, out)
            continue
        _restore_bytes(shard, out)
        if file_sha256(out) != shard.description["sha256"]:
            raise BadCheckpoint(
                f"{shard.file} does not give the dense shard that was packed. "
                "It was altered; pack again."
            )
    if (target / PACKED_INDEX).exists():
        (target / PACKED_INDEX).rename(target / INDEX)


def _restore_values(shard: Shard, out: Path) -> None:
    metadata = {"format": "pt"}
    with ShardWriter(out, shard.names, metadata) as file:
        packed = shard.description["columns"]
        for name in sorted(shard.names, key=lambda name: name not in packed):
            file.add(name, *shard.dense(name))
        file.finish(metadata)


def _restore_bytes(shard: Shard, out: Path) -> None:
    header = shard.description["header"].encode()
    places = json.loads(header)
    with out.open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        for name in shard.names:
            (start, stop), dtype = places[name]["data_offsets"], str(places[name].get("dtype"))
            stream.seek(8 + len(header) + start)
            _, parts = shard.dense(name, DTYPES.get(dtype))
            if sum(stream.write(bytes_of(part)) for part in parts) != stop - start:
                raise BadCheckpoint(
                    f"{name} in {shard.file} has another size than it had. Pack the model again."
                )


def load_packed(
    folder: str | Path, *, dtype: torch.dtype = torch.bfloat16, measure: bool = True
) -> nn.Module:
    """Load a packed folder as a transformers model that multiplies by its packed matrices.

    It is for inference on the CPU, and no dense copy of these matrices is made. Values are cast to
    `dtype`, float32 or bfloat16, integers stay. `measure` as for `pack_model`. Raises BadCheckpoint
    and UnsupportedModel.
    """
    folder = Path(folder)
    refuse_odd_files(folder)
    packed_shards = shards(folder)
    known = sum(len(shard.names) for shard in packed_shards)

    def read(module_of: ModuleOf) -> Read:
        return (
            (name, _cast(shard.tensor(name), dtype))
            for shard in packed_shards
            for name in shard.names
        )

    return load_packing(folder, read, known, dtype, measure=measure)


def _cast(stored: Tensor | Packed, dtype: torch.dtype) -> Tensor | Packed:
    """With packed values of another float dtype, and slack for that."""
    if isinstance(stored, Tensor) or stored.scales is not None or stored.values.dtype == dtype:
        return stored
    kept = stored.values[: int(stored.starts[-1])].to(dtype)
    slack = torch.zeros(SLACK // dtype.itemsize, dtype=dtype)
    return replace(stored, values=torch.cat([kept, slack]))


packed = Format(
    write,
    "secateur (load_packed, bench), on CPUs; export it to 'dense' for every other loader",
    options=frozenset({"values", "trust_remote_code"}),
    holds=holds,
    restore=restore,
)
