"""Where BOS stands in windows, against plain loops over what the tokenizer gives."""

import json
import shutil

import pytest
import torch
from support.texts import byte_tokenizer

import secateur
from secateur.data.bos import bos_way, reading_in_words
from secateur.data.calibration import calibration_windows
from secateur.data.reader import Reader
from secateur.data.windows import evaluation_windows
from secateur.errors import ConditionsDiffer, NotEnoughText, UnknownName, UnsupportedModel
from secateur.evaluation.tasks.lm_eval import wrapped
from secateur.models.load import load
from secateur.system.progress import Progress

BOS, EOS = 1, 2


def documents(file) -> list[str]:
    return [json.loads(line)["text"] for line in file.read_text().splitlines()]


def judged(reader, file, length, windows=None):
    return reader.windows(length, lambda r, n: evaluation_windows(r, str(file), length=n, windows=windows))


def plain_ids(text: str) -> list[int]:
    return byte_tokenizer()(text, add_special_tokens=False)["input_ids"]


def test_every_window_begins_with_bos_and_keeps_its_length(text_file):
    windows = judged(Reader(byte_tokenizer(), "each-window"), text_file, 32)
    stream = [token for text in documents(text_file) for token in [*plain_ids(text), EOS]]
    expected = [[BOS, *stream[i : i + 31]] for i in range(0, len(stream) - 30, 31)]
    assert windows.ids.tolist() == expected
    assert windows.fingerprint()["bos"] == "each-window"


