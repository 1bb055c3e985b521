"""What a run is made of, as `margin_run.json` says it, and what of it all processes must have alike."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from itertools import chain
from typing import Any

from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from datasets.fingerprint import Hasher
from transformers.trainer import Trainer
from transformers.trainer_callback import ExportableState

from .. import __version__
from ..forward.head import causal_model
from ..pairs import SCORE_CHOSEN
from ..redaction import redacted
from ..registry import option_fields
from .base import MarginTrainer
from .card import adapter_options
from .fingerprints import of_arguments, of_columns, of_objects, of_optimizer, of_reference, of_rows, token_columns
from .loaded_optimizers import as_values, of_schedule, options_of, unwrapped
from .preparation import TRAIN
from .step_size import pairs_per_step

_OF_A_STREAM = 8  # rows
_OF_SAMPLING = ("use_seedable_sampler", "even_batches")  # of accelerator_config: by these the order of rows differs


def run_settings(trainer: MarginTrainer) -> dict[str, Any]:
    """A run's settings, for `margin_run.json`."""
    method, objective, rows = trainer.options.method, trainer.objective, trainer.train_dataset
    names = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    adapter = adapter_options(trainer.model) if is_peft_model(trainer.model) else None
    shares, of_reward = objective.losses, option_fields(type(objective.reward), "reward").values()
    reads_scores = SCORE_CHOSEN in objective.columns
    reference = getattr(trainer, "ref_model", None)
    reference = trainer.model if reference is None else reference  # an adapter's, with the adapter off
    optimizer = trainer.optimizer
    groups = getattr(optimizer, "param_groups", ())
    return {
        "version": __version__,
        "method": method and method.id,
        "name": method.name if method else type(trainer).__name__,
        "base": trainer._config_class._base,
        "trainer": type(trainer).__name__,
        "model": _name_of(trainer.model),
        "model_config": config_of(trainer.model),
        "reference": _name_of(reference) if objective.needs_reference else None,
        "reference_config": config_of(reference) if objective.needs_reference else None,
        "reference_types": types_of(reference) if objective.needs_reference else None,
        "reference_attention": _attention_of(reference) if objective.needs_reference else None,
        "fixed_weights": _weights_read(trainer),
        "reward": objective.reward.name,
        "weight": ", ".join(term.name for term in objective.weights) or None,
        "margin": ", ".join(term.name for term in objective.margins) or None,
        "term_options": [
            *trainer.options.term_options("weight"),
            *trainer.options.term_options("margin"),
            *objective.link_options,
        ],
        "reward_options": [name for name in of_reward if hasattr(trainer.args, name)],
        "loss_type": " + ".join(name if share == 1 else f"{share:g} {name}" for name, share in shares.items()),
        "beta": float(objective.beta),
        "gamma": float(objective.gamma),
        "label_smoothing": float(objective.label_smoothing),
        "discopop_tau": float(objective.discopop_tau),
        "score_columns": list(trainer.set_facts[TRAIN].score_columns) if reads_scores else None,
        "prompt_column": trainer.options.prompt_column or "prompt",
        "parts": _parts(trainer),
        "objects": {
            f"{part.name}.{name}": digest
            for part in _from_python(trainer)
            for name, digest in of_objects(part).items()
        },
        "optimizer": None if trainer._made_optimizer else of_optimizer(unwrapped(optimizer), trainer.model),
        "optimizer_options": None if trainer._made_optimizer or not groups else list(map(options_of, groups)),
        "optimizer_arguments": None if trainer._made_optimizer or not groups else of_arguments(unwrapped(optimizer)),
        "optimizer_class": _class_given(trainer),
        **_schedule_given(trainer),
        "adapter": json.loads(json.dumps(adapter, default=str)),
        "attention": _attention_of(trainer.model),
        "experts": getattr(causal_model(trainer.model).config, "_experts_implementation", None),
        "weight_types": types_of(trainer.model),
        "precision": trainer.accelerator.mixed_precision,  # which an environment variable may set, too
        "trained_parameters": f"{len(names)} tensors ({hashlib.sha256(' '.join(names).encode()).hexdigest()[:8]})",
        "train_rows": len(rows) if hasattr(rows, "__len__") else None,
        "rows": of_rows(rows) if hasattr(rows, "__len__") else None,
        "columns": _columns_read(trainer) if hasattr(rows, "__len__") else None,
        "evaluation_sets": _evaluation_sets(trainer),
        "pairs_per_step": pairs_per_step(trainer),
        "processes": trainer.accelerator.num_processes,
        "sampling": {name: getattr(trainer.args.accelerator_config, name) for name in _OF_SAMPLING},
        "config": config_options(trainer.args),
    }


