"""`pm.calibration`: uniform where the posterior is exact, off by a known amount where it is too narrow."""

import dataclasses

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from fits import QUICK, parts
from problems import linear_gaussian
from pyro.nn import PyroSample
from scipy import integrate, stats
from test_linear_gaussian import as_fit

import pyro_metassm as pm
from pyro_metassm.calibrating import covered, rank, simulated
from pyro_metassm.guides.exact import GaussianPath
from pyro_metassm.plots.calibration import binomial_interval

SIGMAS = 5.0
RARE = 1e-5  # a test that is right fails as often
L = 19


class TooNarrow(pm.guides.ExactSmoother):
    """The exact posterior with half of its standard deviations: four times its precision."""

    def latents_posterior(self, batch):
        lower = super().latents_posterior(batch)
        q = object.__new__(GaussianPath)
        q.lower, q.cross = [2.0 * x for x in lower.lower], [2.0 * x for x in lower.cross]
        q.loc, q.mask_of_bins = lower.loc, lower.mask_of_bins
        super(GaussianPath, q).__init__(lower.batch_shape, lower.event_shape, validate_args=False)
        return q


@pytest.fixture(scope="module")
def like():
    """Trials of 3 to 6 bins, some of them missing."""
    rng = np.random.default_rng(0)
    made = []
    for name, neurons in (("a", 3), ("b", 5)):
        values = rng.normal(size=(12, 6, neurons))
        values[0, 2], values[1, :, 0] = np.nan, np.nan
        lengths = np.array([6] * 9 + [3] * 3)
        values[lengths == 3, 3:] = np.nan
        made.append(pm.Recording(name, values, bin_width=0.02, lengths=lengths))
    return pm.Recordings(made)


def found(like, guide, **options):
    model = linear_gaussian(like)
    options = {"num_simulations": 30, "num_samples": L, "progress": False} | options
    return pm.calibration(as_fit(model, guide(model)), like=like, **options)


@pytest.fixture(scope="module")
def exact(like):
    return found(like, pm.guides.ExactSmoother)


@pytest.fixture(scope="module")
def narrow(like):
    return found(like, TooNarrow)


def p_uniform(ranks) -> float:
    """Of the chi-square test; ranks of independent simulations."""
    return stats.chisquare(np.bincount(np.ravel(ranks).astype(int), minlength=L + 1)).pvalue


def test_ranks_are_uniform_where_the_posterior_is_exact(exact):
    assert exact["latents_rank"].shape == (30, 2, 12, 2) and exact["rates_rank"].shape == (30, 2, 12)
    for dim in range(2):  # the latents of a trial depend on each other, trials do not
        assert p_uniform(exact["latents_rank"].isel(latent_dim=dim)) > RARE
    assert p_uniform(exact["rates_rank"]) > RARE
    assert p_uniform(exact["embedding_rank"].isel(embedding_dim=1)) > RARE
    error = np.abs(exact["coverage"] - exact["level"])
    assert bool((error <= SIGMAS * exact["coverage_se"]).all())
    assert float(exact["coverage_se"].sel(quantity="latents").max()) < 0.02
    assert bool((exact["khat"] == 0.0).all())  # all weights are the evidence


def test_a_posterior_that_is_too_narrow_covers_as_little_as_it_must(narrow):
    """Truth Normal(0, 1), draws Normal(0, 1/2): each is below the truth with probability Phi(2 z)."""
    for level, tail in ((0.5, 5), (0.9, 1)):

        def inside(z, tail=tail):
            of = stats.binom(L, stats.norm.cdf(2 * z))
            return (of.cdf(L - tail) - of.cdf(tail - 1)) * stats.norm.pdf(z)

        expected = integrate.quad(inside, -8, 8, limit=200)[0]
        assert expected < level - 0.15
        for quantity in ("latents", "rates"):
            cell = narrow.sel(quantity=quantity, level=level)
            assert abs(float(cell["coverage"]) - expected) < SIGMAS * float(cell["coverage_se"])
    for dim in range(2):
        assert p_uniform(narrow["latents_rank"].isel(latent_dim=dim)) < 1e-20
    assert p_uniform(narrow["rates_rank"]) < 1e-20
    assert p_uniform(narrow["embedding_rank"].isel(embedding_dim=0)) > RARE  # that part is right


def test_intervals_are_exact_for_the_number_of_draws():
    for number in (19, 39, 99):
        assert covered(np.arange(number + 1.0), number).mean(0).tolist() == [0.5, 0.9]
    draws = np.array([[1.0, np.nan], [2.0, 0.0], [3.0, 0.0]])
    np.testing.assert_array_equal(rank(draws, np.array([2.5, 1.0])), [2.0, np.nan])


