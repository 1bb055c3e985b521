"""The model card of a training: collects what the trainer knows, and has `report.card` write it."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from enum import Enum
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import is_peft_model
from huggingface_hub import ModelCard, model_info
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)
from trl import DPOTrainer
from trl.experimental.cpo import CPOTrainer
from trl.trainer.utils import get_config_model_id

from .. import __version__
from ..checks import default_of
from ..data.bundled import BUNDLED_MODELS, BUNDLED_PREFIX
from ..disk import write
from ..methods import Method
from ..objective import Objective
from ..registry import OPTIONS, option_fields
from ..report.card import CardFacts, Image, SetFacts, completed, display_name, hub_id
from ..report.card_results import logged_evaluations, read_report
from ..report.markdown import python_text
from ..report.run_folder import INFO, TRAINING, read_run
from ..zero3 import n_elements
from .configs import OF_FACTOR, MarginOptions, config_class, origin_of
from .folder import CARD, FIGURES, replace_links
from .preparation import OF_COLUMN, TRAIN
from .step_size import factors_of, pairs_per_step
from .whole import step_of

if TYPE_CHECKING:
    from trl.trainer.base_trainer import _BaseTrainer as TRLTrainer
else:
    TRLTrainer = object

logger = logging.getLogger(__name__)

TAGS = ("trl-margins", "preference-optimization")

_LOSS = ("loss_type", "loss_weights", "label_smoothing", "cpo_alpha", "alpha", "f_divergence_type")
_ONLY_IN_SCRIPT = ("bf16", "fp16", "score_columns", "eval_min_score_gap")
_ALWAYS_OF_PEFT = ("r", "lora_alpha", "lora_dropout", "target_modules")
_NEVER_OF_PEFT = ("peft_type", "task_type", "inference_mode", "base_model_name_or_path", "revision", "peft_version")


class CardMixin(TRLTrainer):
    """A trainer whose model card says what it trained, and how."""

    _method: Method | None
    reproduce: str | None = None  # the command that starts this training
    data_name: str | None = None  # of the data set, as it was given
    options: MarginOptions
    objective: Objective
    from_python: Sequence[str]
    set_facts: dict[str, SetFacts]

    def _take_names(self) -> None:
        """The name, paper and tags of the config's method, where the class has TRL's own; tags for search.

        It runs before TRL's `__init__`, which gives the tags to the model.
        """
        method, tags = self.options.method, list(type(self)._tag_names)
        if method and type(self)._name in (CPOTrainer._name, DPOTrainer._name):
            self._name, self._paper = method.name, method.paper.as_trl()
            tags += method.tags
        tags += [name for name in self.objective.losses if name == "simpo"]
        tags += [term.name for term in self.objective.terms]
        self._tag_names = list(dict.fromkeys([*tags, *TAGS]))

    def _warn_of_another(self, file: str | Path, model: str) -> None:
        """Of numbers that seem to be another model's: their file names none of this run's folder or repository."""
        folder, place = Path(str(self.args.output_dir)).resolve(), Path(model)
        place = place.parent if step_of(place) is not None else place  # a checkpoint
        is_here = place.exists() and place.resolve() == folder
        own = {"", folder.name, (self.args.hub_model_id or "").rpartition("/")[2]}  # "" of a dot
        if model and not is_here and ((place.exists() and place.name) or place.name not in own):
            logger.warning(
                "%s has the numbers of the model %s, and the card is of %s: if it is another, evaluate this one",
                file,
                model,
                self.args.output_dir,
            )

    def create_model_card(  # type: ignore[override] # TRL's signature, not that of transformers
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
        *,
        eval_dataset_name: str | None = None,
        reproduce: str | None = None,
        evaluation: str | Path | Sequence[str | Path] = (),
    ) -> None:
        """Writes `README.md` and `figures/` to the output folder: TRL's card, with what was trained, on what and how.

        During training (TRL writes a card with every checkpoint) no pictures are drawn. A card that cannot be written
        is a warning: it costs neither the run nor the model.

        Args:
            model_name: name of the model. Default: the name of the output folder.
            dataset_name: name of the training set. Linked if it can be a Hub id.
            tags: further tags.
            eval_dataset_name: name of the evaluation set, if it is not part of `dataset_name`.
            reproduce: command that starts this training. Default: `trainer.reproduce`, or a Python script.
            evaluation: files that `trl-margins evaluate --json` wrote for this model. Whether it was trained on their
                pairs is not known here.

        Raises:
            ValueError: a file in `evaluation` that another program wrote.
            TypeError: a name that is not text.
        """
        if not self.is_world_process_zero():
            return
        names = {"model_name": model_name, "dataset_name": dataset_name, "eval_dataset_name": eval_dataset_name}
        for argument, name in names.items():
            if not isinstance(name, str | None):
                raise TypeError(f"{argument} is {name!r}: give one name, as text; of several, joined as 'a and b'")
        if not all(isinstance(tag, str) for tag in ([tags] if isinstance(tags, str) else tags or ())):
            raise TypeError(f"tags is {tags!r:.80}: give texts, in a list")
        files = [evaluation] if isinstance(evaluation, str | Path) else [*evaluation]
        reports = list(map(read_report, files))
        for file, report in zip(files, reports, strict=True):
            self._warn_of_another(file, report.model)
        try:
            replace_links(Path(str(self.args.output_dir)))
            replace_links(Path(str(self.args.output_dir), FIGURES), "*")
            facts = card_facts(self, model_name, dataset_name, eval_dataset_name)
            command = reproduce or self.reproduce
            facts = dataclasses.replace(
                facts,
                reports=reports,
                images=[] if self.is_in_train else pictures(self),
                reproduce=command or python_script(self, facts),
                reproduce_language="bash" if command else "python",
            )
            file = Path(str(self.args.output_dir), CARD)
            before = file.with_name(f"_{CARD}.before")  # to move it back takes no room; uploads leave it out
            before.unlink(missing_ok=True)
            if file.is_file():
                file.replace(before)
            try:
                super().create_model_card(facts.model_name, dataset_name, tags)
                completed(ModelCard.load(file), facts).save(file)
                if facts.adapter:
                    _add_peft_entries(self, file)
            except BaseException:
                with suppress(OSError):
                    file.unlink(missing_ok=True)  # TRL's part of it, or less
                    if before.exists():
                        before.replace(file)
                raise
            before.unlink(missing_ok=True)
        except Exception as error:
            if not self.is_in_train and not isinstance(error, OSError):
                raise
            logger.warning(
                "the model card of %s cannot be written (%s: %s); trainer.create_model_card() writes it again",
                self.args.output_dir,
                type(error).__name__,
                error,
            )


def _add_peft_entries(trainer: Any, file: Path) -> None:
    """PEFT adds its entries, but drops the tags, and names the folder of the base model."""
    before = ModelCard.load(file).data
    trainer.accelerator.unwrap_model(trainer.model).create_or_update_model_card(str(file.parent))
    card = ModelCard.load(file)
    added = [tag for tag in card.data.tags or [] if not tag.startswith("base_model:")]
    if before.base_model:
        added.append(f"base_model:adapter:{before.base_model}")
    card.data.tags = list(dict.fromkeys([*(before.tags or []), *added]))
    card.data.base_model = before.base_model
    card.save(file)


# Facts


def card_facts(
    trainer: Any, model_name: str | None, dataset_name: str | None, eval_dataset_name: str | None
) -> CardFacts:
    """What a trainer knows, without pictures."""
    config, state, objective = trainer.args, trainer.state, trainer.objective
    folder = Path(config.output_dir).resolve().name
    evals, evaluations = trainer.eval_dataset, logged_evaluations(state.log_history, trainer.loaded_step)
    split = None if isinstance(evals, dict) else getattr(evals, "split", None)
    return CardFacts(
        model_name=model_name or folder,
        model_id=trainer.hub_model_id or folder,
        base_model=base_model(trainer),
        dataset_name=dataset_name,
        trained_with=trainer._name,
        version=__version__,
        reward=objective.reward.name,
        losses=objective.losses,
        method=trainer.options.method,
        weights=tuple(term.name for term in objective.weights),
        margins=tuple(term.name for term in objective.margins),
        gamma=objective.gamma,
        settings=settings(trainer),
        sets=list(trainer.set_facts.values()),
        evaluations=evaluations,
        trained_on={each.name: trainer.trained_on(each.name) for each in evaluations},
        min_score_gap=trainer.options.eval_min_score_gap,
        last_step=state.global_step,
        best_step=trainer.loaded_step,
        best_by=config.metric_for_best_model,
        eval_dataset_name=eval_dataset_name,
        eval_split=str(split) if split and str(split) != "train" else None,  # load_dataset calls every file train
        adapter=adapter_kind(trainer.model),
        license=_license(trainer),
        task=task_of(trainer.accelerator.unwrap_model(trainer.model)),
        chat=bool(getattr(trainer.processing_class, "chat_template", None)),
    )


def base_model(trainer: Any) -> str | None:
    name = get_config_model_id(trainer.model.config) or ""
    bundled = Path(name).parent.name  # the model is in a folder with the name of its version
    return BUNDLED_PREFIX + bundled if bundled in BUNDLED_MODELS else name or None


def task_of(model: Any) -> str | None:
    """transformers' pipeline for the model, which is the Hub's tag too; None for encoder-decoders of text."""
    base = model.get_base_model() if is_peft_model(model) else model
    name = type(base).__name__
    if name in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values():
        return "image-text-to-text"
    if name in MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.values():  # audio
        return "any-to-any"
    return None if getattr(base.config, "is_encoder_decoder", False) else "text-generation"


def _license(trainer: Any) -> dict[str, str]:
    """The base model's, as its card says; empty where that card cannot be read."""
    name = get_config_model_id(trainer.model.config)
    try:
        if Path(name, CARD).is_file():
            data = ModelCard.load(Path(name, CARD)).data
        elif trainer.is_in_train or not trainer.hub_model_id or not hub_id(name):
            return {}  # no request for a model that stays here
        else:
            data = model_info(name, timeout=5).card_data
    except Exception as error:  # the Hub's, the network's, or of a card that is no YAML
        logger.info("the model card has no license: that of %s cannot be read (%s)", name, type(error).__name__)
        return {}
    found = data.to_dict() if data else {}
    return {key: found[key] for key in ("license", "license_name", "license_link") if isinstance(found.get(key), str)}


