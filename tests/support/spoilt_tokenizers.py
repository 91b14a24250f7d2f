"""Tokenizers that somebody spoilt: the settings of tokenizer_config.json, vocabulary and steps of tokenizer.json."""

from __future__ import annotations

from random import Random
from typing import Any


def spoil_tokenizer_settings(held: dict[str, Any], draw: Random) -> str:
    """Change a setting in place; returns what was done."""
    changes: dict[str, tuple[Any, ...]] = {
        "tokenizer_class": ("LlamaTokenizer", "X", "PreTrainedTokenizer", "../x", 1),
        "bos_token": (1, "x", {}, "<b>"),
        "model_max_length": (-1, 0, "x", 10**400),
        "added_tokens_decoder": ({"0": "x"}, {"4000000000": {"content": "z"}}, {"x": {"content": "y"}}, []),
        "auto_map": ({"AutoTokenizer": ["own.T", None]}, {"AutoTokenizer": 1}, "x"),
        "chat_template": ("{{" * 1000, {"a": 1}, 1), "extra_special_tokens": ({"a": 1}, [1], "x"),
        "backend": ("x", 1),
        "vocab_file": ("/dev/zero",), "add_bos_token": ("x",), "truncation_side": ("up",), "padding_side": (1,),
        "tokenizer_file": ("../sentinel/secret.txt",), "processor_class": ("X", 1), "fix_mistral_regex": (True,),
    }  # fmt: skip
    name = draw.choice(sorted(changes))
    held[name] = draw.choice(changes[name])
    return f"{name} {held[name]!r:.60}"


def spoil_vocabulary(held: dict[str, Any], draw: Random) -> str:
    """Change the vocabulary or a step of a tokenizer.json in place; returns what was done."""
    vocabulary = held["model"]["vocab"]
    what = draw.choice(["big", "huge ids", "same ids", "negative", "merges", "no merges", "added", "kind", "parts"])
    if what == "big":
        vocabulary |= {f"w{i}": len(vocabulary) + i for i in range(draw.choice([10, 1000, 50_000]))}
    elif what in ("huge ids", "same ids", "negative"):
        number = {"huge ids": draw.choice([2**31, 2**32 - 1, 10**6]), "same ids": 5}.get(what, -1)
        for token in draw.sample(sorted(vocabulary), 5):
            vocabulary[token] = number
    elif what == "merges":
        held["model"]["merges"] = draw.choice([[["a", "b"]], ["a b"], ["a"], [[1, 2]], [["t", "h"], ["th", "e"]], "x"])
    elif what == "no merges":
        del held["model"]["merges"]
    elif what == "added":
        number = draw.choice([0, 127, 128, 10**6, 4_000_000_000, -1])
        token = {"id": number, "content": draw.choice(["", "a", "<b>", "\ud800"]), "special": True}
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        held["added_tokens"].append(token | flags)
    elif what == "kind":
        held["model"] = draw.choice(
            [{"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "x"}, {"type": "Unigram", "vocab": [], "unk_id": 7},
             {"type": "Unigram", "vocab": [["a", float("-inf")]], "unk_id": 0}, {"type": "X"},
             {"type": "WordPiece", "vocab": {}, "unk_token": "?", "continuing_subword_prefix": "",
              "max_input_chars_per_word": 0}]
        )  # fmt: skip
    else:
        part = draw.choice(["normalizer", "pre_tokenizer", "post_processor", "decoder", "truncation", "padding"])
        held[part] = draw.choice(
            [None, {"type": "X"}, {"type": "Replace", "pattern": {"Regex": "("}, "content": ""},
             {"type": "Split", "pattern": {"Regex": ""}, "behavior": "Isolated", "invert": False},
             {"type": "Prepend", "prepend": "x" * 1000}, {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
             {"max_length": 0, "strategy": "LongestFirst", "stride": 9, "direction": "Right"},
             {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
             {"strategy": {"Fixed": 2000}, "direction": "Left", "pad_id": 10**6, "pad_type_id": 0, "pad_token": "x",
              "pad_to_multiple_of": None},
             {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "?", "type_id": 0}}], "pair": [],
              "special_tokens": {"?": {"id": "?", "ids": [10**6], "tokens": ["?"]}}}]
        )  # fmt: skip
        what = f"{part} {held[part]!r:.80}"
    return what
