"""Kill a pruning run at random moments and go on, again and again: the result must be byte for byte the same.

    python bench/kill.py --runs 30 --json bench/results/kill.json

Every run is `secateur prune` on a small random model in shards, started anew after every `kill -9` until it ends. Half
of the kills come after a random time; the other half at a named moment: a call that copies, writes, syncs, hashes or
renames a file, or reads statistics, or solves a site, counted from the start of the process, so that every stage is
met. At the end the folder must equal that of an undisturbed run, with nothing beside it. Ends in one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from secateur.checkpoint import file_sha256
from secateur.demo import model_folder
from secateur.machine import machine, versions

MOMENTS = {
    "loading": "secateur.model.replayable",
    "copying": "shutil.copyfile",
    "beginning": "secateur.journal.Journal.begin",
    "statistics": "secateur.stats.Stats.of",
    "solving": "secateur.block.put",
    "writing": "secateur.output.Output.write",
    "syncing": "os.fsync",
    "recording": "secateur.journal.Journal._write",
    "hashing": "secateur.output.file_sha256",
    "renaming": "pathlib.Path.rename",
    "tidying": "secateur.journal.Journal.remove",
}
"""By stage: the function at whose call, before or after it, the process dies."""

DYING = """
import importlib, os, signal, sys
place, number, when = sys.argv.pop(1), int(sys.argv.pop(1)), sys.argv.pop(1)
from secateur import cli
calls = 0
def dying(real):
    def stand_in(*args, **kwargs):
        global calls
        calls += 1
        if calls == number and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        found = real(*args, **kwargs)
        if calls == number and when == "after":
            os.kill(os.getpid(), signal.SIGKILL)
        return found
    return stand_in
owner, names = None, place.split(".")
for cut in range(len(names) - 1, 0, -1):
    try:
        owner = importlib.import_module(".".join(names[:cut]))
        break
    except ImportError:
        continue
for name in names[cut:-1]:
    owner = getattr(owner, name)
held = owner.__dict__[names[-1]]
if isinstance(held, classmethod):
    setattr(owner, names[-1], classmethod(dying(held.__func__)))
else:
    setattr(owner, names[-1], dying(held))
sys.exit(cli.main())
"""


def command(model: Path, out: Path, method: str, pattern: str) -> list[str]:
    """The run, the same every time; overwriting, so that the renaming of two folders is met as well."""
    return [
        "prune", str(model), "--out", str(out), "--method", method, "--pattern", pattern, "--calibration", "demo",
        "--samples", "8", "--seq-len", "64", "--batch-size", "2", "--overwrite", "--quiet",
    ]  # fmt: skip


def contents(folder: Path) -> dict[str, str]:
    """The digest of every file in a folder."""
    return {file.name: file_sha256(file) for file in sorted(folder.iterdir())}


def killed(arguments: list[str], draw: random.Random, patience: float) -> str:
    """Start the run and kill it; at which stage, or "ended" where it was faster."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if draw.random() < 0.5:
        stage = draw.choice(list(MOMENTS))
        few = 40 if stage in ("statistics", "syncing", "recording") else 6
        words = [MOMENTS[stage], str(draw.randint(1, few)), draw.choice(["before", "after"])]
        done = subprocess.run([sys.executable, "-c", DYING, *words, *arguments], capture_output=True, env=environment)
        if done.returncode == -signal.SIGKILL:
            return stage
    else:
        process = subprocess.Popen(
            [sys.executable, "-m", "secateur", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
        )
        try:
            done_out, done_err = process.communicate(timeout=draw.uniform(0.3, 1.0) * patience)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            return "at a random time"
        done = subprocess.CompletedProcess(arguments, process.returncode, done_out, done_err)
    if done.returncode:
        raise SystemExit(f"The run failed with {done.returncode}: {done.stderr.decode()}")
    return "ended"


def one(
    folder: Path, model: Path, method: str, pattern: str, seed: int, patience: float, expected: Any
) -> Counter[str]:
    """Kill a run until it ends by itself; how often it died at which stage."""
    draw, died = random.Random(seed), Counter[str]()
    shutil.rmtree(folder, ignore_errors=True)
    out = folder / "out"
    folder.mkdir(parents=True)
    shutil.copytree(model, out)
    (out / "stale.txt").write_text("of an older result")
    arguments = command(model, out, method, pattern)
    while (stage := killed(arguments, draw, patience)) != "ended":
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/kill"))
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    cases = [("sparsegpt", "50%"), ("wanda", "2:4"), ("energy+repair", "25% of channels"), ("wanda+refine", "50%")]
    model = model_folder()
    total: Counter[str] = Counter()
    expected: dict[tuple[str, str], Any] = {}
    for number in range(given.runs):
        method, pattern = case = cases[number % len(cases)]
        folder = given.out / "same"  # the place is in pruning.json's command, so it must be the same
        if case not in expected:
            shutil.rmtree(folder, ignore_errors=True)
            subprocess.run(
                [sys.executable, "-m", "secateur", *command(model, folder / "out", method, pattern)], check=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
            expected[case] = contents(folder / "out")
        died = one(folder, model, method, pattern, given.seed + number, 12.0, expected[case])
        total += died
        print(
            f"{number + 1}/{given.runs} {method} {pattern}: died {died.total()} times, the same in the end", flush=True
        )
    result = {"runs": given.runs, "kills": total.total(), "stages": dict(sorted(total.items()))}
    if given.json:
        about = {"command": sys.argv, "machine": machine(), "versions": versions()}
        given.json.write_text(json.dumps({**result, **about}, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
