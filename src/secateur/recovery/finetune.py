"""Recovery of the whole model at once: adapters, or all weights, trained under the mask by
transformers' Trainer.

    adapters are put on, or gradients held off the zeros → trained, with checkpoints → merged, rounded as stored
    → the mask of what was written is compared with the first, weight by weight, before it gets its name

Under torchrun every process has its share of each step's windows; the first alone writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from secateur.checkpoints.folder import open_checkpoint
from secateur.checkpoints.result import output
from secateur.errors import Interrupted, UnsupportedModel
from secateur.models.matrices import weight_matrices
from secateur.models.replay import LanguageModel
from secateur.recovery.job import Job, Recovery
from secateur.recovery.masks import masks, refuse_other_masks, written
from secateur.recovery.training import train
from secateur.recovery.training_state import TrainingState
from secateur.system.interrupt import asked_to_stop
from secateur.system.memory import freed_memory_kept


def recover_whole(job: Job) -> Recovery:
    """Train under the mask and write the result. A run that dies goes on after its last
    checkpoint.
    """
    pruned, ranks, adapting = job.pruned, job.ranks, job.way.startswith("lora")
    place = job.out.resolve().with_name(f".{job.out.name}.recovery")
    with TrainingState(
        place, job.conditions, restart=job.restart, ranks=ranks, started=job.started
    ) as halfway:
        kept = masks(pruned)
        adapted: Any = pruned.model.float()
        pruned.model.requires_grad_(True)
        if adapting:
            from secateur.recovery.lora import with_adapters

            adapted = with_adapters(pruned.model, _linear(pruned), job.rank, job.schedule.seed)
        else:
            _hold(pruned, kept, job.device)
        job.progress.begin(f"recovering with {job.way}")
        with asked_to_stop("after this step") as stopping, freed_memory_kept():
            loss = train(
                adapted,
                job.windows.ids,
                job.schedule,
                halfway,
                device=job.device,
                progress=job.progress,
                stopping=stopping,
                dense=job.dense.model.float() if job.dense and job.aims else None,
            )
        reached = loss[-1][0] if loss else 0
        if reached < job.schedule.steps:
            raise Interrupted(f"Stopped after step {reached}. The same command goes on from there.")
        if adapting:
            adapted.merge_and_unload()
        pruned.model.to(torch.device("cpu")).requires_grad_(False)  # type: ignore[arg-type]
        done = job.done(halfway.seconds, loss=loss, rank=job.rank if adapting else None)
        ranks.same(lambda: _write(job, done, kept))
        if ranks.first:
            halfway.remove()
    return done


def _write(job: Job, done: Recovery, kept: Mapping[str, Tensor]) -> None:
    job.progress.begin("writing")
    with output(job.source, job.out, overwrite=job.overwrite, run=job.conditions) as result:
        if not result.done:
            for tensors in written(
                job.pruned, job.source, kept, only_sites=job.way.startswith("lora")
            ):
                result.write(tensors)
            refuse_other_masks(job.source, open_checkpoint(result.partial), job.pruned)
        job.finish(result, done)


def _linear(language_model: LanguageModel) -> list[str]:
    """The full names of the linear layers that are sites; stacks of experts have no place for an
    adapter.
    """
    found = [
        f"{language_model.block_name(index)}.{name}"
        for index, block in enumerate(language_model.blocks)
        for name, site in weight_matrices(block).items()
        if not site.expert
    ]
    if not found:
        raise UnsupportedModel(
            "No linear layer here can have an adapter. Recover with --with masked."
        )
    return found


def _hold(language_model: LanguageModel, kept: Mapping[str, Tensor], device: torch.device) -> None:
    """Let no gradient reach a weight that is zero: Adam then moves it by nothing."""
    for name, mask in kept.items():
        parameter = language_model.model.get_parameter(name)
        parameter.register_hook(partial(torch.mul, mask.to(device)))
