"""Which tokens of a conversation are the assistant's: what the model itself would have said.

A chat template that marks them ({% generation %}) is asked. Of another, the conversation is
rendered up to each turn of the assistant, with the words that ask for it, and again with it: what
has come is the assistant's, the end of its turn included. Where a template renders earlier turns
otherwise once others follow (those that drop old reasoning), the content of the turn is replaced
by a mark instead, and what differs is the assistant's, with the special token behind it.
"""

import re
from typing import Any

from transformers import PreTrainedTokenizerBase

from secateur.data.chat import Chat, in_template, rendered
from secateur.errors import BadText

MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
MARK = "\u2402secateur\u2403"
Span = tuple[int, int]


def assistant_ids(tokenizer: PreTrainedTokenizerBase, chat: Chat) -> list[int]:
    """The token ids of a conversation; those that are not the assistant's as their complement.

    Raises BadText where the template, or a tokenizer without offsets, cannot tell.
    """
    ids, counted = _marked(tokenizer, chat)
    return [one if mine else ~one for one, mine in zip(ids, counted, strict=True)]


def _marked(tokenizer: PreTrainedTokenizerBase, chat: Chat) -> tuple[list[int], list[bool]]:
    if not tokenizer.is_fast:
        raise BadText(
            f"The tokenizer of {tokenizer.name_or_path} does not say which characters its tokens "
            "stand for, so the assistant's are not known. Leave --calibration-on out."
        )
    if MARKED.search(str(tokenizer.chat_template or "")):
        by_template: Any = rendered(
            tokenizer, chat, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        return by_template["input_ids"], list(map(bool, by_template["assistant_masks"]))
    text = in_template(tokenizer, chat)
    encoded: Any = tokenizer(
        text, verbose=False, add_special_tokens=False, return_offsets_mapping=True
    )
    ids, places = encoded["input_ids"], encoded["offset_mapping"]
    counted = [False] * len(ids)
    for number, message in enumerate(chat.messages):
        if message["role"] != "assistant":
            continue
        (start, end), whole = _span(tokenizer, chat, number, text)
        inside = [n for n, (first, last) in enumerate(places) if last > start and first < end]
        behind = inside[-1] + 1 if inside else len(ids)
        if not whole and behind < len(ids) and ids[behind] in tokenizer.all_special_ids:
            inside.append(behind)
        for n in inside:
            counted[n] = True
    return ids, counted


def _span(
    tokenizer: PreTrainedTokenizerBase, chat: Chat, number: int, text: str
) -> tuple[Span, bool]:
    """The characters of turn `number` in the whole conversation, and whether they are all of it."""
    before, after = chat.messages[:number], chat.messages[: number + 1]
    if before:
        asked = rendered(tokenizer, chat._replace(messages=before), add_generation_prompt=True)
        said = in_template(tokenizer, chat._replace(messages=after))
        if said.startswith(asked) and text.startswith(said):
            return (len(asked), len(said)), True
    message = chat.messages[number]
    changed = [*before, {**message, "content": MARK}, *chat.messages[number + 1 :]]
    other = in_template(tokenizer, chat._replace(messages=changed))
    head, mark, tail = other.partition(MARK)
    end = len(text) - len(tail)
    if (
        not mark
        or MARK in tail
        or not (text.startswith(head) and text.endswith(tail))
        or (end < len(head))
    ):
        raise BadText(
            f"The chat template of {tokenizer.name_or_path} does not show which words of "
            f"{chat.where} are the assistant's. Mark them there with {{% generation %}}, or leave "
            "--calibration-on out."
        )
    return (len(head), end), False
