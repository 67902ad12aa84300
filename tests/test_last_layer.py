"""What data say about a last layer: against finite differences of the exact log evidence, and dense matrices."""

import math

import numpy as np
import torch

import pyro_metassm as pm
from pyro_metassm.guides.exact import GaussianPath
from pyro_metassm.laplace_smoother import Chain, log_evidence, smoothed
from pyro_metassm.last_layer import covariances, information, last_hidden
from pyro_metassm.models.revised import with_last_layer

D, HIDDEN = 2, 3


def recordings():
    rng = np.random.default_rng(0)
    y = rng.normal(size=(3, 6, 5))
    y[0, 2], y[1, 3:, 1], y[2, 5] = np.nan, np.nan, np.nan
    return pm.Recordings([pm.Recording("a", y, bin_width=0.02)])


def started(recs, activation=None):
    torch.manual_seed(0)
    model = pm.models.MetaSSM(recs, latent_dim=D, embedding_dim=1, hidden_dim=HIDDEN).double()
    model.requires_grad_(False)
    model.process_noise.log_scale.fill_(math.log(0.4))
    if activation is not None:
        model.dynamics.activation = activation
    batch = recs.batch(model.names, dtype=torch.float64)
    return model, model.dynamics_of(torch.full((1, 1, 1), 0.7, dtype=torch.float64), batch.recording), batch


def evidence(model, dynamics, weights, batch):
    precision, first = model.process_noise().pow(-2).diag(), model.initial.scale.pow(-2).diag()
    chain = Chain(with_last_layer(dynamics, weights[None, None]), precision, model.initial.loc, first)
    zeros = torch.zeros(1, batch.num_trials, batch.num_bins, D, dtype=torch.float64)
    path = smoothed(model, chain, zeros, batch, num_steps=3)
    return float(log_evidence(model, chain, path, batch).sum())


def test_the_slope_is_that_of_the_evidence_where_dynamics_are_linear():
    """Noise of the states included: a regression on smoothed states has another one."""
    model, dynamics, batch = started(recordings(), activation=lambda x: x)
    features = torch.randn(HIDDEN + 1, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    change = 0.1 * torch.randn(3, D, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    zeros = torch.zeros(1, batch.num_trials, batch.num_bins, D, dtype=torch.float64)
    found = information(model, dynamics, features, change, zeros, batch)
    h, slope = 1e-4, torch.empty(3, D, dtype=torch.float64)
    for at in np.ndindex(3, D):
        step = torch.zeros(3, D, dtype=torch.float64)
        step[at] = h
        up, down = (evidence(model, dynamics, features @ (change + s * step), batch) for s in (1, -1))
        slope[at] = (up - down) / (2 * h)
    torch.testing.assert_close(found.slope.sum(0).unflatten(0, (3, D)), slope, rtol=1e-5, atol=1e-5)


def test_the_information_is_the_curvature_of_the_evidence_where_it_is_a_parabola():
    """In a constant, the evidence of linear dynamics is one."""
    model, dynamics, batch = started(recordings(), activation=lambda x: x)
    features = torch.zeros(HIDDEN + 1, 1, dtype=torch.float64)
    features[-1] = 1.0
    zeros = torch.zeros(1, batch.num_trials, batch.num_bins, D, dtype=torch.float64)
    found = information(model, dynamics, features, torch.zeros(1, D, dtype=torch.float64), zeros, batch)
    at = lambda *c: evidence(model, dynamics, features @ torch.tensor([c], dtype=torch.float64), batch)
    second = [[at(0.5, 0) - 2 * at(0, 0) + at(-0.5, 0), 0.0], [0.0, at(0, 0.5) - 2 * at(0, 0) + at(0, -0.5)]]
    second[0][1] = second[1][0] = (at(0.5, 0.5) - at(0.5, -0.5) - at(-0.5, 0.5) + at(-0.5, -0.5)) / 4
    torch.testing.assert_close(
        -found.matrix, torch.tensor(second, dtype=torch.float64) / 0.25, rtol=1e-6, atol=1e-6
    )


def test_covariances_are_those_of_the_dense_inverse():
    rng = torch.Generator().manual_seed(0)
    factor = torch.randn(2, 4 * D, 4 * D, dtype=torch.float64, generator=rng).tril()
    blocks = torch.arange(4 * D) // D
    factor[:, (blocks[:, None] - blocks[None]).abs() > 1] = 0.0
    precision = factor @ factor.mT + 0.5 * torch.eye(4 * D, dtype=torch.float64)
    block = lambda matrix, s, t: matrix[:, s * D : s * D + D, t * D : t * D + D]
    diagonal = torch.stack([block(precision, t, t) for t in range(4)], 1)[None]
    below = torch.stack([block(precision, t + 1, t) for t in range(3)], 1)[None]
    mask = torch.ones(1, 2, 4, dtype=torch.bool)
    own, cross = covariances(
        GaussianPath(diagonal, below, torch.zeros(1, 2, 4, D, dtype=torch.float64), mask)
    )
    dense = torch.linalg.inv(precision)
    for t in range(4):
        torch.testing.assert_close(own[t], block(dense, t, t))
    for t in range(3):
        torch.testing.assert_close(cross[t], block(dense, t, t + 1))


def test_the_last_hidden_layer_times_its_weights_is_the_step():
    model, dynamics, _ = started(recordings())
    z = torch.randn(1, 2, 4, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    layer = model.dynamics.layers[-1]
    weights = torch.cat([layer.weight.mT, layer.bias[None]])
    torch.testing.assert_close(dynamics(z), z + last_hidden(dynamics, z) @ weights)
    change = torch.randn(1, 1, HIDDEN + 1, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    changed = with_last_layer(with_last_layer(dynamics, 0.3 * change), 0.7 * change)
    torch.testing.assert_close(changed(z), dynamics(z) + last_hidden(dynamics, z) @ change[0, 0])
