"""`trl-margins train`: TRL's parser over the config of the chosen method, and YAML of this or another project."""

from __future__ import annotations

import logging
import re
import shlex
from argparse import ArgumentParser
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import is_peft_model
from transformers.hf_argparser import string_to_bool
from transformers.utils.logging import set_tqdm_hook
from trl import ModelConfig, get_peft_config, get_quantization_config
from trl.scripts.utils import DatasetMixtureConfig

from ..checks import check_text
from ..data.loading import is_slice, load_splits, pick_split
from ..data.noise import flip_labels, parse_noise
from ..disk import check_writable
from ..distributed import agreed, check_processes, wait_before_leaving
from ..logging import holding_info, release_info
from ..methods import MARGINS, WEIGHTS, names_of
from ..printable import outlive_readers
from ..redaction import redacted_command, redacted_text
from ..registry import OPTIONS, base_of, get_method, term_class
from ..rows.form import IMAGES
from ..rows.mixed import Named
from ..rows.raw import column_names, first_row
from ..trainers.folder import (
    check_stays,
    check_unused,
    checkpoint_to_resume,
    holds_model,
    last_whole_checkpoint,
    locked,
)
from .config_file import Settings, check_adapter, check_loading, flags_said, read_yaml
from .migration import OLD_KEYS, migrate
from .mixture import mixture_splits, mixture_test_split
from .options import OptionsParser, usage
from .setup import check_model, find_model, load_model, load_tokenizer
from .train_options import (
    OF_MIXTURES,
    TrainArguments,
    chat_template,
    check_run,
    check_splits,
    evaluates_while_training,
)

logger = logging.getLogger(__name__)

_BARS = {"delay": 1, "leave": False, "disable": None}  # the last: only in a terminal
CARD_IS_DUE = "_README.md.due"  # a file that says of a folder with a model that its card is still to be written
# flags about what a folder has: whoever trains again has an empty one
_ONCE = re.compile(r" --resume[_-]from[_-]checkpoint[= ]('[^']*'|\S+)| --overwrite[_-]output[_-]dir([= ](?!-)\S+)?")


def main(argv: Sequence[str], is_part: bool = False) -> int:
    """Trains, saves the model and its card; the exit status.

    Args:
        argv: flags.
        is_part: of another command, which says itself what comes next.
    """
    with holding_info():
        return _run(argv, is_part)


def _run(argv: Sequence[str], is_part: bool) -> int:
    with usage():
        script, config, model_args, mixture = run = parse(argv, command="compare" if is_part else "train")
        check_run(*run)
    if script.dry_run:
        from .dry_run import resolved

        print(resolved(script, config, model_args, mixture), end="")
        return 0
    from ..recording.histograms import PairHistograms
    from ..trainers.best import EvaluateLast
    from ..trainers.interrupts import Interrupts

    check_processes(config.world_size)
    # transformers' field is a string: "true" is the newest checkpoint, anything else is a folder
    resume = {"true": True, "false": None}.get(
        str(config.resume_from_checkpoint).lower(), config.resume_from_checkpoint
    )
    check_writable(config.output_dir)
    command = _ONCE.sub("", redacted_command(["trl-margins", "train", *argv]))
    interrupts = Interrupts()
    try:
        with interrupts.heard(), short_bars_hidden(), ExitStack() as held:
            data = [script.dataset_name, script.eval_dataset_name, *(part.path for part in mixture.datasets)]
            agreed(PartialState(), lambda: _enter_folder(held, config, resume, data))
            trainer = build_trainer(script, config, model_args, mixture)
            trainer.reproduce, trainer.data_name = command, redacted_text(_data_name(script, mixture))
            trainer.holds_folder = True
            trainer.listen(interrupts)
            if script.log_histograms and config.report_to:  # else it has been said that nothing takes them
                trainer.add_callback(PairHistograms(trainer))
            if trainer.eval_dataset is not None:
                trainer.add_callback(EvaluateLast())
            _train(trainer, resume)
            if not interrupts.agreed:
                interrupts.ending = "saving the model first"
                _deliver(trainer, script, config, is_part)
    except SystemExit:
        release_info()
        if interrupts.signal is not None and PartialState().is_main_process:
            print(_stopped(config, 0, "" if is_part else command))
        raise
    if interrupts.agreed:
        trainer.accelerator.print(_stopped(config, trainer.state.global_step, "" if is_part else command))
    wait_before_leaving()
    trainer.end()
    return interrupts.status


