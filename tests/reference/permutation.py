"""The best order of columns for N:M by trying all of them, and where a channel arrives by poisoning its weight."""

from copy import deepcopy
from itertools import permutations

import torch
from torch import Tensor, nn

from secateur.models.hooks import recorded_inputs
from secateur.models.matrices import weight_matrices
from secateur.models.replay import Call, run_block


def kept_score(score: Tensor, n: int, m: int) -> float:
    """The sum of the n largest of every m neighbours in each row, added up one by one."""
    return sum(
        sum(sorted(row[start : start + m], reverse=True)[:n])
        for row in score.tolist()
        for start in range(0, len(row), m)
    )


def best_kept_score(score: Tensor, n: int, m: int) -> float:
    """The largest `kept_score` of any order of the columns. Orders that only rearrange a group are tried once."""
    best = 0.0
    for order in permutations(range(score.shape[1])):
        groups = [order[start : start + m] for start in range(0, len(order), m)]
        if all(list(group) == sorted(group) for group in groups) and groups == sorted(groups):
            best = max(best, kept_score(score[:, list(order)], n, m))
    return best


@torch.no_grad()
def arrivals(block: nn.Module, hidden: Tensor, call: Call, producer: str) -> dict[str, Tensor]:
    """Where NaN in each row of a producer's weight arrives: bool `[out, in]` by site, with nothing to stop it."""
    outputs = weight_matrices(block)[producer].weight.shape[0]
    found = {
        name: torch.zeros(outputs, site.weight.shape[1], dtype=torch.bool)
        for name, site in weight_matrices(block).items()
    }
    for channel in range(outputs):
        poisoned = deepcopy(block)
        weight_matrices(poisoned)[producer].weight[channel] = torch.nan

        def see(name: str, x: Tensor, channel: int = channel) -> None:
            found[name][channel] |= x.isnan().flatten(0, -2).any(0)

        with recorded_inputs(poisoned, see):
            run_block(poisoned, hidden, call)
    return found
