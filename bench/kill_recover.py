"""Kill a recovery at random moments and go on, until it has died often enough: the same loss curve, the same bytes.

    python bench/kill_recover.py --kills 10 --json bench/results/kill-recover.json

`secateur recover` on the demo model, pruned to 2:4: 1,200 steps of 2 × 64 tokens and a checkpoint every 3; block by
block, 400 steps of 8 × 64 in each. Every run is killed with SIGKILL after a random time, as long as kills are left;
what it leaves is taken up by the next.
"""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from common import options, write

import secateur
from secateur.data.demo import model_folder
from secateur.system.files import file_sha256

WAYS = {
    "lora": ["--steps", "1200", "--batch-size", "2"],
    "distill": ["--steps", "1200", "--batch-size", "2"],
    "blocks": ["--steps", "400", "--batch-size", "8"],
}


def command(place: Path, way: str, out: Path) -> list[str]:
    return [
        sys.executable, "-m", "secateur", "recover", str(place / "pruned"), "--dense", str(model_folder()),
        "--with", way, *WAYS[way], "--seq-len", "64", "--save-every", "3", "--out", str(out), "--quiet",
    ]  # fmt: skip


def curve(folder: Path) -> list[Any]:
    told = json.loads((folder / "pruning.json").read_text())["recovery"][0]
    return [loss for *_, loss in told["loss"] or told["blocks"]]


if __name__ == "__main__":
    chosen = options(__doc__, dict(kills=10, out=Path("out/kill-recover"), json=Path))
    shutil.rmtree(chosen.out, ignore_errors=True)
    secateur.prune(out=chosen.out / "pruned", method="wanda", pattern="2:4", samples=8)
    draw, rows = random.Random(0), []
    for way in WAYS:
        whole, out = chosen.out / f"{way}-whole", chosen.out / way
        subprocess.run(command(chosen.out, way, whole), check=True, capture_output=True)
        deaths = 0
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
                print(f"{way}: died {deaths} times", flush=True)
        same = file_sha256(out / "model.safetensors") == file_sha256(whole / "model.safetensors")
        apart = max(abs(one - other) for one, other in zip(curve(out), curve(whole), strict=True))
        rows.append({"way": way, "deaths": deaths, "same_bytes": same, "largest_difference_of_loss": apart})
        print(json.dumps(rows[-1]), flush=True)
    write(chosen.json, command=sys.argv, rows=rows)
    sys.exit(not all(row["same_bytes"] for row in rows))
