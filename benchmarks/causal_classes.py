"""Which ways to log-probabilities hold for which class of models.

    python benchmarks/causal_classes.py [--only Llama,Gemma2] [--json FILE]

    python benchmarks/causal_classes.py --json FILE --page docs/models.md   # the page, from an earlier run's file

Builds every causal class of transformers that builds small, on the CPU, and compares TRL's fused LM head and the
shared-prompt forward pass with the model's own logits: `model(input_ids, attention_mask).logits` of each row alone.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import math
import signal
import sys
import warnings
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from trl.trainer.utils import add_fused_lm_head

from trl_margins.forward.checked import TOLERANCE, Ways, checked_ways, differences_from_own, one_prompt
from trl_margins.forward.head import why_not_fused
from trl_margins.forward.shared_prompt import why_not_shared
from trl_margins.forward.standard import IGNORE

VOCABULARY = 64
MOST_PARAMETERS = 20_000_000
SECONDS = 120
# Names that configs have for the same few things
SMALL: dict[str, Any] = {
    **dict.fromkeys(("vocab_size",), VOCABULARY),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embedding_size", "hidden_dim", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "d_ff", "ffn_hidden_size", "encoder_ffn_dim"), 48),
    **dict.fromkeys(("decoder_ffn_dim", "moe_intermediate_size", "shared_expert_intermediate_size"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers", "encoder_layers"), 4),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "n_heads", "decoder_attention_heads"), 2),
    **dict.fromkeys(("encoder_attention_heads", "num_key_value_heads", "attention_heads"), 2),
    **dict.fromkeys(("head_dim", "global_head_dim", "attention_head_dim", "v_head_dim", "qk_nope_head_dim"), 16),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"), 256),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk"), 2),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank"), 16),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "n_shared_experts"), 1),
    **dict.fromkeys(("sliding_window", "attention_window_size"), 8),
    **dict.fromkeys(("mamba_n_heads", "num_heads_mamba", "mamba_num_heads", "linear_num_value_heads"), 4),
    **dict.fromkeys(("linear_num_key_heads", "mamba_n_groups", "n_groups"), 2),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim", "linear_key_head_dim", "linear_value_head_dim"), 16),
    **dict.fromkeys(("state_size", "mamba_d_state", "ssm_state_size", "time_step_rank", "mamba_dt_rank"), 8),
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 1),
    "qk_rope_head_dim": 16,
    "lru_width": 32,
    "attention_hidden_size": 32,
    "initializer_range": 0.1,
    "chunk_size": 8,
    "vocab_size_per_layer_input": VOCABULARY,
    "num_kv_shared_layers": 0,
    "activation_sparsity_pattern": [0.0] * 4,
    "default_language": "en_XX",
    "is_decoder": True,
}
OF_ONE_TYPE: dict[str, dict[str, Any]] = {
    "codegen": {"n_head": 4, "rotary_dim": 4},
    "gptj": {"rotary_dim": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 2},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1},
    "zamba2": {"mamba_ngroups": 1, "n_mamba_heads": 4},
}


def small_config(model_type: str) -> Any:
    """The class's default config with small sizes wherever it has such a field."""
    cls = CONFIG_MAPPING[model_type]
    default = cls()
    names = set(default.to_dict()) | set(getattr(cls, "attribute_map", {}))
    values = {name: value for name, value in SMALL.items() if name in names}
    for name in ("text_config",):
        part = getattr(default, name, None)
        if part is not None and part is not default:
            part = part if isinstance(part, dict) else part.to_dict()
            values[name] = {k: SMALL.get(k, v) for k, v in part.items() if k not in ("layer_types", "rope_scaling")}
    for name in ("layer_types", "mlp_layer_types", "attention_types", "layers_block_type"):
        if name in names:
            values.pop(name, None)
    return cls(**values | OF_ONE_TYPE.get(model_type, {}))


def built(model_type: str) -> torch.nn.Module:
    config = small_config(model_type)
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(copy.deepcopy(config)).parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"{size / 1e6:.0f}M parameters with small sizes")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():  # nothing may be 0 or 1 by chance
            parameter.add_(0.02 * torch.randn_like(parameter))
        ids = torch.arange(3, 23)[None]
        spread = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits.std()
        head = model.get_output_embeddings()
        if head is not None and spread > 0:  # as wide apart as a trained model's: soft caps show
            head.weight.mul_(4 / spread)
    return model


def pair() -> tuple[torch.Tensor, ...]:
    """Two completions of different lengths to one prompt, longer than the sliding windows."""
    torch.manual_seed(1)
    prompt, answers = torch.randint(3, VOCABULARY, (14,)), [torch.randint(3, VOCABULARY, (n,)) for n in (9, 5)]
    ids, mask, labels = (torch.full((2, 23), value) for value in (1, 0, IGNORE))
    for i, answer in enumerate(answers):
        length = 14 + len(answer)
        ids[i, :length], mask[i, :length], labels[i, 14:length] = torch.cat([prompt, answer]), 1, answer
    return ids, mask, labels


