"""How much of what SparseGPT loses on a real model other methods win back, and for how much of its time.

    python bench/real_quality.py --samples 128 --methods sparsegpt,default,default+distil --json FILE

The model and the texts are those of bench/real.py, which fetches what is missing: SmolLM2-135M-Instruct, C4 to
calibrate on, WikiText-2's test split in windows of 512 tokens to judge on. Every row comes from `secateur compare`,
which keeps it in --out: the same command goes on where it was killed, and other methods join the table. `removed` is
the share of what SparseGPT adds to the dense model that a row does not add, in perplexity and in KL; `cost` its seconds
over SparseGPT's.

With --peers llm-compressor prunes the same model to 50 % on the same windows, in float32 and with as many threads, in
an environment of its own (bench/prune.py): its seconds are those of its call, without reading and writing. --picture
draws perplexity against cost.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from common import options, save, write
from prune import PEER, SMALL, Job, measure, peer_python
from real import model_file, texts

KEPT = ("method", "pattern", "perplexity", "delta", "delta_interval", "kl", "rank")


def line(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What is kept of a row, beside SparseGPT's of the same pattern."""
    base = next(one for one in rows if (one["method"], one["pattern"]) == ("sparsegpt", row["pattern"]))
    seconds, of_base = (sum(one["seconds"].values()) for one in (row, base))
    return {name: row[name] for name in KEPT} | {
        "seconds": seconds,
        "cost": seconds / of_base,
        "removed": 1 - row["delta"] / base["delta"],
        "removed_kl": 1 - row["kl"] / base["kl"],
    }


