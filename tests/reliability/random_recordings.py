"""Recordings as hypothesis makes them: small, of every shape that is allowed, with values that hurt."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import torch

import pyro_metassm as pm

ROOT = Path(__file__).resolve().parents[2]
FAMILIES = (pm.likelihoods.Gaussian, pm.likelihoods.Poisson, pm.likelihoods.NegativeBinomial)


@st.composite
def recording(draw, name: str, counts: bool, num_inputs: int) -> pm.Recording:
    """One recording: few trials, bins and neurons, values from silent to a million, anything missing that may be."""
    trials, bins, neurons = draw(st.integers(1, 4)), draw(st.integers(1, 7)), draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = (trials, bins, neurons)
    scales = (0.0, 0.05, 1.0, 30.0, 1e6) if counts else (0.0, 1e-6, 1.0, 100.0, 1e6)
    scale = rng.choice(draw(st.lists(st.sampled_from(scales), min_size=1, max_size=3)), neurons)
    values = rng.poisson(scale, shape).astype(float) if counts else scale * rng.normal(size=shape)
    if draw(st.booleans()):  # constant neurons
        values[..., 0] = draw(st.sampled_from((0.0, 1.0, 1e6)))
    lengths = np.array([draw(st.integers(1, bins)) for _ in range(trials)])
    values[np.arange(bins) >= lengths[:, None]] = np.nan
    mask = rng.random(shape) < draw(st.sampled_from((1.0, 0.7, 0.2)))
    mask[:, 0, rng.integers(neurons)] = True  # something in every trial
    held_out = [neurons - 1] if neurons > 1 and draw(st.booleans()) else None
    inputs = rng.normal(size=(trials, bins, num_inputs)) if num_inputs else None
    condition = rng.choice(["left", "right"], trials) if draw(st.booleans()) else None
    dtype = draw(st.sampled_from((np.float32, np.float64)))
    return pm.Recording(
        name, values.astype(dtype), bin_width=0.02, mask=mask, lengths=lengths, held_out_neurons=held_out,
        inputs=inputs, condition=condition,
    )  # fmt: skip


@dataclass
class Case:
    """What is fitted, and to what it is adapted."""

    recs: pm.Recordings
    new: pm.Recordings
    family: type[pm.likelihoods.Likelihood]
    dtype: torch.dtype
    warm_start: bool
    rate: float
    sizes: tuple[int, int]
    seed: int

    def __repr__(self) -> str:
        given = (self.family.__name__, self.dtype, self.warm_start, self.rate, self.sizes)
        return f"Case({self.recs!r}, {given})"


@st.composite
def case(draw) -> Case:
    family = draw(st.sampled_from(FAMILIES))
    made = draw(st.integers(1, 3))
    num_inputs = 0  # the models here have a transition that does not read any, which is warned of
    all_ = [draw(recording(f"r{i}", family is not FAMILIES[0], num_inputs)) for i in range(made + 1)]
    return Case(
        pm.Recordings(all_[:-1]), pm.Recordings(all_[-1:]), family,
        draw(st.sampled_from((torch.float32, torch.float64))), draw(st.booleans()),
        draw(st.sampled_from((1e-2, 1e-2, 1.0, 1e4))), (draw(st.integers(1, 3)), draw(st.integers(1, 2))),
        draw(st.integers(0, 99)),
    )  # fmt: skip


def fit_of(case: Case, num_steps: int = 3) -> pm.Fit:
    """The fit of a case."""
    torch.manual_seed(case.seed)
    latent_dim, embedding_dim = case.sizes
    model = pm.models.MetaSSM(
        case.recs, latent_dim=latent_dim, embedding_dim=embedding_dim, hidden_dim=4, likelihood=case.family
    ).to(case.dtype)
    guide = pm.guides.DKF(model, hidden_dim=4, read_in_dim=3).to(case.dtype)
    return pm.fit(
        model, guide, case.recs, num_steps=num_steps, warm_start=case.warm_start, warm_start_steps=2,
        trials_per_step=2, learning_rate=case.rate, seed=case.seed, progress=False,
    )  # fmt: skip


def in_words(error: BaseException) -> bool:
    """Whether an error is one of the library's own: raised by a line of it, with words."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    own = trace is not None and Path(trace.tb_frame.f_code.co_filename).is_relative_to(ROOT)
    own = own and "tests" not in Path(trace.tb_frame.f_code.co_filename).parts
    return own and isinstance(error, ValueError | RuntimeError | FloatingPointError) and len(str(error)) > 30


def check(case: Case) -> str:
    """Fit, draw, forecast and adapt; what came of it. Anything but results and clear errors is an AssertionError."""
    try:
        fit = fit_of(case)
    except pm.NonFiniteLossError as error:
        assert "step" in str(error) and any(name in str(error) for name in case.recs.names)
        fit, outcome = error.fit, "stopped"
    except Exception as error:
        assert in_words(error), f"fit: {type(error).__name__}: {error}"
        return f"refused: {str(error)[:60]}"
    else:
        outcome = "fitted"
        skipped = {entry["step"] for entry in fit.attrs.get("skipped", [])}
        taken = [step not in skipped for step in fit.history["step"].values.tolist()]
        assert np.isfinite(fit.history["elbo"].values[taken]).all(), "a history that is not finite"
    assert fit.dtype == case.dtype
    _finite("parameters", *[p.detach().numpy() for p in (*fit.model.parameters(), *fit.guide.parameters())])
    outcome += _drawn(fit, case)
    try:
        adapted = pm.adapt(
            fit, case.new, num_steps=2, num_starts=3, search_steps=3, seed=case.seed, progress=False
        )
    except pm.NonFiniteLossError as error:
        assert "step" in str(error)
        return outcome + ", adaptation stopped"
    except Exception as error:
        assert in_words(error), f"adapt: {type(error).__name__}: {error}"
        return outcome + f", adaptation refused: {str(error)[:60]}"
    _finite("adapted parameters", *[p.detach().numpy() for p in adapted.model.parameters()])
    return outcome + ", adapted"


def _drawn(fit: pm.Fit, case: Case) -> str:
    shortest = int(min(recording.lengths.max() for recording in case.recs.values()))
    told = ""
    for what in ("posterior", "forecast"):
        try:
            if what == "posterior":
                tree = pm.posterior(
                    fit, case.recs, num_samples=3, predictive=True, log_likelihood=True, seed=case.seed
                )
                group = "posterior"
            else:
                context = max(1, shortest // 2)
                tree = pm.forecast(fit, case.recs, context=context, horizon=3, num_samples=3, seed=case.seed)
                group = "predictions"
        except Exception as error:
            assert in_words(error), f"{what}: {type(error).__name__}: {error}"
            told += f", {what} refused: {str(error)[:60]}"
            continue
        for name, recording in case.recs.items():
            rates = tree[f"{name}/{group}/rates"].values[0]  # (draw, trial, time, neuron)
            if what == "posterior":
                exists = np.arange(recording.num_bins) < recording.lengths[:, None]
                rates = rates[:, exists]
                _finite("log likelihood", tree[f"{name}/log_likelihood/observations"].values)
            _finite(f"rates of the {what}", rates)
        told += f", {what}"
    return told


def _finite(what: str, *arrays: np.ndarray) -> None:
    for array in arrays:
        assert np.isfinite(array).all(), f"{what}: not finite"
