"""A plan by search: sparsity moves between blocks as long as that brings the whole model nearer to
the dense one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from secateur.models.matrices import matrix_shapes, weight_matrices
from secateur.models.replay import Shell, divergence, run_block, working_copy
from secateur.models.stream.blocks import Step
from secateur.pruning.planning.allocation import least_error
from secateur.pruning.planning.sensitivity import Measuring, levels_around, pruned_at, solvable
from secateur.system.files import disk_errors

SEARCH_WINDOWS = 8
"""On how many calibration windows a search looks."""


def search(measuring: Measuring) -> Mapping[str, float]:
    """The sparsity of each site: of the blocks by search, inside each block by the errors of its
    sites.

    Sparsity moves 5 % at a time from one block to another while that lowers the divergence from the
    dense model.

    The divergence is KL(dense ‖ pruned) of the next-token distributions on the first
    `SEARCH_WINDOWS` calibration windows, with every block pruned beforehand at every level on the
    dense model's inputs (as the database of EvoPress, Sieberling et al. 2025, arXiv:2410.14649).
    That database lies in the folder for temporary files and takes up to nine times the model's
    blocks; in memory are the hidden states of those windows at every block (9 GB for Llama 2 7B in
    float32). Blocks exchange only with blocks of as many weights. What a block ends with is shared
    out among its sites by `least_error`, from the errors that filling the database has measured.
    """
    sizes, levels = measuring.blocks, levels_around(measuring.sparsity)
    names = list(sizes)
    with TemporaryDirectory(prefix="secateur-") as folder:
        library = _Library(Path(folder), measuring, levels)
        judge = _Judge(measuring, library)
        chosen = dict.fromkeys(names, levels.index(measuring.sparsity))
        best = judge.divergence(chosen)
        up, down = {}, {}  # what one level more or less of one block does to the divergence
        left = 12 * len(names)  # moves that may still be tried
        stale = list(names)
        while left > 0:
            for name in stale:
                for table, move in ((up, 1), (down, -1)):
                    level = chosen[name] + move
                    known = 0 <= level < len(levels)
                    table[name] = (
                        judge.divergence({**chosen, name: level}) - best if known else torch.inf
                    )
            moves = sorted(
                (up[a] + down[b], a, b)
                for a in names
                for b in names
                if a != b and sizes[a] == sizes[b]
            )
            stale = []
            for expected, a, b in moves[: len(names)]:
                if expected >= 0 or left <= 0:
                    left = 0
                    break
                left -= 1
                measuring.run.progress.advance(
                    f"searching, KL {best:.4f}", 12 * len(names) - left, 12 * len(names)
                )
                trial = {**chosen, a: chosen[a] + 1, b: chosen[b] - 1}
                if (found := judge.divergence(trial)) < best:
                    chosen, best, stale = trial, found, [a, b]
                    break
            if not stale:
                break
    shapes, found = matrix_shapes(measuring.run.language_model), {}
    for name, level in chosen.items():
        inside = {
            site: curve for site, curve in library.curves.items() if site.startswith(f"{name}.")
        }
        shared = least_error(inside, {site: prod(shapes[site]) for site in inside}, levels[level])
        found |= {
            name: levels[level]
        } | shared  # a site that saw no token has no curve: it goes with its block
    return found


class _Library:
    """Every block at every level, pruned on the dense model's inputs, in files."""

    def __init__(self, folder: Path, measuring: Measuring, levels: Sequence[float]) -> None:
        self.folder = folder
        self.curves: dict[str, list[tuple[float, float]]] = {}
        dtypes = {
            name: p.dtype for name, p in measuring.run.language_model.model.named_parameters()
        }

        def look(step: Step) -> None:
            groups = list(solvable(step, measuring))
            for number, level in enumerate(levels):
                tensors = {}
                for names, weights, stats in groups:
                    for name, error, weight in pruned_at(
                        measuring.at(level), names, weights, stats, measuring.method
                    ):
                        self.curves.setdefault(f"{step.name}.{name}", []).append((level, error))
                        site = step.sites[name]
                        lying = weight.T if site.transposed else weight
                        tensors[name] = lying.to(
                            "cpu", dtypes[f"{step.name}.{site.parameter}"]
                        ).contiguous()
                with disk_errors(folder):
                    save_file(tensors, self._file(step.name, number))

        measuring.each("all levels of", look)

    def _file(self, block: str, level: int) -> Path:
        return self.folder / f"{block}-{level}.safetensors"

    def put(self, block: nn.Module, name: str, level: int) -> None:
        """Write the block's weights at that level into a working copy."""
        found = weight_matrices(block)
        for site, stored in load_file(self._file(name, level)).items():
            found[site].stored.copy_(stored)


class _Judge:
    """How far the whole model is from the dense one, with each block at some level."""

    def __init__(self, measuring: Measuring, library: _Library) -> None:
        self.measuring, self.library = measuring, library
        self.model, device = measuring.run.language_model, measuring.run.devices[0]
        self.shell = Shell(self.model, device, measuring.run.dtype)
        self.tokens = list(measuring.run.tokens[:SEARCH_WINDOWS].split(measuring.run.batch_size))
        entered = [self.shell.enter(batch) for batch in self.tokens]
        self.calls = [calls for _, calls in entered]
        self.hidden: list[list[Tensor]] = [
            [hidden for hidden, _ in entered]
        ]  # what enters each block, as last run
        self.ran: list[int | None] = []  # at which level each block was run for it
        self.dense = self._run({})

    def divergence(self, chosen: Mapping[str, int]) -> float:
        """KL(dense ‖ pruned), nats a token, with each named block at that level."""
        found = []
        for batch, hidden, dense in zip(self.tokens, self._run(chosen), self.dense, strict=True):
            for window in range(len(batch)):  # one at a time: the logits of all of them may not fit
                part = slice(window, window + 1)
                p, q = (self._leave(batch[part], x[..., part, :, :]) for x in (dense, hidden))
                found.append(divergence(p, q).double().mean())
        return torch.stack(found).mean().item()

    def _leave(self, batch: Tensor, hidden: Tensor) -> Tensor:
        return self.shell.leave(batch, hidden)[:, :-1].float().log_softmax(-1)

    def _run(self, chosen: Mapping[str, int]) -> list[Tensor]:
        """What leaves the last block; blocks before the first that differs from the last run are
        not run again.
        """
        blocks = self.model.blocks
        wanted = [chosen.get(self.model.block_name(index)) for index in range(len(blocks))]
        same = 0
        while same < len(self.ran) and self.ran[same] == wanted[same]:
            same += 1
        del self.hidden[same + 1 :], self.ran[same:]
        for index in range(same, len(blocks)):
            block = working_copy(blocks[index], self.shell.device, self.measuring.run.dtype)
            level = wanted[index]
            if level is not None:
                self.library.put(block, self.model.block_name(index), level)
            pairs = zip(self.hidden[index], self.calls, strict=True)
            self.hidden.append([run_block(block, hidden, calls[index]) for hidden, calls in pairs])
            self.ran.append(level)
        return self.hidden[-1]
