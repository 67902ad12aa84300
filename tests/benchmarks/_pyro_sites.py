"""Baseline ``pyro_sites``: the form of Pyro's tutorial on deep Markov models, with a site for every time step.

Classic ``SVI`` with the parameter store, a plate over the trials of each recording, and ``TraceMeanField_ELBO``, which
takes the KL of every site analytically as the library does.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from _cases import Case
from _networks import Networks
from pyro.infer import SVI, TraceMeanField_ELBO
from pyro.optim import ClippedAdam
from torch import Tensor

Trials = tuple[Tensor, Tensor]  # indices (K,) of trials of a recording, and which bins are rolled out (K, T)


class PyroSites:
    """The state of a fit, and a step of it."""

    def __init__(self, case: Case, arrays: dict[str, np.ndarray], device: torch.device | str = "cpu"):
        self.case = case
        self.data = [torch.from_numpy(y).to(device) for y in arrays.values()]
        self.networks = Networks(case).to(device)
        optimizer = ClippedAdam({"lr": 1e-3, "betas": (0.9, 0.99), "clip_norm": 10.0})
        self.svi = SVI(self.model, self.guide, optimizer, loss=TraceMeanField_ELBO())
        self.store: dict = {"params": {}, "constraints": {}}

    def take_step(self) -> float:
        """One step of SVI on a random batch; returns the loss. The store and the settings are left as they were."""
        with pyro.get_param_store().scope(self.store), pyro.validation_enabled(False):
            return self.svi.step([self.draw(y) for y in self.data])

    def draw(self, y: Tensor) -> Trials:
        trials = torch.randperm(len(y), device=y.device)[: self.case.trials_per_step]
        shape = (len(trials), y.shape[1])
        return trials, torch.rand(shape, device=y.device) < self.case.rollout_probability

    def model(self, batch: Sequence[Trials]) -> None:
        net = self.networks
        pyro.module("networks", net)
        noise = net.log_noise.exp()
        for r, (y, (trials, _)) in enumerate(zip(self.data, batch, strict=True)):
            zero = y.new_zeros(self.case.embedding_dim)
            e = pyro.sample(f"e_{r}", dist.Normal(zero, torch.ones_like(zero)).to_event(1))
            dynamics, sd = net.dynamics.at(e), net.log_sd[r].exp()
            with pyro.plate(f"trials_{r}", len(y), subsample=trials):
                y = y[trials]
                loc, scale = net.initial_loc.expand(len(trials), -1), net.initial_log_scale.exp()
                for t in range(y.shape[1]):
                    z = pyro.sample(f"z_{r}_{t}", dist.Normal(loc, scale).to_event(1))
                    predicted = net.read_out[r](z)
                    pyro.sample(f"y_{r}_{t}", dist.Normal(predicted, sd).to_event(1), obs=y[:, t])
                    loc, scale = dynamics(z), noise

    def guide(self, batch: Sequence[Trials]) -> None:
        net = self.networks
        pyro.module("networks", net)
        noise = net.log_noise.exp()
        for r, (y, (trials, rollout)) in enumerate(zip(self.data, batch, strict=True)):
            ybar = net.read_in[r](y[trials])
            e = pyro.sample(f"e_{r}", dist.Normal(*net.embedding(ybar)).to_event(1))
            dynamics = net.dynamics.at(e)
            loc, scale = net.states(ybar, e)
            with pyro.plate(f"trials_{r}", len(y), subsample=trials):
                z = pyro.sample(f"z_{r}_0", dist.Normal(loc[:, 0], scale[:, 0]).to_event(1))
                for t in range(1, y.shape[1]):
                    # Where a bin is rolled out, its factor is the prior's own, and its KL vanishes.
                    rolled = rollout[:, t, None]
                    q = dist.Normal(
                        torch.where(rolled, dynamics(z), loc[:, t]), torch.where(rolled, noise, scale[:, t])
                    )
                    z = pyro.sample(f"z_{r}_{t}", q.to_event(1))
