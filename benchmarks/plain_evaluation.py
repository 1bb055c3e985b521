"""Checks `trl-margins evaluate --rewards FILE` by the plainest loop there is: transformers alone, an answer at a time.

python benchmarks/plain_evaluation.py MODEL_FOLDER FILE SET=data.jsonl.gz [SET=… …] [--rows 25]
"""

import argparse
import gzip
import json

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

parser = argparse.ArgumentParser()
parser.add_argument("model")
parser.add_argument("rewards")
parser.add_argument("sets", nargs="+")
parser.add_argument("--rows", type=int)
parser.add_argument("--max_length", type=int, default=1024, help="as evaluate had it")
args = parser.parse_args()
tokenizer, model = AutoTokenizer.from_pretrained(args.model), AutoModelForCausalLM.from_pretrained(args.model).float()


def reward(prompt, answer):
    """Mean log-probability of the answer's tokens: what the chat template puts behind the prompt, and nothing else."""
    messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    start = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    answer = answer if isinstance(answer, str) else answer[-1]["content"]
    whole = tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": answer}], tokenize=False)
    start, ids = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (start, whole))
    ids = torch.tensor([ids[: args.max_length]])
    logps = model(ids).logits[0, len(start) - 1 : -1].log_softmax(-1)
    return logps.gather(1, ids[0, len(start) :, None]).mean().item()


with open(args.rewards) as file:
    theirs = [json.loads(line) for line in file]
for name, path in (each.split("=", 1) for each in args.sets):
    with gzip.open(path, "rt") as file:
        text = file.read()
    rows = json.loads(text) if text[0] == "[" else [json.loads(line) for line in text.splitlines()]
    of_set = [each["rewards"] for each in theirs if each["set"] == name]
    theirs = [each for each in theirs if each["set"] != name or each["row"] >= len(rows)]  # a set of several files
    rows = rows[: args.rows]
    worst = total = 0
    with torch.no_grad():
        for row, found in zip(rows, of_set, strict=False):
            listed = isinstance(row.get("chosen"), list) and isinstance(row["chosen"][0], str)
            answers = row.get("responses") or [row["chosen"], row["rejected"]]
            answers = row["chosen"] + row["rejected"] if listed else answers
            ours = [reward(row["prompt"], answer) for answer in answers]
            worst, total = max(worst, *(abs(a - b) for a, b in zip(ours, found, strict=True))), total + len(ours)
    print(f"{path}: {total} answers in {len(rows)} rows, largest difference {worst:.1e} nats per token", flush=True)
