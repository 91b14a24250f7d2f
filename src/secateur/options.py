"""What the words of an option mean, and what holds where none is given."""

from pathlib import Path
from typing import Any

import torch

from secateur.checkpoint import Checkpoint, open_checkpoint, resolve
from secateur.data import Windows, calibration_windows, load_tokenizer
from secateur.errors import NotEnoughText, UnknownName, UnsupportedModel
from secateur.machine import multiplies_bfloat16
from secateur.model import load
from secateur.progress import Progress
from secateur.replay import LanguageModel
from secateur.restack import spill_folder
from secateur.structures import parse_size


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


def draw_calibration(
    language_model: LanguageModel,
    folder: Path,
    model: str | Path | None,
    corpus: str | None,
    *,
    samples: int,
    seq_len: int | None,
    seed: int,
    data_dir: str | Path | None,
    trust_remote_code: bool,
) -> Windows:
    """The calibration windows of a run: `corpus` (default: c4, or the demo's own text) through the model's tokenizer.

    Raises NotEnoughText, UnknownName, BadText, BadCheckpoint.
    """
    return calibration_windows(
        load_tokenizer(folder, trust_remote_code=trust_remote_code),
        default_corpus(model, corpus, "c4"),
        samples=samples,
        length=seq_len or default_length(language_model),
        seed=seed,
        data_dir=Path(data_dir) if data_dir else None,
    )


def opened(
    model: str | Path | None,
    calibration: str | None,
    *,
    samples: int,
    seq_len: int | None,
    seed: int,
    data_dir: str | Path | None,
    trust_remote_code: bool,
    progress: Progress,
    out: Path,
    memory: str | int | None = None,
) -> tuple[Checkpoint, LanguageModel, Windows]:
    """A model's checkpoint, the model, and the calibration windows of a run on it that writes `out`.

    Raises SecateurError.
    """
    folder = resolve(model)
    source = open_checkpoint(folder)
    progress.begin(f"loading {model or 'the demo model'}")
    spill = spill_folder(out, source.bytes, find_size(memory))
    language_model = load(folder, trust_remote_code=trust_remote_code, spill=spill)
    windows = draw_calibration(
        language_model, folder, model, calibration, samples=samples, seq_len=seq_len, seed=seed, data_dir=data_dir,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    return source, language_model, windows


def width(language_model: LanguageModel) -> int:
    """Numbers of a token between the blocks of a model, at least: some families have several streams of them."""
    return language_model.model.get_input_embeddings().weight.shape[1]  # type: ignore[union-attr]


def check_windows(language_model: LanguageModel, windows: Windows, batch_size: int) -> None:
    """Raise UnsupportedModel where the windows have tokens that the model lacks, or are longer than its context.

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


def find_devices(text: str) -> list[torch.device]:
    """The devices that `text` names, separated by commas; `auto` is all GPUs, else the CPU. Raises UnknownName."""
    if text == "auto":
        count = torch.cuda.device_count()
        return [torch.device("cuda", i) for i in range(count)] or [torch.device("cpu")]
    devices = []
    for part in text.split(","):
        known = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        if part not in known and not (part == "cuda" and torch.cuda.is_available()):
            raise UnknownName("device here", part, [*known, "auto"])
        devices.append(torch.device(part))
    return devices


def find_dtype(name: str) -> str:
    """The name of a dtype for forward passes, checked. Raises UnknownName."""
    names = {"auto": "auto", "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
    names |= {full: full for full in ("float32", "bfloat16", "float16")}
    if name not in names:
        raise UnknownName("dtype", name, names)
    return names[name]


def find_size(text: str | int | None) -> int | None:
    """Bytes for "6GB", "512MiB" or a plain number; None for none. Raises UnknownName."""
    if text is None or isinstance(text, int):
        return text
    found = int(text) if text.isdecimal() else parse_size(text.strip())
    if found is None or found < 0:
        raise UnknownName("size", text, ["6GB", "512MiB", "6000000000"])
    return found


def timed_dtype(name: str) -> torch.dtype:
    """The dtype of models that are timed on the CPU. Raises UnknownName for one without fast products there."""
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if (found := find_dtype(name)) not in kinds:
        raise UnknownName("dtype that can be timed", name, kinds)
    return kinds[found]


def forward_dtype(name: str, device: torch.device) -> torch.dtype | None:
    """The dtype of forward passes; None is as stored. `auto`: as stored, but float32 on the CPU."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else None
    return getattr(torch, name)


def calibration_dtype(name: str, device: torch.device, stored: torch.dtype) -> torch.dtype | None:
    """The same for passes that only collect statistics: `auto` takes bfloat16 as stored where the CPU multiplies it."""
    if name == "auto" and stored == torch.bfloat16 and multiplies_bfloat16():
        return None
    return forward_dtype(name, device)


def training_dtype(name: str, device: torch.device, stored: torch.dtype) -> str:
    """What is multiplied while weights in float32 are trained: "float32" or "bfloat16", the latter under autocast.

    `auto` takes bfloat16 for what is stored in 16 bits where the device multiplies it. Raises UnknownName for float16,
    in which gradients vanish.
    """
    if (found := find_dtype(name)) == "float16":
        raise UnknownName("dtype to train in", name, ["auto", "float32", "bfloat16"])
    multiplies = torch.cuda.is_bf16_supported if device.type == "cuda" else multiplies_bfloat16
    if found == "auto":
        return "bfloat16" if stored.itemsize == 2 and multiplies() else "float32"
    return found
