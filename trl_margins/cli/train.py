"""`trl-margins train`: TRL's own parser over the config of the chosen method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config
from trl.scripts.utils import DatasetMixtureConfig, get_dataset

from ..data.bundled import resolve_model
from ..data.loading import load_splits, pick_split
from ..data.noise import flip_labels, parse_noise
from ..methods import METHODS
from .setup import load_model, load_tokenizer, log_to_console, plain_precision_on_cpu


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
        metadata={"help": "Evaluation set, if it is not a split of `dataset_name`: anything that names a data set."},
    )
    noise: str | None = field(
        default=None,
        metadata={
            "help": "Flip training labels on purpose: random:0.2 flips 20 % of the pairs, length:0.2 as many whose "
            "chosen answer is the longer one. The log says what became of them."
        },
    )
    noise_seed: int = field(default=0, metadata={"help": "Which pairs `noise` flips."})


def main(argv: Sequence[str]) -> int:
    """Trains, saves the model and its card."""
    log_to_console()
    parser = make_parser(argv)
    script, config, model_args, mixture = parser.parse_args_and_config(list(argv), fail_with_unknown_args=True)
    trainer = build_trainer(script, config, model_args, mixture)
    trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    trainer.save_model(config.output_dir)
    if trainer.eval_dataset is not None:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    trainer.create_model_card(dataset_name=_hub_id(script.dataset_name))
    trainer.accelerator.print(f"saved to {config.output_dir}")
    if config.push_to_hub:
        trainer.push_to_hub(dataset_name=_hub_id(script.dataset_name))
    trainer.end()
    return 0


def make_parser(argv: Sequence[str]) -> TrlParser:
    """The parser whose config fields and defaults are those of the method and base that `argv` names."""
    from ..trainers.configs import config_class

    chosen = {"method": "gappo", "base": "cpo"} | _choices(argv)
    config = config_class(_method(chosen["method"]), chosen["base"])
    parser = TrlParser((TrainArguments, config, ModelConfig, DatasetMixtureConfig), prog="trl-margins train")
    plain_precision_on_cpu(parser)
    return parser


def _choices(argv: Sequence[str]) -> dict[str, Any]:
    """`method` and `base`, which decide what else can be said: from the YAML, then from the flags."""
    flags: dict[str, Any] = {}
    for position, argument in enumerate(argv):
        name, equals, value = argument.partition("=")
        if name in ("--method", "--base", "--config"):
            flags[name[2:]] = value if equals else argv[position + 1] if position + 1 < len(argv) else None
    if path := flags.pop("config", None):
        with open(path) as file:
            written = yaml.safe_load(file) or {}
        flags = {key: written[key] for key in ("method", "base") if key in written} | flags
    return flags


def build_trainer(script: TrainArguments, config: Any, model_args: ModelConfig, mixture: DatasetMixtureConfig) -> Any:
    """The trainer that the arguments describe."""
    from ..trainers.named import trainer_class

    train, evals = _datasets(script, config, mixture)
    if script.noise:
        kind, rate = parse_noise(script.noise)
        train = flip_labels(train, rate, kind, script.noise_seed, config.score_columns)
    name, revision = model_args.model_name_or_path, model_args.model_revision
    if name is None:
        raise SystemExit("trl-margins train: --model_name_or_path is missing")
    init = {
        "revision": revision,
        "trust_remote_code": config.trust_remote_code,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        "device_map": None,
        "quantization_config": get_quantization_config(model_args),
        **(config.model_init_kwargs or {}),
    }
    if script.base == "dpo":  # loads its reference model the same way
        config.model_init_kwargs = init
        model = resolve_model(name)
    else:  # would load an encoder-decoder model in the wrong class
        config.model_init_kwargs = None
        model = load_model(name, **init)
    return trainer_class(_method(script.method), script.base)(
        model,
        args=config,
        train_dataset=train,
        eval_dataset=evals,
        processing_class=load_tokenizer(name, revision=revision, trust_remote_code=config.trust_remote_code),
        peft_config=get_peft_config(model_args),
    )


def _method(name: str | None) -> str | None:
    return None if name in (None, "none") else name


def _hub_id(dataset_name: str | None) -> str | None:
    """A model card links to Hub sets only."""
    return None if dataset_name is None or Path(dataset_name).exists() else dataset_name


def _datasets(script: TrainArguments, config: Any, mixture: DatasetMixtureConfig) -> tuple[Any, Any]:
    if mixture.datasets:
        splits, name = get_dataset(mixture), "datasets"
    elif script.dataset_name:
        name = script.dataset_name
        splits = load_splits(name, script.dataset_config, script.dataset_streaming)
    else:
        raise SystemExit("trl-margins train: --dataset_name is missing (or `datasets` in the YAML)")
    train = pick_split(splits, script.dataset_train_split, name)
    if script.eval_dataset_name:
        return train, pick_split(load_splits(script.eval_dataset_name), None, script.eval_dataset_name)
    if config.eval_strategy == "no":
        return train, None
    return train, pick_split(splits, script.dataset_test_split, name)
