"""Python programs run in forks of this process: torch and transformers, seconds of work, need not be imported again."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import traceback
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from subprocess import CompletedProcess
from tempfile import TemporaryFile

from support.paths import ROOT


def run(
    command: Sequence[str | Path], *, cwd: Path | None = None, env: Mapping[str, str] | None = None, **_: object
) -> CompletedProcess[str]:
    """What `subprocess.run(command, capture_output=True, text=True)` returns, where `command` begins with
    `sys.executable` and goes on with `-W error` or nothing, then `-m MODULE`, `-c CODE` or a file, then arguments.
    What this process has imported, and what a test has put in the place of something, the program finds as it is.
    """
    words = [str(word) for word in command]
    assert words[0] == sys.executable, words
    with TemporaryFile() as out, TemporaryFile() as err:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        child = os.fork()
        if not child:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            os._exit(_status(words[1:], cwd, env))
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        for file in (out, err):
            file.seek(0)
        return CompletedProcess(words, status, out.read().decode(), err.read().decode())


def in_ranks(
    count: int,
    program: str | Path,
    *arguments: str,
    fresh: bool = False,
    patience: float = 0.1,
    environment: Mapping[str, str],
) -> CompletedProcess[str]:
    """A program, secateur or a file, in `count` processes that torchrun starts, or alone; the error of any ends all.
    `fresh`: torchrun and its processes are no forks of this one, but begin with nothing. `patience`: after so many
    seconds torchrun sees that one has died, and ends the others, which may have something to say before.
    """
    env = {**os.environ, **environment}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    torchrun += ["--monitor-interval", str(patience)]
    if fresh:
        module = ["-m", str(program)] if program == "secateur" else [str(program)]
        start = torchrun if count > 1 else [sys.executable]
        return subprocess.run([*start, *module, *arguments], capture_output=True, text=True, env=env, check=False)
    file = str(ROOT / "src" / "secateur" / "__main__.py") if program == "secateur" else str(program)
    start = [*torchrun, "--start-method", "fork", "--run-path"] if count > 1 else [sys.executable]
    return run([*start, file, *arguments], env=env)


def _status(words: list[str], cwd: Path | None, env: Mapping[str, str] | None) -> int:
    """The exit status of a program that is run in this process, which ends with it."""
    status = 1
    sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False, buffering=1)  # noqa: SIM115
    try:
        if env is not None:
            os.environ.clear()
            os.environ.update(env)
        os.chdir(cwd or ".")
        warnings.resetwarnings()
        if words[0] == "-W":
            warnings.simplefilter(words[1])  # type: ignore[arg-type]
            words = words[2:]
        _run(*words)
        status = 0
    except SystemExit as left:
        status = left.code if isinstance(left.code, int) else int(left.code is not None)
        if isinstance(left.code, str):
            print(left.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    return status


def _run(first: str, *rest: str) -> None:
    if first in ("-m", "-c"):
        program, *arguments = rest
        sys.argv = [first, *arguments]
        if first == "-c":
            exec(compile(program, "<string>", "exec"), {"__name__": "__main__"})
        else:
            sys.modules.pop(program, None)  # as `python -m` has it
            runpy.run_module(program, run_name="__main__", alter_sys=True)
    else:
        sys.argv = [first, *rest]
        sys.path.insert(0, str(Path(first).parent))
        runpy.run_path(first, run_name="__main__")
