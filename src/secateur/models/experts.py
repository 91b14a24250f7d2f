"""The weight matrices of a mixture of experts, and the inputs that each expert's matrices see.

transformers 5 stores the experts of a block as 3-D parameters of one module, `[experts, out, in]`,
so a walk over `nn.Linear` would miss most of the model. That module is called with the hidden
states and, for every token, the indices of its experts; its own flags say how the weights lie
(`is_transposed`: `[experts, in, out]`), whether there are biases (`has_bias`) and whether the first
matrix holds gate and up together (`has_gate`, applied by `_apply_gate`). From these the inputs of
both matrices are recomputed per expert.
"""

from collections.abc import Iterator

from torch import Tensor, nn


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds fused experts: two 3-D matrices, and flags for how they lie."""
    if not all(hasattr(module, flag) for flag in ("is_transposed", "has_bias", "has_gate")):
        return False
    weights = [getattr(module, part, None) for part in matrices(module)]
    return all(isinstance(weight, Tensor) and weight.dim() == 3 for weight in weights)


def fused_experts(block: nn.Module) -> dict[str, nn.Module]:
    """The modules of a block that hold fused experts, by name."""
    return {name: module for name, module in block.named_modules() if is_experts(module)}


def matrices(module: nn.Module) -> tuple[str, str]:
    """The names of an experts module's two matrices, in the order in which they are applied."""
    gated = getattr(module, "has_gate", hasattr(module, "gate_up_proj"))
    return "gate_up_proj" if gated else "up_proj", "down_proj"


def parameters(module: nn.Module) -> list[str]:
    """The names of an experts module's two matrices, and of their biases where there are any."""
    names = [*matrices(module)]
    return [*names, *(f"{name}_bias" for name in names if getattr(module, "has_bias", False))]


def count(module: nn.Module) -> int:
    """How many experts an experts module holds."""
    return len(getattr(module, matrices(module)[0]))


def is_transposed(module: nn.Module) -> bool:
    """Whether the weights lie as `[experts, in, out]`."""
    return bool(getattr(module, "is_transposed", False))


def outputs(module: nn.Module, part: str) -> int:
    """How many outputs a matrix of every expert has."""
    return getattr(module, part).shape[2 if is_transposed(module) else 1]


def inputs(module: nn.Module, part: str) -> int:
    """How many inputs a matrix of every expert has."""
    return getattr(module, part).shape[1 if is_transposed(module) else 2]


def matrix(module: nn.Module, part: str, expert: int) -> Tensor:
    """A matrix of an expert, `[out, in]`."""
    weight: Tensor = getattr(module, part)[expert]
    return weight.T if is_transposed(module) else weight


def routed(
    module: nn.Module, hidden: Tensor, chosen: Tensor
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(expert, which tokens it saw `[tokens]` bool, inputs of its first matrix), for every expert
    that saw a token.

    `hidden` is `[..., in]`; `chosen` holds the expert indices of each token, `[tokens, top_k]`.
    """
    hidden = hidden.reshape(-1, hidden.shape[-1])
    chosen = chosen.reshape(len(hidden), -1)
    for expert in chosen.unique().tolist():
        if 0 <= expert < count(module):  # some routers mark a token that no expert takes
            mine = (chosen == expert).any(1)
            yield expert, mine, hidden[mine]


def product(module: nn.Module, part: str, expert: int, x: Tensor) -> Tensor:
    """A matrix of an expert, with its bias, times inputs `[tokens, in]`: `[tokens, out]`."""
    z = x @ matrix(module, part, expert).T
    return z + getattr(module, f"{part}_bias")[expert] if getattr(module, "has_bias", False) else z


def inner(module: nn.Module, expert: int, x: Tensor) -> Tensor:
    """The inputs of an expert's second matrix, `[tokens, in]`, for those of its first."""
    return activated(module, product(module, matrices(module)[0], expert, x))


def activated(module: nn.Module, z: Tensor) -> Tensor:
    """What enters the second matrix, `[tokens, in]`, for what left the first, `[tokens, out]`."""
    if matrices(module)[0] == "gate_up_proj":
        return module._apply_gate(z)  # type: ignore[operator]
    return module.act_fn(z)  # type: ignore[operator]


def routers(block: nn.Module) -> set[nn.Module]:
    """The modules that choose experts or weigh them: never pruned.

    Beside an experts module, whatever has one output per expert or a single output (the gate of a
    shared expert). Only the parent of the experts is searched: elsewhere in a block a width may
    equal the number of experts.
    """
    routing: set[nn.Module] = set()
    for parent in block.modules():
        for child in parent.children():
            if (number := _experts_in(child)) is None:
                continue
            siblings = (sibling for sibling in parent.children() if sibling is not child)
            modules = (module for sibling in siblings for module in sibling.modules())
            routing |= {module for module in modules if _outputs(module) in (1, number)}
    return routing


def has_list(block: nn.Module) -> bool:
    """Whether a block holds experts that are modules of their own, a list of them."""
    return any(isinstance(one, nn.ModuleList) and _experts_in(one) for one in block.modules())


def _experts_in(module: nn.Module) -> int | None:
    """How many experts a module holds, fused or as a list of modules of one type, else None."""
    if is_experts(module):
        return count(module)
    alike = isinstance(module, nn.ModuleList) and len({type(expert) for expert in module}) == 1
    return len(module) if alike and len(module) > 1 else None  # type: ignore[arg-type]


def _outputs(module: nn.Module) -> int | None:
    weight = getattr(module, "weight", None)
    return weight.shape[0] if isinstance(weight, Tensor) and weight.dim() == 2 else None
