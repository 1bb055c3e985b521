"""Densities of reward gap and chosen log-probability on held-out pairs, of several models."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

from .picture import span
from .style import GREY, label, legend_below, line_styles, panels, styled

POINTS = 400


@styled
def densities(
    sets: Mapping[str, Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]]], reward: str
) -> tuple[Figure, str]:
    """A row of two panels for each set: reward gaps, and log-probabilities of the chosen completions.

    Args:
        sets: set → model → [M] reward gaps without β, [M] log-probabilities, and [M] what each pair counts.
        reward: `length-normalized` (per token), `sum` or `log-ratio`.

    Returns:
        The figure and its caption.

    Source: AMaPO (arXiv 2511.09385), figures 1b, 1c and 2.
    """
    from scipy.stats import gaussian_kde

    figure, axes = panels(2 * len(sets))
    models = dict.fromkeys(model for of in sets.values() for model in of)
    looks = {model: look | {"marker": ""} for model, look in line_styles(models).items()}
    unit = "nats per token" if reward == "length-normalized" else "nats"
    titles = f"reward gap ({unit}, without β)", f"log-probability of the chosen completion ({unit})"
    for row, (name, of) in enumerate(sets.items()):
        for column, xlabel in enumerate(titles):
            panel = axes[2 * row + column]
            every = np.concatenate([values[column] for values in of.values()])
            # beyond the values by three bandwidths, where every curve is near 0 again
            wide = 3 * max(np.std(values[column]) * values[column].size ** -0.2 for values in of.values())
            at = np.linspace(every.min() - wide, every.max() + wide, POINTS)
            for model, values in of.items():
                if np.ptp(values[column]) > 0:
                    panel.plot(at, gaussian_kde(values[column], weights=values[2])(at), **looks[model])
                panel.axvline(np.average(values[column], weights=values[2]), linewidth=1, alpha=0.6, **looks[model])
            if column == 0:
                panel.axvline(0, color=GREY, linewidth=1.2, linestyle=":", zorder=1)
            panel.set(xlabel=xlabel, ylabel="density", title=label(name))
            panel.set_ylim(bottom=0)
    legend_below(figure, [*looks.values(), {"color": GREY, "linewidth": 1}], [*models, "mean"])
    n = span(round(weights.sum()) for of in sets.values() for *_, weights in of.values())
    summed = "" if reward == "length-normalized" else ", summed over its tokens"
    of_list = "the chosen and the rejected completion of a pair, of a list its best and its worst by score"
    caption = (
        f"Gaussian kernel densities (Scott's bandwidth) over {n} pairs per set and model; thin lines are means. The "
        f"reward ({reward}) has no β in it, so that models trained with different β share an axis; the gap is between "
        f"{of_list}. Right of the dotted line a pair is ranked right. The log-probability is the chosen completion's"
        f"{summed or ', per token'}."
    )
    return figure, caption
