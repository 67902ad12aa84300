"""Spikes beside the rates that a model makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from pyro_metassm import _checks as checks
from pyro_metassm.plots import _given as given
from pyro_metassm.trees import part

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FEW = 20  # rows, or conditions, that are named one by one


def raster_and_rates(
    tree: xr.DataTree,
    recording: str,
    *,
    trial: int | None = None,
    neuron: int | None = None,
    ax: Sequence[Axes] | None = None,
) -> np.ndarray:
    """Observed spikes above, posterior mean rates (Hz) below: all neurons of a trial, or all trials of a neuron.

    Both panels have the same rows and the same bins; the darker, the more, by the square root. Neurons are ordered by
    the centre of mass over time of their mean rate above its lowest; trials by condition, where they have one.
    Hatched: no data.

    Args:
        tree: of :func:`pyro_metassm.posterior`, of counts.
        recording: its name.
        trial: whose neurons to draw, by its number in the recordings that the tree was made of; default the first.
        neuron: whose trials to draw in place of that, by its position.
        ax: two axes.

    Returns:
        the two axes.

    Raises:
        ValueError: a recording, trial or neuron that the tree lacks, both or what is no counts, too few axes.

    Example:
        >>> import pyro_metassm as pm
        >>> recs = pm.simulate.limit_cycles([2.5, 5.0], num_trials=8, num_steps=20, noise="poisson")
        >>> model = pm.models.MetaSSM(recs, latent_dim=2, embedding_dim=1, likelihood=pm.likelihoods.Poisson)
        >>> fit = pm.fit(model, pm.guides.DKF(model), recs, num_steps=5, warm_start_steps=5, progress=False)
        >>> above, below = pm.plots.raster_and_rates(pm.posterior(fit, recs, num_samples=4), "w=5")
        >>> below.get_xlabel()
        'time (s)'
    """
    given.recording("raster_and_rates", tree, recording, "posterior", "observed_data")
    seen = part(tree, recording, "observed_data")["observations"].transpose("trial", "time", "neuron")
    rates = part(tree, recording, "posterior")["rates"].mean(("chain", "draw"))
    rates = rates.transpose("trial", "time", "neuron")
    counts, row, title = _rows(seen, recording, trial, neuron)
    time = seen["time"].values
    width = float(time[1] - time[0]) if len(time) > 1 else 1.0
    known = counts[np.isfinite(counts)]
    if (known < 0).any() or (known != known.round()).any():
        raise ValueError(
            f"raster_and_rates: needed counts of recording {recording!r}, got other numbers; use pm.plots.trajectories"
        )
    mean = (rates.isel(**row).values if "neuron" in row else rates.sel(**row).values.T) / width
    order, ticks, label = _order(seen, mean, row)
    panels = _panels(ax)
    from matplotlib.colors import PowerNorm

    extent = (time[0] - width / 2, time[-1] + width / 2, len(order) - 0.5, -0.5)
    mean = np.where(np.isnan(counts), np.nan, mean)
    for panel, values, unit in zip(panels, (counts, mean), ("spikes per bin", "rate (Hz)"), strict=True):
        panel.patch.set(hatch="////", edgecolor="0.8")
        high = float(np.nanquantile(values, 0.999)) if np.isfinite(values).any() else 0.0
        above = np.nanmax(values, initial=0.0) > high > 0
        # Few neurons have most of the spikes: by the square root the others are seen, too.
        norm = PowerNorm(0.5, 0.0, high or 1.0)
        image = panel.imshow(
            values[order], extent=extent, cmap="Greys", norm=norm, aspect="auto", interpolation="nearest"
        )
        panel.figure.colorbar(image, ax=panel, label=unit, extend="max" if above else "neither")
        panel.set_ylabel(label)
        panel.set_yticks(list(ticks), list(ticks.values()))
    panels[0].set_title(title, fontsize="medium")
    panels[0].tick_params(labelbottom=False)
    panels[1].set_xlabel("time (s)")
    return panels


# ---- parts -----------------------------------------------------------------------------------------------


def _rows(seen: xr.DataArray, recording: str, trial: int | None, neuron: int | None):
    """Observations ``(row, time)``, how to choose them, and what to call them."""
    if trial is not None and neuron is not None:
        raise ValueError(f"raster_and_rates: needed a trial or a neuron, got both ({trial} and {neuron})")
    if neuron is not None:
        if not isinstance(neuron, int | np.integer) or not 0 <= neuron < seen.sizes["neuron"]:
            raise ValueError(
                f"raster_and_rates: needed a neuron of recording {recording!r} by its position, below "
                f"{seen.sizes['neuron']}, got {neuron!r}"
            )
        name = seen["neuron"].values[neuron]
        return seen.isel(neuron=neuron).values, {"neuron": neuron}, f"{recording}, neuron {name}"
    known = seen["trial"].values.tolist()
    chosen = known[0] if trial is None else trial
    if chosen not in known:
        raise ValueError(
            f"raster_and_rates: needed a trial of recording {recording!r}, {checks.some(known)}, got {trial!r}"
        )
    return seen.sel(trial=chosen).values.T, {"trial": chosen}, f"{recording}, trial {chosen}"


def _order(seen: xr.DataArray, mean: np.ndarray, row: dict) -> tuple[list[int], dict[Any, str], str]:
    """The order of the rows, what is written beside which of them, and the label of the axis."""
    number = len(mean)
    if "neuron" in row:
        trials = {k: str(trial) for k, trial in enumerate(seen["trial"].values)}
        if "condition" not in seen.coords:
            return list(range(number)), trials if number <= FEW else {}, f"{number} trials"
        condition = seen["condition"].values
        order = np.argsort(condition, kind="stable")
        kinds = np.unique(condition)
        middle = {float(np.flatnonzero(condition[order] == kind).mean()): str(kind) for kind in kinds}
        return order.tolist(), middle if len(kinds) <= FEW else {}, f"condition ({number} trials)"
    low = np.nanmin(mean, 1, keepdims=True, initial=np.inf, where=np.isfinite(mean))
    above = np.nan_to_num(mean - low)
    total = np.maximum(above.sum(1), np.finfo(float).tiny)
    order = np.argsort(above @ np.arange(mean.shape[1]) / total, kind="stable")
    names = {k: str(seen["neuron"].values[place]) for k, place in enumerate(order)}
    return order.tolist(), names if number <= FEW else {}, f"{number} neurons, by time"


def _panels(ax: Sequence[Axes] | None) -> np.ndarray:
    if ax is None:
        import matplotlib.pyplot as plt

        ax = plt.subplots(2, 1, figsize=(7, 6), sharex=True, layout="constrained")[1]
    panels = np.atleast_1d(np.asarray(ax, object)).ravel()
    if len(panels) < 2:
        raise ValueError(f"raster_and_rates: needed 2 axes, got {len(panels)}")
    return panels[:2]
