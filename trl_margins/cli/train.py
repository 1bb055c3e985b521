"""`trl-margins train`: TRL's own parser over the config of the chosen method, and YAML in anyone's words."""

from __future__ import annotations

import logging
import os
import shlex
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from transformers.hf_argparser import string_to_bool
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config
from trl.scripts.utils import DatasetMixtureConfig

from ..data.loading import load_splits, pick_split
from ..data.media import IMAGES
from ..data.noise import flip_labels, parse_noise
from ..methods import METHODS
from .dialects import Note, Settings, check_known, translate
from .mixture import mixture_splits, mixture_test_split
from .setup import check_writable, find_model, load_model, load_tokenizer, log_to_console, plain_precision_on_cpu
from .yaml_file import read_yaml, typed

logger = logging.getLogger(__name__)


@dataclass
class TrainArguments(ScriptArguments):
    """TRL's script arguments, and what to train with."""

    method: str = field(
        default="gappo",
        metadata={"help": f"One of {', '.join(METHODS)}; 'none' for the base trainer with the terms you name."},
    )
    base: str = field(
        default="cpo",
        metadata={"help": "TRL trainer underneath: cpo (reference-free) or dpo.", "choices": ["cpo", "dpo"]},
    )
    eval_dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Evaluation set, if it is not a split of `dataset_name`: a file, a saved data set, a folder of "
            "files or a Hub id; its `dataset_test_split`, or its only split."
        },
    )
    mixture_weights: list[float] | None = field(
        default=None,
        metadata={
            "help": "Share of its rows, from 0 to 1, that each set of `datasets` gives, in their order; all rows, if "
            "not given."
        },
    )
    mixture_seed: int | None = field(
        default=None,
        metadata={"help": "Draws these rows and `test_split_size` at random; without it a set gives its first rows."},
    )
    tokenizer_name_or_path: str | None = field(default=None, metadata={"help": "Tokenizer, if not the model's own."})
    chat_template: str | None = field(
        default=None, metadata={"help": "Jinja chat template for the tokenizer, or a file with one."}
    )
    noise: str | None = field(
        default=None,
        metadata={
            "help": "Flip training labels on purpose: random:0.2 flips 20 %% of the pairs, length:0.2 as many whose "
            "chosen answer is the longer one. The log says what became of them."
        },
    )
    noise_seed: int = field(default=0, metadata={"help": "Which pairs `noise` flips."})
    recipe: str | None = field(default=None, metadata={"help": "`--config` of a recipe that comes with the package."})
    dry_run: bool = field(
        default=False, metadata={"help": "Print what the settings come to, and load neither model nor data."}
    )


def main(argv: Sequence[str]) -> int:
    """Trains, saves the model and its card."""
    log_to_console()
    parser = make_parser(argv)
    script, config, model_args, mixture = parser.parse_args_and_config(list(argv), fail_with_unknown_args=True)
    if script.dry_run:
        from .resolved import resolved

        print(resolved(script, config, model_args, mixture), end="")
        return 0
    trainer = build_trainer(script, config, model_args, mixture)
    trainer.reproduce = shlex.join(["trl-margins", "train", *argv])
    _train(trainer, _yes_or_path(config.resume_from_checkpoint))
    trainer.save_model(config.output_dir)
    if trainer.eval_dataset is not None:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    names = {"dataset_name": _hub_id(script.dataset_name), "eval_dataset_name": script.eval_dataset_name}
    trainer.create_model_card(**names)
    trainer.accelerator.print(f"saved to {config.output_dir}")
    if config.push_to_hub:
        trainer.push_to_hub(**names)
    trainer.end()
    return 0


def _train(trainer: Any, resume: str | bool | None) -> None:
    """Trains; what stops a run also says where it can go on from."""
    from ..trainers.checkpoints import last_whole_checkpoint

    try:
        trainer.train(resume_from_checkpoint=resume)
    except Exception:
        if trainer.state.global_step:
            last = last_whole_checkpoint(trainer.args.output_dir)
            way_on = f"--resume_from_checkpoint true goes on from {last}" if last else "no checkpoint had been saved"
            logger.exception("training stopped in step %d; %s", trainer.state.global_step + 1, way_on)
        raise


