"""Loading a causal LM: the only file that knows how transformers does it.

The `nn.ModuleList` that holds most parameters of the language model (`parts`) is the stack of
decoder blocks. A model whose blocks, run one by one (`replay`), do not give its own logits bit for
bit is refused rather than pruned wrongly. Weights stay where `from_pretrained` mapped them.
"""

import shutil
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from secateur.checkpoints.folder import Checkpoint, open_checkpoint, stored_dtype
from secateur.checkpoints.hub import Wanted, fetch
from secateur.checkpoints.quantised.base import PlainSource
from secateur.checkpoints.quantised.formats import (
    plain_config,
    plain_source,
    read_headers,
    refuse_unreadable,
    settings_of,
    unreadable,
)
from secateur.checkpoints.quantised.gguf import SUFFIX, is_gguf
from secateur.checkpoints.quantised.reading import DecodedCheckpoint, write_configuration
from secateur.checkpoints.quantised.unpack import copy_of_file, unpacked
from secateur.data import demo
from secateur.errors import BadCheckpoint, UnsupportedModel, in_one_line
from secateur.models.checks import (
    LOAD_ERRORS,
    bad_config,
    bad_weights,
    refuse_adapter,
    refuse_counts,
    refuse_encoder,
    refuse_foreign_weights,
    refuse_non_finite_ends,
    without_weights,
)
from secateur.models.context import vocabulary_size
from secateur.models.mapped_experts import spill_folder, stacked_on_disk
from secateur.models.parts import language_part, loader
from secateur.models.recognise import refuse_other_kinds
from secateur.models.replay import LanguageModel, Shell, run_block
from secateur.models.source import check_loaded
from secateur.system.files import refuse_odd_files
from secateur.system.json_files import json_object, write_json
from secateur.system.machine import CPU
from secateur.system.progress import Progress
from secateur.system.settings import Trust, Unpacking


def find_stack(model: nn.Module) -> str:
    """The name of the `nn.ModuleList` that holds most parameters of the language model. Raises
    UnsupportedModel where there is none.
    """
    part = language_part(model)
    lists = {
        name: sum(p.numel() for p in module.parameters())
        for name, module in model.get_submodule(part).named_modules(prefix=part)
        if isinstance(module, nn.ModuleList) and len(module)
    }
    if not lists:
        raise UnsupportedModel(f"{type(model).__name__} has no list of blocks.")
    return max(lists, key=lambda name: lists[name])


@torch.no_grad()
def replayable(model: PreTrainedModel) -> LanguageModel:
    """The model with its blocks found, after checking that running them one by one gives its own
    logits bit for bit.

    Raises UnsupportedModel with the largest difference where it does not.
    """
    stack, kind = find_stack(model), type(model).__name__
    blocks = list(model.get_submodule(stack).children())
    parameters = [id(p) for block in blocks for p in block.parameters()]
    if len(parameters) != len(set(parameters)):
        raise UnsupportedModel(f"{kind} shares weights between its blocks; that is not supported.")
    draw = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocabulary_size(model), (3, 16), generator=draw)
    tokens[2, :-1] = tokens[1, :-1]  # for the check that no token sees a later one
    try:
        language_model, logits = _with_tuples(model, stack, tokens)
    except LOAD_ERRORS as error:
        raise UnsupportedModel(
            f"{kind} cannot be run as its config.json sets it up: {in_one_line(error)}."
        ) from error
    shell = Shell(language_model, CPU, None)
    hidden, calls = shell.enter(tokens)
    for block, call in zip(blocks, calls, strict=True):
        hidden = run_block(block, hidden, call)
    replayed = shell.leave(tokens, hidden)
    # NaN in a block is found and named later; an infinity among logits may be a mask.
    if hidden.isfinite().all() and not (replayed < torch.inf).all():
        refuse_non_finite_ends(model, stack)
    if not torch.allclose(replayed, logits, rtol=0, atol=0, equal_nan=True):
        difference = (replayed.float() - logits.float()).abs().max().item()
        raise UnsupportedModel(
            f"{kind} cannot be replayed block by block: its logits differ by up to {difference:g}. "
            "The model does more between its blocks than hand on the hidden state."
        )
    refuse_encoder(model, logits[1:])
    return language_model


