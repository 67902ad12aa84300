"""What a model's read-outs make of a bin, against linear regression and numerical differences of scipy's densities."""

import dataclasses

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from members import EMBEDDING, SIZES
from problems import kind_of, recordings
from pyro import poutine
from pyro.nn import PyroSample
from scipy_families import ORACLES

import pyro_metassm as pm
from pyro_metassm.guides.newton import first_newton_step
from pyro_metassm.models import MetaSSM
from pyro_metassm.recordings import Recordings

SMALL = 1e-4  # of the differences, in latents


def made(family=pm.likelihoods.Poisson):
    """Recordings, the second of which holds neurons out, and a model of them in float64 with random parameters."""
    recs = recordings(kind=kind_of(family))
    held_out = np.array([False, True, False, False, True])
    recs = Recordings([r._replace(held_out_neurons=held_out) if n == "b" else r for n, r in recs.items()])
    torch.manual_seed(0)
    model = MetaSSM(recs, **SIZES, likelihood=family).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter))
    return recs, model, recs.batch(model.names, dtype=torch.float64)


def bins(model, batch):
    """Every bin: its place, the rows of its neurons that are seen and not held out, and what they say."""
    for r, name in enumerate(batch.names):
        place = np.arange(model.neurons.total)[model.neurons.slice(name)]
        for k in range(batch.num_trials):
            for t in range(batch.num_bins):
                seen = (batch.mask[r, k, t] & batch.held_in[r])[: len(place)].numpy()
                yield (r, k, t), place[seen], batch.observations[r, k, t, : len(place)].numpy()[seen]


def test_of_gaussian_neurons_it_is_the_posterior_mean():
    """Of a standard Normal state, by conditioning the joint Normal of it and the neurons, bins missing or not."""
    _, model, batch = made(pm.likelihoods.Gaussian)
    found = first_newton_step(model, batch).detach().numpy()
    weight, bias = (p.detach().numpy() for p in (model.read_out.weight, model.read_out.bias))
    sd = model.observation.log_sd.exp().detach().numpy()
    sizes = set()
    for place, rows, y in bins(model, batch):
        c = weight[rows]
        expected = c.T @ np.linalg.solve(c @ c.T + np.diag(sd[rows] ** 2), y - bias[rows])
        assert found[place] == pytest.approx(expected, abs=1e-10)
        sizes.add(len(rows))
    assert sizes >= {0, 1, 2, 3}  # with missing neurons, held-out ones, and in the padding none


@pytest.mark.parametrize("family", ORACLES, ids=lambda family: family.__name__)
def test_it_is_a_newton_step_uphill_in_the_posterior(family):
    """Slope and curvature of every neuron's log density at rest by central differences of scipy's."""
    _, model, batch = made(family)
    found = first_newton_step(model, batch).detach().numpy()
    weight, bias = (p.detach().numpy() for p in (model.read_out.weight, model.read_out.bias))
    moved = 0
    for place, rows, y in bins(model, batch):

        def density(x, rows=rows, y=y):
            oracle = ORACLES[family](model.observation, x, rows)
            return (
                oracle.logpmf(y)
                if hasattr(oracle, "logpmf") and kind_of(family) in DISCRETE
                else oracle.logpdf(y)
            )

        low, middle, high = (density(bias[rows] + step) for step in (-SMALL, 0.0, SMALL))
        slope, second = (high - low) / (2 * SMALL), -(high - 2 * middle + low) / SMALL**2
        c, second = weight[rows], np.maximum(second, 0.0)
        expected = np.linalg.solve(np.eye(c.shape[1]) + c.T @ (second[:, None] * c), c.T @ slope)
        assert found[place] == pytest.approx(expected, rel=1e-4, abs=1e-4)
        moved += np.abs(expected).max() > 0.05
    assert moved > 20


DISCRETE = ("counts", "binary")


def test_its_gradient_is_that_of_the_weights():
    """With slopes and curvatures as they are: the derivative of (I + C'WC)^-1 C's, by differences."""
    _, model, batch = made()
    torch.manual_seed(1)
    direction = torch.randn_like(model.read_out.weight)
    towards = torch.randn_like(first_newton_step(model, batch))
    (towards * first_newton_step(model, batch)).sum().backward()
    assert model.read_out.bias.grad is None
    sides = []
    for sign in (1, -1):
        with torch.no_grad():
            model.read_out.weight.add_(sign * 1e-5 * direction)
            sides.append(float((towards * first_newton_step(model, batch)).sum()))
            model.read_out.weight.sub_(sign * 1e-5 * direction)
    slope = float((model.read_out.weight.grad * direction).sum())
    assert slope == pytest.approx((sides[0] - sides[1]) / 2e-5, rel=1e-6)


