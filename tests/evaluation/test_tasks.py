"""Tasks against lm-eval's own command, against a plain loop, and what is said of items that cannot be used."""

import json
import logging
import lzma
import os
import random
import socket
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from datasets import are_progress_bars_disabled
from support import forks
from support.families import tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from typer.testing import CliRunner

import secateur
from secateur.cli import app as cli
from secateur.data.tokenizer import load_tokenizer
from secateur.errors import BadText, NonFinite, NotEnoughText, SecateurError, UnknownName, UnsupportedModel
from secateur.evaluation.tasks import answer as tasks
from secateur.evaluation.tasks.answer import answer_tasks, check_tasks, lines, summarise
from secateur.evaluation.tasks.items import PAPERS, TASKS
from secateur.evaluation.tasks.lm_eval import Answers, load_task, quiet
from secateur.models.generate import on_device
from secateur.models.load import load
from secateur.models.replay import LanguageModel
from secateur.system.intervals import resampled_means
from secateur.system.progress import Progress
from secateur.system.settings import ZeroShot

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'secateur[tasks]'")
pytest.importorskip("accelerate", reason="accelerate is not installed: pip install 'secateur[tasks]'")

LOCAL = ("boolq", "rte", "piqa", "arc_easy", "openbookqa", "winogrande")
LIMIT = 30
LETTERS = "ABCDE"


