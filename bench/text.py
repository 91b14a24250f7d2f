r"""What drawing calibration text costs: CPU seconds and memory for small and large files.

    python bench/text.py --folder /tmp/bench-text --json bench/results/text.json

Writes rows of text as .jsonl of 5 MB, 60 MB and 5 GB, one row of 60 MB, text of 60 MB without and with emojis,
.jsonl.gz, .txt.gz and .parquet of 1 GB (the size of the text in them) below `--folder`, one at a time, and deletes
each; of these `--only` the named ones. Every draw runs in a process of its own: the tokenizer is loaded and has
tokenised a few words, then 128 windows of 2048 tokens are drawn. CPU seconds are those of the process and its threads
while it draws; memory is the peak of its anonymous memory above the start, looked at every 50 ms.
"""

import gzip
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from common import options, write

from secateur.data.demo import documents, model_folder

DRAW = """
import json, sys, time
from pathlib import Path
from secateur.data.calibration import calibration_windows
from secateur.data.tokenizer import load_tokenizer
from secateur.system.memory import PeakMemory, anonymous_bytes
tokenizer = load_tokenizer(Path(sys.argv[1]))
calibration_windows(tokenizer, sys.argv[5], samples=1, length=16, seed=0)
start, cpu, wall = anonymous_bytes(), time.process_time(), time.perf_counter()
with PeakMemory() as peak:
    windows = calibration_windows(tokenizer, sys.argv[2], samples=int(sys.argv[3]), length=int(sys.argv[4]), seed=0)
print(json.dumps({
    "cpu_seconds": round(time.process_time() - cpu, 2), "seconds": round(time.perf_counter() - wall, 2),
    "peak_bytes_above_start": peak.bytes - start, "fingerprint": windows.fingerprint(),
}))
"""
FILES = {
    "small.jsonl": 5 * 10**6,
    "middle.jsonl": 60 * 10**6,
    "middle.txt": 60 * 10**6,
    "emojis.txt": 60 * 10**6,
    "row.jsonl": 60 * 10**6,
    "large.jsonl": 5 * 10**9,
    "large.jsonl.gz": 10**9,
    "large.txt.gz": 10**9,
    "large.parquet": 10**9,
}


def texts(size: int) -> Iterator[str]:
    """Documents of about `size` bytes in all: the demo's training text, over and over, each with a number."""
    number, written = 0, 0
    pool = [text for text in documents("training") if len(text) < 2**16]
    while written < size:
        text = f"# {number}\n{pool[number * 7919 % len(pool)]}"
        yield text
        number, written = number + 1, written + len(text.encode())


def write_file(file: Path, size: int) -> None:
    """Write text in the form that the name of the file says."""
    if file.suffix == ".parquet":
        import pyarrow as pa
        from pyarrow import parquet

        with parquet.ParquetWriter(file, pa.schema([("text", pa.string())])) as table:
            some: list[str] = []
            for text in texts(size):
                some.append(text)
                if len(some) == 1000:
                    table.write_table(pa.table({"text": some}))
                    some = []
            table.write_table(pa.table({"text": pa.array(some, pa.string())}))
        return
    documents = ["".join(texts(size))] if file.stem == "row" else texts(size)
    mark = "\N{EVERGREEN TREE}" if file.stem == "emojis" else ""
    with gzip.open(file, "wb", 1) if file.suffix == ".gz" else file.open("wb") as stream:
        for text in documents:
            plain = ".txt" in file.suffixes
            stream.write((mark + text).encode() if plain else json.dumps({"text": text}).encode() + b"\n")


def drawn(file: Path, tokenizer: str, samples: int, length: int) -> dict:
    """What drawing from a file costs, in a process of its own."""
    few = file.with_name("few.txt")
    few.write_text("a few words " * 100)
    command = [sys.executable, "-c", DRAW, tokenizer, str(file), str(samples), str(length), str(few)]
    process = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True, env=dict(os.environ))
    return json.loads(process.stdout)


def main() -> None:
    asked = options(
        __doc__,
        dict(folder=Path("out/bench-text"), tokenizer=str(model_folder()), samples=128, seq_len=2048, json=Path),
        dict(only=",".join(FILES)),
    )
    asked.folder.mkdir(parents=True, exist_ok=True)
    results = {}
    try:
        for name, size in ((name, FILES[name]) for name in asked.only.split(",")):
            file = asked.folder / name
            write_file(file, size)
            cost = drawn(file, asked.tokenizer, asked.samples, asked.seq_len)
            results[name] = {"text_bytes": size, "file_bytes": file.stat().st_size} | cost
            print(name, json.dumps(results[name]), flush=True)
            file.unlink()
    finally:
        shutil.rmtree(asked.folder)
    write(asked.json, command=sys.argv, samples=asked.samples, length=asked.seq_len, files=results)


if __name__ == "__main__":
    main()
