"""What may lie in a checkpoint folder that somebody else made: mutations of sound folders, by kind, drawn at random.

`KINDS` is the table: which sound folders a kind spoils, how, and which commands then read them. A mutation is a
function of a `Case` that changes files below it and says in a few words what it did. What the draw gives depends on
the seed and the case alone, so that every case can be made again. `fuzzing` runs the commands and judges them.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING

from support.quantised import NAMES
from support.spoilt_gguf import spoil_gguf
from support.spoilt_json import NASTY, spoilt, spoilt_names
from support.spoilt_onnx import spoil_onnx
from support.spoilt_quantised import spoil_parts, spoil_settings
from support.spoilt_shards import spoil_header, spoil_metadata
from support.spoilt_texts import spoil_text
from support.spoilt_tokenizers import spoil_tokenizer_settings, spoil_vocabulary
from support.truth import SOURCES

SINGLE, INDEX, RECORD = "model.safetensors", "model.safetensors.index.json", "pruning.json"
GGUF = "model.gguf"
CODE = "from pathlib import Path\nPath({marker!r}).write_text('the code ran')\nraise SystemExit(99)\n"


@dataclass(frozen=True)
class Case:
    """Where a case lies: the folder to spoil, one beside it that nobody may touch, the output; the draw, and which
    sound folder it was made from.
    """

    root: Path
    draw: Random
    base: str = ""

    @property
    def model(self) -> Path:
        return self.root / "model"

    @property
    def named(self) -> Path:
        """What a command is given: the folder, or the GGUF file in it."""
        file = self.model / GGUF
        return file if file.exists() else self.model

    @property
    def sentinel(self) -> Path:
        return self.root / "sentinel"

    @property
    def out(self) -> Path:
        return self.root / "out"


class Kind(NamedTuple):
    """One kind of mutation: `spoil(case)`, the sound folders it is tried on, the commands that read them, its share."""

    spoil: Callable[[Case], str]
    bases: tuple[str, ...]
    commands: tuple[str, ...]
    weight: float


def spoil_json_file(case: Case, file: Path) -> str:
    """Change one JSON file, in its tree or in its bytes."""
    data, what = spoilt(file.read_bytes(), case.draw)
    file.write_bytes(data)
    return f"{file.name}: {what}"


def header(case: Case) -> str:
    """Change the header or the data of a shard."""
    file = case.draw.choice(sorted(case.model.glob("*.safetensors")))
    return f"{file.name}: {spoil_header(file, case.draw)}"


def index(case: Case) -> str:
    """Change the index: its JSON, or the names of shards, and now and then put something else for a shard."""
    file, draw = case.model / INDEX, case.draw
    if draw.random() < 0.3:
        return spoil_json_file(case, file)
    held = json.loads(file.read_bytes())
    shard = draw.choice(sorted(case.model.glob("*.safetensors")))
    name = draw.choice([*held["weight_map"], "model.extra.weight", *spoilt_names(draw)])
    outside = [
        "../sentinel/outside.safetensors",
        str(case.sentinel / "outside.safetensors"),
        "./model-00001-of-00002.safetensors",
        "MODEL.SAFETENSORS",
        "a\nb.safetensors",
        "\x1b[31m.safetensors",
        "x" * 300 + ".safetensors",
        "a\x00b.safetensors",
        "\ud800.safetensors",
        "other.safetensors",
        *NASTY,
    ]
    what = draw.choice(["entry", "entry", "all", "missing", "shard"])
    if what == "entry":
        held["weight_map"][name] = draw.choice(outside)
    elif what == "all":
        held["weight_map"] = dict.fromkeys(held["weight_map"], draw.choice(outside))
    elif what == "missing":
        for gone in draw.sample(sorted(held["weight_map"]), draw.randint(1, len(held["weight_map"]))):
            del held["weight_map"][gone]
    else:
        what = put_instead(case, shard)
    file.write_text(json.dumps(held))
    return f"index: {what} {held['weight_map'].get(name)!r:.60}"


def put_instead(case: Case, file: Path) -> str:
    """Put something that is no plain file in the place of a file, or of one that is not there."""
    draw, outside = case.draw, case.sentinel / "outside.safetensors"
    what = draw.choice(
        ["gone", "folder", "pipe", "loop", "link out", "link to text", "dangling", "zero", "null", "socket", "sparse",
         "empty", "noise", "self link"]
    )  # fmt: skip
    kept = file.read_bytes() if file.is_file() and not file.is_symlink() else b""
    if file.is_dir() and not file.is_symlink():
        shutil.rmtree(file)
    file.unlink(missing_ok=True)
    if what == "folder":
        file.mkdir()
    elif what == "pipe":
        os.mkfifo(file)
    elif what == "loop":
        (case.model / "loop").symlink_to(file.name)
        file.symlink_to("loop")
    elif what == "self link":
        (case.sentinel / f"kept-{file.name}").write_bytes(kept)
        file.symlink_to(case.sentinel / f"kept-{file.name}")
    elif what in ("link out", "link to text", "dangling", "zero", "null"):
        text, nowhere = case.sentinel / "secret.txt", case.sentinel / "nowhere"
        goals = {"link out": outside, "link to text": text, "dangling": nowhere, "zero": "/dev/zero"}
        file.symlink_to(goals.get(what, "/dev/null"))
    elif what == "socket":
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(str(file))
    elif what == "sparse":
        with file.open("wb") as stream:
            stream.write(kept[:1000])
            stream.truncate(2 ** draw.choice([31, 36, 40]))
    elif what == "empty":
        file.touch()
    elif what == "noise":
        file.write_bytes(draw.randbytes(draw.choice([1, 8, 100, 10_000])))
    return f"{what} for {file.name}"


EXTRA = (
    "generation_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "merges.txt",
    "vocab.json", "tokenizer.model", "notes.txt", "pytorch_model.bin", "adapter_config.json", "processor_config.json",
    "preprocessor_config.json", "model.safetensors.index.json", "pruning.json", "tekken.json", "vocab.txt",
    "additional_chat_templates", "packed-model.safetensors", "packed.index.json", "chat_template.json", "own.py",
    "configuration_llama.py", "config.1.0.0.json", "a\nb.txt", "\x1b[31m.json", "tokenizer.1.0.0.json",
)  # fmt: skip


def files(case: Case) -> str:
    """Put something else for any file of the folder, also for those that libraries look for of their own accord."""
    name = case.draw.choice([*sorted(file.name for file in case.model.iterdir()), *EXTRA])
    return put_instead(case, case.model / name)


def extra_json(case: Case) -> str:
    """Add or change the small JSON files that transformers reads besides."""
    names = ("generation_config.json", "special_tokens_map.json", "added_tokens.json", "adapter_config.json")
    file = case.model / case.draw.choice(names)
    if not file.exists():
        file.write_text('{"bos_token_id": 1, "eos_token_id": [2, 3], "pad_token": "<pad>", "max_length": 20}')
    return spoil_json_file(case, file)


SIZES = (
    "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size", "max_position_embeddings", "n_layer", "n_embd", "n_head", "n_positions", "n_inner", "num_experts",
    "num_local_experts", "num_experts_per_tok", "sliding_window", "rms_norm_eps", "rope_theta", "pad_token_id",
    "bos_token_id", "eos_token_id", "initializer_range", "attention_dropout", "max_window_layers",
    "layer_norm_epsilon", "query_pre_attn_scalar", "chunk_size_feed_forward", "num_return_sequences",
)  # fmt: skip
SWITCHES: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("gelu", "swosh", "../x", 3), "dtype": ("float8_e4m3fn", "int8", "bool", "load", "os", "complex64"),
    "torch_dtype": ("float16", "nn", 1), "tie_word_embeddings": (True, "yes"), "is_decoder": (False,),
    "attn_implementation": ("flash_attention_2", "kernels-community/flash-attn", "sdpa", "eager", "x"),
    "_attn_implementation": ("kernels-community/flash-attn", "flex_attention", "paged|eager"),
    "_experts_implementation": ("x", "grouped_mm"), "layer_types": (["full_attention"] * 10**5, ["x"] * 4, "full"),
    "rope_parameters": ({"rope_type": "yarn", "factor": 0}, {"rope_type": "dynamic", "factor": 1e30},
                        {"rope_type": "longrope", "short_factor": [1.0], "long_factor": ["x"]}, {"rope_type": "<b>"}),
    "rope_scaling": ({"type": "linear", "factor": "8"}, {"rope_type": "llama3"}, 7),
    "auto_map": ({"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}, {"AutoConfig": "a/b--own.C"}, "x"),
    "quantization_config": ({"quant_method": "gptq"}, {"quant_method": 1}, [], {"load_in_4bit": True}, "x", {"a": {}}),
    "sparsity_config": ({"format": "sparse-bitmask"}, {"format": []}, "x"), "architectures": (["X"], [1], "x", [[]]),
    "pruned_heads": ({"0": [0]}, {"0": [10**9]}, {"x": 1}), "text_config": ({"model_type": "llama"}, {}, 1),
    "transformers_version": ("9", 1), "id2label": ({"x": 1}, {"0": "a"}), "num_labels": (10**9, -1, 2**40),
    "use_cache": (1,), "output_attentions": (True,), "output_hidden_states": (True,), "return_dict": (False,),
    "tokenizer_class": ("X", 1, "AutoTokenizer"), "vocab_file": ("../sentinel/secret.txt",),
    "pretraining_tp": (0, 2, 10**9), "attention_bias": (True, "x"), "mlp_bias": (True,),
    "add_cross_attention": (True,), "is_encoder_decoder": (True,), "num_hidden_layers": (10**9, 2**62, -1, 10**5),
    "gradient_checkpointing": (True,), "_name_or_path": ("../../sentinel",), "output_router_logits": (True, "x"),
}  # fmt: skip


def config(case: Case) -> str:
    """Change config.json: any value, a size, a switch, the family."""
    file, draw = case.model / "config.json", case.draw
    what = draw.choice(["tree", "size", "size", "size", "switch", "switch", "family", "pair"])
    if what == "tree":
        return spoil_json_file(case, file)
    held = json.loads(file.read_bytes())
    changes: dict[str, Any] = {}
    for _ in range(2 if what == "pair" else 1):
        if what == "family":
            changes["model_type"] = draw.choice([*sorted(CONFIG_MAPPING), "no-such", "<b>x</b>", "../llama"])
        elif what == "switch" or (what == "pair" and draw.random() < 0.5):
            name = draw.choice(sorted(SWITCHES))
            changes[name] = draw.choice(SWITCHES[name])
        else:
            name = draw.choice([name for name in SIZES if name in held] if draw.random() < 0.8 else SIZES)
            now = held.get(name)
            near = [now - 1, now + 1, now * 2, -now, now * 1000] if type(now) is int else []
            sizes = [0, -1, 1, 3, 10**5, 10**9, 2**31, 2**40, 2**62, 10**30, 0.5, 1e308, *near]
            changes[name] = draw.choice(sizes if draw.random() < 0.8 else NASTY)
    if "auto_map" in changes:
        (case.model / "own.py").write_text(CODE.format(marker=str(case.root / "mark")))
        changes["model_type"] = draw.choice(["llama", "own"])
    file.write_text(json.dumps({**held, **changes}))
    return f"config.json: {json.dumps(changes)[:160]}"


def tokenizer(case: Case) -> str:
    """Change the tokenizer: any value of its files, or its settings, vocabulary, merges, normalizers."""
    draw, file = case.draw, case.model / case.draw.choice(["tokenizer.json", "tokenizer_config.json"])
    if draw.random() < 0.6:
        return spoil_json_file(case, file)
    held = json.loads(file.read_bytes())
    if file.name == "tokenizer_config.json":
        what = spoil_tokenizer_settings(held, draw)
        if "auto_map" in what:
            (case.model / "own.py").write_text(CODE.format(marker=str(case.root / "mark")))
    else:
        what = spoil_vocabulary(held, draw)
    file.write_text(json.dumps(held))
    return f"{file.name}: {what}"


def record(case: Case) -> str:
    """Change pruning.json."""
    return spoil_json_file(case, case.model / RECORD)


def pruned_folder(case: Case) -> str:
    """Change any part of a pruned folder."""
    return case.draw.choice((record, record, header, config, tokenizer, files))(case)


def result_rows(case: Case) -> str:
    """Change a finished row of a comparison."""
    return spoil_json_file(case, case.draw.choice(sorted((case.out / "rows").glob("*.json"))))


def results(case: Case) -> str:
    """Change what a comparison has written; it lies in the model's folder, since the output is yet to come."""
    return spoil_json_file(case, case.model / "results.json")


