"""Values of few bits as compressed-tensors has them: bit by bit against tests/reference/formats.py, which is held
against the library's own files, back to the dense folder to the bit, and in transformers where the library is there."""

import json
import math
from importlib import import_module
from pathlib import Path

import pytest
import torch
from reference.formats import FORMATS as DECODED
from reference.formats import halves
from safetensors.torch import load_file, save_file
from support.families import tiny_model
from support.grids import drawn, grid, on_grid
from support.quantised import MODULES, dense_llama, fixture, quantised_llama
from torch import Tensor
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

import secateur
from secateur.checkpoints.folder import INDEX, open_checkpoint
from secateur.checkpoints.quantised.formats import plain_source
from secateur.deployment.formats.codes import codes_of
from secateur.deployment.formats.compressed_values import words
from secateur.errors import BadPattern, NonFinite, UnsupportedModel
from secateur.methods.values import find_codes
from secateur.system.progress import Progress

GRIDS = (
    "int8", "int8 of group 64", "int4 of group 64", "int4 of group 32", "int4 of row", "int3 of group 32",
    "int2 of group 64", "int4 asymmetric of group 32", "int3 asymmetric of row", "int8 asymmetric of group 64", "fp8",
    "nvfp4", "mxfp4",
)  # fmt: skip
FORMAT = {"fp8": "float-quantized", "nvfp4": "nvfp4-pack-quantized", "mxfp4": "mxfp4-pack-quantized"}
MATRICES = 4 * 7
SITE = "model.layers.1.mlp.down_proj"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))


