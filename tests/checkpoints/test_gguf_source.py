"""GGUF as a source: against the model that was written, `gguf`'s own dequantisation put in order row by row, and
transformers' loading of the whole file."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from weakref import ref

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.families import tiny_config, tiny_model
from support.splits import TEXTS, splitting
from support.spoilt_gguf import Gguf, Setting, assemble, parse
from support.texts import byte_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import secateur
from secateur.checkpoints.folder import open_checkpoint
from secateur.checkpoints.quantised import formats
from secateur.checkpoints.quantised.gguf import _opened, gguf_source
from secateur.checkpoints.quantised.gguf_tokenizer import SPLITS
from secateur.checkpoints.quantised.unpack import write_plain
from secateur.data import demo
from secateur.deployment.formats.gguf import FILE, write
from secateur.deployment.inspect import Against
from secateur.errors import BadCheckpoint, SecateurError, UnsupportedModel
from secateur.models.load import load, resolve
from secateur.system.json_files import read_json, write_json
from secateur.system.progress import Progress

package = pytest.importorskip("gguf", reason="the package gguf is not installed")
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip


def saved(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    tokenizer: Any = byte_tokenizer()
    tokenizer.save_pretrained(folder)
    stored = read_json(folder / "tokenizer.json")
    stored["model"] |= {"unk_token": None, "merges": [["t", "h"]]}  # a vocabulary of real files has merges
    stored["model"]["vocab"]["th"] = len(stored["model"]["vocab"])
    write_json(folder / "tokenizer.json", stored)
    return folder


def converted(folder: Path, out: Path, values: str = "as stored") -> Path:
    out.mkdir(exist_ok=True)
    write(open_checkpoint(folder), out, values=values)
    return out / FILE


def plain(file: Path, folder: Path, dtype: str = "float32") -> Path:
    """A GGUF file written as a plain checkpoint."""
    folder.mkdir()
    write_plain(gguf_source(file), folder, dtype, Progress())
    return folder


Edit = Callable[[str, np.ndarray], list[tuple[str, np.ndarray, Any]]]


def as_stored(name: str, value: np.ndarray) -> list[tuple[str, np.ndarray, Any]]:
    return [(name, value, None)]


def rewritten(file: Path, out: Path, edit: Edit = as_stored, settings: Mapping[str, Any] | None = None) -> Path:
    """The file again, each tensor as `edit` gives it (name, data, type), with other settings."""
    settings = settings or {}
    reader = package.GGUFReader(file)
    writer = package.GGUFWriter(out, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in settings or name == "general.architecture":
            continue
        kind, *inner = field.types
        writer.add_key_value(name, field.contents(), kind, sub_type=inner[-1] if inner else None)
    for name, value in settings.items():
        if isinstance(value, str):
            writer.add_string(name, value)
        else:
            (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(name, value)
    for tensor in reader.tensors:
        shape = tuple(int(size) for size in tensor.shape[::-1])
        value = package.dequantize(tensor.data, tensor.tensor_type).reshape(shape)
        for name, data, kind in edit(tensor.name, value):
            writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_what_was_written_is_read_again(family, tmp_path):
    model: Any = tiny_model(family)
    file = converted(saved(model, tmp_path / "source"), tmp_path / "gguf", "f32")
    folder = plain(file, tmp_path / "plain")
    checkpoint, stored = open_checkpoint(folder), model.state_dict()
    assert checkpoint.places.keys() == stored.keys()
    for name, tensor in stored.items():
        assert torch.equal(checkpoint.tensor(name), tensor), name
    again: Any = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.arange(8)[None]  # no longer than Mistral's window here
    assert torch.equal(again(ids).logits, model(ids).logits)
    if family != "qwen3":  # of which transformers does not read the size of a head
        whole = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=FILE, dtype=torch.float32)
        for name, tensor in whole.state_dict().items():
            assert torch.equal(tensor, again.get_parameter(name)), name
    assert "_name_or_path" not in (folder / "config.json").read_text()


def test_bfloat16_is_read_as_it_was(tmp_path):
    model = tiny_model("llama").bfloat16()
    folder = plain(converted(saved(model, tmp_path / "source"), tmp_path / "gguf"), tmp_path / "plain", "bfloat16")
    checkpoint = open_checkpoint(folder)
    for name, tensor in model.state_dict().items():
        assert torch.equal(checkpoint.tensor(name).to(tensor.dtype), tensor), name


def blocks(kind: Any, rows: int, columns: int) -> np.ndarray:
    """Rows of a quantised tensor: quantised by `gguf` where it can, else bytes drawn at random, scales among them."""
    draw = np.random.default_rng(int(kind))
    try:
        return package.quantize(draw.standard_normal((rows, columns)).astype(np.float32), kind)
    except NotImplementedError:
        length, size = package.GGML_QUANT_SIZES[kind]
        return draw.integers(0, 256, (rows, columns // length * size), np.uint8)


FLOATS = {"F32", "F16", "F64", "BF16", "I8", "I16", "I32", "I64"}
NOT_DEQUANTISED = {"Q8_1", "Q8_K"}  # of activations, in no file
LATER = {"Q1_0"}  # which gguf 0.19 names and does not dequantise
TYPES = [kind for kind in package.GGMLQuantizationType if kind.name not in FLOATS | NOT_DEQUANTISED]


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
def test_every_type_is_what_gguf_says(kind, tmp_path):
    config: Any = tiny_config("llama")
    config.hidden_size, config.head_dim, config.num_hidden_layers = 256, 64, 1
    model: Any = AutoModelForCausalLM.from_config(config)
    file = converted(saved(model, tmp_path / "source"), tmp_path / "gguf", "f32")
    raw: dict[str, np.ndarray] = {}

    def edit(name: str, value: np.ndarray) -> list[tuple[str, np.ndarray, Any]]:
        if not name.startswith(("blk.0.attn_q", "blk.0.ffn_gate", "token_embd")):
            return [(name, value, None)]
        raw[name] = blocks(kind, *value.shape)
        return [(name, raw[name], kind)]

    quantised = rewritten(file, tmp_path / "quantised.gguf", edit)
    if kind.name in LATER:
        with pytest.raises(UnsupportedModel, match=rf"in {kind.name}, which the package gguf cannot dequantise"):
            gguf_source(quantised)
        return
    source = gguf_source(quantised)
    assert kind.name in source.format
    read = {tensor.name: tensor for tensor in source.tensors}
    with np.errstate(all="ignore"):  # scales drawn at random are infinite at times
        dense = {name: package.dequantize(data, kind) for name, data in raw.items()}
    gate = read["model.layers.0.mlp.gate_proj.weight"]
    np.testing.assert_array_equal(gate.read().numpy(), dense["blk.0.ffn_gate.weight"])
    assert (gate.stored, gate.stored_bytes) == (kind.name, raw["blk.0.ffn_gate.weight"].nbytes)
    np.testing.assert_array_equal(read["model.embed_tokens.weight"].read().numpy(), dense["token_embd.weight"])
    query, heads = read["model.layers.0.self_attn.q_proj.weight"].read().numpy(), config.num_attention_heads
    for row in range(len(query)):  # row 2 i of a head was row i of its first half, 2 i + 1 row i of the second
        head, place = divmod(row, len(query) // heads)
        half, i = divmod(place, len(query) // heads // 2)
        np.testing.assert_array_equal(
            query[row], dense["blk.0.attn_q.weight"][head * len(query) // heads + 2 * i + half]
        )


def test_experts_are_taken_apart(tmp_path):
    """A mixture, written by hand as llama.cpp has it: the experts of a block in one tensor for each matrix."""
    model: Any = tiny_model("qwen3_moe")
    model.save_pretrained(tmp_path / "source")
    source, config = open_checkpoint(tmp_path / "source"), model.config
    writer = package.GGUFWriter(tmp_path / "moe.gguf", "qwen3moe")
    for key, value in {
        "block_count": config.num_hidden_layers, "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size, "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads, "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": 16, "attention.value_length": 16,
        "expert_count": config.num_experts, "expert_used_count": config.num_experts_per_tok,
        "expert_feed_forward_length": config.moe_intermediate_size, "vocab_size": config.vocab_size,
    }.items():  # fmt: skip
        writer.add_uint32(f"qwen3moe.{key}", value)
    writer.add_float32("qwen3moe.attention.layer_norm_rms_epsilon", config.rms_norm_eps)
    writer.add_float32("qwen3moe.rope.freq_base", config.rope_parameters["rope_theta"])
    names = package.get_tensor_name_map(package.MODEL_ARCH.QWEN3MOE, config.num_hidden_layers)
    for name in source.places:
        if ".experts." not in name:
            called = names.get_name(name, try_suffixes=(".weight", ".bias"))
            writer.add_tensor(called, source.tensor(name).numpy())
    for block in range(config.num_hidden_layers):
        for matrix in ("gate", "up", "down"):
            each = [
                source.tensor(f"model.layers.{block}.mlp.experts.{expert}.{matrix}_proj.weight").numpy()
                for expert in range(config.num_experts)
            ]
            writer.add_tensor(f"blk.{block}.ffn_{matrix}_exps.weight", np.stack(each))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    read = gguf_source(tmp_path / "moe.gguf")
    assert {tensor.name: tensor.shape for tensor in read.tensors} == source.shapes
    for tensor in read.tensors:
        assert torch.equal(tensor.read(), source.tensor(tensor.name)), tensor.name
    assert read.config["moe_intermediate_size"] == config.moe_intermediate_size
    assert read.config["norm_topk_prob"] is True


@pytest.mark.parametrize(("rules", "ignore_merges"), SPLITS)
def test_text_is_split_as_it_was(rules, ignore_merges, tmp_path):
    config: Any = tiny_config("llama")
    config.vocab_size = 600
    model: Any = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "source")
    made = PreTrainedTokenizerFast(tokenizer_object=splitting(rules, ignore_merges), bos_token="<s>", eos_token="</s>")
    made.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    made.save_pretrained(tmp_path / "source")
    folder = plain(converted(tmp_path / "source", tmp_path / "gguf"), tmp_path / "plain")
    again = AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        assert again(text).input_ids == made(text).input_ids, text
    assert again.chat_template == made.chat_template
    assert again.eos_token_id == made.eos_token_id


def test_the_demo_and_a_sentencepiece_vocabulary(shared_data, tmp_path):
    for name, folder in (("demo", demo.model_folder()), ("stories", shared_data / "models" / "stories260K")):
        again = AutoTokenizer.from_pretrained(plain(converted(folder, tmp_path / name), tmp_path / f"{name}-plain"))
        before = AutoTokenizer.from_pretrained(folder)
        for text in TEXTS:
            assert again(text).input_ids == before(text).input_ids, (name, text)


def test_scaled_rotation_is_read(tmp_path):
    linear = {"rope_type": "linear", "factor": 4.0}
    for number, rope in enumerate((linear, LLAMA3)):
        config: Any = tiny_config("llama")
        config.rope_parameters = {"rope_theta": 10000.0, **rope}
        model: Any = AutoModelForCausalLM.from_config(config)
        file = converted(saved(model, tmp_path / f"{number}"), tmp_path / f"{number}g", "f32")
        again: Any = AutoModelForCausalLM.from_pretrained(plain(file, tmp_path / f"{number}p"))
        ids = torch.arange(100)[None]
        assert torch.equal(again(ids).logits, model(ids).logits)
    ids, file = torch.arange(100)[None], tmp_path / "0g" / FILE
    yarn = rewritten(
        file, tmp_path / "yarn.gguf",
        settings={"llama.rope.scaling.type": "yarn", "llama.rope.scaling.original_context_length": 32},
    )  # fmt: skip
    rope = gguf_source(yarn).config["rope_parameters"]
    assert rope == {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 10000.0,
    }  # fmt: skip


@pytest.fixture
def file(tmp_path):
    return converted(saved(tiny_model("llama"), tmp_path / "source"), tmp_path / "gguf")


def test_settings_that_nobody_reads_are_refused(file, tmp_path):
    odd = rewritten(file, tmp_path / "odd.gguf", settings={"llama.logit_scale": 0.5})
    with pytest.raises(UnsupportedModel, match=r"sets llama\.logit_scale = 0\.5, which is not known of llama"):
        gguf_source(odd)
    odd = rewritten(
        file, tmp_path / "rope.gguf", settings={"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 4.0}
    )
    with pytest.raises(UnsupportedModel, match="scales its rotation as 'longrope'"):
        gguf_source(odd)
    odd = rewritten(file, tmp_path / "pre.gguf", settings={"tokenizer.ggml.pre": "xyzzy"})
    with pytest.raises(UnsupportedModel, match=r"splits text by the rule 'xyzzy', which is not known here"):
        gguf_source(odd)
    odd = rewritten(file, tmp_path / "arch.gguf", lambda name, value: [(name, value, None)])
    data = odd.read_bytes().replace(b"llama", b"llamb")
    odd.write_bytes(data)
    with pytest.raises(UnsupportedModel, match=r"of the architecture 'llamb', which is not read from GGUF here"):
        gguf_source(odd)


def test_a_rotation_of_a_part_of_a_head_is_refused(tmp_path):
    """Of Llama transformers takes the rotated width for the size of a head; of the others it drops it."""
    file = converted(saved(tiny_model("qwen2"), tmp_path / "source"), tmp_path / "gguf")
    odd = rewritten(file, tmp_path / "part.gguf", settings={"qwen2.rope.dimension_count": 8})
    with pytest.raises(UnsupportedModel, match="rotates 8 of the 16 numbers of a head: it would run as another model"):
        gguf_source(odd)


def test_tensors_that_are_missing_or_left_over_are_refused(file, tmp_path):
    def without(name: str, value: np.ndarray) -> list[tuple[str, np.ndarray, Any]]:
        return [] if name == "blk.1.ffn_up.weight" else [(name, value, None)]

    with pytest.raises(UnsupportedModel, match=r"lacks model\.layers\.1\.mlp\.up_proj\.weight \(1 tensors in all\)"):
        gguf_source(rewritten(file, tmp_path / "less.gguf", without))

    def more(name: str, value: np.ndarray) -> list[tuple[str, np.ndarray, Any]]:
        extra = [("blk.1.ffn_odd.weight", value, None)] if name == "blk.1.ffn_up.weight" else []
        return [(name, value, None), *extra]

    with pytest.raises(UnsupportedModel, match=r"blk\.1\.ffn_odd\.weight in .* has no place in LlamaForCausalLM"):
        gguf_source(rewritten(file, tmp_path / "more.gguf", more))


def test_files_that_hold_no_whole_model_are_named(file, tmp_path):
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(file.read_bytes()[:3000])
    with pytest.raises(BadCheckpoint, match="is no sound GGUF file"):
        gguf_source(cut)
    cut.write_bytes(b"no GGUF at all")
    with pytest.raises(BadCheckpoint, match="is no sound GGUF file"):
        gguf_source(cut)
    part = rewritten(file, tmp_path / "part.gguf", settings={"split.count": 3})
    with pytest.raises(BadCheckpoint, match=r"is one of 3 parts\. Join them first: llama-gguf-split --merge"):
        gguf_source(part)
    adapter = rewritten(file, tmp_path / "adapter.gguf", settings={"general.type": "adapter"})
    with pytest.raises(BadCheckpoint, match=r"holds adapter \(llama\), no language model"):
        gguf_source(adapter)


def spoilt(file: Path, change: Callable[[Gguf], None]) -> Path:
    """The file with its parts changed."""
    parts = parse(file.read_bytes())
    change(parts)
    out = file.with_name("spoilt.gguf")
    out.write_bytes(assemble(parts))
    return out


def having(key: str, kind: int, value: Any) -> Callable[[Gguf], None]:
    """A function that gives a setting a value of a type; None takes it away."""

    def change(parts: Gguf) -> None:
        parts.settings = [one for one in parts.settings if one.key != key.encode()]
        parts.settings += [] if value is None else [Setting(key.encode(), kind, value)]

    return change


def test_tensors_lie_one_behind_the_other(file):
    """As llama.cpp wants them; else a tensor could be read from the place of another."""

    def moved(parts: Gguf) -> None:
        first, second, *_ = (info for info in parts.tensors if b"attn_q.weight" in info.name)
        second.offset = first.offset

    with pytest.raises(BadCheckpoint, match=r"blk\.1\.attn_q\.weight in .* lies at byte \d+, and \d+ was wanted"):
        gguf_source(spoilt(file, moved))


@pytest.mark.parametrize(
    "key", ["context_length", "block_count", "attention.head_count", "attention.layer_norm_rms_epsilon"]
)
def test_settings_of_another_model_are_not_taken_instead(file, key):
    with pytest.raises(BadCheckpoint, match=rf"does not set llama\.{key}\b.*\. Fetch it again\."):
        gguf_source(spoilt(file, having(f"llama.{key}", 4, None)))


def test_a_file_that_announces_more_than_it_holds_is_not_read_on(file):
    """The package reads nothing behind the end of a file, a million times."""
    whole, key = file.read_bytes(), b"tokenizer.ggml.token_type"
    place = whole.index(key) + len(key) + 8
    file.write_bytes(whole[:place] + (10**6).to_bytes(8, "little") + whole[place + 8 :])
    with pytest.raises(BadCheckpoint, match=r"no sound GGUF file \(it ends before what it announces"):
        gguf_source(file)


@pytest.mark.parametrize(
    ("key", "kind", "value", "words"),
    [
        ("tokenizer.ggml.model", 8, b"\xff\xfe", "is no sound GGUF file"),
        ("split.count", 8, b"x", r"is one of x parts\. Join them first"),
        ("llama.attention.head_count", 4, 1000, "is not a multiple of the number of attention heads"),
        ("llama.block_count", 4, 2**20, r"sets 1048576 blocks and holds \d+ tensors"),
        ("llama.attention.head_count_kv", 4, 3, r"attn_k\.weight in .* holds 2048 numbers, and .* is \[48, 64\]"),
    ],
)
def test_values_that_cannot_be_are_sentences(file, key, kind, value, words):
    with pytest.raises(SecateurError, match=words):
        gguf_source(spoilt(file, having(key, kind, value)))


def test_a_vocabulary_that_is_broken_is_a_sentence(file, tmp_path):
    def shorter(parts: Gguf) -> None:
        del parts.get("tokenizer.ggml.tokens")[50:]

    source = gguf_source(spoilt(file, shorter))
    with pytest.raises(BadCheckpoint, match=r"The tokenizer of .* is broken: .*out of vocabulary"):
        write_plain(source, tmp_path, "float32", Progress())


def test_a_tensor_that_lies_the_other_way_is_refused(file):
    def turned(parts: Gguf) -> None:
        next(info for info in parts.tensors if b"ffn_up" in info.name).dims.reverse()

    with pytest.raises(BadCheckpoint, match=r"up_proj\.weight is \[64, 128\] when it is decoded, and \[128, 64\]"):
        secateur.inspect(spoilt(file, turned))


@pytest.mark.parametrize("unknown", [3, None])
def test_no_token_of_another_model_is_added(file, tmp_path, unknown):
    """transformers adds <|endoftext|> behind the last token: the model has no embedding for it."""
    source = spoilt(file, having("tokenizer.ggml.unknown_token_id", 4, unknown))
    write_plain(gguf_source(source), tmp_path, "float32", Progress())
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == len(parse(source.read_bytes()).get("tokenizer.ggml.tokens"))
    assert max(tokenizer("a<|endoftext|>b").input_ids) < len(tokenizer)
    assert tokenizer.eos_token == "</s>"


def test_a_file_is_named_as_other_systems_name_it(file):
    """In capitals; and it has no revision."""
    loud = file.rename(file.with_suffix(".GGUF"))
    assert secateur.inspect(loud).format == "GGUF (F32)"
    with pytest.raises(BadCheckpoint, match=r"--revision main is for names of the hub; .* is a file\. Leave it out"):
        secateur.inspect(loud, revision="main")


def test_a_chat_template_is_a_text(file):
    assert "chat_template.jinja" not in gguf_source(spoilt(file, having("tokenizer.chat_template", 7, True))).files


def test_inspect_says_why_a_file_cannot_be_read(file):
    with pytest.raises(UnsupportedModel, match=r"sets llama\.logit_scale = 2"):
        secateur.inspect(spoilt(file, having("llama.logit_scale", 4, 2)))


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1"])
def test_zeros_that_a_quantiser_moves_are_counted(kind, text_file, tmp_path):
    """Against the pruned model: what `gguf` itself makes of its zeros, matrix by matrix."""
    source, pruned = saved(tiny_model("llama"), tmp_path / "source"), tmp_path / "pruned"
    text: Any = dict(calibration=text_file, samples=2, seq_len=16)
    secateur.prune(source, method="magnitude", pattern="2:4", out=pruned, **text)
    qtype, expected = getattr(package.GGMLQuantizationType, kind), np.zeros(4, dtype=np.int64)

    def quantised(name: str, value: np.ndarray) -> list[tuple[str, np.ndarray, Any]]:
        if not name.startswith("blk.") or value.ndim < 2:
            return as_stored(name, value)
        packed = package.quantize(value, qtype)
        zero, after = value == 0, package.dequantize(packed, qtype) == 0
        expected[:] += [zero.sum(), (zero & ~after).sum(), (~zero).sum(), (~zero & after).sum()]
        return [(name, packed, qtype)]

    plain_file = converted(pruned, tmp_path / "gguf", "f32")
    file = rewritten(plain_file, tmp_path / "model.gguf", quantised)
    gone, came_back, kept, vanished = expected.tolist()
    assert secateur.inspect(plain_file, against=pruned).against == Against(gone, 0, kept, 0)
    assert secateur.inspect(file, against=pruned).against == Against(gone, came_back, kept, vanished)
    assert (came_back == 0) == (kind != "Q4_1")  # whose zero point need not be on its grid


def test_a_long_vocabulary_is_passed_over(tmp_path):
    """Everything behind it lies where the package's own reader, which takes seconds for it, sees it."""
    config: Any = tiny_config("llama")
    config.vocab_size = 3000
    model: Any = AutoModelForCausalLM.from_config(config)
    file = converted(saved(model, tmp_path / "source"), tmp_path / "gguf", "f32")
    whole, quick = package.GGUFReader(file), _opened(file)[0]
    assert len(whole.fields["tokenizer.ggml.tokens"].data) == len(quick.fields["tokenizer.ggml.tokens"].data) == 3000
    assert quick.fields.keys() == whole.fields.keys()
    for name, field in whole.fields.items():
        if len(field.data) < 1000:
            assert quick.fields[name].contents() == field.contents(), name
    for one, other in zip(quick.tensors, whole.tensors, strict=True):
        assert one.name == other.name
        np.testing.assert_array_equal(one.data, other.data)
    place = file.read_bytes().index(b"tokenizer.ggml.tokens") + len(b"tokenizer.ggml.tokens") + 4
    for count in (10**7, 2**60):
        longer = bytearray(file.read_bytes())
        longer[place + 4 : place + 12] = count.to_bytes(8, "little")
        (tmp_path / "longer.gguf").write_bytes(longer)
        with pytest.raises(BadCheckpoint, match="it ends before what it announces"):
            gguf_source(tmp_path / "longer.gguf")


