"""Folders that somebody spoilt on purpose: what fuzzing found, each once, and a slice of the same mutations.

bench/fuzz.py runs thousands of cases; what is allowed is in fuzzing.py. Every case here once was a traceback, a hang,
memory without bounds, a control character on the terminal, a made-up number, or a copy of somebody's private file.
"""

import json
import os
import shutil
from importlib.util import find_spec
from random import Random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.families import tiny_model
from support.fuzzing import bases, difference, judged, run_case, snapshot
from support.mutations import FILES, KINDS, PACKED, Case
from support.spoilt_shards import KEY, parts, write

import secateur
from secateur import errors
from secateur.checkpoints import copied
from secateur.checkpoints.folder import open_checkpoint
from secateur.checkpoints.quantised import gptq
from secateur.checkpoints.result_folder import output
from secateur.errors import BadCheckpoint, ConditionsDiffer, UnsupportedModel
from secateur.evaluation.comparison.row_store import RowStore
from secateur.models.load import load
from secateur.system import files, json_files, typed

SHARD = "model.safetensors"


@pytest.fixture(scope="session")
def sound(tmp_path_factory):
    """The sound folders, of one family."""
    place = tmp_path_factory.mktemp("sound") / "folders"
    bases(place, whole=False)
    return place


@pytest.fixture
def spoilt(sound, tmp_path):
    """A function that copies a sound folder, to be spoilt."""

    def spoilt(base: str) -> Case:
        case = Case(tmp_path / "case", Random(0), base)
        shutil.copytree(sound / base, case.model)
        shutil.copytree(sound / "sentinel", case.sentinel)
        shutil.copy(sound / "plan.json", case.root)
        return case

    return spoilt


@pytest.fixture
def result(sound):
    """A function that runs a command on a case: (result, what was said), with nothing else changed."""

    def result(case: Case, command: str) -> tuple[str, str]:
        before = snapshot(case.root)
        found = judged(case, command, sound / "text.jsonl")
        assert snapshot(case.root) == before, "something was left behind, or the source was touched"
        return found

    return result


@pytest.fixture
def refused(result):
    """A function that runs a command, which must say one sentence that holds `words`."""

    def refused(case: Case, command: str, words: str) -> None:
        found, said = result(case, command)
        assert found == "refused", f"{found}: {said}"
        assert words in said

    return refused


def change(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


SLICE = (
    "header", "index", "files", "config", "record", "plan", "packed", "bitmask", "quantisation", "parts", "quantised",
    "gguf", "values", "onnx",
)  # fmt: skip


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 10**6))
def test_a_slice_of_the_mutations(sound, tmp_path, number):
    root = tmp_path / "case"
    root.mkdir()
    outcome = run_case(0, number, sound, root, SLICE)
    assert not outcome.fault, outcome


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_number_is_the_same_case(sound, tmp_path, kind, monkeypatch):
    if kind in ("rows", "results"):
        pytest.skip("needs a finished comparison, which bench/fuzz.py makes")
    monkeypatch.setattr("support.fuzzing.judged", lambda *_: ("ok", ""))
    found = []
    for _ in range(2):
        (tmp_path / "case").mkdir()
        found.append(run_case(3, 5, sound, tmp_path / "case", (kind,)))
    assert found[0] == found[1]


@pytest.mark.parametrize("base", [*PACKED, *FILES])
def test_sound_sources_are_what_their_formats_say(spoilt, result, base):
    if not find_spec("gguf") and base in FILES:
        pytest.skip("the package gguf is not installed")
    case = spoilt(base)
    for command in ("read", "plain", "inspect --json"):
        assert result(case, command) == ("ok", "")


@pytest.mark.parametrize("command", ["read", "plain", "prune magnitude", "inspect --json"])
def test_a_source_that_is_read_wrongly_is_found(spoilt, result, command, monkeypatch):
    case = spoilt("quantised-gptq-4-order")
    right = gptq._zeros
    monkeypatch.setattr(gptq, "_zeros", lambda *args: right(*args).roll(1, 1))
    found, detail = result(case, command)
    assert found == "wrong result"
    assert "its source" in detail


