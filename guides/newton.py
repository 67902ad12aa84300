"""What a model's own read-outs make of a bin: for guides to read, beside what they read by weights of their own."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_metassm.models.meta_ssm import MetaSSM
from pyro_metassm.observations import curvature, of_single_neurons
from pyro_metassm.recordings import Batch


def first_newton_step(model: MetaSSM, batch: Batch) -> Tensor:
    r"""The first Newton step of a bin's state from rest, uphill in what its neurons say, ``(R, K, T, latent_dim)``::

        (I + sum_n w_n c_n c_n^T)^-1 sum_n s_n c_n,    s_n = d log p(y_n | x) / dx,  w_n = -d^2 log p(y_n | x) / dx^2

    at ``x = d_n``, for read-outs ``(c_n, d_n)``, over the neurons seen that are not held out. Under a standard Normal
    prior of the state it is the posterior mean where observations are Gaussian, and on the way to the mode elsewhere
    (Laplace's method; Bishop, Pattern Recognition and Machine Learning, 2006, section 4.4). Few neurons, or none, move
    it little, or not. Its gradient is that of the weights ``c_n`` alone, at the slopes and curvatures as they are.

    Args:
        model: whose read-outs and likelihood these are.
        batch: what was observed.

    Raises:
        ValueError: for a likelihood of all neurons together.
    """
    if not of_single_neurons(model, batch):
        raise ValueError(
            "newton_step: needed a likelihood of single neurons, got a joint one, "
            f"{type(model.observation).__name__}; make the guide with newton_step=False"
        )
    trials, bins = batch.observations.shape[1:3]
    steps = []
    for r, name in enumerate(batch.names):
        place, held_in = model.neurons.slice(name), batch.held_in[r, : batch.num_neurons[r]]
        weight, bias = model.read_out.weight[place], model.read_out.bias[place]
        _, slope, second = curvature(model, bias.detach().expand(trials, bins, -1), batch, r)
        slope, second = slope * held_in, second * held_in
        squares = (weight.unsqueeze(-1) * weight.unsqueeze(-2)).flatten(1)
        precision = (second @ squares).unflatten(-1, weight.shape[-1:] * 2)
        precision = precision + torch.eye(weight.shape[-1]).to(weight)
        # At least the identity, so never singular: nothing to check, for which a GPU would have to wait.
        steps.append(torch.linalg.solve_ex(precision, slope @ weight).result)
    return torch.stack(steps)
