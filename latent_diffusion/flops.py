"""How much work a model is: FLOPs of its products and convolutions, and the peaks of devices.

Model FLOPs are what the mathematics needs, 2 for each multiplication with its addition, whatever a program recomputes,
pads or fuses; what is no product (norms, activations, softmax) is not counted. They are read off the traced program,
before the compiler sees it, and agree with what torch counts on the reference's networks.
"""

import math
import re
from collections.abc import Callable
from typing import Any

import jax

# Dense bfloat16 (on V100 and T4 float16) TFLOP/s of one JAX device, by the first words of its `device_kind`: makers'
# data sheets, half of what they state with sparsity. On TPU v2, v3 and 7x a device is one of the two cores of a chip.
PEAKS = {
    "NVIDIA GB300": 2500, "NVIDIA B300": 2250, "NVIDIA GB200": 2500, "NVIDIA B200": 2250, "NVIDIA H200 NVL": 835,
    "NVIDIA H200": 989, "NVIDIA GH200": 989, "NVIDIA H100 NVL": 835, "NVIDIA H100 PCIe": 756, "NVIDIA H100": 989,
    "NVIDIA A100": 312, "NVIDIA A40": 150, "NVIDIA A10G": 70, "NVIDIA A10": 125, "NVIDIA L40S": 362, "NVIDIA L40": 181,
    "NVIDIA L4": 121, "Tesla V100-SXM2": 125, "Tesla T4": 65,
    "TPU v2": 22.5, "TPU v3": 61.5, "TPU v4 lite": 138, "TPU v4": 275, "TPU v5 lite": 197, "TPU v5e": 197,
    "TPU v5p": 459, "TPU v5": 459, "TPU v6 lite": 918, "TPU v6e": 918, "TPU7x": 1153.5,
}


def peak(device_kind: str) -> float | None:
    """The most bfloat16 FLOP/s of a device, or None for one that `PEAKS` does not know (such as any CPU) and for a part
    of a GPU (MIG)."""
    fitting = [name for name in PEAKS if re.match(rf"{re.escape(name)}\b(?!.* MIG )", device_kind)]
    return PEAKS[max(fitting, key=len)] * 1e12 if fitting else None


def count(function: Callable, *arguments: Any) -> int:
    """FLOPs of one call of `function`, which is traced with arguments or their shapes, not run.

    The body of a scan counts as often as it runs, that of a while loop once, and of the branches of a condition the
    largest. Kernels of other makers (cuDNN's attention) are not seen: count in float32, which does not use them.
    """
    return _of_jaxpr(jax.make_jaxpr(function)(*arguments).jaxpr)


def _of_jaxpr(jaxpr: Any) -> int:
    return sum(_of_equation(equation) for equation in jaxpr.eqns)


def _of_equation(equation: Any) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        depth = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
        return 2 * equation.outvars[0].aval.size * depth
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        outputs = kernel[params["dimension_numbers"].rhs_spec[0]]
        return 2 * equation.outvars[0].aval.size * math.prod(kernel) // outputs
    if params.get("name") == "winograd":  # with fewer multiplications the convolution that it is
        return 2 * equation.outvars[0].aval.size * math.prod(equation.invars[1].aval.shape[:-1])
    inner = [_of_jaxpr(getattr(value, "jaxpr", value)) for value in _jaxprs(params)]
    if name == "cond":
        return max(inner)
    return sum(inner) * params.get("length", 1)


def _jaxprs(params: dict[str, Any]) -> list[Any]:
    """The programs inside of an equation, of which a derivative's rules are none."""
    values = []
    for value in params.values():
        values += value if isinstance(value, tuple | list) else [value]
    return [value for value in values if hasattr(value, "eqns") or hasattr(value, "jaxpr")]
