"""Values of TRL's and transformers' own fields that they refuse only after they have loaded a model, or with another
library's error.
"""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from accelerate.utils import is_deepspeed_available
from accelerate.utils.dataclasses import DynamoBackend
from torch.utils.checkpoint import checkpoint
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from ..checks import options_of, shown, unknown
from ..forward.checkpointing import NAMES
from ..links import LINKS, Link
from ..registry import find_link
from .elsewhere import elsewhere

logger = logging.getLogger(__name__)

_FILES = ("accelerator_config", "fsdp_config", "deepspeed")  # these fields can name one
# PyTorch's options of checkpointing, and transformers' two
_OF_CHECKPOINTING = [
    *(name for name, each in inspect.signature(checkpoint).parameters.items() if each.kind is each.KEYWORD_ONLY),
    *("preserve_rng_state", "every_n_layers", "offload"),
]


def check_for_trl(config: TrainingArguments) -> None:
    """
    Raises:
        ValueError: a value that its field cannot have.
    """
    mappings = {name: _mapping(config, name) for name in config._VALID_DICT_FIELDS}
    trackers = [config.report_to] if isinstance(config.report_to, str | None) else config.report_to
    known = ["all", "none", *INTEGRATION_TO_CALLBACK]
    if strange := [name for name in trackers if name not in known]:
        raise unknown("report_to", strange[0], known)
    if config.optim_args and not all(part.count("=") == 1 for part in config.optim_args.replace(" ", "").split(",")):
        raise ValueError(f"optim_args must be written NAME=VALUE, with commas between; it is {config.optim_args!r}")
    if config.save_steps == 0 and config.save_strategy == "steps":
        raise ValueError("save_steps must be a number, above 0, with save_strategy 'steps'; it is 0")
    if getattr(config, "train_sampling_strategy", None) == "batch_rebalance":
        raise ValueError(
            "train_sampling_strategy 'batch_rebalance' makes mini-batches of different numbers of pairs, which a step "
            "would not weigh alike: take 'group_by_length'"
        )
    dtype = mappings.get("model_init_kwargs", {}).get("dtype", "auto")
    meant = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
    if meant not in ("auto", None) and not isinstance(meant, torch.dtype):
        raise unknown("dtype of model_init_kwargs", dtype, ("auto", "bfloat16", "float16", "float32"))
    options = options_of(AcceleratorConfig)
    for name, value in mappings["accelerator_config"].items():
        if name not in options:
            raise unknown("key of accelerator_config", name, options)
        try:
            options[name].read(value)
        except ValueError as error:
            raise ValueError(f"accelerator_config: {error}") from None
    for field in (f"{name}_kwargs" for name in NAMES):
        if strange := [name for name in mappings.get(field, ()) if name not in _OF_CHECKPOINTING]:
            raise unknown(f"key of {field}", strange[0], _OF_CHECKPOINTING)
    backend, known = getattr(config, "torch_compile_backend", None), [each.lower() for each in DynamoBackend.list()]
    if backend is not None and backend.lower() not in known:
        raise unknown("torch_compile_backend", backend, known)
    mode = getattr(config, "torch_compile_mode", None)
    if mode is not None and (backend or "inductor").lower() == "inductor":
        from torch._inductor import list_mode_options  # takes its time to import

        if mode not in (modes := list_mode_options()):
            raise unknown("torch_compile_mode", mode, modes)
    if config.label_smoothing_factor:
        raise ValueError(
            f"label_smoothing_factor={config.label_smoothing_factor:g} is transformers', for a loss over all "
            "tokens, which no preference loss reads: leave it out. label_smoothing is that of the labels of pairs"
        )
    if config.fp16 and config.bf16:
        raise ValueError("fp16 and bf16 are both true, and a run computes in one of them: leave one out")
    if config.fsdp_config and not config.fsdp:
        logger.warning("no effect of fsdp_config: fsdp is off")
    if config.dataloader_persistent_workers and not config.dataloader_num_workers:
        raise ValueError(
            "dataloader_persistent_workers keeps workers, and dataloader_num_workers=0 starts none: set that to 1 or "
            "more, or leave the first out"
        )
    _check_schedule(config, mappings["lr_scheduler_kwargs"])


def check_installed(config: TrainingArguments) -> None:
    """
    Raises:
        ValueError: DeepSpeed's settings without DeepSpeed.
    """
    if config.deepspeed and not is_deepspeed_available():
        raise ValueError(f"deepspeed={shown(config.deepspeed)} needs the package of that name: pip install deepspeed")


@contextmanager
def naming_backend(config: TrainingArguments) -> Iterator[None]:
    """What accelerate says of a process group that it cannot have names the field that asks for it."""
    try:
        yield
    except ValueError as error:
        if config.ddp_backend and ("backend" in str(error) or "process group" in str(error)):
            raise ValueError(
                f"ddp_backend={config.ddp_backend!r} does not go with this device, or no launcher has started "
                f"processes ({str(error).rstrip('.')}): leave it out, and accelerate takes the device's own"
            ) from error
        raise


