"""What structured pruning takes out whole; `parse` reads what `str` writes.

    25% of channels    of the feed-forward channels of every block, or of every expert
    25% of heads       of the key-value heads of every block, with the query heads that read them
    25% of experts     of the experts of every block
    4 blocks           whole decoder blocks; `12% of blocks` likewise
    A + B              several of these, one after the other
    to 75% of parameters, to 6GB    whatever reaches that size (`size_budget`)

What is left is a smaller dense model. Every block keeps as many, as stock configurations want.
"""

import re
from dataclasses import dataclass
from math import gcd
from typing import Literal

from secateur.errors import BadPattern
from secateur.system.sizes import NUMBER, SIZES, parse_size

Kind = Literal["channels", "heads", "experts"]
NAMES = {"channels": "channels", "heads": "key-value heads", "experts": "experts"}
"""What is counted: heads with keys and values of their own; their query heads go along."""


@dataclass(frozen=True)
class Units:
    """Remove a share of the channels, heads or experts of every block. Raises BadPattern."""

    ratio: float
    of: Kind

    def __post_init__(self) -> None:
        _check(self.ratio)

    def __str__(self) -> str:
        return f"{100 * self.ratio:.10g}% of {self.of}"

    kind = "structured"

    def kept(self, total: int, align: int | None, where: str) -> int:
        """How many of `total` units stay: the multiple of `align` nearest to what was asked.

        Raises BadPattern where that is none or all of them.
        """
        if align is not None and align < 1:
            raise BadPattern(f"Channels stay in multiples of 1 or more; found {align}.")
        align = (align or default_alignment(total)) if self.of == "channels" else 1
        left = round(total * (1 - self.ratio) / align) * align
        if 0 < left < total:
            return left
        steps = f" in steps of {align}" if align > 1 else ""
        least = 100 * min(align, total) / total
        wanted = "nothing of them would be left" if not left else "that is less than one step"
        can = f"One step is {least:.3g}%, the most that can go {100 - least:.3g}%."
        if least > 50:
            can = "None can go; ask for a smaller --align." if align > 1 else "None can go."
        raise BadPattern(
            f"{where} has {total} {NAMES[self.of]}, which go{steps}; {self} was asked, and "
            f"{wanted}. {can}"
        )


def default_alignment(total: int) -> int:
    """The largest power of two up to 128 that divides a width and is at most a 32nd of it.

    Kernels lose speed on widths that are no multiple of 16 or 128; small models have less to give.
    """
    align = gcd(total, 128)
    while align > 1 and align > total // 32:
        align //= 2
    return align


@dataclass(frozen=True)
class Depth:
    """Remove `count` whole blocks, or the share `ratio`. Raises BadPattern for neither or both."""

    count: int | None = None
    ratio: float | None = None

    def __post_init__(self) -> None:
        if (self.count is None) == (self.ratio is None):
            raise BadPattern("A number of blocks or a share of them is wanted.")
        if self.ratio is not None:
            _check(self.ratio)

    def __str__(self) -> str:
        if self.count is not None:
            return f"{self.count} block{'' if self.count == 1 else 's'}"
        return f"{100 * (self.ratio or 0):.10g}% of blocks"

    kind = "structured"

    def removed(self, total: int) -> int:
        """How many of `total` blocks go. Raises BadPattern where that is none or all of them."""
        count = self.count if self.count is not None else round((self.ratio or 0) * total)
        if not 0 < count < total:
            which = "" if self.count is not None else f", which is {count} of them"
            raise BadPattern(
                f"The model has {total} blocks; {self} was asked{which}. From 1 to {total - 1} can "
                "be removed."
            )
        return count


@dataclass(frozen=True)
class Several:
    """Several structures, at most one of each kind. Raises BadPattern otherwise."""

    parts: tuple[Units | Depth, ...]

    def __post_init__(self) -> None:
        kinds = [part.of if isinstance(part, Units) else "blocks" for part in self.parts]
        if len(set(kinds)) < len(kinds):
            raise BadPattern(f"{self} names {max(kinds, key=kinds.count)} twice.")

    def __str__(self) -> str:
        return " + ".join(map(str, self.parts))

    kind = "structured"


@dataclass(frozen=True)
class Budget:
    """Make the model as small as that: a share of its parameters, or bytes of weights."""

    share: float | None = None
    bytes: int | None = None

    def __post_init__(self) -> None:
        if self.bytes == 0:
            raise BadPattern("A model has more than 0 bytes of weights; found 0.")
        if self.share is not None and not 0 < self.share < 1:
            raise BadPattern(
                "A smaller model has over 0% and under 100% of the parameters; found "
                f"{100 * self.share:g}%."
            )

    def __str__(self) -> str:
        if self.share is not None:
            return f"to {100 * self.share:.10g}% of parameters"
        asked = self.bytes or 0
        for unit, size in SIZES.items():
            if asked >= size and round(float(f"{asked / size:.4g}") * size) == asked:
                return f"to {asked / size:.4g}{unit}"
        return f"to {asked}B"

    kind = "structured"


Structure = Units | Depth | Several | Budget


def _check(ratio: float) -> None:
    if not 0 < ratio < 1:
        raise BadPattern(f"The share to remove is over 0% and under 100%; found {100 * ratio:g}%.")


def parts(structure: Structure) -> tuple[Units | Depth, ...]:
    """The simple structures of which one is made; of a budget, none yet."""
    if isinstance(structure, Budget):
        return ()
    return structure.parts if isinstance(structure, Several) else (structure,)


def parse_structure(text: str) -> Structure | None:
    """The structure that `text` names, else None. Raises BadPattern for an impossible one."""
    text = re.sub(r"\s*%", "%", text.strip())
    if match := re.fullmatch(rf"to ({NUMBER})% of parameters", text):
        return Budget(share=float(match[1]) / 100)
    if text.startswith("to ") and (size := parse_size(text.removeprefix("to "))) is not None:
        return Budget(bytes=size)
    parts = [_parse_part(part.strip()) for part in text.split("+")]
    known = tuple(part for part in parts if part is not None)
    if len(known) < len(parts):
        return None
    return known[0] if len(known) == 1 else Several(known)


def _parse_part(text: str) -> Units | Depth | None:
    if match := re.fullmatch(rf"({NUMBER})% of (channel|head|expert|block)s?", text):
        ratio, kind = float(match[1]) / 100, f"{match[2]}s"
        if kind == "blocks":
            return Depth(ratio=ratio)
        return Units(ratio, kind)  # type: ignore[arg-type]
    if match := re.fullmatch(r"([0-9]{1,6}) blocks?", text):
        return Depth(count=int(match[1]))
    return None