def test_simulations_have_the_shape_of_the_data_and_follow_the_model(like):
    model = linear_gaussian(like)
    fit = as_fit(model, pm.guides.ExactSmoother(model))
    random = torch.get_rng_state()
    made, again, other = (simulated(fit, like, seed)[0] for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), random)
    residuals = []
    for name, recording in made.items():
        np.testing.assert_array_equal(recording.mask, like[name].mask)
        np.testing.assert_array_equal(recording.lengths, like[name].lengths)
        np.testing.assert_array_equal(recording.values, again[name].values)
        assert not np.array_equal(recording.values, other[name].values)
        rows, truth = model.neurons.slice(name), made.truth[name]
        weight, bias = (
            model.read_out.weight[rows].detach().numpy(),
            model.read_out.bias[rows].detach().numpy(),
        )
        np.testing.assert_allclose(truth["rates"], truth["latents"].values @ weight.T + bias, atol=1e-5)
        sd = model.observation.log_sd[rows].exp().detach().numpy()
        residuals.append(((recording.observations - truth["rates"].values) / sd).ravel())
    residual = np.concatenate(residuals)
    assert stats.kstest(residual[np.isfinite(residual)], "norm").pvalue > RARE


@pytest.fixture(scope="module")
def fitted():
    recs = pm.simulate.limit_cycles([2.0, 4.0], num_trials=8, num_steps=12, num_neurons=6)
    fit = pm.fit(*parts(recs), recs, **QUICK)
    mean = torch.tensor([[-1.0], [1.5]])
    return recs, dataclasses.replace(fit, statistics=torch.cat([mean, torch.full_like(mean, 1e-4)], -1))


def test_new_trials_of_known_recordings_have_their_embeddings(fitted):
    recs, fit = fitted
    made, lost = simulated(fit, recs, 0, new_recordings=False)
    assert lost == []
    drawn = [float(made.truth[name]["embedding"][0]) for name in recs.names]
    np.testing.assert_allclose(drawn, [-1.0, 1.5], atol=SIGMAS * 0.01)
    table = pm.calibration(fit, like=recs, new_recordings=False, num_simulations=2, progress=False)
    assert table["quantity"].values.tolist() == ["latents", "rates"]
    units = table["rates_covered"].sel(level=0.9).values.ravel()
    assert float(table["coverage_se"].sel(quantity="rates", level=0.9)) == pytest.approx(
        units.std(ddof=1) / units.size**0.5
    )
    both = pm.calibration(fit, num_simulations=3, num_samples=19, progress=False)
    assert both["latents_rank"].shape == (3, 2, 32, 2) and "embedding" in both["quantity"]
    units = both["rates_covered"].sel(level=0.9).mean("trial").values.ravel()
    assert float(both["coverage_se"].sel(quantity="rates", level=0.9)) == pytest.approx(
        units.std(ddof=1) / units.size**0.5
    )


class DrawnReadOut(pm.models.MetaSSM):
    def __init__(self, recordings, **options):
        super().__init__(recordings, **options)
        shape = self.read_out.weight.shape
        self.read_out.weight = PyroSample(dist.Normal(0.0, 1.0).expand(shape).to_event(2))


@pytest.mark.parametrize("new_recordings", [True, False])
def test_global_sites_are_those_of_the_fit(fitted, new_recordings):
    """The posterior of new recordings has them from the training data: so must the simulation."""
    recs, known = fitted
    model = DrawnReadOut(recs, latent_dim=2, embedding_dim=1, hidden_dim=8)
    guide = pm.guides.DKF(model, hidden_dim=6)
    with torch.no_grad():
        guide.global_sites.loc["read_out-weight"].fill_(3.0)
        guide.global_sites.log_scale["read_out-weight"].fill_(-20.0)
    fit = dataclasses.replace(known, model=model.eval(), guide=guide.eval())
    made, _ = simulated(fit, recs, 0, new_recordings)
    for name, truth in made.truth.items():
        bias = model.read_out.bias[model.neurons.slice(name)].detach().numpy()
        expected = 3.0 * truth["latents"].sum("latent_dim").values[..., None] + bias
        np.testing.assert_allclose(truth["rates"], expected, atol=1e-4)


