"""What other people's quantisers cost and give at 4 and 3 bits, on a dense model and the same calibration tokens.

    python bench/quantise_peers.py MODEL --windows WINDOWS.safetensors --json bench/results/quantise-peers.json
    python bench/quantise_peers.py MODEL --windows WINDOWS.npy --ways 'GPTQ, 4 bits$' --evaluation demo --judged 32

GPTQModel and llm-compressor get the windows, token ids [samples, length] int64, and quantise the linear layers of the
decoder blocks; embeddings and head stay as they are. llama.cpp gets the model as GGUF in bfloat16, no calibration, and
is told to leave the embeddings in bfloat16. Every way is a process of its own. Its seconds go from a library that is
imported to files on disk: loading, quantising and writing; those of the whole process stand beside them.
What was written is unpacked by Secateur into a dense folder in --out, of the dtype of the model, of which it is checked
that just the linear layers of the blocks have changed, and its perplexity is measured. Bits of a weight are those of
the tensors that were written: codes, scales, zeros, the order of the inputs where it is stored.

The libraries are fetched into --folder beside the packages that are installed here; one that cannot be fetched or does
not run is named and left out. A way that is in the file of --json already is not run again.

With --zeros the model is one of 2:4, and `secateur inspect` says what became of its zeros in the files:

    secateur prune --method default --pattern 2:4 --out out/demo24
    python bench/quantise_peers.py out/demo24 --zeros --windows WINDOWS --evaluation demo --judged 32 --json FILE
"""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from time import perf_counter
from typing import Any

import quantisers
import torch
from common import HIDDEN, fetched, parser, write
from torch import Tensor

PACKAGES = quantisers.PACKAGES | {"gptqmodel": "7.7.0", "llmcompressor": "0.14.0.1", "llama-cpp-python": "0.3.36"}
BESIDE = quantisers.BESIDE | {
    "gptqmodel": [
        "Device-SMI==0.5.7", "LogBar==0.4.15", "PyPcre==0.6.4", "TokeNicer==0.0.14", "Defuser==0.0.28",
        "torchao==0.18.0", "pillow==13.0.0",
    ],
    "llmcompressor": [
        "compressed-tensors==0.19.0", "transformers==5.17.0", "huggingface-hub==1.33.0", "httpx==0.28.1",
        "httpcore==1.0.9", "loguru==0.7.3", "nvidia-ml-py==13.615.71",
    ],
    "llama-cpp-python": ["diskcache==5.6.3"],
}  # fmt: skip
"""What these need that is not installed with Secateur. GPTQModel asks for a newer torch and runs with 2.13.0."""


@dataclass(frozen=True)
class Way:
    """One way to quantise: its method in the library, the bits that are asked for and the other settings."""

    package: str
    name: str
    method: str
    bits: int = 0
    settings: dict[str, Any] = field(default_factory=dict)


WAYS = [
    *[
        way
        for bits in (4, 3)
        for way in (
            Way("gptqmodel", f"GPTQ, {bits} bits", "gptq", bits),
            Way("gptqmodel", f"GPTQ, {bits} bits, inputs as they come", "gptq", bits, dict(act_group_aware=False)),
            Way("gptqmodel", f"RTN, {bits} bits", "rtn", bits),
            Way("llmcompressor", f"GPTQ, {bits} bits", "gptq", bits),
            Way("llmcompressor", f"GPTQ, {bits} bits, inputs as they come", "gptq", bits, dict(actorder=None)),
            Way("llmcompressor", f"RTN, {bits} bits", "rtn", bits),
        )
    ],
    *[Way("llama-cpp-python", name, name) for name in ("Q2_K", "Q3_K_S", "Q3_K_M", "Q4_0", "Q4_K_S", "Q4_K_M")],
    *[Way("gptqmodel", f"GPTQ, {bits} bits, act-order", "gptq", bits, dict(desc_act=True)) for bits in (4, 3)],
    Way("gptqmodel", "AWQ, 4 bits", "awq", 4),
    *[Way("llama-cpp-python", name, name) for name in ("Q8_0", "Q6_K", "Q5_0", "Q5_1", "Q4_1", "IQ4_NL", "IQ4_XS")],
    Way("bitsandbytes", "NF4", "nf4"),
    Way("bitsandbytes", "FP4", "fp4"),
    Way("bitsandbytes", "LLM.int8", "int8"),
    Way("torchao", "int4", "int4", 4),
    Way("torchao", "int8", "int8"),
    Way("torchao", "float8", "float8"),
    Way("hqq", "4 bits", "hqq", 4),
]
"""GPTQ without more words is with the order of inputs that the library takes by itself: GPTQModel sorts them within and
between groups so that groups stay together (`act_group_aware`), llm-compressor by its `static` order, which is the only
one it has left: "weight" is another name of it, "group" is refused."""


