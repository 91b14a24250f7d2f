"""The sparse formats of compressed-tensors, against a slow reading of their layout (and see bench/legacy_formats.py).

Packed folders come from tiny models and from hand-made tensors; what cannot be packed is refused by name, and a folder
that was cut or altered is refused before anything is believed.
"""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import save_file
from support.families import tiny_config, tiny_model
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from secateur.checkpoints import shards
from secateur.checkpoints.folder import INDEX, SINGLE, open_checkpoint
from secateur.deployment.formats.compressed_tensors import CONFIG_KEYS, sparse_24_bitmask, sparse_bitmask
from secateur.errors import BadCheckpoint, BadPattern, DiskFull, NonFinite, OutputRefused, UnsupportedModel

FORMATS = {"sparse-24-bitmask": sparse_24_bitmask, "sparse-bitmask": sparse_bitmask}
SITE = "model.layers.1.mlp.down_proj"
PARTS = ("compressed", "bitmask", "shape", "row_offsets")


def slow_parts(weight: Tensor, name: str) -> dict[str, Tensor]:
    """The parts of a matrix, weight by weight as the formats describe them."""
    kept = (weight != 0).tolist()
    if name == "sparse-24-bitmask":
        largest = weight.abs().unflatten(1, (-1, 4)).topk(2).indices.tolist()
        kept = [[j in two for two in row for j in range(4)] for row in largest]
    values = [
        value for row, some in zip(weight.tolist(), kept, strict=True) for value, k in zip(row, some, strict=True) if k
    ]
    counts = [sum(row) for row in kept]
    packed = [[sum(k << j for j, k in enumerate(row[i : i + 8])) for i in range(0, len(row), 8)] for row in kept]
    compressed = torch.tensor(values, dtype=torch.float64).to(weight.dtype)
    bitmask, shape = torch.tensor(packed, dtype=torch.uint8), torch.tensor(weight.shape)
    if name == "sparse-24-bitmask":
        return {"compressed": compressed.reshape(len(weight), -1), "bitmask": bitmask, "shape": shape.reshape(2, 1)}
    offsets = torch.tensor([sum(counts[:i]) for i in range(len(counts))])
    return {"compressed": compressed, "bitmask": bitmask, "shape": shape, "row_offsets": offsets}