def test_the_recurrent_network_reads_it():
    """Beside the read-in: with other read-outs the same guide says otherwise, of other held-out neurons it does not."""
    recs, model, batch = made()
    e = {"embedding": torch.zeros(len(recs), 1, EMBEDDING).double()}

    def posterior(guide, batch):
        trace = poutine.trace(poutine.condition(guide, data=e)).get_trace(batch)
        return trace.nodes["latents"]["fn"].loc.detach()

    for newton_step in (True, False):
        torch.manual_seed(0)
        guide = pm.guides.DKF(model, hidden_dim=5, newton_step=newton_step).double().eval()
        guide.read_in.start(recs)
        before = posterior(guide, batch)
        unseen = torch.where(batch.held_in[:, None, None], batch.observations, 3.0)
        assert torch.equal(posterior(guide, dataclasses.replace(batch, observations=unseen)), before)
        with torch.no_grad():
            model.read_out.weight.mul_(2.0)
        assert torch.equal(posterior(guide, batch), before) is not newton_step
        with torch.no_grad():
            model.read_out.weight.div_(2.0)


def test_hidden_neurons_are_hidden_from_it():
    recs, model, batch = made()
    guide = pm.guides.DKF(model, hidden_dim=5, neuron_dropout=0.9, newton_step=True).double().train()
    guide.read_in.start(recs)
    torch.manual_seed(0)
    hidden = guide._with_hidden_neurons(batch)
    assert (hidden.mask != batch.mask).any()
    ybar, _, _ = guide.common_space(hidden)
    assert torch.equal(ybar[..., -model.latent_dim :], first_newton_step(model, hidden))


def test_a_likelihood_may_read_global_sites():
    """They are in the middle of their posteriors: the guide is a function of the data."""

    class Scaled(MetaSSM):
        def __init__(self, recordings, **options):
            super().__init__(recordings, **options)
            self.gain = PyroSample(dist.LogNormal(0.0, 0.5))

        def likelihood(self, predictor, recording):
            return super().likelihood(predictor * self.gain[..., None, None], recording)

    recs, _, batch = made()
    torch.manual_seed(0)
    model = Scaled(recs, **SIZES, likelihood=pm.likelihoods.Poisson).double()
    guide = pm.guides.DKF(model, hidden_dim=5, newton_step=True).double()
    guide.read_in.start(recs)
    for median in (1.0, 3.0):
        guide.global_sites.loc["gain"].data.fill_(np.log(median))
        with model.given({"gain": torch.tensor(median).double()}):
            expected = first_newton_step(model, batch)
        ybar, _, _ = guide.common_space(batch)
        assert torch.allclose(ybar[..., -model.latent_dim :], expected)
    options = {"num_steps": 2, "warm_start_steps": 2, "progress": False}
    assert np.isfinite(pm.fit(model, guide, recs, **options).history["elbo"]).all()


@pytest.mark.parametrize("family", [pm.likelihoods.Poisson, pm.likelihoods.Gaussian])
def test_pools_adapt_and_are_saved(family, tmp_path):
    recs = recordings(kind=kind_of(family), missing=False)
    old, new = recs.select(["a", "b"]), recs.select(["c"])
    model = pm.models.PartiallyPooled(old, **SIZES, likelihood=family)
    guide = pm.guides.PartiallyPooledDKF(model, hidden_dim=5, read_in_dim=2, newton_step=True)
    fit = pm.fit(model, guide, old, num_steps=3, warm_start_steps=3, progress=False)
    fit = pm.adapt(fit, new, num_steps=3, num_starts=4, search_steps=3, progress=False)
    fit.save(tmp_path / "fit")
    batch = recs.batch(fit.model.names)
    again = pm.load(tmp_path / "fit")
    assert again.guide.newton_step
    for one, other in zip(fit.guide.common_space(batch), again.guide.common_space(batch), strict=True):
        assert torch.equal(one, other) and one.isfinite().all()


def test_what_has_no_such_step_is_refused():
    recs = recordings()
    joint = MetaSSM(recs, **SIZES, likelihood=pm.likelihoods.LowRankGaussian)
    with pytest.raises(
        ValueError, match=r"newton_step: needed a likelihood of single neurons.*LowRankGaussian"
    ):
        pm.fit(joint, pm.guides.DKF(joint, newton_step=True), recs, num_steps=1, progress=False)
    drawn = MetaSSM(recs, **SIZES)
    drawn.read_out.weight = PyroSample(dist.Normal(0.0, 1.0).expand(drawn.read_out.weight.shape).to_event(2))
    with pytest.raises(ValueError, match="newton_step: needed read-outs that are parameters"):
        pm.guides.DKF(drawn, newton_step=True)