def test_a_simulation_of_ones_own_is_compared_in_its_coordinates(fitted):
    """Against draws, maps and intervals taken by hand."""
    recs, fit = fitted
    seeds = []

    def simulate(seed):
        seeds.append(seed)
        return recs.take_trials(5, seed=seed)

    options = {"new_recordings": False, "num_simulations": 2, "num_samples": 39, "seed": 7, "progress": False}
    table = pm.calibration(fit, simulate, align=recs, **options)
    assert seeds == [7, 8] and table["quantity"].values.tolist() == ["latents", "rates"]
    name, few = "w=4", recs.take_trials(5, seed=8).select(["w=4"])
    to_truth = pm.plots.align(pm.posterior(fit, recs.select([name]), num_samples=50), name).to_truth
    draws = pm.posterior(fit, few, num_samples=39, seed=8)[f"{name}/posterior"]
    pairs = {"latents": to_truth(draws["latents"].values[0]), "rates": draws["rates"].values[0]}
    for key, values in pairs.items():
        truth = few.truth[name][key].values.astype(values.dtype)
        ordered = np.sort(values, 0)
        for level, tail in ((0.5, 10), (0.9, 2)):
            inside = (truth > ordered[tail - 1]) & (truth <= ordered[39 - tail])
            expected = table[f"{key}_covered"].sel(simulation=1, recording=name, level=level)
            np.testing.assert_allclose(inside.mean((1, 2)), expected)
    plain = pm.calibration(fit, simulate, **options)
    assert plain["quantity"].values.tolist() == ["rates"]
    np.testing.assert_array_equal(plain["rates_rank"].shape, (2, 2, 5))


def test_what_cannot_be_calibrated_is_refused(fitted):
    recs, fit = fitted
    with pytest.raises(ValueError, match=r"num_samples = 19, 39.*got 100"):
        pm.calibration(fit, num_samples=100)
    with pytest.raises(ValueError, match="`align` with it"):
        pm.calibration(fit, align=recs)
    with pytest.raises(ValueError, match="needed the truth of recording 'w=2'"):
        pm.calibration(fit, lambda seed: pm.Recordings(recs.values()), num_simulations=1, progress=False)
    with pytest.raises(ValueError, match="num_simulations"):
        pm.calibration(fit, num_simulations=0)


class Wild(pm.models.LinearGaussian):
    """Recordings of a positive embedding leave the finite numbers."""

    def adapt_dynamics(self, e):
        return lambda z: self.dynamics(z) * torch.where(e[..., :1] > 0, 1e30, 1.0).unsqueeze(-2)


def test_simulations_that_are_not_finite_are_left_out_and_told(like):
    model = Wild(like, latent_dim=2, embedding_dim=2).double()
    fit = as_fit(model, pm.guides.ExactSmoother(model))
    with pytest.warns(
        UserWarning, match=r"1 of 4 simulated recordings left .*: 'b' \(seed 4\); see new_recordings"
    ):
        table = pm.calibration(fit, like=like, num_simulations=2, num_samples=L, seed=4, progress=False)
    there = np.isfinite(table["embedding_rank"].isel(embedding_dim=0))
    np.testing.assert_array_equal(there, [[True, False], [True, True]])
    for seed in (4, 5):
        made, lost = simulated(fit, like, seed)
        assert all(made.truth[name]["embedding"][0] < 0 for name in made) and len(lost) == 5 - seed
    with pytest.raises(ValueError, match="all of the model's own simulations"):
        simulated(fit, like, 1)


def test_the_picture(exact, narrow):
    axes = pm.plots.calibration(exact)
    assert [ax.get_title() for ax in axes[:3]] == ["embedding", "latents", "rates"] and len(axes) == 4
    bars = axes[2].patches[0].get_data()
    ranks = np.bincount(exact["rates_rank"].values.ravel().astype(int), minlength=L + 1)
    np.testing.assert_allclose(bars.values, ranks * 20 / 720)  # one bar a rank
    np.testing.assert_allclose(bars.edges, np.linspace(0, 1, 21))
    low, high = stats.binom(720, 1 / 20).interval(0.99)
    band = axes[2].patches[1].get_extents().transformed(axes[2].transData.inverted())
    np.testing.assert_allclose([band.y0, band.y1], [low * 20 / 720, high * 20 / 720])
    # latents and embeddings have two dims, and a band for as many ranks as are independent
    assert "n = 720" in axes[1].get_xlabel() and "n = 60" in axes[0].get_xlabel()
    drawn = {float(line.get_ydata()[0]) for line in axes[3].lines if len(line.get_ydata()) == 1}
    assert drawn >= set(exact["coverage"].values.ravel().tolist())
    few = pm.plots.calibration(narrow, axes=axes)
    assert all(one is other for one, other in zip(few, axes, strict=True))
    with pytest.raises(ValueError, match="needed 4 axes, got 1"):
        pm.plots.calibration(exact, axes[0])


@pytest.mark.parametrize(("number", "p"), [(60, 0.2), (720, 0.05), (5000, 0.1)])
def test_the_band_is_that_of_the_binomial(number, p):
    assert binomial_interval(number, p, 0.99) == stats.binom(number, p).interval(0.99)