def test_a_tensor_that_is_written_wrongly_is_found(spoilt, monkeypatch):
    """The result of a plain source is held against it too."""
    case = spoilt("llama")
    tensors = load_file(case.model / SHARD)
    case.out.mkdir()
    (case.out / "pruning.json").write_text('{"sites": [{"site": "model.layers.0.mlp.up_proj"}]}')
    wrong = {"lm_head.weight": (0, "is torch.float32"), "model.layers.0.mlp.up_proj.weight": (0, "")}
    for name, (value, words) in wrong.items():
        changed = {**tensors, name: tensors[name] * value}
        save_file(changed, case.out / SHARD, {"format": "pt"})
        found = difference(case, "prune", "")
        assert words in found
        assert bool(found) == bool(words)
    del tensors["model.norm.weight"]
    save_file(tensors, case.out / SHARD, {"format": "pt"})
    assert difference(case, "prune", "") == "model.norm.weight is missing"


@pytest.mark.parametrize("command", ["inspect", "validate packed", "prune magnitude", "open"])
@pytest.mark.parametrize("base", ["llama", "sharded", "pruned"])
def test_sound_folders_are_no_faults(spoilt, result, base, command):
    assert result(spoilt(base), command)[0] in ("ok", "not kept")


# Shards.


@pytest.mark.parametrize("name", ["a\nb", "\x1b[2J", "a\x00b", "\u202eabc", "x" * 5000])
def test_names_that_cannot_be_printed(spoilt, refused, name):
    case = spoilt("llama")
    header, data = parts(case.model / SHARD)
    header[name] = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    write(case.model / SHARD, json.dumps(header).encode(), data)
    refused(case, "inspect", "holds a tensor with the name ")


@pytest.mark.parametrize("name", ["a\nb.safetensors", "\x1b[31m.safetensors", "\u2028.safetensors"])
def test_names_of_shards_that_cannot_be_printed(spoilt, refused, name):
    case = spoilt("sharded")
    change(case.model / "model.safetensors.index.json", weight_map={name: name})
    refused(case, "inspect", "which is missing")


def test_sites_of_whole_numbers(spoilt, result, refused):
    case = spoilt("pruned")
    header, data = parts(case.model / SHARD)
    header["model.layers.0.self_attn.o_proj.weight"]["dtype"] = "U16"
    write(case.model / SHARD, json.dumps(header).encode(), data)
    refused(case, "export sparse-bitmask", "model.layers.0.self_attn.o_proj is stored as torch.uint16")
    assert result(case, "export packed")[0] == "ok"


@pytest.mark.parametrize("to", ["gguf", "tensorrt-llm"])
def test_the_model_type_says_what_a_model_is(spoilt, result, refused, to):
    case = spoilt("pruned")
    for odd in ([], {}, 5, "\x1b[31m"):
        change(case.model / "config.json", architectures=[odd])
        assert result(case, f"export {to}")[0] == "ok"
        shutil.rmtree(case.out)
    change(case.model / "config.json", model_type="vit")
    refused(case, f"export {to}", "holds a vit model, which is no causal language model")


def test_a_folder_does_not_choose_how_attention_is_computed(spoilt):
    case = spoilt("llama")
    change(case.model / "config.json", _attn_implementation="flex_attention")
    assert load(case.model).model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("shape", [[8192], [64, 128], [128, 64, 1], [1, 8192]])
@pytest.mark.parametrize("command", ["inspect --json", "validate tensorrt-llm", "export packed"])
def test_sites_of_another_shape(spoilt, refused, shape, command):
    case = spoilt("pruned")
    header, data = parts(case.model / SHARD)
    header["model.layers.1.mlp.gate_proj.weight"]["shape"] = shape
    write(case.model / SHARD, json.dumps(header).encode(), data)
    refused(case, command, f"model.layers.1.mlp.gate_proj.weight is {shape}, not [128, 64]")


def test_a_site_without_weights_has_no_share_of_zeros(spoilt, refused):
    case = spoilt("llama")
    tensors = load_file(case.model / SHARD)
    tensors["model.layers.1.mlp.gate_proj.weight"] = torch.zeros(0, 64)
    save_file(tensors, case.model / SHARD, {"format": "pt"})
    refused(case, "inspect --json", "is [0, 64], not [128, 64]")


