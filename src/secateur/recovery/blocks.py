"""Recovery block by block, one in memory: each is trained to do on the text what the dense block
does.

Two streams go through the blocks, as when pruning with `+refine`: that of the pruned model, whose
blocks are replaced as they are finished, and that of the dense one, which gives the targets. So a
block also makes up for what earlier ones could not. Only the linear layers are trained, each batch
of windows once. What is on a grid of values stays on it.
"""

from time import perf_counter
from typing import Any

import torch
from torch import nn

from secateur.checkpoints.folder import open_checkpoint
from secateur.methods.values import AS_STORED, parse_values
from secateur.models.kept import block_masks, keep_masks, matrix_parameters
from secateur.models.replay import working_copy
from secateur.models.stream.block_writer import block_writer, with_room
from secateur.models.stream.blocks import BlockRun, Step, stream
from secateur.models.stream.refine import refine
from secateur.models.stream.straight_through import grids_of
from secateur.recovery.checks import refuse_blocks
from secateur.recovery.job import Job, Recovery
from secateur.recovery.masks import refuse_other_masks

STREAMS = 3
"""Of hidden states: those of the pruned model, of the dense one, and what leaves its block."""


def recover_blocks(job: Job) -> Recovery:
    """Train every block in turn and write it; a run that dies goes on after the last of them."""
    assert job.dense is not None
    (source, _, pruned), dense = job.pruned, job.dense.language_model
    refuse_blocks(pruned, dense)
    run = BlockRun(dense, job.windows.ids, [job.device], torch.float32, job.training.batch_size)
    count, since = len(pruned.blocks), job.started
    with block_writer(source, pruned, job.destination, job.trust, job.conditions) as writer:
        if len(writer.entries) < count:
            run = with_room(run, writer.folder.parent, STREAMS)
            for step in stream(run, dense=True, finished=writer.finished()):
                job.progress.advance(step.name, step.index, count)
                block, entry = _recovered(step, job)
                now = perf_counter()
                entry["seconds"], since = now - since, now
                trained = matrix_parameters(block)
                tensors, last = {f"{step.name}.{n}": p.data for n, p in trained.items()}, step.last
                step.inputs.replace(block)
                del step, block, trained
                writer.commit(tensors, entry, last=last)
        if (result := writer.result) and not writer.done:
            result.settle()
            refuse_other_masks(source, open_checkpoint(result.partial), pruned)
        blocks = [(entry["block"], entry["before"], entry["after"]) for entry in writer.entries]
        recovery = job.recovery(sum(entry["seconds"] for entry in writer.entries), [], blocks)
        writer.finish(job.record(recovery))
    return recovery


def _recovered(step: Step, job: Job) -> tuple[nn.Module, dict[str, Any]]:
    """A block as it is stored after it is trained, and what the journal says of it."""
    original = job.pruned.language_model.blocks[step.index]
    block = working_copy(original, step.device, torch.float32)
    kept = block_masks(block)
    values = parse_values(job.pruned.record.get("values", AS_STORED))
    grids = grids_of(original, kept, values) if values else None
    batches = step.batches()  # each is seen once, so that what they judge was not learnt by heart
    tuned = refine(block, kept, batches, batches, len(batches), job.rate, grids)
    tuned.refuse_non_finite(step.name)
    keep_masks(block, original, kept)
    return block, {"block": step.name, "before": tuned.before, "after": tuned.after}
