"""Packed checkpoints: a bit for every weight and the kept values, as `packed` multiplies them, and
back byte for byte.

For every shard of the dense checkpoint there is a safetensors file `packed-<shard>`. A site with
enough zeros is in it

    <tensor>.bitmap   int64 [rows, words]   bit j of word k: is the weight in column 64 k + j kept?
    <tensor>.values   [kept + slack]        the kept weights, row by row, then 64 bytes of zeros
    <tensor>.scales   float32 [rows]        with int8 values alone: weight = value * scale of its row

and everything else as it was. The file's metadata hold one entry, `secateur.packed`, a JSON object:
`layout` 1, `values`, `columns` by tensor, and of the dense shard its `header` and `sha256`, from
which it is restored as it was. With 16 bits half of the weights take 56 % of the bytes, 30 % of
them 36 %. int8 values come back as float32.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from secateur.checkpoints.folder import FLOATS, INDEX, Checkpoint
from secateur.deployment.formats.base import Format, refuse_odd_values, save
from secateur.deployment.packed_model import LEAST, Crossovers, own_products, put_packed
from secateur.errors import BadCheckpoint, UnknownName, UnsupportedModel, in_one_line
from secateur.kernels.packed import SLACK, Packed, check, pack, pack_int8, row_starts
from secateur.models.checks import LOAD_ERRORS, bad_weights, foreign, refuse_larger, refusing_more
from secateur.models.load import load_config
from secateur.models.stored import stored_matrices
from secateur.system.files import file_sha256, refuse_odd_files
from secateur.system.tensors import count_zeros

KEY, PREFIX, PACKED_INDEX = "secateur.packed", "packed-", "packed.index.json"
VALUES = ("as stored", "int8")


def write(
    source: Checkpoint, folder: Path, *, values: str = "as stored", trust_remote_code: bool = False
) -> None:
    """Put the packed shards into `folder`, a shard at a time; `values` is one of `VALUES`.

    Raises UnsupportedModel where no site has enough zeros, BadCheckpoint for -0.0, NonFinite for
    NaN and Inf.
    """
    if values not in VALUES:
        raise UnknownName("kind of values", values, VALUES)
    stored, _ = stored_matrices(source, trust_remote_code=trust_remote_code)
    places = source.places
    sites = {
        name for name in stored if len(places[name].shape) == 2 and places[name].dtype in FLOATS
    }
    packed_any = False
    for shard in source.shards:
        tensors: dict[str, Tensor] = {}
        columns: dict[str, int] = {}
        for name in (name for name, place in places.items() if place.shard == shard):
            tensor = source.tensor(name)
            if name not in sites or count_zeros(tensor) < LEAST * tensor.numel():
                tensors[name] = tensor
                continue
            refuse_odd_values(name, tensor, "the packed format")
            held = pack_int8(tensor) if values == "int8" else pack(tensor)
            columns[name] = held.columns
            tensors |= {f"{name}.bitmap": held.bitmap, f"{name}.values": held.values}
            if held.scales is not None:
                tensors[f"{name}.scales"] = held.scales
        packed_any |= bool(columns)
        file = source.folder / shard
        with file.open("rb") as stream:
            header = stream.read(int.from_bytes(stream.read(8), "little")).decode()
        told = {
            "layout": 1,
            "values": values,
            "columns": columns,
            "header": header,
            "sha256": file_sha256(file),
        }
        save(tensors, folder / f"{PREFIX}{shard}", {KEY: json.dumps(told)})
    if not packed_any:
        raise UnsupportedModel(
            f"{source.folder} has no matrix with {LEAST:.0%} zeros or more: there is nothing to pack."
        )
    if (folder / INDEX).exists():
        (folder / INDEX).rename(folder / PACKED_INDEX)


@dataclass(frozen=True)
class Shard:
    """A packed shard: its file, what its metadata tell, and where each dense tensor is, packed or
    not.
    """

    file: Path
    told: dict[str, Any]
    names: tuple[str, ...]

    def dense(self, name: str) -> Tensor:
        """A dense tensor by name, with int8 values as float32."""
        held = self.tensor(name)
        return held.dense().contiguous() if isinstance(held, Packed) else held

    def tensor(self, name: str) -> Tensor | Packed:
        """A dense tensor by name, packed where it is, after `check`."""
        try:
            with safe_open(self.file, framework="pt") as held:
                if name not in self.told["columns"]:
                    return held.get_tensor(name)
                parts = {part: held.get_tensor(f"{name}.{part}") for part in ("bitmap", "values")}
                names = held.keys()
                scales = held.get_tensor(f"{name}.scales") if f"{name}.scales" in names else None
        except (
            SafetensorError,
            AttributeError,
        ) as error:  # a dtype that torch or the library lacks
            raise BadCheckpoint(
                f"{name} in {self.file} cannot be read: {in_one_line(error)}."
            ) from error
        bitmap = parts["bitmap"]
        if bitmap.dtype != torch.int64 or bitmap.dim() != 2:
            raise BadCheckpoint(
                f"{name} in {self.file} has a bitmap of {bitmap.dtype} {list(bitmap.shape)}."
            )
        packed = Packed(
            bitmap, parts["values"], row_starts(bitmap), self.told["columns"][name], scales
        )
        check(packed, f"{name} in {self.file}")
        return packed


def shards(folder: Path) -> list[Shard]:
    """The packed shards of a folder. Raises BadCheckpoint where one is not sound."""
    found = []
    for file in sorted(folder.glob(f"{PREFIX}*.safetensors")):
        try:
            with safe_open(file, framework="pt") as held:
                told, stored = json.loads((held.metadata() or {})[KEY]), list(held.keys())
            columns, header = told["columns"], json.loads(told["header"])
            sound = told["layout"] == 1 and all(type(count) is int for count in columns.values())
            wanted = [f"{name}.{part}" for name in columns for part in ("bitmap", "values")]
            names = [name for name in header if name != "__metadata__"]
            sound &= (
                told["values"] in VALUES
                and isinstance(told["sha256"], str)
                and _adjoin(header, names)
            )
            wanted += [name for name in names if name not in columns]
            if not sound or not set(wanted) <= set(stored) or not set(columns) <= set(names):
                raise ValueError("tensors are missing, or the layout is another")
        except (
            SafetensorError,
            LookupError,
            ValueError,
            TypeError,
            AttributeError,
            RecursionError,
        ) as error:
            raise BadCheckpoint(
                f"{file} is no packed shard ({in_one_line(error)}). Pack the model again."
            ) from error
        found.append(Shard(file, told, tuple(names)))
    if not found:
        raise BadCheckpoint(f"{folder} holds no packed shards ({PREFIX}*.safetensors).")
    return found


def _adjoin(header: dict[str, Any], names: list[str]) -> bool:
    """Whether the tensors of a header lie one after the other, as they must."""
    offsets = sorted(header[name]["data_offsets"] for name in names)
    starts, stops = [start for start, _ in offsets], [stop for _, stop in offsets]
    return (
        all(type(place) is int for place in (*starts, *stops))
        and starts == [0, *stops][: len(starts)]
    )


def holds(folder: Path) -> bool:
    """Whether a folder holds packed shards."""
    return any(folder.glob(f"{PREFIX}*.safetensors"))


def restore(folder: Path, target: Path) -> None:
    """Write the dense shards into `target`, byte for byte what was packed; with int8 values, what
    they stand for.

    Raises BadCheckpoint where a shard does not come out as it was.
    """
    for shard in shards(folder):
        out, header = target / shard.file.name.removeprefix(PREFIX), shard.told["header"].encode()
        if shard.told["values"] == "int8":
            save({name: shard.dense(name) for name in shard.names}, out)
            continue
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
        if file_sha256(out) != shard.told["sha256"]:
            raise BadCheckpoint(
                f"{shard.file} does not give the dense shard that was packed. It was altered; pack again."
            )
    if (target / PACKED_INDEX).exists():
        (target / PACKED_INDEX).rename(target / INDEX)


def load_packed(
    folder: str | Path, *, dtype: torch.dtype = torch.bfloat16, measure: bool = True
) -> nn.Module:
    """The transformers model of a packed folder, its packed matrices never made dense; for
    inference on the CPU.

    Values are cast to `dtype`, float32 or bfloat16, int8 ones stay. `measure` as for `pack_model`.
    Raises BadCheckpoint and UnsupportedModel.
    """
    folder = Path(folder)
    refuse_odd_files(folder)
    config = load_config(folder)
    try:
        family: Any = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    except KeyError as error:
        raise UnsupportedModel(
            f"{folder} holds a {config.model_type} model, which is no causal language model."
        ) from error
    held_shards = shards(folder)
    try:
        with (
            torch.device("meta"),
            refusing_more(folder, sum(len(shard.names) for shard in held_shards)),
        ):
            skeleton = family(config)
    except LOAD_ERRORS as error:
        raise bad_weights(folder, {}, config, None, error) from error
    linear = {name for name, module in skeleton.named_modules() if type(module) is nn.Linear}
    prefix = f"{skeleton.base_model_prefix}."
    state: dict[str, Tensor] = {}
    packed: dict[str, Packed] = {}
    for shard in held_shards:
        for name in shard.names:
            held = shard.tensor(name)
            bare = name.removesuffix(".weight")
            module = next(
                (n for n in (bare, bare.removeprefix(prefix), prefix + bare) if n in linear), None
            )
            if isinstance(held, Packed) and module is not None:
                packed[module] = _as(held, dtype)
                held = torch.zeros((), dtype=dtype).expand(
                    held.rows, held.columns
                )  # takes no memory
            state[name] = held.dense().contiguous() if isinstance(held, Packed) else held
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    refuse_larger(folder, shapes, skeleton)
    try:
        model, report = family.from_pretrained(
            None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
        )
    except LOAD_ERRORS as error:
        raise bad_weights(folder, shapes, config, skeleton, error) from error
    if missing := sorted(report["missing_keys"]):
        raise foreign(
            folder, f"it lacks {', '.join(missing[:3])}{' …' if len(missing) > 3 else ''}"
        )
    model.eval()
    crossovers = Crossovers(dtype) if measure else None
    for name, matrix in packed.items():
        put_packed(model, name, matrix, crossovers)
    own_products(model)
    return model


def _as(packed: Packed, dtype: torch.dtype) -> Packed:
    """With values of another float dtype, and slack for that."""
    if packed.scales is not None or packed.values.dtype == dtype:
        return packed
    kept = packed.values[: int(packed.starts[-1])].to(dtype)
    return replace(
        packed, values=torch.cat([kept, torch.zeros(SLACK // dtype.itemsize, dtype=dtype)])
    )


packed = Format(
    write,
    "secateur (load_packed, bench), on CPUs; export it to 'dense' for every other loader",
    options=frozenset({"values", "trust_remote_code"}),
    holds=holds,
    restore=restore,
)
