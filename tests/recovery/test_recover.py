"""Recovery: what was zero stays zero, what is trained is what is merged, and a run that dies costs nothing."""

from __future__ import annotations

import json
import os
import platform
import random
import resource
import shutil
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig
from support import forks
from support.families import tiny_model
from support.forks import in_ranks
from support.paths import SUPPORT
from support.texts import byte_tokenizer
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import secateur
from secateur.checkpoints.folder import open_checkpoint
from secateur.checkpoints.journal import Journal
from secateur.errors import (
    BadCheckpoint,
    ConditionsDiffer,
    Interrupted,
    NonFinite,
    NotEnoughText,
    OutputRefused,
    SecateurError,
    UnknownName,
    UnsupportedModel,
)
from secateur.models import divergence
from secateur.models.divergence import Divergence
from secateur.models.load import load
from secateur.models.stream import block_writer
from secateur.recovery import finetune as all_at_once
from secateur.recovery import training
from secateur.recovery import training_state as halfway
from secateur.recovery.checks import WAYS
from secateur.recovery.lora import MaskedLora
from secateur.recovery.masks import masks
from secateur.recovery.recover import recover
from secateur.recovery.text import recovery_windows
from secateur.system.devices import training_dtype
from secateur.system.memory import freed_memory_kept

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers and peft warn of their own

