"""What a user may name as text: files, folders, globs, data sets, and mixtures of them."""

import json
import math
from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet
from support.texts import byte_tokenizer

from secateur.data import corpora
from secateur.data.calibration import apportioned, calibration_windows
from secateur.data.corpora import corpus_of
from secateur.data.sources import CORPORA, DataSet, read_shares, read_source
from secateur.data.windows import evaluation_windows
from secateur.errors import BadText, NotEnoughText, UnknownName


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """The working folder, with some text below it."""
    monkeypatch.chdir(tmp_path)
    texts = {
        "a.txt": "a text",
        "b.jsonl": '{"text": "b text", "body": "b body"}\n',
        "with, comma.txt": "comma text",
        "with space.txt": "space text",
        "odd[1].txt": "odd text",
        "many/z.txt": "z text",
        "many/deep/y.jsonl": '{"text": "y text"}\n',
        "many/.git/x.txt": "hidden",
        "many/picture.png": "no text",
        "code/one.py": "one = 1\n",
        "code/two.py": "two = 2\n",
    }
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def read(source: str) -> list[Any]:
    return list(corpus_of(source, "train", None).documents())


@pytest.mark.parametrize(
    ("source", "texts"),
    [
        ("a.txt", ["a text"]),
        ("a.txt,b.jsonl", ["a text", "b text"]),
        ("a.txt, b.jsonl", ["a text", "b text"]),
        ("with, comma.txt", ["comma text"]),
        ("a.txt,with, comma.txt,b.jsonl", ["a text", "comma text", "b text"]),
        ("with space.txt", ["space text"]),
        ("odd[1].txt", ["odd text"]),
        ("many", ["y text", "z text"]),  # many/deep/y.jsonl, many/z.txt
        ("many/", ["y text", "z text"]),
        ("code/*.py", ["one = 1\n", "two = 2\n"]),
        ("**/*.txt", ["a text", "z text", "odd text", "space text", "comma text"]),
        ("[ab].*", ["a text", "b text"]),
        ("b.jsonl:body", ["b body"]),
        ("[b].jsonl:body", ["b body"]),
        ("a.txt,b.jsonl:body", ["a text", "b body"]),
        ("many,code/one*", ["y text", "z text", "one = 1\n"]),
    ],
)
def test_names_of_text(place, source, texts):
    assert sorted(read(source)) == sorted(texts)
    if "*" not in source:
        assert read(source) == texts


@pytest.mark.parametrize(
    ("source", "error", "words"),
    [
        ("c5", UnknownName, "There is no corpus 'c5'. Known: c4, demo"),
        ("no.txt", BadText, r"There is no text file no\.txt\."),
        ("a.txt,no.txt", BadText, r"There is no text file no\.txt\."),
        ("no/*.txt", BadText, r"No file matches 'no/\*\.txt'\. Look at the folder"),
        ("code", BadText, r"code holds no text file; its files end in \.py\. Take some by a glob: 'code/\*\*/\*\.py'"),
        ("code/one.py", BadText, r"one\.py is no text file that can be read; \.txt, \.jsonl"),
        ("a.txt(train)", BadText, r"a\.txt is a file; a subset or split is for data sets and folders"),
        ("c4,a.txt", BadText, r"'c4,a.txt' names c4 beside others; only files make one corpus.*'c4:0.5,a.txt:0.5'"),
        ("b.jsonl:nobody", BadText, r"needs a field 'nobody'; row 1 of b\.jsonl has none; it has 'text', 'body'"),
        ("", UnknownName, "There is no corpus ''"),
        (",", UnknownName, "There is no corpus ''"),
        ("\0", UnknownName, "There is no corpus"),
    ],
)
def test_names_of_nothing(place, source, error, words):
    (place / "empty").mkdir(exist_ok=True)
    with pytest.raises(error, match=words):
        read(source)