def _with_tuples(
    model: PreTrainedModel, stack: str, tokens: Tensor
) -> tuple[LanguageModel, Tensor]:
    """Which blocks return a tuple, asked of the real blocks in one forward, and its logits."""
    tuples: list[bool] = []
    blocks = list(model.get_submodule(stack).children())

    def note(module: nn.Module, args: Any, output: Any) -> None:
        tuples.append(isinstance(output, tuple))

    with ExitStack() as hooks:
        for block in blocks:
            hooks.enter_context(block.register_forward_hook(note))
        logits = model(tokens, use_cache=False).logits
    if len(tuples) != len(blocks):
        raise UnsupportedModel(
            f"{type(model).__name__} called its {len(blocks)} blocks {len(tuples)} times for text; "
            "once each is wanted. What only images or sound reach cannot be judged by text."
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
    model, checkpoint, spill = _mapped(folder, trust_remote_code, spill)
    language_model = replayable(model)
    ignored = check_loaded(checkpoint, language_model)
    return replace(language_model, spilled=spill is not None, ignored=ignored)


def load_blocks(
    folder: Path, *, trust_remote_code: bool = False, spill: Path | None = None
) -> list[nn.Module]:
    """The blocks of a checkpoint of our own making, mapped; some may hold nothing yet, so nothing
    is run.
    """
    model, *_ = _mapped(folder, trust_remote_code, spill)
    return list(model.get_submodule(find_stack(model)).children())


def _mapped(
    folder: Path, trust_remote_code: bool, spill: Path | None
) -> tuple[PreTrainedModel, Checkpoint, Path | None]:
    """The causal LM, its checkpoint, and the folder of weights that the loader put together, None
    where they lie in memory.
    """
    checkpoint = plain_checkpoint(folder)
    folder = checkpoint.folder
    config, built = load_config(folder, trust_remote_code=trust_remote_code), None
    refuse_adapter(folder)
    refuse_other_kinds(checkpoint)
    spill = spill or spill_folder(None, checkpoint.bytes)
    try:
        built = without_weights(checkpoint, config, trust_remote_code=trust_remote_code)
        with stacked_on_disk(spill):
            loaded: Any = loader(config).from_pretrained(
                folder,
                config=config,
                dtype=stored_dtype(checkpoint),
                trust_remote_code=trust_remote_code,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
            )
    except LOAD_ERRORS as error:
        raise bad_weights(folder, checkpoint.shapes, config, built, error) from error
    model, info = loaded
    refuse_foreign_weights(checkpoint, model, find_stack(model), info)
    return model.eval(), checkpoint, spill


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
        settings = settings_of(folder, json_object(folder / "config.json"))
        raise UnsupportedModel(unreadable(folder, settings or {}))
    # Ours to choose, not the folder's: flex_attention compiles for a minute.
    config._attn_implementation = None
    return config


def checkpoint_config(checkpoint: Checkpoint, *, trust_remote_code: bool = False) -> Any:
    """The configuration of the model in a checkpoint, or of the plain one that it stands for.

    Raises UnsupportedModel or BadCheckpoint.
    """
    if not isinstance(checkpoint, DecodedCheckpoint):
        return load_config(checkpoint.folder, trust_remote_code=trust_remote_code)
    with TemporaryDirectory() as place:
        write_configuration(checkpoint.source, Path(place))
        return load_config(Path(place), trust_remote_code=trust_remote_code)


def described_config(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The configuration of the plain model where the weights are not there yet.

    Raises UnsupportedModel or BadCheckpoint where that alone says that it cannot be read.
    """
    config = json_object(folder / "config.json")
    settings = settings_of(folder, config)
    if settings is None:
        return load_config(folder, trust_remote_code=trust_remote_code)
    refuse_unreadable(folder, settings)
    with TemporaryDirectory() as place:
        write_json(Path(place) / "config.json", plain_config(config))
        for file in folder.glob("*.py"):
            shutil.copy(file, place)
        return load_config(Path(place), trust_remote_code=trust_remote_code)


def resolve(
    model: str | Path | None,
    trust: Trust | None = None,
    *,
    dtype: str = Unpacking.result_dtype,
    progress: Progress | None = None,
) -> Path:
    """The folder of a model with plain weights: as `locate` gives it, or where it was unpacked to.

    Raises BadCheckpoint, UnsupportedModel for a format that cannot be read, DiskFull.
    """
    return plain_folder(locate(model, trust), dtype, progress)


def plain_folder(
    folder: Path, dtype: str = Unpacking.result_dtype, progress: Progress | None = None
) -> Path:
    """A folder itself or, of a quantised one and of a GGUF file, the plain copy."""
    if is_gguf(folder) and (copy := copy_of_file(folder, dtype)):
        return copy
    source = plain_source(folder)
    if source is None:
        return folder
    refuse_adapter(folder)  # which would be left behind
    return unpacked(source, dtype, progress)


def plain_checkpoint(folder: Path) -> Checkpoint:
    """The checkpoint in a folder or, of a quantised one and of a GGUF file, in its plain copy."""
    if is_gguf(folder):
        return open_checkpoint(plain_folder(folder))
    source = read_headers(folder)
    return open_checkpoint(unpacked(source)) if isinstance(source, PlainSource) else source


def locate(model: str | Path | None, trust: Trust | None = None, *, weights: bool = True) -> Path:
    """The folder of a model: the embedded demo for None, a folder or a GGUF file as it is, else
    what is fetched from the hub, NAME or NAME@REVISION; without `weights` what describes them.

    Raises BadCheckpoint where it is none of these.
    """
    trust = trust or Trust()
    folder = demo.model_folder() if model is None else Path(model)
    if folder.is_dir() or is_gguf(folder):
        if trust.revision:
            kind = "folder" if folder.is_dir() else "file"
            raise BadCheckpoint(
                f"--revision {trust.revision} is for names of the hub; {model or 'the demo model'} "
                f"is a {kind}. Leave it out."
            )
        if folder.is_dir():
            refuse_odd_files(folder)
        return folder
    if folder.exists():
        raise BadCheckpoint(
            f"{model} is a file; the folder of a checkpoint, or a .gguf file, was wanted."
        )
    name, _, revision = str(model).partition("@")
    gguf = name.lower().endswith(SUFFIX)
    if name.count("/") > 1 or name.startswith((".", "/", "~")) or gguf:
        kind = "GGUF file" if gguf else "checkpoint folder"
        raise BadCheckpoint(f"There is no {kind} {model}.")
    check = partial(described_config, trust_remote_code=trust.trust_remote_code)
    wanted = Wanted(check, trust.trust_remote_code, weights)
    return fetch(name, revision or trust.revision, wanted)
