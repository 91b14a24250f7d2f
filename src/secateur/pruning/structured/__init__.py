"""Structured pruning: a smaller dense model. Read `program` first."""
