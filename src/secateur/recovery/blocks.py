"""Recovery block by block, one in memory: each is trained to do on the text what the dense block
does.

Two streams go through the blocks, as when pruning with `+refine`: that of the pruned model, whose
blocks are replaced as they are finished, and that of the dense one, which gives the targets. So a
block also makes up for what earlier ones could not. Only the linear layers are trained, each batch
of windows once.
"""

from __future__ import annotations

from math import isfinite
from time import perf_counter
from typing import Any

import torch
from torch import nn

from secateur.checkpoints.folder import open_checkpoint
from secateur.checkpoints.result import BLOCK, output
from secateur.errors import Interrupted, NonFinite
from secateur.models.context import width
from secateur.models.load import load_blocks
from secateur.models.mapped_tensors import hidden_bytes
from secateur.models.replay import working_copy
from secateur.models.stored import checkpoint_tensors
from secateur.models.stream.blocks import BlockRun, Step, stream
from secateur.models.stream.refine import refine
from secateur.recovery.checks import refuse_blocks
from secateur.recovery.job import Job, Recovery
from secateur.recovery.masks import block_masks, keep_masks, refuse_other_masks
from secateur.system.interrupt import asked_to_stop
from secateur.system.memory import available_bytes

STREAMS = 3
"""Hidden states that are held: of the pruned model, of the dense one, and what its block at hand
makes of them.
"""


def recover_blocks(job: Job) -> Recovery:
    """Train every block in turn and write it as it is finished; a run that dies goes on after the
    last of them.
    """
    assert job.dense is not None
    refuse_blocks(job.pruned, job.dense)
    count = len(job.pruned.blocks)
    held = STREAMS * hidden_bytes(job.windows.ids.shape, width(job.pruned), torch.float32)
    with (
        output(
            job.source, job.out, overwrite=job.overwrite, run=job.conditions, restart=job.restart
        ) as result,
        asked_to_stop("after this block") as stopping,
    ):
        finished, since = result.recorded(BLOCK), job.started
        folder = result.partial.parent
        again: list[nn.Module] = []
        if 0 < len(finished) < count:
            loaded = load_blocks(
                result.partial,
                trust_remote_code=job.trust_remote_code,
                spill=folder if job.pruned.spilled else None,
            )
            again = loaded[: len(finished)]
        run = BlockRun(
            job.dense,
            job.windows.ids,
            [job.device],
            torch.float32,
            job.schedule.batch_size,
            spill=folder if held > available_bytes(job.device) / 2 else None,
        )
        steps = stream(run, dense=True, finished=again)
        for step in steps if len(finished) < count else ():
            job.progress.advance(step.name, step.index, count)
            block, entry = _recovered(step, job)
            now = perf_counter()
            entry["seconds"], since = now - since, now
            tensors = {
                f"{step.name}.{name}": block.get_parameter(name).data for name in block_masks(block)
            }
            result.commit(checkpoint_tensors(job.pruned, tensors, job.source.places), entry)
            finished.append(entry)
            step.replace(block)
            del block, tensors
            if stopping() and step.index < count - 1:
                raise Interrupted("Stopped.")
        if not result.done:
            result.settle()
            refuse_other_masks(job.source, open_checkpoint(result.partial), job.pruned)
        done = job.done(
            sum(entry["seconds"] for entry in finished),
            loss=[],
            blocks=[(entry["block"], entry["before"], entry["after"]) for entry in finished],
        )
        job.finish(result, done)
    return done


def _recovered(step: Step, job: Job) -> tuple[nn.Module, dict[str, Any]]:
    """A block as it is stored after it is trained, and what the journal says of it."""
    original = job.pruned.blocks[step.index]
    block = working_copy(original, step.device, torch.float32)
    kept = block_masks(block)
    tuned = refine(block, kept, step.batches(), 1, job.schedule.rate)
    if not isfinite(tuned.before):
        raise NonFinite(
            f"{step.name} makes NaN or Inf of the text, or the dense block does. Nothing can aim at that."
        )
    keep_masks(block, original, kept)
    return block, {"block": step.name, "before": tuned.before, "after": tuned.after}
