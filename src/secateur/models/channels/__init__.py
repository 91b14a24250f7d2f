"""Which channels of a block belong together, found by tracing."""
