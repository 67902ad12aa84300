"""A model in words: its sites, and its parameters."""

from __future__ import annotations

from collections import defaultdict

import pyro
import torch

from pyro_metassm.distributions import MarkovPath
from pyro_metassm.rebuilding import tables_of
from pyro_metassm.recordings import Batch
from pyro_metassm.sites import family

EVENTS = {
    "embedding": ("embedding_dim",),
    "latents": ("time", "latent_dim"),
    "observations": ("time", "neuron"),
}
OWNERS = {"recording": "each recording", "neuron": "each neuron", "": "all together"}


def describe(model) -> str:
    """The generative model as text: a line for each site and for each group of parameters."""
    neurons = model.neurons
    fewest, most = min(neurons.num_neurons), max(neurons.num_neurons)
    span = f"{most}" if fewest == most else f"{fewest}-{most}"
    config = ", ".join(f"{key} {getattr(value, '__name__', value)}" for key, value in model.config.items())
    names = len(neurons.names)
    title = f"{type(model).__name__} of {names} recording{'s' * (names > 1)} with {span} neurons; {config}"
    return "\n".join([title, "", *_columns(_sites(model)), "", *_columns(_parameters(model))])


def _sites(model) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("site", "distribution", "in plates", "event")]
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        trace = pyro.poutine.trace(model).get_trace(_empty(model))
    for name, site in trace.nodes.items():
        if site["type"] != "sample" or type(site["fn"]).__name__ == "_Subsample":
            continue
        plates = ", ".join(frame.name for frame in site["cond_indep_stack"]) or "none"
        observed = " (observed)" * site["is_observed"]
        known = (EVENTS | model.dims).get(name, ())
        rows.append((name, family(site["fn"]) + observed, plates, _event(known, site["fn"].event_shape)))
        if isinstance(path := site["fn"], MarkovPath):
            with torch.no_grad():
                following = path.into(slice(1, None), site["value"][..., :-1, :])
            rows += [("  first", family(path.initial), "", ""), ("  next", family(following), "", "")]
    return rows


def _event(known: tuple[str, ...], shape: torch.Size) -> str:
    if not shape or len(known) != len(shape):
        return ", ".join(map(str, shape)) or "a number"
    told = ("time", "neuron")  # their sizes are the batch's
    return ", ".join(key if key in told else f"{key} {size}" for key, size in zip(known, shape, strict=True))


def _parameters(model) -> list[tuple[str, ...]]:
    try:
        owners = tables_of(model)
    except ValueError:  # an edited class that cannot be built again
        owners = None
    groups: dict[tuple[str, str], int] = defaultdict(int)
    for name, parameter in model.named_parameters():
        owner = "" if owners is None else OWNERS[owners.get(name, "")]
        groups[name.split(".")[0], owner] += parameter.numel()
    rows = (
        [("parameters", "numbers", "a value for")] if owners is not None else [("parameters", "numbers", "")]
    )
    rows += [(part, f"{number:,}", owner) for (part, owner), number in groups.items()]
    return [*rows, ("in all", f"{sum(groups.values()):,}", "")]


def _columns(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


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