def test_every_command_takes_the_file(file, text_file, tmp_path, cache):
    """What is made of the file is what is made of the plain checkpoint, and says what it was read from."""
    plain_model = plain(file, tmp_path / "plain", "bfloat16")
    options: Any = {"method": "sparsegpt", "pattern": "2:4", "calibration": str(text_file), "samples": 4, "seq_len": 32}
    report = secateur.prune(file, out=tmp_path / "one", **options)
    secateur.prune(plain_model, out=tmp_path / "other", **options)
    one, other = (open_checkpoint(tmp_path / name) for name in ("one", "other"))
    assert one.sha256() == other.sha256()
    assert "Read from GGUF (F32)." in report.note
    record = read_json(tmp_path / "one" / "pruning.json")
    assert record["model"] == record["source"]["folder"] == str(file)
    judged: Any = {"evaluation": str(text_file), "windows": 4, "seq_len": 32}
    evaluation = secateur.evaluate(tmp_path / "one", dense=file, **judged)
    assert evaluation.dense_perplexity == secateur.evaluate(plain_model, **judged).perplexity
    inspection = secateur.inspect(file)
    assert inspection.format == "GGUF (F32)"
    assert {tensor.dtype for tensor in inspection.tensors} == {"F32"}
    of_file, of_plain = (secateur.validate(model, runtime="packed") for model in (file, plain_model))
    assert of_file.kept == of_plain.kept
    foreseen = secateur.forecast(file, method="wanda", samples=4, seq_len=32)
    assert foreseen.sites == len(report.sites)
    assert len(list(cache.glob("model-*"))) == 1
    with pytest.raises(BadCheckpoint, match=r"There is no GGUF file .*nosuch\.gguf"):
        secateur.inspect(tmp_path / "nosuch.gguf")


