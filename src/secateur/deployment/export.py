"""A checkpoint in another form: for a runtime that wants one, or back to the dense folder that
every loader reads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from secateur.checkpoints.folder import INDEX, SINGLE, Checkpoint, open_checkpoint
from secateur.checkpoints.record import record_of
from secateur.checkpoints.result import output
from secateur.deployment.formats import FORMATS, find_format, format_of
from secateur.deployment.formats.base import save
from secateur.errors import BadCheckpoint, UnknownName
from secateur.models.checks import LOAD_ERRORS, bad_weights, foreign, other_shape, without_weights
from secateur.models.load import load_config, resolve
from secateur.system.files import disk_errors
from secateur.system.json_files import read_json, write_json
from secateur.system.machine import typed_command, versions
from secateur.system.progress import Progress
from secateur.system.settings import Destination

SHARD_BYTES = 5 * 10**9


def export(
    model: str | Path | None = None,
    *,
    out: str | Path,
    to: str,
    overwrite: bool = Destination.overwrite,
    command: Sequence[str] | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> str:
    """Write a checkpoint in the format `to`, or with `dense` one of those formats as a dense
    checkpoint again.

    `options` are those of the format: `values` for `packed` and `gguf`, `ranks` for `tensorrt-llm`.
    Returns what loads the result. Raises UnknownName, BadCheckpoint, BadPattern, NonFinite,
    UnsupportedModel, OutputRefused, DiskFull.
    """
    progress = progress or Progress()
    folder, out = resolve(model), Path(out)
    wanted = None if to == "dense" else find_format(to)
    allowed = frozenset() if wanted is None else wanted.options
    for option in options:
        if option not in allowed:
            raise UnknownName(f"option of {to}", option, allowed or ["none"])
    stored_as = format_of(folder)
    if wanted is None and stored_as is None:
        open_checkpoint(folder)  # says what is wrong, where something is
        raise BadCheckpoint(f"{folder} is a dense checkpoint already.")
    if wanted is not None and stored_as is not None:
        raise BadCheckpoint(
            f"{folder} is stored as {stored_as}. Export it to 'dense' first, then to {to}."
        )
    progress.begin(f"writing {to}")
    source = Checkpoint(folder, (), {}) if wanted is None else open_checkpoint(folder)
    record = record_of(folder) or {}
    said = "every loader of safetensors checkpoints" if wanted is None else wanted.loaded_by
    record["exported"] = {
        "to": to,
        "from": stored_as or "dense",
        "options": options,
        "loaded_by": said,
        "versions": versions(),
        "command": typed_command(command),
        "source_shards": source.sha256(),
    }
    if wanted is not None:
        _refuse_other_shapes(source, options.get("trust_remote_code", False))
    with output(source, out, overwrite=overwrite, other_weights=source.bytes) as result:
        if wanted is not None:
            wanted.write(source, result.partial, **options)
        else:
            assert stored_as is not None
            _densify(folder, result.partial, stored_as)
        result.finish(record)
    progress.end()
    return said


def _refuse_other_shapes(source: Checkpoint, trusted: bool) -> None:
    """Raise BadCheckpoint or UnsupportedModel unless config.json, which formats go by, says what
    the weights are.
    """
    config = load_config(source.folder, trust_remote_code=trusted)
    try:
        model = without_weights(source, config, trust_remote_code=trusted)
    except LOAD_ERRORS as error:
        raise bad_weights(source.folder, source.shapes, config, None, error) from error
    if other := other_shape(source.shapes, model):
        raise foreign(source.folder, other)


def _densify(folder: Path, target: Path, stored_as: str) -> None:
    """Write the dense shards of a folder in another format, and what its config.json says without
    that format.
    """
    held = FORMATS[stored_as]
    with disk_errors(target):
        if held.restore is not None:
            held.restore(folder, target)
        elif held.read is not None:
            (target / INDEX).unlink(missing_ok=True)
            _save_in_shards(held.read(folder), target)
        if held.foreign:
            file = target / "config.json"
            config = read_json(file)
            kept = {key: value for key, value in config.items() if key not in held.foreign}
            write_json(file, kept, 2)
    open_checkpoint(target)


def _save_in_shards(tensors: Iterator[tuple[str, Tensor]], target: Path) -> None:
    """Write tensors one after the other, a new shard where one is full; no more than a shard is in
    memory.
    """
    where: list[list[str]] = []
    shard: dict[str, Tensor] = {}
    size = total = 0

    def finish() -> None:
        save(shard, target / f"part-{len(where)}.safetensors")
        where.append(list(shard))
        shard.clear()

    for name, tensor in tensors:
        if shard and size + tensor.nbytes > SHARD_BYTES:
            finish()
            size = 0
        shard[name] = tensor.contiguous()
        size, total = size + tensor.nbytes, total + tensor.nbytes
    finish()
    names = (
        [SINGLE]
        if len(where) == 1
        else [f"model-{i + 1:05d}-of-{len(where):05d}.safetensors" for i in range(len(where))]
    )
    for index, name in enumerate(names):
        (target / f"part-{index}.safetensors").rename(target / name)
    if len(names) > 1:
        weight_map = {
            tensor: name for name, held in zip(names, where, strict=True) for tensor in held
        }
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(target / INDEX, index, 2)
