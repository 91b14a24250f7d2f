"""Weights that lie on a grid of few bits, drawn as levels and scales, and tiny models that are made of them."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from secateur.methods.values import Values, parse_values
from support.families import tiny_config
from support.texts import byte_tokenizer

E2M1 = torch.tensor([0.5, 1, 1.5, 2, 3, 4, 6])


def grid(text: str) -> Values:
    values = parse_values(text)
    assert values is not None
    return values


def drawn_levels(values: Values, shape: tuple[int, int, int], draw: torch.Generator) -> Tensor:
    """Levels `[out, groups, inputs]` of all kinds that a group can have, half of them 0."""
    if values.name == "fp8":
        levels = torch.randint(1, 127, shape, generator=draw).to(torch.uint8).view(torch.float8_e4m3fn).float()
    elif values.name in ("nvfp4", "mxfp4"):
        levels = E2M1[torch.randint(0, 7, shape, generator=draw)]
    else:
        half = 2 ** (values.grid.bits - 1)
        lowest = -torch.randint(0, 2 * half, (*shape[:2], 1), generator=draw) if values.asymmetric else -half
        levels = torch.randint(0, 2 * half, shape, generator=draw).float() + lowest
    if values.grid.levels.share:
        levels = levels * (torch.randint(0, 2, shape, generator=draw) * 2 - 1)
    return levels * (torch.rand(shape, generator=draw) < 0.5)


def drawn(text: str, shape: tuple[int, int], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """A weight matrix `[out, in]` on the grid, its scales of as many bits as the grid says and about 2^-9."""
    values, draw = grid(text), torch.Generator().manual_seed(seed)
    groups = values.groups(shape[1])
    levels = drawn_levels(values, (shape[0], groups, shape[1] // groups), draw)
    most = 2 ** (values.grid.scale_bits - 1)
    scales = torch.randint(most, 2 * most, (shape[0], groups, 1), generator=draw) * 2.0**-9 / most
    return (levels * scales).flatten(1).to(dtype) + 0


def on_grid(text: str, folder: Path, dtype: torch.dtype = torch.bfloat16, family: str = "llama") -> Path:
    """The folder of a tiny model in two or more shards whose weight matrices lie on a grid."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(family)).to(dtype)
    model.save_pretrained(folder, max_shard_size="150KB")
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.model.unk_token = None  # type: ignore[attr-defined]
    tokenizer.save_pretrained(folder)
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        for seed, (name, tensor) in enumerate(tensors.items()):
            if ".layers." in name and tensor.dim() == 2 and not name.endswith("gate.weight"):
                tensors[name] = drawn(text, (tensor.shape[0], tensor.shape[1]), dtype, seed)
        save_file(tensors, file, {"format": "pt"})
    return folder
