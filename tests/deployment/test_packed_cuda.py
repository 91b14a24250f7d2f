"""The runtime for GPUs through stand-ins: the kernels' own arithmetic is tested in test_kernels.py."""

import pytest
import torch
from support.families import tiny_model

from secateur.deployment.runtimes import RUNTIMES, packed_cuda
from secateur.deployment.runtimes.packed_cuda import CLASSES, DeviceLinear, packed_product, use_packed
from secateur.errors import UnsupportedModel
from secateur.kernels import bitmap
from secateur.kernels import two_of_four as nm


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Products that unpack on the CPU, and note which they are."""
    called: list[str] = []

    def product(name, module):
        def multiply(packed, x):
            called.append(name)
            return x @ module.unpack(packed).to(x.dtype).T

        return multiply

    monkeypatch.setattr(nm, "missing", lambda: None)
    monkeypatch.setattr(nm, "multiply", product("2:4", nm))
    monkeypatch.setattr(bitmap, "multiply", product("bitmap", bitmap))
    return called


@torch.no_grad()
@pytest.mark.parametrize("pattern", ["2:4", "60%"])
def test_few_rows_are_packed_and_more_are_dense(emulated, pattern):
    model = tiny_model("llama").bfloat16()
    draw = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        if name.endswith("proj.weight"):
            if pattern == "2:4":
                weight.view(-1, 4)[:, ::2] = 0
            else:
                weight[torch.rand(weight.shape, generator=draw) < 0.6] = 0
    ids = torch.randint(3, 90, (1, 12), generator=draw)
    few, many = model(ids[:, :3]).logits, model(ids).logits
    timed = []
    saved = use_packed(model, lambda product, weight: timed.append(weight.shape) or (True, True, True, False))
    assert saved > 0
    assert len(timed) <= 8  # each kind of matrix once, not each of 28
    layers = [module for module in model.modules() if isinstance(module, DeviceLinear)]
    assert len(layers) == 4 * 7
    assert not emulated
    assert torch.equal(model(ids).logits, many)
    assert not emulated  # twelve rows, and then five to eight, which were measured as slower
    model(ids[:, :6])
    assert not emulated
    assert torch.allclose(model(ids[:, :3]).logits, few, atol=0.05)
    assert set(emulated) == {"2:4" if pattern == "2:4" else "bitmap"}


def test_a_matrix_is_packed_as_what_it_is(emulated):
    weight = torch.randn(16, 64).bfloat16()
    weight[:, ::2] = 0
    for matrix, name in ((weight, "2:4"), (weight.roll(1, 0) * (torch.rand(16, 64) < 0.9), "2:4")):
        product, size = packed_product(matrix, "site")
        x = torch.randn(3, 64).bfloat16()
        assert torch.allclose(product(x), x @ matrix.T, atol=0.1)
        assert size < matrix.nbytes
        assert emulated[-1] == name
    weight[0, :4] = 1
    packed_product(weight, "site")[0](torch.ones(1, 64).bfloat16())
    assert emulated[-1] == "bitmap"


def test_what_it_cannot_do_is_said(tiny_llama, monkeypatch):
    with pytest.raises(UnsupportedModel, match="take bfloat16 and float16"):
        packed_cuda.load(tiny_llama, torch.float32)
    assert RUNTIMES["packed-cuda"].twin == "eager-cuda"
    model = tiny_model("llama")
    assert use_packed(model, lambda product, weight: (False,) * len(CLASSES)) == 0
    if not torch.cuda.is_available():
        assert RUNTIMES["packed-cuda"].missing() == "there is no CUDA device"
