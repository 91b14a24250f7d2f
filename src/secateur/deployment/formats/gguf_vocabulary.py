"""The tokenizer in a GGUF file: byte-level BPE, or SentencePiece's kind with byte fallback.

llama.cpp splits text by rules that it knows by name (`tokenizer.ggml.pre`). Its own converter finds
the name by a hash of what a whole tokenizer makes of a text; here it is found from the rule itself
in tokenizer.json, so that a tokenizer trained anew by a known rule is known as well. A rule that is
not in the table is refused, since a wrong one would give other tokens without a word. Unicode
normalisation (NFC, in Qwen's tokenizers) is left to the user's text.

llama.cpp has no merges for SentencePiece's kind: it joins neighbours whose union is a token, the
highest score first. The merges in tokenizer.json say the same thing where they hold every such pair
and the pairs of one token follow each other; both are checked, and a score is then minus the place
of a token's first merge.
"""

from itertools import groupby, product
from pathlib import Path
from typing import Any, NamedTuple

from secateur.checkpoints.quantised.gguf_tokenizer import GPT2, SPLITS
from secateur.data.tokenizer import encode, load_tokenizer
from secateur.errors import UnsupportedModel, in_one_line
from secateur.system.json_files import read_json


class Vocabulary(NamedTuple):
    """Tokens in order and the names of their `gguf.TokenType`.

    Byte-level BPE has `pre` and `merges`; SentencePiece's kind has neither, but `scores`.
    """

    tokens: list[str]
    types: list[str]
    pre: str | None = None
    merges: list[str] | None = None
    scores: list[float] | None = None
    space_prefix: bool = False


