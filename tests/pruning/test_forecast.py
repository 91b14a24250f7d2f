"""What a run will take, said from the configuration: counts against counted runs, memory against its own sum."""

import json
from dataclasses import replace

import pytest
import torch
from support.counting import counted
from support.families import tiny_config, tiny_model
from support.streams import CPU
from transformers import LlamaConfig

import secateur
from secateur import errors
from secateur.data.windows import Windows
from secateur.methods import METHODS, find_method
from secateur.methods.pattern_text import parse_pattern
from secateur.methods.rounding import with_values
from secateur.methods.statistics import Stats
from secateur.methods.values import parse_values
from secateur.models.hooks import recorded_inputs
from secateur.models.load import replayable
from secateur.models.replay import Shell, run_block
from secateur.models.stream.observe import Watch
from secateur.pruning.planning import memory
from secateur.pruning.planning.forecast import lines
from secateur.pruning.planning.memory import as_it_fits
from secateur.pruning.planning.outline import build, outline
from secateur.pruning.planning.passes import Workload, passes

CUDA = torch.device("cuda")


def forecast(folder, **options):
    return secateur.forecast(folder, **{"samples": 6, "seq_len": 32, "batch_size": 2, "measure": False, **options})


@pytest.fixture
def folder(tmp_path):
    """A folder with the configuration of the tiny Llama, and nothing else."""
    tiny_config("llama").save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("values", ["as stored", "int4 of row", "int3 of 64 by sweep", "int4 of 32 by nearest"])
@pytest.mark.parametrize(
    "name", [*METHODS, "sweep+refit", "wanda+refit", "alps-fast+dense-target", "sweep+dense-target"]
)
def test_the_formula_of_a_method_is_what_it_does(name, values):
    rows, columns = 48, 64
    method, draw = find_method(name), torch.Generator().manual_seed(0)
    if kind := parse_values(values):
        method = with_values(method, kind)
    x, weight = torch.randn(256, columns, generator=draw), torch.randn(rows, columns, generator=draw)
    gram = (x.T @ x).double()
    sums = {"gram": gram, "square": gram.diagonal(), **({"cross": gram} if "cross" in method.need else {})}
    pattern = parse_pattern("50%").within(method.group)
    found = counted(lambda: method.prune(weight, Stats(256, sums), pattern))
    assert method.cost
    assert found == pytest.approx(method.cost.of_matrix(rows, columns) + method.cost.shared(columns), rel=1e-9)


def test_swaps_are_counted_at_most():
    cost = find_method("wanda+swap").cost
    assert cost
    assert cost.products > 100


def test_every_method_has_a_formula():
    assert [name for name, method in METHODS.items() if method.cost is None] == []


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bloom", "falcon", "mixtral", "deepseek_v3", "mamba"])
def test_the_outline_is_what_a_real_model_does(family):
    language_model = replayable(tiny_model(family))
    built = build(tiny_config(family), torch.float32)
    found = outline(built, 2, 32)
    with torch.no_grad():
        hidden, calls = Shell(language_model, torch.device("cpu"), None).enter(torch.randint(0, 128, (2, 32)))
        operations, shared = 0.0, set()
        for block, call in zip(language_model.blocks, calls, strict=True):
            watch, after = Watch(("square",), None), []
            with recorded_inputs(block, watch.see):
                watch.next_batch(0, {})
                run_block(block, hidden, call)
            operations += counted(lambda b=block, c=call, a=after: a.append(run_block(b, hidden, c)))  # noqa: B023
            groups: dict[str, list[str]] = {}
            for name, first in watch.shared.items():
                groups.setdefault(first, []).append(name)
            shared.add(str(sorted(map(sorted, groups.values()))))
            hidden = after[0]
    assert sum(kind.flops * kind.count for kind in found.kinds) == operations
    assert {str(sorted(sorted(read.rows) for read in kind.reads)) for kind in found.kinds} == shared
    assert built.model.num_parameters() == language_model.model.num_parameters()
    assert found.hidden_bytes == 2 * 32 * 64 * 4


@pytest.mark.parametrize(
    "method", ["magnitude", "wanda", "sparsegpt", "default", "wanda+sequential", "alps-fast+dense-target"]
)
@pytest.mark.parametrize("passes", ["one", "two"])
def test_the_operations_of_a_run_are_those_forecast(folder, method, passes):
    language_model = replayable(tiny_model("llama"))
    windows = Windows(torch.randint(0, 128, (6, 32)), "test", "train", 0, 192)
    run = {"method": method, "pattern": "50%", "batch_size": 2}
    found = counted(lambda: secateur.prune_model(language_model, windows, passes=passes, **run))
    assert forecast(folder, **run).operations[passes].total == pytest.approx(found, rel=1e-9)


def test_the_operations_of_tuning_all_blocks_are_bounded(folder):
    """Blocks whose graph stays run once where the forecast counts two; nothing else is missing."""
    language_model = replayable(tiny_model("llama"))
    windows = Windows(torch.randint(0, 128, (6, 32)), "test", "train", 0, 192)
    run = {"method": "wanda+distil", "pattern": "50%", "batch_size": 2}
    found = counted(lambda: secateur.prune_model(language_model, windows, passes="one", **run))
    said = forecast(folder, **run)
    assert 0.95 * found < said.operations["one"].total < 1.35 * found
    assert "tuning all blocks" in lines(said)[6]


