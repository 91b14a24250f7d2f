"""What of a source belongs to a result besides the weights, and what was made of other weights.

Configuration, tokenizer, processor, templates and licences are copied as they are. What holds the
weights once more, or says how others were quantised, would no longer fit: it stays behind, and the
report says so.
"""

import re
from pathlib import Path

from secateur.checkpoints.folder import INDEX, RECORD, Checkpoint, weight_file
from secateur.errors import BadCheckpoint
from secateur.system.json_files import read_json

TEMPLATES, MODULES = "additional_chat_templates", "modules.json"
_STALE = re.compile(
    r".*\.(safetensors|bin|pt|pth|ckpt|h5|msgpack|gguf|onnx|onnx[._]data|npz|imatrix|engine|plan"
    r"|ot)"
    r"|(hf_)?quant(ize|ization)?_config\.json|params\.json|adapter_config\.json"
    r"|.*\.(safetensors|bin|h5|msgpack)\.index\.json"
)
"""Other weights, their indices, and how they were quantised."""


def belonging_files(source: Checkpoint) -> list[Path]:
    """The files that a result gets from its source as they are, its index among them."""
    folder = source.folder
    files = [path for path in sorted(folder.iterdir()) if path.is_file()]
    kept = [path for path in files if path.name != RECORD and not _is_stale(source, path.name)]
    for name in belonging_folders(folder):
        kept += [path for path in sorted((folder / name).iterdir()) if path.is_file()]
    return kept


def belonging_folders(folder: Path) -> list[str]:
    """The folders inside a model's folder that are part of the model: chat templates, and the
    modules that sentence-transformers runs after it (`1_Pooling`).
    """
    names = {TEMPLATES}
    if (folder / MODULES).is_file():
        try:
            modules = read_json(folder / MODULES)
        except ValueError:
            modules = []
        for module in modules if isinstance(modules, list) else []:
            path = module.get("path") if isinstance(module, dict) else None
            if isinstance(path, str) and re.fullmatch(r"\d+_\w+", path):
                names.add(path)
    return sorted(name for name in names if (folder / name).is_dir())


def left_behind_in_words(source: Checkpoint) -> str:
    """A sentence on what of a source is not in a result; empty where all is."""
    folder, belonging = source.folder, belonging_folders(source.folder)
    shown = [path for path in sorted(folder.iterdir()) if not path.name.startswith((".", "_"))]
    names = [f"{path.name}/" for path in shown if path.is_dir() and path.name not in belonging]
    names += [
        path.name
        for path in shown
        if path.is_file() and path.name not in source.shards and _is_stale(source, path.name)
    ]
    if not names:
        return ""
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return f"Not copied, since it is no part of the result: {', '.join(names[:4])}{more}."


def refuse_links_out(folder: Path) -> None:
    """Raise BadCheckpoint for links out of a folder whose files will be copied, shards excepted.

    A link in a folder from elsewhere can name a private key; the copy would then be in a result
    that is given away. The hub's own cache keeps its files in a folder beside the snapshots.
    """
    allowed = {folder.resolve()}
    if folder.resolve().parent.name == "snapshots":
        allowed.add(folder.resolve().parent.parent / "blobs")
    inside = belonging_folders(folder)
    paths = [path for path in folder.iterdir() if path.is_file() or path.name in inside]
    paths += [path for name in inside for path in (folder / name).iterdir()]
    for path in paths:
        if path.is_symlink() and path.suffix != ".safetensors":
            target = path.resolve()
            if allowed.isdisjoint(target.parents):
                raise BadCheckpoint(
                    f"{path} is a link to {target}, outside of the folder. Put a copy in its place."
                )


def _is_stale(source: Checkpoint, name: str) -> bool:
    """Whether a file is of other weights; of indices the one in use is not."""
    if name == INDEX and weight_file(source.folder) == INDEX:
        return False
    return bool(_STALE.fullmatch(name))
