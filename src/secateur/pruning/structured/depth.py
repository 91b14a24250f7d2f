"""Which blocks go, and what the block before them can do in their place.

`influence`   the blocks that change the hidden state least: 1 − cos(entering, leaving), mean over
              tokens (ShortGPT, Men et al. 2024, arXiv:2403.03853)
`angular`     the span of that many blocks with the least angle between entering and leaving at the
              last token (Gromov et al. 2024, arXiv:2403.17887)
`kl`          one at a time, the block without which the model's predictions stay nearest to the
              dense model's: KL(dense ‖ pruned) on 32 windows. Costs about blocks² / 2 block passes
              for each block that goes.

What takes over: removing blocks i+1 … j after block i with output h_i loses δ = h_j − h_i. If the
last matrix W of block i adds W x to h_i, the best linear stand-in is W + E[δ xᵀ] (C + λ)⁻¹, which
`reconstruct` computes. ReplaceMe (Shopkhoev et al. 2025, arXiv:2505.02819) estimates a linear map
of the block's output instead; that is contained in this.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import repeat
from typing import NamedTuple

import torch
from torch import Tensor, nn

from secateur.models.divergence import DenseReference
from secateur.models.hooks import recorded_inputs
from secateur.models.matrices import WeightMatrix, weight_matrices
from secateur.models.replay import Call, in_float32, run_block, working_copy
from secateur.models.stream.blocks import BlockRun, stream
from secateur.models.stream.observe import chosen_tokens

KL_WINDOWS = 32
Holds = Callable[[Sequence[int]], bool]
Blocks = Callable[[BlockRun, int, Holds], list[int]]
"""(run, how many go, whether a configuration holds the rest) → the blocks that go, ascending."""


@torch.no_grad()
def influence(run: BlockRun, count: int, holds: Holds) -> list[int]:
    """The blocks with the least block influence."""
    score = [1.0 - value for value in _cosines(run, 1, last=False)]
    removed: list[int] = []
    for index in sorted(range(len(score)), key=lambda i: (score[i], i)):
        if len(removed) < count and holds(sorted([*removed, index])):
            removed = sorted([*removed, index])
    return removed


@torch.no_grad()
def angular(run: BlockRun, count: int, holds: Holds) -> list[int]:
    """The span of `count` blocks with the least angle."""
    cosine = _cosines(run, count, last=True)
    for start in sorted(range(len(cosine)), key=lambda i: (-cosine[i], i)):
        if holds(span := list(range(start, start + count))):
            return span
    return []


def _cosines(run: BlockRun, span: int, *, last: bool) -> list[float]:
    """The mean cosine of what enters block i and leaves i + span − 1, at all tokens or the last;
    where only some count, at these or the last of these in each window.
    """
    entering: list[list[Tensor]] = []
    cosines: list[float] = []
    count = len(run.language_model.blocks)

    def part(hidden: Tensor, counted: Tensor | None) -> Tensor:
        if counted is None:
            return (hidden[..., -1:, :] if last else hidden).to("cpu", copy=True)
        places = counted & (counted.flip(1).cumsum(1).flip(1) == 1) if last else counted
        return hidden[..., places.to(hidden.device), :].to("cpu", copy=True)

    for step in stream(run):
        run.progress.advance(f"influence of {step.name}", step.index, count)
        windows, masks = step.inputs.windows(), step.inputs.masks()
        entering.append([part(h, mask) for (h, _), mask in zip(windows, masks, strict=True)])
        if len(entering) > span:
            cosines.append(_cosine(entering.pop(0), entering[-1]))
        if step.index == count - 1:
            outputs = (run_block(step.block, h, calls[step.index]) for h, calls in windows)
            leaving = [part(h, mask) for h, mask in zip(outputs, masks, strict=True)]
            cosines.append(_cosine(entering.pop(0), leaving))
    return cosines


def _cosine(before: list[Tensor], after: list[Tensor]) -> float:
    pairs = [
        torch.cosine_similarity(a.float(), b.float(), dim=-1).flatten()
        for a, b in zip(before, after, strict=True)
    ]
    return torch.cat(pairs).double().mean().item()


@torch.no_grad()
def kl(run: BlockRun, count: int, holds: Holds) -> list[int]:
    """Greedily, the blocks without which the predictions stay nearest to the dense model's."""
    dense, total = DenseReference(run, KL_WINDOWS), len(run.language_model.blocks)
    left, removed, done = list(range(total)), list[int](), 0
    work = sum((total - n) for n in range(count))
    for _ in range(count):
        best: tuple[float, int] | None = None
        entering = dense.entering  # of the block that is left out
        for position, out in enumerate(left):
            run.progress.advance(f"the model without block {out}", done, work)
            done += 1
            if holds(sorted([*removed, out])):
                hidden = entering
                for block in left[position + 1 :]:
                    hidden = dense.run(block, hidden)
                best = min(best or (torch.inf, -1), (dense.divergence(hidden), out))
            entering = dense.run(out, entering)
        if best is None:
            return removed
        removed, left = sorted([*removed, best[1]]), [block for block in left if block != best[1]]
    return removed


