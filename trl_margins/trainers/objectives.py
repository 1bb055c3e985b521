"""From a config to the objective that it describes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trl.experimental.cpo import CPOConfig

from ..links import TRLS, Link
from ..objective import Objective
from ..registry import built, find_link, own_alpha, reward_class, usual_reward
from ..rewards import REWARDS, MeanLogRatioReward
from ..terms import Term
from .configs import MarginOptions, config_class


def objective_of(
    config: Any, weight: Term | Sequence[Term] | None = None, margin: Term | Sequence[Term] | None = None
) -> Objective:
    """The objective that a config describes; of TRL's own `CPOConfig` and `DPOConfig`, too.

    Args:
        config: of either base.
        weight: weight terms from Python, instead of those that the config names.
        margin: margin terms from Python.

    Raises:
        ValueError: an unknown name, or parts that do not go together.
    """
    options = config if isinstance(config, MarginOptions) else MarginOptions()
    base = "cpo" if isinstance(config, CPOConfig) else "dpo"
    losses = [config.loss_type] if isinstance(config.loss_type, str) else config.loss_type
    shares = getattr(config, "loss_weights", None) or [1.0] * len(losses)
    links: dict[Link, float] = {}
    for name, share in zip(losses, shares, strict=True):
        link = find_link(base, name)
        links[link] = links.get(link, 0.0) + share
    usual = usual_reward(base, losses[0])
    reward = getattr(config, "reward", None) or usual
    alpha, shaped = getattr(config, "alpha", 0.0), reward_class(reward).option_fields.values()
    if alpha and "alpha" not in shaped:
        able = sorted(name for name, each in REWARDS.items() if "alpha" in each.option_fields.values())
        own = own_alpha(options._term_classes("margin"))
        meant = f" and give that of margin={options.margin!r} as {own}" if own else ""
        raise ValueError(
            f"alpha={alpha!r} does not go with reward={reward!r}, which does not read it: set it to 0.0{meant}, "
            f"or use one of the rewards {', '.join(able)}"
        )
    # CPOConfig always has a simpo_gamma, whether its loss reads it or not
    is_read = losses[0] == "simpo" or losses[0] not in TRLS["cpo"] or getattr(config, "gamma_beta_ratio", None)
    has_target = base == "dpo" or (next(iter(links)).takes_margin and is_read)
    gamma = (getattr(config, "simpo_gamma", None) or 0.0) if has_target else 0.0
    weights = options.terms("weight") if weight is None else weight
    margins = options.terms("margin") if margin is None else margin
    of_pairs = [link for link in links if not link.of_batch]
    if [link.name for link in of_pairs] == ["sigmoid_norm"] and reward == usual and (gamma or margins):
        # the same loss, with the gap and its margins in one unit
        links = {find_link(base, "sigmoid") if link in of_pairs else link: share for link, share in links.items()}
        reward = MeanLogRatioReward.name
    return Objective(
        reward=built(reward_class(reward), "reward", config),
        link=links,
        beta=config.beta,
        gamma=gamma,
        weight=weights,
        margin=margins,
        label_smoothing=config.label_smoothing,
        discopop_tau=getattr(config, "discopop_tau", 0.05),
        link_options={name: getattr(options, name, default) for link in links for name, default in link.options},
        is_trls=reward == usual and TRLS[base].issuperset(losses) and not (gamma and losses[0] != "simpo"),
    )


def objective_of_run(settings: Mapping[str, Any]) -> Objective:
    """The objective of a run, from its `margin_run.json`.

    Raises:
        ValueError: terms that were given from Python, which no file describes.
    """
    config: Any = object.__new__(config_class(settings["method"], settings["base"]))
    vars(config).update(settings["config"])
    objective = objective_of(config)
    for kind, terms in (("weight", objective.weights), ("margin", objective.margins)):
        names = ", ".join(term.name for term in terms) or None
        if names != settings[kind]:
            raise ValueError(
                f"the run trained with {kind} {settings[kind]!r}, which was given from Python: its config describes "
                f"{names!r}"
            )
    return objective
