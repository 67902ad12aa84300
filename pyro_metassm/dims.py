"""Names of the dimensions of a model's sites: said in the model, and read from it."""

from __future__ import annotations

import pyro
import torch

from pyro_metassm import _machine as machine
from pyro_metassm.recordings import Batch


def named(*dims: str) -> dict[str, tuple[str, ...]]:
    """``infer=named("time", "latent_dim")`` gives names to the dimensions of a site's event."""
    return {"event_dims": dims}


def alone(model, batch: Batch | None = None) -> pyro.poutine.Trace:
    """The trace of a model by itself (a replay forgets ``infer``); without a batch, on one without observations."""
    device = next(model.parameters()).device
    # Names are asked for: the draw of the prior that tells them may have left the finite numbers.
    with torch.no_grad(), machine.random_forked(device), pyro.validation_enabled(False):
        return pyro.poutine.trace(model).get_trace(_empty(model) if batch is None else batch)


def dims(model, batch: Batch | None = None) -> dict[str, tuple[str, ...]]:
    """Of every site, the names of its dimensions: its plates from the outermost on, then those of its event.

    A site names the dimensions of its event with :func:`named`; where it does not, they are called ``SITE_dim_0``,
    ``SITE_dim_1``, ..., as ArviZ would.

    Example:
        >>> import pyro_metassm as pm
        >>> recs = pm.simulate.limit_cycles([2.5, 5.0], num_trials=8, num_steps=20)
        >>> dims(pm.models.MetaSSM(recs, latent_dim=2, embedding_dim=1))["latents"]
        ('recording', 'trial', 'time', 'latent_dim')
    """
    return {name: _of(name, site) for name, site in alone(model, batch).nodes.items() if is_random(site)}


def event_dims(name: str, site: dict) -> tuple[str, ...]:
    """Names of the dimensions of a site's event."""
    number = len(site["fn"].event_shape)
    named = tuple(site["infer"].get("event_dims", ()))
    return named if len(named) == number else tuple(f"{name}_dim_{i}" for i in range(number))


def _of(name: str, site: dict) -> tuple[str, ...]:
    plates = sorted(site["cond_indep_stack"], key=lambda frame: frame.dim)
    return (*(frame.name for frame in plates), *event_dims(name, site))


def is_random(site: dict) -> bool:
    """Whether it is a site of the model, latent or observed, and not the choice of a plate."""
    return site["type"] == "sample" and type(site["fn"]).__name__ != "_Subsample"


def _empty(model) -> Batch:
    """One trial of two bins of every recording, in which nothing was observed."""
    neurons, like = model.neurons, next(model.parameters())
    num, most = len(neurons.names), max(neurons.num_neurons)
    shape, device = (num, 1, 2, most), like.device
    return Batch(
        names=neurons.names,
        recording=torch.arange(num, device=device),
        observations=torch.zeros(shape, dtype=like.dtype, device=device),
        mask=torch.zeros(shape, dtype=torch.bool, device=device),
        time_mask=torch.ones(shape[:3], dtype=torch.bool, device=device),
        held_in=torch.ones(num, most, dtype=torch.bool, device=device),
        num_neurons=neurons.num_neurons,
        trial_scale=torch.ones(num, 1, dtype=like.dtype, device=device),
        inputs=_no_inputs(model, shape, like),
        num_recordings=num,
    )


def _no_inputs(model, shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor | None:
    """Zeros, for a transition that reads inputs; how many a model is for is in its configuration."""
    number = model.config.get("input_dim") if model.reads_inputs else None
    return None if number is None else like.new_zeros(*shape[:3], number)
