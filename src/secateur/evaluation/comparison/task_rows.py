"""The rows of a comparison on zero-shot tasks: each checkpoint answers the same items as the dense
model.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path

from secateur.checkpoints.journal import Finished
from secateur.evaluation.comparison.row_store import TASKS, file_name
from secateur.evaluation.comparison.rows import ComparisonContext
from secateur.evaluation.results.schema import Row
from secateur.evaluation.tasks.answer import answer_tasks, summarise
from secateur.evaluation.tasks.items import find_items
from secateur.evaluation.tasks.lm_eval import Answers
from secateur.models.load import load
from secateur.system.files import file_sha256


@dataclass(frozen=True)
class FinishedTask(Finished):
    """What the file of a row's answers on a task holds."""

    answers: Answers


def answer_rows(context: ComparisonContext, rows: Sequence[Row]) -> None:
    """Fill in `tasks` of the dense row and of every row with a checkpoint.

    What a row has answered is kept in `out/tasks`, so that the same command again asks only what is
    missing. Raises what `answer_tasks` raises.
    """
    if not context.asked.zero_shot.tasks:
        return
    (context.out / TASKS).mkdir(exist_ok=True)
    reference: dict[str, Answers] = {}
    for row in rows:
        if row.kind == "dense" or row.checkpoint:
            answers = _answers(context, row)
            reference = reference or answers
            row.tasks = summarise(answers, reference)


def _answers(context: ComparisonContext, row: Row) -> dict[str, Answers]:
    """What a row answers on each task: kept from a run before, or asked now."""
    asked, folder, model = context.asked, context.source.folder, None
    trust, batch_size = asked.trust.trust_remote_code, asked.resources.batch_size
    answers: dict[str, Answers] = {}
    for name in asked.zero_shot.tasks:
        items = None if asked.data_dir is None else file_sha256(find_items(name, asked.data_dir))
        conditions = {
            "limit": asked.zero_shot.limit,
            "batch_size": batch_size,
            "items": items,
            "lm_eval": version("lm_eval"),
            # what tells these weights from others
            "loss": sha256(json.dumps(row.loss).encode()).hexdigest(),
            **({} if context.reader.bos == "stream" else {"bos": context.reader.bos}),
        }
        file = context.out / TASKS / f"{file_name(row.name)}-{name}.json"
        if (before := _kept(file)) and before.conditions == conditions:
            answers[name] = before.answers
            continue
        asked.progress.begin(f"{row.name} answers {name}")
        weights = folder if row.checkpoint is None else context.out / row.checkpoint
        model = model or load(weights, trust_remote_code=trust)
        answers |= answer_tasks(
            model,
            context.reader,
            replace(asked.zero_shot, tasks=[name]),
            data_dir=asked.data_dir,
            batch_size=batch_size,
            device=asked.device,
            progress=asked.progress,
        )
        FinishedTask(conditions, answers[name]).write(file)
    return answers


def _kept(file: Path) -> FinishedTask | None:
    try:
        return FinishedTask.read(file)
    except (OSError, ValueError):
        return None
