"""One process that draws the pictures of all tests: starting one for each page takes a second every time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from subprocess import DEVNULL, PIPE, CompletedProcess
from typing import Any

from secateur.evaluation.report import vega

PROGRAM = f"""
import json, sys, vl_convert
for line in sys.stdin:
    drawn = [vl_convert.vegalite_to_svg(one, vl_version={vega.VEGA_LITE!r}) for one in json.loads(line)]
    print(json.dumps(drawn), flush=True)
"""


@contextmanager
def drawing() -> Iterator[Callable[..., CompletedProcess[str]]]:
    """What stands in for `subprocess.run` in `vega.draw`. Another command, a fork of this process and a picture at
    which the drawing process dies go to the real one."""
    started: list[subprocess.Popen[str]] = []
    own = os.getpid()

    def run(command: list[str], **options: Any) -> CompletedProcess[str]:
        if command == [sys.executable, "-I", vega.__file__] and os.getpid() == own:
            if not started or started[-1].poll() is not None:
                start = [sys.executable, "-I", "-c", PROGRAM]
                started.append(subprocess.Popen(start, stdin=PIPE, stdout=PIPE, stderr=DEVNULL, encoding="utf-8"))
            ask, answer = started[-1].stdin, started[-1].stdout
            assert ask
            assert answer
            print(json.dumps(json.loads(options["input"])), file=ask, flush=True)
            if drawn := answer.readline():
                return CompletedProcess(command, 0, drawn, "")
            started[-1].wait()
        return subprocess.run(command, **options)

    yield run
    for process in started:
        process.communicate()
