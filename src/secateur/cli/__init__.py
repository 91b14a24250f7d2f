"""The command line: the public functions with the same names and defaults. Parsing and printing
only.
"""
