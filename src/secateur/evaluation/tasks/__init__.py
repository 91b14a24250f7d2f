"""Zero-shot tasks, answered through lm-evaluation-harness."""
