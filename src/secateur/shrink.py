"""The program for structured pruning: the same stream as `prune`, but what comes out is a smaller dense model.

    survey: what can go, and the stock configuration that holds the rest → which blocks go
    → for each block that stays: statistics → which units go → repair of what reads them → the block cut
    → the block's bytes in the result → hidden states entering the next block → …
    → the written model loaded by a fresh process, its logits compared with those of the stream

Whatever can be refused is refused by the survey, before any work.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from secateur.checkpoint import Checkpoint, Output, output
from secateur.cut import State, module_of, without_experts, without_units
from secateur.data import Windows
from secateur.depth import BLOCKS, Looking, last_matrix, span_effect
from secateur.errors import BadPattern, NonFinite, UnknownName
from secateur.layout import resized
from secateur.machine import release_memory, versions
from secateur.model import LanguageModel, Shell, checkpoint_tensors, run_block, working_copy
from secateur.options import check_windows, find_devices, find_dtype, forward_dtype
from secateur.patterns import parse
from secateur.progress import PeakMemory, Progress
from secateur.reap import EXPERTS, routed_to
from secateur.record import Report, SiteReport
from secateur.repair import NEED, repaired
from secateur.selection import SELECTIONS, lowest
from secateur.sites import bias, coverage, sites
from secateur.stats import OF_DENSE, Stats
from secateur.stream import Seconds, Step, stream
from secateur.structures import Depth, Structure, Units, parts
from secateur.survey import BlockCut, Consumer, Survey, holds, survey
from secateur.taylor import taylor
from secateur.units import Unit
from secateur.verify import refuse_unequal

DEFAULT = {"channels": "obs", "heads": "obs", "experts": "reap", "blocks": "kl"}
"""The selections of `default`, which repairs as well."""
PROBE_TOKENS = 1024
CHECKED_TOKENS = 256


class Shrinking(NamedTuple):
    """A structured method: which selection for which kind of unit, whether the rest is repaired, and to which target."""

    selections: Mapping[str, str]
    repair: bool
    dense: bool


def find_shrinking(name: str, structure: Structure) -> Shrinking:
    """The structured method of that name for a structure. Raises UnknownName.

    A selection and suffixes: `energy`, `obs+repair`, `kl+repair`, `obs+repair+dense-target`. `default` selects and
    repairs. In a structure of several kinds, those that a selection does not know are selected as by default.
    """
    first, *suffixes = name.split("+")
    tables: dict[str, Mapping[str, Any]] = {
        "channels": SELECTIONS, "heads": SELECTIONS, "experts": EXPERTS, "blocks": BLOCKS,
    }  # fmt: skip
    kinds = ["blocks" if isinstance(part, Depth) else part.of for part in parts(structure)]
    known = {"default", *(selection for kind in kinds for selection in tables[kind])}
    if first not in known:
        raise UnknownName(f"method for {structure}", first, known)
    for suffix in suffixes:
        if suffix not in ("repair", "dense-target"):
            raise UnknownName("refinement of a structured method", suffix, ("repair", "dense-target"))
    chosen = {kind: first if first in tables[kind] else DEFAULT[kind] for kind in kinds}
    return Shrinking(chosen, first == "default" or bool(suffixes), "dense-target" in suffixes)


def shrink_checkpoint(
    source: Checkpoint,
    language_model: LanguageModel,
    windows: Windows,
    out: Path,
    *,
    method: str,
    pattern: str,
    align: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    batch_size: int = 8,
    overwrite: bool = False,
    trust_remote_code: bool = False,
    command: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> Report:
    """`prune_checkpoint` for a structure: writes the smaller model to `out`; returns the report in `pruning.json`."""
    progress = progress or Progress()
    structure = parse(pattern)
    assert isinstance(structure, Structure)
    shrinking = find_shrinking(method, structure)
    check_windows(language_model, windows, batch_size)
    devices, chosen = find_devices(device), find_dtype(dtype)
    run = _Run(
        language_model, windows.ids, shrinking, devices, forward_dtype(chosen, devices[0]), batch_size, Seconds(),
        progress,
    )  # fmt: skip
    with PeakMemory() as peak:
        started = perf_counter()
        found = _surveyed(run, structure, align)
        run.seconds.plan = perf_counter() - started
        counts = [coverage(block) for block in language_model.blocks]
        share = sum(covered for covered, _ in counts) / max(sum(total for _, total in counts), 1)
        dense = language_model.model.num_parameters()
        report = Report(
            method, str(structure), "structured", 0.0, share, [], run.seconds, None, windows.fingerprint(),
            parameters=(dense, dense - _difference(language_model, found.stock.language_model)),
            removed=_in_words(language_model, found),
        )  # fmt: skip
        names = _Names(source, language_model, found)
        with output(source, out, overwrite=overwrite, weights=False) as result:
            result.places = resized(source, result.partial, names.places())
            result.configure(found.stock.changes, language_model.model.config.model_type)
            progress.begin(f"shrinking with {method} to {structure}")
            logits = _shrink(run, found, report, names, result)
            _verify(result, windows.ids, logits, trust_remote_code, progress)
            report.sparsity = _share_gone(language_model, found)
            report.peak_bytes, report.out = peak.bytes, out
            result.finish(
                {
                    "schema": "secateur.pruning/1",
                    "model": str(source.folder),
                    "command": list(command) if command is not None else [Path(sys.argv[0]).name, *sys.argv[1:]],
                    "versions": versions(),
                    **report.record(),
                    "options": {"dtype": dtype, "batch_size": batch_size, "align": align},
                }
            )
    return report


@dataclass
class _Run:
    """What every step of a run needs to know."""

    language_model: LanguageModel
    tokens: Tensor
    shrinking: Shrinking
    devices: Sequence[torch.device]
    dtype: torch.dtype | None
    batch_size: int
    seconds: Seconds
    progress: Progress


def _surveyed(run: _Run, structure: Structure, align: int | None) -> Survey:
    """What goes, blocks included. Raises BadPattern or UnsupportedModel."""
    total = len(run.language_model.blocks)
    kept, gone = list(range(total)), list[int]()
    run.progress.begin("finding what belongs together")
    found = survey(run.language_model, structure, kept, align, run.devices[0])
    for part in parts(structure):
        if isinstance(part, Depth):
            count = part.removed(total)
            looking = Looking(
                run.language_model, run.tokens, run.devices[0], run.dtype, run.batch_size, run.progress
            )  # fmt: skip
            run.progress.begin(f"choosing {part} by {run.shrinking.selections['blocks']}")
            gone = BLOCKS[run.shrinking.selections["blocks"]](looking, count, holds(run.language_model))
            if len(gone) < count:
                raise BadPattern(
                    f"No configuration of {type(run.language_model.model).__name__} holds it without {part}: its kinds "
                    f"of block come in a fixed order. {len(gone)} could go."
                )
    if gone:
        found = survey(run.language_model, structure, [i for i in kept if i not in gone], align, run.devices[0])
    return found


@torch.no_grad()
def _shrink(run: _Run, found: Survey, report: Report, names: _Names, result: Output) -> Tensor:
    """Shrink and write every block that stays; the logits of the first window's first tokens in the smaller model."""
    model, position, count = run.language_model, 0, len(found.kept)
    steps = stream(
        model, run.tokens, devices=run.devices, dtype=run.dtype, batch_size=run.batch_size, seconds=run.seconds,
        dense=run.shrinking.dense, kept=found.kept,
    )  # fmt: skip
    logits = torch.empty(0)
    for step in steps:
        run.progress.advance(step.name, position, count)
        original = model.blocks[step.index]
        span = _span(found.kept, position, len(model.blocks))
        state, reports = _shrunk(step, original, found.of(original), span, run)
        smaller = module_of(found.stock.language_model.blocks[position], state, original)
        step.replace(smaller)
        report.sites += reports
        result.write(names.of_block(position, state))
        position += 1
        if position == count:
            leaving = run_block(working_copy(smaller, step.device, run.dtype), *step.first())
            shell = Shell(model, step.device, run.dtype)
            logits = shell.leave(run.tokens[:1, :CHECKED_TOKENS], leaving[..., :1, :CHECKED_TOKENS, :]).cpu()
        del step
        release_memory()
    run.progress.advance("done", count, count)
    return logits