def test_a_folder_with_nothing_in_it(place):
    (place / "empty").mkdir()
    with pytest.raises(BadText, match=r"empty holds no text file\. Put some there: \.txt"):
        read("empty")


def test_a_name_that_can_be_read_in_two_ways(place):
    for name in ("x", "y.txt", "x,y.txt"):
        (place / name).write_text(name)
    with pytest.raises(
        BadText, match=r"'x,y\.txt' is a file, and so is each of its parts\. Name the one file by a glob"
    ):
        read("x,y.txt")
    assert read("x?y.txt") == ["x,y.txt"]


def test_a_table_without_text(place):
    parquet.write_table(pa.table({"body": ["x"]}), place / "t.parquet")
    with pytest.raises(BadText, match=r"needs a field 'text' or 'messages'; row 1 of t\.parquet has none"):
        read("t.parquet")
    assert read("t.parquet:body") == ["x"]


# Data sets.


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the hub: what it was asked for, and rows in splits as `datasets` streams them."""
    asked = []

    def load_dataset(path, name=None, *, split=None, streaming=False):
        asked.append((path, name, split, streaming))
        if path == "no/where":
            raise FileNotFoundError("Couldn't find any data file")
        if split not in ("train", "test"):
            raise ValueError(f'Bad split: {split}. Available splits: ["train", "test"]')
        table = {"text": [f"{split} {number:04d} " * 4 for number in range(400)], "code": ["x"] * 400}
        return datasets.Dataset.from_dict(table).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


@pytest.mark.parametrize(
    ("source", "asked"),
    [
        ("owner/name", ("owner/name", None, "train", True)),
        ("owner/name[sub-set.1]", ("owner/name", "sub-set.1", "train", True)),
        ("owner/name[sub](test)", ("owner/name", "sub", "test", True)),
        ("owner/name(test):code", ("owner/name", None, "test", True)),
        ("name[sub]:code", ("name", "sub", "train", True)),
    ],
)
def test_data_sets_of_the_hub_are_streamed(place, hub, source, asked):
    texts = read(source)
    assert hub == [asked]
    assert texts[0] == ("x" if source.endswith("code") else f"{asked[2]} 0000 " * 4)
    assert len(texts) == 400


def test_a_data_set_is_drawn_shuffled_by_the_seed(place, hub, monkeypatch):
    def draw(seed):
        return calibration_windows(byte_tokenizer(), "owner/name", samples=20, length=32, seed=seed)

    one, again, other = draw(0), draw(0), draw(1)
    assert one.fingerprint() == again.fingerprint() != other.fingerprint()
    assert (one.source, one.split, one.available_tokens) == ("owner/name", "train", 400 * (44 + 1))
    monkeypatch.setattr(corpora, "LARGE", 4000)
    assert (draw(0).fingerprint()["drawn"], draw(0).available_tokens) == ("from what came first", None)
    few = calibration_windows(byte_tokenizer(), "owner/name", samples=5, length=32, seed=0)
    assert few.fingerprint()["drawn"] == "from random groups of documents"
    judged = evaluation_windows(byte_tokenizer(), "owner/name", length=32, windows=5)
    assert judged.split == "test"
    text: Any = byte_tokenizer().decode(judged.ids[0], skip_special_tokens=True)
    assert text.startswith("test 0000 test 0000")  # in order, from its beginning
    with pytest.raises(BadText, match=r"owner/name is longer than what is read of a data set\. Use --windows"):
        evaluation_windows(byte_tokenizer(), "owner/name", length=32)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (
            "owner/name(dev)",
            r"owner/name\(dev\) could not be read as a data set, split 'dev': Bad split: dev\. Available",
        ),
        (
            "no/where",
            r"no/where could not be read as a data set.*Couldn't find any data file\. It is neither a file nor",
        ),
        ("owner/name:nothing", r"needs a field 'nothing'; row 1 of owner/name:nothing has none; it has 'text', 'code'"),
    ],
)
def test_data_sets_that_are_not_there(place, hub, source, words):
    with pytest.raises(BadText, match=words):
        read(source)


def test_a_folder_as_a_data_set(place):
    """Through `datasets` itself, which finds the splits by the names of files."""
    (place / "set").mkdir()
    for split in ("train", "test"):
        (place / "set" / f"{split}.jsonl").write_text(json.dumps({"text": split, "body": f"{split} body"}) + "\n")
    assert read("set(test)") == ["test"]
    assert read("set(train):body") == ["train body"]
    assert read("set") == ["test", "train"]
    with pytest.raises(BadText, match=r"could not be read as a data set, split 'dev'"):
        read("set(dev)")


# Mixtures.


@pytest.fixture
def texts(tmp_path, monkeypatch) -> Path:
    """Three texts that are told apart by their letters."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("a" * 5000)
    (tmp_path / "b,c.jsonl").write_text('{"text": "' + "b" * 5000 + '"}\n')
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "one.py").write_text("c" * 2500)
    (tmp_path / "code" / "two.py").write_text("c" * 2500)
    return tmp_path


