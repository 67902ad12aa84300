"""The meta-dynamical state space model as a Pyro program (Vermani et al., ICLR 2025, eq. 8-13)."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from functools import partial

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from pyro_metassm.describing import describe
from pyro_metassm.dims import named
from pyro_metassm.distributions import MarkovPath
from pyro_metassm.dynamics import LowRankMLP
from pyro_metassm.global_sites import Program
from pyro_metassm.likelihoods import Gaussian, Likelihood
from pyro_metassm.neurons import NeuronTable, ReadOut
from pyro_metassm.observations import observed
from pyro_metassm.recordings import Batch, Recordings


class DiagonalNormal(nn.Module):
    """A learned diagonal Normal over a state: ``loc`` (zero unless given) and ``scale``, both ``(latent_dim,)``."""

    def __init__(self, latent_dim: int, scale: float):
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(latent_dim))
        self.log_scale = nn.Parameter(torch.full((latent_dim,), scale).log())

    @property
    def scale(self) -> Tensor:
        return self.log_scale.exp()


class DiagonalNoise(nn.Module):
    """A learned diagonal scale ``(latent_dim,)``."""

    def __init__(self, latent_dim: int, scale: float):
        super().__init__()
        self.log_scale = nn.Parameter(torch.full((latent_dim,), scale).log())

    def forward(self) -> Tensor:
        return self.log_scale.exp()


class MetaSSM(Program):
    r"""One family of latent dynamics for many recordings, indexed by an embedding per recording.

    For recording i, trial k and bin t (eq. 8-13)::

        e_i              ~ Normal(0, I)                            site "embedding"     (recording, embedding_dim)
        z_{k,1}          ~ Normal(mu_0, Sigma_0)
        z_{k,t}|z_{k,t-1} ~ Normal(f_{theta + h(e_i)}(z_{k,t-1}), Q)   site "latents"   (trial, time, latent_dim)
        y_{k,t}|z_{k,t}  ~ p(y | C_i z_{k,t} + d_i)                site "observations"  (trial, time, neuron)

    A variant overrides one of the hooks :meth:`embedding_prior`, :meth:`adapt_dynamics`, :meth:`initial_state`,
    :meth:`transition`, :meth:`likelihood`, or names another ``dynamics_class``; :meth:`forward` stays as it is. What it
    assigns as a ``PyroSample`` in its constructor is one more latent, of all recordings, that the hooks may read; every
    guide has a posterior of it. ``docs/edits.md`` has an example of each.

    Args:
        recordings: the recordings that the model is for (their names, neurons and the scale of their data).
        latent_dim: number of latents.
        embedding_dim: size of the embedding of a recording.
        rank: rank of the embedding's update of the dynamics; 0 is shared dynamics.
        hidden_dim: width of the two hidden layers of the dynamics.
        likelihood: family of observations, a class of :mod:`pyro_metassm.likelihoods`.

    Raises:
        ValueError: for sizes below 1 (``rank`` below 0), or data that the family cannot have produced.

    Example:
        >>> import pyro_metassm as pm
        >>> recs = pm.simulate.limit_cycles([2.5, 5.0], num_trials=8, num_steps=20)
        >>> model = pm.models.MetaSSM(recs, latent_dim=2, embedding_dim=1)
        >>> trace = pyro.poutine.trace(model).get_trace(recs.batch(model.names))
        >>> trace.nodes["latents"]["value"].shape  # (recording, trial, time, latent_dim)
        torch.Size([2, 8, 20, 2])
    """

    deviations: tuple[str, ...] = ()
    """Names, or their beginnings, of tables in which recordings deviate from what they share; a new one's are zero."""

    learning_rates: Mapping[str, float] = {}
    """Relative to that of :func:`pyro_metassm.fit`, of parameters by their names or the beginnings of these."""

    dynamics_class: type = LowRankMLP
    """Makes ``dynamics`` from ``(latent_dim, embedding_dim, *, rank, hidden_dim)``: a module from an embedding to a
    callable, as those of :mod:`pyro_metassm.dynamics` are."""

    def __init__(
        self,
        recordings: Recordings | NeuronTable,
        *,
        latent_dim: int,
        embedding_dim: int,
        rank: int = 1,
        hidden_dim: int = 64,
        likelihood: type[Likelihood] = Gaussian,
    ):
        super().__init__()
        _check_sizes(
            latent_dim=latent_dim, embedding_dim=embedding_dim, hidden_dim=hidden_dim, rank=(rank, 0)
        )
        self.latent_dim, self.embedding_dim = latent_dim, embedding_dim
        self.config = {
            "latent_dim": latent_dim,
            "embedding_dim": embedding_dim,
            "rank": rank,
            "hidden_dim": hidden_dim,
            "likelihood": likelihood,
        }
        self.neurons = recordings if isinstance(recordings, NeuronTable) else NeuronTable.of(recordings)
        self.dynamics: nn.Module = self.dynamics_class(
            latent_dim, embedding_dim, rank=rank, hidden_dim=hidden_dim
        )
        self.initial = DiagonalNormal(latent_dim, scale=1.0)
        self.process_noise = DiagonalNoise(latent_dim, scale=0.1)
        self.read_out = ReadOut(self.neurons, latent_dim)
        self.observation = Likelihood.checked(likelihood)(self.neurons)
        self.dims: dict[str, tuple[str, ...]] = {}  # of the event of a global site, by its name
        self.coords: dict[str, list] = {}  # of these dims
        # Sizes alone, as when a saved model is read: nothing to start from.
        if isinstance(recordings, NeuronTable):
            return
        for recording in recordings.values():
            self.observation.check(recording)
            if recording.inputs is not None and not self.reads_inputs:
                warnings.warn(
                    f"recording {recording.name!r} has inputs; {type(self).__name__}.transition does not read "
                    "them (it has no argument `inputs`)",
                    stacklevel=2,
                )
        self.observation.start(recordings)

    @property
    def names(self) -> tuple[str, ...]:
        """The recordings that the model knows, in the order of its rows."""
        return self.neurons.names

    def describe(self) -> str:
        """The generative model as text: its sites with their distributions, plates and events, and its parameters."""
        return describe(self)

    # ---- the hooks: override any of them ------------------------------------------------------------------------

    def embedding_prior(self) -> TorchDistribution:
        """Prior of a recording's embedding, event ``(embedding_dim,)`` (eq. 8)."""
        zero = self.process_noise.log_scale.new_zeros(self.embedding_dim)
        return dist.Normal(zero, 1.0).to_event(1)

    def embedding_prior_of(self, recording: Tensor) -> TorchDistribution:
        """The priors of these recordings, rows ``recording (R,)`` of the model's tables; batch ``(..., R, 1)``."""
        return self.here(self.embedding_prior())

    def trial_embedding(self, e: Tensor, batch: Batch) -> Tensor:
        """The embedding of the trials: their recording's, ``(..., R, 1, d)``, or each its own, ``(..., R, K, d)``."""
        return e

    def adapt_dynamics(self, e: Tensor):
        """The dynamics at ``e (..., R, 1, embedding_dim)``: a callable from states to next means (eq. 12)."""
        return self.dynamics(e)

    def dynamics_of(self, e: Tensor, recording: Tensor):
        """The dynamics of these recordings, rows ``recording (R,)`` of the model's tables, at their embeddings ``e``.

        Recordings differ through ``e`` alone, as long as this is not overridden.
        """
        return self.adapt_dynamics(e)

    def initial_state(self, e: Tensor) -> TorchDistribution:
        """Distribution of a trial's first state, event ``(latent_dim,)``."""
        return dist.Normal(self.initial.loc, self.initial.scale).to_event(1)

    def transition(self, z: Tensor, dynamics) -> TorchDistribution:
        """Distribution of the successors of states ``z (..., K, latent_dim)``, batch ``(..., K)`` (eq. 10).

        With one more argument, ``inputs``, it is given those of the successors' bins, ``(..., K, input_dim)``.
        """
        return dist.Normal(dynamics(z), self.process_noise()).to_event(1)

    def likelihood(self, predictor: Tensor, recording: Tensor) -> TorchDistribution:
        """Distribution over the neurons given ``predictor (..., R, K, T, neuron)``; ``recording (R,)`` are rows."""
        return self.observation(predictor, recording)

    # ---- the program --------------------------------------------------------------------------------------------

    def forward(self, batch: Batch) -> Tensor:
        """Eq. 8-11 for all recordings of a batch at once; returns the predictor ``(..., R, K, T, neuron)``."""
        self.global_sites()
        with self.recording_plate(batch):
            e = pyro.sample(
                "embedding", self.embedding_prior_of(batch.recording), infer=named("embedding_dim")
            )
            with self.trial_plate(batch), pyro.poutine.scale(scale=batch.trial_scale):
                z = pyro.sample("latents", self.path_prior(e, batch), infer=named("time", "latent_dim"))
                predictor = self.read_out(z, batch.recording, batch.width)
                y = self.likelihood(predictor, batch.recording)
                seen = observed(y, batch.mask)
                pyro.sample("observations", seen, obs=batch.observations, infer=named("time", "neuron"))
        return predictor

    def path_prior(self, e: Tensor, batch: Batch) -> MarkovPath:
        """The prior of whole paths at embeddings ``e``; the guide's roll-outs use the same one."""
        e = self.trial_embedding(e, batch)
        # A path steps and is scored after the program has ended: it keeps the global sites that it began with.
        transition = self.bound(partial(self.transition, dynamics=self.dynamics_of(e, batch.recording)))
        inputs = self.inputs_of(batch) if self.reads_inputs else None
        return MarkovPath(self.initial_state(e), transition, batch.num_bins, batch.time_mask, inputs)

    @property
    def reads_inputs(self) -> bool:
        """Whether :meth:`transition` has an argument ``inputs``."""
        return "inputs" in inspect.signature(self.transition).parameters

    def inputs_of(self, batch: Batch) -> Tensor:
        """Inputs of all bins, ``(R, K, T, input_dim)``."""
        if batch.inputs is None:
            raise ValueError(
                f"{type(self).__name__}.transition: needed recordings with inputs, got {', '.join(batch.names)} "
                "without; make them with pm.Recording(..., inputs=...)"
            )
        return batch.inputs

    def recording_plate(self, batch: Batch) -> pyro.plate:
        """Scales a sub-sample of recordings up to all of them."""
        self.neurons.check(batch.names, batch.num_neurons)
        return pyro.plate("recording", batch.num_recordings, subsample=torch.arange(len(batch.names)), dim=-2)

    def trial_plate(self, batch: Batch) -> pyro.plate:
        """Trials of the batch; ``batch.trial_scale`` scales each recording's trials up to all of its trials."""
        return pyro.plate("trial", batch.num_trials, dim=-1)


def _check_sizes(**sizes) -> None:
    for name, size in sizes.items():
        value, least = size if isinstance(size, tuple) else (size, 1)
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{name}: needed an integer >= {least}, got {value!r}")
