"""What the test of the network runs: everything that a training takes, where whoever reaches for the network is noted.

Given `import`, it loads every module of the package; given an empty folder and a model's, it trains, evaluates and
reports in there.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import socket
import sys
import traceback
from pathlib import Path
from typing import Any

TRIED: list[str] = []


def refused(name: str) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        TRIED.append(f"{name}: {''.join(traceback.format_stack(limit=6)[:-1])}")
        raise OSError(f"no network here: {name}")

    return call


def import_everything() -> None:
    import trl_margins

    for module in pkgutil.walk_packages(trl_margins.__path__, "trl_margins."):
        if not module.name.endswith("__main__"):  # which runs the command
            importlib.import_module(module.name)


def train(folder: Path, model: str) -> None:
    """A step, an evaluation, a card with pictures, a report, and the commands that load a model."""
    from conftest import byte_tokenizer, drawn_pictures, preference_rows, quiet

    from trl_margins import GapPODPOConfig, MarginDPOTrainer
    from trl_margins.cli import main
    from trl_margins.trainers import card

    rows = preference_rows(4)
    trainer = MarginDPOTrainer(
        model,  # by name, as the reference model is
        args=GapPODPOConfig(**quiet(output_dir=str(folder / "run"), reward="log-ratio", max_steps=1, max_length=64)),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=byte_tokenizer(),
    )
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    card.pictures = drawn_pictures
    trainer.create_model_card(dataset_name="me/pairs")
    data = str(folder / "pairs.jsonl")
    rows.to_json(data)
    assert main(["report", str(folder / "run")]) == 0
    assert main(["evaluate", "--model_name_or_path", model, "--dataset_name", data, "--bootstrap", "2"]) == 0
    assert main(["inspect", data]) == 0


if __name__ == "__main__":
    for name in ("connect", "connect_ex", "sendto"):
        setattr(socket.socket, name, refused(name))
    for name in ("create_connection", "getaddrinfo", "gethostbyname"):
        setattr(socket, name, refused(name))
    if sys.argv[1] == "import":
        import_everything()
    else:
        train(Path(sys.argv[1]), sys.argv[2])
    sys.stdout.write(json.dumps(TRIED) + "\n")
