"""Quantised checkpoints: what is read of them is what the library that wrote them reads, to the bit."""

from hashlib import sha256
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.quantised import NAMES, fixture, quantised_llama

from secateur.checkpoints.quantised.formats import plain_source
from secateur.checkpoints.quantised.unpack import decoded_pieces

PREFIX = {"square": "model.layers.0.self_attn.q_proj", "up": "model.layers.1.mlp.up_proj", "down": "model.layers.0.mlp.down_proj"}  # fmt: skip


def digest(tensor: torch.Tensor) -> tuple[str, str]:
    raw = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return str(tensor.dtype).removeprefix("torch."), sha256(raw).hexdigest()


@pytest.mark.parametrize("name", NAMES)
def test_every_bit_is_what_the_library_gives(name: str, tmp_path: Path):
    made, source = fixture(name), plain_source(quantised_llama(name, tmp_path))
    assert source is not None
    tensors = {tensor.name: tensor for tensor in source.tensors}
    for module, expected in made.digests.items():
        tensor = tensors[f"{PREFIX[module]}.weight"]
        assert digest(tensor.read()) == expected
        assert digest(torch.cat(list(decoded_pieces(tensor)))) == expected