def plan(case: Case) -> str:
    """Change a plan."""
    return spoil_json_file(case, case.root / "plan.json")


def packed(case: Case) -> str:
    """Change what a packed shard says of itself, or its tensors."""
    file = next(case.model.glob("packed-*.safetensors"))
    return f"{file.name}: {spoil_metadata(file, case.draw)}" if case.draw.random() < 0.5 else header(case)


def nested(case: Case) -> str:
    """Change the configuration of the text, or of a tower, of a model that sees."""
    file, draw = case.model / "config.json", case.draw
    held = json.loads(file.read_bytes())
    part = draw.choice(["text_config", "text_config", "text_config", "vision_config", "vision_config", ""])
    fields = held[part] if part else held
    name = draw.choice([*sorted(fields), *SIZES[:12], "model_type", "architectures", "quantization_config"])
    now = fields.get(name)
    near = [now - 1, now + 1, now * 2, -now, now * 1000] if type(now) is int else []
    sizes = [0, -1, 1, 3, 10**5, 10**9, 2**62, 10**30, 0.5, *near]
    families = ["llama", "gemma3_text", "siglip_vision_model", "gemma3", "t5", "no-such"]
    values = {"model_type": families, "architectures": [["Gemma3ForCausalLM"], ["LlamaForCausalLM"], [], [1]]}
    fields[name] = draw.choice(values.get(name) or [*sizes, *near, *NASTY])
    if draw.random() < 0.1:
        held[part or "text_config"] = draw.choice([{}, None, [], 7, "x", {"model_type": "llama"}])
    file.write_text(json.dumps(held))
    return f"config.json: {part}.{name} = {json.dumps(fields[name])[:80]}"


