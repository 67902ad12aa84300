"""The paper's guide, of the Deep Kalman Filter family (eq. 15-17)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyro_metassm.blocks import everywhere
from pyro_metassm.distributions import MarkovPath, RolloutPath
from pyro_metassm.guides.base import AmortizedGuide
from pyro_metassm.guides.encoders import EmbeddingEncoder, SetEncoder
from pyro_metassm.guides.gru import BidirectionalGRU
from pyro_metassm.guides.newton import first_newton_step
from pyro_metassm.models.meta_ssm import MetaSSM
from pyro_metassm.native.mlp import affine
from pyro_metassm.recordings import Batch


class DKF(AmortizedGuide):
    r"""``q(z_k | y_k, e_i) = prod_t Normal(mu_b([ybar_k; e_i])_t, var_b([ybar_k; e_i])_t)`` (eq. 16-17).

    A bidirectional gated recurrent network reads the common space and the embedding. Its means correct the *frame*
    (see :class:`AmortizedGuide`), so that a started guide begins as a sensible one.

    Args:
        model: the model that this guide is for.
        read_in_dim: channels of the read-in of each recording; default ``max(16, 2 latent_dim)``.
        common_dim: size of a second, shared linear layer with normalisation after the read-in; None for none.
        hidden_dim: width of the recurrent network, each direction.
        rollout_probability: while guide and model are training, the probability that a bin's state is the dynamics
            applied to the state before it (the bin's KL vanishes: still a valid bound). It teaches the dynamics to
            carry several steps: 0.8 forecasts better where the noise of the states is not small beside them, 0.2
            reconstructs better.
        embedding_encoder: :class:`~pyro_metassm.guides.encoders.SetEncoder` or ``RecurrentEncoder``.
        detach_embedding: cut the gradient of ``e`` where it enters the state encoder.
        neuron_dropout: while training, the largest share of a trial's neurons that the guide does not see (see
            :class:`AmortizedGuide`): against guides that learn few trials of many neurons by heart.
        newton_step: the recurrent network also reads what the model's own read-outs make of a bin
            (:func:`~pyro_metassm.guides.newton.first_newton_step`), ``latent_dim`` channels more, in which all
            recordings speak alike and which have no weights that could learn trials by heart. For likelihoods of
            single neurons.

    Raises:
        ValueError: for a probability or a share outside [0, 1), ``read_in_dim < latent_dim``, or ``newton_step`` with
            read-outs that are drawn from a prior; in use, ``newton_step`` with a joint likelihood.

    Example:
        >>> import pyro_metassm as pm
        >>> recs = pm.simulate.limit_cycles([2.5, 5.0], num_trials=8, num_steps=20)
        >>> model = pm.models.MetaSSM(recs, latent_dim=2, embedding_dim=1)
        >>> guide = pm.guides.DKF(model, hidden_dim=32)
    """

    def __init__(
        self,
        model: MetaSSM,
        *,
        read_in_dim: int | None = None,
        common_dim: int | None = None,
        hidden_dim: int = 64,
        rollout_probability: float = 0.2,
        embedding_encoder: type[EmbeddingEncoder] = SetEncoder,
        detach_embedding: bool = True,
        neuron_dropout: float = 0.0,
        newton_step: bool = False,
    ):
        super().__init__(
            model,
            read_in_dim=read_in_dim,
            embedding_encoder=embedding_encoder,
            detach_embedding=detach_embedding,
            neuron_dropout=neuron_dropout,
        )
        if not 0 <= rollout_probability < 1:
            raise ValueError(f"rollout_probability: needed a number in [0, 1), got {rollout_probability!r}")
        if newton_step and not {"weight", "bias"} <= {name for name, _ in model.read_out.named_parameters()}:
            raise ValueError(
                "newton_step: needed read-outs that are parameters, got a prior of them, whose draws a guide does not "
                "know; make the guide with newton_step=False"
            )
        self.config |= {
            "common_dim": common_dim,
            "hidden_dim": hidden_dim,
            "rollout_probability": rollout_probability,
            "newton_step": newton_step,
        }
        self.newton_step = newton_step
        channels = self.read_in.weight.shape[-1] + newton_step * model.latent_dim + 1
        self.common: nn.Sequential | None = None
        if common_dim is not None:
            self.common = nn.Sequential(nn.Linear(channels, common_dim), nn.LayerNorm(common_dim), nn.SiLU())
        in_dim = (channels if common_dim is None else common_dim) + model.latent_dim + model.embedding_dim
        self.rnn = BidirectionalGRU(in_dim, hidden_dim, 2 * model.latent_dim)
        self.rollout_probability = rollout_probability
        with torch.no_grad():  # start as the frame with a tenth of a latent's scale
            self.rnn.weight_out.mul_(0.1)
            self.rnn.bias_out[model.latent_dim :] = -2.3

    @torch.no_grad()
    def start_posterior(self, noise: Tensor) -> None:
        # Nothing is added to the frame: what a random network adds is larger than the noise of many neurons.
        self.rnn.weight_out.zero_()
        self.rnn.bias_out[: len(noise)] = 0.0
        self.rnn.bias_out[len(noise) :] = noise.clamp(0.002, 1.0).log()

    def common_space(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        ybar, frame, share = super().common_space(batch)
        if self.newton_step:
            with self.model.given(self.global_sites.medians()):
                ybar = torch.cat([ybar, first_newton_step(self.model, batch)], -1)
        return ybar, frame, share

    def latents_posterior(
        self, ybar: Tensor, frame: Tensor, share: Tensor, e: Tensor, prior: MarkovPath, batch: Batch
    ) -> RolloutPath:
        common = torch.cat([ybar, share], -1) if self.common is None else self._common(ybar, share)
        shape = (*e.shape[:-2], batch.num_trials, batch.num_bins)
        inputs = torch.cat(
            [common.expand(*shape, -1), frame.expand(*shape, -1), e.unsqueeze(-2).expand(*shape, -1)], -1
        )
        lengths = batch.time_mask.sum(-1).expand(shape[:-1])
        change, log_scale = self.recurrent(inputs, lengths, batch).chunk(2, -1)
        rollout = None
        if self.training and self.model.training and self.rollout_probability > 0:
            rollout = torch.rand(shape) < self.rollout_probability  # on the host, which works out the runs
        return RolloutPath(frame + change, log_scale.clamp(-7.0, 3.0).exp(), prior, rollout)

    def recurrent(self, x: Tensor, lengths: Tensor, batch: Batch) -> Tensor:
        """The network's ``(..., R, K, T, 2 latent_dim)`` for ``x (..., R, K, T, *)``, trials of these lengths."""
        return self.rnn(x.flatten(0, -3), lengths.flatten()).unflatten(0, x.shape[:-2])

    def _common(self, ybar: Tensor, share: Tensor) -> Tensor:
        """``common`` of both together; the share, mostly the same everywhere, is not worth a copy of ``ybar``."""
        assert self.common is not None
        linear, *rest = self.common
        assert isinstance(linear, nn.Linear)
        out = affine(ybar, linear.weight[:, :-1], linear.bias) + everywhere(share) * linear.weight[:, -1]
        for module in rest:
            out = module(out)
        return out
