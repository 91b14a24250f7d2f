"""What a runtime is, what runs in one, and a transformers model that runs step by step."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from secateur.models.load import load_config
from secateur.models.parts import loader


class Running(ABC):
    """A loaded model that is run token by token, with its keys and values kept.

    `weight_bytes` are read for one token: all weights but the input embedding, of which a row is
    looked up. Logits are float32 `[batch, vocabulary]` on the CPU, those after the last token.
    `room` is set to the number of tokens that will be decoded after a prompt, `memory_bytes` to
    what loading and running once took, both by `bench`.
    """

    memory_bytes: int | None = None

    def __init__(self, vocabulary: int, weight_bytes: int) -> None:
        self.vocabulary, self.weight_bytes, self.room = vocabulary, weight_bytes, 64

    @abstractmethod
    def prefill(self, ids: Tensor) -> Tensor:
        """The logits after tokens int64 `[batch, length]`, from an empty cache. Raises
        UnsupportedModel for a batch that the runtime cannot take.
        """

    @abstractmethod
    def decode(self, ids: Tensor) -> Tensor:
        """The logits after one more token for each row, `[batch, 1]`."""


class Stepped(Running):
    """A transformers model as `Running`, on whatever device it is; its cache grows."""

    def __init__(self, model: PreTrainedModel, weight_bytes: int | None = None) -> None:
        read = bytes_read(model) if weight_bytes is None else weight_bytes
        super().__init__(model.config.get_text_config().vocab_size, read)
        self.model: Any = model
        self.cache: Any = None

    def prefill(self, ids: Tensor) -> Tensor:
        self.cache = DynamicCache(config=self.model.config)
        return self.decode(ids)

    @torch.no_grad()
    def decode(self, ids: Tensor) -> Tensor:
        output = self.model(
            ids.to(self.model.device), past_key_values=self.cache, use_cache=True, logits_to_keep=1
        )
        return output.logits[:, -1].float().cpu()


class Runtime(NamedTuple):
    """What can load a checkpoint folder and run it.

    `missing()` says why it cannot be used on this machine, None where it can. `load(folder, dtype)`
    raises UnsupportedModel where it cannot run that folder in that dtype. `twin` is the runtime
    that shows what its kernels give without zeros: there the dense model is its baseline. `rounded`
    names the values that it rounds the folder's weights to, so that its outputs are compared
    loosely.
    `runs_code`: `load` takes `trust_remote_code` as well. `packages` are those whose versions
    `doctor` shows.
    """

    missing: Callable[[], str | None]
    load: Callable[..., Running]
    twin: str | None = None
    rounded: str = ""
    runs_code: bool = False
    packages: tuple[str, ...] = ()


def not_installed(modules: Sequence[str], extra: str) -> str | None:
    """Which of these modules are missing and how to install them, None where all are there."""
    absent = [name for name in modules if find_spec(name) is None]
    return f"{' and '.join(absent)} not installed: pip install {extra}" if absent else None


def load_model(
    folder: Path, dtype: torch.dtype, device: str = "cpu", *, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The model of a checkpoint folder, in eval mode."""
    trust: Any = {"trust_remote_code": trust_remote_code}
    model: Any = loader(load_config(folder, **trust)).from_pretrained(
        folder, dtype=dtype, local_files_only=True, **trust
    )
    return model.to(device).eval()


def bytes_read(model: nn.Module) -> int:
    """What one decoded token reads: all weights but embeddings, each once, a tied head whole."""
    sizes = {}
    for module in model.modules():
        if not isinstance(module, nn.Embedding):
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                sizes[tensor.data_ptr(), tensor.shape] = tensor.nbytes
    return sum(sizes.values())
