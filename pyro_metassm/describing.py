"""A model in words: its sites, and its parameters."""

from __future__ import annotations

from collections import defaultdict

import pyro
import torch

from pyro_metassm import _machine as machine
from pyro_metassm import dims
from pyro_metassm.distributions import MarkovPath
from pyro_metassm.rebuilding import tables_of
from pyro_metassm.sites import family

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


@machine.alone()
def _sites(model) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("site", "distribution", "in plates", "event")]
    for name, site in dims.alone(model).nodes.items():
        if not dims.is_random(site):
            continue
        plates = ", ".join(frame.name for frame in site["cond_indep_stack"]) or "none"
        observed = " (observed)" * site["is_observed"]
        rows.append(
            (name, family(site["fn"]) + observed, plates, _event(name, site, model.dims.get(name, ())))
        )
        if isinstance(path := site["fn"], MarkovPath):
            # The draw may have left the finite numbers.
            with torch.no_grad(), pyro.validation_enabled(False):
                following = path.into(slice(1, None), site["value"][..., :-1, :])
            rows += [("  first", family(path.initial), "", ""), ("  next", family(following), "", "")]
    return rows


def _event(name: str, site: dict, known: tuple[str, ...]) -> str:
    shape = site["fn"].event_shape
    keys = dims.event_dims(name, site) if "event_dims" in site["infer"] else known
    if not shape or len(keys) != len(shape):
        return ", ".join(map(str, shape)) or "a number"
    told = ("time", "neuron")  # their sizes are the batch's
    return ", ".join(key if key in told else f"{key} {size}" for key, size in zip(keys, shape, strict=True))


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
