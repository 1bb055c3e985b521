"""`trl-margins train`: TRL's parser over the config of the chosen method, and YAML of this or another project."""

from __future__ import annotations

import logging
import re
import shlex
from argparse import ArgumentParser
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers.hf_argparser import string_to_bool
from transformers.trainer import TRAINING_ARGS_NAME
from trl import ModelConfig, get_peft_config, get_quantization_config
from trl.scripts.utils import DatasetMixtureConfig

from ..data.loading import load_splits, pick_split
from ..data.media import IMAGES
from ..data.noise import flip_labels, parse_noise
from ..distributed import agreed, check_processes, wait_before_leaving
from ..redaction import redacted_text
from ..registry import base_of
from ..trainers.folder import check_unused, last_whole_checkpoint, locked
from .config_file import Settings, check_adapter, flags_said, read_yaml
from .migration import OLD_KEYS, migrate
from .mixture import mixture_splits, mixture_test_split
from .options import OptionsParser
from .setup import check_writable, find_model, load_model, load_tokenizer
from .train_options import TrainArguments, chat_template, check_run, training_splits

logger = logging.getLogger(__name__)

# flags about what a folder has: whoever trains again has an empty one
_ONCE = re.compile(r" --resume[_-]from[_-]checkpoint[= ]('[^']*'|\S+)| --overwrite[_-]output[_-]dir([= ](?!-)\S+)?")


def main(argv: Sequence[str]) -> int:
    """Trains, saves the model and its card."""
    script, config, model_args, mixture = run = parse(argv)
    check_run(*run)
    if script.dry_run:
        from .dry_run import resolved

        print(resolved(script, config, model_args, mixture), end="")
        return 0
    from ..trainers.best import EvaluateLast

    check_processes(config.world_size)
    # transformers' field is a string: "true" is the newest checkpoint, anything else is a folder
    resume = {"true": True, "false": None}.get(
        str(config.resume_from_checkpoint).lower(), config.resume_from_checkpoint
    )
    check_writable(config.output_dir)
    with ExitStack() as held:
        agreed(PartialState(), lambda: _enter_folder(held, config, resume))
        trainer = build_trainer(script, config, model_args, mixture)
        command = redacted_text(shlex.join(["trl-margins", "train", *argv]))
        trainer.reproduce = _ONCE.sub("", command)
        trainer.holds_folder = True
        if trainer.eval_dataset is not None:
            trainer.add_callback(EvaluateLast())
        _train(trainer, resume)
        if trainer.is_complete and Path(config.output_dir, TRAINING_ARGS_NAME).exists():  # saved last, with the model
            raise ValueError(
                f"{config.output_dir} has the complete run and its model: nothing was trained. To go on with it, "
                "raise --max_steps or --num_train_epochs"
            )
        _deliver(trainer, script, config)
    wait_before_leaving()
    trainer.end()
    return 0


def _enter_folder(held: ExitStack, config: Any, resume: str | bool | None) -> None:
    """Keeps other runs out of the folder, and this one where it would move files without being asked."""
    folder = Path(config.output_dir)
    held.enter_context(locked(folder))
    goes_on = resume is True or (resume and Path(resume).resolve().parent == folder.resolve())
    if not goes_on and not config.overwrite_output_dir:
        check_unused(folder)  # now, rather than after the model was loaded


def _deliver(trainer: Any, script: TrainArguments, config: Any) -> None:
    """Saves the model, evaluates it and writes its card."""
    trainer.save_model(config.output_dir)
    if trainer.eval_dataset is not None:
        metrics = trainer.loaded_metrics or trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    is_local = script.dataset_name is None or Path(script.dataset_name).exists()  # a card links to Hub sets only
    names = {
        "dataset_name": None if is_local else script.dataset_name,
        "eval_dataset_name": script.eval_dataset_name,
    }
    trainer.create_model_card(**names)
    last, best = trainer.state.global_step, trainer.loaded_step
    which = (
        f"of step {last}" if best is None else f"of step {best} of {last}, the best by {config.metric_for_best_model}"
    )
    trainer.accelerator.print(f"saved to {config.output_dir}: the model {which}")
    if config.push_to_hub:
        trainer.push_to_hub(**names)


