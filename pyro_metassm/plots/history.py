"""How a fit went."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from pyro_metassm.plots._style import BLUE, ORANGE, new_axes
from pyro_metassm.recordings import Recordings
from pyro_metassm.result import Fit, check_fit

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def history(
    fit: Fit, ax: Axes | None = None, *, recs: Recordings | None = None, validation: Recordings | None = None
) -> Axes:
    """The ELBO against the steps of the fit: every step thin, a running mean bold, the validation ELBO as
    dots.

    The axis leaves out how low the first steps were. The ELBO is per observed number where that number is
    known, from ``recs`` or the attribute ``num_observed`` of the history, else in nats of all data.
    Validation shares the axis if its number is known (``validation``, ``num_observed_validation``) and has
    one of its own if not. It may lie above training, which rolls the dynamics out for part of the bins.

    Args:
        fit: the fit.
        ax: where to draw.
        recs: what it was trained on.
        validation: what it was validated on.

    Returns:
        the axes.

    Raises:
        ValueError: a fit without steps.
    """
    check_fit(fit)
    if not fit.history.sizes.get("step", 0) or "elbo" not in fit.history:
        raise ValueError("history: needed a fit with at least one step, got none; use num_steps > 0")
    ax = new_axes(ax)
    number = _num_observed(recs, fit.history.attrs.get("num_observed"))
    steps, elbo = fit.history["step"].values, fit.history["elbo"].values / (number or 1.0)
    width = max(len(elbo) // 25, 1)
    mean = np.convolve(elbo, np.full(width, 1 / width), "valid")
    ax.plot(steps, elbo, color=BLUE, linewidth=0.6, alpha=0.5)
    lines = ax.plot(steps[width - 1 :], mean, color=BLUE, linewidth=2.0, label="training")
    settled = elbo[len(elbo) // 10 :]
    ax.set_xlabel("step")
    ax.set_ylabel(f"ELBO ({_nats(number, 'data')})")
    if "validation_elbo" in fit.history:
        other = _num_observed(validation, fit.history.attrs.get("num_observed_validation"))
        values = fit.history["validation_elbo"].dropna("step")
        values = values / (other if number and other else 1.0)
        shared = bool(number and other)
        of_validation = ax if shared else ax.twinx()
        style: dict[str, Any] = {"color": ORANGE, "markersize": 4, "label": "validation"}
        lines += of_validation.plot(values["step"].values, values.values, "o--", **style)
        if shared:
            settled = np.concatenate([settled, values.values])
        else:
            of_validation.set_ylabel(f"validation ELBO ({_nats(None, 'validation data')})")
        ax.legend(handles=lines, frameon=False, loc="lower right")
    low, high = np.quantile(settled, 0.02), settled.max()
    margin = 0.05 * (high - low) or 1.0
    ax.set_ylim(low - margin, high + margin)
    return ax


# ---- parts -----------------------------------------------------------------------------------------------


def _nats(number: float | None, of: str) -> str:
    return "nats per observed number" if number else f"nats, all {of}"


def _num_observed(recs: Recordings | None, known: Any) -> float | None:
    return float(sum(int(r.mask.sum()) for r in recs.values())) if recs is not None else known
