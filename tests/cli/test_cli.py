"""The command line end to end: the four commands on a tiny model, in processes of their own where it matters."""

import inspect as introspection
import json
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import typer
from safetensors import safe_open
from support.command_line import run, runner
from transformers import AutoModelForCausalLM, AutoTokenizer

import secateur
from secateur.cli import app as cli
from secateur.cli import compare, deployment, recover
from secateur.system import settings


@pytest.fixture
def pruned(tiny_llama, text_file, tmp_path) -> Path:
    out = tmp_path / "pruned"
    secateur.prune(
        str(tiny_llama), out=out, method="sparsegpt", pattern="2:4", calibration=str(text_file), samples=8, seq_len=32
    )
    return out


def test_prune_writes_a_folder_that_stock_loaders_read(tiny_llama, text_file, tmp_path):
    out = tmp_path / "out"
    text = run(
        "prune", tiny_llama, "--method", "wanda", "--pattern", "2:4", "--calibration", text_file, "--samples", 8,
        "--seq-len", 32, "--out", out, "--quiet",
    )  # fmt: skip
    assert "50.00% of the weights of 28 weight matrices are zero" in text
    assert {p.name for p in out.iterdir()} == {p.name for p in tiny_llama.iterdir()} | {"pruning.json"}
    assert (out / "config.json").read_bytes() == (tiny_llama / "config.json").read_bytes()
    AutoTokenizer.from_pretrained(out)
    AutoModelForCausalLM.from_pretrained(out)
    with safe_open(out / "model.safetensors", "pt") as new, safe_open(tiny_llama / "model.safetensors", "pt") as old:
        assert new.metadata() == old.metadata()
        for name in old.keys():  # noqa: SIM118 — not a mapping
            changed = not new.get_tensor(name).equal(old.get_tensor(name))
            assert changed == ("proj" in name), name


def test_the_record_tells_what_was_done(pruned, tiny_llama):
    record = json.loads((pruned / "pruning.json").read_text())
    assert record["schema"] == "secateur.pruning/1"
    assert (record["method"], record["pattern"], record["sparsity"], record["coverage"]) == ("sparsegpt", "2:4", 0.5, 1)
    assert len(record["sites"]) == 28
    assert all(site["sparsity"] == 0.5 and 0 < site["output_error"] < 1 for site in record["sites"])
    assert record["calibration"].keys() >= {"source", "samples", "length", "seed", "sha256"}
    assert record["versions"].keys() >= {"secateur", "torch", "transformers", "python"}
    from secateur.system.files import file_sha256

    digests = record["shards"]["model.safetensors"]
    assert digests["source_sha256"] == file_sha256(tiny_llama / "model.safetensors")
    assert digests["sha256"] == file_sha256(pruned / "model.safetensors")