def _train(trainer: Any, resume: str | bool | None) -> None:
    """Trains; if training stops, logs where it can be resumed."""
    try:
        trainer.train(resume_from_checkpoint=resume)
    except Exception:
        if trainer.state.global_step:
            last = last_whole_checkpoint(trainer.args.output_dir)
            way_on = f"--resume_from_checkpoint true resumes from {last}" if last else "no checkpoint had been saved"
            logger.exception("training stopped in step %d; %s", trainer.state.global_step + 1, way_on)
        raise


# Of a config that is only looked at: another machine may have what these need
_ANY_MACHINE = {"use_cpu": True, "tf32": None, "dataloader_pin_memory": True, "deepspeed": None}


# Settings ------------------------------------------------------------------------------------------------------------


def parse(
    argv: Sequence[str], settings: Settings | None = None, source: str = "", command: str = "train"
) -> tuple[TrainArguments, Any, ModelConfig, DatasetMixtureConfig]:
    """Script arguments, config, model and mixture that flags and YAML describe.

    The method's config class decides which options there are, so method, base and file are read first.

    Args:
        settings: those of the file, if they have been read and migrated.
        source: the file.
        command: the subcommand, for errors.
    """
    from ..trainers.configs import check_for_trl

    first = ArgumentParser(prog=f"trl-margins {command}", add_help=False, allow_abbrev=False)
    files = first.add_mutually_exclusive_group()
    files.add_argument("--config")
    files.add_argument("--recipe")
    first.add_argument("--method")
    first.add_argument("--base")
    first.add_argument("--dataset_name", "--dataset-name")
    first.add_argument("--dry_run", "--dry-run", nargs="?", const=True, default=False, type=string_to_bool)
    flags, _ = first.parse_known_args(list(argv))
    if settings is None:
        settings, source = read_settings(flags.config, flags.recipe, flags.method, flags.base)
    if isinstance(resumed := settings.get("resume_from_checkpoint"), bool):  # YAML's; the field is text
        settings = {**settings, "resume_from_checkpoint": str(resumed).lower()}
    if flags.dataset_name is not None:  # TRL would still take the mixture
        for name in ("datasets", "mixture_weights", "mixture_seed", "test_split_size"):
            settings.pop(name, None)
    method = settings.get("method", "gappo") if flags.method is None else flags.method
    base = base_of(_method(method), settings.get("base") if flags.base is None else flags.base)
    parser = parser_for(method, base, command)
    script, config, model_args, mixture = parser.parse(argv, settings, source, _ANY_MACHINE if flags.dry_run else {})
    script.base = base
    vars(config).update(parser.said)
    check_adapter({**settings, **flags_said(argv)}, source)
    check_for_trl(config)
    return script, config, model_args, mixture


def read_settings(
    config: str | None, recipe: str | None, method: str | None = None, base: str | None = None
) -> tuple[Settings, str]:
    """The settings of `--config` or `--recipe`, migrated, and the file; nothing without either."""
    source = config or ""
    if recipe is not None:
        from .recipes import recipe_path

        source = str(recipe_path(recipe))
    settings, notes = migrate(read_yaml(source), method, base) if source else ({}, [])
    for note in notes:
        logger.log(logging.WARNING if note.warns else logging.INFO, "%s", note)
    return settings, source


def parser_for(method: str | None, base: str, command: str = "train") -> OptionsParser:
    """The parser over the fields of a method's config on a base."""
    from ..trainers.configs import config_class

    parser = OptionsParser(
        command,
        *(TrainArguments, config_class(_method(method), base), ModelConfig, DatasetMixtureConfig),
        scope=f"method {method or 'none'!r} on base {base!r}",
        flags_only=("recipe", "dry_run"),
        old_keys=OLD_KEYS,
        usage="%(prog)s [--config FILE | --recipe NAME] [options]",  # there are about two hundred
    )
    import torch

    if not torch.accelerator.is_available():
        parser.set_defaults(bf16=False)  # TRL's default, and several times slower than fp32 there
    return parser


