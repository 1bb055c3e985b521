"""The options of `trl-margins train` beside the config's, and whether a run can start with what they say.

`train`, its `--dry_run` and `convert` ask the same: all that shows without data and model.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trl import ModelConfig, ScriptArguments, get_peft_config
from trl.scripts.utils import DatasetMixtureConfig

from ..checks import check_options, expression_of, unknown
from ..data.loading import check_slice, is_slice, names_in
from ..data.local_files import is_saved, names_files
from ..data.noise import parse_noise
from ..methods import METHODS
from ..registry import RESERVED
from ..rows.scores import check_given
from .config_file import read_yaml
from .mixture import check_mixture
from .options import option, warn_of_unread
from .recipes import recipe_path

logger = logging.getLogger(__name__)

# the losses of which TRL's DPOTrainer knows a form for other divergences
_F_DIVERGENCE = frozenset(("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft"))
_TO_MIX = ("mixture_weights", "mixture_seed", "test_split_size")
OF_MIXTURES = ("datasets", *_TO_MIX, "streaming")


@dataclass
class TrainArguments(ScriptArguments):
    """TRL's script arguments, and what to train with."""

    method: str = option(
        f"A method: {', '.join(METHODS)}, or one of an installed plug-in. 'none' is TRL's own trainer with the terms "
        "that you name.",
        "gappo",
    )
    base: str | None = option(
        "TRL trainer underneath: cpo (reference-free) or dpo. By default the method's own: dpo for one that needs a "
        "reference model.",
        None,
        choices=["cpo", "dpo"],
    )
    eval_dataset_name: str | None = option(
        "Evaluation set, if it is not a split of `dataset_name`: a file, a saved data set, a folder of files or a Hub "
        "id. Takes its `dataset_test_split`, or its only split.",
        None,
    )
    mixture_weights: list[float] | None = option(
        "Share of its rows, from 0 to 1, to take from each set of `datasets`, in their order. All rows by default.",
        None,
    )
    mixture_seed: int | None = option(
        "Draws these rows and `test_split_size` at random; without it, a set's first rows are taken.", None
    )
    tokenizer_name_or_path: str | None = option("Tokenizer, if not the model's own.", None)
    chat_template: str | None = option("Jinja chat template for the tokenizer, or a file with one.", None)
    noise: str | None = option(
        "Flip training labels on purpose: random:0.2 flips 20 %% of the pairs, length:0.2 as many whose chosen "
        "completion is the longer one. The log shows what happened to them.",
        None,
    )
    noise_seed: int = option("Which pairs `noise` flips.", 0)
    log_histograms: bool = option(
        "Give the trackers in `report_to` histograms of the pairs' weights, margins and reward gaps at every log.",
        False,
    )
    recipe: str | None = option("A recipe of the package, as `--config`.", None)
    dry_run: bool = option("Print the resulting settings without loading model or data.", False)


# before plug-ins are loaded: one with an option of these names is left out, with a warning
for _arguments in (TrainArguments, ModelConfig, DatasetMixtureConfig):
    RESERVED.update(_arguments.__dataclass_fields__)


def check_run(
    script: TrainArguments, config: Any, model_args: ModelConfig, mixture: DatasetMixtureConfig, whole: bool = True
) -> None:
    """Checks what no parser has looked at.

    Args:
        whole: whether model and data must be named; a file can leave them to the flags.

    Raises:
        ValueError: a value that its option does not take, options that do not go together, no model or no data.
    """
    for arguments in (script, model_args, mixture):
        check_options(arguments)
    if config.score_columns is not None:
        check_given(config.score_columns)
    if script.noise:
        parse_noise(script.noise)
    if script.chat_template is not None:
        chat_template(script.chat_template)
    _check_model(config, model_args)
    _check_objective(config)
    _check_data(script, config, mixture)
    of_recipe = read_yaml(recipe_path(script.recipe)) if script.recipe else {}
    warn_of_unread(_unread(script, config, mixture), script, config, said=of_recipe)
    data = script.dataset_name or mixture.datasets
    if script.dataset_name and mixture.datasets:
        raise ValueError(
            f"dataset_name ({script.dataset_name}) and datasets ({len(mixture.datasets)} of them) both name the "
            "training data: remove one"
        )
    if whole and model_args.model_name_or_path is None:
        raise ValueError("--model_name_or_path is missing")
    if whole and not data:
        raise ValueError("--dataset_name is missing (or `datasets` in the YAML)")
    if not (model_args.model_name_or_path and data):
        logger.warning("model_name_or_path and dataset_name: the file leaves one of them to the flags of train")


