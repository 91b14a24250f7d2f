"""Loading a causal LM: the only file that knows how transformers does it.

The `nn.ModuleList` that holds most parameters is the stack of decoder blocks. A model whose blocks,
run one by one (`replay`), do not give its own logits bit for bit is refused rather than pruned
wrongly. Weights stay where `from_pretrained` mapped them.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from secateur.checkpoints.folder import Checkpoint, open_checkpoint, stored_dtype
from secateur.data import demo
from secateur.data.windows import Windows
from secateur.errors import BadCheckpoint, NotEnoughText, UnsupportedModel, in_one_line
from secateur.models.checks import (
    LOAD_ERRORS,
    bad_config,
    bad_weights,
    refuse_counts,
    refuse_encoder,
    refuse_foreign_weights,
    refuse_non_finite_ends,
    without_weights,
)
from secateur.models.mapped_experts import spill_folder, stacked_on_disk
from secateur.models.replay import LanguageModel, Shell, run_block
from secateur.system.files import refuse_odd_files

WANTED = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja")
"""What is downloaded of a model."""


def find_stack(model: nn.Module) -> str:
    """The name of the `nn.ModuleList` that holds most parameters. Raises UnsupportedModel where
    there is none.
    """
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
    """The model with its blocks found, after checking that replaying them gives its own logits bit
    for bit.

    Raises UnsupportedModel with the largest difference where it does not.
    """
    stack = find_stack(model)
    blocks = list(model.get_submodule(stack).children())
    shared = [id(p) for block in blocks for p in block.parameters()]
    if len(shared) != len(set(shared)):
        raise UnsupportedModel(
            f"{type(model).__name__} shares weights between its blocks; that is not supported."
        )
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
    if (
        hidden.isfinite().all() and not (got < torch.inf).all()
    ):  # NaN, or an infinity that is no mask
        refuse_non_finite_ends(model, stack)
    if not torch.allclose(
        got, wanted, rtol=0, atol=0, equal_nan=True
    ):  # NaN in a block is found and named later
        difference = (got.float() - wanted.float()).abs().max().item()
        raise UnsupportedModel(
            f"{type(model).__name__} cannot be replayed block by block: its logits differ by up to {difference:g}. "
            "The model does more between its blocks than hand on the hidden state."
        )
    refuse_encoder(model, wanted[1:])
    return found


def _with_tuples(
    model: PreTrainedModel, stack: str, tokens: Tensor
) -> tuple[LanguageModel, Tensor]:
    """Which blocks return a tuple, asked of the real blocks in one forward, and its logits."""
    tuples: list[bool] = []
    blocks = list(model.get_submodule(stack).children())
    hooks = [
        block.register_forward_hook(
            lambda module, args, output: tuples.append(isinstance(output, tuple))
        )
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


def load(
    folder: Path, *, trust_remote_code: bool = False, spill: Path | None = None
) -> LanguageModel:
    """The causal LM in a checkpoint folder, weights mapped in the dtype they are stored in, ready
    to replay.

    `spill`: a folder for weights that the loader puts together; without one they lie in memory, or
    where temporary files go if that is short. Raises BadCheckpoint where configuration and weights
    do not belong together, UnsupportedModel where the architecture is unknown, quantised, or cannot
    be replayed.
    """
    model, spill = _mapped(folder, trust_remote_code, spill)
    return replace(replayable(model), spilled=spill is not None)


def load_blocks(
    folder: Path, *, trust_remote_code: bool = False, spill: Path | None = None
) -> list[nn.Module]:
    """The blocks of a checkpoint of our own making, mapped; some may hold nothing yet, so nothing
    is run.
    """
    model, _ = _mapped(folder, trust_remote_code, spill)
    return list(model.get_submodule(find_stack(model)).children())


def _mapped(
    folder: Path, trust_remote_code: bool, spill: Path | None
) -> tuple[PreTrainedModel, Path | None]:
    config, built = load_config(folder, trust_remote_code=trust_remote_code), None
    checkpoint = open_checkpoint(folder)
    shapes, spill = checkpoint.shapes, spill or spill_folder(None, checkpoint.bytes)
    try:
        built = without_weights(checkpoint, config, trust_remote_code=trust_remote_code)
        with stacked_on_disk(spill):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype=stored_dtype(checkpoint),
                trust_remote_code=trust_remote_code,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
            )
    except LOAD_ERRORS as error:
        raise bad_weights(folder, shapes, config, built, error) from error
    model, report = loaded
    refuse_foreign_weights(folder, model, find_stack(model), report)
    return model.eval(), spill


def checkpoint_tensors(
    language_model: LanguageModel,
    tensors: Mapping[str, Tensor],
    known: Container[str],
    optional: Container[str] = (),
) -> dict[str, Tensor]:
    """Parameters by their name in the model, turned into the tensors by their name in the
    checkpoint.

    transformers renames and re-stacks weights when it loads them (experts above all) and knows the
    way back; `known` holds the names of the checkpoint. Raises UnsupportedModel for a name that it
    does not hold, unless that is `optional`.
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
                raise UnsupportedModel(
                    f"The checkpoint has no tensor {name!r}, which the model was loaded from."
                )
    return stored


