"""Plain transformers: zeros are multiplied like all other numbers; only a smaller model is
faster.
"""

from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from secateur.deployment.runtimes.base import Running, Runtime, Stepped


def load_model(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a checkpoint folder on the CPU, in eval mode."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True).eval()


def bytes_read(model: nn.Module) -> int:
    """What one decoded token reads of the weights: all but embeddings, each once; a tied head is
    read as a whole.
    """
    held = {}
    for module in model.modules():
        if not isinstance(module, nn.Embedding):
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                held[tensor.data_ptr(), tensor.shape] = tensor.numel() * tensor.element_size()
    return sum(held.values())


def load(folder: Path, dtype: torch.dtype) -> Running:
    model = load_model(folder, dtype)
    return Stepped(model, bytes_read(model))


eager = Runtime(lambda: None, load)
