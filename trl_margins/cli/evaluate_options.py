"""Options of `trl-margins evaluate`."""

from __future__ import annotations

from dataclasses import dataclass

from ..checks import check_names
from ..data.splits import SPLITS
from .cases import OF_RUN
from .options import DTYPES, ScoredRowOptions, option

REWARDS = ("length-normalized", "sum", "log-ratio")
RM_BENCH_LENGTH = 2048


@dataclass(kw_only=True)
class EvaluateArguments(ScoredRowOptions):
    """Model and data sets."""

    model_name_or_path: list[str] = option(
        "One or more models, which are measured alike and stand side by side, such as one before and after training: "
        "folders (also an adapter's), Hub ids, or bundled:smollm2-135m-instruct."
    )
    dataset_name: list[str] = option(
        "One or more files, saved data sets, folders of files or Hub ids: pairs, RewardBench's file, lists (prompt, "
        "responses, scores) or RM-Bench files, which count as one set."
    )
    dataset_split: list[str] | None = option(
        f"Splits; by default the only one there is, or those of {', '.join(SPLITS)} that there are.", None
    )
    reward: str = option(
        "Mean log-probability per token, as in the trainers' eval_pwa, its sum, or log-ratio to --ref_model.",
        "length-normalized",
        choices=REWARDS,
    )
    ref_model: str | None = option("Reference model of the log-ratio; by default, an adapter's base model.", None)
    drift_from: str | None = option(
        "Model that training started from, with the same vocabulary: also reports the KL divergence from it.", None
    )
    cases: str | None = option(
        f"Also counts AMaPO's four cases under the margin of the training run ({OF_RUN!r}), or of a method with its "
        "default settings, by its id.",
        None,
    )
    plot: str | None = option(
        "File (.png, .svg) for the densities of reward gap and chosen log-probability, all models in the same axes.",
        None,
    )
    json: str | None = option("File for the numbers, as JSON.", None)
    markdown: str | None = option("File for the tables.", None)
    rewards: str | None = option("File for the reward of each completion, as JSON lines.", None)
    eval_min_score_gap: float = option("Smallest score gap of the pairs behind `pwa`.", 2.0)
    max_length: int | None = option(
        "Longest prompt and completion, in tokens; longest completion of an encoder-decoder model. By default that "
        f"of the model's training run, else the model's limit; for RM-Bench {RM_BENCH_LENGTH}, as its authors set it.",
        None,
    )
    tokenization: str | None = option(
        "As `tokenization` of the trainer. By default that of the model's training run.",
        None,
        choices=["chat-template", "cpo"],
    )
    batch_size: int = option("Completions per device and forward pass. Does not change the numbers.", 16)
    bootstrap: int = option("Resamples for the 95 %% intervals.", 1000)
    dtype: str = option(f"Dtype of the weights: {', '.join(DTYPES)}.", "float32", choices=DTYPES)
    trust_remote_code: bool = option("Run the model's own code.", False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_names("model_name_or_path", self.model_name_or_path)
        if twice := [name for name in self.model_name_or_path if self.model_name_or_path.count(name) > 1]:
            raise ValueError(f"model_name_or_path names {twice[0]!r} twice: name every model once")
