"""What the sites of a model and of its guide have to have in common, and in words what does not match."""

from __future__ import annotations

import copy

import pyro
import torch
from pyro import poutine
from pyro.distributions.torch_distribution import ExpandedDistribution, MaskedDistribution
from pyro.poutine.util import prune_subsample_sites
from torch.distributions import Distribution, Independent

from pyro_metassm import _machine as machine
from pyro_metassm.global_sites import GlobalPosterior, declared
from pyro_metassm.hooks import wrong_hooks
from pyro_metassm.recordings import Batch, Recordings

WRAPPERS = (Independent, MaskedDistribution, ExpandedDistribution)
BASES = ("TorchDistribution", "Distribution", "ExponentialFamily")


def check(model, guide, recs: Recordings) -> list[str]:
    """Run a model and its guide once on a trial of every recording, and say what does not match.

    Args:
        model, guide: as :func:`pyro_metassm.fit` takes them; nothing in them is changed.
        recs: the recordings that they are to be fitted to.

    Returns:
        one sentence for each thing that does not match: a hook that returns another distribution than it must, a
        program that stops with an error, a latent site that only one of them has, other batch or event shapes, other
        plates, values of the guide that the model's distribution excludes. An empty list where all is well.

    Example:
        >>> import pyro_metassm as pm
        >>> recs = pm.simulate.limit_cycles([2.5, 5.0], num_trials=8, num_steps=20)
        >>> model = pm.models.MetaSSM(recs, latent_dim=2, embedding_dim=1)
        >>> pm.guides.check(model, pm.guides.DKF(model), recs)
        []
    """
    model, guide = copy.deepcopy((model, guide))
    like = next(model.parameters())
    with machine.random_forked(like.device), torch.no_grad(), pyro.validation_enabled(True):
        try:
            batch = recs.batch(
                model.names, trials={name: [0] for name in recs}, dtype=like.dtype, device=like.device
            )
            guide.read_in.start(recs, model.observation.kinds)
        except Exception as error:
            return [f"the recordings do not go with the model: {_of(error)}"]
        try:
            return compare(model, guide, batch)
        except ProgramError as error:
            return [str(error)]


class ProgramError(ValueError):
    """A program that ended with an error."""


def compare(model, guide, batch: Batch) -> list[str]:
    """What does not match on one batch, as :func:`check` says it.

    Raises:
        ProgramError: from what a program raised.
    """
    if found := wrong_hooks(model, batch):
        return found
    own = getattr(guide, "global_sites", None)
    if isinstance(own, GlobalPosterior) and (lacking := set(declared(model)) - set(own.transforms)):
        return [_lacks(lacking)]  # it would draw them from the prior wherever it asks the model for a path
    guide_trace = _trace("guide", guide, batch)
    model_trace = _trace("model", poutine.replay(model, trace=guide_trace), batch)
    guide_trace, model_trace = prune_subsample_sites(guide_trace), prune_subsample_sites(model_trace)
    return mismatches(model_trace, guide_trace) + _differences(model_trace, guide_trace)


def _trace(what: str, program, batch: Batch) -> poutine.Trace:
    try:
        return poutine.trace(program).get_trace(batch)
    except Exception as error:
        given = ", given the guide's values" if what == "model" else ""
        raise ProgramError(
            f"the {what} stops with an error on these recordings{given}: {_of(error)}"
        ) from error


def mismatches(model_trace: poutine.Trace, guide_trace: poutine.Trace) -> list[str]:
    """What would make an ELBO wrong: a latent site without its partner, or in other plates; quick, for every step."""
    in_model, in_guide = _latent(model_trace), _latent(guide_trace)
    lacking, unknown = in_model - in_guide, in_guide - in_model
    unknown -= {n for n in unknown if guide_trace.nodes[n]["infer"].get("is_auxiliary")}
    found = []
    if lacking:
        found.append(_lacks(lacking))
    if unknown:
        found.append(
            f"the guide samples {sorted(unknown)}, which the model does not have; remove them from the guide"
        )
    for name in sorted(in_model & in_guide):
        p, q = (tuple(trace.nodes[name]["fn"].batch_shape) for trace in (model_trace, guide_trace))
        if p != q:  # its KL would be counted as often as the larger of the two
            found.append(
                f"latent site {name!r}: needed one batch shape in model and guide, got {p} and {q}; sample it "
                "inside the same plates in both (inside the recording plate are the model's embedding_prior and the "
                "guide's embedding_posterior)"
            )
    return found


def _lacks(names: set[str]) -> str:
    return (
        f"the guide lacks the model's latent site(s) {sorted(names)}; needed a posterior for each: assign it in the "
        "model's constructor, self.name = PyroSample(prior), before the guide is made, which then has one; or subclass "
        "the guide and sample it in its forward before super().forward(batch); or make it a parameter of the model"
    )


def _differences(model_trace: poutine.Trace, guide_trace: poutine.Trace) -> list[str]:
    """What else differs, of the sites that both have."""
    found = []
    for name in sorted(_latent(model_trace) & _latent(guide_trace)):
        p, q = (trace.nodes[name] for trace in (model_trace, guide_trace))
        shapes = [tuple(site["fn"].event_shape) for site in (p, q)]
        if shapes[0] != shapes[1]:
            found.append(
                f"latent site {name!r}: needed one event shape in model and guide, got {shapes[0]} and {shapes[1]}"
            )
            continue
        plates = [[frame.name for frame in site["cond_indep_stack"]] for site in (p, q)]
        if plates[0] != plates[1]:
            found.append(
                f"latent site {name!r}: needed the same plates in model and guide, got {plates[0]} and {plates[1]}"
            )
        if not bool(p["fn"].support.check(q["value"]).all()):
            found.append(
                f"latent site {name!r}: the guide draws values that the model's {family(p['fn'])} excludes; needed a "
                f"posterior with the support {p['fn'].support}, e.g. a Normal through the transform "
                "torch.distributions.biject_to(support)"
            )
    return found


def _latent(trace: poutine.Trace) -> set[str]:
    return {n for n, s in trace.nodes.items() if s["type"] == "sample" and not s["is_observed"]}


def family(distribution: Distribution) -> str:
    """The name of what is inside: without the wrappers that mask, expand or make events of dimensions."""
    while isinstance(distribution, WRAPPERS):
        distribution = distribution.base_dist
    names = [c.__name__ for c in type(distribution).__mro__ if hasattr(pyro.distributions, c.__name__)]
    return next((name for name in names if name not in BASES), type(distribution).__name__)


def _of(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
