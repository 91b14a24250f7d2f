"""SparseGPT's sweep over the columns: which weights go, and how the later ones make up for them.

With H the damped Gram matrix of the inputs and H⁻¹ = Uᵀ U, U upper triangular, a weight that goes
leaves the error w / U_jj, and the later columns take it up along row U_j (Frantar & Alistarh 2023,
alg. 1, arXiv:2301.00774). U is wanted only inside of a block of columns. With H = A Aᵀ, A upper
triangular, U is A⁻¹, and what the errors of all earlier columns do to block b can be said by what
was taken off them, δ = dense weights − weights now:

    w_b  =  dense w_b  +  δ A_·b A_bb⁻¹        (A_·b: the rows of A of earlier columns)

the least-squares answer of this and all later columns to δ, as far as the block goes. So blocks on
the diagonal of A are inverted instead of all of it, which is a third of n³ operations at best
(`responses`). It is the difference between GPTQ, SparseGPT's sister for rounding, and Babai's
nearest plane, which are the same (Chen et al. 2025, arXiv:2507.18553).

Inside of a block rows are independent, and every column is a few operations: sweep.c takes some
rows at a time through all columns (float32, CPU), kernels/sweep.py does it on a GPU, and torch
elsewhere, one column of all rows at a time.
"""

import torch
from torch import Tensor

from secateur.kernels import sweep as on_gpu
from secateur.kernels.library import best, library
from secateur.methods.patterns import NM, Pattern
from secateur.methods.together import Stacked

AT_ONCE = 4
"""How many columns of a given mask sweep.c takes up errors for together; any number is right."""


def block_width(pattern: Pattern, width: int) -> int:
    """The columns of a block, about `width`: groups never straddle its edge."""
    chunk = pattern.chunk or 1
    return max(width // chunk, 1) * chunk


def responses(gram: Tensor, width: int) -> Tensor:
    """How weights answer to each other, `[in, in]`, for a positive definite H `[in, in]`.

    On its diagonal the blocks A_bb⁻¹, upper triangular; above them A_·b A_bb⁻¹: what was taken off
    the earlier weights times this is added to the block's. Zero below. Raises
    torch.linalg.LinAlgError where H is not positive definite.
    """
    # With J the reversal of order, J H J = L Lᵀ gives A = J L J.
    factor = torch.linalg.cholesky(gram.flip(0, 1)).flip(0, 1)
    for start in range(0, len(factor), width):
        block = factor[start : start + width, start : start + width]
        identity = torch.eye(len(block), dtype=gram.dtype, device=gram.device)
        inverse = torch.linalg.solve_triangular(block, identity, upper=True)
        factor[:start, start : start + width] = factor[:start, start : start + width] @ inverse
        block.copy_(inverse)
    return factor


def sweep(
    weight: Tensor, answers: Tensor, alive: Tensor, pattern: Pattern, width: int
) -> tuple[Tensor, Tensor]:
    """(kept, updated weight), both `[out, in]`: each column leaves its error to the later ones.

    `answers` are the `responses` in blocks of this `width`; inputs that are not `alive` `[in]` go
    first. Unstructured masks are chosen a block at a time over all rows, others group by group.
    """
    rows, columns = weight.shape
    swept = weight.clone(memory_format=torch.contiguous_format)
    kept = torch.empty_like(swept, dtype=torch.bool)
    for start in range(0, columns, width):
        stop = min(start + width, columns)
        block, inverse = slice(start, stop), answers[start:stop, start:stop]
        part = pattern.columns(rows, start, stop)
        values = swept[:, block].clone(memory_format=torch.contiguous_format)
        given = None
        if pattern.chunk is None:
            given = part.mask((values / inverse.diagonal()).square_() * alive[block])
        kept[:, block] = sweep_block(values, inverse, alive[block], part, given)
        swept[:, block] = values
        swept[:, stop:].addmm_(weight[:, block] - values, answers[block, stop:])
    return kept, swept


def sweep_block(
    values: Tensor, inverse: Tensor, alive: Tensor, pattern: Pattern, given: Tensor | None
) -> Tensor:
    """Sweep the columns of a block, overwriting its weights `values` `[out, width]`: the mask.

    `inverse` is U of the block. The mask is `given`, or chosen when the sweep reaches a group.
    """
    groups = _groups(pattern, len(values)) if given is None else [(len(values), 0)]
    width = values.shape[1]
    compiled = library() if values.device.type == "cpu" else None
    by_gpu = values.is_cuda and on_gpu.usable(width)
    if groups is None or values.dtype != torch.float32 or not (compiled or by_gpu):
        return sweep_block_in_torch(values, inverse, alive, pattern, given)
    kept = torch.empty_like(values, dtype=torch.bool) if given is None else given.contiguous()
    columns, usable = inverse.T.contiguous(), alive.float().contiguous()
    rows, counts = zip(*groups, strict=True)
    for part, mask, n in zip(values.split(rows), kept.split(rows), counts, strict=True):
        if not compiled:
            on_gpu.sweep_block(part, mask, inverse, alive, pattern.chunk or width, n)
            continue
        failed = compiled.secateur_sweep_block(
            best(),
            part.data_ptr(),
            mask.data_ptr(),
            columns.data_ptr(),
            usable.data_ptr(),
            *part.shape,
            pattern.chunk or AT_ONCE,
            n,
            torch.get_num_threads(),
        )
        if failed:
            raise MemoryError(f"There is no memory to sweep {width} columns at a time.")
    return kept


def _groups(pattern: Pattern, rows: int) -> list[tuple[int, int]] | None:
    """(rows, n kept of every `pattern.chunk`) from the top; None for what is not N:M."""
    stack = pattern if isinstance(pattern, Stacked) else Stacked((rows,), (pattern,))
    groups = []
    for count, part in zip(stack.rows, stack.parts, strict=True):
        if type(part) is not NM or part.m != pattern.chunk:
            return None
        groups.append((count, part.n))
    return groups


def sweep_block_in_torch(
    values: Tensor, inverse: Tensor, alive: Tensor, pattern: Pattern, given: Tensor | None
) -> Tensor:
    """`sweep_block` in torch, on the transpose, so that a column is contiguous."""
    rows, width = values.shape
    chunk = pattern.chunk or width
    columns, diagonal = values.T.contiguous(), inverse.diagonal()  # [width, out]
    kept = torch.empty_like(columns, dtype=torch.bool) if given is None else given.T.contiguous()
    for first in range(0, width, chunk):
        last = min(first + chunk, width)
        if given is None:
            scores = (columns[first:last] / diagonal[first:last, None]).square()
            scores = scores * alive[first:last, None]
            kept[first:last] = pattern.columns(rows, first, last).mask(scores.T).T
        for j in range(first, last):
            error = columns[j].where(~kept[j], 0.0) / diagonal[j]
            columns[j + 1 :].addr_(inverse[j, j + 1 :], error, alpha=-1)
    values.copy_(columns.where(kept, 0.0).T)
    return kept.T
