"""Sites that belong to all recordings: the `PyroSample`s of a model, and their mean-field posterior.

A model declares one in its constructor, ``self.tau = PyroSample(prior)``, and reads ``self.tau`` in any hook. It is
drawn once, before the plates. Outside the program (roll-outs, forecasts) hooks see the values that
:meth:`Program.given` puts there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.distributions import (
    ComposeTransform,
    Distribution,
    ExpTransform,
    Transform,
    biject_to,
    constraints,
)

from pyro_metassm import _machine as machine

START_DRAWS = 15  # of the prior, whose median a posterior starts at
START_SCALE = 0.1


def declared(module: PyroModule, path: str = "") -> dict[str, tuple[PyroModule, str]]:
    """The global sites that a model declares: the module and the attribute of each, by Pyro's name of the site."""
    found = {path + attribute: (module, attribute) for attribute in module._pyro_samples}
    for name, child in module._modules.items():
        if isinstance(child, PyroModule):  # in any other module Pyro would not know the site's name
            found |= declared(child, f"{path}{name}.")
    return found


class Program(PyroModule):
    """A `PyroModule` that keeps its parameters to itself, and whose `PyroSample`s are global sites."""

    def __init__(self) -> None:
        with pyro.settings.context(module_local_params=True):
            super().__init__()

    def __call__(self, *args, **kwargs):
        # Parameters stay in the module: Pyro's global store is neither read nor written, in any run of the program.
        with pyro.settings.context(module_local_params=True):
            return super().__call__(*args, **kwargs)

    def global_sites(self) -> dict[str, Tensor]:
        """Draw every global site: one that is first read inside a plate would be one draw for each of its elements."""
        found = declared(self)
        if not found:
            return {}
        with pyro.settings.context(module_local_params=True), self._pyro_context:
            return {name: getattr(module, attribute) for name, (module, attribute) in found.items()}

    def given(self, values: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        """For a while the global sites are these values, for hooks that are called outside of the program, too.

        Without it a site that is read there is drawn anew from its prior, every time. Other names are left aside.
        """
        found = declared(self)
        return _put(
            [(vars(found[name][0]), found[name][1], values[name]) for name in found if name in values]
        )

    def bound(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function that sees the global sites as they are now, whenever it is called."""
        values = self.global_sites()
        if not values:
            return function
        places = [(vars(module), key, values[name]) for name, (module, key) in declared(self).items()]

        def call(*args, **kwargs):
            with _put(places):
                return function(*args, **kwargs)

        return call

    @staticmethod
    def rows(table: Tensor, *index: Tensor) -> Tensor:
        """Rows of a global site that is a table, of one draw of it or of many.

        Args:
            table: ``([S, 1, 1,] *sizes, d)``, a size for each index.
            index: long tensors of one shape ``I``, or that broadcast to it.

        Returns:
            ``([S,] *I, d)``.
        """
        own = len(index) + 1
        draws = table.shape[: table.dim() - own]
        place: Any = (..., *index, slice(None))
        return table.reshape(*draws[:1], *table.shape[-own:])[place]

    def here(self, prior: TorchDistribution) -> TorchDistribution:
        """A distribution with its tensors on the model's device, whichever it was written for."""
        device = next(self.parameters()).device
        if device.type != "cpu":
            _move(prior, lambda tensor: tensor.to(device))
        return prior

    def _apply(self, fn, recurse=True):
        """Move the priors, which hold tensors that are nobody's parameters, with the parameters."""
        super()._apply(fn, recurse)
        for module, key in declared(self).values():
            if isinstance(prior := module._pyro_samples[key], Distribution):
                _move(prior, fn)
        return self


@contextmanager
def _put(places: list[tuple[dict[str, Any], str, Tensor]]) -> Iterator[None]:
    """Values as instances' own attributes, which go before what `PyroModule` looks up; then as it was."""
    before = [attributes.get(key) for attributes, key, _ in places]
    for attributes, key, value in places:
        attributes[key] = value
    try:
        yield
    finally:
        for (attributes, key, _), known in zip(places, before, strict=True):
            del attributes[key]
            if known is not None:
                attributes[key] = known


def _move(distribution: Distribution, function: Callable[[Tensor], Tensor]) -> None:
    for key, value in vars(distribution).items():
        if isinstance(value, Tensor):
            vars(distribution)[key] = function(value)
        elif isinstance(value, Distribution):
            _move(value, function)


def prior_draws(model: Program, num_draws: int) -> dict[str, Tensor]:
    """Draws from the prior of the global sites, ``(num_draws, 1, 1, *event)``."""
    with torch.no_grad(), pyro.plate("draw", num_draws, dim=-3):
        return model.global_sites()


class GlobalPosterior(nn.Module):
    r"""Mean-field posterior of a model's global sites: Normals, mapped onto the priors' supports.

    ``x = b(u)``, ``u_j ~ Normal(loc_j, scale_j)`` with ``b = biject_to(support)``. Of a Normal prior, and of one that
    is a Normal mapped by the same ``b`` (LogNormal), the divergence is analytic.

    Args:
        model: the model; its sites are those that it has now.

    Raises:
        ValueError: a site with a batch shape, or that has no smooth map onto its support (counts).
    """

    def __init__(self, model):
        super().__init__()
        self.loc, self.log_scale = nn.ParameterDict(), nn.ParameterDict()
        self.transforms: dict[str, tuple[str, Transform, int]] = {}
        with machine.random_forked(), torch.no_grad():
            trace = poutine.trace(model.global_sites).get_trace()
            starts = prior_draws(model, START_DRAWS) if declared(model) else {}
        for name, site in trace.nodes.items():
            if site["type"] != "sample" or site["is_observed"]:
                continue
            prior, key = site["fn"], name.replace(".", "-")
            start = starts[name].median(0).values.reshape(site["value"].shape)
            transform = _transform(name, prior)
            loc = transform.inv(start)
            self.loc[key] = nn.Parameter(loc)
            self.log_scale[key] = nn.Parameter(torch.full_like(loc, math.log(START_SCALE)))
            self.transforms[name] = key, transform, prior.event_dim

    def forward(self) -> dict[str, Tensor]:
        """Draws of all sites, sampled in the plates that there are."""
        return {name: pyro.sample(name, self.distribution(name)) for name in self.transforms}

    def distribution(self, name: str) -> TorchDistribution:
        """The posterior of a site."""
        key, transform, event_dim = self.transforms[name]
        u = dist.Normal(self.loc[key], self.log_scale[key].exp())
        if _is_identity(transform):
            return u.to_event(event_dim)
        # What is mapped together, a simplex say, is an event before it is mapped.
        mapped = dist.TransformedDistribution(u.to_event(transform.domain.event_dim), [transform])
        return mapped.to_event(event_dim - transform.codomain.event_dim)

    def medians(self) -> dict[str, Tensor]:
        """The middle of every site's posterior."""
        return {name: transform(self.loc[key]) for name, (key, transform, _) in self.transforms.items()}

    @contextmanager
    def as_parameters(self, model) -> Iterator[None]:
        """For a while the sites of the model are parameters, from the medians on; then these are where they ended.

        What is real is trained as other parameters are, what is bounded stays as it is.
        """
        found, priors = declared(model), {}
        for name, value in self.medians().items():
            module, attribute = found[name]
            priors[name] = module._pyro_samples.pop(attribute)
            real = _is_identity(self.transforms[name][1])
            value = nn.Parameter(value.detach().clone(), requires_grad=real)
            module.register_parameter(attribute, value)
        try:
            yield
        finally:
            for name, prior in priors.items():
                (module, attribute), (key, transform, _) = found[name], self.transforms[name]
                with torch.no_grad():
                    self.loc[key].copy_(transform.inv(module._parameters.pop(attribute)))
                module._pyro_samples[attribute] = prior


def _transform(name: str, prior: TorchDistribution) -> Transform:
    if prior.batch_shape:
        raise ValueError(
            f"global site {name!r}: needed a prior without a batch shape, got batch shape {tuple(prior.batch_shape)} "
            f"and event shape {tuple(prior.event_shape)}; use .to_event({len(prior.batch_shape) + prior.event_dim})"
        )
    support = prior.support
    while isinstance(support, type(constraints.real_vector)):  # independent: of each number by itself
        support = support.base_constraint
    try:
        transform = biject_to(support)
    except NotImplementedError as error:
        raise ValueError(
            f"global site {name!r}: needed a prior over numbers that a Normal can be mapped onto, got {prior} with the "
            f"support {prior.support}; sum it out, or sample it in a guide of your own"
        ) from error
    # All positive numbers are exp(u): the map that a LogNormal has, so that their divergence is analytic.
    lower = getattr(support, "lower_bound", None)
    positive = isinstance(support, constraints.greater_than | constraints.greater_than_eq)
    return ExpTransform() if positive and lower == 0 else transform


def _is_identity(transform: Transform) -> bool:
    return isinstance(transform, ComposeTransform) and not transform.parts
