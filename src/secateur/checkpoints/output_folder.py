"""Which folders a result may be written to, and what lies beside them while it is."""

from pathlib import Path

from secateur.checkpoints.copied import belonging_folders, refuse_links_out
from secateur.checkpoints.folder import Checkpoint
from secateur.checkpoints.quantised.unpack import source_of
from secateur.errors import OutputRefused


def journal_of(out: Path) -> Path:
    """The journal of the run that writes `out`."""
    return out.with_name(f".{out.name}.journal")


def check_output_folder(source: Checkpoint, out: Path, *, overwrite: bool) -> None:
    """Raise OutputRefused where `out` cannot hold a result of `source`; BadCheckpoint for links."""
    out, model = out.resolve(), source.folder.resolve()
    unpacked_from = source_of(model)
    if out == model or (unpacked_from and out == Path(unpacked_from["folder"])):
        raise OutputRefused(f"{out} is the model itself. Choose another folder.")
    if model in out.parents or out in model.parents:
        raise OutputRefused(
            f"One of {out} and the model's folder {model} lies inside the other. Choose another "
            "folder."
        )
    refuse_output(out, overwrite=overwrite)
    refuse_links_out(model)


def refuse_output(out: Path, *, overwrite: bool, strict: bool = False) -> None:
    """Raise OutputRefused where `out` holds something that may not be replaced.

    Unless `strict`, what a run may have left that died after it renamed its result is let through.
    """
    if (
        not strict
        and journal_of(out).is_file()
        and not out.with_name(f".{out.name}.partial").exists()
    ):
        return
    if out.exists() and not out.is_dir():
        raise OutputRefused(f"{out} is a file; a folder was wanted.")
    if out.resolve() == Path.cwd():
        raise OutputRefused(f"{out} is the current folder. Name a folder inside it.")
    if out.is_mount():
        raise OutputRefused(
            f"{out} is a mount point, which cannot be replaced at once. Name a folder inside it."
        )
    if out.is_dir() and any(out.iterdir()):
        if not overwrite:
            raise OutputRefused(
                f"{out} exists already. Choose another --out, or replace it with --overwrite."
            )
        if not (out / "config.json").is_file() or not any(out.glob("*.safetensors")):
            raise OutputRefused(
                f"{out} is no checkpoint folder, so --overwrite does not replace it."
            )
        inside = {path.name for path in out.iterdir() if path.is_dir()}
        if folders := sorted(inside - {*belonging_folders(out)}):
            raise OutputRefused(
                f"{out} holds other folders ({folders[0]}), so --overwrite does not replace it. "
                "Delete it yourself."
            )