def test_tuning_all_blocks_does_not_change_the_way_through_them(folder):
    """Smaller batches and two passes would take nothing off what is held at the end."""
    limit = forecast(folder, method="wanda").memory["one"].bytes
    plain, tuned = (forecast(folder, method=method, memory=limit) for method in ("wanda", "wanda+distil"))
    assert (tuned.passes, tuned.batch_size) == (plain.passes, plain.batch_size)
    assert plain.fits
    assert tuned.fits == (tuned.memory["one"].bytes <= limit)


def test_all_blocks_lie_in_a_file_where_memory_is_short(tmp_path):
    """200 M parameters in blocks: 2.4 GB in float32 with Adam's two means, and a limit that holds all but them."""
    LlamaConfig(
        hidden_size=1024, intermediate_size=2816, num_attention_heads=16, vocab_size=4096, num_hidden_layers=16
    ).save_pretrained(tmp_path)
    run = {"method": "alps+distil", "samples": 8, "seq_len": 128}
    held, filed = forecast(tmp_path, **run), forecast(tmp_path, memory="1.8GB", **run)
    assert held.spill_bytes == 0
    blocks = filed.memory["one"].parts["all blocks"]
    assert blocks > 1.8e9
    assert filed.spill_bytes > blocks
    assert filed.fits


def test_best_is_forecast_without_what_it_does_without(folder, monkeypatch):
    few, many = (forecast(folder, method="best", samples=samples) for samples in (1, 6))
    said = "All blocks cannot be tuned together, and the run does without."
    assert said in few.left_out
    assert said not in many.left_out
    assert "all blocks" not in few.memory["two"].parts
    on_gpu = Workload(
        replayable(tiny_model("llama")), find_method("best"), (), 6, 32, torch.float32, torch.float32, [CUDA]
    )
    without = find_method("best")._replace(distil=0)
    for free, limit, fits in ((10**12, None, True), (10**12, 10**12, True), (10**12, 10**6, False), (1, None, False)):
        monkeypatch.setattr(memory, "available_bytes", lambda device, free=free: free)
        assert as_it_fits(on_gpu, limit).method == (find_method("best") if fits else without)
    assert as_it_fits(replace(on_gpu, devices=[CPU]), 10**6).method.distil
    shared = replace(on_gpu, built=replayable(tiny_model("gemma3n_text")), devices=[CPU])
    assert as_it_fits(shared, None).method == without


def test_a_plan_refuses_what_a_run_would(tmp_path):
    tiny_config("gemma3n_text").save_pretrained(tmp_path)
    with pytest.raises(errors.UnsupportedModel, match="share keys and values"):
        forecast(tmp_path, method="alps+distil")
    assert "all blocks" not in forecast(tmp_path, method="best").memory["two"].parts


@pytest.mark.parametrize("pattern", ["0%", "50%"])
@pytest.mark.parametrize("values", ["int4 of group 32", "int3 of row by sweep"])
def test_the_operations_of_a_run_with_values_are_those_forecast(folder, pattern, values):
    language_model = replayable(tiny_model("llama"))
    windows = Windows(torch.randint(0, 128, (6, 32)), "test", "train", 0, 192)
    run = {"method": "default", "pattern": pattern, "values": values, "batch_size": 2}
    found = counted(lambda: secateur.prune_model(language_model, windows, passes="one", **run))
    said = forecast(folder, **run)
    assert said.operations["one"].total == pytest.approx(found, rel=1e-9)
    assert f"with default to {pattern} and {values}: 6 windows" in lines(said)[1]


def test_one_pass_takes_less_work_and_more_memory(folder):
    found = forecast(folder, method="wanda", samples=64)
    assert found.operations["one"].forward < found.operations["two"].forward
    assert found.memory["one"].bytes > found.memory["two"].bytes
    assert "waiting activations" in found.memory["one"].parts
    assert "waiting activations" not in found.memory["two"].parts


def test_what_fits_with_hidden_states_in_a_file_is_said_to_fit(folder):
    moment = forecast(folder, batch_size=1, passes="two").memory["two"]
    limit = moment.bytes - moment.parts["hidden states"]
    found = forecast(folder, memory=limit, passes="two")
    assert (found.passes, found.batch_size, found.fits) == ("two", 1, True)
    assert found.spill_bytes == moment.parts["hidden states"]
    assert not forecast(folder, memory=limit - 1, passes="two").fits


def test_memory_is_the_sum_of_its_parts(folder):
    for method in ("magnitude", "default", "best", "wanda+permute"):
        for moment in forecast(folder, method=method).memory.values():
            assert moment.bytes == sum(moment.parts.values())
            assert moment.on_device == 0
    hidden = forecast(folder, method="wanda").memory["two"].parts["hidden states"]
    assert hidden == 6 * 32 * 64 * 4
    assert forecast(folder, method="wanda", dtype="bfloat16").memory["two"].parts["hidden states"] == hidden // 2
    assert forecast(folder, method="alps+dense-target+refine").memory["two"].parts["hidden states"] == 2 * hidden


