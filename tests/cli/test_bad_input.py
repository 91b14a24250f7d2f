"""Bad input: one clear sentence and exit code 2; no output is left behind, and the source stays as it was.

Every case runs the real command line in this process and is judged by the words that the user reads.
"""

import errno
import functools
import gzip
import hashlib
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.families import tiny_config, tiny_model
from support.texts import byte_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

from secateur.checkpoints import result as output
from secateur.cli import app as cli

SITE = "model.layers.1.mlp.down_proj"


@pytest.fixture
def run(capsys):
    """A function that runs the command line: (exit code, standard output, standard error)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = cli.guarded(functools.partial(cli.app, [str(a) for a in arguments], standalone_mode=True))
        except SystemExit as left:
            code = int(left.code or 0)
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def snapshot(folder: Path) -> dict[str, str | None]:
    """Every path below a folder, hidden ones too, with the digest of each file."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture
def refused(run, tmp_path):
    """A function that runs a command which must say one sentence holding `words`, and change nothing."""

    def refused(*arguments: object, words: str, code: int = 2) -> str:
        before = snapshot(tmp_path)
        found, out, err = run(*arguments)
        assert found == code, err
        assert err.startswith("secateur: ")
        assert err.endswith((".\n", "?\n"))
        assert err.count("\n") == 1, "one line was wanted"
        assert "Traceback" not in err
        assert words in err
        assert out == ""
        assert snapshot(tmp_path) == before, "something was left behind, or the source was touched"
        return err

    return refused


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def copy(tiny_llama, tmp_path) -> Path:
    """A copy of the tiny model, to be spoilt."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


@pytest.fixture
def prune(refused, out, text_file):
    """A function that prunes a model with small settings; what it is given comes last and so wins."""

    def prune(model: object, *options: object, words: str, calibration: object = text_file) -> str:
        return refused(
            "prune", model, "--out", out, "--method", "wanda", "--calibration", calibration,
            "--samples", 4, "--seq-len", 16, "--quiet", *options, words=words,
        )  # fmt: skip

    return prune


def spoil_json(file: Path, **changes: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def spoil_weights(folder: Path, **changes) -> None:
    """Rewrite the weights; each change is a function of a tensor, by the tensor's name with `__` for dots."""
    tensors = load_file(folder / "model.safetensors")
    for name, change in changes.items():
        name = name.replace("__", ".")
        tensors[name] = change(tensors[name])
    save_file({name: t for name, t in tensors.items() if t is not None}, folder / "model.safetensors", {"format": "pt"})


