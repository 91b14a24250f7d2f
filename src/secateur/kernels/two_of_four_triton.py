"""The Triton kernel of two_of_four.py, apart from it because Triton may be missing.

A lane takes eight columns at a time: one byte of metadata, four values as one number of 64 bits,
and for each row of x their activations as two such numbers. A position in a group, times 16, is how
far these have to be shifted for the activation that belongs to a value to be at the lower end, so
nothing is gathered from memory. The activations stay in registers for the `rows_at_once` rows of W
that a program takes.
"""

# pyright: reportGeneralTypeIssues=false
# Triton's ranges are compiled, never iterated.

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]


@triton.jit
def number(bits, amount, dtype: tl.constexpr):
    """The 16 bits that begin at bit `amount`, as float32."""
    return (bits >> amount).to(tl.uint16).to(dtype, bitcast=True).to(tl.float32)


@triton.jit
def add_products(
    sums, x, values, meta, rows_at_once: tl.constexpr, batch: tl.constexpr, dtype: tl.constexpr
):
    """`sums` and the products of the lane's eight columns; all arguments are tuples over rows of W,
    x or both.
    """
    added = ()
    for r in tl.static_range(rows_at_once):
        place = meta[r].to(tl.uint32)
        low, high = values[r].to(tl.uint32), (values[r] >> 32).to(tl.uint32)
        first, second = number(low, 0, dtype), number(low, 16, dtype)
        third, fourth = number(high, 0, dtype), number(high, 16, dtype)
        for b in tl.static_range(batch):
            left, right = x[2 * b], x[2 * b + 1]
            total = sums[r * batch + b] + first * number(
                left, ((place << 4) & 48).to(tl.uint64), dtype
            )
            total += second * number(left, ((place << 2) & 48).to(tl.uint64), dtype)
            total += third * number(right, (place & 48).to(tl.uint64), dtype)
            total += fourth * number(right, ((place >> 2) & 48).to(tl.uint64), dtype)
            added = added + (total,)  # noqa: RUF005
    return added


@triton.jit
def multiply(
    values,
    meta,
    x,
    y,
    rows,
    units,
    rows_at_once: tl.constexpr,
    batch: tl.constexpr,
    lanes: tl.constexpr,
    dtype: tl.constexpr,
):
    """y [batch, rows]: values [rows, units] uint64, meta [rows, units] uint8, x [batch, 2 * units]
    uint64.
    """
    first_row = tl.program_id(0) * rows_at_once
    lane = tl.arange(0, lanes)
    sums = ()
    for _ in tl.static_range(rows_at_once * batch):
        sums = sums + (tl.zeros((lanes,), tl.float32),)  # noqa: RUF005
    for start in range(0, units, lanes):
        unit = start + lane
        inside = unit < units
        activations = ()
        for b in tl.static_range(batch):
            at = x + b * 2 * units + 2 * unit
            activations = activations + (tl.load(at, inside, 0), tl.load(at + 1, inside, 0))  # noqa: RUF005
        stored = ()
        places = ()
        for r in tl.static_range(rows_at_once):
            # Rows beyond the last one repeat it, which is cheaper than a mask; they are not stored.
            at = tl.minimum(first_row + r, rows - 1).to(tl.int64) * units + unit
            stored = stored + (tl.load(values + at, inside, 0),)  # noqa: RUF005
            places = places + (tl.load(meta + at, inside, 0),)  # noqa: RUF005
        sums = add_products(sums, activations, stored, places, rows_at_once, batch, dtype)
    for r in tl.static_range(rows_at_once):
        for b in tl.static_range(batch):
            row = first_row + r
            tl.store(y + b * rows + row, tl.sum(sums[r * batch + b], 0), row < rows)
