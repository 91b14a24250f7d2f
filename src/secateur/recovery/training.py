"""Steps of training: transformers' `Trainer` with masks, a target, checkpoints that are whole, and
our own progress.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from time import perf_counter
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from secateur.errors import DiskFull, NonFinite, in_one_line
from secateur.recovery.job import Schedule
from secateur.recovery.training_state import TrainingState
from secateur.system.files import disk_errors
from secateur.system.progress import Progress

WARM = 0.05
"""The share of the steps in which the rate rises."""
SQUARES = 0.98
"""How Adam's mean of squares decays: over fifty steps and not a thousand, which is more than many
recoveries have.
"""
_NAMES = {one.name for one in fields(TrainingArguments)}
_CHECKPOINTING = (
    "activation_checkpointing" if "activation_checkpointing" in _NAMES else "gradient_checkpointing"
)


class _Windows(Dataset[dict[str, Tensor]]):
    def __init__(self, ids: Tensor) -> None:
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


class Divergence(torch.autograd.Function):
    """KL(wanted ‖ given) of next-token distributions by their logits `[…, vocabulary]`: the mean
    over rows, nats.

    The gradient is (softmax(given) − softmax(wanted)) / rows. Written out, two tensors of the
    logits' size are held, and nothing is gone through twice.
    """

    @staticmethod
    def forward(ctx: Any, given: Tensor, wanted: Tensor) -> Tensor:
        log_q, log_p = (logits.log_softmax(-1, dtype=torch.float32) for logits in (given, wanted))
        p, rows = log_p.exp(), given[..., 0].numel()
        ctx.save_for_backward(log_q, p)
        ctx.rows, ctx.dtype = rows, given.dtype
        return torch.tensordot(p, log_p.sub_(log_q), p.dim()) / rows

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        log_q, p = ctx.saved_tensors
        return log_q.exp().sub_(p).mul_(gradient / ctx.rows).to(ctx.dtype), None


class _Distilling(Trainer):
    """A Trainer whose loss is how far a model is from a dense one, where there is one; NaN ends it.

    That is the divergence of the next tokens, and where both have as many blocks the relative error
    of what leaves each (SquareHead, Kurtic et al. 2023, arXiv:2310.06927, section 2; here token by
    token, as tokens of massive norm would hide all others).
    """

    dense: nn.Module | None = None
    halfway: TrainingState

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], *args: Any, **options: Any
    ) -> Any:
        if self.dense is None:
            return super().compute_loss(model, inputs, *args, **options)
        asked: dict[str, Any] = {
            "input_ids": inputs["input_ids"],
            "use_cache": False,
            "output_hidden_states": True,
        }
        given = model(**asked)
        with (
            torch.no_grad(),
            torch.autocast(self.args.device.type, torch.bfloat16, enabled=self.args.bf16),
        ):
            wanted = self.dense(**asked)
        # Batches are of one size, so their mean is that of all tokens.
        loss: Any = Divergence.apply(given.logits[:, :-1], wanted.logits[:, :-1])
        loss = loss + _apart(given.hidden_states or (), wanted.hidden_states or ())
        return (loss, None) if options.get("return_outputs") else loss

    def _save_checkpoint(self, *args: Any, **options: Any) -> None:
        try:
            with disk_errors(self.halfway.folder):
                super()._save_checkpoint(*args, **options)
        except (
            RuntimeError,
            SafetensorError,
        ) as error:  # what torch and safetensors make of a full disk
            raise DiskFull(
                f"A checkpoint could not be written to {self.halfway.folder} ({in_one_line(error, 120)}). The last "
                "whole one is kept: make room, and the same command goes on after it."
            ) from error

    def training_step(self, *args: Any, **options: Any) -> Tensor:
        loss = super().training_step(*args, **options)
        self.halfway.ranks.together(lambda: self._refuse(loss))
        return loss

    def _refuse(self, loss: Tensor) -> None:
        if not loss.isfinite():
            last = self.halfway.last()
            raise NonFinite(
                f"The loss became {loss.item()} at step {self.state.global_step + 1}. "
                + (f"The last checkpoint is kept in {last}. " if last else "")
                + "Try a lower --rate, with --restart or another --out."
            )


def _apart(given: Sequence[Tensor], wanted: Sequence[Tensor]) -> Tensor | float:
    """The mean over blocks and tokens of ‖given − wanted‖² / ‖wanted‖²; 0 where blocks are gone.

    The first hidden states are those that enter the first block, `[windows, tokens, hidden]` each.
    """
    if len(given) != len(wanted):
        return 0.0
    errors = [
        (
            (one.float() - two.float()).square().sum(-1)
            / two.float().square().sum(-1).clamp_min(1e-30)
        ).mean()
        for one, two in zip(given[1:], wanted[1:], strict=True)
    ]
    return sum(errors, torch.zeros(())) / max(len(errors), 1)


class _Watching(TrainerCallback):
    """Progress, an end that was asked for, and the mark on a checkpoint that is whole."""

    def __init__(
        self, progress: Progress, stopping: Callable[[], bool], tokens: int, halfway: TrainingState
    ) -> None:
        self.progress, self.stopping, self.tokens, self.halfway = (
            progress,
            stopping,
            tokens,
            halfway,
        )
        self.loss, self.started, self.first = "", perf_counter(), None

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Mapping[str, float] | None = None, **_: Any
    ) -> None:
        if logs and "loss" in logs:
            self.loss = f"loss {logs['loss']:.4f}"

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        self.first = state.global_step - 1 if self.first is None else self.first
        rate = (
            (state.global_step - self.first)
            * self.tokens
            / max(perf_counter() - self.started, 1e-9)
        )
        self.progress.advance(
            f"{self.loss} {rate:,.0f} tokens/s".strip(), state.global_step, state.max_steps
        )
        if self.halfway.ranks.same(self.stopping) and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True
        return control

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.halfway.mark(state.global_step)


def train(
    model: Any,
    ids: Tensor,
    schedule: Schedule,
    halfway: TrainingState,
    *,
    dense: nn.Module | None,
    device: torch.device,
    progress: Progress,
    stopping: Callable[[], bool],
) -> list[tuple[int, float]]:
    """Train `model` in place on windows `[windows, length]`; the loss by step, to where it got.

    AdamW without decay, warm for the first steps, then down to zero as a cosine; gradients are cut
    at norm 1. What was trained before is taken up. With `dense`, the loss is KL(dense ‖ model).
    Raises NonFinite.
    """
    arguments = TrainingArguments(
        output_dir=str(halfway.folder),
        max_steps=schedule.steps,
        per_device_train_batch_size=schedule.batch_size,
        gradient_accumulation_steps=schedule.accumulate,
        learning_rate=schedule.rate,
        weight_decay=0.0,
        lr_scheduler_type="cosine",
        warmup_steps=int(WARM * schedule.steps),
        max_grad_norm=1.0,
        save_strategy="steps",
        save_steps=schedule.save_every,
        save_total_limit=2,
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to=[],
        disable_tqdm=True,
        seed=schedule.seed,
        data_seed=schedule.seed,
        use_cpu=device.type == "cpu",
        bf16=schedule.dtype == "bfloat16",
        adam_beta2=SQUARES,
        ddp_backend="gloo" if halfway.ranks.size > 1 and device.type == "cpu" else None,
        dataloader_pin_memory=device.type == "cuda",
        remove_unused_columns=False,
        **cast(Any, {_CHECKPOINTING: True} if schedule.checkpointing else {}),
    )
    arguments._n_gpu = min(
        arguments.n_gpu, 1
    )  # several in one process would share a batch out and count it otherwise
    tokens = schedule.windows // schedule.steps * ids.shape[1]
    trainer = _Distilling(
        model=model,
        args=arguments,
        train_dataset=_Windows(ids),
        callbacks=[_Watching(progress, stopping, tokens, halfway)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.halfway = halfway
    if dense is not None:
        trainer.model_accepts_loss_kwargs = (
            False  # the Trainer divides by the batches of a step then
        )
        trainer.dense = dense.to(trainer.args.device).eval().requires_grad_(False)
    trainer.train(resume_from_checkpoint=halfway.ranks.same(halfway.last))
    return [
        (int(entry["step"]), float(entry["loss"]))
        for entry in trainer.state.log_history
        if "loss" in entry
    ]