def test_magnitude_reads_one_batch(folder):
    few, many = (forecast(folder, method="magnitude", samples=samples) for samples in (2, 64))
    assert few.memory == many.memory
    assert few.operations == many.operations


def test_headers_give_exact_bytes(tiny_llama, folder):
    exact, without = forecast(tiny_llama), forecast(folder)
    assert exact.exact
    assert exact.checkpoint_bytes == (tiny_llama / "model.safetensors").stat().st_size
    assert not without.exact
    assert without.checkpoint_bytes == without.parameters * 4
    assert exact.disk_bytes == exact.checkpoint_bytes
    assert exact.parameters == without.parameters


def test_a_limit_chooses_the_passes(folder):
    limits = {mode: moment.bytes for mode, moment in forecast(folder, samples=64).memory.items()}
    between = (limits["one"] + limits["two"]) // 2
    wide, narrow = (forecast(folder, samples=64, memory=limit) for limit in (limits["one"], between))
    assert (wide.passes, wide.fits, narrow.passes, narrow.fits) == ("one", True, "two", True)
    small = forecast(folder, memory="1MB")
    assert (small.passes, small.fits, small.memory_limit) == ("two", False, 10**6)
    asked = forecast(folder, samples=64, memory=between, passes="one")
    assert (asked.fits, asked.spill_bytes > 0) == (False, True)
    assert "does not fit into 1 MB" in "\n".join(lines(small))


def test_sites_that_are_left_out_are_not_counted(folder):
    whole, fewer = forecast(folder), forecast(folder, skip=["down_proj"])
    assert (whole.pruned_sites, fewer.pruned_sites) == (28, 24)
    assert fewer.operations["two"].solve < whole.operations["two"].solve
    assert fewer.bytes_written < whole.bytes_written


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        (
            {"pattern": "25% of channels"},
            errors.BadPattern,
            "makes a smaller model, and what that takes is not forecast",
        ),
        ({"pattern": "5:17"}, errors.BadPattern, "5:17 needs inputs in groups of 17; model.layers.0.self_attn.q_proj"),
        ({"values": "int4"}, errors.BadPattern, "int4 of group 128 needs inputs in groups of 128; model.layers.0.self"),
        ({"values": "int5"}, errors.BadPattern, "'int5' is no kind of values"),
        ({"memory": "much"}, errors.UnknownName, "There is no size 'much'"),
        ({"passes": "three"}, errors.UnknownName, "There is no number of passes 'three'"),
        (
            {"seq_len": 4096},
            errors.UnsupportedModel,
            "Windows of 4096 tokens were asked for; the model has a context of",
        ),
        ({"samples": 0}, errors.NotEnoughText, "At least one window"),
        ({"skip": ["nothing"]}, errors.UnknownName, "nothing"),
    ],
)
def test_what_cannot_be_run_is_refused_before(folder, options, error, said):
    with pytest.raises(error, match=said):
        forecast(folder, **options)


def test_an_architecture_that_cannot_be_run_without_numbers_is_refused(tmp_path):
    tiny_config("jetmoe").save_pretrained(tmp_path)
    with pytest.raises(errors.UnsupportedModel, match="cannot be run without numbers, so its cost is not known"):
        forecast(tmp_path)


def test_an_unknown_architecture_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "of another world"}))
    with pytest.raises(errors.UnsupportedModel):
        forecast(tmp_path)


def test_seconds_are_operations_over_the_measured_rate(folder):
    found = secateur.forecast(folder, method="sparsegpt", samples=2, seq_len=8)
    assert found.seconds is not None
    assert found.operations["one"].statistics > 0
    for mode, operations in found.operations.items():
        products, grams = operations.forward + operations.solve, operations.statistics
        expected = products / found.rates["float32"] + grams / found.rates["Gram matrices"]
        assert found.seconds[mode] == pytest.approx(expected)
    assert any("estimated: operations over the rate" in line for line in lines(found))
    assert forecast(folder).seconds is None


def test_passes():
    assert passes(find_method("wanda"), 4, "two", 32, 1) == (1, 0, 1)
    assert passes(find_method("wanda+sequential"), 4, "two", 32, 1) == (4, 0, 1)
    tuning = (2 * 2 + 3 * 150) / 32  # two windows judge before and after, five times 30 are tuned on
    assert passes(find_method("alps+dense-target+refine"), 4, "two", 32, 1) == (4 * 2 + tuning + 1, 0, 1)
    assert passes(find_method("best"), 4, "two", 32, 1) == (1 + tuning + 1, 0, 1)
    assert passes(find_method("magnitude"), 4, "two", 32, 1) == (0, 1, 1)
    assert passes(find_method("wanda"), 4, "one", 32, 1) == (1, 0, 0)
    assert passes(find_method("alps+dense-target+refine"), 4, "one", 32, 1) == (2 + tuning, 0, 1)
