"""Kill a pruning run at random moments and go on, again and again: the result must be byte for byte the same.

    python bench/kill.py --runs 30 --json bench/results/kill.json

Every run is `secateur prune` on a small random model in shards, started anew after every `kill -9` until it ends. Half
of the kills come after a random time; the other half at a named moment: a call that copies, writes, syncs, hashes or
renames a file, or reads statistics, or solves a site, counted from the start of the process, so that every stage is
met. At the end the folder must equal that of an undisturbed run, with nothing beside it. Ends in one JSON line.
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import sys
from collections import Counter
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from common import options, write

from secateur.data.demo import model_folder
from secateur.system.files import file_sha256

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from support.dying import MOMENTS, started


def command(model: Path, out: Path, method: str, pattern: str) -> list[str]:
    """The run, the same every time; overwriting, so that the renaming of two folders is met as well."""
    return [
        "prune", str(model), "--out", str(out), "--method", method, "--pattern", pattern, "--calibration", "demo",
        "--samples", "8", "--seq-len", "64", "--batch-size", "2", "--overwrite", "--quiet",
    ]  # fmt: skip


def contents(folder: Path) -> dict[str, str]:
    """The digest of every file in a folder."""
    return {file.name: file_sha256(file) for file in sorted(folder.iterdir())}


def killed(arguments: list[str], draw: random.Random, seconds: float) -> str:
    """Start the run and kill it; at which stage, or "ended" where it was faster."""
    if draw.random() < 0.5:
        stage = draw.choice(list(MOMENTS))
        few = 16 if stage in ("statistics", "syncing", "recording", "solving") else 2
        status = started(arguments, (MOMENTS[stage], draw.randint(1, few), draw.choice(["before", "after"])))
    else:
        stage, status = "at a random time", started(arguments, after=draw.uniform(0, 0.8 * seconds))
    if status not in (0, -signal.SIGKILL):
        raise SystemExit(f"The run ended with {status}.")
    return stage if status else "ended"


def one(folder: Path, model: Path, method: str, pattern: str, seed: int, seconds: float, expected: Any) -> Counter[str]:
    """Kill a run until it ends by itself; how often it died at which stage."""
    draw, died = random.Random(seed), Counter[str]()
    shutil.rmtree(folder, ignore_errors=True)
    out = folder / "out"
    folder.mkdir(parents=True)
    shutil.copytree(model, out)
    (out / "stale.txt").write_text("of an older result")
    arguments = command(model, out, method, pattern)
    while (stage := killed(arguments, draw, seconds)) != "ended":
        died[stage] += 1
        if died.total() > 60:
            raise SystemExit("The run does not come to an end.")
    left = sorted(path.name for path in folder.iterdir())
    if left != ["out"]:
        raise SystemExit(f"seed {seed}: beside the result lie {left}")
    found = contents(out)
    if found != expected:
        wrong = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        raise SystemExit(f"seed {seed}: {wrong} differ from the undisturbed run")
    return died


if __name__ == "__main__":
    given = options(__doc__, dict(runs=30, seed=0, out=Path("out/kill"), json=Path))
    cases = [("sparsegpt", "50%"), ("wanda", "2:4"), ("energy+repair", "25% of channels"), ("wanda+refine", "50%")]
    model = model_folder()
    total: Counter[str] = Counter()
    expected: dict[tuple[str, str], Any] = {}
    seconds: dict[tuple[str, str], float] = {}
    torch.set_num_threads(1)  # a fork has none of the threads of its parent
    for number in range(given.runs):
        method, pattern = case = cases[number % len(cases)]
        folder = given.out / "same"  # the place is in pruning.json's command, so it must be the same
        if case not in expected:
            shutil.rmtree(folder, ignore_errors=True)
            began = perf_counter()
            if started(command(model, folder / "out", method, pattern)):
                raise SystemExit("The undisturbed run failed.")
            expected[case], seconds[case] = contents(folder / "out"), perf_counter() - began
        died = one(folder, model, method, pattern, given.seed + number, seconds[case], expected[case])
        total += died
        print(
            f"{number + 1}/{given.runs} {method} {pattern}: died {died.total()} times, the same in the end", flush=True
        )
    result = {"runs": given.runs, "kills": total.total(), "stages": dict(sorted(total.items()))}
    write(given.json, command=sys.argv, **result)
    print(json.dumps(result))
