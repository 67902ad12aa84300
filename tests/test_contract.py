"""The public names, as scripts and notebooks call them: none goes or changes its meaning without a deprecation.

CONTRIBUTING.md says how a name is changed. What is added is keyword-only and has a default.
"""

import dataclasses
import inspect
from functools import reduce

import numpy as np
import pytest

import pyro_metassm as pm

# name -> its arguments. What stands in capitals is another object's default, compared by name.
CONTRACT = {
    "Recording": "name, observations, *, bin_width, mask=None, inputs=None, behavior=None, condition=None, "
    "neuron_ids=None, held_out_neurons=None, attrs=None",
    "Recording.to_xarray": "self",
    "Recording.from_xarray": "ds",
    "Recordings": "recordings",
    "Recordings.select": "self, names",
    "Recordings.drop": "self, names",
    "Recordings.take_trials": "self, n, seed=0",
    "Recordings.split": "self, test_fraction=0.25, seed=0",
    "Recordings.summary": "self",
    "simulate.limit_cycles": "velocities, *, num_trials=128, num_steps=100, num_neurons=(20, 60), noise='gaussian', "
    "seed=0",
    "simulate.duffing": "parameters, *, num_trials=128, num_steps=300, num_neurons=(30, 100), noise='gaussian', seed=0",
    "simulate.hopf": "mu, *, num_trials=128, num_steps=300, num_neurons=(30, 100), noise='gaussian', seed=0",
    "models.MetaSSM": "recordings, *, latent_dim, embedding_dim, rank=1, hidden_dim=64, "
    "likelihood=pm.likelihoods.Gaussian",
    "guides.DKF": "model, *, read_in_dim=None, common_dim=None, hidden_dim=64, rollout_probability=0.2, "
    "embedding_encoder=pm.guides.encoders.SetEncoder, detach_embedding=True",
    "fit": "model, guide, recs, *, num_steps=2000, trials_per_step=32, recordings_per_step=None, learning_rate=1e-2, "
    "warm_start=True, warm_start_steps=1000, validation=None, validation_every=100, clip_norm=1.0, "
    "update_penalty=1e-4, seed=0, device='auto', num_threads=None, checkpoint=None, checkpoint_every=200, "
    "progress=True",
    "Fit.save": "self, path",
    "load": "path, *, custom=(), device='cpu'",
    "posterior": "fit, recs, *, num_samples=100, predictive=False, log_likelihood=False, keep=None, chunk_size=None, "
    "max_gib=4.0, seed=0",
    "forecast": "fit, recs, *, context, horizon, num_samples=100, predictive=False, keep=None, chunk_size=None, "
    "max_gib=4.0, seed=0",
    "prior_predictive": "model, recs, *, num_samples=100, max_gib=4.0, seed=0",
    "adapt": "fit, new, *, num_steps=None, train=('read_in', 'read_out'), num_starts=1024, search_steps=150, "
    "trials_per_step=32, learning_rate=None, likelihood=None, seed=0, num_threads=None, progress=True",
    "report": "fit, recs=None, *, out, train=None, context=None, horizon=None, title=None, num_samples=20, "
    "num_draws=20, seed=0, progress=True",
    "metrics.r2": "truth, prediction",
    "metrics.forecast_r2": "fit, recs, *, context, horizon, num_samples=100, seed=0",
    "metrics.reconstruction_r2": "fit, recs, *, num_samples=50, seed=0",
    "metrics.co_bps": "fit, recs",
    "metrics.fp_bps": "fit, recs, *, context, horizon=None",
    "metrics.velocity_r2": "train_rates, train_velocity, test_rates, test_velocity",
    "metrics.psth_r2": "rates, spikes, condition",
}
HOOKS = {
    "embedding_prior": "self",
    "adapt_dynamics": "self, e",
    "initial_state": "self, e",
    "transition": "self, z, dynamics",
    "likelihood": "self, predictor, recording",
    "forward": "self, batch",
}
FIT = ("model", "guide", "history", "statistics", "seed", "attrs", "names", "device", "dtype")
RECORDING = ("name", "observations", "bin_width", "num_trials", "num_neurons", "lengths", "values", "mask")
LIKELIHOODS = (
    "Gaussian", "StudentT", "LowRankGaussian", "Poisson", "NegativeBinomial", "ZeroInflatedPoisson", "Bernoulli",
    "Binomial", "LogNormal", "Gamma", "ZeroInflatedGamma", "Mixed",
)  # fmt: skip
MODELS = ("MetaSSM", "LinearGaussian")
PLOTS = (
    "AffineMap", "adaptation_curve", "align", "bifurcation", "calibration", "embedding", "fixed_points", "flow",
    "flow_comparison", "flow_field", "forecast_curve", "history", "interpolation_grid", "limit_cycles",
    "raster_and_rates", "trace_panels", "traces", "trajectories", "true_flow_field",
)  # fmt: skip
ERRORS = {"NonFiniteLossError": RuntimeError, "CheckpointError": OSError}


