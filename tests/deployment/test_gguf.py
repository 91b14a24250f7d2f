"""GGUF against the `gguf` reader, literal names and a row-by-row permutation; in llama.cpp, where that is installed,
against transformers' own tokens."""

import json
import logging
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.families import tiny_config, tiny_model
from support.grids import on_grid
from support.splits import TEXTS, splitting
from support.texts import byte_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import secateur
from secateur.checkpoints.folder import open_checkpoint
from secateur.checkpoints.quantised.gguf_tokenizer import SPLITS
from secateur.data import demo
from secateur.deployment.formats.gguf import FILE, write
from secateur.deployment.formats.gguf_blocks import six_bits
from secateur.deployment.formats.gguf_vocabulary import add_vocabulary, read_vocabulary
from secateur.errors import BadCheckpoint, BadPattern, NonFinite, UnknownName, UnsupportedModel

package = pytest.importorskip("gguf", reason="the package gguf is not installed")

NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "model.layers.1.input_layernorm.weight": "blk.1.attn_norm.weight",
    "model.layers.1.self_attn.q_proj.weight": "blk.1.attn_q.weight",
    "model.layers.1.self_attn.k_proj.weight": "blk.1.attn_k.weight",
    "model.layers.1.self_attn.v_proj.weight": "blk.1.attn_v.weight",
    "model.layers.1.self_attn.o_proj.weight": "blk.1.attn_output.weight",
    "model.layers.1.post_attention_layernorm.weight": "blk.1.ffn_norm.weight",
    "model.layers.1.mlp.gate_proj.weight": "blk.1.ffn_gate.weight",
    "model.layers.1.mlp.up_proj.weight": "blk.1.ffn_up.weight",
    "model.layers.1.mlp.down_proj.weight": "blk.1.ffn_down.weight",
}
MORE = {
    "qwen2": {f"model.layers.1.self_attn.{p}_proj.bias": f"blk.1.attn_{p}.bias" for p in "qkv"},
    "qwen3": {f"model.layers.1.self_attn.{p}_norm.weight": f"blk.1.attn_{p}_norm.weight" for p in "qk"},
}


def saved(model: torch.nn.Module, folder: Path) -> Path:
    """A checkpoint folder of a tiny model, with the byte tokenizer of the tests."""
    model.save_pretrained(folder)  # type: ignore[operator]
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.model.unk_token = None  # type: ignore[attr-defined]
    tokenizer.save_pretrained(folder)
    return folder


def converted(folder: Path, out: Path, **options: str) -> Path:
    out.mkdir(exist_ok=True)
    write(open_checkpoint(folder), out, **options)  # type: ignore[arg-type]
    return out / FILE


def fields(file: Path) -> dict[str, object]:
    return {name: field.contents() for name, field in package.GGUFReader(file).fields.items()}


def tensors(file: Path) -> dict[str, np.ndarray]:
    """Every tensor as float32, by its name in the file."""
    found = {}
    for tensor in package.GGUFReader(file).tensors:
        shape = tuple(int(size) for size in tensor.shape[::-1])
        found[tensor.name] = package.dequantize(tensor.data, tensor.tensor_type).reshape(shape)
    return found


