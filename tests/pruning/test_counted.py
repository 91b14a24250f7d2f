"""Statistics on some tokens: where whole windows count or not, a run is one on those that count alone; single tokens
are checked against loops over what stock transformers gives.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.families import tiny_model
from support.texts import byte_tokenizer
from torch import nn

import secateur
from secateur.checkpoints.folder import open_checkpoint
from secateur.data.windows import Windows
from secateur.errors import NotEnoughText, UnsupportedModel
from secateur.models.divergence import DenseReference
from secateur.models.load import load
from secateur.models.stream.blocks import BlockRun, stream
from secateur.pruning.check import find_recipe
from secateur.pruning.opening import Opened
from secateur.pruning.prune import prune_checkpoint
from secateur.pruning.structured.channel_scores import taylor
from secateur.pruning.structured.depth import _cosines, missing
from secateur.pruning.structured.expert_scores import routed_to
from secateur.system.devices import find_resources
from secateur.system.settings import Compute, Destination, Recipe, Trust

CPU, LENGTH = torch.device("cpu"), 24


def windows_of(count: int, *, alone: int | None = None, seed: int = 0) -> Windows:
    """Some windows; of `alone`, the first so many count and the others do not."""
    ids = torch.randint(3, 100, (count, LENGTH), generator=torch.Generator().manual_seed(seed))
    counted = None
    if alone is not None:
        counted = torch.zeros_like(ids, dtype=torch.bool)
        counted[:alone] = True
    return Windows(ids, "mine", "", None, None, counted=counted)


def scattered(windows: Windows) -> torch.Tensor:
    """A mask with half of the tokens, and a window without any."""
    mask = torch.rand(windows.ids.shape, generator=torch.Generator().manual_seed(9)) < 0.5
    mask[1] = False
    return mask


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Any:
    """Tiny models by family, saved once."""
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp("models") / family
            tiny_model(family).save_pretrained(made[family])
            byte_tokenizer().save_pretrained(made[family])
        return made[family]

    return folder


# Whole windows: the others might as well not be there.

ZEROS = [
    ("mixtral", "wanda", "uniform"), ("mixtral", "sparsegpt", "uniform"), ("mixtral", "best", "uniform"),
    ("mixtral", "wanda", "error"), ("deepseek_v3", "wanda", "uniform"), ("gpt_oss", "sparsegpt", "uniform"),
    ("llama", "wanda", "search"), ("mixtral", "wanda", "search"), ("llama", "sparsegpt", "owl"),
]  # fmt: skip


@pytest.mark.parametrize("passes", ["one", "two"])
@pytest.mark.parametrize(("family", "method", "allocate"), ZEROS)
def test_zeros_of_counted_windows_are_those_of_these_windows(folders, family, method, allocate, passes):
    some, alone = load(folders(family)), load(folders(family))
    options = {"method": method, "allocate": allocate, "passes": passes, "batch_size": 1, "dtype": "float32"}
    many = windows_of(5, alone=3)
    secateur.prune_model(some, many, **options)
    secateur.prune_model(alone, replace(many, ids=many.ids[:3], counted=None), **options)
    for (name, one), other in zip(some.model.named_parameters(), alone.model.parameters(), strict=True):
        assert torch.equal(one, other), name


STRUCTURES = [
    ("llama", "default", "25% of channels"), ("llama", "taylor", "25% of channels"),
    ("llama", "taylor", "50% of heads"), ("llama", "best", "25% of channels"),
    ("llama", "fast", "1 block"), ("llama", "angular+repair", "1 block"),
    ("llama", "kl+repair+dense-target", "1 block"), ("mixtral", "reap", "25% of experts"),
    ("mixtral", "frequency+refine", "25% of experts"), ("mixtral", "default", "25% of channels"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "method", "pattern"), STRUCTURES)
def test_structures_of_counted_windows_are_those_of_these_windows(folders, family, method, pattern, tmp_path):
    many = windows_of(5, alone=3)
    results = []
    for name, windows in (("some", many), ("alone", replace(many, ids=many.ids[:3], counted=None))):
        chosen = find_recipe(Recipe(method=method, pattern=pattern, align=8 if "channels" in pattern else None))
        opened = Opened(open_checkpoint(folders(family)), load(folders(family)), windows)
        resources = find_resources(Compute(batch_size=1, dtype="float32"))
        prune_checkpoint(opened, chosen, resources, Destination(out=tmp_path / name), Trust())
        results.append(load(tmp_path / name).model.state_dict())
    assert results[0].keys() == results[1].keys()
    for name, tensor in results[0].items():
        assert torch.equal(tensor, results[1][name]), name


# Single tokens.


@pytest.mark.parametrize("passes", ["one", "two"])
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_the_gram_matrix_of_an_expert_is_that_of_its_tokens_that_count(folders, family, passes):
    """Against a loop over the tokens of a plain forward of stock transformers, window by window."""
    windows, language_model = windows_of(5), load(folders(family))
    mask = scattered(windows)
    run = BlockRun(language_model, windows.ids, [CPU], torch.float32, 2, counted=mask)
    step = next(step for step in stream(run) if any(one.expert for one in step.matrices.values()))
    names = [name for name in step.matrices if step.matrices[name].expert]
    if passes == "two":
        seen = step.observe({"gram"}, 0).stats
    else:
        stages = step.stages({"gram"}, list(step.matrices), one_pass=True, sequential=False, again=False)
        seen = {name: part.stats[name] for group, part in stages for name in group if name in part.stats}
    first = next(name for name, module in step.block.named_modules() if hasattr(module, "gate_up_proj"))
    module = language_model.blocks[step.index].get_submodule(first)
    tokens: dict[int, list[torch.Tensor]] = {}
    calls: list[tuple[torch.Tensor, torch.Tensor]] = []
    module.register_forward_pre_hook(lambda _, args: calls.append((args[0].reshape(-1, args[0].shape[-1]), args[1])))
    with torch.no_grad():
        for window in windows.ids:
            language_model.model(window[None])
    for (hidden, chosen), row in zip(calls, mask, strict=True):
        for place in range(LENGTH):
            for expert in set(chosen.reshape(LENGTH, -1)[place].tolist()) if row[place] else ():
                tokens.setdefault(expert, []).append(hidden[place])
    found = [name for name in names if name.endswith(".gate_up_proj") and name in seen]
    assert len(found) == len(tokens) > 1
    for name in found:
        x = torch.stack(tokens[int(name.split(".")[-2])]).double()
        assert seen[name].tokens == seen[name.replace("gate_up", "down")].tokens == len(x)
        assert torch.allclose(seen[name].sums["gram"], x.T @ x, rtol=1e-4, atol=1e-5)


def test_experts_are_scored_by_their_tokens_that_count(folders):
    windows, language_model = windows_of(4), load(folders("mixtral"))
    mask = scattered(windows)
    run = BlockRun(language_model, windows.ids, [CPU], torch.float32, 4)
    step = next(iter(stream(run)))
    batches = [(hidden, calls[0]) for hidden, calls in step.inputs.windows()]
    ((name, found),) = routed_to(step.block, batches, [mask]).items()
    arguments: list[Any] = []
    step.block.get_submodule(name).register_forward_pre_hook(lambda _, args: arguments.append(args))
    routed_to(step.block, batches)
    chosen = arguments[0][1].reshape(-1, arguments[0][1].shape[-1])[mask.flatten()]
    assert found.tokens.tolist() == [int((chosen == expert).any(1).sum()) for expert in range(len(found.tokens))]


def test_the_objective_is_how_tokens_that_count_are_foreseen(folders):
    """KL of stock transformers at the places before the tokens that count, each of them weighing the same."""
    windows, language_model = windows_of(6), load(folders("llama"))
    mask = scattered(windows)
    run = BlockRun(language_model, windows.ids, [CPU], torch.float32, 2, counted=mask)
    reference = DenseReference(run, 4)  # the first four windows with any
    changed = [0.9 * hidden for hidden in reference.leaving]
    rows = [row for row in range(6) if mask[row, 1:].any()][:4]
    assert 1 not in rows
    lost = []
    with torch.no_grad():
        for row in rows:
            stock = language_model.model(windows.ids[row : row + 1], output_hidden_states=True)
            places = [place for place in range(LENGTH - 1) if mask[row, place + 1]]
            hidden = torch.cat([*changed])[rows.index(row)]
            other = language_model.model.lm_head(language_model.model.model.norm(hidden[None]))
            p, q = (one.logits if hasattr(one, "logits") else one for one in (stock, other))
            p, q = (one[0, places].log_softmax(-1) for one in (p, q))
            lost += (p.exp() * (p - q)).sum(-1).tolist()
    assert reference.divergence(changed) == pytest.approx(sum(lost) / len(lost), rel=1e-4)
    nothing = torch.zeros_like(mask)
    nothing[:, 0] = True
    with pytest.raises(NotEnoughText, match="No token that counts has one before it"):
        DenseReference(replace(run, counted=nothing), 4)


@pytest.mark.parametrize("last", [False, True])
def test_blocks_are_compared_at_the_tokens_that_count(folders, last):
    windows, language_model = windows_of(5), load(folders("llama"))
    mask = scattered(windows)
    run = BlockRun(language_model, windows.ids, [CPU], torch.float32, 2, counted=mask)
    found = _cosines(run, 1, last=last)
    with torch.no_grad():  # the last of these is behind the final norm
        states = language_model.model(windows.ids, output_hidden_states=True).hidden_states
    for before, after, value in zip(states, states[1:-1], found, strict=False):
        cosines = []
        for row in range(5):
            places = mask[row].nonzero().flatten().tolist()
            for place in places[-1:] if last else places:
                cosines.append(torch.cosine_similarity(before[row, place], after[row, place], dim=0).item())
        assert value == pytest.approx(sum(cosines) / len(cosines), abs=1e-5)


def test_what_blocks_leave_is_wanted_at_the_tokens_that_count(folders):
    windows, language_model = windows_of(4), load(folders("llama"))
    mask = scattered(windows)
    run = BlockRun(language_model, windows.ids, [CPU], torch.float32, 4, counted=mask)
    step = next(iter(stream(run)))
    span = [(1, load(folders("llama")).blocks[1])]
    added = missing(step.block, span, "mlp.down_proj", step.inputs.windows(), 0, None, step.inputs.masks())
    inputs: list[torch.Tensor] = []
    model = load(folders("llama")).model
    model.get_submodule("model.layers.0.mlp.down_proj").register_forward_pre_hook(
        lambda _, args: inputs.append(args[0])
    )
    with torch.no_grad():
        states = model(windows.ids, output_hidden_states=True).hidden_states
    delta, x = ((states[2] - states[1])[mask], inputs[0][mask])
    expected = delta.T @ torch.cat([x, torch.ones(len(x), 1)], 1) / len(x)
    assert torch.allclose(added.product, expected, rtol=1e-3, atol=1e-6)
    assert added.power == pytest.approx(delta.square().sum().item() / len(x), rel=1e-4)


def test_units_are_scored_by_the_outputs_that_count(folders):
    """What follows the feed-forward sees each token by itself, so its score is a sum over the tokens that count."""
    windows, language_model = windows_of(3), load(folders("llama"))
    run = BlockRun(language_model, windows.ids, [CPU], torch.float32, 3)
    step = next(iter(stream(run)))
    batches = [(hidden, calls[0]) for hidden, calls in step.inputs.windows()]
    units = torch.arange(step.matrices["mlp.down_proj"].weight.shape[1])[:, None]
    mask = scattered(windows)
    one, other, whole = (
        taylor(step.block, "mlp.down_proj", units, batches, [part]) for part in (mask, ~mask, torch.ones_like(mask))
    )
    assert torch.allclose(one + other, whole)
    assert torch.equal(whole, taylor(step.block, "mlp.down_proj", units, batches))
    assert (one > 0).all()


def test_experts_that_are_handed_tokens_without_their_places_are_refused(folders):
    language_model = load(folders("mixtral"))
    language_model.blocks[1].add_module("list", nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]))
    with pytest.raises(UnsupportedModel, match=r"layers\.1 has experts that are modules of their own, .*on out"):
        secateur.prune_model(language_model, windows_of(3, alone=1), method="wanda")