def adapter_kind(model: Any) -> str | None:
    if not is_peft_model(model):
        return None
    kind = str(_plain(model.active_peft_config.peft_type))
    return {"LORA": "LoRA"}.get(kind, kind)


def pictures(trainer: Any) -> list[Image]:
    """Draws the run folder; nothing before training, without a pair log, or without matplotlib."""
    folder = Path(trainer.args.output_dir)
    if trainer._pair_log is None or not trainer.state.global_step or not (folder / INFO).is_file():
        return []
    if find_spec("matplotlib") is None:
        logger.info("no pictures for the model card: pip install 'trl-margins[report]'")
        return []
    try:
        from ..report.figures import draw_pictures
        from ..report.style import render

        run = read_run(folder)
    except (ValueError, FileNotFoundError) as error:  # matplotlib's too, of an MPLBACKEND that it does not have
        logger.warning("no pictures for the model card: %s", error)
        return []
    images: list[Image] = []
    try:
        for picture in draw_pictures([dataclasses.replace(run, name=trainer._name)]):
            file = folder / FIGURES / f"{picture.name}.png"
            if picture.figure is None:
                file.unlink(missing_ok=True)  # an earlier run's would be uploaded with this card
            else:
                file.parent.mkdir(exist_ok=True)
                write(file, render(picture.figure, "png"))
                images.append(Image(f"{FIGURES}/{file.name}", picture.title, picture.caption))
    except OSError as error:
        logger.warning("the model card has only the first %d pictures: %s", len(images), error)
    return images


