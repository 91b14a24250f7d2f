"""Forwards that stop inside a block: one pass gives what a forward for every group of sites gives, bit for bit."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from support.families import tiny_model
from torch.utils._pytree import tree_leaves

from secateur.data.windows import Windows
from secateur.errors import OutputRefused, UnknownName, UnsupportedModel
from secateur.methods import METHODS
from secateur.models.load import replayable
from secateur.models.mapped_tensors import HiddenStateStore
from secateur.models.matrices import weight_matrices
from secateur.models.replay import run_block, working_copy
from secateur.models.stream.blocks import BlockRun, stream
from secateur.models.stream.paused import InputGroups, PausedForwards, find_groups
from secateur.pruning.in_memory import prune_model
from secateur.pruning.planning.memory import arrange, way_through
from secateur.pruning.planning.meta import storage
from secateur.pruning.planning.outline import build, outline
from secateur.pruning.planning.passes import Workload
from secateur.system.memory import available_bytes, will_need
from secateur.system.sizes import find_size

CPU = torch.device("cpu")
TOKENS = torch.randint(3, 128, (7, 24), generator=torch.Generator().manual_seed(2))
WINDOWS = Windows(TOKENS, "random", "none", 2, None)
FAMILIES = ["llama", "gpt2", "mixtral", "gpt_oss", "falcon", "gemma2", "jamba", "deepseek_v3"]


def pruned(family: str, method: str, passes: str, **options) -> dict[str, torch.Tensor]:
    model = tiny_model(family)
    options = {"pattern": "50%", "batch_size": 2, "allow_low_coverage": True, **options}
    report = prune_model(replayable(model), WINDOWS, method=method, passes=passes, **options)
    errors = {site.site: torch.tensor(site.output_error or 0.0) for site in report.sites}
    return {**dict(model.named_parameters()), **errors}


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "magnitude", "sweep+dense-target", "wanda+refine"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.filterwarnings("ignore")
def test_one_pass_is_a_forward_for_every_group(family, method):
    one, many = pruned(family, method, "one"), pruned(family, f"{method}+sequential", "two")
    if method == "magnitude":  # which needs no inputs, so the order shows in the reported errors alone
        one, many = ({n: t for n, t in found.items() if t.dim()} for found in (one, many))
    assert all(torch.equal(one[name], many[name]) for name in many)


@pytest.mark.filterwarnings("ignore")
def test_a_block_that_cannot_be_stopped_runs_twice():
    """Gemma 3n calls one of its layers twice."""
    one, two = pruned("gemma3n_text", "wanda", "one"), pruned("gemma3n_text", "wanda", "two")
    assert all(torch.equal(one[name], two[name]) for name in two)


@pytest.mark.parametrize("passes", ["one", "two"])
def test_how_often_a_block_runs(passes, monkeypatch):
    """Every batch once in one pass, beside one forward of the first batch that finds the stages."""
    calls: Counter[str] = Counter()
    real = torch.nn.Linear.forward

    def forward(self, x):
        if x.shape[:2] != (3, 16):  # the check at load
            calls["linear"] += 1
        return real(self, x)

    language_model = replayable(tiny_model("llama"))
    monkeypatch.setattr(torch.nn.Linear, "forward", forward)
    prune_model(language_model, WINDOWS, method="wanda", passes=passes, batch_size=1)
    blocks, linear, batches = len(language_model.blocks), 7, len(TOKENS)
    if passes == "one":  # the last block stops at its last site
        assert calls["linear"] == blocks * linear * batches - batches + linear
    else:
        assert calls["linear"] == 2 * blocks * linear * batches - linear * batches


def test_stages_of_blocks():
    def stages(family: str) -> InputGroups:
        language_model = replayable(tiny_model(family))
        step = next(stream(BlockRun(language_model, TOKENS, [CPU], None, 3)))
        return find_groups(step.block, *step.inputs.first())

    attention = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
    assert stages("llama").order == [
        attention, ["self_attn.o_proj"], ["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"]
    ]  # fmt: skip
    first, second, gate_up, down = stages("mixtral").order
    assert (first, second) == (attention, ["self_attn.o_proj"])
    assert gate_up == [f"mlp.experts.{e}.gate_up_proj" for e in range(len(gate_up))]
    assert down == [f"mlp.experts.{e}.down_proj" for e in range(len(gate_up))]
    assert stages("mixtral").plain
    twice = stages("gemma3n_text")
    assert not twice.plain
    named = [name for stage in [*twice.order, twice.unreached] for name in stage]
    assert len(named) == len(set(named))


def test_a_batch_that_takes_another_way_is_refused():
    model = tiny_model("llama")
    step = next(stream(BlockRun(replayable(model), TOKENS, [CPU], None, 3)))
    hidden, call = step.inputs.first()
    stages = find_groups(step.block, hidden, call)
    backwards = PausedForwards(step.block, stages.order[::-1], {0: lambda: run_block(step.block, hidden, call)})
    list(backwards.inputs(0))
    with pytest.raises(UnsupportedModel, match=r"self_attn.o_proj is reached in another order.*--passes two"):
        list(backwards.outputs())
    backwards.close()


def test_what_is_given_up_leaves_the_block_as_it_was():
    step = next(stream(BlockRun(replayable(tiny_model("llama")), TOKENS, [CPU], None, 3)))
    hidden, call = step.inputs.first()
    before = run_block(step.block, hidden, call)
    stages = find_groups(step.block, hidden, call)
    held = PausedForwards(step.block, stages.order, {n: lambda: run_block(step.block, hidden, call) for n in range(3)})
    assert [number for number, _ in held.inputs(1)] == [0, 1, 2]
    held.close()
    assert not any(module._forward_pre_hooks for module in step.block.modules())
    assert torch.equal(run_block(step.block, hidden, call), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hidden_states_in_a_file(tmp_path: Path, dtype):
    """The same values; nothing with a name is left, even while they are in use."""
    tensors = [torch.randn(2, 3, 5).to(dtype) for _ in range(3)]
    spilled, held = HiddenStateStore(tmp_path, tensors), HiddenStateStore(None, tensors)
    assert list(tmp_path.iterdir()) == []
    for states in (spilled, held):
        states[1] = tensors[1] * 2
    assert len(spilled) == 3
    assert all(torch.equal(one, other) for one, other in zip(spilled, held, strict=True))


def test_many_batches_in_a_file_take_few_descriptors(tmp_path: Path):
    before = len(list(Path("/proc/self/fd").iterdir()))
    states = HiddenStateStore(tmp_path, (torch.full((1, 5, 3), float(number)) for number in range(1000)))
    assert len(list(Path("/proc/self/fd").iterdir())) - before < 20
    assert [part.mean().item() for part in states] == list(range(1000))


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path):
    with pytest.raises(OutputRefused, match="cannot be written"):
        HiddenStateStore(tmp_path / "not there")


@pytest.mark.parametrize("method", ["wanda", "sweep+dense-target", "wanda+refine"])
def test_spilling_changes_nothing(method):
    one = pruned("llama", method, "two", batch_size=1)  # in nothing at all, batches are as small as they can be
    other = pruned("llama", method, "two", memory=0)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_what_does_not_fit_runs_in_smaller_batches_or_twice_or_goes_to_a_file():
    language_model = replayable(tiny_model("llama"))
    planned = [f"model.layers.{index}.mlp.down_proj" for index in range(4)]

    def way(limit: int | None, passes: str = "auto", shape=(512, 128)) -> tuple[str, bool, int]:
        run = BlockRun(language_model, torch.zeros(shape, dtype=torch.int64), [CPU], torch.float32, 8)
        found = way_through(run, METHODS["wanda"], planned, passes, limit)
        return found["passes"], found["spill"], found["batch_size"]

    built = build(language_model.model.config, torch.float32)
    work = Workload(built, METHODS["wanda"], planned, 512, 128, torch.float32, torch.float32, [CPU])

    def bytes_of(passes: str, batch: int) -> int:
        found = arrange(work, batch, passes, None)
        assert (found.passes, found.spill, found.batch) == (passes, False, batch)
        return found.peaks[passes].bytes

    one, two = ({batch: bytes_of(passes, batch) for batch in (8, 4, 1)} for passes in ("one", "two"))
    assert two[1] < two[8] < one[1] < one[4] < one[8]
    assert way(None, shape=(4, 16)) == way(one[8]) == ("one", False, 8)
    assert way(one[8] - 1) == way(one[4]) == ("one", False, 4)
    assert way(one[1]) == ("one", False, 1)
    assert way(one[1] - 1) == way(two[8]) == ("two", False, 8)
    assert way(two[8] - 1) == ("two", False, 4)
    assert way(two[1] - 1) == ("two", True, 8)
    assert way(0) == ("two", True, 1)
    assert way(two[1] - 1, "one") == ("one", True, 1)


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon", "bloom", "gemma2"])
@pytest.mark.filterwarnings("ignore")
def test_what_waits_is_forecast_from_the_configuration(family):
    """Against the tensors that the frames of a stopped forward really hold."""
    language_model = replayable(tiny_model(family))
    tokens = TOKENS[:4]
    step = next(stream(BlockRun(language_model, tokens, [CPU], None, 4)))
    hidden, call = step.inputs.first()
    found = find_groups(step.block, hidden, call)
    reads = outline(build(language_model.model.config, torch.float32), *tokens.shape).kinds[0].reads
    given = {storage(t).data_ptr() for t in tree_leaves([hidden, call]) if isinstance(t, torch.Tensor)}
    held = PausedForwards(step.block, found.order, {0: lambda: run_block(step.block, hidden, call)})
    for stage, names in enumerate(found.order):
        list(held.inputs(stage))
        frame, tensors = held.forwards[0].stack.gr_frame, {}
        while frame is not None:
            for value in tree_leaves(list(frame.f_locals.values())):
                if isinstance(value, torch.Tensor) and not isinstance(value, torch.nn.Parameter):
                    tensors[storage(value).data_ptr()] = storage(value).nbytes()
            frame = frame.f_back
        real = sum(size for place, size in tensors.items() if place not in given)
        forecast = next(read.live_bytes for read in reads if read.group == names[0])
        assert real <= 1.1 * forecast + 4096, (names, real, forecast)
        assert forecast <= 2 * real + 4096, (names, real, forecast)
    held.close()


def test_sizes_in_words():
    assert [find_size(text) for text in ("6GB", "512MiB", "1.5 kB", "77", 5, None)] == [
        6 * 10**9, 512 * 2**20, 1500, 77, 5, None
    ]  # fmt: skip
    with pytest.raises(UnknownName, match="There is no size 'much'"):
        find_size("much")


def test_the_machine_says_what_is_free():
    assert 2**20 < available_bytes(CPU) < 2**50
    will_need(tiny_model("llama").parameters())


NEW = ("memory.max", "memory.current", "inactive_file")
OLD = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


@pytest.mark.parametrize(
    ("line", "place", "names"),
    [
        ("0::/pod/job", "pod", NEW),
        ("9:cpu:/\n8:memory:/pod/job", "memory/pod/job", OLD),
        ("8:memory:/not/mounted", "memory", OLD),
    ],
)
def test_the_limits_of_control_groups_count(line, place, names, tmp_path, monkeypatch):
    folder = tmp_path / place
    folder.mkdir(parents=True)
    (folder / names[0]).write_text("9000\n")
    (folder / names[1]).write_text("5000\n")
    (folder / "memory.stat").write_text(f"file 7\n{names[2]} 300\n")
    (tmp_path / "own").write_text(line + "\n")
    monkeypatch.setattr("secateur.system.memory._CGROUP", tmp_path)
    monkeypatch.setattr("secateur.system.memory._OWN_CGROUP", tmp_path / "own")
    assert available_bytes(CPU) == 4300
    (folder / names[0]).write_text("max\n")
    assert available_bytes(CPU) > 2**20


@pytest.mark.parametrize("family", ["llama"])
def test_sites_left_out_are_not_observed(family):
    """No statistics for what the plan does not prune."""
    model, dense = tiny_model(family), tiny_model(family)
    prune_model(replayable(model), WINDOWS, method="wanda", pattern="2:4", skip=["*down_proj", "*o_proj"])
    for name, site in weight_matrices(working_copy(model.model.layers[0], CPU, None)).items():
        same = torch.equal(site.weight, dense.get_parameter(f"model.layers.0.{name}.weight"))
        assert same == name.endswith(("down_proj", "o_proj"))
