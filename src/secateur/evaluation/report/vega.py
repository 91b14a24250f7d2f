"""Vega-Lite specifications drawn as SVG, in a process of its own: this file, run as a script.

The library that draws has a JavaScript engine inside, which takes 35 GB of addresses and some 200
MB of memory, and ends its process where `ulimit -v` leaves less. Hours of comparing must not end
with it.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

VEGA_LITE = "6.1"


class NotDrawn(Exception):
    """The process that draws has died; the message says how."""


def draw(specifications: Sequence[dict[str, Any]]) -> list[str]:
    """The SVG of each specification. Raises NotDrawn."""
    done = subprocess.run(
        [sys.executable, "-I", __file__],
        input=json.dumps(specifications),
        capture_output=True,
        text=True,
        check=False,
        encoding="utf-8",
    )
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"it ended with {done.returncode}"]
        raise NotDrawn(last[0])
    return json.loads(done.stdout)


if __name__ == "__main__":
    import vl_convert

    sys.stdin.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    json.dump(
        [vl_convert.vegalite_to_svg(one, vl_version=VEGA_LITE) for one in json.load(sys.stdin)],
        sys.stdout,
    )
