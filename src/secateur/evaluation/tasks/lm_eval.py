"""One task of EleutherAI's lm-eval on one loaded model: the only file that knows how lm-eval does
it.

lm-eval is an extra and is imported inside functions. Its task configurations are used as they are,
through its public interface: the items may come from a file, and LAMBADA goes without its
perplexity. Its wrapper around a model is used as well, so that what this gives equals what its own
command gives on the same checkpoint and batch size. It logs, warns and shows bars; `quiet` keeps
that away and puts everything back.
"""

import logging
import math
import os
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import ConfigDict, PlainValidator
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from secateur.data.reader import Reader
from secateur.errors import BadText, NonFinite, SecateurError, UnsupportedModel, in_one_line
from secateur.evaluation.tasks.items import TASKS, Row, find_items, read_items
from secateur.models.context import vocabulary_size
from secateur.system.intervals import Floats
from secateur.system.progress import Progress
from secateur.system.typed import Number, read_as

# What lm-eval and datasets raise where the hub cannot be reached, and for rows that they cannot
# make prompts of.
HUB_ERRORS = (OSError, ValueError, RuntimeError)
ROW_ERRORS = (*HUB_ERRORS, LookupError, TypeError, AttributeError, SyntaxError, AssertionError)
AS_LIST = PlainValidator(lambda value: np.asarray(read_as(list[Number], value), np.float64))
"""Of an array that is a list in JSON."""


@dataclass(frozen=True)
class Answers:
    """What one model answered on one task: 1 for every item it got right, else 0; lm-eval's
    accuracy and its standard error (None of a single item). `norm` is by log-likelihood per byte,
    None where lm-eval does not give it.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    right: Annotated[Floats, AS_LIST]
    accuracy: float
    stderr: float | None
    right_norm: Annotated[Floats, AS_LIST] | None = None
    accuracy_norm: float | None = None


def answer(model: Any, name: str, data_dir: Path | None, limit: int | None) -> Answers:
    """What a wrapped model answers on the items of a task, or on the first `limit` of them."""
    model.task, known_as = name, TASKS[name].known_as
    tasks = {"tasks": {known_as: load_task(name, data_dir)}}
    results = import_module("lm_eval").evaluate(lm=model, task_dict=tasks, limit=limit)
    totals, samples = results["results"][known_as], results["samples"][known_as]
    stderr = totals["acc_stderr,none"]

    def right(metric: str) -> Floats:
        return np.array([sample[metric] for sample in samples], np.float64)

    normed = "acc_norm,none" in totals
    return Answers(
        right("acc"),
        float(totals["acc,none"]),
        None if stderr == "N/A" else float(stderr),
        right("acc_norm") if normed else None,
        float(totals["acc_norm,none"]) if normed else None,
    )


def load_task(name: str, data_dir: Path | None) -> Any:
    """lm-eval's task as its own command loads it, with items from `data_dir` where that is given.
    Raises BadText for rows that lm-eval cannot read, SecateurError where the hub cannot be
    reached.
    """
    task, module = TASKS[name], import_module("lm_eval.tasks")
    change: Row = {"task": task.known_as}
    if name == "lambada":  # without perplexity, whose standard error takes 100,000 resamples
        change["metric_list"] = [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]
    file = find_items(name, data_dir) if data_dir else None
    if file is not None:
        change["custom_dataset"] = _in_memory(read_items(file, task.form))
    # its one folder: the index of all takes seconds
    place = Path(str(module.__file__)).parent / task.folder
    manager = module.TaskManager(include_defaults=False, include_path=str(place))
    try:
        loaded: Any = manager.load({"group": "secateur", "task": [change]})["tasks"][task.known_as]
    except ROW_ERRORS as error:
        if file is not None:
            raise BadText(
                f"lm-eval cannot take the rows of {file}: {in_one_line(error)}."
            ) from error
        if not isinstance(error, HUB_ERRORS):
            raise
        raise SecateurError(
            f"The items of {name} could not be fetched ({in_one_line(error)}). Give a local copy "
            "with --data-dir."
        ) from error
    loaded.set_config(key="num_fewshot", value=0)
    loaded.set_fewshot_seed(seed=0)
    return loaded


def _in_memory(rows: list[Row]) -> Callable[..., Any]:
    """What lm-eval calls for a data set of one's own; the cache of `datasets` gets nothing."""

    def splits(**_: Any) -> dict[str, Any]:
        from datasets import Dataset

        return dict.fromkeys(("train", "validation", "test"), Dataset.from_list(rows))

    return splits


