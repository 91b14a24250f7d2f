"""`+distil`: all kept weights of a finished model, tuned together so that it predicts what the
dense one predicts.

A block's output error says little about what becomes of it in the blocks behind. Here the loss is
that of the end: KL(dense ‖ pruned) of the next tokens, on the calibration tokens and no others.
Masks stand still, Adam moves what is kept, and windows that are held back judge. A step is

    tokens → hidden states entering every block, which are kept
           → the gradient of the loss to what leaves the last one, by pieces of the logits
           → backwards, block by block: run once more with a graph, its gradient, its step

so of gradients and of what a backward pass needs, one block's are in memory, and of the logits one
piece; weights and Adam's two means of all blocks stay, in float32, in memory or in a mapped file.
The graphs of the last blocks stay from the way there as far as there is room, and these blocks run
once; the numbers are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from math import cos, isfinite, pi
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from secateur.errors import NotEnoughText, UnsupportedModel
from secateur.models.context import vocabulary_size
from secateur.models.divergence import Divergence
from secateur.models.matrices import weight_matrices
from secateur.models.replay import Call, LanguageModel, Shell, run_block
from secateur.models.stream.forward import BlockRun, final_batches
from secateur.models.stream.steps import held_back, section_length, step_windows
from secateur.models.stream.straight_through import StraightThrough, put_on_grid, take_off_grid
from secateur.system.machine import CPU

RATE = 0.2
"""Adam's highest step, to be divided by the inputs of a matrix (recover.py says why)."""
SQUARES = 0.98
"""How Adam's mean of squares decays: over 50 steps."""
WARM = 0.1
"""The share of the steps in which the rate rises; then it falls to zero as a cosine."""
MOST_EPOCHS = 8
"""Few windows come several times until enough tokens were seen, but so often at most."""
MEANS = ("exp_avg", "exp_avg_sq")
"""What Adam keeps of each weight, as torch names it."""
LOGITS = 2**24
"""How many logits a piece has at most."""


Piece = tuple[slice, slice]


