"""The clock: it compares outputs first, times in turn, and says what it could not time."""

import json
from pathlib import Path

import pytest
import torch
from support.command_line import run

import secateur
from secateur.deployment import bench_matrices as layers
from secateur.deployment.bench import read_bandwidth
from secateur.deployment.runtimes import RUNTIMES, Runtime
from secateur.deployment.runtimes.base import Stepped
from secateur.errors import UnknownName, UnsupportedModel
from secateur.kernels.library import isa, library
from secateur.system.machine import matrix_rate
from secateur.system.settings import TimedRuns

needs_library = pytest.mark.skipif(library() is None, reason="the package was installed without a C compiler")


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, text_file: Path) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pruned")
    for name, pattern in (("half", "50%"), ("smaller", "25% of channels")):
        method = "magnitude" if name == "half" else "energy"
        secateur.prune(
            tiny_llama,
            out=folder / name,
            method=method,
            pattern=pattern,
            calibration=str(text_file),
            samples=2,
            seq_len=16,
        )
    secateur.prune(
        tiny_llama, out=folder / "int4", method="magnitude", pattern="50%", values="int4 of group 64",
        calibration=str(text_file), samples=2, seq_len=16,
    )  # fmt: skip
    return {name: folder / name for name in ("half", "smaller", "int4")}


@needs_library
def test_every_runtime_is_timed_beside_the_dense_model(tiny_llama, pruned, tmp_path):
    out = tmp_path / "bench.json"
    found = secateur.bench(
        [pruned["half"], pruned["smaller"]],
        dense=tiny_llama,
        batch=[1, 2],
        prompt=[8],
        new=2,
        rounds=3,
        dtype="float32",
        out=out,
    )
    rows = [(row.model, row.runtime, row.batch) for row in found.timings]
    assert rows == [
        (model, runtime, batch) for batch in (1, 2)
        for model, runtime in (("dense", "eager"), ("half", "eager"), ("half", "packed"), ("smaller", "eager"))
    ]  # fmt: skip
    assert found.skipped.keys() == {"dense in packed", "dense in own-dense", "smaller in packed"}
    by_name = {(row.model, row.runtime): row for row in found.timings}
    assert by_name["dense", "eager"].decode_ratio == (1.0, 1.0, 1.0)
    assert by_name["half", "packed"].weight_bytes < by_name["half", "eager"].weight_bytes
    assert by_name["smaller", "eager"].weight_bytes < by_name["dense", "eager"].weight_bytes
    for row in found.timings:
        assert row.prefill[0] <= row.prefill[1] <= row.prefill[2]
        assert row.decode_ratio[1] <= row.decode_ratio[0] <= row.decode_ratio[2]
        assert row.against == "eager"
        assert row.over_eager == row.decode_ratio
    assert json.loads(out.read_text())["schema"] == "secateur.bench/2"


@needs_library
@pytest.mark.skipif(isa() == "portable", reason="there is no dense product of our own for this processor")
def test_packed_is_compared_with_the_dense_model_in_our_own_product_too(tiny_llama, pruned):
    found = secateur.bench(
        [pruned["half"]], dense=tiny_llama, runtimes=["packed", "packed-int8"], prompt=[8], new=2, rounds=3,
    )  # fmt: skip
    rows = {(row.model, row.runtime): row for row in found.timings}
    assert rows["half", "packed"].against == "own-dense"
    assert rows["half", "packed-int8"].against == "own-int8"
    assert rows["dense", "own-dense"].decode_ratio == (1.0, 1.0, 1.0)
    assert rows["dense", "own-int8"].weight_bytes < rows["dense", "own-dense"].weight_bytes
    assert rows["half", "packed-int8"].weight_bytes < rows["half", "packed"].weight_bytes
    assert all(row.tokens_per_second > 0 and row.share_of_matrix_rate > 0 for row in rows.values())


@needs_library
def test_four_bits_are_timed_on_what_was_pruned_to_them(tiny_llama, pruned):
    runtimes = ["packed-int8", "packed-int4"]
    found = secateur.bench([pruned["int4"]], dense=tiny_llama, runtimes=runtimes, prompt=[8], new=2, rounds=3)
    rows = {(row.model, row.runtime): row for row in found.timings}
    assert rows["int4", "packed-int4"].against == "eager"
    assert rows["int4", "packed-int4"].weight_bytes < rows["int4", "packed-int8"].weight_bytes