def wrapped(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | Reader,
    batch_size: int,
    progress: Progress,
) -> Any:
    """lm-eval's own wrapper around a loaded model, which shows how far it is and refuses what
    cannot be scored. Where a `Reader` begins windows with BOS, so do its requests; where it takes
    BOS out, they have none.

    Raises UnsupportedModel for a tokenizer that lm-eval cannot use.
    """
    base: Any = import_module("lm_eval.models.huggingface").HFLM
    bos = tokenizer.bos if isinstance(tokenizer, Reader) else "stream"
    tokenizer = tokenizer.tokenizer if isinstance(tokenizer, Reader) else tokenizer
    where, first = tokenizer.name_or_path, tokenizer.bos_token_id
    if not isinstance(tokenizer, (PreTrainedTokenizer, PreTrainedTokenizerFast)):
        raise UnsupportedModel(
            f"The tokenizer of {where} is a {type(tokenizer).__name__}, which lm-eval cannot use."
        )
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise UnsupportedModel(
            f"The tokenizer of {where} has no token that begins or ends a text; lm-eval needs one."
        )
    vocabulary = vocabulary_size(model)

    class Wrapper(base):
        task, rows, total = "", 0, 0

        def tok_encode(self, *args: Any, **options: Any) -> list[int]:
            return _begun(super().tok_encode(*args, **options), bos, first)

        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().loglikelihood(requests, disable_tqdm=True)

        def _loglikelihood_tokens(self, requests: Any, *args: Any, **options: Any) -> Any:
            _refuse(requests, self.task, self.max_length, vocabulary)
            self.rows, self.total = 0, len(requests)
            likelihoods = super()._loglikelihood_tokens(requests, *args, **options)
            progress.advance(self.task, self.total, self.total)
            if odd := sum(math.isnan(likelihood) for likelihood, _ in likelihoods):
                raise NonFinite(
                    f"{odd} of {len(likelihoods)} log-likelihoods on {self.task} are NaN. Check "
                    "the checkpoint with 'secateur inspect'."
                )
            return likelihoods

        def _model_call(self, inps: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
            self.rows += len(inps)  # fewer than requests: answers of one token share a forward
            progress.advance(self.task, min(self.rows, self.total - 1), self.total)
            return super()._model_call(inps, *args, **options)

    # the wrapper gives the tokenizer a padding token where it has none
    return Wrapper(
        pretrained=model, tokenizer=deepcopy(tokenizer), backend="causal", batch_size=batch_size
    )


def _begun(ids: list[int], bos: str, first: Any) -> list[int]:
    """The tokens of a request, with BOS before them or without, as windows have it."""
    if bos == "stream" or first is None:
        return ids
    rest = ids[1:] if ids[:1] == [first] else ids
    return [first, *rest] if bos == "each-window" else rest


def _refuse(requests: Any, task: str, context: int, vocabulary: int) -> None:
    """Raise UnsupportedModel for a request that cannot be scored."""
    for _, before, after in requests:
        if not before or not 0 < len(after) <= context:
            raise UnsupportedModel(
                f"{task} has an answer of {len(after)} tokens after {len(before)}; at least 1 "
                f"after 1 and at most the model's context of {context} are wanted. Leave this task "
                "out."
            )
        if max(*before, *after) >= vocabulary:
            raise UnsupportedModel(
                f"The tokenizer gives token {max(*before, *after)}, the model has {vocabulary}: "
                "they do not belong together."
            )


@contextmanager
def quiet() -> Iterator[None]:
    """Without lm-eval's log, bars and warnings, and with everything as it was afterwards."""
    import datasets

    loggers = [logging.getLogger(name) for name in ("lm_eval", "transformers", "datasets")]
    levels, environment = [one.level for one in loggers], set(os.environ)
    bars, drawn = datasets.are_progress_bars_disabled(), random.getstate()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        building: Any = import_module("lm_eval.api.task")
        bar = getattr(building, "tqdm", None)
        try:
            for logger in loggers:
                logger.setLevel(logging.CRITICAL)
            datasets.disable_progress_bars()
            building.tqdm = lambda items, **_: items  # the one bar that no option turns off
            yield
        finally:
            building.tqdm = bar
            if not bars:
                datasets.enable_progress_bars()
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
            for name in set(os.environ) - environment:  # lm-eval sets one when it is imported
                del os.environ[name]
            random.setstate(drawn)  # it draws names for tasks, without need
