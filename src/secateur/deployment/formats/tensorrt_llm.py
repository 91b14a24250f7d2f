"""A TensorRT-LLM checkpoint: what `trtllm-build` of TensorRT-LLM up to 1.2.1 turns into an engine.

`trtllm-build --weight_sparsity` sets one flag, `SPARSE_WEIGHTS`, and checks nothing. TensorRT then
looks at every matrix that is a constant of the network, times sparse against dense where it is 2:4
along its inputs, and takes the faster. So all that can be done without a GPU is done here: every
rank's part of every pruned matrix must be 2:4, free of -0.0 and of NaN, or nothing is written;
`eligible` says which layers may get a sparse kernel, the log of the build which got one
(`sparsity_support.parse_build_log`). Nothing in the files says that they are sparse: their loader
has no such word.

Names and order are those of TensorRT-LLM's own converters: q, k and v are one matrix, `mlp.fc` is
the gate and `mlp.gate` the up projection. Only models that this is true of are written
(`ARCHITECTURES`). A sliding window is not part of such a checkpoint: there it is an option of the
runtime, `--max_attention_window_size`.

The header of a file needs only shapes, so it is written first and the tensors follow one by one:
never more than one of them, and what it is put together from, is in memory.
"""

from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from secateur.checkpoints.folder import INDEX, Checkpoint
from secateur.checkpoints.shards import header
from secateur.deployment.formats.base import Format, head_size
from secateur.errors import BadCheckpoint, BadPattern, NonFinite, SecateurError, UnsupportedModel
from secateur.methods.patterns import TWO_OF_FOUR
from secateur.models.load import load_config
from secateur.models.parts import architecture_of
from secateur.system.json_files import write_json
from secateur.system.tensors import count_zeros

ARCHITECTURES = {"LlamaForCausalLM": False, "MistralForCausalLM": False, "Qwen2ForCausalLM": True}
"""The models that can be written, and whether their q, k and v have biases."""

HF_CONFIG = "hf_config.json"
"""Where the config.json of the source goes: TensorRT-LLM's own has that name."""

PRUNED = 0.01
"""The share of zeros from which on a matrix counts as pruned: dense models have a few, too."""

NOT_FINITE, NEGATIVE_ZERO = "holds NaN or Inf", "holds zeros that are -0.0"
NOT_TWO_OF_FOUR = "is not 2:4 along its inputs"
FAULTS: dict[str, tuple[type[SecateurError], str]] = {
    NOT_FINITE: (NonFinite, "Prune it again from a sound model."),
    NOT_TWO_OF_FOUR: (
        BadPattern,
        "TensorRT would ignore its zeros: prune it with --pattern 2:4, "
        "or serve the Hugging Face folder.",
    ),
    NEGATIVE_ZERO: (
        BadCheckpoint,
        "Not every kernel takes those for zero: add 0 to the matrix and save it again.",
    ),
}
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
ROPES = ("linear", "dynamic", "llama3")
OUT_MULTIPLE, IN_MULTIPLE = 16, 32
"""The alignments that every tool of NVIDIA is content with; TensorRT does not publish its own."""


class Part(NamedTuple):
    """A tensor there, those here that it is made of, and the axis that ranks share (None: not)."""

    name: str
    sources: tuple[str, ...]
    axis: int | None


QKV = tuple(f"self_attn.{letter}_proj" for letter in "qkv")
LAYER = (
    Part("input_layernorm.weight", ("input_layernorm.weight",), None),
    Part("attention.qkv.weight", tuple(f"{name}.weight" for name in QKV), 0),
    Part("attention.qkv.bias", tuple(f"{name}.bias" for name in QKV), 0),
    Part("attention.dense.weight", ("self_attn.o_proj.weight",), 1),
    Part("post_layernorm.weight", ("post_attention_layernorm.weight",), None),
    Part("mlp.fc.weight", ("mlp.gate_proj.weight",), 0),
    Part("mlp.gate.weight", ("mlp.up_proj.weight",), 0),
    Part("mlp.proj.weight", ("mlp.down_proj.weight",), 1),
)


@dataclass(frozen=True)
class Layer:
    """One product of an engine on one rank: may TensorRT take a sparse kernel, and why not?

    `matrices` are those of the checkpoint that it is made of, `shape` is `[out, in]` of the rank's
    part.
    """

    rank: int
    name: str
    matrices: tuple[str, ...]
    shape: tuple[int, int]
    eligible: bool
    reason: str