def slow_dense(parts: dict[str, Tensor], name: str) -> Tensor | None:
    """The matrix that the parts stand for, None where they do not agree with each other."""
    halves = name == "sparse-24-bitmask"
    sizes = parts["shape"].flatten().tolist()
    if parts["shape"].dtype != torch.int64 or list(parts["shape"].shape) not in ([2], [2, 1] if halves else [1]):
        return None
    if min(sizes) < 1 or parts["bitmask"].dtype != torch.uint8 or not parts["compressed"].is_floating_point():
        return None
    if list(parts["bitmask"].shape) != [*sizes[:-1], (sizes[-1] + 7) // 8]:
        return None
    bits = [
        [byte >> j & 1 for byte in row for j in range(8)]
        for row in parts["bitmask"].reshape(-1, parts["bitmask"].shape[-1]).tolist()
    ]
    if any(any(row[sizes[-1] :]) for row in bits):
        return None
    flat = [bit for row in bits for bit in row[: sizes[-1]]]
    if sum(flat) != parts["compressed"].numel():
        return None
    if halves:
        if sizes[1] % 2 or len(flat) % 4 or list(parts["compressed"].shape) != [sizes[0], sizes[1] // 2]:
            return None
        if any(sum(flat[i : i + 4]) != 2 for i in range(0, len(flat), 4)):
            return None
    else:
        offsets = torch.tensor([sum(map(sum, bits[:i])) for i in range(len(bits))]).reshape(sizes[:-1])
        if parts["compressed"].dim() != 1 or not torch.equal(offsets, parts["row_offsets"]):
            return None
        if parts["row_offsets"].dtype != torch.int64:
            return None
    values = iter(parts["compressed"].flatten())
    return torch.stack([next(values) if bit else torch.tensor(0.0) for bit in flat]).reshape(sizes)


def prune(model: PreTrainedModel, name: str) -> PreTrainedModel:
    """The model with zeros in its blocks: groups of four that hold two, one or none, or any half."""
    draw = torch.Generator().manual_seed(0)
    for key, parameter in model.named_parameters():
        if parameter.dim() > 1 and ".layers." in key:
            chance = torch.rand(parameter.shape, generator=draw)
            if name == "sparse-24-bitmask":
                fours = chance.unflatten(-1, (-1, 4))
                zero = ((fours < 0.4) | (fours.argsort(-1).argsort(-1) >= 2)).flatten(-2)
            else:
                zero = chance < 0.5
            parameter.data[zero] = 0
            parameter.data += 0  # a cast may have left -0.0
    return model


def llama(*, ffn: int, blocks: int = 2) -> PreTrainedModel:
    """A Llama whose down projection has that many inputs, always the same."""
    config = tiny_config("llama")
    config.num_hidden_layers, config.intermediate_size = blocks, ffn
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config)


def saved(model: PreTrainedModel, folder: Path, *, shards: bool = False) -> Path:
    model.save_pretrained(folder, max_shard_size="150KB" if shards else "1GB")
    return folder


def packed(dense: Path, out: Path, name: str) -> Path:
    """The folder that `write` makes of a dense one, beside the other files as `output` leaves them."""
    out.mkdir()
    for file in dense.iterdir():
        if file.suffix != ".safetensors":
            shutil.copyfile(file, out / file.name)
    FORMATS[name].write(open_checkpoint(dense), out)
    return out


def tensors(folder: Path) -> dict[str, Tensor]:
    checkpoint = open_checkpoint(folder)
    return {key: checkpoint.tensor(key) for key in checkpoint.places}


def read(folder: Path, name: str) -> dict[str, Tensor]:
    reader = FORMATS[name].read
    assert reader is not None
    pairs = list(reader(folder))
    assert len(pairs) == len(dict(pairs))
    return dict(pairs)


def holds(folder: Path, name: str) -> bool:
    found = FORMATS[name].holds
    assert found is not None
    return found(folder)


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    """Whether names, dtypes, shapes and bytes are equal."""
    return found.keys() == wanted.keys() and all(
        found[key].dtype == wanted[key].dtype
        and found[key].shape == wanted[key].shape
        and found[key]
        .contiguous()
        .flatten()
        .view(torch.uint8)
        .equal(wanted[key].contiguous().flatten().view(torch.uint8))
        for key in wanted
    )


def hand_made(folder: Path, held: dict[str, Tensor], name: str, *, key: str = CONFIG_KEYS[0]) -> Path:
    """A folder in the format with these tensors, told of in config.json as some version did."""
    sparsity = {"sparsity_config": {"format": name, "targets": ["Linear"]}}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(sparsity if key == "sparsity_config" else {key: sparsity}))
    save_file(held, folder / SINGLE)
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_what_is_written_follows_the_layout_and_is_read_back_bit_for_bit(tmp_path, name, dtype):
    model = llama(ffn=132 if name == "sparse-24-bitmask" else 45).to(dtype)  # type: ignore[arg-type]
    dense = saved(prune(model, name), tmp_path / "dense", shards=True)
    out = packed(dense, tmp_path / "out", name)
    before, after = tensors(dense), tensors(out)
    sites = [key.removesuffix(".weight") for key in before if ".layers." in key and before[key].dim() == 2]
    wanted = {key: tensor for key, tensor in before.items() if key.removesuffix(".weight") not in sites}
    for site in sites:
        wanted |= {f"{site}.{part}": t for part, t in slow_parts(before[f"{site}.weight"], name).items()}
    assert same(after, wanted)
    assert same(read(out, name), before)
    assert len(sites) == 2 * 7


