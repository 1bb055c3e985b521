"""Whether a model's files have all of its weights. What they lack, transformers and PEFT draw at random, and say so in
a table or a warning.
"""

from __future__ import annotations

import copy
import functools
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from peft import PeftType, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import CONFIG_NAME as ADAPTER_CONFIG_NAME
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from .fingerprints import place_of

logger = logging.getLogger(__name__)

_REPORT = "transformers.modeling_utils"  # whose logger says what was missing
_ROW = re.compile(r"^(.+?)\s*\|\s*(?:\x1b\[[\d;]*m)*(MISSING|MISMATCH)\b", re.MULTILINE)
_NO_ADAPTER = "Found missing adapter keys"


@contextmanager
def whole_weights(name: Any = None) -> Iterator[None]:
    """Models that are loaded within the block have all of their weights.

    Args:
        name: of the model, for the error.

    Raises:
        ValueError: one has not, or has some of other shapes; with the names of some.
    """
    found: dict[str, list[str]] = {"MISSING": [], "MISMATCH": []}
    which = f"the model {name!r}: " if isinstance(name, str) else ""

    def note(record: logging.LogRecord) -> bool:
        for tensor, status in _ROW.findall(record.getMessage()):
            found[status].append(tensor)
        return True

    reporting = logging.getLogger(_REPORT)
    reporting.addFilter(note)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", _NO_ADAPTER)
            yield
    except UserWarning as error:
        if not str(error).startswith(_NO_ADAPTER):
            raise
        raise ValueError(f"{which}{str(error)[:300]}. They would be drawn at random") from None
    except RuntimeError as error:
        if not found["MISMATCH"]:
            raise
        others = _some(found["MISMATCH"])
        raise ValueError(f"{which}its files have other shapes than its config.json: {others}") from error
    finally:
        reporting.removeFilter(note)
    if found["MISSING"]:
        raise ValueError(
            f"{which}its files have no weights for {_some(found['MISSING'])}, which would be drawn at random: its "
            "config.json is another model's, or a part of it was saved alone"
        )


def _some(names: list[str]) -> str:
    return ", ".join(sorted(names)[:3]) + (" and others" if len(names) > 3 else "")


def adapter_tensors(folder: str | Path) -> set[str]:
    """The names of the tensors in an adapter's file; empty without one."""
    file = Path(folder, SAFETENSORS_WEIGHTS_NAME)
    if not file.is_file():
        return set()
    with safe_open(file, "pt") as saved:
        return {*saved.keys()}


def is_converted(model: Any) -> bool:
    """Whether transformers saves some tensors by other names or in other shapes than the model has them, as those of
    GPT-NeoX and of most mixtures of experts: the Hub has them in that form.
    """
    if not isinstance(model, PreTrainedModel):
        return False
    of_its_files = getattr(model, "_weight_conversions", None)  # of a model that was loaded
    return bool(of_its_files or get_model_conversion_mapping(model, add_legacy=False))


def has_weights(folder: str | Path) -> bool:
    """Whether there is a file of a whole model's weights, or their index."""
    names = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME)
    return any(Path(folder, name).is_file() for name in names)


def _renamings_of_ones_own(model: PreTrainedModel) -> dict[str, str]:
    """`key_mapping`, by which a model was loaded, and by which it is saved."""
    known = [each.source_patterns for each in get_model_conversion_mapping(model)]
    own = [each for each in getattr(model, "_weight_conversions", None) or () if each.source_patterns not in known]
    return {
        source: target
        for each in own
        if type(each) is WeightRenaming
        for source, target in zip(each.source_patterns, each.target_patterns, strict=True)
    }


def load_converted(model: PreTrainedModel, folder: str | Path) -> None:
    """Loads a saved model's weights into one that `is_converted`, by `from_pretrained`, which converts them back.

    Raises:
        ValueError: the files do not have all of its weights, or an adapter lies among them, and would be loaded.
    """
    if (adapter := Path(folder, ADAPTER_CONFIG_NAME)).exists():
        raise ValueError(
            f"{adapter} is an adapter's, and the model is a whole one: move the adapter's files elsewhere"
        )
    weights = [each for each in model.state_dict().values() if each.is_floating_point()]
    widest = functools.reduce(torch.promote_types, {each.dtype for each in weights})  # so that nothing is rounded
    with whole_weights(str(folder)):
        saved = type(model).from_pretrained(
            folder, config=copy.deepcopy(model.config), dtype=widest, key_mapping=_renamings_of_ones_own(model) or None
        )
    model.load_state_dict(saved.state_dict())


def warn_of_unread_tensors(model: Any, folder: str | Path) -> None:
    """Names the tensors of an adapter's file for which its configuration leaves no place; PEFT leaves them out."""
    if not (saved := adapter_tensors(folder)):
        return
    extra = sorted(saved - {*get_peft_model_state_dict(model, save_embedding_layers=True)})
    if extra:
        logger.warning(
            "%s: its adapter_config.json has no place for %d of its tensors, which are left out: %s is one",
            *(folder, len(extra), extra[0]),
        )


def check_saved(model: Any) -> None:
    """
    Raises:
        ValueError: weights below an adapter train, and would be in no file: PEFT saves the adapter alone.
    """
    if not is_peft_model(model) or not isinstance(model.base_model, BaseTuner):
        return
    adapters = {*model.peft_config}
    below = {
        name: weight
        for name, weight in model.named_parameters()
        if weight.requires_grad and weight.numel() and not adapters & {*name.split(".")}
    }
    for embeddings in (False, "auto"):  # some of which PEFT saves, too: then it looks at the base model's files
        if not below:
            return
        saved = get_peft_model_state_dict(model, save_embedding_layers=embeddings).values()
        places = {*map(place_of, saved)}
        below = {name: weight for name, weight in below.items() if place_of(weight) not in places}
    if below:
        raise ValueError(
            f"{_some([*below])} would train below the adapter, and neither a checkpoint nor the saved adapter would "
            "have them: name their modules in the adapter's modules_to_save, or freeze them (requires_grad_(False))"
        )


def why_not_loaded(model: Any) -> str | None:
    """Why no checkpoint's adapter can be loaded into training; None if it can.

    Of virtual tokens that are computed, PEFT saves what was computed, and puts it in the place of what they are
    computed from: loaded, the adapter would be another one.
    """
    for adapter in model.peft_config.values() if is_peft_model(model) else ():
        are_trained = adapter.peft_type in (PeftType.PROMPT_TUNING, PeftType.PREFIX_TUNING)
        if adapter.is_prompt_learning and (not are_trained or getattr(adapter, "prefix_projection", False)):
            kind = adapter.peft_type.value
            return f"PEFT saves the virtual tokens of a {kind} adapter, and not what is trained to compute them"
        if getattr(adapter, "save_only_topk_weights", False):
            return "with save_only_topk_weights, PEFT saves a part of what VB-LoRA trains"
    return None
