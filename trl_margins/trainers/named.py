"""One tiny class a paper."""

from __future__ import annotations

from ..methods import METHODS
from .configs import GapPOConfig
from .cpo import MarginCPOTrainer
from .dpo import MarginDPOTrainer


class GapPOTrainer(MarginCPOTrainer):
    """GapPO: SimPO's loss with each pair weighted by its annotation score gap."""

    _method = METHODS["gappo"]
    _config_class = GapPOConfig
    _name = _method.name
    _paper = _method.paper.as_trl()
    _tag_names = ["trl", "trl-margins", *_method.tags]


_TRAINERS: dict[str, type[MarginCPOTrainer]] = {"gappo": GapPOTrainer}


def trainer_class(method_id: str | None, base: str = "cpo") -> type:
    """The trainer of a method on a base; without a method, and on the DPO base, the one that takes any objective."""
    if base == "dpo":
        return MarginDPOTrainer
    return MarginCPOTrainer if method_id is None else _TRAINERS[method_id]