class Text(NamedTuple):
    """Windows `[windows, length]`, and whether the `next` token of each of theirs counts."""

    tokens: Tensor
    next: Tensor

    def of(self, windows: slice | Tensor) -> Text:
        """Some of the windows."""
        return Text(self.tokens[windows], self.next[windows])

    def that_count(self) -> Text:
        """The windows in which some token is foreseen that counts."""
        return self.of(self.next.any(1))

    def in_sections(self, bos: bool = False) -> Text:
        """The windows cut for steps, the first sections of all of them coming first, so that few
        steps see many documents.

        With `bos` each window begins with it, and so does each section.
        """
        length = section_length(self.tokens.shape[1])
        if (count := self.tokens.shape[1] // length) == 1:
            return self
        start, size = (1, length - 1) if bos else (0, length)
        cut = Text(*(torch.cat(one[:, start:].split(size, 1)[:count]) for one in self))
        cut.next[:, -1] = False  # what would be foreseen is in another section
        if bos:
            first = self.tokens[:, :1].repeat(count, 1)
            foreseen = torch.zeros_like(first, dtype=torch.bool)
            cut = Text(torch.cat([first, cut.tokens], 1), torch.cat([foreseen, cut.next], 1))
        return cut.that_count()


class Windows(NamedTuple):
    """Windows by batch: `tokens` `[windows, length]`, what leaves the last block of the `dense`
    model, `[…, windows, length, hidden]`, and whether the `next` token counts, `[windows, length]`.
    """

    tokens: Sequence[Tensor]
    dense: Sequence[Tensor]
    next: Sequence[Tensor]

    def batch(self, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """One of them: tokens, what leaves the dense model, which next tokens count."""
        return self.tokens[number], self.dense[number], self.next[number]


class Aims(NamedTuple):
    """What the dense model makes of the calibration windows: of sections to tune on in so many
    `steps`, and of whole ones that judge.

    `shell` is what stands before the first block and behind the last.
    """

    shell: Shell
    tuned: Windows
    judged: Windows
    steps: int


def steps_of(tokens: int, sections: int, length: int) -> int:
    """How many steps go through so many tokens, in so many sections of windows of `length`, which
    come several times if need be.
    """
    size, section = step_windows(length), section_length(length)
    return min(-(-tokens // (size * section)), MOST_EPOCHS * -(-sections // size))


def check_windows_for_tuning(count: int, sections: int = 1) -> None:
    """Raise NotEnoughText unless some windows, in so many sections, can be tuned on and others can
    judge.
    """
    if count < 2 or not sections:
        raise NotEnoughText(
            "+distil tunes on some calibration windows and judges on others; found "
            f"{count} with a token that counts behind its first. Give --samples 32, or leave "
            "+distil out."
        )


def text_of(run: BlockRun) -> tuple[Text, Text]:
    """The sections to tune on and the windows that judge, of a run. Raises NotEnoughText."""
    counts = torch.ones_like(run.tokens, dtype=torch.bool)
    if run.counted is not None:
        counts[:, :-1] = run.counted[:, 1:]
    counts[:, -1] = False
    found = Text(run.tokens, counts).that_count()
    first = len(found.tokens) - held_back(len(found.tokens))
    tuned = found.of(slice(first)).in_sections(run.bos)
    check_windows_for_tuning(len(found.tokens), len(tuned.tokens))
    return tuned, found.of(slice(first, None))


def refuse_shared(run: BlockRun) -> None:
    """Raise UnsupportedModel where a block reads what another computes, beside the hidden states:
    gradients go from block to block alone.
    """
    model = run.language_model
    refuse_said_to_share(model)
    hidden, calls = Shell(model, CPU, None, head=False).enter(run.tokens[:1, :16])
    for block, call in zip(model.blocks, calls, strict=True):
        with torch.enable_grad():
            hidden = run_block(block, hidden.detach().requires_grad_(), call).detach()
        if _holds_graph(call):
            raise _shared(model)


def refuse_said_to_share(model: LanguageModel) -> None:
    """The same by what the configuration says, for a model without weights."""
    if getattr(model.text_config, "num_kv_shared_layers", 0):
        raise _shared(model)


def _shared(model: LanguageModel) -> UnsupportedModel:
    return UnsupportedModel(
        f"The blocks of {type(model.model).__name__} share keys and values, and +distil follows "
        "gradients from block to block alone. Leave it out, or use +refine."
    )


@torch.no_grad()
def aims(run: BlockRun, most: int, spill: Path | None = None) -> Aims:
    """What to aim at, for a run whose model is still dense, on about so many tokens at `most`; in a
    file in the folder `spill`, if there is one. Raises NotEnoughText.
    """
    tuned, judged = text_of(run)
    shell = Shell(run.language_model, run.devices[0], run.dtype)
    mapped = set(shell.embedding.parameters()) if shell.embedding else set()
    for parameter in set(shell.model.parameters()) - mapped:  # the model's own stay as they are
        parameter.requires_grad_(False)
    length = run.tokens.shape[1]
    size, steps = step_windows(length), steps_of(most, len(tuned.tokens), length)

    def seen(text: Text) -> Windows:
        through = BlockRun(run.language_model, text.tokens, [shell.device], run.dtype, size, spill)
        return Windows(
            text.tokens.split(size), final_batches(through, shell), text.next.split(size)
        )

    return Aims(shell, seen(tuned.of(slice(steps * size))), seen(judged), steps)


class Distillation:
    """The blocks of a pruned model while they are tuned in place, in float32, where `aims` are.

    `kept` has for each block the parameters that are tuned, bool of their shape, and `grids` those
    of them that stay on one. `room`: bytes for graphs; `placed` puts Adam's means and what comes
    out where they shall lie. `done` of all `steps` are taken.
    """

    def __init__(
        self,
        aims: Aims,
        blocks: Sequence[nn.Module],
        kept: Sequence[Mapping[str, Tensor]],
        *,
        grids: Sequence[Mapping[str, StraightThrough]] = (),
        room: int = 0,
        placed: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    ) -> None:
        self.aims, self.blocks, self.kept = aims, blocks, kept
        self.grids, self.device = grids or [{} for _ in blocks], aims.shell.device
        self.steps, self.done, self.room = aims.steps, 0, room
        self.placed = placed
        self._graphs: int | None = None
        self.weights: list[dict[str, nn.Parameter]] = []
        self._optimisers: list[torch.optim.Adam] = []
        for block, masks, grid in zip(blocks, kept, self.grids, strict=True):
            block.requires_grad_(False)
            weights = {name: block.get_parameter(name) for name in masks}
            for weight in weights.values():
                weight.requires_grad_()
            put_on_grid(block, grid)
            self.weights.append(weights)
            inputs = {one.parameter: one.weight.shape[1] for one in weight_matrices(block).values()}
            groups = [
                {"params": [weight], "lr": 0.0, "highest": RATE / inputs[name]}
                for name, weight in weights.items()
            ]
            adam = torch.optim.Adam(groups or [torch.zeros(0)], betas=(0.9, SQUARES), fused=True)
            for weight in weights.values():
                means = {key: placed(torch.zeros_like(weight.data)) for key in MEANS}
                adam.state[weight] = {"step": torch.zeros((), device=self.device), **means}
            self._optimisers.append(adam)

    def run(self) -> Iterator[float]:
        """Take the steps that are left, every batch once before any comes again; gives the loss
        before each. They end where it is no number.
        """
        count = len(self.aims.tuned.tokens)
        while self.done < self.steps:
            epoch, place = divmod(self.done, count)
            order = torch.randperm(count, generator=torch.Generator().manual_seed(epoch))
            yield (loss := self.step(int(order[place])))
            if not isfinite(loss):
                return

    def step(self, number: int) -> float:
        """One step of every block on a batch, unless the loss is no number; the loss before it."""
        entering, calls, graphs = self._forward(self.aims.tuned.tokens[number], self._graphs or 0)
        loss, gradient = self._end(number, entering.pop())
        if not isfinite(loss):
            return loss
        sizes: list[int] | None = [] if self._graphs is None else None
        for index in reversed(range(len(self.blocks))):
            with _counted(sizes):
                hidden, output = graphs.pop(index, None) or self._run(
                    index, entering[index], calls[index], graph=True
                )
            entering.pop()
            output.backward(gradient.to(output.dtype))
            assert hidden.grad is not None
            gradient = hidden.grad
            del hidden, output
            self._move(index)
        if sizes:
            # what the largest batch takes, where this one is the rest
            shown = len(self.aims.tuned.tokens[0]) / len(self.aims.tuned.tokens[number])
            self._graphs = sum(1 for total in accumulate(sizes) if shown * total <= self.room)
        self.done += 1
        return loss

    def _move(self, index: int) -> None:
        """A step of one block, whose gradients are there."""
        warm = max(1, round(WARM * self.steps))
        share = min(1.0, (self.done + 1) / warm) * (1 + cos(pi * self.done / self.steps)) / 2
        optimiser = self._optimisers[index]
        for group in optimiser.param_groups:
            group["lr"] = share * group.get("highest", 0.0)
        for name, weight in self.weights[index].items():
            if weight.grad is not None:
                weight.grad.mul_(self.kept[index][name])
        optimiser.step()
        optimiser.zero_grad()

    def _run(self, index: int, hidden: Tensor, call: Call, *, graph: bool) -> tuple[Tensor, Tensor]:
        """What enters a block and what leaves it, with a graph where one is wanted."""
        hidden = hidden.detach().requires_grad_(graph)
        with (
            torch.set_grad_enabled(graph),
            torch.autocast(self.device.type, hidden.dtype, enabled=hidden.dtype != torch.float32),
        ):
            return hidden, run_block(self.blocks[index], hidden, call).to(hidden.dtype)

    def _forward(
        self, tokens: Tensor, graphs: int = 0
    ) -> tuple[list[Tensor], list[Call], dict[int, tuple[Tensor, Tensor]]]:
        """What enters every block and leaves the last, the calls, and the graphs that stay."""
        with torch.no_grad():
            hidden, calls = self.aims.shell.enter(tokens)
        entering, stay = [hidden], dict[int, tuple[Tensor, Tensor]]()
        for index in range(len(self.blocks)):
            graph = index >= len(self.blocks) - graphs
            ends = self._run(index, entering[-1], calls[index], graph=graph)
            if graph:
                stay[index] = ends
            entering.append(ends[1].detach())
        return entering, calls, stay

    def _leaving(self, tokens: Tensor) -> Tensor:
        """What leaves the last block; nothing else is kept."""
        hidden, calls = self.aims.shell.enter(tokens)
        for index, call in enumerate(calls):
            _, hidden = self._run(index, hidden, call, graph=False)
        return hidden

    def _end(self, number: int, leaving: Tensor) -> tuple[float, Tensor]:
        """The mean KL(dense ‖ pruned) of a batch, and the gradient of the sum, in which float16
        does not underflow, to what leaves the last block. Adam does not see the scale.
        """
        gradient, lost = torch.zeros_like(leaving), 0.0
        batch = tokens, _, counts = self.aims.tuned.batch(number)
        for where in _pieces(tokens, counts, self.aims.shell):
            hidden = leaving[..., *where, :].detach().requires_grad_()
            with torch.enable_grad():
                loss = self._lost(batch, where, hidden)
            loss.backward()
            assert hidden.grad is not None
            gradient[..., *where, :], lost = hidden.grad, lost + loss.item()
        return lost / int(counts.sum()), gradient

    @torch.no_grad()
    def judge(self) -> float:
        """The mean KL(dense ‖ pruned) on the windows that are held back, nats a token."""
        lost, judged = 0.0, self.aims.judged
        for number, tokens in enumerate(judged.tokens):
            leaving, batch = self._leaving(tokens), judged.batch(number)
            for where in _pieces(tokens, judged.next[number], self.aims.shell):
                lost += self._lost(batch, where, leaving[..., *where, :]).item()
        return lost / sum(int(counts.sum()) for counts in judged.next)

    def _lost(self, batch: tuple[Tensor, Tensor, Tensor], where: Piece, hidden: Tensor) -> Tensor:
        """KL(dense ‖ pruned), summed over the tokens of a piece that count, for the hidden states
        that leave the last block there.
        """
        shell, (tokens, dense, counts) = self.aims.shell, batch
        with torch.no_grad():
            aim = shell.leave(tokens[where], dense[..., *where, :].to(self.device))
        given, places = shell.leave(tokens[where], hidden), counts[where].to(self.device)
        mean: Any = Divergence.apply(given[places], aim[places])
        return mean * places.sum()

    def end(self) -> None:
        """Make plain blocks of those that were tuned."""
        for block, grid in zip(self.blocks, self.grids, strict=True):
            take_off_grid(block, grid)
            block.requires_grad_(False)

    def state(self) -> dict[str, Tensor]:
        """What the steps that are left depend on, by name."""
        tensors = {"done": torch.tensor(self.done)}
        for name, weight, means in self._moving():
            tensors |= {f"{name}.weight": weight.detach()}
            tensors |= {f"{name}.{key}": value for key, value in means.items()}
        return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from a `state`."""
        self.done = int(tensors["done"])
        for name, weight, means in self._moving():
            weight.copy_(tensors[f"{name}.weight"])
            for key, mean in means.items():
                mean.copy_(tensors[f"{name}.{key}"])

    def _moving(self) -> Iterator[tuple[str, nn.Parameter, dict[str, Tensor]]]:
        """(name, weight, Adam's means) of everything that is tuned."""
        for index, weights in enumerate(self.weights):
            for name, weight in weights.items():
                yield f"{index}.{name}", weight, self._optimisers[index].state[weight]


@contextmanager
def _counted(sizes: list[int] | None) -> Iterator[None]:
    """Append how many bytes the graphs hold that are made meanwhile."""
    if sizes is None:
        yield
        return
    saved: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        yield
    sizes.append(sum(saved.values()))


def _holds_graph(value: Any) -> bool:
    """Whether a block has left something with a graph in the call that others get too."""
    if isinstance(value, Tensor):
        return value.requires_grad
    if isinstance(value, Mapping):
        return any(map(_holds_graph, value.values()))
    return isinstance(value, (tuple, list)) and any(map(_holds_graph, value))


def _pieces(tokens: Tensor, counts: Tensor, shell: Shell) -> Iterator[Piece]:
    """Windows and tokens of a batch `[windows, length]`, in parts with few enough logits; those of
    which no token counts are left out.
    """
    length = max(1, LOGITS // vocabulary_size(shell.model))
    for window in range(len(tokens)):
        for start in range(0, tokens.shape[1], length):
            where = slice(window, window + 1), slice(start, start + length)
            if counts[where].any():
                yield where
