"""The TensorRT-LLM checkpoint: put together again here by other means, it must give every tensor bit for bit.

Nothing of TensorRT-LLM is installed, so the names are those that NVIDIA's own exporter wrote for the same tiny models
(nvidia-modelopt 0.47, Llama, Mistral and Qwen2 on one and two ranks: all tensors equal, but for a tied head, which is
left out here).
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.families import HEAD_DIM, tiny_model
from torch import Tensor

from secateur.checkpoints.folder import Checkpoint, open_checkpoint
from secateur.deployment.formats.tensorrt_llm import eligible, tensorrt_llm, write
from secateur.deployment.sparsity_support import RULES
from secateur.errors import BadCheckpoint, BadPattern, NonFinite, UnsupportedModel

SITE = "model.layers.1.mlp.down_proj"
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 64}
MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def two_of_four(weight: Tensor) -> Tensor:
    """The first two of every four inputs set to zero."""
    weight = weight.clone()
    weight[:, 0::4] = 0
    weight[:, 1::4] = 0
    return weight


@pytest.fixture
def made(tmp_path):
    """A function that saves a tiny model, its tensors changed by `change`, and gives its checkpoint."""

    def made(kind: str = "llama", change=lambda tensors: None, *, dtype=torch.bfloat16, **fields) -> Checkpoint:
        model: Any = tiny_model(kind)
        model.to(dtype)
        for name, value in fields.items():
            setattr(model.config, name, value)
        if fields.get("tie_word_embeddings"):
            model.get_output_embeddings().weight = model.get_input_embeddings().weight
        folder = tmp_path / "model"
        model.save_pretrained(folder)
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return open_checkpoint(folder)

    return made


def prune_all(tensors: dict[str, Tensor]) -> None:
    for name in tensors:
        if name.split(".")[-2] in MATRICES and name.endswith(".weight"):
            tensors[name] = two_of_four(tensors[name])


def written(source: Checkpoint, tmp_path: Path, ranks: int) -> tuple[dict, list[dict[str, Tensor]]]:
    """What the format writes: config.json and the tensors of every rank."""
    folder = tmp_path / "out"
    shutil.copytree(source.folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    write(source, folder, ranks=ranks)
    assert sorted(f.name for f in folder.glob("*.safetensors")) == [f"rank{r}.safetensors" for r in range(ranks)]
    config = json.loads((folder / "config.json").read_text())
    return config, [load_file(folder / f"rank{rank}.safetensors") for rank in range(ranks)]


def rebuilt(ranks: list[dict[str, Tensor]], config: dict) -> dict[str, Tensor]:
    """The Hugging Face tensors again, head by head and column by column as TensorRT-LLM shares them out."""
    heads, groups = config["num_attention_heads"] // len(ranks), config["num_key_value_heads"] // len(ranks)
    size = config["head_size"]
    found: dict[str, Tensor] = {}
    for layer in range(config["num_hidden_layers"]):
        here, there = f"model.layers.{layer}", f"transformer.layers.{layer}"
        found[f"{here}.input_layernorm.weight"] = ranks[0][f"{there}.input_layernorm.weight"]
        found[f"{here}.post_attention_layernorm.weight"] = ranks[0][f"{there}.post_layernorm.weight"]
        for kind in ("weight", "bias"):
            if f"{there}.attention.qkv.{kind}" in ranks[0]:
                rows: dict[str, list[Tensor]] = {"q": [], "k": [], "v": []}
                for rank in ranks:
                    fused = rank[f"{there}.attention.qkv.{kind}"]
                    for row in range(len(fused)):
                        head = row // size
                        letter = "q" if head < heads else "k" if head < heads + groups else "v"
                        rows[letter].append(fused[row])
                for letter, held in rows.items():
                    found[f"{here}.self_attn.{letter}_proj.{kind}"] = torch.stack(held)
        for ours, theirs in (("self_attn.o_proj", "attention.dense"), ("mlp.down_proj", "mlp.proj")):
            columns = [column for rank in ranks for column in rank[f"{there}.{theirs}.weight"].T]
            found[f"{here}.{ours}.weight"] = torch.stack(columns, 1)
        for ours, theirs in (("mlp.gate_proj", "mlp.fc"), ("mlp.up_proj", "mlp.gate")):
            found[f"{here}.{ours}.weight"] = torch.vstack([rank[f"{there}.{theirs}.weight"] for rank in ranks])
    found["model.norm.weight"] = ranks[0]["transformer.ln_f.weight"]
    found["model.embed_tokens.weight"] = torch.vstack([rank["transformer.vocab_embedding.weight"] for rank in ranks])
    if not config["share_embedding_table"]:
        found["lm_head.weight"] = torch.vstack([rank["lm_head.weight"] for rank in ranks])
    return found


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
def test_the_ranks_put_together_are_the_model(made, tmp_path, kind, tied, ranks):
    source = made(kind, prune_all, tie_word_embeddings=tied)
    config, parts = written(source, tmp_path, ranks)
    found, expected = rebuilt(parts, config), load_file(source.folder / "model.safetensors")
    if tied:
        expected.pop("lm_head.weight", None)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name].view(torch.int16), tensor.view(torch.int16)), name
    for rank in parts:  # norms are whole on every rank
        assert torch.equal(rank["transformer.ln_f.weight"], expected["model.norm.weight"])


def test_the_config_says_what_the_loader_asks_for(made, tmp_path):
    scaling = {"rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    source = made(rope_parameters=scaling | {"original_max_position_embeddings": 64})
    config, _ = written(source, tmp_path, 2)
    assert config["architecture"] == "LlamaForCausalLM"
    assert config["dtype"] == "bfloat16"
    assert config["rotary_base"] == 5e5
    assert config["rotary_scaling"]["type"] == "llama3"
    assert config["rotary_scaling"]["original_max_position_embeddings"] == 64
    assert config["mapping"] == {"world_size": 2, "tp_size": 2, "pp_size": 1}
    assert (config["num_key_value_heads"], config["head_size"]) == (2, HEAD_DIM)
    assert config["quantization"] == {"quant_algo": None, "kv_cache_quant_algo": None}
    assert json.loads((tmp_path / "out" / "hf_config.json").read_text())["model_type"] == "llama"


def test_a_plain_rotary_embedding_has_no_scaling_and_qwen_says_its_type(made, tmp_path):
    config, _ = written(made("qwen2"), tmp_path, 1)
    assert config["rotary_scaling"] is None  # their loader fails on a scaling of type "default"
    assert (config["attn_bias"], config["qwen_type"]) == (True, "qwen2")


def test_any_reader_of_safetensors_reads_a_rank(made, tmp_path):
    written(made(), tmp_path, 2)
    with safe_open(tmp_path / "out" / "rank1.safetensors", framework="np") as held:
        assert held.metadata() == {"format": "pt"}
        assert held.get_slice("transformer.layers.0.mlp.proj.weight").get_shape() == [64, 64]
    header = int.from_bytes((tmp_path / "out" / "rank1.safetensors").read_bytes()[:8], "little")
    assert header % 8 == 0


def spoil(change) -> object:
    """A change of all tensors to 2:4, and of one by `change`."""

    def spoilt(tensors: dict[str, Tensor]) -> None:
        prune_all(tensors)
        tensors[f"{SITE}.weight"] = change(tensors[f"{SITE}.weight"])

    return spoilt


def across(weight: Tensor) -> Tensor:
    weight = torch.ones_like(weight)
    weight[0::4], weight[1::4] = 0, 0
    return weight


def with_value(value: float):
    def change(weight: Tensor) -> Tensor:
        weight[3, 5] = value
        return weight

    return change


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (across, BadPattern, "is not 2:4 along its inputs"),
        (with_value(-0.0), BadCheckpoint, "holds zeros that are -0.0"),
        (with_value(torch.nan), NonFinite, "holds NaN or Inf"),
        (with_value(1.0), BadPattern, "prune it with --pattern 2:4"),
    ],
    ids=["wrong axis", "negative zero", "NaN", "one weight too many"],
)
def test_an_unfit_site_is_refused_by_name(made, tmp_path, change, error, words):
    with pytest.raises(error) as raised:
        written(made("llama", spoil(change)), tmp_path, 1)
    assert SITE in str(raised.value)
    assert words in str(raised.value)


def test_a_split_that_cuts_groups_is_refused(made, tmp_path):
    """In 24 inputs are six groups of 4; on two ranks twelve inputs each are three, on four ranks six are none."""
    source = made("llama", prune_all, num_key_value_heads=4)
    shrunk = load_file(source.folder / "model.safetensors")
    for layer in range(4):
        for name in ("gate_proj", "up_proj"):
            shrunk[f"model.layers.{layer}.mlp.{name}.weight"] = shrunk[f"model.layers.{layer}.mlp.{name}.weight"][:24]
        for name in ("k_proj", "v_proj"):
            site = f"model.layers.{layer}.self_attn.{name}.weight"
            shrunk[site] = shrunk[site].repeat(2, 1)
        site = f"model.layers.{layer}.mlp.down_proj.weight"
        shrunk[site] = shrunk[site][:, :24].contiguous()
    save_file({name: tensor.contiguous() for name, tensor in shrunk.items()}, source.folder / "model.safetensors")
    config = json.loads((source.folder / "config.json").read_text()) | {"intermediate_size": 24}
    (source.folder / "config.json").write_text(json.dumps(config))
    source = open_checkpoint(source.folder)
    written(source, tmp_path, 2)
    with pytest.raises(BadPattern, match=r"mlp\.down_proj, in the part \[64, 6\] of rank 0, is not 2:4"):
        write(source, tmp_path / "out", ranks=4)
    reasons = {layer.name: layer.reason for layer in eligible(source, ranks=4)}
    assert reasons["transformer.layers.0.mlp.proj"].startswith("24 inputs on 4 ranks are no groups of 4 on each")
    assert reasons["transformer.layers.0.mlp.fc"] == "6 outputs a rank are no multiple of 16"


@pytest.mark.parametrize(
    ("fields", "ranks", "words"),
    [
        ({}, 3, "has 4 attention heads, which 3 ranks cannot share evenly. Choose a --ranks that divides it."),
        ({}, 4, "has 2 key-value heads, which 4 ranks cannot share evenly"),
        ({}, 0, "which 0 ranks cannot share evenly"),
        ({"rope_parameters": YARN}, 1, "has rotary embeddings of type 'yarn'; default, linear, dynamic, llama3 were"),
    ],
)
def test_what_cannot_be_split_or_turned_is_refused(made, tmp_path, fields, ranks, words):
    source = made(**fields)
    with pytest.raises(UnsupportedModel) as raised:
        write(source, tmp_path, ranks=ranks)
    assert words in str(raised.value)


def test_rotary_embeddings_that_differ_between_layers_are_refused(made, tmp_path):
    source = made("qwen2")
    config = json.loads((source.folder / "config.json").read_text())
    kinds = {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("full_attention", "sliding_attention")}
    config |= {"rope_parameters": kinds, "layer_types": ["full_attention"] * config["num_hidden_layers"]}
    (source.folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModel, match="has rotary embeddings of type None; default, linear"):
        write(open_checkpoint(source.folder), tmp_path)


def test_another_architecture_is_named(made, tmp_path):
    with pytest.raises(
        UnsupportedModel, match="is a GPT2LMHeadModel; a TensorRT-LLM checkpoint can be written of Llama"
    ):
        write(made("gpt2"), tmp_path)


def test_tensors_without_a_place_and_missing_ones_are_named(made, tmp_path):
    def extra(tensors):
        tensors["model.layers.0.self_attn.o_proj.bias"] = torch.zeros(64, dtype=torch.bfloat16)

    def less(tensors):
        del tensors["model.norm.weight"]

    with pytest.raises(UnsupportedModel, match=r"o_proj\.bias, which TensorRT-LLM has no place for"):
        write(made("llama", extra), tmp_path)
    with pytest.raises(BadCheckpoint, match=r"has no tensor model\.norm\.weight"):
        write(made("llama", less), tmp_path)


def test_several_dtypes_are_refused(made, tmp_path):
    def mixed(tensors):
        tensors["model.norm.weight"] = tensors["model.norm.weight"].float()

    with pytest.raises(BadCheckpoint, match="holds tensors of BF16, F32; one dtype of F32, F16, BF16 was wanted"):
        write(made("llama", mixed), tmp_path)


def test_a_dense_model_is_written_and_nothing_of_it_is_eligible(made, tmp_path):
    source = made()
    written(source, tmp_path, 1)
    layers = eligible(source)
    assert len(layers) == 4 * 5
    assert not any(layer.eligible for layer in layers)
    assert (
        "model.layers.0.mlp.up_proj is not 2:4"
        in {layer.name: layer for layer in layers}["transformer.layers.0.mlp.gate"].reason
    )


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_2_4_model_is_eligible_in_half_precision_alone(made, ranks):
    layers = eligible(made("llama", prune_all), ranks=ranks)
    assert len(layers) == ranks * 4 * 5
    assert all(layer.eligible and not layer.reason for layer in layers)
    assert layers[0].shape == ((4 + 2 + 2) * HEAD_DIM // ranks, 64)
    reasons = {layer.reason for layer in eligible(made("llama", prune_all, dtype=torch.float32), ranks=ranks)}
    assert reasons == {"float32: float16 or bfloat16 was wanted (int8, fp8 are not written)"}


def test_one_dense_matrix_of_three_makes_the_fused_one_dense(made):
    def change(tensors):
        dense = tensors["model.layers.2.self_attn.v_proj.weight"]
        prune_all(tensors)
        tensors["model.layers.2.self_attn.v_proj.weight"] = dense

    lost = [layer for layer in eligible(made("llama", change)) if not layer.eligible]
    assert [layer.name for layer in lost] == ["transformer.layers.2.attention.qkv"]
    assert lost[0].reason == "model.layers.2.self_attn.v_proj is not 2:4 along its inputs"
    assert len(lost[0].matrices) == 3


def test_narrow_parts_are_not_eligible(made):
    """Four ranks of 16 inputs: fewer than the 32 that sparse kernels take."""
    source = made("llama", prune_all)
    held = load_file(source.folder / "model.safetensors")
    for layer in range(4):
        for name in ("k_proj", "v_proj"):
            site = f"model.layers.{layer}.self_attn.{name}.weight"
            held[site] = held[site].repeat(2, 1)
    save_file(held, source.folder / "model.safetensors")
    config = json.loads((source.folder / "config.json").read_text()) | {"num_key_value_heads": 4}
    (source.folder / "config.json").write_text(json.dumps(config))
    layers = {layer.name: layer for layer in eligible(open_checkpoint(source.folder), ranks=4) if layer.rank == 3}
    assert layers["transformer.layers.0.attention.dense"].reason == "16 inputs a rank are no multiple of 32"
    assert layers["transformer.layers.0.mlp.proj"].eligible


def test_the_build_command_disables_what_makes_it_dense():
    command, silently_dense = RULES["tensorrt-llm"].build, RULES["tensorrt-llm"].silently_dense
    assert "--weight_sparsity" in command
    assert "--gemm_plugin disable" in command
    bad = [option for option in silently_dense if option.startswith("--") and "gemm_plugin auto" not in option]
    assert not any(option in command for option in bad)
    assert all(reason for reason in silently_dense.values())


def test_the_format_is_data():
    assert tensorrt_llm.options == {"ranks"}
    assert tensorrt_llm.read is None
    assert "1.2.1" in tensorrt_llm.loaded_by
