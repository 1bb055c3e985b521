"""Derivatives along one direction of the parameters, in the same pass as the values: forward-mode differentiation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel


@torch.no_grad()
def directional_derivative(
    model: nn.Module, direction: Mapping[str, Tensor], f: Callable[[Callable[..., Any]], Tensor]
) -> Tensor:
    """(d/dt) f(θ + t · direction) at t = 0. Nothing of the model changes, and no graph is kept.

    Unlike the difference of two passes it does not drown in rounding: the derivative is carried beside the value, with
    its own exponent. About the cost of two to three forward passes; attention runs through PyTorch's plain kernel,
    which alone can do it.

    Args:
        model: any model without custom autograd functions.
        direction: parameter name → tensor of its shape.
        f: from a model (a callable that takes what the model takes) to a tensor.

    Raises:
        NotImplementedError: an operation of the model has no forward-mode derivative.
        ValueError: quantized weights, whose products have none either, and may say 0 instead of raising.
    """
    parameters = dict(model.named_parameters())
    if whole := next((name for name, weight in parameters.items() if not weight.is_floating_point()), None):
        raise ValueError(
            f"{whole} is quantized ({parameters[whole].dtype}), and products with it have no forward-mode derivative: "
            "take anchor_estimator='difference'"
        )
    with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
        moving = {
            name: forward_ad.make_dual(parameters[name].detach(), along.to(parameters[name].dtype))
            for name, along in direction.items()
        }

        def call(*args: Any, **kwargs: Any) -> Any:
            return functional_call(model, moving, args, kwargs)

        try:
            value, tangent = forward_ad.unpack_dual(f(call))
        except NotImplementedError as error:
            raise NotImplementedError(f"{error} Take anchor_estimator='difference'") from error
        return torch.zeros_like(value) if tangent is None else tangent
