"""What several test files need: a tiny model with a tokenizer, some text, and the real data where it lies.

Nothing here may reach for the network: a hub look-up fails at once instead of waiting.
"""

# ruff: noqa: E402
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

import pytest
import torch

pytest.register_assert_rewrite("reference", "support")

from support import forks
from support.drawing import drawing
from support.families import tiny_model
from support.paths import ROOT
from support.texts import byte_tokenizer, write_documents

from secateur.evaluation.report import vega
from secateur.pruning.structured import verify

torch.set_num_threads(1)


FIRST = ("tests/test_wheel.py", "tests/test_examples.py")
"""Files of long tests: at the end one process would wait for the other."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not item.nodeid.startswith(FIRST))


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    """What a test draws does not depend on the tests before it in the same process."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def float32_passes() -> Iterator[None]:
    """What `--dtype auto` means does not depend on the machine: as on a processor without products of bfloat16."""
    with patch("secateur.system.devices.multiplies_bfloat16", lambda: False):
        yield


@pytest.fixture(autouse=True, scope="session")
def forked_check() -> Iterator[None]:
    """The check of a smaller model is made in a fork of this process, but in the tests that use `fresh_process`."""
    with patch.object(verify, "subprocess", SimpleNamespace(run=forks.run)):
        yield


@pytest.fixture(autouse=True, scope="session")
def one_drawing_process() -> Iterator[None]:
    """Pictures are drawn by one process for all tests."""
    with drawing() as run, patch.object(vega, "subprocess", SimpleNamespace(run=run)):
        yield


@pytest.fixture
def fresh_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check of a smaller model is made in a process that begins with nothing, as users have it."""
    monkeypatch.setattr(verify, "subprocess", subprocess)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder: a random float32 Llama of 4 blocks, context 128, with a byte tokenizer. Read only."""
    return _saved("llama", tmp_path_factory)


@pytest.fixture(scope="session")
def tiny_mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of a Mixtral."""
    return _saved("mixtral", tmp_path_factory)


def _saved(family: str, places: pytest.TempPathFactory) -> Path:
    folder = places.mktemp("models") / f"tiny-{family}"
    tiny_model(family).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .jsonl of 300 documents of about 200 bytes each, always the same."""
    file = tmp_path_factory.mktemp("text") / "documents.jsonl"
    write_documents(file)
    return file


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real test data beside the checkout; skips where it is missing."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"the real data is not here: {folder}")
    return folder
