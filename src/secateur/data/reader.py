"""A tokenizer that reads texts in one way: where BOS stands, and which tokens of chats count.

Where BOS is taken out, the end-of-text token follows each document, as it does under a tokenizer
that puts in none. Tokens that do not count are their own complement (`~id`, below zero) on their
way through whatever draws windows, so that nothing which cuts tokens needs to know of them.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from secateur.data.assistant import assistant_ids
from secateur.data.bos import adds_bos
from secateur.data.chat import Chat, in_template
from secateur.data.windows import Windows
from secateur.errors import BadText, NotEnoughText


@dataclass(frozen=True)
class Reader:
    """A tokenizer, `bos` of `WAYS` and `counted` of `COUNTED`; whatever else is the tokenizer's."""

    tokenizer: PreTrainedTokenizerBase
    bos: str = "stream"
    counted: str = "all"

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def __call__(self, texts: Any, **options: Any) -> dict[str, Any]:
        """What the tokenizer gives for a list of texts, as they are read."""
        encoded: Any = self.tokenizer(texts, **options)
        ids = encoded["input_ids"]
        left_out = [len(one) - len(self.read(one)) for one in ids]
        return {
            name: [one[first:] for one, first in zip(values, left_out, strict=True)]
            for name, values in encoded.items()
        }

    def read(self, ids: list[int]) -> list[int]:
        """The token ids of a document, without a BOS at its start unless it is a stream."""
        begins = ids[:1] == [self.tokenizer.bos_token_id]
        return ids[1:] if self.bos != "stream" and begins else ids

    def num_special_tokens_to_add(self) -> int:
        """How many special tokens are put around a text."""
        taken_out = self.bos != "stream" and adds_bos(self.tokenizer)
        return self.tokenizer.num_special_tokens_to_add() - taken_out

    def ids_of_chat(self, chat: Chat) -> list[int]:
        """The token ids of a conversation through the chat template. Raises BadText."""
        if self.counted == "all":
            text = in_template(self.tokenizer, chat)
            plain: Any = self.tokenizer(text, verbose=False, add_special_tokens=False)["input_ids"]
            return self.read(plain)
        ids = assistant_ids(self.tokenizer, chat)
        bos: Any = self.tokenizer.bos_token_id
        begins = self.bos != "stream" and bos is not None and ids[:1] in ([bos], [~bos])
        return ids[1:] if begins else ids

    def windows(self, length: int, draw: Callable[[Any, int], Windows]) -> Windows:
        """What `draw(tokenizer, length)` gives, read in this way, in windows of `length` tokens.

        Raises what `draw` raises; BadText, NotEnoughText where no token counts.
        """
        if (self.bos, self.counted) == ("stream", "all"):
            return draw(self.tokenizer, length)
        if self.bos != "each-window":
            return self._counted(draw(self, length))
        if length < 3:
            raise NotEnoughText(
                f"Windows of BOS and at least 2 tokens were wanted; found a length of {length}. "
                "Use a greater --seq-len, or --bos stream."
            )
        drawn = self._counted(draw(self, length - 1))
        bos: Any = self.tokenizer.bos_token_id
        first = torch.full_like(drawn.ids[:, :1], int(bos))
        counted = drawn.counted
        if counted is not None:
            counted = torch.cat([torch.zeros_like(counted[:, :1]), counted], 1)
        return replace(drawn, ids=torch.cat([first, drawn.ids], 1), counted=counted)

    def _counted(self, drawn: Windows) -> Windows:
        """Windows as they were drawn, with the tokens that count apart from their ids."""
        drawn = replace(drawn, bos=self.bos)
        if self.counted == "all":
            return drawn
        counted = drawn.ids >= 0
        if counted.all():
            raise BadText(
                f"--calibration-on assistant wants conversations; none was found in {drawn.source}."
                " Give rows of messages, or leave it out."
            )
        if not counted.any():
            raise NotEnoughText(
                f"No token in {drawn.ids.shape[0]} windows of {drawn.source} is the assistant's. "
                "Use more --samples, or leave --calibration-on out."
            )
        return replace(drawn, ids=torch.where(counted, drawn.ids, ~drawn.ids), counted=counted)
