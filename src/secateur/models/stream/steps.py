"""How calibration windows are shared out to the steps in which a block, or all of them, are tuned.

Many small steps tune better than few large ones on as many tokens (docs/LOG.md, 2026-12-01).
"""

from collections.abc import Sequence

STEP_TOKENS = 512
"""About how many tokens make a step."""
HELD_BACK = 16
"""One window of so many is not tuned on; it judges."""


def step_windows(length: int) -> int:
    """How many windows, or sections of windows, of so many tokens make a step."""
    return max(1, STEP_TOKENS // length)


def section_length(length: int) -> int:
    """How many tokens the sections have into which windows of `length` are cut for steps; windows
    that are short enough are one section.
    """
    return length // -(-length // STEP_TOKENS)


def held_back(windows: int) -> int:
    """How many of the windows, the last ones, judge."""
    return max(1, windows // HELD_BACK)


def batch_of_a_step(windows: int, length: int, most: int) -> int:
    """How many of so many windows go through a block at once, at `most`, where each batch makes a
    step of tuning and the last ones judge.
    """
    return max(1, min(most, step_windows(length), windows - held_back(windows)))


def judging_batches(windows: Sequence[int]) -> int:
    """How many batches, the last ones, have the windows that judge, where each has so many that
    count.

    A block does not judge itself by what it has learnt; and the same windows judge blocks one by
    one and together, or those that had been tuned on them would be so near to the dense ones there
    that nothing could be better. A single batch is tuned on.
    """
    left, count = held_back(sum(windows)), 0
    while left > 0 and count < len(windows) - 1:
        count += 1
        left -= windows[-count]
    return count
