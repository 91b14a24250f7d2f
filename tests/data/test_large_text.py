"""Text of any size: read as wanted, tokenised in pieces, drawn without reading all of it."""

import bz2
import errno
import gzip
import io
import json
import lzma
import random
import tracemalloc
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from support.texts import WORDS, byte_tokenizer

from secateur.data import corpora, id_stream, long_text, pieces, readers, sampling
from secateur.data.calibration import calibration_windows
from secateur.data.corpora import StoredTexts, corpus_of
from secateur.data.demo import documents, model_folder
from secateur.data.id_stream import IdStream
from secateur.data.long_text import LongText
from secateur.data.overlap import overlapping
from secateur.data.pieces import append_long, batches, stream_of
from secateur.data.reader import Reader
from secateur.data.tokenizer import encode, load_tokenizer
from secateur.data.windows import border_of, evaluation_windows
from secateur.errors import BadText, DiskFull
from secateur.recovery.text import recovery_windows

LENGTH = 64


def numbered(count: int, draw: random.Random, longest: int = 40) -> list[str]:
    """Texts in which no eight characters in a row come twice: numbers and words."""
    texts, number = [], 0
    for _ in range(count):
        words = draw.randint(1, longest)
        texts.append(" ".join(f"{number + one:06d}{draw.choice(WORDS)[0]}" for one in range(words)))
        number += words
    return texts


