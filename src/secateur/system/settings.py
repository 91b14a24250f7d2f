"""Every option of Secateur, declared once: its default, its words of help and its bounds.

The command line is made from these fields (`cli.options`); the first words of a class's docstring
are the heading of its options in `--help`. The public functions keep flat keywords,
whose defaults are these, and build the objects in their first lines; everything below takes the
objects. Nothing here needs torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_args

T = TypeVar("T")


class Option(NamedTuple):
    """What the command line knows of a field besides its name, type and default.

    `flags` are its spellings, where they are not made from the name; `least`, the smallest number
    that is let in; `listed`, whether its values stand in one argument, separated by commas.
    """

    help: str
    flags: tuple[str, ...] = ()
    least: int | None = None
    listed: bool = False


def option(default: Any, help: str, *flags: str, **rest: Any) -> Any:
    """A field of an options class; `default` MISSING for one that must be given."""
    return field(default=default, metadata={"option": Option(help, flags, **rest)})


MIXED = "A mixture, by shares of tokens: 'c4:0.7,code/*.py:0.3'. "


def corpus(use: str, first: str, other: str, more: str = "") -> Any:
    """A field that names texts, by default the `first`."""
    named = (
        f"{use}: {first}, {other}, demo, files, folders or globs separated by commas, or "
        "owner/name[subset](split):column."
    )
    return option(None, f"{named} {more}Default: {first}, demo for the demo.")


def taken(kind: type[T], keywords: Mapping[str, Any]) -> T:
    """An object of an options class, with those of its fields that are among the keywords.

    A path where a name is wanted, as of a text, is the name that it has.
    """
    own: list[Any] = [one for one in fields(kind) if one.name in keywords]  # type: ignore[arg-type]
    return kind(**{one.name: _named(one.type, keywords[one.name]) for one in own})


def _named(hint: Any, value: Any) -> Any:
    if Path in get_args(hint):
        return value
    if isinstance(value, list | tuple):
        return type(value)(_named(hint, one) for one in value)
    return str(value) if isinstance(value, Path) else value


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What may not be removed."""

    align: int | None = option(
        None,
        "Channels that stay are a multiple of this; default 128, less for widths under 4096.",
        least=1,
    )
    skip: Sequence[str] = option(
        (), "Leave weight matrices out: a glob on their names. May be repeated."
    )
    keep_zeros: bool = option(False, "What is zero already stays zero, under any method.")
    draft_heads: str = option(
        "refuse", "Draft heads, which a structure cannot cut alike: refuse, drop (without them)."
    )


@dataclass(frozen=True, kw_only=True)
class Recipe(Limits):
    """What is removed, by which method, and how it is shared out."""

    method: str = option(
        "default", "A method of the table in the README, or a preset: fast, default, best."
    )
    pattern: str = option(
        "50%",
        "What to remove: 50%, '50% of row', 2:4, '25% of channels', '4 blocks', "
        "'to 75% of parameters' …",
    )
    allocate: str = option(
        "uniform",
        "How sparsity is shared out: uniform, owl, error, search, or a plan's .json file.",
    )
    values: str = option(
        "as stored",
        "What kept weights may be: 'as stored', int8, int4, int3, int2, fp8, nvfp4, mxfp4, 'int4 "
        "of group 64', 'int4 of row', 'int4 asymmetric'; ' by nearest', ' by sweep' or ' by joint' "
        "chooses them otherwise.",
    )


@dataclass(frozen=True, kw_only=True)
class PlannedRecipe(Recipe):
    """What is removed, where how much each matrix can lose is measured."""

    allocate: str = option(
        "error", "How sparsity is shared out in what is measured: error, owl, search, uniform."
    )


@dataclass(frozen=True, kw_only=True)
class Text:
    """Text as a model reads it."""

    seq_len: int | None = option(
        None, "Tokens in a window. Default: 2048, or the context if smaller.", least=2
    )
    data_dir: str | Path | None = option(None, "A folder with local copies of the corpora.")
    bos: str = option(
        "auto",
        "Where BOS stands: each-window, stream (as the tokenizer has it), never; auto: each-window "
        "for a family that leans on it (Gemma), else stream.",
    )


@dataclass(frozen=True, kw_only=True)
class CalibrationTokens:
    """The tokens of the calibration text, which count and which the model itself makes."""

    calibration_on: str = option(
        "all",
        "Tokens of conversations that statistics are taken on: all, assistant (what the model "
        "itself would say).",
    )
    self_temperature: float = option(
        0.7, "Temperature of what the model says to 'self:prompts.jsonl'; 0: the likeliest token."
    )
    self_tokens: int = option(512, "The most tokens that it says to a prompt.", least=1)


