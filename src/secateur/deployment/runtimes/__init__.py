"""What can run a model, a file each. A new runtime is a file here and its line in `RUNTIMES`.

The clock, the rounds and the comparison of outputs are in `bench`.
"""

from secateur.deployment.runtimes import (
    compiled,
    eager,
    llamacpp,
    onnxruntime,
    packed,
    packed_cuda,
    semi_structured,
    vllm,
)
from secateur.deployment.runtimes.base import Runtime
from secateur.errors import UnknownName
from secateur.methods.values import AS_STORED

RUNTIMES: dict[str, Runtime] = {
    "eager": eager.eager,
    "compiled": compiled.compiled,
    "packed": packed.packed,
    "packed-int8": packed.packed_int8,
    "packed-int4": packed.packed_int4,
    "own-dense": packed.own_dense,
    "own-int8": packed.own_int8,
    "onnxruntime": onnxruntime.onnxruntime,
    "llamacpp": llamacpp.llamacpp,
    "llamacpp-q8": llamacpp.llamacpp_q8,
    "llamacpp-q4": llamacpp.llamacpp_q4,
    "eager-cuda": eager.eager_cuda,
    "packed-cuda": packed_cuda.packed_cuda,
    "semi-structured": semi_structured.semi_structured,
    "vllm": vllm.vllm,
}


def runs_values(runtime: Runtime, values: str) -> bool:
    """Whether a runtime runs rows of such values: as stored, or those that it rounds to itself."""
    return values.startswith(runtime.rounded) if runtime.rounded else values == AS_STORED


def find_runtime(name: str) -> Runtime:
    """The runtime of that name. Raises UnknownName."""
    if name not in RUNTIMES:
        raise UnknownName("runtime", name, RUNTIMES)
    return RUNTIMES[name]
