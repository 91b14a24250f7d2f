"""Byte-level tokenizers that split text by given rules, and texts on which the rules differ."""

import json

from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

TEXTS = (
    "Once upon a time, there was a xyzzy little girl.",
    "  two spaces,\ttabs\t\tand\n\nlines \r\n\r\n   \n x",
    "I'm HE'LL don't 12345 6 78.90 x=1000000",
    "naïve café — 漢字かな 안녕 Привет мир ½ ² ٣٤",
    "CamelCaseWord snake_case // path/to/file?!\n\n\n",
    "",
    " ",
)


def splitting(rules: tuple[str, ...], ignore_merges: bool) -> Tokenizer:
    """A byte-level tokenizer that splits by these rules; its merges reach over every border, so that each one shows.

    " xyzzy" is a token that no merge makes: it is only found whole, where words skip the merges.
    """
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=520, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )  # type: ignore[call-arg]
    tokenizer.train_from_iterator([text.replace(" xyzzy", "") for text in TEXTS], trainer)
    steps: list = [
        pre_tokenizers.ByteLevel(add_prefix_space=False)
        if rule.startswith("as ")
        else pre_tokenizers.Split(Regex(rule), "isolated")
        for rule in rules
    ]
    if rules[-1:] != ("as GPT-2",):
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    held = json.loads(tokenizer.to_str())
    held["model"]["vocab"]["Ġxyzzy"] = len(held["model"]["vocab"])
    return Tokenizer.from_str(json.dumps(held))
