"""The projection of an embedder in a layout that knows one epsilon for all its norms.

Such a layout gets the dense layer scaled. A file beside it holds the layer as it was and its epsilon, so that nothing is
lost on the way back; whoever does not know that file reads the scaled layer.
"""

from collections.abc import Iterable, Mapping
from math import sqrt

from torch import Tensor

PROJECTION, PROJECTION_EPS = "projection.safetensors", "projection_eps"  # the file, and the epsilon among its tensors


def rescaled(weight: Tensor, bias: Tensor, eps: float, new_eps: float) -> tuple[Tensor, Tensor]:
    """A dense layer after which LayerNorm with `new_eps` gives what LayerNorm with `eps` gives after the old one.

    Scaling the input of the norm by s turns its epsilon into eps / s^2. Equal epsilons leave every bit as it is.
    """
    if eps == new_eps:
        return weight, bias
    scale = sqrt(new_eps / eps)
    return weight * scale, bias * scale


def projection_names(names: Iterable[str]) -> list[str]:
    """Those of the dense layers of all towers."""
    return sorted(name for name in names if name.endswith(("cls.dense.weight", "cls.dense.bias")))


def scaled_projection(exact: Mapping[str, Tensor], eps: float, new_eps: float) -> dict[str, Tensor]:
    """All dense layers that are complete for another epsilon, under the names they have."""
    scaled = {}
    for name in exact:
        weight, bias = (f"{name.rpartition('.')[0]}.{leaf}" for leaf in ("weight", "bias"))
        if name == weight and bias in exact:
            scaled[weight], scaled[bias] = rescaled(exact[weight], exact[bias], eps, new_eps)
    return scaled
