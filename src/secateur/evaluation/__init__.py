"""What a model is worth: perplexity, tasks, comparisons, reports, advice."""
