"""Every model, guide and likelihood there is, and how the suites run them."""

import inspect
from collections.abc import Callable

import pytest
import torch
from problems import kind_of, recordings
from pyro import poutine

import pyro_metassm as pm
from pyro_metassm.elbo import SequentialELBO
from pyro_metassm.guides.encoders import RecurrentEncoder
from pyro_metassm.likelihoods import Gaussian, Likelihood
from pyro_metassm.models import LinearGaussian, MetaSSM
from pyro_metassm.recordings import Batch, Recordings

DOUBLE = torch.float64
LATENT, EMBEDDING = 2, 2


def concrete(module, base: type) -> list[type]:
    """Public classes of a module that can be made."""
    found = [c for n, c in vars(module).items() if inspect.isclass(c) and issubclass(c, base) and n[0] != "_"]
    return [c for c in found if not inspect.isabstract(c)]


def accepted(kind: type) -> set[str]:
    """Names of the arguments of a class, through ``**kwargs`` to its bases."""
    names: set[str] = set()
    for cls in kind.__mro__:
        if "__init__" in vars(cls):
            parameters = inspect.signature(cls.__init__).parameters.values()
            names |= {p.name for p in parameters}
            if not any(p.kind is p.VAR_KEYWORD for p in parameters):
                break
    return names


def maker(kind: type, *args, **chosen) -> Callable:
    return lambda *more, **extra: kind(
        *args, *more, **{k: v for k, v in (chosen | extra).items() if k in accepted(kind)}
    )


def smoothed(guide):
    """As a warm start on noisy data leaves it."""
    guide.smoothing.fill_(1.5)
    return guide


SIZES = {"latent_dim": LATENT, "embedding_dim": EMBEDDING, "hidden_dim": 6}
LIKELIHOODS = {c.__name__: c for c in concrete(pm.likelihoods, Likelihood)}
LIKELIHOODS["Mixed"] = pm.likelihoods.Mixed.of(
    {"b": Gaussian, "*": {"unit": pm.likelihoods.Poisson, "*": pm.likelihoods.Gamma}}
)
FIRST = ("Gaussian", "Poisson", "NegativeBinomial")
MODELS = {c.__name__: (maker(c, **SIZES), c) for c in concrete(pm.models, MetaSSM)}
COMPARISONS = [c for c in concrete(pm.models, MetaSSM) if c.__module__ == pm.models.comparisons.__name__]
MODELS["MetaSSM of rank 0"] = (maker(MetaSSM, **SIZES, rank=0), MetaSSM)
MODELS["MetaSSM of rank 3"] = (maker(MetaSSM, **SIZES, rank=3), MetaSSM)
GUIDES = {c.__name__: maker(c, hidden_dim=5) for c in concrete(pm.guides, pm.guides.AmortizedGuide)}
GUIDES["DKF, recurrent encoder"] = maker(pm.guides.DKF, hidden_dim=5, embedding_encoder=RecurrentEncoder)
GUIDES["DKF, smoothed frame"] = lambda model: smoothed(pm.guides.DKF(model, hidden_dim=5))
GUIDES["DKF, common layer"] = maker(pm.guides.DKF, hidden_dim=5, common_dim=4, detach_embedding=False)
GUIDES["DKF, Newton step"] = maker(pm.guides.DKF, hidden_dim=5, newton_step=True)
ALL_GUIDES = GUIDES | {"ExactSmoother": pm.guides.ExactSmoother}


def cases():
    """All guides and likelihoods for the main model; for the others, each guide and each likelihood once.

    Likelihoods that share their code with others (not in ``FIRST``) meet the main model and guide alone.
    The comparison methods differ from the main model in their dynamics alone, and have the main guide and likelihood.
    """
    for model, (_, kind) in MODELS.items():
        families = LIKELIHOODS if "likelihood" in accepted(kind) else {"Gaussian": Gaussian}
        guides = ALL_GUIDES if issubclass(kind, LinearGaussian) else GUIDES
        if kind in COMPARISONS:
            families, guides = {"Gaussian": Gaussian}, {"DKF": GUIDES["DKF"]}
        for guide in guides:
            for family in families:
                if family not in FIRST and (model, guide) != ("MetaSSM", "DKF"):
                    continue
                if model == "MetaSSM" or guide == "DKF" or family == "Gaussian":
                    yield pytest.param(
                        (model, guide, family), id=f"{model}-{guide}-{family}".replace(" ", "_")
                    )


every = pytest.mark.parametrize("case", list(cases()))


def data_for(case, **more) -> Recordings:
    return recordings(kind=kind_of(LIKELIHOODS[case[2]]), **more)


def make(case, recs: Recordings, seed: int = 0, dtype=DOUBLE):
    """Model and guide of a case, every parameter moved from where it starts, without roll-outs."""
    model_name, guide_name, family = case
    torch.manual_seed(seed)
    model = MODELS[model_name][0](recs, likelihood=LIKELIHOODS[family])
    guide = ALL_GUIDES[guide_name](model)
    if hasattr(guide, "read_in"):
        guide.read_in.start(recs)
    with torch.no_grad():
        for parameter in (*model.parameters(), *guide.parameters()):
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype).eval(), guide.to(dtype).eval()


def values_for(batch: Batch, trials=None) -> tuple[torch.Tensor, torch.Tensor]:
    """An embedding of each recording and a path of each trial, the same whatever else is in the batch."""
    rng = torch.Generator().manual_seed(0)
    e = torch.randn(8, 1, EMBEDDING, generator=rng, dtype=DOUBLE)[batch.recording]
    z = torch.randn(8, 6, 14, LATENT, generator=rng, dtype=DOUBLE)[batch.recording]
    rows = torch.arange(batch.num_trials).expand(len(e), -1) if trials is None else torch.as_tensor(trials)
    z = torch.take_along_dim(z, rows[..., None, None], 1)
    return e, z[:, :, : batch.num_bins]


def fixed(guide, e, z) -> Callable:
    """The guide, its draws replaced by given values."""
    trace = poutine.Trace()
    for name, value in (("embedding", e), ("latents", z)):
        trace.add_node(name, name=name, type="sample", is_observed=False, value=value, infer={})
    return poutine.replay(guide, trace=trace)


def evaluate(model, guide, batch: Batch, e, z) -> dict[str, torch.Tensor]:
    """Everything that the ELBO is made of at given values: densities by site and trial, and the terms."""
    at = fixed(guide, e, z)
    with torch.no_grad():
        terms = SequentialELBO().terms(model, at, batch)
        q = poutine.trace(at).get_trace(batch)
        p = poutine.trace(poutine.replay(model, trace=q)).get_trace(batch)
    result = {"by_recording": terms.by_recording, "log_likelihood": terms.log_likelihood}
    result |= {f"kl_{name}": kl for name, kl in terms.kl.items()}
    for name, trace in (("q", q), ("p", p)):
        for site in ("embedding", "latents"):
            result[f"{name}({site})"] = trace.nodes[site]["fn"].log_prob(trace.nodes[site]["value"])
    y = p.nodes["observations"]
    result["p(observations)"] = y["fn"].log_prob(y["value"])
    result["predictor"] = p.nodes["_RETURN"]["value"]
    return result


def same(a: dict, b: dict, keys=None) -> None:
    for key in keys or a:
        assert torch.equal(a[key], b[key]), key


def close(a, b, **tolerance) -> None:
    torch.testing.assert_close(a, b, **({"rtol": 1e-9, "atol": 1e-9} | tolerance))


PER_TRIAL = ("q(latents)", "p(latents)", "p(observations)")
PER_RECORDING = ("q(embedding)", "p(embedding)", "by_recording")