@dataclass(frozen=True)
class Job:
    """What one process does: quantise `model` by a way into the folder `out`, with the tokens of `windows`."""

    way: Way
    model: Path
    windows: Path
    out: Path
    group: int
    threads: int


# What runs in the processes that are measured: no Secateur out here.


class Meter:
    """CPU-seconds, of children too, and wall seconds of this process between entering and leaving."""

    def __enter__(self) -> Meter:
        self._wall, self._cpu = perf_counter(), cpu_seconds(resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        return self

    def __exit__(self, *_: object) -> None:
        self.cpu = cpu_seconds(resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN) - self._cpu
        self.wall = perf_counter() - self._wall


def cpu_seconds(*whose: int) -> float:
    """User and system seconds so far."""
    used = [resource.getrusage(who) for who in whose]
    return sum(each.ru_utime + each.ru_stime for each in used)


def window_ids(file: Path) -> Tensor:
    """Calibration tokens [samples, length] int64, from the one tensor of a .safetensors file or from a .npy file."""
    if file.suffix == ".npy":
        return torch.from_numpy(import_module("numpy").load(file)).long()
    (ids,) = import_module("safetensors.torch").load_file(file).values()
    return ids.long()


def of_gptqmodel(job: Job) -> Meter:
    library, config = import_module("gptqmodel"), import_module("gptqmodel.quantization.config")
    import_module("gptqmodel.extension").load("pack_block_cpu")  # compiled once a machine, some 30 CPU-seconds
    rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in window_ids(job.windows).tolist()]
    kind = {"gptq": config.GPTQConfig, "rtn": config.RTNConfig, "awq": config.AWQConfig}[job.way.method]
    with Meter() as meter:
        grid = {} if job.way.method == "awq" else {"sym": True}
        settings = kind(bits=job.way.bits, group_size=job.group, **grid, **job.way.settings)
        model = library.GPTQModel.load(str(job.model), settings, device="cpu")
        model.quantize(None if job.way.method == "rtn" else rows, batch_size=1)
        model.save(str(job.out))
    return meter


