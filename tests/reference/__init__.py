"""Slow, obvious, float64 versions of the published pruners: the oracles of the test-suite.

They follow the papers with plain loops over numpy arrays and share nothing with the fast code
(no file here imports secateur), so that both would have to be wrong in the same way for a test to
pass by mistake. They are meant for matrices up to about 64 x 256; nothing here is fast on purpose.
"""
