"""Chooses which scores are kept; of two equal ones that at the lower position goes first.

NaN is above every number where the lowest are removed, and where fewer than the lowest asked for
are numbers, nothing is. Within groups a comparison with NaN fails, whichever side it is on. Float32
scores on a CPU go to masks.c, which does no more than read them three times; everything else, and
everything without a compiler, to the same in torch.
"""

import torch
from torch import Tensor

from secateur.kernels.library import addresses, library

MOST = 2**31
"""The scores that masks.c counts at most."""
SORTED = 2**24
"""The scores that a device sorts at most."""


def without_lowest(scores: Tensor, removed: int) -> Tensor:
    """Rows of scores `[groups, n]` without their `removed` lowest: bool, True is kept."""
    if removed == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    if (compiled := library()) is None or not _plain_memory(scores):
        return without_lowest_in_torch(scores, removed)
    scores = scores.contiguous()
    kept = torch.empty(scores.shape, dtype=torch.bool)
    places, threads, (groups, size) = addresses(scores, kept), torch.get_num_threads(), scores.shape
    if groups == 1:
        failed = compiled.secateur_without_lowest(*places, size, removed, threads)
    else:
        failed = compiled.secateur_without_lowest_rows(*places, groups, size, removed, threads)
    return without_lowest_in_torch(scores, removed) if failed else kept


def best_of_groups(scores: Tensor, n: int, m: int) -> Tensor:
    """The best n of every m neighbours in scores `[out, in]`: bool `[out, in]`, True is kept."""
    if (compiled := library()) is None or not _plain_memory(scores):
        return best_of_groups_in_torch(scores, n, m)
    scores = scores.contiguous()
    kept = torch.empty(scores.shape, dtype=torch.bool)
    groups = scores.numel() // m
    threads = min(torch.get_num_threads(), max(groups // 4096, 1))
    failed = compiled.secateur_best_of_groups(*addresses(scores, kept), groups, m, n, threads)
    return best_of_groups_in_torch(scores, n, m) if failed else kept


def _plain_memory(scores: Tensor) -> bool:
    plain = scores.device.type == "cpu" and scores.dtype == torch.float32
    return plain and 0 < scores.numel() < MOST


def without_lowest_in_torch(scores: Tensor, removed: int) -> Tensor:
    """What `without_lowest` says, for 0 < removed."""
    alone = len(scores) == 1
    threshold = (
        _lowest(scores[0], removed) if alone else scores.kthvalue(removed, 1, keepdim=True).values
    )
    above = ~(scores <= threshold)
    # Of those tied at the threshold, how many stay.
    spare = (scores.shape[1] - removed) - above.sum(1, keepdim=True)
    if not spare.any():
        return above
    equal = scores == threshold
    return above | (equal & (equal.cumsum(1) > equal.sum(1, keepdim=True) - spare))


def _lowest(scores: Tensor, count: int) -> Tensor:
    """The `count`-th lowest of scores `[n]`; of millions three times as fast as `kthvalue`.

    A sample brackets it, so that only a few per cent of the scores are ordered. Where the bracket
    misses, all are, as they are on a device, which would wait for each answer; millions there, as
    ordering takes 24 bytes a score.
    """
    size = len(scores)
    if scores.is_cuda and size <= SORTED:
        return scores.sort().values[count - 1]
    if size >= 2**17:
        sample = scores[:: size // 2**15 | 1]  # an odd step, so that it meets every column
        place = round(count * len(sample) / size)
        margin = round(2 * len(sample) ** 0.5)  # four standard deviations
        low = sample.kthvalue(max(place - margin, 1)).values
        high = sample.kthvalue(min(place + margin, len(sample))).values
        below = int((scores < low).sum())
        middle = scores[(scores >= low) & (scores <= high)]
        if below < count <= below + len(middle):
            return middle.kthvalue(count - below).values
    return scores.kthvalue(count).values


def best_of_groups_in_torch(scores: Tensor, n: int, m: int) -> Tensor:
    """What `best_of_groups` says."""
    groups = scores.unflatten(1, (-1, m)).permute(2, 0, 1).contiguous()  # [m, out, in / m]
    small = torch.int8 if m < 128 else torch.int32
    ahead = torch.zeros_like(groups, dtype=small)  # how many of its group a weight gives way to
    for j in range(1, m):
        # [j, out, in / m]; the later of two equal stays
        wins = (groups[j] >= groups[:j]).view(torch.int8)
        ahead[:j] += wins
        ahead[j] += j - wins.sum(0, dtype=small)
    return (ahead < n).permute(1, 2, 0).reshape(scores.shape)  # [out, in]


def crowded(weight: Tensor, n: int, m: int) -> Tensor:
    """Which groups of m inputs of a matrix `[…, in]` hold more than n weights that are not zero.

    Returns bool `[…, in / m]`. The inputs must be whole groups.
    """
    return (weight != 0).unflatten(-1, (-1, m)).sum(-1) > n
