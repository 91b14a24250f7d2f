"""What pruning costs in CPU-seconds: Secateur beside llm-compressor, and beside the products that cannot be left out.

    python bench/prune.py --json bench/results/prune.json
    python bench/prune.py --dtype bfloat16 --json bench/results/prune-bfloat16.json
    python bench/prune.py --dtype bfloat16 --profile wanda
    python bench/prune.py --large --rounds 1 --methods wanda

A random Llama, the same tokens of text and the same method for all. llm-compressor runs the model in the dtype that it
is stored in, as it does by itself; Secateur in what `--forward` says, by default what it takes by itself. The former is
installed into a virtual environment of its own, with the torch that runs here. The floor is the arithmetic of one pass,
as plain products of the very shapes, into memory that is there already: the linear layers of all blocks, the
attention's scores and values, and for SparseGPT the Gram matrices, where q, k, v share one and gate, up another.

Every run is a process of its own, and the three take turns, so that what else the machine does falls on all of them.
CPU-seconds are user and system, children too, from a model that is loaded to a result. Secateur's result is a
checkpoint on disk with its record: copying, writing, digests and the error of every site are in its seconds.
llm-compressor's is the model in memory; it is saved afterwards, which only the seconds of the whole process show.

Speed is not bought with quality: of every result it is checked that half the weights of each site are zeros and that
nothing else has changed, and the divergence from the dense model on windows not seen stands beside the seconds.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import product
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from common import HIDDEN, parser, write
from torch import Tensor

PEER = "llmcompressor==0.14.0.1"
"""The last release that was tried: `WandaPruningModifier` and `SparseGPTModifier` are in it, and do prune."""
PROGRAMS = ("floor", "secateur", "llm-compressor")
METHODS = ("wanda", "sparsegpt")
PEER_BATCH = 1
"""llm-compressor's own default: eight windows at a time took as many CPU-seconds and half as much memory again."""
HELD_OUT = 16
"""Windows that no program sees, to compare the results on."""
TOLERANCE = 0.001
"""How far the zeros of a site may be from a half: llm-compressor's SparseGPT removes one too many in 128 columns."""


@dataclass(frozen=True)
class Size:
    """The shape of a model and of its calibration tokens."""

    hidden: int
    blocks: int
    ffn: int
    heads: int
    samples: int
    length: int = 512
    vocabulary: int = 4096


SMALL, LARGE = Size(512, 8, 1344, 8, samples=64), Size(1024, 12, 2752, 16, samples=16)


@dataclass(frozen=True)
class Job:
    """What one process does: `work` holds the model, the tokens and the results."""

    program: str
    method: str
    size: Size
    work: Path
    dtype: str
    threads: int
    batch: int

    @property
    def out(self) -> Path:
        return self.work / f"{self.program}-{self.method}"

    @property
    def name(self) -> str:
        return f"{self.program} {self.method}"


# What runs in the processes that are measured, one of them in another environment: no Secateur out here.


class Meter:
    """CPU-seconds, wall seconds and the peak of anonymous memory, of this process between entering and leaving."""

    def __enter__(self) -> Meter:
        self.peak = self.start = self.anonymous()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        self._wall, self._cpu = perf_counter(), cpu_seconds()
        return self

    def __exit__(self, *_: object) -> None:
        self.cpu, self.wall = cpu_seconds() - self._cpu, perf_counter() - self._wall
        self.peak = max(self.peak, self.anonymous())
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.05):
            self.peak = max(self.peak, self.anonymous())

    @staticmethod
    def anonymous() -> int:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("RssAnon:")[1].split()[0])

    def record(self) -> dict[str, float]:
        return {"cpu_seconds": self.cpu, "wall_seconds": self.wall, "peak_bytes": self.peak, "start_bytes": self.start}


