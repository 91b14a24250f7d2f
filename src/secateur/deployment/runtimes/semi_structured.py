"""transformers on a CUDA device, with torch's 2:4 products where they are measured to be faster.

Not run on one yet. torch has two backends: CUTLASS, with kernels written for Ampere, and
cuSPARSELt, whose default algorithm is often a bad one, so the library's own search is asked.
Published figures for an H100 in bfloat16 begin to gain at 256 rows of x and reach 1.4 to 1.7 times
at 512 to 16384; one row is slower than dense, as x is padded to eight. So each shape is timed once,
for several numbers of rows, and each layer uses what was fastest for the rows it gets, dense
included: such a layer holds its weight in all forms that it uses.

torch converts a matrix that is not 2:4 without a word and drops what does not fit. So it is checked
here first, and what the folder's own record says is 2:4 must be.
"""

from collections.abc import Callable, Iterator, Mapping, Set
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

from secateur.checkpoints.record import record_of
from secateur.deployment.autotune import choice_for, fastest_by_rows
from secateur.deployment.runtimes.base import Runtime, Stepped, bytes_read, load_model
from secateur.deployment.sparsity_support import MULTIPLES
from secateur.errors import BadPattern, UnsupportedModel, in_one_line
from secateur.kernels.device import no_device
from secateur.kernels.two_of_four import check_two_of_four

CLASSES = (1, 2, 4, 8, 16, 64, 256, 1024, 4096)
"""Rows of x that are timed; other numbers use what was fastest for the next larger, or the last."""
CUTLASS_MULTIPLES, CUSPARSELT_MULTIPLES = (
    {torch.float16: MULTIPLES[backend]["F16"], torch.bfloat16: MULTIPLES[backend]["BF16"]}
    for backend in ("CUTLASS", "cuSPARSELt")
)
"""What outputs and inputs of a matrix must be multiples of. float32 has kernels for 1:2 only."""
PADDED = 8
"""Both backends take rows of x in multiples of this."""
_TORCH: Any = torch  # what is used of it here has no types


class Algorithm(NamedTuple):
    """What cuSPARSELt's search chooses; these are its values for the default."""

    number: int = 0
    split: int = 1
    split_mode: int = -1


class Product(NamedTuple):
    """A way to multiply x `[tokens, in]` with a matrix `[out, in]` transposed.

    `prepare(weight, name)` gives what `multiply(prepared, x, bias, algorithm)` wants, and
    `search(prepared, x, bias)` the fastest algorithm. `multiples` None takes all. `share` of the
    bytes of the dense matrix is read.
    """

    prepare: Callable[[Tensor, str], Any]
    multiply: Callable[[Any, Tensor, Tensor | None, Algorithm], Tensor]
    multiples: Mapping[torch.dtype, tuple[int, int]] | None = None
    search: Callable[[Any, Tensor, Tensor | None], Algorithm] = lambda *_: Algorithm()
    share: float = 9 / 16


class Choice(NamedTuple):
    """What a layer uses for one class of rows of x."""

    product: str
    algorithm: Algorithm = Algorithm()


def checked(weight: Tensor, name: str) -> Tensor:
    """The matrix with -0.0 made +0.0. Raises BadPattern unless it is 2:4, NonFinite for NaN."""
    check_two_of_four(weight, name=name)
    return weight.detach().contiguous() + 0


def fits(weight: Tensor, multiples: Mapping[torch.dtype, tuple[int, int]] | None) -> bool:
    if multiples is None:
        return True
    rows, columns = multiples.get(weight.dtype, (0, 0))
    return rows > 0 and weight.shape[0] % rows == 0 and weight.shape[1] % columns == 0