def _data_name(script: TrainArguments, mixture: DatasetMixtureConfig) -> str:
    return script.dataset_name or " and ".join(part.path for part in mixture.datasets)


def _stopped(config: Any, step: int, command: str) -> str:
    """What a stopped run has, and the command that goes on with it."""
    last = last_whole_checkpoint(config.output_dir)
    said = f"stopped after step {step}" if step else "stopped before the first step"
    if last is None:
        return f"{said}: nothing has been trained, and the same command starts again"
    said += f": {last} has all that is needed to go on"
    resume = "--resume_from_checkpoint true"
    if config.world_size > 1:  # started by a launcher, whose flags nobody knows here
        return f"{said}\nresume  the same command with {resume}"
    return f"{said}\nresume  {command} {resume}" if command else said


def _enter_folder(held: ExitStack, config: Any, resume: str | bool | None, data: Sequence[str | None] = ()) -> None:
    """Keeps other runs out of the folder, and this one where it would move files without being asked, or its data."""
    folder = Path(config.output_dir)
    held.enter_context(locked(folder))
    if resume and resume is not True:
        checkpoint_to_resume(folder, resume)
    goes_on = resume is True or (resume and Path(resume).resolve().parent == folder.resolve())
    if not goes_on and not config.overwrite_output_dir:
        check_unused(folder)  # now, rather than after the model was loaded
    if not goes_on:
        check_stays(folder, [name for name in data if name])


def _deliver(trainer: Any, script: TrainArguments, config: Any, is_part: bool) -> None:
    """Saves the model, evaluates it, writes its card, and says what there is now."""
    due = Path(config.output_dir, CARD_IS_DUE)
    if trainer.is_complete and holds_model(config.output_dir) and not due.exists():
        raise ValueError(
            f"{config.output_dir} has the complete run and its model: nothing was trained. To go on with it, "
            "raise --max_steps or --num_train_epochs"
        )
    if trainer.is_world_process_zero():
        with suppress(OSError):  # of a full disk, which the model's own error names
            due.touch()
    trainer.save_model(config.output_dir)
    metrics: dict[str, Any] = {}
    if trainer.eval_dataset is not None:
        metrics = trainer.loaded_metrics or trainer.evaluate()
        trainer.save_metrics("eval", metrics)
    is_local = script.dataset_name is None or Path(script.dataset_name).exists()  # a card links to Hub sets only
    names = {
        "dataset_name": None if is_local else script.dataset_name,
        "eval_dataset_name": script.eval_dataset_name,
    }
    trainer.create_model_card(**names)
    if trainer.is_world_process_zero():
        due.unlink(missing_ok=True)
    lines = [f"kept    {_kept(trainer, metrics)}", f"saved   {config.output_dir}"]
    if config.push_to_hub:
        pushed = trainer.push_to_hub(**names)
        lines.append(f"pushed  {getattr(pushed, 'repo_url', pushed)}")
    trainer.accelerator.print("\n".join(lines if is_part else [*lines, *next_steps(trainer, script)]))


def _kept(trainer: Any, metrics: Mapping[str, Any]) -> str:
    """Which step's model, and its score."""
    last, best, by = trainer.state.global_step, trainer.loaded_step, trainer.args.metric_for_best_model
    if best is not None:
        return f"the model of step {best} of {last}, the best by {by}: {trainer.state.best_metric:.4f}"
    scores = {key: metrics[key] for key in (by, "eval_pwa", "eval_pwa_all", "eval_loss") if key in metrics}
    return f"the model of step {last}" + "".join(f", {key} {value:.4f}" for key, value in list(scores.items())[:1])


