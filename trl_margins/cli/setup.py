"""What subcommands do first: check folders, find and load model and tokenizer."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..disk import check_writable

logger = logging.getLogger(__name__)

WEIGHTS = (".safetensors", ".bin", ".jinja")  # suffixes of the files that make a model what it is
SHORT = (LookupError, AttributeError, AssertionError, TypeError)  # errors whose text does not stand alone
# suffixes of files that no command writes as text, or only one of them
_OTHER_FORMATS = {".csv", ".tsv", ".parquet", ".xlsx", ".yaml", ".html", ".png", ".svg", ".pdf", ".gz", ".md"}
MAX_LENGTH = 1024  # of a model that this package did not train


def check_files(
    outputs: Iterable[str | Path | None], inputs: Iterable[str | Path] = (), continues: bool = False
) -> None:
    """Checks that these files can be written, each beside the others and none in the place of an input, before hours
    of work, and says which are there. None stands for a file that nobody wants.

    Args:
        outputs: the files.
        inputs: what is read.
        continues: a file that is there is kept and added to.

    Raises:
        ValueError: a folder, a file that is named twice, or one that is read.
        OSError: a file that cannot be written.
    """
    read = (Path(name) for name in inputs if "\0" not in str(name))
    places: dict[Path, str] = {name.expanduser().resolve(): "is read, and would be lost" for name in read}
    for file in (Path(name) for name in outputs if name is not None):
        if file.is_dir():
            raise ValueError(f"{file} is a folder: name a file in it")
        if why := places.get(file.resolve()):
            raise ValueError(f"{file} {why}: name another file")
        if file.exists() and not file.is_file():
            continue  # a console or a pipe, which must be opened only once
        places[file.resolve()] = "is to be written twice"
        check_writable(file.parent)
        is_new = not file.exists()
        if not (is_new or continues) and file.stat().st_size:
            logger.warning("%s is there, and will be written over", file)
        try:
            with file.open("ab"):
                pass
        except OSError as error:
            raise OSError(f"{file} cannot be written ({error.strerror or error}): name another file") from error
        if is_new:
            file.unlink(missing_ok=True)  # another process may have done so


def check_format(file: str | None, name: str, suffix: str) -> None:
    """
    Args:
        file: None stands for a file that nobody wants.
        name: of its format.
        suffix: as files of this format have it.

    Raises:
        ValueError: the file's own is another format's.
    """
    path = Path(file or "")
    if path.suffix.lower() in _OTHER_FORMATS - {suffix}:
        raise ValueError(f"{file} would hold {name}: name it {path.stem}{suffix}")


def find_model(name: str) -> str:
    """The folder or Hub id of a model or an adapter.

    Raises:
        ValueError: a folder that does not exist or contains no model, or an adapter whose base model is missing.
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
        base = _object_in(adapter).get("base_model_name_or_path")
        if not base or not isinstance(base, str) or Path(base).resolve() == folder.resolve():
            raise ValueError(
                f"{adapter} names no base model: base_model_name_or_path is {base!r}. Set it to the folder or the Hub "
                "id of the model that the adapter was trained on"
            )
        try:
            find_model(base)
        except ValueError as error:
            raise ValueError(
                f"the base model of the adapter {name} is missing: {error}. If it has moved, set "
                f"base_model_name_or_path in {adapter}"
            ) from error
    elif not (folder / "config.json").is_file():
        inside = sorted(path.parent.name for path in folder.glob("*/config.json"))
        hint = f", but {', '.join(inside)} in it: name one of these" if inside else ""
        raise ValueError(f"{name} contains no model (neither config.json nor adapter_config.json){hint}")
    return str(folder)


def _object_in(file: Path) -> dict[str, Any]:
    from ..report.run_folder import read_json  # with NumPy, which light commands do without

    return read_json(file)


def adapter_of(name: str) -> dict[str, Any]:
    """The config of an adapter in a folder; empty of another model."""
    file = Path(find_model(name)) / "adapter_config.json"
    return _object_in(file) if file.is_file() else {}


def base_of(name: str) -> str:
    """`find_model`'s folder or Hub id; of an adapter, its base model's."""
    adapter = adapter_of(name)
    return base_of(adapter["base_model_name_or_path"]) if adapter else find_model(name)


def digest_of_files(path: Path, kinds: Sequence[str] = WEIGHTS) -> str:
    """Of a file, or of those of these kinds in a model's folder."""
    digest = hashlib.sha256()
    for file in sorted(each for each in path.iterdir() if each.suffix in kinds) if path.is_dir() else [path]:
        with file.open("rb") as opened:
            while block := opened.read(2**20):
                digest.update(block)
    return digest.hexdigest()[:8]


def weights_of(name: str) -> dict[str, str]:
    """What tells a model in a folder from another one that was in the same folder; empty for a Hub id."""
    folder = Path(find_model(name))
    return {"weights": digest_of_files(folder)} if folder.is_dir() else {}


@contextmanager
def _loading(what: str, name: str) -> Iterator[None]:
    """Errors of the block say what could not be loaded, and the fix."""
    try:
        yield
    except (ImportError, MemoryError):  # which say what is missing
        raise
    except Exception as error:  # of a damaged file, libraries raise all kinds
        if type(error).__name__ == "OutOfMemoryError":  # torch's
            raise
        from huggingface_hub.constants import HF_HUB_OFFLINE

        reason = " ".join(str(error).split()) or "it says no more"
        if isinstance(error, SHORT):  # a key or a name alone says little
            reason = f"{type(error).__name__}: {reason}. Look at its config.json and its other files"
        if isinstance(error, OSError) and not Path(name).exists():
            offline = " (HF_HUB_OFFLINE is set)" if HF_HUB_OFFLINE else ""
            reason += f"{offline} Give a folder, or download it first: hf download {name}"
        raise ValueError(f"the {what} {name!r} cannot be loaded: {reason}") from error