class TrainParser(TrlParser):
    """TRL's parser, whose `--config` may be another project's YAML: each key that is not today's is mapped, with a
    line in the log. Flags go before the YAML."""

    def parse_args_and_config(
        self, args: Sequence[str] | None = None, *arguments: Any, **kwargs: Any
    ) -> tuple[Any, ...]:
        flags, rest = _split_config(sys.argv[1:] if args is None else args)
        if flags.path is not None:
            settings, notes = flags.read()
            for note in notes:
                logger.info("%s", note)
            variables = settings.pop("env", None) or {}
            if not isinstance(variables, dict):
                raise ValueError(f"{flags.path}: env is a mapping from environment variables to values")
            os.environ.update({name: str(value) for name, value in variables.items()})
            check_known(settings, self.fields, str(flags.path))
            self.set_defaults_with_config(**typed(settings, self._actions, str(flags.path)))
        self.set_defaults(recipe=flags.recipe)
        if flags.dry_run:
            use_cpu_without_accelerator(self)
        self._check_flags(rest)
        try:
            return super().parse_args_and_config(rest, *arguments, **kwargs)
        except (ValueError, TypeError, RuntimeError) as error:  # of the configs, about their fields
            raise ValueError(str(error)) from error

    def _check_flags(self, args: Sequence[str]) -> None:
        """
        Raises:
            ValueError: flags that no field has, with the nearest that one has.
        """
        unknown = [text.partition("=")[0] for text in self.parse_known_args(list(args))[1] if text.startswith("--")]
        complaints = []
        for flag in unknown:
            nearest = get_close_matches(flag, self._option_string_actions, n=1)
            complaints.append(flag + (f" (did you mean {nearest[0]}?)" if nearest else ""))
        if complaints:
            raise ValueError(f"unknown flags for this method and base: {', '.join(complaints)}")

    @property
    def fields(self) -> set[str]:
        """What a YAML may say."""
        return {action.dest for action in self._actions} - {"help", "recipe", "dry_run"}


def make_parser(argv: Sequence[str]) -> TrainParser:
    """The parser whose config fields and defaults are those of the method and base that `argv` names."""
    flags, _ = _split_config(argv)
    settings = {} if flags.path is None else flags.read()[0]
    return parser_for(flags.method or settings.get("method", "gappo"), flags.base or settings.get("base", "cpo"))


def parser_for(method: str | None, base: str) -> TrainParser:
    """The parser over the fields of a method on a base."""
    from ..trainers.configs import config_class

    config = config_class(_method(method), base)
    parser = TrainParser(
        (TrainArguments, config, ModelConfig, DatasetMixtureConfig),
        prog="trl-margins train",
        usage="%(prog)s [--config FILE | --recipe NAME] [options]",  # of some two hundred
        allow_abbrev=False,  # the flags that decide which others there are must be whole
    )
    plain_precision_on_cpu(parser)
    return parser


def use_cpu_without_accelerator(parser: TrainParser) -> None:
    """So that a GPU's settings can be looked at elsewhere: transformers refuses bf16 without one."""
    import torch

    if not torch.accelerator.is_available():
        parser.set_defaults(use_cpu=True)


@dataclass(frozen=True)
class Flags:
    """The flags that decide what the others, and the YAML, can say."""

    path: Path | None
    method: str | None = None
    base: str | None = None
    data: str | None = None
    recipe: str | None = None
    dry_run: bool = False

    def read(self) -> tuple[Settings, list[Note]]:
        """The YAML in today's words."""
        written = read_yaml(self.path)
        settings, notes = translate(written, self.method, self.base)
        if self.data is not None:  # TRL would go on taking the mixture
            for name in ("datasets", "mixture_weights", "mixture_seed", "test_split_size"):
                settings.pop(name, None)
        return settings, notes


def _split_config(argv: Sequence[str]) -> tuple[Flags, list[str]]:
    """The flags above, and all flags without those that name a YAML."""
    files = ArgumentParser(prog="trl-margins train", add_help=False, allow_abbrev=False)
    which = files.add_mutually_exclusive_group()
    which.add_argument("--config", type=Path)
    which.add_argument("--recipe")
    named, rest = files.parse_known_args(list(argv))
    deciding = ArgumentParser(prog="trl-margins train", add_help=False, allow_abbrev=False)
    deciding.add_argument("--method")
    deciding.add_argument("--base")
    deciding.add_argument("--dataset_name", "--dataset-name")
    deciding.add_argument("--dry_run", "--dry-run", nargs="?", const="true", default="false")
    flags, _ = deciding.parse_known_args(rest)
    path = named.config
    if named.recipe is not None:
        from .recipes import recipe_path

        path = Path(recipe_path(named.recipe))
    dry_run = string_to_bool(flags.dry_run)
    return Flags(path, flags.method, flags.base, flags.dataset_name, named.recipe, dry_run), rest