# Settings


def settings(trainer: Any) -> list[tuple[str, Any]]:
    """Config fields, or words, and their values."""
    config, objective, model = trainer.args, trainer.objective, trainer.model
    base = DPOTrainer if isinstance(trainer, DPOTrainer) else CPOTrainer
    rows: list[tuple[str, Any]] = [
        ("trainer", f"{type(trainer).__name__}, on TRL's {base.__name__}"),
        ("reward", objective.reward.name),
        ("beta", objective.beta),
    ]
    uses_target = any(term.takes_target() for term in objective.margins) or objective.shared_margin
    if uses_target or (not objective.margins and getattr(config, "gamma_beta_ratio", None) is not None):
        rows.append(("simpo_gamma", f"{objective.gamma:g} (in reward units, β inside)"))
        rows.append(("gamma_beta_ratio", f"{objective.gamma / objective.beta:g} (the same, divided by β)"))
    if "objective" not in trainer.from_python:
        fields = option_fields(type(objective.reward), "reward").values()
        rows += [(name, getattr(config, name)) for name in fields if name in OPTIONS]
    rows += [row for kind in ("weight", "margin") for row in _term_settings(trainer, kind)]
    if trainer.options.sam_radius:
        rows += [("sam_radius", trainer.options.sam_radius), ("anchor_scope", trainer.options.anchor_scope)]
    trained, total = n_parameters(model)
    rows += changed(config, _LOSS, always=("loss_type",))
    rows.append(("trained parameters", f"{trained:,} of {total:,} ({100 * trained / max(total, 1):.3g} %)"))
    if is_peft_model(model):
        rows.append((f"{adapter_kind(model)} adapter", _arguments(adapter_options(model))))
    for name in TRAINING:
        value = getattr(config, name, None)
        if name == "warmup_steps" and value is not None and 0 < value < 1:
            value = f"{value:g} of all steps"
        if name not in (("num_train_epochs",) if config.max_steps > 0 else ("max_steps",)):
            rows.append((name, value))
    rows += [
        ("pairs per optimizer step", f"{pairs_per_step(trainer)} ({factors_of(trainer)})"),
        ("optimizer steps", trainer.state.global_step),
        ("weights stored in", stored_in(trainer)),
    ]
    return [(name, value) for name, value in dict(rows).items() if value is not None]


