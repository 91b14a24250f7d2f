"""Commands whose options are made from the fields of `system.settings`, so that none is written
down twice.
"""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Annotated, Any

import typer

from secateur.system.settings import Option

Model = Annotated[
    str | None, typer.Argument(help="A checkpoint folder or hub name. Default: the embedded demo.")
]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document last.")]


def options(
    *classes: type, without: Sequence[str] = (), **defaults: Any
) -> Callable[[Callable[..., None]], Any]:
    """Give a command the options of these classes, but those `without`, some with other `defaults`.

    The command takes them as its first argument, a dictionary by name of field; its other
    parameters are typer's.
    """
    made = {
        one.name: (one, typing.get_type_hints(cls)[one.name])
        for cls in classes
        for one in sorted(
            fields(cls), key=lambda one, cls=cls: one.name not in cls.__annotations__
        )  # inherited last
        if "option" in one.metadata and one.name not in without
    }

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
        arguments = [parameter for parameter in own if parameter.name not in ("quiet", "as_json")]
        flags = [parameter for parameter in own if parameter not in arguments]
        parameters = [
            *arguments,
            *(
                _parameter(one, hint, defaults.get(name, one.default))
                for name, (one, hint) in made.items()
            ),
            *flags,
        ]

        def run(**values: Any) -> None:
            given = {name: _read(one, hint, values.pop(name)) for name, (one, hint) in made.items()}
            command(given, **values)

        run.__name__, run.__doc__ = command.__name__, command.__doc__
        parameters = [
            parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters
        ]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate


def _parameter(one: Field[Any], hint: Any, default: Any) -> inspect.Parameter:
    """What typer is told of a field."""
    option: Option = one.metadata["option"]
    kinds = _kinds(hint)
    kind: Any = str
    if not option.listed:
        if any(typing.get_origin(member) is not None for member in kinds):
            kind, default = list[str] | None, None
        else:
            kind = next(
                (member for member in (Path, str, bool, int, float) if member in kinds), str
            )
            if types.NoneType in kinds:
                kind = kind | None
    elif isinstance(default, Sequence) and not isinstance(default, str):
        default = ",".join(map(str, default))
    else:
        default = str(default)
    flags = option.flags or (
        (f"--{one.name.replace('_', '-')}",) if kind is bool or one.name == "windows" else ()
    )
    told = typer.Option(*flags, help=option.help, min=option.least)
    return inspect.Parameter(
        one.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=... if default is MISSING else default,
        annotation=Annotated[kind, told],
    )


def _read(one: Field[Any], hint: Any, value: Any) -> Any:
    """A value as the field holds it, from what typer has read."""
    if not one.metadata["option"].listed:
        return () if value is None and isinstance(one.default, tuple) else value
    return numbers(value) if "int" in str(hint) else split(value)


def _kinds(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def split(text: str) -> list[str]:
    """The parts of an option that is a list."""
    return [part.strip() for part in text.split(",") if part.strip()]


def numbers(text: str) -> list[int]:
    """The same where every part is a whole number."""
    try:
        return [int(part) for part in split(text)]
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no list of whole numbers") from None