@dataclass(frozen=True, kw_only=True)
class CalibrationText(Text, CalibrationTokens):
    """The calibration text, whose tokens go through the model while it is pruned."""

    calibration: str | None = corpus("Text to calibrate on", "c4", "wikitext2", MIXED)
    samples: int = option(128, "Calibration windows.", least=1)
    seed: int = option(0, "Seed of the calibration windows.")


@dataclass(frozen=True, kw_only=True)
class EvaluationText(Text):
    """The evaluation text, on which a model is judged."""

    evaluation: str | None = corpus("Text to measure perplexity on", "wikitext2", "c4")
    windows: int | None = option(None, "Evaluation windows. Default: all.", least=2)


@dataclass(frozen=True, kw_only=True)
class ZeroShot:
    """Zero-shot tasks, which a model answers."""

    tasks: Sequence[str] = option(
        (),
        "Zero-shot tasks, separated by commas: boolq,piqa … or papers, which is seven. "
        "Default: none.",
        listed=True,
    )
    limit: int | None = option(None, "Items of each task, the first ones. Default: all.", least=1)


@dataclass(frozen=True, kw_only=True)
class Devices:
    """Where a model runs."""

    device: str = option("auto", "Where it runs: auto, cpu, cuda, cuda:0,cuda:1 …")


@dataclass(frozen=True, kw_only=True)
class Compute(Devices):
    """Where and in which numbers a model runs, and what it may take."""

    dtype: str = option(
        "auto",
        "dtype of forward passes: auto, float32, bfloat16, float16. auto: on a CPU float32, "
        "or in calibration bfloat16 as stored if the processor multiplies it.",
    )
    batch_size: int = option(
        8,
        "Windows in a forward pass; fewer in calibration where memory is short, or for +refine.",
        least=1,
    )
    passes: str = option(
        "auto", "How often blocks run: one, two (less memory), auto: one where that fits."
    )
    memory: str | int | None = option(
        None,
        "What the run may take, such as 6GB; hidden states go to a file if need be. "
        "Default: what is free.",
    )


@dataclass(frozen=True, kw_only=True)
class Destination:
    """The result: the folder that it is written to, and what may be done to what lies there.

    `command` is what was typed, for the record.
    """

    out: str | Path = option(MISSING, "The folder to write.")
    overwrite: bool = option(False, "Replace what was written to --out before.")
    restart: bool = option(False, "Discard a half-finished run at --out.")
    command: Sequence[str] | None = None


@dataclass(frozen=True, kw_only=True)
class Unpacking:
    """A quantised source, which is unpacked before it is read."""

    result_dtype: str = option(
        "bfloat16",
        "dtype of the result of a quantised model: bfloat16, float16, float32. Others keep theirs.",
    )


@dataclass(frozen=True, kw_only=True)
class Trust:
    """What is let in from elsewhere."""

    allow_low_coverage: bool = option(
        False, "Prune although most weights are in no matrix that can be pruned."
    )
    trust_remote_code: bool = option(False, "Run code that comes with the model.")
    revision: str | None = option(
        None,
        "Of a hub name, the branch, tag or commit; default: main. NAME@REVISION says it as well, "
        "and for --dense.",
    )


@dataclass(frozen=True, kw_only=True)
class Grid(Limits):
    """The rows of a comparison: every method with every pattern, rule and kind of values."""

    methods: Sequence[str] = option(
        ("magnitude", "wanda", "sparsegpt"), "Methods, separated by commas.", listed=True
    )
    patterns: Sequence[str] = option(
        ("50%", "4:8", "2:4"),
        "Patterns, separated by commas; ranges such as 10%..80%, or 30%..60%/5%.",
        listed=True,
    )
    allocate: Sequence[str] = option(
        ("uniform",),
        "How sparsity is shared out, a row each: uniform, owl, error, search.",
        listed=True,
    )
    values: Sequence[str] = option(
        ("as stored",),
        "What kept weights may be, a row each: 'as stored,int8,int4'; see prune --values.",
        listed=True,
    )
    tolerance: str | float | None = option(
        None, "Find how far each method goes within so much more perplexity: 5%."
    )


