"""Several trees of one fit as one."""

from __future__ import annotations

import numpy as np
import xarray as xr


def join(*trees: xr.DataTree) -> xr.DataTree:
    """One tree of the posterior, the prior and the forecasts of a fit, for the same recordings.

    Args:
        *trees: of :func:`pyro_metassm.posterior`, ``prior_predictive`` and ``forecast``, in any order, each at most
            once; made with one fit (or its model) from the same data.

    Returns:
        a tree that has all their groups. Forecasts keep what belongs to them together: ``predictions`` at the root has
        the embeddings that they were made with, ``predictions_constant_data`` of a recording what was observed and
        known in the forecast bins. What was said of a whole tree (``seed``, ``context``, ``horizon``) stands with its
        groups at the root.

    Raises:
        ValueError: a group in two trees, trees of different fits, recordings or data.

    Example:
        >>> import pyro_metassm as pm
        >>> recs = pm.simulate.limit_cycles([2.5, 5.0], num_trials=8, num_steps=20)
        >>> model = pm.models.MetaSSM(recs, latent_dim=2, embedding_dim=1)
        >>> fit = pm.fit(model, pm.guides.DKF(model), recs, num_steps=5, warm_start_steps=5, progress=False)
        >>> tree = pm.join(
        ...     pm.posterior(fit, recs, predictive=True, log_likelihood=True),
        ...     pm.prior_predictive(fit.model, recs),
        ...     pm.forecast(fit, recs, context=10, horizon=10),
        ... )
        >>> sorted(tree["w=5"].children)[-4:]
        ['predictions', 'predictions_constant_data', 'prior', 'prior_predictive']
    """
    if not trees:
        raise ValueError("join: needed trees of pm.posterior, pm.prior_predictive or pm.forecast, got none")
    groups: dict[str, xr.Dataset] = {}
    for tree in trees:
        for path, dataset in _groups(tree).items():
            if path in groups and _may_stand_twice(path):
                _check_same(path, groups[path], dataset)
            elif path in groups:
                raise ValueError(f"join: needed every group in one of the trees, got {path!r} in two")
            else:
                groups[path] = dataset
    names = [{child.name for child in tree.children.values() if child.children} for tree in trees]
    if any(other != names[0] for other in names):
        raise ValueError(
            f"join: needed trees of the same recordings, got {[sorted(of, key=str) for of in names]}"
        )
    _check_forecast_data(groups)
    return xr.DataTree.from_dict(groups)


def _groups(tree: xr.DataTree) -> dict[str, xr.Dataset]:
    """The groups of a tree by the paths that they have in a joined one."""
    ahead = "context" in tree.attrs
    found = {}
    for name, child in tree.children.items():
        if not child.children:
            key = "predictions" if ahead and name == "posterior" else name
            dataset = child.to_dataset()
            found[key] = dataset if key == "sample_stats" else dataset.assign_attrs(tree.attrs)
            continue
        parts = {key: node.to_dataset() for key, node in child.children.items()}
        if ahead:
            seen = parts.pop("observed_data")
            # As a plain variable: the condition is a coordinate beside what was observed, and data among what is known.
            observations = seen["observations"].variable
            parts["predictions_constant_data"] = parts.pop("constant_data").assign(observations=observations)
        found |= {f"{name}/{key}": dataset for key, dataset in parts.items()}
    return found


def _may_stand_twice(path: str) -> bool:
    return path.rsplit("/", 1)[-1] in ("sample_stats", "observed_data", "constant_data")


def _check_same(path: str, one: xr.Dataset, other: xr.Dataset) -> None:
    if not one.equals(other):
        what = "fit" if path == "sample_stats" else "data"
        raise ValueError(f"join: needed trees of one {what}, got different {path!r}")


def _check_forecast_data(groups: dict[str, xr.Dataset]) -> None:
    """Where a forecast's bins are among the others, the same was observed."""
    for path, dataset in groups.items():
        name, _, group = path.rpartition("/")
        if group == "predictions_constant_data" and f"{name}/observed_data" in groups:
            pair = (dataset["observations"], groups[f"{name}/observed_data"]["observations"])
            one, other = xr.align(*pair, join="inner", exclude=("neuron",))
            if one.shape != other.shape or not np.array_equal(one, other, equal_nan=True):
                raise ValueError(f"join: needed trees of one data, got different observations of {name!r}")
