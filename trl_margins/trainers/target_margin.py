"""The target margin of a config: one number in two fields, a ratio to β and in reward units."""

from __future__ import annotations

import logging
import math
from typing import Any

logger = logging.getLogger(__name__)


def resolve_target_margin(config: Any, default: float | None) -> None:
    """Leaves both fields with the same margin, each in its unit.

    Args:
        default: the method's ratio, where neither field was given.
    """
    if config._replaces_target and (config.simpo_gamma or config.gamma_beta_ratio):
        named = ", ".join(map(repr, config.term_names("margin")))
        logger.warning("margin %s makes its own margins: gamma_beta_ratio and simpo_gamma are not used", named)
    if config.gamma_beta_ratio is None and config.simpo_gamma is None:
        config.gamma_beta_ratio = default
    if config.gamma_beta_ratio is None:
        config.gamma_beta_ratio = None if config.simpo_gamma is None else config.simpo_gamma / config.beta
        return
    gamma = config.gamma_beta_ratio * config.beta
    if config.simpo_gamma is not None and not math.isclose(config.simpo_gamma, gamma):
        raise ValueError(
            f"gamma_beta_ratio={config.gamma_beta_ratio:g} and simpo_gamma={config.simpo_gamma:g} both set the target "
            f"margin and differ: with beta={config.beta:g} the ratio means simpo_gamma={gamma:g}. Give one of them "
            "and leave the other None."
        )
    config.simpo_gamma = gamma


def check_target_margin(config: Any) -> None:
    """
    Raises:
        ValueError: β or a target margin was set after the config had made one of the other.
    """
    ratio, gamma = getattr(config, "gamma_beta_ratio", None), getattr(config, "simpo_gamma", None)
    if ratio is not None and gamma is not None and not math.isclose(gamma, ratio * config.beta):
        raise ValueError(
            f"beta={config.beta:g}, gamma_beta_ratio={ratio:g} and simpo_gamma={gamma:g} do not fit each other: one "
            "was set after the config was made, which makes simpo_gamma of the other two. Make a new config with them"
        )