def _class_given(trainer: MarginTrainer) -> str | None:
    """The class that makes the optimizer, and its arguments, where they are not those of the config."""
    given = trainer.optimizer_cls_and_kwargs
    if given is None and type(trainer).get_optimizer_cls_and_kwargs is Trainer.get_optimizer_cls_and_kwargs:
        return None
    kind, options = given or trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)
    return f"{kind.__name__} {as_values(options)}"


def _schedule_given(trainer: MarginTrainer) -> dict[str, Any]:
    """What a schedule of one's own was when it was given: a second call of `train` goes on with it."""
    schedule = None if trainer._made_schedule else unwrapped(trainer.lr_scheduler)
    if schedule is None:
        return {"schedule": None, "schedule_arguments": None}
    if trainer._first_schedule[0] is not schedule:
        trainer._first_schedule = schedule, of_schedule(schedule)
    return {"schedule": type(schedule).__name__, "schedule_arguments": trainer._first_schedule[1]}


def _evals(trainer: MarginTrainer) -> Mapping[str, Any]:
    """The evaluation sets by name; one alone has none."""
    evals = trainer.eval_dataset
    return evals if isinstance(evals, Mapping) else {"": evals}


def _of_streams(trainer: MarginTrainer) -> list[str]:
    """Digests of the first rows of each stream."""
    sets = (trainer.train_dataset, *_evals(trainer).values())
    return [Hasher.hash([*rows.take(_OF_A_STREAM)]) for rows in sets if isinstance(rows, IterableDataset)]


def _evaluation_sets(trainer: MarginTrainer) -> dict[str, str]:
    """Digests of those that are no streams."""
    sets = _evals(trainer).items()
    return {name: f"{len(rows)} rows ({of_rows(rows)})" for name, rows in sets if isinstance(rows, Dataset)}


# of the config: what a launcher, or a user, gives each process of its own
_OF_ONE_RANK = ("local_rank", "logging_dir", "run_name", "log_level", "log_level_replica", "disable_tqdm", "report_to")


# of the settings: what a script has made. Weights are not all there where FSDP loads them on one process
_MADE = (
    *("weight", "margin", "reference", "evaluation_sets", "parts", "optimizer", "optimizer_arguments", "schedule"),
    *("schedule_arguments", "adapter", "trained_parameters", "weight_types", "attention", "experts"),
    *("reference_attention", "precision"),
)


def exported_states(trainer: MarginTrainer) -> list[Any]:
    """The callbacks with a state."""
    return [each for each in trainer.callback_handler.callbacks if isinstance(each, ExportableState)]


def config_options(config: Any) -> dict[str, Any]:
    """A config's fields, as JSON has them."""
    options: dict[str, Any] = json.loads(config.to_json_string())
    return redacted(options)  # TRL's own config has secrets


