"""Links: from the reward gap and its margin to a loss per pair, under the names that `loss_type` gives them."""

from . import papers, trls
from .link import Link, LossInputs, margin_loss
from .papers import conservative, robust_simpo

# TRL gives the same name to different losses on its two bases
CPO_LINKS: dict[str, Link] = {**trls.CPO, **papers.ANY_REWARD}
DPO_LINKS: dict[str, Link] = {**trls.DPO, **papers.ANY_REWARD, **papers.LOG_RATIO}
LINKS: dict[str, dict[str, Link]] = {"cpo": CPO_LINKS, "dpo": DPO_LINKS}
TRLS = {"cpo": frozenset(trls.CPO), "dpo": frozenset(trls.DPO)}  # those that its own trainers have

__all__ = [
    "CPO_LINKS",
    "DPO_LINKS",
    "LINKS",
    "TRLS",
    "Link",
    "LossInputs",
    "conservative",
    "margin_loss",
    "robust_simpo",
]
