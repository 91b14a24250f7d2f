"""Pruned and quantised in one run: what is written, in every family, and what is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file
from support.families import FAMILIES, UNCOVERED, tiny_model

import secateur
from secateur.data.windows import Windows
from secateur.errors import BadPattern, UnsupportedModel
from secateur.methods.values import Values, find_codes, parse_values
from secateur.models.load import locate, replayable
from secateur.models.matrices import weight_matrices
from secateur.pruning.in_memory import prune_model
from secateur.pruning.prune import prune
from secateur.system.settings import Trust

pytestmark = pytest.mark.filterwarnings("ignore")  # each family warns about itself in its own way
SMALL = {"calibration": "demo", "samples": 4, "seq_len": 64}


def grid_of(text: str) -> Values:
    values = parse_values(text)
    assert values is not None
    return values


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - UNCOVERED - {"zamba2"}))
def test_zeros_are_exact_and_weights_on_the_grid_in_every_family(family):
    model = replayable(tiny_model(family).bfloat16())
    ids = torch.randint(3, 100, (4, 32), generator=torch.Generator().manual_seed(0))
    windows = Windows(ids, "random", "none", 1, None)
    report = prune_model(model, windows, method="wanda", pattern="2:4", values="int4 of row", dtype="float32")
    reports = {one.site: one for one in report.sites}
    for index, block in enumerate(model.blocks):
        for name, matrix in weight_matrices(block).items():
            one = reports[f"{model.block_name(index)}.{name}"]
            if one.pattern is None:
                continue
            kept = matrix.weight.unflatten(1, (-1, 4)).ne(0).sum(-1)
            assert (kept <= 2).all()
            assert find_codes(matrix.weight, grid_of("int4 of row")) is not None
            assert one.rounded_away == matrix.weight.numel() // 2 - int(kept.sum())


@pytest.mark.parametrize(
    ("method", "pattern", "values"),
    [
        ("default", "50%", "int4 of group 64"), ("wanda", "2:4", "nvfp4"),
        ("default", "0%", "int3 of group 32 by sweep"),
        ("sparsegpt+refine", "50%", "int4 asymmetric of group 64"), ("alps", "2:4", "int3 of group 64 by joint"),
    ],
)  # fmt: skip
def test_a_run_writes_weights_on_the_grid_and_says_so(method, pattern, values, tmp_path):
    report = prune(out=tmp_path / "out", method=method, pattern=pattern, values=values, **SMALL)
    record = json.loads((tmp_path / "out" / "pruning.json").read_text())
    assert record["values"] == values
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    away = 0
    for one, kept in zip(report.sites, record["sites"], strict=True):
        weight = tensors[f"{one.site}.weight"]
        assert find_codes(weight, grid_of(values)) is not None
        zeros = int((weight == 0).sum())
        assert zeros == round(one.sparsity * weight.numel())
        assert zeros - one.rounded_away == (0 if pattern == "0%" else weight.numel() // 2)
        assert kept["rounded_away"] == one.rounded_away
        away += one.rounded_away
    assert f"{away:,} weights that the mask keeps" in report.note


def test_as_stored_is_not_in_the_record(tmp_path):
    prune(out=tmp_path / "out", method="magnitude", pattern="50%", **SMALL)
    record = json.loads((tmp_path / "out" / "pruning.json").read_text())
    assert "values" not in record
    assert all("rounded_away" not in site for site in record["sites"])


def test_what_is_left_out_stays_as_it_is_stored(tmp_path):
    report = prune(out=tmp_path / "out", pattern="0%", values="int2 of group 64", skip=["*v_proj"], **SMALL)
    ours = load_file(tmp_path / "out" / "model.safetensors")
    left = [one.site for one in report.sites if one.pattern is None]
    assert len(left) == 6
    for site in left:
        assert find_codes(ours[f"{site}.weight"], grid_of("int2 of group 64")) is None


def test_groups_that_do_not_divide_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(BadPattern) as raised:
        prune(out=tmp_path / "out", values="int4", **SMALL)
    assert str(raised.value) == (
        "int4 of group 128 needs inputs in groups of 128; model.layers.0.self_attn.q_proj has 192. Leave it out with "
        "--skip '*q_proj' or say 'int4 of group 64'."
    )
    assert not (tmp_path / "out").exists()


def test_structures_have_no_values(tmp_path):
    with pytest.raises(BadPattern) as raised:
        prune(out=tmp_path / "out", pattern="25% of channels", values="int4 of group 64", **SMALL)
    assert str(raised.value) == (
        "--values is for patterns of zeros, 0% among them; 25% of channels takes out whole structures. Take them out "
        "first, then prune the result to 0% with int4 of group 64."
    )


def test_recovery_by_blocks_keeps_the_grid_and_other_ways_refuse_it(tmp_path):
    values = "int4 of group 64"
    prune(out=tmp_path / "pruned", method="magnitude", pattern="50%", values=f"{values} by nearest", **SMALL)
    dense = locate(None, Trust())
    training = {"steps": 8, "text": "demo", "seq_len": 64, "batch_size": 2}
    with pytest.raises(
        UnsupportedModel, match="was written with --values 'int4 of group 64 by nearest', and masked trains"
    ):
        secateur.recover(tmp_path / "pruned", out=tmp_path / "masked", way="masked", **training)
    secateur.recover(tmp_path / "pruned", out=tmp_path / "blocks", way="blocks", dense=dense, **training)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("pruned", "blocks"))
    changed = 0
    for name, weight in after.items():
        if "proj" in name:
            assert find_codes(weight, grid_of(values)) is not None
            assert torch.equal(weight == 0, before[name] == 0)
            changed += int((weight != before[name]).sum())
    assert changed
