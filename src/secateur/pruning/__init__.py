"""The program: read `prune` first."""
