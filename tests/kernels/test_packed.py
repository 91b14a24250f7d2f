"""Packed products against float64, for every instruction set of this machine; what comes from files is checked."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.families import tiny_model
from torch import Tensor

from secateur.deployment.autotune import BATCHES, WAYS, Crossovers, measure_crossover
from secateur.deployment.packed_model import OwnLinear, PackedLinear, pack_model
from secateur.errors import BadCheckpoint, BadPattern
from secateur.kernels import packed as module
from secateur.kernels.library import ISAS, isa, library
from secateur.kernels.packed import (
    MOST,
    SLACK,
    Packed,
    check,
    dense_product,
    joined,
    multiply,
    multiply_unpacked,
    pack,
    pack_int8,
    pack_levels,
)
from secateur.methods.values import Codes

SHAPES = [(512, 256), (37, 128), (1, 64), (13, 1), (9, 65), (64, 100), (5, 1376)]
needs_library = pytest.mark.skipif(library() is None, reason="the package was installed without a C compiler")


def sparse(rows: int, columns: int, sparsity: float, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """A random matrix of which some rows are empty and some full."""
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=draw)
    kept = torch.rand(rows, columns, generator=draw) >= sparsity
    if 0 < sparsity < 1:
        kept[::7], kept[3::7] = True, False
    return (weight * kept).to(dtype)


def available() -> list[str]:
    found = isa()
    return [] if found is None else list(ISAS[: ISAS.index(found) + 1])


@needs_library
@pytest.mark.parametrize("use", available())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_products_equal_float64(shape, dtype, use):
    rows, columns = shape
    before = torch.get_num_threads()
    for sparsity in (0.0, 0.5, 0.7, 0.97, 1.0):
        weight = sparse(rows, columns, sparsity, dtype)
        held = pack(weight)
        for batch in (1, 2, 3, 5, MOST):
            x = torch.randn(batch, columns, generator=torch.Generator().manual_seed(batch)).to(dtype)
            wanted = x.double() @ weight.double().T
            for threads in (1, 2):
                torch.set_num_threads(threads)
                got = multiply(held, x.float(), use=use)
                torch.set_num_threads(before)
                assert (got - wanted).abs().max() <= 2e-6 * max(1.0, wanted.abs().max().item()) * columns**0.5


@needs_library
@pytest.mark.parametrize("use", available())
@pytest.mark.parametrize("shape", SHAPES)
def test_int8_products_equal_float64(shape, use):
    rows, columns = shape
    for sparsity in (0.0, 0.5, 0.97, 1.0):
        weight = sparse(rows, columns, sparsity)
        held = pack_int8(weight)
        check(held)
        dense = held.dense()
        steps = weight.abs().amax(1, keepdim=True) / 127
        assert ((dense - weight).abs() <= steps * 0.501).all()
        for batch in (1, 2, 5, MOST, MOST + 1):
            x = torch.randn(batch, columns, generator=torch.Generator().manual_seed(batch))
            wanted = x.double() @ dense.double().T
            rounding = x.abs().max() / 2**16 * dense.abs().sum(1).max() if use.startswith("avx512") else 0
            got = multiply(held, x, use=use)
            assert (got - wanted).abs().max() <= 2e-6 * max(1.0, wanted.abs().max().item()) * columns**0.5 + rounding


def coded(rows: int, columns: int, groups: int, sparsity: float, seed: int = 0, bits: int = 4) -> Codes:
    """Random levels of so many bits, of which some rows are empty, some full and one has one left, and their scales."""
    draw = torch.Generator().manual_seed(seed)
    half = 2 ** (bits - 1)
    levels = torch.randint(-half, half - 1, (rows, columns), generator=draw).float()
    levels[levels >= 0] += 1  # none is zero before the zeros
    levels *= sparse(rows, columns, sparsity, seed=seed) != 0
    levels[-1:, 1:] = 0
    scales = (torch.rand(rows, groups, generator=draw) + 0.01).bfloat16().float()
    return Codes(levels, scales, torch.full((rows, groups), float(half)))


GROUPED = [(512, 256, 2), (37, 128, 1), (1, 64, 1), (13, 1, 1), (9, 65, 1), (64, 100, 1), (5, 1376, 1), (6, 1344, 21),
           (7, 1280, 2), (10, 5120, 1)]  # fmt: skip


@needs_library
@pytest.mark.parametrize("use", available())
@pytest.mark.parametrize("shape", GROUPED)
@pytest.mark.parametrize("bits", [4, 3, 2])
def test_products_of_levels_equal_float64(shape, use, bits):
    rows, columns, groups = shape
    before = torch.get_num_threads()
    for sparsity in (0.0, 0.5, 0.97, 1.0):
        codes = coded(rows, columns, groups, sparsity, bits=bits)
        held = pack_levels(codes.levels, codes.scales, bits)
        check(held)
        dense = codes.dense()
        for batch in (1, 2, 3, 5, MOST, MOST + 1):
            x = torch.randn(batch, columns, generator=torch.Generator().manual_seed(batch))
            wanted = x.double() @ dense.double().T
            rounding = x.abs().max() / 2**16 * dense.abs().sum(1).max() if use != "portable" else 0
            for threads in (1, 2):
                torch.set_num_threads(threads)
                got = multiply(held, x, use=use)
                torch.set_num_threads(before)
                most = max(1.0, wanted.abs().max().item())
                assert (got - wanted).abs().max() <= 2e-6 * most * columns**0.5 + rounding


@given(
    rows=st.integers(1, 20), words=st.integers(1, 6), odd=st.integers(0, 63), sparsity=st.floats(0, 1),
    seed=st.integers(0, 99), bits=st.integers(2, 4),
)  # fmt: skip
def test_packing_loses_nothing_of_levels_and_scales(rows, words, odd, sparsity, seed, bits):
    columns, groups = 64 * words - odd, 1 if odd else words
    codes = coded(rows, columns, groups, sparsity, seed, bits)
    held, middle = pack_levels(codes.levels, codes.scales, bits), rows // 2
    check(held)
    wanted = codes.dense()
    halves = (slice(0, middle), slice(middle, rows))
    parts = [pack_levels(codes.levels[part], codes.scales[part], bits) for part in halves]
    together = joined(parts[middle == 0 :])
    assert all(torch.equal(one, other) for one, other in zip(together.tensors, held.tensors, strict=True))
    assert held.kept == int(codes.levels.count_nonzero())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "library", lambda: None)
        assert torch.equal(held.dense().contiguous().view(torch.int32), wanted.view(torch.int32))
        assert torch.equal(held.dense(middle, rows), wanted[middle:])
        patch.undo()
        for use in range(len(available())):
            patch.setattr(module, "best", lambda use=use: use)
            assert torch.equal(held.dense().contiguous().view(torch.int32), wanted.view(torch.int32))
            assert torch.equal(held.dense(middle, rows), wanted[middle:])
            assert torch.equal(held.dense(dtype=torch.bfloat16), codes.dense(torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8])
def test_matrices_packed_in_parts_are_those_packed_at_once(dtype):
    weight = sparse(20, 70, 0.5, torch.float32)
    way = pack_int8 if dtype == torch.int8 else lambda part: pack(part.to(dtype))
    together, wanted = joined([way(weight[:7]), way(weight[7:8]), way(weight[8:])]), way(weight)
    assert all(torch.equal(one, other) for one, other in zip(together.tensors, wanted.tensors, strict=True))


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_levels_take_the_bytes_that_are_promised_and_refuse_small_groups(bits):
    kept = torch.rand(1024, 4096, generator=torch.Generator().manual_seed(0)) < 0.5
    held = pack_levels(kept * 1.0, torch.ones(1024, 32), bits)
    assert held.bytes / kept.numel() == pytest.approx(1 / 8 + bits / 16 + 2 / 128, abs=0.01)
    with pytest.raises(
        BadPattern, match=rf"a multiple of 64 inputs, or for a row; found groups of 32\. Say 'int{bits} of group 64'"
    ):
        pack_levels(torch.ones(2, 128), torch.ones(2, 4), bits)


def test_levels_lie_side_by_side_from_the_lowest_bit_on():
    """Bytes worked out by hand: 3, -4, -1 are 011, 100, 111, written from the right."""
    levels = torch.zeros(1, 65)
    levels[0, [0, 7, 63, 64]] = torch.tensor([3.0, -4.0, -1.0, 2.0])
    held = pack_levels(levels, torch.ones(1, 1), 3)
    assert held.values[:3].tolist() == [0b11100011, 0b1, 0b010]
    assert held.starts.tolist() == [0, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(rows=st.integers(1, 20), columns=st.integers(1, 200), sparsity=st.floats(0, 1), seed=st.integers(0, 99))
def test_packing_loses_nothing(dtype, rows, columns, sparsity, seed):
    weight = sparse(rows, columns, sparsity, dtype, seed)
    weight[weight == 0] = 0.0  # -0.0 comes back as +0.0
    held = pack(weight)
    check(held)
    assert torch.equal(held.dense().contiguous().view(torch.uint8), weight.view(torch.uint8))
    assert torch.equal(held.dense(rows // 2, rows), weight[rows // 2 :])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "library", lambda: None)
        assert torch.equal(held.dense(rows // 2, rows), weight[rows // 2 :])
        patch.undo()
        for use in range(len(available())):
            patch.setattr(module, "best", lambda use=use: use)
            assert torch.equal(held.dense(), weight)
            assert torch.equal(held.dense(dtype=torch.float32), weight.float())


def test_float16_is_stored_and_multiplied_unpacked():
    weight, x = sparse(20, 70, 0.5).half(), torch.randn(3, 70).half()
    held = pack(weight)
    check(held)
    assert torch.equal(held.dense(), weight)
    assert torch.allclose(multiply(held, x), x @ weight.T)


def test_the_size_is_what_is_promised():
    weight = sparse(1024, 1024, 0.5, torch.bfloat16)
    weight[::7], weight[3::7] = weight[1::7][: len(weight[::7])], weight[2::7][: len(weight[3::7])]
    assert pack(weight).bytes / (2 * weight.numel()) == pytest.approx(0.5625 + 4 / 1024, abs=0.01)


def test_a_larger_batch_and_no_library_give_the_same(monkeypatch):
    weight, x = sparse(60, 100, 0.6), torch.randn(3, 9, 100)
    wanted = x @ weight.T
    assert torch.allclose(multiply(pack(weight), x), wanted, atol=1e-4)
    assert torch.allclose(multiply_unpacked(pack(weight), x), wanted, atol=1e-4)
    monkeypatch.setattr(module, "_product", lambda dtype: None)
    monkeypatch.setattr(module, "library", lambda: None)
    assert torch.allclose(multiply(pack(weight), x[:, 0]), wanted[:, 0], atol=1e-4)
    assert multiply(pack(weight), x[:, :0]).shape == (3, 0, 60)


@needs_library
@settings(max_examples=200)
@given(
    which=st.sampled_from(["bitmap", "values", "starts", "columns"]), place=st.integers(0, 10**6),
    by=st.integers(1, 2**62), cut=st.booleans(),
)  # fmt: skip
def test_what_was_changed_is_refused_or_harmless(which, place, by, cut):
    held = pack(sparse(9, 130, 0.5))
    parts = {"bitmap": held.bitmap, "values": held.values, "starts": held.starts, "columns": held.columns}
    if which == "columns":
        parts["columns"] = (held.columns + by) % 4096
    elif cut:
        parts[which] = parts[which][: place % len(parts[which])]  # type: ignore[index,arg-type]
    else:
        changed = parts[which].clone()  # type: ignore[union-attr]
        changed.view(-1)[place % changed.numel()] += float(by) if which == "values" else by - 2**61
        parts[which] = changed
    mutant = Packed(**parts)  # type: ignore[arg-type]
    try:
        check(mutant)
    except BadCheckpoint:
        return
    assert multiply(mutant, torch.ones(1, mutant.columns)).shape == (1, mutant.rows)


@needs_library
@settings(max_examples=300)
@given(
    which=st.sampled_from(["bitmap", "values", "starts", "columns", "scales", "bits"]), place=st.integers(0, 10**6),
    by=st.integers(1, 255), cut=st.sampled_from(["no", "rows", "columns", "dtype"]), bits=st.integers(2, 4),
)  # fmt: skip
def test_what_was_changed_of_levels_is_refused_or_harmless(which, place, by, cut, bits):
    codes = coded(9, 384, 3, 0.5, bits=bits)
    held = pack_levels(codes.levels, codes.scales, bits)
    parts = {name: getattr(held, name) for name in ("bitmap", "values", "starts", "columns", "scales", "bits")}
    tensor = parts[which]
    if which == "columns":
        parts["columns"] = (held.columns + by) % 4096
    elif which == "bits":
        parts["bits"] = None if cut == "dtype" else by % 10
    elif cut == "dtype":
        parts[which] = tensor.float()
    elif cut == "columns" and tensor.ndim == 2:
        parts[which] = tensor[:, : place % tensor.shape[1]].contiguous()
    elif cut != "no":
        parts[which] = tensor[: place % len(tensor)]
    else:
        changed = tensor.clone()
        changed.view(torch.uint8).view(-1)[place % changed.nbytes] ^= by
        parts[which] = changed
    mutant = Packed(**parts)
    try:
        check(mutant)
    except BadCheckpoint:
        return
    for use in available():
        assert multiply(mutant, torch.ones(1, mutant.columns), use=use).shape == (1, mutant.rows)
    assert mutant.dense().shape == (mutant.rows, mutant.columns)


def test_a_scale_is_wanted_for_every_row_and_group():
    codes = coded(6, 256, 2, 0.5)
    held = pack_levels(codes.levels, codes.scales, 4)
    assert held.scales is not None
    for scales in (None, codes.scales, held.scales[:5], held.scales[:, :0], held.scales.repeat(1, 2)[:, ::2]):
        with pytest.raises(BadCheckpoint, match="tensors of the wrong type or shape"):
            check(Packed(held.bitmap, held.values, held.starts, held.columns, scales, 4))
    with pytest.raises(BadCheckpoint, match="slack"):
        check(Packed(held.bitmap, held.values[:-1], held.starts, held.columns, held.scales, 4))


def test_dtypes_and_slack_are_wanted():
    with pytest.raises(BadCheckpoint, match="float64"):
        pack(sparse(4, 64, 0.5).double())
    held = pack(sparse(4, 64, 0.5))
    short = held.values[: -(SLACK // 4)].clone()
    with pytest.raises(BadCheckpoint, match="slack"):
        check(Packed(held.bitmap, short, held.starts, held.columns))


def zeroed(least: float = 0.6):
    """A tiny Llama with zeros in its blocks, none in its head."""
    model = tiny_model("llama")
    for name, parameter in model.named_parameters():
        if name.endswith("proj.weight"):
            parameter[torch.rand(parameter.shape, generator=torch.Generator().manual_seed(1)) < least] = 0
    return model


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_a_packed_model_generates_what_the_dense_one_does():
    model = zeroed()
    ids = torch.randint(3, 128, (1, 12), generator=torch.Generator().manual_seed(2))
    wanted = model.generate(ids, max_new_tokens=12, do_sample=False)  # type: ignore[operator]
    logits = model(ids).logits
    names = pack_model(model, measure=False)
    assert len(names) == 4 * 7
    assert "lm_head" not in names
    assert torch.allclose(model(ids).logits, logits, atol=1e-4)
    assert torch.equal(model.generate(ids, max_new_tokens=12, do_sample=False), wanted)  # type: ignore[operator]


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_int8_values_round_and_own_products_do_not():
    model, rounded, own = zeroed(), zeroed(), zeroed().bfloat16()
    ids = torch.randint(3, 128, (1, 12), generator=torch.Generator().manual_seed(2))
    logits = model(ids).logits
    pack_model(rounded, values="int8", measure=False)
    difference = (rounded(ids).logits - logits).norm() / logits.norm()
    assert 1e-4 < difference < 0.05
    wanted = own(ids[:, :1]).logits
    pack_model(own, least=1.1, measure=False)
    assert isinstance(own.lm_head, OwnLinear)
    assert torch.allclose(own(ids[:, :1]).logits, wanted, atol=0.02)
    assert torch.equal(own(ids).logits, zeroed().bfloat16()(ids).logits)


@torch.no_grad()
def test_every_way_that_a_crossover_can_choose_gives_the_same(monkeypatch):
    weight, bias = sparse(40, 100, 0.6), torch.randn(40)
    found = measure_crossover(pack(weight), torch.float32, keep_dense=True)
    assert found.keys() == set(BATCHES)
    assert set(found.values()) <= {*WAYS, "dense"}
    assert "dense" not in measure_crossover(pack(weight), torch.float32, keep_dense=False).values()
    for way in ("packed", "unpacked", "unpacked to float32", "dense"):
        layer = PackedLinear(pack(weight), bias, {1: way}, weight)
        for batch in (1, 3, 20):
            x = torch.randn(2, batch, 100)
            assert torch.allclose(layer(x), x @ weight.T + bias, atol=1e-4)
    counted = []
    monkeypatch.setattr(
        "secateur.deployment.autotune.measure_crossover", lambda *args, **kwargs: counted.append(args) or found
    )
    crossovers = Crossovers(torch.float32)
    for seed, sparsity in ((1, 0.6), (2, 0.6), (3, 0.8)):
        kept = torch.rand(64, 128, generator=torch.Generator().manual_seed(seed)) >= sparsity
        crossovers.of(pack(torch.ones(64, 128) * kept))
    assert len(counted) == 2


@needs_library
def test_the_dense_products_are_right_too():
    for rows, columns in ((512, 256), (37, 128), (3, 64)):
        weight, x = torch.randn(rows, columns).bfloat16(), torch.randn(columns).bfloat16()
        if (got := dense_product(weight, x)) is None:
            pytest.skip(f"not written for {isa()}")
        assert torch.allclose(got.double(), weight.double() @ x.double(), atol=1e-4)
        whole, scales = torch.randint(-127, 128, (rows, columns)).to(torch.int8), torch.rand(rows)
        got = dense_product(whole, x.float(), scales)
        assert got is not None
        wanted = (whole.double() * scales[:, None]) @ x.double()
        assert (got - wanted).abs().max() <= 1e-4 * wanted.abs().max()
    assert dense_product(weight[:, :20].contiguous(), x[:20].contiguous()) is None