def llama_rows(value: np.ndarray, heads: int) -> np.ndarray:
    """Row by row: within a head, row i of the first half comes to 2 i, row i of the second half to 2 i + 1."""
    out, size = np.empty_like(value), len(value) // heads
    for head in range(heads):
        for i in range(size // 2):
            out[head * size + 2 * i] = value[head * size + i]
            out[head * size + 2 * i + 1] = value[head * size + size // 2 + i]
    return out


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_the_reader_finds_every_tensor(family, tmp_path):
    model = tiny_model(family)
    file = converted(saved(model, tmp_path / "source"), tmp_path / "out")
    read, stored = tensors(file), {name: value.numpy() for name, value in model.state_dict().items()}
    assert len(read) == len(stored)
    for name, called in (NAMES | MORE.get(family, {})).items():
        wanted = stored[name]
        if family in ("llama", "mistral") and called.endswith(("attn_q.weight", "attn_k.weight")):
            wanted = llama_rows(wanted, 4 if "attn_q" in called else 2)
        np.testing.assert_array_equal(read[called], wanted, err_msg=name)
    held, arch = fields(file), "llama" if family == "mistral" else family
    assert held["general.architecture"] == arch
    assert (held[f"{arch}.attention.head_count"], held[f"{arch}.attention.head_count_kv"]) == (4, 2)
    assert held[f"{arch}.block_count"] == 4
    assert held[f"{arch}.rope.dimension_count"] == held[f"{arch}.attention.key_length"] == 16
    assert held[f"{arch}.context_length"] == (8 if family == "mistral" else 128)  # no further than the window


def test_values_are_cast_and_zeros_stay(tmp_path):
    model = tiny_model("llama").bfloat16()
    gate = model.get_parameter("model.layers.0.mlp.gate_proj.weight").data
    gate[:, ::2] = 0
    source = saved(model, tmp_path / "source")
    sizes = {}
    for values in ("as stored", "f32", "f16", "bf16", "q8_0", "q5_0"):
        file = converted(source, tmp_path / values, values=values)
        read, sizes[values] = tensors(file)["blk.0.ffn_gate.weight"], file.stat().st_size
        assert (read[:, ::2] == 0).all()
        if values == "q8_0":  # half a step, the largest of 32 weights over 127, with a scale in half precision
            exact = gate.float().reshape(128, -1, 32)
            step = exact.abs().amax(2, keepdim=True) / 127
            error = (torch.from_numpy(read).reshape(128, -1, 32) - exact).abs()
            assert (error <= (0.501 + 127 * 2**-11) * step).all()
        elif values == "q5_0":  # the largest of 32 is level -16, and the other end is cut to 15
            step = gate.float().reshape(128, -1, 32).abs().amax(2, keepdim=True) / 16
            error = (torch.from_numpy(read).reshape(128, -1, 32) - gate.float().reshape(128, -1, 32)).abs()
            assert (error <= 1.01 * step).all()
        else:
            exact = gate.half() if values == "f16" else gate
            np.testing.assert_array_equal(read, exact.float().numpy())
    assert sizes["q5_0"] < sizes["q8_0"] < sizes["bf16"] < sizes["f32"]
    assert abs(sizes["as stored"] - sizes["bf16"]) <= 64  # but for the line that names the values


def test_six_bits_are_what_the_package_reads(tmp_path):
    """Within half a step of 16 weights, by the package's own decoding; rows of other lengths are refused."""
    six = package.GGMLQuantizationType.Q6_K
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 512, generator=draw) * torch.randn(8, 512, generator=draw).exp()
    weight[:, ::2], weight[3, :300], weight[4] = 0, 0, 0
    made = six_bits(weight, "m")
    assert made.shape == (8, 2 * 210)
    read = torch.from_numpy(package.dequantize(made, six))
    assert (read[weight == 0] == 0).all()
    groups, error = weight.reshape(8, 2, 16, 16), (read - weight).reshape(8, 2, 16, 16).abs()
    steps = groups.abs().amax(3, keepdim=True) / 32
    scale_error = 32 * (steps.amax(2, keepdim=True) / 127 / 2 + steps * 2**-11)
    assert (error <= 1.001 * steps.clamp_min(1e-30) + 1.001 * scale_error).all()
    assert error.square().mean() < (steps / 2).square().mean()
    assert len(read.unique()) > 500
    with pytest.raises(NonFinite, match=r"m has a scale of .* Q6_K"):
        six_bits(weight * 1e10, "m")
    config = tiny_config("llama")
    config.hidden_size, config.intermediate_size, config.head_dim = 256, 512, 64
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    file = converted(saved(model, tmp_path / "source"), tmp_path / "out", values="q6_k")
    down = model.get_parameter("model.layers.0.mlp.down_proj.weight").data
    wanted = package.dequantize(six_bits(down, "m"), six)
    np.testing.assert_array_equal(tensors(file)["blk.0.ffn_down.weight"], wanted)
    with pytest.raises(BadPattern, match="q6_k needs rows in 256s"):
        converted(saved(tiny_model("llama"), tmp_path / "narrow"), tmp_path / "none", values="q6_k")


BLOCKS = {"int4 of group 32": "Q4_0", "int8 of group 32": "Q8_0", "mxfp4": "MXFP4"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("text", BLOCKS)
def test_what_lies_on_a_grid_becomes_blocks_with_the_same_levels(text, dtype, tmp_path, monkeypatch):
    """gguf's own dequantisation gives level times scale, which the checkpoint has rounded to its dtype."""
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))
    source = on_grid(text, tmp_path / "source", dtype)
    (source / "pruning.json").write_text(json.dumps({"values": text}))
    secateur.export(source, out=tmp_path / "out", to="gguf")
    checkpoint, file = open_checkpoint(source), tmp_path / "out" / FILE
    kinds = {tensor.name: tensor.tensor_type.name for tensor in package.GGUFReader(file).tensors}
    stored = tensors(file)
    for name, called in NAMES.items():
        weight = checkpoint.tensor(name).float()
        wanted = weight.numpy()
        if called.endswith(("attn_q.weight", "attn_k.weight")):
            wanted = llama_rows(wanted, 4 if "attn_q" in called else 2)
        found = torch.from_numpy(stored[called].copy())
        np.testing.assert_array_equal(found.to(dtype).float().numpy(), wanted, err_msg=name)
        assert int((found == 0).sum()) == int((weight == 0).sum())
        matrix = called.startswith("blk.") and found.dim() == 2
        plain = "F32" if found.dim() == 1 or dtype == torch.float32 else "BF16"
        assert kinds[called] == (BLOCKS[text] if matrix else plain)
    kind = package.LlamaFileType(fields(file)["general.file_type"]).name
    assert kind.removesuffix("_MOE") == f"MOSTLY_{BLOCKS[text]}"
    secateur.export(file, out=tmp_path / "back", to="dense")
    back = open_checkpoint(tmp_path / "back")
    for name in checkpoint.places:
        assert torch.equal(back.tensor(name).bfloat16(), checkpoint.tensor(name).bfloat16()), name


