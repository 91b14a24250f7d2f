"""Folders and repositories without weights that are read here: what they hold instead, by the names
of their files, and the way out.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from typing import NamedTuple

from secateur.errors import BadCheckpoint

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
ADAPTER = "adapter_config.json"
HQQ = "qmodel.pt"
_CONVERT = (
    "import json, sys, torch; from pathlib import Path; from safetensors.torch import save_file; "
    "files = sorted(map(Path, sys.argv[1:])); one = len(files) == 1; "
    'to = {f: f.with_name("model.safetensors" if one else '
    'f"model-{i:05}-of-{len(files):05}.safetensors") for i, f in enumerate(files, 1)}; '
    "index = {n: to[f].name for f in files "
    'for p in [torch.load(f, map_location="cpu", weights_only=True)] '
    'for t in [{n: v for n, v in p.get("state_dict", p).items() if torch.is_tensor(v)}] '
    "for _ in [save_file({n: v.clone(memory_format=torch.contiguous_format) "
    'for n, v in t.items()}, to[f], {"format": "pt"})] for n in t}; '
    'one or files[0].with_name("model.safetensors.index.json").write_text('
    'json.dumps({"metadata": {}, "weight_map": index}))'
)
"""A program that writes pickled weights as safetensors beside them, a shard at a time. Nothing in a
pickle is run (`weights_only`); tensors that share memory get memory of their own.
"""


_HQQ = (
    "from hqq.models.hf.base import AutoHQQHFModel as model; "
    'model.save_to_safetensors(model.from_quantized({0!r}, device="cpu"), "DIR")'
)
"""A program that writes what HQQ has pickled as safetensors, with its own library."""


class Kind(NamedTuple):
    """What it is that has files with such names, in words, and the way out."""

    names: str
    what: str
    way_out: str


KINDS = (
    Kind(
        re.escape(ADAPTER),
        "an adapter, not a model",
        "Merge it into its base model (peft's merge_and_unload), save that, and name it.",
    ),
    Kind(
        r".*\.gguf$",
        "a GGUF file and no safetensors weights",
        "Name that file (of the hub, after hf download), or the model that it was made from.",
    ),
    Kind(
        r"(consolidated.*\.safetensors|params\.json)$",
        "weights in Mistral's own layout",
        "Take a repository with model.safetensors, or convert it as transformers does "
        "(convert_mistral_weights_to_hf.py).",
    ),
    Kind(
        r".*\.distcp$",
        "shards that FSDP has saved",
        "Merge them: accelerate merge-weights FOLDER OUT.",
    ),
    Kind(
        r".*\.(npz|h5|msgpack|onnx|mlmodel|tflite|ckpt\.index)$",
        "weights for another framework alone",
        "Take a repository with safetensors weights.",
    ),
)
"""By the name of some file; the first that fits is said. Pickles and packed shards come before."""


def no_weights(where: str, names: Iterable[str], *, hub: bool = False) -> BadCheckpoint:
    """What to raise for a folder, or a repository of the `hub`, that has files of these names and
    no weights that are read here.
    """
    names = sorted(names)
    if ADAPTER in names:
        return _said(KINDS[0], where, ADAPTER)
    if HQQ in names:
        program = shlex.quote(_HQQ.format(where))
        return BadCheckpoint(
            f"{where} has weights that HQQ has pickled ({HQQ}), which can run code when loaded. "
            f"Where you trust them, the package hqq writes them as safetensors: python -c {program}"
            " . Then copy the tokenizer into DIR."
        )
    if pickles := _pickles(names):
        only = f"{where} has only pickled weights ({pickles[0]}), which can run code when loaded."
        if not _are_known(pickles):
            return BadCheckpoint(
                f"{only} Load the model in a place you trust, and call save_pretrained."
            )
        way_out = converting(where, pickles, hub=hub)
        return BadCheckpoint(f"{only} This writes them as safetensors and runs none: {way_out} .")
    if packed := [name for name in names if re.match(r"packed-.*\.safetensors$", name)]:
        folder = where.rpartition("/")[-1] if hub else where
        return BadCheckpoint(
            f"{where} is packed ({packed[0]}). Make it dense first: {_fetching(where, hub)}"
            f"secateur export {shlex.quote(folder)} --to dense --out DIR."
        )
    for kind in KINDS:
        if name := next((name for name in names if re.match(kind.names, name)), None):
            return _said(kind, where, name)
    return BadCheckpoint(f"{where} has no weights: neither {SINGLE} nor {INDEX}.")


def _said(kind: Kind, where: str, name: str) -> BadCheckpoint:
    return BadCheckpoint(f"{where} holds {kind.what} ({name}). {kind.way_out}")


def _are_known(pickles: list[str]) -> bool:
    """Whether pickles are one file, or shards of one model, and not parts that nobody can put
    together by their names.
    """
    return len(pickles) == 1 or all(re.search(r"-\d+-of-\d+\.bin$", name) for name in pickles)


def no_config(where: str, names: Iterable[str], *, hub: bool = False) -> BadCheckpoint:
    """What to raise for a folder, or a repository of the `hub`, without config.json."""
    names = sorted(names)
    for kind in KINDS:
        if name := next((name for name in names if re.match(kind.names, name)), None):
            return _said(kind, where, name)
    what = "model of transformers" if hub else "checkpoint folder"
    return BadCheckpoint(f"{where} is no {what}: it has no config.json.")


def _pickles(names: list[str]) -> list[str]:
    """The pickled weights among files; where there are transformers' own, only these."""
    own = [name for name in names if re.match(r"pytorch_model(-\d+-of-\d+)?\.bin$", name)]
    # what trainers leave beside them is no model
    left = re.compile(r"(training_args|optimizer|scheduler|rng_state|scaler).*")
    ends = (".bin", ".pt", ".pth", ".ckpt")
    if "pytorch_model.bin" in own:
        return ["pytorch_model.bin"]
    return own or [name for name in names if name.endswith(ends) and not left.match(name)]


def converting(where: str, pickles: list[str], *, hub: bool = False) -> str:
    """One line of a shell that converts pickled weights to safetensors; of a repository, after
    fetching it.
    """
    folder = where.rpartition("/")[-1] if hub else where
    start = re.match(r"(.*)-\d+-of-\d+\.bin$", pickles[0])
    many = f"{shlex.quote(f'{folder}/{start[1]}')}-*.bin" if start and len(pickles) > 1 else ""
    files = many or " ".join(shlex.quote(f"{folder}/{name}") for name in pickles)
    return f"{_fetching(where, hub)}python -c {shlex.quote(_CONVERT)} {files}"


def _fetching(where: str, hub: bool) -> str:
    """What comes before a command on a folder that is yet to be fetched."""
    folder = shlex.quote(where.rpartition("/")[-1])
    return f"hf download {shlex.quote(where)} --local-dir {folder} && " if hub else ""
