"""The end of a result: its record, proof that the source is still the same, and its name."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from secateur.checkpoints.folder import RECORD, Checkpoint
from secateur.checkpoints.output_folder import refuse_output
from secateur.errors import BadCheckpoint, OutputRefused
from secateur.system.files import file_sha256, sync
from secateur.system.json_files import write_json

Stamps = Mapping[str, list[int]]


def stamps(source: Checkpoint) -> dict[str, list[int]]:
    """Size and time of change of the files that a run reads, to tell whether they change."""
    files = {name: (source.folder / name).stat() for name in ("config.json", *source.shards)}
    return {name: [state.st_size, state.st_mtime_ns] for name, state in files.items()}


def seal(source: Checkpoint, begun: Stamps, partial: Path, record: dict[str, Any]) -> None:
    """Write `record` with the digests of all shards as `pruning.json` into the folder `partial`.

    Raises BadCheckpoint where the source has other stamps than when the run had `begun`.
    """
    record["shards"] = {
        shard: {"source_sha256": digest, "sha256": file_sha256(partial / shard)}
        for shard, digest in source.sha256().items()
        if (partial / shard).exists()
    }
    for name, stamp in stamps(source).items():
        if stamp != begun[name]:
            raise BadCheckpoint(
                f"{source.folder / name} was changed while it was read, so the result would be of "
                "neither. Run again."
            )
    write_json(partial / RECORD, record, finite=True)


def give_name(partial: Path, out: Path, *, overwrite: bool) -> None:
    """Rename `partial` to `out`; what was there before lies aside until `discard_replaced`.

    Raises OutputRefused where `out` has appeared during the run; the result then has another name.
    """
    try:
        refuse_output(out, overwrite=overwrite)
    except OutputRefused as error:
        other = Path(mkdtemp(prefix=f"{out.name}.", dir=out.parent))
        partial.rename(other)
        raise OutputRefused(
            f"{error} That came about during the run, so the result is in {other}."
        ) from error
    if not out.exists():
        partial.rename(out)
        return
    shutil.rmtree(_aside(out), ignore_errors=True)
    out.rename(_aside(out))
    try:
        partial.rename(out)
    except OSError:
        _aside(out).rename(out)
        raise


def discard_replaced(out: Path) -> None:
    """Delete what `out` has replaced, and return when its name is on disk."""
    shutil.rmtree(_aside(out), ignore_errors=True)
    sync(out.parent)


def _aside(out: Path) -> Path:
    return out.with_name(f".{out.name}.replaced")