def test_what_does_not_lie_on_a_grid_is_rounded_and_said(tmp_path):
    model = tiny_model("llama")
    gate = model.get_parameter("model.layers.0.mlp.gate_proj.weight").data
    gate[:, ::2] = 0
    source, out = saved(model, tmp_path / "source"), tmp_path / "out"
    out.mkdir()
    note = write(open_checkpoint(source), out, values="int4 of group 32")
    assert note is not None
    assert note.startswith("28 of 28 matrices did not lie on int4 of group 32 and were rounded to nearest: model.")
    read = torch.from_numpy(tensors(out / FILE)["blk.0.ffn_gate.weight"])
    assert (read[:, ::2] == 0).all()
    steps = gate.unflatten(1, (-1, 32)).abs().amax(2, keepdim=True) / 7
    assert ((read - gate).unflatten(1, (-1, 32)).abs() <= 0.52 * steps).all()


def test_grids_without_blocks_are_refused_by_name_or_written_as_stored(tmp_path):
    source = saved(tiny_model("llama"), tmp_path / "source")
    for text, named in (("int4 of group 64", "int4 of group 64"), ("fp8", "fp8"), ("int8", "int8"),
                        ("int4 asymmetric of group 32", "int4 asymmetric of group 32")):  # fmt: skip
        with pytest.raises(BadPattern, match=rf"GGUF has no blocks for {named}\. Say --values 'int8 of group 32' or"):
            converted(source, tmp_path / "no", values=text)
    (source / "pruning.json").write_text(json.dumps({"values": "int4 of group 64"}))
    out = tmp_path / "stored"
    out.mkdir()
    note = write(open_checkpoint(source), out)
    assert note == "GGUF has no blocks for int4 of group 64, with which it was pruned; written as stored."
    assert {tensor.tensor_type.name for tensor in package.GGUFReader(out / FILE).tensors} == {"F32"}
    config = tiny_config("llama")
    config.intermediate_size = 72
    odd = saved(AutoModelForCausalLM.from_config(config), tmp_path / "odd")
    with pytest.raises(BadPattern, match=r"mxfp4 needs inputs in groups of 32; .*down_proj has 72"):
        converted(odd, tmp_path / "no", values="mxfp4")
    model = tiny_model("llama")
    weight = model.get_parameter("model.layers.0.mlp.up_proj.weight").data
    weight[3, 4] = 1e6
    with pytest.raises(NonFinite, match=r"up_proj\.weight has a scale of \d+, more than the f16 of Q4_0 can hold"):
        converted(saved(model, tmp_path / "large"), tmp_path / "no", values="int4 of group 32")
    weight[3, 4] = float("nan")
    with pytest.raises(NonFinite, match=r"up_proj\.weight holds NaN or Inf"):
        converted(saved(model, tmp_path / "nan"), tmp_path / "no", values="int4 of group 32")


