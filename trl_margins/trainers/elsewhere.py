"""Objectives of other code: what its files call them, and the settings that train them here.

Read in huggingface/trl and its older versions, huggingface/alignment-handbook, wzhouad/WPO, tengxiao1/SimPER,
uclaml/SPPO. Importing this loads nothing heavy.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Elsewhere:
    """An objective of other code, and how its files are recognised.

    Args:
        losses: values of `loss_type`.
        here: the settings that train it; none where the package does not have it.
        keys: keys that only its config has.
        word: in the name of the run, where its files have the keys of others.
        near: without `here`, the settings of what is nearest to it.
        remark: what is different here; without `here`, what else to know.
        code: whose code has it, by its defaults.
    """

    name: str
    losses: tuple[str, ...] = ()
    here: Mapping[str, Any] = field(default_factory=dict)
    keys: tuple[str, ...] = ()
    word: str | None = None
    near: Mapping[str, Any] = field(default_factory=dict)
    remark: str = ""
    code: Literal["TRL", "SimPO"] = "TRL"

    @property
    def instead(self) -> str:
        """What there is instead of it, as flags, and what else to know."""
        values = {
            key: " ".join(map(str, value)) if isinstance(value, list) else value for key, value in self.near.items()
        }
        flags = "".join(f" --{key} {value}" for key, value in values.items())
        return " ".join(filter(None, (self.remark, flags and f"The nearest here is{flags}.")))

    def said_by(self, written: Mapping[str, Any], words: Collection[str]) -> str | None:
        """What says that a file is for it."""
        losses = written.get("loss_type")
        for loss in losses if isinstance(losses, list) else [losses]:
            if loss in self.losses:
                return f"loss_type: {loss}"
        if keys := [key for key in self.keys if key in written]:
            return f"{keys[0]}: {written[keys[0]]}, a key of {self.name}"
        return f"{self.word} in the name of the run" if self.word in words else None


def _trls(base: str, loss: str | list[str], **more: Any) -> Mapping[str, Any]:
    return {"method": "none", "base": base, "loss_type": loss, **more}


ELSEWHERE = (
    Elsewhere("BCO", ("bco",), word="bco", near=_trls("dpo", "bco_pair")),
    Elsewhere(
        "KTO",
        ("kto",),
        keys=("desirable_weight", "undesirable_weight"),
        word="kto",
        near={"method": "kto-pair"},
        remark="KTO on unpaired completions is in trl.KTOTrainer.",
    ),
    Elsewhere(
        "RPO",
        ("rpo",),
        near=_trls("dpo", ["sigmoid", "sft"], loss_weights=[1.0, 1.0]),
        remark="Nemotron's reward-aware RPO is the method reward-aware-po.",
    ),
    Elsewhere(
        "rDPO or R-DPO",
        ("rdpo", "rDPO"),
        near={"method": "robust-dpo"},
        remark="If it has a length margin (R-DPO), it is the method r-dpo.",
    ),
    Elsewhere("TDPO", ("tdpo", "tdpo1", "tdpo2"), remark="It needs the KL over the vocabulary at every token."),
    Elsewhere(
        "ORPO",
        ("orpo",),
        {"method": "orpo"},
        word="orpo",
        remark="the NLL is over the tokens of the completions, in TRL's ORPOTrainer over those of the prompts too",
    ),
    Elsewhere(
        "WPO",
        ("wpo",),
        {"method": "wpo"},
        word="wpo",
        remark="weights as TRL has them, without the cap of 1 in WPO's code",
    ),
    Elsewhere("SimPER", ("SimPER", "simper"), {"method": "simper"}, word="simper", code="SimPO"),
    Elsewhere(
        "SPPO",
        ("sppo", "sppo_single"),
        {"method": "sppo"},
        word="sppo",
        remark="the chosen completion wins with probability 1, in SPPO's code with those of the columns chosen_probs, "
        "chosen_probs_win and chosen_probs_lose; and the loss is twice as large",
    ),
    Elsewhere(
        "KTO on pairs",
        ("kto_pair",),
        {"method": "kto-pair"},
        remark="the loss of a pair is the sum over its completions, in an older TRL their mean",
    ),
    Elsewhere("DPOP", ("dpop", "smaug"), {"method": "dpop"}),
    Elsewhere("cDPO", ("cdpo",), {"method": "cdpo"}),
    Elsewhere("RRHF", ("rrhf",), {"method": "rrhf"}),
    Elsewhere("SLiC-HF", ("slic", "slic_hf", "slic-hf"), {"method": "slic-hf"}),
    Elsewhere("EXO", ("exo",), _trls("dpo", "exo_pair", label_smoothing=1e-3)),
    Elsewhere("NCA", ("nca",), _trls("dpo", "nca_pair")),
    Elsewhere("APO", ("apo",), _trls("dpo", "apo_zero")),
    Elsewhere(
        "R-DPO",
        ("r-dpo", "r_dpo"),
        {"method": "r-dpo"},
        remark="α adds to the gap of a longer chosen completion, as in its paper; some code subtracts it, which a "
        "negative α does",
    ),
    Elsewhere("ODPO", ("odpo",), {"method": "odpo"}),
    Elsewhere("Dr. DPO", ("DrDPO", "dr-dpo", "dr_dpo"), {"method": "dr-dpo"}),
    Elsewhere("β-DPO", ("beta_DPO", "beta-dpo", "beta_dpo"), {"method": "beta-dpo"}),
    Elsewhere("α-DPO", ("alpha-dpo", "alpha_dpo"), {"method": "alpha-dpo"}),
    Elsewhere("DPO", ("dpo",), _trls("dpo", "sigmoid")),
    Elsewhere("CPO", ("cpo",), _trls("cpo", "sigmoid")),
)


def elsewhere(loss: Any) -> Elsewhere | None:
    """The objective that other code gives this `loss_type`."""
    return next((each for each in ELSEWHERE if loss in each.losses), None)