class Said(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def row(model_type: str, name: str) -> dict[str, str]:
    found = {"class": name, "model type": model_type, "built": "yes", "fused": "", "shared": "", "taken": ""}
    try:
        model = built(model_type)
    except TimeoutError:
        raise
    except Exception as error:
        return {**found, "built": f"no: {type(error).__name__}: {error}".split("\n")[0][:160]}
    no_head, no_sharing = why_not_fused(model), why_not_shared(model)
    if no_head is None:
        add_fused_lm_head(model, outputs=("log_probs", "mean_logits"))
    ways = Ways(no_head is None, no_sharing is None)
    said = Said()
    logging.getLogger("trl_margins").addHandler(said)
    try:
        with torch.no_grad():
            differences = differences_from_own(model, one_prompt(model, *pair(), 2), ways)
        right = checked_ways(model, *pair(), ways)
    finally:
        logging.getLogger("trl_margins").removeHandler(said)

    def number(possible: str | None, difference: float) -> str:
        if possible is not None:
            return f"not tried: {possible}"
        return "crash" if difference == math.inf else f"{difference:.1e}"

    head = "fused head" if right.fused else "own logits"
    found |= {"fused": number(no_head, differences.fused), "shared": number(no_sharing, differences.shared)}
    found["taken"] = f"{head}, shared prompts" if right.shared else head
    if differences.padded > TOLERANCE[None]:
        found["taken"] += f" (padding changes them by {differences.padded:.1e})"
    if differences.crash:
        found["crash"] = differences.crash
    if right != ways:
        found["said"] = said.lines[-1]
    return found


def page(measured: dict[str, Any]) -> str:
    """docs/models.md."""
    rows: dict[str, dict[str, str]] = {}
    for each in measured["rows"]:  # several model types may have one class, and not all of them build small
        if rows.get(each["class"], {}).get("built") != "yes":
            rows[each["class"]] = each
    built_rows = [row for row in rows.values() if row["built"] == "yes"]
    shared = [row for row in built_rows if row["taken"].startswith("fused head, shared prompts")]
    own = [row for row in built_rows if row["taken"].startswith("own logits")]
    fused = [row for row in built_rows if row not in shared and row not in own]

    def names(rows: list[dict[str, str]]) -> str:
        return ", ".join(f"`{name}`" for name in sorted({row["class"] for row in rows}))

    def worst(rows: list[dict[str, str]], way: str) -> str:
        return f"{max(float(row[way]) for row in rows if row[way][:1].isdigit()):.0e}"

    lines = [
        "# Models",
        "",
        "Log-probabilities are computed in the fastest way that agrees with the model's own logits,",
        "`model(input_ids, attention_mask).logits` of each completion alone. Before the first step this is checked on",
        "one pair, in float32 and to 1e-4 nats per token, whatever the training computes in: see",
        "[performance](performance.md#checked-before-the-first-step).",
        "",
        "The results for transformers' causal classes, built small with random weights, in float32 on a CPU",
        f"({measured['date']}, torch {measured['torch']}, transformers {measured['transformers']}, trl",
        f"{measured['trl']}): {len(built_rows)} of {len(rows)} build small.",
        "`python benchmarks/causal_classes.py` generates this page.",
        "",
        f"## Fused LM head, shared prompts: {len(shared)}",
        "",
        f"TRL's fused head differs from the model's logits by at most {worst(shared, 'fused')} nats per token, the",
        f"shared-prompt forward pass by {worst(shared, 'shared')}.",
        "",
        names(shared),
        "",
        f"## Fused LM head, one prompt per completion: {len(fused)}",
        "",
        f"The fused head differs by at most {worst(fused, 'fused')}.",
        "",
        "| why prompts are not shared | classes |",
        "|---|---|",
    ]
    reasons = sorted({row["shared"] for row in fused})
    for reason in reasons:
        lines.append(
            f"| {reason.removeprefix('not tried: ')} | {names([r for r in fused if r['shared'] == reason])} |"
        )
    lines += [
        "",
        f"## The model's own logits: {len(own)}",
        "",
        "TRL's fused head does not give the logits of these classes: most have layers between decoder and head that",
        "it skips. A warning says so before the first step, and the logits are built: only for completion tokens",
        "where prompts are shared, otherwise for all tokens, which takes memory (batch × length × vocabulary).",
        "",
        "| class | fused head, nats per token | shared prompts, nats per token |",
        "|---|---:|---|",
    ]
    lines += [f"| `{row['class']}` | {row['fused']} | {row['shared']} |" for row in own]
    padded = [row for row in built_rows if "padding" in row["taken"]]
    lines += ["", f"Padding alone changes the logits of {names(padded)}: no way is right for them in a batch.", ""]
    others = [row for row in rows.values() if row["built"] != "yes"]
    lines += [f"## Not built small: {len(others)}", "", names(others), ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help="model types or classes, with commas")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--page", type=Path)
    arguments = parser.parse_args()
    if arguments.page:
        arguments.page.write_text(page(json.loads(arguments.json.read_text())))
        return
    warnings.simplefilter("ignore")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    logging.getLogger("trl_margins").setLevel(logging.INFO)

    def late(*_: Any) -> None:
        raise TimeoutError

    signal.signal(signal.SIGALRM, late)
    wanted = set(arguments.only.split(",")) if arguments.only else None
    rows = []
    for model_type, names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        name = names if isinstance(names, str) else names[0]
        if wanted and not {model_type, name} & wanted:
            continue
        signal.alarm(SECONDS)
        try:
            found = row(model_type, name)
        except TimeoutError:
            found = {"class": name, "model type": model_type, "built": f"no: over {SECONDS} s"}
        except Exception as error:  # a class must not end the table
            found = {"class": name, "model type": model_type, "built": "yes", "taken": f"CRASH {error!r}"[:300]}
        signal.alarm(0)
        rows.append(found)
        print(" | ".join(str(value) for value in found.values()), flush=True)
        if arguments.json:
            about = {"date": str(date.today()), "torch": torch.__version__, "transformers": transformers.__version__}
            arguments.json.write_text(json.dumps({**about, "trl": trl.__version__, "rows": rows}, indent=1))
    n_built = sum(found["built"] == "yes" for found in rows)
    print(f"{len(rows)} model types, {n_built} built", file=sys.stderr)


if __name__ == "__main__":
    main()