def write(source: Checkpoint, folder: Path, *, ranks: int = 1) -> None:
    """Write config.json and one rank{r}.safetensors a rank into `folder`.

    The source's config.json is kept beside them. Raises UnsupportedModel for a model that
    TensorRT-LLM does not read in this way or that cannot be split over so many ranks; BadPattern
    for a matrix that has zeros but is not 2:4 along its inputs on every rank; BadCheckpoint for
    -0.0 in such a matrix, or for tensors that are missing or of several dtypes; NonFinite for NaN
    or Inf.
    """
    config = _config(source, ranks)
    parts = _parts(source, config)
    _rank_files(source, folder, parts, ranks)
    (folder / INDEX).unlink(missing_ok=True)
    (folder / "config.json").replace(folder / HF_CONFIG)
    write_json(folder / "config.json", _their_config(source, config, parts, ranks), 2)


def _config(source: Checkpoint, ranks: int) -> Any:
    """The model's configuration, checked. Raises UnsupportedModel."""
    config = load_config(source.folder)
    name = architecture_of(config)
    if name not in ARCHITECTURES:
        raise UnsupportedModel(
            f"{source.folder} is a {name}; a TensorRT-LLM checkpoint can be written of "
            f"{', '.join(ARCHITECTURES)}. Serve it from the Hugging Face folder."
        )
    counts = {
        "attention heads": config.num_attention_heads,
        "key-value heads": config.num_key_value_heads,
        "channels between up and down": config.intermediate_size,
        "tokens in the vocabulary": config.vocab_size,
    }
    for what, count in counts.items():
        if ranks < 1 or count % ranks:
            raise UnsupportedModel(
                f"{source.folder} has {count} {what}, which {ranks} ranks cannot share evenly. "
                "Choose a --ranks that divides it."
            )
    rope = config.rope_parameters.get("rope_type")  # none where layers differ
    rope = rope if config.rope_parameters.get("partial_rotary_factor", 1) == 1 else "partial"
    if rope not in ("default", *ROPES):
        raise UnsupportedModel(
            f"{source.folder} has rotary embeddings of type {rope!r}; "
            f"default, {', '.join(ROPES)} were wanted."
        )
    return config


def _parts(source: Checkpoint, config: Any) -> list[Part]:
    """All tensors of the checkpoint in order. Raises UnsupportedModel, BadCheckpoint."""
    parts = [Part("transformer.vocab_embedding.weight", ("model.embed_tokens.weight",), 0)]
    biases = ARCHITECTURES[architecture_of(config)]
    for index in range(config.num_hidden_layers):
        for part in LAYER:
            if biases or not part.name.endswith(".bias"):
                sources = tuple(f"model.layers.{index}.{name}" for name in part.sources)
                parts.append(Part(f"transformer.layers.{index}.{part.name}", sources, part.axis))
    parts.append(Part("transformer.ln_f.weight", ("model.norm.weight",), None))
    if not config.tie_word_embeddings:  # a tied head is the embedding, for the loader as well
        parts.append(Part("lm_head.weight", ("lm_head.weight",), 0))
    wanted = {name for part in parts for name in part.sources}
    if missing := sorted(wanted - source.places.keys()):
        raise BadCheckpoint(
            f"{source.folder} has no tensor {missing[0]}, which its config.json asks for."
        )
    ignored = {"lm_head.weight"} if config.tie_word_embeddings else set()
    for name in sorted(source.places.keys() - wanted - ignored):
        if not name.endswith("rotary_emb.inv_freq"):  # computed again; old checkpoints hold it
            raise UnsupportedModel(
                f"{source.folder} holds {name}, which TensorRT-LLM has no place for."
            )
    dtypes = sorted({source.places[name].dtype for name in wanted})
    if len(dtypes) > 1 or dtypes[0] not in DTYPES:
        raise BadCheckpoint(
            f"{source.folder} holds tensors of {', '.join(dtypes)}; "
            f"one dtype of {', '.join(DTYPES)} was wanted. Cast the model first."
        )
    return parts


def _their_config(source: Checkpoint, config: Any, parts: list[Part], ranks: int) -> dict[str, Any]:
    """TensorRT-LLM's config.json."""
    rope = dict(config.rope_parameters)
    base, kind = rope.pop("rope_theta"), rope["rope_type"]
    name = architecture_of(config)
    theirs = {
        "producer": {"name": "secateur"},
        "architecture": name,
        "dtype": DTYPES[source.places[parts[0].sources[0]].dtype],
        "logits_dtype": "float32",
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "head_size": head_size(config),
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "hidden_act": config.hidden_act,
        "norm_epsilon": config.rms_norm_eps,
        "position_embedding_type": "rope_gpt_neox",
        "rotary_base": base,
        "rotary_scaling": None if kind == "default" else {**rope, "type": kind},
        "use_parallel_embedding": True,
        "embedding_sharding_dim": 0,
        "share_embedding_table": bool(config.tie_word_embeddings),
        "tie_word_embeddings": bool(config.tie_word_embeddings),
        "attn_bias": ARCHITECTURES[name],
        "mlp_bias": False,
        "mapping": {"world_size": ranks, "tp_size": ranks, "pp_size": 1},
        "quantization": {"quant_algo": None, "kv_cache_quant_algo": None},
    }
    return theirs | ({"qwen_type": "qwen2"} if name == "Qwen2ForCausalLM" else {})


