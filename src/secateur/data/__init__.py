"""Text: corpora, token windows, the demo model and its text."""