def load_config(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The configuration of a checkpoint folder. Raises UnsupportedModel or BadCheckpoint."""
    refuse_counts(folder)
    try:
        config = AutoConfig.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except LOAD_ERRORS as error:
        raise bad_config(folder, error) from error
    if getattr(config, "quantization_config", None):
        raise UnsupportedModel(
            f"{folder} is quantised (quantization_config in config.json). Prune the unquantised model instead."
        )
    config._attn_implementation = (
        None  # ours to choose, not the folder's: flex_attention compiles for a minute
    )
    return config


def default_length(language_model: LanguageModel) -> int:
    """The window length where none is asked for: the smaller of 2048 and the model's context."""
    return min(2048, context(language_model.model.config) or 2048)


def context(config: Any) -> int | None:
    """The longest window that a model was made for, None where its configuration does not say."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def check_length(config: Any, length: int) -> None:
    """Raise UnsupportedModel for windows that are longer than the model's context."""
    most = context(config)
    if most and length > most:
        raise UnsupportedModel(
            f"Windows of {length} tokens were asked for; the model has a context of {most}. "
            f"Use --seq-len {most} or less."
        )


def default_corpus(model: str | Path | None, corpus: str | None, otherwise: str) -> str:
    """The corpus where none is asked for: the demo's own text for the demo model."""
    return corpus or ("demo" if model is None else otherwise)


def width(language_model: LanguageModel) -> int:
    """Numbers of a token between the blocks of a model, at least: some families have several
    streams of them.
    """
    return language_model.model.get_input_embeddings().weight.shape[1]  # type: ignore[union-attr]


def check_windows(language_model: LanguageModel, windows: Windows, batch_size: int) -> None:
    """Raise UnsupportedModel where the windows have tokens that the model lacks, or are longer than
    its context.

    Raises NotEnoughText for batches of nothing.
    """
    if batch_size < 1:
        raise NotEnoughText(f"A batch needs at least one window; found --batch-size {batch_size}.")
    check_length(language_model.model.config, windows.ids.shape[1])
    size = language_model.model.get_input_embeddings().weight.shape[0]  # type: ignore[union-attr]
    if windows.ids.max() >= size:
        raise UnsupportedModel(
            f"The tokenizer gives token {int(windows.ids.max())}, the model has {size}: they do not belong together."
        )


def resolve(model: str | Path | None, wanted: Sequence[str] = WANTED) -> Path:
    """The folder of a model: the embedded demo for None, a folder as it is, else a download of
    `wanted` from the hub.

    Raises BadCheckpoint where it is none of these.
    """
    if model is None:
        return demo.model_folder()
    folder = Path(model)
    if folder.is_dir():
        refuse_odd_files(folder)
        return folder
    if folder.exists():
        raise BadCheckpoint(f"{model} is a file; the folder of a checkpoint was wanted.")
    if str(model).count("/") > 1 or str(model).startswith((".", "/", "~")):
        raise BadCheckpoint(f"There is no checkpoint folder {model}.")
    try:
        return Path(snapshot_download(str(model), allow_patterns=list(wanted)))
    except (OSError, ValueError, HfHubHTTPError, HFValidationError, RuntimeError) as error:
        raise BadCheckpoint(
            f"{model} is neither a folder here nor a model that the hub gives out: {in_one_line(error)}."
        ) from error


def check_source(source: Checkpoint, language_model: LanguageModel, names: Iterable[str]) -> None:
    """Raise UnsupportedModel unless the tensors, by their name in the model, are the bytes that the
    source holds.

    transformers turns some into others when it loads them; turned back, they must be what they
    were.
    """
    loaded = {name: _tensor(language_model.model, name) for name in names}
    for name, tensor in checkpoint_tensors(language_model, loaded, source.places).items():
        held = source.tensor(name)
        if held.dtype != tensor.dtype or not torch.equal(held, tensor):
            raise UnsupportedModel(
                f"{name} in {source.folder} is not what the model was loaded with."
            )


def _tensor(model: nn.Module, name: str) -> Tensor:
    owner, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(owner), leaf).data
