"""torch's 2:4 products, as far as they go without a GPU: what is converted, refused and chosen; on one, the numbers."""

import json

import pytest
import torch
from support.families import tiny_model
from torch import Tensor, nn
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from secateur.checkpoints.folder import RECORD
from secateur.deployment.runtimes.eager import eager_cuda
from secateur.deployment.runtimes.semi_structured import (
    CLASSES,
    CUTLASS_MULTIPLES,
    PRODUCTS,
    Choice,
    Product,
    SemiStructuredLinear,
    compress_cutlass,
    fits,
    load,
    promised,
    semi_structured,
    sparse_linears,
    usable,
    use_products,
)
from secateur.errors import BadCheckpoint, BadPattern, NonFinite, UnsupportedModel
from secateur.kernels.device import no_device
from secateur.methods.pattern_text import parse

DTYPES = [torch.float16, torch.bfloat16]
PROJECTION = "model.layers.1.mlp.up_proj"


def prune_to_two_of_four(model: nn.Module) -> None:
    """All linear layers of the blocks, by magnitude."""
    for name, linear in model.named_modules():
        if isinstance(linear, nn.Linear) and name != "lm_head":
            linear.weight.data *= parse("2:4").mask(linear.weight.data.abs())  # type: ignore[union-attr]


def two_of_four(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    return (weight * parse("2:4").mask(weight.abs())).to(dtype)  # type: ignore[union-attr]


@pytest.mark.parametrize("dtype", DTYPES)
def test_conversion_loses_nothing(dtype):
    weight = two_of_four(64, 128, dtype)
    weight[:8, ::4] = 0  # groups with fewer than two
    weight[8] = 0
    assert (weight.view(torch.int16) == -(2**15)).any()
    values, meta = compress_cutlass(weight, "up")
    assert values.shape == (64, 64)
    assert (meta.shape, meta.dtype) == ((64, 8), torch.int16)
    dense = sparse_semi_structured_to_dense_cutlass(values, meta)
    assert torch.equal(dense.view(torch.int16), (weight + 0.0).view(torch.int16))


@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_itself_drops_weights_without_a_word(dtype):
    """Why there is a check of ours: were this to fail, torch would have got one."""
    weight = torch.randn(64, 128).to(dtype)
    back = sparse_semi_structured_to_dense_cutlass(*sparse_semi_structured_from_dense_cutlass(weight))
    assert (back != 0).sum() == weight.numel() // 2
    with pytest.raises(BadPattern, match="up is not 2:4: inputs 0 to 3 of output 0 keep 4 weights"):
        compress_cutlass(weight, "up")


def test_what_conversion_refuses():
    with pytest.raises(BadPattern, match=r"up is torch\.float32 \[64, 128\]; CUTLASS wants float16 or bfloat16"):
        compress_cutlass(two_of_four(64, 128, torch.float32), "up")
    with pytest.raises(BadPattern, match=r"\[48, 128\]; .* outputs in multiples of 32 and inputs in multiples of 64"):
        compress_cutlass(two_of_four(48, 128, torch.float16), "up")
    weight = two_of_four(64, 128, torch.float16)
    weight[3, 5] = float("nan")
    with pytest.raises(NonFinite, match="up holds NaN"):
        compress_cutlass(weight, "up")


def test_shapes_that_fit():
    cutlass, cusparselt = PRODUCTS["CUTLASS"].multiples, PRODUCTS["cuSPARSELt"].multiples
    weight = torch.empty(48, 80, dtype=torch.float16)
    assert (fits(weight, None), fits(weight, cutlass), fits(weight, cusparselt)) == (True, False, True)
    assert not fits(weight.float(), cusparselt)
    assert not fits(weight[:40], cusparselt)
    assert not fits(weight[:, :40], cusparselt)


def test_the_record_says_what_must_be_two_of_four(tmp_path):
    assert promised(tmp_path) == frozenset()
    sites = [{"site": "a", "pattern": "2:4"}, {"site": "b", "pattern": None}, {"site": "c", "pattern": "50%"}]
    (tmp_path / RECORD).write_text(json.dumps({"pattern": "2:4", "sites": sites}))
    assert promised(tmp_path) == {"a"}
    said = "is no record of a pruning run"
    for text, what in (("{", "is no JSON"), ("[]", "holds a list"), ('{"sites": 3}', said), ('{"sites": [{}]}', said)):
        (tmp_path / RECORD).write_text(text)
        with pytest.raises(BadCheckpoint, match=rf"{what}.* prune again"):
            promised(tmp_path)


def test_layers_that_are_not_two_of_four_stay_or_are_refused():
    model = tiny_model("llama").bfloat16()
    assert list(sparse_linears(model, frozenset())) == []
    prune_to_two_of_four(model)
    names = [name for name, _ in sparse_linears(model, frozenset())]
    assert len(names) == 4 * 7
    model.get_submodule(PROJECTION).weight.data[5, 8:12] = 1  # type: ignore[union-attr,operator,index]
    assert [name for name, _ in sparse_linears(model, frozenset())] == [n for n in names if n != PROJECTION]
    with pytest.raises(BadPattern, match=rf"{PROJECTION} is not 2:4: inputs 8 to 11 of output 5 keep 4 weights"):
        list(sparse_linears(model, {PROJECTION}))
    assert list(sparse_linears(model.float(), frozenset())) == []


@torch.no_grad()
def test_each_layer_uses_what_was_fastest_for_its_rows(monkeypatch):
    model = tiny_model("llama").bfloat16()
    prune_to_two_of_four(model)
    ids = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(0))
    wanted, of_few, used = model(ids).logits, model(ids[:, :4]).logits, []

    def unpacked(held: tuple[Tensor, Tensor], x: Tensor, bias: Tensor | None, _: object) -> Tensor:
        used.append(len(x))
        return nn.functional.linear(x, sparse_semi_structured_to_dense_cutlass(*held), bias)

    monkeypatch.setitem(PRODUCTS, "unpacked", Product(compress_cutlass, unpacked, CUTLASS_MULTIPLES))
    asked = []

    def measure(weight: Tensor, bias: Tensor | None, site: str) -> tuple[Choice, ...]:
        asked.append(tuple(weight.shape))
        return tuple(Choice("unpacked" if tokens >= 16 else "dense") for tokens in CLASSES)

    chosen = use_products(model, {PROJECTION}, measure)
    assert len(chosen) == 4 * 7
    assert sorted(asked) == [(32, 64), (64, 64), (64, 128), (128, 64)]
    assert torch.equal(model(ids).logits, wanted)
    assert used == [24] * 28
    assert torch.equal(model(ids[:, :4]).logits, of_few)
    assert len(used) == 28
    layer = model.get_submodule(PROJECTION)
    assert isinstance(layer, SemiStructuredLinear)
    assert layer.prepared.keys() == {"dense", "unpacked"}
    assert layer.bytes == 2 * 128 * 64


