r"""What runs on large models will take, from their configurations alone, and how true a forecast is on a small one.

    python bench/forecast.py --json bench/results/forecast.json
    python bench/forecast.py --measure magnitude,wanda,sparsegpt --samples 32 --seq-len 512 \
        --json bench/results/forecast-measured.json

The configurations are written by hand from what is public; parameters must come out as published. `--measure` prunes
a random Llama of hidden size 2048 (`memory.py`) in a process of its own and compares the peak of anonymous memory,
from the first import to the end, with what was forecast; operations are compared in tests/pruning/test_forecast.py.
"""

import json
import shutil
import sys
from dataclasses import asdict
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from common import options, write
from memory import run, write_model

from secateur.pruning.planning.forecast import Forecast, forecast
from secateur.pruning.planning.passes import MODES, seconds_of

LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "float16", "num_hidden_layers": 32,
    "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_key_value_heads": 32,
    "vocab_size": 32000, "max_position_embeddings": 4096, "tie_word_embeddings": False,
}  # fmt: skip
OPT = {
    "model_type": "opt", "architectures": ["OPTForCausalLM"], "dtype": "float16", "num_hidden_layers": 96,
    "hidden_size": 12288, "word_embed_proj_dim": 12288, "ffn_dim": 49152, "num_attention_heads": 96,
    "vocab_size": 50272, "max_position_embeddings": 2048,
}  # fmt: skip
BLOOM = {
    "model_type": "bloom", "architectures": ["BloomForCausalLM"], "dtype": "bfloat16", "n_layer": 70,
    "hidden_size": 14336, "n_head": 112, "vocab_size": 250880,
}  # fmt: skip
MODELS = {"Llama-2-7B": (LLAMA, 6.74e9), "OPT-175B": (OPT, 175e9), "BLOOM-176B": (BLOOM, 176.2e9)}
"""Configuration and published parameters."""
METHODS = ("magnitude", "wanda", "sparsegpt", "default", "best")

RUN = """
import sys, torch
from secateur.system.memory import PeakMemory
with PeakMemory() as peak:
    import secateur
    folder, out, method, samples, length, passes = sys.argv[1:]
    report = secateur.prune(folder, out=out, method=method, pattern="2:4", calibration="demo", passes=passes,
                            samples=int(samples), seq_len=int(length), overwrite=True)
print(peak.bytes, report.peak_bytes, report.seconds.forward, report.seconds.statistics, report.seconds.solve)
"""


def foreseen() -> list[dict]:
    """A line for every model and method. Exits where parameters are not as published."""
    rows = []
    for name, (config, published) in MODELS.items():
        with TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text(json.dumps(config))
            for method in METHODS:
                found = forecast(folder, method=method, pattern="2:4", dtype="float32")
                if abs(found.parameters / published - 1) > 0.005:
                    sys.exit(f"{name} has {published:.4g} parameters, the forecast says {found.parameters}")
                rows.append({"name": name, "published_parameters": published, **asdict(found), "model": name})
    return rows


def measured(methods: list[str], parameters: float, samples: int, length: int, out: Path) -> list[dict]:
    """The memory that runs took, beside what was forecast."""
    write_model(out / "model", parameters)
    rows = []
    for method, passes in product(methods, MODES):
        found = forecast(out / "model", method=method, pattern="2:4", samples=samples, seq_len=length)
        peak, inside, *seconds = run(
            RUN, str(out / "model"), str(out / "pruned"), method, str(samples), str(length), passes
        )
        said = found.memory[passes]
        rows.append({
            "method": method, "passes": passes, "samples": samples, "seq_len": length, "parameters": found.parameters,
            "peak_bytes": peak, "peak_bytes_in_prune": inside, "forecast_bytes": said.bytes,
            "ratio": said.bytes / peak, "forecast": asdict(said), "seconds": seconds,
            "estimated_seconds": _estimated(found, passes),
        })  # fmt: skip
        print(
            f"{method:12}{passes:4}{samples:4} x {length:<5}{peak / 1e6:9.0f} MB measured{said.bytes / 1e6:9.0f} MB "
            f"forecast{said.bytes / peak:7.2f}   when {said.when}; seconds {seconds}",
            flush=True,
        )
    shutil.rmtree(out)
    return rows


def _estimated(found: Forecast, passes: str) -> list[float]:
    seconds = seconds_of(found.operations[passes], found.rates)
    return [seconds.forward, seconds.statistics, seconds.solve]


def show(rows: list[dict]) -> None:
    """The table of the large models."""
    print(f"{'':32}{'memory GB':>18}{'Pflop':>20}{'hours':>18}{'disk GB':>9}")
    print(f"{'model':12}{'method':11}{'billion':>9}{'one':>9}{'two':>9}{'one':>10}{'two':>10}{'one':>9}{'two':>9}")
    for row in rows:
        memory, work, seconds = row["memory"], row["operations"], row["seconds"]
        text = f"{row['name']:12}{row['method']:11}{row['parameters'] / 1e9:9.2f}"
        text += "".join(f"{memory[mode]['bytes'] / 1e9:9.1f}" for mode in ("one", "two"))
        text += "".join(f"{sum(work[mode].values()) / 1e15:10.1f}" for mode in ("one", "two"))
        text += "".join(f"{seconds[mode] / 3600:9.1f}" for mode in ("one", "two"))
        print(text + f"{row['disk_bytes'] / 1e9:9.1f}")


if __name__ == "__main__":
    chosen = options(
        __doc__,
        dict(measure=("", "methods to run, separated by commas")),
        dict(parameters=3e8, samples=8, seq_len=256, out=Path("out/forecast"), json=Path),
    )
    torch.set_num_threads(1)
    if chosen.measure:
        lines = measured(chosen.measure.split(","), chosen.parameters, chosen.samples, chosen.seq_len, chosen.out)
    else:
        lines = foreseen()
        show(lines)
    write(chosen.json, command=sys.argv, lines=lines)