STRAYS = (
    "mtp.layers.0.q_proj.weight", "model.layers.99.mlp.up_proj.weight", "model.layers.4.mlp.up_proj.weight",
    "vision_tower.encoder.weight", "score.weight", "model.layers.0.self_attn.rotary_emb.inv_freq", "lm_head.bias",
    "model.layers.0.mlp.up_proj.weight_scale", "model.layers.0.mlp.up_proj.qweight", "module.a", "_orig_mod.b",
    "model.layers.-1.a", "model.layers.00.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.lora_A.weight", "x" * 999,
    "model.embed_tokens.weight.absmax", "eagle.fc.weight", "model.layers.1e3.a", "a.weight_packed", "a.scales",
)  # fmt: skip


def strays(case: Case) -> str:
    """Add tensors that the model has no use for."""
    draw, file = case.draw, case.model / SINGLE
    tensors, names = load_file(file), draw.sample(STRAYS, draw.randint(1, 3))
    for name in names:
        shape = draw.choice([(), (1,), (8, 8), (0,), (64, 64), (2, 3, 4)])
        dtype = draw.choice([torch.float32, torch.bfloat16, torch.int8, torch.uint32, torch.float8_e4m3fn, torch.bool])
        tensors[name] = torch.zeros(shape, dtype=dtype)
    save_file(tensors, file, {"format": "pt"})
    return f"{file.name}: with {', '.join(name[:40] for name in names)}"


