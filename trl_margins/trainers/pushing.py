"""What is pushed to the Hub: the model and its card, and of the run's files only those that are no rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from huggingface_hub import HfApi

from ..recording.pair_log import PAIRS_FILE

if TYPE_CHECKING:
    from trl.trainer.base_trainer import _BaseTrainer as TRLTrainer

    from .configs import MarginOptions
else:
    TRLTrainer = object


class PushMixin(TRLTrainer):
    """Leaves the pair log out of what is uploaded, unless `push_pair_log` is set."""

    options: MarginOptions

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's, without the pair log."""
        with uploads_without([] if self.options.push_pair_log else [PAIRS_FILE]):
            return super().push_to_hub(*args, **kwargs)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        with uploads_without([] if self.options.push_pair_log else [PAIRS_FILE]):
            super()._push_from_checkpoint(checkpoint_folder)


@contextmanager
def uploads_without(files: Sequence[str]) -> Iterator[None]:
    """Folders are uploaded without these files. transformers' `push_to_hub` takes no patterns of its own."""
    upload = HfApi.upload_folder

    def upload_some(self: HfApi, **given: Any) -> Any:
        given["ignore_patterns"] = [*(given.get("ignore_patterns") or ()), *files]
        return upload(self, **given)

    HfApi.upload_folder = upload_some  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        HfApi.upload_folder = upload  # type: ignore[method-assign]
