"""Zeros that came in: counted, and kept where that is asked."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.every_method import layer, outputs

import secateur
from secateur.checkpoints.record import filled_in_words
from secateur.deployment.inspect import inspect
from secateur.errors import BadPattern
from secateur.methods import METHODS, find_method
from secateur.methods.keep_zeros import KeepZeros
from secateur.methods.pattern_text import parse_pattern
from secateur.methods.patterns import NM, Unstructured
from secateur.methods.statistics import Stats
from secateur.methods.together import prune_together


@pytest.mark.parametrize("pattern", ["20%", "80%", "30% of row", "2:4", "4:8"])
@pytest.mark.parametrize("name", [*METHODS, "wanda+swap", "sweep+refit"])
def test_zeros_stay_and_count(name, pattern):
    weight, x = layer()
    zeros = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.4
    weight[zeros] = 0
    method = find_method(name)
    resolved = parse_pattern(pattern).within(method.group)
    (pruned,) = prune_together(method, [weight], Stats.of(x, method.need), [KeepZeros(resolved, zeros)])
    assert (pruned.weight[zeros] == 0).all()
    gone = pruned.weight == 0
    # a sweep chooses some columns at a time, each of which may hold more zeros than its share; a swap may choose a zero
    more = name.startswith("s") or "swap" in name
    if isinstance(resolved, NM):
        groups = (1, (-1, resolved.m))
        found, least = (
            gone.unflatten(*groups).sum(-1),
            zeros.unflatten(*groups).sum(-1).clamp_min(resolved.m - resolved.n),
        )
    elif isinstance(resolved, Unstructured) and resolved.over == "row":
        found, least = gone.sum(1), zeros.sum(1).clamp_min(round(resolved.ratio * weight.shape[1]))
    else:
        assert isinstance(resolved, Unstructured)
        found, least = gone.sum(), zeros.sum().clamp_min(round(resolved.ratio * weight.numel()))
    assert (found >= least).all()
    assert more or torch.equal(found, least)


@pytest.mark.parametrize("name", ["sparsegpt", "default", "wanda+refit"])
def test_a_solver_that_knows_of_the_zeros_is_better_than_one_that_is_overruled(name):
    weight, x = layer()
    zeros = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.4
    weight[zeros] = 0
    method, pattern = find_method(name), parse_pattern("2:4")
    stats, goal = Stats.of(x, method.need), outputs(weight, x)

    def error(pattern) -> float:
        (pruned,) = prune_together(method, [weight], stats, [pattern])
        return float((outputs(pruned.weight.masked_fill(zeros, 0), x) - goal).square().sum())

    assert error(KeepZeros(pattern, zeros)) < error(pattern)


@pytest.fixture(scope="module")
def sparse(tiny_llama, text_file, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("sparse") / "seventy"
    secateur.prune(
        tiny_llama, out=out, method="sparsegpt", pattern="70%", calibration=str(text_file), samples=8, seq_len=32
    )
    return out


@pytest.fixture
def again(sparse, text_file, tmp_path):
    def run(method: str, **options):
        given = {"calibration": str(text_file), "samples": 8, "seq_len": 32, "pattern": "2:4", **options}
        return secateur.prune(sparse, out=tmp_path / "out", method=method, **given)

    return run


def filled(sparse: Path, out: Path) -> tuple[int, int]:
    """(zeros of the source in weight matrices, how many of them are none in the result), counted anew."""
    before, after = (load_file(folder / "model.safetensors") for folder in (sparse, out))
    names = [name for name in before if "proj" in name]
    zeros = sum(int((before[name] == 0).sum()) for name in names)
    return zeros, sum(int(((before[name] == 0) & (after[name] != 0)).sum()) for name in names)


def test_zeros_that_are_filled_are_counted_and_said(again, sparse):
    report = again("default")
    zeros, gone = filled(sparse, report.out)
    assert gone > 1000
    assert (
        report.note
        == f"{gone:,} of {zeros:,} zeros of the source ({gone / zeros:.1%}) were filled; --keep-zeros keeps them."
    )
    assert sum(matrix.zeros_filled for matrix in report.sites) == gone
    record = json.loads((report.out / "pruning.json").read_text())
    assert sum(matrix["zeros_before"] for matrix in record["sites"]) == zeros


def test_a_method_that_only_removes_says_nothing(again):
    report = again("wanda")
    assert report.note == ""
    assert {matrix.zeros_filled for matrix in report.sites} == {0}


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("default", {}), ("best", {}), ("sparsegpt", {"passes": "two"}), ("default", {"device": "cpu,cpu"}),
        ("wanda+swap", {}), ("wanda+refit", {"pattern": "50%"}), ("wanda+refit+permute", {}),
    ],
)  # fmt: skip
def test_zeros_are_kept_under_any_method(again, sparse, method, options):
    report = again(method, keep_zeros=True, **options)
    assert sum(matrix.zeros_filled for matrix in report.sites) == 0
    assert report.note == filled_in_words(report.sites) == ""
    if "permute" not in method:  # which moves them
        assert filled(sparse, report.out)[1] == 0
    if "pattern" not in options:
        assert all("2:4" in tensor.patterns for tensor in inspect(report.out).tensors)
    assert json.loads((report.out / "pruning.json").read_text())["options"]["keep_zeros"]


def test_a_structure_cannot_keep_them(again):
    with pytest.raises(BadPattern, match="--keep-zeros is for patterns of zeros"):
        again("energy", pattern="25% of channels", keep_zeros=True)