FAMILIES = {"llama": "2:4", "gpt2": "50%", "mixtral": "2:4", "gemma2": "70%"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Path:
    """For each family its dense model in NAME and a pruned one in NAME-pruned, and a structured one of the first."""
    place = tmp_path_factory.mktemp("recover")
    for family, pattern in FAMILIES.items():
        tiny_model(family).save_pretrained(place / family)
        byte_tokenizer().save_pretrained(place / family)
        for name, wanted in ((f"{family}-pruned", pattern), (f"{family}-smaller", "25% of channels")):
            if family == "llama" or name.endswith("pruned"):
                method = "wanda" if name.endswith("pruned") else "energy"
                secateur.prune(
                    place / family, out=place / name, method=method, pattern=wanted,
                    calibration=str(text_file), samples=8, seq_len=32,
                )  # fmt: skip
    return place


@pytest.fixture
def options(models: Path, text_file: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "out": tmp_path / "out", "dense": models / "llama", "text": str(text_file), "steps": 6, "seq_len": 32,
        "batch_size": 2, "save_every": 2, "rate": 5e-3, "command": ["secateur", "recover"],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("family", "way"),
    [(family, way) for family in FAMILIES for way in WAYS if family in ("llama", "mixtral") or "distill" not in way],
)
def test_the_mask_at_the_end_is_the_mask_at_the_beginning(models, options, family, way):
    source = models / f"{family}-pruned"
    done = recover(source, **options | {"way": way, "dense": models / family})
    before, after = masks(load(source)), masks(load(options["out"]))
    assert before.keys() == after.keys()
    assert before
    assert all(torch.equal(before[name], after[name]) for name in before)
    one, two = open_checkpoint(source), open_checkpoint(options["out"])
    changed = {name for name in one.places if not torch.equal(one.tensor(name), two.tensor(name))}
    assert changed
    if way.startswith("lora") or way == "blocks":
        assert not any("embed" in name or "norm" in name or "wte" in name or "ln_" in name for name in changed)
    if way == "blocks":
        assert not done.loss
        language_model = load(source)
        assert [name for name, _, _ in done.blocks] == list(map(language_model.block_name, range(len(done.blocks))))
        assert len(done.blocks) == len(language_model.blocks)
    else:
        assert len(done.loss) == 6
    assert done.tokens == 6 * 2 * 32
    record = json.loads((options["out"] / "pruning.json").read_text())
    (told,) = record["recovery"]
    assert (told["way"], told["steps"], told["tokens"], told["seed"]) == (way, 6, 384, 0)
    assert [tuple(step) for step in told["loss"]] == done.loss
    assert told["text"]["sha256"]
    assert record["sites"] == json.loads((source / "pruning.json").read_text())["sites"]
    found = secateur.inspect(options["out"])
    assert abs(found.sparsity - record["sparsity"]) < 1e-9
    AutoModelForCausalLM.from_pretrained(options["out"])


def test_a_smaller_model_recovers_as_the_dense_model_that_it_is(models, options):
    done = recover(models / "llama-smaller", **options | {"way": "distill", "steps": 20, "rate": 5e-4})
    assert done.loss[-1][1] < done.loss[0][1]
    before, after = (open_checkpoint(place) for place in (models / "llama-smaller", options["out"]))
    assert {name: place.shape for name, place in before.places.items()} == {
        name: place.shape for name, place in after.places.items()
    }


@pytest.mark.parametrize("source", ["llama-pruned", "llama-smaller", "mixtral-pruned"])
def test_block_by_block_every_block_comes_nearer_to_the_dense_one(models, options, source):
    dense = models / source.partition("-")[0]
    options = options | {"way": "blocks", "rate": None, "steps": 20, "batch_size": 4, "dense": dense}
    done = recover(models / source, **options)
    assert all(after <= before for _, before, after in done.blocks)
    assert any(after < before for _, before, after in done.blocks)
    ids = recovery_windows(byte_tokenizer(), options["text"], count=40, length=32, seed=5).ids
    wanted = load(dense).model.float()(ids).logits
    before, after = (
        (load(place).model.float()(ids).logits - wanted).square().mean() for place in (models / source, options["out"])
    )
    assert after < before


def test_training_brings_the_loss_down_and_a_recovery_can_be_recovered(models, options, tmp_path):
    first = recover(models / "llama-pruned", **options | {"way": "masked", "steps": 30, "batch_size": 4})
    assert sum(loss for _, loss in first.loss[-5:]) < sum(loss for _, loss in first.loss[:5])
    again = options | {"out": tmp_path / "again", "way": "lora", "seed": 1}
    recover(options["out"], **again)
    record = json.loads((tmp_path / "again" / "pruning.json").read_text())
    assert [told["way"] for told in record["recovery"]] == ["masked", "lora"]


@pytest.mark.parametrize("way", ["lora", "distill"])
def test_products_in_bfloat16_train_what_those_in_float32_do(models, options, tmp_path, way):
    source, found = models / "llama-pruned", {}
    for dtype in ("float32", "bfloat16"):
        found[dtype] = recover(source, **options | {"out": tmp_path / dtype, "way": way, "dtype": dtype, "steps": 20})
        (told,) = json.loads((tmp_path / dtype / "pruning.json").read_text())["recovery"]
        assert told["dtype"] == found[dtype].dtype == dtype
    one, two = (torch.tensor([loss for _, loss in done.loss]) for done in found.values())
    assert not torch.equal(one, two)
    assert torch.allclose(one, two, rtol=0.02)
    before, after = masks(load(source)), masks(load(tmp_path / "bfloat16"))
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("multiplies", [True, False])
def test_what_is_stored_in_sixteen_bits_is_trained_in_bfloat16_where_that_is_multiplied(monkeypatch, multiplies):
    monkeypatch.setattr("secateur.system.devices.multiplies_bfloat16", lambda: multiplies)
    short = "bfloat16" if multiplies else "float32"
    for stored, wanted in ((torch.bfloat16, short), (torch.float16, short), (torch.float32, "float32")):
        assert training_dtype("auto", torch.device("cpu"), stored) == wanted
    assert training_dtype("bf16", torch.device("cpu"), torch.float32) == "bfloat16"
    assert training_dtype("fp32", torch.device("cpu"), torch.bfloat16) == "float32"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library keeps memory in its own way")
def test_a_step_is_not_given_its_memory_page_by_page_again():
    def faults(tensors: int) -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(tensors):
            torch.ones(2**24)  # 64 MiB, or 16,384 pages
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    with freed_memory_kept():
        faults(3)
        assert faults(10) < 1000


# One layer against a slow reference.


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_the_masked_product_its_gradient_and_its_merge(kind):
    torch.manual_seed(0)
    base: Any = nn.Linear(8, 6) if kind is nn.Linear else Conv1D(6, 8)
    with torch.no_grad():
        base.weight[torch.rand_like(base.weight) < 0.5] = 0
    config = LoraConfig(r=3, lora_alpha=6, lora_dropout=0.0)
    layer: Any = MaskedLora(deepcopy(base), "default", config, r=3, lora_alpha=6)
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with torch.no_grad():
        up.normal_()
    a, b = (part.detach().clone().requires_grad_() for part in (down, up))
    x, target = torch.randn(5, 8), torch.randn(5, 6)
    matrix = base.weight.detach() if kind is nn.Linear else base.weight.detach().T
    nothing = torch.zeros(())
    rows = [  # weight by weight: what is zero gets nothing
        torch.stack([w + (2.0 * (b[i] * a[:, j]).sum() if w != 0 else nothing) for j, w in enumerate(row)])
        for i, row in enumerate(matrix)
    ]
    merged = torch.stack(rows)
    wanted = x @ merged.T + base.bias.detach()
    (wanted - target).square().sum().backward()
    got = layer(x)
    (got - target).square().sum().backward()
    assert torch.allclose(got, wanted, atol=1e-5)
    assert a.grad is not None
    assert b.grad is not None
    assert torch.allclose(down.grad, a.grad, atol=1e-4)
    assert torch.allclose(up.grad, b.grad, atol=1e-4)
    layer.merge()
    weight = layer.get_base_layer().weight
    assert torch.allclose(weight if kind is nn.Linear else weight.T, merged, atol=1e-6)
    assert torch.equal(weight == 0, base.weight == 0)
    assert torch.allclose(layer(x), wanted, atol=1e-5)


def test_the_target_is_what_the_dense_model_says_next(models):
    pruned, dense = (load(models / name).model.float() for name in ("llama-pruned", "llama"))
    trainer: Any = training._Distilling.__new__(training._Distilling)
    trainer.dense, trainer.args = dense, SimpleNamespace(device=torch.device("cpu"), bf16=False)
    ids = torch.randint(3, 100, (2, 16), generator=torch.Generator().manual_seed(0))
    found = trainer.compute_loss(pruned, {"input_ids": ids, "labels": ids})
    divergences, errors = [], []
    for window in ids:
        said, given = (model(window[None], output_hidden_states=True) for model in (dense, pruned))
        p, q = (one.logits[0].double().softmax(-1) for one in (said, given))
        divergences += [(p[t] * (p[t] / q[t]).log()).sum() for t in range(len(window) - 1)]
        for one, two in zip(given.hidden_states[1:], said.hidden_states[1:], strict=True):
            errors += [(one[0, t] - two[0, t]).norm() ** 2 / two[0, t].norm() ** 2 for t in range(len(window))]
    slow = torch.stack(divergences).mean() + torch.stack(errors).mean()
    assert found.item() == pytest.approx(slow.item(), rel=1e-4)
    fewer = load(models / "llama").model.float()
    fewer.model.layers = fewer.model.layers[:-1]
    trainer.dense = fewer
    found = trainer.compute_loss(pruned, {"input_ids": ids, "labels": ids})
    p, q = (model(ids).logits[:, :-1].double().softmax(-1) for model in (fewer, pruned))
    assert found.item() == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), rel=1e-4)


