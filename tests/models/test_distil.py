"""Tuning towards the end loss: its gradients against autograd through the whole model, and what it must leave alone."""

import shutil
from pathlib import Path

import pytest
import torch
from support.families import tiny_model
from support.streams import CPU, TOKENS, windows
from torch import nn

from secateur.errors import NotEnoughText, SecateurError, UnsupportedModel
from secateur.methods import find_method
from secateur.methods.values import find_codes, parse_values
from secateur.models import mapped_tensors
from secateur.models.kept import matrix_parameters
from secateur.models.load import replayable
from secateur.models.matrices import weight_matrices
from secateur.models.replay import working_copy
from secateur.models.stream import distil
from secateur.models.stream import steps as stepping
from secateur.models.stream.distil import Distillation, aims, text_of
from secateur.models.stream.forward import BlockRun
from secateur.pruning import distil as tuning
from secateur.pruning.in_memory import prune_model
from secateur.pruning.planning import memory
from secateur.pruning.prune import prune

FAMILIES = ["llama", "gemma2", "gemma3_text", "cohere", "granite", "gpt2", "mixtral", "qwen3_moe", "mamba", "lfm2"]


def masked(model, seed=0):
    """Half of every matrix in a block is taken out, at random; the masks."""
    draw = torch.Generator().manual_seed(seed)
    found = []
    for block in model.blocks:
        kept = {n: torch.rand(p.shape, generator=draw) > 0.5 for n, p in matrix_parameters(block).items()}
        for name, mask in kept.items():
            block.get_parameter(name).data.mul_(mask)
        found.append(kept)
    return found


def slopes_of_autograd(family, tokens, masks):
    """What one backward pass through the whole model gives, in float64 where it can be, and the loss."""
    dtype = torch.float32 if family in ("mixtral", "qwen3_moe") else torch.float64  # grouped products have no others
    dense, pruned = tiny_model(family), tiny_model(family)
    nn.Module.to(dense, dtype)
    nn.Module.to(pruned, dtype)
    blocks = replayable(pruned).blocks
    for block, kept in zip(blocks, masks, strict=True):
        for name, mask in kept.items():
            block.get_parameter(name).data.mul_(mask)
            block.get_parameter(name).requires_grad_()
    p = dense(tokens, use_cache=False).logits[:, :-1].log_softmax(-1).detach()
    q = pruned(tokens, use_cache=False).logits[:, :-1].log_softmax(-1)
    loss = (p.exp() * (p - q)).sum(-1).mean()
    loss.backward()
    slopes = [
        {name: block.get_parameter(name).grad * mask for name, mask in kept.items()}
        for block, kept in zip(blocks, masks, strict=True)
    ]
    return slopes, loss.item()


@pytest.mark.parametrize("graphs", [0, 2])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.filterwarnings("ignore")
def test_gradients_are_those_of_the_whole_model(family, graphs, monkeypatch):
    dense, pruned = replayable(tiny_model(family)), replayable(tiny_model(family))
    masks = masked(pruned)
    monkeypatch.setattr(distil, "LOGITS", 128 * 7)  # pieces that do not divide a window
    run = BlockRun(dense, torch.cat([TOKENS, TOKENS[:1]]), [CPU], torch.float32, 2)
    blocks = [working_copy(block, CPU, torch.float32) for block in pruned.blocks]
    with torch.no_grad():
        distillation = Distillation(aims(run, 1), blocks, masks)
    monkeypatch.setattr(distillation, "_graphs", graphs)
    found = {}

    def collect(index):
        found[index] = {n: blocks[index].get_parameter(n).grad * mask for n, mask in masks[index].items()}

    monkeypatch.setattr(distillation, "_move", collect)
    loss = distillation.step(0)
    assert all(one.grad is None for one in distillation.aims.shell.model.parameters())
    expected, whole = slopes_of_autograd(family, TOKENS, masks)
    assert loss == pytest.approx(whole, rel=1e-4)
    for index, kept in enumerate(expected):
        for name, slope in kept.items():
            scale, summed = slope.abs().max().clamp_min(1e-12), TOKENS.numel() - len(TOKENS)
            assert ((found[index][name] / summed - slope).abs().max() / scale) < 2e-3, (index, name)


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float16"])
@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2", "gemma3_text"])
@pytest.mark.filterwarnings("ignore")
def test_the_model_comes_nearer_and_masks_stand_still(family, dtype, monkeypatch):
    monkeypatch.setattr(stepping, "STEP_TOKENS", 64)
    monkeypatch.setattr(distil, "RATE", 0.05)  # for a few windows of random text
    found = {}
    for method in ("wanda", "wanda+distil"):
        model, dense = tiny_model(family), tiny_model(family)
        report = prune_model(replayable(model), windows(), method=method, pattern="2:4", batch_size=3, dtype=dtype)
        assert all(site.sparsity == pytest.approx(0.5, abs=1e-3) for site in report.sites)
        with torch.no_grad():
            p, q = (m(TOKENS, use_cache=False).logits.log_softmax(-1) for m in (dense, model))
        found[method] = (p.exp() * (p - q)).sum(-1).mean().item(), model.state_dict()
        if report.distilled:
            before, after = report.distilled
            assert after < before
    (before, wanda), (after, tuned) = found.values()
    assert after < before
    for name, tensor in tuned.items():
        assert torch.equal(tensor == 0, wanda[name] == 0), name
        if "norm" in name or "embed" in name:
            assert torch.equal(tensor, wanda[name]), name