def _term_settings(trainer: Any, kind: str) -> list[tuple[str, Any]]:
    """The weights or margins, and their config fields; of terms from Python, their own attributes."""
    terms = [term for each, term in trainer.objective.named_terms if each == kind]
    if not terms:
        return []
    if "objective" not in trainer.from_python and f"{kind}_term" not in trainer.from_python:
        unread = OF_FACTOR if trainer.set_facts[TRAIN].factor == OF_COLUMN else ()
        names = [name for name in trainer.options.term_options(kind) if name not in unread]
        options = [(name, getattr(trainer.args, name)) for name in names]
        return [(kind, ", ".join(term.name for term in terms)), *options]
    rows = [(kind, ", ".join(f"{type(term).__name__} from Python" for term in terms))]
    for term in terms:
        where = kind if len(terms) == 1 else f"{kind} {term.name}"
        own = {name: value for name, value in getattr(term, "__dict__", {}).items() if _is_plain(value)}
        rows += [(f"{where}: {name}", value) for name, value in own.items() if not name.startswith("_")]
    return rows


def n_parameters(model: Any) -> tuple[int, int]:
    """(trained, all). DeepSpeed's shards count as a whole."""
    if is_peft_model(model):
        return model.get_nb_trainable_parameters()
    counts = [(n_elements(p), p.requires_grad) for p in model.parameters()]
    return sum(n for n, trains in counts if trains), sum(n for n, _ in counts)


def stored_in(trainer: Any) -> str:
    """The dtypes of the weights and, if it is another, that of the computation."""
    dtypes = ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in trainer.model.parameters()}))
    accelerator = trainer.accelerator
    computes = (
        accelerator.native_amp or trainer.is_deepspeed_enabled
    )  # not in float16 on a CPU, whatever was asked for
    precision = accelerator.mixed_precision
    return f"{dtypes}; computed in {precision}" if computes and precision != "no" else dtypes


def changed(config: Any, names: Sequence[str], always: Sequence[str] = ()) -> list[tuple[str, Any]]:
    """The fields that differ from their defaults."""
    defaults = {field.name: _plain(default_of(field)) for field in dataclasses.fields(config)}
    return [
        (name, value)
        for name in dict.fromkeys(names)
        if name in defaults
        and _is_plain(value := getattr(config, name))
        and (name in always or _plain(value) != defaults[name])
    ]


def adapter_options(model: Any) -> dict[str, Any]:
    """The options of an adapter that differ from their defaults, and the usual ones."""
    config = model.active_peft_config
    fields = [field.name for field in dataclasses.fields(config) if field.init and field.name not in _NEVER_OF_PEFT]
    found = {name: _plain(value) for name, value in changed(config, fields, always=_ALWAYS_OF_PEFT)}
    found |= {name: value for name in fields if isinstance(value := getattr(config, name), dict) and value}  # patterns
    return {name: value for name, value in found.items() if name in _ALWAYS_OF_PEFT or value is not None}


# The training as a Python script


