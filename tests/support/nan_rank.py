"""One rank of a recovery whose loss becomes NaN: NAN_AT is its number and the step."""

import os

import torch

from secateur.cli import app as cli
from secateur.recovery import training

rank, step = map(int, os.environ["NAN_AT"].split())
real = training._Distilling.compute_loss


def compute_loss(self, *args, **options):
    """The real one, but for the step at which this rank's loss is NaN."""
    odd = int(os.environ["RANK"]) == rank and self.state.global_step + 1 == step
    return real(self, *args, **options) * (torch.nan if odd else 1.0)


training._Distilling.compute_loss = compute_loss
cli.main()