def _unread(script: TrainArguments, config: Any, mixture: DatasetMixtureConfig) -> Iterator[tuple[str, Any, str]]:
    """For `warn_of_unread`."""
    evaluation, saving, logging_, schedule, optim = (
        getattr(getattr(config, name), "value", getattr(config, name))
        for name in ("eval_strategy", "save_strategy", "logging_strategy", "lr_scheduler_type", "optim")
    )
    evaluates = evaluates_while_training(config) or script.eval_dataset_name
    yield "eval_steps", evaluation == "steps", "eval_strategy 'steps'"
    yield "eval_delay", evaluation != "no", "an eval_strategy other than 'no'"
    yield "eval_accumulation_steps per_device_eval_batch_size dataset_test_split", evaluates, "an evaluation set"
    yield "save_steps", saving == "steps", "save_strategy 'steps'"
    yield "save_total_limit save_only_model", saving != "no", "a save_strategy other than 'no'"
    # eval_steps are logging_steps where nothing else is said
    yield "logging_steps", "steps" in (logging_, evaluation), "logging_strategy 'steps'"
    yield "greater_is_better", config.metric_for_best_model, "metric_for_best_model"
    yield "warmup_steps", schedule not in ("constant", "reduce_lr_on_plateau"), "a schedule with a warm-up"
    yield "adam_beta1 adam_beta2", re.search("adam|lion|apollo", optim), "Adam and its like"
    yield "adam_epsilon", re.search("adam|apollo", optim), "Adam and its like"
    yield "optim_target_modules", re.search("galore|apollo", optim), "the optimizers galore_* and apollo_*"
    if config._base == "dpo":
        yield "precompute_ref_batch_size", config.precompute_ref_log_probs, "precompute_ref_log_probs"
        yield "ref_model_sync_steps ref_model_mixup_alpha", config.sync_ref_model, "sync_ref_model"
    yield "gradient_checkpointing_kwargs", config.gradient_checkpointing, "gradient_checkpointing"
    yield "length_column_name", config.train_sampling_strategy == "group_by_length", "sampling by length"
    yield "noise_seed", script.noise, "noise"
    yield "dataset_config dataset_streaming", not mixture.datasets, "dataset_name"
    yield "log_histograms", config.report_to, "a tracker in report_to"
    yield "trackio_space_id trackio_bucket_id", "trackio" in config.report_to, "trackio in report_to"
    pushing = "hub_model_id hub_revision hub_strategy hub_private_repo hub_always_push push_pair_log"
    yield pushing, config.push_to_hub, "push_to_hub"
    yield "ignore_data_skip restore_callback_states_from_checkpoint", config.resume_from_checkpoint, "a resumed run"


def chat_template(text: str) -> str:
    """A Jinja chat template, or the one in the file of this name.

    Raises:
        ValueError: neither.
    """
    if "{%" in text or "{{" in text:
        return text
    file = os.path.expanduser(text)
    if os.path.isfile(file):  # Path's raises an error where a name is too long
        try:
            found = Path(file).read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"chat_template: {text} is not UTF-8 ({error}): save the file as UTF-8") from error
        if not found.strip():
            raise ValueError(f"chat_template: {text} is empty")
        return found
    raise ValueError(f"chat_template: {text!r:.200} is neither a Jinja template nor a file with one")


