"""Checkpoints whose weights are stored in few bits, read as the plain checkpoints they stand for."""