def changed_in_silence(file: Path, change: Callable[[bytes], bytes]) -> None:
    """Other bytes of the same size, with the old time put back on the file."""
    before = file.stat()
    file.write_bytes(change(file.read_bytes()))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)


def test_the_second_command_opens_the_copy_and_not_the_file(file, cache, monkeypatch):
    copy = resolve(file)
    monkeypatch.setattr(formats, "gguf_source", lambda file: pytest.fail("it was opened again"))
    assert resolve(file) == copy
    assert len(load(file).blocks) > 1
    with pytest.raises(pytest.fail.Exception):
        resolve(file, dtype="float16")


def test_a_changed_file_is_never_served_from_the_old_copy(file, cache):
    copies = [resolve(file)]
    changed_in_silence(file, lambda data: data[:-4] + b"\0\0\0\0")
    copies.append(resolve(file))
    other = file.with_name("other.gguf")
    other.write_bytes(file.read_bytes()[:-4] + np.float32(2).tobytes())
    os.utime(other, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns))
    other.replace(file)
    copies.append(resolve(file))
    assert len(set(copies)) == 3
    expected = {tensor.name: tensor.read() for tensor in gguf_source(file).tensors}
    assert all(
        torch.equal(tensor, expected[name].to(tensor.dtype))
        for name, tensor in load_file(copies[-1] / "model.safetensors").items()
    )


def test_a_file_that_changes_while_it_is_read_leaves_no_copy(file, cache, monkeypatch):
    """Replaced after its header was read: what is mapped is the old one, what is there the new."""

    def replaced(file: Path) -> Any:
        source = gguf_source(file)
        file.with_name("new").write_bytes(file.read_bytes()[:-4] + b"\0\0\0\0")
        file.with_name("new").replace(file)
        return source

    monkeypatch.setattr(formats, "gguf_source", replaced)
    with pytest.raises(BadCheckpoint, match=r"changed while it was unpacked\. Let it be during a run, and begin again"):
        resolve(file)
    assert not list(cache.glob("model-*"))


def test_decoded_tensors_are_let_go(file):
    """Of a file that is unpacked, one parameter is in memory."""
    tensors = gguf_source(file).tensors
    first = ref(tensors[0].read().untyped_storage())
    for tensor in tensors[1:3]:
        tensor.read()
    assert first() is None
