"""How far a changed model is from the dense one, by what both predict."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import NotEnoughText
from secateur.models.replay import Shell, run_block, working_copy
from secateur.models.stream.blocks import BlockRun

LOGITS_AT_ONCE = 2**22
"""So many fit into caches, and the allocator uses the same memory again."""


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p ‖ q) in nats for log-probabilities `[…, vocabulary]`; 0 · log 0 counts as 0."""
    return (log_p.exp() * (log_p - log_q)).where(log_p > -torch.inf, 0.0).sum(-1)


class Divergence(torch.autograd.Function):
    """KL(wanted ‖ given) in nats, the mean over rows, for logits `[…, vocabulary]` of next tokens.

    The gradient is (softmax(given) − softmax(wanted)) / rows. It is made on the way there, some
    rows at a time, so one tensor of the logits' size is held, and nothing is gone through twice;
    where no gradient is wanted, none.
    """

    @staticmethod
    def forward(ctx: Any, given: Tensor, wanted: Tensor) -> Tensor:
        lost = given.new_zeros((), dtype=torch.float32)
        slope = torch.empty_like(given) if ctx.needs_input_grad[0] else None
        length = max(1, LOGITS_AT_ONCE // given[..., :1, :].numel())
        for start in range(0, given.shape[-2], length):
            part = ..., slice(start, start + length), slice(None)
            log_q, log_p = (
                one[part].log_softmax(-1, dtype=torch.float32) for one in (given, wanted)
            )
            p = log_p.exp()
            apart = log_p.sub_(log_q).masked_fill_(p == 0, 0.0)  # 0 · log 0, of masked tokens
            lost += torch.tensordot(p, apart, p.dim())
            if slope is not None:
                slope[part] = log_q.exp_().sub_(p)
        if slope is not None:
            ctx.save_for_backward(slope)
        ctx.rows = given[..., 0].numel()
        return lost / ctx.rows

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,), (slope,) = gradients, ctx.saved_tensors
        return slope * (gradient / ctx.rows), None


class DenseReference:
    """What the dense model makes of the first windows of a run, to compare changed models with.

    Hidden states are lists with a tensor for each batch: `entering` enters the first block,
    `leaving` leaves the last. Where only some tokens count, windows without any are passed over,
    and what is compared is how those that count are foreseen. A changed model is run from the first
    block that differs by whoever kept what enters it.
    """

    def __init__(self, run: BlockRun, windows: int) -> None:
        tokens, counted = run.tokens[:windows], run.counted
        self.foreseen: list[Tensor] | None = None  # by batch, whether the next token counts
        if counted is not None:
            next_counts = counted[:, 1:]
            rows = next_counts.any(1).nonzero().flatten()[:windows]
            if not len(rows):
                raise NotEnoughText(
                    "No token that counts has one before it in its window, so none is foreseen. "
                    "Use a greater --seq-len, or leave --calibration-on out."
                )
            tokens, self.foreseen = run.tokens[rows], list(next_counts[rows].split(run.batch_size))
        self.blocks = run.language_model.blocks
        self.shell = Shell(run.language_model, run.devices[0], run.dtype)
        self.batches = tokens.split(run.batch_size)
        entered = [self.shell.enter(batch) for batch in self.batches]
        self.entering, self.calls = [h for h, _ in entered], [calls for _, calls in entered]
        self.leaving = self.entering
        for index in range(len(self.blocks)):
            self.leaving = self.run(index, self.leaving)

    def run(
        self,
        index: int,
        entering: Sequence[Tensor],
        change: Callable[[nn.Module], None] | None = None,
    ) -> list[Tensor]:
        """What leaves block `index`, after `change` was done to a copy of it."""
        block = working_copy(self.blocks[index], self.shell.device, self.shell.dtype)
        if change:
            change(block)
        pairs = zip(entering, self.calls, strict=True)
        return [run_block(block, hidden, calls[index]) for hidden, calls in pairs]

    def divergence(self, leaving: Sequence[Tensor], *, last: bool = True) -> float:
        """KL(dense ‖ changed), nats a token, for what leaves the last block of a changed model.

        `last`: whether the prediction after the last token of a window counts too, where all do.
        """
        means, weights = [], []
        for number, (batch, *hidden) in enumerate(
            zip(self.batches, self.leaving, leaving, strict=True)
        ):
            for window in range(len(batch)):  # one at a time: the logits of all of them may not fit
                part = slice(window, window + 1)
                logits = (self.shell.leave(batch[part], x[..., part, :, :]) for x in hidden)
                places: slice | Tensor = slice(None) if last else slice(-1)
                if self.foreseen is not None:
                    places = self.foreseen[number][window].nonzero().flatten()
                p, q = (one[:, places].float().log_softmax(-1) for one in logits)
                means.append(divergence(p, q).double().mean())
                weights.append(p.shape[1])
        if self.foreseen is None:
            return torch.stack(means).mean().item()
        share = torch.tensor(weights, dtype=torch.float64) / sum(weights)
        return (torch.stack(means).cpu() * share).sum().item()
