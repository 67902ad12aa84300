"""Trees as the installed ArviZ reads them."""

from __future__ import annotations

import numpy as np
import xarray as xr

from pyro_metassm import _checks as checks

PREDICTIVE = ("posterior_predictive", "prior_predictive")


def to_arviz(tree: xr.DataTree, recording: str | None = None):
    """What the installed ArviZ reads, summarises, plots and scores: `InferenceData` for 0.x, a `DataTree` for 1.x.

    - ``observed_data``, ``posterior_predictive`` and ``prior_predictive`` have one dimension ``observation``, of the
      observations that were made, in place of ``(trial, time, neuron)``, which become coordinates along it: the plots
      of neither line take missing numbers, and some of 1.x take one dimension alone. Counts are integers.
    - ``log_likelihood`` is that of trials, their latents integrated out (``trials``): bins of a trial are not
      exchangeable, and what leaves a trial out leaves its latents out. ``loo`` and ``compare`` are then of trials; for
      later bins given earlier ones see :func:`pyro_metassm.leave_future_out`.

    Args:
        tree: from :func:`pyro_metassm.posterior`, ``forecast``, ``prior_predictive`` or ``join``.
        recording: take this recording's groups; None takes what is of all recordings: the embeddings, and the log
            likelihood of the trials of all of them, one after the other.

    Raises:
        ImportError: without ArviZ.
        KeyError: for a recording that the tree does not hold.

    Example:
        >>> import pyro_metassm as pm
        >>> recs = pm.simulate.limit_cycles([2.5, 5.0], num_trials=8, num_steps=20)
        >>> model = pm.models.MetaSSM(recs, latent_dim=2, embedding_dim=1)
        >>> fit = pm.fit(model, pm.guides.DKF(model), recs, num_steps=5, warm_start_steps=5, progress=False)
        >>> data = pm.to_arviz(pm.posterior(fit, recs, log_likelihood=True))
        >>> data["log_likelihood"]["trials"].shape  # chain, draw, trials of both recordings: for arviz.loo(data)
        (1, 100, 16)
    """
    import arviz  # here, not above: nothing else of the library needs it

    if recording is not None:
        recordings = {name: node for name, node in tree.children.items() if node.children}
        if recording not in recordings:
            raise checks.lacking("recording", recording, recordings)
        groups = {name: node.to_dataset() for name, node in recordings[recording].children.items()}
        if "log_likelihood" in groups:
            groups["log_likelihood"] = groups["log_likelihood"][["trials"]]
        _flat(groups)
    else:
        groups = {
            name: _of_one_kind(node.to_dataset()) for name, node in tree.children.items() if not node.children
        }
        recordings = {name: node for name, node in tree.children.items() if "log_likelihood" in node.children}
        parts = {name: node["log_likelihood"].to_dataset()["trials"] for name, node in recordings.items()}
        if parts:
            groups["log_likelihood"] = _one_after_the_other(parts)
    if arviz.__version__.startswith("0."):
        # What 0.x does not know: the fit's history, which has no chain and draw, and statistics of draws.
        known = {
            name: ds for name, ds in groups.items() if name != "sample_stats" and "statistics" not in name
        }
        return arviz.InferenceData(**known)  # type: ignore[arg-type]
    return xr.DataTree.from_dict(groups)


def _of_one_kind(group: xr.Dataset) -> xr.Dataset:
    """Without what is said of the recordings in a group with variables that have none: `summary` of 1.x stacks them."""
    some = [
        name
        for name, coord in group.coords.items()
        if name not in group.dims and any(not set(coord.dims) <= set(v.dims) for v in group.values())
    ]
    return group.drop_vars(some)


def _one_after_the_other(parts: dict[str, xr.DataArray]) -> xr.Dataset:
    """The trials of all recordings, named ``RECORDING TRIAL``."""
    named = [
        part.drop_vars("condition", errors="ignore").assign_coords(
            recording=("trial", [name] * part.sizes["trial"]),
            trial=[f"{name} {trial}" for trial in part["trial"].values],
        )
        for name, part in parts.items()
    ]
    return xr.concat(named, "trial").to_dataset(name="trials")


def _flat(groups: dict[str, xr.Dataset]) -> None:
    """One dimension of the observations that were made, of the data and of draws of them; counts as integers."""
    names = [name for name in (*PREDICTIVE, "observed_data") if name in groups]
    values = groups["observed_data"]["observations"]
    chosen = np.flatnonzero(values.notnull().values.ravel())
    for name in names:
        flat = groups[name]["observations"].stack(observation=values.dims, create_index=False)
        groups[name] = flat.isel(observation=chosen).to_dataset(name="observations")
    known = {name: groups[name]["observations"].notnull() for name in names}
    if all(bool((~known[name] | (groups[name]["observations"] % 1 == 0)).all()) for name in names):
        for name in names:
            if bool(known[name].all()):  # draws of the prior may have left the finite numbers
                groups[name] = groups[name].astype(np.int32)