def next_steps(trainer: Any, script: TrainArguments) -> Iterator[str]:
    """Commands about the trained model, and how Python loads it."""
    config, out, first = trainer.args, as_argument(trainer.args.output_dir), "next"
    name = script.eval_dataset_name or script.dataset_name
    if name and not any(column in IMAGES for column in column_names(trainer.train_dataset)):
        options: dict[str, Any] = {
            "dataset_config": None if script.eval_dataset_name else script.dataset_config,
            "dataset_split": _split_to_evaluate(trainer, script, name),
            **{key: getattr(config, key) for key in ("prompt_column", "system_column", "score_columns")},
            "trust_remote_code": config.trust_remote_code or None,
        }
        words = ["trl-margins", "evaluate", "--model_name_or_path", out, "--dataset_name", as_argument(name)]
        for key, value in options.items():
            if value is not None:
                words += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
        yield f"next    {shlex.join(words)}"
        first = "    "
    if config.log_pairs:
        yield f"{first}    {shlex.join(['trl-margins', 'report', out])}"
    yield f"python  {loading(trainer.accelerator.unwrap_model(trainer.model), out, config.trust_remote_code)}"


def as_argument(name: str) -> str:
    """A file's name as a command takes it, which would be a flag with a dash in front."""
    return f"./{name}" if name.startswith("-") else name


def _split_to_evaluate(trainer: Any, script: TrainArguments, name: str) -> str | None:
    """None for a data set that has only one."""
    on_train = trainer.eval_dataset is None and not script.eval_dataset_name
    split = script.dataset_train_split if on_train else script.dataset_test_split
    if is_slice(split):
        return split
    if Path(name).is_file():
        return None
    with suppress(ValueError, OSError):  # the data has changed since: no reason to fail at the end of a run
        return None if script.eval_dataset_name and len(load_splits(name, decoded=IMAGES)) == 1 else split
    return None


def loading(model: Any, folder: str, trust_remote_code: bool = False) -> str:
    """Python that loads the model, or the adapter on its base model."""
    from ..trainers.card import task_of

    kind = {None: "Seq2SeqLM", "text-generation": "CausalLM", "image-text-to-text": "ImageTextToText"}.get(
        task_of(model), "MultimodalLM"
    )
    # transformers loads these with an adapter, too
    has_adapter = is_peft_model(model) and kind in ("Seq2SeqLM", "CausalLM")
    library, loader = ("peft", f"AutoPeftModelFor{kind}") if has_adapter else ("transformers", f"AutoModelFor{kind}")
    trusted = ", trust_remote_code=True" if trust_remote_code else ""
    return f"from {library} import {loader}; model = {loader}.from_pretrained({folder!r}{trusted})"


@contextmanager
def short_bars_hidden() -> Iterator[None]:
    """Within the block, transformers draws bars for what takes its time, in a terminal, and takes them away again."""
    before = set_tqdm_hook(lambda bar, args, options: bar(*args, **{**options, **_BARS}))
    try:
        yield
    finally:
        set_tqdm_hook(before)


