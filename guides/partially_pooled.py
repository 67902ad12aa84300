"""The paper's guide, of which every recording has a version of its own."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call

from pyro_metassm.guides.dkf import DKF
from pyro_metassm.models.meta_ssm import MetaSSM
from pyro_metassm.models.partially_pooled import OWN
from pyro_metassm.recordings import Batch


class PartiallyPooledDKF(DKF):
    """:class:`DKF` whose recurrent network has weights ``phi + delta_i`` in recording i, shared and its own.

    ``delta_i`` starts at zero. What the network reads is in a space that recordings share, but how fast their neurons
    say it, and how much, differs between them; one network of all costs each some of its reconstruction.

    Both learn at rates whose sum is the fit's, so that a recording's own network moves as fast as one alone would: Adam
    steps do not shrink where two tables add up, and at twice the rate networks fit their training trials worse.

    Args:
        model: the model that this guide is for.
        options: as of :class:`DKF`.

    Example:
        >>> import pyro_metassm as pm
        >>> recs = pm.simulate.limit_cycles([2.5, 5.0], num_trials=8, num_steps=20)
        >>> model = pm.models.PartiallyPooled(recs, latent_dim=2, embedding_dim=1)
        >>> guide = pm.guides.PartiallyPooledDKF(model, hidden_dim=32)
    """

    deviations = ("deviation",)
    learning_rates = {"rnn": 1 - OWN, "deviation": OWN}

    def __init__(self, model: MetaSSM, **options):
        super().__init__(model, **options)
        number = len(model.names)
        self.deviation = nn.ParameterDict(
            {name: nn.Parameter(p.new_zeros(number, *p.shape)) for name, p in self.rnn.named_parameters()}
        )

    def recurrent(self, x: Tensor, lengths: Tensor, batch: Batch) -> Tensor:
        shared = dict(self.rnn.named_parameters())
        rows = [self.model.names.index(name) for name in batch.names]
        of_each = [
            self._through(
                {key: weight + self.deviation[key][row] for key, weight in shared.items()},
                x[..., r, :, :, :],
                lengths[..., r, :],
            )
            for r, row in enumerate(rows)
        ]
        return torch.stack(of_each, -4)

    def _through(self, weights: dict[str, Tensor], x: Tensor, lengths: Tensor) -> Tensor:
        y = functional_call(self.rnn, weights, (x.flatten(0, -3), lengths.flatten()))
        return y.unflatten(0, x.shape[:-2])
