"""The rows of a comparison on zero-shot tasks: each checkpoint answers the same items as the dense
model.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import torch

from secateur.data.windows import load_tokenizer
from secateur.evaluation.comparison.row_store import file_name
from secateur.evaluation.results.schema import Row
from secateur.evaluation.tasks.answer import answer_tasks, check_tasks, summarise
from secateur.evaluation.tasks.items import find_items
from secateur.evaluation.tasks.lm_eval import Answers
from secateur.models.load import load
from secateur.system.files import file_sha256, write_whole
from secateur.system.json_files import fits, read_json
from secateur.system.progress import Progress

FOLDER = "tasks"
"""Where the answers of a comparison lie, a file a row."""
_LISTS = ("right", "right_norm")


def answer_rows(
    rows: Sequence[Row],
    dense: Path,
    out: Path,
    names: Sequence[str],
    *,
    limit: int | None,
    data_dir: Path | None,
    batch_size: int,
    device: torch.device,
    trust_remote_code: bool,
    progress: Progress,
) -> None:
    """Fill in `tasks` of the dense row and of every row with a checkpoint that loads as it is, so
    not of packed ones.

    What a row has answered is kept in `out/tasks`, so that the same command again asks only what is
    missing. Raises what `check_tasks` and `answer_tasks` raise.
    """
    names = check_tasks(names, data_dir, limit)
    (out / FOLDER).mkdir(exist_ok=True)
    reference: dict[str, Answers] = {}
    for row in rows:
        if row.kind != "dense" and (row.checkpoint is None or row.values != "as stored"):
            continue
        folder = dense if row.checkpoint is None else out / row.checkpoint
        found: dict[str, Answers] = {}
        model = None
        for name in names:
            items = None if data_dir is None else file_sha256(find_items(name, data_dir))
            conditions = {
                "limit": limit,
                "batch_size": batch_size,
                "items": items,
                "lm_eval": version("lm_eval"),
                "loss": sha256(
                    json.dumps(row.loss).encode()
                ).hexdigest(),  # what tells these weights from others
            }
            file = out / FOLDER / f"{file_name(row.name)}-{name}.json"
            held = _kept(file, conditions)
            if held is None:
                progress.begin(f"{row.name} answers {name}")
                model = model or load(folder, trust_remote_code=trust_remote_code)
                tokenizer = load_tokenizer(dense, trust_remote_code=trust_remote_code)
                (held,) = answer_tasks(
                    model,
                    tokenizer,
                    [name],
                    data_dir=data_dir,
                    limit=limit,
                    batch_size=batch_size,
                    device=device,
                    progress=progress,
                ).values()
                write_whole(
                    file,
                    json.dumps(
                        {"conditions": conditions, "answers": _plain(held)}, allow_nan=False
                    ),
                )
            found[name] = held
        reference = reference or found
        row.tasks = summarise(found, reference)


def _plain(answers: Answers) -> dict[str, Any]:
    values = {one.name: getattr(answers, one.name) for one in fields(answers)}
    return {
        name: value.tolist() if isinstance(value, np.ndarray) else value
        for name, value in values.items()
    }


def _kept(file: Path, conditions: dict[str, Any]) -> Answers | None:
    """The answers in a file, where there are any and they were given under these conditions."""
    try:
        held = read_json(file, finite=True)
    except (OSError, ValueError):
        return None
    if (
        not isinstance(held, dict)
        or held.get("conditions") != conditions
        or not isinstance(held.get("answers"), dict)
    ):
        return None
    answers, hints = held["answers"], get_type_hints(Answers)
    hints |= {"right": list[float], "right_norm": list[float] | None}
    if answers.keys() != hints.keys() or not all(
        fits(answers[name], hint) for name, hint in hints.items()
    ):
        return None
    lists = {
        name: None if answers[name] is None else np.asarray(answers[name], float) for name in _LISTS
    }
    return Answers(**{**answers, **lists})