def test_empty_matrices_of_an_unknown_model(spoilt, result):
    case = spoilt("llama")
    change(case.model / "config.json", model_type="unheard-of")
    tensors = load_file(case.model / SHARD)
    save_file({**tensors, "empty": torch.zeros(0, 4)}, case.model / SHARD, {"format": "pt"})
    assert result(case, "inspect --json")[0] == "ok"
    assert result(case, "validate packed")[0] in ("ok", "not kept")


@pytest.mark.parametrize("dtype", ["F4", "C64"])
def test_dtypes_that_are_not_known_here(spoilt, result, dtype):
    case = spoilt("llama")
    header, data = parts(case.model / SHARD)
    entry = header["model.layers.1.mlp.gate_proj.weight"]
    entry |= {"dtype": dtype, "shape": [128, 512 if dtype == "F4" else 32]}
    write(case.model / SHARD, json.dumps(header).encode(), data)
    change(case.model / "config.json", model_type="unheard-of")
    assert result(case, "inspect --json")[0] == "ok"
    (odd,) = [tensor for tensor in secateur.inspect(case.model).tensors if tensor.dtype == dtype]
    assert odd.sparsity is None
    assert secateur.inspect(case.model).sparsity is None


def test_thousands_of_tensors_take_seconds(spoilt, result):
    case = spoilt("sparse-bitmask")
    header, data = parts(case.model / SHARD)
    header |= {f"x{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(5000)}
    write(case.model / SHARD, json.dumps(header).encode(), data)
    assert result(case, "export dense")[0] == "ok"


def test_tensors_are_read_as_the_library_reads_them(spoilt):
    checkpoint = open_checkpoint(spoilt("pruned").model)
    for name, tensor in load_file(checkpoint.folder / SHARD).items():
        assert torch.equal(checkpoint.tensor(name), tensor)
        assert checkpoint.tensor(name).dtype == tensor.dtype


def test_a_token_for_the_unknown_that_is_unknown(spoilt, refused):
    """transformers looks for it until the stack ends."""
    case = spoilt("llama")
    change(case.model / "tokenizer_config.json", unk_token="")
    refused(case, "export gguf", "names '' as its unk_token, which its vocabulary does not have")


# What is no plain file.


@pytest.mark.parametrize(
    "name", ["pruning.json", "generation_config.json", "tokenizer.json", "config.json", "note.txt"]
)
@pytest.mark.parametrize("command", ["inspect", "prune", "export packed"])
def test_pipes_are_not_waited_for(spoilt, refused, name, command):
    case = spoilt("llama")
    (case.model / name).unlink(missing_ok=True)
    os.mkfifo(case.model / name)
    refused(case, command, "is a pipe, a device or a socket; only plain files were wanted")


def test_devices_are_not_read(spoilt, refused):
    case = spoilt("llama")
    (case.model / "added_tokens.json").symlink_to("/dev/zero")
    refused(case, "prune", "is a pipe, a device or a socket")


@pytest.mark.parametrize("name", ["added_tokens.json", "config.json", "pruning.json"])
def test_texts_of_absurd_sizes_are_not_read(spoilt, refused, name):
    case = spoilt("llama")
    with (case.model / name).open("wb") as stream:
        stream.truncate(2**40)
    refused(case, "prune", "has 1,099,511,627,776 bytes, too many for a .json file")


@pytest.mark.parametrize("command", ["prune magnitude", "export packed"])
def test_links_to_private_files_are_not_copied(spoilt, refused, command):
    case = spoilt("pruned")
    (case.model / "notes.txt").symlink_to(case.sentinel / "secret.txt")
    refused(case, command, f"notes.txt is a link to {case.sentinel / 'secret.txt'}, outside of the folder")


def test_links_within_the_cache_of_the_hub_are_copied(spoilt, result, tmp_path):
    case = spoilt("llama")
    hub = tmp_path / "models--a--b"
    (hub / "snapshots").mkdir(parents=True)
    (hub / "blobs").mkdir()
    for file in case.model.iterdir():
        file.rename(hub / "blobs" / file.name)
        file.symlink_to(hub / "blobs" / file.name)
    snapshot_folder = case.model.rename(hub / "snapshots" / "0")
    copied.refuse_links_out(snapshot_folder)
    with output(open_checkpoint(snapshot_folder), tmp_path / "copy", overwrite=False) as written:
        assert (written.partial / "config.json").is_file()


# config.json.


@pytest.mark.parametrize("count", [10**5, 10**9, 10**30, 1e308])
@pytest.mark.parametrize("name", ["num_hidden_layers", "num_attention_heads", "num_labels", "num_local_experts"])
def test_counts_that_no_model_has(spoilt, refused, name, count):
    case = spoilt("llama")
    change(case.model / "config.json", **{name: count})
    refused(case, "inspect", f"says that {name} is {count}; no model has so many")


@pytest.mark.parametrize("command", ["inspect", "prune magnitude", "export gguf", "export tensorrt-llm"])
def test_more_blocks_than_the_weights_have(spoilt, refused, command):
    case = spoilt("llama")
    change(case.model / "config.json", num_hidden_layers=50_000)
    refused(
        case, command, "does not hold the weights its config.json describes: it has 39 tensors, the model more than"
    )


@pytest.mark.parametrize("command", ["prune magnitude", "evaluate", "export gguf", "export packed"])
@pytest.mark.parametrize("sizes", [{"vocab_size": 10**9}, {"intermediate_size": 2**32}, {"hidden_size": 2**24}])
def test_sizes_do_not_fill_the_memory(spoilt, refused, sizes, command):
    case = spoilt("llama")
    change(case.model / "config.json", **sizes)
    refused(case, command, "does not hold the weights its config.json describes: model.")


def test_tables_do_not_fill_the_memory(spoilt, refused, tmp_path):
    shutil.rmtree(spoilt("llama").model)
    case = Case(tmp_path / "case", Random(0))
    tiny_model("gpt2").save_pretrained(case.model)
    change(case.model / "config.json", n_positions=10**5)
    refused(case, "inspect", "transformer.wpe.weight is [128, 64], not [100000, 64]")


def test_a_model_that_cannot_be_run(tmp_path):
    tiny_model("mixtral").save_pretrained(tmp_path)
    change(tmp_path / "config.json", num_experts_per_tok=100)
    with pytest.raises(UnsupportedModel, match=r"MixtralForCausalLM cannot be run as its config\.json sets it up: "):
        load(tmp_path)


# Tokenizers.


@pytest.mark.parametrize("command", ["prune", "evaluate", "export gguf"])
def test_a_tokenizer_that_fails_on_every_text(spoilt, refused, command):
    case = spoilt("llama")
    change(case.model / "tokenizer_config.json", model_max_length="50%")
    refused(case, command, "cannot take a text: ")


@pytest.mark.parametrize("command", ["prune", "export gguf"])
def test_a_tokenizer_that_panics_does_so_in_silence(spoilt, refused, command):
    case = spoilt("llama")
    held = json.loads((case.model / "tokenizer.json").read_text())
    held["post_processor"]["special_tokens"] = {}
    (case.model / "tokenizer.json").write_text(json.dumps(held))
    refused(case, command, "is broken: ")


def test_odd_fields_of_a_tokenizer_are_not_talked_about(spoilt, refused):
    case = spoilt("llama")
    held = json.loads((case.model / "tokenizer.json").read_text())
    held["added_tokens"][0]["option"] = held["added_tokens"][0].pop("normalized")
    (case.model / "tokenizer.json").write_text(json.dumps(held))
    refused(case, "prune magnitude", "missing field `normalized`")


# pruning.json, plans and rows.


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"sparsity": NaN}', "is no JSON (it holds nan)"),
        ('{"sparsity": 1e999}', "is no JSON (it holds inf)"),
        ('{"method": "\\ud800"}', "is no JSON ('utf-8' codec can't encode character"),
        ('{"a": ' + "[" * 900 + "]" * 900 + "}", "is no JSON (it is nested deeper than 64)"),
        ('{"parameters": true}', "is no record of a pruning run: parameters is True, which should be"),
        ('{"parameters": ["a", "b"]}', "is no record of a pruning run: parameters.0 is 'a', which should be"),
        ('{"sites": [1]}', "is no record of a pruning run: sites.0 is 1, which should be"),
        ('{"sites": [{"pattern": "2:4"}]}', "is no record of a pruning run: sites.0 lacks field 'site'"),
        ('{"method": {}}', "is no record of a pruning run: method is {}, which should be"),
    ],
)
@pytest.mark.parametrize("command", ["inspect --json", "validate tensorrt-llm", "export packed"])
def test_records_that_nobody_can_read(spoilt, refused, text, words, command):
    case = spoilt("pruned")
    (case.model / "pruning.json").write_text(text)
    refused(case, command, words)


