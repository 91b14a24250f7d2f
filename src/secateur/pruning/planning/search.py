"""A plan by search: sparsity moves between blocks while that brings the model nearer to dense."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from secateur.models.divergence import DenseReference
from secateur.models.matrices import weight_matrices
from secateur.models.stream.blocks import Step
from secateur.pruning.planning.allocation import least_error
from secateur.pruning.planning.sensitivity import Sensitivity, levels_around
from secateur.system.files import disk_errors

SEARCH_WINDOWS = 8
"""On how many calibration windows a search looks."""


def search(sensitivity: Sensitivity) -> Mapping[str, float]:
    """The sparsity of each weight matrix: moved between blocks while that helps, shared out within.

    Sparsity moves 5 % at a time from one block to another of as many weights, while that lowers
    KL(dense ‖ pruned) of the next-token distributions on the first `SEARCH_WINDOWS` calibration
    windows. Every block is pruned beforehand at every level on the dense model's inputs (as the
    database of EvoPress, Sieberling et al. 2025, arXiv:2410.14649). That database lies in the
    folder for temporary files and takes up to nine times the model's blocks; in memory are the
    hidden states of those windows at every block (9 GB for Llama 2 7B in float32). What a block
    ends with is shared out among its matrices by `least_error`, from the errors that filling the
    database has measured.
    """
    levels, sizes = levels_around(sensitivity.sparsity), sensitivity.sizes
    with TemporaryDirectory(prefix="secateur-") as folder:
        library = _Library(Path(folder), sensitivity, levels)
        chosen = _exchanged(sensitivity, levels, _Judge(sensitivity, library))
    ratios: dict[str, float] = {}
    for block, level in chosen.items():
        inside = {name: c for name, c in library.curves.items() if name.startswith(f"{block}.")}
        # a matrix that saw no token has no curve: it goes with its block
        ratios[block] = levels[level]
        ratios |= least_error(inside, {name: sizes[name] for name in inside}, levels[level])
    return ratios


def _exchanged(sensitivity: Sensitivity, levels: Sequence[float], judge: _Judge) -> dict[str, int]:
    """The level of each block, after the exchanges that bring the model nearer to the dense one."""
    sizes = sensitivity.blocks
    chosen = dict.fromkeys(sizes, levels.index(sensitivity.sparsity))
    best = judge.divergence(chosen)
    more: dict[str, float] = {}  # what one level more of a block does to the divergence
    less: dict[str, float] = {}
    moves = left = 12 * len(sizes)  # that may still be tried
    stale = list(sizes)
    while stale and left:
        for name in stale:
            for table, level in ((more, chosen[name] + 1), (less, chosen[name] - 1)):
                known = 0 <= level < len(levels)
                trial = {**chosen, name: level}
                table[name] = judge.divergence(trial) - best if known else torch.inf
        pairs = ((a, b) for a in sizes for b in sizes if a != b and sizes[a] == sizes[b])
        promising = sorted((more[a] + less[b], a, b) for a, b in pairs)
        stale = []
        for expected, a, b in promising[: len(sizes)]:
            if expected >= 0 or not left:
                break
            left -= 1
            sensitivity.run.progress.advance(f"searching, KL {best:.4f}", moves - left, moves)
            trial = {**chosen, a: chosen[a] + 1, b: chosen[b] - 1}
            if (divergence := judge.divergence(trial)) < best:
                chosen, best, stale = trial, divergence, [a, b]
                break
    return chosen


class _Library:
    """Every block at every level, pruned on the dense model's inputs, in files."""

    def __init__(self, folder: Path, sensitivity: Sensitivity, levels: Sequence[float]) -> None:
        self.folder = folder
        self.curves: dict[str, list[tuple[float, float]]] = {}
        model = sensitivity.run.language_model.model

        def look(step: Step) -> None:
            groups = list(sensitivity.groups(step))
            for number, level in enumerate(levels):
                tensors = {}
                for group in groups:
                    for name, error, weight in sensitivity.pruned(group, level):
                        self.curves.setdefault(f"{step.name}.{name}", []).append((level, error))
                        matrix = step.matrices[name]
                        dtype = model.get_parameter(f"{step.name}.{matrix.parameter}").dtype
                        stored = weight.T if matrix.transposed else weight
                        tensors[name] = stored.to("cpu", dtype).contiguous()
                with disk_errors(folder):
                    save_file(tensors, self._file(step.name, number))

        sensitivity.each("all levels of", look)

    def _file(self, block: str, level: int) -> Path:
        return self.folder / f"{block}-{level}.safetensors"

    def put(self, block: nn.Module, name: str, level: int) -> None:
        """Write the block's weights at that level into a working copy."""
        matrices = weight_matrices(block)
        for matrix, stored in load_file(self._file(name, level)).items():
            matrices[matrix].stored.copy_(stored)


class _Judge:
    """How far the whole model is from the dense one, with each block at some level."""

    def __init__(self, sensitivity: Sensitivity, library: _Library) -> None:
        self.library, self.model = library, sensitivity.run.language_model
        self.dense = DenseReference(sensitivity.run, SEARCH_WINDOWS)
        self.entering = [self.dense.entering]  # of each block, as last run
        self.ran: list[int | None] = []  # at which level each block was run for it

    def divergence(self, chosen: Mapping[str, int]) -> float:
        """KL(dense ‖ pruned), nats a token, with each named block at that level.

        Blocks before the first that differs from the last run are not run again.
        """
        names = [self.model.block_name(index) for index in range(len(self.dense.blocks))]
        wanted = [chosen.get(name) for name in names]
        same = 0
        while same < len(self.ran) and self.ran[same] == wanted[same]:
            same += 1
        del self.entering[same + 1 :], self.ran[same:]
        for index, level in enumerate(wanted[same:], same):
            put = (
                None if level is None else partial(self.library.put, name=names[index], level=level)
            )
            self.entering.append(self.dense.run(index, self.entering[index], put))
            self.ran.append(level)
        return self.dense.divergence(self.entering[-1], last=False)