def test_the_gradient_of_the_divergence(monkeypatch):
    draw = torch.Generator().manual_seed(0)
    given, wanted = (torch.randn(2, 3, 11, generator=draw) for _ in range(2))
    one, two = (given.clone().requires_grad_() for _ in range(2))
    found = Divergence.apply(one, wanted)
    slow = nn.functional.kl_div(two.double().log_softmax(-1), wanted.double().log_softmax(-1), log_target=True,
                                reduction="none").sum(-1).mean()  # fmt: skip
    (3 * found).backward()
    (3 * slow).backward()
    assert found.item() == pytest.approx(slow.item(), rel=1e-6)
    assert one.grad is not None
    assert two.grad is not None
    assert torch.allclose(one.grad, two.grad, atol=1e-7)
    monkeypatch.setattr(divergence, "LOGITS_AT_ONCE", 2 * 11)  # a row of each window at once
    three = given.clone().requires_grad_()
    parts = Divergence.apply(three, wanted)
    (3 * parts).backward()
    assert parts.item() == pytest.approx(found.item(), rel=1e-6)
    assert three.grad is not None
    assert torch.allclose(three.grad, one.grad, atol=1e-8)
    half = given.bfloat16().requires_grad_()
    Divergence.apply(half, wanted).backward()
    assert half.grad is not None
    assert half.grad.dtype == torch.bfloat16
    masked = wanted.index_fill(-1, torch.tensor([3]), -torch.inf)  # a token that neither model ever says
    one = given.index_fill(-1, torch.tensor([3]), -torch.inf).requires_grad_()
    rest = torch.arange(11) != 3
    found = Divergence.apply(one, masked)
    found.backward()
    assert found.item() == pytest.approx(Divergence.apply(given[..., rest], wanted[..., rest]).item(), rel=1e-6)
    assert one.grad is not None
    assert one.grad.isfinite().all()


