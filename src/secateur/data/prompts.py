"""Prompts that a model continues by itself: rows of files, through its chat template or as text.

{"messages": [{"role": "user", "content": "…"}, …]}     the assistant's last turns are left out
{"prompt": "…"}     what a user says, where the tokenizer has a chat template; else plain text
{"text": "…"}       plain text that goes on
"""

import random
from pathlib import Path
from typing import Any, NamedTuple

from secateur.data.chat import Chat, chat_of, rendered
from secateur.data.readers import reading, rows
from secateur.data.tokenizer import encode
from secateur.errors import BadText

PREFIX = "self:"
"""How a corpus begins that is the model's own text; behind it stand the files of its prompts."""


class Prompt(NamedTuple):
    """The token ids of a prompt, and its number among the rows."""

    number: int
    ids: list[int]


def prompt_files(source: str) -> list[Path]:
    """The files of a corpus of `PREFIX`. Raises BadText where there is none."""
    files = [Path(part) for part in source.removeprefix(PREFIX).split(",")]
    for file in files:
        if not file.is_file():
            raise BadText(
                f"There is no file {file} with prompts. Say '{PREFIX}prompts.jsonl', with rows of "
                "'messages', 'prompt' or 'text'."
            )
    return files


def read_prompts(tokenizer: Any, source: str, *, longest: int, seed: int) -> list[Prompt]:
    """The prompts of at most `longest` tokens, in an order by the seed. Raises BadText."""
    prompts: list[Prompt] = []
    for file in prompt_files(source):
        with reading(file):
            for number, row in enumerate(rows(file), 1):
                ids = _ids(tokenizer, row, f"row {number} of {file}")
                prompts.append(Prompt(len(prompts), ids))
    fitting = [prompt for prompt in prompts if 0 < len(prompt.ids) <= longest]
    if not fitting:
        raise BadText(
            f"{source.removeprefix(PREFIX)} holds {len(prompts)} prompts, none of 1 to {longest} "
            "tokens, after which --self-tokens fit the model's context."
        )
    random.Random(seed).shuffle(fitting)
    return fitting


def prompt_characters(source: str) -> list[int]:
    """How many characters each prompt has, answers that are left out and all. Raises BadText."""
    sizes: list[int] = []
    for file in prompt_files(source):
        with reading(file):
            sizes += map(_characters, rows(file))
    if not sizes:
        raise BadText(f"{source.removeprefix(PREFIX)} holds no prompts.")
    return sizes


def _characters(value: Any) -> int:
    if isinstance(value, dict | list):
        return sum(map(_characters, value.values() if isinstance(value, dict) else value))
    return len(value) if isinstance(value, str) else 0


def _ids(tokenizer: Any, row: Any, where: str) -> list[int]:
    row = row if isinstance(row, dict) else {"text": row}
    asked: Any = row.get("prompt")
    if isinstance(asked, list):  # of messages, as sets of preferences have it
        row = {**row, "messages": asked}
    elif isinstance(asked, str) and "messages" not in row:
        spoken = [{"role": "user", "content": asked}]
        row = {"messages": spoken} if tokenizer.chat_template else {"text": asked}
    if isinstance(row.get("text"), str):
        return encode(tokenizer, [row["text"]])[0]
    chat = chat_of(row, where)
    if chat is None:
        raise BadText(f"Every prompt needs 'messages', 'prompt' or 'text'; {where} has none.")
    messages = list(chat.messages)
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not messages:
        raise BadText(f"{where} has nothing that the model could answer.")
    text = rendered(tokenizer, Chat(messages, chat.tools, where), add_generation_prompt=True)
    return encode(tokenizer, [text], add_special_tokens=False)[0]
