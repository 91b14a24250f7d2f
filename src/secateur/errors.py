"""What can go wrong through no fault of ours. Each message says what was found, what was wanted,
what to do.

SecateurError               the command line prints the message alone and exits with 2
├── UnknownName             a method, pattern, corpus or value that does not exist (did you mean)
├── BadPattern              a pattern that cannot be read, or that does not fit a weight matrix
├── BadPlan                 a plan that cannot be read, or cannot be made as asked
├── BadCheckpoint           a folder that is no sound safetensors checkpoint
├── UnsupportedModel        a model whose blocks cannot be replayed, or with too few matrices
├── NonFinite               NaN or Inf in weights, activations or results
├── BadResults              a file that is no results.json of ours
├── BadText                 a text file that is missing, or holds no text that can be read
├── NotEnoughText           fewer tokens than asked for
├── NotSolved               a factorisation that failed at every damping tried
├── OutputRefused           an output folder that exists, is not ours, or cannot be written
├── DiskFull                no space for the result
├── ConditionsDiffer        rows or a half-finished run under other conditions, not to be joined
├── RankLost                another process of the same run that has died
└── Interrupted             stopped by the user; exits with 130
"""

from collections.abc import Iterable
from difflib import get_close_matches

LIBRARY_ERRORS = (
    ValueError,
    LookupError,
    RuntimeError,
    OSError,
    TypeError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    ImportError,
)
"""What other libraries raise for files that they cannot take, whatever it is that is wrong."""


def in_one_line(error: BaseException, most: int = 240) -> str:
    """What another library says went wrong, in one line of at most `most` characters, without the
    last full stop.
    """
    text = " ".join(str(error).split()) or type(error).__name__
    return (text if len(text) <= most else f"{text[: most - 2]} …").rstrip(".")


def printable(text: str, most: int = 2000) -> str:
    """Text from outside as a terminal may show it: control characters and line breaks escaped, the
    middle of much left out. Names in a checkpoint can hold anything, and an escape sequence can
    rewrite what was printed before.
    """
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return shown if len(shown) <= most else f"{shown[: most // 2]} … {shown[-most // 4 :]}"


class SecateurError(Exception):
    """The root of all errors that are the user's to mend."""


class UnknownName(SecateurError):
    """A name that is in no table."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        names = sorted(known)
        near = get_close_matches(name, names, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(names)}."
        super().__init__(f"There is no {kind} {name!r}. {hint}")


class BadPattern(SecateurError):
    """A pattern that cannot be read, or that does not fit a weight matrix."""


class BadPlan(SecateurError):
    """A plan that cannot be read, or cannot be made as asked."""


class BadCheckpoint(SecateurError):
    """A folder that is no sound safetensors checkpoint."""


class UnsupportedModel(SecateurError):
    """A model that the generic rules do not fit."""


class NonFinite(SecateurError):
    """NaN or Inf where a number was needed."""


class BadResults(SecateurError):
    """A file that is no results.json of ours."""


class BadText(SecateurError):
    """A text file that is missing, or holds no text that can be read."""


class NotEnoughText(SecateurError):
    """Fewer tokens than asked for."""


class NotSolved(SecateurError):
    """A factorisation that failed at every damping tried."""


class OutputRefused(SecateurError):
    """An output folder that must not or cannot be written."""


class DiskFull(SecateurError):
    """No space for the result."""


class ConditionsDiffer(SecateurError):
    """Rows, or halves of a run, under different conditions."""


class RankLost(SecateurError):
    """Another process of the same run has died."""


class Interrupted(SecateurError):
    """The user asked to stop."""
