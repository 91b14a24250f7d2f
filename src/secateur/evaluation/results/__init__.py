"""The results of a comparison: their schema, their checks, their ranks."""
