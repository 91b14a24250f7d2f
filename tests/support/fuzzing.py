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
import shutil
import stat
import traceback
import unicodedata
from collections.abc import Callable
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from safetensors.torch import load_file, save_file

import secateur
from secateur.checkpoints.folder import open_checkpoint
from secateur.cli import app as cli
from secateur.cli.failures import FAULT
from secateur.deployment.formats.packed import load_packed, shards
from support.families import tiny_model
from support.hub import serving
from support.limits import TimeLimit, captured, file_limit, forget_peak, held, peak, time_limit
from support.multimodal import tiny_multimodal
from support.mutations import HUB, KINDS, Case
from support.texts import byte_tokenizer, write_documents

SECONDS, SLOW = 20.0, {"shrink": 100.0}
"""Of processor and waiting that a case may take; `shrink` starts a process that loads the result."""
MEMORY, FILES = 2**29, 2**28
"""Bytes by which a case may raise the memory of a process, and of a file that it writes. Models have 500 KB."""
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
    secateur.plan(place / "llama", out=place / "plan.json", allocate="uniform", **small)
    if whole:
        _compare(place, text)
    (place / "sentinel").mkdir()
    shutil.copy(place / "llama" / "model.safetensors", place / "sentinel" / "outside.safetensors")
    (place / "sentinel" / "secret.txt").write_text("a secret that no result may hold\n")


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
    case = Case(root, draw)
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
        if name.split("/")[0] != "out":
            plain = stat.S_ISREG(held.st_mode) and held.st_size < 2**26
            digest = hashlib.sha256(path.read_bytes()).hexdigest() if plain else ""
            found[name] = f"{held.st_mode} {held.st_size} {held.st_mtime_ns} {digest}"
    return found


def _changed(before: dict[str, str], after: dict[str, str]) -> str:
    return ", ".join(sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name)))


def arguments(case: Case, command: str, text: Path) -> list[str]:
    """The words of a command line."""
    model, out, calibrated = str(case.model), ["--out", str(case.out)], ["--calibration", str(text), *SMALL]
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
    with captured() as said:
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
    if grown > MEMORY or ("allocate memory" in err and "os error 12" not in err):  # a file mapped is no memory
        return "memory", f"{grown / 2**20:.0f} MiB more; {err[:500]}"
    return _words(case, command, code, out, err)


def _from_hub(case: Case, run: Callable[[], Any]) -> None:
    """Run while a hub on this machine serves the folder of a case."""
    manner = json.loads((case.root / HUB).read_text())
    waiting = patch("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    with TemporaryDirectory() as cache, serving(case.root, Path(cache)) as hub, waiting:
        hub.manners["model"] = manner
        run()


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
        if case.out.exists() and command != "compare":
            return "left behind", err
        return "refused", err.strip()
    if code == FAULT:
        return "traceback", Path(err.split("Its traceback is in ")[-1].split(";")[0]).read_text()[-3000:]
    if code not in ((0, 1) if command.startswith("validate") else (0,)):
        return "exit code", f"{code!r} {err[:1000]!r}"
    if err:
        return "words", err[:1000]
    if wrong := _wrong(case, command, out):
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


def _as_it_came(case: Case, name: str) -> bool:
    """Whether a tensor was left alone: then it has the bytes of the source, -0.0 and all."""
    before, after = open_checkpoint(case.model), open_checkpoint(case.out)
    if name not in before.places or name not in after.places:
        return False
    old, new = before.tensor(name), after.tensor(name)
    return old.shape == new.shape and torch.equal(old.flatten().view(torch.uint8), new.flatten().view(torch.uint8))


def _not_json(text: str) -> str:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} in the JSON")

    try:
        json.loads(text, parse_constant=refuse)
    except ValueError as error:
        return f"{error}: {text[:300]!r}"
    return ""