def cpu_seconds(*whose: int) -> float:
    """User and system seconds so far, of this process and the children that have ended, or of `whose`."""
    used = [resource.getrusage(who) for who in whose or (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def run_floor(job: Job) -> dict[str, float]:
    size, dtype = job.size, getattr(torch, job.dtype)
    tokens, width = job.batch * size.length, size.hidden // size.heads

    def matrix(*shape: int) -> Tensor:
        return torch.randn(shape).to(dtype)

    hidden, inner = matrix(tokens, size.hidden), matrix(tokens, size.ffn)
    products = [
        *[(hidden, matrix(size.hidden, size.hidden).T, matrix(tokens, size.hidden)) for _ in "qkvo"],
        *[(hidden, matrix(size.ffn, size.hidden).T, matrix(tokens, size.ffn)) for _ in ("gate", "up")],
        (inner, matrix(size.hidden, size.ffn).T, matrix(tokens, size.hidden)),
    ]
    heads = job.batch * size.heads
    query, key, mixed = (matrix(heads, size.length, width) for _ in range(3))
    scores = matrix(heads, size.length, size.length)
    grams = []
    if job.method == "sparsegpt":
        grams = [(x.T, x, matrix(x.shape[1], x.shape[1])) for x in (hidden, hidden, hidden, inner)]
    passes = size.blocks * size.samples // job.batch
    with Meter() as meter:
        for _ in range(passes):
            for left, right, into in products:
                torch.mm(left, right, out=into)
            torch.bmm(query, key.mT, out=scores)
            torch.bmm(scores, key, out=mixed)
            for left, right, into in grams:
                torch.mm(left, right, out=into)
    shapes = [(len(left), left.shape[1], right.shape[1]) for left, right, _ in (*products, *grams)]
    shapes += [(heads * size.length, width, size.length)] * 2
    return meter.record() | {"flops": passes * sum(2.0 * m * k * n for m, k, n in shapes)}


def run_secateur(job: Job) -> dict[str, float]:
    from secateur.checkpoints.folder import open_checkpoint
    from secateur.data.windows import Windows
    from secateur.models.load import load
    from secateur.pruning.check import find_recipe
    from secateur.pruning.opening import Opened
    from secateur.pruning.prune import prune_checkpoint
    from secateur.system.devices import find_resources
    from secateur.system.settings import Compute, Destination, Recipe, Trust

    windows = Windows(torch.load(job.work / "calibration.pt"), "demo", "calibration", 0, None)
    source, language_model = open_checkpoint(job.work / "model"), load(job.work / "model")
    with Meter() as meter:
        prune_checkpoint(
            Opened(source, language_model, windows),
            find_recipe(Recipe(method=job.method, pattern="50%")),
            find_resources(Compute(device="cpu", dtype=job.dtype, batch_size=job.batch)),
            Destination(out=job.out, overwrite=True),
            Trust(),
        )
    return meter.record()


def run_llm_compressor(job: Job) -> dict[str, float]:
    from datasets import Dataset
    from llmcompressor import oneshot  # type: ignore[import-not-found]
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier  # type: ignore[import-not-found]
    from transformers import AutoModelForCausalLM

    ids: Tensor = torch.load(job.work / "calibration.pt")
    data = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
    model: Any = AutoModelForCausalLM.from_pretrained(job.work / "model", dtype=getattr(torch, job.dtype))
    modifier = {"wanda": WandaPruningModifier, "sparsegpt": SparseGPTModifier}[job.method]
    with Meter() as meter:
        oneshot(
            model=model, dataset=data, num_calibration_samples=len(ids), max_seq_length=ids.shape[1],
            batch_size=PEER_BATCH, shuffle_calibration_samples=False,
            recipe=modifier(sparsity=0.5, targets=["Linear"], ignore=["re:.*lm_head"]),
        )  # fmt: skip
    model.save_pretrained(job.out)
    return meter.record()


WORKERS: dict[str, Callable[[Job], dict[str, float]]] = {
    "floor": run_floor,
    "secateur": run_secateur,
    "llm-compressor": run_llm_compressor,
}


def work(text: str) -> None:
    """Do the job that JSON describes; print what it took, and the versions it took it with, as one line of JSON."""
    held = json.loads(text)
    job = Job(**held | {"size": Size(**held["size"]), "work": Path(held["work"])})
    torch.set_num_threads(job.threads)
    torch.manual_seed(0)
    found: dict[str, Any] = {**WORKERS[job.program](job)}
    packages = {
        "secateur": ("transformers", "secateur"),
        "llm-compressor": ("transformers", "llmcompressor", "compressed-tensors", "datasets"),
    }
    found["versions"] = {name: version(name) for name in ("torch", *packages.get(job.program, ()))}
    print(json.dumps(found))


# What runs here: the model, the other environment, the turns, the checks.


def write_inputs(size: Size, work: Path, dtype: str) -> None:
    """A random Llama, calibration tokens and held-out ones, as text in the demo model's tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from secateur.data.calibration import calibration_windows
    from secateur.data.demo import model_folder
    from secateur.data.tokenizer import load_tokenizer
    from secateur.data.windows import evaluation_windows

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=size.hidden, intermediate_size=size.ffn, num_hidden_layers=size.blocks,
        num_attention_heads=size.heads, num_key_value_heads=size.heads, vocab_size=size.vocabulary,
        max_position_embeddings=size.length, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        if parameter.dim() == 1:  # norms: channels of different sizes, so that there is something to choose by
            parameter.data.normal_(std=0.5).exp_()
        else:
            parameter.data.normal_(std=parameter.shape[1] ** -0.5)
    tokenizer = load_tokenizer(model_folder())
    if len(tokenizer) > size.vocabulary:
        sys.exit(f"The demo's tokenizer has {len(tokenizer)} tokens; the model has {size.vocabulary}.")
    model.to(getattr(torch, dtype)).save_pretrained(work / "model")
    tokenizer.save_pretrained(work / "model")
    calibration = calibration_windows(tokenizer, "demo", samples=size.samples, length=size.length, seed=0)
    torch.save(calibration.ids, work / "calibration.pt")
    held_out = evaluation_windows(tokenizer, "demo", length=size.length, windows=HELD_OUT)
    torch.save(held_out.ids.clone(), work / "evaluation.pt")  # a view of the whole corpus until cloned


def peer_python(folder: Path) -> Path:
    """The interpreter of the environment that has llm-compressor, made where it is missing, with this very torch."""
    python, ready = folder / "bin" / "python", folder / "ready"
    wanted = [f"torch=={torch.__version__}", PEER]
    if not ready.exists() or ready.read_text().split() != wanted:
        print(f"installing {PEER} into {folder}", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*install, wanted[0]], check=True, stdout=sys.stderr)
        subprocess.run([*install, *wanted], check=True, stdout=sys.stderr)
        ready.write_text("\n".join(wanted) + "\n")
    return python


def measure(job: Job, python: Path) -> dict[str, Any]:
    """What a job takes in a fresh process, and what the whole process takes. Exits where it fails."""
    described = {**vars(job), "size": vars(job.size), "work": str(job.work)}
    variables = {
        "OMP_NUM_THREADS": str(job.threads), "MKL_NUM_THREADS": str(job.threads), "OMP_WAIT_POLICY": "PASSIVE",
        "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    wall, cpu = perf_counter(), cpu_seconds(resource.RUSAGE_CHILDREN)
    with (job.work / f"{job.program}-{job.method}.log").open("w") as log:
        done = subprocess.run(
            [python, Path(__file__).resolve(), "--work", json.dumps(described)],
            env=os.environ | variables, stdout=subprocess.PIPE, stderr=log, text=True,
        )  # fmt: skip
    if done.returncode:
        sys.exit(f"{job.name} failed: {Path(log.name).read_text()[-4000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    found["whole_cpu_seconds"] = cpu_seconds(resource.RUSAGE_CHILDREN) - cpu
    found["whole_wall_seconds"] = perf_counter() - wall
    return {"program": job.program, "method": job.method, **found}


def weight_matrices(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """The pruned matrices of a result by name. Exits where one is not half zeros or something else has changed."""
    from secateur.checkpoints.folder import open_checkpoint

    dense, found = open_checkpoint(folder.parent / "model"), open_checkpoint(folder)
    for name in dense.places:
        tensor = found.tensor(name)
        if not name.endswith("_proj.weight"):
            if not torch.equal(tensor, dense.tensor(name)):
                sys.exit(f"{folder} has another {name} than the dense model; only sites may change.")
            continue
        if abs((zeros := (tensor == 0).double().mean().item()) - 0.5) > TOLERANCE:
            sys.exit(f"{zeros:.2%} of {name} in {folder} are zeros; 50 % were asked for.")
        yield name, tensor


@torch.no_grad()
def divergence(folder: Path) -> float:
    """The mean KL divergence of the next-token distributions from the dense model's, nats, on held-out windows."""
    from transformers import AutoModelForCausalLM

    dense, pruned = (
        AutoModelForCausalLM.from_pretrained(each, dtype=torch.float32) for each in (folder.parent / "model", folder)
    )
    total = 0.0
    for window in torch.load(folder.parent / "evaluation.pt").split(1):
        wanted, got = (model(window).logits[0].log_softmax(-1) for model in (dense, pruned))
        total += (wanted.exp() * (wanted - got)).sum(-1).mean().item()
    return total / HELD_OUT


def check(jobs: Sequence[Job]) -> dict[str, Any]:
    """Sparsity and divergence of each program's result; of two, the share of weights that both keep or both remove."""
    found: dict[str, Any] = {}
    masks: list[Tensor] = []
    for job in jobs:
        kept = torch.cat([(tensor != 0).flatten() for _, tensor in weight_matrices(job.out)])
        found[job.program] = {"sparsity": 1 - kept.double().mean().item(), "kl": divergence(job.out)}
        masks.append(kept)
    if len(masks) == 2:
        found["same_mask"] = (masks[0] == masks[1]).double().mean().item()
    return found


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": median(values), "min": min(values), "max": max(values)}


def ratios(rounds: Sequence[dict[str, dict[str, Any]]]) -> dict[str, dict[str, dict[str, float]]]:
    """Of the rounds of one method: llm-compressor over Secateur, and Secateur over the floor, by what is measured."""
    return {
        f"{above} / {below}": {
            what: spread([found[above][what] / found[below][what] for found in rounds])
            for what in ("cpu_seconds", "wall_seconds", "peak_bytes", "whole_cpu_seconds", "whole_wall_seconds")
        }
        for above, below in (("llm-compressor", "secateur"), ("secateur", "floor"))
        if all(above in found and below in found for found in rounds)
    }


def show(runs: Sequence[dict[str, Any]], summary: dict[str, Any], checks: dict[str, Any], title: str) -> None:
    """The table on standard error: medians over the rounds, then the ratios with what they ranged over."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for column in ("method", "program", "CPU-s", "wall s", "peak MiB", "process CPU-s", "Gflop/s", "zeros", "KL"):
        table.add_column(column, justify="left" if column in ("method", "program") else "right")
    for method, program in product(METHODS, PROGRAMS):
        mine = [run for run in runs if (run["method"], run["program"]) == (method, program)]
        if not mine:
            continue
        middle = {
            key: median(run[key] for run in mine) for key, value in mine[0].items() if isinstance(value, (int, float))
        }
        quality = checks.get(method, {}).get(program)
        table.add_row(
            method, program, f"{middle['cpu_seconds']:.1f}", f"{middle['wall_seconds']:.1f}",
            f"{middle['peak_bytes'] / 2**20:.0f}", f"{middle['whole_cpu_seconds']:.1f}",
            f"{middle['flops'] / middle['cpu_seconds'] / 1e9:.0f}" if "flops" in middle else "",
            f"{quality['sparsity']:.4%}" if quality else "", f"{quality['kl']:.5f}" if quality else "",
        )  # fmt: skip
    console = Console(stderr=True, width=120)
    console.print(table)
    for method, found in summary.items():
        for pair, by in found.items():
            cpu, wall, peak = by["cpu_seconds"], by["wall_seconds"], by["peak_bytes"]
            console.print(
                f"{method}: {pair} {cpu['median']:.2f} of CPU-seconds [{cpu['min']:.2f}, {cpu['max']:.2f}], "
                f"{wall['median']:.2f} of wall seconds, {peak['median']:.2f} of peak memory"
            )
        if "same_mask" in checks[method]:
            console.print(f"{method}: {checks[method]['same_mask']:.3%} of the weights are kept or removed by both")


def main() -> None:
    dtypes = ("float32", "bfloat16")
    declared = parser(
        __doc__,
        dict(large=(False, "160 million parameters, fewer tokens")),
        dict(samples=(int, "calibration windows of 512 tokens, a multiple of --batch")),
        dict(methods=",".join(METHODS), programs=",".join(PROGRAMS)),
        dict(batch=(8, "windows at a time, of Secateur and of the floor"), threads=1, rounds=3),
        dict(out=Path("out"), json=Path, work=(str, HIDDEN)),  # `work` is what a process that is measured does
    )
    declared.add_argument("--dtype", choices=dtypes, default="float32", help="what the model is stored in")
    declared.add_argument("--forward", default="auto", choices=("auto", *dtypes), help="dtype of Secateur's passes")
    declared.add_argument(
        "--profile", choices=METHODS, help="only show where Secateur's seconds go, operator by operator"
    )
    chosen = declared.parse_args()
    if chosen.work:
        work(chosen.work)
        return

    from transformers.utils.logging import disable_progress_bar

    from secateur.system.devices import calibration_dtype

    disable_progress_bar()
    size = LARGE if chosen.large else SMALL
    size = Size(**vars(size) | {"samples": chosen.samples or size.samples})
    if size.samples % chosen.batch:
        declared.error(f"{size.samples} windows are no multiple of --batch {chosen.batch}.")
    torch.set_num_threads(chosen.threads)
    programs, load_before = chosen.programs.split(","), os.getloadavg()
    pythons = dict.fromkeys(programs, Path(sys.executable))
    if "llm-compressor" in programs:
        pythons["llm-compressor"] = peer_python(chosen.out / "llm-compressor-venv")
    work_folder = (chosen.out / "prune").resolve()
    shutil.rmtree(work_folder, ignore_errors=True)
    work_folder.mkdir(parents=True)
    write_inputs(size, work_folder, chosen.dtype)
    forward = calibration_dtype(chosen.forward, torch.device("cpu"), getattr(torch, chosen.dtype))
    used = str(forward).removeprefix("torch.") if forward else chosen.dtype
    taken = {"floor": used, "secateur": chosen.forward}
    if chosen.profile:
        job = Job("secateur", chosen.profile, size, work_folder, chosen.forward, chosen.threads, chosen.batch)
        with torch.profiler.profile() as seen:
            run_secateur(job)
        print(seen.key_averages().table(sort_by="self_cpu_time_total", row_limit=16, max_name_column_width=60))
        return
    runs: list[dict[str, Any]] = []
    checks, summary = {}, {}
    for method in chosen.methods.split(","):
        jobs = [
            Job(each, method, size, work_folder, taken.get(each, chosen.dtype), chosen.threads, chosen.batch)
            for each in programs
        ]
        rounds = []
        for number in range(chosen.rounds):
            turn = jobs[number % len(jobs) :] + jobs[: number % len(jobs)]
            found = []
            for job in turn:
                found.append(measure(job, pythons[job.program]) | {"round": number})
                print(f"{job.name}: {found[-1]['cpu_seconds']:.1f} CPU-s", file=sys.stderr, flush=True)
            runs += found
            rounds.append({run["program"]: run for run in found})
        checks[method] = check([job for job in jobs if job.program != "floor"])
        summary[method] = ratios(rounds)
    title = (
        f"random Llama {size.hidden} × {size.blocks} in {chosen.dtype}, Secateur's passes and the floor in {used}, "
        f"{size.samples} × {size.length} tokens, "
        f"50 %, {chosen.threads} thread{'s' * (chosen.threads > 1)}, {chosen.rounds} rounds, medians"
    )
    load = {"before": load_before, "after": os.getloadavg()}
    about = {"title": title, "load_average": load, "size": vars(size), "batch": chosen.batch}
    command = ["bench/prune.py", *sys.argv[1:]]
    write(chosen.json, command=command, **about, ratios=summary, results=checks, runs=runs)
    show(runs, summary, checks, title)

    def middle(pair: str) -> dict[str, float]:
        found = {method: by[pair]["cpu_seconds"]["median"] for method, by in summary.items() if pair in by}
        return {method: round(value, 3) for method, value in found.items()}

    print(json.dumps({"ratio": middle("llm-compressor / secateur"), "floor_ratio": middle("secateur / floor")}))


if __name__ == "__main__":
    main()
