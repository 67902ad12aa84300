"""Fits to draw from, and what it means for two trees to be the same."""

import dataclasses

import numpy as np
import torch
import xarray as xr

import pyro_metassm as pm
from pyro_metassm.recordings import Recordings

QUICK = {"num_steps": 4, "warm_start": False, "progress": False, "trials_per_step": 2}


def fit_for(recs: Recordings, family=pm.likelihoods.Gaussian, **more) -> pm.Fit:
    torch.manual_seed(0)
    model = pm.models.MetaSSM(recs, latent_dim=2, embedding_dim=2, hidden_dim=8, likelihood=family)
    fit = pm.fit(model, pm.guides.DKF(model, hidden_dim=6, **more), recs, **QUICK)
    with torch.no_grad():  # as if it had been trained: everything acts on everything
        for parameter in (*fit.model.parameters(), *fit.guide.parameters()):
            parameter.add_(0.2 * torch.randn_like(parameter))
    return dataclasses.replace(fit, statistics=fit.statistics + 0.3)


def variables(tree: xr.DataTree) -> dict[str, np.ndarray]:
    """Every variable of a tree by its path."""
    return {f"{node.path}/{name}": v.values for node in tree.subtree for name, v in node.data_vars.items()}


def identical(a: xr.DataTree, b: xr.DataTree, under: str = "/") -> bool:
    one, other = ({k: v for k, v in variables(t).items() if k.startswith(under)} for t in (a, b))
    assert one and one.keys() == other.keys()
    return all(np.array_equal(v, other[k], equal_nan=v.dtype.kind == "f") for k, v in one.items())
