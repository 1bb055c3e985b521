"""The trainer as its parts see it, for type checkers: TRL's, with what the mixins add. Empty at run time."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from contextlib import AbstractContextManager
    from typing import Any

    from torch import Tensor, nn
    from trl.trainer.base_trainer import _BaseTrainer

    from ..forward.standard import TokenLogps
    from ..objective import Objective, ObjectiveOutput
    from ..pairs import PairLogps
    from ..recording.metrics import MetricBuffer
    from ..recording.pair_log import PairLog
    from ..report.card import SetFacts
    from .configs import ConfigClass, MarginOptions

    class MarginTrainer(_BaseTrainer):
        # TRL's, which are declared for trainers of any kind
        args: Any
        model: Any
        processing_class: Any
        data_collator: Any
        train_dataset: Any
        eval_dataset: Any
        optimizer: Any
        _signature_columns: Any

        _config_class: ConfigClass
        options: MarginOptions
        objective: Objective
        _fused: bool
        _pair_log: PairLog | None
        _logs: Sequence[PairLog]
        _buffers: dict[str, MetricBuffer]
        _sharing: Any
        set_facts: dict[str, SetFacts]
        last_grad_norm: Tensor | float
        _made_optimizer: bool
        _made_schedule: bool
        _loaded_from: str | None
        settings: dict[str, Any]
        _first_schedule: tuple[Any, dict[str, Any]]
        lr_scheduler: Any
        loads_reference: bool
        aux_loss_enabled: bool

        @property
        def inputs_beside_tokens(self) -> dict[str, Any]: ...

        def standard_rows(self) -> Callable[[Mapping[str, Any]], tuple[Tensor, Tensor, Tensor] | None]: ...
        def same_completions(self, batch: Mapping[str, Any]) -> Tensor: ...
        def is_plain_text(self, batch: Mapping[str, Any]) -> bool: ...
        def token_logps(
            self, model: nn.Module, batch: Mapping[str, Any], shared: bool, fused: bool = True
        ) -> TokenLogps: ...
        def forward_pairs(
            self, batch: Mapping[str, Any], model: nn.Module | None = None, fused: bool = True
        ) -> PairLogps: ...
        def agree_to_stop(self, n_asked: float) -> None: ...
        def store_metrics(self, metrics: Mapping[str, Tensor | float], train_eval: str = "train") -> None: ...
        def _prepare_inputs(self, inputs: Any) -> dict[str, Any]: ...
        def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor: ...
        def _loss(
            self, pairs: PairLogps, batch: Mapping[str, Any], training: bool
        ) -> tuple[Tensor, ObjectiveOutput]: ...
        def _term_states(self) -> dict[str, dict[str, Any]]: ...
        @property
        def is_interrupted(self) -> bool: ...
        @property
        def asked_to_stop(self) -> bool: ...
        @property
        def checkpoints_reentrantly(self) -> bool: ...
        def _adapter_autocast(self) -> AbstractContextManager: ...

else:

    class MarginTrainer:
        """TRL's trainer as the mixins see it. The trainers' own bases make it one."""
