r"""The methods that meta-dynamical state space models are compared with, each an edit of :class:`MetaSSM`.

Only the dynamics differ; embedding, first state, noise, read-outs, likelihood and guides are as there. A step is ``z' =
z + W_o s( W_h s( W_i z + b_i ) + b_h ) + b_o``, with ``theta`` all of its weights and biases::

    model             dynamics of recording i                                         rank
    MetaSSM           W + u(e_i) v(e_i)^T for W_i and W_h, by networks u and v        of the update
    FullRank          W + H(e_i) for W_i and W_h, by a network H                      has no effect
    LinearAdapter     theta + L e_i                                                   has no effect
    GEPS              W + A diag(e_i) B^T and b + D e_i in every layer                per entry of e_i
    EmbeddingInput    W_i z + W_e e_i + b_i in place of W_i z + b_i                   has no effect
    SharedDynamics    theta                                                           has no effect
    SingleSession     theta_i, its own                                                has no effect

All take the arguments of :class:`MetaSSM`. At ``e = 0`` the first five are shared dynamics.

Example:
    >>> import pyro_metassm as pm
    >>> recs = pm.simulate.limit_cycles([2.5, 5.0], num_trials=8, num_steps=20)
    >>> model = pm.models.LinearAdapter(recs, latent_dim=2, embedding_dim=1)
    >>> fit = pm.fit(model, pm.guides.DKF(model), recs, num_steps=5, warm_start_steps=5, progress=False)
"""

from __future__ import annotations

from torch import Tensor

from pyro_metassm.adaptations import (
    GEPSMLP,
    EmbeddingInputMLP,
    FullRankMLP,
    LinearAdapterMLP,
    SessionMLP,
    SharedMLP,
)
from pyro_metassm.models.meta_ssm import MetaSSM
from pyro_metassm.neurons import NeuronTable
from pyro_metassm.recordings import Recordings


class SharedDynamics(MetaSSM):
    """One ``f`` for all recordings, ``z' ~ Normal(f(z), Q)``; read-outs and noise are their own.

    What :class:`MetaSSM` is at rank 0. The embedding is drawn and does not act on the dynamics.
    """

    dynamics_class = SharedMLP


class EmbeddingInput(MetaSSM):
    """The embedding is an input of the dynamics, ``z' ~ Normal(f([z; e_i]), Q)``.

    CAVIA by concatenation (Zintgraf et al., ICML 2019), DYNAMO (Cotler et al., 2023).
    """

    dynamics_class = EmbeddingInputMLP


class LinearAdapter(MetaSSM):
    """All weights and biases of the dynamics are linear in the embedding, ``theta_i = theta + L e_i``.

    CoDA (Kirchmeyer et al., ICML 2022), with the embedding of an amortised guide.
    """

    dynamics_class = LinearAdapterMLP


class GEPS(MetaSSM):
    """Every layer of the dynamics is ``W + A diag(c_i) B^T``, ``b + D c_i``, with shared factors and ``c_i = e_i``.

    GEPS (Kassai Koupai et al., NeurIPS 2024) at rank 1; at rank r, r columns of ``A`` and ``B`` per entry of ``e_i``.
    """

    dynamics_class = GEPSMLP


class FullRank(MetaSSM):
    """The hypernetwork of :class:`MetaSSM` without its low rank: ``W + H(e_i)`` of the input and the hidden matrix."""

    dynamics_class = FullRankMLP


class SingleSession(MetaSSM):
    """Dynamics of its own for every recording, ``z' ~ Normal(f_i(z), Q)``: as many models, fitted as one batch.

    The embedding is drawn and does not act on the dynamics. ``Q``, the first state and the guide's encoders are shared;
    for fits that have nothing in common, fit :class:`SharedDynamics` to ``recs.select([name])``, one by one.

    Raises:
        ValueError: from :meth:`adapt_dynamics`.
    """

    def __init__(self, recordings: Recordings | NeuronTable, *, hidden_dim: int = 64, **options):
        super().__init__(recordings, hidden_dim=hidden_dim, **options)
        self.dynamics = SessionMLP(len(self.names), self.latent_dim, hidden_dim=hidden_dim)

    def adapt_dynamics(self, e: Tensor):
        raise ValueError(
            "SingleSession: needed a recording that the model was made with, got an embedding alone; recordings share "
            "no dynamics that it could adapt: use dynamics_of(e, recording), and make a new model for new recordings"
        )

    def dynamics_of(self, e: Tensor, recording: Tensor):
        return self.dynamics(recording)