BLOCKS: dict[str, Blocks] = {"influence": influence, "angular": angular, "kl": kl}


@torch.no_grad()
def last_matrix(
    block: nn.Module, hidden: Tensor, call: Call, first: Collection[str] = ()
) -> WeightMatrix | None:
    """The weight matrix whose output is simply added to the block's, None where there is none.

    Those in `first` are asked before others, and those with more inputs. The block itself answers:
    a weight is changed a little, and the output must change by that times the input.
    """
    block = working_copy(block, hidden.device, torch.float32)
    hidden, call = hidden.float(), in_float32(call)
    before = run_block(block, hidden, call)
    candidates = [
        matrix
        for matrix in weight_matrices(block).values()
        if not matrix.expert and matrix.weight.shape[0] == before.shape[-1]
    ]
    for matrix in sorted(candidates, key=lambda m: (m.name not in first, -m.weight.shape[1])):
        inputs = _inputs(block, matrix.name, hidden, call)[1]
        if len(inputs) != 1 or inputs[0].shape[:-1].numel() != before.shape[:-1].numel():
            continue
        old = matrix.weight.clone()
        draw = torch.Generator().manual_seed(0)
        change = torch.randn(old.shape, generator=draw).to(old.device) * old.std()
        matrix.weight.add_(change)
        moved = run_block(block, hidden, call) - before
        matrix.weight.copy_(old)
        wanted = (inputs[0] @ change.T).view(before.shape)  # OPT flattens the tokens
        if (moved - wanted).norm() <= 1e-3 * wanted.norm():
            return matrix
    return None


def _inputs(
    block: nn.Module, matrix: str, hidden: Tensor, call: Call
) -> tuple[Tensor, list[Tensor]]:
    """What a block gives, and every input of one of its weight matrices on the way."""
    inputs: list[Tensor] = []
    with recorded_inputs(block, lambda name, x: inputs.append(x) if name == matrix else None):
        return run_block(block, hidden, call), inputs


class Missing(NamedTuple):
    """What should be added to a block's output, δ, as `reconstruct` needs it.

    `product` is E[δ xᵀ] `[hidden, in]` float32 with E[δ] as one more column, `power` E‖δ‖².
    """

    product: Tensor
    power: float


def missing(
    block: nn.Module,
    span: Sequence[tuple[int, nn.Module]],
    matrix: str,
    windows: Sequence[tuple[Tensor, list[Call]]],
    index: int,
    dense: Sequence[Tensor] | None = None,
    masks: Iterable[Tensor | None] = repeat(None),
) -> Missing:
    """What should be added to what a block gives, on all batches.

    That is the effect of a span of blocks that are removed; with `dense`, what the dense block
    gives on dense inputs by batch, also all that the stream has lost before. `block`, its number
    `index`, and the span are working copies on the device of the hidden states; x are the inputs of
    `matrix`. `masks`: by batch, the tokens that count, `[windows, length]` bool; None for all.
    """
    total, power, tokens = torch.zeros(()), 0.0, 0
    for batch, ((hidden, calls), counted) in enumerate(zip(windows, masks, strict=False)):
        before, (inputs,) = _inputs(block, matrix, hidden, calls[index])
        after = before if dense is None else dense[batch]
        for number, module in span:
            after = run_block(module, after, calls[number])
        delta, x = (chosen_tokens(matrix, one.float(), counted) for one in (after - before, inputs))
        x = torch.cat([x, torch.ones(len(x), 1, device=x.device)], 1)
        total = total.to(x.device) + (delta.T @ x).double()
        power += delta.double().square().sum().item()
        tokens += len(x)
    return Missing((total / tokens).float(), power / tokens)