def of_llmcompressor(job: Job) -> Meter:
    oneshot, transformers = import_module("llmcompressor").oneshot, import_module("transformers")
    ids = window_ids(job.windows)
    columns = {"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()}
    text = {
        "dataset": import_module("datasets").Dataset.from_dict(columns), "num_calibration_samples": len(ids),
        "max_seq_length": ids.shape[1], "batch_size": 1, "shuffle_calibration_samples": False,
    }  # fmt: skip
    weights = {
        "num_bits": job.way.bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": job.group,
    }  # fmt: skip
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    modifiers = import_module("llmcompressor.modifiers.gptq"), import_module("llmcompressor.modifiers.quantization")
    kind = {"gptq": modifiers[0].GPTQModifier, "rtn": modifiers[1].QuantizationModifier}[job.way.method]
    with Meter() as meter:
        model = transformers.AutoModelForCausalLM.from_pretrained(job.model, dtype="auto")
        recipe = kind(config_groups=groups, ignore=["lm_head"], **job.way.settings)
        oneshot(model=model, recipe=recipe, **(text if job.way.method == "gptq" else {}))
        model.save_pretrained(job.out, save_compressed=True)
    return meter


def of_llama_cpp(job: Job) -> Meter:
    import ctypes

    llama = import_module("llama_cpp")
    settings = llama.llama_model_quantize_default_params()
    settings.nthread = job.threads
    settings.ftype = getattr(llama, f"LLAMA_FTYPE_MOSTLY_{job.way.method}")
    # A tied head is the embeddings, which llama.cpp counts as its output.
    kind = import_module("gguf").GGMLQuantizationType.BF16.value
    settings.output_tensor_type = settings.token_embedding_type = kind
    settings.allow_requantize = True  # from bfloat16
    job.out.mkdir(parents=True)
    source, out = job.out.parent / "source" / "model.gguf", job.out / "model.gguf"
    with Meter() as meter:
        failed = llama.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(settings))
    if failed:
        sys.exit(f"llama_model_quantize gives {failed}")
    return meter


def of_transformers(job: Job) -> Meter:
    """Rounded while transformers loads it, and saved."""
    transformers = import_module("transformers")
    with Meter() as meter:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            job.model, dtype="auto", device_map="cpu", quantization_config=rounding_of(job)
        )
        model.save_pretrained(job.out)
    return meter


def of_hqq(job: Job) -> Meter:
    """By the library itself; transformers 5 writes no HQQ."""
    transformers, kinds = import_module("transformers"), import_module("hqq.models.hf.base").AutoHQQHFModel
    settings = import_module("hqq.core.quantize").BaseQuantizeConfig(nbits=job.way.bits, group_size=job.group)
    with Meter() as meter:
        model = transformers.AutoModelForCausalLM.from_pretrained(job.model, dtype="auto")
        if model.config.tie_word_embeddings:  # which it cannot save
            model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
            model.config.tie_word_embeddings = False
        kinds.quantize_model(model, quant_config=settings, compute_dtype=model.dtype, device="cpu")
        kinds.save_to_safetensors(model, str(job.out))
    return meter


def rounding_of(job: Job) -> Any:
    """The settings with which transformers calls a library that takes no calibration text."""
    transformers, method = import_module("transformers"), job.way.method
    if job.way.package == "bitsandbytes":
        if method == "int8":
            return transformers.BitsAndBytesConfig(load_in_8bit=True)
        return transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=method)
    quantization = import_module("torchao.quantization")
    kinds: dict[str, Any] = {"int8": quantization.Int8WeightOnlyConfig, "float8": quantization.Float8WeightOnlyConfig}
    if method in kinds:
        return transformers.TorchAoConfig(quant_type=kinds[method]())
    config = quantization.IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, method), granularity=quantization.PerGroup(job.group)
    )
    return transformers.TorchAoConfig(quant_type=config)


WORKERS: dict[str, Callable[[Job], Meter]] = {
    "gptqmodel": of_gptqmodel,
    "llmcompressor": of_llmcompressor,
    "llama-cpp-python": of_llama_cpp,
    "bitsandbytes": of_transformers,
    "torchao": of_transformers,
    "hqq": of_hqq,
}


def work(text: str) -> None:
    """Do the job that JSON describes; print what it took as one line of JSON."""
    given = json.loads(text)
    paths = {name: Path(given[name]) for name in ("model", "windows", "out")}
    job = Job(**given | paths | {"way": Way(**given["way"])})
    torch.set_num_threads(job.threads)
    meter = WORKERS[job.way.package](job)
    if not list(job.out.glob("tokenizer*")) and job.way.package != "llama-cpp-python":
        import_module("transformers").AutoTokenizer.from_pretrained(job.model).save_pretrained(job.out)
    print("\n" + json.dumps({"cpu_seconds": meter.cpu, "wall_seconds": meter.wall}))


# What runs here: the libraries are fetched, the processes started, what they wrote is read and judged.


