"""The rows of a comparison on zero-shot tasks: each checkpoint answers the same items as the dense
model.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from secateur.data.windows import load_tokenizer
from secateur.evaluation.comparison.row_store import file_name
from secateur.evaluation.comparison.rows import ComparisonContext
from secateur.evaluation.results.schema import Row
from secateur.evaluation.tasks.answer import answer_tasks, check_tasks, summarise
from secateur.evaluation.tasks.items import find_items
from secateur.evaluation.tasks.lm_eval import Answers
from secateur.models.load import load
from secateur.system.files import file_sha256, write_whole
from secateur.system.json_files import read_json
from secateur.system.settings import ZeroShot
from secateur.system.typed import read_as

FOLDER = "tasks"
"""Where the answers of a comparison lie, a file a row."""


def answer_rows(
    context: ComparisonContext, rows: Sequence[Row], zero_shot: ZeroShot, data_dir: Path | None
) -> None:
    """Fill in `tasks` of the dense row and of every row with a checkpoint that loads as it is, so
    not of packed ones.

    What a row has answered is kept in `out/tasks`, so that the same command again asks only what is
    missing. Raises what `check_tasks` and `answer_tasks` raise.
    """
    names = check_tasks(zero_shot, data_dir)
    (context.out / FOLDER).mkdir(exist_ok=True)
    reference: dict[str, Answers] = {}
    for row in rows:
        if row.kind != "dense" and (row.checkpoint is None or row.values != "as stored"):
            continue
        answers = _answers(context, row, replace(zero_shot, tasks=names), data_dir)
        reference = reference or answers
        row.tasks = summarise(answers, reference)


def _answers(
    context: ComparisonContext, row: Row, zero_shot: ZeroShot, data_dir: Path | None
) -> dict[str, Answers]:
    """What a row answers on each task: kept from a run before, or asked now."""
    folder = context.source.folder
    model, answers = None, dict[str, Answers]()
    for name in zero_shot.tasks:
        conditions = {
            "limit": zero_shot.limit,
            "batch_size": context.compute.batch_size,
            "items": None if data_dir is None else file_sha256(find_items(name, data_dir)),
            "lm_eval": version("lm_eval"),
            # what tells these weights from others
            "loss": sha256(json.dumps(row.loss).encode()).hexdigest(),
        }
        file = context.out / FOLDER / f"{file_name(row.name)}-{name}.json"
        if (before := _kept(file, conditions)) is not None:
            answers[name] = before
            continue
        context.progress.begin(f"{row.name} answers {name}")
        trust = context.trust.trust_remote_code
        model = model or load(
            folder if row.checkpoint is None else context.out / row.checkpoint,
            trust_remote_code=trust,
        )
        answers |= answer_tasks(
            model,
            load_tokenizer(folder, trust_remote_code=trust),
            replace(zero_shot, tasks=[name]),
            data_dir=data_dir,
            batch_size=context.compute.batch_size,
            device=context.dense.device,
            progress=context.progress,
        )
        kept = asdict(Kept(conditions, answers[name]))
        write_whole(file, json.dumps(kept, allow_nan=False, default=np.ndarray.tolist))
    return answers


@dataclass(frozen=True)
class Kept:
    """What the file of a row's answers on a task holds."""

    conditions: dict[str, Any]
    answers: Answers


def _kept(file: Path, conditions: dict[str, Any]) -> Answers | None:
    """The answers in a file, where there are any and they were given under these conditions."""
    try:
        kept = read_as(Kept, read_json(file, finite=True))
    except (OSError, ValueError):
        return None
    return kept.answers if kept.conditions == conditions else None