def _mapping(config: TrainingArguments, name: str) -> Mapping[str, Any]:
    """A field that is a mapping, or one as JSON; empty for a file's name."""
    value = getattr(config, name, None)
    if isinstance(value, list | tuple | set):
        raise ValueError(f"{name} must be a mapping, or one as JSON; it is {value!r}")
    if not isinstance(value, str):
        return value if isinstance(value, Mapping) else {}
    if name in _FILES and not value.startswith("{"):
        return {}
    try:
        if not value.startswith("{"):
            raise ValueError(f"it is {value!r}")
        found: dict[str, Any] = json.loads(value)
    except ValueError as error:
        raise ValueError(f"{name} must be a mapping, or one as JSON; {error}") from None
    return found


def _check_schedule(config: TrainingArguments, options: Mapping[str, Any]) -> None:
    """Makes the schedule of the learning rate, and looks at a few of its steps."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=config.learning_rate)
    try:
        schedule = get_scheduler(config.lr_scheduler_type, optimizer, 2, 10, dict(options) or None)
        for each in getattr(schedule, "lr_lambdas", ()):
            for step in (1, 5, 10):
                float(each(step))
    except Exception as error:  # each has its own
        kind = getattr(config.lr_scheduler_type, "value", config.lr_scheduler_type)
        raise ValueError(
            f"lr_scheduler_type {kind!r} does not go with lr_scheduler_kwargs {shown(dict(options))}: {error}"
        ) from error


def check_optimizer(config: TrainingArguments) -> None:
    """Warns of `optim_args` without which the optimizer would be the same.

    Raises:
        ValueError: a value that the optimizer does not take.
    """
    parts = (config.optim_args or "").replace(" ", "").split(",")
    if parts == [""]:
        return
    optim = getattr(config.optim, "value", config.optim)

    def made(parts: list[str]) -> Any:
        settings: Any = SimpleNamespace(**{**vars(config), "optim_args": ",".join(parts)})
        return Trainer.get_optimizer_cls_and_kwargs(settings)

    try:
        whole = made(parts)
        unread = [part for part in parts if made([each for each in parts if each != part]) == whole]
    except ImportError:  # another machine may have it
        return
    except Exception as error:
        raise ValueError(f"optim={optim!r} does not go with optim_args={config.optim_args!r}: {error}") from error
    if unread:
        logger.warning("no effect of optim_args %s: optim=%r does not read it", ",".join(unread), optim)


def find_loss(base: str, name: Any) -> Link:
    """The link of a `loss_type`.

    Raises:
        ValueError: an unknown name, with what there is instead.
    """
    try:
        return find_link(base, name)
    except ValueError as error:
        said = str(error).partition("; did you mean")[0]
        others = [{"method": "none", "base": each, "loss_type": name} for each in LINKS if name in LINKS[each]]
        theirs = elsewhere(name)
        settings = next(iter(others), (theirs.here or theirs.near) if theirs else None)
        if not settings:
            raise
        if theirs and theirs.near and theirs.remark:
            said += f". {theirs.remark.rstrip('.')}"
        instead = ", ".join(f"{key}: {json.dumps(each)}" for key, each in settings.items()).replace('"', "")
        raise ValueError(f"{said}. Instead, set {instead}") from None


def keep_best(config: TrainingArguments, metric: str | None) -> None:
    """Whether the best checkpoint is loaded at the end, and by what it is chosen: by default, the method's metric.

    Raises:
        ValueError: without evaluations there is no best.
    """
    evaluates = IntervalStrategy(config.eval_strategy) != IntervalStrategy.NO
    if config.load_best_model_at_end is None:
        config.load_best_model_at_end = evaluates
    saves = SaveStrategy(config.save_strategy)
    if not config.load_best_model_at_end and saves != SaveStrategy.BEST:
        return
    if not evaluates:
        raise ValueError(
            f"{'load_best_model_at_end' if config.load_best_model_at_end else 'save_strategy best'}: with "
            "eval_strategy='no' nothing is evaluated, so no checkpoint is the best. Set eval_strategy='steps' and "
            "eval_steps, or leave it out"
        )
    if config.metric_for_best_model is None:
        config.metric_for_best_model = metric or ("loss" if config.load_best_model_at_end else None)
    if saves == SaveStrategy.NO:
        config.save_strategy = SaveStrategy.BEST
        logger.warning(
            "save_strategy 'no' becomes 'best': the best checkpoint is loaded at the end, so each evaluation that is "
            "the best so far is saved (load_best_model_at_end=False saves none)"
        )
    elif saves != SaveStrategy.BEST:
        evaluated, saved = _how_often(config, "eval"), _how_often(config, "save")
        if saved != evaluated:
            logger.info(
                "checkpoints: saved every %s, evaluated every %s; each that is the best so far is saved as well",
                *(saved, evaluated),
            )


def _how_often(config: TrainingArguments, what: str) -> str:
    if IntervalStrategy(getattr(config, f"{what}_strategy")) == IntervalStrategy.EPOCH:
        return "epoch"
    steps = getattr(config, f"{what}_steps") or config.logging_steps
    return f"{steps:g} of all steps" if steps < 1 else f"{steps:g} steps"
