"""What the calibration text takes before the first block: files by their size, answers by a real model's cache."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.families import tiny_config, tiny_model
from support.texts import chat_model

import secateur
from secateur.data import calibration
from secateur.data.calibration import drawing_bytes
from secateur.data.id_stream import HELD
from secateur.data.prompts import prompt_characters
from secateur.data.readers import LARGE
from secateur.errors import BadText, NotEnoughText
from secateur.models.generate import answers
from secateur.pruning import own_text
from secateur.pruning.own_text import own_file
from secateur.pruning.planning.drawing import Speech, _cache_bytes, fitting_batch
from secateur.pruning.planning.forecast import lines
from secateur.pruning.planning.outline import build
from secateur.system.devices import find_resources
from secateur.system.settings import Compute


def foreseen(model, **options) -> Any:
    return secateur.forecast(model, **{"samples": 4, "seq_len": 32, "measure": False, **options})


def held(source: str | Path, tokens: int = 4 * 32, data_dir: Path | None = None) -> dict[str, int]:
    return drawing_bytes(str(source), samples=4, length=tokens // 4, data_dir=data_dir)


def test_text_is_counted_by_its_files(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("x" * 3000)
    (tmp_path / "b.txt").write_text("y" * 300)
    (tmp_path / "c.jsonl").write_text('{"text": "z"}\n' * 60)
    assert held(tmp_path / "a.txt") == {"text": 3000, "token ids": 4 * 3000}
    assert held(f"{tmp_path}/a.txt,{tmp_path}/b.txt") == {"text": 3000, "token ids": 4 * 3300}
    assert held(tmp_path / "c.jsonl") == {"text": 0, "token ids": 4 * 60 * 14}
    assert held(f"{tmp_path}/b.txt:0.5,{tmp_path}/a.txt:0.5") == held(tmp_path / "a.txt")  # one after the other
    for module in (calibration, calibration.corpus_of.__globals__):
        monkeypatch.setitem(vars(module) if module is calibration else module, "LARGE", 1000)
    assert held(tmp_path / "a.txt", 16) == {"text": 2 * 16 * 16}
    with pytest.raises(BadText, match="There is no text file"):
        held(tmp_path / "none.txt")
    with pytest.raises(NotEnoughText, match="leaves none for"):
        held(f"{tmp_path}/b.txt:0.01,{tmp_path}/a.txt:0.99")


def test_corpora_are_counted_without_fetching_them(tmp_path):
    assert held("c4") == held("wikitext2") == {}
    assert held("owner/name") == {"text": LARGE, "token ids": 4 * HELD}
    assert 0 < held("demo")["token ids"] < 10**8
    (tmp_path / "c4").mkdir()
    (tmp_path / "c4" / "train.jsonl").write_text('{"text": "z"}\n' * 60)
    assert held("c4", data_dir=tmp_path) == {"text": 60 * 14}


def test_a_plan_foresees_the_draw(tiny_llama, tmp_path):
    (tmp_path / "a.txt").write_text("x" * 3000)
    found = foreseen(tiny_llama, calibration=str(tmp_path / "a.txt"))
    assert found.text.memory.bytes == sum(found.text.memory.parts.values())
    assert found.text.memory.parts["token ids"] == 4 * 3000
    assert found.text.memory.parts["calibration tokens"] == 4 * 32 * 8
    assert (found.text.tokens, found.text.seconds) == (None, None)
    assert "when drawing the calibration text: process 360 MB" in "\n".join(lines(found))
    with pytest.raises(BadText):
        foreseen(tiny_llama, calibration=str(tmp_path / "b.txt"))


def test_a_draw_that_takes_most_decides_what_fits(tiny_llama, tmp_path):
    file = tmp_path / "a.txt"
    with file.open("wb") as stream:
        stream.truncate(LARGE)  # of zeros that no disk holds
    found = foreseen(tiny_llama, calibration=str(file), method="wanda")
    most, blocks = found.text.memory.bytes, found.memory[found.passes].bytes
    assert most > blocks
    assert foreseen(tiny_llama, calibration=str(file), method="wanda", memory=most).fits
    assert foreseen(tiny_llama, calibration=str(file), method="wanda", memory=most - 1).fits is False


# Text that the model makes itself.


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "gemma2", "mixtral", "deepseek_v3"])
def test_keys_and_values_are_those_of_a_real_model(family):
    model = tiny_model(family)
    with torch.no_grad():
        cache = model(torch.zeros(1, 40, dtype=torch.long), use_cache=True).past_key_values
    real = [sum(one.nbytes for one in vars(layer).values() if isinstance(one, torch.Tensor)) for layer in cache.layers]
    assert _cache_bytes(build(tiny_config(family), torch.float32), 40) == real
    assert all(real)


@pytest.fixture
def model(tiny_llama, tmp_path) -> Path:
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
    return chat_model(tiny_llama, tmp_path / "chat-model", template)


@pytest.fixture
def prompts(tmp_path) -> str:
    rows: list[dict[str, Any]] = [{"prompt": f"who runs {number}"} for number in range(20)]
    rows += [{"messages": [{"role": "user", "content": "a cat"}, {"role": "user", "content": "a dog"}]}] * 20
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"self:{file}"


def test_batches_are_as_small_as_the_limit_wants_them(tiny_llama):
    speech = Speech(build(tiny_config("llama"), torch.float32), 30, 100, True)
    sizes = {batch: int(sum(speech.parts(batch).values())) for batch in (8, 4, 2, 1)}
    assert sizes[8] > sizes[4] > sizes[2] > sizes[1]
    # four layers, and the copy of one, of keys and values of two heads of 16 numbers
    assert speech.parts(8)["keys and values"] == 8 * 130 * (4 + 1) * 2 * 2 * 16 * 4
    for batch, size in sizes.items():
        limited = {limit: fitting_batch(speech, find_resources(Compute(memory=limit))) for limit in (size, size - 1)}
        assert limited == {size: batch, size - 1: max(batch // 2, 1)}
    assert fitting_batch(speech, find_resources(Compute(batch_size=3))) == 3


def test_a_plan_foresees_what_the_model_says(model, prompts):
    assert set(prompt_characters(prompts)) == {10, 11, 18}
    options = {"calibration": prompts, "self_tokens": 20, "batch_size": 4}
    found = foreseen(model, **options)
    assert found.text.batch_size == 4
    assert found.text.memory.parts["keys and values"] > 0
    assert found.text.tokens == 6 * 20  # 128 tokens of about 25 each
    assert found.text.seconds is None
    assert "up to 120 tokens that the model says, 4 prompts at once" in "\n".join(lines(found))
    timed, longer = (foreseen(model, **options, samples=samples, measure=True) for samples in (1, 64))
    assert timed.text.seconds
    assert longer.text.tokens == 40 * 20  # more than all prompts can give
    assert any("Answers are taken to be as long as --self-tokens allow" in line for line in lines(timed))


def test_what_a_model_keeps_is_not_guessed(prompts, tmp_path):
    tiny_config("mamba").save_pretrained(tmp_path)
    found = foreseen(tmp_path, calibration=prompts, method="wanda")
    assert (found.text, found.fits) == (None, None)
    assert found.left_out[-1] == "What the model takes to answer prompts is not known without its numbers."
    assert "memory, text" not in "\n".join(lines(found))


def test_a_run_answers_in_such_batches_and_goes_on_with_them(model, prompts, tmp_path, monkeypatch):
    speech = Speech(build(tiny_config("llama"), torch.float32), 40, 20, True)
    between = int(sum(speech.parts(2).values()))  # the prompts are shorter
    asked: list[int] = []

    def counting(model: Any, batch: Any, *rest: Any) -> Any:
        asked.append(len(batch))
        return answers(model, batch, *rest)

    monkeypatch.setattr(own_text, "answers", counting)
    given: dict[str, Any] = {"calibration": prompts, "samples": 4, "seq_len": 32, "self_tokens": 20, "method": "wanda"}
    secateur.prune(str(model), out=tmp_path / "out", memory=between, **given)
    assert set(asked) < {1, 2, 4}
    assert max(asked) < 8
    assert not own_file(tmp_path / "out").exists()
    asked.clear()
    secateur.prune(str(model), out=tmp_path / "other", **given)
    assert set(asked) == {8}
