"""One rank of a run that dies when it comes to a block: DIE_AT is its number and the name of the block."""

import importlib
import os
import signal

from secateur.cli import app as cli
from secateur.pruning import block

rank, name = os.environ["DIE_AT"].split()


def prune_block(step, *args, **kwargs):
    """The real one, but for the block at which this rank dies."""
    if os.environ["RANK"] == rank and step.name == name:
        os.kill(os.getpid(), signal.SIGKILL)
    return block.prune_block(step, *args, **kwargs)


setattr(importlib.import_module("secateur.pruning.prune"), "prune_block", prune_block)  # noqa: B010 - no attribute of the package
cli.main()
