"""Grids of values: how they are written, their levels against torch's own dtypes, and codes found again."""

import pytest
import torch
from reference.rounding import LEVELS

from secateur.errors import BadPattern, UnknownName
from secateur.methods.values import AS_STORED, GRIDS, SOLVERS, Codes, Values, find_codes, parse_values

TEXTS = [
    *GRIDS, "int4 of row", "int8 of group 64", "int3 of group 32", "int4 asymmetric of group 64",
    "int8 asymmetric", "int2 of group 64 by joint", "nvfp4 by sweep", "fp8 by nearest",
]  # fmt: skip


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def on_grid(values: Values, rows: int = 24, columns: int = 256, seed: int = 0) -> Codes:
    """Random levels with random scales, half of them zero, a group of nothing but zeros among them."""
    draw, grid = torch.Generator().manual_seed(seed), values.grid
    groups = values.groups(columns)
    ratios = torch.rand(rows, groups, columns // groups, generator=draw) * 2 - 1
    zero_points = torch.zeros(rows, groups)
    if values.asymmetric:
        zero_points = torch.randint(0, 2**grid.bits, (rows, groups), generator=draw).float()
        ratios = ratios * 2**grid.bits
        levels = values.nearest(ratios, zero_points[..., None])
    else:
        levels = values.nearest(ratios * grid.most)
    levels = levels * (torch.rand(levels.shape, generator=draw) < 0.5)
    levels[0, 0] = 0
    scales = values.storable(torch.rand(rows, groups, generator=draw) * 0.01 + 1e-3)
    return Codes(levels.flatten(1), scales, zero_points)


@pytest.mark.parametrize("text", TEXTS)
def test_values_are_read_as_they_are_written(text):
    values = parse_values(text)
    assert values is not None
    assert parse_values(str(values)) == values


def test_short_names_say_the_usual_group():
    assert str(parse_values("int4")) == "int4 of group 128"
    assert str(parse_values("int8")) == "int8"
    assert str(parse_values("int8 of row")) == "int8"
    assert str(parse_values("int4 of 64")) == "int4 of group 64"
    assert str(parse_values(f"int4 by {SOLVERS[0]}")) == "int4 of group 128"
    assert parse_values(AS_STORED) is None


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("int5", "'int5' is no kind of values. Say 'as stored', int8, int4, int3, int2, fp8, nvfp4, mxfp4, "
                 "'int4 of group 64', 'int4 of row' or 'int4 asymmetric'."),
        ("fp8 asymmetric", "fp8 has levels of both signs and no zero point; found 'fp8 asymmetric'. Say 'fp8', or "
                           "'int4 asymmetric'."),
        ("int4 of group 48", "int4 is stored with a scale of group 128, group 64, group 32, row; found "
                             "'int4 of group 48'."),
        ("nvfp4 of group 32", "nvfp4 is stored with a scale of group 16; found 'nvfp4 of group 32'."),
    ],
)  # fmt: skip
def test_what_is_no_kind_of_values_is_refused(text, error):
    with pytest.raises(BadPattern) as raised:
        parse_values(text)
    assert str(raised.value) == error


def test_an_unknown_solver_is_refused_with_the_known_ones():
    with pytest.raises(
        UnknownName, match=r"no way to choose levels 'luck'\. Known: act-order, descent, joint, nearest, sweep\."
    ):
        parse_values("int4 by luck")


def test_a_group_that_does_not_divide_the_inputs_names_one_that_does():
    values = parse_values("int4")
    assert values is not None
    with pytest.raises(BadPattern) as raised:
        values.check((8, 192), "model.layers.0.mlp.up_proj")
    assert str(raised.value) == (
        "int4 of group 128 needs inputs in groups of 128; model.layers.0.mlp.up_proj has 192. Leave it out with "
        "--skip '*up_proj' or say 'int4 of group 64'."
    )
    fixed = parse_values("mxfp4")
    assert fixed is not None
    with pytest.raises(BadPattern, match=r"has 48\. Leave it out with --skip '\*up_proj'\.$"):
        fixed.check((8, 48), "up_proj")


@pytest.mark.parametrize("name", sorted(LEVELS))
def test_every_ratio_goes_to_the_nearest_level(name):
    values = parse_values(name)
    assert values is not None
    levels = torch.tensor(LEVELS[name], dtype=torch.float32)
    ratios = random(4000, seed=1) * levels.abs().max()
    nearest = values.nearest(ratios)
    assert torch.isin(nearest, levels).all()
    closest = (ratios[:, None] - levels).abs().amin(1)
    assert torch.equal((ratios - nearest).abs(), closest)


def test_levels_of_fp8_are_those_of_the_dtype():
    values = parse_values("fp8")
    assert values is not None
    ratios = torch.cat([random(4000) * scale for scale in (1e-3, 0.1, 10, 200)]).clamp(-448, 448)
    assert torch.equal(values.nearest(ratios), ratios.to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize(("text", "dtype"), [("int4", torch.bfloat16), ("int8", torch.bfloat16)])
def test_scales_of_integers_are_those_of_bfloat16(text, dtype):
    values = parse_values(text)
    assert values is not None
    scales = random(2000).abs() + 1e-6
    assert torch.equal(values.storable(scales), scales.to(dtype).float())


def test_scales_of_nvfp4_and_mxfp4_are_those_of_their_dtypes():
    four, power = parse_values("nvfp4"), parse_values("mxfp4")
    assert four is not None
    assert power is not None
    scales = random(2000).abs() + 0.1
    assert torch.equal(four.storable(scales), scales.to(torch.float8_e4m3fn).float())
    assert torch.equal(power.storable(scales).log2() % 1, torch.zeros(2000))
    assert four.storable(torch.tensor([0.0, -1.0])).tolist() == [1, 1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("text", TEXTS)
def test_codes_are_found_in_stored_weights_to_the_bit(text, dtype):
    values = parse_values(text)
    assert values is not None
    codes = on_grid(values)
    stored = codes.dense(dtype)
    found = find_codes(stored, values)
    assert found is not None
    assert torch.equal(found.dense(dtype), stored)
    assert torch.equal(found.levels == 0, codes.levels == 0)
    assert torch.equal(found.scales, values.storable(found.scales))
    groups = found.levels.unflatten(1, (found.scales.shape[1], -1)).flatten(0, 1)
    assert values.holds(groups).all()


@pytest.mark.parametrize("text", TEXTS)
def test_weights_that_are_not_on_the_grid_are_told(text):
    values = parse_values(text)
    assert values is not None
    stored = on_grid(values).dense(torch.float32)
    stored[3, 5] = stored.abs().max() * 0.7312
    stored[3, 6] = stored.abs().max() * 0.1177
    assert find_codes(stored, values) is None


def test_groups_that_do_not_divide_hold_no_codes():
    values = parse_values("int4")
    assert values is not None
    assert find_codes(torch.zeros(4, 100), values) is None
