"""Which row to deploy: read `recommend` first. `goals` choose among what was measured, `priors` are
the rest.
"""