def test_two_runs_of_one_command_are_byte_identical(tiny_llama, text_file, tmp_path):
    command = [
        sys.executable, "-m", "secateur", "prune", str(tiny_llama), "--pattern", "4:8", "--out", "out",
        "--calibration", str(text_file), "--samples", "8", "--seq-len", "32",
    ]  # fmt: skip
    held = []
    for folder in ("first", "second"):
        (tmp_path / folder).mkdir()
        done = subprocess.run(command, cwd=tmp_path / folder, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        held.append({p.name: p.read_bytes() for p in (tmp_path / folder / "out").iterdir()})
    assert held[0] == held[1]


def test_progress_goes_to_standard_error_in_plain_lines(tiny_llama, text_file, tmp_path):
    result = runner.invoke(
        cli.app,
        ["prune", str(tiny_llama), "--calibration", str(text_file), "--samples", "8", "--seq-len", "32",
         "--out", str(tmp_path / "out"), "--json"],
    )  # fmt: skip
    assert "4/4 done  elapsed" in result.stderr
    assert "peak memory" in result.stderr
    assert json.loads(result.stdout)["method"] == "default"


def test_evaluate(pruned, tiny_llama, text_file):
    text = run("evaluate", pruned, "--dense", tiny_llama, "--evaluation", text_file, "--windows", 9, "--quiet")
    assert "9 windows of 128 tokens" in text
    assert "95 % interval" in text
    held = json.loads(run("evaluate", pruned, "--evaluation", text_file, "--windows", 9, "--quiet", "--json"))
    assert held["perplexity"] > 1
    assert held["delta"] is None


def test_compare(tiny_llama, text_file, tmp_path):
    text = run(
        "compare", tiny_llama, "--methods", "magnitude,wanda", "--patterns", "2:4", "--calibration", text_file,
        "--evaluation", text_file, "--samples", 8, "--seq-len", 32, "--windows", 9, "--out", tmp_path / "c", "--quiet",
    )  # fmt: skip
    assert "semi-structured" in text
    assert (tmp_path / "c" / "results.json").exists()


def test_inspect(pruned, tiny_llama):
    held = json.loads(run("inspect", pruned, "--json"))
    assert (held["sparsity"], held["coverage"]) == (0.5, 1)
    assert all("2:4" in tensor["patterns"] and "1:4" not in tensor["patterns"] for tensor in held["tensors"])
    text = run("inspect", pruned)
    assert "Pruned with sparsegpt to 2:4." in text
    assert json.loads(run("inspect", tiny_llama, "--json"))["sparsity"] < 0.001


def test_inspect_counts_odd_values(tiny_llama, tmp_path):
    import torch

    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    with torch.no_grad():
        weight = model.model.layers[1].mlp.up_proj.weight
        weight[0, :3] = -0.0
        weight[1, 0] = float("nan")
        weight[2, :2] = float("inf")
    model.save_pretrained(tmp_path)
    tensors = {t.name: t for t in secateur.inspect(tmp_path).tensors}
    found = tensors["model.layers.1.mlp.up_proj.weight"]
    assert (found.negative_zeros, found.nans, found.infs) == (3, 1, 2)
    assert "3 -0.0, 1 NaN, 2 Inf" in run("inspect", tmp_path)


def test_inspect_reads_an_architecture_that_is_not_known(tiny_llama, tmp_path):
    for file in tiny_llama.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text('{"model_type": "of another world"}')
    found = secateur.inspect(tmp_path)
    assert found.coverage is None
    assert "model.layers.0.mlp.up_proj.weight" in {tensor.name for tensor in found.tensors}


@pytest.mark.parametrize("name", ["prune", "plan", "evaluate", "compare", "inspect", "bench", "validate", "recover"])
def test_the_command_line_has_the_names_and_defaults_of_the_functions(name):
    function = introspection.signature(getattr(secateur, name)).parameters
    where = next(module for module in (recover, compare, deployment, cli) if callable(getattr(module, name, None)))
    command = introspection.signature(getattr(where, name)).parameters
    spelled = {"quiet", "as_json", "layers"} | (
        {"values", "passes", "memory"} if name == "plan" else set()
    )  # of forecast
    assert command.keys() - spelled == function.keys() - {"command", "progress", "avoid"}
    for option in command.keys() - spelled:
        one, other = command[option].default, function[option].default
        if isinstance(other, tuple):
            assert one in (None, ",".join(map(str, other)))
        elif other is not introspection.Parameter.empty:
            assert one in (other, str(other)), option  # as text where it may be a list


def test_the_forecast_has_the_names_and_defaults_of_prune():
    function = introspection.signature(secateur.forecast).parameters
    prune = introspection.signature(secateur.prune).parameters
    assert function.keys() - prune.keys() == {"measure"}
    for option in function.keys() & prune.keys():
        assert function[option].default == prune[option].default, option


def test_plan_without_out_says_what_a_run_will_take(tiny_llama, tmp_path):
    (tmp_path / "config.json").write_bytes((tiny_llama / "config.json").read_bytes())
    text = run("plan", tmp_path, "--method", "wanda", "--memory", "1GB")
    assert "4 blocks, 28 weight matrices that hold 100.0% of the block weights" in text
    assert "Blocks run in one pass, which fits into 1 GB." in text
    held = json.loads(run("plan", tmp_path, "--passes", "two", "--json"))
    assert (held["passes"], held["exact"], held["memory_limit"]) == ("two", False, None)
    assert held["seconds"]["one"] < held["seconds"]["two"]


@pytest.mark.parametrize("arguments", ["--version", "--help", "prune --help", "compare --help"])
def test_what_needs_no_model_loads_neither_torch_nor_transformers(arguments):
    program = (
        "import sys, runpy; sys.argv = ['secateur', *sys.argv[1:]]\n"
        "try: runpy.run_module('secateur', run_name='__main__')\n"
        "except SystemExit as left: assert not left.code, left.code\n"
        "heavy = {'torch', 'transformers', 'numpy', 'scipy', 'datasets', 'jinja2'} & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments.split()], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_importing_the_package_loads_nothing_heavy():
    program = "import secateur, sys; assert 'torch' not in sys.modules; secateur.METHODS; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", program], timeout=60, check=True)