def _train(trainer: Any, resume: str | bool | None) -> None:
    """Trains, whoever reads what is printed; if training stops, logs where it can be resumed."""
    outlive_readers()
    try:
        trainer.train(resume_from_checkpoint=resume)
    except Exception as error:
        if trainer.state.global_step:
            last = last_whole_checkpoint(trainer.args.output_dir)
            way_on = f"--resume_from_checkpoint true resumes from {last}" if last else "no checkpoint had been saved"
            said = "training stopped in step %d; %s"
            logger.error(said, trainer.state.global_step + 1, way_on, exc_info=not isinstance(error, OSError))
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
        command: the subcommand, for errors; a run of another has settings that nobody has written.
    """
    from ..trainers.trls_fields import check_for_trl

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
        has_default = flags_said(argv).keys().isdisjoint(("weight", "margin", "reward", "loss_type"))
        settings, source = read_settings(flags.config, flags.recipe, flags.method, flags.base, has_default)
    if isinstance(resumed := settings.get("resume_from_checkpoint"), bool):  # YAML's; the field is text
        settings = {**settings, "resume_from_checkpoint": str(resumed).lower()}
    if flags.dataset_name is not None and settings.get("datasets"):  # TRL would still take the mixture
        settings = {**settings}
        gone = [name for name in OF_MIXTURES if settings.pop(name, None) is not None]
        logger.info("--dataset_name %s replaces the file's %s", flags.dataset_name, ", ".join(gone))
    method = settings.get("method", "gappo") if flags.method is None else flags.method
    base = base_of(_method(method), settings.get("base") if flags.base is None else flags.base)
    parser = parser_for(method, base, command)
    script, config, model_args, mixture = parser.parse(argv, settings, source, _ANY_MACHINE if flags.dry_run else {})
    script.base = base
    for name, value in parser.said.items():
        check_text(name, value)
        setattr(config, name, value)
    by_flags = flags_said(argv)
    of_file = {"max_steps", "num_train_epochs"} <= settings.keys() - by_flags.keys()  # and not cut short by a flag
    if command == "train" and config.max_steps > 0 and ("num_train_epochs" in by_flags or of_file):
        logger.warning("no effect of num_train_epochs: the run has max_steps %d", config.max_steps)
    said = {**settings, **by_flags}
    check_adapter(said, source)
    check_loading(said, config.model_init_kwargs)
    check_for_trl(config)
    return script, config, model_args, mixture


def read_settings(
    config: str | None,
    recipe: str | None,
    method: str | None = None,
    base: str | None = None,
    has_default: bool = False,
) -> tuple[Settings, str]:
    """The settings of `--config` or `--recipe`, migrated, and the file; nothing without either. `method`, `base` and
    `has_default` are those of `migrate`.
    """
    check_text("config", config)
    source = config or ""
    if recipe is not None:
        from .recipes import recipe_path

        source = str(recipe_path(recipe))
    settings, notes = migrate(read_yaml(source), method, base, has_default) if source else ({}, [])
    for note in notes:
        logger.log(logging.WARNING if note.warns else logging.INFO, "%s", note)
    return settings, source


def parser_for(method: str | None, base: str, command: str = "train", *more: Any) -> OptionsParser:
    """The parser over the fields of a method's config on a base, and over those of `more`, which come first."""
    from ..trainers.configs import config_class

    first = {command.title(): [item.name for item in fields(kind)] for kind in more}
    parser = OptionsParser(
        command,
        *(*more, TrainArguments, config_class(_method(method), base), ModelConfig, DatasetMixtureConfig),
        scope=f"method {method or 'none'!r} on base {base!r}",
        flags_only=("recipe", "dry_run"),
        old_keys=OLD_KEYS,
        usage="%(prog)s [--config FILE | --recipe NAME] [options]",  # there are about two hundred
        groups=first | _groups(method, config_class(_method(method), base)),
    )
    import torch

    if not torch.accelerator.is_available():
        parser.set_defaults(bf16=False)  # TRL's default, and several times slower than fp32 there
    return parser


