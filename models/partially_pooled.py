"""A family of dynamics whose recordings are not of it alone: each adds something of its own."""

from __future__ import annotations

import pyro.distributions as dist
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from pyro_metassm.adaptations import DeviatingMLP
from pyro_metassm.models.meta_ssm import MetaSSM
from pyro_metassm.neurons import NeuronTable
from pyro_metassm.recordings import Recordings

OWN = 0.3  # of the learning rate


class PartiallyPooled(MetaSSM):
    r"""The family of :class:`MetaSSM`, and deviations of every recording from it, in its dynamics and its noise::

        z_{k,t} | z_{k,t-1} ~ Normal(f_{e_i}(z_{k,t-1}) + delta_i phi(z_{k,t-1}, e_i) + d_i, diag(q exp(g_i))^2)

    ``phi`` is the last hidden layer of ``f``: features of the family, which a recording adds up in its own way.
    ``delta_i``, ``d_i`` and ``g_i`` are zero at first, and after the start from the data; the former two cost what the
    embedding's changes do (``update_penalty`` of ``pm.fit``). For recordings that a family of few dimensions does not
    hold, such as of different areas of the brain: without deviations these lose by being fitted together, the more the
    finer their bins.

    ``adapt_dynamics(e)`` are dynamics of the family: what :mod:`pyro_metassm.analysis` shows of an embedding (of a
    recording's name, its own), and where :func:`pyro_metassm.adapt` starts a new recording.

    Between complete pooling and none (Gelman and Hill, 2007, chapter 12); :class:`~pyro_metassm.guides.
    PartiallyPooledDKF` is the guide that goes with it.

    Args:
        recordings, options: as of :class:`MetaSSM`; ``dynamics_class`` has no effect.

    Example:
        >>> import pyro_metassm as pm
        >>> recs = pm.simulate.limit_cycles([2.5, 5.0], num_trials=8, num_steps=20)
        >>> model = pm.models.PartiallyPooled(recs, latent_dim=2, embedding_dim=1)
        >>> guide = pm.guides.PartiallyPooledDKF(model)
        >>> fit = pm.fit(model, guide, recs, num_steps=5, warm_start_steps=5, progress=False)
    """

    deviations = ("dynamics.weight", "dynamics.bias", "log_noise")
    learning_rates = dict.fromkeys(deviations, OWN)  # slower than what is shared, which is to say what it can

    def __init__(self, recordings: Recordings | NeuronTable, **options):
        super().__init__(recordings, **options)
        sizes = {key: self.config[key] for key in ("rank", "hidden_dim")}
        self.dynamics = DeviatingMLP(len(self.names), self.latent_dim, self.embedding_dim, **sizes)
        self.log_noise = nn.Parameter(self.read_out.weight.new_zeros(len(self.names), self.latent_dim))

    def adapt_dynamics(self, e: Tensor):
        dynamics = super().adapt_dynamics(e)
        dynamics.noise = self.process_noise()
        return dynamics

    def dynamics_of(self, e: Tensor, recording: Tensor):
        dynamics = self.dynamics(e, recording)
        dynamics.noise = self.process_noise() * self.log_noise[recording].exp()[:, None, None]
        return dynamics

    def transition(self, z: Tensor, dynamics) -> TorchDistribution:
        return dist.Normal(dynamics(z), dynamics.noise).to_event(1)
