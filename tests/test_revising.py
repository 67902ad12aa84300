"""A revision against dense Gaussian processes, known truths drawn from its own prior, and what it must leave alone."""

import copy
import dataclasses

import numpy as np
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from pyro import poutine
from pyro.nn import PyroSample
from scipy import stats

import pyro_metassm as pm
from pyro_metassm.analysis._maps import Source
from pyro_metassm.draws import observations_of
from pyro_metassm.models.revised import kernel
from pyro_metassm.revising import Process, _held, _likeliest, _roll_out_error, _Source

NAMES = [f"r{k}" for k in range(4)]


def recordings(num_trials=8, num_bins=40, num_neurons=12):
    rng = np.random.default_rng(0)
    return pm.Recordings(
        pm.Recording(name, rng.normal(size=(num_trials, num_bins, num_neurons)), bin_width=0.05)
        for name in NAMES
    )


def fit_of(recs, model_class=pm.models.MetaSSM, **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class(recs, latent_dim=2, embedding_dim=1, hidden_dim=6, **options)
        guide = pm.guides.DKF(model, hidden_dim=4)
    guide.read_in.start(recs)
    with torch.no_grad():
        model.process_noise.log_scale.fill_(np.log(0.1))
        for name in model.names:
            rows = model.neurons.slice(name)
            weights = torch.linspace(-1.0, 1.0, 2 * (rows.stop - rows.start)).view(-1, 2).sin()
            model.read_out.weight[rows] = torch.cat([weights[:, :1], weights[:, 1:].cos()], 1)
        model.observation.log_sd.fill_(np.log(0.3))
    statistics = torch.tensor([[e, 1e-6] for e in np.linspace(-1, 1, len(recs.names))], dtype=torch.float32)
    return pm.Fit(model.eval(), guide.eval(), xr.Dataset(), statistics, attrs={"bin_width": 0.05})


def posterior(process, slope, matrix):
    """Mean and covariance."""
    spectrum = process.spectrum(slope, matrix)
    mean, variances = process.posterior(spectrum)
    return mean, (spectrum[1] * variances) @ spectrum[1].mT


def test_the_posterior_is_that_of_a_dense_gaussian_process():
    rng = torch.Generator().manual_seed(0)
    places = torch.randn(5, 2, generator=rng, dtype=torch.float64)
    slope = torch.randn(5, 3, generator=rng, dtype=torch.float64)
    root = torch.randn(5, 3, 3, generator=rng, dtype=torch.float64)
    matrix = root @ root.mT + 0.1 * torch.eye(3, dtype=torch.float64)
    process = Process.over(places, 1.3, 99)
    process = Process(places, 1.3, process.functions, process.of_places, variance=0.7)
    mean, covariance = posterior(process, slope, matrix)
    each = torch.kron(process.of_places, torch.eye(3, dtype=torch.float64))
    prior = torch.kron(0.7 * kernel(places, places, 1.3), torch.eye(3, dtype=torch.float64))
    noise = torch.block_diag(*torch.linalg.inv(matrix))
    seen = torch.linalg.solve(matrix, slope.unsqueeze(-1)).flatten()
    gain = prior @ torch.linalg.inv(prior + noise)
    torch.testing.assert_close(each @ mean, gain @ seen, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(each @ covariance @ each.mT, prior - gain @ prior, rtol=1e-5, atol=1e-6)


def test_the_process_of_most_evidence_is_that_of_scipy():
    rng = torch.Generator().manual_seed(1)
    places = torch.randn(4, 1, generator=rng, dtype=torch.float64)
    slope = 3 * torch.randn(4, 2, generator=rng, dtype=torch.float64)
    matrix = torch.eye(2, dtype=torch.float64).expand(4, 2, 2) * torch.tensor([1.0, 2.0, 3.0, 4.0]).view(
        4, 1, 1
    )
    process = _likeliest(places, slope, matrix)
    evidence = process.log_evidence(process.spectrum(slope, matrix))
    noise = torch.block_diag(*torch.linalg.inv(matrix))
    prior = process.variance * torch.kron(
        kernel(places, places, process.reach), torch.eye(2, dtype=torch.float64)
    )
    seen = (slope / matrix.diagonal(dim1=1, dim2=2)).flatten().numpy()
    with_process = stats.multivariate_normal(cov=(prior + noise).numpy()).logpdf(seen)
    assert evidence == pytest.approx(
        with_process - stats.multivariate_normal(cov=noise.numpy()).logpdf(seen), rel=1e-4
    )


def test_information_below_zero_is_rounding_and_so_is_what_is_no_larger():
    place, eye = torch.zeros(1, 1, dtype=torch.float64), torch.eye(3, dtype=torch.float64)
    process = dataclasses.replace(Process.over(place, 1.0, 9), variance=10.0)
    turned = torch.linalg.qr(
        torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    )[0]
    matrix = turned @ torch.tensor([-0.2, 0.1, 4.0], dtype=torch.float64).diag() @ turned.mT
    slope = turned @ torch.tensor([100.0, 100.0, 8.0], dtype=torch.float64)
    mean, covariance = posterior(process, slope[None], matrix[None])
    known = torch.tensor([10.0, 10.0, 1 / 4.1], dtype=torch.float64)
    torch.testing.assert_close(turned.mT @ mean, 8 * known * eye[2])
    torch.testing.assert_close(turned.mT @ covariance @ turned, known.diag())


def test_a_revision_that_forecasts_worse_than_none_is_held_back(wrong):
    """Information so small that the weights follow a slope which sends states out of all bounds."""
    fit, _, recs, _ = wrong
    model = copy.deepcopy(fit.model).double()
    source = _Source.of(model, fit, recs, NAMES[0], 4)
    features = torch.eye(7, 3, dtype=torch.float64)
    process = dataclasses.replace(Process.over(source.embedding[None], 1.0, 1), variance=1.0)
    slope, matrix = (
        torch.full((1, 6), 100.0, dtype=torch.float64),
        1e-3 * torch.eye(6, dtype=torch.float64)[None],
    )
    with torch.no_grad():
        spectrum = process.spectrum(slope, matrix)
        held = _held(process, spectrum, features, [source])
        errors = [
            _roll_out_error([source], features, weights.view(1, 1, 6))
            for weights in (
                torch.zeros(6).double(),
                process.posterior(spectrum)[0],
                held.posterior(spectrum)[0],
            )
        ]
        assert held.variance < process.variance
        assert errors[1] > 2 * errors[0] and errors[2] < 1.01 * errors[0]
        # What does no harm stays as it is.
        harmless = process.spectrum(0 * slope, 1e12 * matrix)
        assert _held(process, harmless, features, [source]) == process


@pytest.fixture(scope="module")
def wrong():
    """A fit whose last layer is not that of its data, the fit that made them, the data and their states."""
    recs = recordings()
    fit, truth = fit_of(recs), fit_of(recs)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        for tensor in truth.model.dynamics.layers[-1].parameters():
            tensor += 0.2 * torch.randn(tensor.shape, generator=generator)
        batch = recs.batch(truth.names)
        program = poutine.condition(truth.model, data={"embedding": truth.statistics[:, None, :1]})
        states = poutine.trace(program).get_trace(batch).nodes["latents"]["value"]
        _, y, _ = observations_of(truth.model, states, batch)
    made = [pm.Recording(name, values, bin_width=0.05) for name, values in zip(NAMES, y.numpy(), strict=True)]
    return fit, truth, pm.Recordings(made), states.flatten(1, 2).double().numpy()


def flows(fit, states, num_draws):
    """Next states of visited ones, (draw, recording, state, latent_dim)."""
    source = [Source("test", fit, name, num_draws) for name in NAMES]
    each = [s.maps(s.places[0]) for s in source]
    z = [torch.as_tensor(x).expand(max(1, num_draws), -1, -1) for x in states]
    return torch.stack([maps(x) for maps, x in zip(each, z, strict=True)], 1).numpy()


def test_a_wrong_last_layer_is_corrected_as_surely_as_is_said(wrong):
    fit, truth, recs, states = wrong
    revised = pm.revise(fit, recs)
    assert revised.attrs["revision"]["evidence"] > 10
    some = states[:, [20, 100, 180]]  # few, so that their draws have a covariance
    right, before, draws = flows(truth, some, 0)[0], flows(fit, some, 0)[0], flows(revised, some, 4000)
    after = draws.mean(0)
    assert np.square(after - right).mean() < 0.1 * np.square(before - right).mean()
    error, covariance = (after - right).ravel(), np.cov(draws.reshape(len(draws), -1).T)
    distance = error @ np.linalg.solve(covariance, error)
    assert stats.chi2(error.size).ppf(0.001) < distance < stats.chi2(error.size).ppf(0.999)
    fewer = flows(pm.revise(fit, recs, num_trials=2), some, 400)
    assert (fewer.std(0) > draws.std(0)).mean() > 0.9


def test_a_revision_is_a_fit_like_others(wrong, tmp_path):
    fit, _, recs, states = wrong
    before = {key: value.clone() for key, value in fit.model.state_dict().items()}
    random = torch.get_rng_state()
    revised = pm.revise(fit, recs, num_trials=3)
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(value, before[key]) for key, value in fit.model.state_dict().items())
    revised.save(tmp_path)
    same = pm.load(tmp_path)
    some = states[:, :3]
    np.testing.assert_array_equal(flows(same, some, 5), flows(revised, some, 5))
    again = pm.revise(revised, recs, num_trials=3)  # begins from the same fit
    np.testing.assert_allclose(flows(again, some, 0), flows(revised, some, 0), rtol=1e-5)
    tree = pm.posterior(revised, recs, num_samples=3)
    assert tree["posterior"]["last_layer"].dims == ("chain", "draw", "direction")


def test_far_from_all_recordings_nothing_is_changed(wrong):
    fit, _, recs, _ = wrong
    revised = pm.revise(fit, recs, num_trials=3)
    far, z = torch.full((3, 1), 1e3, dtype=torch.float64), torch.randn(3, 4, 2, dtype=torch.float64)
    maps = [Source("test", one, far, 3) for one in (fit, revised)]
    first, second = (source.maps(source.places[0])(z) for source in maps)
    torch.testing.assert_close(first, second)


def test_without_directions_it_is_the_family():
    recs = recordings(num_trials=2, num_bins=5)
    for family in (pm.models.MetaSSM, pm.models.LinearAdapter, pm.models.GEPS):
        fit = fit_of(recs, family)
        model = pm.models.Revised(recs, latent_dim=2, embedding_dim=1, hidden_dim=6, family=family)
        model.load_state_dict(fit.model.state_dict())
        e, z = torch.randn(4, 1, 1), torch.randn(4, 2, 5, 2)
        torch.testing.assert_close(model.adapt_dynamics(e)(z), fit.model.adapt_dynamics(e)(z))


@pytest.mark.parametrize("family", [pm.models.LinearAdapter, pm.models.GEPS, pm.models.SharedDynamics])
def test_other_families_are_corrected_too(family, wrong):
    _, truth, recs, states = wrong
    fit = fit_of(recs, family)
    revised = pm.revise(fit, recs)
    some = states[:, ::40]
    right, before, after = (flows(one, some, 0)[0] for one in (truth, fit, revised))
    assert np.square(after - right).mean() < 0.2 * np.square(before - right).mean()


class WithNoise(pm.models.MetaSSM):
    def transition(self, z, dynamics):
        return super().transition(z, dynamics)


class WithSite(pm.models.MetaSSM):
    def __init__(self, recordings, **options):
        super().__init__(recordings, **options)
        self.tau = PyroSample(dist.Normal(0.0, 1.0))


def test_a_burst_of_counts_does_not_decide_a_revision():
    """One bin of one neuron with 20,000 counts among 3,840 bins of neurons: the evidence is that of the others."""
    rng = np.random.default_rng(0)
    counts = rng.poisson(1.0, size=(8, 40, 12)).astype(np.float32)
    found = []
    for burst in (counts[3, 20, 0], 2e4):
        counts[3, 20, 0] = burst
        recs = pm.Recordings([pm.Recording("r0", counts, bin_width=0.05)])
        model = pm.models.MetaSSM(
            recs, latent_dim=2, embedding_dim=1, hidden_dim=6, likelihood=pm.likelihoods.Poisson
        )
        guide = pm.guides.DKF(model, hidden_dim=4)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for part in (model, guide):
                for tensor in part.parameters():
                    tensor.copy_(0.3 * torch.randn_like(tensor))
            model.process_noise.log_scale.fill_(np.log(0.1))
            model.observation.start(recs)
        statistics = torch.tensor([[0.0, 1e-6]])
        fit = pm.Fit(model.eval(), guide.eval(), xr.Dataset(), statistics, attrs={"bin_width": 0.05})
        found.append(pm.revise(fit, recs).attrs["revision"])
    assert abs(found[0]["evidence"] - found[1]["evidence"]) < 10, found
    assert found[1]["sd"] < 10 * found[0]["sd"] + 1e-3, found


def test_bad_input_is_named():
    recs = recordings(num_trials=2, num_bins=5)
    with pytest.raises(ValueError, match=r"revise: needed a model with the hooks of MetaSSM.*transition"):
        pm.revise(fit_of(recs, WithNoise), recs)
    with pytest.raises(ValueError, match="no global sites, got WithSite"):
        pm.revise(fit_of(recs, WithSite), recs)
    with pytest.raises(ValueError, match=r"got SingleSession .adapt_dynamics, dynamics_of"):
        pm.revise(fit_of(recs, pm.models.SingleSession), recs)
    fit = fit_of(recs)
    other = pm.Recordings([pm.Recording("other", np.zeros((2, 5, 3)), bin_width=0.05)])
    with pytest.raises(ValueError, match=r"revise: needed recordings that the fit was trained on.*'other'"):
        pm.revise(fit, other)
    fit.statistics[1] = torch.nan
    with pytest.raises(ValueError, match=r"revise: needed recordings that the fit was trained on.*'r1'"):
        pm.revise(fit, recs)
    with pytest.raises(ValueError, match="num_trials"):
        pm.revise(fit_of(recs), recs, num_trials=0)
