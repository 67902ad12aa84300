"""Learned latents beside true ones: the affine map between them, and displacements of learned dynamics."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import xarray as xr

from pyro_metassm.result import Fit
from pyro_metassm.trees import part


@dataclass(frozen=True)
class AffineMap:
    """Between learned and true latents, which agree up to an affine map at best.

    ``truth = latents @ matrix + offset``, and back ``latents = truth @ back_matrix + back_offset``; ``r2``
    says how well the true latents are met.
    """

    matrix: np.ndarray
    offset: np.ndarray
    back_matrix: np.ndarray
    back_offset: np.ndarray
    r2: float

    def to_truth(self, latents: np.ndarray) -> np.ndarray:
        """``(..., latent_dim)`` to ``(..., truth_dim)``."""
        return latents @ self.matrix + self.offset

    def to_latents(self, truth: np.ndarray) -> np.ndarray:
        """``(..., truth_dim)`` to ``(..., latent_dim)``."""
        return truth @ self.back_matrix + self.back_offset


def align(tree: xr.DataTree, recording: str) -> AffineMap:
    """The affine map from a recording's posterior mean latents to its true latents, by least squares.

    Args:
        tree: of :func:`pyro_metassm.posterior` of simulated recordings (with ``constant_data/true_latents``).
        recording: its name.

    Returns:
        the map. With as many latents as true ones its back is the exact inverse, else a regression of its
        own.

    Raises:
        ValueError: a recording that the tree lacks, or one without true latents.
    """
    z, _ = tree_latents(tree, recording)
    constant = part(tree, recording, "constant_data")
    if "true_latents" not in constant:
        raise ValueError(
            f"align: needed the true latents of recording {recording!r} in the tree, got none; they come "
            "with pm.posterior of simulated recordings"
        )
    z, truth = (
        z.reshape(-1, z.shape[-1]),
        constant["true_latents"].values.reshape(-1, constant.sizes["truth_dim"]),
    )
    known = np.isfinite(z).all(1) & np.isfinite(truth).all(1)
    z, truth = z[known].astype(np.float64), truth[known].astype(np.float64)
    matrix, offset = _regression(z, truth)
    if z.shape[1] == truth.shape[1]:
        back_matrix = np.linalg.inv(matrix)
        back_offset = -offset @ back_matrix
    else:
        back_matrix, back_offset = _regression(truth, z)
    error = ((truth - z @ matrix - offset) ** 2).sum() / ((truth - truth.mean(0)) ** 2).sum()
    return AffineMap(matrix, offset, back_matrix, back_offset, float(1 - error))


def displacement(fit: Fit, recording: str, states: np.ndarray) -> np.ndarray:
    """Mean displacement in a bin of states ``(..., latent_dim)``, at the recording's mean embedding."""
    row = fit.names.index(recording)
    z = torch.as_tensor(states.reshape(1, 1, -1, states.shape[-1]), dtype=fit.dtype, device=fit.device)
    with torch.no_grad(), fit.model.given(fit.guide.global_sites.medians()):
        dynamics = fit.model.dynamics_of(mean_embedding(fit, row), torch.tensor([row], device=fit.device))
        change = successor(fit.model, z, dynamics).mean - z
    return change.cpu().numpy().reshape(states.shape)


def tree_latents(tree: xr.DataTree, recording: str) -> tuple[np.ndarray, float | None]:
    """Posterior mean latents ``(trial, time, latent_dim)`` and the bin width in s."""
    if recording not in tree.children or "posterior" not in tree[recording].children:
        raise ValueError(
            f"needed recording {recording!r} in a tree of pm.posterior, got {list(tree.children)}"
        )
    latents = part(tree, recording, "posterior")["latents"].mean(("chain", "draw"))
    time = latents["time"].values
    z = latents.transpose("trial", "time", "latent_dim").values
    return z, float(time[1] - time[0]) if len(time) > 1 else None


def mean_embedding(fit: Fit, row: int) -> torch.Tensor:
    """Posterior mean of a recording's embedding, ``(1, 1, embedding_dim)`` as the model's plates have it."""
    return fit.guide.embedding_posterior(fit.statistics[row : row + 1]).mean


def successor(model, z: torch.Tensor, dynamics):
    """The transition, of inputs that are zero where it reads any."""
    if not model.reads_inputs:
        return model.transition(z, dynamics)
    return model.transition(z, dynamics, inputs=z.new_zeros(*z.shape[:-1], model.config.get("input_dim", 1)))


# ---- parts -----------------------------------------------------------------------------------------------


def _regression(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    weights = np.linalg.lstsq(x - x.mean(0), y - y.mean(0), rcond=None)[0]
    return weights, y.mean(0) - x.mean(0) @ weights