def test_records_are_printed_as_text(spoilt, result):
    case = spoilt("pruned")
    change(case.model / "pruning.json", method="\x1b[31m[bold]red", pattern="a\nb")
    assert result(case, "inspect")[0] == "ok"
    assert result(case, "validate packed")[0] in ("ok", "not kept")


def test_json_holds_no_character_that_a_terminal_obeys(spoilt, result):
    case = spoilt("pruned")
    change(case.model / "pruning.json", method="\x9b31m\u202e\u2028")
    assert result(case, "inspect --json")[0] == "ok"


def test_a_plan_with_very_long_words(spoilt, refused):
    case = spoilt("llama")
    change(case.root / "plan.json", sites={"model.layers.0.mlp.up_proj": "x" * 10**5})
    refused(case, "prune plan", " … ")


CONDITIONS = {"evaluation": {"samples": 2}}
ROW = {
    "method": "magnitude", "pattern": "2:4", "kind": "semi-structured", "sparsity": 0.5, "perplexity": 9.0,
    "delta": 1.0, "delta_interval": [0.5, 1.5], "kl": 0.1, "top1_agreement": 0.9, "seconds": {},
    "peak_bytes": None, "disk_bytes": 9, "rank": "", "ties": [], "checkpoint": "checkpoints/magnitude-2of4",
    "allocation": "uniform", "parameters": None, "values": "as stored", "latency": [], "calibration": None, "tasks": {},
    "sites": [], "loss": [1.0, 2.0], "searched": False, "recovered": None,
}  # fmt: skip