def measure(job: Job, place: Path) -> dict[str, Any]:
    """What a job takes in a fresh process. Raises CalledProcessError where that fails."""
    shutil.rmtree(job.out, ignore_errors=True)
    job.out.parent.mkdir(parents=True, exist_ok=True)
    if job.way.package == "llama-cpp-python":
        write_gguf(job.model, job.out.parent / "source")
    threads = str(job.threads)
    variables = {
        "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false", "GPTQMODEL_OFFLINE": "1",
        "GPTQMODEL_CPU_WORKERS": "2",  # with fewer than three cores it takes one, and then asks for two of them
    }  # fmt: skip
    wall, cpu = perf_counter(), cpu_seconds(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-W", "ignore", "-c", RUN, str(place.resolve()), str(Path(__file__).resolve())]
    described = json.dumps(asdict(job), default=os.fspath)
    done = subprocess.run(  # in the folder of results, since GPTQModel leaves its logs where it is started
        [*command, described],
        env=os.environ | variables,
        cwd=job.out.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    whole = {
        "whole_cpu_seconds": cpu_seconds(resource.RUSAGE_CHILDREN) - cpu,
        "whole_wall_seconds": perf_counter() - wall,
    }
    return json.loads(done.stdout.splitlines()[-1]) | whole


def write_gguf(model: Path, folder: Path) -> None:
    """The model as GGUF in bfloat16, unless it is there."""
    from secateur.checkpoints.folder import open_checkpoint
    from secateur.deployment.formats import gguf

    if not (folder / gguf.FILE).exists():
        folder.mkdir(parents=True, exist_ok=True)
        gguf.write(open_checkpoint(model), folder, values="bf16")


def changed(model: Path, dense: Path, method: str) -> list[str]:
    """The names of the linear layers that differ. Exits where these are not all matrices of the blocks and no more;
    AWQ moves scales to norms."""
    from secateur.checkpoints.folder import open_checkpoint

    before, after = open_checkpoint(model), open_checkpoint(dense)
    wanted = [name for name, place in before.places.items() if ".layers." in name and len(place.shape) == 2]
    others = [
        name for name in before.places if not torch.equal(before.tensor(name).float(), after.tensor(name).float())
    ]
    if method == "awq":
        others = [name for name in others if not name.endswith("norm.weight")]
    if sorted(wanted) != sorted(others):
        sys.exit(f"{dense} differs from {model} in {others[:3]} …, {len(others)} tensors; wanted: {len(wanted)}.")
    return wanted


def stored(packed: Path, dense: Path, names: list[str]) -> dict[str, Any]:
    """Bits of a weight that a quantised result holds, by what they are, and of all; the formats of a GGUF by count."""
    from secateur.checkpoints.folder import open_checkpoint

    shapes = open_checkpoint(dense).shapes
    weights = sum(shapes[name][0] * shapes[name][1] for name in names)
    bits, kinds = Counter[str](), Counter[str]()
    for part, kind, size in stored_parts(packed, {name.removesuffix("weight") for name in names}):
        bits[part] += 8 * size
        kinds[kind] += 1
    parts = {part: count / weights for part, count in bits.items()}
    found = {"bits_per_weight": sum(parts.values()), "parts": parts, "weights": weights}
    return found | ({"formats": dict(kinds)} if packed.suffix else {})


def stored_parts(packed: Path, prefixes: set[str]) -> Iterator[tuple[str, str, int]]:
    """(what, format, bytes) of the tensors that stand for the matrices of the blocks."""
    from secateur.checkpoints.folder import open_checkpoint

    if packed.suffix == ".gguf":
        for tensor in import_module("gguf").GGUFReader(packed).tensors:
            if tensor.name.startswith("blk.") and len(tensor.shape) == 2:
                yield "blocks", tensor.tensor_type.name, int(tensor.n_bytes)
        return
    for name, place in open_checkpoint(packed).places.items():
        prefix = next((one for one in prefixes if name.startswith(one)), None)
        if prefix and (part := name.removeprefix(prefix)) != "weight_shape":  # two numbers a matrix
            yield part, place.dtype, place.bytes


def judged(model: Path, given: Any) -> dict[str, float]:
    """The perplexity of a model, and with --distance its divergence from the dense one."""
    import secateur

    found = secateur.evaluate(
        model, dense=given.model if given.distance else None, evaluation=given.evaluation, windows=given.judged,
        seq_len=given.seq_len, data_dir=given.data_dir,
    )  # fmt: skip
    values = {name: getattr(found, name) for name in ("perplexity", "kl", "top1_agreement")}
    return {name: value for name, value in values.items() if value is not None}


def over_ours(dense: Path, ours: Path, given: Any) -> list[float]:
    """How much a quantised model's perplexity is above that of `ours`: [difference, its paired interval]."""
    import secateur

    found = secateur.evaluate(
        dense, dense=ours, evaluation=given.evaluation, windows=given.judged, seq_len=given.seq_len,
        data_dir=given.data_dir,
    )  # fmt: skip
    assert found.delta is not None
    assert found.delta_interval is not None
    return [found.delta, *found.delta_interval]


def row_of(way: Way, given: Any) -> dict[str, Any]:
    """Quantise by a way, unpack and judge. Raises CalledProcessError where the library does not run."""
    from secateur.system.machine import machine

    job = job_of(way, given)
    pinned = [f"{way.package}=={PACKAGES[way.package]}", *BESIDE.get(way.package, [])]
    took = measure(job, fetched(given.folder / way.package, pinned))
    packed = job.out / "model.gguf" if way.package == "llama-cpp-python" else job.out
    dense = dense_of(packed, given)
    matrices = changed(given.model, dense, way.method)
    return {
        "package": way.package, "version": PACKAGES[way.package], "way": way.name,
        "processor": machine()["processor"],
        **({"group": given.group} if way.bits else {}),
        **took, **stored(packed, dense, matrices), "matrices": len(matrices), **judged(dense, given),
        **(zeros_of(packed, given.model) if given.zeros else {}),
    }  # fmt: skip


def zeros_of(packed: Path, pruned: Path) -> dict[str, Any]:
    """What `secateur inspect` finds of the zeros of a pruned model in the file that was made of it: shares of pruned
    weights that came back and of kept ones that vanished, and in how many of the matrices 2:4 holds.
    """
    import secateur

    found = secateur.inspect(packed, against=pruned)
    assert found.against
    tensors = [one for one in found.tensors if one.against]
    return {
        "came_back": found.against.came_back / found.against.pruned,
        "vanished": found.against.vanished / found.against.kept,
        "holds": [sum("2:4" in map(str, one.patterns) for one in tensors), len(tensors)],
    }


def job_of(way: Way, given: Any) -> Job:
    """The job of a way, whose folder has its name."""
    name = "-".join((way.package, *way.name.replace(",", "").split()))
    out = given.out.resolve() / name
    return Job(way, given.model.resolve(), given.windows.resolve(), out, given.group, given.threads)


def dense_of(packed: Path, given: Any) -> Path:
    """What was quantised as a dense folder, of the dtype of the model; made once."""
    from secateur.checkpoints.folder import open_checkpoint, stored_dtype
    from secateur.models.load import resolve

    os.environ["SECATEUR_CACHE"] = str(given.out.resolve() / "dense")
    dtype = stored_dtype(open_checkpoint(given.model))
    return resolve(packed, dtype=str(dtype).removeprefix("torch."))


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    bits = f"{row['bits_per_weight']:.2f}" if "bits_per_weight" in row else "16"
    seconds = f"{row['cpu_seconds']:.1f}" if "cpu_seconds" in row else ""
    words = f"{row['package']} {row['version']}" if row["package"] else ""
    return f"| {words} | {row['way']} | {bits} | {row['perplexity']:.3f} | {seconds} |"


def zeros_line(row: dict[str, Any]) -> str:
    """A row of the table of what became of the zeros of a 2:4 model."""
    holds, of = row["holds"]
    return (
        f"| {row['package']} {row['version']} | {row['way']} | {1 - row['came_back']:.2%} | "
        f"{'yes' if holds == of else f'in {holds} of {of}' if holds else '**no**'} | {row['vanished']:.2%} | "
        f"{row['perplexity']:.2f} |"
    )


def main() -> None:
    made = parser(
        __doc__,
        dict(
            windows=(Path, "calibration token ids, .safetensors or .npy"), out=Path("out/quantise-peers"),
            folder=(Path("out/quantisers"), "where the libraries lie"), json=Path,
            ways=("", "a regular expression: the ways to take, by package and name"), group=64, threads=1,
            ours=("", "rows of bench/quantise.py to be compared with, by bits: 4=FOLDER,3=FOLDER"),
        ),
        dict(evaluation="wikitext2", judged=24, seq_len=512, data_dir=Path, distance=False,
             zeros=(False, "the model is of 2:4: what became of its zeros, by `secateur inspect`"), work=(str, HIDDEN)),
    )  # fmt: skip
    made.add_argument("model", type=Path, nargs="?")
    given = made.parse_args()
    if given.work:  # in a process of its own
        work(given.work)
        return
    run(given)


def run(given: Any) -> None:
    """Go through the ways, and write what is known after each."""
    torch.set_num_threads(given.threads)
    document = json.loads(given.json.read_text()) if given.json and given.json.exists() else {}
    models = document.get("models", {})
    known = models.setdefault(given.model.name, {"rows": []})
    ids = window_ids(given.windows)
    known |= {
        "calibration": [given.windows.name, *ids.shape], "threads": given.threads,
        "evaluation": [given.evaluation, given.judged, given.seq_len],
    }  # fmt: skip
    rows = known["rows"]
    if not rows:
        rows.append({"package": "", "version": "", "way": "dense", **judged(given.model, given)})
    for way in WAYS:
        words = f"{way.package} {way.name}"
        if not re.search(given.ways, words) or any(
            (row["package"], row["way"]) == (way.package, way.name) for row in rows
        ):
            continue
        try:
            rows.append(row_of(way, given))
        except subprocess.CalledProcessError as error:
            print(f"{words} does not run here: {(error.stderr or '').strip()[-600:]}", flush=True)
            continue
        print(line(rows[-1]), flush=True)
        write(given.json, command=["bench/quantise_peers.py"], beside=BESIDE, models=models)
    ours = dict(one.split("=") for one in given.ours.split(",") if one)
    ways = {(way.package, way.name): way for way in WAYS}
    for row in rows[1:]:  # the first is the dense model
        way = ways[row["package"], row["way"]]
        out = job_of(way, given).out
        if str(way.bits) in ours and "over_ours" not in row and out.is_dir():
            row["over_ours"] = over_ours(dense_of(out, given), Path(ours[str(way.bits)]), given)
            write(given.json, command=["bench/quantise_peers.py"], beside=BESIDE, models=models)
            print(f"{way.package} {way.name}: {row['over_ours']}", flush=True)
    print("| quantiser | way | bits of a weight | perplexity | CPU-seconds |")
    print("| --- | --- | --- | --- | --- |")
    print("\n".join(map(line, rows)))
    if given.zeros:
        print("| quantiser | way | zeros kept | 2:4 holds | kept weights that become zero | perplexity |")
        print("| --- | --- | --- | --- | --- | --- |")
        print("\n".join(map(zeros_line, rows[1:])))


RUN = (
    "import runpy, sys; place, script, job = sys.argv[1:]; sys.path[:0] = [place, script.rpartition('/')[0]];"
    "sys.argv = [script, '--work', job]; runpy.run_path(script, run_name='__main__')"
)


if __name__ == "__main__":
    main()
