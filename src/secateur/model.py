"""The only file that knows transformers: a causal LM as a stack of blocks that can be replayed.

No adapter class per family. The `nn.ModuleList` that holds most parameters is the stack of decoder blocks.
A `Shell` is the model with every block replaced by a tap: one forward through it records what enters the
first block and the arguments of each block's own call (masks, rotary tables), and one more turns the last
block's output into logits. Running the blocks with those calls must equal `model(...)` bit for bit; `load`
checks it, and a model that differs is refused rather than pruned wrongly.

Weights stay where `from_pretrained` mapped them. `working_copy` converts one block at a time to the device
and dtype of the computation; the model itself is never converted.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from copy import copy, deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from secateur.checkpoint import open_checkpoint, stored_dtype
from secateur.errors import UnsupportedModel, in_one_line
from secateur.refusals import (
    LOAD_ERRORS,
    bad_config,
    bad_weights,
    refuse_counts,
    refuse_encoder,
    refuse_foreign_weights,
    refuse_non_finite_ends,
    without_weights,
)
from secateur.restack import spill_folder, stacked_on_disk


class Call(NamedTuple):
    """How the model calls one block, apart from the hidden state."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class LanguageModel:
    """A causal LM and where its blocks are. `tuples` says which blocks return a tuple; `spilled`, whether weights that
    the loader put together lie in a file rather than in memory."""

    model: PreTrainedModel
    stack: str
    tuples: tuple[bool, ...]
    spilled: bool = False

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self.model.get_submodule(self.stack).children())

    def block_name(self, index: int) -> str:
        return f"{self.stack}.{index}"


def working_copy(module: nn.Module, device: torch.device, dtype: torch.dtype | None) -> nn.Module:
    """A copy of a block on `device`, in `dtype` (None: as stored). The original keeps its mapped weights."""
    return _cast(deepcopy(module), device, dtype)


def _cast(module: nn.Module, device: torch.device, dtype: torch.dtype | None, *, recurse: bool = True) -> nn.Module:
    """Move a module; parameters take the dtype, buffers (rotary tables, masks) only where it is wider."""
    for tensor in (*module.parameters(recurse), *module.buffers(recurse)):
        target = None
        if dtype and tensor.is_floating_point():
            wider = dtype.itemsize > tensor.dtype.itemsize
            target = dtype if wider or isinstance(tensor, nn.Parameter) else None
        tensor.data = tensor.data.to(device, target)
    return module


def run_block(block: nn.Module, hidden: Tensor, call: Call) -> Tensor:
    """The hidden state `[batch, tokens, hidden]` after a block."""
    call = Call(*(_move(part, hidden.device) for part in call))
    output = block(hidden, *call.args, **call.kwargs)
    return output[0] if isinstance(output, tuple) else output


def in_float32(call: Call) -> Call:
    """The call with its floating-point tensors (rotary tables, ALiBi, masks) in float32."""
    return Call(*(_move(part, None, torch.float32) for part in call))


def _move(value: Any, device: torch.device | None, dtype: torch.dtype | None = None) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, dtype if value.is_floating_point() else None)
    if isinstance(value, (tuple, list)):
        return type(value)(_move(part, device, dtype) for part in value)
    if isinstance(value, dict):
        return {key: _move(part, device, dtype) for key, part in value.items()}
    return value


class _Reached(Exception):
    """Ends a forward at the last tap; what follows it is not needed."""


class _Tap(nn.Module):
    """Stands in for a block: hands each call to the shell, and looks like the block to whoever asks."""

    def __init__(self, block: nn.Module, index: int) -> None:
        super().__init__()
        object.__setattr__(self, "block", block)
        self.index = index
        self.called: Callable[[int, Tensor, Call], Any] | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "block"), name)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Tap:
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.called is None:
            raise AssertionError("a tap was called outside enter() and leave()")
        if args:
            hidden, *rest = args
        else:
            hidden, rest = kwargs.pop("hidden_states"), []
        return self.called(self.index, hidden, Call(tuple(rest), kwargs))


