"""Training: transformers' `Trainer` with a target, checkpoints that are whole, our progress."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from time import perf_counter
from typing import Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from secateur.errors import DiskFull, NonFinite, in_one_line
from secateur.models.divergence import Divergence
from secateur.recovery.job import Job
from secateur.recovery.training_state import TrainingState
from secateur.system.files import disk_errors

WARM = 0.05
"""The share of the steps in which the rate rises."""
SQUARES = 0.98
"""How Adam's mean of squares decays: over 50 steps, not 1000, which many recoveries do not have."""
TOKENS_AT_ONCE = 1024
"""About how many tokens a processor runs forward and back at once; more only take more memory."""
_NAMES = {one.name for one in fields(TrainingArguments)}
_CHECKPOINTING = (
    "activation_checkpointing" if "activation_checkpointing" in _NAMES else "gradient_checkpointing"
)


class _Distilling(Trainer):
    """A Trainer whose loss is how far a model is from a dense one, where there is one; NaN ends it.

    That is the divergence of the next tokens, and where both have as many blocks the relative error
    of what leaves each (SquareHead, Kurtic et al. 2023, arXiv:2310.06927, section 2; here token by
    token, as tokens of massive norm would hide all others).
    """

    dense: nn.Module | None = None
    training_state: TrainingState

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
            with disk_errors(self.training_state.folder):
                super()._save_checkpoint(*args, **options)
        # what torch and safetensors make of a full disk
        except (RuntimeError, SafetensorError) as error:
            raise DiskFull(
                f"A checkpoint could not be written to {self.training_state.folder} "
                f"({in_one_line(error, 120)}). The last whole one is kept: make room, and the same "
                "command goes on after it."
            ) from error

    def training_step(self, *args: Any, **options: Any) -> Tensor:
        loss = super().training_step(*args, **options)
        self.training_state.ranks.together(lambda: self._refuse(loss))
        return loss

    def _refuse(self, loss: Tensor) -> None:
        if not loss.isfinite():
            last = self.training_state.last()
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

    def __init__(self, job: Job, training_state: TrainingState, stopping: Callable[[], bool]):
        self.progress, self.training_state, self.stopping = job.progress, training_state, stopping
        self.tokens_of_step = job.windows.ids.numel() // job.training.steps
        self.loss, self.started, self.first = "", perf_counter(), None

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Mapping[str, float] | None = None, **_: Any
    ) -> None:
        if logs and "loss" in logs:
            self.loss = f"loss {logs['loss']:.4f}"

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
        self.first = state.global_step - 1 if self.first is None else self.first
        tokens = (state.global_step - self.first) * self.tokens_of_step
        rate = tokens / max(perf_counter() - self.started, 1e-9)
        self.progress.advance(
            f"{self.loss} {rate:,.0f} tokens/s".strip(), state.global_step, state.max_steps
        )
        if self.training_state.ranks.same(self.stopping) and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True
        return control

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.training_state.mark(state.global_step)


def train(
    model: Any, job: Job, state: TrainingState, stopping: Callable[[], bool]
) -> list[tuple[int, float]]:
    """Train `model` in place on the windows of a job; the loss by step, to where it got.

    AdamW without decay, warm for the first steps, then down to zero as a cosine; gradients are cut
    at norm 1. What was trained before is taken up. Where the job aims at the dense model, the loss
    is the distance to it. Raises NonFinite.
    """
    trainer = _Distilling(
        model=model,
        args=_arguments(job, state),
        train_dataset=cast(Any, [{"input_ids": ids, "labels": ids} for ids in job.windows.ids]),
        callbacks=[_Watching(job, state, stopping)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.training_state = state
    if job.target:
        # the Trainer divides by the batches of a step then
        trainer.model_accepts_loss_kwargs = False
        dense: Any = job.target.language_model.model.float()
        trainer.dense = dense.to(trainer.args.device).eval().requires_grad_(False)
    trainer.train(resume_from_checkpoint=state.ranks.same(state.last))
    return [
        (int(entry["step"]), float(entry["loss"]))
        for entry in trainer.state.log_history
        if "loss" in entry
    ]


def windows_at_once(batch_size: int, length: int) -> int:
    """How many windows of a batch a processor runs at once: what divides it, of so many tokens."""
    fit = max(1, TOKENS_AT_ONCE // length)
    return max(part for part in range(1, batch_size + 1) if not batch_size % part and part <= fit)


def _arguments(job: Job, state: TrainingState) -> TrainingArguments:
    training, on_cpu = job.training, job.device.type == "cpu"
    at_once = training.batch_size
    if on_cpu:
        at_once = windows_at_once(at_once, job.windows.ids.shape[1])
    arguments = TrainingArguments(
        output_dir=str(state.folder),
        max_steps=training.steps,
        per_device_train_batch_size=at_once,
        gradient_accumulation_steps=training.accumulate * (training.batch_size // at_once),
        learning_rate=job.rate,
        weight_decay=0.0,
        lr_scheduler_type="cosine",
        warmup_steps=int(WARM * training.steps),
        max_grad_norm=1.0,
        save_strategy="steps",
        save_steps=training.save_every,
        save_total_limit=2,
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to=[],
        disable_tqdm=True,
        seed=training.seed,
        data_seed=training.seed,
        use_cpu=on_cpu,
        bf16=job.dtype == "bfloat16",
        adam_beta2=SQUARES,
        ddp_backend="gloo" if state.ranks.size > 1 and on_cpu else None,
        dataloader_pin_memory=job.device.type == "cuda",
        remove_unused_columns=False,
        **cast(Any, {_CHECKPOINTING: True} if training.gradient_checkpointing else {}),
    )
    # several in one process would share a batch out and count it otherwise
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments
