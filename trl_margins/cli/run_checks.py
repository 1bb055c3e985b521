"""What a run's settings must be, as far as it shows without data and model: `train`, its `--dry_run` and `convert` ask
the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl import ModelConfig, get_peft_config
from trl.scripts.utils import DatasetMixtureConfig

from ..checks import check_options, unknown
from ..data.loading import pick_split
from ..data.noise import parse_noise
from .mixture import check_mixture

if TYPE_CHECKING:
    from .train import TrainArguments

_TO_MIX = ("mixture_weights", "mixture_seed", "test_split_size")


def check_run(
    script: TrainArguments, config: Any, model_args: ModelConfig, mixture: DatasetMixtureConfig, whole: bool = True
) -> None:
    """Checks what no parser has looked at.

    Args:
        whole: whether model and data must be named; a file can leave them to the flags.

    Raises:
        ValueError: a value that its option does not take, or options that do not go together.
        SystemExit: no model or no data.
    """
    for arguments in (script, model_args, mixture):
        check_options(arguments)
    if script.noise:
        parse_noise(script.noise)
    if script.chat_template is not None:
        chat_template(script.chat_template)
    _check_model(config, model_args)
    _check_objective(config)
    _check_data(script, config, mixture)
    if whole and model_args.model_name_or_path is None:
        raise SystemExit("trl-margins train: --model_name_or_path is missing")
    if whole and not (script.dataset_name or mixture.datasets):
        raise SystemExit("trl-margins train: --dataset_name is missing (or `datasets` in the YAML)")


def chat_template(text: str) -> str:
    """A Jinja chat template, or the one in the file of this name.

    Raises:
        ValueError: neither.
    """
    if "{%" in text or "{{" in text:
        return text
    if Path(text).is_file():
        return Path(text).read_text()
    raise ValueError(f"chat_template: {text!r} is neither a Jinja template nor a file with one")


def _check_model(config: Any, model_args: ModelConfig) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name, known = model_args.attn_implementation, ["eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()]
    if name is not None and name not in known and "/" not in name and not name.startswith("paged|"):  # a kernel's id
        raise unknown("attn_implementation", name, known)
    get_peft_config(model_args)
    if model_args.use_peft and config.train_only:
        raise ValueError("train_only and peft_config both choose what trains: give one of them")
    if model_args.use_peft and getattr(config, "sync_ref_model", False):
        raise ValueError(
            "sync_ref_model=True does not go with use_peft: the reference model is the model without its adapter"
        )


def _check_objective(config: Any) -> None:
    from ..probes.anchor import check_estimator
    from ..trainers.configs import objective_of
    from ..trainers.dpo import check_unread_options

    objective = objective_of(config)
    check_estimator(objective, config)
    if config._base == "dpo":
        check_unread_options(config, objective)
        losses = set(config.loss_type)
        if config.use_weighting and losses & {"aot", "aot_unpaired"}:
            raise ValueError(
                "use_weighting=True does not go with loss_type 'aot' and 'aot_unpaired', which sort the pairs"
            )
        if config.sync_ref_model and config.precompute_ref_log_probs:
            raise ValueError("sync_ref_model=True changes the model whose outputs precompute_ref_log_probs=True keeps")
    if (config.liger_kernel_config or {}).get("fused_linear_cross_entropy"):
        raise ValueError("liger_kernel_config: fused_linear_cross_entropy replaces the forward pass that TRL patches")


def _check_data(script: TrainArguments, config: Any, mixture: DatasetMixtureConfig) -> None:
    name, test = script.dataset_name, script.dataset_test_split
    evaluates = config.eval_strategy != "no" and not script.eval_dataset_name
    given = [each for each in _TO_MIX if getattr(script, each, getattr(mixture, each, None)) is not None]
    streams = mixture.streaming if mixture.datasets else script.dataset_streaming
    if mixture.datasets:
        check_mixture(mixture, script.mixture_weights, script.mixture_seed)
        if evaluates and mixture.streaming:
            raise ValueError(f"a stream of several sets has no {test!r} split: give eval_dataset_name")
    elif given:
        raise ValueError(f"{', '.join(given)}: without `datasets` in the YAML there is nothing to mix or to split")
    elif name and Path(name).expanduser().is_file():
        pick_split({"train": None}, script.dataset_train_split, name, "--dataset_train_split")
        if evaluates:
            pick_split({"train": None}, test, name, "--dataset_test_split")
    if streams and config.max_steps < 1:
        raise ValueError("max_steps must be set for a data set that is streamed, whose length is not known")
    if streams and getattr(config, "precompute_ref_log_probs", False):
        raise ValueError("precompute_ref_log_probs=True needs the whole data set: do not stream it")
