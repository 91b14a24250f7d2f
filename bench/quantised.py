"""What reading a quantised source costs: whole prune runs of one, beside the same model in bfloat16.

Two models of some 0.6 GB in bfloat16 are made: a Llama in block FP8 (128 x 128), and a gpt-oss whose experts are in
MXFP4. Each run is a process of its own: of the quantised folder with an empty cache ("first"), of it with the copy that
the first has left ("again"), and of the plain folder. Runs take turns; figures are medians. `anonymous` is the most
that the process had allocated itself, mapped files not counted; `cpu` the seconds of processors, which other work on
the machine changes less.

    python bench/quantised.py --out bench/results/quantised.json
"""

import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import options, write
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, GptOssConfig, GptOssForCausalLM, LlamaConfig, LlamaForCausalLM

from secateur.data import demo
from secateur.models.load import resolve

BLOCK = 128


def save(model: Any, folder: Path) -> dict[str, Tensor]:
    """Save a model with the tokenizer of the demo; its tensors."""
    model.bfloat16().save_pretrained(folder)
    AutoTokenizer.from_pretrained(demo.model_folder()).save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def requantise(folder: Path, tensors: dict[str, Tensor], words: dict[str, Any]) -> None:
    """Put packed tensors in the place of the plain ones."""
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": words}))


def fp8(folder: Path, vocabulary: int, blocks: int) -> None:
    """A Llama of width 1024 whose matrices are in block FP8."""
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=1024, intermediate_size=2816, num_hidden_layers=blocks,
        num_attention_heads=16, num_key_value_heads=16, max_position_embeddings=1024,
    )  # fmt: skip
    tensors = save(LlamaForCausalLM(config), folder)
    for name in [name for name in tensors if "_proj" in name]:
        weight = tensors[name].float()
        parts = weight.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK))
        scales = parts.abs().amax((1, 3)) / 448
        tensors[name] = (parts / scales[:, None, :, None]).flatten(2).flatten(0, 1).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scales
    requantise(folder, tensors, {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]})


def mxfp4(folder: Path, vocabulary: int, blocks: int) -> None:
    """A gpt-oss of width 1024 with eight experts in MXFP4."""
    config = GptOssConfig(
        vocab_size=vocabulary, hidden_size=1024, intermediate_size=1024, num_hidden_layers=max(blocks // 2, 1),
        head_dim=64, num_attention_heads=16, num_key_value_heads=4, num_local_experts=8, num_experts_per_tok=2,
        max_position_embeddings=1024, pad_token_id=0, eos_token_id=0,
    )  # fmt: skip
    tensors = save(GptOssForCausalLM(config), folder)
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, inputs, out = tensors.pop(name).shape
        tensors[f"{name}_blocks"] = torch.randint(256, (experts, out, inputs // 32, 16), dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(118, 122, (experts, out, inputs // 32), dtype=torch.uint8)
    requantise(folder, tensors, {"quant_method": "mxfp4"})


def run(model: Path, place: Path, cache: Path, method: str) -> dict[str, float]:
    """Prune a model in a process of its own: seconds, and bytes at most."""
    out = place / "out"
    shutil.rmtree(out, ignore_errors=True)
    command = [
        *(sys.executable, "-W", "ignore", "-m", "secateur", "prune", str(model), "--out", str(out), "--method", method),
        *("--pattern", "2:4", "--calibration", "demo", "--samples", "4", "--seq-len", "128", "--device", "cpu"),
        *("--quiet", "--json"),
    ]
    started, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    with (place / "report.json").open("wb") as report:
        subprocess.run(command, stdout=report, env={**os.environ, "SECATEUR_CACHE": str(cache)}, check=True)
    seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    told = json.loads((place / "report.json").read_text())
    return {"seconds": seconds, "cpu": cpu, "anonymous": told["peak_bytes"]}


def unpacking(model: Path, cache: Path) -> dict[str, float]:
    """Unpack a model in a process of its own: seconds of that alone, and the most it allocated on top."""
    code = (
        "import sys, time; from secateur.models.load import resolve\n"
        "from secateur.system.memory import PeakMemory, anonymous_bytes\n"
        "before, started, own = anonymous_bytes(), time.perf_counter(), time.process_time()\n"
        "with PeakMemory() as peak: resolve(sys.argv[1])\n"
        "print(time.perf_counter() - started, time.process_time() - own, max(peak.bytes - before, 0))"
    )
    env = {**os.environ, "SECATEUR_CACHE": str(cache)}
    done = subprocess.run([sys.executable, "-c", code, str(model)], capture_output=True, text=True, env=env, check=True)
    seconds, cpu, size = map(float, done.stdout.split())
    return {"seconds": seconds, "cpu": cpu, "anonymous": size}


def measure(model: Path, place: Path, rounds: int, method: str) -> dict[str, Any]:
    """All runs of a model; medians, and ratios to the plain one."""
    cache, plain = place / "cache", place / "plain"
    os.environ["SECATEUR_CACHE"] = str(cache)
    shutil.copytree(resolve(model), plain)
    (plain / "source.json").unlink()  # a plain model of no origin
    runs: dict[str, list[dict[str, float]]] = {"first": [], "again": [], "plain": []}
    alone = []
    for _ in range(rounds):
        shutil.rmtree(cache)
        alone.append(unpacking(model, cache))
        shutil.rmtree(cache)
        for kind, folder in (("first", model), ("again", model), ("plain", plain)):
            runs[kind].append(run(folder, place, cache, method))
            print(model.name, kind, runs[kind][-1], flush=True)
    medians = {
        kind: {key: statistics.median(one[key] for one in many) for key in many[0]} for kind, many in runs.items()
    }
    ratios = {
        kind: {key: medians[kind][key] / medians["plain"][key] for key in medians["plain"]}
        for kind in ("first", "again")
    }
    sizes = {"stored": size(model), "plain": size(plain)}
    return {"bytes": sizes, "unpacking": alone, "runs": runs, "medians": medians, "ratios": ratios}


def size(folder: Path) -> int:
    """The bytes of the shards of a folder."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def main() -> None:
    asked = options(__doc__, dict(out=Path, blocks=24, rounds=3, method="wanda"))
    torch.manual_seed(0)
    vocabulary = len(AutoTokenizer.from_pretrained(demo.model_folder()))
    results: dict[str, Any] = {}
    for make in (fp8, mxfp4):
        with tempfile.TemporaryDirectory() as place:
            model = Path(place) / make.__name__
            make(model, vocabulary, asked.blocks)
            results[make.__name__] = measure(model, Path(place), asked.rounds, asked.method)
    write(asked.out, command=sys.argv, options=vars(asked), models=results)


if __name__ == "__main__":
    main()
