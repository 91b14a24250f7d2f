"""What a model answers on zero-shot tasks, and how far that is from the dense model.

Prompts, scoring and standard errors are those of EleutherAI's lm-eval (`lm_eval`), so that the
numbers can stand beside published ones. What is added is what a comparison needs: which items were
right, and from that the difference from the dense model with a 95 % interval by a paired bootstrap
over items. One task runs at a time, so that a result does not depend on which others were asked
for. Models run in the dtype that is stored, as in lm-eval's own command.
"""

import math
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from secateur.data.reader import Reader
from secateur.errors import NotEnoughText, UnknownName, UnsupportedModel
from secateur.evaluation.tasks.items import PAPERS, TASKS, find_items, read_items
from secateur.evaluation.tasks.lm_eval import Answers, answer, quiet, wrapped
from secateur.models.generate import on_device
from secateur.models.replay import LanguageModel
from secateur.system.intervals import percentile_interval, resampled_means
from secateur.system.progress import Progress
from secateur.system.settings import ZeroShot

PACKAGES = {"lm_eval": "lm-eval", "accelerate": "accelerate"}


def check_tasks(zero_shot: ZeroShot, data_dir: Path | None = None) -> list[str]:
    """The tasks that are named, each once, after looking at all that can be wrong before a model
    runs.

    Raises UnknownName, UnsupportedModel where lm-eval is not installed, NotEnoughText, BadText for
    local files.
    """
    groups = (PAPERS if name == "papers" else [name] for name in zero_shot.tasks)
    names = list(dict.fromkeys(name for group in groups for name in group))
    for name in names:
        if name not in TASKS:
            raise UnknownName("task", name, [*TASKS, "papers"])
    if zero_shot.limit is not None and zero_shot.limit < 1:
        raise NotEnoughText(f"A task needs at least one item; found --limit {zero_shot.limit}.")
    absent = [package for module, package in PACKAGES.items() if find_spec(module) is None]
    if names and absent:
        raise UnsupportedModel(
            f"Tasks need the package {' and '.join(absent)}. Install it: pip install "
            "'secateur[tasks]'."
        )
    if data_dir is not None:
        for name in names:
            read_items(find_items(name, data_dir), TASKS[name].form)
    return names


def answer_tasks(
    language_model: LanguageModel,
    tokenizer: PreTrainedTokenizerBase | Reader,
    zero_shot: ZeroShot,
    *,
    data_dir: Path | None = None,
    batch_size: int = 8,
    device: torch.device = torch.device("cpu"),  # noqa: B008 — immutable
    progress: Progress | None = None,
) -> dict[str, Answers]:
    """What a model answers on tasks, on all items or the first `limit` of each, by the names of
    `TASKS`.

    Items come from `data_dir`, or from the hub. The model runs in the dtype in which it is stored.
    Raises what `check_tasks` raises; NonFinite; UnsupportedModel where model, tokenizer and items
    do not fit together.
    """
    names = check_tasks(zero_shot, data_dir)
    with quiet():
        model = wrapped(
            on_device(language_model.model, device), tokenizer, batch_size, progress or Progress()
        )
        return {name: answer(model, name, data_dir, zero_shot.limit) for name in names}


def summarise(
    answered: dict[str, Answers], dense: dict[str, Answers] | None = None
) -> dict[str, dict[str, Any]]:
    """A row's `tasks`: for every task its items, accuracy and standard error, and where `dense` is
    given the difference from it with its 95 % interval; under `mean` the same of the plain mean
    over tasks.

    The differences of an item, 1, 0 or -1, are resampled with replacement, 10,000 times: pairs stay
    together, so what makes an item hard for both models cancels. Percentile interval (Efron &
    Tibshirani 1993, ch. 13). The mean resamples the items within each task; its standard error is
    sqrt(Σ se²) / tasks.
    """
    summary: dict[str, dict[str, Any]] = {}
    deltas, resampled = [], []
    for name, answers in answered.items():
        summary[name] = {
            "items": len(answers.right),
            "accuracy": answers.accuracy,
            "stderr": answers.stderr,
            "accuracy_norm": answers.accuracy_norm,
            "delta": None,
            "delta_interval": None,
        }
        if dense is not None:
            assert len(dense[name].right) == len(answers.right)
            difference = answers.right - dense[name].right
            deltas.append(float(difference.mean()))
            resampled.append(resampled_means(difference, name))
            summary[name] |= {
                "delta": deltas[-1],
                "delta_interval": list(percentile_interval(resampled[-1])),
            }
    count = len(answered)
    errors = [answers.stderr for answers in answered.values() if answers.stderr is not None]
    mean: dict[str, Any] = {
        "tasks": count,
        "accuracy": float(np.mean([answers.accuracy for answers in answered.values()])),
        "stderr": math.hypot(*errors) / count if len(errors) == count else None,
        "delta": float(np.mean(deltas)) if deltas else None,
        "delta_interval": list(percentile_interval(np.mean(resampled, 0))) if resampled else None,
    }
    return {**summary, "mean": mean}


def lines(summary: dict[str, dict[str, Any]]) -> Iterator[str]:
    """A summary as lines for a terminal, in percent."""
    for name, answers in summary.items():
        count = f"{answers['items']} items" if "items" in answers else f"{answers['tasks']} tasks"
        error = "" if answers["stderr"] is None else f" ± {100 * answers['stderr']:.2f}"
        line = f"{name:<14}{count:>12}  accuracy {100 * answers['accuracy']:.2f}{error} %"
        if answers["delta"] is not None:
            low, high = answers["delta_interval"]
            line += (
                f", difference {100 * answers['delta']:+.2f} "
                f"(95 % interval {100 * low:+.2f} to {100 * high:+.2f})"
            )
        yield line
