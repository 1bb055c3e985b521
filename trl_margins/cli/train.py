"""`trl-margins train`: TRL's parser over the config of the chosen method, and YAML of this or another project."""

from __future__ import annotations

import logging
import re
import shlex
from argparse import ArgumentParser
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.hf_argparser import string_to_bool
from transformers.trainer import TRAINING_ARGS_NAME
from trl import ModelConfig, ScriptArguments, get_peft_config, get_quantization_config
from trl.scripts.utils import DatasetMixtureConfig

from ..data.loading import load_splits, pick_split
from ..data.media import IMAGES
from ..data.noise import flip_labels, parse_noise
from ..distributed import check_processes, wait_before_leaving
from ..methods import METHODS
from ..registry import RESERVED
from ..trainers.folder import check_unused, last_whole_checkpoint, locked
from .config_file import Settings, read_yaml
from .migration import OLD_KEYS, migrate
from .mixture import mixture_splits, mixture_test_split
from .options import OptionsParser, option
from .setup import check_writable, find_model, load_model, load_tokenizer

logger = logging.getLogger(__name__)

# flags about what a folder has: whoever trains again has an empty one
_ONCE = r" --resume[_-]from[_-]checkpoint[= ]('[^']*'|\S+)| --overwrite[_-]output[_-]dir([= ](?!-)\S+)?"


@dataclass
class TrainArguments(ScriptArguments):
    """TRL's script arguments, and what to train with."""

    method: str = option(
        f"A method: {', '.join(METHODS)}, or one of an installed plug-in. 'none' is TRL's own trainer with the terms "
        "that you name.",
        "gappo",
    )
    base: str = option("TRL trainer underneath: cpo (reference-free) or dpo.", "cpo", choices=["cpo", "dpo"])
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
    recipe: str | None = option("A recipe of the package, as `--config`.", None)
    dry_run: bool = option("Print the resulting settings without loading model or data.", False)


# before plug-ins are loaded: one with an option of these names is left out, with a warning
for _arguments in (TrainArguments, ModelConfig, DatasetMixtureConfig):
    RESERVED.update(_arguments.__dataclass_fields__)


def main(argv: Sequence[str]) -> int:
    """Trains, saves the model and its card."""
    script, config, model_args, mixture = parse(argv)
    if script.dry_run:
        from .dry_run import resolved

        print(resolved(script, config, model_args, mixture), end="")
        return 0
    check_processes(config.world_size)
    # transformers' field is a string: "true" is the newest checkpoint, anything else is a folder
    resume = {"true": True, "false": None}.get(
        str(config.resume_from_checkpoint).lower(), config.resume_from_checkpoint
    )
    check_writable(config.output_dir)
    is_main = config.process_index == 0
    with locked(config.output_dir) if is_main else nullcontext():
        if is_main and not resume and not config.overwrite_output_dir:
            check_unused(config.output_dir)  # now, rather than after the model was loaded
        trainer = build_trainer(script, config, model_args, mixture)
        command = shlex.join(["trl-margins", "train", *argv])
        trainer.reproduce = re.sub(_ONCE, "", command)
        trainer.holds_folder = True
        _train(trainer, resume)
        if trainer.is_complete and Path(config.output_dir, TRAINING_ARGS_NAME).exists():  # saved last, with the model
            raise ValueError(
                f"{config.output_dir} has the complete run and its model: nothing was trained. More --max_steps or "
                "--num_train_epochs go on with it"
            )
        _deliver(trainer, script, config)
    wait_before_leaving()
    trainer.end()
    return 0


def _deliver(trainer: Any, script: TrainArguments, config: Any) -> None:
    """Saves the model, evaluates it and writes its card."""
    trainer.save_model(config.output_dir)
    if trainer.eval_dataset is not None:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    is_local = script.dataset_name is None or Path(script.dataset_name).exists()  # a card links to Hub sets only
    names = {
        "dataset_name": None if is_local else script.dataset_name,
        "eval_dataset_name": script.eval_dataset_name,
    }
    trainer.create_model_card(**names)
    trainer.accelerator.print(f"saved to {config.output_dir}")
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


# Settings ------------------------------------------------------------------------------------------------------------