@pytest.mark.parametrize("name", FORMATS)
def test_shards_stay_as_they_were_grouped(tmp_path, name):
    dense = saved(prune(tiny_model("llama"), name), tmp_path / "dense", shards=True)
    out = packed(dense, tmp_path / "out", name)
    before, after = (json.loads((folder / INDEX).read_text()) for folder in (dense, out))
    assert len(set(before["weight_map"].values())) > 2
    whole = {
        key: key if key in before["weight_map"] else f"{key.rpartition('.')[0]}.weight" for key in after["weight_map"]
    }
    assert {key: before["weight_map"][whole[key]] for key in whole} == after["weight_map"]
    assert after["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors(out).values())
    assert {file.name for file in out.iterdir()} == {file.name for file in dense.iterdir()}
    assert {oct(file.stat().st_mode) for file in out.iterdir()} == {oct((out / "config.json").stat().st_mode)}


@pytest.mark.parametrize("name", FORMATS)
def test_config_names_the_format_and_nothing_else_changes(tmp_path, name):
    dense = saved(prune(tiny_model("llama"), name), tmp_path / "dense")
    out = packed(dense, tmp_path / "out", name)
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (dense, out))
    said = after.pop("quantization_config")
    assert after == before
    weights = tensors(dense).values()
    sparsity = said["sparsity_config"].pop("global_sparsity")
    assert sparsity == sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)
    assert said == {
        "quant_method": "compressed-tensors",
        "version": "0.14.0.1",
        "transform_config": {},
        "sparsity_config": {
            "format": name,
            "sparsity_structure": {"sparse-24-bitmask": "2:4", "sparse-bitmask": "unstructured"}[name],
            "targets": ["Linear"],
            "ignore": ["lm_head"],
            "registry_requires_subclass": False,
        },
    }
    assert [other for other in FORMATS if holds(out, other)] == [name]
    assert not holds(dense, name)
    assert not (out / INDEX).exists()


def test_experts_are_packed_and_routers_left_out(tmp_path):
    dense = saved(prune(tiny_model("mixtral"), "sparse-24-bitmask"), tmp_path / "dense")
    out = packed(dense, tmp_path / "out", "sparse-24-bitmask")
    assert same(read(out, "sparse-24-bitmask"), tensors(dense))
    ignored = json.loads((out / "config.json").read_text())["quantization_config"]["sparsity_config"]["ignore"]
    assert ignored == ["lm_head", *(f"model.layers.{i}.block_sparse_moe.gate" for i in range(4))]
    assert f"{ignored[1]}.weight" in tensors(out)
    assert "model.layers.0.block_sparse_moe.experts.0.w1.compressed" in tensors(out)


def spoilt(tmp_path: Path, value: float, name: str) -> Path:
    model = prune(tiny_model("llama"), name)
    model.get_parameter(f"{SITE}.weight").data[3, 4:7] = value
    return saved(model, tmp_path / "dense")


@pytest.mark.parametrize(
    ("name", "value", "error", "words"),
    [
        (
            "sparse-24-bitmask",
            1.0,
            BadPattern,
            f"{SITE} is not 2:4: 1 of its 2048 groups of four inputs hold more than",
        ),
        ("sparse-24-bitmask", -0.0, BadCheckpoint, f"{SITE} holds -0.0, which sparse-24-bitmask loses. Prune again"),
        ("sparse-bitmask", -0.0, BadCheckpoint, f"{SITE} holds -0.0, which sparse-bitmask loses. Prune again"),
        ("sparse-24-bitmask", float("nan"), NonFinite, f"{SITE} holds NaN or Inf. Prune the dense model again"),
        ("sparse-bitmask", float("-inf"), NonFinite, f"{SITE} holds NaN or Inf. Prune the dense model again"),
    ],
)
def test_a_site_that_does_not_fit_is_refused_by_name(tmp_path, name, value, error, words):
    with pytest.raises(error, match=words):
        packed(spoilt(tmp_path, value, name), tmp_path / "out", name)


def test_other_refusals_to_write(tmp_path, monkeypatch):
    odd = saved(prune(llama(ffn=126), "sparse-bitmask"), tmp_path / "odd")
    for key, parameter in (model := AutoModelForCausalLM.from_pretrained(odd)).named_parameters():
        if ".layers." in key:
            parameter.data[...] = 0
    with pytest.raises(BadPattern, match=r"2:4 needs inputs in fours; model\.layers\.0\.mlp\.down_proj has 126\."):
        packed(saved(model, tmp_path / "zero"), tmp_path / "a", "sparse-24-bitmask")
    with pytest.raises(UnsupportedModel, match="has no linear layer that lies"):
        packed(saved(tiny_model("gpt2"), tmp_path / "gpt2"), tmp_path / "b", "sparse-bitmask")
    with pytest.raises(OutputRefused, match=r"model\.safetensors cannot be written"):
        sparse_bitmask.write(open_checkpoint(odd), tmp_path / "nowhere")

    def full(*arguments: object, **options: object) -> None:
        raise SafetensorError(f"Error while serializing: I/O error: {os.strerror(28)} (os error 28)")

    monkeypatch.setattr(shards, "save_file", full)
    with pytest.raises(DiskFull, match="No space left on device"):
        packed(odd, tmp_path / "c", "sparse-bitmask")


