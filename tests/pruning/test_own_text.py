"""The model's own text: what it says, against a loop over its logits; what is kept, and taken up."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.texts import chat_model
from transformers import AutoModelForCausalLM

import secateur
from secateur.data.prompts import read_prompts
from secateur.data.tokenizer import load_tokenizer
from secateur.errors import BadText, ConditionsDiffer, Interrupted, NotEnoughText
from secateur.models.generate import Drawing, _seed, answers
from secateur.pruning import own_text
from secateur.pruning.own_text import own_file
from secateur.system.progress import Progress

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture
def model(tiny_llama, tmp_path) -> Path:
    return chat_model(tiny_llama, tmp_path / "chat-model", TEMPLATE)


@pytest.fixture
def prompts(tmp_path) -> str:
    rows: list[dict[str, Any]] = [{"prompt": f"who runs {number}"} for number in range(9)]
    rows += [{"messages": [{"role": "user", "content": f"a cat {number}"}]} for number in range(9)]
    rows += [{"text": f"the tree {number} "} for number in range(6)]
    rows += [{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "not this"}]}]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"self:{file}"


OPTIONS: dict[str, Any] = {"samples": 4, "seq_len": 48, "self_tokens": 20, "batch_size": 3, "method": "wanda"}


def test_prompts_end_where_the_model_is_to_speak(model, prompts):
    tokenizer = load_tokenizer(model)
    texts = {str(tokenizer.decode(one.ids)) for one in read_prompts(tokenizer, prompts, longest=99, seed=0)}
    assert "[user]who runs 3\n[assistant]" in texts
    assert "[user]a cat 8\n[assistant]" in texts
    assert "<s>the tree 0 " in texts
    assert "[user]x\n[assistant]" in texts  # its last answer is left out
    assert len(texts) == 25


def test_without_a_template_a_prompt_is_text(tiny_llama, tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"prompt": "a cat"}) + "\n")
    (one,) = read_prompts(load_tokenizer(tiny_llama), f"self:{file}", longest=99, seed=0)
    assert load_tokenizer(tiny_llama).decode(one.ids) == "<s>a cat"


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_answers_are_those_of_a_loop_over_logits(model, temperature):
    """One prompt at a time, nothing cached, nothing padded; the noise drawn as it is documented."""
    stock = AutoModelForCausalLM.from_pretrained(model).eval()
    prompts = [(5, [1, 40, 41]), (2, [1, 50]), (9, [1, 60, 61, 62, 63, 64])]
    drawing = Drawing(temperature, 12, (2,), 3)
    expected = []
    for number, ids in prompts:
        draw, said = torch.Generator().manual_seed(_seed(3, number)), []
        while len(said) < 12 and said[-1:] != [2]:
            with torch.no_grad():
                logits = stock(torch.tensor([[*ids, *said]])).logits[0, -1].float()
            if temperature:
                noise = torch.rand(len(logits), generator=draw).clamp_min(1e-20)
                logits = logits / temperature - (-noise.log()).log()
            said.append(int(logits.argmax()))
        expected.append(said)
    assert answers(stock, prompts, drawing) == expected
    assert [answers(stock, [one], drawing)[0] for one in prompts] == expected  # whatever the batch


def test_an_answer_ends_with_the_token_that_ends_it(model):
    stock = AutoModelForCausalLM.from_pretrained(model).eval()
    (free,) = answers(stock, [(0, [1, 40, 41])], Drawing(0.0, 8, (), 0))
    stop = free[3]
    ended = free[: free.index(stop) + 1]
    assert answers(stock, [(0, [1, 40, 41])], Drawing(0.0, 8, (stop,), 0)) == [ended]


def test_draws_are_those_of_the_softmax(model):
    stock = AutoModelForCausalLM.from_pretrained(model).eval()
    with torch.no_grad():
        expected = (stock(torch.tensor([[1, 40]])).logits[0, -1] / 0.5).softmax(-1)
    many = [(number, [1, 40]) for number in range(4000)]
    drawn = torch.tensor(answers(stock, many, Drawing(0.5, 1, (), 0))).flatten()
    shares = torch.bincount(drawn, minlength=len(expected)) / len(many)
    assert (shares - expected).abs().max() < 4 * (expected * (1 - expected) / len(many)).sqrt().max()


def test_a_model_is_pruned_on_what_it_says(model, prompts, tmp_path):
    report = secateur.prune(str(model), out=tmp_path / "out", calibration=prompts, **OPTIONS)
    facts = report.calibration
    assert facts["source"] == prompts
    assert facts["generated"]["temperature"] == 0.7
    assert facts["generated"]["tokens"] == 20
    assert facts["generated"]["prompts"] % 3 == 0  # whole batches, as many as are needed
    assert facts["available_tokens"] >= 4 * 48
    assert not own_file(tmp_path / "out").exists()
    again = secateur.prune(str(model), out=tmp_path / "again", calibration=prompts, **OPTIONS)
    assert again.calibration == facts
    other = secateur.prune(str(model), out=tmp_path / "other", calibration=prompts, seed=1, **OPTIONS)
    assert other.calibration["sha256"] != facts["sha256"]


class Dying(Progress):
    """Interrupts a run when the model has said so many tokens."""

    def __init__(self, after: int) -> None:
        self.after = after

    def advance(self, what: str, done: int, total: int) -> None:
        if what == "tokens" and done > self.after:
            raise KeyboardInterrupt


def test_a_run_that_died_goes_on_with_the_same_tokens(model, prompts, tmp_path, monkeypatch):
    whole = secateur.prune(str(model), out=tmp_path / "whole", calibration=prompts, **OPTIONS)
    run: dict[str, Any] = {"out": tmp_path / "out", "calibration": prompts, **OPTIONS}
    with pytest.raises(Interrupted, match=r"goes on after the \d batches of answers"):
        secateur.prune(str(model), progress=Dying(120), **run)
    kept = own_file(tmp_path / "out").read_bytes()
    assert kept.count(b"batch") >= 2
    asked: list[int] = []

    def counting(model: Any, batch: Any, *rest: Any) -> Any:
        asked.append(len(batch))
        return answers(model, batch, *rest)

    monkeypatch.setattr(own_text, "answers", counting)
    resumed = secateur.prune(str(model), **run)
    assert resumed.calibration == whole.calibration
    assert 0 < sum(asked) < whole.calibration["generated"]["prompts"]
    one, other = (tmp_path / name / "model.safetensors" for name in ("whole", "out"))
    assert one.read_bytes() == other.read_bytes()


def test_what_was_said_under_other_conditions_is_not_taken_up(model, prompts, tmp_path):
    run: dict[str, Any] = {"out": tmp_path / "out", "calibration": prompts, **OPTIONS}
    with pytest.raises(Interrupted):
        secateur.prune(str(model), progress=Dying(120), **run)
    with pytest.raises(ConditionsDiffer, match=r"temperature was 0.7, now 0.2"):
        secateur.prune(str(model), self_temperature=0.2, **run)
    report = secateur.prune(str(model), self_temperature=0.2, restart=True, **run)
    assert report.calibration["generated"]["temperature"] == 0.2


def test_statistics_on_the_answers_alone(model, prompts, tmp_path):
    report = secateur.prune(
        str(model), out=tmp_path / "out", calibration=prompts, calibration_on="assistant", **OPTIONS
    )
    whole = secateur.prune(str(model), out=tmp_path / "whole", calibration=prompts, **OPTIONS)
    assert report.calibration["sha256"] == whole.calibration["sha256"]
    assert 0 < report.calibration["counted_tokens"] <= whole.calibration["generated"]["answer_tokens"]
    begun = secateur.prune(
        str(model), out=tmp_path / "bos", calibration=prompts, calibration_on="assistant", bos="each-window", **OPTIONS
    )
    assert begun.calibration["bos"] == "each-window"


def test_all_rows_of_a_comparison_are_made_of_one_text(model, prompts, text_file, tmp_path, monkeypatch):
    asked: list[int] = []

    def counting(model: Any, batch: Any, *rest: Any) -> Any:
        asked.append(len(batch))
        return answers(model, batch, *rest)

    monkeypatch.setattr(own_text, "answers", counting)
    run: dict[str, Any] = {
        "out": tmp_path / "out", "methods": ["wanda", "magnitude"], "patterns": ["50%"], "windows": 4,
        "calibration": prompts, "evaluation": str(text_file), "samples": [2, 4], "seq_len": 48, "self_tokens": 20,
        "batch_size": 3,
    }  # fmt: skip
    first = secateur.compare(str(model), **run)
    made = sum(asked)
    assert made == first.calibrations[0]["generated"]["prompts"]
    again = secateur.compare(str(model), **run)
    assert sum(asked) == made
    assert again.calibrations == first.calibrations
    assert [draw["samples"] for draw in first.calibrations] == [4, 2]


def test_what_cannot_be_answered_is_refused(model, prompts, tmp_path):
    run: dict[str, Any] = {"out": tmp_path / "out", **OPTIONS}
    with pytest.raises(BadText, match=r"There is no file .*none\.jsonl with prompts"):
        secateur.prune(str(model), calibration=f"self:{tmp_path}/none.jsonl", **run)
    with pytest.raises(NotEnoughText, match=r"25 prompts of .* and their answers have [\d,]+\. Use more prompts"):
        secateur.prune(str(model), calibration=prompts, **{**run, "samples": 100})
    own_file(tmp_path / "out").unlink()
    with pytest.raises(BadText, match=r"none of 1 to 8 tokens, after which --self-tokens fit"):
        secateur.prune(str(model), calibration=prompts, **{**run, "self_tokens": 120})
    with pytest.raises(BadText, match=r"--self-temperature is 0 or more; found -1"):
        secateur.prune(str(model), calibration=prompts, self_temperature=-1, **run)
    odd = tmp_path / "odd.jsonl"
    odd.write_text(json.dumps({"answer": "x"}) + "\n")
    with pytest.raises(BadText, match=r"Every prompt needs 'messages', 'prompt' or 'text'; row 1 of"):
        secateur.prune(str(model), calibration=f"self:{odd}", **run)
    odd.write_text(json.dumps({"messages": [{"role": "assistant", "content": "x"}]}) + "\n")
    with pytest.raises(BadText, match=r"row 1 of .* has nothing that the model could answer"):
        secateur.prune(str(model), calibration=f"self:{odd}", **run)


def test_a_plan_is_measured_on_it(model, prompts, tmp_path):
    options = {key: OPTIONS[key] for key in ("samples", "seq_len", "self_tokens", "batch_size", "method")}
    plan = secateur.plan(str(model), out=tmp_path / "plan.json", calibration=prompts, **options)
    assert plan
    assert not own_file(tmp_path / "plan.json").exists()
