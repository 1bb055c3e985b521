"""A focal weight: pairs that the model already ranks correctly count less."""

from dataclasses import dataclass, field

import torch

from trl_margins import Method, PairView, Paper, Term, register_method, register_term


@dataclass
class FocalWeight(Term):
    """w_i = (1 − σ(m_i))^γ of the reward gap m_i, as a constant (Lin et al., arXiv 1708.02002, eq. 4)."""

    gamma: float = field(default=2.0, metadata={"help": "Focusing parameter γ; 0 gives every pair weight 1."})

    name = "focal"

    def __call__(self, view: PairView) -> torch.Tensor:
        return torch.sigmoid(-view.reward_gap) ** self.gamma


register_term(FocalWeight, kind="weight")
register_method(
    Method(
        id="focal-simpo",
        name="FocalSimPO",
        paper=Paper(
            title="Focal Loss for Dense Object Detection",
            arxiv="1708.02002",
            citation="@inproceedings{focal,\n    title = {{Focal Loss for Dense Object Detection}}, year = 2017,\n}",
        ),
        formula="loss = (1/B) Σ (1 − σ(m_i))^γ · −log σ(m_i − γ_SimPO),  m_i = β (mean log π(y_w) − mean log π(y_l))",
        reward="length-normalized",
        weight="focal",
        defaults={"beta": 2.0, "gamma_beta_ratio": 0.5, "learning_rate": 1e-6},
    )
)