class Notes(Progress):
    """What a run says."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def note(self, text: str) -> None:
        self.texts.append(text)


def tensors(folder: Path) -> dict[str, Tensor]:
    checkpoint = open_checkpoint(folder)
    return {name: checkpoint.tensor(name) for name in checkpoint.places}


def packed(folder: Path, out: Path, text: str | None = None) -> Path:
    secateur.export(folder, out=out, to="compressed-tensors", values=text)
    return out


def settings(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def parts_of(stored: dict[str, Tensor], module: str) -> dict[str, Tensor]:
    found = {name: tensor for name, tensor in stored.items() if name.startswith(f"{module}.weight")}
    return {name.removeprefix(f"{module}."): tensor for name, tensor in found.items()}


def same(one: Tensor, other: Tensor) -> bool:
    """Whether dtype, shape and bytes are equal."""
    return (
        one.dtype == other.dtype and one.shape == other.shape and one.view(torch.uint8).equal(other.view(torch.uint8))
    )


# What is written


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_words_are_a_stream_of_bits(bits):
    codes = torch.randint(2**bits, (3, 41), generator=torch.Generator().manual_seed(0))
    found = words(codes, bits)
    for row, stored in zip(codes.tolist(), found, strict=True):
        stream = sum(code << bits * place for place, code in enumerate(row))
        whole = stream.to_bytes(4 * math.ceil(41 * bits / 32), "little")
        assert stored.numpy().tobytes() == whole


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("text", GRIDS)
def test_what_lies_on_a_grid_comes_back_to_the_bit(tmp_path, text, dtype):
    dense, notes = on_grid(text, tmp_path / "dense", dtype), Notes()
    secateur.export(dense, out=tmp_path / "out", to="compressed-tensors", values=text, progress=notes)
    assert notes.texts == []
    before, after = tensors(dense), tensors(tmp_path / "out")
    scheme = settings(tmp_path / "out")["config_groups"]["group_0"]
    modules = [name.removesuffix(".weight_scale") for name in after if name.endswith(".weight_scale")]
    assert len(modules) == MATRICES
    for module in modules:
        decoded = DECODED["ct"](parts_of(after, module), scheme["weights"])
        assert torch.equal(decoded.to(dtype), before[f"{module}.weight"])
    others = before.keys() - {f"{module}.weight" for module in modules}
    assert all(same(after[name], before[name]) for name in others)
    secateur.export(tmp_path / "out", out=tmp_path / "back", to="dense")
    back = tensors(tmp_path / "back")
    assert back.keys() == before.keys()
    assert all(same(back[name], tensor) for name, tensor in before.items())
    source = plain_source(tmp_path / "out")
    assert source is not None
    assert all(torch.equal(tensor.read().to(dtype), before[tensor.name]) for tensor in source.tensors)


LIBRARY = {
    "ct-int4": "int4 of group 32",
    "ct-int4-zeros": "int4 asymmetric of group 32",
    "ct-int3-zeros": "int3 asymmetric of group 32",
    "ct-int8-packed": "int8",
    "ct-fp8-channel": "fp8",
    "ct-mxfp4": "mxfp4",
}


@pytest.mark.parametrize("name", LIBRARY)
def test_the_bytes_are_those_that_the_library_wrote(tmp_path, name):
    """But for some groups that lie on the grid in two ways, and for its zeros with a sign in mxfp4."""
    source = plain_source(quantised_llama(name, tmp_path / "model"))
    assert source is not None
    decoded = {tensor.name: tensor.read() for tensor in source.tensors}
    out = tensors(packed(dense_llama(decoded, tmp_path / "dense"), tmp_path / "out", LIBRARY[name]))
    for module, matrix in MODULES.items():
        found, wanted = parts_of(out, f"model.layers.0.{module}"), fixture(name).parts[matrix]
        assert found.keys() == wanted.keys()
        for part, tensor in wanted.items():
            assert (found[part].dtype, found[part].shape) == (tensor.dtype, tensor.shape)
            ours, theirs = found[part], tensor
            if part == "weight_packed" and name == "ct-mxfp4":
                ours, theirs = halves(ours), halves(theirs)
            assert (ours.float() == theirs.float()).float().mean() > 0.99, part
    said, wanted_words = settings(tmp_path / "out"), fixture(name).config["quantization_config"]
    assert said["format"] == wanted_words["format"]
    group = wanted_words["config_groups"]["group_0"]
    assert group["weights"].items() <= said["config_groups"]["group_0"]["weights"].items()


def test_config_says_what_the_library_says(tmp_path):
    dense = on_grid("int4 of group 64", tmp_path / "dense")
    out = packed(dense, tmp_path / "out", "int4 of group 64")
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (dense, out))
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "group_size": 64, "strategy": "group", "dynamic": False}
    scheme = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    assert after.pop("quantization_config") == {
        "version": "0.20.1",
        "quant_method": "compressed-tensors",
        "transform_config": {},
        "config_groups": {"group_0": scheme | {"format": "pack-quantized"}},
        "kv_cache_scheme": None,
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "ignore": ["lm_head"],
        "moe_sparsity_config": None,
    }
    assert after == before
    index, shards = json.loads((out / INDEX).read_text()), json.loads((dense / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors(out).values())
    whole = {name: name.replace(".weight_", " ").split(" ")[0] for name in index["weight_map"]}
    for name, module in whole.items():
        assert index["weight_map"][name] == shards["weight_map"][name if name == module else f"{module}.weight"]
    record = json.loads((out / "pruning.json").read_text())["exported"]
    assert record["options"] == {"values": "int4 of group 64"}
    assert "note" not in record


def test_joined_matrices_share_a_power_of_two(tmp_path):
    dense = on_grid("nvfp4", tmp_path / "dense")
    for file in dense.glob("*.safetensors"):
        held = load_file(file)
        for name in held:
            if name.endswith("k_proj.weight"):
                held[name] = held[name] * 64
        save_file(held, file, {"format": "pt"})
    stored = tensors(packed(dense, tmp_path / "out", "nvfp4"))
    for block in range(4):
        layer = f"model.layers.{block}."
        scales = {
            name: float(stored[f"{layer}{name}.weight_global_scale"]) for name in
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
        }  # fmt: skip
        assert all(math.frexp(scale)[0] == 0.5 for scale in scales.values())
        assert len({scales[f"self_attn.{letter}_proj"] for letter in "qkv"}) == 1
        assert scales["mlp.gate_proj"] == scales["mlp.up_proj"]
        assert 16 < scales["mlp.gate_proj"] / scales["self_attn.k_proj"] < 256


# What does not lie on a grid


def nearest_of(table: list[float], ratio: float) -> float:
    return min(table, key=lambda level: abs(level - ratio))


def slow_nearest(weight: Tensor, text: str) -> Tensor:
    """A matrix rounded group by group: its largest weight is the highest level, scales have 8 bits (or 4, or 1)."""
    values, rows = grid(text), []
    levels = {"nvfp4": [0, 0.5, 1, 1.5, 2, 3, 4, 6], "mxfp4": [0, 0.5, 1, 1.5, 2, 3, 4, 6]}.get(values.name)
    lowest, highest = (-6.0, 6.0) if levels else (-(2.0 ** (values.grid.bits - 1)), 2.0 ** (values.grid.bits - 1) - 1)
    table = [float(n) for n in range(int(lowest), int(highest) + 1)]
    table = sorted({sign * level for level in levels for sign in (1, -1)}) if levels else table
    size = values.group or weight.shape[1]
    for row in weight.float().tolist():
        made = []
        for start in range(0, len(row), size):
            group = row[start : start + size]
            largest = max(abs(value) for value in group) / highest
            mantissa, exponent = math.frexp(largest)
            steps = 2**values.grid.scale_bits
            scale = math.ldexp(round(mantissa * steps) / steps, exponent) or 1.0
            made += [nearest_of(table, value / scale) * scale for value in group]
        rows.append(made)
    return torch.tensor(rows)


@pytest.mark.parametrize("text", ["int4 of group 32", "int8", "nvfp4", "mxfp4"])
def test_what_does_not_lie_on_a_grid_is_rounded_to_nearest(text):
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(0)).bfloat16() * 0.1
    weight[:, ::3] = 0
    weight[2] = 0
    coded = codes_of(weight, grid(text))
    assert coded.rounded
    found = coded.codes.dense()
    wanted = slow_nearest(weight, text)  # which takes the lower of two that are as near
    torch.testing.assert_close((found - weight).abs(), (wanted - weight).abs(), rtol=1e-5, atol=1e-7)
    assert torch.equal(found == 0, wanted == 0)
    assert (found[weight == 0] == 0).all()
    again = codes_of(found, grid(text))
    assert not again.rounded
    assert torch.equal(again.codes.dense(), found)


def test_an_asymmetric_grid_rounds_by_half_a_step_at_most():
    values = grid("int4 asymmetric of group 32")
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)).abs() + 0.1
    weight[:, ::2] = 0
    weight[4:] *= -1
    codes = codes_of(weight, values).codes
    steps = codes.scales.repeat_interleave(32, 1)
    assert ((codes.dense() - weight).abs() <= 0.5 * steps + 2**-7 * weight.abs()).all()
    numbers = codes.levels.unflatten(1, (2, 32)) + codes.zero_points[..., None]
    assert 0 <= numbers.min() <= numbers.max() <= 15
    assert (codes.dense()[weight == 0] == 0).all()


def test_rounding_is_said_and_counted(tmp_path):
    notes = Notes()
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    secateur.export(tmp_path / "dense", out=tmp_path / "out", to="compressed-tensors", values="int8", progress=notes)
    said = "28 of 28 matrices did not lie on int8 and were rounded to nearest: model.layers.0."
    assert notes.texts[0].startswith(said)
    assert notes.texts[0].endswith("Rounding that spares the outputs is 'secateur prune --values'.")
    assert json.loads((tmp_path / "out" / "pruning.json").read_text())["exported"]["note"] == notes.texts[0]


def test_scales_that_a_dtype_lacks_are_those_nearest_to_them(tmp_path):
    """float16 has no 8 significant bits at 2^-20; of these groups alone the levels change."""
    dense = on_grid("int4 of group 32", tmp_path / "dense", torch.float16)
    name, file = f"{SITE}.weight", dense / open_checkpoint(dense).places[f"{SITE}.weight"].shard
    held = load_file(file)
    held[name][3, :32] = held[name][3, :32] * 2.0**-13
    save_file(held, file, {"format": "pt"})
    notes = Notes()
    secateur.export(dense, out=tmp_path / "out", to="compressed-tensors", values="int4 of group 32", progress=notes)
    stored = tensors(tmp_path / "out")
    found = DECODED["ct"](parts_of(stored, SITE), settings(tmp_path / "out")["config_groups"]["group_0"]["weights"])
    assert len(notes.texts) <= 1
    assert torch.equal(found[:, 32:], held[name][:, 32:])
    assert torch.equal(found[4:], held[name][4:])
    assert (found[held[name] == 0] == 0).all()
    assert (found - held[name])[3, :32].abs().max() <= 2.0**-23


# What prune left out, and what it said


def record(folder: Path, values: str, left: tuple[str, ...] = ()) -> None:
    sites = [{"site": site, "pattern": None} for site in left] + [{"site": "model.other", "pattern": "50%"}]
    (folder / "pruning.json").write_text(json.dumps({"values": values, "sites": sites}))


def test_the_record_says_the_values_and_what_was_left_out(tmp_path):
    dense = on_grid("int4 of group 64", tmp_path / "dense")
    file = dense / open_checkpoint(dense).places[f"{SITE}.weight"].shard
    held = load_file(file)
    held[f"{SITE}.weight"] = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    save_file(held, file, {"format": "pt"})
    record(dense, "int4 of group 64 by sweep", (SITE, "model.layers.2.mlp.down_proj"))
    out = packed(dense, tmp_path / "out")
    assert settings(out)["config_groups"]["group_0"]["weights"]["group_size"] == 64
    assert settings(out)["ignore"] == ["lm_head", SITE]
    assert same(tensors(out)[f"{SITE}.weight"], held[f"{SITE}.weight"])
    record(dense, "int4 of group 64")
    out = packed(dense, tmp_path / "all")
    assert settings(out)["ignore"] == ["lm_head"]
    assert "1 of 28 matrices" in json.loads((out / "pruning.json").read_text())["exported"]["note"]


def test_experts_are_packed_one_by_one(tmp_path):
    dense = on_grid("int4 of group 32", tmp_path / "dense", family="mixtral")
    out = packed(dense, tmp_path / "out", "int4 of group 32")
    gates = [f"model.layers.{block}.block_sparse_moe.gate" for block in range(4)]
    assert settings(out)["ignore"] == ["lm_head", *gates]
    assert "model.layers.0.block_sparse_moe.experts.0.w1.weight_packed" in tensors(out)
    secateur.export(out, out=tmp_path / "back", to="dense")
    back = tensors(tmp_path / "back")
    assert all(same(back[name], tensor) for name, tensor in tensors(dense).items())


def spoilt(folder: Path, value: float) -> Path:
    model = tiny_model("llama")
    model.get_parameter(f"{SITE}.weight").data[3, 4] = value
    model.save_pretrained(folder)
    return folder


def test_what_cannot_be_written_says_why(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "dense")
    for text, said in (
        ("int4", r"int4 of group 128 needs inputs in groups of 128; .*q_proj has 64\. Say 'int4 of group 64'\."),
        (None, r"has no values in its record; .* Say which with --values: int8, int4"),
        ("as stored", r"cannot be packed 'as stored'; compressed-tensors stores few bits"),
        ("int5", r"'int5' is no kind of values\. Say 'as stored', int8, int4"),
        ("nvfp4 asymmetric", r"nvfp4 has levels of both signs and no zero point"),
    ):
        with pytest.raises(BadPattern, match=said):
            packed(tmp_path / "dense", tmp_path / "out", text)
    for value in (math.nan, math.inf):
        folder = spoilt(tmp_path / str(value), value)
        with pytest.raises(NonFinite, match=rf"{SITE}\.weight holds NaN or Inf"):
            packed(folder, tmp_path / "out", "int8")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("family", "text", "said"),
    [
        ("gpt2", "int8", r"h\.0\.attn\.c_attn\.weight lies \[inputs, outputs\] on disk"),
        ("gpt_oss", "int8", r"gate_up_proj holds all experts of a block in one tensor \[4, 64, 256\]"),
        ("mixtral", "nvfp4", r"experts\.0\.w1\.weight is of an expert, and transformers loses what nvfp4 needs"),
        ("mixtral", "int8 asymmetric", r"experts\.0\.w1\.weight is of an expert, .* Say --values 'int4 of group 32'"),
    ],
)
def test_what_no_loader_reads_is_refused(tmp_path, family, text, said):
    tiny_model(family).save_pretrained(tmp_path / "dense")
    with pytest.raises(UnsupportedModel, match=said):
        packed(tmp_path / "dense", tmp_path / "out", text)


def test_a_quantised_source_is_fine(tmp_path):
    out = packed(quantised_llama("awq", tmp_path / "model"), tmp_path / "out", "int8 of group 32")
    assert settings(out)["format"] == "pack-quantized"
    again = packed(out, tmp_path / "again", "int8 of group 32")
    before, after = tensors(out), tensors(again)
    assert before.keys() == after.keys()
    assert all(same(after[name], tensor) for name, tensor in before.items())


# In transformers, with the library


IDS = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "mixtral"])
@pytest.mark.parametrize("text", GRIDS)
def test_transformers_computes_with_the_same_weights(tmp_path, text, family):
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    if family == "mixtral" and ("asymmetric" in text or text == "nvfp4"):
        pytest.skip("refused")
    dense = on_grid(text, tmp_path / "dense", family=family)
    out = packed(dense, tmp_path / "out", text)
    plain = AutoModelForCausalLM.from_pretrained(dense)
    # transformers 5.23 packs no zero points when it makes room for a checkpoint's, and so reads none
    unpacking = [True] if "asymmetric" in text else [False, True]
    for dequantize in unpacking:
        config = CompressedTensorsConfig(dequantize=True) if dequantize else None
        options = {"quantization_config": config} if config else {}
        model = AutoModelForCausalLM.from_pretrained(out, **options)
        assert torch.equal(model(IDS).logits, plain(IDS).logits)
        weights = dict(model.named_parameters())
        for name, weight in plain.named_parameters():
            assert torch.equal(weights[name], weight), name
            assert (weights[name] == 0).sum() == (weight == 0).sum()


@pytest.mark.parametrize("text", GRIDS)
def test_the_library_packs_the_same_bytes_of_the_same_codes(tmp_path, text):
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    quantization = import_module("compressed_tensors.quantization")
    registry = import_module("compressed_tensors.compressors").BaseCompressor
    weight = drawn(text, (64, 128), torch.bfloat16)
    dense = on_grid(text, tmp_path / "dense")
    file = dense / open_checkpoint(dense).places[f"{SITE}.weight"].shard
    held = load_file(file)
    save_file(held | {f"{SITE}.weight": weight}, file, {"format": "pt"})
    out = packed(dense, tmp_path / "out", text)
    parts = parts_of(tensors(out), SITE)
    scheme = quantization.QuantizationScheme.model_validate(settings(out)["config_groups"]["group_0"])
    compressor = registry.get_value_from_registry(FORMAT.get(text, "pack-quantized"))
    codes = find_codes(weight, grid(text))
    assert codes is not None
    state: dict[str, Tensor] = {"weight": weight.float(), "weight_scale": codes.scales}
    if grid(text).asymmetric:
        state["weight_zero_point"] = (codes.zero_points - 2 ** (grid(text).grid.bits - 1)).to(torch.int8)
    if text == "nvfp4":
        state["weight_global_scale"] = parts["weight_global_scale"]
        state["weight_scale"] = codes.scales * parts["weight_global_scale"]
    made = compressor.compress(state, scheme)
    zero = (weight == 0).unflatten(1, (codes.scales.shape[1], -1)).all(2)  # of which a scale may be any
    for part, tensor in made.items():
        found = parts[part] if part != "weight_scale" else torch.where(zero, tensor, parts[part].to(tensor.dtype))
        assert torch.equal(found.to(tensor.dtype), tensor), part
    assert made.keys() == parts.keys()
