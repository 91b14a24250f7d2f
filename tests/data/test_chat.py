"""Chat rows as calibration, evaluation and training text, through the model's own template."""

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from support.texts import byte_tokenizer

import secateur
from secateur.data.calibration import calibration_windows
from secateur.data.chat import chat_of
from secateur.data.corpora import corpus_of
from secateur.data.tokenizer import load_tokenizer
from secateur.data.windows import evaluation_windows
from secateur.errors import BadText
from secateur.recovery.text import recovery_windows

TEMPLATE = (
    "{% if tools %}<tools>{{ tools | length }}\n{% endif %}{% for m in messages %}[{{ m.role }}]"
    "{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}{{ m.content }}\n{% endfor %}"
)
MESSAGES = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Who sees the cat?"},
    {"role": "assistant", "content": "The dog.", "reasoning_content": "cats run"},
]


@pytest.fixture
def model(tiny_llama, tmp_path) -> Path:
    folder = shutil.copytree(tiny_llama, tmp_path / "chat-model")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def written(file: Path, rows: list) -> str:
    if file.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(rows), file)
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def in_stream(tokenizer, source: str) -> list[int]:
    """All tokens of a corpus, from windows of two."""
    return evaluation_windows(tokenizer, source, length=2).ids.flatten().tolist()


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet"])
def test_messages_go_through_the_template(model, tmp_path, name):
    tokenizer = load_tokenizer(model)
    rows = [{"messages": MESSAGES, "id": 7}] * 3
    file = tmp_path / name
    source = written(file, rows) if name != "a.json" else str(file)
    if name == "a.json":
        file.write_text(json.dumps(rows))
    once: Any = tokenizer.apply_chat_template(MESSAGES, tokenize=True, return_dict=False)
    text = "[system]Be short.\n[user]Who sees the cat?\n[assistant](cats run)The dog.\n"
    assert tokenizer.decode(once) == text
    expected = once * 3  # no <s> in front and no </s> between: the template says what stands there
    assert in_stream(tokenizer, source) == expected[: len(expected) // 2 * 2]


def test_other_spellings_are_the_same_conversation(model, tmp_path):
    asked = [{"role": "user", "content": "Add.\n\n1 and 2"}, {"role": "assistant", "content": "3"}]
    shared = [{"from": "human", "value": "Add.\n\n1 and 2"}, {"from": "gpt", "value": "3"}]
    alpaca = {"instruction": "Add.", "input": "1 and 2", "output": "3"}
    rows = [{"messages": asked}, {"conversations": shared}, alpaca, {"conversations": asked, "tools": []}]
    files = [written(tmp_path / f"{number}.jsonl", [row] * 2) for number, row in enumerate(rows)]
    streams = [in_stream(load_tokenizer(model), file) for file in files]
    assert streams[0] == streams[1] == streams[2] == streams[3]


def test_tools_and_a_system_line_reach_the_template(model, tmp_path):
    row = {"system": "Be short.", "conversations": [{"from": "human", "value": "who"}], "tools": [{"name": "look"}]}
    tokens = in_stream(load_tokenizer(model), written(tmp_path / "a.jsonl", [row] * 2))
    assert str(load_tokenizer(model).decode(tokens)).startswith("<tools>1\n[system]Be short.\n[user]who\n")


def test_text_and_conversations_stand_side_by_side(model, tmp_path):
    tokenizer = load_tokenizer(model)
    file = written(tmp_path / "a.jsonl", [{"text": "a cat"}, {"messages": MESSAGES}, {"text": "a dog"}])
    chat: Any = tokenizer.apply_chat_template(MESSAGES, tokenize=True, return_dict=False)
    expected = [*tokenizer("a cat")["input_ids"], *chat, *tokenizer("a dog")["input_ids"]]
    assert in_stream(tokenizer, file) == expected[: len(expected) // 2 * 2]


def test_a_list_of_strings_is_text(tmp_path):
    file = tmp_path / "a.json"
    file.write_text(json.dumps(["one", "two"]))
    assert list(corpus_of(str(file), "train", None).documents()) == ["one", "two"]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": []}, "must hold a list of messages; in row 1 of"),
        ({"messages": "hello"}, "must hold a list of messages"),
        ({"messages": [{"content": "x"}]}, "Every message needs a 'role' and its 'content'"),
        ({"conversations": [{"from": "human"}]}, "'from' and 'value'"),
        (
            {"prompt": "x", "answer": "y"},
            "needs a field 'text' or 'messages'; row 1 of .* has none; it has 'prompt', 'answer'",
        ),
        (7, "needs a field 'text' or 'messages'; row 1 of .* has none"),
    ],
)
def test_what_is_no_conversation_is_refused(tmp_path, row, words):
    with pytest.raises(BadText, match=words):
        list(corpus_of(written(tmp_path / "a.jsonl", [row]), "train", None).documents())


def test_without_a_template_the_way_out_is_said(tmp_path):
    source = written(tmp_path / "a.jsonl", [{"messages": MESSAGES}])
    with pytest.raises(BadText, match=r"row 1 of .* is a conversation, and the tokenizer of .* has no chat template"):
        evaluation_windows(byte_tokenizer(), source, length=2)


def test_a_corpus_of_lines_holds_no_conversations(model, tmp_path):
    (tmp_path / "wikitext2").mkdir()
    for split in ("train", "test"):
        written(tmp_path / "wikitext2" / f"{split}.jsonl", [{"text": "a cat"}, {"messages": MESSAGES}])
    with pytest.raises(BadText, match=r"row 2 of .*test\.jsonl is a conversation; wikitext2 is lines of one text"):
        evaluation_windows(load_tokenizer(model), "wikitext2", length=2, data_dir=tmp_path)
    with pytest.raises(BadText, match=r"row 2 of .*train\.jsonl is a conversation"):
        recovery_windows(load_tokenizer(model), "wikitext2", count=1, length=8, seed=0, data_dir=tmp_path)


def test_what_the_template_refuses_is_said(model, tmp_path):
    (model / "chat_template.jinja").write_text("{{ raise_exception('only users speak') }}")
    source = written(tmp_path / "a.jsonl", [{"messages": MESSAGES}])
    with pytest.raises(BadText, match=r"does not take row 1 of .*: only users speak"):
        evaluation_windows(load_tokenizer(model), source, length=2)


def test_a_model_is_pruned_on_its_own_conversations(model, tmp_path):
    source = written(tmp_path / "a.jsonl", [{"messages": MESSAGES}] * 40)
    report = secateur.prune(model, out=tmp_path / "out", calibration=source, samples=8, seq_len=32)
    assert report.calibration["source"] == source
    drawn = calibration_windows(load_tokenizer(model), source, samples=8, length=32, seed=0)
    assert report.calibration == drawn.fingerprint()
    trained = recovery_windows(load_tokenizer(model), source, count=2, length=32, seed=0)
    tokenizer = load_tokenizer(model)
    once: Any = tokenizer.apply_chat_template(MESSAGES, tokenize=True, return_dict=False)
    assert trained.ids.flatten().tolist() == (once * 2)[:64]  # and no </s> between
    assert torch.isin(trained.ids, drawn.ids.unique()).all()


def test_an_input_that_is_no_text_is_refused():
    """Found by fuzzing: it was a TypeError."""
    with pytest.raises(BadText, match="The field 'input' must hold text; in row 1 it does not"):
        chat_of({"instruction": "a", "input": 7, "output": "b"}, "row 1")