@dataclass(frozen=True, kw_only=True)
class CalibrationDraws(CalibrationTokens):
    """The calibration texts: every row is made for every draw of them, the first is the table's."""

    calibration: str | Sequence[str] | None = corpus(
        "Text to calibrate on", "c4", "wikitext2", f"{MIXED}May be repeated. "
    )
    samples: int | Sequence[int] = option(
        128, "Calibration windows; several, as in 1,16,128, for a row each.", listed=True
    )
    seed: int | Sequence[int] = option(
        0,
        "Seeds of the calibration windows; several for a row each.",
        "--seeds",
        "--seed",
        listed=True,
    )


@dataclass(frozen=True, kw_only=True)
class RecoveredRows:
    """Fine-tuned rows, which a comparison trains after they were pruned."""

    recover: Sequence[str] = option(
        (),
        "Fine-tune pruned rows, zeros kept, a row each: lora, masked, distill, blocks.",
        listed=True,
    )
    recover_steps: int = option(500, "Steps of that, of 8 windows.", least=1)
    recover_text: str | None = option(
        None, "Text for that: c4, wikitext2, demo, or files. Default: c4, demo for the demo."
    )


@dataclass(frozen=True, kw_only=True)
class TimedRows:
    """Timed rows, which run beside the dense model."""

    bench: Sequence[str] = option(
        (),
        "Runtimes in which to time the rows: eager,packed,packed-int8 … Default: none.",
        listed=True,
    )
    bench_dtype: str = option("bfloat16", "dtype of the timed models: bfloat16, float32.")


@dataclass(frozen=True, kw_only=True)
class Training(Devices):
    """How a pruned model is fine-tuned."""

    way: str = option(
        "lora",
        "lora, masked, distill, lora+distill, masked+distill (the same as distill) or blocks.",
        "--with",
    )
    steps: int = option(500, "Steps of the optimiser; of each block with blocks.", least=1)
    batch_size: int = option(8, "Windows of a forward pass, on each device.", least=1)
    accumulate: int = option(1, "Forward passes of a step.", least=1)
    rate: float | None = option(None, "The highest rate. Default: by the model's width.")
    rank: int = option(16, "The rank of adapters.", least=1)
    save_every: int = option(100, "Steps between checkpoints of the training.", least=1)
    gradient_checkpointing: bool = option(False, "Less memory for more time.")
    seed: int = option(0, "Seed of the text, its order and the adapters.")
    dtype: str = option(
        "auto",
        "What is multiplied: float32, bfloat16 (under autocast), auto: bfloat16 for what is "
        "stored in 16 bits where the device multiplies it. Weights are trained in float32.",
    )


@dataclass(frozen=True, kw_only=True)
class TrainingText(Text):
    """The training text of a pruned model."""

    text: str | None = corpus("Text to train on", "c4", "wikitext2")
    evaluation: str | None = option(
        None, "Text that will judge the result, and is not trained on: as for --text."
    )


@dataclass(frozen=True, kw_only=True)
class TimedRuns:
    """What is timed, and how often."""

    runtimes: Sequence[str] = option(
        ("eager", "packed"),
        "Runtimes, separated by commas; `secateur doctor` lists them.",
        "--runtime",
        "--runtimes",
        listed=True,
    )
    batch: Sequence[int] = option((1,), "Batch sizes, separated by commas.", listed=True)
    prompt: Sequence[int] = option(
        (128,), "Prompt lengths in tokens, separated by commas.", listed=True
    )
    new: int = option(32, "Tokens to decode.", least=1)
    rounds: int = option(8, "Rounds in which every model takes its turn.", least=3)
    dtype: str = option("bfloat16", "dtype of the models: bfloat16, float32.")


@dataclass(frozen=True, kw_only=True)
class Serving:
    """How a checkpoint will be run."""

    runtime: str = option(
        MISSING, "The runtime: eager, packed, semi-structured, tensorrt-llm …", "--for"
    )
    batch: int = option(1, "Rows of activations: the batch, in prefill times the tokens.", least=1)
    ranks: int = option(1, "Devices that share the model (tensorrt-llm).", least=1)


@dataclass(frozen=True, kw_only=True)
class Goal:
    """What a row of a comparison is chosen for."""

    goal: str = option(MISSING, "quality, latency, memory, portability.")
    max_perplexity_increase: float | str | None = option(
        None, "At most so much more than dense, such as 5%. Default 5%, for quality none."
    )
    hardware: str | None = option(
        None, "Timings count on this alone: cpu, apple, ampere, hopper, h100, rtx-3090 …"
    )
    runtime: str | None = option(None, "The runtime: eager, packed, llamacpp, vllm, tensorrt …")