def _span(kept: Sequence[int], position: int, total: int) -> list[int]:
    """The blocks that are gone between a block that stays and the next one."""
    following = kept[position + 1] if position + 1 < len(kept) else total
    return list(range(kept[position] + 1, following))


def _shrunk(
    step: Step, original: nn.Module, cut: BlockCut, span: Sequence[int], run: _Run
) -> tuple[State, list[SiteReport]]:
    """The tensors of a block after its units and experts are gone and what reads them is repaired, as stored."""
    result = working_copy(original, torch.device("cpu"), None)
    gone: dict[str, list[Unit]] = {}
    reports: list[SiteReport] = []
    kept_experts: dict[str, Tensor] = {}
    if cut.experts:
        routed = routed_to(step.block, ((h, calls[step.index]) for h, calls in step.windows()))
        for name, count in cut.experts.items():
            score = EXPERTS[run.shrinking.selections["experts"]](routed[name])
            leaving = set(lowest(score, count).tolist())
            kept_experts[name] = torch.tensor([e for e in range(len(score)) if e not in leaving])
    fold = _folded_into(step, span, run)
    for of in ("heads", "channels"):
        names = [name for name, consumer in cut.consumers.items() if consumer.of == of]
        if names:
            gone |= _remove(step, result, {n: cut.consumers[n] for n in names}, fold, span, run, reports)
    if fold and fold not in gone:
        _remove(step, result, {fold: Consumer([], 0, "blocks")}, fold, span, run, reports)
    state = without_units(result, gone)
    return without_experts(result, state, kept_experts), reports