def matrix(rows: int = 3, columns: int = 12) -> Tensor:
    """A 2:4 matrix whose groups hold two weights, one and none in turn."""
    weight = torch.arange(1.0, rows * columns + 1).reshape(rows, columns)
    for start, kept in enumerate([(1, 2), (3,), ()]):
        for place in set(range(4)) - set(kept):
            weight[:, start * 4 + place :: 12] = 0
    return weight


def parts_of(weight: Tensor, name: str, base: str = "m") -> dict[str, Tensor]:
    return {f"{base}.{part}": tensor for part, tensor in slow_parts(weight, name).items()}


@pytest.mark.parametrize("key", CONFIG_KEYS)
def test_older_versions_packed_every_tensor_under_its_whole_name(tmp_path, key):
    norm = torch.tensor([0.0, 2, 0, 4, 5, 6, 7, 8, 9])
    kept = {"compressed": norm[norm != 0], "bitmask": torch.tensor([0b11111010, 1], dtype=torch.uint8)}
    kept |= {"shape": torch.tensor([9]), "row_offsets": torch.tensor(0)}
    held = {f"norm.weight.{part}": tensor for part, tensor in kept.items()}
    folder = hand_made(
        tmp_path / "old", held | parts_of(matrix(), "sparse-bitmask", "m.weight"), "sparse_bitmask", key=key
    )
    assert holds(folder, "sparse-bitmask")
    assert same(read(folder, "sparse-bitmask"), {"norm.weight": norm, "m.weight": matrix()})


def test_parts_may_lie_in_several_shards_and_groups_over_the_end_of_a_row(tmp_path):
    weight = torch.tensor([[1.0, 2, 0, 0, 3, 4], [0, 0, 5, 6, 0, 0]])  # the second group of four reaches into row 2
    held = {
        "m.compressed": torch.tensor([[1.0, 2, 3], [4, 5, 6]]),
        "m.bitmask": torch.tensor([[0b110011], [0b001100]], dtype=torch.uint8),
        "m.shape": torch.tensor([2, 6]),
        "m.bias": torch.ones(2),
    }
    folder = hand_made(tmp_path / "shards", {}, "sparse-24-bitmask")
    (folder / SINGLE).unlink()
    for number, (key, tensor) in enumerate(held.items()):
        save_file({key: tensor}, folder / f"{number}.safetensors")
    index = {"weight_map": {key: f"{number}.safetensors" for number, key in enumerate(held)}}
    (folder / INDEX).write_text(json.dumps(index))
    assert same(read(folder, "sparse-24-bitmask"), {"m.weight": weight, "m.bias": torch.ones(2)})


def test_refusals_to_read(tmp_path, tiny_llama):
    with pytest.raises(BadCheckpoint, match=r"is not in sparse-bitmask: its config\.json names no such"):
        read(tiny_llama, "sparse-bitmask")
    held = parts_of(matrix(), "sparse-24-bitmask")
    folder = hand_made(tmp_path / "bad", held | {"m.weight": matrix()}, "sparse-24-bitmask")
    with pytest.raises(BadCheckpoint, match=r"m\.weight is stored both dense and packed"):
        read(folder, "sparse-24-bitmask")
    hand_made(folder, {key: tensor for key, tensor in held.items() if key != "m.bitmask"}, "sparse-24-bitmask")
    with pytest.raises(BadCheckpoint, match="m is stored as compressed, shape; bitmask, compressed, shape were wanted"):
        read(folder, "sparse-24-bitmask")
    hand_made(folder, held | {"m.shape": torch.tensor([2**40, 12])}, "sparse-24-bitmask")
    with pytest.raises(BadCheckpoint, match=r"m\.bitmask is stored as U8 \[3, 2\], not as U8 \[1099511627776, 2\]"):
        read(folder, "sparse-24-bitmask")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["config_groups"] = {"group_0": {"weights": {"num_bits": 8}}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadCheckpoint, match=r"is quantised as well \(quantization_config\.config_groups"):
        read(folder, "sparse-24-bitmask")


