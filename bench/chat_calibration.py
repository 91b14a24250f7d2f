"""What a real chat model loses on chat and on text, by what it was calibrated on.

    python bench/chat_calibration.py --data-dir DIR --json bench/results/chat-calibration.json

SmolLM2-135M-Instruct (bench/real.py fetches it) is pruned with one method and one pattern, calibrated on C4, on chat,
on half of each, and on its own answers to the questions of the chat; chat once more with statistics on the assistant's
tokens alone. Each result is judged on WikiText-2 and on chat that nothing was calibrated on: perplexity, and KL against
the dense model with a 95 % interval from a bootstrap over windows. The chat is made of PIQA and ARC-easy of the
folder's tasks: the question, and the right answer as the assistant's; the last fifth is held out. Goes on where it was
killed.
"""

from __future__ import annotations

import json
import lzma
from collections.abc import Iterator
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from common import options, write
from real import model_file

import secateur
from secateur.system.json_files import read_json, write_json
from secateur.system.progress import Progress

TASKS = ("piqa", "arc_easy")


def conversations(data_dir: Path) -> Iterator[dict[str, Any]]:
    """Question and right answer of every item, the tasks in turn."""
    each = []
    for task in TASKS:
        with lzma.open(data_dir / "tasks" / f"{task}.jsonl.xz", "rt", encoding="utf-8") as lines:
            each.append([json.loads(line) for line in lines])
    for item in filter(None, chain.from_iterable(zip_longest(*each))):
        question = item["context"].removeprefix("Question: ").removesuffix("\nAnswer:")
        answer = item["continuations"][item["gold"]].strip()
        yield {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def write_rows(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def calibrations(folder: Path) -> dict[str, dict[str, Any]]:
    """By the name of a row: the options of its calibration."""
    chat, prompts = folder / "chat.jsonl", folder / "prompts.jsonl"
    return {
        "C4": dict(calibration="c4"),
        "chat": dict(calibration=str(chat)),
        "chat, the assistant's tokens": dict(calibration=str(chat), calibration_on="assistant"),
        "half C4, half chat": dict(calibration=f"c4:0.5,{chat}:0.5"),
        "its own answers": dict(calibration=f"self:{prompts}", batch_size=32),  # answers: twice as quick as 8 at once
    }


def main() -> None:
    given = options(
        __doc__,
        dict(
            data_dir=Path("../shared/data"), folder=Path("out/real"), out=Path("out/chat-calibration"), json=Path,
            method="sparsegpt", pattern="50%", samples=64, seq_len=512, windows=48,
        ),
    )  # fmt: skip
    model, out = model_file(given.folder), given.out
    out.mkdir(parents=True, exist_ok=True)
    rows = list(conversations(given.data_dir))
    border = len(rows) * 4 // 5
    write_rows(out / "chat.jsonl", rows[:border])
    write_rows(out / "heldout.jsonl", rows[border:])
    write_rows(out / "prompts.jsonl", [{"messages": row["messages"][:1]} for row in rows[:border]])
    results: dict[str, Any] = {}
    for name, text in calibrations(out).items():
        place = out / name.replace(" ", "-").replace(",", "").replace("'", "")
        done = place.with_suffix(".json")
        if not done.is_file():
            settings: Any = dict(seq_len=given.seq_len, data_dir=given.data_dir, progress=Progress())
            if not place.is_dir():  # a result has its name when it is whole
                recipe: Any = dict(method=given.method, pattern=given.pattern, samples=given.samples)
                secateur.prune(model, out=place, **recipe, **text, **settings)
            measured: dict[str, Any] = {"calibration": read_json(place / "pruning.json")["calibration"]}
            for evaluation in ("wikitext2", str(out / "heldout.jsonl")):
                found = secateur.evaluate(place, dense=model, evaluation=evaluation, windows=given.windows, **settings)
                measured[Path(evaluation).stem] = dict(
                    dense=found.dense_perplexity, perplexity=found.perplexity, interval=found.delta_interval,
                    kl=found.kl, kl_interval=found.kl_interval, top1=found.top1_agreement,
                )  # fmt: skip
            write_json(done, measured)
        results[name] = read_json(done)
    print(f"{'calibrated on':32} {'WikiText-2':>10} {'KL':>22} {'chat':>8} {'KL':>22}")
    for name, one in results.items():
        cells = []
        for text in ("wikitext2", "heldout"):
            low, high = one[text]["kl_interval"]
            cells.append(f"{one[text]['perplexity']:10.2f} {one[text]['kl']:.4f} [{low:.4f}, {high:.4f}]")
        print(f"{name:32} {' '.join(cells)}")
    write(given.json, results=results)


if __name__ == "__main__":
    main()