def letters(windows) -> list[str]:
    """Of each window the letters that are in it."""
    tokenizer: Any = byte_tokenizer()
    return ["".join(sorted(set(tokenizer.decode(ids, skip_special_tokens=True)))) for ids in windows.ids]


def mixed(source: str, samples: int = 20, seed: int = 0):
    return calibration_windows(byte_tokenizer(), source, samples=samples, length=32, seed=seed)


def test_a_mixture_has_windows_by_share_and_each_is_of_one_text(texts):
    source = "a.txt:0.5,b,c.jsonl:0.3,code/*.py:0.2"
    windows = mixed(source)
    assert Counter(letters(windows)) == {"a": 10, "b": 6, "c": 4}
    assert len(set(letters(windows)[:8])) == 3  # what comes first is mixed
    assert letters(mixed(source, seed=1)) != letters(windows)
    fingerprint = windows.fingerprint()
    assert (fingerprint["source"], fingerprint["split"], fingerprint["samples"]) == (source, "mixture", 20)
    assert [(part["source"], part["share"], part["samples"], part["tokens"]) for part in fingerprint["parts"]] == [
        ("a.txt", 0.5, 10, 320), ("b,c.jsonl", 0.3, 6, 192), ("code/*.py", 0.2, 4, 128),
    ]  # fmt: skip
    assert json.loads(json.dumps(fingerprint)) == fingerprint == mixed(source).fingerprint()


def test_a_part_is_drawn_as_it_is_alone(texts):
    windows = mixed("a.txt:3,code/*.py:1")
    alone = calibration_windows(byte_tokenizer(), "code/*.py", samples=5, length=32, seed=0)
    of_code = [number for number, letter in enumerate(letters(windows)) if letter == "c"]
    assert torch.equal(windows.ids[of_code].sort(0).values, alone.ids.sort(0).values)


@pytest.mark.parametrize("source", ["a.txt:1,code/*.py:3", "a.txt:25%,code/*.py:75%", "a.txt: .25, code/*.py:7.5e-1"])
def test_shares_need_not_add_up(texts, source):
    assert Counter(letters(mixed(source))) == {"a": 5, "c": 15}


def test_a_file_of_any_ending_may_be_mixed_in(texts):
    assert Counter(letters(mixed("code/one.py:1,a.txt:1"))) == {"a": 10, "c": 10}


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("a.txt:0,code/*.py:1", r"'0' is no share; a number above 0 was wanted, such as 0\.5\. Leave a part out"),
        ("a.txt:-1,code/*.py:1", "'-1' is no share"),
        ("a.txt:nan,code/*.py:1", "'nan' is no share"),
        ("a.txt:inf,code/*.py:1", "'inf' is no share"),
        ("a.txt:1e308,code/*.py:1e308", "have no sum"),
        ("a.txt:1,code/*.py", r"'code/\*\.py' has no share\. Give every part one: 'code/\*\.py:0\.5'"),
        ("a.txt:1,no.txt:1", r"There is no text file no\.txt"),
        ("a.txt:1,c5:1", "There is no corpus 'c5'"),
        (":1,a.txt:1", "There is no corpus ''"),
        ("a.txt:1,code:1", r"code holds no text file"),
    ],
)
def test_mixtures_that_are_none(texts, source, words):
    with pytest.raises((BadText, UnknownName), match=words):
        mixed(source)


