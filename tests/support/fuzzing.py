"""One case of fuzzing: a sound folder, a mutation of it, a command that reads it, and whether that went as it must.

Allowed is a correct run, or one sentence on standard error and exit code 2 (`validate` may also say no with 1).
Everything else is a fault: an exception that comes through, a crash, a hang, memory far beyond what the weights take,
control characters on the terminal, anything changed or left behind outside the output, a result that is not what its
own record says. `bases` makes the sound folders; bench/fuzz.py runs many cases in a process of their own.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import shutil
import stat
import traceback
import unicodedata
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from safetensors.torch import load_file, save_file

import secateur
from secateur.checkpoints.folder import open_checkpoint
from secateur.checkpoints.quantised.reading import DecodedCheckpoint, readable_checkpoint
from secateur.cli import app as cli
from secateur.cli.failures import FAULT
from secateur.deployment.formats.packed import load_packed, shards
from secateur.errors import UnsupportedModel
from secateur.models.load import resolve
from support.families import tiny_model
from support.hub import serving
from support.limits import TimeLimit, captured, file_limit, forget_peak, held, peak, time_limit
from support.multimodal import tiny_multimodal
from support.mutations import GGUF, HUB, KINDS, RECORD, SINGLE, Case
from support.quantised import NAMES, fp8_llama, gpt_oss, quantised_llama, write
from support.spoilt_gguf import requantised
from support.spoilt_onnx import write_graph
from support.texts import byte_tokenizer, write_documents
from support.truth import PLAIN, SOURCES, other_settings, other_tensors, stored_tensors, truth

SECONDS, SLOW = 20.0, {"shrink": 26.0}
"""That a case may compute, or five times as many of waiting; `shrink` starts a process that loads the result."""
MEMORY, FILES = 2**29, 2**28
"""Bytes by which a case may raise the memory of a process, and of a file that it writes. Models have 500 KB."""
CACHE = "cache"
"""Where plain copies of the sources of a case lie, or what was read of them."""
SMALL = ("--samples", "4", "--seq-len", "16", "--quiet")


class Outcome(NamedTuple):
    """What became of a case. `result` is ok, refused or not kept, or else a fault, of which `detail` tells more."""

    kind: str
    base: str
    command: str
    what: str
    result: str
    detail: str

    @property
    def fault(self) -> bool:
        return self.result not in ("ok", "refused", "not kept")


def bases(place: Path, *, whole: bool = True) -> None:
    """Write the sound folders of `KINDS` below `place`, with text, a plan and what nobody may touch.

    Unless `whole` is asked for, without the other families and the comparison, which take longest.
    """
    place.mkdir(parents=True, exist_ok=True)
    text = place / "text.jsonl"
    write_documents(text)
    for family in ("llama", "gpt2", "mixtral", "gemma3_text") if whole else ("llama",):
        tiny_model(family).save_pretrained(place / family)
        byte_tokenizer().save_pretrained(place / family)
    tiny_multimodal("gemma3").save_pretrained(place / "gemma3")
    byte_tokenizer().save_pretrained(place / "gemma3")
    tiny_model("llama").bfloat16().save_pretrained(place / "bfloat16")
    byte_tokenizer().save_pretrained(place / "bfloat16")
    _shard(place / "llama", place / "sharded")
    small: dict[str, Any] = {"calibration": str(text), "samples": 4, "seq_len": 16}
    secateur.prune(place / "bfloat16", out=place / "pruned", method="wanda", pattern="2:4", **small)
    for to in ("packed", "sparse-bitmask", "sparse-24-bitmask"):
        secateur.export(place / "pruned", out=place / to, to=to)
    secateur.export(place / "pruned", out=place / "packed-int8", to="packed", values="int8")
    secateur.export(place / "pruned", out=place / "packed-int4", to="packed", values="int4 of group 64")
    secateur.export(place / "pruned", out=place / "packed-int3", to="packed", values="int3 of row")
    int4: dict[str, Any] = small | {"method": "wanda", "pattern": "2:4", "values": "int4 of group 32"}
    secateur.prune(place / "bfloat16", out=place / "values", **int4)
    if find_spec("onnx") and find_spec("onnxruntime"):
        write_graph(place / "onnx")
    secateur.plan(place / "llama", out=place / "plan.json", allocate="uniform", **small)
    quantised_bases(place)
    if whole:
        _compare(place, text)
    (place / "sentinel").mkdir()
    shutil.copy(place / "llama" / "model.safetensors", place / "sentinel" / "outside.safetensors")
    (place / "sentinel" / "secret.txt").write_text("a secret that no result may hold\n")


def quantised_bases(place: Path) -> None:
    """The sound folders of every format that is packed, and of GGUF where the package is there."""
    for name in (*NAMES, "fp8", "mxfp4"):
        folder = place / f"{SOURCES}{name}"
        {"fp8": fp8_llama, "mxfp4": gpt_oss}.get(name, functools.partial(quantised_llama, name))(folder)
        tensors = load_file(folder / SINGLE)
        for number, (part, tensor) in enumerate(sorted(tensors.items())):
            if tensor.dtype in PLAIN and part.endswith(("scale", "scales", "scale_inv", "absmax", "SCB")):
                tensor *= 1 + number / 64  # no two modules are the same
        write(folder, tensors, {})
    if find_spec("gguf"):
        for name, (family, dtype, kind) in GGUFS.items():
            _gguf(place, place / f"{SOURCES}gguf-{name}", family, dtype, kind)


GGUFS = {
    "bf16": ("llama", torch.bfloat16, 30), "q8": ("llama", torch.float32, 8), "q4": ("llama", torch.float32, 2),
    "qwen3": ("qwen3", torch.float32, 0),
}  # fmt: skip
"""The family, its dtype and the type of the matrices in a GGUF file, as its specification numbers them."""


def _gguf(place: Path, folder: Path, family: str, dtype: torch.dtype, kind: int) -> None:
    """A GGUF file with matrices of one type and vectors in float32."""
    dense = place / f"{folder.name}-dense"
    model: Any = tiny_model(family)
    model.to(dtype).save_pretrained(dense)
    byte_tokenizer().save_pretrained(dense)
    stored = json.loads((dense / "tokenizer.json").read_text())
    stored["model"] |= {"unk_token": None, "merges": [["t", "h"]]}  # a vocabulary of real files has merges
    stored["model"]["vocab"]["th"] = len(stored["model"]["vocab"])
    (dense / "tokenizer.json").write_text(json.dumps(stored))
    secateur.export(dense, out=folder, to="gguf")
    for file in folder.iterdir():
        if file.name != GGUF:
            file.unlink()
    if kind in (2, 8):
        requantised(folder / GGUF, kind)
    shutil.rmtree(dense)


def _compare(place: Path, text: Path) -> None:
    """A finished comparison: the model is `compared`, its rows are in `rows`, its figures in `results`."""
    shutil.copytree(place / "llama", place / "compared")
    (place / "results").mkdir()
    secateur.compare(
        place / "llama", out=place / "rows", methods=["magnitude"], patterns=["2:4", "50%"], windows=4,
        evaluation=str(text), calibration=str(text), samples=4, seq_len=16, tolerance=0.5,
    )  # fmt: skip
    shutil.copy(place / "rows" / "results.json", place / "results")


def _shard(whole: Path, folder: Path) -> None:
    """A copy of a checkpoint with its weights in two shards."""
    shutil.copytree(whole, folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map: dict[str, str] = {}
    for number in (0, 1):
        part = {name: tensors[name] for name in sorted(tensors)[number::2]}
        file = f"model-0000{number + 1}-of-00002.safetensors"
        save_file(part, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def run_case(seed: int, number: int, sound: Path, root: Path, kinds: tuple[str, ...] = tuple(KINDS)) -> Outcome:
    """Make case `number` of a seed in the new folder `root` from those in `sound`, run it, judge it, remove it."""
    draw = Random(f"{seed} {number}")
    chosen = draw.choices(kinds, [KINDS[kind].weight for kind in kinds])[0]
    known = [name for name in KINDS[chosen].bases if (sound / name).exists()]
    base, command = draw.choice(known), draw.choice(KINDS[chosen].commands)
    case = Case(root, draw, base)
    try:
        shutil.copytree(sound / base, case.model)
        shutil.copytree(sound / "sentinel", case.sentinel)
        shutil.copy(sound / "plan.json", root)
        if command == "compare":
            shutil.copytree(sound / "rows", case.out)
        what = KINDS[chosen].spoil(case)
        before = snapshot(root)
        result, detail = judged(case, command, sound / "text.jsonl")
        if result in ("ok", "refused", "not kept") and (changed := _changed(before, snapshot(root))):
            result, detail = "changed", changed
        return Outcome(chosen, base, command, what, result, detail)
    finally:
        shutil.rmtree(root, ignore_errors=True)


def snapshot(root: Path) -> dict[str, str]:
    """What lies below a folder, the output left out: the digest of each plain file, and what anything else is."""
    found = {}
    for path in sorted(root.rglob("*")):
        held = path.lstat()
        name = os.fsencode(path.relative_to(root)).decode(errors="replace")
        if name.split("/")[0] not in ("out", CACHE):
            plain = stat.S_ISREG(held.st_mode) and held.st_size < 2**26
            digest = hashlib.sha256(path.read_bytes()).hexdigest() if plain else ""
            found[name] = f"{held.st_mode} {held.st_size} {held.st_mtime_ns} {digest}"
    return found


def _changed(before: dict[str, str], after: dict[str, str]) -> str:
    return ", ".join(sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name)))


def arguments(case: Case, command: str, text: Path) -> list[str]:
    """The words of a command line."""
    model, out, calibrated = str(case.named), ["--out", str(case.out)], ["--calibration", str(text), *SMALL]
    first, *rest = command.split(" ")
    if first == "prune":
        plan = ["--allocate", str(case.root / "plan.json")] if rest == ["plan"] else []
        return ["prune", model, *out, "--method", "wanda" if rest != ["magnitude"] else "magnitude", *calibrated, *plan]
    if first == "shrink":
        return ["prune", model, *out, "--method", "energy", "--pattern", "25% of channels", *calibrated]
    if first == "evaluate":
        return ["evaluate", model, "--evaluation", str(text), "--windows", "4", "--json", *SMALL[2:]]
    if first == "compare":
        compared = ["--methods", "magnitude", "--patterns", "2:4", "--windows", "4", "--evaluation", str(text)]
        return ["compare", model, *out, *compared, *calibrated]
    if first == "report":
        return ["report", model, *out]
    if first == "recommend":
        return ["recommend", model, "--goal", *rest]
    if first == "recover":
        way = ["--with", *rest, "--dense", str(text.parent / "bfloat16"), "--text", str(text)]
        return ["recover", model, *out, *way, "--steps", "2", "--batch-size", "2", *SMALL[2:]]
    if first == "validate":
        return ["validate", model, "--for", *rest]
    return ["export", model, *out, "--to", *rest, "--quiet"] if first == "export" else [first, model, *rest]


def judged(case: Case, command: str, text: Path) -> tuple[str, str]:
    """(result, detail) of running a command on a case."""
    if command == "open":
        run = functools.partial(open_checkpoint, case.model)
    elif command == "read":
        run = functools.partial(_read, case)
    elif command == "plain":
        run = functools.partial(resolve, case.named)
    elif command == "load packed":
        run = functools.partial(_load_packed, case.model)
    else:
        own = next(case.root.glob("text.*"), text)
        words = arguments(case, command, own)
        if served := (case.root / HUB).exists():
            words = ["model" if word == str(case.model) else word for word in words]
        run = functools.partial(cli.app, words, standalone_mode=True)
        run = functools.partial(_from_hub, case, run) if served else run
    code: Any
    forget_peak()
    with captured() as said, patch.dict(os.environ, SECATEUR_CACHE=str(case.root / CACHE)):
        try:
            with file_limit(FILES), time_limit(SLOW.get(command, SECONDS)):
                code = cli.guarded(run)
        except SystemExit as left:
            code = left.code or 0
        except TimeLimit:
            return "hang", traceback.format_exc()[-3000:]
        except BaseException:  # pyo3's panics are no Exception
            return "traceback", traceback.format_exc()[-3000:]
    grown = peak() - held() if peak() else 0
    out, err = said
    mapped = "os error 12" in err or "Errno 12" in err  # a file that is mapped is no memory
    if grown > MEMORY or ("allocate memory" in err and not mapped):
        return "memory", f"{grown / 2**20:.0f} MiB more; {err[:500]}"
    return _words(case, command, code, out, err)


def _from_hub(case: Case, run: Callable[[], Any]) -> None:
    """Run while a hub on this machine serves the folder of a case."""
    manner = json.loads((case.root / HUB).read_text())
    waiting = patch("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    with TemporaryDirectory() as cache, serving(case.root, Path(cache)) as hub, waiting:
        hub.manners["model"] = manner
        run()


def _read(case: Case) -> None:
    """Read every tensor of a source, and keep it for `difference`."""
    checkpoint = readable_checkpoint(case.named)
    if not isinstance(checkpoint, DecodedCheckpoint):
        raise UnsupportedModel(f"{case.named} is not read as a quantised source.")
    tensors = {name: checkpoint.tensor(name).contiguous().clone() for name in checkpoint.places}
    (case.root / CACHE).mkdir(exist_ok=True)
    torch.save(tensors, case.root / CACHE / "read")


def _load_packed(folder: Path) -> None:
    with torch.no_grad():
        logits = load_packed(folder, measure=False)(torch.arange(1, 9)[None]).logits
    assert logits.shape[:2] == (1, 8)


def _words(case: Case, command: str, code: Any, out: str, err: str) -> tuple[str, str]:
    """(result, detail) by exit code and what was printed."""
    if odd := [c for c in out + err.removesuffix("\n") if _unprintable(c) and not (c == "\n" and c in out)]:
        return "control characters", f"{odd[:5]!r} in {out[-300:]!r} {err[:300]!r}"
    if code == 2:
        if not (err.startswith("secateur: ") and err.endswith((".\n", "?\n")) and err.count("\n") == 1) or out:
            return "words", f"{err[:1000]!r} {out[:300]!r}"
        if len(err) > 3000:
            return "words", f"{len(err)} characters: {err[:200]!r}"
        if (case.out.exists() and command != "compare") or any((case.root / CACHE).glob(".*.partial")):
            return "left behind", err
        return "refused", err.strip()
    if code == FAULT:
        return "traceback", Path(err.split("Its traceback is in ")[-1].split(";")[0]).read_text()[-3000:]
    if code not in ((0, 1) if command.startswith("validate") else (0,)):
        return "exit code", f"{code!r} {err[:1000]!r}"
    if err:
        return "words", err[:1000]
    if wrong := _wrong(case, command, out) or difference(case, command, out):
        return "wrong result", wrong
    return ("ok" if code == 0 else "not kept"), ""


def _unprintable(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Zl", "Zp", "Cs") or character in "\u202a\u202b\u202c\u202d\u202e"


def _wrong(case: Case, command: str, out: str) -> str:
    """What is wrong with a result, empty where it is sound."""
    first = command.split(" ")[0]
    if "--json" in command or first == "evaluate":
        return _not_json(out)
    if "nan%" in out or "inf%" in out:
        return f"NaN was printed: {out[:500]}"
    if first in ("prune", "shrink", "recover"):
        found = secateur.inspect(case.out)
        odd = [t.name for t in found.tensors if t.negative_zeros or t.nans or t.infs]
        odd = [name for name in odd if not _as_it_came(case, name)]
        claimed = json.loads((case.out / "pruning.json").read_text())["sparsity"]
        if odd or (first != "shrink" and abs(found.sparsity - claimed) > 0.02):
            return f"odd values in {odd[:3]}, sparsity {found.sparsity}, {claimed} claimed"
    if command in ("export packed", "export dense", "export sparse-bitmask", "export sparse-24-bitmask"):
        if command == "export packed":
            return "" if shards(case.out) else "nothing was packed"
        open_checkpoint(case.out)
    return ""


JUDGED = ("read", "plain", "evaluate", "prune", "inspect --json", "export dense")
"""Commands whose results are held against what the source is by the description of its format."""


def difference(case: Case, command: str, out: str) -> str:
    """What was loaded, counted or written otherwise than the source has it; empty where nothing.

    A source that its format's description does not allow should not have been accepted.
    """
    source = case.base.startswith(SOURCES)
    if not command.startswith(JUDGED) or case.base in ("", "packed", "compared") or (case.root / HUB).exists():
        return ""
    if not source and not command.startswith("prune"):
        return ""
    told = json.loads(out) if command == "inspect --json" else {}
    if told and told["format"] is None:
        return ""  # it is not decoded, and what is no float is not counted
    try:
        wanted = truth(case.model, case.base)
    except Exception as error:
        return f"accepted, and by its format's description it is {type(error).__name__}: {error}"
    if command == "read":
        return other_tensors(wanted, torch.load(case.root / CACHE / "read"), cast=False)
    if command == "inspect --json":
        return _other_counts(wanted, told)
    folder = case.out if case.out.exists() else next(case.root.glob(f"{CACHE}/*/config.json")).parent
    record = json.loads((folder / RECORD).read_text()) if (folder / RECORD).exists() else {}
    pruned = _pruned(wanted, record)
    other = other_tensors(wanted, stored_tensors(folder), cast=source, pruned=pruned)
    if not other and source and (case.model / GGUF).exists():
        other = other_settings(case.model, json.loads((folder / "config.json").read_text()))
    return other


def _pruned(names: Iterable[str], record: dict[str, Any]) -> set[str]:
    """The tensors that may have new zeros by the record of a result: sites by what follows the list of their blocks, as
    prefixes differ, and experts as a whole, as transformers stacks them.
    """
    ends = {_end(site["site"]) for site in record.get("sites", [])}
    text = [name for name in names if "vision" not in name]
    return {name for name in text if ".experts." in name or _end(name.removesuffix(".weight")) in ends}


def _end(name: str) -> str:
    return re.sub(r"^.*?\.(?=\d+\.)", "", name)


def _other_counts(wanted: dict[str, torch.Tensor], told: dict[str, Any]) -> str:
    """Whose zeros were counted otherwise."""
    for tensor in told["tensors"]:
        weight = wanted.get(tensor["name"])
        if weight is not None and weight.numel():
            share = (weight == 0).double().mean().item()
            if tensor["sparsity"] is None or abs(tensor["sparsity"] - share) > 1e-9:
                return f"{tensor['name']} has {tensor['sparsity']} of zeros, and {share} by its source"
    return ""


def _as_it_came(case: Case, name: str) -> bool:
    """Whether a tensor was left alone: then it has the bytes of the source, -0.0 and all."""
    before, after = readable_checkpoint(case.named), open_checkpoint(case.out)
    if name not in before.places or name not in after.places:
        return False
    old, new = before.tensor(name), after.tensor(name)
    if isinstance(before, DecodedCheckpoint):
        old = old.to(new.dtype)
    return old.shape == new.shape and torch.equal(old.flatten().view(torch.uint8), new.flatten().view(torch.uint8))


def _not_json(text: str) -> str:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} in the JSON")

    try:
        json.loads(text, parse_constant=refuse)
    except ValueError as error:
        return f"{error}: {text[:300]!r}"
    return ""
