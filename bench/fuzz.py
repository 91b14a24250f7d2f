"""Thousands of spoilt checkpoint folders, each read by a command as users run it: `make fuzz`.

    python bench/fuzz.py --count 10000 --seed 0          every case, then one JSON line; 1 where one is a fault
    python bench/fuzz.py --seed 0 --only 1234 [5678 …]   these cases again, with what became of them

What is spoilt and how is in tests/support/mutations.py, what is allowed in tests/support/fuzzing.py. The cases run one
after the other in a process of their own with limits to its memory and to the files that it writes; where it dies or
hangs, that is the fault of the case at hand, and another process goes on with the next one. A run that was ended
goes on where it was when it last wrote its results.
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
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import mkdtemp
from time import perf_counter
from typing import Any, NamedTuple

from common import HIDDEN, parser, write

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

RESULTS = Path(__file__).parent / "results" / "fuzz.json"
SPACE = 2**34
"""Bytes of addresses that a worker may have."""
PATIENCE, EVERY = 150.0, 100
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
        found = Found(chosen.seed, chosen.first, chosen.kinds)
        if not chosen.only and chosen.json.exists():
            found.take(json.loads(chosen.json.read_text()), chosen.count)
        numbers = chosen.only or range(chosen.first + found.cases, chosen.first + chosen.count)
        run(place, numbers, found, None if chosen.only else chosen.json)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    print(json.dumps(found.told()))
    sys.exit(bool(found.faults))


QUIET = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}


class Worker(NamedTuple):
    """A process that runs cases; what it says of its own, on standard error, is in `log`."""

    process: subprocess.Popen[bytes]
    log: Path


@dataclass
class Found:
    """What became of the cases so far, counted, and every fault with what it takes to make it again."""

    seed: int
    first: int
    kinds: str
    cases: int = 0
    seconds: float = 0.0
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    commands: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    faults: list[dict[str, Any]] = field(default_factory=list)

    def told(self) -> dict[str, Any]:
        kinds = sorted({kind for kind, _ in self.counts})
        return {
            "seed": self.seed, "first": self.first, "kinds": self.kinds, "cases": self.cases,
            "seconds": round(self.seconds, 1),
            "counts": {kind: {r: n for (k, r), n in sorted(self.counts.items()) if k == kind} for kind in kinds},
            "seconds_by_command": {name: round(value, 1) for name, value in sorted(self.commands.items())},
            "faults": self.faults,
        }  # fmt: skip

    def take(self, earlier: dict[str, Any], count: int) -> None:
        """Go on where a run of the same cases was ended; one of other cases, or a whole one, is begun anew."""
        same = (earlier["seed"], earlier.get("first"), earlier.get("kinds")) == (self.seed, self.first, self.kinds)
        if same and earlier["cases"] < count:
            self.cases, self.seconds, self.faults = earlier["cases"], earlier["seconds"], earlier["faults"]
            self.counts.update({(kind, r): n for kind, by in earlier["counts"].items() for r, n in by.items()})
            self.commands.update(earlier["seconds_by_command"])


def start(place: Path, seed: int, kinds: str) -> Worker:
    command = [sys.executable, __file__, "--worker", str(place), "--seed", str(seed), "--kinds", kinds]
    log = place / "log"
    with log.open("wb") as stream:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stream,
                                   env=os.environ | QUIET | {"HF_HOME": str(place / "hub")})  # fmt: skip
    return Worker(process, log)


def run(place: Path, numbers: Sequence[int], found: Found, file: Path | None) -> None:
    """Run cases by number and add what became of them; it is written to a file now and then, or else each is told."""
    worker, before, started = start(place, found.seed, found.kinds), found.seconds, perf_counter()
    for number in numbers:
        begun = perf_counter()
        case = ask(worker, number)
        found.commands[case["command"] if case else "unknown"] += perf_counter() - begun
        if case is None:
            worker.process.kill()
            worker.process.wait()
            code, said = worker.process.returncode, worker.log.read_text(errors="replace")[-3000:]
            case = {"kind": "unknown", "result": "crash or hang", "detail": f"exit code {code}: {said}"}
            worker = start(place, found.seed, found.kinds)
        found.counts[case["kind"], case["result"]] += 1
        fault = case["result"] not in ("ok", "refused", "not kept")
        if fault:
            found.faults.append({"seed": found.seed, "number": number, **case})
        if fault or not file:
            print(number, *(f"{key}: {value}" for key, value in case.items()), sep="\n    ", flush=True)
        found.cases += 1
        found.seconds = before + perf_counter() - started
        if file and (found.cases % EVERY == 0 or number == numbers[-1]):
            print(f"{found.cases} cases, {len(found.faults)} faults, {found.seconds:.0f} s", flush=True)
            write(file, command=sys.argv, **found.told())
    assert worker.process.stdin
    worker.process.stdin.close()
    worker.process.wait()


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