@pytest.mark.parametrize(
    ("name", "part", "tensor", "words"),
    [
        ("sparse-24-bitmask", "shape", torch.tensor([0, 12]), r"m\.shape claims the sizes \(0, 12\)"),
        (
            "sparse-24-bitmask",
            "shape",
            torch.tensor([3, 11]),
            r"m\.shape claims \(3, 11\), which hold no groups of four",
        ),
        ("sparse-24-bitmask", "shape", torch.tensor([3.0, 12]), r"m\.shape is no list of one or two sizes"),
        (
            "sparse-24-bitmask",
            "compressed",
            torch.ones(3, 5),
            r"m\.compressed is stored as F32 \[3, 5\], not as F64 or",
        ),
        ("sparse-24-bitmask", "bitmask", torch.tensor([[7, 14]] * 3, dtype=torch.uint8), "does not mark two of every"),
        ("sparse-24-bitmask", "bitmask", torch.tensor([[51, 19]] * 3, dtype=torch.uint8), "inputs past the last of 12"),
        ("sparse-bitmask", "compressed", torch.ones(10), r"m\.bitmask marks 9 weights where 10 are stored"),
        ("sparse-bitmask", "row_offsets", torch.tensor([0, 3, 7]), r"m\.row_offsets does not fit the bitmask"),
    ],
)
def test_a_part_that_does_not_fit_the_others_is_named(tmp_path, name, part, tensor, words):
    folder = hand_made(tmp_path / "bad", parts_of(matrix(), name) | {f"m.{part}": tensor}, name)
    with pytest.raises(BadCheckpoint, match=words):
        read(folder, name)


@pytest.mark.parametrize(
    "text", ["", "[]", "[" * 100_000, "null", '{"quantization_config": []}', '{"sparsity_config": 7}']
)
def test_a_config_of_another_kind_holds_neither_format(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    assert not any(holds(tmp_path, name) for name in FORMATS)


sizes = st.integers(min_value=0, max_value=20)
shapes = st.lists(sizes, max_size=3)
dtypes = st.sampled_from([torch.int64, torch.uint8, torch.float32, torch.int32, torch.bool])


@st.composite
def mutations(draw: st.DrawFn) -> dict[str, Tensor]:
    """The parts of a sound matrix, one or two of them altered: an element, the dtype, the shape, or all."""
    parts = slow_parts(matrix(), draw(st.sampled_from(list(FORMATS))))
    for part in draw(st.lists(st.sampled_from(list(parts)), min_size=1, max_size=2, unique=True)):
        tensor = parts[part].clone()
        kind = draw(st.sampled_from(["element", "dtype", "reshape", "cut", "other"]))
        if kind == "element" and tensor.numel():
            value = draw(st.integers(0, 255) if tensor.dtype == torch.uint8 else st.integers(-(2**40), 2**40))
            tensor.view(-1)[draw(st.integers(0, tensor.numel() - 1))] = value
        elif kind == "dtype":
            tensor = tensor.to(draw(dtypes))
        elif kind == "reshape":
            tensor = draw(
                st.sampled_from([tensor.flatten(), tensor.unsqueeze(0), tensor.unsqueeze(-1), tensor[None].mT])
            )
        elif kind == "cut":
            tensor = tensor[: draw(st.integers(0, len(tensor)))]
        else:
            tensor = torch.ones(draw(shapes), dtype=draw(dtypes))
        parts[part] = tensor.contiguous()
    return parts


quick = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@quick
@given(parts=mutations())
def test_altered_parts_are_read_as_they_say_or_refused_by_name(tmp_path, parts):
    name = "sparse-bitmask" if "row_offsets" in parts else "sparse-24-bitmask"
    folder = hand_made(tmp_path / "altered", {f"m.{part}": tensor for part, tensor in parts.items()}, name)
    wanted = slow_dense(parts, name)
    if wanted is None:
        with pytest.raises(BadCheckpoint, match=r"^m\.(compressed|bitmask|shape|row_offsets) .*fetch it again\.$"):
            read(folder, name)
    else:
        assert same(read(folder, name), {"m.weight": wanted})


@quick
@given(place=st.integers(0, 10**6), byte=st.integers(0, 255), cut=st.booleans(), name=st.sampled_from(list(FORMATS)))
def test_no_byte_of_a_file_breaks_the_reader(tmp_path, place, byte, cut, name):
    folder = hand_made(tmp_path / "bytes", parts_of(matrix(), name), name)
    content = bytearray((folder / SINGLE).read_bytes())
    place %= len(content)
    content[place] = byte
    (folder / SINGLE).write_bytes(content[:place] if cut else content)
    try:
        found = read(folder, name)
    except BadCheckpoint:
        return
    assert all(tensor.numel() <= 8 * len(content) for tensor in found.values())