def packed(name: str, data: bytes) -> bytes:
    if name.endswith(".zst"):
        sink = pa.BufferOutputStream()
        with pa.CompressedOutputStream(sink, "zstd") as stream:
            stream.write(data)
        return sink.getvalue().to_pybytes()
    ways: dict[str, Any] = {".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress}
    return ways.get(Path(name).suffix, bytes)(data)


def written(file: Path, texts: list[str]) -> str:
    """A file that holds texts, in the form that its name says."""
    if file.suffix == ".parquet":
        parquet.write_table(pa.table({"text": texts}), file, row_group_size=50)
    elif ".jsonl" in file.name:
        lines = "".join(json.dumps({"id": 1, "text": text}) + "\n" for text in texts)
        file.write_bytes(packed(file.name, lines.encode()))
    elif ".json" in file.name:
        file.write_bytes(packed(file.name, json.dumps([{"text": text} for text in texts], indent=1).encode()))
    else:
        file.write_bytes(packed(file.name, "\n".join(texts).encode()))
    return str(file)


@pytest.fixture
def small_limits(monkeypatch):
    """Text of more than 16 KiB is large."""
    for module in (readers, corpora):
        monkeypatch.setattr(module, "LARGE", 2**14)


def long_ids(tokenizer, text) -> list[int]:
    (stream := IdStream()).extend([7])
    append_long(stream, tokenizer, text)
    first, *ids = stream.tensor().tolist()
    assert first == 7  # what was there before
    return ids


def draw_of(source: str, samples: int, seed: int = 0, length: int = LENGTH):
    return calibration_windows(byte_tokenizer(), source, samples=samples, length=length, seed=seed)


def texts_of(windows) -> list[str]:
    """The windows as text, what the tokenizer puts in left out."""
    tokenizer: Any = byte_tokenizer()
    return [tokenizer.decode(ids, skip_special_tokens=True) for ids in windows.ids]


# A draw from little text is what it always was.


def tiles(tokenizer, texts: list[str], samples: int, length: int, seed: int) -> torch.Tensor:
    """The draw that docs/comparing.md describes, with all tokens of all texts in a list."""
    stream = [token for text in texts for token in [*tokenizer(text)["input_ids"]]]
    draw = random.Random(seed)
    shift = draw.randint(0, min(len(stream) - samples * length, length - 1))
    places = draw.sample(range((len(stream) - shift) // length), samples)
    return torch.tensor([stream[shift + length * p : shift + length * (p + 1)] for p in places])


KINDS = ["a.jsonl", "a.json", "a.parquet", "a.jsonl.gz", "a.json.xz", "a.jsonl.zst", "a.jsonl.bz2"]


@pytest.mark.parametrize("name", KINDS)
def test_little_text_is_drawn_from_all_of_its_tokens(tmp_path, name):
    texts = numbered(60, random.Random(1))
    source = written(tmp_path / name, texts)
    # the last kind is not taken by its name alone
    windows = draw_of(source[:-1] + "?" if name.endswith(".bz2") else source, 5, seed=7)
    assert torch.equal(windows.ids, tiles(byte_tokenizer(), texts, 5, LENGTH, 7))
    assert "drawn" not in windows.fingerprint()
    assert windows.available_tokens == sum(len(text) + 1 for text in texts)


# Long texts in pieces.


@pytest.mark.parametrize("tokenizer", [byte_tokenizer(), load_tokenizer(model_folder())], ids=["bytes", "demo"])
@pytest.mark.parametrize("characters", [5000, 7777])
def test_pieces_of_a_text_have_the_tokens_of_the_whole(monkeypatch, tokenizer, characters):
    monkeypatch.setattr(pieces, "CHARACTERS", characters)
    monkeypatch.setattr(pieces, "OVERLAP", 1000)
    text = "\n\n".join(documents("evaluation")[:4])
    for part in (
        text[:40_000],
        text[:characters],
        text[: characters + 1000],
        text[: characters + 1001],
        "é中🙂 " * 3000,
    ):
        assert long_ids(tokenizer, part) == list(tokenizer(part)["input_ids"])


@pytest.mark.parametrize("bos", ["stream", "never", "each-window"])
def test_pieces_are_read_as_the_whole_is(monkeypatch, bos):
    reader: Any = Reader(byte_tokenizer(), bos)
    text = "\n\n".join(documents("evaluation")[:2])[:30_000]
    whole = encode(reader, [text])[0]
    assert (whole[0] == byte_tokenizer().bos_token_id) is (bos == "stream")
    monkeypatch.setattr(pieces, "CHARACTERS", 5000)
    monkeypatch.setattr(pieces, "OVERLAP", 1000)
    assert long_ids(reader, text) == whole


def test_text_without_a_place_to_join_is_tokenised_whole(monkeypatch):
    tokenizer = load_tokenizer(model_folder())
    monkeypatch.setattr(pieces, "CHARACTERS", 1000)
    monkeypatch.setattr(pieces, "OVERLAP", 40)
    text = "\n".join(documents("evaluation")[:2])[:5000]
    whole = []
    monkeypatch.setattr(pieces, "encode", lambda *given: whole.append(given) or encode(*given))
    assert long_ids(tokenizer, text) == list(tokenizer(text)["input_ids"])
    assert len(whole) == 1


def test_no_more_is_read_than_is_wanted(monkeypatch):
    monkeypatch.setattr(pieces, "CHARACTERS", 100)
    asked = []

    def endless():
        while True:
            asked.append(1)
            yield "x" * 49

    stream = stream_of(byte_tokenizer(), endless(), border_of, most=1000)
    assert stream.dtype == torch.int32
    assert 1000 <= len(stream) <= 1100
    assert len(asked) <= 24
    asked.clear()
    monkeypatch.setattr(pieces, "OVERLAP", 64)
    texts = (asked.append(1) or "x y " * 100 for _ in range(9))  # long ones
    assert 800 <= len(stream_of(byte_tokenizer(), texts, border_of, most=800)) <= 1300
    assert len(asked) <= 3
    assert [len(some) for some in batches(["x" * 60, "y" * 60, "z" * 300, "w"])] == [1, 1, 1, 1]


@pytest.mark.parametrize("held", [1, 10, 100, 10_000])
def test_ids_wait_in_a_file(monkeypatch, held):
    monkeypatch.setattr(id_stream, "HELD", held)
    stream, expected, draw = IdStream(), [], random.Random(held)
    for _ in range(60):
        some = [draw.randrange(2**31) for _ in range(draw.randrange(40))]
        stream.extend(some)
        expected += some
        if draw.random() < 0.2:
            length = draw.randint(0, len(expected))
            stream.cut(length)
            del expected[length:]
        assert len(stream) == len(expected)
    found = stream.tensor()
    assert (found.tolist(), found.dtype) == (expected, torch.int32)
    assert IdStream().tensor().shape == (0,)


def test_a_disk_too_small_for_ids_is_one_sentence(monkeypatch):
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(id_stream, "HELD", 10)
    monkeypatch.setattr(id_stream.tempfile, "TemporaryFile", full)
    with pytest.raises(DiskFull, match="The disk filled up while"):
        draw_of("demo", 2)


@pytest.mark.parametrize("size", [0, 1, 5, 6, 7, 12, 13, 50])
def test_a_long_text_is_the_text(monkeypatch, size):
    monkeypatch.setattr(long_text, "PIECE", 6)
    text = ("aé中🙂\n" * 20)[:size]
    held = LongText(io.StringIO(text).read, 30)
    assert (len(held), str(held)) == (min(size, 30), text[:30])
    for start in range(0, 34, 3):
        for stop in range(0, 34, 3):
            assert held[start:stop] == text[:30][start:stop]
    assert str(LongText(io.StringIO(text).read, 30, "x")) == ("x" + text)[:30]


def test_a_long_text_is_never_held_as_one_string(tmp_path, monkeypatch):
    """An emoji makes each character of a `str` four bytes."""
    monkeypatch.setattr(pieces, "CHARACTERS", 2**12)
    monkeypatch.setattr(pieces, "OVERLAP", 2**9)
    text = "\n".join(numbered(4000, random.Random(10))) + "🙂"
    (tmp_path / "a.txt").write_text(text)
    tokenizer = byte_tokenizer()
    expected = tiles(tokenizer, [text], 5, LENGTH, 0)
    tracemalloc.start()
    drawn = draw_of(str(tmp_path / "a.txt"), 5)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert torch.equal(drawn.ids, expected)
    # a byte a character, and the ids that are held: four bytes for each of them, here one a byte
    assert len(text) > 500_000
    assert peak < 5.5 * len(text) + 2**20


# Large text.

LARGE_KINDS = [*KINDS[:-1], "a.txt", "a.txt.gz"]


@pytest.mark.parametrize("name", LARGE_KINDS)
def test_windows_of_large_text_are_pieces_of_it_and_do_not_overlap(small_limits, tmp_path, name):
    texts = numbered(1200, random.Random(2))
    source = written(tmp_path / name, texts)
    windows = draw_of(source, 60)
    assert windows.ids.shape == (60, LENGTH)
    assert windows.available_tokens is None
    entered = name in ("a.jsonl", "a.txt")
    assert windows.fingerprint()["drawn"] == ("at random bytes" if entered else "from random groups of documents")
    joined = ("\n" if ".txt" in name else "").join(texts)
    places = [joined.find(text) for text in texts_of(windows)]
    assert -1 not in places
    places.sort()
    # up to a border in each window, of which no byte is text
    assert all(later - one >= LENGTH - 20 for one, later in pairwise(places))
    assert max(places) - min(places) > 0.8 * len(joined)
    again, other = draw_of(source, 60), draw_of(source, 60, seed=1)
    assert torch.equal(windows.ids, again.ids)
    assert not torch.equal(windows.ids, other.ids)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_a_token_of_a_long_text_is_as_likely_as_one_of_a_short_text(small_limits, tmp_path, name):
    """Half of the text is one document of 40: about half of the windows are of it."""
    draw = random.Random(3)
    short = numbered(400, draw, 60)
    size = sum(map(len, short))
    long = " ".join(f"{draw.randrange(10**5):05d}LL" for _ in range(size // 8))
    source = written(tmp_path / name, [*short[:200], long, *short[200:]])
    share = [sum("LL" in text for text in texts_of(draw_of(source, 40, seed))) / 40 for seed in range(10)]
    assert 0.4 < sum(share) / len(share) < 0.6


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_large_text_is_not_tokenised(small_limits, tmp_path, monkeypatch, name):
    source = written(tmp_path / name, numbered(20_000, random.Random(4)))
    characters = []
    monkeypatch.setattr(
        sampling, "encode", lambda tokenizer, texts: characters.append(len(texts[0])) or encode(tokenizer, texts)
    )
    draw_of(source, 4)
    assert 4 * LENGTH <= sum(characters) < 10_000 < Path(source).stat().st_size


def test_what_cannot_be_sampled_is_drawn_from_all_tokens(small_limits, tmp_path):
    """Rows that are nearly all something else: text is too thin for windows at random places."""
    rows = [{"text": f"{n:04d}", "other": "x" * 2000} for n in range(300)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as stream:
        stream.write((tmp_path / "a.jsonl").read_text())
    thin = draw_of(str(tmp_path / "a.jsonl.gz"), 10)
    assert "drawn" not in thin.fingerprint()
    assert torch.equal(thin.ids, tiles(byte_tokenizer(), [row["text"] for row in rows], 10, LENGTH, 0))


def test_other_columns_of_a_table_are_no_text(small_limits, tmp_path):
    texts = numbered(60, random.Random(1))
    noise = [str(random.Random(number).random()) * 100 for number in range(60)]
    parquet.write_table(pa.table({"noise": noise, "text": texts}), tmp_path / "a.parquet", use_dictionary=False)
    assert draw_of(str(tmp_path / "a.parquet"), 5).available_tokens == sum(len(text) + 1 for text in texts)
    assert corpus_of(f"{tmp_path / 'a.parquet'}:noise", "train", None).is_large(1)


def test_only_the_first_windows_of_large_text_are_read_to_evaluate(small_limits, tmp_path, monkeypatch):
    monkeypatch.setattr(pieces, "CHARACTERS", 1000)
    texts = numbered(1000, random.Random(5))
    file = Path(written(tmp_path / "a.jsonl", texts))
    file.write_bytes(file.read_bytes() + b"no JSON\n")
    windows = evaluation_windows(byte_tokenizer(), str(file), length=LENGTH, windows=8)
    stream = [token for text in texts for token in byte_tokenizer()(text)["input_ids"]]
    assert windows.ids.flatten().tolist() == stream[: 8 * LENGTH]
    assert windows.available_tokens is None
    with pytest.raises(BadText, match="is no JSON"):
        evaluation_windows(byte_tokenizer(), str(file), length=LENGTH)


def test_large_plain_text_is_one_document_in_pieces(small_limits, tmp_path):
    text = "\n".join(numbered(1000, random.Random(6)))
    file = tmp_path / "a.txt"
    file.write_text(text)
    read = list(corpus_of(str(file), "test", None).documents())
    assert len(read) > 2
    assert "".join(map(str, read)) == text
    tokenizer = load_tokenizer(model_folder())
    assert [border_of(tokenizer, piece) for piece in read] == [*[[]] * (len(read) - 1), [tokenizer.eos_token_id]]


def test_what_does_not_fit_into_memory_is_refused_before_it_is_read(small_limits, tmp_path, monkeypatch):
    from secateur.data import windows

    source = written(tmp_path / "a.jsonl", numbered(1000, random.Random(7)))
    monkeypatch.setattr(windows, "available_bytes", lambda device: 100_000)
    with pytest.raises(BadText, match=r"tokens of all of .*a\.jsonl do not fit into memory, of which 97\.66 KiB are"):
        evaluation_windows(byte_tokenizer(), source, length=LENGTH)
    assert len(evaluation_windows(byte_tokenizer(), source, length=LENGTH, windows=3).ids) == 3


def test_documents_by_number_wait_in_a_file(small_limits, tmp_path):
    texts = numbered(1000, random.Random(8))
    stored = corpora.corpus_texts(corpus_of(written(tmp_path / "a.jsonl", texts), "train", None))
    assert isinstance(stored, StoredTexts)
    assert (len(stored), stored[0], stored[-1], stored[5:7]) == (1000, texts[0], texts[-1], texts[5:7])
    assert [stored[number] for number in (999, 3, 500)] == [texts[number] for number in (999, 3, 500)]
    with pytest.raises(IndexError):
        stored[1000]


def test_characters_and_lines_at_the_edges_of_pieces(small_limits, tmp_path):
    """Two and three bytes a character; whatever byte is met, what is read is text."""
    line = "äöü€" * 3
    (tmp_path / "a.txt").write_text("\r\n".join([line] * 4000), newline="")
    for how in ("a.txt",):
        corpus = corpus_of(str(tmp_path / how), "train", None)
        size = (tmp_path / how).stat().st_size
        for place in range(1000, 1100):
            spans = list(sampling._spans(corpus, [size], place, 500))
            assert set(str(spans[0].text)) <= set(line + "\n")
            assert place <= spans[0].start < spans[0].stop <= place + 500


# Files as other programs write them.


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.jsonl.gz"])
def test_marks_of_byte_order_are_no_text(tmp_path, name, encoding):
    texts = ["one é", "two"]
    content = {
        "a.txt": "one é\ntwo",
        "a.json": json.dumps(texts, ensure_ascii=False),
    }.get(name, "\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts))
    mark = b"\xfe\xff" if encoding == "utf-16-be" else b""
    (tmp_path / name).write_bytes(packed(name, mark + content.encode(encoding)))
    read = list(corpus_of(str(tmp_path / name), "train", None).documents())
    assert read == (["one é\ntwo"] if name == "a.txt" else texts)


def test_an_array_is_read_an_item_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "BUFFER", 7)
    items = [{"text": "one, [two]"}, "three", {"text": 'fo"ur', "n": 1.5e3}, "é🙂"]
    for indent in (None, 1):
        for ascii_only in (True, False):
            (tmp_path / "a.json").write_text(json.dumps(items, indent=indent, ensure_ascii=ascii_only))
            assert list(readers.rows(tmp_path / "a.json")) == items
    (tmp_path / "a.json").write_text("[12345678901234567890, 1]")
    assert list(readers.rows(tmp_path / "a.json")) == [12345678901234567890, 1]
    (tmp_path / "a.json").write_text("[ ]")
    assert list(readers.rows(tmp_path / "a.json")) == []
    for broken in ("[1, 2", "[1 2]", "[1,]", "[,1]", '["a', "["):
        (tmp_path / "a.json").write_text(broken)
        with pytest.raises(ValueError, match=r"Expecting|Unterminated"):
            list(readers.rows(tmp_path / "a.json"))


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.xz", "a.jsonl.zst"])
def test_a_cut_file_is_one_sentence(tmp_path, name):
    data = packed(name, b"".join(json.dumps({"text": text}).encode() for text in numbered(99, random.Random(0))))
    (tmp_path / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(BadText, match=rf"{name} cannot be read: (Compressed file ended|Truncated compressed)"):
        draw_of(str(tmp_path / name), 2)
    (tmp_path / name).write_bytes(b"plain")
    with pytest.raises(BadText, match=rf"{name} cannot be read: "):
        draw_of(str(tmp_path / name), 2)


def test_a_line_without_end_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "LONGEST", 2**20)
    (tmp_path / "a.jsonl").write_text('{"text": "' + "x" * 2**21)
    with pytest.raises(
        BadText, match=r"Line 1 of .*a.jsonl is longer than 1 MiB; a document a line was wanted\. Split"
    ):
        draw_of(str(tmp_path / "a.jsonl"), 2)
    (tmp_path / "a.json").write_text('["' + "x" * 2**22)
    with pytest.raises(BadText, match=r"An item of .*a.json is longer than 1 MiB\. Split it"):
        draw_of(str(tmp_path / "a.json"), 2)


def test_data_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"MZ\0\0\1" * 100)
    with pytest.raises(BadText, match=r"a\.txt is no text: it holds zero bytes\. Convert it, or leave it out"):
        draw_of(str(tmp_path / "a.txt"), 2)
    (tmp_path / "b.txt").write_bytes(bytes(range(128, 256)) * 9)
    with pytest.raises(BadText, match=r"b\.txt is not text in UTF-8"):
        draw_of(str(tmp_path / "b.txt"), 2)


def test_utf16_is_converted_as_it_is_read():
    text = "é🙂\n" * 100_000
    stream = readers._InUtf8(io.BytesIO(text.encode("utf-16")))  # type: ignore[arg-type]
    assert io.BufferedReader(stream, 2**10).read() == text.encode()


# Recovery, and what texts have in common.


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_large_text_to_recover_on_shares_nothing_with_what_is_avoided(small_limits, tmp_path, name):
    texts = numbered(1500, random.Random(9))
    source = written(tmp_path / name, texts)
    calibrated = draw_of(source, 100)
    trained = recovery_windows(byte_tokenizer(), source, count=60, length=LENGTH, seed=5, avoid=[calibrated.ids])
    assert trained.fingerprint()["drawn"]
    assert overlapping(trained.ids, calibrated.ids) == 0
    runs = {text[start : start + 32] for text in texts_of(calibrated) for start in range(len(text) - 31)}
    assert not any(text[start : start + 32] in runs for text in texts_of(trained) for start in range(len(text) - 31))
    unaware = recovery_windows(byte_tokenizer(), source, count=60, length=LENGTH, seed=5)
    assert overlapping(unaware.ids, calibrated.ids) > 0


def test_windows_that_share_a_run_of_tokens_are_counted():
    stream = torch.arange(1000)
    windows = stream[:640].view(10, 64)
    assert overlapping(windows, stream[600:700].view(1, 100)) == 1
    assert overlapping(windows, stream[620:700].view(1, 80)) == 0  # 20 in a row
    assert overlapping(windows, stream[60:160].view(2, 50)) == 2
    assert overlapping(windows, stream[700:].view(3, 100)) == 0
