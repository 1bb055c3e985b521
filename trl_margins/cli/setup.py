"""What every subcommand does first: speak up, choose a precision, find model and tokenizer."""

from __future__ import annotations

import json
import logging
import tempfile
from argparse import ArgumentParser
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

DTYPES = ("float32", "bfloat16", "float16", "auto")


def log_to_console() -> None:
    """Shows this package's info lines; the libraries keep their own level."""
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    logging.getLogger("trl_margins").setLevel(logging.INFO)


def plain_precision_on_cpu(parser: ArgumentParser) -> None:
    """TRL trains in bf16 by default, several times slower than fp32 on a CPU; a flag or a YAML key still decides."""
    import torch

    if not torch.accelerator.is_available():
        parser.set_defaults(bf16=False)


def check_writable(folder: str | Path) -> None:
    """Makes a folder, and sees whether files can be put there: before hours of work.

    Raises:
        OSError: they cannot.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(
            f"{folder} cannot be written to ({error.strerror or error}): name another folder, or make room"
        ) from error


def find_model(name: str) -> str:
    """The folder or Hub id of a model or an adapter, by its name.

    Raises:
        ValueError: a folder that is not there or holds no model, or an adapter's whose base is not there.
    """
    from ..data.bundled import resolve_model

    path = resolve_model(name)
    folder = Path(path).expanduser()
    if not folder.is_dir():
        if folder.is_absolute() or path.startswith((".", "~")) or path.count("/") > 1:
            raise ValueError(
                f"there is no model folder {name}: give a folder, a Hub id, or bundled:smollm2-135m-instruct"
            )
        return path
    adapter = folder / "adapter_config.json"
    if adapter.is_file():
        base = json.loads(adapter.read_text(encoding="utf-8")).get("base_model_name_or_path")
        try:
            if base:  # else PEFT says that there is none
                find_model(base)
        except ValueError as error:
            raise ValueError(
                f"the base of the adapter {name} is missing: {error}. Where it has moved, say so in {adapter}, as "
                "base_model_name_or_path"
            ) from error
    elif not (folder / "config.json").is_file():
        inside = sorted(path.parent.name for path in folder.glob("*/config.json"))
        hint = f", but {', '.join(inside)} in it: name one of these" if inside else ""
        raise ValueError(f"{name} holds no model (it has neither config.json nor adapter_config.json){hint}")
    return str(folder)


@contextmanager
def _named(what: str, name: str) -> Iterator[None]:
    """An error in the block names what could not be loaded, and what to do."""
    try:
        yield
    except (OSError, ValueError) as error:
        from huggingface_hub.constants import HF_HUB_OFFLINE

        if HF_HUB_OFFLINE and not Path(name).exists() and isinstance(error, OSError):
            reason = (
                "it is no folder and in no cache, and HF_HUB_OFFLINE keeps the Hub from being asked. Unset that, "
                f"fetch it before (hf download {name}), or give a folder"
            )
        else:
            reason = " ".join(str(error).split())
        raise ValueError(f"the {what} {name!r} cannot be loaded: {reason}") from error


def load_model(name: str, trainable: bool = False, **kwargs: Any) -> Any:
    """The model of a folder, a Hub id or `bundled:NAME`, in the class of its config; an adapter on its base, frozen
    unless it is to be trained on.

    Raises:
        ValueError: it is not there, or cannot be loaded.
    """
    from trl.trainer.utils import create_model_from_path

    path = find_model(name)
    with _named("model", name):
        if (Path(path) / "adapter_config.json").exists():
            from peft import AutoPeftModelForCausalLM

            return AutoPeftModelForCausalLM.from_pretrained(path, is_trainable=trainable, **kwargs)
        return create_model_from_path(path, **kwargs)


def load_tokenizer(name: str, **kwargs: Any) -> Any:
    """Its tokenizer.

    Raises:
        ValueError: it is not there, or cannot be loaded.
    """
    from transformers import AutoTokenizer

    path = find_model(name)
    with _named("tokenizer", name):
        return AutoTokenizer.from_pretrained(path, **kwargs)
