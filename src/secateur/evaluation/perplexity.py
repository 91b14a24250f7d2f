"""How good a model is: perplexity by the papers' protocol, and its distance from the dense model.

Perplexity is exp of the mean next-token loss over windows that do not overlap, every predicted
token weighing the same. Against a dense model, on the same windows: the difference in perplexity
with a 95 % interval from a paired bootstrap over windows, the mean KL divergence of the next-token
distributions (dense ‖ pruned, nats), how often both models predict the same token, and what share
of tokens drawn from the model the dense one would accept in speculative decoding: Σ min(p, q)
(Leviathan et al. 2023, arXiv:2211.17192, theorem 3.5). With `tasks`, also what it answers on
zero-shot tasks.

The model runs block by block over a group of windows at a time, so neither it nor the logits need
to fit in memory at once. Nothing is rounded to the dtype of the checkpoint: on the CPU the
arithmetic is float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from secateur.checkpoints.folder import open_checkpoint
from secateur.data.bos import readable
from secateur.data.reader import Reader
from secateur.data.tokenizer import load_tokenizer
from secateur.data.windows import Windows, evaluation_windows
from secateur.errors import NonFinite, UnsupportedModel
from secateur.evaluation.bits import bits_per_byte, text_bytes
from secateur.evaluation.bos import bos_note
from secateur.evaluation.forward import Forward, mean_loss
from secateur.evaluation.seen import seen_in_words
from secateur.evaluation.tasks.answer import answer_tasks, check_tasks, summarise
from secateur.models.context import check_windows, default_corpus, default_length, reader_of
from secateur.models.divergence import LOGITS_AT_ONCE, divergence
from secateur.models.load import load, resolve
from secateur.models.replay import LanguageModel
from secateur.system.devices import find_devices, find_dtype, forward_dtype
from secateur.system.intervals import Floats, bootstrap_interval
from secateur.system.progress import Progress
from secateur.system.settings import Compute, EvaluationText, Trust, ZeroShot, taken


@dataclass(frozen=True)
class Measured:
    """One model on the evaluation windows, a figure for each: mean loss in nats, and against a
    dense model KL, agreement, acceptance and that model's own loss.
    """

    loss: Floats
    kl: Floats | None = None
    top1_agreement: Floats | None = None
    acceptance: Floats | None = None
    dense_loss: Floats | None = None

    @property
    def perplexity(self) -> float:
        return float(np.exp(self.loss.mean()))

    @property
    def kl_interval(self) -> tuple[float, float] | None:
        """The 95 % interval of the mean KL by a bootstrap over windows."""
        if (kl := self.kl) is None:
            return None
        return bootstrap_interval(lambda chosen: kl[chosen].mean(1), len(kl))

    def beside(self, dense: Measured) -> dict[str, Any]:
        """What is said of a model beside the dense one, by the names of the fields that have it."""
        delta, interval = perplexity_difference(self.loss, dense.loss)
        means = {
            name: None if (figures := getattr(self, name)) is None else float(figures.mean())
            for name in ("kl", "top1_agreement", "acceptance")
        }
        return {"perplexity": self.perplexity, "delta": delta, "delta_interval": interval, **means}


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` returns; None is what was not asked for, or wants a dense model."""

    perplexity: float
    evaluation: dict[str, Any]
    dense_perplexity: float | None = None
    delta: float | None = None
    delta_interval: tuple[float, float] | None = None
    kl: float | None = None
    kl_interval: tuple[float, float] | None = None
    top1_agreement: float | None = None
    acceptance: float | None = None
    tasks: dict[str, dict[str, Any]] | None = None
    bits_per_byte: float | None = None
    dense_bits_per_byte: float | None = None
    note: str = ""
    """What the reader must know besides, in a sentence."""


