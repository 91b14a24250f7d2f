"""Where BOS, the token that begins a text, stands in windows, and what `--bos` means for a model.

    each-window   every window is BOS and length − 1 tokens of text
    stream        what the tokenizer does by itself, window borders notwithstanding: the papers' way
    never         no BOS at all

A window that a corpus was cut into begins mid-text. Some models, those of the Gemma family, were
never trained on a text without BOS and lose nearly everything where there is none; others, such as
one trained on stories, take BOS for the start of a new one. So it is chosen, and stated.
"""

from collections.abc import Mapping
from typing import Any, TypeVar

from secateur.errors import BadText, UnknownName, UnsupportedModel
from secateur.system.settings import Text

Options = TypeVar("Options", bound=Text)

WAYS = {
    "stream": "BOS as the tokenizer puts it",
    "each-window": "BOS at the start of every window",
    "never": "no BOS",
}
"""The ways to put BOS, each in words."""
COUNTED = ("all", "assistant")
LEANING = ("gemma", "recurrent_gemma", "vaultgemma")
"""How the types of models begin that were never trained on a text without BOS, and that lose nearly
everything without: gemma-2b has a perplexity of 650 on WikiText-2, and of 21 with it.
"""


def readable(text: Options) -> Options:
    """The options of a text, as they are. Raises UnknownName for a way to read it that does not
    exist.
    """
    bos, counted = text.bos, getattr(text, "calibration_on", "all")
    if bos not in ("auto", *WAYS):
        raise UnknownName("way of --bos", bos, ("auto", *WAYS))
    if counted not in COUNTED:
        raise UnknownName("kind of tokens for --calibration-on", counted, COUNTED)
    temperature = getattr(text, "self_temperature", 0.0)
    if not 0 <= temperature < float("inf"):
        raise BadText(f"--self-temperature is 0 or more; found {temperature}.")
    return text


def adds_bos(tokenizer: Any) -> bool:
    """Whether a tokenizer puts BOS before a text by itself."""
    first: Any = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and first[:1] == [tokenizer.bos_token_id]


def bos_way(tokenizer: Any, model_type: str, asked: str) -> str:
    """The way of `WAYS` that `--bos` means for a tokenizer and a type of model.

    auto: every window begins with BOS for a family that leans on it; else as the tokenizer has it,
    as the papers do. Raises UnsupportedModel where there is no BOS to put.
    """
    if tokenizer.bos_token_id is None:
        if asked == "each-window":
            raise UnsupportedModel(
                f"The tokenizer of {tokenizer.name_or_path} has no BOS token to begin windows "
                "with. Use --bos stream."
            )
        return "stream"
    if asked == "auto":
        return "each-window" if model_type.startswith(LEANING) else "stream"
    if asked == "never" and not tokenizer.chat_template and not adds_bos(tokenizer):
        return "stream"  # which is the same, so rows are the same
    return asked


def reading_in_words(text: Mapping[str, Any]) -> str:
    """How a text was read, from its fingerprint: where BOS stood, what counted, who wrote it."""
    bos, generated = str(text.get("bos") or "stream"), text.get("generated") or {}
    words = [WAYS.get(bos, f"BOS {bos}")]
    if text.get("counted"):
        words.append(f"statistics on {text.get('counted_tokens')} tokens of the {text['counted']}")
    if generated:
        words.append(f"answers of the dense model at temperature {generated.get('temperature')}")
    return ", ".join(words)
