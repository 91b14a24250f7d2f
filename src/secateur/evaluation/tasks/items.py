"""The zero-shot tasks, what an item of each holds, and items from a file of rows instead of from
the hub.

A file is for whom the hub is out of reach, or whose copy is not to change. A row is the columns of
the hub's data set, or holds them under the key `doc`; of ARC and OpenBookQA the plain form with
`choices` as a list and `answer_index` is taken as well. What a task needs is checked row by row
before a model sees any, so that a wrong file is one sentence and no odd accuracy: an answer that is
none of the choices would silently count as wrong.
"""

import json
import lzma
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.data.readers import rows
from secateur.errors import BadText, in_one_line
from secateur.system.typed import Whole, is_a

Row = dict[str, Any]
SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.xz", ".parquet")
WORDS = {str: "a text", Whole: "a whole number", list[str]: "a list of texts"}


@dataclass(frozen=True)
class Form:
    """What the rows of a data set hold: the type of each column, `choices.text` for one inside of
    another; and what is true of a row that can be scored, as a function and in words.
    """

    columns: dict[str, Any]
    sound: Callable[[Row], bool]
    rule: str


@dataclass(frozen=True)
class Task:
    """A task: its name and the folder of its configuration in lm-eval, what its rows hold."""

    known_as: str
    folder: str
    form: Form


def _lettered(question: str) -> Form:
    return Form(
        {question: str, "choices.text": list[str], "choices.label": list[str], "answerKey": str},
        lambda row: (
            len(row["choices"]["text"]) == len(row["choices"]["label"])
            and row["answerKey"].lstrip() in row["choices"]["label"]
            and all(map(str.strip, row["choices"]["text"]))
        ),
        "'answerKey' must be one of 'choices.label', and every choice a text",
    )


def _either(*columns: str, choices: Sequence[str] = ()) -> Form:
    return Form(
        {**dict.fromkeys(columns, str), "label": Whole},
        lambda row: row["label"] in (0, 1) and all(row[column].strip() for column in choices),
        " and ".join(["'label' must be 0 or 1", *(f"'{column}' a text" for column in choices)]),
    )


HELLASWAG = Form(
    {"activity_label": str, "ctx_a": str, "ctx_b": str, "endings": list[str], "label": str},
    lambda row: (
        row["label"] in [str(number) for number in range(len(row["endings"]))]
        and all(map(str.strip, row["endings"]))
    ),
    "'label' must be the number of one of 'endings', from \"0\", and every ending a text",
)
WINOGRANDE = Form(
    {"sentence": str, "option1": str, "option2": str, "answer": str},
    lambda row: (
        row["answer"] in ("1", "2")
        and bool(row["sentence"].partition("_")[2].strip())
        and all(row[column].strip() for column in ("option1", "option2"))
    ),
    "'answer' must be \"1\" or \"2\", 'sentence' have a _ with words after it, and both options be "
    "texts",
)
LAMBADA = Form(
    {"text": str},
    lambda row: all(map(str.strip, row["text"].rpartition(" ")[::2])),
    "'text' must end in a word with others before it",
)
TASKS = {
    "boolq": Task("boolq", "super_glue/boolq", _either("passage", "question")),
    "rte": Task("rte", "glue/rte", _either("sentence1", "sentence2")),
    "hellaswag": Task("hellaswag", "hellaswag", HELLASWAG),
    "winogrande": Task("winogrande", "winogrande", WINOGRANDE),
    "arc_easy": Task("arc_easy", "arc", _lettered("question")),
    "arc_challenge": Task("arc_challenge", "arc", _lettered("question")),
    "openbookqa": Task("openbookqa", "openbookqa", _lettered("question_stem")),
    "piqa": Task("piqa", "piqa", _either("goal", "sol1", "sol2", choices=("sol1", "sol2"))),
    "lambada": Task("lambada_openai", "lambada", LAMBADA),
}
PAPERS = tuple(TASKS)[:7]
"""The seven of Frantar & Alistarh 2023 and Sun et al. 2024; `papers` names them together."""


def find_items(name: str, folder: Path) -> Path:
    """The file with the items of a task, in a folder or in its `tasks`. Raises BadText."""
    for place in (folder, folder / "tasks"):
        for suffix in SUFFIXES:
            if (file := place / f"{name}{suffix}").is_file():
                return file
    raise BadText(
        f"There is no {name}.jsonl, .jsonl.gz, .jsonl.xz or .parquet in {folder}, nor in "
        f"{folder / 'tasks'}. Put the items there, or leave --data-dir out to fetch them."
    )


def read_items(file: Path, form: Form) -> list[Row]:
    """The rows of a file, with nothing but the columns of the form. Raises BadText."""
    items = []
    try:
        for number, row in enumerate(rows(file), 1):
            items.append(_checked(row, form, f"row {number} of {file}"))
    except UnicodeError as error:
        raise BadText(
            f"{file} is not text in UTF-8 ({in_one_line(error)}). Convert it first."
        ) from error
    except RecursionError as error:  # of an array, which begins there
        raise BadText(f"Line 1 of {file} is no JSON: {in_one_line(error)}.") from error
    except (OSError, EOFError, ValueError, RuntimeError, zlib.error, lzma.LZMAError) as error:
        raise BadText(f"{file} cannot be read: {in_one_line(error)}.") from error
    if not items:
        raise BadText(f"{file} holds no rows; one for each item was wanted.")
    return items


def _checked(row: Any, form: Form, where: str) -> Row:
    """The columns of the form, from a row as it was read. Raises BadText."""
    row = row if isinstance(row, dict) else {}
    row = row["doc"] if isinstance(row.get("doc"), dict) else row
    if "choices.text" in form.columns:
        row = _with_letters(row, form)
    item: Row = {}
    for path, kind in form.columns.items():
        outer, _, inner = path.partition(".")
        value = row.get(outer)
        if inner:
            value = value.get(inner) if isinstance(value, dict) else None
        if value is None:
            raise BadText(
                f"The column '{path}' is missing in {where}; {', '.join(form.columns)} are wanted."
            )
        if not is_a(kind, value):
            raise BadText(
                f"The column '{path}' of {where} holds a {type(value).__name__}, not {WORDS[kind]}."
            )
        json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair is a UnicodeError
        (item.setdefault(outer, {}) if inner else item)[inner or outer] = value
    if not form.sound(item):
        raise BadText(f"There is no answer to score in {where}: {form.rule}.")
    return item


def _with_letters(row: Row, form: Form) -> Row:
    """A row with `choices` as a list and `answer_index`, in the hub's columns; others as is."""
    choices: Any = row.get("choices")
    index: Any = row.get("answer_index")
    if not is_a(list[str], choices) or not is_a(Whole, index):
        return row
    letters = [chr(ord("A") + number) for number in range(len(choices))]
    answer = letters[index] if 0 <= index < len(letters) else "none"
    stem = next(iter(form.columns))  # what the hub calls the question
    return {
        stem: row.get("question"),
        "choices": {"text": choices, "label": letters},
        "answerKey": answer,
    }