@pytest.mark.parametrize("way", ["lora", "masked", "distill"])
def test_a_step_is_the_same_in_parts_and_with_less_memory(models, options, tmp_path, monkeypatch, way):
    """Accumulated batches are one batch, as are those of which a processor takes a part at once, and gradients with
    activations computed again are the same.
    """
    curves = []
    ways: dict[str, dict[str, Any]] = {
        "whole": {"batch_size": 4}, "parts": {"accumulate": 2},
        "again": {"batch_size": 4, "gradient_checkpointing": True}, "at once": {"batch_size": 4},
    }  # fmt: skip
    for name, changed in ways.items():
        if name == "at once":
            monkeypatch.setattr(training, "TOKENS_AT_ONCE", 2 * options["seq_len"])
        done = recover(models / "llama-pruned", **options | changed | {"way": way, "out": tmp_path / name})
        curves.append([loss for _, loss in done.loss])
    assert curves[1] == pytest.approx(curves[0], rel=1e-3)
    assert curves[2] == pytest.approx(curves[0], rel=1e-4)
    assert curves[3] == pytest.approx(curves[0], rel=1e-3)


@pytest.mark.parametrize(
    ("batch_size", "length", "at_once"),
    [(8, 512, 2), (8, 2048, 1), (6, 256, 3), (7, 256, 1), (1, 4, 1), (8, 64, 8)],
)
def test_a_processor_takes_a_thousand_tokens_at_once(batch_size, length, at_once):
    assert training.windows_at_once(batch_size, length) == at_once


# Runs that die.


@pytest.mark.parametrize("way", ["lora", "masked"])
def test_a_run_that_dies_goes_on_to_the_same_loss_curve_and_bytes(models, options, tmp_path, monkeypatch, way):
    whole = recover(models / "llama-pruned", **options | {"way": way, "out": tmp_path / "whole", "steps": 12})
    real, count = training._Distilling.training_step, 0

    def dies(self, *args, **more):
        nonlocal count
        count += 1
        if count % 4 == 0:
            raise KeyboardInterrupt
        return real(self, *args, **more)

    monkeypatch.setattr(training._Distilling, "training_step", dies)
    deaths = 0
    while True:
        try:
            done = recover(models / "llama-pruned", **options | {"way": way, "steps": 12})
            break
        except KeyboardInterrupt:
            deaths += 1
            place = tmp_path / ".out.recovery"
            half = place / "checkpoint-999"  # as if it had died while it wrote
            half.mkdir()
            (half / "model.safetensors").write_bytes(b"half")
        assert deaths < 20
    assert deaths >= 3
    assert done.loss == whole.loss
    assert (tmp_path / "whole" / "model.safetensors").read_bytes() == (
        options["out"] / "model.safetensors"
    ).read_bytes()
    assert not (tmp_path / ".out.recovery").exists()