def test_rows_between_and_beyond_the_classes(monkeypatch):
    seen = []
    for name in map(str, CLASSES):
        product = Product(lambda w, _: w, lambda w, x, b, _, name=name: seen.append(name) or x @ w.T)
        monkeypatch.setitem(PRODUCTS, name, product)
    layer = SemiStructuredLinear(nn.Linear(4, 2), "up", tuple(Choice(str(tokens)) for tokens in CLASSES))
    for tokens in (1, 3, 8, 9, 65, 4096, 5000):
        assert layer(torch.zeros(tokens, 4)).shape == (tokens, 2)
    assert seen == ["1", "4", "8", "16", "256", "4096", "4096"]


def test_backends_that_fail_are_named():
    reasons = usable(torch.bfloat16, torch.device("cpu"))
    assert reasons["dense"] is None
    assert all(reasons[name] for name in ("CUTLASS", "cuSPARSELt"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_is_missing():
    assert semi_structured.missing() == eager_cuda.missing() == "there is no CUDA device"


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_a_model_on_a_device_gives_the_same_logits(tmp_path):
    if (reason := no_device()) is not None:
        pytest.skip(reason)
    model = tiny_model("llama").bfloat16()
    model.save_pretrained(tmp_path / "dense")
    with pytest.raises(UnsupportedModel, match="no linear layer in float16 or bfloat16 that is 2:4"):
        load(tmp_path / "dense", torch.bfloat16)
    prune_to_two_of_four(model)
    model.save_pretrained(tmp_path / "sparse")
    ids = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(0))
    plain = eager_cuda.load(tmp_path / "sparse", torch.bfloat16)
    fast = load(tmp_path / "sparse", torch.bfloat16)
    for wanted, got in ((plain.prefill(ids), fast.prefill(ids)), (plain.decode(ids[:, :1]), fast.decode(ids[:, :1]))):
        assert (got - wanted).norm() <= 5e-2 * wanted.norm()
    weight = two_of_four(64, 128, torch.bfloat16).cuda()
    for name, reason in usable(torch.bfloat16, weight.device).items():
        if reason is None:
            for tokens, bias in ((1, None), (11, torch.randn(64).bfloat16().cuda())):
                x, held = torch.randn(tokens, 128).bfloat16().cuda(), PRODUCTS[name].prepare(weight, "up")
                got = PRODUCTS[name].multiply(held, x, bias, PRODUCTS[name].search(held, x, bias))
                assert torch.allclose(got, nn.functional.linear(x, weight, bias), rtol=2e-2, atol=2e-2)