def rows_of(folder: Path, name: str) -> list[dict[str, Any]]:
    with lzma.open(folder / "tasks" / f"{name}.jsonl.xz", "rt", encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def write_rows(file: Path, rows: list[Any]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def stories(shared_data) -> tuple[LanguageModel, PreTrainedTokenizerFast, Path]:
    folder = shared_data / "models" / "stories260K"
    if not folder.is_dir() or not (shared_data / "tasks").is_dir():
        pytest.skip(f"the real tasks or the real model are not in {shared_data}")
    tokenizer: Any = load_tokenizer(folder)
    return load(folder), tokenizer, folder


@pytest.fixture(scope="module")
def ours(stories, shared_data) -> dict[str, Answers]:
    return answer_tasks(stories[0], stories[1], ZeroShot(tasks=LOCAL, limit=LIMIT), data_dir=shared_data)


# --- against lm-eval's own command ---------------------------------------------------------------------------------


def in_hub_columns(name: str, row: dict[str, Any]) -> dict[str, Any]:
    """A row of the local file as the hub has it; the test's own conversion."""
    doc = row["doc"]
    if name not in ("arc_easy", "openbookqa"):
        return doc
    asked = {"arc_easy": "question", "openbookqa": "question_stem"}[name]
    letters = list(LETTERS[: len(doc["choices"])])
    choices = {"text": doc["choices"], "label": letters}
    return {asked: doc["question"], "choices": choices, "answerKey": letters[doc["answer_index"]]}


@pytest.fixture(scope="module")
def theirs(stories, shared_data, tmp_path_factory) -> dict[str, Any]:
    """What `python -m lm_eval` writes: its own YAML files, with nothing but the data set changed to a local file."""
    import lm_eval.tasks

    place = tmp_path_factory.mktemp("lm-eval")
    for name in LOCAL:
        file = write_rows(place / f"{name}.jsonl", [in_hub_columns(name, row) for row in rows_of(shared_data, name)])
        folder = Path(str(lm_eval.tasks.__file__)).parent / TASKS[name].folder
        own = folder / f"{name}.yaml"
        files = "".join(f"    {split}: {file}\n" for split in ("train", "validation", "test"))
        (place / f"{name}_local.yaml").write_text(
            f"include: {own if own.exists() else folder / 'default.yaml'}\ntask: {name}_local\ndataset_path: json\n"
            f"dataset_name: null\ndataset_kwargs:\n  data_files:\n{files}"
        )
    command = [
        sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={stories[2]}", "--device", "cpu",
        "--tasks", ",".join(f"{name}_local" for name in LOCAL), "--include_path", str(place), "--limit", str(LIMIT),
        "--batch_size", "8", "--log_samples", "--output_path", str(place / "out"),
    ]  # fmt: skip
    with patch("datasets.config.HF_DATASETS_CACHE", place / "cache"):
        done = forks.run(command, cwd=place)
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = (place / "out").rglob("results_*.json")
    held = {"results": json.loads(results.read_text())["results"], "samples": {}}
    for name in LOCAL:
        (samples,) = (place / "out").rglob(f"samples_{name}_local_*.jsonl")
        held["samples"][name] = [json.loads(line) for line in samples.read_text().splitlines()]
    return held


@pytest.mark.parametrize("name", LOCAL)
def test_a_task_equals_the_command_of_lm_eval(ours, theirs, name):
    found, wanted = ours[name], theirs["results"][f"{name}_local"]
    assert found.accuracy == wanted["acc,none"]
    assert found.stderr == wanted["acc_stderr,none"]
    assert found.accuracy_norm == wanted.get("acc_norm,none")
    samples = sorted(theirs["samples"][name], key=lambda sample: sample["doc_id"])
    assert len(samples) == LIMIT
    assert found.right.tolist() == [sample["acc"] for sample in samples]
    if found.right_norm is not None:
        assert found.right_norm.tolist() == [sample["acc_norm"] for sample in samples]


# --- against a plain loop ------------------------------------------------------------------------------------------


@torch.no_grad()
def likelihood(model: Any, tokenizer: Any, context: str, continuation: str) -> tuple[float, bool]:
    """log p(continuation | context), and whether it is what the model would say; one forward, no batch."""
    before, ids = tokenizer(context)["input_ids"], tokenizer(context + continuation)["input_ids"]
    said = len(ids) - len(before)
    ids = torch.tensor(ids[-(model.config.max_position_embeddings + 1) :])
    scores = model(ids[None, :-1]).logits[0].log_softmax(-1)[-said:]
    return scores.gather(-1, ids[-said:, None]).sum().item(), bool((scores.argmax(-1) == ids[-said:]).all())


def plain(folder: Path, asked: list[tuple[list[str], list[str], int]]) -> list[float]:
    """1 for every item whose likeliest continuation is the right one; of one continuation, where it is said."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    right = []
    for contexts, continuations, gold in asked:
        found = [likelihood(model, tokenizer, *pair) for pair in zip(contexts, continuations, strict=True)]
        best = max(range(len(found)), key=lambda number: found[number][0])
        right.append(float(found[0][1] if len(found) == 1 else best == gold))
    return right


@pytest.mark.parametrize("name", ["rte", "openbookqa", "winogrande"])
def test_a_task_equals_a_plain_loop_over_prompts_that_others_wrote(ours, stories, shared_data, name):
    asked = []
    for row in rows_of(shared_data, name)[:LIMIT]:
        contexts = row.get("contexts") or [row["context"]] * len(row["continuations"])
        asked.append((contexts, row["continuations"] * (len(contexts) // len(row["continuations"])), row["gold"]))
    assert ours[name].right.tolist() == plain(stories[2], asked)


def sentences(seed: int, count: int) -> list[str]:
    draw = random.Random(seed)
    words = "one two cat dog tree road runs sees likes old new red and but then why".split()  # noqa: SIM905
    return [" ".join(draw.choices(words, k=draw.randint(2, 4))) for _ in range(count)]


def hellaswag(number: int) -> tuple[dict[str, Any], tuple[list[str], list[str], int]]:
    first, second, *endings = sentences(number, 6)
    row = {"activity_label": "Road", "ctx_a": first, "ctx_b": second, "endings": endings, "label": str(number % 4)}
    context = f"Road: {first} {second.capitalize()}"
    return row, ([context] * 4, [f" {ending}" for ending in endings], number % 4)


def arc_challenge(number: int) -> tuple[dict[str, Any], tuple[list[str], list[str], int]]:
    question, *choices = sentences(number, 5)
    labels = list("1234" if number % 3 else LETTERS[:4])  # the hub's has both
    row = {"question": question, "choices": {"text": choices, "label": labels}, "answerKey": labels[number % 4]}
    return row, ([f"Question: {question}\nAnswer:"] * 4, [f" {choice}" for choice in choices], number % 4)


@pytest.mark.parametrize("make", [hellaswag, arc_challenge])
def test_tasks_without_local_data_equal_a_plain_loop(tiny_llama, tmp_path, make):
    made = [make(number) for number in range(25)]
    write_rows(tmp_path / f"{make.__name__}.jsonl", [{**row, "ind": 3} for row, _ in made])
    found = answer_tasks(
        load(tiny_llama), load_tokenizer(tiny_llama), ZeroShot(tasks=[make.__name__]), data_dir=tmp_path
    )
    wanted = plain(tiny_llama, [asked for _, asked in made])
    assert found[make.__name__].right.tolist() == wanted
    assert 0 < sum(wanted) < 25
    assert found[make.__name__].right_norm is not None


def test_lambada_asks_whether_the_last_word_is_what_the_model_says(tiny_llama, tmp_path):
    """A random model never says a word of several bytes, so the texts end in the byte that it does say."""
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(tiny_llama).eval(),
        AutoTokenizer.from_pretrained(tiny_llama),
    )
    texts = []
    for number, text in enumerate(sentences(0, 60)):
        ids = torch.tensor(tokenizer(f"{text} ")["input_ids"])
        with torch.no_grad():
            said = tokenizer.decode(model(ids[None]).logits[0, -1].argmax())
        texts.append(f"{text} {said if number % 2 and said.strip() else 'x'}")
    write_rows(tmp_path / "lambada.jsonl", [{"text": text} for text in texts])
    found = answer_tasks(load(tiny_llama), load_tokenizer(tiny_llama), ZeroShot(tasks=["lambada"]), data_dir=tmp_path)[
        "lambada"
    ]
    asked = [([text.rpartition(" ")[0]], [f" {text.rpartition(' ')[2]}"], 0) for text in texts]
    assert found.right.tolist() == plain(tiny_llama, asked)
    assert found.right_norm is None
    assert found.accuracy == found.right.mean()


# --- what a run leaves and touches ---------------------------------------------------------------------------------


def rte(count: int, **change: Any) -> list[dict[str, Any]]:
    pairs = zip(sentences(1, count), sentences(2, count), strict=True)
    return [{"sentence1": a, "sentence2": b, "label": number % 2, **change} for number, (a, b) in enumerate(pairs)]


@pytest.fixture
def asked(tiny_llama, tmp_path):
    """Answers of the tiny model on an RTE of these rows."""

    def ask(rows: list[Any], limit: int | None = None, **options: Any) -> Answers:
        write_rows(tmp_path / "rte.jsonl", rows)
        return answer_tasks(
            load(tiny_llama),
            load_tokenizer(tiny_llama),
            ZeroShot(tasks=["rte"], limit=limit),
            data_dir=tmp_path,
            **options,
        )["rte"]

    return ask


def test_limit_takes_the_first_items(asked):
    everything, some = asked(rte(20)), asked(rte(20), limit=7)
    assert some.right.tolist() == everything.right[:7].tolist()
    assert some.stderr == pytest.approx(np.std(some.right, ddof=1) / 7**0.5)
    assert len(asked(rte(20), limit=99).right) == 20


def test_one_item_has_no_standard_error(asked):
    found = asked(rte(3), limit=1)
    assert found.stderr is None
    assert summarise({"rte": found})["mean"]["stderr"] is None
    assert next(lines(summarise({"rte": found}))).endswith(f"accuracy {100 * found.accuracy:.2f} %")


def test_the_batch_size_changes_nothing(asked):
    assert asked(rte(12), batch_size=1).right.tolist() == asked(rte(12), batch_size=5).right.tolist()


def test_local_items_need_no_network_and_leave_nothing(tiny_llama, monkeypatch, tmp_path, capfd):
    def refuse(*_: Any) -> None:
        raise AssertionError("the network was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    write_rows(tmp_path / "hellaswag.jsonl", [hellaswag(number)[0] for number in range(5)])
    model, tokenizer = load(tiny_llama), load_tokenizer(tiny_llama)
    state = (random.getstate(), torch.random.get_rng_state().tolist(), np.random.get_state()[1].tolist())  # type: ignore[index]
    before, level = dict(os.environ), logging.getLogger("lm_eval").level
    bars = are_progress_bars_disabled()
    capfd.readouterr()
    answer_tasks(model, tokenizer, ZeroShot(tasks=["hellaswag"]), data_dir=tmp_path)
    assert capfd.readouterr() == ("", "")
    assert not (tmp_path / "cache").exists()
    assert list((tmp_path / "temporary").iterdir()) == []
    assert state == (random.getstate(), torch.random.get_rng_state().tolist(), np.random.get_state()[1].tolist())  # type: ignore[index]
    assert dict(os.environ) == before
    assert logging.getLogger("lm_eval").level == level
    assert are_progress_bars_disabled() == bars


def test_the_tokenizer_stays_as_it_was(tiny_llama, tmp_path):
    tokenizer: Any = load_tokenizer(tiny_llama)
    tokenizer.pad_token = None
    write_rows(tmp_path / "rte.jsonl", rte(3))
    answer_tasks(load(tiny_llama), tokenizer, ZeroShot(tasks=["rte"]), data_dir=tmp_path)
    assert tokenizer.pad_token is None


def test_a_copy_on_another_device_keeps_its_ties_and_leaves_the_model():
    model = tiny_model("gemma2")
    copy = on_device(model, torch.device("meta"))
    assert on_device(model, torch.device("cpu")) is model
    assert {tensor.device.type for tensor in (*copy.parameters(), *copy.buffers())} == {"meta"}
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"cpu"}
    assert copy.get_output_embeddings().weight is copy.get_input_embeddings().weight  # type: ignore[union-attr]


def test_progress_says_how_far_a_task_is(asked):
    class Seen(Progress):
        def __init__(self) -> None:
            self.calls: list[tuple[str, int, int]] = []

        def advance(self, what: str, done: int, total: int) -> None:
            self.calls.append((what, done, total))

    seen = Seen()
    asked(rte(20), progress=seen)
    assert seen.calls[-1] == ("rte", 40, 40)
    assert [done for _, done, _ in seen.calls] == sorted(done for _, done, _ in seen.calls)
    assert len(seen.calls) > 2


# --- the summary ---------------------------------------------------------------------------------------------------


def answers(right: np.ndarray) -> Answers:
    return Answers(right, float(right.mean()), float(right.std(ddof=1) / len(right) ** 0.5))


def test_resampling_equals_a_loop_that_draws_items():
    draw = np.random.default_rng(3)
    values = draw.choice([-1.0, 0.0, 1.0], 60, p=[0.3, 0.5, 0.2])
    slow = np.array([draw.choice(values, 60).mean() for _ in range(10_000)])
    fast = resampled_means(values, "rte")
    assert fast.shape == (10_000,)
    assert fast.mean() == pytest.approx(slow.mean(), abs=0.005)
    assert fast.std() == pytest.approx(slow.std(), rel=0.05)
    assert np.percentile(fast, [2.5, 97.5]) == pytest.approx(np.percentile(slow, [2.5, 97.5]), abs=0.025)


def test_the_interval_is_the_normal_one_for_many_items():
    draw = np.random.default_rng(0)
    dense, pruned = (draw.random(4000) < p for p in (0.7, 0.65))
    found = summarise({"piqa": answers(pruned.astype(float))}, {"piqa": answers(dense.astype(float))})["piqa"]
    difference = pruned.astype(float) - dense
    half = 1.96 * difference.std() / 4000**0.5
    assert found["delta"] == difference.mean()
    assert found["delta_interval"] == pytest.approx([difference.mean() - half, difference.mean() + half], abs=0.0015)


def test_the_mean_over_tasks():
    draw = np.random.default_rng(0)
    pruned = {name: answers((draw.random(count) < 0.6).astype(float)) for name, count in (("rte", 277), ("piqa", 1838))}
    dense = {name: answers((draw.random(len(held.right)) < 0.7).astype(float)) for name, held in pruned.items()}
    found = summarise(pruned, dense)
    mean = found["mean"]
    assert mean["tasks"] == 2
    assert mean["accuracy"] == pytest.approx((found["rte"]["accuracy"] + found["piqa"]["accuracy"]) / 2)
    assert mean["stderr"] == pytest.approx((found["rte"]["stderr"] ** 2 + found["piqa"]["stderr"] ** 2) ** 0.5 / 2)
    assert mean["delta"] == pytest.approx((found["rte"]["delta"] + found["piqa"]["delta"]) / 2)
    variance = sum((pruned[name].right - dense[name].right).var() / len(dense[name].right) for name in pruned)
    low, high = mean["delta_interval"]
    assert high - low == pytest.approx(2 * 1.96 * variance**0.5 / 2, rel=0.05)
    assert found["rte"]["delta_interval"] == summarise({"rte": pruned["rte"]}, dense)["rte"]["delta_interval"]
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_a_model_does_not_differ_from_itself(ours):
    found = summarise(ours, ours)
    assert found.keys() == {*LOCAL, "mean"}
    assert all(held["delta"] == 0 and held["delta_interval"] == [0, 0] for held in found.values())
    assert all(held["delta"] is held["delta_interval"] is None for held in summarise(ours).values())


# --- the command ---------------------------------------------------------------------------------------------------


def test_the_command_answers_tasks(tiny_llama, text_file, tmp_path):
    pruned = tmp_path / "pruned"
    secateur.prune(
        str(tiny_llama), out=pruned, method="wanda", pattern="2:4", calibration=str(text_file), samples=8, seq_len=32
    )
    (tmp_path / "tasks").mkdir()
    write_rows(tmp_path / "tasks" / "rte.jsonl", rte(40))
    write_rows(tmp_path / "tasks" / "hellaswag.jsonl", [hellaswag(number)[0] for number in range(30)])
    command = [
        "evaluate", str(pruned), "--evaluation", str(text_file), "--windows", "4", "--quiet", "--tasks",
        "rte,hellaswag", "--data-dir", str(tmp_path), "--limit", "25",
    ]  # fmt: skip
    shown = CliRunner().invoke(cli.app, [*command, "--dense", str(tiny_llama)], catch_exceptions=False).stdout
    held = json.loads(CliRunner().invoke(cli.app, [*command, "--dense", str(tiny_llama), "--json"]).stdout)["tasks"]
    assert held.keys() == {"rte", "hellaswag", "mean"}
    assert (held["rte"]["items"], held["mean"]["tasks"]) == (25, 2)
    assert [line.rstrip() for line in shown.splitlines()[-3:]] == list(lines(held))
    both = [
        answer_tasks(
            load(folder), load_tokenizer(folder), ZeroShot(tasks=["rte", "hellaswag"], limit=25), data_dir=tmp_path
        )
        for folder in (pruned, tiny_llama)
    ]
    assert summarise(*both) == held
    alone = json.loads(CliRunner().invoke(cli.app, [*command, "--json"]).stdout)["tasks"]
    assert alone["rte"]["delta"] is None
    assert alone["rte"]["accuracy"] == held["rte"]["accuracy"]


# --- what cannot be used -------------------------------------------------------------------------------------------


def test_names():
    assert check_tasks(ZeroShot(tasks=["papers"])) == list(PAPERS)
    assert set(PAPERS) == {"boolq", "rte", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa"}
    assert check_tasks(ZeroShot(tasks=["piqa", "papers", "piqa"])) == ["piqa", *PAPERS]
    assert check_tasks(ZeroShot(tasks=[])) == []
    with pytest.raises(UnknownName, match=r"There is no task 'boolqq'\. Did you mean 'boolq'\?"):
        check_tasks(ZeroShot(tasks=["boolqq"]))
    with pytest.raises(NotEnoughText, match="found --limit 0"):
        check_tasks(ZeroShot(tasks=["boolq"], limit=0))


def test_every_task_is_in_lm_eval_where_the_table_says(tmp_path):
    """Its folder and name, that accuracy is the mean of `acc`, and that its columns are those that the prompt uses."""
    import lm_eval.tasks

    for task in TASKS.values():
        place = Path(str(lm_eval.tasks.__file__)).parent / task.folder
        manager = lm_eval.tasks.TaskManager(include_defaults=False, include_path=str(place))
        entry = manager.task_index[task.known_as]
        assert entry.cfg is not None
        assert "acc" in [metric["metric"] for metric in entry.cfg["metric_list"]]


def test_without_lm_eval_it_is_one_sentence(monkeypatch):
    monkeypatch.setattr(tasks, "find_spec", lambda name: None)
    wanted = r"^Tasks need the package lm-eval and accelerate\. Install it: pip install 'secateur\[tasks\]'\.$"
    with pytest.raises(UnsupportedModel, match=wanted):
        check_tasks(ZeroShot(tasks=["rte"]))
    assert check_tasks(ZeroShot(tasks=[])) == []


GOOD = {
    "boolq": {"passage": "a", "question": "b", "label": 1},
    "rte": {"sentence1": "a", "sentence2": "b", "label": 0},
    "hellaswag": hellaswag(0)[0],
    "winogrande": {"sentence": "a _ b", "option1": "c", "option2": "d", "answer": "2"},
    "arc_easy": arc_challenge(0)[0],
    "openbookqa": {"question": "a", "choices": ["b", "c"], "answer_index": 1},
    "piqa": {"goal": "a", "sol1": "b", "sol2": "c", "label": 1},
    "lambada": {"text": "a b c"},
}
BAD = [
    ("boolq", {"label": 2}, "There is no answer to score in row 2 of .*boolq.jsonl: 'label' must be 0 or 1"),
    ("boolq", {"label": -1}, "'label' must be 0 or 1"),
    ("boolq", {"label": True}, "The column 'label' of row 2 of .* holds a bool, not a whole number"),
    ("boolq", {"label": None}, "The column 'label' is missing in row 2 of .*; passage, question, label are wanted"),
    ("rte", {"sentence1": 3}, "The column 'sentence1' of row 2 of .*rte.jsonl holds a int, not a text"),
    ("rte", {"sentence1": "\ud800"}, "rte.jsonl is not text in UTF-8"),
    ("hellaswag", {"label": "4"}, "'label' must be the number of one of 'endings'"),
    ("hellaswag", {"label": ""}, "'label' must be the number of one of 'endings'"),
    ("hellaswag", {"endings": []}, "'label' must be the number of one of 'endings'"),
    ("hellaswag", {"endings": ["a", ""]}, "every ending a text"),
    ("hellaswag", {"endings": "abc"}, "The column 'endings' of row 2 .* holds a str, not a list of texts"),
    ("winogrande", {"answer": ""}, '\'answer\' must be "1" or "2"'),
    ("winogrande", {"sentence": "a b"}, "'sentence' have a _ with words after it"),
    ("winogrande", {"sentence": "a _"}, "'sentence' have a _ with words after it"),
    ("winogrande", {"option1": " "}, "both options be texts"),
    ("arc_easy", {"answerKey": "E"}, "'answerKey' must be one of 'choices.label'"),
    ("arc_easy", {"choices": {"text": ["a"], "label": ["A", "B"]}}, "'answerKey' must be one of 'choices.label'"),
    ("arc_easy", {"choices": ["a", "b"]}, "The column 'choices.text' is missing in row 2"),
    ("openbookqa", {"answer_index": 2}, "'answerKey' must be one of 'choices.label'"),
    ("openbookqa", {"choices": ["a", ""]}, "every choice a text"),
    ("piqa", {"sol2": ""}, "'sol2' a text"),
    ("lambada", {"text": "word"}, "'text' must end in a word with others before it"),
    ("lambada", {"text": "a b "}, "'text' must end in a word with others before it"),
]


@pytest.mark.parametrize(("name", "change", "message"), BAD)
def test_rows_that_cannot_be_scored_are_one_sentence(tmp_path, name, change, message):
    write_rows(tmp_path / f"{name}.jsonl", [GOOD[name], {**GOOD[name], **change}])
    with pytest.raises(BadText, match=message):
        check_tasks(ZeroShot(tasks=[name]), tmp_path)


def test_rows_that_are_right_pass(tmp_path):
    for name, row in GOOD.items():
        write_rows(tmp_path / f"{name}.jsonl", [row, {"doc": row, "id": 1}])
    assert check_tasks(ZeroShot(tasks=list(GOOD)), tmp_path) == list(GOOD)
    for name in GOOD:
        with quiet():
            assert load_task(name, tmp_path).eval_docs.num_rows == 2


FILES = [
    (b"", "holds no rows"),
    (b"\n\n", "holds no rows"),
    (b"{", "Line 1 of .*rte.jsonl is no JSON"),
    (b"[" * 100_000, "Line 1 of .*rte.jsonl is no JSON"),
    (b"3\n", "The column 'sentence1' is missing in row 1 of .*rte.jsonl; sentence1, sentence2, label are wanted"),
    (b'{"doc": 3}\n', "The column 'sentence1' is missing in row 1"),
    (b'{"sentence1": "a\xff"}\n', "is not text in UTF-8"),
    (b'{"sentence1": "a", "sentence2": "b", "label": 1e99}\n', "holds a float, not a whole number"),
    (b'{"sentence1": "a", "sentence2": "b", "label": NaN}\n', "holds a float, not a whole number"),
]


@pytest.mark.parametrize(("content", "message"), FILES)
def test_files_that_hold_no_rows_are_one_sentence(tmp_path, content, message):
    (tmp_path / "rte.jsonl").write_bytes(content)
    with pytest.raises(BadText, match=message):
        check_tasks(ZeroShot(tasks=["rte"]), tmp_path)


@pytest.mark.parametrize("suffix", ["jsonl.xz", "jsonl.gz", "parquet"])
def test_packed_files_that_are_broken_are_one_sentence(tmp_path, suffix):
    (tmp_path / f"rte.{suffix}").write_bytes(b"\xfd7zXZ\x00 and no more")
    with pytest.raises(BadText, match=f"rte.{suffix} cannot be read"):
        check_tasks(ZeroShot(tasks=["rte"]), tmp_path)


def test_parquet_and_packed_files_give_the_same(asked, tiny_llama, tmp_path):
    import gzip

    from pyarrow import Table, parquet

    wanted, rows = asked(rte(9)), rte(9)
    text = (tmp_path / "rte.jsonl").read_bytes()
    for folder, write in {
        "parquet": lambda place: parquet.write_table(Table.from_pylist(rows), place / "rte.parquet"),
        "gz": lambda place: (place / "rte.jsonl.gz").write_bytes(gzip.compress(text)),
        "xz": lambda place: (place / "rte.jsonl.xz").write_bytes(lzma.compress(text)),
    }.items():
        (tmp_path / folder).mkdir()
        write(tmp_path / folder)
        model = load(tiny_llama), load_tokenizer(tiny_llama)
        assert (
            answer_tasks(*model, ZeroShot(tasks=["rte"]), data_dir=tmp_path / folder)["rte"].right.tolist()
            == wanted.right.tolist()
        )


def test_a_missing_file_and_an_unreachable_hub_are_one_sentence(tiny_llama, tmp_path):
    with pytest.raises(BadText, match=r"^There is no rte\.jsonl, .* in .*, nor in .*tasks\. Put the items there"):
        check_tasks(ZeroShot(tasks=["rte"]), tmp_path)
    with pytest.raises(SecateurError, match=r"The items of rte could not be fetched \(.*--data-dir\.$"):
        answer_tasks(load(tiny_llama), load_tokenizer(tiny_llama), ZeroShot(tasks=["rte"]))


def test_answers_that_do_not_fit_the_model_are_one_sentence(tiny_llama, tmp_path):
    model, tokenizer = load(tiny_llama), load_tokenizer(tiny_llama)
    write_rows(tmp_path / "piqa.jsonl", [{**GOOD["piqa"], "sol1": "long " * 40}])
    with pytest.raises(
        UnsupportedModel, match=r"piqa has an answer of 201 tokens .* at most the model's context of 128"
    ):
        answer_tasks(model, tokenizer, ZeroShot(tasks=["piqa"]), data_dir=tmp_path)
    write_rows(tmp_path / "rte.jsonl", rte(4))
    tokenizer.add_tokens(["cat"] * 1 + [f"<{number}>" for number in range(40)])
    write_rows(tmp_path / "boolq.jsonl", [{**GOOD["boolq"], "passage": "<39>"}])
    with pytest.raises(UnsupportedModel, match="they do not belong together"):
        answer_tasks(model, tokenizer, ZeroShot(tasks=["boolq"]), data_dir=tmp_path)
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(UnsupportedModel, match="no token that begins or ends a text"):
        answer_tasks(model, tokenizer, ZeroShot(tasks=["rte"]), data_dir=tmp_path)


def test_likelihoods_of_nan_are_refused(tiny_llama, tmp_path):
    model = load(tiny_llama)
    write_rows(tmp_path / "rte.jsonl", rte(4))
    head = model.model.get_output_embeddings()
    assert head is not None
    head.register_forward_hook(lambda module, args, logits: logits * float("nan"))
    with pytest.raises(NonFinite, match="8 of 8 log-likelihoods on rte are NaN"):
        answer_tasks(model, load_tokenizer(tiny_llama), ZeroShot(tasks=["rte"]), data_dir=tmp_path)