def test_every_option_is_declared_once():
    """The options of a command are the fields of the classes in `settings`, with their defaults and words of help."""
    classes = [value for value in vars(settings).values() if isinstance(value, type) and is_dataclass(value)]
    declared = [one for cls in classes for one in fields(cls) if "option" in one.metadata]
    helped = {one.metadata["option"].help for one in declared}
    for command in typer.main.get_command(cli.app).commands.values():  # type: ignore[attr-defined]
        given = [
            p for p in command.params if p.param_type_name == "option" and p.name not in ("quiet", "as_json", "help")
        ]
        assert sum(option.help in helped for option in given) >= len(given) - 4, (
            command.name
        )  # a few are of one command alone


MODEL_OPTIONS = {
    "prune": "allow_low_coverage", "plan": "", "compare": "allow_low_coverage",
    "recover": "", "evaluate": "", "inspect": "", "validate": "", "export": "", "bench": "",
}  # fmt: skip
"""The commands that take a model, and which options of `Trust` each has beside those that all have."""


@pytest.mark.parametrize("name", [*MODEL_OPTIONS, "report", "recommend", "doctor"])
def test_every_command_that_takes_a_model_has_the_same_options_of_it(name):
    own = {one.name for one in fields(settings.Trust)}
    command = typer.main.get_command(cli.app).commands[name]  # type: ignore[attr-defined]
    given = {p.name for p in command.params if p.name in own}
    takes_model = {"model", "models"} & {p.name for p in command.params}
    assert bool(takes_model) == (name in MODEL_OPTIONS)
    assert given == ({"trust_remote_code", "revision", *MODEL_OPTIONS[name].split()} if takes_model else set())


def test_the_table_of_commands_with_a_model_is_whole():
    commands = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    assert commands.keys() - {"report", "recommend", "doctor"} == MODEL_OPTIONS.keys()


def test_version_and_help():
    assert run("--version").strip()
    assert "compare" in run("--help")
    assert "--calibration" in run("prune", "--help")


def test_bits_a_byte_stand_in_brackets(tiny_llama, text_file):
    from secateur.cli.tables import evaluation_lines

    given = {"evaluation": str(text_file), "windows": 4, "seq_len": 32}
    found = secateur.evaluate(str(tiny_llama), dense=str(tiny_llama), **given)
    first, second = list(evaluation_lines(found))[:2]
    assert f"Perplexity {found.perplexity:.4f} ({found.bits_per_byte:.4f} bits a byte) on " in first
    assert f"Dense {found.perplexity:.4f} ({found.dense_bits_per_byte:.4f} bits a byte), difference +0.0000" in second
