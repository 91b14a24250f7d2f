"""Checkpoints with weights in few bits, read as the plain checkpoints that they stand for."""
