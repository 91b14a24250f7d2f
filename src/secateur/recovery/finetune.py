"""Recovery of the whole model at once: adapters, or all weights, trained under the mask by
transformers' Trainer.

    adapters are put on, or gradients held off the zeros → trained, with checkpoints
    → merged, rounded as stored → the mask of what was written is compared with the first, weight by
    weight, before it gets its name

Under torchrun every process has its share of each step's windows; the first alone writes.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from secateur.checkpoints.folder import open_checkpoint
from secateur.checkpoints.result_folder import output
from secateur.errors import Interrupted, UnsupportedModel
from secateur.models.matrices import weight_matrices
from secateur.models.replay import LanguageModel
from secateur.recovery.job import Job, Recovery
from secateur.recovery.masks import masks, refuse_other_masks, written
from secateur.recovery.training import train
from secateur.recovery.training_state import TrainingState
from secateur.system.interrupt import asked_to_stop
from secateur.system.memory import freed_memory_kept


def finetune(job: Job) -> Recovery:
    """Train under the mask and write the result, from the last checkpoint where a run died."""
    language_model, training = job.pruned.language_model, job.training
    model: Any = language_model.model
    with TrainingState(job) as state:
        kept = masks(language_model)
        trained = model.float()
        model.requires_grad_(True)
        if training.way.startswith("lora"):
            from secateur.recovery.lora import with_adapters

            names = _linear_layers(language_model)
            trained = with_adapters(model, names, training.rank, training.seed)
        else:
            for name, mask in kept.items():  # Adam moves a weight without a gradient by nothing
                parameter = model.get_parameter(name)
                parameter.register_hook(partial(torch.mul, mask.to(job.device)))
        job.progress.begin(f"recovering with {training.way}")
        with asked_to_stop("after this step") as stopping, freed_memory_kept():
            loss = train(trained, job, state, stopping)
        reached = loss[-1][0] if loss else 0
        if reached < training.steps:
            raise Interrupted(f"Stopped after step {reached}. The same command goes on from there.")
        if trained is not model:
            trained.merge_and_unload()
        model.to(torch.device("cpu")).requires_grad_(False)
        recovery = job.recovery(state.seconds, loss)
        job.ranks.same(lambda: _write(job, recovery, kept))
        if job.ranks.first:
            state.remove()
    return recovery


def _write(job: Job, recovery: Recovery, kept: Mapping[str, Tensor]) -> None:
    job.progress.begin("writing")
    source, _, language_model = job.pruned
    overwrite, lora = job.destination.overwrite, job.training.way.startswith("lora")
    with output(source, job.out, overwrite=overwrite, run=job.conditions) as result:
        if not result.done:
            for tensors in written(language_model, source, kept, only_matrices=lora):
                result.write(tensors)
            refuse_other_masks(source, open_checkpoint(result.partial), language_model)
        result.finish(job.record(recovery))


def _linear_layers(language_model: LanguageModel) -> list[str]:
    """The full names of the linear layers of the blocks; fused experts cannot have adapters."""
    names = [
        f"{language_model.block_name(index)}.{name}"
        for index, block in enumerate(language_model.blocks)
        for name, matrix in weight_matrices(block).items()
        if not matrix.expert
    ]
    if not names:
        raise UnsupportedModel(
            "No linear layer here can have an adapter. Recover with --with masked."
        )
    return names
