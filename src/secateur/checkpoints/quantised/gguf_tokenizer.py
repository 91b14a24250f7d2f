"""The tokenizer in a GGUF file, as the files that transformers loads.

transformers builds it from the vocabulary in the file, and splits text by the rule of a table of
its own; a rule that it does not know becomes GPT-2's without a word, and no rule of it lets whole
words skip the merges. So the rule is put in here from the table that is used for writing GGUF, and
one that neither knows is refused: other splits give other tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tokenizers import Regex, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.integrations.gguf.gguf_tokenizer_mapping import (
    GGUF_PRE_TOKENIZER_SPLITS,
    GGUF_SENTENCEPIECE_BUILDERS,
)

from secateur.errors import LIBRARY_ERRORS, UnsupportedModel, in_one_line
from secateur.system.rust import rust_errors, silent

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+"
    rf"|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2 = "as GPT-2"
SPLITS: dict[tuple[tuple[str, ...], bool], str] = {
    ((GPT2,), False): "gpt-2",
    ((r"\p{N}", GPT2), False): "smollm",
    ((rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}|{_REST}",), False): "qwen2",
    ((rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}|{_REST}",), True): "llama-bpe",
    ((rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}|{_REST}",), False): "dbrx",
    ((_TEKKEN,), True): "tekken",
}
"""llama.cpp's name for (expressions that split a text in turn; whether whole words skip merges)."""
_RULES = {name: rule for rule, name in SPLITS.items()}
_SAME = {
    "default": "gpt-2",
    "llama3": "llama-bpe",
    "llama-v3": "llama-bpe",
    "deepseek-r1-qwen": "qwen2",
}
"""Names of llama.cpp for the rule of another name."""
_NAMES = ("tokenizer.json", "tokenizer_config.json")
_TEMPLATE = "chat_template.jinja"


def tokenizer_files(
    file: Path, settings: Mapping[str, Any], count: int
) -> dict[str, Callable[[Path], None]]:
    """What writes each file of the tokenizer of a model with `count` tokens. Raises
    UnsupportedModel for an unknown rule.
    """
    if settings.get("tokenizer.ggml.model") == "gpt2":
        _rule(file, settings)
    names = [*_NAMES]
    template = settings.get("tokenizer.chat_template")
    names += [_TEMPLATE] if template and isinstance(template, str) else []
    saved = lru_cache(maxsize=1)(partial(_saved, file, settings, count))
    return {name: partial(_write, saved, name) for name in names}


def _write(saved: Callable[[], dict[str, bytes]], name: str, place: Path) -> None:
    place.write_bytes(saved()[name])


def _saved(file: Path, settings: Mapping[str, Any], count: int) -> dict[str, bytes]:
    """The files of the tokenizer by name, as transformers saves it with the rule put right and
    without the tokens of other models that it adds.
    """
    try:
        with rust_errors(file), silent():
            tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(
                file.parent, gguf_file=file.name
            )
    except LIBRARY_ERRORS as error:
        raise UnsupportedModel(
            f"The vocabulary of {file} is none that transformers can read ({in_one_line(error)}). "
            "Use the original checkpoint."
        ) from error
    rule = _rule(file, settings) if settings.get("tokenizer.ggml.model") == "gpt2" else None
    backend = tokenizer.backend_tokenizer
    if rule is not None:
        backend.pre_tokenizer = _pre_tokenizer(rule[0])
    elif _is_sentencepiece(settings):
        backend.pre_tokenizer, backend.normalizer = None, _spaces(settings)
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
    whole, words = (json.loads(files[name]) for name in _NAMES)
    if rule is not None and rule[1]:
        whole["model"]["ignore_merges"] = True
    foreign = [token["content"] for token in whole["added_tokens"] if token["id"] >= count]
    whole["added_tokens"] = [one for one in whole["added_tokens"] if one["content"] not in foreign]
    words = {key: value for key, value in words.items() if value not in foreign}
    for name, value in zip(_NAMES, (whole, words), strict=True):
        files[name] = json.dumps(value, indent=2, ensure_ascii=False).encode()
    return files


def _rule(file: Path, settings: Mapping[str, Any]) -> tuple[tuple[str, ...], bool] | None:
    """The expressions by which the tokenizer splits a text, and whether whole words skip merges;
    None where transformers' table has it.
    """
    name: str = settings.get("tokenizer.ggml.pre", "default")
    if (rule := _RULES.get(_SAME.get(name, name))) is not None:
        return rule
    if name in GGUF_PRE_TOKENIZER_SPLITS:
        return None
    raise UnsupportedModel(
        f"The tokenizer of {file} splits text by the rule {name!r}, which is not known here: "
        f"tokens would be others. Known: {', '.join(sorted(_RULES | GGUF_PRE_TOKENIZER_SPLITS))}. "
        "Use the original checkpoint."
    )


def _is_sentencepiece(settings: Mapping[str, Any]) -> bool:
    """Whether a vocabulary is SentencePiece's, of a model for which transformers has no reader."""
    own = settings["general.architecture"] in GGUF_SENTENCEPIECE_BUILDERS
    return settings.get("tokenizer.ggml.model") == "llama" and not own


def _spaces(settings: Mapping[str, Any]) -> Any:
    """Spaces as llama.cpp writes them: each is kept, and one comes first where the file says so.
    transformers' Metaspace, which it puts there, adds none before a text that begins with one.
    """
    first = settings.get("tokenizer.ggml.add_space_prefix", True)
    steps: list[Any] = [normalizers.Prepend("▁")] if first else []
    return normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])


def _pre_tokenizer(rule: tuple[str, ...]) -> Any:
    """The pre-tokenizer of a byte-level vocabulary that splits by these expressions in turn."""
    steps: list[Any] = [
        pre_tokenizers.Digits(individual_digits=True)
        if expression == r"\p{N}"
        else pre_tokenizers.Split(Regex(expression), behavior="isolated")
        for expression in rule
        if expression != GPT2
    ]
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=GPT2 in rule)
    return pre_tokenizers.Sequence([*steps, last]) if steps else last
