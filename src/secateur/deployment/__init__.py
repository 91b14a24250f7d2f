"""What comes after pruning: formats, runtimes, which uses which zeros, benchmarks."""