def _folded_into(step: Step, span: Sequence[int], run: _Run) -> str | None:
    """The site that can take over what a span of removed blocks did; None where there is none, or it is not wanted."""
    if not span or not run.shrinking.repair:
        return None
    hidden, call = step.first()
    site = last_matrix(step.block, hidden, call)
    return site.name if site else None


def _remove(
    step: Step,
    result: nn.Module,
    consumers: Mapping[str, Consumer],
    fold: str | None,
    span: Sequence[int],
    run: _Run,
    reports: list[SiteReport],
) -> dict[str, list[Unit]]:
    """Choose units of consumers in one forward, write zeros in their place and what makes up for them."""
    repair = run.shrinking.repair
    need = (NEED | (OF_DENSE if run.shrinking.dense else set())) if repair else frozenset[str]()
    selections = {n: SELECTIONS[run.shrinking.selections[c.of]] for n, c in consumers.items() if c.units}
    need = need.union(*(selection.need for selection in selections.values())) - {"taylor"}
    observed = step.observe(need | {"square"}, PROBE_TOKENS, list(consumers))
    added = None
    if fold in consumers:
        blocks = [(i, working_copy(run.language_model.blocks[i], step.device, run.dtype)) for i in span]
        added = span_effect(step.block, blocks, str(fold), step.windows(), step.index)
    started = perf_counter()
    gone: dict[str, list[Unit]] = {}
    targets = sites(result)
    for name, consumer in consumers.items():
        weight = targets[name].weight.to(step.device, torch.float32, copy=True)
        held = bias(result, targets[name])
        old = None if held is None else held[1].to(step.device, torch.float32, copy=True)
        stats = observed.stats.get(name)
        kept = torch.ones(weight.shape[1], dtype=torch.bool, device=step.device)
        if consumer.units:
            chosen = _choose(step, name, consumer, weight, stats, run)
            gone[name] = [consumer.units[i] for i in chosen]
            kept[[i for unit in gone[name] for i in unit.inputs]] = False
        new, new_bias = weight * kept, old
        if repair and stats is not None:
            new, new_bias = repaired(weight, stats, kept, old, added if name == fold else None)
        _put(step, result, name, new, new_bias)
        note = "" if stats is not None else "no calibration token: chosen by weights"
        note += f"blocks {span[0]} to {span[-1]} folded into it" if name == fold else ""
        reports.append(_report(step, name, consumer, weight, targets[name].weight, old, new_bias, observed.probes.get(name), note))
    step.seconds.solve += perf_counter() - started
    return gone


def _choose(
    step: Step, name: str, consumer: Consumer, weight: Tensor, stats: Stats | None, run: _Run
) -> list[int]:
    units = consumer.inputs.to(weight.device)
    selection = SELECTIONS[run.shrinking.selections[consumer.of]]
    if stats is None:
        return lowest(weight.square().sum(0)[units].sum(1), consumer.gone).tolist()
    if "taylor" in selection.need:
        batches = ((h, calls[step.index]) for h, calls in step.windows())
        block = working_copy(step.block, step.device, torch.float32)
        stats = Stats(stats.tokens, {**stats.sums, "taylor": taylor(block, name, units, batches).to(weight.device)})
    return selection.choose(weight, stats, units, consumer.gone).tolist()


def _put(step: Step, result: nn.Module, name: str, weight: Tensor, new_bias: Tensor | None) -> None:
    """Write a weight and a bias into both copies of the block, rounded as they are stored. Raises NonFinite."""
    for block in (result, step.block):
        site = sites(block)[name]
        stored = weight.to(sites(result)[name].stored.dtype)
        if not stored.isfinite().all():
            raise NonFinite(f"The repaired weights of {step.name}.{name} do not fit {stored.dtype}. Leave out '+repair'.")
        site.put(stored)
        held = bias(block, site)
        if held is not None and new_bias is not None:
            rounded = bias(result, sites(result)[name])
            assert rounded is not None
            held[1].copy_(new_bias.to(rounded[1].dtype))


