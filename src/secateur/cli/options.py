"""Commands whose options are made from the fields of `system.settings`."""

import inspect
import re
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from secateur.system.settings import Option

Model = Annotated[
    str | None, typer.Argument(help="A checkpoint folder or hub name. Default: the embedded demo.")
]
Quiet = Annotated[bool, typer.Option("--quiet", metavar="", help="Show no progress.")]
AsJson = Annotated[bool, typer.Option("--json", metavar="", help="Print one JSON document.")]


class Declared(NamedTuple):
    """A field of an options class, its type, and the heading under which `--help` lists it."""

    field: Field[Any]
    hint: Any
    heading: str

    @property
    def option(self) -> Option:
        return self.field.metadata["option"]


def options(
    *classes: type, without: Sequence[str] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of these classes, but those `without`.

    The command takes them as its first argument, a dictionary by name of field; its other
    parameters are typer's. In `--help` what must be given comes first, then what the command
    declares itself, then the classes in this order, each under the first words of its docstring.
    """
    made = {
        declared.field.name: declared
        for cls in classes
        for declared in _declared(cls)
        if declared.field.name not in without
    }

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
        parameters = [*own, *map(_parameter, made.values())]
        parameters = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in parameters]
        parameters.sort(key=lambda one: one.default is not ...)

        def run(**values: Any) -> None:
            given = {name: _read(declared, values.pop(name)) for name, declared in made.items()}
            command(given, **values)

        paragraphs = (inspect.getdoc(command) or "").split("\n\n")
        run.__doc__ = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
        run.__name__ = command.__name__
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {one.name: one.annotation for one in parameters}
        return run

    return decorate


def _declared(cls: type) -> list[Declared]:
    """The options of a class in the order of their declaration, those of its bases last."""
    hints = typing.get_type_hints(cls)
    heading = " ".join(re.split(r"[.,:;]", cls.__doc__ or cls.__name__)[0].split())
    origin = {name: base for base in cls.__mro__ for name in inspect.get_annotations(base)}
    own_first = sorted(fields(cls), key=lambda one: cls.__mro__.index(origin[one.name]))
    return [
        Declared(one, hints[one.name], heading) for one in own_first if "option" in one.metadata
    ]


def _parameter(declared: Declared) -> inspect.Parameter:
    """What typer is told of a field."""
    option, hint, default = declared.option, declared.hint, declared.field.default
    members = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    kind: Any = next((one for one in (Path, str, bool, int, float) if one in members), str)
    if option.listed:
        kind, values = str, default if isinstance(default, Sequence) else [default]
        default = ",".join(map(str, [values] if isinstance(values, str) else values))
    elif any(typing.get_origin(one) is not None for one in members):
        kind, default = list[str] | None, None
    elif types.NoneType in members:
        kind = kind | None
    flag = f"--{declared.field.name.replace('_', '-')}"
    shape = {"": kind is bool, "<str>": kind == list[str] | None, "<int>": option.least is not None}
    shown = typer.Option(
        *(option.flags or (flag,)),
        help=option.help,
        min=option.least,
        metavar=next((text for text, wanted in shape.items() if wanted), None),
        rich_help_panel=None if default is MISSING else declared.heading,
    )
    return inspect.Parameter(
        declared.field.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=... if default is MISSING else default,
        annotation=Annotated[kind, shown],
    )


def _read(declared: Declared, value: Any) -> Any:
    """A value as the field holds it, from what typer has read."""
    if not declared.option.listed:
        return () if value is None and isinstance(declared.field.default, tuple) else value
    parts = [part.strip() for part in value.split(",") if part.strip()]
    if "int" not in str(declared.hint):
        return parts
    try:
        return list(map(int, parts))
    except ValueError:
        raise typer.BadParameter(f"{value!r} is no list of whole numbers") from None
