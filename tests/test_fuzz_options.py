"""Configurations of random values: a dry run, `convert` and training take them or refuse them, in the same words.

`FUZZ=1000` tries so many, drawn anew, as in `test_fuzz.py`.
"""

from __future__ import annotations

import re
from dataclasses import fields
from typing import Any

import pytest
import yaml
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from test_fuzz import fuzzed, said_by

from trl_margins import GapPOConfig, GapPODPOConfig
from trl_margins.checks import options_of
from trl_margins.cli.train_options import TrainArguments

pytestmark = pytest.mark.rehearsal

# what reaches out of the process, names where things lie, or can be judged only beside the model
NOT_DRAWN = re.compile(
    "train_only|anchor_scope|push|hub|deepspeed|fsdp|report_to|_dir$|resume|^env$|^debug$|local_rank|ddp|compile|cpu|ipex|mps|jit|neptune|tpu|"
    "router_aux|pad_token|trackio|run_name|project|liger|vllm|^config$|^method$|^base$|dataset|data_files|model|ref_|trust|overwrite|"
    "peft|lora|load_in|bnb|quant|attn|dtype|tf32|bf16|fp16|precision|accelerator|backend|dry_run|tokenizer|chat_template|"
    "stop_after|auto_find|torch_empty|dataloader|workers|streaming|offload|memory|kernels|profil|neftune|optim"
)
DIVERGED = re.compile(r"^step 1: .* NaN or infinite|^step 1 broke")
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 12),
    st.sampled_from([10**12, 10**30, -(10**12)]),
    st.floats(allow_nan=True),
    st.sampled_from(
        ["", " ", "no", "yes", "none", "null", "1", "0.5", "1e-4", "1_000", "٣", "-", "auto", "steps", "epoch"]
    ),
    st.sampled_from(["sigmoid", "score-gap", "amapo", "simpo", "linear", "log-ratio", "x" * 300, "a: b", "{}", "[1]"]),
    st.lists(st.one_of(st.integers(-1, 2), st.sampled_from(["a", "sigmoid", None])), max_size=2),
    st.dictionaries(
        st.sampled_from(["a", "b", "num_cycles", "min_lr", "power", "split_batches", "use_reentrant", "debug"]),
        st.one_of(st.integers(0, 1), st.booleans(), st.sampled_from(["x", 0.5, None, [1]])),
        max_size=2,
    ),
    st.dates(),
)


def fields_of(base: str) -> list[str]:
    classes = (TrainArguments, {"cpo": GapPOConfig, "dpo": GapPODPOConfig}[base])
    return sorted({f.name for cls in classes for f in fields(cls) if f.init and not NOT_DRAWN.search(f.name)})


FIELDS = {base: fields_of(base) for base in ("cpo", "dpo")}
OPTIONS = {**options_of(TrainArguments), **options_of(GapPODPOConfig), **options_of(GapPOConfig)}


def values(name: str) -> st.SearchStrategy[Any]:
    """Anything, and what the option takes by its own word."""
    takes = OPTIONS[name]
    if takes.choices:
        return st.one_of(st.sampled_from(takes.choices), VALUES)
    if (number := takes.number) is not None:
        least = next((bound for bound in (number.least, number.above) if bound is not None), -10)
        most = next((bound for bound in (number.most, number.below) if bound is not None), least + 20)
        return st.one_of(st.integers(int(least), int(most)) if number.whole else st.floats(least, most), VALUES)
    return VALUES


@fuzzed(20)
@given(data=st.data(), base=st.sampled_from(["cpo", "dpo"]))
def test_a_configuration_is_the_same_to_all(data, base, tiny_model, tmp_path_factory, capsys):
    """A dry run, `convert` and training take it or refuse it, in the same words."""
    folder = tmp_path_factory.mktemp("config")
    names = data.draw(st.lists(st.sampled_from(FIELDS[base]), min_size=1, max_size=2, unique=True))
    drawn = {name: data.draw(values(name), label=name) for name in names}
    rows = [
        {"prompt": "q ", "chosen": f"a{i}", "rejected": f"b{i}", "score_chosen": 3, "score_rejected": i}
        for i in (1, 2)
    ]
    Dataset.from_list(rows).to_json(folder / "pairs.jsonl")
    settings = {
        **{"model_name_or_path": tiny_model, "dataset_name": str(folder / "pairs.jsonl"), "base": base},
        **{
            "output_dir": str(folder / "out"),
            "bf16": False,
            "report_to": "none",
            "max_steps": 1,
            "save_strategy": "no",
        },
        **{"eval_strategy": "no", "max_length": 64, "use_cpu": True},
        **drawn,
    }
    file = folder / "c.yaml"
    file.write_text(yaml.safe_dump(settings, allow_unicode=True))
    dry = said_by(capsys, "train", "--config", str(file), "--dry_run")
    converted = said_by(capsys, "convert", str(file))
    assert (dry is None) == (converted is None), (dry, converted)
    trained = said_by(capsys, "train", "--config", str(file))
    # a dry run reads no rows, and what has diverged is the model's word, not the configuration's
    if dry is None and trained and (re.search("data set|train pairs", trained) or DIVERGED.search(trained)):
        trained = None
    assert (dry is None) == (trained is None), (drawn, dry, trained)
    if dry is not None:
        assert dry == trained
        assert any(name in dry for name in names), dry