def options_of_every_rank(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those that have to be the same on all processes."""
    return {name: value for name, value in options.items() if name not in _OF_ONE_RANK}


def of_every_rank(trainer: MarginTrainer, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What has to be the same on all processes."""
    columns = ", ".join(f"{name} {digest}" for name, digest in (settings["columns"] or {}).items())
    groups = [
        as_values({name: value for name, value in group.items() if name != "params"})
        for group in getattr(trainer.optimizer, "param_groups", ())
    ]
    schedule = trainer.lr_scheduler
    return {
        **options_of_every_rank(settings["config"]),
        "training set": f"{settings['train_rows']} rows ({columns})",
        **{f"the model's {name}": value for name, value in settings["model_config"].items()},
        **{f"the reference model's {name}": value for name, value in (settings["reference_config"] or {}).items()},
        "order of evaluation sets": [*_evals(trainer)],
        "score columns": [*(trainer.set_facts[TRAIN].score_columns or ())],  # which the pair log has, too
        "first rows of streams": _of_streams(trainer) if trainer.accelerator.num_processes > 1 else None,
        **{name: settings[name] for name in (*_MADE, *(() if trainer.is_fsdp_enabled else ("fixed_weights",)))},
        **{f"optimizer's {name}": [group.get(name) for group in groups] for name in dict.fromkeys(chain(*groups))},
        "schedule's rates": schedule and schedule.get_last_lr(),
        "compute_metrics": trainer.compute_metrics is not None,
        "callbacks": [f"{type(each).__name__} {each.state().get('args')}" for each in exported_states(trainer)],
    }


def _parts(trainer: Any) -> dict[str, Any]:
    """The options of those parts of the objective that no config describes."""
    objective = trainer.objective
    found = {
        f"{part.name}.{name}": value for part in _from_python(trainer) for name, value in of_arguments(part).items()
    }
    of_links = {
        f"{link.name}.{name}": float(objective.link_options.get(name, default))
        for link in objective.links
        for name, default in link.options
    }
    return {**found, **of_links} if "objective" in trainer.from_python else found


def _from_python(trainer: Any) -> list[Any]:
    """The terms, and the reward, that no config describes."""
    objective, whole = trainer.objective, "objective" in trainer.from_python
    parts = [term for kind, term in objective.named_terms if whole or f"{kind}_term" in trainer.from_python]
    return [*parts, objective.reward] if whole else parts


# of a model's config: what computes nothing, or has a setting of its own
_NOT_COMPUTED = (
    *("transformers_version", "architectures", "dtype", "torch_dtype", "use_cache", "_name_or_path"),
    *("initializer_range", "bos_token_id", "eos_token_id", "pad_token_id"),
    *("output_hidden_states", "output_attentions", "return_dict", "keys_to_ignore_at_inference"),
    *("id2label", "label2id", "problem_type", "task_specific_params"),
)


def config_of(model: Any) -> dict[str, Any]:
    """What of a model's config is not its class's default."""
    found = json.loads(json.dumps(causal_model(model).config.to_diff_dict(), default=str))
    return redacted(_computed(found))


def _computed(config: Mapping[str, Any]) -> dict[str, Any]:
    """Also within the configs of a model's parts."""
    return {
        name: _computed(value) if isinstance(value, Mapping) else value
        for name, value in config.items()
        if name not in _NOT_COMPUTED
    }


def types_of(model: Any) -> str:
    """Those of a model's weights."""
    return ", ".join(sorted({str(each.dtype).removeprefix("torch.") for each in model.parameters()}))


def _attention_of(model: Any) -> str | None:
    return getattr(causal_model(model).config, "_attn_implementation", None)


def _name_of(model: Any) -> str:
    return str(causal_model(model).config.name_or_path)  # DeepSpeed wraps the reference, too


def _columns_read(trainer: MarginTrainer) -> dict[str, str]:
    """Digests of all rows: of their tokens, and of each column that a term reads."""
    rows, read = trainer.train_dataset, trainer.objective.columns
    tokens = token_columns(rows)
    scores = trainer.set_facts[TRAIN].score_columns if SCORE_CHOSEN in read else None
    found = of_columns(rows, [*tokens, *(scores or ()), *read])
    of_tokens = "".join(found.pop(name) for name in tokens)
    return {"tokens": hashlib.sha256(of_tokens.encode()).hexdigest()[:8], **found}


def _weights_read(trainer: MarginTrainer) -> str | None:
    """A digest of the weights below an adapter, and of a reference model's; not of one that follows the model."""
    follows = getattr(trainer.args, "sync_ref_model", False)
    if (precomputed_by := getattr(trainer, "precomputed_by", None)) is not None:
        return precomputed_by
    reference = getattr(trainer, "ref_model", None) if trainer.objective.needs_reference else None
    return None if follows else of_reference(trainer.model, reference)