def texts(case: Case) -> str:
    """Write a text of the case's own, which the command reads."""
    return spoil_text(case.root, case.draw)


HUB = "hub.json"
"""The file of a case whose folder is served by a hub, with what that hub does."""


def hub(case: Case) -> str:
    """Let a hub give out the folder, or refuse it; now and then with something spoilt in it."""
    draw = case.draw
    manner = draw.choice(["", "", "", "gated", "missing", "private", "limited", "down", "disabled", "cut"])
    (case.root / HUB).write_text(json.dumps(manner))
    what = draw.choice(["nothing", "nothing", "config", "header", "without", "without"])
    if what == "config":
        what = config(case)
    elif what == "header":
        what = header(case)
    elif what == "without":
        file = draw.choice(sorted(case.model.iterdir()))
        file.unlink()
        (case.model / draw.choice(["a.gguf", "pytorch_model.bin", "adapter_config.json", "x.h5"])).write_text("{}")
        what = f"without {file.name}"
    return f"a hub, {manner or 'polite'}; {what}"


def quantisation(case: Case) -> str:
    """Change what a quantised folder says of its weights."""
    return spoil_settings(case.model / "config.json", case.draw)


def parts(case: Case) -> str:
    """Change the parts of packed weights, or the header of the shard they lie in."""
    file = case.model / SINGLE
    return spoil_parts(file, case.draw) if case.draw.random() < 0.8 else spoil_header(file, case.draw)