@pytest.mark.parametrize("family", ["falcon_h1", "deepseek_v3", "gpt_oss", "qwen3_next", "bloom", "mpt"])
@pytest.mark.filterwarnings("ignore")
def test_other_architectures_are_tuned_too(family, monkeypatch):
    """States, biases by position, experts and shared ones: zeros stay, nothing is made worse."""
    monkeypatch.setattr(stepping, "STEP_TOKENS", 64)
    language_model = replayable(tiny_model(family))
    report = prune_model(language_model, windows(), method="magnitude+distil", pattern="50%", batch_size=3)
    assert report.sparsity == pytest.approx(0.5, abs=2e-3)
    assert report.distilled
    assert report.distilled[1] <= report.distilled[0]


@pytest.mark.filterwarnings("ignore")
def test_what_is_on_a_grid_stays_on_it(monkeypatch):
    monkeypatch.setattr(stepping, "STEP_TOKENS", 64)
    values = parse_values("int4 of group 32")
    assert values is not None
    model = replayable(tiny_model("llama"))
    prune_model(model, windows(), method="wanda+distil", pattern="50%", values=str(values), batch_size=3)
    for block in model.blocks:
        for name, matrix in weight_matrices(block).items():
            assert find_codes(matrix.weight, values) is not None, name


def test_only_tokens_that_count_are_aimed_at():
    """The gradient of a window of which some tokens count is that of their losses alone."""
    counted = torch.zeros_like(TOKENS, dtype=torch.bool)
    counted[:, 5:9] = True
    run = BlockRun(replayable(tiny_model("llama")), TOKENS, [CPU], torch.float32, 2, counted=counted)
    tuned = aims(run, 2**17).tuned
    assert torch.equal(torch.cat(list(tuned.next)).nonzero()[:, 1].unique(), torch.arange(4, 8))


@pytest.mark.parametrize("counted", [None, 1])
def test_a_single_window_is_refused_before_any_work(counted, tmp_path, text_file, tiny_llama):
    with pytest.raises(NotEnoughText, match=r"tunes on some calibration windows .* found 1 .* Give --samples 32"):
        prune(
            tiny_llama, out=tmp_path / "out", method="wanda+distil", calibration=str(text_file), samples=1, seq_len=16
        )
    assert not any(tmp_path.iterdir())
    few = torch.zeros_like(TOKENS, dtype=torch.bool)
    few[0] = True
    run = BlockRun(replayable(tiny_model("llama")), TOKENS, [CPU], torch.float32, 2, counted=few)
    with pytest.raises(NotEnoughText, match="found 1 with a token that counts"):
        aims(run, 2**17)