def test_what_was_left_out_stays(tmp_path):
    source = on_grid("int4 of group 32", tmp_path / "source")
    site = "model.layers.1.mlp.up_proj"
    file = source / open_checkpoint(source).places[f"{site}.weight"].shard
    held = load_file(file)
    held[f"{site}.weight"] = torch.randn(128, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    save_file(held, file, {"format": "pt"})
    sites = [{"site": site, "pattern": None}, {"site": "model.layers.0.mlp.up_proj", "pattern": None}]
    (source / "pruning.json").write_text(json.dumps({"values": "int4 of group 32", "sites": sites}))
    read = package.GGUFReader(converted(source, tmp_path / "out")).tensors
    kinds = {tensor.name: tensor.tensor_type.name for tensor in read}
    assert (kinds["blk.1.ffn_up.weight"], kinds["blk.0.ffn_up.weight"]) == ("BF16", "Q4_0")


def test_a_tied_head_is_not_written_twice(tmp_path):
    config = tiny_config("llama")
    config.tie_word_embeddings = True
    source = saved(AutoModelForCausalLM.from_config(config), tmp_path / "source")
    assert "output.weight" not in tensors(converted(source, tmp_path / "out"))
    held = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(held | {"tie_word_embeddings": False}))
    with pytest.raises(BadCheckpoint, match=r"has no lm_head\.weight, and config\.json does not tie it"):
        converted(source, tmp_path / "untied")


def rotated(tmp_path: Path, family: str = "llama", **rope: object) -> Path:
    config = tiny_config(family)
    config.rope_parameters = {"rope_theta": 10000.0, **rope}
    return saved(AutoModelForCausalLM.from_config(config), tmp_path / "source")


LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip


def test_rotations_are_written_or_refused(tmp_path):
    file = converted(rotated(tmp_path / "1", rope_type="linear", factor=4.0), tmp_path / "linear")
    held = fields(file)
    assert held["llama.rope.scaling.type"] == "linear"
    assert held["llama.rope.scaling.factor"] == 4.0
    factors = tensors(converted(rotated(tmp_path / "2", **LLAMA3), tmp_path / "llama3"))["rope_freqs.weight"]
    for i, factor in enumerate(factors):  # Llama 3.1: long waves are stretched, short ones kept, a ramp in between
        waves = 32 / (2 * np.pi * 10000.0 ** (2 * i / 16))
        ramp = np.clip((waves - 1) / (4 - 1), 0, 1)
        assert factor == pytest.approx(1 / ((1 - ramp) / 8 + ramp), rel=1e-5)
    with pytest.raises(UnsupportedModel, match="rotation 'yarn'"):
        converted(rotated(tmp_path / "3", rope_type="yarn", factor=4.0), tmp_path / "yarn")
    with pytest.raises(UnsupportedModel, match="qwen3 rotation 'llama3'"):
        converted(rotated(tmp_path / "4", "qwen3", **LLAMA3), tmp_path / "qwen")