def asked(words):
    class Asked:
        def __enter__(self):
            return lambda: True

        def __exit__(self, *error):
            return None

    return Asked()


def test_an_end_that_is_asked_for(models, options, monkeypatch):
    monkeypatch.setattr(all_at_once, "asked_to_stop", asked)
    with pytest.raises(Interrupted, match=r"Stopped after step 1\. The same command goes on from there\."):
        recover(models / "llama-pruned", **options)
    monkeypatch.undo()
    assert len(recover(models / "llama-pruned", **options).loss) == 6


def test_blocks_that_are_finished_are_kept(models, options, tmp_path, monkeypatch):
    options = options | {"way": "blocks", "rate": None}
    whole = recover(models / "llama-pruned", **options | {"out": tmp_path / "whole"})
    monkeypatch.setattr(block_writer, "asked_to_stop", asked)
    for count in (1, 2):
        with pytest.raises(Interrupted, match=f"The same command goes on after the {count} blocks that are finished"):
            recover(models / "llama-pruned", **options)
    with pytest.raises(ConditionsDiffer, match="has other conditions: seed"):
        recover(models / "llama-pruned", **options | {"seed": 1})
    monkeypatch.undo()
    done = recover(models / "llama-pruned", **options)
    assert done.blocks == whole.blocks
    assert (tmp_path / "whole" / "model.safetensors").read_bytes() == (
        options["out"] / "model.safetensors"
    ).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


DIES = """
import os, sys
from secateur.cli import app
from secateur.recovery import training_state
real, count = training_state.TrainingState.mark, 0
def mark(self, step):
    global count
    real(self, step)
    count += 1
    if count == 2:
        os._exit(9)
training_state.TrainingState.mark = mark
app.main()
"""


def test_the_seconds_of_a_run_that_was_killed_are_counted(models, options, tmp_path):
    words = [
        "recover", str(models / "llama-pruned"), "--with", "masked", "--text", options["text"], "--seq-len", "32",
        "--batch-size", "2", "--steps", "6", "--save-every", "2", "--out", str(tmp_path / "out"), "--quiet", "--json",
    ]  # fmt: skip
    assert forks.run([sys.executable, "-c", DIES, *words]).returncode == 9
    before = Journal(tmp_path / ".out.recovery" / "journal")
    spent = before.of("seconds")
    before.close()
    assert len(spent) == 2
    done = forks.run([sys.executable, "-m", "secateur", *words])
    assert json.loads(done.stdout)["seconds"] > spent[-1] > 0
    assert not (tmp_path / ".out.recovery").exists()


