"""Quantised checkpoints: what is read of them is what the library that wrote them reads, to the bit."""

import json
import multiprocessing
import os
import random
import shutil
from contextlib import suppress
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from reference.quantised import block_fp8, integers_in_any_order
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.command_line import run
from support.quantised import NAMES, dense_llama, fixture, fp8_llama, gpt_oss, quantised_llama, write
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import secateur
from secateur.checkpoints.quantised import unpack
from secateur.checkpoints.quantised.formats import plain_source
from secateur.checkpoints.quantised.packed import unpacked
from secateur.checkpoints.quantised.unpack import decoded_pieces, place_of, source_of
from secateur.errors import BadCheckpoint, DiskFull, UnknownName, UnsupportedModel
from secateur.models.load import resolve
from secateur.system.progress import Progress

PREFIX = {
    "square": "model.layers.0.self_attn.q_proj",
    "up": "model.layers.1.mlp.up_proj",
    "down": "model.layers.0.mlp.down_proj",
}
FEW = (
    "ct-int4-zeros", "gptq-4-order", "awq", "bnb-nf4-nested", "bnb-int8", "modelopt-nvfp4", "mlx-4", "torchao-int4",
    "hqq-4",
)  # fmt: skip
"""One of each library."""
WORDS = {
    "ct-int4-zeros": "compressed-tensors 4-bit integers",
    "gptq-4-order": "GPTQ 4-bit, groups of 32, act-order",
    "awq": "AWQ 4-bit, groups of 32",
    "bnb-nf4-nested": "bitsandbytes NF4",
    "bnb-int8": "bitsandbytes int8",
    "modelopt-nvfp4": "NVFP4",
    "mlx-4": "MLX 4-bit, groups of 64",
    "torchao-int4": "torchao int4, groups of 32",
    "hqq-4": "HQQ 4-bit, groups of 64",
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of unpacked checkpoints is a folder of the test."""
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def digest(tensor: Tensor) -> tuple[str, str]:
    raw = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return str(tensor.dtype).removeprefix("torch."), sha256(raw).hexdigest()


def decoded(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a quantised folder as its plain model has it."""
    source = plain_source(folder)
    assert source is not None
    return {tensor.name: tensor.read() for tensor in source.tensors}


# What is decoded


@pytest.mark.parametrize("name", NAMES)
def test_every_bit_is_what_the_library_gives(name: str, tmp_path: Path):
    made, source = fixture(name), plain_source(quantised_llama(name, tmp_path / "model"))
    assert source is not None
    tensors = {tensor.name: tensor for tensor in source.tensors}
    for module, expected in made.digests.items():
        tensor = tensors[f"{PREFIX[module]}.weight"]
        assert digest(tensor.read()) == expected
        assert digest(torch.cat(list(decoded_pieces(tensor)))) == expected
    assert "quantization_config" not in source.config
    assert not any("scale" in name or "qweight" in name for name in tensors)


@pytest.mark.parametrize("name", FEW)
def test_without_settings_the_names_of_tensors_say_it(name: str, tmp_path: Path):
    if name in ("ct-int4-zeros", "mlx-4"):
        pytest.skip("the parts do not say how many bits they have")
    folder = quantised_llama(name, tmp_path / "model")
    file = folder / "config.json"
    config = json.loads(file.read_text())
    expected = decoded(folder)
    del config["quantization_config"]
    file.write_text(json.dumps(config))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in decoded(folder).items())


