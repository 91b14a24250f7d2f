"""What every command writes, as digests: whether a change of the code left the results as they were.

    python bench/same.py --checkout ../before --json before.json
    python bench/same.py --json after.json --against before.json        # exit code 1 where they differ

A fixed list of commands (`cases`) runs on tiny random models, in one process per checkout, which enters the command
line as `[project.scripts]` of that checkout names it, so that modules may move. Of each command: the exit code, the
digest of what it printed, the last line of an error as it stands, and the digest of every file that it wrote. What
differs from run to run of the same code is left out (`VOLATILE`, `TEXTS`); all else counts, byte by byte in weights.
Both sides must run on the same machine: other processors and other versions of torch round otherwise.

Runs that are killed are forks of that process, killed as soon as the journal beside the result holds something that is
done; the same command then ends them. `--only TEXT` runs the cases that have it in their name, and what those need.
`--keep DIR` keeps all files, and under DIR/canonical what the digests are of, for `diff -r`.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import io
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
import traceback
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

VOLATILE = {
    "seconds": "how long something took",
    "rates": "operations a second, timed for a forecast",
    "peak_bytes": "memory, as the system counted it",
    "latency": "timings of a row; the pages of `frozen` ones show that they are read as before",
    "machine": "where it ran",
    "versions": "of the libraries",
    "command": "what was typed, with paths",
}
"""Keys of JSON documents that are left out wherever they stand, and why."""

TEXTS = {
    r"\b\d[\d,.]* (s|min|h)\b": "how long something took",
    r"\b\d+\.\d (planning|forward|statistics|solving|refining)\b": "the same, of its parts",
    r"\b\d[\d,.]* [GT]flop/s": "a rate, timed for a forecast",
    r"\b\d[\d,.]* +\d[\d,.]* [MG]iB\b": "seconds and memory of a row of a comparison, as the system counted them",
}
"""What is left out of texts, and why."""

PAGES = ("report.html", "report.md")
"""Full of times where a comparison writes them; the cases of `report` write them of times that are `frozen`."""

MODELS = ("llama", "bf16", "gpt2", "mixtral")
CALIBRATION = "--calibration calibration.jsonl --samples 8 --seq-len 64 --batch-size 4 --device cpu --quiet"
ZEROS = f"{CALIBRATION} --json"
COMPARED = f"{CALIBRATION} --evaluation evaluation.jsonl --windows 9 --json"
TRAINING = "--text training.jsonl --steps 3 --batch-size 2 --seq-len 64 --device cpu --quiet --json"

METHODS = ("magnitude", "wanda", "ria", "sparsegpt", "sweep", "alps", "alps-fast", "fast", "default", "best")
REFINED = (
    "wanda+refit", "wanda+swap", "wanda+permute", "sparsegpt+dense-target", "wanda+refine", "wanda+sequential",
    "sweep+refit+dense-target", "magnitude+swap+refit",
)  # fmt: skip
STRUCTURES = {
    "channels": ("energy+repair", "25% of channels"),
    "heads": ("default", "50% of heads"),
    "blocks": ("kl", "1 block"),
    "several": ("taylor+repair", "25% of channels + 1 block"),
    "size": ("fast", "to 75% of parameters"),
    "refined": ("obs+repair+dense-target+refine", "25% of channels"),
}
RECOVERIES = ("lora", "masked", "distill", "lora+distill", "blocks")
EXPORTS = {
    "packed": ("2:4 bf16", "--to packed"),
    "packed 50%": ("wanda 50%", "--to packed"),
    "packed int8": ("2:4 bf16", "--to packed --values int8"),
    "gguf": ("2:4 bf16", "--to gguf"),
    "gguf f32": ("2:4 bf16", "--to gguf --values f32"),
    "gguf f16": ("2:4 bf16", "--to gguf --values f16"),
    "gguf bf16": ("2:4 bf16", "--to gguf --values bf16"),
    "gguf q8_0": ("2:4 bf16", "--to gguf --values q8_0"),
    "onnx": ("2:4 bf16", "--to onnx"),
    "tensorrt-llm": ("2:4 bf16", "--to tensorrt-llm"),
    "tensorrt-llm ranks": ("2:4 bf16", "--to tensorrt-llm --ranks 2"),
    "sparse-24-bitmask": ("2:4 bf16", "--to sparse-24-bitmask"),
    "sparse-bitmask": ("2:4 bf16", "--to sparse-bitmask"),
    "dense": ("export packed", "--to dense"),
    "dense of int8": ("export packed int8", "--to dense"),
}
"""A name: of which case, and how. `secateur doctor` says what can be written."""
RUNTIMES = (
    "eager", "compiled", "packed", "packed-int8", "semi-structured", "tensorrt-llm", "tensorrt", "vllm", "onnxruntime",
    "llamacpp",
)  # fmt: skip
FAR = "--max-perplexity-increase 99%"
GOALS = ("quality", "latency", "memory", "portability")
REFUSED = {
    "pattern": "prune @llama --out @ --pattern 5:4",
    "pattern words": "prune @llama --out @ --pattern 'half of it'",
    "share": "prune @llama --out @ --pattern 150%",
    "method": "prune @llama --out @ --method wandaa",
    "refinement": "prune @llama --out @ --method wanda+refi",
    "dtype": "prune @llama --out @ --dtype float31",
    "device": "prune @llama --out @ --device tpu",
    "passes": "prune @llama --out @ --passes three",
    "memory": "prune @llama --out @ --memory lots",
    "allocation": "prune @llama --out @ --allocate owls",
    "allocation 2:4": "prune @llama --out @ --allocate owl --pattern 2:4",
    "folder": "prune no/such/folder --out @",
    "calibration": "prune @llama --out @ --calibration missing.jsonl --seq-len 64",
    "text": "prune @llama --out @ --calibration short.txt --seq-len 64",
    "length": "prune @llama --out @ --calibration calibration.jsonl --seq-len 4096",
    "align": "prune @llama --out @ --align 4",
    "skip structure": "prune @llama --out @ --pattern '25% of channels' --skip '*'",
    "skip nothing": "prune @llama --out @ --skip 'no.such.site' --calibration calibration.jsonl --seq-len 64",
    "structure method": "prune @llama --out @ --method wanda --pattern '25% of channels'",
    "structure allocation": "prune @llama --out @ --pattern '25% of channels' --allocate owl",
    "too many blocks": "prune @llama --out @ --pattern '9 blocks' --calibration calibration.jsonl --seq-len 64",
    "experts": "prune @llama --out @ --pattern '25% of experts' --calibration calibration.jsonl --seq-len 64",
    "existing": "prune @llama --out @wanda-50% --calibration calibration.jsonl --seq-len 64",
    "itself": "prune @llama --out @llama --overwrite --calibration calibration.jsonl --seq-len 64",
    "not finite": "prune @broken --out @ --calibration calibration.jsonl --seq-len 64",
    "option": "prune @llama --out @ --metod wanda",
    "samples": "prune @llama --out @ --samples 0",
    "no out": "prune @llama",
    "plan file": "prune @llama --out @ --allocate missing.json",
    "plan of 2:4": "plan @llama --out @ --pattern 2:4",
    "recover way": "recover @wanda-50% --out @ --with magic",
    "recover dense": "recover @llama --out @ --text training.jsonl --seq-len 64",
    "recover without text": "recover @wanda-50% --out @ --text missing.jsonl",
    "export format": "export @wanda-50% --out @ --to gguff",
    "export values": "export @wanda-50% --out @ --to gguf --values q3",
    "export pattern": "export @wanda-50% --out @ --to sparse-24-bitmask",
    "validate": "validate @wanda-50% --for tensorflow",
    "inspect": "inspect no/such/folder",
    "evaluate packed": "evaluate @export-packed --evaluation evaluation.jsonl --windows 9",
    "validate packed": "validate @export-packed --for packed",
    "compare methods": "compare @llama --out @ --methods wanda,wando",
    "compare values": "compare @llama --out @ --values int4",
    "compare numbers": "compare @llama --out @ --samples a,b",
    "tolerance": "compare @llama --out @ --tolerance much",
    "tasks": "evaluate @llama --tasks boolqq",
    "report": "report no/such/folder --out @",
    "recommend": "recommend @compare/results.json --goal beauty",
    "recommend increase": "recommend @compare/results.json --goal memory --max-perplexity-increase 5x",
    "hardware": "recommend --goal latency --hardware abacus",
    "runtime": "bench @wanda-50% --runtime warp --quiet",
}


class Case(NamedTuple):
    """A command line, where `@name` is the place of a model or of the result of a case and `@` that of its own.

    `kill`: it is killed once before. `prepare` is called before, with the folder in which all lies.
    """

    name: str
    command: str
    kill: bool = False
    prepare: Callable[[Path], None] | None = None

    @property
    def place(self) -> str:
        return re.sub(r"[^\w.%+:/-]+", "-", self.name)

    @property
    def needs(self) -> set[str]:
        """The places of what it reads."""
        return {word[1:].partition("/")[0] for word in shlex.split(self.command) if re.match(r"@.", word)}


def cases() -> list[Case]:
    """All of them, in an order in which what is read has been made before."""
    found = [
        Case("killed zeros", "prune @llama --out @ --method best --pattern 50% --calibration calibration.jsonl "
             "--samples 64 --seq-len 128 --device cpu --quiet --json", kill=True),
        Case("killed structure", "prune @llama --out @ --method best --pattern '25% of channels' --calibration "
             "calibration.jsonl --samples 64 --seq-len 128 --device cpu --quiet --json", kill=True),
    ]  # fmt: skip
    found += [
        Case(f"{method} {pattern}", f"prune @llama --out @ --method {method} --pattern {pattern} {ZEROS}")
        for method in METHODS
        for pattern in ("50%", "2:4")
    ]
    found += [Case(f"{method} 50%", f"prune @llama --out @ --method {method} {ZEROS}") for method in REFINED]
    found += [Case(f"{name} 2:4", f"prune @llama --out @ --method {name} --pattern 2:4 {ZEROS}") for name in REFINED]
    more = {
        "4:8": "prune @llama --method wanda --pattern 4:8",
        "share of a row": "prune @llama --method magnitude --pattern '50% of row'",
        "one pass": "prune @llama --method sparsegpt --passes one",
        "two passes": "prune @llama --method sparsegpt --passes two",
        "two devices": "prune @llama --method wanda --device cpu,cpu",
        "skip": "prune @llama --method wanda --skip '*down_proj'",
        "seed": "prune @llama --method wanda --seed 7",
        "bfloat16 passes": "prune @llama --method wanda --dtype bfloat16",
        "2:4 bf16": "prune @bf16 --method wanda --pattern 2:4",
        "default bf16": "prune @bf16 --method default --dtype float32",
        "wanda gpt2": "prune @gpt2 --method wanda",
        "default gpt2": "prune @gpt2 --method default --pattern 2:4",
        "wanda mixtral": "prune @mixtral --method wanda",
        "default mixtral": "prune @mixtral --method default --pattern 2:4",
        "owl": "prune @llama --method wanda --allocate owl --pattern 60%",
        "error": "prune @llama --method default --allocate error --pattern 60%",
        "search": "prune @llama --method wanda --allocate search --pattern 60%",
    }
    for name, command in more.items():
        typed, _, options = command.partition(" --")
        found.append(Case(name, f"{typed} --out @ {ZEROS} --{options}"))
    found += [
        Case("plan", f"plan @llama --out @/plan.json --method wanda --pattern 60% {ZEROS}"),
        Case("plan owl", f"plan @llama --out @/plan.json --method wanda --allocate owl --pattern 60% {CALIBRATION}"),
        Case("of a plan", f"prune @llama --out @ --method wanda --allocate @plan/plan.json --pattern 60% {ZEROS}"),
        Case("forecast", "plan @llama --pattern 50% --device cpu --samples 8 --seq-len 64 --json"),
        Case("forecast of two passes", "plan @mixtral --method best --passes two --pattern 2:4 --device cpu --json"),
        Case("forecast in words", "plan @llama --method wanda --pattern 70% --memory 1GB --device cpu"),
        Case("forecast of the demo", "plan --method sparsegpt --pattern 50% --memory 16GB --device cpu --json"),
        Case("in words", f"prune @llama --out @ --method wanda {CALIBRATION}"),
        Case(
            "structure in words",
            f"prune @llama --out @ --method energy --pattern '25% of channels' --align 32 {CALIBRATION}",
        ),
        Case("demo", "prune --out @ --method fast --samples 4 --seq-len 64 --device cpu --quiet --json"),
    ]
    found += [
        Case(name, f"prune @llama --out @ --method {method} --pattern '{pattern}' {ZEROS}")
        for name, (method, pattern) in STRUCTURES.items()
    ]
    found += [
        Case("experts", f"prune @mixtral --out @ --method reap --pattern '25% of experts' {ZEROS}"),
        Case("channels gpt2", f"prune @gpt2 --out @ --method default --pattern '25% of channels' {ZEROS}"),
    ]
    dense = {"distill": "--dense @llama", "lora+distill": "--dense @llama", "blocks": "--dense @llama"}
    found += [
        Case(f"recover {way}", f"recover @wanda-50% --out @ --with {way} {dense.get(way, '')} {TRAINING}")
        for way in RECOVERIES
    ]
    found += [
        Case("recover again in words", "recover @recover-lora --out @ --with masked "
             f"{TRAINING.removesuffix('--json')}"),
        Case("recover bf16", f"recover @2:4-bf16 --out @ --with masked --dtype float32 {TRAINING}"),
        Case("killed recovery", "recover @wanda-50% --out @ --with blocks --dense @llama --text training.jsonl "
             "--steps 40 --batch-size 4 --seq-len 64 --device cpu --quiet --json", kill=True),
    ]  # fmt: skip
    for name, (source, how) in EXPORTS.items():
        found.append(Case(f"export {name}", f"export @{source.replace(' ', '-')} --out @ {how} --quiet"))
    found += [Case(f"inspect {name}", f"inspect @{name.replace(' ', '-')} --json") for name in (
        "llama", "2:4 bf16", "of a plan", "channels", "export packed", "wanda mixtral")]  # fmt: skip
    found += [Case("inspect in words", "inspect @2:4-bf16"), Case("inspect structure in words", "inspect @channels")]
    found += [
        Case(f"validate {source} {runtime}", f"validate @{source} --for {runtime} --json")
        for source in ("2:4-bf16", "wanda-50%", "wanda-mixtral")
        for runtime in RUNTIMES
    ]
    found += [
        Case("validate in words", "validate @2:4-bf16 --for semi-structured --batch 256"),
        Case("validate ranks", "validate @2:4-bf16 --for tensorrt-llm --ranks 2 --json"),
        Case("evaluate", "evaluate @wanda-50% --dense @llama --evaluation evaluation.jsonl --windows 9 --device cpu "
             "--quiet --json"),
        Case("evaluate in words", "evaluate @channels --dense @llama --evaluation evaluation.jsonl --windows 9 "
             "--device cpu --quiet"),
        Case("evaluate tasks", "evaluate @wanda-50% --dense @llama --evaluation evaluation.jsonl --windows 9 --tasks "
             "boolq --data-dir data --limit 8 --device cpu --quiet --json"),
        Case("compare", f"compare @llama --out @ --methods magnitude,wanda --patterns 50%,2:4 {COMPARED}"),
        Case("compare values", "compare @llama --out @ --methods wanda --patterns 50% --values 'as stored,int8' "
             f"{COMPARED}"),
        Case("compare structures", f"compare @llama --out @ --methods energy --patterns '25% of channels' {COMPARED}"),
        Case("compare allocations", "compare @llama --out @ --methods wanda --patterns 60% --allocate uniform,owl "
             f"{COMPARED}"),
        Case("compare seeds", f"compare @llama --out @ --methods wanda --patterns 50% --seeds 0,1 {COMPARED}"),
        Case("compare recovered", "compare @llama --out @ --methods wanda --patterns 50% --recover lora "
             f"--recover-steps 3 --recover-text training.jsonl {COMPARED}"),
        Case("compare tolerance", "compare @llama --out @ --methods magnitude,wanda --patterns 10%..80% --tolerance 5% "
             f"{COMPARED}"),
        Case("compare tasks", "compare @llama --out @ --methods wanda --patterns 50% --tasks boolq --data-dir data "
             f"--limit 8 {COMPARED}"),
        Case("compare timed", "compare @bf16 --out @ --methods magnitude,wanda --patterns 2:4 --bench eager,packed "
             f"{COMPARED}"),
        Case("compare in words", "compare @llama --out @ --methods wanda --patterns 2:4 "
             f"{COMPARED.removesuffix('--json')}"),
        Case("report", "report @compare --out @", prepare=frozen("compare")),
        Case("report timed", "report @compare-timed --out @", prepare=frozen("compare-timed")),
        Case("report tolerance", "report @compare-tolerance --out @", prepare=frozen("compare-tolerance")),
        Case("report tasks", "report @compare-tasks --out @", prepare=frozen("compare-tasks")),
        Case("report joined", "report @compare @compare-values @compare-recovered --out @",
             prepare=frozen("compare", "compare-values", "compare-recovered")),
    ]  # fmt: skip
    found += [
        Case(f"recommend {goal}", f"recommend @compare --goal {goal} {FAR} --json", prepare=frozen("compare"))
        for goal in GOALS
    ]
    found += [
        Case(
            f"recommend timed {goal}", f"recommend @compare-timed --goal {goal} {FAR}", prepare=frozen("compare-timed")
        )
        for goal in GOALS
    ]
    found += [
        Case("recommend within", "recommend @report-joined --goal memory"),
        Case("recommend without results", "recommend --goal latency --hardware hopper --json"),
        Case("recommend runtime", f"recommend @compare-timed --goal latency --runtime packed {FAR} --json",
             prepare=frozen("compare-timed")),
        Case("help", "--help"), Case("help of prune", "prune --help"), Case("help of compare", "compare --help"),
        Case("help of plan", "plan --help"), Case("help of recover", "recover --help"),
    ]  # fmt: skip
    return found + [Case(f"refused {name}", command) for name, command in REFUSED.items()]


# --- models and texts ----------------------------------------------------------------------------------------------


def make_models(work: Path) -> None:
    """Tiny random models with a tokenizer of bytes; every parameter has noise, biases and norms too."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, logging

    logging.disable_progress_bar()
    tokenizer = byte_tokenizer()
    size: dict[str, Any] = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
                num_key_value_heads=2, vocab_size=128, max_position_embeddings=128, pad_token_id=0, bos_token_id=1,
                eos_token_id=2)  # fmt: skip
    configs = {
        "llama": AutoConfig.for_model("llama", **size),
        "bf16": AutoConfig.for_model("llama", **{**size, "hidden_size": 128, "intermediate_size": 256}),
        "gpt2": AutoConfig.for_model("gpt2", n_embd=64, n_layer=3, n_head=4, n_positions=128, vocab_size=128,
                                     bos_token_id=1, eos_token_id=2),
        "mixtral": AutoConfig.for_model("mixtral", **size, num_local_experts=4, num_experts_per_tok=2),
    }  # fmt: skip
    for name in MODELS:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(configs[name], dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
        model.to(torch.bfloat16 if name == "bf16" else torch.float32).save_pretrained(work / name)
        tokenizer.save_pretrained(work / name)
        if name == "llama":
            with torch.no_grad():
                model.model.layers[1].mlp.up_proj.weight[3, 5] = float("nan")
            model.save_pretrained(work / "broken")
            tokenizer.save_pretrained(work / "broken")


def byte_tokenizer() -> Any:
    """A tokenizer of printable ASCII bytes, 128 tokens at most; it begins every text with `<s>`."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from tokenizers.decoders import ByteLevel
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<unk>"]
    alphabet = sorted(c for c in pre_tokenizers.ByteLevel.alphabet() if c.isascii() or c in "ĠĊ")
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(special + alphabet)}, merges=[],
                                     unk_token="<unk>"))  # fmt: skip
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def make_texts(work: Path) -> None:
    """Documents of about 200 bytes to calibrate, to train and to evaluate on, and a task; always the same."""
    words = "a the one two cat dog tree road runs sees likes old new red and but then why who how no yes".split()  # noqa: SIM905
    for seed, name in enumerate(("calibration", "training", "evaluation")):
        draw = random.Random(seed)
        texts = [" ".join(draw.choice(words) for _ in range(draw.randint(30, 70))) + ".\n" for _ in range(300)]
        (work / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (work / "short.txt").write_text("too short\n")
    draw, rows = random.Random(3), []
    for number in range(16):
        question = " ".join(draw.choice(words) for _ in range(4))
        rows.append({"passage": f"the {draw.choice(words)} sees", "question": question, "label": number % 2})
    (work / "data" / "tasks").mkdir(parents=True)
    (work / "data" / "tasks" / "boolq.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def frozen(*places: str) -> Callable[[Path], None]:
    """Put what is always the same for all that was timed and counted in comparisons, so that pages of them are, too."""

    def freeze(work: Path) -> None:
        for place in places:
            file = work / place / "results.json"
            if not file.is_file():
                continue
            held, numbers = json.loads(file.read_text()), count(1)
            held["machine"] |= {
                "processor": "a processor", "cores": 1, "threads": 1, "megahertz": [1000.0], "memory_bytes": 2**34,
                "system": "a system", "accelerators": [],
            }  # fmt: skip
            held["versions"] = dict.fromkeys(sorted(held["versions"]), "1.0")
            for row in held["rows"]:
                row["seconds"] = {part: next(numbers) / 4 for part in sorted(row["seconds"])}
                row["peak_bytes"] = row["peak_bytes"] and 2**29
                row["latency"] = [{key: _frozen(key, entry[key], numbers) for key in entry} for entry in row["latency"]]
                if row["recovered"]:
                    row["recovered"]["seconds"] = 1.0
            file.write_text(json.dumps(held, indent=1, ensure_ascii=False))

    return freeze


def _frozen(key: str, value: Any, numbers: Iterator[int]) -> Any:
    """For a timing: a number of its own, three in the order in which they are kept, the ratio of a model to itself."""
    if key == "memory_bytes":
        return value and 2**24
    if value == [1.0, 1.0, 1.0] or not isinstance(value, float | list):
        return value
    number = 0.5 + next(numbers) / 100
    low, high = number * 0.9, number * 1.1
    if isinstance(value, float):
        return number
    return [number, low, high] if key in ("prefill_ratio", "decode_ratio", "over_eager") else [low, number, high]


# --- what is the same ----------------------------------------------------------------------------------------------


def canonical(name: str, content: bytes, places: dict[str, str]) -> bytes:
    """Of a file, or of what was printed, that which the same code gives again."""
    try:
        text = content.decode()
    except UnicodeDecodeError:
        return content
    if name.endswith((".json", ".index.json")) or (name == "stdout" and text.lstrip()[:1] in ("{", "[")):
        with contextlib.suppress(ValueError):
            text = json.dumps(_stable(json.loads(text)), indent=1, sort_keys=True, ensure_ascii=False)
    elif name.endswith((".md", ".html", ".txt")) or name == "stdout":
        for pattern in TEXTS:
            text = re.sub(pattern, "…", text)
    for place, word in places.items():
        text = text.replace(place, word)
    return text.encode()


def _stable(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _stable(held) for name, held in value.items() if name not in VOLATILE}
    return [_stable(held) for held in value] if isinstance(value, list) else value


def last_line(text: str) -> str:
    """The last line of what was said, without the frame that typer draws around it."""
    lines = [line.strip("│ \n") for line in text.splitlines()]
    return next((line for line in reversed(lines) if re.search(r"\w", line)), "")


# --- one checkout --------------------------------------------------------------------------------------------------


def entry(checkout: Path) -> Callable[[], Any]:
    """The function that is the command line of a checkout."""
    scripts = tomllib.loads((checkout / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, name = scripts["secateur"].partition(":")
    return getattr(importlib.import_module(module), name)


def called(main: Callable[[], Any], arguments: list[str]) -> tuple[int, str, str]:
    """Run a command in this process: its exit code, what it printed, what it said of errors."""
    sys.argv = ["secateur", *arguments]
    out, err, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as left:
            status = left.code if isinstance(left.code, int) else int(left.code is not None)
        except BaseException:
            traceback.print_exc()
            status = 70
    return status, out.getvalue(), err.getvalue()


def killed(main: Callable[[], Any], arguments: list[str], out: Path) -> str:
    """Run a command in a fork and kill it when something of it is done; what came of that."""
    child = os.fork()
    if not child:
        called(main, arguments)
        os._exit(0)
    status = 0
    while not status:
        if any(file.read_bytes().count(b"\n") > 1 for file in out.parent.glob(f".{out.name}.*") if file.is_file()):
            os.kill(child, signal.SIGKILL)
            return "killed" if os.waitpid(child, 0)[1] == signal.SIGKILL else "ended before it was killed"
        time.sleep(0.002)
        status = os.waitpid(child, os.WNOHANG)[0]
    return "ended before it was killed"


def run(case: Case, main: Callable[[], Any], checkout: Path, work: Path, keep: bool) -> dict[str, str]:
    """Everything that a case gives, by name: digests, and words where it failed."""
    import torch

    out = work / case.place
    if case.prepare:
        case.prepare(work)
    arguments = [re.sub(r"^@(?=/|$)", f"@{case.place}", word) for word in shlex.split(case.command)]
    arguments = [word.removeprefix("@") for word in arguments]
    for word in arguments:
        if word.startswith(f"{case.place}/"):
            out.mkdir(exist_ok=True)
    found = {"killed": killed(main, arguments, out)} if case.kill else {}
    torch.manual_seed(0)
    random.seed(0)
    status, printed, said = called(main, arguments)
    found["exit"] = str(status)
    places = {str(work): "WORK", str(work.resolve()): "WORK", str(checkout): "CHECKOUT"}
    if status:
        found["said"] = canonical("stdout", last_line(said).encode(), places).decode()
    files = {"stdout": printed.encode()}
    if out.is_dir():
        files |= {str(f.relative_to(out)): f.read_bytes() for f in sorted(out.rglob("*")) if f.is_file()}
    for name, content in files.items():
        if name in PAGES and not case.prepare:
            content = b""
        held = canonical(name, content, places)
        found[name] = hashlib.sha256(held).hexdigest()
        if keep:
            place = work / "canonical" / case.place / name
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(held)
    found |= {f"left behind {file.name}": "" for file in work.glob(f".{out.name}.*")}
    return found


def chosen(only: str) -> Iterator[Case]:
    """The cases that have the text in their name, and those that they need."""
    every = cases()
    wanted = {case.place for case in every if only in case.name}
    for case in reversed(every):
        if case.place in wanted:
            wanted |= case.needs
    return (case for case in every if case.place in wanted)


def work(checkout: Path, folder: Path, only: str, keep: bool, answer: Path) -> None:
    """Run the cases on one checkout, in this process."""
    import torch

    torch.set_num_threads(1)
    os.chdir(folder)
    make_models(folder)
    make_texts(folder)
    main, found = entry(checkout), {}
    import secateur

    if not Path(str(secateur.__file__)).is_relative_to(checkout):
        raise SystemExit(f"{secateur.__file__} was imported, which is not of {checkout}.")
    for case in chosen(only):
        began = time.perf_counter()
        found[case.name] = run(case, main, checkout, folder, keep)
        told = found[case.name].get("said", "")
        print(f"{time.perf_counter() - began:6.1f} s  {case.name}  {told}", file=sys.__stdout__, flush=True)
    answer.write_text(json.dumps(found))


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Every case and file that is not the same, a line each."""
    found = []
    for case in before | now:
        if case not in now or case not in before:
            found.append(f"{case}: {'new' if case in now else 'gone'}")
            continue
        for name in before[case] | now[case]:
            was, is_now = before[case].get(name, "not there"), now[case].get(name, "not there")
            if was != is_now:
                words = f": was {was}, is {is_now}" if name in ("exit", "said", "killed") else ""
                words = words or (": gone" if is_now == "not there" else ": new" if was == "not there" else "")
                found.append(f"{case}: {name}{words}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkout", type=Path, default=Path(__file__).resolve().parents[1])
    parser.add_argument("--json", type=Path, help="the file to write the digests to")
    parser.add_argument("--against", type=Path, help="such a file, to compare with")
    parser.add_argument("--only", default="", help="cases with this in their name")
    parser.add_argument("--keep", type=Path, help="a new folder for everything that was written")
    parser.add_argument("--worker", nargs=2, type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    checkout = given.checkout.resolve()
    if given.worker:
        work(checkout, given.worker[0], given.only, given.keep is not None, given.worker[1])
        return 0
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="same-") as temporary:
        folder, answer = Path(temporary) / "work", Path(temporary) / "answer.json"
        folder.mkdir()
        words = [sys.executable, "-P", __file__, "--checkout", checkout, "--only", given.only]
        words += ["--worker", folder, answer, *(["--keep", given.keep] if given.keep else [])]
        fixed = {
            "PYTHONPATH": str(checkout / "src"), "PYTHONHASHSEED": "0",
            "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "COLUMNS": "180",
            "TERM": "dumb", "NO_COLOR": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1",
            "HF_HOME": str(Path(temporary) / "home"), "LC_ALL": "C.UTF-8",
        }  # fmt: skip
        subprocess.run(list(map(str, words)), env={**os.environ, **fixed}, check=True)
        found = json.loads(answer.read_text())
        if given.keep:
            shutil.move(folder, given.keep)
    files = sum(len(held.keys() - {"exit", "said", "killed"}) for held in found.values())
    print(f"{len(found)} cases, {files} files, {time.perf_counter() - began:.0f} s")
    if given.json:
        given.json.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    if not given.against:
        return 0
    before = json.loads(given.against.read_text())
    if given.only:
        before = {case: held for case, held in before.items() if case in found}
    lines = differences(before, found)
    print("\n".join(lines) or "Nothing differs.")
    return int(bool(lines))


if __name__ == "__main__":
    sys.exit(main())