def add_vocabulary(gguf: Any, writer: Any, folder: Path, size: int) -> None:
    """Add `size` tokens and what they mean. Raises UnsupportedModel, BadCheckpoint."""
    tokenizer: Any = load_tokenizer(folder)
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise UnsupportedModel(
            f"{folder} has no tokenizer.json. Load its tokenizer and call save_pretrained."
        )
    try:
        vocabulary = read_vocabulary(read_json(file), size)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise UnsupportedModel(
            f"{file} is of a form that is not known here: {in_one_line(error)}."
        ) from error
    writer.add_tokenizer_model("llama" if vocabulary.pre is None else "gpt2")
    writer.add_tokenizer_pre(vocabulary.pre or "default")
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types([gguf.TokenType[kind] for kind in vocabulary.types])
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(vocabulary.space_prefix)
    else:
        writer.add_token_merges(vocabulary.merges)
    first, last = _ends(tokenizer, folder)
    writer.add_add_bos_token(first)
    writer.add_add_eos_token(last)
    for name in ("bos", "eos", "unk", "pad"):
        if (number := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(number)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _ends(tokenizer: Any, folder: Path) -> tuple[bool, bool]:
    """Whether a text gets a first and a last token. Raises UnsupportedModel."""
    plain = encode(tokenizer, ["a"], add_special_tokens=False)[0]
    whole = encode(tokenizer, ["a"])[0]
    bos, eos = [tokenizer.bos_token_id], [tokenizer.eos_token_id]
    for first, last in product((False, True), repeat=2):
        if eos != [None] and whole == bos * first + plain + eos * last:
            return first, last
    raise UnsupportedModel(
        f"The tokenizer of {folder} makes {whole} of 'a', with {eos[0]} for the end; llama.cpp "
        "knows one token before a text, one after it, and wants the end named."
    )


def read_vocabulary(tokenizer: dict[str, Any], size: int) -> Vocabulary:
    """The vocabulary in a tokenizer.json, filled up to `size` tokens. Raises UnsupportedModel."""
    model, added = tokenizer["model"], {token["id"]: token for token in tokenizer["added_tokens"]}
    if model["type"] != "BPE":
        raise UnsupportedModel(f"The tokenizer is a {model['type']}; for GGUF a BPE was wanted.")
    text = {number: token for token, number in model["vocab"].items()}
    text |= {number: token["content"] for number, token in added.items()}
    if max(text) >= size:
        raise UnsupportedModel(
            f"The tokenizer gives token {max(text)}, the model has {size}: "
            "they do not belong together."
        )
    fallback = bool(model.get("byte_fallback"))

    def kind(number: int) -> str:
        if number not in text:
            return "UNUSED"
        if fallback and text[number] == model.get("unk_token"):
            return "UNKNOWN"
        if number in added:
            return "CONTROL" if added[number]["special"] else "USER_DEFINED"
        byte = fallback and len(text[number]) == 6 and text[number].startswith("<0x")
        return "BYTE" if byte else "NORMAL"

    tokens = [text.get(number, f"[unused {number}]") for number in range(size)]
    types = [kind(number) for number in range(size)]
    merges = [_pair(merge) for merge in model["merges"]]
    if not fallback:
        return Vocabulary(tokens, types, _split_name(tokenizer), list(map(" ".join, merges)))
    normal = {token for token, kind in zip(tokens, types, strict=True) if kind == "NORMAL"}
    prefix = _space_prefix(tokenizer, normal)
    first, lowest = _scores(merges, normal), -1.0 - len(merges)
    scores = [first.get(token, lowest) for token in tokens]
    return Vocabulary(tokens, types, scores=scores, space_prefix=prefix)


def _pair(merge: str | list[str]) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _steps(step: dict[str, Any] | None, parts: str) -> list[dict[str, Any]]:
    """The steps of a normaliser or pre-tokenizer, a sequence taken apart."""
    if step is None:
        return []
    return step[parts] if step["type"] == "Sequence" else [step]


def _rule(step: dict[str, Any]) -> str:
    """The expression that a pre-tokenizer splits by, or its name where it is no known kind."""
    if step["type"] == "ByteLevel" and not step["add_prefix_space"]:
        return GPT2 if step.get("use_regex", True) else ""
    if step["type"] == "Digits" and step["individual_digits"]:
        return r"\p{N}"
    if step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        return step["pattern"].get("Regex", "a fixed text")
    return f"{step['type']} {step}"


def _split_name(tokenizer: dict[str, Any]) -> str:
    """llama.cpp's name for the way a byte-level tokenizer splits a text."""
    steps = _steps(tokenizer.get("pre_tokenizer"), "pretokenizers")
    rules = tuple(rule for step in steps if (rule := _rule(step)))
    normalizers = _steps(tokenizer.get("normalizer"), "normalizers")
    others = [step["type"] for step in normalizers if step["type"] != "NFC"]
    name = SPLITS.get((rules, bool(tokenizer["model"].get("ignore_merges"))))
    if name is None or others or steps[-1]["type"] != "ByteLevel":
        way = ", ".join([*others, *rules]) or "not at all"
        raise UnsupportedModel(
            f"llama.cpp is not known to split text as this tokenizer does: {way}. "
            f"Known: {', '.join(SPLITS.values())}. Try llama.cpp's own convert_hf_to_gguf.py."
        )
    return name


def _space_prefix(tokenizer: dict[str, Any], normal: set[str]) -> bool:
    """Whether a space is put before a text. Raises UnsupportedModel for what llama.cpp does not."""
    prefix, inner = False, False
    steps = _steps(tokenizer.get("normalizer"), "normalizers")
    for step in steps + _steps(tokenizer.get("pre_tokenizer"), "pretokenizers"):
        kind = step["type"]
        if kind == "Prepend" and step["prepend"] == "▁":
            prefix = True
        elif kind == "Metaspace" and step["replacement"] == "▁":
            prefix = step.get("prepend_scheme", "always") != "never"
            inner |= step.get("split", True) and any("▁" in token[1:] for token in normal)
        elif (
            kind == "Split"
            and step["pattern"] == {"Regex": "▁+"}
            and step["behavior"] == "MergedWithNext"
        ):
            inner |= any("▁" in token.lstrip("▁") for token in normal)
        elif kind != "Replace" or (step["pattern"], step["content"]) != ({"String": " "}, "▁"):
            raise UnsupportedModel(
                f"The tokenizer has a step {kind}, which llama.cpp's SentencePiece lacks."
            )
    if inner:
        raise UnsupportedModel(
            "The tokenizer splits text at spaces, but has tokens that reach across one."
        )
    return prefix


def _scores(merges: list[tuple[str, str]], normal: set[str]) -> dict[str, float]:
    """Minus the place of the first merge of every token that has one. Raises UnsupportedModel."""
    made = [token for token, _ in groupby(left + right for left, right in merges)]
    known = set(merges)
    for token in sorted(normal):
        for cut in range(1, len(token)):
            pair = token[:cut], token[cut:]
            if pair not in known and normal.issuperset(pair):
                raise UnsupportedModel(
                    f"The tokenizer never merges {pair}, but llama.cpp would: {token!r} is a token."
                )
    if len(made) != len(set(made)):
        raise UnsupportedModel(
            "The tokenizer's merges of one token do not follow each other, as llama.cpp's would."
        )
    return {token: -float(place) for place, token in enumerate(made)}