def with_value(value: float):
    def change(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[3] = value
        return tensor

    return change


def shard(folder: Path) -> dict:
    """Split the weights into two shards; returns the index, which is written."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {}}
    for number, parity in ((1, 0), (2, 1)):
        part = {name: tensors[name] for name in sorted(tensors)[parity::2]}
        file = f"model-0000{number}-of-00002.safetensors"
        save_file(part, folder / file, {"format": "pt"})
        index["weight_map"] |= dict.fromkeys(part, file)
    write_index(folder, index)
    return index


def write_index(folder: Path, index: object) -> None:
    (folder / "model.safetensors.index.json").write_text(index if isinstance(index, str) else json.dumps(index))


# The good case, without which no refusal means anything.


def test_the_same_settings_prune_a_sound_checkpoint(run, copy, out, text_file):
    shard(copy)
    code, said, err = run(
        "prune", copy, "--out", out, "--method", "wanda", "--calibration", text_file,
        "--samples", 4, "--seq-len", 16, "--quiet", "--json",
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert json.loads(said)["sparsity"] == 0.5
    assert {path.name for path in out.parent.iterdir()} == {"model", "out"}


# Folders and weights.


@pytest.mark.parametrize("command", ["prune", "evaluate", "inspect", "compare"])
def test_no_folder(refused, tmp_path, out, command):
    options = ["--out", out] if command in ("prune", "compare") else []
    refused(command, tmp_path / "nowhere", *options, words=f"There is no checkpoint folder {tmp_path / 'nowhere'}")


def test_no_hub_model_without_a_network(prune):
    prune("no-such-model-here", words="no-such-model-here is neither a folder here nor a model that the hub gives out")


def test_a_file_for_a_folder(prune, text_file):
    prune(text_file, words="is a file; the folder of a checkpoint, or a .gguf file, was wanted")


def test_no_config(prune, copy):
    (copy / "config.json").unlink()
    prune(copy, words="is no checkpoint folder: it has no config.json")


def test_no_weights(prune, copy):
    (copy / "model.safetensors").unlink()
    prune(copy, words="has no weights: neither model.safetensors nor model.safetensors.index.json")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.ckpt"])
def test_pickled_weights(prune, copy, name):
    (copy / "model.safetensors").rename(copy / name)
    said = prune(copy, words=f"has only pickled weights ({name}), which can run code when loaded")
    assert "This writes them as safetensors and runs none: " in said


def test_pickled_weights_of_hqq(prune, copy):
    """The package itself can write them otherwise: 0.2.8.post1 did so."""
    (copy / "model.safetensors").rename(copy / "qmodel.pt")
    said = prune(copy, words="has weights that HQQ has pickled (qmodel.pt), which can run code when loaded. Where you")
    assert "AutoHQQHFModel as model; model.save_to_safetensors(model.from_quantized(" in said
    assert said.rstrip().endswith("Then copy the tokenizer into DIR.")


def header(length: int, text: bytes) -> bytes:
    return length.to_bytes(8, "little") + text


DEEP = b'{"a":' + b"[" * 5000 + b"]" * 5000 + b"}"


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda data: b"", id="empty"),
        pytest.param(lambda data: data[:5], id="no length"),
        pytest.param(lambda data: data[:100], id="cut in the header"),
        pytest.param(lambda data: data[:-10], id="cut in the data"),
        pytest.param(lambda data: data + b"more", id="too long"),
        pytest.param(lambda data: header(2**62, data[8:]), id="huge length"),
        pytest.param(lambda data: header(7, data[8:]), id="wrong length"),
        pytest.param(lambda data: header(64, b"x" * 64), id="header no JSON"),
        pytest.param(lambda data: header(8, b"[1, 2]  "), id="header no object"),
        pytest.param(lambda data: header(8, b'{"a": 1}'), id="header of numbers"),
        pytest.param(lambda data: header(len(DEEP), DEEP), id="deep header"),
        pytest.param(lambda data: b"version https://git-lfs.github.com/spec/v1\n", id="pointer file"),
    ],
)
def test_broken_shard(prune, copy, change):
    file = copy / "model.safetensors"
    file.write_bytes(change(file.read_bytes()))
    said = prune(copy, words=f"{file} is no sound safetensors file (")
    assert "fetch it again" in said


def test_missing_shard(prune, copy):
    shard(copy)
    (copy / "model-00002-of-00002.safetensors").unlink()
    prune(copy, words="names model-00002-of-00002.safetensors, which is missing. Fetch it again.")


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000], ids=["empty", "cut", "deep"])
def test_index_no_json(prune, copy, text):
    shard(copy)
    write_index(copy, text)
    prune(copy, words="model.safetensors.index.json is no JSON (")


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ([], "model.safetensors.index.json holds a list; an object was wanted"),
        ({}, "is no index of safetensors shards: it has no 'weight_map'"),
        ({"weight_map": []}, "is no index of safetensors shards: it has no 'weight_map'"),
        ({"weight_map": {}}, "is no index of safetensors shards: it has no 'weight_map'"),
    ],
)
def test_index_of_another_form(prune, copy, index, words):
    shard(copy)
    write_index(copy, index)
    prune(copy, words=words)


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/x.safetensors", "sub/x.safetensors", "x.bin", "", 7, None])
def test_index_naming_files_outside(prune, copy, name):
    save_file({"lm_head.weight": torch.ones(2)}, copy.parent / "x.safetensors")
    index = shard(copy)
    index["weight_map"]["lm_head.weight"] = name
    write_index(copy, index)
    prune(copy, words=f"names {name!r}; a .safetensors file in the same folder was wanted")


def test_index_of_tensors_in_no_shard(prune, copy):
    index = shard(copy)
    index["weight_map"]["model.extra.weight"] = "model-00001-of-00002.safetensors"
    write_index(copy, index)
    prune(copy, words="says that model.extra.weight is in model-00001-of-00002.safetensors, which does not hold it")


def test_a_tensor_in_two_shards(prune, copy):
    index = shard(copy)
    first, second = (load_file(copy / f"model-0000{n}-of-00002.safetensors") for n in (1, 2))
    twice = next(name for name, file in index["weight_map"].items() if "00001" in file)
    second[twice] = first[twice]
    save_file(second, copy / "model-00002-of-00002.safetensors", {"format": "pt"})
    prune(copy, words=f"{twice} is in two shards of {copy}")


def test_inspect_refuses_a_broken_shard_too(refused, copy):
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    refused("inspect", copy, words="is no sound safetensors file")


@pytest.mark.parametrize("text", ["{", "[]", '"x"', "\xff", "[" * 100_000])
def test_inspect_of_a_broken_record(refused, copy, text):
    (copy / "pruning.json").write_text(text, encoding="latin-1")
    said = refused("inspect", copy, words=f"{copy / 'pruning.json'} ")
    assert " is no JSON (" in said or " an object was wanted" in said


# Configurations.


@pytest.mark.parametrize("text", ["", "{", "\xff", "[" * 100_000], ids=["empty", "cut", "not UTF-8", "deep"])
def test_config_no_json(prune, copy, text):
    (copy / "config.json").write_text(text, encoding="latin-1")
    prune(copy, words="config.json is no JSON (")


@pytest.mark.parametrize(("text", "kind"), [("[]", "list"), ("null", "NoneType"), ("7", "int"), ('"llama"', "str")])
def test_config_no_object(prune, copy, text, kind):
    (copy / "config.json").write_text(text)
    prune(copy, words=f"config.json holds a {kind}; an object was wanted")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "llamma"}, "has model type `llamma` but Transformers does not recognize this architecture"),
        ({"model_type": ["llama"]}, "describes no model that transformers knows: unhashable type"),
        ({"hidden_size": "wide"}, "Field 'hidden_size' expected int, got str (value: 'wide')"),
        ({"hidden_size": -64}, "transformers cannot load"),
        ({"num_attention_heads": 0}, "describes no model that transformers knows: integer modulo by zero"),
        ({"num_attention_heads": 3}, "The hidden size (64) is not a multiple of the number of attention heads (3)"),
        ({"dtype": "float31"}, "module 'torch' has no attribute 'float31'"),
        ({"hidden_act": "swosh"}, "swosh"),
        ({"num_hidden_layers": 0}, "LlamaForCausalLM has no list of blocks"),
        ({"vocab_size": 0}, "transformers cannot load"),
    ],
)
def test_config_of_no_model(prune, copy, changes, words):
    spoil_json(copy / "config.json", **changes)
    prune(copy, words=words)


def test_config_without_an_architecture(prune, copy):
    (copy / "config.json").write_text("{}")
    prune(copy, words="Should have a `model_type` key in its config.json")


def test_quantised_model(prune, copy):
    spoil_json(copy / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    prune(copy, words="holds no quantised weights. If they are plain, delete quantization_config from config.json.")
    spoil_json(copy / "config.json", quantization_config={"quant_method": "aqlm", "bits": 2})
    prune(copy, words="is quantised by aqlm (quantization_config in config.json), which cannot be read here;")


def test_weights_in_eight_bits(prune, copy):
    spoil_weights(copy, model__layers__1__mlp__down_proj__weight=lambda t: t.to(torch.float8_e4m3fn))
    prune(copy, words=f"{SITE}.weight in {copy} is stored as F8_E4M3, which cannot be used")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_hidden_layers": 5}, "it lacks model.layers.4.input_layernorm.weight, "),
        ({"num_hidden_layers": 3}, "it has besides model.layers.3.input_layernorm.weight, "),
        ({"attention_bias": True}, "it lacks model.layers.0.self_attn.k_proj.bias, "),
        ({"intermediate_size": 96}, "model.layers.0.mlp.gate_proj.weight is [128, 64], not [96, 64]"),
        ({"intermediate_size": 10**9}, "model.layers.0.mlp.gate_proj.weight is [128, 64], not [1000000000, 64]"),
        ({"vocab_size": 200}, "model.embed_tokens.weight is [128, 64], not [200, 64]"),
    ],
)
def test_weights_of_another_config(prune, copy, changes, words):
    spoil_json(copy / "config.json", **changes)
    said = prune(copy, words=words)
    assert "does not hold the weights its config.json describes" in said


def test_encoders(prune, tmp_path):
    sizes = dict(dim=32, n_layers=2, n_heads=2, hidden_dim=64, vocab_size=128)
    AutoModelForMaskedLM.from_config(AutoConfig.for_model("distilbert", **sizes)).save_pretrained(tmp_path / "model")
    prune(tmp_path / "model", words="holds a distilbert model, which is no causal language model")


def test_encoders_that_transformers_would_load(prune, tmp_path):
    tiny_model("bert").save_pretrained(tmp_path / "model")
    prune(tmp_path / "model", words="BertLMHeadModel is no causal language model as its config.json sets it up")


# NaN and Inf.


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("method", ["magnitude", "sparsegpt"])
def test_non_finite_weights_of_a_site(prune, copy, value, method):
    spoil_weights(copy, model__layers__1__mlp__down_proj__weight=with_value(value))
    prune(copy, "--method", method, words=f"The weights of {SITE} hold NaN or Inf. Fetch the checkpoint again.")


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_nan_in_a_norm(prune, copy, method):
    spoil_weights(copy, model__layers__2__input_layernorm__weight=with_value(float("nan")))
    words = "NaN or Inf in the activations that enter model.layers.2.self_attn.q_proj"
    prune(copy, "--method", method, words=words)


def test_nan_in_the_embedding(prune, copy):
    spoil_weights(copy, model__embed_tokens__weight=lambda t: t * float("nan"))
    prune(copy, words="NaN or Inf in the activations that enter model.layers.0.self_attn.q_proj")


@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight"])
def test_nan_behind_the_blocks(prune, copy, name):
    spoil_weights(copy, **{name.replace(".", "__"): with_value(float("nan"))})
    prune(copy, words=f"The weights of {name} hold NaN or Inf. Fetch the checkpoint again.")


def test_activations_that_overflow(prune, copy):
    spoil_weights(
        copy,
        model__layers__1__mlp__up_proj__weight=lambda t: t * 1e30,
        model__layers__1__mlp__gate_proj__weight=lambda t: t * 1e30,
    )
    prune(copy, words="NaN or Inf in the activations that enter model.layers.1.mlp.down_proj")


def test_activations_that_overflow_in_half_precision(prune, copy):
    spoil_weights(copy, model__layers__1__mlp__up_proj__weight=lambda t: t * 1e5)
    said = prune(copy, "--dtype", "float16", words=f"NaN or Inf in the activations that enter {SITE}")
    assert "try --dtype float32" in said


def test_a_loss_of_nan(refused, copy, text_file):
    spoil_weights(copy, model__layers__2__input_layernorm__weight=with_value(float("nan")))
    said = refused(
        "evaluate", copy, "--evaluation", text_file, "--seq-len", 16, "--windows", 4, "--quiet",
        words="4 of 4 evaluation windows have a loss of NaN or Inf",
    )  # fmt: skip
    assert "secateur inspect" in said


# Patterns, names and numbers.


def test_two_of_four_on_inputs_not_divisible_by_four(prune, tmp_path):
    config = tiny_config("llama")
    config.intermediate_size = 126
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    words = "2:4 needs inputs in groups of 4; model.layers.0.mlp.down_proj has 126. Leave it out with --skip"
    prune(tmp_path / "model", "--pattern", "2:4", words=words)


def test_four_of_eight_on_stories260k(prune, shared_data):
    words = (
        "4:8 needs inputs in groups of 8; model.layers.0.mlp.down_proj has 172. "
        "Leave it out with --skip '*down_proj' or use '50%'."
    )
    prune(shared_data / "models" / "stories260K", "--pattern", "4:8", words=words)


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("100%", "Sparsity is the share removed, at least 0% and under 100%; found 100%."),
        ("150% of row", "under 100%; found 150%."),
        ("-5%", "at least 0% and under 100%; found -5%."),
        ("4:4", "N:M keeps N of every M inputs, 0 < N < M; found 4:4."),
        ("0:4", "0 < N < M; found 0:4."),
        ("half", "'half' is no sparsity pattern. Say '50%', '50% of row', '50% of matrix', 'N:M' such as '2:4'"),
        ("nan%", "'nan%' is no sparsity pattern"),
        ("0.5", "'0.5' is no sparsity pattern"),
        ("", "'' is no sparsity pattern"),
    ],
)
def test_patterns(prune, tiny_llama, pattern, words):
    prune(tiny_llama, "--pattern", pattern, words=words)


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--method", "wnda", "There is no method 'wnda'. Did you mean 'wanda'?"),
        ("--method", "lottery", "There is no method 'lottery'. Known: "),
        ("--method", "alps+refin", "There is no refinement 'refin'. Did you mean 'refine'?"),
        ("--method", "wanda+dense-target", "There is no refinement 'dense-target' after a method that solves nothing"),
        ("--allocate", "oul", "There is no allocation 'oul'. Did you mean 'owl'?"),
        ("--allocate", "nowhere.json", "There is no plan nowhere.json. Write one with"),
        ("--calibration", "wikitext", "There is no corpus 'wikitext'. Did you mean 'wikitext2'?"),
        ("--calibration", "pile", "There is no corpus 'pile'. Known: c4, demo, wikitext2."),
        ("--dtype", "floaty32", "There is no dtype 'floaty32'. Did you mean 'float32'?"),
        ("--device", "gpu", "There is no device here 'gpu'. "),
        ("--device", "auto,cpu", "There is no device here 'auto'. "),
        ("--device", "cpu,", "There is no device here ''. "),
        ("--device", "cuda:99", "There is no device here 'cuda:99'. "),
        ("--skip", "*.dwn_proj", "There is no weight matrix that matches '*.dwn_proj'. Did you mean 'down_proj'?"),
        (
            "--skip",
            "re:.*down_proj",
            "--skip takes globs such as '*.down_proj'; found the regular expression 're:.*down_proj'.",
        ),
        ("--skip", "lm_head", "There is no weight matrix that matches 'lm_head'. Known: down_proj, gate_proj, "),
        ("--seq-len", "129", "Windows of 129 tokens were asked for; the model has a context of 128. Use --seq-len 128"),
    ],
)
def test_names_and_lengths(prune, tiny_llama, option, value, words):
    prune(tiny_llama, option, value, words=words)


def test_evaluate_with_windows_longer_than_the_context(refused, tiny_llama, text_file):
    refused(
        "evaluate", tiny_llama, "--evaluation", text_file, "--seq-len", 256, "--quiet",
        words="Windows of 256 tokens were asked for; the model has a context of 128.",
    )  # fmt: skip


@pytest.mark.parametrize("rule", ["owl", "error", "search"])
def test_a_rule_for_a_pattern_that_cannot_be_shared_out(prune, refused, tiny_llama, out, rule):
    words = f"2:4 removes the same of every weight matrix; --allocate {rule} needs a percentage such as '70%'."
    prune(tiny_llama, "--pattern", "2:4", "--allocate", rule, words=words)
    refused("plan", tiny_llama, "--out", out, "--pattern", "2:4", "--allocate", rule, words=words)
    refused("compare", tiny_llama, "--out", out, "--patterns", "50%,2:4", "--allocate", rule, words=words)


def test_a_plan_in_the_way(refused, tiny_llama, out):
    out.write_text("mine")
    refused("plan", tiny_llama, "--out", out, words="exists already. Choose another --out, or replace it with")
    assert out.read_text() == "mine"


def test_a_plan_of_another_model(prune, tiny_llama, tmp_path):
    file = tmp_path / "plan.json"
    file.write_text(json.dumps({"schema": "secateur.plan/1", "sites": {"model.layers.9.mlp.up_proj": "50%"}}))
    prune(
        tiny_llama,
        "--allocate",
        file,
        words="There is no weight matrix in this model 'model.layers.9.mlp.up_proj'. Did you",
    )


def test_a_sparsity_near_all(prune, tiny_llama):
    words = "of its weights for a mean of 95.0%; between 0 and 99% is possible. Ask for another"
    prune(tiny_llama, "--pattern", "95%", "--allocate", "owl", words=words)


def test_compare_names_an_unknown_method(refused, tiny_llama, out):
    refused("compare", tiny_llama, "--out", out, "--methods", "wanda,sparcegpt", words="Did you mean 'sparsegpt'?")


USAGE = [
    (["prune", "--out", "OUT", "--samples", "0"], "Invalid value for '--samples': .*(x>=|greater than or equal to )1"),
    (["prune", "--out", "OUT", "--seq-len", "1"], "Invalid value for '--seq-len': .*(x>=|greater than or equal to )2"),
    (["prune", "--out", "OUT", "--seq-len", "0"], "Invalid value for '--seq-len': .*(x>=|greater than or equal to )2"),
    (
        ["prune", "--out", "OUT", "--batch-size", "0"],
        "Invalid value for '--batch-size': .*(x>=|greater than or equal to )1",
    ),
    (["evaluate", "--windows", "0"], "Invalid value for '--windows': .*(x>=|greater than or equal to )2"),
    (["prune", "--out", "OUT", "--samples", "many"], "Invalid value for '--samples': .*valid integer"),
    (["prune"], "Missing option '--out'"),
    (["prune", "--out", "OUT", "--sampels", "4"], "No such option: --sampels"),
    (["prone"], "No such command 'prone'"),
    (["inspect", "a", "b"], "Got unexpected extra argument"),
]


@pytest.mark.parametrize(("arguments", "words"), USAGE)
def test_usage(run, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert re.search(words, " ".join(re.sub("[│╭╮╰╯─]", " ", err).split()))
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arguments", [["-h"], ["--help"], ["prune", "-h"], ["inspect", "--help"]])
def test_help(run, arguments):
    code, out, err = run(*arguments)
    assert (code, err) == (0, "")
    assert "Usage: " in out


# Text.


def test_fewer_tokens_than_asked(prune, tiny_llama, tmp_path):
    (tmp_path / "t.txt").write_text("x" * 50)
    words = "4 samples of 16 tokens need 64 tokens; "
    said = prune(tiny_llama, calibration=tmp_path / "t.txt", words=words)
    assert "(train) has 51. Use --samples 3 or a smaller --seq-len." in said


@pytest.mark.parametrize(("name", "text"), [("t.txt", ""), ("t.jsonl", ""), ("t.json", "[]"), ("t.txt", "few")])
def test_empty_text(prune, tiny_llama, tmp_path, name, text):
    (tmp_path / name).write_text(text)
    said = prune(tiny_llama, calibration=tmp_path / name, words="Use more text or a smaller --seq-len.")
    assert "4 samples of 16 tokens need 64 tokens" in said


def test_fewer_evaluation_tokens_than_asked(refused, tiny_llama, tmp_path):
    (tmp_path / "t.txt").write_text("x" * 50)
    said = refused(
        "evaluate", tiny_llama, "--evaluation", tmp_path / "t.txt", "--seq-len", 16, "--windows", 4, "--quiet",
        words="4 evaluation windows of 16 tokens were wanted; ",
    )  # fmt: skip
    assert "(test) has 51 tokens, 3 windows" in said


def test_c4_without_documents_long_enough(prune, tiny_llama, tmp_path):
    folder = tmp_path / "data" / "c4"
    folder.mkdir(parents=True)
    rows = ["x" * length for length in (5, 9, 12, 40)]
    (folder / "train.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    said = prune(
        tiny_llama, "--data-dir", tmp_path / "data", calibration="c4",
        words="4 samples of 16 tokens need 64 tokens from documents longer than 16; ",
    )  # fmt: skip
    assert "the 4 documents looked at have 41 in 1 such documents. Use fewer --samples" in said


@pytest.mark.parametrize("seed", range(4))
def test_c4_with_just_enough_documents(run, tiny_llama, tmp_path, out, seed):
    (tmp_path / "c4").mkdir()
    (tmp_path / "c4" / "train.jsonl").write_text(2 * (json.dumps({"text": "x" * 40}) + "\n"))
    code, _, err = run(
        "prune", tiny_llama, "--out", out, "--calibration", "c4", "--data-dir", tmp_path, "--seed", seed,
        "--samples", 4, "--seq-len", 16, "--method", "wanda", "--quiet",
    )  # fmt: skip
    assert (code, err) == (0, "")


def test_c4_with_no_document_at_all(prune, tiny_llama, tmp_path):
    (tmp_path / "c4").mkdir()
    (tmp_path / "c4" / "train.jsonl").write_text("\n\n")
    words = "the 0 documents looked at have 0 in 0 such documents"
    prune(tiny_llama, "--data-dir", tmp_path, calibration="c4", words=words)


def test_a_data_folder_without_the_split(prune, tiny_llama, tmp_path):
    (tmp_path / "wikitext2").mkdir()
    (tmp_path / "wikitext2" / "test.jsonl").write_text('{"text": "x"}\n')
    words = "wikitext2 holds no train split (train.jsonl, .json.gz, .parquet or .txt)"
    prune(tiny_llama, "--data-dir", tmp_path, calibration="wikitext2", words=words)


def test_wikitext2_of_exactly_one_window_is_enough(run, tiny_llama, tmp_path, out):
    (tmp_path / "wikitext2").mkdir()
    (tmp_path / "wikitext2" / "train.txt").write_text("x" * 15)
    code, _, err = run(
        "prune", tiny_llama, "--out", out, "--calibration", "wikitext2", "--data-dir", tmp_path,
        "--samples", 1, "--seq-len", 16, "--method", "wanda", "--quiet",
    )  # fmt: skip
    assert (code, err) == (0, "")


ROW = b'{"text": "some words"}\n'


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("t.txt", b"caf\xe9", "t.txt is not text in UTF-8 ("),
        ("t.jsonl", b'{"text": "caf\xe9"}\n', "t.jsonl is not text in UTF-8 ("),
        ("t.jsonl", b'{"body": "x"}\n', "Every row needs a field 'text' or 'messages'; row 1 of "),
        ("t.jsonl", ROW + b"7\n", "Every row needs a field 'text' or 'messages'; row 2 of "),
        ("t.jsonl", ROW + b'{"text": null}\n', "The field 'text' must hold a string; in row 2 of "),
        ("t.jsonl", b'{"text": 3}\n', "t.jsonl it holds a int."),
        ("t.jsonl", ROW + b'{"text": \n', "is no JSON: Expecting value"),
        ("t.jsonl", b"{", "Line 1 of "),
        ("t.jsonl", b'{"text": ' + b"[" * 100_000 + b"\n", "Line 1 of "),
        ("t.jsonl", b'{"text": "\\ud800"}\n', "surrogates not allowed"),
        ("t.json", b'["a", "b', "t.json cannot be read: "),
        ("t.json.gz", ROW, "t.json.gz cannot be read: Not a gzipped file"),
        ("t.json.gz", gzip.compress(ROW * 99, mtime=0)[:-12], "t.json.gz cannot be read: Compressed file ended before"),
        ("t.parquet", b"PAR1", "t.parquet cannot be read: Parquet file size is 4 bytes"),
        ("t.csv", b"text\nx\n", "t.csv is no text file that can be read; .txt, .jsonl, "),
    ],
)
def test_text_files(prune, tiny_llama, tmp_path, name, data, words):
    (tmp_path / name).write_bytes(data)
    prune(tiny_llama, calibration=tmp_path / name, words=words)


def test_parquet_without_text(prune, tiny_llama, tmp_path):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"body": ["x"]}), tmp_path / "t.parquet")
    prune(
        tiny_llama, calibration=tmp_path / "t.parquet", words="Every row needs a field 'text' or 'messages'; row 1 of "
    )


def test_missing_text_file(prune, tiny_llama, tmp_path, text_file):
    words = f"There is no text file {tmp_path / 'a.jsonl'}."
    prune(tiny_llama, calibration=f"{text_file},{tmp_path / 'a.jsonl'}", words=words)


@pytest.mark.parametrize("name", ["a[1].jsonl", "a*.jsonl", "a b::c.jsonl"])
def test_names_with_odd_characters_are_names(run, tiny_llama, out, tmp_path, text_file, name):
    shutil.copy(text_file, tmp_path / name)
    code, _, err = run(
        "prune", tiny_llama, "--out", out, "--calibration", tmp_path / name,
        "--samples", 4, "--seq-len", 16, "--method", "wanda", "--quiet",
    )  # fmt: skip
    assert (code, err) == (0, "")


# Tokenizers.


def test_no_tokenizer(prune, copy):
    for file in copy.glob("tokenizer*"):
        file.unlink()
    prune(copy, words="has no tokenizer (tokenizer.json or the like). Copy it there.")


@pytest.mark.parametrize("text", ["", "{", "{}", '{"added_tokens": []}', '{"added_tokens": [], "model": 3}', "[]"])
def test_broken_tokenizer(prune, copy, text):
    (copy / "tokenizer.json").write_text(text)
    said = prune(copy, words=f"{copy} ")
    assert re.search(r"The tokenizer of \S+ is broken: |has no tokenizer that transformers can load: ", said)


@pytest.mark.parametrize("kind", ["GPT2Tokenizer", "LlamaTokenizer", "T5Tokenizer", "BertTokenizer"])
def test_a_tokenizer_of_which_only_the_settings_are_there(prune, copy, kind):
    (copy / "tokenizer.json").unlink()
    (copy / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind}))
    prune(copy, words="has no tokenizer with a vocabulary. Copy tokenizer.json or the like there.")


def test_tokenizer_with_more_tokens_than_the_model(prune, tmp_path):
    model = tiny_model("llama")
    model.resize_token_embeddings(60)
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    said = prune(tmp_path / "model", words="the model has 60: they do not belong together")
    assert re.search(r"The tokenizer gives token \d+,", said)


# The result's folder.


@pytest.fixture
def existing(run, tiny_llama, out, text_file) -> Path:
    shutil.copytree(tiny_llama, out)
    return out


def test_an_existing_result_is_refused(prune, tiny_llama, existing):
    prune(tiny_llama, words=f"{existing} exists already. Choose another --out, or replace it with --overwrite.")


def test_an_existing_result_is_replaced_when_asked(run, tiny_llama, existing, text_file):
    (existing / "old.txt").write_text("old")
    code, _, err = run(
        "prune", tiny_llama, "--out", existing, "--calibration", text_file, "--samples", 4, "--seq-len", 16,
        "--method", "wanda", "--overwrite", "--quiet",
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert (existing / "pruning.json").exists()
    assert not (existing / "old.txt").exists()
    assert [path.name for path in existing.parent.iterdir()] == ["out"]


def test_an_existing_result_survives_a_failure(prune, copy, existing):
    spoil_weights(copy, model__layers__3__mlp__down_proj__weight=with_value(float("nan")))
    prune(copy, "--overwrite", words="hold NaN or Inf")


@pytest.mark.parametrize("files", [["notes.txt"], ["config.json"], ["model.safetensors"]])
def test_what_is_no_checkpoint_is_never_replaced(prune, tiny_llama, out, files):
    out.mkdir()
    for file in files:
        (out / file).write_text("{}")
    prune(tiny_llama, "--overwrite", words=f"{out} is no checkpoint folder, so --overwrite does not replace it.")


def test_a_checkpoint_with_other_folders_is_never_replaced(prune, tiny_llama, existing):
    (existing / "checkpoint-500").mkdir()
    prune(tiny_llama, "--overwrite", words="holds other folders (checkpoint-500), so --overwrite does not replace it.")


def test_the_model_itself(prune, copy, out):
    prune(copy, "--out", copy, "--overwrite", words=f"{copy} is the model itself. Choose another folder.")
    prune(copy, "--out", copy, words="exists already")
    out.symlink_to(copy)
    prune(copy, "--out", out, "--overwrite", words=f"{copy} is the model itself. Choose another folder.")


def test_inside_the_model(prune, copy):
    prune(copy, "--out", copy / "pruned", words="lies inside the other. Choose another folder.")


def test_around_the_model(prune, copy, out):
    inside = copy.rename(copy.parent / "inside")
    shutil.copytree(inside, out)
    inside.rename(out / "dense")
    prune(out / "dense", "--overwrite", words="so --overwrite does not replace it")
    (out / "config.json").unlink()


def test_a_file_in_the_way(prune, tiny_llama, out):
    out.write_text("mine")
    prune(tiny_llama, "--overwrite", words=f"{out} is a file; a folder was wanted.")
    prune(tiny_llama, "--out", out / "deeper", words=f"{out / 'deeper'} cannot be written: ")


def test_a_name_that_is_too_long(prune, tiny_llama, out):
    prune(tiny_llama, "--out", out / ("x" * 300), words="File name too long")


def test_a_mount_point(prune, tiny_llama, out, monkeypatch):
    out.mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path == out)
    prune(tiny_llama, words=f"{out} is a mount point, which cannot be replaced at once. Name a folder inside it.")


def test_a_link_is_followed(run, tiny_llama, out, tmp_path, text_file):
    (tmp_path / "real").mkdir()
    out.symlink_to(tmp_path / "real")
    code, _, err = run(
        "prune", tiny_llama, "--out", out, "--calibration", text_file, "--samples", 4, "--seq-len", 16,
        "--method", "wanda", "--quiet",
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert out.is_symlink()
    assert (tmp_path / "real" / "pruning.json").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"out", "real"}


def raising(number: int, after: int = 0):
    """A function that raises OSError, after that many calls to what it stands for."""
    calls = []

    def wrap(real):
        def stand_in(*args, **kwargs):
            calls.append(args)
            if len(calls) > after:
                raise OSError(number, os.strerror(number), str(args[0]))
            return real(*args, **kwargs)

        return stand_in

    return wrap


def test_a_read_only_place(prune, tiny_llama, out, monkeypatch):
    monkeypatch.setattr(Path, "mkdir", raising(errno.EACCES)(Path.mkdir))
    prune(tiny_llama, words=f"{out} cannot be written: [Errno 13] Permission denied")


def test_a_read_only_disk(prune, tiny_llama, out, monkeypatch):
    monkeypatch.setattr(Path, "mkdir", raising(errno.EROFS)(Path.mkdir))
    prune(tiny_llama, "--out", out / "a" / "b", words="cannot be written: [Errno 30] Read-only file system")


def test_a_disk_with_too_little_space(prune, tiny_llama, out, monkeypatch):
    size = sum(file.stat().st_size for file in tiny_llama.iterdir()) / 2**20
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2**20, 2**20 - 2**16, 2**16))
    prune(tiny_llama, words=f"{out} needs {size:.2f} MiB, the disk has 0.06 MiB free.")


def test_a_disk_with_too_little_space_for_what_distil_keeps(prune, tiny_llama, out, monkeypatch):
    """24 bytes for each weight of the blocks, besides the weights themselves."""
    tensors = load_file(tiny_llama / "model.safetensors")
    weights = sum(one.numel() for name, one in tensors.items() if ".layers." in name)
    size = (tiny_llama / "model.safetensors").stat().st_size
    asked = ("--method", "wanda+distil", "--samples", "4", "--seq-len", "16")
    wanted = f"{out} needs {(size + 24 * weights) / 2**20:.1f}"
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2**30, 2**30 - size * 3, size * 3))
    prune(tiny_llama, *asked, words=wanted)
    in_a_file = f"{out} needs {(size + 42 * weights) / 2**20:.2f}"  # and 18 for what memory does not hold
    prune(tiny_llama, *asked, "--memory", "1MB", words=in_a_file)
    assert not out.exists()


def test_a_disk_that_fills_up_while_copying(prune, tiny_llama, out, monkeypatch):
    monkeypatch.setattr(shutil, "copyfile", raising(errno.ENOSPC, after=2)(shutil.copyfile))
    words = f"The disk filled up while {out / 'a'} was written; nothing was left behind."
    prune(tiny_llama, "--out", out / "a", words=words)


def test_a_disk_that_fills_up_while_pruning(prune, tiny_llama, out, monkeypatch):
    real = Path.open

    def full(path, mode="r", *args, **kwargs):
        if mode == "r+b":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(path, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", full)
    prune(tiny_llama, words=f"The disk filled up while {out} was written; nothing was left behind.")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_is_full_at_the_end(prune, tiny_llama, existing, monkeypatch, number):
    monkeypatch.setattr(os, "fsync", raising(number, after=3)(os.fsync))
    prune(tiny_llama, "--overwrite", words=f"The disk filled up while {existing} was written")


def test_a_name_that_cannot_be_given(prune, run, tiny_llama, text_file, existing, monkeypatch):
    command = [
        "prune", tiny_llama, "--out", existing, "--method", "wanda", "--calibration", text_file,
        "--samples", 4, "--seq-len", 16, "--quiet", "--overwrite",
    ]  # fmt: skip
    before = snapshot(existing)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", raising_second_rename(existing, Path.rename))
        code, out, err = run(*command)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"{existing} cannot be written: [Errno 5] Input/output error" in err
    assert "The same command goes on after the 4 blocks that are finished." in err
    assert snapshot(existing) == before, "what was to be replaced is as it was"
    assert run(*command)[0] == 0
    assert snapshot(existing).keys() - before.keys() == {"pruning.json"}
    assert not list(existing.parent.glob(f".{existing.name}.*"))


def raising_second_rename(out: Path, real):
    def rename(path, target):
        if path.name == f".{out.name}.partial":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(path, target)

    return rename


def test_a_real_small_disk(prune, tiny_llama, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "none", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no disk can be mounted here: {mounted.stderr.decode().strip()}")
    try:
        prune(tiny_llama, "--out", disk, words=f"{disk} is a mount point")
        prune(tiny_llama, "--out", disk / "out", words="the disk has 0.29 MiB free")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2**40, 0, 2**40))
            prune(tiny_llama, "--out", disk / "out", words=f"The disk filled up while {disk / 'out'} was written")
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_folder_that_appears_during_the_run_costs_nobody_anything(run, tiny_llama, out, text_file, monkeypatch):
    real = output.Output.finish

    def finish(result, record):
        out.mkdir()
        (out / "theirs.txt").write_text("theirs")
        real(result, record)

    monkeypatch.setattr(output.Output, "finish", finish)
    code, _, err = run(
        "prune", tiny_llama, "--out", out, "--calibration", text_file, "--samples", 4, "--seq-len", 16,
        "--method", "wanda", "--quiet",
    )  # fmt: skip
    assert code == 2
    assert "That came about during the run, so the result is in " in err
    kept = Path(err.rsplit("so the result is in ", 1)[1].strip().rstrip("."))
    assert (kept / "pruning.json").exists()
    assert (out / "theirs.txt").read_text() == "theirs"
    assert {path.name for path in out.parent.iterdir()} == {"out", kept.name}


# Foreign code, and interruptions.


CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path({marker!r}).write_text("the code ran")
class OwnConfig(LlamaConfig):
    model_type = "own-architecture"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def with_code(copy, tmp_path, tmp_path_factory, monkeypatch) -> Path:
    """A model whose architecture is in a file of its own, which leaves a mark when it is run."""
    modules = tmp_path_factory.mktemp("modules")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(modules))
    monkeypatch.syspath_prepend(str(modules))
    (copy / "own.py").write_text(CODE.format(marker=str(tmp_path / "mark")))
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    spoil_json(copy / "config.json", model_type="own-architecture", auto_map=auto_map)
    return copy


def test_foreign_code_is_not_run(prune, with_code, tmp_path):
    said = prune(with_code, words="needs code of its own (auto_map in config.json), which is not run unless asked for.")
    assert "Read that code, then add --trust-remote-code." in said
    assert not (tmp_path / "mark").exists()


def test_foreign_code_is_run_when_asked(run, with_code, tmp_path, out, text_file):
    code, _, err = run(
        "prune", with_code, "--out", out, "--calibration", text_file, "--samples", 4, "--seq-len", 16,
        "--method", "wanda", "--quiet", "--trust-remote-code",
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert (tmp_path / "mark").read_text() == "the code ran"


def test_foreign_code_of_a_tokenizer_is_not_run(prune, copy, tmp_path):
    (copy / "own.py").write_text(CODE.format(marker=str(tmp_path / "mark")))
    changes = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]}}
    spoil_json(copy / "tokenizer_config.json", **changes)
    prune(copy, words="needs code of its own, which is not run unless asked for. Read that code, then add --trust-")
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize("where", ["result_folder._copy", "result.Output.write"])
def test_an_interruption(refused, prune, tiny_llama, out, text_file, monkeypatch, where):
    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"secateur.checkpoints.{where}", interrupt)
    refused(
        "prune", tiny_llama, "--out", out / "a" / "b", "--calibration", text_file, "--samples", 4,
        "--seq-len", 16, "--method", "wanda", "--quiet", code=130,
        words="interrupted; nothing unfinished was left behind.",
    )  # fmt: skip


def test_other_errors_of_the_disk_are_one_sentence(refused, tiny_llama, monkeypatch):
    monkeypatch.setattr("secateur.checkpoints.folder._read_header", raising(errno.EIO)(None))
    refused("inspect", tiny_llama, words="[Errno 5] Input/output error")


# What is nobody's mistake but ours.


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (AttributeError("'X' object has no attribute 'y'"), 70, "fault of Secateur and not yours: Attribute"),
        (RecursionError("too\ndeep \x1b[31m"), 70, "RecursionError: too deep \\x1b[31m. Its traceback is in "),
        (AssertionError(), 70, "AssertionError: AssertionError. Its traceback"),
        (MemoryError(), 2, "There was not enough memory (MemoryError). Lower --batch-size"),
        (torch.OutOfMemoryError("CUDA out of memory."), 2, "not enough memory (CUDA out of memory). Lower"),
        (RuntimeError("[enforce fail] CPUAllocator: can't allocate memory: you tried"), 2, "not enough memory ([enf"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), 70, "UnicodeDecodeError: 'utf-8' codec"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)  # fmt: skip
def test_no_error_is_a_traceback_on_the_terminal(run, tiny_llama, monkeypatch, tmp_path, error, code, words):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr("secateur.deployment.inspect.readable_checkpoint", fail)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    found, out, err = run("inspect", tiny_llama)
    assert (found, out) == (code, "")
    assert words in err
    assert err.count("\n") == 1
    files = list(tmp_path.iterdir())
    assert len(files) == (code == 70)
    for file in files:
        assert str(file) in err
        assert "Traceback (most recent call last)" in file.read_text()
        assert type(error).__name__ in file.read_text()


def test_a_fault_on_a_full_disk_is_one_line_as_well(run, tiny_llama, monkeypatch, tmp_path):
    def fail(*arguments, **options):
        raise LookupError("a")

    monkeypatch.setattr("secateur.deployment.inspect.readable_checkpoint", fail)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "no-such-folder"))
    code, _, err = run("inspect", tiny_llama)
    assert code == 70
    assert err.startswith(
        "secateur: This is a fault of Secateur and not yours: LookupError: a. Its traceback could not be "
    )
    assert err.count("\n") == 1