def test_a_run_that_died_behind_its_end_has_ended(models, options, tmp_path, monkeypatch):
    for way in ("masked", "blocks"):
        chosen = options | {"way": way, "rate": None, "out": tmp_path / way}
        monkeypatch.setattr(Journal, "remove", lambda self: 1 // 0)  # the result has its name by then
        with pytest.raises(ZeroDivisionError):
            recover(models / "llama-pruned", **chosen)
        monkeypatch.undo()
        written = (tmp_path / way / "model.safetensors").read_bytes()
        recover(models / "llama-pruned", **chosen)
        assert (tmp_path / way / "model.safetensors").read_bytes() == written
    assert sorted(path.name for path in tmp_path.iterdir()) == ["blocks", "masked"]


def test_two_runs_in_one_place(models, options, tmp_path):
    (tmp_path / ".out.recovery").mkdir()
    other = Journal(tmp_path / ".out.recovery" / "journal")
    with pytest.raises(OutputRefused, match="Another run is writing there"):
        recover(models / "llama-pruned", **options)
    other.close()


def test_another_dense_model_does_not_go_on(models, options, tmp_path, monkeypatch):
    monkeypatch.setattr(all_at_once, "asked_to_stop", asked)
    options = options | {"way": "distill"}
    with pytest.raises(Interrupted):
        recover(models / "llama-pruned", **options | {"save_every": 1})
    monkeypatch.undo()
    shutil.copytree(models / "llama", tmp_path / "other")
    os.utime(tmp_path / "other" / "model.safetensors")
    with pytest.raises(ConditionsDiffer, match=r"has other conditions: dense\.model\.safetensors was"):
        recover(models / "llama-pruned", **options | {"save_every": 1, "dense": tmp_path / "other"})


def test_another_recovery_in_its_place_is_refused(models, options, monkeypatch):
    real = training._Distilling.training_step
    monkeypatch.setattr(
        training._Distilling, "training_step",
        lambda self, *args, **more: real(self, *args, **more) / (self.state.global_step < 3 or 1 // 0),
    )  # fmt: skip
    with pytest.raises(ZeroDivisionError):
        recover(models / "llama-pruned", **options)
    monkeypatch.undo()
    with pytest.raises(ConditionsDiffer, match="has other conditions: rate"):
        recover(models / "llama-pruned", **options | {"rate": 1e-4})
    recover(models / "llama-pruned", **options | {"rate": 1e-4, "restart": True})


def test_a_loss_that_is_none_keeps_the_last_checkpoint(models, options, tmp_path, monkeypatch):
    real, count = training._Distilling.compute_loss, 0

    def spoilt(self, *args, **more):
        nonlocal count
        count += 1
        loss = real(self, *args, **more)
        return loss * float("nan") if count > 4 else loss

    monkeypatch.setattr(training._Distilling, "compute_loss", spoilt)
    with pytest.raises(NonFinite, match=r"The loss became nan at step 5\. The last checkpoint is kept in"):
        recover(models / "llama-pruned", **options)
    assert (tmp_path / ".out.recovery" / "checkpoint-4" / halfway.WHOLE).is_file()
    assert not options["out"].exists()


def test_a_run_that_never_came_to_a_checkpoint_leaves_nothing(models, options, tmp_path, monkeypatch):
    real = training._Distilling.compute_loss
    monkeypatch.setattr(training._Distilling, "compute_loss", lambda *args, **more: real(*args, **more) + torch.inf)
    with pytest.raises(NonFinite, match=r"The loss became inf at step 1\. Try a lower --rate"):
        recover(models / "llama-pruned", **options)
    assert not list(tmp_path.iterdir())


# What is refused.


@pytest.mark.parametrize(
    ("changed", "kind", "words"),
    [
        ({"way": "lroa"}, UnknownName, "There is no way to recover 'lroa'. Did you mean 'lora'?"),
        ({"way": "distill", "dense": None}, UnsupportedModel, "name it with --dense"),
        ({"steps": 10**5}, NotEnoughText, "Recovery was asked to see 6,400,000 tokens"),
        ({"seq_len": 4096, "steps": 1}, SecateurError, "has a context of"),
        ({"rate": 0.0}, UnsupportedModel, r"A rate is above 0; found 0\.0"),
        ({"rate": float("inf"), "way": "blocks"}, UnsupportedModel, "A rate is above 0; found inf"),
        ({"dtype": "float16"}, UnknownName, "There is no dtype to train in 'float16'"),
        ({"dtype": "int8"}, UnknownName, "There is no dtype 'int8'"),
        ({"dtype": "bf16", "way": "blocks"}, UnsupportedModel, "blocks trains in float32; found --dtype bf16"),
        ({"seed": -1}, UnsupportedModel, r"A seed is at least 0 and below 2\^32; found -1"),
    ],
)
def test_bad_options(models, options, changed, kind, words):
    with pytest.raises(kind, match=words):
        recover(models / "llama-pruned", **options | changed)
    assert not options["out"].exists()


def test_what_blocks_cannot_do(models, options, tmp_path, monkeypatch):
    options = options | {"way": "blocks"}
    with pytest.raises(UnsupportedModel, match="name it with --dense"):
        recover(models / "llama-pruned", **options | {"dense": None})
    with pytest.raises(UnsupportedModel, match="neither accumulates nor checkpoints gradients"):
        recover(models / "llama-pruned", **options | {"accumulate": 2})
    recover(models / "llama-pruned", **options | {"way": "masked", "out": tmp_path / "once"})
    with pytest.raises(UnsupportedModel, match=r"model\.embed_tokens\.weight is not that of the dense model"):
        recover(tmp_path / "once", **options)
    secateur.prune(
        models / "llama", out=tmp_path / "fewer", method="fast", pattern="1 blocks", calibration=options["text"],
        samples=8, seq_len=32,
    )  # fmt: skip
    with pytest.raises(UnsupportedModel, match="block by block they cannot be matched"):
        recover(tmp_path / "fewer", **options)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UnsupportedModel, match="blocks recovers in one process"):
        recover(models / "llama-pruned", **options)


def test_a_folder_that_is_not_as_it_was_pruned(models, options, tmp_path):
    from safetensors.torch import load_file, save_file

    source = tmp_path / "changed"
    shutil.copytree(models / "llama-pruned", source)
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0:4] = 1.0
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(BadCheckpoint, match=r"model\.layers\.1\.mlp\.up_proj has 49\.\d+% zeros, and .* says 0\.5"):
        recover(source, **options)
    record = json.loads((models / "llama-pruned" / "pruning.json").read_text())
    other = tmp_path / "other"
    shutil.copytree(models / "llama-pruned", other)
    (other / "pruning.json").write_text(json.dumps(record | {"sparsity": 1e308}))
    with pytest.raises(
        BadCheckpoint, match=r"The weight matrices of .* have 50\.00% zeros, and its pruning\.json says 1e\+308"
    ):
        recover(other, **options)
    (source / "pruning.json").unlink()
    with pytest.raises(BadCheckpoint, match=r"has no pruning\.json; a folder that 'secateur prune' wrote is wanted"):
        recover(source, **options)
    (source / "pruning.json").write_text("[1]")
    with pytest.raises(BadCheckpoint, match="holds a list; an object was wanted"):
        recover(source, **options)