def _check_model(config: Any, model_args: ModelConfig) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    from ..probes.scope import check_one_choice
    from ..trainers.model_checks import check_task

    name, known = model_args.attn_implementation, ["eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()]
    if name is not None and name not in known and "/" not in name and not name.startswith("paged|"):  # a kernel's id
        raise unknown("attn_implementation", name, known)
    if get_peft_config(model_args) is not None:
        if isinstance(pattern := model_args.lora_target_modules, str):
            expression_of("lora_target_modules", pattern)
        check_task(model_args.lora_task_type)
    if config.save_strategy == "best" and config.metric_for_best_model is None:
        raise ValueError("save_strategy 'best' needs metric_for_best_model, for example eval_pwa")
    check_one_choice(config.train_only, has_adapter=model_args.use_peft)
    if model_args.use_peft and getattr(config, "sync_ref_model", False):
        raise ValueError(
            "sync_ref_model=True does not go with use_peft: the reference model is the model without its adapter"
        )


def _check_objective(config: Any) -> None:
    from ..probes.anchor import check_estimator
    from ..probes.diagnostics import check_diagnostics
    from ..trainers.best import check_metric
    from ..trainers.dpo import check_unread_options
    from ..trainers.objectives import objective_of

    objective = objective_of(config)
    check_metric(config, objective)
    check_estimator(objective, config)
    check_diagnostics(objective, config)
    if config._base == "dpo":
        check_unread_options(config, objective)
        losses = set(config.loss_type)
        if config.use_weighting and losses & {"aot", "aot_unpaired"}:
            raise ValueError(
                "use_weighting=True does not go with loss_type 'aot' and 'aot_unpaired', which sort the pairs"
            )
        if config.f_divergence_type != "reverse_kl" and (others := losses - _F_DIVERGENCE):
            raise ValueError(
                f"f_divergence_type={config.f_divergence_type!r} does not go with loss_type {min(others)!r}, but with "
                f"{', '.join(sorted(_F_DIVERGENCE))}"
            )
        if config.sync_ref_model and config.precompute_ref_log_probs:
            raise ValueError("sync_ref_model=True changes the model whose outputs precompute_ref_log_probs=True keeps")
    if (config.liger_kernel_config or {}).get("fused_linear_cross_entropy"):
        raise ValueError("liger_kernel_config: fused_linear_cross_entropy replaces the forward pass that TRL patches")


def evaluates_while_training(config: Any) -> bool:
    """Whether a set is needed for that."""
    return bool(config.eval_strategy != "no" or config.eval_on_start)


def check_splits(there: Collection[str], train: str, test: str | None, name: str) -> None:
    """
    Raises:
        ValueError: the data set lacks the split to train on, or that to evaluate on if one is named.
    """
    named = {"--dataset_train_split": train, **({} if test is None else {"--dataset_test_split": test})}
    if missing := {flag: split for flag, split in named.items() if not names_in(split, there) <= {*there}}:
        without = (
            ", or another data set to evaluate on with --eval_dataset_name; `train` needs none with "
            "--eval_strategy no --eval_on_start false"
        )
        raise ValueError(
            f"data set {name!r} has the splits {list(there)}, not {' and '.join(map(repr, missing.values()))}: name "
            f"one of them with {' and '.join(missing)}{without * ('--dataset_test_split' in missing)}"
        )


def _check_data(script: TrainArguments, config: Any, mixture: DatasetMixtureConfig) -> None:
    name, test = script.dataset_name, script.dataset_test_split
    evaluates = evaluates_while_training(config) and not script.eval_dataset_name
    given = [each for each in _TO_MIX if getattr(script, each, getattr(mixture, each, None)) is not None]
    streams = mixture.streaming if mixture.datasets else script.dataset_streaming
    sources = [each for each in (name, script.eval_dataset_name, *(part.path for part in mixture.datasets)) if each]
    if not any(is_saved(Path(each).expanduser()) for each in sources):  # whose splits may have any name
        for split in filter(is_slice, (script.dataset_train_split, test, *(part.split for part in mixture.datasets))):
            check_slice(split)
    if script.dataset_streaming and is_slice(script.dataset_train_split):
        raise ValueError(f"split {script.dataset_train_split!r}: a stream has no slices: load the data set instead")
    if mixture.datasets:
        check_mixture(mixture, script.mixture_weights, script.mixture_seed)
        if script.eval_dataset_name and mixture.test_split_size is not None:
            logger.warning(
                "test_split_size keeps rows from training, and nothing reads them: the evaluation set is "
                "eval_dataset_name. Remove one"
            )
        if evaluates and mixture.streaming:
            raise ValueError(f"a stream of several sets has no {test!r} split: give eval_dataset_name")
    elif given:
        raise ValueError(f"{', '.join(given)}: without `datasets` in the YAML there is nothing to mix or to split")
    elif mixture.streaming:
        raise ValueError("streaming is for `datasets` in the YAML: dataset_name is streamed with dataset_streaming")
    elif name and Path(name).expanduser().is_file():
        check_splits(["train"], script.dataset_train_split, test if evaluates else None, name)
    if streams and config.max_steps < 1:
        raise ValueError("max_steps must be set for a data set that is streamed, whose length is not known")
    if streams and getattr(config, "precompute_ref_log_probs", False):
        raise ValueError("precompute_ref_log_probs=True needs the whole data set: do not stream it")
    _warn_of_place([each for each in (name, script.eval_dataset_name) if each], config.output_dir)


def _warn_of_place(names: Iterable[str], output_dir: str) -> None:
    """Of an output folder in which `datasets` would look for data."""
    out = Path(output_dir).expanduser().resolve()
    for folder in (Path(name).expanduser().resolve() for name in names):
        if not folder.is_dir() or is_saved(folder) or names_files(folder) or not out.is_relative_to(folder):
            continue
        if not any(part.startswith((".", "__")) for part in out.relative_to(folder).parts):
            logger.warning(
                "output_dir %s lies in a folder of data, and whoever reads that again may take files of the run for "
                "data, such as eval_results.json. Name a folder outside",
                output_dir,
            )