def build_trainer(script: TrainArguments, config: Any, model_args: ModelConfig, mixture: DatasetMixtureConfig) -> Any:
    """The trainer that the arguments describe."""
    from ..rows.tokens import prepare_tokenizer
    from ..trainers.named import trainer_class

    check_writable(config.output_dir)
    train, evals = _datasets(script, config, mixture)
    if script.noise:
        kind, rate = parse_noise(script.noise)
        train = flip_labels(
            train,
            rate,
            kind,
            script.noise_seed,
            config.score_columns,
            prompt_column=config.prompt_column,
            system_column=config.system_column,
        )
    name, revision = model_args.model_name_or_path, model_args.model_revision
    if name is None:
        raise SystemExit("trl-margins train: --model_name_or_path is missing")
    tokenizer = _tokenizer(script, name, revision, config.trust_remote_code)
    # the trainer looks too, when the model has been loaded
    prepare_tokenizer(tokenizer, ["train"] if _is_conversational(train, config) else [])
    init = {
        "revision": revision,
        "trust_remote_code": config.trust_remote_code,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        "device_map": None,
        "quantization_config": get_quantization_config(model_args),
        **(config.model_init_kwargs or {}),
    }
    is_adapter = Path(find_model(name), "adapter_config.json").is_file()
    if script.base == "dpo" and not is_adapter:  # loads its reference model the same way
        config.model_init_kwargs = init
        model = find_model(name)
    else:  # would load an encoder-decoder model in the wrong class
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


def _is_conversational(dataset: Any, config: Any) -> bool:
    """Whether the first row is messages."""
    from ..rows import RowReader
    from ..rows.opened import column_names

    first = next(iter(dataset), None)
    if first is None:
        return False
    return RowReader.of(column_names(dataset), "train", config.prompt_column, config.system_column)(
        first, 0
    ).is_conversational


def _tokenizer(script: TrainArguments, model: str, revision: str, trust_remote_code: bool) -> Any:
    own = script.tokenizer_name_or_path in (None, model)
    tokenizer = load_tokenizer(
        model if own else script.tokenizer_name_or_path,
        revision=revision if own else "main",
        trust_remote_code=trust_remote_code,
    )
    if script.chat_template is not None:
        tokenizer.chat_template = chat_template(script.chat_template)
    return tokenizer


def chat_template(text: str) -> str:
    """A Jinja chat template as it is, or from the file that is named.

    Raises:
        ValueError: neither.
    """
    if "{%" in text or "{{" in text:
        return text
    if Path(text).is_file():
        return Path(text).read_text()
    raise ValueError(f"chat_template: {text!r} is neither a Jinja template nor a file with one")


def _method(name: str | None) -> str | None:
    return None if name in (None, "none") else name


def _yes_or_path(resume: str | None) -> str | bool | None:
    """transformers' field is text: "true" is the newest checkpoint, anything else its folder."""
    return {"true": True, "false": None}.get(str(resume).lower(), resume)


def _hub_id(dataset_name: str | None) -> str | None:
    """A model card links to Hub sets only."""
    return None if dataset_name is None or Path(dataset_name).exists() else dataset_name


def _datasets(script: TrainArguments, config: Any, mixture: DatasetMixtureConfig) -> tuple[Any, Any]:
    alone = {
        "mixture_weights": script.mixture_weights,
        "mixture_seed": script.mixture_seed,
        "test_split_size": mixture.test_split_size,
    }
    if not mixture.datasets and (given := [option for option, value in alone.items() if value is not None]):
        raise ValueError(f"{', '.join(given)}: without `datasets` in the YAML there is nothing to mix or to split")
    if mixture.datasets:
        name = "datasets"
        splits = mixture_splits(mixture, script.mixture_weights, script.mixture_seed)
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