def quantised(case: Case) -> str:
    """Change any other part of a quantised folder."""
    return case.draw.choice((config, tokenizer, files, strays, extra_json))(case)


def gguf(case: Case) -> str:
    """Change a GGUF file, or now and then what lies beside it."""
    file = case.model / GGUF
    return put_instead(case, file) if case.draw.random() < 0.03 else spoil_gguf(file, case.draw)


def onnx(case: Case) -> str:
    """Change an ONNX graph or the numbers beside it."""
    return spoil_onnx(case.model, case.draw)


READERS = ("inspect", "inspect --json", "validate packed", "validate tensorrt-llm", "open")
WRITERS = ("prune", "prune magnitude", "evaluate", "export packed", "export sparse-bitmask")
DENSE = ("llama", "sharded", "pruned")
FAMILIES = ("llama", "gpt2", "mixtral", "gemma3_text")
PACKED = (*(SOURCES + name for name in (*NAMES, "fp8", "mxfp4")),)
FILES = (*(SOURCES + name for name in ("gguf-bf16", "gguf-q8", "gguf-q4", "gguf-qwen3")),)
READ = ("read", "read", "read", "inspect", "inspect --json", "inspect --json", "validate packed")
WRITE = ("prune", "prune magnitude", "prune magnitude", "evaluate", "export dense", "export gguf", "plain")
VALUES = ("export compressed-tensors", "export packed", "export gguf", "inspect --json", "recover blocks", "prune")
PACKED_FORMATS = ("packed", "packed-int8", "packed-int4", "packed-int3")
KINDS: dict[str, Kind] = {
    "header": Kind(header, DENSE, (*READERS, *READERS, *WRITERS), 20),
    "index": Kind(index, ("sharded",), (*READERS, "prune", "export sparse-bitmask"), 12),
    "files": Kind(files, ("llama", "sharded", "pruned"), (*READERS, *WRITERS), 12),
    "extra": Kind(extra_json, ("llama",), ("prune magnitude", "evaluate"), 3),
    "config": Kind(config, FAMILIES, (*READERS, *READERS, *WRITERS, "export gguf", "export tensorrt-llm"), 22),
    "tokenizer": Kind(tokenizer, ("llama",), ("prune magnitude", "evaluate", "export gguf"), 9),
    "nested": Kind(nested, ("gemma3",), (*READERS, *READERS, *WRITERS, "shrink", "export gguf"), 12),
    "strays": Kind(strays, ("llama", "pruned"), (*READERS, *WRITERS, "shrink"), 6),
    "texts": Kind(texts, ("llama",), ("prune magnitude", "prune", "evaluate"), 8),
    "hub": Kind(hub, DENSE, ("inspect --json", "validate packed", "prune magnitude", "evaluate", "export packed"), 5),
    "record": Kind(record, ("pruned",), (*READERS[:4], "export packed", "export sparse-24-bitmask"), 8),
    "recover": Kind(pruned_folder, ("pruned",), ("recover masked", "recover blocks", "recover lora"), 4),
    "rows": Kind(result_rows, ("compared",), ("compare",), 4),
    "results": Kind(results, ("results",), ("report", "recommend quality", "recommend portability"), 4),
    "plan": Kind(plan, ("llama",), ("prune plan",), 4),
    "packed": Kind(packed, PACKED_FORMATS, ("export dense", "load packed", "inspect"), 8),
    "quantisation": Kind(quantisation, PACKED, (*READ, *WRITE), 20),
    "parts": Kind(parts, PACKED, (*READ, *WRITE), 30),
    "quantised": Kind(quantised, PACKED, (*READ, *WRITE, "export packed"), 10),
    "gguf": Kind(gguf, FILES, (*READ, *WRITE, "export packed"), 25),
    "onnx": Kind(onnx, ("onnx",), ("inspect", "inspect --json"), 8),
    "values": Kind(pruned_folder, ("values",), VALUES, 8),
    "smaller": Kind(header, ("pruned",), ("shrink",), 0.3),
    "bitmask": Kind(header, ("sparse-bitmask", "sparse-24-bitmask"), ("export dense", "inspect --json"), 6),
}  # fmt: skip