def test_windows_without_a_token_that_counts_are_neither_tuned_on_nor_judge():
    counted = torch.ones_like(TOKENS, dtype=torch.bool)
    counted[-1] = False
    run = BlockRun(replayable(tiny_model("llama")), TOKENS, [CPU], torch.float32, 2, counted=counted)
    found = aims(run, 2**17)
    assert torch.equal(torch.cat([*found.tuned.tokens, *found.judged.tokens]), TOKENS[:-1])


@pytest.mark.parametrize("family", ["gemma3n_text", "gemma4_text"])
@pytest.mark.filterwarnings("ignore")
def test_blocks_that_share_keys_and_values_are_refused(family):
    with pytest.raises(UnsupportedModel, match=r"share keys and values.*use \+refine"):
        prune_model(replayable(tiny_model(family)), windows(), method="magnitude+distil")


@pytest.mark.filterwarnings("ignore")
def test_experts_that_are_skipped_stand_still():
    model, dense = replayable(tiny_model("mixtral")), replayable(tiny_model("mixtral"))
    report = prune_model(model, windows(), method="wanda+distil", skip=["*experts*.0.*"], batch_size=3)
    assert report.distilled
    left = {one.site for one in report.sites if one.pattern is None}
    assert left
    for index, (block, before) in enumerate(zip(model.blocks, dense.blocks, strict=True)):
        old = weight_matrices(before)
        for name, matrix in weight_matrices(block).items():
            if f"{model.block_name(index)}.{name}" in left:
                assert torch.equal(matrix.weight, old[name].weight), name


def test_errors_of_matrices_are_not_those_of_weights_that_are_gone(monkeypatch):
    monkeypatch.setattr(Distillation, "judge", lambda self: 1 / (1 + self.done))
    report = prune_model(replayable(tiny_model("llama")), windows(), method="wanda+distil")
    assert {site.output_error for site in report.sites} == {None}
    assert report.distilled