def _loaded(dataset: Any, name: str | None, n: int | None) -> tuple[str, str] | None:
    """Python code that loads a data set of the Hub again, and a comment with its n rows, if that may have others."""
    if isinstance(dataset, dict) or not (found := hub_id(name)):
        return None
    split, config = str(getattr(dataset, "split", None) or "train"), dataset.info.config_name or "default"
    there = (dataset.info.splits or {}).get(split)
    arguments = [python_text(found), *([] if config.startswith("default") else [python_text(config)])]
    comment = "as the script took it" if n is None else f"{n:,} rows"
    whole = n is not None and there is not None and there.num_examples == n
    return f"load_dataset({', '.join(arguments)}, split={python_text(split)})", "" if whole else comment


def python_script(trainer: Any, facts: CardFacts) -> str:
    """The script that starts the training, with every setting of the card that is not the default of its config."""
    config, model = trainer.args, trainer.model
    names = [name for name, _ in facts.settings if name not in ("simpo_gamma", "gamma_beta_ratio")]
    options = {"output_dir": facts.model_name, **dict(changed(config, [*names, *TRAINING, *_ONLY_IN_SCRIPT]))}
    ratio = getattr(config, "gamma_beta_ratio", None)
    if ratio is not None and ratio != getattr(config, "_default_gamma_beta_ratio", None):
        options["gamma_beta_ratio"] = float(f"{ratio:.6g}")
    arguments = {"model": python_text(display_name(facts.base_model or "model")), "args": "config"}
    imports: dict[str, list[str]] = {}
    data = {"train_dataset": (trainer.train_dataset, facts.dataset_name, TRAIN)}
    if trainer.eval_dataset is not None:
        data["eval_dataset"] = (trainer.eval_dataset, facts.eval_dataset_name, "eval")
    comments = {}
    for name, (dataset, called, split) in data.items():
        known = trainer.set_facts.get(split)
        if found := _loaded(dataset, called, known and known.pairs):
            imports["datasets"] = ["load_dataset"]
        arguments[name], comments[name] = found or (name, "as the script made it")
    origin = origin_of(type(config))
    is_made = isinstance(origin, tuple)  # by `config_class`, and not to be imported by its name
    classes = [config_class if is_made else origin, type(trainer)]
    made = f"config_class({', '.join(map(python_source, origin))})" if is_made else origin.__name__
    if is_peft_model(model):
        classes.append(type(model.active_peft_config))
        arguments["peft_config"] = f"{classes[-1].__name__}({_arguments(adapter_options(model))})"
    for name in trainer.from_python:
        arguments[name], comments[name] = name, "as the script made it"
    for cls in classes:
        imports.setdefault(_home(cls), []).append(cls.__name__)
    lines = [f"from {home} import {', '.join(sorted(names))}" for home, names in sorted(imports.items())]
    lines += ["", *_registered(trainer), f"config = {made}("]
    lines += [f"    {name}={python_source(value)}," for name, value in options.items()]
    lines += [")", f"trainer = {type(trainer).__name__}("]
    for name, source in arguments.items():
        comment = comments.get(name)
        lines.append(f"    {name}={source}," + (f"  # {comment}" if comment else ""))
    return "\n".join([*lines, ")", "trainer.train()"])


def _registered(trainer: Any) -> list[str]:
    """Imports of the modules that register what the config names."""
    parts = [] if trainer.from_python else [trainer.objective.reward, *trainer.objective.terms]
    modules = {type(part).__module__: part.name for part in parts}
    if not trainer.from_python:
        modules |= {link.function.__module__: link.name for link in trainer.objective.links}
    lines = [
        f"# register {name!r} here, as the script did" if module == "__main__" else f"import {module}  # {name!r}"
        for module, name in modules.items()
        if not module.startswith(__name__.partition(".")[0] + ".")
    ]
    return [*lines, ""] if lines else []


def _home(cls: Any) -> str:
    """The module to import a class or function from: the package itself where it has it."""
    package = cls.__module__.partition(".")[0]
    return package if getattr(import_module(package), cls.__name__, None) is cls else cls.__module__


def _arguments(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={python_source(value)}" for name, value in options.items())


def python_source(value: Any) -> str:
    """The value as Python code."""
    value = _plain(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(python_source, value))}]"
    return python_text(value) if isinstance(value, str) else repr(value)


def _plain(value: Any) -> Any:
    """The value as Python and JSON have it."""
    if isinstance(value, Enum):
        return value.value
    return sorted(value, key=repr) if isinstance(value, set | frozenset) else value


def _is_plain(value: Any) -> bool:
    value = _plain(value)
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, str | int | float | bool)
