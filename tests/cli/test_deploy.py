"""The commands after pruning, end to end."""

import json

import pytest
from support.command_line import run
from typer.testing import CliRunner

import secateur
from secateur.cli.app import app
from secateur.deployment.doctor import examine
from secateur.deployment.formats import FORMATS
from secateur.deployment.runtimes import RUNTIMES


def test_doctor_says_of_every_runtime_and_format_what_is_what():
    said = run("doctor")
    found = examine()
    for name in (*RUNTIMES, *FORMATS, *found.packages):
        assert name in said
    for reason in found.runtimes.values():
        assert reason is None or " ".join(reason.split()) in " ".join(said.split())
    assert json.loads(run("doctor", "--json"))["packed"] == found.packed
    assert {"peft", "gguf", "onnx", "tensorrt-llm", "compressed-tensors", "llama-cpp-python"} <= found.packages.keys()


@pytest.mark.parametrize(("pattern", "runtime", "code"), [("2:4", "packed", 0), ("50%", "tensorrt", 1)])
def test_validate_exits_with_one_where_a_promise_is_not_kept(tiny_llama, text_file, tmp_path, pattern, runtime, code):
    secateur.prune(
        tiny_llama, out=tmp_path / "p", method="magnitude", pattern=pattern, calibration=str(text_file), samples=1
    )
    found = CliRunner().invoke(app, ["validate", str(tmp_path / "p"), "--for", runtime])
    assert found.exit_code == code, found.output
    assert "model.layers.0.mlp.down_proj" in found.output
    plain = CliRunner().invoke(app, ["validate", str(tmp_path / "p"), "--for", runtime, "--json"])
    assert json.loads(plain.output)["kept"] == (code == 0)