@pytest.fixture
def store(tmp_path):
    (tmp_path / "out" / "rows").mkdir(parents=True)
    (tmp_path / "out" / "checkpoints" / "magnitude-2of4").mkdir(parents=True)
    (tmp_path / "out" / "checkpoints" / "magnitude-2of4" / "config.json").write_text("{}")
    return RowStore(tmp_path / "out" / "rows", CONDITIONS, [{"samples": 1}])


def put(store, row=ROW, conditions=CONDITIONS, calibration=None):
    held = json.dumps({"conditions": conditions, "calibration": calibration, "row": row})
    (store.folder / "magnitude-2of4.json").write_text(held)


def test_a_sound_row(store):
    put(store)
    store.check()
    row = store.get("magnitude 2:4", None)
    assert (row.method, row.delta_interval, row.latency, row.loss) == ("magnitude", (0.5, 1.5), [], [1.0, 2.0])


@pytest.mark.parametrize(
    "spoil",
    [
        {"conditions": -0.0},
        {"row": {**ROW, "checkpoint": "../../elsewhere"}},
        {"row": {**ROW, "checkpoint": "checkpoints/another"}},
        {"row": {**ROW, "sparsity": "half"}},
        {"row": {**ROW, "delta_interval": [1.0]}},
        {"row": {**ROW, "unknown": 1}},
        {"row": {"method": "magnitude"}},
        {"row": 7},
        {"row": {**ROW, "loss": [1e308, 1.0]}},
        {"row": {**ROW, "loss": ["a", 1.0]}},
        {"row": {**ROW, "loss": [float("nan"), 1.0]}},
        {"row": {**ROW, "loss": [-1.0, 1.0]}},
        {"calibration": 7},
    ],
)
def test_rows_that_are_none(store, spoil):
    put(store, **spoil)
    with pytest.raises(ConditionsDiffer, match="is no finished row"):
        store.check()


@pytest.mark.parametrize("spoil", [{"row": {**ROW, "method": "wanda"}}, {"row": {**ROW, "loss": [1.0]}}])
def test_rows_of_something_else(store, spoil):
    put(store, **spoil)
    with pytest.raises(ConditionsDiffer, match="is no row 'magnitude 2:4' over the windows at hand"):
        store.get("magnitude 2:4", None)


