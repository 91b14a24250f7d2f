"""The comparison: read `compare` first. `grid` says which rows, `rows` makes them, `report` and
`page` show them.
"""
