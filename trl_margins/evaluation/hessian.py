"""The Hessian of a loss in the LM head's weight: its largest and its smallest eigenvalues, by Lanczos."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor
from tqdm.auto import tqdm

from ..forward.head import StoppedForward
from ..forward.precision import eval_mode, ieee_float32
from ..links import margin_loss
from ..pairs import upcast
from ..rewards import length_normalized
from .scorer import CompletionTokens, standard_inputs

# of an eigenvalue, relative; its error is of second order in the residual that ARPACK stops at
TOLERANCE = 1e-4


def head_spectrum(
    model: Any, pairs: Sequence[CompletionTokens], beta: float, gamma: float, k: int = 5, desc: str = "Hessian"
) -> np.ndarray:
    r"""The spectrum of :math:`\nabla^2_W \frac1B \sum_i -\log\sigma(\beta\,\Delta_i - \gamma)`, SimPO's mean loss.

    W is the LM head's weight alone. Where it is tied to the embeddings these stay as they are, so hidden states do not
    depend on W and are computed once. Products with the Hessian are exact, by double backward; the matrix is never
    built. Memory: about 20 vectors of the size of W, and the logits' graph of the batch.

    Args:
        model: a language model, without an adapter on its head.
        pairs: [B] tokens of two completions each, the chosen one first.
        beta: β.
        gamma: target margin in reward units, β times the paper's γ.
        k: how many of the largest.
        desc: of the progress bar, which counts products with the Hessian.

    Returns:
        [k + 1] the k largest eigenvalues, then the smallest.

    Source: GAPO (arXiv 2602.04909), appendix I, which does not name its loss.
    """
    device = next(model.parameters()).device
    inputs, labels = standard_inputs(model, pairs, 2, device)
    with eval_mode(model), ieee_float32(), tqdm(desc=desc, unit=" products") as progress:
        with torch.no_grad():
            stopped = StoppedForward(model, inputs, labels)
        weight = model.get_output_embeddings().weight.detach().clone().requires_grad_()
        loss = _loss(stopped, weight, beta, gamma)
        (gradient,) = torch.autograd.grad(loss, weight, create_graph=True)
        kind = np.float64 if weight.dtype == torch.float64 else np.float32

        def product(vector: np.ndarray) -> np.ndarray:
            progress.update()
            along = torch.from_numpy(vector.astype(kind)).to(weight).view_as(weight)
            (found,) = torch.autograd.grad(gradient, weight, along, retain_graph=True)
            return found.flatten().cpu().numpy()

        n = weight.numel()
        hessian = LinearOperator((n, n), matvec=product, dtype=kind)
        start = np.random.default_rng(0).standard_normal(n).astype(kind)  # the same numbers every time
        options = {"v0": start, "tol": TOLERANCE, "return_eigenvectors": False}
        largest, smallest = (eigsh(hessian, many, which=which, **options) for many, which in ((k, "LA"), (1, "SA")))
    return np.array([*np.sort(largest)[::-1], *smallest], float)


def _loss(stopped: StoppedForward, weight: Tensor, beta: float, gamma: float) -> Tensor:
    logps = upcast(stopped.logits(stopped.hidden, weight)).log_softmax(-1)
    logps = logps.gather(1, stopped.labels[:, None])[:, 0]
    row, lengths = stopped.is_completion.nonzero()[:, 0], stopped.is_completion.sum(1)
    sums = logps.new_zeros(len(lengths)).index_add(0, row, logps)
    chosen, rejected = length_normalized(sums, lengths).chunk(2)
    return margin_loss(beta * (chosen - rejected), gamma).mean()