def test_pieces_are_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With pieces of a few rows, what is written is the same."""
    monkeypatch.setattr("secateur.checkpoints.quantised.packed.PIECE", 1)
    monkeypatch.setattr("secateur.checkpoints.quantised.packed.ROWS", 32)
    for name in FEW:
        source = plain_source(quantised_llama(name, tmp_path / name))
        assert source is not None
        tensor = next(t for t in source.tensors if t.name == "model.layers.1.mlp.up_proj.weight")
        pieces = list(decoded_pieces(tensor))
        assert len(pieces) == 4
        assert torch.equal(torch.cat(pieces), tensor.read())


def test_block_fp8_is_what_transformers_gives(tmp_path: Path):
    folder = fp8_llama(tmp_path / "model")
    stored, given = load_file(folder / "model.safetensors"), decoded(folder)
    for name in [name for name in given if "_proj" in name]:
        expected = Fp8Dequantize(None)._dequantize_one(stored[name], stored[f"{name}_scale_inv"])
        assert torch.equal(given[name], expected)


def test_exponents_as_scales_are_what_transformers_gives(tmp_path: Path):
    """MXFP8: a byte for the power of two of 32 weights."""
    folder = fp8_llama(tmp_path / "model", quant_method="mxfp8", weight_block_size=[1, 32])
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_scale_inv")]:
        rows, columns = tensors[name.removesuffix("_scale_inv")].shape
        tensors[name] = torch.randint(110, 130, (rows, columns // 32), dtype=torch.uint8)
    write(folder, tensors, {})
    for name, given in decoded(folder).items():
        if "_proj" in name:
            expected = Fp8Dequantize(None)._dequantize_one(tensors[name], tensors[f"{name}_scale_inv"], torch.float32)
            assert torch.equal(given, expected)


def test_zeros_of_autoround_are_stored_as_its_packing_says(tmp_path: Path):
    """`auto_round` stores zeros as they are, `auto_round:auto_gptq` less one (auto_round/inference/backend.py)."""
    for name, packing in (("gptq-4-order", "auto_round:auto_gptq"), ("gptq-4-v2", "auto_round")):
        folder = quantised_llama(name, tmp_path / name)
        expected = decoded(folder)
        words = {"quant_method": "auto-round", "packing_format": packing}
        write(folder, load_file(folder / "model.safetensors"), {"quantization_config": words})
        assert all(torch.equal(tensor, expected[key]) for key, tensor in decoded(folder).items())


def test_blocks_that_are_cut_short_are_those_of_deepseek(tmp_path: Path):
    folder = fp8_llama(tmp_path / "model", block=48)
    stored, given = load_file(folder / "model.safetensors"), decoded(folder)
    name = "model.layers.0.mlp.up_proj.weight"
    assert stored[f"{name}_scale_inv"].shape == (3, 2)
    assert torch.equal(given[name], block_fp8(stored[name], stored[f"{name}_scale_inv"], 48))


@pytest.mark.parametrize("shape", [(), (1,), (64, 1), (64,), (1, 128)])
def test_scales_of_a_row_a_column_or_a_tensor(shape: tuple[int, ...], tmp_path: Path):
    folder = fp8_llama(tmp_path / "model", weight_block_size=None)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    del tensors[f"{name}_scale_inv"]
    tensors[f"{name}_scale"] = scale = torch.rand(shape) + 0.5
    tensors["model.layers.1.mlp.down_proj.input_scale"] = torch.ones(())
    write(folder, tensors, {})
    wide = scale.view(-1, 1) if len(shape) == 1 else scale
    given = decoded(folder)
    assert torch.equal(given[name], tensors[name].float() * wide)
    assert "model.layers.1.mlp.down_proj.input_scale" not in given


def test_fused_experts_in_fp8(tmp_path: Path):
    folder = fp8_llama(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    experts = torch.randn(3, 64, 32).to(torch.float8_e4m3fn)
    tensors["model.layers.0.mlp.experts.gate_up_proj"] = experts
    tensors["model.layers.0.mlp.experts.gate_up_proj_scale_inv"] = scales = torch.rand(3, 4, 2)
    write(folder, tensors, {})
    each = scales.repeat_interleave(16, 1).repeat_interleave(16, 2)
    assert torch.equal(decoded(folder)["model.layers.0.mlp.experts.gate_up_proj"], experts.float() * each)


def test_mxfp4_is_what_transformers_gives(tmp_path: Path):
    folder = gpt_oss(tmp_path / "model")
    stored, given = load_file(folder / "model.safetensors"), decoded(folder)
    names = [name.removesuffix("_blocks") for name in stored if name.endswith("_blocks")]
    assert len(names) == 4
    for name in names:
        expected = convert_moe_packed_tensors(stored[f"{name}_blocks"], stored[f"{name}_scales"])
        assert given[name].dtype == torch.bfloat16
        assert torch.equal(given[name].view(torch.int16), expected.view(torch.int16))


def test_every_byte_of_mxfp4_with_every_exponent(tmp_path: Path):
    folder = gpt_oss(tmp_path / "model")
    tensors, name = load_file(folder / "model.safetensors"), "model.layers.0.mlp.experts.down_proj"
    experts, out, groups, half = tensors[f"{name}_blocks"].shape
    count = 256 * 256 // (out * groups * half)
    blocks = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).expand(256, -1, -1)
    tensors[f"{name}_blocks"] = blocks.reshape(count, out, groups, half)
    exponents = torch.arange(256, dtype=torch.uint8).view(-1, 1).expand(-1, 16)
    tensors[f"{name}_scales"] = exponents.reshape(count, out, groups)
    write(folder, tensors, {})
    expected = convert_moe_packed_tensors(tensors[f"{name}_blocks"], tensors[f"{name}_scales"])
    assert count > experts
    assert torch.equal(decoded(folder)[name].view(torch.int16), expected.view(torch.int16))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("block", [[16, 16], [1, 16], [48, 16], [16, 7]])
def test_every_byte_of_fp8(dtype: torch.dtype, block: list[int], tmp_path: Path):
    """NaN and Inf too, in blocks that divide the matrix and in such that are cut short."""
    folder = fp8_llama(tmp_path / "model", weight_block_size=block)
    tensors, name = load_file(folder / "model.safetensors"), "model.layers.0.mlp.down_proj.weight"
    rows, columns = tensors[name].shape
    tensors = {key: tensor for key, tensor in tensors.items() if "_proj" not in key}
    tensors[name] = torch.arange(rows * columns).to(torch.uint8).view(dtype).view(rows, columns)
    tensors[f"{name}_scale_inv"] = torch.randn(-(-rows // block[0]), -(-columns // block[1]))
    write(folder, tensors, {})
    scales = tensors[f"{name}_scale_inv"].repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    expected = tensors[name].float() * scales[:rows, :columns]
    assert torch.equal(decoded(folder)[name].view(torch.int32), expected.view(torch.int32))


def test_integers_in_any_order(tmp_path: Path):
    """Groups that are named input by input, which the library reads no more."""
    folder = quantised_llama("ct-int4-zeros", tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    module = "model.layers.0.mlp.down_proj"
    order = torch.randperm(128) // 32
    tensors[f"{module}.weight_g_idx"] = order.int()
    write(folder, tensors, {})
    numbers = unpacked(tensors[f"{module}.weight_packed"], 4, 128).int() - 8
    zeros = unpacked(tensors[f"{module}.weight_zero_point"].T, 4, 64).T.int() - 8
    expected = integers_in_any_order(numbers, zeros, tensors[f"{module}.weight_scale"], order.tolist())
    assert torch.equal(decoded(folder)[f"{module}.weight"], expected)


# Whole runs


def quantised(name: str, folder: Path) -> Path:
    return (
        {"fp8": fp8_llama, "mxfp4": gpt_oss}[name](folder)
        if name in ("fp8", "mxfp4")
        else quantised_llama(name, folder)
    )


@pytest.mark.parametrize("name", [*FEW, "fp8"])
def test_pruning_it_is_pruning_the_plain_model(name: str, tmp_path: Path, text_file: Path):
    folder = quantised(name, tmp_path / "model")
    matrices = {key: tensor.bfloat16() for key, tensor in decoded(folder).items() if "_proj" in key}
    dense = dense_llama(matrices, tmp_path / "dense")
    options = {"pattern": "2:4", "method": "wanda", "calibration": str(text_file), "samples": 4, "seq_len": 32}
    report = secateur.prune(folder, out=tmp_path / "out", **options)
    secateur.prune(dense, out=tmp_path / "expected", **options)
    one, other = (load_file(tmp_path / where / "model.safetensors") for where in ("out", "expected"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) and one[key].dtype == torch.bfloat16 for key in other)
    assert report.note.startswith(f"Read from {WORDS.get(name, 'block FP8 (16 x 16)')}.")
    record = json.loads((tmp_path / "out" / "pruning.json").read_text())
    assert (record["model"], record["source"]["folder"]) == (str(folder), str(folder))
    assert record["source"]["format"] == WORDS.get(name, "block FP8 (16 x 16)")
    config = (tmp_path / "out" / "config.json").read_text()
    assert "quanti" not in config
    assert json.loads(config)["dtype"] == "bfloat16"
    assert not (tmp_path / "out" / "source.json").exists()
    text = {"evaluation": str(text_file), "seq_len": 32, "windows": 4}
    one, other = (secateur.evaluate(where, dense=dense, **text) for where in (folder, dense))
    assert one.perplexity == other.perplexity == one.dense_perplexity


def test_experts_in_mxfp4_are_pruned(tmp_path: Path, text_file: Path):
    folder, dense = gpt_oss(tmp_path / "model"), tmp_path / "dense"
    shutil.copytree(folder, dense)
    config = json.loads((dense / "config.json").read_text())
    del config["quantization_config"]
    (dense / "config.json").write_text(json.dumps(config))
    write(dense, {name: tensor.bfloat16().contiguous() for name, tensor in decoded(folder).items()}, {})
    text = {"calibration": str(text_file), "samples": 4, "seq_len": 32}
    report = secateur.prune(folder, out=tmp_path / "out", pattern="50%", method="wanda", **text)
    secateur.prune(dense, out=tmp_path / "expected", pattern="50%", method="wanda", **text)
    one, other = (load_file(tmp_path / where / "model.safetensors") for where in ("out", "expected"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in other)
    assert report.note.startswith("Read from MXFP4.")
    assert secateur.inspect(folder).format == "MXFP4"


@pytest.mark.parametrize("name", [*FEW, "fp8"])
def test_inspect_and_validate_need_no_copy(name: str, tmp_path: Path, cache: Path):
    folder = quantised(name, tmp_path / "model")
    weights = {key: tensor for key, tensor in decoded(folder).items() if "_proj" in key}
    zeros = sum(int((weight == 0).sum()) for weight in weights.values())
    inspection = secateur.inspect(folder)
    assert inspection.format == WORDS.get(name, "block FP8 (16 x 16)")
    assert inspection.coverage == 1
    assert inspection.sparsity == pytest.approx(zeros / sum(w.numel() for w in weights.values()))
    assert {tensor.dtype for tensor in inspection.tensors}.isdisjoint({"BF16", "F16", "F32", "U8"})
    secateur.validate(folder, runtime="packed")
    secateur.forecast(folder, pattern="2:4", samples=4)
    assert not cache.exists()


def test_the_dtype_of_the_result_can_be_chosen(tmp_path: Path, text_file: Path):
    folder = quantised_llama("gptq-4", tmp_path / "model")
    options = {"pattern": "2:4", "method": "magnitude", "calibration": str(text_file), "samples": 2, "seq_len": 32}
    secateur.prune(folder, out=tmp_path / "out", result_dtype="float16", **options)
    assert {t.dtype for t in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.float16}
    with pytest.raises(UnknownName, match="There is no dtype of a result 'int8'"):
        secateur.prune(folder, out=tmp_path / "other", result_dtype="int8", **options)


def test_the_source_is_not_overwritten(tmp_path: Path, text_file: Path):
    folder = quantised_llama("gptq-4", tmp_path / "model")
    (folder / "pruning.json").write_text("{}")
    with pytest.raises(secateur.SecateurError, match="is the model itself"):
        secateur.prune(
            folder,
            out=folder,
            overwrite=True,
            pattern="2:4",
            method="magnitude",
            calibration=str(text_file),
            samples=2,
            seq_len=32,
        )
    assert plain_source(folder) is not None


def test_it_is_exported_as_a_dense_checkpoint(tmp_path: Path):
    folder = quantised_llama("awq", tmp_path / "model")
    secateur.export(folder, to="dense", out=tmp_path / "out")
    given = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(tensor.bfloat16(), given[name]) for name, tensor in decoded(folder).items())
    assert "quanti" not in (tmp_path / "out" / "config.json").read_text()
    assert not (tmp_path / "out" / "source.json").exists()
    record = json.loads((tmp_path / "out" / "pruning.json").read_text())
    assert record["exported"]["from"] == "AWQ 4-bit, groups of 32"


def test_the_command_line_says_what_it_reads(tmp_path: Path, text_file: Path, cache: Path):
    folder = quantised_llama("modelopt-nvfp4", tmp_path / "model")
    text = run("inspect", folder)
    assert "Stored as NVFP4; zeros are counted in what is decoded." in text
    assert "NVFP4" in text.splitlines()[-8]
    text = run(
        "prune", folder, "--out", tmp_path / "out", "--method", "magnitude", "--pattern", "2:4",
        "--calibration", text_file, "--samples", 2, "--seq-len", 32, "--result-dtype", "float16",
    )  # fmt: skip
    assert "Read from NVFP4." in text
    assert load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"].dtype == torch.float16


def test_a_pruned_model_is_recovered_beside_its_quantised_source(tmp_path: Path, text_file: Path):
    folder = quantised_llama("gptq-4", tmp_path / "model")
    text = {"samples": 2, "seq_len": 32, "calibration": str(text_file)}
    secateur.prune(folder, out=tmp_path / "pruned", pattern="2:4", method="magnitude", **text)
    secateur.recover(
        tmp_path / "pruned",
        dense=folder,
        out=tmp_path / "out",
        way="distill",
        steps=1,
        batch_size=1,
        seq_len=32,
        text=str(text_file),
    )
    assert all("2:4" in tensor.patterns for tensor in secateur.inspect(tmp_path / "out").tensors)


# The copy


class Told(Progress):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_the_copy_is_made_once_and_says_so(tmp_path: Path, cache: Path):
    folder, told = quantised_llama("mlx-4", tmp_path / "model"), Told()
    place = resolve(folder, progress=told)
    assert len(told.notes) == 1
    assert "is MLX 4-bit, groups of 64; it is unpacked to" in told.notes[0]
    assert told.notes[0].endswith("used again from there, and may be deleted.")
    made = (place / "model.safetensors").stat().st_mtime_ns
    assert resolve(folder, progress=told) == place
    assert len(told.notes) == 1
    assert (place / "model.safetensors").stat().st_mtime_ns == made
    assert (source_of(place) or {})["folder"] == str(folder)
    assert sorted(path.name for path in cache.iterdir() if path.suffix != ".lock") == [place.name]
    other = resolve(folder, dtype="float32", progress=told)
    assert other != place
    assert load_file(other / "model.safetensors")["model.norm.weight"].dtype == torch.float32
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] += 1
    write(folder, tensors, {})
    assert resolve(folder) != place


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json"])
def test_a_changed_folder_is_never_served_from_the_old_copy(file: str, tmp_path: Path):
    """Not even where size and time are the old ones."""
    folder = quantised_llama("awq", tmp_path / "model")
    place, path = resolve(folder), folder / file
    before, data = path.stat(), path.read_bytes()
    path.write_bytes(data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert resolve(folder) != place


@pytest.mark.parametrize("what", ["a tensor", "cut", "gone", "config", "record"])
def test_a_copy_that_was_changed_is_made_anew(what: str, tmp_path: Path):
    """What is loaded is the source, whatever has become of its copy."""
    folder = quantised_llama("awq", tmp_path / "model")
    place = resolve(folder)
    shard = place / "model.safetensors"
    whole = shard.read_bytes()
    if what == "a tensor":
        shard.write_bytes(whole[:-1000] + bytes(1000))
    elif what == "cut":
        shard.write_bytes(whole[:5000])
    elif what == "gone":
        shard.unlink()
    elif what == "config":
        (place / "config.json").write_text("{}")
    else:
        (place / "source.json").write_text("nonsense")
    assert resolve(folder) == place
    assert shard.read_bytes() == whole
    assert (source_of(place) or {}).keys() == {"format", "folder", "weights", "dtype"}


def test_of_several_processes_one_makes_the_copy(tmp_path: Path, cache: Path):
    """Three begin at once; the shard is written once, and all get the same folder."""
    folder = quantised_llama("gptq-3", tmp_path / "model")
    forks = multiprocessing.get_context("fork")
    begin, answers = forks.Barrier(3), forks.SimpleQueue()

    def run() -> None:
        told = Told()
        begin.wait()
        answers.put((str(resolve(folder, progress=told)), len(told.notes)))

    runs = [forks.Process(target=run) for _ in range(3)]
    for one in runs:
        one.start()
    found = [answers.get() for _ in runs]
    for one in runs:
        one.join()
    assert [one.exitcode for one in runs] == [0, 0, 0]
    assert len({place for place, _ in found}) == 1
    assert sorted(count for _, count in found) == [0, 0, 1]
    assert len([path for path in cache.iterdir() if path.suffix != ".lock"]) == 1


def test_a_copy_in_shards_is_the_same(tmp_path: Path):
    source = plain_source(quantised_llama("awq", tmp_path / "model"))
    assert source is not None
    whole, tensors = unpack.unpacked(source), {}
    expected = load_file(whole / "model.safetensors")
    (tmp_path / "parts").mkdir()
    unpack.write_plain(source, tmp_path / "parts", "bfloat16", Progress(), most=50_000)
    files = sorted((tmp_path / "parts").glob("model-*.safetensors"))
    assert len(files) > 2
    assert all(file.stat().st_size < 60_000 for file in files)
    for file in files:
        tensors |= load_file(file)
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    assert secateur.inspect(tmp_path / "parts").sparsity == secateur.inspect(whole).sparsity


def test_the_copy_has_the_templates_in_folders(tmp_path: Path):
    folder = quantised_llama("awq", tmp_path / "model")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ messages }}")
    (folder / "quant_config.json").write_text('{"w_bit": 4}')
    place = resolve(folder)
    assert (place / "additional_chat_templates" / "tools.jinja").read_text() == "{{ messages }}"
    assert not (place / "quant_config.json").exists()


def test_a_full_disk_is_told_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path):
    folder = quantised_llama("awq", tmp_path / "model")
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(unpack.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(DiskFull, match=r"unpacked it takes .* KiB in .*, where 0\.98 KiB are free\..*SECATEUR_CACHE"):
        resolve(folder)
    assert [path for path in cache.iterdir() if path.suffix != ".lock"] == []


def test_a_run_that_is_killed_leaves_no_copy(tmp_path: Path):
    folder = quantised_llama("awq", tmp_path / "model")

    class Dying(Progress):
        def advance(self, what: str, done: int, total: int) -> None:
            if done == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        resolve(folder, progress=Dying())
    source = plain_source(folder)
    assert source is not None
    place = place_of(source, "bfloat16")
    assert not place.exists()
    partial = place.with_name(f".{place.name}.partial")
    partial.mkdir()  # as kill -9 leaves it
    (partial / "model.safetensors").write_bytes(b"half")
    assert resolve(folder) == place
    assert not partial.exists()


# What is refused


def broken(name: str, change: str, folder: Path) -> Path:
    """A folder in which the parts of one module do not fit each other."""
    quantised(name, folder)
    tensors = load_file(folder / "model.safetensors")
    parts = {
        "ct-int4-zeros": "weight_scale", "gptq-4-order": "scales", "awq": "qzeros", "mlx-4": "biases",
        "bnb-nf4-nested": "weight.quant_map", "bnb-int8": "SCB", "modelopt-nvfp4": "weight_scale",
        "fp8": "weight_scale_inv", "torchao-int4": "_weight_scale", "hqq-4": "zero",
    }  # fmt: skip
    part = f"model.layers.1.mlp.down_proj.{parts[name]}"
    if change == "missing":
        del tensors[part]
    else:
        tensors[part] = torch.cat([tensors[part].view(torch.uint8)] * 3).view(tensors[part].dtype)
    write(folder, tensors, {})
    return folder


@pytest.mark.parametrize("name", [*FEW, "fp8"])
@pytest.mark.parametrize("change", ["missing", "shape"])
def test_parts_that_do_not_fit_are_refused(name: str, change: str, tmp_path: Path):
    folder = broken(name, change, tmp_path / "model")
    with pytest.raises(BadCheckpoint, match=r"model\.layers\.1\.mlp\.down_proj.*Fetch the checkpoint again\."):
        resolve(folder)


@pytest.mark.parametrize("name", NAMES)
def test_spoilt_parts_are_sentences(name: str, tmp_path: Path):
    """Parts that are gone, halved, flat, scalar, empty or of another dtype: read, or refused in words."""
    folder, draw = quantised_llama(name, tmp_path / "model"), random.Random(name)
    stored = load_file(folder / "model.safetensors")
    spoil = (
        lambda t: t[: len(t) // 2].clone(),
        lambda t: t.reshape(-1).clone(),
        lambda t: t.reshape(-1)[:1].reshape(()).clone(),
        lambda t: t[:0].clone(),
        lambda t: torch.zeros(t.shape),
        lambda t: torch.zeros(t.shape, dtype=torch.int64),
    )
    names = [key for key in stored if "_proj" in key]
    for change in [*spoil, *spoil]:
        key = draw.choice(names)
        other = change(stored[key]) if stored[key].ndim else None
        tensors = {name: tensor for name, tensor in {**stored, key: other}.items() if tensor is not None}
        write(folder, tensors, {})
        with suppress(BadCheckpoint, UnsupportedModel):
            source = plain_source(folder)
            assert source is None or all(tensor.read().shape == tensor.shape for tensor in source.tensors)


@pytest.mark.parametrize("name", ["gptq-4", "fp8"])
def test_a_file_that_is_cut_short_is_refused(name: str, tmp_path: Path):
    folder = quantised(name, tmp_path / "model")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(BadCheckpoint, match="is no sound safetensors file"):
        resolve(folder)


UP = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    ("name", "part", "change", "words"),
    [
        ("bnb-nf4", "weight.quant_map", lambda t: t.flip(0), "has a quant_map of other values than NF4 has"),
        ("bnb-fp4", "weight.quant_map", lambda t: t * 0, "has a quant_map of other values than FP4 has"),
        ("ct-nvfp4", "weight_packed", lambda t: t.unsqueeze(-1), r"has scales of shape \[128, 4\] for shape"),
        ("ct-mxfp4", "weight_scale", lambda t: t[:, :0], r"has scales of shape \[128, 0\] for shape \[128, 64\]"),
        ("gptq-4", "weight", lambda _: torch.ones(128, 64), "is there twice, packed and plain"),
        ("awq", "weight", lambda _: torch.ones(128, 64), "is there twice, packed and plain"),
        ("ct-int4", "weight", lambda _: torch.ones(128, 64), "is there twice, packed and plain"),
        ("fp8", "weight", lambda t: t.float(), r"is plain \(F32\), and has scales of packed weights beside it"),
    ],
)
def test_parts_that_contradict_each_other_are_refused(name, part, change, words, tmp_path: Path):
    """The library has the numbers of NF4 in its code; of two weights it would take one."""
    folder = quantised(name, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{UP}.{part}"] = change(tensors.get(f"{UP}.{part}")).contiguous()
    write(folder, tensors, {})
    with pytest.raises(BadCheckpoint, match=rf"{UP}.* {words}"):
        resolve(folder)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 1000 + "1" + "}" * 1000, '"\\ud800"', "7"])
def test_a_state_that_is_no_object_is_refused(text: str, tmp_path: Path):
    folder = quantised_llama("bnb-nf4", tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{UP}.weight.quant_state.bitsandbytes__nf4"] = torch.tensor(list(text.encode()), dtype=torch.uint8)
    write(folder, tensors, {})
    with pytest.raises(BadCheckpoint, match=rf"{UP}\.weight in .* has a quant_state"):
        resolve(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"nested_offset": None}, "without shape, blocksize or dtype, or those of its scales"),
        ({"nested_blocksize": None}, "without shape, blocksize or dtype, or those of its scales"),
        ({"quant_type": "fp4"}, "that says fp4, float32"),
        ({"nested_dtype": "float16"}, "that says nf4, float16"),
    ],
)
def test_a_state_of_another_kind_is_refused(change: dict[str, str | None], words: str, tmp_path: Path):
    """The library goes by what the state says, and has nothing in place of what is missing."""
    folder = quantised_llama("bnb-nf4-nested", tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    name = f"{UP}.weight.quant_state.bitsandbytes__nf4"
    state = json.loads(bytes(tensors[name].tolist())) | change
    text = json.dumps({key: value for key, value in state.items() if value is not None})
    tensors[name] = torch.tensor(list(text.encode()), dtype=torch.uint8)
    write(folder, tensors, {})
    with pytest.raises(BadCheckpoint, match=rf"{UP}\.weight in .* has a quant_state.* {words}"):
        resolve(folder)


def test_a_weight_of_torchao_lies_in_several_shards(tmp_path: Path):
    """As transformers splits them; each shard describes all weights."""
    folder = quantised_llama("torchao-int4", tmp_path / "model")
    expected, tensors = decoded(folder), load_file(folder / "model.safetensors")
    with safe_open(folder / "model.safetensors", framework="pt") as opened:
        metadata = opened.metadata()
    (folder / "model.safetensors").unlink()
    shards = {name: f"model-{1 + name.endswith('scale')}.safetensors" for name in tensors}
    for shard in set(shards.values()):
        save_file({name: t for name, t in tensors.items() if shards[name] == shard}, folder / shard, metadata)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    given = decoded(folder)
    assert given.keys() == expected.keys()
    assert all(torch.equal(given[name], tensor) for name, tensor in expected.items())


TORCHAO = {"_type": "IntxUnpackedToInt8Tensor", "_data": {"block_size": [1, 32], "dtype": {"_data": "bfloat16"}}}


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("{", r"has a weight whose description is no JSON \("),
        ("[1]", r"has a weight that is described as '\[1\]'; an object was wanted"),
        (TORCHAO | {"_data": {"block_size": [1, 32]}}, "has a weight of dtype None; one of bfloat16, "),
        (TORCHAO | {"_data": {"block_size": [1, 24], "dtype": {"_data": "float16"}}}, r"in blocks of \[1, 24\]"),
        (TORCHAO | {"_data": {"block_size": [1, 16], "dtype": {"_data": "float16"}}}, r"\[128, 4\] was wanted"),
        (
            TORCHAO | {"_type": "Int4TilePackedTo4dTensor"},
            "is a Int4TilePackedTo4dTensor of torchao; one of Int8Tensor",
        ),
        ({"_type": "Tensor"}, "is one of torchao's, and the metadata of the shards do not describe it"),
    ],
)
def test_a_description_of_torchao_that_does_not_fit_is_refused(said, words: str, tmp_path: Path):
    folder = quantised_llama("torchao-int4", tmp_path / "model")
    described = {f"{UP}.weight": said if isinstance(said, str) else json.dumps(said)}
    write(folder, load_file(folder / "model.safetensors"), {}, described)
    with pytest.raises((BadCheckpoint, UnsupportedModel), match=rf"{UP}.* {words}"):
        resolve(folder)


def test_inputs_that_torchao_scales_are_refused(tmp_path: Path):
    """SmoothQuant and AWQ divide what comes before, which a plain model would not."""
    folder = quantised_llama("torchao-int8", tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    write(folder, tensors | {f"{UP}._weight_act_pre_scale": torch.ones(64)}, {})
    with pytest.raises(BadCheckpoint, match=rf"{UP} .* has an act_pre_scale, which would have to go into what is"):
        resolve(folder)


@pytest.mark.parametrize(
    ("part", "change", "words"),
    [
        ("packing", lambda _: torch.tensor(list(b"5bit_u8"), dtype=torch.uint8), r"packed as '5bit_u8', in 'torch\.bf"),
        ("compute_dtype", lambda _: torch.tensor(list(b"os.abort()"), dtype=torch.uint8), r"in 'os\.abort\(\)'"),
        ("shape", lambda t: t * 2, r"has 128 rows of 64 numbers of 4 bits for shape \[256, 128\]"),
        ("scale", lambda t: t.T, r"has a scale of shape \[1, 128\] for 128 × 64"),
        ("zero", lambda t: t[:64], r"has zero of shape \[64, 1\]; \[128, 1\] was wanted"),
        ("W_q", lambda t: t.flatten(), r"has W_q of shape \[4096\]; a matrix was wanted"),
    ],
)
def test_parts_of_hqq_that_contradict_each_other_are_refused(part, change, words: str, tmp_path: Path):
    """The library evaluates the text of a dtype as Python; here it is looked up."""
    folder = quantised_llama("hqq-4", tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{UP}.{part}"] = change(tensors[f"{UP}.{part}"]).contiguous()
    write(folder, tensors, {})
    with pytest.raises(BadCheckpoint, match=rf"{UP} .* {words}"):
        resolve(folder)


def test_an_adapter_beside_packed_weights_is_not_left_behind(tmp_path: Path):
    folder = quantised_llama("bnb-nf4", tmp_path / "model")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(BadCheckpoint, match=r"holds a model and an adapter \(adapter_config\.json\)"):
        resolve(folder)


def test_groups_of_settings_are_those_of_compressed_tensors(tmp_path: Path):
    """Without the name of the method they are read as FP8 else, which looks for another key with the block."""
    folder = quantised_llama("ct-fp8-block", tmp_path / "model")
    expected, config = decoded(folder), json.loads((folder / "config.json").read_text())
    del config["quantization_config"]["quant_method"]
    (folder / "config.json").write_text(json.dumps(config))
    given = decoded(folder)
    assert all(torch.equal(given[name], t) and given[name].dtype == t.dtype for name, t in expected.items())


def test_groups_that_do_not_exist_are_refused(tmp_path: Path):
    folder = quantised_llama("gptq-4-order", tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.g_idx"][3] = 9
    write(folder, tensors, {})
    with pytest.raises(BadCheckpoint, match=r"q_proj in .* has g_idx from 0 to 9; 2 groups"):
        resolve(folder)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            {"quant_method": "aqlm"},
            r"is quantised by aqlm .*which cannot be read here; mlx, .* can\. Name the unquantised",
        ),
        (
            {"quant_method": "gptq", "checkpoint_format": "marlin"},
            r"GPTQ weights packed as marlin; one of gptq, gptq_v2, ",
        ),
        (
            {"quant_method": "awq", "version": "gemv"},
            r"AWQ weights of 4 bits packed as gemv; 4 bits as gemm were wanted",
        ),
        (
            {"quant_method": "compressed-tensors", "format": "marlin-24"},
            r"is stored as marlin-24 of compressed-tensors",
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"group_0": {}},
                "sparsity_config": {"format": "sparse-24-bitmask"},
            },
            r"is packed as sparse-24-bitmask, and quantised as well\. Name the model that it was made from",
        ),
    ],
)
def test_what_cannot_be_read_is_named(words: dict[str, str], message: str, tmp_path: Path):
    folder = quantised_llama("gptq-4", tmp_path / "model")
    write(folder, load_file(folder / "model.safetensors"), {"quantization_config": words})
    with pytest.raises(UnsupportedModel, match=message):
        resolve(folder)


def test_plain_weights_that_are_said_to_be_quantised(tmp_path: Path):
    folder = dense_llama({}, tmp_path / "model")
    write(folder, load_file(folder / "model.safetensors"), {"quantization_config": {"quant_method": "fp8"}})
    with pytest.raises(
        BadCheckpoint, match=r"holds no quantised weights\. If they are plain, delete quantization_config"
    ):
        resolve(folder)


# What inspect says of what it cannot count


def test_unknown_is_not_zero(tmp_path: Path):
    folder = quantised_llama("gptq-4", tmp_path / "model")
    write(folder, load_file(folder / "model.safetensors"), {"quantization_config": {"quant_method": "aqlm"}})
    inspection = secateur.inspect(folder)
    assert inspection.sparsity is None
    assert {tensor.sparsity for tensor in inspection.tensors if tensor.name.endswith("qweight")} == {None}


def test_zeros_in_eight_bit_floats_are_counted(tmp_path: Path):
    folder = dense_llama({}, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if "_proj" in name]:
        half = torch.ones_like(tensors[name])
        half[::2] = -0.0
        tensors[name] = half.to(torch.float8_e4m3fn)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert secateur.inspect(folder).sparsity == 0.5


def test_parts_of_a_model_are_kept_apart(tmp_path: Path):
    folder = dense_llama({}, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["vision_tower.blocks.0.weight"] = torch.zeros(8, 4, dtype=torch.bfloat16)
    tensors["model.embed_tokens.weight"][:] = 0
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    parts = {part.name: part for part in secateur.inspect(folder).parts}
    assert (parts["towers"].numbers, parts["towers"].sparsity) == (32, 1)
    assert parts["embeddings and head"].sparsity == pytest.approx(0.5, abs=0.01)
    assert parts["weight matrices of blocks"].sparsity == pytest.approx(0, abs=0.01)