@pytest.mark.parametrize("values", ["as stored", "int4 of row"])
def test_what_memory_does_not_hold_lies_in_a_file(values, monkeypatch, tmp_path):
    """And comes to the same, to the bit."""
    asked = {"method": "wanda+distil", "values": values, "batch_size": 2}
    held, filed = replayable(tiny_model("llama")), replayable(tiny_model("llama"))
    assert prune_model(held, windows(), **asked).distilled
    files, real = list[Path](), mapped_tensors.TemporaryFile
    monkeypatch.setattr(mapped_tensors, "TemporaryFile", lambda dir: files.append(dir) or real(dir=dir))
    monkeypatch.setattr("secateur.pruning.in_memory.gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(tuning, "tuned_in_file", lambda *_: True)
    assert prune_model(filed, windows(), **asked).distilled
    assert files.count(tmp_path) >= 3  # what the dense model gives, to tune on and to judge by, and the blocks
    for one, other in zip(held.model.parameters(), filed.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_what_a_device_does_not_hold_is_refused(monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device, limit: 2**19)
    model = replayable(tiny_model("llama"))
    assert memory.tuned_in_file(model, torch.device("cpu"), None)
    with pytest.raises(UnsupportedModel, match=r"all blocks at once.* on cuda:0; found 0.50 MiB\. Use --device cpu"):
        memory.tuned_in_file(model, torch.device("cuda:0"), None)


def test_a_loss_that_is_no_number_ends_it_and_weights_stay(monkeypatch):
    monkeypatch.setattr(Distillation, "_end", lambda self, number, leaving: (torch.nan, leaving))
    tuned, plain = replayable(tiny_model("llama")), replayable(tiny_model("llama"))
    report = prune_model(tuned, windows(), method="wanda+distil")
    assert "The loss of +distil was no number after 0 of" in report.note
    prune_model(plain, windows(), method="wanda")
    for one, other in zip(tuned.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_model_that_cannot_be_judged_stays_as_it_is(monkeypatch, tmp_path, text_file, tiny_llama):
    monkeypatch.setattr(Distillation, "judge", lambda self: torch.inf)
    options = {"calibration": str(text_file), "samples": 6, "seq_len": 16}
    report = prune(tiny_llama, out=tmp_path / "out", method="wanda+distil", **options)
    assert "The loss of +distil was no number after 0 of" in report.note
    assert report.distilled is None
    assert not [file for file in (tmp_path / "out").iterdir() if file.name.startswith(".")]


@pytest.mark.parametrize("values", ["as stored", "int4 of row"])
@pytest.mark.filterwarnings("ignore")
def test_what_is_said_is_said_of_what_is_stored(values, monkeypatch):
    """KL before and after, judged once more on the weights that stay, those that became level 0 among them."""
    monkeypatch.setattr(distil, "RATE", 0.1)
    many = windows(torch.randint(3, 128, (40, 24), generator=torch.Generator().manual_seed(3)))
    dense, model = replayable(tiny_model("llama")), replayable(tiny_model("llama"))
    report = prune_model(model, many, method="alps-fast+distil", values=values, batch_size=3, dtype="float32")
    found = aims(BlockRun(dense, many.ids, [CPU], torch.float32, 3), 2**17)
    blocks = [working_copy(block, CPU, torch.float32) for block in model.blocks]
    assert report.distilled
    assert report.distilled[1] < report.distilled[0]
    judged = Distillation(found, blocks, [{} for _ in blocks]).judge()
    assert report.distilled[1] == pytest.approx(judged, rel=1e-6)
    zeros = {
        f"{model.block_name(index)}.{name}": int((matrix.weight == 0).sum())
        for index, block in enumerate(model.blocks)
        for name, matrix in weight_matrices(block).items()
    }
    assert {one.site: one.sparsity * one.shape[0] * one.shape[1] for one in report.sites} == pytest.approx(zeros)
    kept_but_zero = sum(one.rounded_away for one in report.sites)
    removed = sum(count // 2 for count in (a * b for a, b in (one.shape for one in report.sites)))
    assert kept_but_zero == sum(zeros.values()) - removed
    assert report.sparsity == pytest.approx(sum(zeros.values()) / (2 * removed))


@pytest.mark.parametrize(
    ("tokens", "count", "length", "steps"),
    [
        (2**15, 128, 2048, 64),  # of a quarter of a window each
        (2**15, 128, 700, 94),  # of half a window, 350 tokens
        (2**15, 128, 300, 110),  # of a window, though two would be nearer to 512 tokens
        (2**17, 128, 512, 256),  # 120 steps go through all of them
        (2**17, 32, 512, 240),  # 30 do, and eight times is enough
        (2**17, 2, 16, 8),
    ],
)
def test_steps_go_through_so_many_tokens(tokens, count, length, steps):
    sections = (count - stepping.held_back(count)) * (length // stepping.section_length(length))
    assert distil.steps_of(tokens, sections, length) == steps


def test_windows_without_a_step_are_not_run(monkeypatch):
    monkeypatch.setattr(stepping, "STEP_TOKENS", 32)
    run = BlockRun(replayable(tiny_model("llama")), TOKENS, [CPU], torch.float32, 2)
    found = aims(run, 48)
    assert found.steps == 2
    assert torch.equal(torch.cat(list(found.tuned.tokens)), TOKENS[: 2 * stepping.step_windows(TOKENS.shape[1])])
    assert torch.equal(torch.cat(list(found.judged.tokens)), TOKENS[-1:])


def test_long_windows_are_cut_into_sections_for_steps(monkeypatch):
    """First sections of all windows come first; those that judge stay whole; what a section foresees lies in it."""
    monkeypatch.setattr(stepping, "STEP_TOKENS", 10)
    tokens = torch.arange(4 * 23).view(4, 23) % 100
    counted = torch.ones_like(tokens, dtype=torch.bool)
    counted[0, 7:] = False  # nothing counts in the second and third section of the first window
    run = BlockRun(replayable(tiny_model("llama")), tokens, [CPU], torch.float32, 2, counted=counted)
    found = aims(run, 10**6)
    wanted = [tokens[window, 7 * part : 7 * part + 7] for part in range(3) for window in range(3) if window or not part]
    assert torch.equal(torch.cat(list(found.tuned.tokens)), torch.stack(wanted))
    assert torch.cat(list(found.tuned.next)).sum(1).tolist() == [6] * 7
    assert [one.shape for one in found.judged.tokens] == [(1, 23)]
    assert found.steps == distil.MOST_EPOCHS * 7
    with torch.no_grad():
        whole = run.language_model.model.model(wanted[4][None], use_cache=False).last_hidden_state
        shell = found.shell
        logits = shell.leave(wanted[4][None], found.tuned.dense[4])
        expected = run.language_model.model.lm_head(whole)
    assert torch.allclose(logits, expected, rtol=1e-4, atol=1e-5)


def test_sections_begin_with_bos_where_windows_do(monkeypatch):
    """Models that lean on it make nothing of a text without (data/bos.py)."""
    monkeypatch.setattr(stepping, "STEP_TOKENS", 10)
    tokens = torch.arange(4 * 23).view(4, 23) % 100
    tokens[:, 0] = 101
    run = BlockRun(replayable(tiny_model("llama")), tokens, [CPU], torch.float32, 2, bos=True)
    tuned, judged = text_of(run)
    assert torch.equal(tuned.tokens[:, 0], torch.full((9,), 101))
    assert torch.equal(tuned.tokens[4, 1:], tokens[1, 7:13])  # the second section of the second window
    assert tuned.next.tolist() == [[False, *[True] * 5, False]] * 9
    assert torch.equal(judged.tokens, tokens[-1:])


def test_windows_whose_sections_foresee_nothing_are_refused(monkeypatch):
    monkeypatch.setattr(stepping, "STEP_TOKENS", 10)
    tokens, counted = torch.arange(40).view(2, 20), torch.zeros(2, 20, dtype=torch.bool)
    counted[:, 10] = True  # foreseen by the last token of the section before
    run = BlockRun(replayable(tiny_model("llama")), tokens, [CPU], torch.float32, 2, counted=counted)
    with pytest.raises(NotEnoughText, match="found 2 with a token that counts"):
        aims(run, 100)


def test_best_does_without_where_it_does_not_fit(monkeypatch, tmp_path, text_file, tiny_llama):
    """On a device that is too small, on a disk, with one window; and says so. Whoever asks for it is refused."""
    options = {"calibration": str(text_file), "seq_len": 16}
    full = shutil._ntuple_diskusage(2**30, 2**30 - 2**20, 2**20)
    assert prune(tiny_llama, out=tmp_path / "whole", method="best", samples=6, **options).distilled

    def refuse(*_: object) -> bool:
        raise UnsupportedModel("+distil tunes all blocks at once, which is too much.")

    changes = {
        "which is too much": lambda patch: patch.setattr(tuning, "tuned_in_file", refuse),
        "the disk has 1.00 MiB free": lambda patch: patch.setattr(shutil, "disk_usage", lambda path: full),
        "found 1 with a token that counts": lambda patch: None,
    }
    for number, (words, change) in enumerate(changes.items()):
        with monkeypatch.context() as patch:
            change(patch)
            given = options | {"samples": 1 if number == 2 else 6, "out": tmp_path / str(number)}
            report = prune(tiny_llama, method="best", **given)
            assert "All blocks were not tuned together. " in report.note
            assert words in report.note
            assert report.distilled is None
            with pytest.raises(SecateurError, match=words):
                prune(tiny_llama, method="alps+distil", **given | {"out": tmp_path / "asked"})


def test_who_asks_for_it_by_name_gets_no_less():
    asked, best = find_method("best+distil"), find_method("best")
    assert asked.distil == best.distil > find_method("default+distil").distil
    assert not asked.distil_if_it_fits


def test_who_goes_on_does_as_the_run_began():
    best, refused = find_method("best"), UnsupportedModel("There is no room.")
    assert tuning.as_it_is_run(best, None, lambda what, decide: [None]) == (best, "")
    for now in (None, refused):  # without, although there is room by now
        method, said = tuning.as_it_is_run(best, now, lambda what, decide: ["There is no room."])
        assert (method.distil, method.refine) == (0, best.refine)
        assert said.endswith("There is no room.")
    with pytest.raises(UnsupportedModel, match=r"There is no room\."):
        tuning.as_it_is_run(best, refused, lambda what, decide: [None])
