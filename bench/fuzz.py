"""Thousands of spoilt checkpoint folders, each read by a command as users run it: `make fuzz`.

    python bench/fuzz.py --count 10000 --seed 0          every case, then one JSON line; 1 where one is a fault
    python bench/fuzz.py --seed 0 --only 1234 [5678 …]   these cases again, with what became of them

What is spoilt and how is in tests/support/mutations.py, what is allowed in tests/support/fuzzing.py. The cases run one
after the other in a process of their own with limits to its memory and to the files that it writes; where it dies or
hangs, that is the fault of the case at hand, and another process goes on with the next one.
"""

from __future__ import annotations

import faulthandler
import json
import os
import resource
import select
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path
from tempfile import mkdtemp
from time import perf_counter
from typing import Any, NamedTuple

from common import HIDDEN, parser, write

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

RESULTS = Path(__file__).parent / "results" / "fuzz.json"
SPACE = 2**34
"""Bytes of addresses that a worker may have."""
PATIENCE, EVERY = 150.0, 250
"""Seconds until a silent worker is taken for hung, and cases between two lines of progress."""


def main() -> None:
    declared = parser(
        __doc__,
        dict(count=10_000, seed=0, first=(0, "the number of the first case")),
        dict(kinds=("", "kinds of mutations, separated by commas; default: all")),
        dict(json=RESULTS, worker=(Path, HIDDEN)),
    )
    declared.add_argument("--only", type=int, nargs="+", help="run these cases and tell of each")
    chosen = declared.parse_args()
    if chosen.worker:
        return work(chosen.worker, chosen.seed, tuple(filter(None, chosen.kinds.split(","))))
    place = Path(mkdtemp(prefix="secateur-fuzz-"))
    try:
        subprocess.run([sys.executable, __file__, "--worker", str(place)], check=True, stdin=subprocess.DEVNULL,
                       env=os.environ | QUIET)  # fmt: skip
        numbers = chosen.only or range(chosen.first, chosen.first + chosen.count)
        found = run(place, chosen.seed, numbers, chosen.kinds, tell=bool(chosen.only))
    finally:
        shutil.rmtree(place, ignore_errors=True)
    if not chosen.only:
        write(chosen.json, command=sys.argv, **found)
    print(json.dumps(found))
    sys.exit(bool(found["faults"]))


QUIET = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}


class Worker(NamedTuple):
    """A process that runs cases; what it says of its own, on standard error, is in `log`."""

    process: subprocess.Popen[bytes]
    log: Path


def start(place: Path, seed: int, kinds: str) -> Worker:
    command = [sys.executable, __file__, "--worker", str(place), "--seed", str(seed), "--kinds", kinds]
    log = place / "log"
    with log.open("wb") as stream:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stream,
                                   env=os.environ | QUIET | {"HF_HOME": str(place / "hub")})  # fmt: skip
    return Worker(process, log)


def run(place: Path, seed: int, numbers: Any, kinds: str, *, tell: bool) -> dict[str, Any]:
    """Run cases by number; what became of them, counted, and every fault with what it takes to make it again."""
    counts: Counter[tuple[str, str]] = Counter()
    seconds: defaultdict[str, float] = defaultdict(float)
    faults: list[dict[str, Any]] = []
    worker, started = start(place, seed, kinds), perf_counter()
    for done, number in enumerate(numbers, 1):
        begun = perf_counter()
        found = ask(worker, number)
        seconds[found["command"] if found else "unknown"] += perf_counter() - begun
        if found is None:
            worker.process.kill()
            worker.process.wait()
            code, said = worker.process.returncode, worker.log.read_text(errors="replace")[-3000:]
            found = {"kind": "unknown", "result": "crash or hang", "detail": f"exit code {code}: {said}"}
            worker = start(place, seed, kinds)
        counts[found["kind"], found["result"]] += 1
        if found["result"] not in ("ok", "refused", "not kept"):
            faults.append({"seed": seed, "number": number, **found})
        if tell or found["result"] not in ("ok", "refused", "not kept"):
            print(number, *(f"{key}: {value}" for key, value in found.items()), sep="\n    ", flush=True)
        if done % EVERY == 0:
            print(f"{done} cases, {len(faults)} faults, {perf_counter() - started:.0f} s", flush=True)
    assert worker.process.stdin
    worker.process.stdin.close()
    worker.process.wait()
    kinds_found = sorted({kind for kind, _ in counts})
    return {
        "seed": seed, "cases": len(numbers), "seconds": round(perf_counter() - started, 1),
        "counts": {kind: {r: n for (k, r), n in sorted(counts.items()) if k == kind} for kind in kinds_found},
        "seconds_by_command": {name: round(value, 1) for name, value in sorted(seconds.items())}, "faults": faults,
    }  # fmt: skip


def ask(worker: Worker, number: int) -> dict[str, Any] | None:
    """What the worker says of a case; None where it died or says nothing."""
    assert worker.process.stdin
    assert worker.process.stdout
    try:
        worker.process.stdin.write(b"%d\n" % number)
        worker.process.stdin.flush()
    except BrokenPipeError:
        return None
    waiting = 3 * PATIENCE if worker.log.stat().st_size == 0 else PATIENCE
    if not select.select([worker.process.stdout], [], [], waiting)[0]:
        return None
    line = worker.process.stdout.readline()
    return json.loads(line) if line else None


def work(place: Path, seed: int, kinds: tuple[str, ...]) -> None:
    """Answer every case number on standard input with a line; the first worker of a run makes the sound folders."""
    import warnings

    import torch
    from support.fuzzing import bases, run_case
    from support.mutations import KINDS

    torch.set_num_threads(1)
    sound = place / "sound"
    if not sound.exists():
        from secateur.cli.terminal import progress

        progress(quiet=True)
        return bases(sound)
    warnings.simplefilter("ignore")  # as the command does
    answers = os.fdopen(os.dup(1), "w")
    log = os.fdopen(os.dup(2), "w")
    resource.setrlimit(resource.RLIMIT_AS, (SPACE, SPACE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    faulthandler.enable(log)
    for line in sys.stdin:
        root = place / "case"
        shutil.rmtree(root, ignore_errors=True)  # of a worker that died
        root.mkdir()
        faulthandler.dump_traceback_later(PATIENCE - 10, exit=True, file=log)
        outcome = run_case(seed, int(line), sound, root, kinds or tuple(KINDS))
        faulthandler.cancel_dump_traceback_later()
        print(json.dumps(outcome._asdict()), file=answers, flush=True)
    return None


if __name__ == "__main__":
    main()