def _report(
    step: Step, name: str, consumer: Consumer, before: Tensor, after: Tensor, old: Tensor | None, new: Tensor | None,
    probe: Tensor | None, note: str,
) -> SiteReport:  # fmt: skip
    total, error = len(consumer.units), None
    left = total - consumer.gone
    if probe is not None and consumer.units:
        change = probe @ (before - after.to(probe.device, torch.float32)).T
        if old is not None and new is not None:
            change = change + (old - new)
        error = (change.square().sum() / (probe @ before.T).square().sum().clamp_min(1e-30)).item()
    size = len(consumer.units[0].inputs) if total else 0
    inputs = left * size if total else before.shape[1]
    pattern = f"{left} of {total} {consumer.of}" if total else None
    return SiteReport(f"{step.name}.{name}", (before.shape[0], inputs), pattern, 0.0, error, note)


def _verify(result: Output, tokens: Tensor, logits: Tensor, trust_remote_code: bool, progress: Progress) -> None:
    progress.begin("loading the result in a fresh process")
    refuse_unequal(
        result.partial, tokens[:1, :CHECKED_TOKENS], logits, trust_remote_code=trust_remote_code
    )  # fmt: skip


class _Names:
    """Which tensors the smaller checkpoint has, by the names that the source has, or would have, for them."""

    def __init__(self, source: Checkpoint, language_model: LanguageModel, found: Survey) -> None:
        self.source, self.dense, self.found = source, language_model, found
        stem = language_model.stack
        prefix = f"{language_model.model.base_model_prefix}."
        stems = [f"{part}." for part in (stem, stem.removeprefix(prefix), prefix + stem)]
        self.stem = next((part for part in stems if any(name.startswith(part) for name in source.places)), stems[0])

    def of_block(self, position: int, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a block of the smaller model, by checkpoint name."""
        return self._stored(self.found.stock.language_model, position, self.found.kept[position], state)

    def places(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """For every tensor of the smaller checkpoint the source's tensor that it comes from, and its own shape."""
        inside: set[str] = set()
        for index, block in enumerate(self.dense.blocks):
            inside |= self._stored(self.dense, index, index, block.state_dict()).keys()
        found = {
            name: (name, place.shape)
            for name, place in self.source.places.items()
            if name not in inside and not name.startswith(self.stem)
        }
        for position, block in enumerate(self.found.stock.language_model.blocks):
            old = _Old(self.source, f"{self.stem}{position}.", f"{self.stem}{self.found.kept[position]}.")
            for name, tensor in self.of_block(position, block.state_dict()).items():
                found[name] = old.name(name), tuple(tensor.shape)
        return found

    def _stored(self, model: LanguageModel, position: int, index: int, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        start = model.block_name(position)
        buffers = {f"{start}.{name}" for name, _ in model.blocks[position].named_buffers()}
        tensors = {f"{start}.{name}": tensor for name, tensor in state.items()}
        known = _Old(self.source, f"{self.stem}{position}.", f"{self.stem}{index}.")
        return checkpoint_tensors(model, tensors, known, buffers)


@dataclass(frozen=True)
class _Old:
    """The names of a block's tensors where the block has moved; those are in it that the source has under its number."""

    source: Checkpoint
    now: str
    before: str

    def name(self, name: str) -> str:
        return self.before + name.removeprefix(self.now) if name.startswith(self.now) else name

    def __contains__(self, name: object) -> bool:
        return self.name(str(name)) in self.source.places


def _difference(dense: LanguageModel, smaller: LanguageModel) -> int:
    """How many parameters the blocks of one model have more than those of the other."""
    return sum(sum(p.numel() for block in model.blocks for p in block.parameters()) * sign for model, sign in ((dense, 1), (smaller, -1)))


def _share_gone(language_model: LanguageModel, found: Survey) -> float:
    """The share of the blocks' matrix weights that are gone."""
    before, after = (
        sum(site.stored.numel() for block in model.blocks for site in sites(block).values())
        for model in (language_model, found.stock.language_model)
    )
    return 1 - after / max(before, 1)


def _in_words(language_model: LanguageModel, found: Survey) -> dict[str, str]:
    """What goes, by where: `mlp.down_proj` → `128 of 512 channels`; `blocks` → which."""
    words: dict[str, str] = {}
    for cut in found.kinds.values():
        for name, consumer in cut.consumers.items():
            words[name] = f"{consumer.gone} of {len(consumer.units)} {consumer.of}"
        for name, gone in cut.experts.items():
            words[name] = f"{gone} experts"
    if gone := [i for i in range(len(language_model.blocks)) if i not in found.kept]:
        words["blocks"] = ", ".join(map(str, gone))
    return words