# What most runs set, in the order in which one thinks of it
_GROUPS = {
    "Method": """
        method base recipe config dry_run loss_type beta gamma_beta_ratio simpo_gamma reward
        learning_rate weight margin
    """,
    "Model": """
        model_name_or_path tokenizer_name_or_path chat_template dtype attn_implementation
        trust_remote_code use_peft lora_r lora_alpha lora_dropout lora_target_modules load_in_4bit
        train_only
    """,
    "Data": """
        dataset_name dataset_config dataset_train_split dataset_test_split eval_dataset_name
        datasets mixture_weights mixture_seed test_split_size score_columns prompt_column
        system_column max_length dataset_num_proc noise noise_seed
    """,
    "Training": """
        output_dir overwrite_output_dir resume_from_checkpoint num_train_epochs max_steps
        per_device_train_batch_size gradient_accumulation_steps per_device_eval_batch_size optim
        lr_scheduler_type warmup_steps weight_decay max_grad_norm seed bf16 use_cpu
        activation_checkpointing eval_strategy eval_steps eval_min_score_gap save_strategy
        save_steps save_total_limit load_best_model_at_end metric_for_best_model logging_steps
        report_to log_histograms run_name push_to_hub hub_model_id
    """,
}


def _groups(method: str | None, config: Any) -> dict[str, list[str]]:
    """With the options of the method's terms, and those of this package that every method has."""
    from ..trainers.configs import TRL_FIELDS

    groups = {title: names.split() for title, names in _GROUPS.items()}
    row = None if method in (None, "none") else get_method(str(method))
    kinds = {"weight": WEIGHTS, "margin": MARGINS}
    of_method = [term_class(kind, name) for kind in kinds for name in names_of(getattr(row, kind, None))]
    of_terms = tuple(term_class(kind, name).option_prefix for kind, names in kinds.items() for name in names)
    named = {name for names in groups.values() for name in names}
    own = [item.name for item in fields(config) if item.init and item.name not in TRL_FIELDS | named]
    mine = tuple(term.option_prefix for term in of_method)
    groups["Method"] += [name for name in own if name.startswith(mine)]
    groups["All methods"] = [name for name in own if not name.startswith(of_terms) and name not in OPTIONS]
    return groups


def _method(name: str | None) -> str | None:
    return None if name == "none" else name


# Trainer -------------------------------------------------------------------------------------------------------------


def build_trainer(script: TrainArguments, config: Any, model_args: ModelConfig, mixture: DatasetMixtureConfig) -> Any:
    """The trainer that the arguments describe."""
    from ..trainers.named import trainer_of

    train, evals, tokenizer = inputs_of(script, config, model_args, mixture)
    name = str(model_args.model_name_or_path)
    # TRL makes a single name a text, and PEFT takes a text for a pattern of whole names
    if isinstance(only := model_args.lora_target_modules, str) and only.isidentifier():
        model_args.lora_target_modules = [only]
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
        check_model(name, revision=init["revision"], trust_remote_code=init["trust_remote_code"])
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

    first = first_row(dataset, "train")
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
    named = Named(config.prompt_column, config.system_column, config.score_columns)
    if mixture.datasets:
        name, splits = "datasets", mixture_splits(mixture, script.mixture_weights, script.mixture_seed, named)
    else:
        name = str(script.dataset_name)
        splits = load_splits(name, script.dataset_config, script.dataset_streaming, decoded=IMAGES)
    test = script.dataset_test_split
    held_out = mixture.datasets and test not in splits
    evaluates = evaluates_while_training(config)
    own = evaluates and not (script.eval_dataset_name or held_out)
    check_splits(splits, script.dataset_train_split, test if own else None, name)
    train = pick_split(splits, script.dataset_train_split, name)
    evals = pick_split(splits, test, name) if own else None
    if script.eval_dataset_name:
        splits = load_splits(script.eval_dataset_name, decoded=IMAGES)
        name, nobody_said = script.eval_dataset_name, test == TrainArguments.dataset_test_split
        # the only split of a file is called train, whatever it is for
        any_name = (nobody_said or Path(name).expanduser().is_file()) and not is_slice(test, splits)
        any_name = any_name and len(splits) == 1
        return train, pick_split(splits, None if any_name else test, name, "--dataset_test_split")
    if held_out and evaluates:
        return train, mixture_test_split(mixture, test, named)
    return train, evals
