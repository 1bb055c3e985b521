"""What every subcommand does first: speak up, choose a precision, find model and tokenizer."""

from __future__ import annotations

import logging
from argparse import ArgumentParser
from pathlib import Path
from typing import Any


def log_to_console() -> None:
    """Shows this package's info lines; the libraries keep their own level."""
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    logging.getLogger("trl_margins").setLevel(logging.INFO)


def plain_precision_on_cpu(parser: ArgumentParser) -> None:
    """TRL trains in bf16 by default, several times slower than fp32 on a CPU; a flag or a YAML key still decides."""
    import torch

    if not torch.accelerator.is_available():
        parser.set_defaults(bf16=False)


def load_model(name: str, trainable: bool = False, **kwargs: Any) -> Any:
    """The model of a folder, a Hub id or `bundled:NAME`, in the class of its config; an adapter on its base, frozen
    unless it is to be trained on.
    """
    from trl.trainer.utils import create_model_from_path

    from ..data.bundled import resolve_model

    path = resolve_model(name)
    if (Path(path) / "adapter_config.json").exists():
        from peft import AutoPeftModelForCausalLM

        return AutoPeftModelForCausalLM.from_pretrained(path, is_trainable=trainable, **kwargs)
    return create_model_from_path(path, **kwargs)


def load_tokenizer(name: str, **kwargs: Any) -> Any:
    """Its tokenizer."""
    from transformers import AutoTokenizer

    from ..data.bundled import resolve_model

    return AutoTokenizer.from_pretrained(resolve_model(name), **kwargs)
