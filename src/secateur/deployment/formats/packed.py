"""Packed checkpoints: a bit for every weight and the kept values; unpacked, the same bytes again.

For every shard of the dense checkpoint there is a safetensors file `packed-<shard>`. A weight
matrix with enough zeros is in it

    <tensor>.bitmap   int64 [rows, words]   bit j of word k: is the weight in column 64 k + j kept?
    <tensor>.values   [kept + slack]        the kept weights, row by row, then 64 bytes of zeros
    <tensor>.scales   float32 [rows]        with int8 values alone: weight = value * its row's scale

and everything else as it was. The file's metadata hold one entry, `secateur.packed`, a JSON object:
`layout` 1, `values`, `columns` by tensor, and of the dense shard its `header` and `sha256`, from
which it is restored as it was. With 16 bits half of the weights take 56 % of the bytes, 30 % of
them 36 %. int8 values come back as float32.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from secateur.checkpoints.folder import FLOATS, INDEX, Checkpoint
from secateur.checkpoints.shards import save
from secateur.deployment.autotune import Crossovers
from secateur.deployment.formats.base import Format, refuse_odd_values, tensors_of
from secateur.deployment.packed_model import LEAST, own_products, put_packed
from secateur.errors import BadCheckpoint, UnknownName, UnsupportedModel, in_one_line
from secateur.kernels.packed import SLACK, Packed, check, pack, pack_int8, row_starts
from secateur.models.checks import LOAD_ERRORS, bad_weights, foreign, refuse_larger, refusing_more
from secateur.models.load import load_config
from secateur.models.parts import loader
from secateur.models.stored import stored_matrices
from secateur.system.files import file_sha256, refuse_odd_files
from secateur.system.tensors import count_zeros

KEY, PREFIX, PACKED_INDEX = "secateur.packed", "packed-", "packed.index.json"
VALUES = ("as stored", "int8")


def write(
    source: Checkpoint, folder: Path, *, values: str = "as stored", trust_remote_code: bool = False
) -> None:
    """Put the packed shards into `folder`, a shard at a time; `values` is one of `VALUES`.

    Raises UnsupportedModel where no matrix has enough zeros, BadCheckpoint for -0.0, NonFinite for
    NaN and Inf.
    """
    if values not in VALUES:
        raise UnknownName("kind of values", values, VALUES)
    stored, _ = stored_matrices(source, trust_remote_code=trust_remote_code)
    places = {name: source.places[name] for name in stored}
    packable = {n for n, place in places.items() if len(place.shape) == 2 and place.dtype in FLOATS}
    packed_any = False
    for shard in source.shards:
        tensors: dict[str, Tensor] = {}
        columns: dict[str, int] = {}
        for name, tensor in tensors_of(source, shard):
            if name not in packable or count_zeros(tensor) < LEAST * tensor.numel():
                tensors[name] = tensor
                continue
            refuse_odd_values(name, tensor, "the packed format")
            matrix = pack_int8(tensor) if values == "int8" else pack(tensor)
            columns[name] = matrix.columns
            tensors |= {f"{name}.bitmap": matrix.bitmap, f"{name}.values": matrix.values}
            if matrix.scales is not None:
                tensors[f"{name}.scales"] = matrix.scales
        packed_any |= bool(columns)
        with (source.folder / shard).open("rb") as stream:
            header = stream.read(int.from_bytes(stream.read(8), "little")).decode()
        description = {"layout": 1, "values": values, "columns": columns}
        description |= {"header": header, "sha256": file_sha256(source.folder / shard)}
        save(tensors, folder / f"{PREFIX}{shard}", {KEY: json.dumps(description)})
    if not packed_any:
        raise UnsupportedModel(
            f"{source.folder} has no matrix with {LEAST:.0%} zeros or more: "
            "there is nothing to pack."
        )
    if (folder / INDEX).exists():
        (folder / INDEX).rename(folder / PACKED_INDEX)


@dataclass(frozen=True)
class Shard:
    """A packed shard: its file, what its metadata say, and the dense tensors in it by name."""

    file: Path
    description: dict[str, Any]
    names: tuple[str, ...]

    def dense(self, name: str) -> Tensor:
        """A dense tensor by name, with int8 values as float32."""
        stored = self.tensor(name)
        return stored.dense().contiguous() if isinstance(stored, Packed) else stored

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
        packed = Packed(bitmap, values, row_starts(bitmap), columns, scales)
        check(packed, where)
        return packed


ODD = (SafetensorError, LookupError, ValueError, TypeError, AttributeError, RecursionError)
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
    names = [name for name in header if name != "__metadata__"]
    wanted = {f"{name}.{part}" for name in columns for part in ("bitmap", "values")}
    wanted |= set(names) - set(columns)
    sound = (
        description["layout"] == 1
        and all(type(count) is int for count in columns.values())
        and description["values"] in VALUES
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
    """Write into `target` the dense shards that were packed; of int8 values, what they stand for.

    Raises BadCheckpoint where a shard does not come out byte for byte as it was.
    """
    for shard in shards(folder):
        out = target / shard.file.name.removeprefix(PREFIX)
        if shard.description["values"] == "int8":
            save({name: shard.dense(name) for name in shard.names}, out)
            continue
        _restore_bytes(shard, out)
        if file_sha256(out) != shard.description["sha256"]:
            raise BadCheckpoint(
                f"{shard.file} does not give the dense shard that was packed. "
                "It was altered; pack again."
            )
    if (target / PACKED_INDEX).exists():
        (target / PACKED_INDEX).rename(target / INDEX)


def _restore_bytes(shard: Shard, out: Path) -> None:
    header = shard.description["header"].encode()
    places = json.loads(header)
    with out.open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        for name in shard.names:
            (start, stop), dense = places[name]["data_offsets"], shard.dense(name).contiguous()
            if dense.nbytes != stop - start:
                raise BadCheckpoint(
                    f"{name} in {shard.file} has another size than it had. Pack the model again."
                )
            stream.seek(8 + len(header) + start)
            stream.write(dense.flatten().view(torch.uint8).numpy().data)


def load_packed(
    folder: str | Path, *, dtype: torch.dtype = torch.bfloat16, measure: bool = True
) -> nn.Module:
    """Load a packed folder as a transformers model that multiplies by its packed matrices.

    It is for inference on the CPU, and no dense copy of these matrices is made. Values are cast to
    `dtype`, float32 or bfloat16, int8 ones stay. `measure` as for `pack_model`. Raises
    BadCheckpoint and UnsupportedModel.
    """
    folder = Path(folder)
    refuse_odd_files(folder)
    config = load_config(folder)
    packed_shards = shards(folder)
    known = sum(len(shard.names) for shard in packed_shards)
    try:
        with torch.device("meta"), refusing_more(folder, known):
            skeleton = loader(config).from_config(config)
    except LOAD_ERRORS as error:
        raise bad_weights(folder, {}, config, None, error) from error
    state, packed = _read(packed_shards, skeleton, dtype)
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    refuse_larger(folder, shapes, skeleton)
    try:
        model, report = type(skeleton).from_pretrained(
            None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
        )
    except LOAD_ERRORS as error:
        raise bad_weights(folder, shapes, config, skeleton, error) from error
    if missing := sorted(report["missing_keys"]):
        more = " …" if len(missing) > 3 else ""
        raise foreign(folder, f"it lacks {', '.join(missing[:3])}{more}")
    model.eval()
    crossovers = Crossovers(dtype) if measure else None
    for name, matrix in packed.items():
        put_packed(model, name, matrix, crossovers)
    own_products(model)
    return model


def _read(
    packed_shards: list[Shard], skeleton: Any, dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, Packed]]:
    """Tensors by name, with nothing behind those of packed linear layers, which come by module."""
    linear = {name for name, module in skeleton.named_modules() if type(module) is nn.Linear}
    prefix = f"{skeleton.base_model_prefix}."
    state: dict[str, Tensor] = {}
    packed: dict[str, Packed] = {}
    for shard in packed_shards:
        for name in shard.names:
            stored = shard.tensor(name)
            bare = name.removesuffix(".weight")
            names = (bare, bare.removeprefix(prefix), prefix + bare)
            module = next((name for name in names if name in linear), None)
            if isinstance(stored, Tensor):
                state[name] = stored
            elif module is None:
                state[name] = stored.dense().contiguous()
            else:
                packed[module] = _cast(stored, dtype)
                nothing = torch.zeros((), dtype=dtype)
                state[name] = nothing.expand(stored.rows, stored.columns)  # takes no memory
    return state, packed


def _cast(packed: Packed, dtype: torch.dtype) -> Packed:
    """With values of another float dtype, and slack for that."""
    if packed.scales is not None or packed.values.dtype == dtype:
        return packed
    kept = packed.values[: int(packed.starts[-1])].to(dtype)
    slack = torch.zeros(SLACK // dtype.itemsize, dtype=dtype)
    return replace(packed, values=torch.cat([kept, slack]))


packed = Format(
    write,
    "secateur (load_packed, bench), on CPUs; export it to 'dense' for every other loader",
    options=frozenset({"values", "trust_remote_code"}),
    holds=holds,
    restore=restore,
)