def peer_row(method: str, given: Any, source: Path, base: dict[str, Any]) -> dict[str, Any]:
    """What llm-compressor's method makes of the model, beside SparseGPT's row; kept in --out once it is known."""
    kept = given.out / "peers" / f"{method}.json"
    if kept.is_file():
        return json.loads(kept.read_text())
    import secateur

    work = kept.parent / "work"
    model = write_inputs(given, source, work)
    job = Job("llm-compressor", method, SMALL, work, "float32", given.threads, 1)
    took = measure(job, peer_python(given.out / "llm-compressor-venv"))
    shutil.copytree(model, job.out, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    found = secateur.evaluate(
        job.out, dense=model, evaluation="wikitext2", windows=given.windows, seq_len=given.seq_len,
        data_dir=given.data_dir,
    )  # fmt: skip
    row = {name: getattr(found, name) for name in ("perplexity", "delta", "delta_interval", "kl")}
    row |= {"method": PEER.replace("==", " ") + f" {method}", "pattern": "50%"}
    row |= {"seconds": {"whole": took["wall_seconds"]}, "rank": ""}
    row = line(row, [base]) | {"peak_bytes": took["peak_bytes"]}
    save(kept, row)
    shutil.rmtree(job.out)
    return row


def write_inputs(given: Any, source: Path, work: Path) -> Path:
    """The model as a dense folder in float32 and the calibration windows, for bench/prune.py; made once."""
    import torch

    from secateur.data.calibration import calibration_windows
    from secateur.data.tokenizer import load_tokenizer
    from secateur.models.load import load, resolve

    work.mkdir(parents=True, exist_ok=True)
    model, tokens = work / "model", work / "calibration.pt"
    if not tokens.is_file():
        dense = resolve(source)
        tokenizer = load_tokenizer(dense)
        load(dense).model.float().save_pretrained(model)
        tokenizer.save_pretrained(model)
        drawn = calibration_windows(
            tokenizer, "c4", samples=given.samples, length=given.seq_len, seed=0, data_dir=given.data_dir
        )
        torch.save(drawn.ids.clone(), tokens)
    return model


def picture(rows: list[dict[str, Any]], dense: float) -> str:
    """Perplexity against cost, as SVG: a mark a row, with its name."""
    from secateur.evaluation.report.charts import front
    from secateur.evaluation.report.vega import draw

    values = [
        {"cost": row["cost"], "perplexity": row["perplexity"], "name": row["method"].rpartition(" ")[2],
         "of": "llm-compressor" if row["method"].startswith("llm") else "Secateur"}
        for row in rows
    ]  # fmt: skip
    best = front([(row["cost"], row["perplexity"]) for row in rows], least=True)
    values = [value | {"front": number in best} for number, value in enumerate(values)]
    axis = {"type": "quantitative", "scale": {"type": "log", "nice": False, "padding": 24}}
    x = {"field": "cost", "title": "seconds, in those of SparseGPT (log)", **axis}
    y = {"field": "perplexity", "title": "perplexity on WikiText-2 (log)", **axis, "axis": {"format": "~g"}}
    kind = {"field": "of", "type": "nominal", "title": None}
    colour = kind | {"scale": {"range": ["#b35900", "#1f6f8b"]}, "legend": {"orient": "top"}}
    marks = {"encoding": {"x": x, "y": y}}
    layers = [
        marks | {"mark": {"type": "line", "strokeDash": [4, 3], "color": "#888"},
                 "transform": [{"filter": "datum.front"}]},
        {"mark": {"type": "point", "filled": True, "size": 90, "opacity": 1},
         "encoding": {"x": x, "y": y, "color": colour, "shape": kind}},
        {"mark": {"type": "text", "align": "left", "dx": 8, "dy": -8, "color": "#555"},
         "encoding": {"x": x, "y": y, "text": {"field": "name"}}},
        {"mark": {"type": "rule", "strokeDash": [2, 2], "color": "#888"}, "encoding": {"y": {"datum": dense}}},
        {"data": {"values": [{}]}, "mark": {"type": "text", "align": "left", "dy": -8, "color": "#555"},
         "encoding": {"x": {"value": 6}, "y": {"datum": dense}, "text": {"value": f"dense, {dense:.2f}"}}},
    ]  # fmt: skip
    look = {"config": {"axis": {"gridColor": "#eee"}}, "background": "white", "width": 620, "height": 380}
    (svg,) = draw([{**look, "data": {"values": values}, "layer": layers}])
    return svg


def main() -> None:
    given = options(
        __doc__,
        {
            "data_dir": (Path, "a folder with local copies of c4 and wikitext2"),
            "folder": (Path("out/real"), "where the model lies"),
            "out": Path("out/real-quality"),
            "methods": "sparsegpt,default,best",
            "patterns": "50%,2:4",
            "samples": 32,
            "seq_len": 512,
            "windows": 24,
            "threads": (2, "of llm-compressor; Secateur takes OMP_NUM_THREADS"),
        },
        {
            "peers": (str, "llm-compressor's methods: wanda,sparsegpt"),
            "picture": (Path, "an SVG of perplexity against cost"),
            "json": Path,
        },
    )
    source = model_file(given.folder)
    command = ["compare", str(source), *texts(given.data_dir), "--methods", given.methods]
    command += ["--patterns", given.patterns, "--samples", str(given.samples), "--seq-len", str(given.seq_len)]
    command += ["--windows", str(given.windows)]
    subprocess.run([sys.executable, "-m", "secateur", *command, "--out", str(given.out)], check=True)
    table = json.loads((given.out / "results.json").read_text())
    pruned = [row for row in table["rows"] if row["pattern"] and row["delta"]]
    lines = [line(row, pruned) for row in pruned]
    if given.peers:
        (base,) = (row for row in pruned if (row["method"], row["pattern"]) == ("sparsegpt", "50%"))
        lines += [peer_row(method, given, source, base) for method in given.peers.split(",")]
    for one in lines:
        print(
            f"{one['method']:24} {one['pattern']:4} {one['perplexity']:8.2f}  KL {one['kl']:.4f}  removed "
            f"{one['removed']:4.0%} ({one['removed_kl']:4.0%})  cost {one['cost']:5.1f}"
        )
    kept = {key: table[key] for key in ("evaluation", "calibrations", "model")}
    write(given.json, command=sys.argv, **kept, rows=lines)
    if given.picture:
        (dense,) = (row["perplexity"] for row in table["rows"] if row["kind"] == "dense")
        given.picture.write_text(picture(lines, dense))


if __name__ == "__main__":
    main()