def test_a_dropout_that_is_no_share(models, options, tmp_path):
    shutil.copytree(models / "llama-pruned", tmp_path / "odd")
    config = json.loads((tmp_path / "odd" / "config.json").read_text())
    (tmp_path / "odd" / "config.json").write_text(json.dumps(config | {"attention_dropout": 1e308}))
    with pytest.raises(BadCheckpoint, match=r"has attention_dropout 1e\+308; a share below 1 was wanted"):
        recover(tmp_path / "odd", **options)


def test_a_stranger_is_no_target(models, options, tmp_path):
    with pytest.raises(UnsupportedModel, match="Name the dense model that was pruned"):
        recover(models / "llama-pruned", **options | {"dense": models / "gpt2", "way": "distill"})
    other = tmp_path / "other"
    shutil.copytree(models / "llama", other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    one, two = [word for word in vocabulary if word.isalpha()][:2]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UnsupportedModel, match="have different tokenizers"):
        recover(models / "llama-pruned", **options | {"dense": other, "way": "distill"})


# Several processes.


def in_two_processes(
    program: str | Path, model: Path, options: dict[str, Any], *, fresh: bool = False, **environment: str
) -> subprocess.CompletedProcess:
    """`recover` with `program`, secateur or a file that calls it, as torchrun starts it."""
    words = [str(part) for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value)]
    words = ["recover", str(model), *words, "--quiet"]
    return in_ranks(2, program, *words, fresh=fresh, environment={"OMP_NUM_THREADS": "1", **environment})


