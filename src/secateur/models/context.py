"""What a model says of the tokens that it takes: its context, its vocabulary, its width."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur.data.bos import bos_way
from secateur.data.reader import Reader
from secateur.data.windows import Windows
from secateur.errors import NotEnoughText, UnsupportedModel
from secateur.models.experts import has_list
from secateur.models.replay import LanguageModel


def context(config: Any) -> int | None:
    """The longest window that a model was made for, None where its configuration does not say."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def default_length(language_model: LanguageModel) -> int:
    """The window length where none is asked for: the smaller of 2048 and the model's context."""
    return min(2048, context(language_model.model.config) or 2048)


def default_corpus(model: str | Path | None, corpus: str | None, otherwise: str) -> str:
    """The corpus where none is asked for: the demo's own text for the demo model."""
    return corpus or ("demo" if model is None else otherwise)


def reader_of(
    language_model: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    bos: str,
    counted: str = "all",
) -> Reader:
    """The tokenizer of a model, which puts BOS as `--bos` says. Raises UnsupportedModel."""
    kind = language_model.text_config.model_type
    return Reader(tokenizer, bos_way(tokenizer, kind, bos), counted)


def vocabulary_size(model: PreTrainedModel) -> int:
    """How many tokens a model has embeddings for."""
    return model.get_input_embeddings().weight.shape[0]  # type: ignore[union-attr]


def width(language_model: LanguageModel) -> int:
    """Numbers of a token between the blocks, at least: some families have several streams."""
    return language_model.model.get_input_embeddings().weight.shape[1]  # type: ignore[union-attr]


def check_length(config: Any, length: int) -> None:
    """Raise UnsupportedModel where windows are longer than the model's context."""
    most = context(config) or length
    if length > most:
        raise UnsupportedModel(
            f"Windows of {length} tokens were asked for; the model has a context of {most}. "
            f"Use --seq-len {most} or less."
        )


def check_windows(language_model: LanguageModel, windows: Windows, batch_size: int) -> None:
    """Raise UnsupportedModel for tokens that the model lacks, windows longer than its context, and
    where it is not known which tokens count.

    Raises NotEnoughText for batches of nothing.
    """
    if batch_size < 1:
        raise NotEnoughText(f"A batch needs at least one window; found --batch-size {batch_size}.")
    check_length(language_model.model.config, windows.ids.shape[1])
    size, largest = vocabulary_size(language_model.model), int(windows.ids.max())
    if largest >= size:
        raise UnsupportedModel(
            f"The tokenizer gives token {largest}, the model has {size}: they do not belong "
            "together."
        )
    _refuse_unknown_tokens(language_model, windows)


def _refuse_unknown_tokens(language_model: LanguageModel, windows: Windows) -> None:
    """Raise UnsupportedModel where only some tokens count, and it is not known which of them reach
    an expert.
    """
    if windows.counted is None:
        return
    for index, block in enumerate(language_model.blocks):
        if has_list(block):
            raise UnsupportedModel(
                f"{language_model.block_name(index)} has experts that are modules of their own, "
                "which are handed tokens without their places, so whose they are is not known. "
                "Leave --calibration-on out."
            )
