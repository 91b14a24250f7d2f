"""Pruning a model of Llama-2-7B's shape on a GPU, end to end: seconds of every stage, and how near the matrix peak.

    python bench/gpu_prune.py --json bench/results/gpu-prune.json
    python bench/gpu_prune.py --device cpu --parameters 2.5e8 --samples 4 --seq-len 128      # a try without a GPU

Random weights in bfloat16, written by `bench/memory.py`, 128 × 2048 tokens of the demo's text. Stages are wall time on
the device, synchronised (`Report.seconds`); what is left of the whole run is files: copying the checkpoint, writing and
the digests of both. Shares are the operations that `secateur plan` counts over the stage's seconds, by the rate of
matrix products in the dtype of the stage, measured in the same process; a Gram matrix counts with both halves.
"""

from __future__ import annotations

import shutil
import sys
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from common import options, write
from memory import write_model

import secateur
from secateur.pruning.planning.passes import GRAM


def measure(folder: Path, out: Path, method: str, chosen: Namespace) -> dict[str, Any]:
    """One run: its seconds, their share of the peak, and the most memory that the device held."""
    options = {"method": method, "pattern": "50%", "samples": chosen.samples, "seq_len": chosen.seq_len}
    options |= {"device": chosen.device, "batch_size": chosen.batch}
    planned = secateur.forecast(folder, **options)
    cuda = chosen.device != "cpu"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    began = perf_counter()
    report = secateur.prune(folder, out=out, calibration="demo", overwrite=True, **options)
    whole, seconds = perf_counter() - began, asdict(report.seconds)
    work = planned.operations["one"]
    shares = {
        "forward": work.forward / max(seconds["forward"], 1e-9) / planned.rates[planned.forward_dtype],
        "statistics": work.statistics / max(seconds["statistics"], 1e-9) / planned.rates[GRAM],
    }
    return {
        "method": method, "parameters": planned.parameters, "share_of_peak": shares,
        "seconds": seconds | {"all": whole, "stages": report.seconds.total},
        "rates": planned.rates, "sparsity": report.sparsity,
        "device_peak_bytes": torch.cuda.max_memory_allocated() if cuda else None, "host_peak_bytes": report.peak_bytes,
    }  # fmt: skip


if __name__ == "__main__":
    chosen = options(
        __doc__,
        dict(parameters=6.74e9, model=(Path, "a folder to prune instead, which stays")),
        dict(methods="wanda,sparsegpt", samples=128, seq_len=2048, batch=8, device="cuda"),
        dict(out=Path("out/gpu-prune"), json=Path),
    )
    model, rows = chosen.model or chosen.out / "model", []
    if not chosen.model:
        write_model(model, chosen.parameters, 4096 if chosen.parameters > 1e9 else 2048)
    for method in chosen.methods.split(","):
        rows.append(found := measure(model, chosen.out / "pruned", method, chosen))
        stages = ", ".join(f"{stage} {taken:.1f}" for stage, taken in found["seconds"].items())
        shares = ", ".join(f"{stage} {share:.0%}" for stage, share in found["share_of_peak"].items())
        print(f"{method}: seconds {stages}; of the peak {shares}", flush=True)
        write(chosen.json, command=["bench/gpu_prune.py", *sys.argv[1:]], rows=rows)
    shutil.rmtree(chosen.out)
