"""A trial over time: observed, reconstructed, forecast."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
import xarray as xr

from pyro_metassm import _checks as checks
from pyro_metassm.plots import _given as given
from pyro_metassm.plots._style import BLACK, BLUE, INTERVAL, ORANGE
from pyro_metassm.trees import part

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DIMS = {"rates": "neuron", "latents": "latent_dim"}


def trajectories(
    tree: xr.DataTree,
    recording: str,
    trial: int = 0,
    *,
    of: Literal["rates", "latents"] = "rates",
    which: int | Sequence[int] = 3,
    forecast: xr.DataTree | None = None,
    context: int | None = None,
    ax: Axes | Sequence[Axes] | None = None,
) -> np.ndarray:
    """A trial over time, a panel for each neuron or latent: observations as dots, the posterior mean solid, a
    forecast dashed from the bin on from which it was made, each in a band that holds 90 % of the draws.

    Bands are of the rate (or latent), not of observations, which scatter around it. With a forecast the posterior is
    drawn up to where that begins, at the dotted line.

    Args:
        tree: of :func:`pyro_metassm.posterior`; or joined with a forecast by :func:`pyro_metassm.join`.
        recording: its name.
        trial: the trial, by its number in the recordings that the tree was made of.
        of: "rates" (expected observations per bin) or "latents".
        which: how many (those whose posterior mean varies most in this trial), or which positions.
        forecast: of :func:`pyro_metassm.forecast`, of the same trials; default what the tree is joined with.
        context: bins given to the forecast; default where it begins.
        ax: where to draw, one for each panel.

    Returns:
        the axes, one for each panel, from above.

    Raises:
        ValueError: a recording or trial that a tree lacks, positions that there are not, too few axes.

    Example:
        >>> import pyro_metassm as pm
        >>> recs = pm.simulate.limit_cycles([2.5, 5.0], num_trials=8, num_steps=20)
        >>> model = pm.models.MetaSSM(recs, latent_dim=2, embedding_dim=1)
        >>> fit = pm.fit(model, pm.guides.DKF(model), recs, num_steps=5, warm_start_steps=5, progress=False)
        >>> tree = pm.posterior(fit, recs, num_samples=4)
        >>> ahead = pm.forecast(fit, recs, context=12, horizon=8, num_samples=4)
        >>> axes = pm.plots.trajectories(tree, "w=5", of="latents", which=[0, 1], forecast=ahead)
        >>> [ax.get_ylabel() for ax in axes]
        ['latent 1', 'latent 2']
    """
    return draw("trajectories", tree, recording, trial, of, which, forecast, context, ax, "tree", "forecast")


def draw(
    caller: str,
    tree: xr.DataTree,
    recording: str,
    trial: int,
    of: str,
    which: int | Sequence[int],
    forecast: xr.DataTree | None,
    context: int | None,
    ax: Axes | Sequence[Axes] | None,
    *words: str,
) -> np.ndarray:
    """:func:`trajectories`; ``words`` are what the caller calls the two trees."""
    if of not in DIMS:
        raise ValueError(f"{caller}: needed of= 'rates' or 'latents', got {of!r}")
    for which_tree, word, hint in (
        (forecast, words[1], "; a trial that ends before the context is not forecast"),
        (tree, words[0], ""),
    ):
        known = () if which_tree is None else trials(which_tree, recording)
        if which_tree is not None and trial not in known:
            raise ValueError(
                f"{caller}: needed trial {trial} of recording {recording!r} in the {word}, got "
                f"{checks.some(known) or 'none'}{hint}"
            )
    given.recording(caller, tree, recording, "posterior", "observed_data")
    past = part(tree, recording, "posterior")[of].sel(trial=trial)
    if forecast is None:
        own = tree[recording].children
        ahead = part(tree, recording, "predictions")[of] if "predictions" in own else None
        ahead = ahead.sel(trial=trial) if ahead is not None and trial in ahead["trial"] else None
    else:
        given.recording(caller, forecast, recording, "predictions")
        ahead = part(forecast, recording, "predictions")[of].sel(trial=trial)
    dim = DIMS[of]
    places = _chosen(caller, past, dim, which)
    panels = _panels(caller, ax, len(places), dim)
    time = past["time"].values
    width = float(time[1] - time[0]) if len(time) > 1 else 1.0
    end, begins = time[-1] + width / 2, None
    if ahead is not None:
        first = (ahead["time"].values[0] - time[0]) / width if context is None else context
        begins = round(first)
        end = max(end, ahead["time"].values[-1] + width / 2)
    seen = part(tree, recording, "observed_data")["observations"].sel(trial=trial)
    for axes, place in zip(panels, places, strict=True):
        if of == "rates":
            y = seen.isel(neuron=place)
            axes.plot(y["time"], y, ".", color=BLACK, markersize=3.5, label="observed")
        _band(axes, past.isel({dim: place, "time": slice(begins)}), BLUE, "-", "reconstructed")
        if ahead is not None and begins is not None:
            _band(axes, ahead.isel({dim: place}), ORANGE, "--", "forecast")
            axes.axvline(time[0] + (begins - 0.5) * width, color=BLACK, linewidth=1.0, linestyle=":")
        axes.set_xlim(time[0] - width / 2, end)
        axes.set_ylabel(
            f"neuron {seen['neuron'].values[place]}\n(per bin)" if of == "rates" else f"latent {place + 1}"
        )
    what = {"rates": "rate", "latents": "latent"}[of]
    panels[0].set_title(
        f"{recording}, trial {trial} (bands hold 90 % of the {what}'s draws)", fontsize="medium"
    )
    panels[0].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize="small")
    panels[-1].set_xlabel("time (s)")
    return panels


def trials(tree: xr.DataTree, recording: str) -> list[int]:
    """The trials of a recording in a tree; none of one that is not there."""
    if recording not in getattr(tree, "children", {}):
        return []
    return part(tree, recording, "observed_data")["trial"].values.tolist()


# ---- parts -----------------------------------------------------------------------------------------------


def _chosen(caller: str, past: xr.DataArray, dim: str, which: int | Sequence[int]) -> list[int]:
    """The positions to draw; of a number of them those that vary most."""
    if isinstance(which, int | np.integer):
        checks.integers(which=which)
        spread = np.nan_to_num(past.mean(("chain", "draw")).std("time").values)
        return sorted(np.argsort(-spread, kind="stable")[:which].tolist())
    places, size = [int(place) for place in which], past.sizes[dim]
    wrong = [place for place in places if not -size <= place < size]
    if wrong or not places:
        raise ValueError(f"{caller}: needed positions below {size}, got {checks.some(wrong) or 'none'}")
    return [place % size for place in places]


def _panels(caller: str, ax: Axes | Sequence[Axes] | None, number: int, dim: str) -> np.ndarray:
    if ax is None:
        import matplotlib.pyplot as plt

        size = (7, 1.2 + 1.4 * number)
        grid = plt.subplots(number, 1, sharex=True, figsize=size, layout="constrained", squeeze=False)[1]
        return grid[:, 0]
    panels = np.atleast_1d(np.asarray(ax, object)).ravel()
    if len(panels) < number:
        raise ValueError(
            f"{caller}: needed {number} axes, one for each {dim.split('_')[0]}, got {len(panels)}"
        )
    return panels[:number]


def _band(ax: Axes, draws: xr.DataArray, color: str, style: str, label: str) -> None:
    time = draws["time"].values
    low, high = draws.quantile(INTERVAL, ("chain", "draw"), skipna=False).values
    ax.fill_between(time, low, high, color=color, alpha=0.25, linewidth=0)
    ax.plot(time, draws.mean(("chain", "draw")).values, style, color=color, linewidth=1.6, label=label)