@pytest.mark.parametrize("way", ["lora", "masked", "distill"])
def test_two_processes_train_as_one_with_twice_the_batch(models, options, tmp_path, way):
    alone = recover(models / "llama-pruned", **options | {"way": way, "out": tmp_path / "one", "batch_size": 4})
    given = {name: value for name, value in options.items() if name != "command"} | {"with": way}
    done = in_two_processes("secateur", models / "llama-pruned", given, fresh=way == "distill")
    assert done.returncode == 0, done.stderr[-2000:]
    (told,) = json.loads((options["out"] / "pruning.json").read_text())["recovery"]
    assert told["tokens"] == alone.tokens == 6 * 4 * 32
    assert [loss for _, loss in alone.loss] == pytest.approx([loss for _, loss in told["loss"]], rel=1e-3)
    before, after = masks(load(models / "llama-pruned")), masks(load(options["out"]))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "out"]


def test_what_is_wrong_in_two_processes_is_said_once(models, options, tmp_path):
    given = {name: value for name, value in options.items() if name != "command"} | {"with": "masked"}
    refused = in_two_processes("secateur", models / "llama-pruned", given | {"steps": 10**5})
    assert refused.returncode != 0
    assert refused.stderr.count("secateur: Recovery was asked to see") == 1
    refused = in_two_processes(SUPPORT / "nan_rank.py", models / "llama-pruned", given, NAN_AT="1 4")
    assert refused.returncode != 0
    assert refused.stderr.count("secateur: The loss became nan at step 4. The last checkpoint is kept in ") == 1
    assert [path.name for path in tmp_path.iterdir()] == [".out.recovery"]
    assert (tmp_path / ".out.recovery" / "checkpoint-2" / halfway.WHOLE).exists()


# Text.


def test_no_window_is_seen_twice_and_none_that_is_to_be_avoided(text_file):
    tokenizer = byte_tokenizer()
    every = recovery_windows(tokenizer, str(text_file), count=200, length=128, seed=0).ids
    assert len(every.unique(dim=0)) == 200
    assert not torch.equal(every, recovery_windows(tokenizer, str(text_file), count=200, length=128, seed=1).ids)
    shifted = torch.cat([every[3, 20:], every[4, :20]])[None]  # the same text, cut elsewhere
    rest = recovery_windows(tokenizer, str(text_file), count=190, length=128, seed=0, avoid=[shifted]).ids
    seen = {tuple(window.tolist()) for window in rest}
    assert tuple(every[3].tolist()) not in seen  # 108 consecutive tokens of it
    assert tuple(every[4].tolist()) in seen  # 20 of it
    rows = every[7:8].reshape(8, 16)  # the same in rows that are shorter, or across their borders
    for avoid in (rows, torch.cat([torch.zeros(1, 8, dtype=torch.int64), every[7:8, :120]], 1).reshape(2, 64)):
        rest = recovery_windows(tokenizer, str(text_file), count=100, length=128, seed=0, avoid=[avoid]).ids
        assert tuple(every[7].tolist()) not in {tuple(window.tolist()) for window in rest}
    with pytest.raises(NotEnoughText, match="that overlap other text"):
        recovery_windows(tokenizer, str(text_file), count=10**4, length=128, seed=0, avoid=[shifted])


def test_short_documents_are_left_out_one_by_one(tmp_path):
    """Sentences in another order share no long run; each is looked up as a whole."""
    draw = random.Random(0)
    texts = ["".join(draw.choices("abcdefghij ", k=20)) for _ in range(400)]
    file = tmp_path / "short.jsonl"
    file.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    tokenizer = byte_tokenizer()
    known = torch.tensor([token for text in texts[:200] for token in tokenizer(text)["input_ids"]])[None]
    rest = recovery_windows(tokenizer, str(file), count=60, length=64, seed=0, avoid=[known]).ids
    told = tokenizer.decode(rest.reshape(-1), skip_special_tokens=True)
    assert not any(text in told for text in texts[:200])
    assert sum(text in told for text in texts[200:]) > 150