def test_too_few_windows_for_a_part(texts):
    with pytest.raises(
        NotEnoughText, match=r"Of 4 samples the mixture .* leaves none for a\.txt, whose share is 1\.00%"
    ):
        mixed("a.txt:1,code/*.py:99", samples=4)
    with pytest.raises(NotEnoughText, match=r"180 samples of 32 tokens need 5,760 tokens; a\.txt \(train\) has"):
        mixed("a.txt:9,code/*.py:1", samples=200)


def test_only_calibration_is_mixed(texts):
    with pytest.raises(BadText, match="is a mixture, by shares of the tokens; it can be calibrated on"):
        evaluation_windows(byte_tokenizer(), "a.txt:1,code/*.py:1", length=32)


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=8), st.integers(0, 500))
def test_windows_are_apportioned_by_largest_remainder(weights, count):
    shares = [weight / math.fsum(weights) for weight in weights]
    counts = apportioned(shares, count)
    assert sum(counts) == count
    assert all(abs(number - share * count) < 1 + 1e-6 for number, share in zip(counts, shares, strict=True))


NAMES = ["c4", "demo", "a.txt", "b,c.jsonl", "code/*.py", "code", "x", "o/n[s](t):c", "", "a.txt:", "::", "[", "(", "*"]
SHARES = ["", ":1", ":0.5", ":50%", ":1e3", ":0", ":-2", ":nan", ":inf", ":x", ":1:2", ": 3 ", ":%", ":1e999"]


@given(st.lists(st.tuples(st.sampled_from(NAMES), st.sampled_from(SHARES)), min_size=1, max_size=5))
def test_whatever_is_written_is_read_or_refused_in_a_sentence(parts):
    _read_or_refused(",".join(name + share for name, share in parts))


@given(st.text(max_size=40))
def test_any_text_at_all(text):
    _read_or_refused(text)


def test_folders_that_cannot_be_searched_or_hold_a_disk(tmp_path, monkeypatch):
    """ "/" was walked through, and what lay there and could not be read was a traceback."""
    for number in range(4):
        (tmp_path / f"{number}.txt").write_text("a")
    monkeypatch.setattr("secateur.data.sources.MOST_FILES", 3)
    with pytest.raises(BadText, match=r"holds more than 3 files\. Name the folder that the text is in, or the files\."):
        read_source(str(tmp_path))

    def denied(path: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("os.scandir", denied)
    with pytest.raises(BadText, match=r"cannot be searched for text: \[Errno 13\] Permission denied"):
        read_source(str(tmp_path))


def _read_or_refused(text: str) -> None:
    try:
        shares = read_shares(text)
        source = None if shares else read_source(text)
    except (BadText, UnknownName):
        return
    assert bool(shares) != bool(source)
    assert not shares or math.isclose(sum(part.share for part in shares), 1)
    assert all(part.share > 0 for part in shares)
    assert source is None or source.corpus or source.files or isinstance(source.data_set, DataSet)


def test_every_pair_of_a_name_and_a_share_that_are_good_is_good(texts):
    for (one, first), (two, second) in product(
        product(["a.txt", "b,c.jsonl", "code/*.py", *CORPORA], [":1", ":50%"]), repeat=2
    ):
        shares = read_shares(f"{one}{first},{two}{second}")
        assert [part.source.text for part in shares] == [one, two]
