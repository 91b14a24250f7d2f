"""Products with sparse matrices on a GPU, for decoding at batch 1 to 8: a file for each format.

At these batches a product waits for the weights, so the formats are made to be small: 2:4 with two
bits a kept value (two_of_four.py), and any other zeros with one bit a weight (bitmap.py), both
1.125 bytes a weight at 50 % and 16 bits. Nothing here is imported by the rest of the package unless
a GPU is to be used, and docs/speed.md has what it gave on an H200.
"""
