"""A checkpoint in another form: for a runtime that wants one, or back to a dense folder."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from secateur.checkpoints.folder import INDEX, Checkpoint, open_checkpoint
from secateur.checkpoints.quantised.unpack import RESULTS, source_of
from secateur.checkpoints.record import record_of
from secateur.checkpoints.result_folder import output
from secateur.checkpoints.shards import save_in_shards
from secateur.deployment.formats import FORMATS, Format, format_of
from secateur.errors import BadCheckpoint, UnknownName
from secateur.models.checks import LOAD_ERRORS, bad_weights, foreign, other_shape, without_weights
from secateur.models.load import load_config, locate, plain_folder
from secateur.system.files import disk_errors
from secateur.system.json_files import json_object, read_json, write_json
from secateur.system.machine import typed_command, versions
from secateur.system.progress import Progress
from secateur.system.settings import Destination, Trust, Unpacking


def export(
    model: str | Path | None = None,
    *,
    out: str | Path,
    to: str,
    values: str | None = None,
    ranks: int | None = None,
    trust_remote_code: bool | None = None,
    revision: str | None = Trust.revision,
    overwrite: bool = Destination.overwrite,
    command: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> str:
    """Write a checkpoint in another format, or back as a dense one; returns what loads the result.

    `to` is a format that `secateur doctor` lists, or `dense`. Some formats have options: `packed`,
    `gguf` and `compressed-tensors` the `values` that are stored, `tensorrt-llm` the number of
    `ranks`, `packed` and `compressed-tensors` whether to `trust_remote_code`. Raises UnknownName,
    BadCheckpoint, BadPattern, NonFinite, UnsupportedModel, OutputRefused, DiskFull.
    """
    progress = progress or Progress()
    trust = Trust(trust_remote_code=bool(trust_remote_code), revision=revision)
    place, out = locate(model, trust), Path(out)
    folder = place if format_of(place) else plain_folder(place, _dtype_of(place), progress)
    given = {"values": values, "ranks": ranks, "trust_remote_code": trust_remote_code}
    options = {name: value for name, value in given.items() if value is not None}
    wanted, stored_as = _formats(folder, to, options)
    progress.begin(f"writing {to}")
    unpacked_from = source_of(folder) or {}
    opens = wanted or unpacked_from
    source = open_checkpoint(folder) if opens else Checkpoint(folder, (), {})
    loaded_by = wanted.loaded_by if wanted else "every loader of safetensors checkpoints"
    record = record_of(folder) or {}
    record["exported"] = {
        "to": to,
        "from": stored_as or unpacked_from.get("format") or "dense",
        "options": options,
        "loaded_by": loaded_by,
        "versions": versions(),
        "command": typed_command(command),
        "source_shards": source.sha256(),
    }
    if wanted is not None:
        _refuse_other_shapes(source, trust.trust_remote_code)
    with output(source, out, overwrite=overwrite, other_weights=source.bytes) as result:
        if wanted is not None:
            if note := wanted.write(source, result.partial, **options):
                record["exported"]["note"] = note
                progress.note(note)
        elif stored_as is not None:
            _densify(folder, result.partial, FORMATS[stored_as])
        else:  # unpacked already
            for shard in source.shards:
                shutil.copyfile(folder / shard, result.partial / shard)
        result.finish(record)
    progress.end()
    return loaded_by


def _dtype_of(place: Path) -> str:
    """What quantised weights become: of a folder that was exported here, the dtype they had."""
    if place.is_dir() and "exported" in (record_of(place) or {}):
        config = json_object(place / "config.json")
        dtype = config.get("dtype", config.get("torch_dtype"))
        if dtype in RESULTS:
            return str(dtype)
    return Unpacking.result_dtype


def _formats(
    folder: Path, to: str, options: Mapping[str, object]
) -> tuple[Format | None, str | None]:
    """The format to write and the name of the one that a folder is in, None for dense.

    Raises UnknownName; BadCheckpoint where both are dense, or neither.
    """
    if to != "dense" and to not in FORMATS:
        raise UnknownName("format", to, ["dense", *FORMATS])
    wanted = FORMATS.get(to)
    allowed = frozenset() if wanted is None else wanted.options
    for option in options:
        if option not in allowed:
            raise UnknownName(f"option of {to}", option, allowed or ["none"])
    stored_as = format_of(folder)
    if wanted is None and stored_as is None and not source_of(folder):
        open_checkpoint(folder)  # says what is wrong, where something is
        raise BadCheckpoint(f"{folder} is a dense checkpoint already.")
    if wanted is not None and stored_as is not None:
        raise BadCheckpoint(
            f"{folder} is stored as {stored_as}. Export it to 'dense' first, then to {to}."
        )
    return wanted, stored_as


def _refuse_other_shapes(source: Checkpoint, trusted: bool) -> None:
    """Raise BadCheckpoint or UnsupportedModel unless the weights are what config.json says."""
    config = load_config(source.folder, trust_remote_code=trusted)
    try:
        model = without_weights(source, config, trust_remote_code=trusted)
    except LOAD_ERRORS as error:
        raise bad_weights(source.folder, source.shapes, config, None, error) from error
    if other := other_shape(source.shapes, model):
        raise foreign(source.folder, other)


def _densify(folder: Path, target: Path, stored_as: Format) -> None:
    """Write the dense shards of a folder, and what its config.json says but for the format."""
    with disk_errors(target):
        if stored_as.restore is not None:
            stored_as.restore(folder, target)
        elif stored_as.read is not None:
            (target / INDEX).unlink(missing_ok=True)
            save_in_shards(stored_as.read(folder), target)
        if stored_as.foreign:
            file = target / "config.json"
            config = read_json(file)
            kept = {key: value for key, value in config.items() if key not in stored_as.foreign}
            write_json(file, kept, 2)
    open_checkpoint(target)