def broken(found: inspect.Signature, promised: inspect.Signature) -> list[str]:
    """What of a promise a signature does not keep."""
    told = []
    own = list(found.parameters)
    for position, (name, parameter) in enumerate(promised.parameters.items()):
        here = found.parameters.get(name)
        if here is None or here.default != parameter.default:
            told.append(f"{parameter} became {here}")
        elif parameter.kind is parameter.KEYWORD_ONLY:
            if here.kind not in (here.KEYWORD_ONLY, here.POSITIONAL_OR_KEYWORD):
                told.append(f"{name} is no keyword")
        elif here.kind is not here.POSITIONAL_OR_KEYWORD or own[position] != name:
            told.append(f"{name} is no longer argument {position}")
    for name in [name for name in own if name not in promised.parameters]:
        new = found.parameters[name]
        if new.default is new.empty and new.kind not in (new.VAR_KEYWORD, new.VAR_POSITIONAL):
            told.append(f"{name} is new and must be given")
    return told


def signature(arguments: str) -> inspect.Signature:
    return inspect.signature(eval(f"lambda {arguments}: None", {"pm": pm}))


@pytest.mark.parametrize("name", CONTRACT)
def test_public_names_take_what_they_took(name):
    found = inspect.signature(reduce(getattr, name.split("."), pm))
    assert broken(found, signature(CONTRACT[name])) == []


@pytest.mark.parametrize("name", HOOKS)
def test_hooks_are_called_as_they_were(name):
    """What a user has overridden: here nothing may be added, since the library would pass it."""
    found = inspect.signature(getattr(pm.models.MetaSSM, name))
    assert list(found.parameters) == list(signature(HOOKS[name]).parameters)


def test_attributes_stay():
    fields = {field.name for field in dataclasses.fields(pm.Fit)}
    assert [name for name in FIT if name not in fields and not hasattr(pm.Fit, name)] == []
    recording = pm.Recording("a", np.ones((2, 3, 1)), bin_width=0.02)
    assert [name for name in RECORDING if not hasattr(recording, name)] == []
    assert [name for name in LIKELIHOODS if not hasattr(pm.likelihoods, name)] == []
    assert [name for name in MODELS if not hasattr(pm.models, name)] == []
    assert [name for name in PLOTS if not callable(getattr(pm.plots, name, None))] == []
    assert pm.io.read and pm.io.write_npz and pm.io.write_netcdf and pm.plots and pm.transitions


def test_errors_are_of_their_kinds():
    assert all(issubclass(getattr(pm, name), kind) for name, kind in ERRORS.items())


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ("a, b=1", []),
        ("a, b=1, *, c=2", []),
        ("a, b=2", ["b=1 became b=2"]),
        ("a", ["b=1 became None"]),
        ("b=1, *, a", ["a is no longer", "b is no longer argument 1"]),
        ("a, *, b=1", ["b is no longer argument 1"]),
        ("a, b=1, *, c", ["c is new and must be given"]),
    ],
)
def test_a_broken_promise_is_seen(changed, told):
    found = broken(signature(changed), signature("a, b=1"))
    assert len(found) == len(told) and all(
        part.startswith(start) for part, start in zip(found, told, strict=True)
    )