def load_model(name: str, trainable: bool = False, **kwargs: Any) -> Any:
    """The model of a folder, a Hub id or `bundled:NAME`, in the class that its config names.

    An adapter is loaded on its base model, frozen unless `trainable`.

    Raises:
        ValueError: it does not exist or cannot be loaded.
    """
    from trl.trainer.utils import create_model_from_path

    from ..trainers.loaded import warn_of_unread_tensors, whole_weights
    from ..trainers.weights import broken_names, is_broken

    path = find_model(name)
    if trainable:
        _check_goes_on(name, path)
    with _loading("model", name):
        if (Path(path) / "adapter_config.json").exists():
            if list(Path(path).glob("model*.safetensors")):
                logger.warning("%s has a model and an adapter: the adapter is loaded, on its own base model", path)
            from peft import AutoPeftModelForCausalLM

            with whole_weights():
                model = AutoPeftModelForCausalLM.from_pretrained(path, is_trainable=trainable, **kwargs)
            warn_of_unread_tensors(model, path)
        else:
            with whole_weights():
                model = create_model_from_path(path, **kwargs)
        weights = dict(model.named_parameters())
        if is_broken(weights):  # one value from the device, and not one of each tensor
            names = broken_names(weights)
            logger.warning(
                "%s: %d of its weight tensors hold NaN or infinity, %s among them", name, len(names), names[0]
            )
        return model


def _check_goes_on(name: str, path: str) -> None:
    """
    Raises:
        ValueError: an adapter that PEFT loads for use alone.
    """
    if (Path(path) / "adapter_config.json").is_file():
        from peft import PeftConfig

        config = PeftConfig.from_pretrained(path)
        if config.is_prompt_learning:
            raise ValueError(
                f"{name} is an adapter of virtual tokens ({config.peft_type.value}), whose training PEFT cannot go on "
                f"with: train a new one on its base model, {config.base_model_name_or_path}, or name that model here"
            )


def check_model(name: str, **kwargs: Any) -> None:
    """What can be seen of a model without loading it.

    Raises:
        ValueError: a config that does not describe a model, or a file of its weights that is damaged.
    """
    import torch
    import transformers

    from ..trainers.folder import weight_files
    from ..trainers.whole import damage_of

    config = load_config(name, **kwargs)
    architecture = getattr(transformers, next(iter(config.architectures or [""])), None)
    if architecture is not None:  # else it has code of its own
        with _loading("model", name), torch.device("meta"):  # without its weights
            architecture(config)
    for file in weight_files(find_model(name)):
        if damage := damage_of(file):
            raise ValueError(f"the model {name!r} cannot be loaded: its {file.name} {damage}")


def load_config(name: str, **kwargs: Any) -> Any:
    """The config of a model; of an adapter, its base model's.

    Raises:
        ValueError: it does not exist or cannot be loaded.
    """
    from transformers import AutoConfig

    with _loading("model", name):
        return AutoConfig.from_pretrained(base_of(name), **kwargs)


def load_tokenizer(name: str, **kwargs: Any) -> Any:
    """The tokenizer of a model; of an adapter that was saved without one, its base model's.

    Raises:
        ValueError: it does not exist or cannot be loaded.
    """
    from transformers import AutoTokenizer

    path = find_model(name)
    if (Path(path) / "adapter_config.json").is_file() and not list(Path(path).glob("tokenizer*")):
        path = base_of(name)
    with _loading("tokenizer", name):
        return AutoTokenizer.from_pretrained(path, **kwargs)


def run_of(model: str) -> dict[str, Any]:
    """What the training run says of itself whose folder, or whose checkpoint, the model is in; empty without one."""
    from ..report.run_folder import INFO

    folder = Path(model).expanduser()
    file = next((file for file in (folder / INFO, folder.parent / INFO) if file.is_file()), None)
    return {} if file is None else _object_in(file)


def trained_as(models: Sequence[str]) -> dict[str, str]:
    """Of each model the one whose training run says how to treat it: itself, or without a run (as of the model that
    training started from) the first that has one.
    """
    of_runs = [name for name in models if run_of(name)]
    first = of_runs[:1]
    if first and (others := [name for name in models if name not in of_runs]):
        logger.info("%s: no training run, treated as %s", ", ".join(others), first[0])
    return {name: name if name in of_runs else (first or [name])[0] for name in models}


def trained_with(model: str, option: str) -> Any:
    """An option of the model's training run; None without one."""
    value = (run_of(model).get("config") or {}).get(option)
    if value is not None:
        logger.info("%s=%r, with which the model was trained", option, value)
    return value


def of_training(option: str, given: Any, models: Sequence[str], default: Any) -> Any:
    """The value given, else that of the first of these models that a training run has left, else the default."""
    found = (trained_with(model, option) for model in models) if given is None else (given,)
    return next((value for value in found if value is not None), default)


def max_length_of(given: int | None, model: str | None) -> int:
    """The `max_length` given, or that of the model's training run."""
    return of_training("max_length", given, [model] if model else [], MAX_LENGTH)