def parse(argv: Sequence[str]) -> tuple[TrainArguments, Any, ModelConfig, DatasetMixtureConfig]:
    """Script arguments, config, model and mixture that flags and YAML describe.

    The method's config class decides which options there are, so method, base and file are read first.
    """
    first = ArgumentParser(prog="trl-margins train", add_help=False, allow_abbrev=False)
    files = first.add_mutually_exclusive_group()
    files.add_argument("--config")
    files.add_argument("--recipe")
    first.add_argument("--method")
    first.add_argument("--base")
    first.add_argument("--dataset_name", "--dataset-name")
    first.add_argument("--dry_run", "--dry-run", nargs="?", const="true", default="false")
    flags, _ = first.parse_known_args(list(argv))
    source = flags.config
    if flags.recipe is not None:
        from .recipes import recipe_path

        source = str(recipe_path(flags.recipe))
    settings: Settings = {}
    if source is not None:
        settings, notes = migrate(read_yaml(source), flags.method, flags.base)
        for note in notes:
            logger.info("%s", note)
    if flags.dataset_name is not None:  # TRL would still take the mixture
        for name in ("datasets", "mixture_weights", "mixture_seed", "test_split_size"):
            settings.pop(name, None)
    parser = parser_for(flags.method or settings.get("method", "gappo"), flags.base or settings.get("base", "cpo"))
    if string_to_bool(flags.dry_run):
        _adapt_to_cpu(parser, use_cpu=True)  # to look at a GPU's settings elsewhere: bf16 is refused without one
    return parser.parse(argv, settings, source or "")


def parser_for(method: str | None, base: str) -> OptionsParser:
    """The parser over the fields of a method's config on a base."""
    from ..trainers.configs import config_class

    parser = OptionsParser(
        "train",
        *(TrainArguments, config_class(_method(method), base), ModelConfig, DatasetMixtureConfig),
        scope=f"method {method or 'none'!r} on base {base!r}",
        flags_only=("recipe", "dry_run"),
        old_keys=OLD_KEYS,
        usage="%(prog)s [--config FILE | --recipe NAME] [options]",  # there are about two hundred
    )
    _adapt_to_cpu(parser, bf16=False)  # TRL's default, and several times slower than fp32 there
    return parser


def _adapt_to_cpu(parser: ArgumentParser, **defaults: bool) -> None:
    """Sets defaults for machines without an accelerator; flags and YAML override them."""
    import torch

    if not torch.accelerator.is_available():
        parser.set_defaults(**defaults)


def _method(name: str | None) -> str | None:
    return None if name == "none" else name


# Trainer -------------------------------------------------------------------------------------------------------------


def build_trainer(script: TrainArguments, config: Any, model_args: ModelConfig, mixture: DatasetMixtureConfig) -> Any:
    """The trainer that the arguments describe."""
    from ..rows.tokens import prepare_tokenizer
    from ..trainers.named import trainer_class

    train, evals = _datasets(script, config, mixture)
    columns: dict[str, Any] = {"prompt_column": config.prompt_column, "system_column": config.system_column}
    if script.noise:
        kind, rate = parse_noise(script.noise)
        train = flip_labels(train, rate, kind, script.noise_seed, config.score_columns, **columns)
    name, revision = model_args.model_name_or_path, model_args.model_revision
    if name is None:
        raise SystemExit("trl-margins train: --model_name_or_path is missing")
    tokenizer = _tokenizer(script, name, revision, config.trust_remote_code)
    # the trainer checks this too, but after loading the model
    prepare_tokenizer(tokenizer, ["train"] if _is_conversational(train, columns) else [])
    init = {
        "revision": revision,
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
    return trainer_class(_method(script.method), script.base)(
        model,
        args=config,
        train_dataset=train,
        eval_dataset=evals,
        processing_class=tokenizer,
        peft_config=get_peft_config(model_args),
    )


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


def _datasets(script: TrainArguments, config: Any, mixture: DatasetMixtureConfig) -> tuple[Any, Any]:
    """Training set and evaluation set."""
    weights, seed, size = script.mixture_weights, script.mixture_seed, mixture.test_split_size
    if mixture.datasets:
        name, splits = "datasets", mixture_splits(mixture, weights, seed)
    elif given := [
        option
        for option, value in {"mixture_weights": weights, "mixture_seed": seed, "test_split_size": size}.items()
        if value is not None
    ]:
        raise ValueError(f"{', '.join(given)}: without `datasets` in the YAML there is nothing to mix or to split")
    elif script.dataset_name:
        name = script.dataset_name
        splits = load_splits(name, script.dataset_config, script.dataset_streaming, decoded=IMAGES)
    else:
        raise SystemExit("trl-margins train: --dataset_name is missing (or `datasets` in the YAML)")
    train = pick_split(splits, script.dataset_train_split, name, "--dataset_train_split")
    test = script.dataset_test_split
    if script.eval_dataset_name:
        splits = load_splits(script.eval_dataset_name, decoded=IMAGES)
        only = len(splits) == 1  # whatever its name
        return train, pick_split(splits, None if only else test, script.eval_dataset_name, "--dataset_test_split")
    if config.eval_strategy == "no":
        return train, None
    if mixture.datasets and test not in splits:
        return train, mixture_test_split(mixture, test)
    return train, pick_split(splits, test, name, "--dataset_test_split")
