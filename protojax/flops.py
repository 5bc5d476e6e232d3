"""Floating-point operations of a traced program, counted from its matrix products and convolutions.

    matrix product [.., M, K] x [.., K, N]      2 B M N K
    convolution                                  2 x outputs x (kernel elements / output channels)

Everything else (element-wise operations, reductions) is left out, as in published model FLOPs. A loop counts its body
times its length; of branches the most expensive counts. The program is counted as it is traced: recomputation
(rematerialisation, micro-batches) is included.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax

# Dense bfloat16 peak of one device, FLOP/s, from the vendors' data sheets; the first name found in device_kind decides.
PEAKS = (
    ("H200", 989e12), ("H100", 989e12), ("A100", 312e12), ("L4", 121e12), ("V100", 125e12), ("T4", 65e12),
    ("TPU v6", 918e12), ("TPU v5p", 459e12), ("TPU v5 lite", 197e12), ("TPU v5e", 197e12), ("TPU v4", 275e12),
    ("TPU v3", 123e12), ("TPU v2", 45e12),
)  # fmt: skip


def count(function: Callable[..., Any], *arguments: Any) -> float:
    """Operations of one call of `function` on arguments of these shapes."""
    return of_jaxpr(jax.make_jaxpr(function)(*arguments).jaxpr)


def of_jaxpr(jaxpr: Any) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name == "dot_general":
            total += _product(equation)
        elif name == "conv_general_dilated":
            total += _convolution(equation)
        else:
            inner = [of_jaxpr(j) for j in _inner(equation.params)]
            if name == "cond":
                total += max(inner, default=0.0)
            else:
                total += equation.params.get("length", 1) * sum(inner) if name == "scan" else sum(inner)
    return total


def _inner(params: dict[str, Any]) -> list[Any]:
    """The programs inside an operation: calls, loops and branches (not the rules of its derivative)."""
    found = []
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            jaxpr = getattr(item, "jaxpr", item)
            if hasattr(jaxpr, "eqns"):
                found.append(jaxpr)
    return found


def _product(equation: Any) -> float:
    (contracted, _), (batched, _) = equation.params["dimension_numbers"]
    left, right = (v.aval.shape for v in equation.invars)
    shared = math.prod(left[d] for d in contracted)
    batch = math.prod(left[d] for d in batched)
    return 2.0 * math.prod(left) * math.prod(right) / max(shared * batch, 1)


def _convolution(equation: Any) -> float:
    kernel, outputs = equation.invars[1].aval.shape, equation.outvars[0].aval.shape
    channels = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
    # A dilated input (the gradient of a strided convolution) multiplies zeros, which are nobody's work.
    zeros = math.prod(equation.params["lhs_dilation"])
    return 2.0 * math.prod(outputs) * math.prod(kernel) / channels / zeros


def peak(device: Any) -> float | None:
    """FLOP/s of a device at best, dense bfloat16; None for one that is not in the table (a CPU)."""
    return next((value for name, value in PEAKS if name.lower() in device.device_kind.lower()), None)
