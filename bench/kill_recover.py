"""Kill a recovery at random moments and go on, until it has died often enough: the same loss curve, the same bytes.

    python bench/kill_recover.py --kills 10 --json bench/results/kill-recover.json

`secateur recover` on the demo model, pruned to 2:4, with 800 steps of 2 × 64 tokens and a checkpoint every 3. Each run
is killed with SIGKILL after a random time, as long as kills are left; what it leaves is taken up by the next.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import secateur
from secateur.checkpoint import file_sha256
from secateur.demo import model_folder
from secateur.machine import machine, versions


def command(place: Path, way: str, out: Path) -> list[str]:
    return [
        sys.executable, "-m", "secateur", "recover", str(place / "pruned"), "--dense", str(model_folder()),
        "--with", way, "--steps", "800", "--batch-size", "2", "--seq-len", "64", "--save-every", "3",
        "--out", str(out), "--quiet",
    ]  # fmt: skip


def curve(folder: Path) -> list[Any]:
    return json.loads((folder / "pruning.json").read_text())["recovery"][0]["loss"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("out/kill-recover"))
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    shutil.rmtree(chosen.out, ignore_errors=True)
    secateur.prune(out=chosen.out / "pruned", method="wanda", pattern="2:4", samples=8)
    draw, rows = random.Random(0), []
    for way in ("lora", "distill"):
        whole, out = chosen.out / f"{way}-whole", chosen.out / way
        subprocess.run(command(chosen.out, way, whole), check=True, capture_output=True)
        deaths = steps = 0
        while not out.exists():
            running = subprocess.Popen(
                command(chosen.out, way, out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            try:
                running.wait(draw.uniform(8.0, 16.0) if deaths < chosen.kills else None)
            except subprocess.TimeoutExpired:
                running.kill()
                running.wait()
                deaths += 1
                steps = max(
                    [0, *(int(p.name.split("-")[1]) for p in out.with_name(f".{way}.recovery").glob("checkpoint-*"))]
                )
                print(f"{way}: died {deaths} times, {steps} steps are kept", flush=True)
        same = file_sha256(out / "model.safetensors") == file_sha256(whole / "model.safetensors")
        apart = max(abs(one[1] - other[1]) for one, other in zip(curve(out), curve(whole), strict=True))
        rows.append({"way": way, "deaths": deaths, "same_bytes": same, "largest_difference_of_loss": apart})
        print(json.dumps(rows[-1]), flush=True)
    if chosen.json:
        held = {"command": sys.argv, "machine": machine(), "versions": versions(), "rows": rows}
        chosen.json.write_text(json.dumps(held, indent=1) + "\n")
    sys.exit(not all(row["same_bytes"] for row in rows))


if __name__ == "__main__":
    main()
