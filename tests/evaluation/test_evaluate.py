"""Evaluation against plain stock code, and the interval against what it must mean."""

import copy
import errno
from pathlib import Path

import numpy as np
import pytest
import torch
from support.families import tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import secateur
from secateur.errors import DiskFull
from secateur.evaluation.bits import text_bytes
from secateur.evaluation.perplexity import Forward, measure, perplexity_difference
from secateur.models.load import load, replayable
from secateur.system.progress import Progress


def plain_losses(folder: Path, ids: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Mean next-token loss of every window with stock transformers, one window at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    with torch.no_grad():
        return torch.stack([model(window[None], labels=window[None]).loss for window in ids])


def plain_windows(folder: Path, texts: list[str], length: int) -> torch.Tensor:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    stream = [token for text in texts for token in tokenizer(text)["input_ids"]]
    return torch.tensor(stream[: len(stream) // length * length]).view(-1, length)


def documents(file: Path) -> list[str]:
    import json

    return [json.loads(line)["text"] for line in file.read_text().splitlines()]


def test_perplexity_equals_stock_transformers(tiny_llama, text_file):
    found = secateur.evaluate(str(tiny_llama), evaluation=str(text_file), seq_len=64, batch_size=3)
    ids = plain_windows(tiny_llama, documents(text_file), 64)
    expected = plain_losses(tiny_llama, ids).double().mean().exp().item()
    assert found.perplexity == pytest.approx(expected, rel=1e-5)
    assert found.evaluation["samples"] == len(ids)
    assert found.delta is None


def test_a_bf16_checkpoint_is_evaluated_as_its_float32_copy(tiny_llama, text_file, tmp_path):
    AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path)
    found = secateur.evaluate(str(tmp_path), evaluation=str(text_file), seq_len=64, windows=20)
    ids = plain_windows(tiny_llama, documents(text_file), 64)[:20]
    expected = plain_losses(tmp_path, ids).double().mean().exp().item()
    assert found.perplexity == pytest.approx(expected, rel=1e-5)


def test_distance_from_the_dense_model(tiny_llama, text_file, tmp_path):
    pruned = tmp_path / "pruned"
    secateur.prune(
        str(tiny_llama), out=pruned, method="wanda", pattern="2:4", calibration=str(text_file), samples=8, seq_len=32
    )
    found = secateur.evaluate(str(pruned), dense=str(tiny_llama), evaluation=str(text_file), seq_len=64, windows=20)
    ids = plain_windows(tiny_llama, documents(text_file), 64)[:20]
    logits = {}
    for folder in (tiny_llama, pruned):
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        with torch.no_grad():
            logits[folder] = model(ids).logits[:, :-1]
    log_p, log_q = logits[tiny_llama].log_softmax(-1), logits[pruned].log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
    agreement = (log_p.argmax(-1) == log_q.argmax(-1)).float().mean().item()
    assert found.kl == pytest.approx(kl, rel=1e-4)
    assert found.top1_agreement == pytest.approx(agreement, abs=1e-6)
    p, q = (log.double().exp() for log in (log_p, log_q))
    rejected = (p - q).clamp_min(0).sum(-1).mean().item()  # what the dense model draws in place of it
    assert found.acceptance == pytest.approx(1 - rejected, abs=1e-6)
    dense, sparse = (plain_losses(f, ids).double().mean().exp().item() for f in (tiny_llama, pruned))
    assert found.dense_perplexity == pytest.approx(dense, rel=1e-5)
    assert found.delta == pytest.approx(sparse - dense, abs=1e-3)
    assert found.delta is not None
    assert found.delta_interval is not None
    low, high = found.delta_interval
    assert low < found.delta < high


def test_a_model_does_not_differ_from_itself(tiny_llama, text_file):
    found = secateur.evaluate(str(tiny_llama), dense=str(tiny_llama), evaluation=str(text_file), windows=4)
    assert (found.delta, found.delta_interval) == (0, (0, 0))
    assert found.kl == pytest.approx(0, abs=1e-9)
    assert found.top1_agreement == 1
    assert found.acceptance == pytest.approx(1, abs=1e-6)


def test_spilled_hidden_states_give_the_same(tiny_llama, tmp_path):
    ids = torch.randint(3, 100, (9, 32), generator=torch.Generator().manual_seed(0))
    run = (load(tiny_llama), ids, torch.device("cpu"), torch.float32, 2)
    plain = Forward(*run)
    spilling = Forward(*run, spill=tmp_path / "spill")
    first, second, third = (measure(f, None, Progress()).loss for f in (plain, spilling, spilling))
    assert (first == second).all()
    assert (first == third).all()


def test_the_interval_covers_what_it_says():
    """Over many pairs with a known difference, 95 % intervals must hold it about 95 % of the time."""
    draw = np.random.default_rng(1)
    inside = 0
    for _ in range(200):
        hard = draw.normal(2.0, 0.5, 60)  # what both models find hard about a window
        a = hard + draw.normal(0.1, 0.05, 60)
        b = hard
        _, (low, high) = perplexity_difference(a, b)
        true = np.exp(2.1 + 0 * a.mean()) - np.exp(2.0)
        # the mean over windows is random too, so judge the ratio, which pairing makes sharp
        scale = np.exp(hard.mean() - 2.0)
        inside += low <= true * scale <= high
    assert 180 <= inside <= 200


def test_pairing_makes_the_interval_narrow():
    draw = np.random.default_rng(2)
    hard = draw.normal(2.0, 0.5, 100)
    _, (low, high) = perplexity_difference(hard + 0.01, hard)
    assert 0 < low < high < 0.2
    _, (low, high) = perplexity_difference(draw.permutation(hard) + 0.01, hard)
    assert low < 0 < high


@pytest.mark.parametrize("family", ["gemma2", "minicpm3", "gemma3n_text"])
@pytest.mark.filterwarnings("ignore")
def test_families_with_scaled_embeddings_or_several_streams(family):
    """A bf16 model evaluated in float32 equals its float32 copy; Gemma 3n has a hidden state of four dimensions."""
    model = tiny_model(family)
    with torch.no_grad():
        ids = torch.randint(3, 128, (5, 32), generator=torch.Generator().manual_seed(0))
        narrow = copy.deepcopy(model).bfloat16()
        expected = torch.stack([copy.deepcopy(narrow).float()(w[None], labels=w[None]).loss for w in ids])
    run = Forward(replayable(narrow), ids, torch.device("cpu"), torch.float32, 2)
    assert torch.allclose(torch.from_numpy(measure(run, None, Progress()).loss).float(), expected, rtol=1e-5)


def test_tokens_that_neither_model_can_say_cost_no_divergence(tiny_llama):
    language_model = load(tiny_llama)
    head = language_model.model.get_output_embeddings()
    assert head is not None
    head.register_forward_hook(lambda m, args, logits: logits.index_fill(-1, torch.tensor([1]), float("-inf")))
    ids = torch.randint(3, 100, (4, 32), generator=torch.Generator().manual_seed(0))
    run = (language_model, ids, torch.device("cpu"), torch.float32, 2)
    found = measure(Forward(*run), Forward(*run), Progress())
    assert found.kl is not None
    assert found.kl.mean() == pytest.approx(0, abs=1e-9)


def test_a_disk_too_small_to_spill_is_one_sentence(tiny_llama, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    ids = torch.randint(3, 100, (4, 32))
    run = Forward(load(tiny_llama), ids, torch.device("cpu"), torch.float32, 2, spill=tmp_path / "spill")
    with pytest.raises(DiskFull, match="The disk filled up while"):
        measure(run, None, Progress())


def test_perplexity_with_bos_in_each_window_equals_stock_transformers(tiny_llama, text_file):
    found = secateur.evaluate(str(tiny_llama), evaluation=str(text_file), seq_len=64, windows=12, bos="each-window")
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    texts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in documents(text_file)]
    stream = [token for ids in texts for token in [*ids, tokenizer.eos_token_id]]
    ids = torch.tensor([[tokenizer.bos_token_id, *stream[63 * i : 63 * (i + 1)]] for i in range(12)])
    expected = plain_losses(tiny_llama, ids).double().mean().exp().item()
    assert found.perplexity == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("bos", ["stream", "each-window"])
def test_bits_a_byte_against_a_loop_over_tokens(tiny_llama, text_file, bos):
    """Every token of this tokenizer is a byte, but special ones are none."""
    found = secateur.evaluate(str(tiny_llama), evaluation=str(text_file), seq_len=64, windows=8, bos=bos)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    if bos == "stream":
        ids = plain_windows(tiny_llama, documents(text_file), 64)[:8]
    else:
        texts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in documents(text_file)]
        stream = [token for one in texts for token in [*one, tokenizer.eos_token_id]]
        ids = torch.tensor([[1, *stream[63 * i : 63 * (i + 1)]] for i in range(8)])
    nats, size = 0.0, 0
    for window in ids:
        with torch.no_grad():
            log_p = model(window[None]).logits[0].double().log_softmax(-1)
        for place in range(1, len(window)):
            nats -= log_p[place - 1, window[place]].item()
            size += window[place].item() not in tokenizer.all_special_ids
    assert found.bits_per_byte == pytest.approx(nats / np.log(2) / size, rel=1e-5)


def test_the_bytes_of_text_are_those_of_utf8():
    """Words in pieces, a leading space, letters of several bytes; nothing is cut through here."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0, "<s>": 1, "▁a": 2, "▁nä": 3, "he": 4, "▁€": 5, "▁": 6}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", unk_token="<unk>")
    ids = torch.tensor([[2, 3, 4, 5], [4, 2, 1, 3], [3, 1, 6, 5]])
    expected = len(" nähe €".encode()) + len(" a nä".encode()) + len("  €".encode())
    assert text_bytes(tokenizer, ids) == expected


def test_much_that_hangs_on_bos_is_said(tiny_llama, text_file, monkeypatch):
    """The two figures are those of stock transformers, on the same tokens."""
    given = {"evaluation": str(text_file), "seq_len": 64, "windows": 8}
    assert secateur.evaluate(str(tiny_llama), **given).note == ""
    monkeypatch.setattr("secateur.evaluation.bos.MUCH", 1.0)
    note = secateur.evaluate(str(tiny_llama), **given).note
    model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    ids = plain_windows(tiny_llama, documents(text_file), 64)[:4]
    with_bos = torch.cat([torch.ones_like(ids[:, :1]), ids], 1)
    with torch.no_grad():
        without = model(ids).logits[:, :-1].flatten(0, 1)
        begun = model(with_bos).logits[:, 1:-1].flatten(0, 1)
    target = ids[:, 1:].flatten()
    figures = [torch.nn.functional.cross_entropy(one, target).exp().item() for one in (without, begun)]
    assert f"{figures[0]:.4g} without and {figures[1]:.4g} with BOS before each of 4 windows" in note
    assert "The way in use is --bos stream" in note
