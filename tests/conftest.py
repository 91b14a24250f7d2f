"""What several test files need: a tiny model with a tokenizer, some text, and the real data where it lies.

Nothing here may reach for the network: a hub look-up fails at once instead of waiting.
"""

import json
import os
import random
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

import pytest
import torch
from families import VOCAB, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from tokenizers.decoders import ByteLevel
from transformers import PreTrainedTokenizerFast

torch.set_num_threads(1)

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


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder: a random float32 Llama of 4 blocks, context 128, with a byte tokenizer. Read only."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    tiny_model("llama").save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder: a random float32 Mixtral with a byte tokenizer. Read only."""
    folder = tmp_path_factory.mktemp("models") / "tiny-mixtral"
    tiny_model("mixtral").save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .jsonl of 300 documents of about 200 bytes each, always the same."""
    draw = random.Random(0)
    file = tmp_path_factory.mktemp("text") / "documents.jsonl"
    with file.open("w", encoding="utf-8") as stream:
        for _ in range(300):
            text = " ".join(draw.choice(WORDS) for _ in range(draw.randint(30, 70))) + ".\n"
            stream.write(json.dumps({"text": text}) + "\n")
    return file


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real test data beside the checkout; skips where it is missing."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"the real data is not here: {folder}")
    return folder