def _rank_files(source: Checkpoint, folder: Path, parts: list[Part], ranks: int) -> None:
    """Write the tensors of every rank, the header of a file first."""
    dtype = source.places[parts[0].sources[0]].dtype
    shapes = {part.name: (dtype, _shape(source, part, ranks)) for part in parts}
    for rank in range(ranks):
        file = folder / f"rank{rank}.safetensors"
        first, places = header(file.name, shapes)
        with file.open("wb") as stream:
            stream.write(first)
            for part in parts:
                pieces = _pieces(source, part, rank, ranks)
                for name, piece in pieces.items():
                    _refuse(
                        name.removesuffix(".weight"), piece, rank, block=".layers." in part.name
                    )
                tensor = torch.cat(list(pieces.values()))
                assert tensor.shape == places[part.name].shape, f"{part.name} is {tensor.shape}"
                stream.write(tensor.flatten().view(torch.uint8).numpy().data)


def _shape(source: Checkpoint, part: Part, ranks: int) -> tuple[int, ...]:
    shapes = [source.places[name].shape for name in part.sources]
    shape = [sum(shape[0] for shape in shapes), *shapes[0][1:]]
    if part.axis is not None:
        shape[part.axis] //= ranks
    return tuple(shape)


def _pieces(source: Checkpoint, part: Part, rank: int, ranks: int) -> dict[str, Tensor]:
    """What a rank holds of the tensors that a part is made of, by their name in the source."""
    tensors = {name: source.tensor(name) for name in part.sources}
    if part.axis is None:
        return tensors
    return {name: tensor.chunk(ranks, part.axis)[rank] for name, tensor in tensors.items()}


def fault(weight: Tensor) -> str | None:
    """Why no sparse kernel takes a matrix `[out, in]`, one of `FAULTS`; None where one may."""
    if not weight.isfinite().all():
        return NOT_FINITE
    if not TWO_OF_FOUR.holds(weight):
        return NOT_TWO_OF_FOUR
    return NEGATIVE_ZERO if ((weight == 0) & weight.signbit()).any() else None


def _refuse(name: str, weight: Tensor, rank: int, *, block: bool) -> None:
    """Raise what `FAULTS` says of a rank's part; outside of pruned matrices for NaN, Inf alone."""
    pruned = block and weight.dim() == 2 and count_zeros(weight) >= PRUNED * weight.numel()
    trouble = fault(weight) if pruned else None if weight.isfinite().all() else NOT_FINITE
    if trouble:
        error, advice = FAULTS[trouble]
        raise error(f"{name}, in the part {list(weight.shape)} of rank {rank}, {trouble}. {advice}")


def eligible(source: Checkpoint, *, ranks: int = 1) -> list[Layer]:
    """For every rank and product of the blocks, whether TensorRT may take a sparse kernel. Raises
    as `write` does for a model that cannot be written; what a single matrix lacks is a `reason`.
    """
    layers = []
    for rank, part in product(range(ranks), _parts(source, _config(source, ranks))):
        name = part.name.removesuffix(".weight")
        if part.axis is None or name == part.name or ".layers." not in name:
            continue
        shares = _pieces(source, part, rank, ranks).items()
        pieces = {name.removesuffix(".weight"): share for name, share in shares}
        rows, columns = _shape(source, part, ranks)
        reasons = _objections(pieces, rows, columns, ranks if part.axis == 1 else 1)
        reason = "; ".join(reasons)
        layers.append(Layer(rank, name, tuple(pieces), (rows, columns), not reasons, reason))
    return layers


def _objections(pieces: dict[str, Tensor], rows: int, columns: int, ranks: int) -> list[str]:
    """Why TensorRT takes no sparse kernel for a product; empty where it may."""
    reasons = []
    dtype = next(iter(pieces.values())).dtype
    if dtype not in (torch.float16, torch.bfloat16):
        reasons.append(
            f"{str(dtype).removeprefix('torch.')}: float16 or bfloat16 was wanted "
            "(int8, fp8 are not written)"
        )
    if rows % OUT_MULTIPLE:
        reasons.append(f"{rows} outputs a rank are no multiple of {OUT_MULTIPLE}")
    if columns % 4:
        reasons.append(f"{columns * ranks} inputs on {ranks} ranks are no groups of 4 on each")
    elif columns % IN_MULTIPLE:
        reasons.append(f"{columns} inputs a rank are no multiple of {IN_MULTIPLE}")
    return reasons + [f"{name} {what}" for name, piece in pieces.items() if (what := fault(piece))]


tensorrt_llm = Format(
    write=write,
    loaded_by="TensorRT-LLM up to 1.2.1 (trtllm-build); "
    "1.3 has no engine backend any more, only dense products",
    options=frozenset({"ranks"}),
    packages=("tensorrt-llm",),
)