def compress_cutlass(weight: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Compress a 2:4 matrix for CUTLASS: values `[out, in / 2]`, metadata `[out, in / 16]` int16.

    Raises BadPattern where it is not 2:4 or its shape or dtype does not fit, NonFinite for NaN.
    """
    if not fits(weight, CUTLASS_MULTIPLES):
        raise BadPattern(
            f"{name} is {weight.dtype} {list(weight.shape)}; CUTLASS wants float16 or bfloat16, "
            "outputs in multiples of 32 and inputs in multiples of 64. Leave it dense."
        )
    return sparse_semi_structured_from_dense_cutlass(checked(weight, name))


def _padded(x: Tensor) -> Tensor:
    beyond = -len(x) % PADDED
    return (pad(x, (0, 0, 0, beyond)) if beyond else x).t()


def _multiply_cutlass(
    compressed: tuple[Tensor, Tensor], x: Tensor, bias: Tensor | None, _: Algorithm
) -> Tensor:
    if bias is None:
        y = _TORCH._sparse_semi_structured_mm(*compressed, _padded(x))
    else:
        y = _TORCH._sparse_semi_structured_addmm(bias, *compressed, _padded(x))
    return y[:, : len(x)].t().contiguous()  # [out, padded tokens] → [tokens, out]


def _multiply_cusparselt(
    compressed: Tensor, x: Tensor, bias: Tensor | None, algorithm: Algorithm
) -> Tensor:
    y = _TORCH._cslt_sparse_mm(
        compressed,
        _padded(x),
        bias=bias,
        transpose_result=True,
        alg_id=algorithm.number,
        split_k=algorithm.split,
        split_k_mode=algorithm.split_mode,
    )
    return y[: len(x)]


def _search_cusparselt(compressed: Tensor, x: Tensor, bias: Tensor | None) -> Algorithm:
    library, arguments = _TORCH._C._cusparselt, (compressed, _padded(x), bias, None, None, True)
    if not hasattr(library, "mm_search"):  # an older torch gives the number alone
        return Algorithm(int(_TORCH._cslt_sparse_mm_search(*arguments)))
    return Algorithm(*library.mm_search(*arguments)[:3])


PRODUCTS = {
    "dense": Product(
        lambda weight, _: weight.detach(), lambda w, x, b, _: linear(x, w, b), share=1.0
    ),
    "CUTLASS": Product(compress_cutlass, _multiply_cutlass, CUTLASS_MULTIPLES),
    "cuSPARSELt": Product(
        lambda weight, name: _TORCH._cslt_compress(checked(weight, name)),
        _multiply_cusparselt,
        CUSPARSELT_MULTIPLES,
        _search_cusparselt,
    ),
}


def promised(folder: Path) -> frozenset[str]:
    """The matrices that pruning.json says are 2:4; none without one. Raises BadCheckpoint."""
    reports = (record_of(folder) or {}).get("sites") or ()
    return frozenset(one["site"] for one in reports if one.get("pattern") == "2:4")


def sparse_linears(model: nn.Module, promised: Set[str]) -> Iterator[tuple[str, nn.Linear]]:
    """The linear layers that are 2:4 and fit a backend. Raises BadPattern for a broken promise."""
    backends = [product.multiples for product in PRODUCTS.values() if product.multiples]
    for name, module in model.named_modules():
        if type(module) is not nn.Linear:
            continue
        try:
            check_two_of_four(module.weight, name=name)
        except BadPattern:
            if name in promised:
                raise
            continue
        if any(fits(module.weight, multiples) for multiples in backends):
            yield name, module


def usable(dtype: torch.dtype, device: torch.device) -> dict[str, str | None]:
    """Why each product does not work on a device, by trying a small one; None where it does."""
    weight = torch.zeros(64, 64, dtype=dtype, device=device)
    weight[:, ::2] = 1
    reasons: dict[str, str | None] = {}
    for name, product in PRODUCTS.items():
        try:
            y = product.multiply(product.prepare(weight, "a trial"), weight[:8], None, Algorithm())
            right = bool((y == weight[:8] @ weight.T).all())
            reasons[name] = None if right else "a small product gave wrong numbers"
        except (RuntimeError, AttributeError) as error:  # a torch without it has no function for it
            reasons[name] = in_one_line(error)
    return reasons


def measured(
    weight: Tensor, bias: Tensor | None, name: str, products: list[str]
) -> tuple[Choice, ...]:
    """The fastest product for each of `CLASSES`. Raises UnsupportedModel where one fails here."""

    def calls(x: Tensor) -> dict[Choice, Callable[[], Tensor]]:
        works = {}
        for one, matrix in prepared.items():
            choice = Choice(one, PRODUCTS[one].search(matrix, x, bias))
            works[choice] = partial(PRODUCTS[one].multiply, matrix, x, bias, choice.algorithm)
        return works

    fitting = [one for one in products if fits(weight, PRODUCTS[one].multiples)]
    try:
        prepared = {one: PRODUCTS[one].prepare(weight, name) for one in fitting}
        return fastest_by_rows(CLASSES, weight, calls)
    except RuntimeError as error:
        raise UnsupportedModel(
            f"A 2:4 product of the shape of {name}, {list(weight.shape)}, fails on this device: "
            f"{in_one_line(error)}."
        ) from error


class SemiStructuredLinear(nn.Module):
    """A linear layer that keeps its weight in each form it uses; a choice for each of `CLASSES`.

    For inference where it was made: it is not moved, converted or saved.
    """

    def __init__(self, layer: nn.Linear, name: str, choices: tuple[Choice, ...]) -> None:
        super().__init__()
        self.choices = choices
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.bias = None if layer.bias is None else layer.bias.detach()
        products = {choice.product for choice in choices}
        self.prepared = {one: PRODUCTS[one].prepare(layer.weight, name) for one in products}
        self.bytes = int(layer.weight.nbytes * PRODUCTS[choices[0].product].share)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, self.in_features)
        name, algorithm = choice_for(self.choices, CLASSES, len(flat))
        y = PRODUCTS[name].multiply(self.prepared[name], flat, self.bias, algorithm)
        return y.view(*x.shape[:-1], self.out_features)


Measure = Callable[[Tensor, Tensor | None, str], tuple[Choice, ...]]


def use_products(model: nn.Module, promised: Set[str], measure: Measure) -> dict[str, int]:
    """Replace the 2:4 layers in place; by name, how many bytes less are read for one row of x."""
    known: dict[tuple[int, int, bool], tuple[Choice, ...]] = {}
    saved = {}
    for name, layer in list(sparse_linears(model, promised)):
        shape = (layer.out_features, layer.in_features, layer.bias is not None)
        if shape not in known:  # layers of one shape are measured once
            known[shape] = measure(layer.weight.detach(), layer.bias, name)
        replaced = SemiStructuredLinear(layer, name, known[shape])
        model.set_submodule(name, replaced)
        saved[name] = layer.weight.nbytes - replaced.bytes
    return saved


@torch.no_grad()
def load(folder: Path, dtype: torch.dtype, **trust: Any) -> Stepped:
    """Raises UnsupportedModel where no layer is 2:4 and has a kernel, BadPattern as above."""
    model = load_model(folder, dtype, "cuda", **trust)
    reasons = usable(dtype, model.device)
    products = [name for name, reason in reasons.items() if reason is None]
    if products == ["dense"]:
        failed = (f"{name}: {reason}" for name, reason in reasons.items() if reason)
        raise UnsupportedModel(
            f"No 2:4 product of torch works here in {dtype}: {'; '.join(failed)}. "
            "Use --dtype bfloat16, or install a torch that has them."
        )
    read = bytes_read(model)
    saved = use_products(model, promised(folder), partial(measured, products=products))
    if not saved:
        raise UnsupportedModel(
            f"{folder} has no linear layer in float16 or bfloat16 that is 2:4 and has outputs and "
            "inputs in multiples of 16. Prune it with --pattern 2:4."
        )
    return Stepped(model, read - sum(saved.values()))


semi_structured = Runtime(no_device, load, twin="eager-cuda", runs_code=True)