def test_never_takes_out_what_the_tokenizer_puts_in(text_file):
    windows = judged(Reader(byte_tokenizer(), "never"), text_file, 32)
    stream = [token for text in documents(text_file) for token in [*plain_ids(text), EOS]]
    assert windows.ids.flatten().tolist() == stream[: len(stream) // 32 * 32]
    assert not (windows.ids == BOS).any()


def test_a_stream_is_what_it_was(text_file):
    windows = judged(Reader(byte_tokenizer(), "stream"), text_file, 32)
    before = evaluation_windows(byte_tokenizer(), str(text_file), length=32)
    assert windows.fingerprint() == before.fingerprint()
    assert "bos" not in windows.fingerprint()


def test_a_draw_begins_with_bos_too(text_file):
    def draw(tokenizer, length):
        return calibration_windows(tokenizer, str(text_file), samples=8, length=length, seed=3)

    reader = Reader(byte_tokenizer(), "each-window")
    windows, without = reader.windows(33, draw), Reader(byte_tokenizer(), "never").windows(32, draw)
    assert (windows.ids[:, 0] == BOS).all()
    assert torch.equal(windows.ids[:, 1:], without.ids)


def test_c4_and_conversations_lose_the_bos_in_front(tmp_path):
    (tmp_path / "c4").mkdir()
    rows = "".join(json.dumps({"text": "a cat and a dog " * 9}) + "\n" for _ in range(40))
    (tmp_path / "c4" / "train.jsonl").write_text(rows)

    def draw(tokenizer, length):
        return calibration_windows(tokenizer, "c4", samples=4, length=length, seed=0, data_dir=tmp_path)

    windows = Reader(byte_tokenizer(), "each-window").windows(64, draw)
    assert (windows.ids == BOS).sum() == 4  # one a window, at its start
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "<s>{% for m in messages %}{{ m.content }}\n{% endfor %}"
    chats = tmp_path / "chats.jsonl"
    chats.write_text((json.dumps({"messages": [{"role": "user", "content": "a cat"}]}) + "\n") * 9)
    assert (judged(Reader(tokenizer, "stream"), chats, 7).ids == BOS).sum() == 9
    assert (judged(Reader(tokenizer, "never"), chats, 6).ids == BOS).sum() == 0


def test_what_auto_means():
    tokenizer = byte_tokenizer()
    assert bos_way(tokenizer, "llama", "auto") == "stream"
    assert bos_way(tokenizer, "gemma3_text", "auto") == "each-window"
    assert bos_way(tokenizer, "llama", "never") == "never"
    unmarked = byte_tokenizer()
    unmarked.backend_tokenizer.post_processor = None
    assert bos_way(unmarked, "llama", "never") == "stream"  # the same tokens, so the same rows
    unmarked.bos_token = None
    assert bos_way(unmarked, "gemma", "auto") == "stream"
    with pytest.raises(UnsupportedModel, match=r"has no BOS token to begin windows with. Use --bos stream"):
        bos_way(unmarked, "llama", "each-window")


def test_an_unknown_way_is_refused_before_the_model_is_opened(tmp_path):
    with pytest.raises(UnknownName, match=r"no way of --bos 'each'\. Known: auto, each-window, never, stream"):
        secateur.evaluate(str(tmp_path), bos="each")
    with pytest.raises(UnknownName, match="way of --bos"):
        secateur.prune(str(tmp_path), out=tmp_path / "out", bos="each")


def test_windows_too_short_for_bos_are_refused(text_file):
    with pytest.raises(NotEnoughText, match="Windows of BOS and at least 2 tokens"):
        judged(Reader(byte_tokenizer(), "each-window"), text_file, 2)


def test_a_gemma_is_pruned_and_judged_with_bos(tmp_path, text_file):
    from support.families import tiny_model

    folder = tmp_path / "gemma"
    tiny_model("gemma2").save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    options = {"calibration": str(text_file), "samples": 4, "seq_len": 32}
    report = secateur.prune(str(folder), out=tmp_path / "out", method="wanda", **options)
    assert report.calibration["bos"] == "each-window"
    found = secateur.evaluate(str(folder), evaluation=str(text_file), seq_len=32, windows=4)
    assert found.evaluation["bos"] == "each-window"
    plain = secateur.evaluate(str(folder), evaluation=str(text_file), seq_len=32, windows=4, bos="stream")
    assert "bos" not in plain.evaluation


def test_rows_of_another_way_are_other_conditions(tiny_llama, tmp_path, text_file):
    options = {"calibration": str(text_file), "evaluation": str(text_file), "samples": 2, "seq_len": 32, "windows": 4}
    run = {"out": tmp_path / "out", "methods": ["magnitude"], "patterns": ["50%"], **options}
    first = secateur.compare(str(tiny_llama), **run)
    assert secateur.compare(str(tiny_llama), bos="stream", **run).evaluation == first.evaluation
    with pytest.raises(ConditionsDiffer, match="evaluation"):
        secateur.compare(str(tiny_llama), bos="each-window", **run)


def test_recovery_finds_the_windows_again(tiny_llama, tmp_path, text_file):
    options = {"calibration": str(text_file), "samples": 4, "seq_len": 32, "bos": "each-window"}
    secateur.prune(str(tiny_llama), out=tmp_path / "pruned", method="wanda", **options)
    more = {"text": str(text_file), "seq_len": 32, "steps": 2, "batch_size": 2, "bos": "each-window"}
    done = secateur.recover(str(tmp_path / "pruned"), out=tmp_path / "out", way="masked", **more)
    assert done.apart
    assert done.text["bos"] == "each-window"


@pytest.mark.parametrize("bos", ["stream", "each-window", "never"])
@pytest.mark.parametrize("marked", [True, False])
def test_requests_of_tasks_begin_as_windows_do(tiny_llama, bos, marked):
    pytest.importorskip("lm_eval")
    tokenizer = byte_tokenizer()
    if not marked:
        tokenizer.backend_tokenizer.post_processor = None
    model = wrapped(load(tiny_llama).model, Reader(tokenizer, bos), 1, Progress())
    begins = {"stream": marked, "each-window": True, "never": False}[bos]
    assert model.tok_encode("a cat") == [BOS][: int(begins)] + plain_ids("a cat")


def test_the_record_says_so_in_words(tiny_llama, tmp_path, text_file, capsys):
    from secateur.cli.tables import summary

    options = {"calibration": str(text_file), "samples": 2, "seq_len": 32}
    report = secateur.prune(str(tiny_llama), out=tmp_path / "out", method="wanda", **options)
    line = f"Calibrated on 2 windows of 32 tokens of {text_file}, BOS as the tokenizer puts it."
    assert line in list(summary(report))
    shutil.rmtree(tmp_path / "out")
    report = secateur.prune(str(tiny_llama), out=tmp_path / "out", method="wanda", bos="never", **options)
    assert any(one.endswith(", no BOS.") for one in summary(report))


def test_a_text_is_put_into_words():
    assert reading_in_words({}) == "BOS as the tokenizer puts it"
    told = {"bos": "each-window", "counted": "assistant", "counted_tokens": 7, "generated": {"temperature": 0.7}}
    words = "statistics on 7 tokens of the assistant, answers of the dense model at temperature 0.7"
    assert reading_in_words(told) == f"BOS at the start of every window, {words}"


def test_a_long_text_is_read_alike_in_pieces(monkeypatch):
    """Offsets and masks go with the tokens, so pieces are joined where they are without BOS as well."""
    from secateur.data import pieces

    monkeypatch.setattr(pieces, "CHARACTERS", 500)
    monkeypatch.setattr(pieces, "OVERLAP", 100)
    text = "the cat sees a dog and runs " * 100
    (ids,) = pieces.ids_of(Reader(byte_tokenizer(), "never"), [text])  # type: ignore[arg-type]
    assert ids.tolist() == plain_ids(text)