def evaluate(
    model: str | Path | None = None,
    *,
    dense: str | Path | None = None,
    evaluation: str | None = EvaluationText.evaluation,
    windows: int | None = EvaluationText.windows,
    seq_len: int | None = EvaluationText.seq_len,
    tasks: Sequence[str] = ZeroShot.tasks,
    limit: int | None = ZeroShot.limit,
    device: str = Compute.device,
    dtype: str = Compute.dtype,
    batch_size: int = Compute.batch_size,
    data_dir: str | Path | None = EvaluationText.data_dir,
    bos: str = EvaluationText.bos,
    trust_remote_code: bool = Trust.trust_remote_code,
    revision: str | None = Trust.revision,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure the perplexity of a model, and its distance from `dense` where that is given.

    `model` and `dense` are checkpoint folders or hub names, None the demo model (as `dense`: none).
    `evaluation` names a corpus or files (default: wikitext2, the demo's own text for the demo
    model); all of its windows of `seq_len` tokens count, or the first `windows`. `tasks` names
    zero-shot tasks, to be answered in the dtype that is stored. Raises SecateurError.
    """
    zero_shot, text = taken(ZeroShot, locals()), readable(taken(EvaluationText, locals()))
    progress, local = progress or Progress(), Path(data_dir) if data_dir else None
    first, dtype = find_devices(device)[0], find_dtype(dtype)
    asked = check_tasks(zero_shot, local)
    given: Any = {"trust_remote_code": trust_remote_code}
    trust = Trust(revision=revision, **given)
    folder = open_checkpoint(resolve(model, trust, progress=progress)).folder
    progress.begin(f"loading {model or 'the demo model'}")
    language_model, tokenizer = load(folder, **given), load_tokenizer(folder, **given)
    reader = reader_of(language_model, tokenizer, bos)
    judged = judged_windows(language_model, reader, model, text)
    check_windows(language_model, judged, batch_size)
    seen = seen_in_words(folder, judged.ids)
    pruned = Forward(language_model, judged.ids, first, forward_dtype(dtype, first), batch_size)
    models, reference, answers = [(language_model, reader)], None, None
    if dense is not None:
        folder = open_checkpoint(resolve(dense, Trust(**given), progress=progress)).folder
        reference = pruned.of(load(folder, **given))
        if asked:
            other = replace(reader, tokenizer=load_tokenizer(folder, **given))
            models.append((reference.language_model, other))
        _check_vocabularies(pruned, reference, f"{dense}", f"{model or 'the demo model'}")
    found = _beside(pruned, reference, reader, judged, progress)
    found = replace(found, note=" ".join(filter(None, (found.note, seen))))
    if asked:
        progress.begin("answering tasks")
        run: Any = dict(data_dir=local, batch_size=batch_size, device=first, progress=progress)
        answers = summarise(*(answer_tasks(*each, zero_shot, **run) for each in models))
    progress.end()
    return replace(found, tasks=answers)


def _beside(
    pruned: Forward, dense: Forward | None, reader: Reader, judged: Windows, progress: Progress
) -> Evaluation:
    """What is measured of a model, beside a dense one where there is one."""
    progress.begin("evaluating")
    measured = measure(pruned, dense, progress)
    length, size = judged.ids.shape[1], text_bytes(reader, judged.ids)
    found = Evaluation(
        measured.perplexity,
        judged.fingerprint(),
        bits_per_byte=bits_per_byte(measured.loss, length, size),
        note=bos_note(dense or pruned, reader),
    )
    if measured.dense_loss is None:
        return found
    expected = Measured(measured.dense_loss)
    return replace(
        found,
        dense_perplexity=expected.perplexity,
        dense_bits_per_byte=bits_per_byte(expected.loss, length, size),
        kl_interval=measured.kl_interval,
        **measured.beside(expected),
    )


def judged_windows(
    language_model: LanguageModel, reader: Reader, model: str | Path | None, text: EvaluationText
) -> Windows:
    """The windows that a model is judged on: of `text`, by default wikitext2, of the demo model the
    demo's own.
    """
    return reader.windows(
        text.seq_len or default_length(language_model),
        lambda reading, length: evaluation_windows(
            reading,
            default_corpus(model, text.evaluation, "wikitext2"),
            length=length,
            windows=text.windows,
            data_dir=Path(text.data_dir) if text.data_dir else None,
        ),
    )


def _check_vocabularies(pruned: Forward, dense: Forward, name: str, other: str) -> None:
    if (size := dense.vocabulary) != pruned.vocabulary:
        raise UnsupportedModel(
            f"{name} has a vocabulary of {size} tokens, {other} one of {pruned.vocabulary}. Name "
            "the dense model that the other was made from."
        )


@torch.no_grad()
def measure(model: Forward, dense: Forward | None, progress: Progress) -> Measured:
    """The loss of every window; KL, agreement and acceptance where a dense model is given.

    Raises NonFinite, and UnsupportedModel where the vocabularies differ.
    """
    loss, dense_loss = [], []
    beside: dict[str, list[Tensor]] = {"kl": [], "top1_agreement": [], "acceptance": []}
    step = max(1, LOGITS_AT_ONCE // (model.tokens.shape[1] * model.vocabulary))
    for windows in model.groups():
        hidden = model.hidden(windows)
        reference = dense.hidden(windows) if dense else None
        for start in range(windows.start, windows.stop, step):
            part = slice(start, min(start + step, windows.stop))
            inside = slice(part.start - windows.start, part.stop - windows.start)
            logits = model.logits(part, hidden[..., inside, :, :])
            log_q = logits.log_softmax(-1)
            target = model.tokens[part, 1:, None].to(log_q.device)
            loss.append(mean_loss(log_q, target))
            if dense is not None and reference is not None:
                expected = dense.logits(part, reference[..., inside, :, :])
                if expected.shape != logits.shape:
                    raise UnsupportedModel(
                        f"The dense model has a vocabulary of {expected.shape[-1]}, the other "
                        f"{logits.shape[-1]}."
                    )
                log_p = expected.log_softmax(-1)
                dense_loss.append(mean_loss(log_p, target))
                figures = (  # of each token, in the order of their names
                    divergence(log_p, log_q),
                    log_p.argmax(-1) == log_q.argmax(-1),
                    torch.minimum(log_p, log_q).exp_().sum(-1),
                )
                for several, of_tokens in zip(beside.values(), figures, strict=True):
                    several.append(of_tokens.double().mean(1).cpu())
        progress.advance("evaluating", windows.stop, len(model.tokens))
    losses = _finite(loss)
    if dense is None:
        return Measured(losses)
    found = {name: torch.cat(several).numpy() for name, several in beside.items()}
    return Measured(losses, **found, dense_loss=_finite(dense_loss))


def _finite(loss: list[Tensor]) -> Floats:
    """The losses of all windows. Raises NonFinite."""
    losses = torch.cat(loss).numpy()
    if not np.isfinite(losses).all():
        raise NonFinite(
            f"{int((~np.isfinite(losses)).sum())} of {len(losses)} evaluation windows have a loss "
            "of NaN or Inf. Check the checkpoint with 'secateur inspect', or evaluate with --dtype "
            "float32."
        )
    return losses


def perplexity_difference(loss: Floats, reference: Floats) -> tuple[float, tuple[float, float]]:
    """Perplexity minus the reference's, and its 95 % interval by a paired bootstrap over windows.

    Both models are resampled with the same windows, so what makes a window hard for both cancels.
    """
    interval = bootstrap_interval(
        lambda chosen: np.exp(loss[chosen].mean(1)) - np.exp(reference[chosen].mean(1)), len(loss)
    )
    return float(np.exp(loss.mean()) - np.exp(reference.mean())), interval