@needs_library
def test_only_what_was_asked_for_is_timed(tiny_llama, pruned):
    found = secateur.bench(
        [pruned["half"]], dense=tiny_llama, runtimes=["packed"], prompt=[4], new=1, rounds=3, dtype="float32"
    )
    assert [(row.model, row.runtime) for row in found.timings] == [("dense", "eager"), ("half", "packed")]


def test_a_runtime_with_other_outputs_is_not_timed(tiny_llama, pruned, monkeypatch):
    def wrong(folder, dtype):
        running = RUNTIMES["eager"].load(folder, dtype)
        assert isinstance(running, Stepped)
        running.model.get_parameter("model.norm.weight").data[0] += 5
        return running

    monkeypatch.setitem(RUNTIMES, "packed", Runtime(lambda: None, wrong))
    with pytest.raises(UnsupportedModel, match="Nothing was timed"):
        secateur.bench([pruned["half"]], dense=tiny_llama, new=1, rounds=3, prompt=[4], dtype="float32")


def test_a_runtime_that_is_missing_says_why(tiny_llama, pruned, monkeypatch):
    monkeypatch.setitem(RUNTIMES, "packed", RUNTIMES["packed"]._replace(missing=lambda: "no compiler"))
    found = secateur.bench([pruned["half"]], dense=tiny_llama, new=1, rounds=3, prompt=[4], dtype="float32")
    assert found.skipped["dense in packed"] == found.skipped["half in packed"] == "no compiler"
    with pytest.raises(UnknownName, match="There is no runtime"):
        secateur.bench([pruned["half"]], runtimes=["pakced"])
    with pytest.raises(UnknownName, match="There is no dtype that can be timed 'float16'"):
        secateur.bench([pruned["half"]], dtype="float16")


@pytest.mark.parametrize("whole", [True, False])
def test_the_compiled_runtime_has_a_cache_of_fixed_length(tiny_llama, monkeypatch, whole):
    """Without the compiler, which takes half a minute; bench/decode.py has it."""
    if whole:
        monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    else:
        monkeypatch.setattr(torch, "compile", lambda function, **options: lambda *args: int("no compiler"))
    plain, running = (RUNTIMES[name].load(tiny_llama, torch.float32) for name in ("eager", "compiled"))
    ids = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(0))
    if not whole:
        with pytest.raises(UnsupportedModel, match=r"torch\.compile cannot run this model: .*no compiler"):
            running.prefill(ids)
        return
    for _ in range(2):
        assert torch.allclose(plain.prefill(ids), running.prefill(ids), atol=1e-4)
        for token in ids.T[:4]:
            assert torch.allclose(plain.decode(token[:, None]), running.decode(token[:, None]), atol=1e-4)


@needs_library
def test_single_matrices_are_timed_with_every_kernel(pruned, tmp_path, monkeypatch):
    monkeypatch.setattr(layers, "BEYOND_CACHE", 1e5)
    found = layers.time_layers([pruned["half"], pruned["smaller"]], TimedRuns(dtype="bf16", batch=[1, 3], rounds=3))
    shapes = {(row.site.split()[0], row.shape) for row in found}
    assert len({shape for name, shape in shapes if name == "half"}) == 4
    for row in found:
        assert row.kernel != "packed" or (row.sparsity > 0.4 and row.bytes > 1)
        assert row.batch == 1 or not row.kernel.startswith("own")
        assert row.over["torch"] > 0
    timed = {row.kernel for row in found if row.site.startswith("half")}
    assert timed >= {"torch", "packed", "packed int8", "packed int4"}
    said = run("bench", pruned["half"], "--layers", "--rounds", 3, "--quiet", "--out", tmp_path / "layers.json")
    assert "over torch" in said
    assert json.loads((tmp_path / "layers.json").read_text()).keys() == {"command", "machine", "versions", "layers"}
    with pytest.raises(UnknownName, match="dtype that can be timed"):
        layers.time_layers([pruned["half"]], TimedRuns(dtype="float16"))


def test_the_machine_is_measured():
    assert read_bandwidth() > 1e8
    assert matrix_rate(torch.float32) > 1e8


def test_the_command_prints_a_table(tiny_llama, pruned):
    said = run("bench", pruned["half"], "--dense", tiny_llama, "--new", 1, "--rounds", 3, "--prompt", 4, "--quiet")
    assert "half" in said
    assert "a token" in said
