"""Plain transformers: zeros are multiplied like all other numbers; only a smaller model is faster."""

from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from secateur.runtimes.base import Running, Runtime, Stepped


def load_model(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a checkpoint folder on the CPU, in eval mode."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True).eval()


def bytes_read(model: PreTrainedModel) -> int:
    """What one decoded token reads of the weights; a head tied to the embedding is read as a whole."""
    tied = model.get_output_embeddings() is not None and model.get_input_embeddings().weight is getattr(
        model.get_output_embeddings(), "weight", None
    )
    looked_up = set() if tied else {id(p) for p in model.get_input_embeddings().parameters()}  # type: ignore[union-attr]
    tensors = [p for p in model.parameters() if id(p) not in looked_up]
    tensors += [b for m in model.modules() if not isinstance(m, nn.Embedding) for b in m.buffers(recurse=False)]
    return sum(t.numel() * t.element_size() for t in tensors)


def load(folder: Path, dtype: torch.dtype) -> Running:
    model = load_model(folder, dtype)
    return Stepped(model, bytes_read(model))


eager = Runtime(lambda: None, load)