def test_what_llama_cpp_lacks_is_refused(tmp_path):
    with pytest.raises(UnsupportedModel, match=r"MixtralForCausalLM; as GGUF are written: LlamaForCausalLM"):
        converted(saved(tiny_model("mixtral"), tmp_path / "mixtral"), tmp_path / "1")
    config = tiny_config("qwen2")
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = 2, 2, 16
    with pytest.raises(UnsupportedModel, match="32 query rows and a hidden size of 64"):
        converted(saved(AutoModelForCausalLM.from_config(config), tmp_path / "heads"), tmp_path / "2")
    config = tiny_config("qwen3")
    config.attention_bias = True
    with pytest.raises(UnsupportedModel, match=r"o_proj\.bias has no place in llama\.cpp's qwen3"):
        converted(saved(AutoModelForCausalLM.from_config(config), tmp_path / "bias"), tmp_path / "3")
    config = tiny_config("llama")
    config.intermediate_size, config.hidden_act = 72, "gelu"
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(UnsupportedModel, match="computes with gelu"):
        converted(saved(model, tmp_path / "gelu"), tmp_path / "4")
    model.config.hidden_act = "silu"
    with pytest.raises(BadPattern, match=r"q8_0 needs rows in 32s; .*down_proj\.weight has rows of 72"):
        converted(saved(model, tmp_path / "rows"), tmp_path / "5", values="q8_0")
    model.get_parameter("model.layers.0.mlp.up_proj.weight").data[3, 4] = 1e5
    with pytest.raises(NonFinite, match=r"up_proj\.weight holds 100000, more than f16 can hold"):
        converted(saved(model, tmp_path / "large"), tmp_path / "6", values="f16")
    with pytest.raises(UnknownName, match="There is no kind of GGUF values 'q4_0'"):
        converted(tmp_path / "large", tmp_path / "7", values="q4_0")


def test_a_missing_package_is_named(tmp_path, tiny_llama, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UnsupportedModel, match=r"pip install 'secateur\[gguf\]'"):
        converted(tiny_llama, tmp_path / "out")


