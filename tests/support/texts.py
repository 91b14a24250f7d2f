"""The tokenizer and the text of the tiny models: needed by tests, and by bench/fuzz.py, which runs without pytest."""

import json
import random
import shutil
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from tokenizers.decoders import ByteLevel
from transformers import PreTrainedTokenizerFast

from support.families import VOCAB

WORDS = "a the one two cat dog tree road runs sees likes old new red and but then why who how no yes".split()  # noqa: SIM905


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of printable ASCII bytes, `VOCAB` tokens in all; it begins every text with `<s>`."""
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    alphabet = sorted(c for c in pre_tokenizers.ByteLevel.alphabet() if c.isascii() or c in "ĠĊ")
    vocabulary = {token: i for i, token in enumerate(special + alphabet)}
    assert len(vocabulary) <= VOCAB
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def chat_model(source: Path, out: Path, template: str) -> Path:
    """A copy of a model's folder with a chat template."""
    shutil.copytree(source, out)
    (out / "chat_template.jinja").write_text(template)
    return out


def write_documents(file: Path, count: int = 300) -> None:
    """Write a .jsonl of `count` documents of about 200 bytes each, always the same."""
    draw = random.Random(0)
    with file.open("w", encoding="utf-8") as stream:
        for _ in range(count):
            text = " ".join(draw.choice(WORDS) for _ in range(draw.randint(30, 70))) + ".\n"
            stream.write(json.dumps({"text": text}) + "\n")
