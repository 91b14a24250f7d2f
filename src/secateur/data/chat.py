"""Conversations as text: rows of messages, through the model's own chat template.

    {"messages": [{"role": "user", "content": "…"}, …], "tools": […]}     as chat models are tuned
    {"conversations": [{"from": "human", "value": "…"}, …]}               ShareGPT
    {"instruction": "…", "input": "…", "output": "…"}                     Alpaca

Whatever else a message holds (tool calls, reasoning) is handed to the template, which takes what it
knows. Special tokens are the template's: the tokenizer adds none.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from secateur.errors import BadText, in_one_line

FIELDS = ("messages", "conversations", "instruction", "input", "output", "tools", "system")
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant"}
"""What ShareGPT calls a role, and what templates do; other names stay."""


class Chat(NamedTuple):
    """The messages of a row, the tools that they speak of, and which row it is, for errors."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None
    where: str


def chat_of(row: Mapping[str, Any], where: str) -> Chat | None:
    """The conversation in a row, None where it holds none. Raises BadText for a broken one."""
    if "messages" in row or "conversations" in row:
        name = "messages" if "messages" in row else "conversations"
        messages = [_message(one, name, where) for one in _listed(row[name], name, where)]
    elif isinstance(row.get("instruction"), str) and isinstance(row.get("output"), str):
        if not isinstance(row.get("input") or "", str):
            raise BadText(f"The field 'input' must hold text; in {where} it does not.")
        asked = "\n\n".join(filter(None, (row["instruction"], row.get("input"))))
        messages = [
            {"role": "user", "content": asked},
            {"role": "assistant", "content": row["output"]},
        ]
    else:
        return None
    if isinstance(row.get("system"), str) and row["system"] and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": row["system"]})
    return Chat(messages, row.get("tools") or None, where)


def _listed(value: Any, name: str, where: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise BadText(f"The field {name!r} must hold a list of messages; in {where} it does not.")
    return value


def _message(message: Any, name: str, where: str) -> dict[str, Any]:
    if isinstance(message, dict) and isinstance(message.get("from"), str) and "value" in message:
        role = ROLES.get(message["from"], message["from"])
        return {"role": role, "content": message["value"]}
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise BadText(
            f"Every message needs a 'role' and its 'content' (or 'from' and 'value'); one of "
            f"{name!r} in {where} has none."
        )
    return {key: value for key, value in message.items() if value is not None} | {
        "content": message.get("content") or ""
    }


def in_template(tokenizer: PreTrainedTokenizerBase, chat: Chat) -> str:
    """A conversation as the text that the model was tuned on. Raises BadText without a template."""
    return rendered(tokenizer, chat)


def rendered(tokenizer: PreTrainedTokenizerBase, chat: Chat, **options: Any) -> Any:
    """What the chat template makes of a conversation, text unless the `options` say otherwise.

    They are those of `apply_chat_template`. Raises BadText without a template.
    """
    if not tokenizer.chat_template:
        raise BadText(
            f"{chat.where} is a conversation, and the tokenizer of {tokenizer.name_or_path} has no "
            "chat template. Give rows with a field 'text', or put chat_template.jinja there."
        )
    try:
        return tokenizer.apply_chat_template(
            chat.messages, tools=chat.tools, **{"tokenize": False, **options}
        )
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
        raise BadText(
            f"The chat template of {tokenizer.name_or_path} does not take {chat.where}: "
            f"{in_one_line(error)}."
        ) from error
