"""Statistics on the assistant's tokens alone, against loops over plain text and plain products."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.texts import WORDS, byte_tokenizer, chat_model

import secateur
from secateur.data.assistant import assistant_ids
from secateur.data.calibration import calibration_windows
from secateur.data.chat import Chat
from secateur.data.reader import Reader
from secateur.data.windows import Windows
from secateur.errors import BadText, NotEnoughText, UnknownName
from secateur.models.load import load
from secateur.models.matrices import weight_matrices
from secateur.models.stream.blocks import BlockRun, stream
from secateur.models.stream.refine import error
from secateur.system.settings import CalibrationText

PLAIN = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
MARKED = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}</s>{% endgeneration %}{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
)
# like Qwen3's: what was thought in earlier turns is dropped once the user has spoken again
DROPPING = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' and loop.last %}(thinks){% endif %}"
    "{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
MESSAGES = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Who runs?"},
    {"role": "assistant", "content": "The cat."},
    {"role": "user", "content": "The cat. Who else?"},
    {"role": "assistant", "content": "The dog."},
]
CHAT = Chat(MESSAGES, None, "row 1")


def tokenizer_with(template: str) -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def spoken(template: str) -> list[str]:
    """The runs of tokens that count, as text."""
    tokenizer = tokenizer_with(template)
    runs, last = [[]], False
    for one in assistant_ids(tokenizer, CHAT):
        if one >= 0 and not last:
            runs.append([])
        last = one >= 0
        runs[-1] += [one] if last else []
    return [tokenizer.decode(run) for run in runs if run]


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_what_the_assistant_says_and_where_it_ends(template):
    assert spoken(template) == ["The cat.</s>", "The dog.</s>"]


def test_a_template_that_renders_earlier_turns_otherwise():
    """The second turn is found by what comes between its prefixes, the first by a mark in its place."""
    assert spoken(DROPPING) == ["The cat.</s>", "(thinks)The dog.</s>"]


@pytest.mark.parametrize("template", [PLAIN, MARKED, DROPPING])
def test_the_tokens_are_those_of_the_whole_conversation(template):
    tokenizer = tokenizer_with(template)
    ids = [one if one >= 0 else ~one for one in assistant_ids(tokenizer, CHAT)]
    text: Any = tokenizer.apply_chat_template(MESSAGES, tokenize=False)
    assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_a_template_that_hides_the_words_is_refused():
    tokenizer = tokenizer_with("{% for m in messages | reverse %}{{ m.content | upper }}{% endfor %}")
    with pytest.raises(BadText, match=r"does not show which words of row 1 are the assistant's"):
        assistant_ids(tokenizer, CHAT)


@pytest.fixture
def model(tiny_llama, tmp_path) -> Path:
    return chat_model(tiny_llama, tmp_path / "chat-model", PLAIN)


@pytest.fixture
def chats(tmp_path) -> str:
    import random

    draw = random.Random(5)
    rows = []
    for _ in range(60):
        asked, said = (" ".join(draw.choices(WORDS, k=draw.randint(4, 20))) for _ in range(2))
        rows.append({"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]})
    file = tmp_path / "chats.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def drawn(model, chats, bos="stream", counted="assistant", samples=6, length=48) -> Any:
    from secateur.data.tokenizer import load_tokenizer

    return Reader(load_tokenizer(model), bos, counted).windows(
        length, lambda r, n: calibration_windows(r, chats, samples=samples, length=n, seed=0)
    )


def test_the_windows_are_those_of_all_tokens(model, chats):
    masked, whole = drawn(model, chats), drawn(model, chats, counted="all")
    assert torch.equal(masked.ids, whole.ids)
    assert masked.counted is not None
    assert masked.counted.shape == masked.ids.shape
    fingerprint = masked.fingerprint()
    assert fingerprint["counted_tokens"] == int(masked.counted.sum())
    assert {k: v for k, v in fingerprint.items() if "counted" not in k and k != "empty_windows"} == whole.fingerprint()
    begun = drawn(model, chats, bos="each-window")
    assert (begun.ids[:, 0] == 1).all()
    assert begun.counted is not None
    assert not begun.counted[:, 0].any()


@pytest.mark.parametrize("passes", ["one", "two"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "phi", "gpt2"])
def test_the_gram_matrix_is_that_of_the_chosen_tokens(model, chats, passes, family, tmp_path):
    """Against the inputs of a plain forward of stock transformers, one window at a time."""
    from support.families import tiny_model

    folder = tmp_path / family
    tiny_model(family).save_pretrained(folder)
    windows, language_model = drawn(model, chats), load(folder)
    run = BlockRun(language_model, windows.ids, [torch.device("cpu")], torch.float32, 4, counted=windows.counted)
    step = next(iter(stream(run)))
    if passes == "two":
        stats = step.observe({"gram", "sum"}, 10**6)
        seen, probes = stats.stats, stats.probes
    else:
        seen, probes = {}, {}
        names = list(step.matrices)
        for group, part in step.stages({"gram", "sum"}, names, one_pass=True, sequential=False, again=False):
            seen |= {name: part.stats[name] for name in group}
            probes |= part.probes
    inputs: dict[str, list[torch.Tensor]] = {}

    def kept(name: str) -> Any:
        return lambda _, args: inputs.setdefault(name, []).append(args[0][0])

    for name in seen:
        language_model.blocks[0].get_submodule(name).register_forward_pre_hook(kept(name))
    with torch.no_grad():
        for window in windows.ids:
            language_model.model(window[None])
    for name, stats in seen.items():
        x = torch.cat([part[row] for part, row in zip(inputs[name], windows.counted, strict=True)]).double()
        assert stats.tokens == len(x) == int(windows.counted.sum())
        assert torch.allclose(stats.sums["gram"], x.T @ x, rtol=1e-4, atol=1e-5)
        assert torch.allclose(stats.sums["sum"], x.sum(0), rtol=1e-4, atol=1e-5)
    first = next(iter(probes.values()))
    if passes == "two":
        assert len(first) == int(windows.counted[:4].sum())


def test_refining_counts_the_same_tokens(model, chats):
    windows, language_model = drawn(model, chats), load(model)
    run = BlockRun(language_model, windows.ids, [torch.device("cpu")], torch.float32, 4, counted=windows.counted)
    step = next(iter(stream(run, dense=True)))
    batches = step.batches()
    for parameter in step.block.parameters():
        parameter.data.mul_(0.9)
    lost = []
    for batch in batches:
        from secateur.models.replay import run_block

        output = run_block(step.block, batch.hidden, batch.call)
        for window in range(len(output)):
            for place in range(output.shape[1]):
                if batch.counted[window, place]:  # type: ignore[index]
                    target = batch.target[window, place]
                    lost.append((output[window, place] - target).square().sum() / target.square().sum())
    assert error(step.block, batches) == pytest.approx(torch.stack(lost).mean().item(), rel=1e-5)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "magnitude", "best", "sparsegpt+permute"])
def test_a_run_on_the_assistant_is_one_on_these_tokens(model, chats, tmp_path, method):
    options = {"samples": 6, "seq_len": 48, "calibration": chats}
    report = secateur.prune(str(model), out=tmp_path / "a", method=method, calibration_on="assistant", **options)
    assert report.calibration["counted"] == "assistant"
    assert report.sparsity == pytest.approx(0.5, abs=0.01)
    whole = secateur.prune(str(model), out=tmp_path / "b", method=method, **options)
    assert "counted" not in whole.calibration
    assert report.calibration["sha256"] == whole.calibration["sha256"]


def test_windows_without_a_word_of_the_assistant_are_counted(model, tmp_path):
    rows = [[{"role": "user", "content": "the road " * 30}, {"role": "assistant", "content": "yes"}]] * 30
    file = tmp_path / "long.jsonl"
    file.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    windows = drawn(model, str(file), samples=20, length=40)
    empty = sum(not row.any() for row in windows.counted)
    assert 0 < empty < 20
    options = {"samples": 20, "seq_len": 40, "calibration": str(file), "calibration_on": "assistant"}
    report = secateur.prune(str(model), out=tmp_path / "out", method="wanda", **options)
    assert f"{empty} of 20 windows hold no token that counts." in report.note
    assert report.calibration["empty_windows"] == empty


def test_what_cannot_be_told_is_refused(model, chats, text_file, tmp_path):
    options: dict[str, Any] = {"samples": 6, "seq_len": 48, "calibration_on": "assistant", "out": tmp_path / "out"}
    with pytest.raises(BadText, match=r"--calibration-on assistant wants conversations; none was found in .*documents"):
        secateur.prune(str(model), method="wanda", calibration=str(text_file), **options)
    with pytest.raises(UnknownName, match=r"kind of tokens for --calibration-on 'user'"):
        secateur.prune(str(model), calibration=chats, **{**options, "calibration_on": "user"})
    silent = tmp_path / "silent.jsonl"
    silent.write_text((json.dumps({"messages": [{"role": "user", "content": "a cat"}]}) + "\n") * 200)
    with pytest.raises(NotEnoughText, match="No token in 6 windows"):
        secateur.prune(str(model), method="wanda", calibration=str(silent), **options)


def test_experts_are_seen_by_the_tokens_that_count(tiny_mixtral, chats, tmp_path):
    folder = shutil.copytree(tiny_mixtral, tmp_path / "mixtral")
    (folder / "chat_template.jinja").write_text(PLAIN)
    options = {"samples": 6, "seq_len": 48, "calibration_on": "assistant", "calibration": chats}
    report = secateur.prune(str(folder), out=tmp_path / "out", method="wanda", **options)
    assert report.calibration["counted"] == "assistant"
    assert 0.4 < report.sparsity <= 0.51


def test_channels_go_by_the_tokens_that_count(model, chats, tmp_path):
    options = {"samples": 6, "seq_len": 48, "calibration": chats, "pattern": "25% of channels", "align": 8}
    for method in ("fast", "default", "obs+repair+refine"):
        out = tmp_path / method.replace("+", "-")
        report = secateur.prune(str(model), out=out, method=method, calibration_on="assistant", **options)
        assert report.calibration["counted"] == "assistant"


def test_rows_of_a_comparison_say_so(model, chats, text_file, tmp_path):
    options: dict[str, Any] = {"calibration": chats, "evaluation": str(text_file), "samples": 6, "seq_len": 48}
    run = {"out": tmp_path / "out", "methods": ["wanda"], "patterns": ["50%"], "windows": 4, **options}
    results = secateur.compare(str(model), calibration_on="assistant", **run)
    assert results.calibrations[0]["counted"] == "assistant"
    assert secateur.evaluate(str(model), evaluation=str(text_file), windows=4, seq_len=48).perplexity == (
        pytest.approx(results.dense.perplexity, rel=1e-6)
    )
    assert CalibrationText().calibration_on == "all"


def test_a_mask_in_hand_is_taken_by_a_model_in_memory(model):
    ids = torch.randint(3, 100, (6, 32), generator=torch.Generator().manual_seed(0))
    counted = torch.zeros_like(ids, dtype=torch.bool)
    counted[:, 5:20] = True
    language_model = load(model)
    secateur.prune_model(language_model, Windows(ids, "mine", "", None, None, counted=counted), method="wanda")
    other = load(model)
    dense = weight_matrices(load(model).blocks[0])["self_attn.q_proj"].weight
    inputs = []
    other.blocks[0].get_submodule("self_attn.q_proj").register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad():
        other.model(ids)
    norm = inputs[0][counted].square().sum(0).sqrt()
    score = dense.abs() * norm
    kept = score >= score.sort(1).values[:, score.shape[1] // 2, None]
    pruned = weight_matrices(language_model.blocks[0])["self_attn.q_proj"].weight
    assert torch.equal(pruned != 0, kept)
