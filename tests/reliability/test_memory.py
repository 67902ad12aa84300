"""What would not fit is refused before it is allocated, with what to ask for; work is cut into chunks."""

import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from fits import QUICK, parts

import pyro_metassm as pm
from pyro_metassm import draws as drawing

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def recs():
    return pm.simulate.limit_cycles([2.5, 5.0], num_trials=6, num_steps=10, num_neurons=4)


@pytest.fixture(scope="module")
def fit(recs):
    return pm.fit(*parts(recs), recs, **QUICK | {"num_steps": 2, "warm_start_steps": 2})


CALLS = {
    "posterior": lambda fit, recs, **more: pm.posterior(fit, recs, **more),
    "predictive": lambda fit, recs, **more: pm.posterior(
        fit, recs, predictive=True, log_likelihood=True, **more
    ),
    "forecast": lambda fit, recs, **more: pm.forecast(fit, recs, context=5, horizon=5, **more),
    "prior": lambda fit, recs, **more: pm.prior_predictive(fit.model, recs, **more),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_too_much_is_refused_before_it_is_allocated(fit, recs, call):
    call(fit, recs, num_samples=2)  # whatever is made once
    tracemalloc.start()
    try:
        with pytest.raises(
            ValueError, match=r"max_gib=0.001 GiB .*; ask for .*num_samples=\d+.*larger max_gib"
        ):
            call(fit, recs, num_samples=100_000, max_gib=0.001)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2**20


def test_a_draw_of_the_prior_that_does_not_fit():
    recs = pm.Recordings([pm.Recording("a", np.ones((50, 200, 2), np.float32), bin_width=0.02)])
    model, _ = parts(recs)
    with pytest.raises(ValueError, match=r"recording 'a': .*work on a draw.*fewer trials"):
        pm.prior_predictive(model, recs, num_samples=1, max_gib=0.004)


@pytest.mark.parametrize("chunk_size", [1, 4, None])
def test_chunks_are_as_small_as_they_were_asked_to_be(fit, recs, chunk_size, monkeypatch):
    monkeypatch.setattr(drawing, "ELEMENTS", 30 * 10 * (4 + drawing.NETWORK_WIDTH))  # 30 trials of 10 bins
    chunks = [
        (len(chunk.trials), chunk.latents.shape[0])
        for chunk in drawing.posterior_chunks(fit, recs, "w=5", 13, 0, chunk_size)
    ]
    assert sum(trials * draws for trials, draws in chunks) == 6 * 13
    assert all(trials <= (chunk_size or 6) and draws <= 30 for trials, draws in chunks)
    if chunk_size is None:
        assert all(trials * draws <= 30 for trials, draws in chunks)


CODE = """
import json, resource, sys, torch, pyro_metassm as pm
torch.set_num_threads(1)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
small = pm.simulate.limit_cycles([2.5], num_trials=2, num_steps=200, num_neurons=100)
model = pm.models.MetaSSM(small, latent_dim=2, embedding_dim=1)
fit = pm.fit(model, pm.guides.DKF(model), small, num_steps=1, warm_start=False, progress=False)
pm.posterior(fit, small, num_samples=2)
recs = pm.simulate.limit_cycles([2.5], num_trials=40, num_steps=200, num_neurons=100)
before = peak()
pm.posterior(fit, recs, num_samples=100, keep=("mean", "sd"), predictive=True, log_likelihood=True, max_gib=0.2)
pm.forecast(fit, recs, context=100, horizon=100, num_samples=100, keep=("mean",), max_gib=0.2)
print(json.dumps(peak() - before))
"""


@pytest.mark.slow
def test_posterior_and_forecast_stay_within_the_budget():
    """All draws would take 0.6 GB, the statistics 0.04 GB at a time; beside it the work, some 32 MiB tensors."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [sys.executable, "-c", CODE], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout.splitlines()[-1]) < 0.2 * 2**30 + 10 * 4 * drawing.ELEMENTS
