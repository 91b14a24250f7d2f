"""Wanda: weight times the norm of its input (Sun et al. 2024, eq. 1, arXiv:2306.11695).

Compared within each output row, or within each N:M group. The norm here is the root mean square
over tokens; the reference code averages over sequences, which is the same for the equal lengths it
uses, and wrong for others.
"""

from secateur.methods.base import importance, scored
from secateur.methods.cost import Cost

wanda = scored({"square"}, "row", importance, cost=Cost())
