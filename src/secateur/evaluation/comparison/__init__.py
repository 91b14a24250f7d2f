"""The comparison: read `compare` first. `options` says what was asked for, `grid` which rows there
are, `rows` makes them, the other `*_rows` add to them, `join` makes one of several comparisons.
"""