def test_a_row_on_other_calibration_text(store):
    put(store, calibration={"samples": 2})
    with pytest.raises(ConditionsDiffer, match=r"with calibration \{'samples': 2\}, now it is \{'samples': 1\}"):
        store.check()
    with pytest.raises(ConditionsDiffer, match=r"with calibration \{'samples': 2\}, now it is None"):
        store.get("magnitude 2:4", None)


# Packed shards.


def tell(case, **changes):
    """Change what the packed shard of a case says of itself."""
    file = case.model / f"packed-{SHARD}"
    header, data = parts(file)
    told = json.loads(header["__metadata__"][KEY])
    header["__metadata__"][KEY] = json.dumps({**told, **{k: change(told[k]) for k, change in changes.items()}})
    write(file, json.dumps(header).encode(), data)


def moved(offset: int, size: int = 0):
    """A header whose last tensor lies elsewhere, or has another size."""

    def move(text: str) -> str:
        header = json.loads(text)
        name = max((name for name in header if name != "__metadata__"), key=lambda n: header[n]["data_offsets"][0])
        start, stop = header[name]["data_offsets"]
        header[name]["data_offsets"] = [start + offset, stop + offset + size]
        return json.dumps(header)

    return move


@pytest.mark.parametrize("change", [moved(2**50), moved(-4), moved(10**30)])
def test_packed_tensors_that_do_not_adjoin(spoilt, refused, change):
    case = spoilt("packed")
    tell(case, header=change)
    refused(case, "export dense", "is no packed shard (tensors are missing, or the layout is another)")


def test_packed_tensors_of_another_size(spoilt, refused):
    case = spoilt("packed")
    tell(case, header=moved(0, 2**40))
    refused(case, "export dense", "has another size than it had. Pack the model again.")


@pytest.mark.parametrize("spoil", [{"values": lambda _: "int5"}, {"sha256": lambda _: 7}, {"header": lambda _: "[]"}])
def test_packed_shards_that_say_something_else(spoilt, refused, spoil):
    case = spoilt("packed")
    tell(case, **spoil)
    refused(case, "export dense", "is no packed shard (")


def test_packed_weights_are_not_made_up(spoilt, refused):
    case = spoilt("packed")
    change(case.model / "config.json", attention_bias=True)
    refused(
        case, "load packed", "does not hold the weights its config.json describes: it lacks model.layers.0.self_attn."
    )


def test_packed_weights_of_another_shape(spoilt, refused):
    case = spoilt("packed")
    change(case.model / "config.json", intermediate_size=136)
    refused(case, "load packed", "is [128, 64], not [136, 64]")


# What the rest stands on.


def test_printable():
    assert errors.printable("é ü … × plain") == "é ü … × plain"
    assert errors.printable("a\nb\x1b[31m\u202e\x00") == "a\\nb\\x1b[31m\\u202e\\x00"
    assert len(errors.printable("\x00" * 10**5)) < 2000


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        (typed.Whole, [1]), (typed.Number, [1, 1.5, 2**70]), (str, ["a"]), (list[typed.Whole], [[1, 2], [1, 2, 3]]),
        (dict[str, typed.Whole], [{"a": 1}]), (typed.Whole | None, [1, None]),
    ],
    ids=str,
)  # fmt: skip
def test_is_a(kind, wanted):
    values = [1, 1.5, "a", [1, 2], [1, 2, 3], {"a": 1}, None, True, float("nan"), [None], 2**70, {"a": "b"}, ["a"]]
    found = [value for value in values if typed.is_a(kind, value)]
    assert [(type(value), value) for value in found] == [(type(value), value) for value in wanted]


def test_read_json(tmp_path):
    file = tmp_path / "a.json"
    file.write_text('{"a": [NaN, "\\u00e9"]}')
    assert str(json_files.read_json(file)) == "{'a': [nan, 'é']}"
    with pytest.raises(ValueError, match="it holds nan"):
        json_files.read_json(file, finite=True)
    file.write_text('{"\\ud800": 1}')
    with pytest.raises(ValueError, match="surrogates not allowed"):
        json_files.read_json(file)
    os.truncate(file, 2**29)
    with pytest.raises(BadCheckpoint, match=r"a\.json has .* bytes"):
        files.refuse_odd_files(tmp_path)
