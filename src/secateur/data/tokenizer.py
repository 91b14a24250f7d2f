"""The tokenizer of a checkpoint, and the token ids of texts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from secateur.data.chat import Chat, in_template
from secateur.data.long_text import Document
from secateur.errors import LIBRARY_ERRORS, BadCheckpoint, in_one_line
from secateur.system.rust import rust_errors, silent

TOKENIZER_ERRORS = (*LIBRARY_ERRORS, MemoryError)
"""What transformers raises for the files of a tokenizer."""
_TOKENIZER_FILES = ("tokenizer", "vocab", "tekken")


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint folder. Raises BadCheckpoint where there is none."""
    if not any(
        file.name.startswith(_TOKENIZER_FILES) or file.suffix in (".model", ".tiktoken")
        for file in folder.iterdir()
    ):
        raise BadCheckpoint(
            f"{folder} has no tokenizer (tokenizer.json or the like). Copy it there."
        )
    try:
        with rust_errors(folder), silent():
            tokenizer = AutoTokenizer.from_pretrained(
                folder, trust_remote_code=trust_remote_code, local_files_only=True
            )
    except TOKENIZER_ERRORS as error:
        if "trust_remote_code" in str(error):
            raise BadCheckpoint(
                f"The tokenizer of {folder} needs code of its own, which is not run unless asked "
                "for. Read that code, then add --trust-remote-code."
            ) from error
        raise BadCheckpoint(
            f"{folder} has no tokenizer that transformers can load: {in_one_line(error)}."
        ) from error
    # Of settings alone, transformers makes a tokenizer of nothing but special tokens.
    if len(set(tokenizer.get_vocab().values()) - set(tokenizer.added_tokens_decoder)) < 2:
        raise BadCheckpoint(
            f"{folder} has no tokenizer with a vocabulary. Copy tokenizer.json or the like there."
        )
    _refuse_unknown_unknown(tokenizer, folder)
    with silent():
        encode(tokenizer, ["a few words"])
    return tokenizer


def _refuse_unknown_unknown(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Raise BadCheckpoint where the token for what is unknown is unknown itself: transformers looks
    it up for ever.
    """
    try:
        tokenizer.convert_tokens_to_ids(str(tokenizer.unk_token))
    except RecursionError as error:
        raise BadCheckpoint(
            f"The tokenizer of {folder} names {tokenizer.unk_token!r} as its unk_token, which its "
            "vocabulary does not have. Mend tokenizer_config.json, or fetch it again."
        ) from error


def encode(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[Document], **options: Any
) -> list[list[int]]:
    """The token ids of every text; of conversations through the chat template.

    Raises BadCheckpoint where the tokenizer cannot take them, BadText without a template.
    """
    if chats := [text for text in texts if isinstance(text, Chat)]:
        marked = _of_chats(tokenizer, chats)
        others = [text for text in texts if not isinstance(text, Chat)]
        unmarked = encode(tokenizer, others, **options)
        of_chats, of_others = iter(marked), iter(unmarked)
        return [next(of_chats if isinstance(text, Chat) else of_others) for text in texts]
    if not texts:
        return []
    return tokenize(tokenizer, [str(text) for text in texts], **options)["input_ids"]


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], **options: Any) -> Any:
    """What the tokenizer gives for texts, its masks left out. Raises BadCheckpoint."""
    plain: Any = list(texts)
    masks = {"return_attention_mask": False, "return_token_type_ids": False}
    try:
        with rust_errors(tokenizer.name_or_path):
            return tokenizer(plain, verbose=False, **masks, **options)
    except TOKENIZER_ERRORS as error:
        raise BadCheckpoint(
            f"The tokenizer of {tokenizer.name_or_path} cannot take a text: {in_one_line(error)}."
        ) from error


def _of_chats(tokenizer: PreTrainedTokenizerBase, chats: Sequence[Chat]) -> list[list[int]]:
    """The token ids of conversations; a `Reader` has its own way with them."""
    if (own_way := getattr(tokenizer, "ids_of_chat", None)) is not None:
        return list(map(own_way, chats))
    texts = [in_template(tokenizer, chat) for chat in chats]
    return encode(tokenizer, texts, add_special_tokens=False)