def _method(name: str | None) -> str | None:
    return None if name == "none" else name


# Trainer -------------------------------------------------------------------------------------------------------------


def build_trainer(script: TrainArguments, config: Any, model_args: ModelConfig, mixture: DatasetMixtureConfig) -> Any:
    """The trainer that the arguments describe."""
    from ..trainers.named import trainer_of

    train, evals, tokenizer = inputs_of(script, config, model_args, mixture)
    name = str(model_args.model_name_or_path)
    init = {
        "revision": model_args.model_revision,
        "trust_remote_code": config.trust_remote_code,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        "device_map": None,
        "quantization_config": get_quantization_config(model_args),
        **(config.model_init_kwargs or {}),
    }
    model = find_model(name)
    if script.base == "dpo" and not Path(model, "adapter_config.json").is_file():
        config.model_init_kwargs = init  # the trainer loads model and reference model
    else:  # CPOTrainer would load an encoder-decoder model in the wrong class
        config.model_init_kwargs = None
        model = load_model(name, trainable=True, **init)
    return trainer_of(config)(
        model,
        args=config,
        train_dataset=train,
        eval_dataset=evals,
        processing_class=tokenizer,
        peft_config=get_peft_config(model_args),
    )


def inputs_of(script: TrainArguments, config: Any, model_args: ModelConfig, mixture: DatasetMixtureConfig) -> Any:
    """Training set, evaluation set and tokenizer: what a trainer is given beside the model."""
    from ..rows.tokens import prepare_tokenizer

    train, evals = datasets_of(script, config, mixture)
    columns: dict[str, Any] = {"prompt_column": config.prompt_column, "system_column": config.system_column}
    if script.noise:
        kind, rate = parse_noise(script.noise)
        train = flip_labels(train, rate, kind, script.noise_seed, config.score_columns, **columns)
    name, revision = str(model_args.model_name_or_path), model_args.model_revision
    tokenizer = _tokenizer(script, name, revision, config.trust_remote_code)
    # the trainer checks this too, but after loading the model
    prepare_tokenizer(tokenizer, ["train"] if _is_conversational(train, columns) else [])
    return train, evals, tokenizer


def _is_conversational(dataset: Any, columns: dict[str, Any]) -> bool:
    from ..rows import RowReader
    from ..rows.opened import column_names

    first = next(iter(dataset), None)
    return first is not None and RowReader.of(column_names(dataset), "train", **columns)(first, 0).is_conversational


def _tokenizer(script: TrainArguments, model: str, revision: str, trust_remote_code: bool) -> Any:
    name = script.tokenizer_name_or_path or model
    tokenizer = load_tokenizer(
        name, revision=revision if name == model else "main", trust_remote_code=trust_remote_code
    )
    if script.chat_template is not None:
        tokenizer.chat_template = chat_template(script.chat_template)
    return tokenizer


def datasets_of(script: TrainArguments, config: Any, mixture: DatasetMixtureConfig) -> tuple[Any, Any]:
    """Training set and evaluation set."""
    if mixture.datasets:
        name, splits = "datasets", mixture_splits(mixture, script.mixture_weights, script.mixture_seed)
    else:
        name = str(script.dataset_name)
        splits = load_splits(name, script.dataset_config, script.dataset_streaming, decoded=IMAGES)
    test = script.dataset_test_split
    held_out = mixture.datasets and test not in splits
    own = not (script.eval_dataset_name or config.eval_strategy == "no" or held_out)
    train, evals = training_splits(splits, script.dataset_train_split, test if own else None, name)
    if script.eval_dataset_name:
        splits = load_splits(script.eval_dataset_name, decoded=IMAGES)
        only = len(splits) == 1  # whatever its name
        return train, pick_split(splits, None if only else test, script.eval_dataset_name, "--dataset_test_split")
    if held_out and config.eval_strategy != "no":
        return train, mixture_test_split(mixture, test)
    return train, evals