class Shell:
    """A language model without its blocks: what happens before the first and after the last.

    It runs on `device` with parameters in `dtype` (None: as stored). On the CPU the input embedding is never
    copied: the few rows that are looked up are converted. Without `head`, only `enter` works, and the output
    embedding stays mapped as well.
    """

    def __init__(
        self,
        language_model: LanguageModel,
        device: torch.device,
        dtype: torch.dtype | None,
        *,
        head: bool = True,
    ) -> None:
        self.tuples = language_model.tuples
        blocks = language_model.blocks
        self.taps = [_Tap(block, index) for index, block in enumerate(blocks)]
        memo: dict[int, Any] = {id(block): tap for block, tap in zip(blocks, self.taps, strict=True)}
        embedding = language_model.model.get_input_embeddings()
        kept = [embedding] if device.type == "cpu" else []
        if not head and (output := language_model.model.get_output_embeddings()) is not None:
            kept.append(output)
        memo |= {id(module): module for module in kept}
        self.model = deepcopy(language_model.model, memo)
        for module in self.model.modules():
            if module not in kept and not isinstance(module, _Tap):
                _cast(module, device, dtype, recurse=False)
        self.embedding, self.dtype = embedding if device.type == "cpu" else None, dtype
        self.device = device

    @contextmanager
    def _answering(self, answer: Callable[[int, Tensor, Call], Tensor]) -> Iterator[None]:
        """While open, every tap answers its call with `answer(index, hidden, call)`."""

        def called(index: int, hidden: Tensor, call: Call) -> Any:
            output = answer(index, hidden, call)
            return (output, None) if self.tuples[index] else output

        def convert(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            return _looked_up(module, args[0], self.dtype) if self.dtype else output

        for tap in self.taps:
            tap.called = called
        hook = self.embedding.register_forward_hook(convert) if self.embedding else None
        try:
            yield
        finally:
            if hook:
                hook.remove()
            for tap in self.taps:
                tap.called = None

    def enter(self, tokens: Tensor) -> tuple[Tensor, list[Call]]:
        """The hidden state that enters block 0 for tokens `[batch, length]`, and every block's call."""
        calls: list[Call] = []
        entering: list[Tensor] = []

        def note(index: int, hidden: Tensor, call: Call) -> Tensor:
            if index != len(calls):
                raise UnsupportedModel(f"Block {index} is called out of turn, after {len(calls)} others.")
            calls.append(call)
            entering.append(hidden)
            if len(calls) == len(self.taps):
                raise _Reached
            return hidden

        with self._answering(note):
            try:
                self.model(tokens.to(self.device), use_cache=False)
            except _Reached:
                return entering[0], calls
        raise UnsupportedModel(f"{type(self.model).__name__} called {len(calls)} of its {len(self.taps)} blocks.")

    def leave(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        """The logits `[batch, length, vocabulary]` when `hidden` is what the last block returned."""
        with self._answering(lambda index, entering, call: hidden.to(entering.device)):
            return self.model(tokens.to(self.device), use_cache=False).logits


def _looked_up(embedding: nn.Module, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """What an embedding gives in another dtype: only the rows that are looked up are converted.

    Its own forward runs on them, since some families scale the result.
    """
    rows, places = tokens.unique(return_inverse=True)
    weight: Tensor = embedding.weight  # type: ignore[assignment]
    narrow = copy(embedding)
    narrow._parameters = {"weight": nn.Parameter(weight[rows].to(dtype), requires_grad=False)}
    narrow.padding_idx = None  # type: ignore[assignment]
    return narrow.forward(places)


def find_stack(model: nn.Module) -> str:
    """The name of the `nn.ModuleList` that holds most parameters. Raises UnsupportedModel where there is none."""
    lists = {
        name: sum(p.numel() for p in module.parameters())
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module)
    }
    if not lists:
        raise UnsupportedModel(f"{type(model).__name__} has no list of blocks.")
    return max(lists, key=lambda name: lists[name])


@torch.no_grad()
def replayable(model: PreTrainedModel) -> LanguageModel:
    """The model with its blocks found, after checking that replaying them gives its own logits bit for bit.

    Raises UnsupportedModel with the largest difference where it does not.
    """
    stack = find_stack(model)
    blocks = list(model.get_submodule(stack).children())
    shared = [id(p) for block in blocks for p in block.parameters()]
    if len(shared) != len(set(shared)):
        raise UnsupportedModel(f"{type(model).__name__} shares weights between its blocks; that is not supported.")
    vocabulary = model.get_input_embeddings().weight.shape[0]  # type: ignore[union-attr]
    tokens = torch.randint(int(vocabulary), (3, 16), generator=torch.Generator().manual_seed(0))
    tokens[2, :-1] = tokens[1, :-1]  # for the check that no token sees a later one
    try:
        found, wanted = _with_tuples(model, stack, tokens)
    except LOAD_ERRORS as error:
        raise UnsupportedModel(
            f"{type(model).__name__} cannot be run as its config.json sets it up: {in_one_line(error)}."
        ) from error
    shell = Shell(found, torch.device("cpu"), None)
    hidden, calls = shell.enter(tokens)
    for block, call in zip(found.blocks, calls, strict=True):
        hidden = run_block(block, hidden, call)
    got = shell.leave(tokens, hidden)
    if hidden.isfinite().all() and not (got < torch.inf).all():  # NaN, or an infinity that is no mask
        refuse_non_finite_ends(model, stack)
    if not torch.allclose(got, wanted, rtol=0, atol=0, equal_nan=True):  # NaN in a block is found and named later
        difference = (got.float() - wanted.float()).abs().max().item()
        raise UnsupportedModel(
            f"{type(model).__name__} cannot be replayed block by block: its logits differ by up to {difference:g}. "
            "The model does more between its blocks than hand on the hidden state."
        )
    refuse_encoder(model, wanted[1:])
    return found


def _with_tuples(model: PreTrainedModel, stack: str, tokens: Tensor) -> tuple[LanguageModel, Tensor]:
    """Which blocks return a tuple, asked of the real blocks in one forward, and its logits."""
    tuples: list[bool] = []
    blocks = list(model.get_submodule(stack).children())
    hooks = [
        block.register_forward_hook(lambda module, args, output: tuples.append(isinstance(output, tuple)))
        for block in blocks
    ]
    try:
        logits = model(tokens, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    if len(tuples) != len(blocks):
        raise UnsupportedModel(
            f"{type(model).__name__} called its {len(blocks)} blocks {len(tuples)} times; once each is wanted."
        )
    return LanguageModel(model, stack, tuple(tuples)), logits


def load(folder: Path, *, trust_remote_code: bool = False, spill: Path | None = None) -> LanguageModel:
    """The causal LM in a checkpoint folder, weights mapped in the dtype they are stored in, ready to replay.

    `spill`: a folder for weights that the loader puts together; without one they lie in memory, or where temporary
    files go if that is short. Raises BadCheckpoint where configuration and weights do not belong together,
    UnsupportedModel where the architecture is unknown, quantised, or cannot be replayed.
    """
    model, spill = _mapped(folder, trust_remote_code, spill)
    return replace(replayable(model), spilled=spill is not None)


def load_blocks(folder: Path, *, trust_remote_code: bool = False, spill: Path | None = None) -> list[nn.Module]:
    """The blocks of a checkpoint of our own making, mapped; some may hold nothing yet, so nothing is run."""
    model, _ = _mapped(folder, trust_remote_code, spill)
    return list(model.get_submodule(find_stack(model)).children())


def _mapped(folder: Path, trust_remote_code: bool, spill: Path | None) -> tuple[PreTrainedModel, Path | None]:
    config, built = load_config(folder, trust_remote_code=trust_remote_code), None
    checkpoint = open_checkpoint(folder)
    shapes, spill = checkpoint.shapes, spill or spill_folder(None, checkpoint.bytes)
    try:
        built = without_weights(checkpoint, config, trust_remote_code=trust_remote_code)
        with stacked_on_disk(spill):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder, config=config, dtype=stored_dtype(checkpoint), trust_remote_code=trust_remote_code,
                local_files_only=True, use_safetensors=True, output_loading_info=True,
            )  # fmt: skip
    except LOAD_ERRORS as error:
        raise bad_weights(folder, shapes, config, built, error) from error
    model, report = loaded
    refuse_foreign_weights(folder, model, find_stack(model), report)
    return model.eval(), spill


def checkpoint_tensors(
    language_model: LanguageModel, tensors: Mapping[str, Tensor], known: Container[str], optional: Container[str] = ()
) -> dict[str, Tensor]:
    """Parameters by their name in the model, turned into the tensors by their name in the checkpoint.

    transformers renames and re-stacks weights when it loads them (experts above all) and knows the way back;
    `known` holds the names of the checkpoint. Raises UnsupportedModel for a name that it does not hold, unless that
    is `optional`.
    """
    prefix = f"{language_model.model.base_model_prefix}."
    stored: dict[str, Tensor] = {}
    for name, tensor in revert_weight_conversion(language_model.model, dict(tensors)).items():
        for candidate in (name, name.removeprefix(prefix), prefix + name):
            if candidate in known:
                stored[candidate] = tensor
                break
        else:
            if name not in optional:
                raise UnsupportedModel(f"The checkpoint has no tensor {name!r}, which the model was loaded from.")
    return stored


def load_config(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The configuration of a checkpoint folder. Raises UnsupportedModel or BadCheckpoint."""
    refuse_counts(folder)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except LOAD_ERRORS as error:
        raise bad_config(folder, error) from error
    if getattr(config, "quantization_config", None):
        raise UnsupportedModel(
            f"{folder} is quantised (quantization_config in config.json). Prune the unquantised model instead."
        )
    config._attn_implementation = None  # ours to choose, not the folder's: flex_attention compiles for a minute
    return config