def test_the_demo_vocabulary(tmp_path):
    held = fields(converted(demo.model_folder(), tmp_path / "out"))
    stored = json.loads((demo.model_folder() / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    assert {token: i for i, token in enumerate(held["tokenizer.ggml.tokens"])} == stored["vocab"]  # type: ignore[arg-type]
    assert held["tokenizer.ggml.merges"] == [" ".join(merge) for merge in stored["merges"]]
    assert (held["tokenizer.ggml.model"], held["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    assert held["tokenizer.ggml.add_bos_token"] is False
    assert held["tokenizer.ggml.eos_token_id"] == 0
    assert held["tokenizer.ggml.token_type"][:2] == [package.TokenType.CONTROL, package.TokenType.NORMAL]  # type: ignore[index]


@pytest.mark.parametrize(("rules", "ignore_merges"), SPLITS)
def test_a_known_split_gets_its_name(rules, ignore_merges):
    held = json.loads(splitting(rules, ignore_merges).to_str())
    assert read_vocabulary(held, 600).pre == SPLITS[rules, ignore_merges]
    held["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [{"type": "Whitespace"}]}
    with pytest.raises(UnsupportedModel, match=r"not known to split text as this tokenizer does: Whitespace"):
        read_vocabulary(held, 600)


def test_digits_by_themselves_are_known():
    held = json.loads(splitting(("as GPT-2",), False).to_str())
    held["pre_tokenizer"]["pretokenizers"].insert(0, {"type": "Digits", "individual_digits": True})
    assert read_vocabulary(held, 600).pre == "smollm"


def test_a_vocabulary_is_filled_up_or_refused():
    held = json.loads(splitting(("as GPT-2",), False).to_str())
    found = read_vocabulary(held, 600)
    assert len(found.tokens) == len(set(found.tokens)) == len(found.types) == 600
    assert found.types[:3] == ["CONTROL", "CONTROL", "NORMAL"]
    assert found.types[-1] == "UNUSED"
    with pytest.raises(UnsupportedModel, match=r"gives token \d+, the model has 400"):
        read_vocabulary(held, 400)
    with pytest.raises(UnsupportedModel, match="is a Unigram"):
        read_vocabulary(held | {"model": {"type": "Unigram"}}, 600)
    with pytest.raises(UnsupportedModel, match="NFKC"):
        read_vocabulary(held | {"normalizer": {"type": "NFKC"}}, 600)


@pytest.fixture
def stories(shared_data: Path) -> Path:
    return shared_data / "models" / "stories260K"


def test_sentencepiece_scores_follow_the_merges(stories):
    held = json.loads((stories / "tokenizer.json").read_text(encoding="utf-8"))
    found = read_vocabulary(held, 512)
    assert found.pre is None
    assert found.space_prefix
    assert found.types[:4] == ["UNKNOWN", "CONTROL", "CONTROL", "BYTE"]
    assert found.scores is not None
    scores = dict(zip(found.tokens, found.scores, strict=True))
    merged = [scores[left + right] for left, right in held["model"]["merges"]]
    assert merged == sorted(merged, reverse=True)
    assert min(merged) > scores["e"]
    reordered = json.loads(json.dumps(held))
    reordered["model"]["merges"].append(reordered["model"]["merges"][0])
    with pytest.raises(UnsupportedModel, match="do not follow each other"):
        read_vocabulary(reordered, 512)
    held["model"]["merges"] = held["model"]["merges"][1:]
    with pytest.raises(UnsupportedModel, match="The tokenizer never merges"):
        read_vocabulary(held, 512)


@pytest.fixture
def llama_class() -> type:
    found = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed").Llama
    logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)
    return found


def same_tokens(llama: type, file: Path, folder: Path) -> None:
    """llama.cpp and transformers make the same tokens of the texts."""
    model, tokenizer = llama(str(file), vocab_only=True, verbose=False), AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        assert model.tokenize(text.encode(), add_bos=True, special=False) == tokenizer(text).input_ids, text
    model.close()


@pytest.mark.parametrize(("rules", "ignore_merges"), SPLITS)
def test_llama_cpp_splits_alike(rules, ignore_merges, llama_class, tmp_path):
    tokenizer = splitting(rules, ignore_merges)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(tmp_path)
    writer = package.GGUFWriter(tmp_path / FILE, "llama")
    add_vocabulary(package, writer, tmp_path, 600)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    same_tokens(llama_class, tmp_path / FILE, tmp_path)


@pytest.mark.parametrize("name", ["demo", "stories260K"])
def test_llama_cpp_says_what_transformers_says(name, llama_class, tmp_path, request):
    folder = demo.model_folder() if name == "demo" else request.getfixturevalue("stories")
    file = converted(folder, tmp_path / "out", values="f32")
    same_tokens(llama_class, file, folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(folder)(
        "def read(self" if name == "demo" else "Once upon a time", return_tensors="pt"
    ).input_ids
    wanted = model.generate(ids, max_new_tokens=24, do_sample=False, eos_token_id=None)[0, ids.shape[1] :].tolist()  # type: ignore[operator]
    other = llama_class(str(file), n_ctx=128, n_threads=1, verbose=False)
    got = [
        token for token, _ in zip(other.generate(ids[0].tolist(), temp=0.0, repeat_penalty=1.0), wanted, strict=False)
    ]
    other.close()
    assert got == wanted
