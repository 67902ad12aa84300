"""The linear-Gaussian model and its exact guide against a textbook Kalman filter and smoother."""

import numpy as np
import pytest
import torch
import xarray as xr
from problems import garbage, linear_gaussian, recordings
from pyro import poutine
from scipy.stats import multivariate_normal, norm

import pyro_metassm as pm
from pyro_metassm.elbo import SequentialELBO
from pyro_metassm.recordings import Recording, Recordings

SIGMAS = 5.0


def kalman(y, a, b, q, c, d, r, mu, sigma):
    """Kalman filter and RTS smoother of one trial; NaN is missing; q, r and sigma are variances.

    Returns the log evidence, the smoothed means and covariances, and the filtered mean and covariance at the end.
    """
    filtered, predicted, evidence = [], [], 0.0
    m, p = mu, np.diag(sigma)
    for t, y_t in enumerate(y):
        if t > 0:
            m, p = a @ m + b, a @ p @ a.T + np.diag(q)
        predicted.append((m, p))
        seen = ~np.isnan(y_t)
        if seen.any():
            c_t, r_t = c[seen], np.diag(r[seen])
            innovation, s = y_t[seen] - c_t @ m - d[seen], c_t @ p @ c_t.T + r_t
            evidence += multivariate_normal(np.zeros(len(s)), s).logpdf(innovation)
            gain = p @ c_t.T @ np.linalg.inv(s)
            m, p = m + gain @ innovation, p - gain @ s @ gain.T
        filtered.append((m, p))
    smoothed = [filtered[-1]]
    for (m, p), (m_next, p_next) in zip(filtered[-2::-1], predicted[:0:-1], strict=True):
        gain = p @ a.T @ np.linalg.inv(p_next)
        m_s, p_s = smoothed[0]
        smoothed.insert(0, (m + gain @ (m_s - m_next), p + gain @ (p_s - p_next) @ gain.T))
    means, covs = (np.stack(x) for x in zip(*smoothed, strict=True))
    return evidence, means, covs, filtered[-1]


def parameters(model, name: str) -> tuple[np.ndarray, ...]:
    """The model's parameters for one recording, in the order of `kalman`."""
    rows = model.neurons.slice(name)
    tensors = (
        model.dynamics.weight, model.dynamics.bias, model.process_noise() ** 2, model.read_out.weight[rows],
        model.read_out.bias[rows], (2 * model.observation.log_sd[rows]).exp(),
        model.initial.loc, model.initial.scale**2,
    )  # fmt: skip
    return tuple(x.detach().numpy() for x in tensors)


def trial(recording: Recording, k: int, stop: int | None = None) -> np.ndarray:
    return recording.observations[k, : recording.lengths[k] if stop is None else stop]


def evidences(model, recs) -> np.ndarray:
    """Log evidence by recording."""
    return np.array([
        sum(kalman(trial(r, k), *parameters(model, name))[0] for k in range(r.num_trials)) for name, r in recs.items()
    ])  # fmt: skip


def as_fit(model, guide) -> pm.Fit:
    """A fit of parameters that are known."""
    unknown = torch.zeros(len(model.names), 2 * model.embedding_dim, dtype=torch.float64)
    return pm.Fit(model.eval(), guide.eval(), xr.Dataset(), unknown)


@pytest.fixture
def problem():
    recs = recordings()
    model = linear_gaussian(recs)
    return recs, model, pm.guides.ExactSmoother(model)


def test_the_oracle_is_the_dense_gaussian():
    """The filter itself against the joint Gaussian of all observations of a trial."""
    rng = np.random.default_rng(0)
    a, c, b, d = (
        0.5 * rng.normal(size=(2, 2)),
        rng.normal(size=(3, 2)),
        rng.normal(size=2),
        rng.normal(size=3),
    )
    q, r, mu, sigma = (
        np.array([0.3, 0.6]),
        np.array([0.5, 1.0, 0.2]),
        rng.normal(size=2),
        np.array([1.0, 0.4]),
    )
    y = rng.normal(size=(4, 3))
    y[1], y[2, 0] = np.nan, np.nan
    mean, blocks = [mu], [np.diag(sigma)]
    for _ in range(3):
        mean.append(a @ mean[-1] + b)
        blocks.append(a @ blocks[-1] @ a.T + np.diag(q))
    cov = np.block([
        [
            np.linalg.matrix_power(a, t - s) @ blocks[s] if t >= s else blocks[t] @ np.linalg.matrix_power(a, s - t).T
            for s in range(4)
        ]
        for t in range(4)
    ])  # fmt: skip
    big_c, seen = np.kron(np.eye(4), c), ~np.isnan(y.ravel())
    y_mean = (big_c @ np.concatenate(mean) + np.tile(d, 4))[seen]
    y_cov = (big_c @ cov @ big_c.T + np.diag(np.tile(r, 4)))[np.ix_(seen, seen)]
    evidence, means, covs, (last, last_cov) = kalman(y, a, b, q, c, d, r, mu, sigma)
    assert np.isclose(evidence, multivariate_normal(y_mean, y_cov).logpdf(y.ravel()[seen]), rtol=1e-12)
    gain = cov @ big_c[seen].T @ np.linalg.inv(y_cov)
    posterior = np.concatenate(mean) + gain @ (y.ravel()[seen] - y_mean)
    posterior_cov = cov - gain @ big_c[seen] @ cov
    np.testing.assert_allclose(means.ravel(), posterior, rtol=1e-10)
    for t in range(4):
        np.testing.assert_allclose(covs[t], posterior_cov[2 * t : 2 * t + 2, 2 * t : 2 * t + 2], rtol=1e-9)
    assert np.array_equal(last, means[-1]) and np.array_equal(last_cov, covs[-1])


@pytest.mark.parametrize("latent_dim", [1, 2, 3])
def test_every_one_sample_elbo_is_the_log_evidence(latent_dim):
    recs = recordings()
    model = linear_gaussian(recs, latent_dim)
    guide = pm.guides.ExactSmoother(model)
    expected = evidences(model, recs)
    batch = recs.batch(model.names, dtype=torch.float64)
    values = set()
    for seed in range(4):
        torch.manual_seed(seed)
        terms = SequentialELBO().terms(model, guide, batch)
        np.testing.assert_allclose(terms.elbo.item(), expected.sum(), rtol=1e-10)
        np.testing.assert_allclose(terms.by_recording.numpy(), expected, rtol=1e-10)
        assert terms.kl["embedding"] == 0
        values.add(terms.log_likelihood.item())
    assert len(values) == 4  # the parts are of different samples, only their sum is constant


def test_order_of_recordings_and_padding_do_not_matter(problem):
    recs, model, guide = problem
    expected = evidences(model, recs)
    batch = garbage(recs.select(["c", "a", "b"]).batch(model.names, dtype=torch.float64), 1e3)
    terms = SequentialELBO().terms(model, guide, batch)
    np.testing.assert_allclose(terms.by_recording.numpy(), expected[[2, 0, 1]], rtol=1e-10)


def test_smoother_means_are_those_of_rts(problem):
    recs, model, guide = problem
    q = guide.latents_posterior(recs.batch(model.names, dtype=torch.float64))
    for r, (name, recording) in enumerate(recs.items()):
        for k in range(recording.num_trials):
            _, means, _, _ = kalman(trial(recording, k), *parameters(model, name))
            np.testing.assert_allclose(
                q.mean[r, k, : len(means)].detach().numpy(), means, rtol=1e-9, atol=1e-9
            )


def test_smoother_draws_are_the_posterior(problem):
    """Moments of draws of one trial within standard errors; neighbouring bins' covariance from the dense density."""
    recs, model, guide = problem
    torch.manual_seed(0)
    num, k = 20_000, 1
    q = guide.latents_posterior(recs.batch(model.names, dtype=torch.float64))
    draws = q.sample((num,))[:, 0, k].numpy()
    _, means, covs, _ = kalman(trial(recs["a"], k), *parameters(model, "a"))
    for t, (mean, cov) in enumerate(zip(means, covs, strict=True)):
        assert (np.abs(draws[:, t].mean(0) - mean) < SIGMAS * np.sqrt(cov.diagonal() / num)).all()
        error = np.sqrt((np.outer(cov.diagonal(), cov.diagonal()) + cov**2) / num)
        centred = draws[:, t] - mean
        assert (np.abs(centred.T @ centred / num - cov) < SIGMAS * error).all()


def test_smoother_density_belongs_to_its_draws(problem):
    """The mean of log q over draws is minus the entropy: log q = const - chi^2_n / 2 with n = time x latent_dim."""
    recs, model, guide = problem
    torch.manual_seed(0)
    num, batch = 5_000, recs.batch(model.names, dtype=torch.float64)
    q = guide.latents_posterior(batch)
    z = q.sample((num,))
    # chi^2 with n degrees of freedom: mean n, variance 2 n.
    squares = 2 * (q.log_prob(q.mean) - q.log_prob(z))
    n = 2.0 * batch.time_mask.sum(-1)
    assert ((squares.mean(0) - n).abs() <= SIGMAS * (2 * n / num).sqrt()).all()
    error = ((squares.var(0) - 2 * n).abs() - 1e-12) / (2 * n).clamp(min=1)
    assert (
        error < SIGMAS * ((2 + 12 / n.clamp(min=1)) / num).sqrt()
    ).all()  # var(s^2) = sigma^4 (kurtosis - 1) / N
    # Nothing depends on what a trial does not have.
    hidden = torch.where(batch.time_mask.unsqueeze(-1), z, 1e6)
    assert torch.equal(q.log_prob(hidden), q.log_prob(z))


def test_smoother_expands_as_pyro_needs(problem):
    recs, model, guide = problem
    q = guide.latents_posterior(recs.batch(model.names, dtype=torch.float64))
    wide = q.expand((5, *q.batch_shape))
    z = wide.rsample((2,))
    assert z.shape == (2, 5, *q.batch_shape, *q.event_shape)
    assert len(torch.unique(z[..., 0, 0, 0, 0])) == 10
    assert (
        torch.equal(wide.log_prob(z), q.log_prob(z))
        and wide.mean.shape == wide.batch_shape + wide.event_shape
    )


def test_held_out_neurons_are_scored_and_not_seen():
    """Sample by sample, ELBO = log p(y_seen) + log p(y_held_out | z) for z of the posterior given y_seen alone."""
    recs = recordings(shapes={"a": (3, (6, 4))}, missing=False)
    held = Recordings([with_held_out(r, [1]) for r in recs.values()])
    model = linear_gaussian(recs)
    guide = pm.guides.ExactSmoother(model)
    batch = held.batch(model.names, dtype=torch.float64)
    torch.manual_seed(0)
    z = poutine.trace(guide).get_trace(batch).nodes["latents"]["value"][0].detach().numpy()
    torch.manual_seed(0)
    terms = SequentialELBO().terms(model, guide, batch)
    expected = 0.0
    c, d, r = parameters(model, "a")[3:6]
    for k, length in enumerate(recs["a"].lengths):
        y = trial(recs["a"], k).copy()
        expected += norm(z[k, :length] @ c[1] + d[1], np.sqrt(r[1])).logpdf(y[:, 1]).sum()
        y[:, 1] = np.nan
        expected += kalman(y, *parameters(model, "a"))[0]
    assert np.isclose(terms.elbo.item(), expected, rtol=1e-10)


def with_held_out(recording: Recording, held_out) -> Recording:
    return Recording(
        recording.name, recording.observations, bin_width=recording.bin_width, lengths=recording.lengths,
        held_out_neurons=held_out,
    )  # fmt: skip


def test_gradient_of_the_elbo_is_that_of_the_log_evidence(problem):
    """Through model and posterior together, against central differences of the Kalman filter's evidence."""
    recs, model, guide = problem
    batch = recs.batch(model.names, dtype=torch.float64)
    SequentialELBO().terms(model, guide, batch).elbo.backward()
    chosen = (
        model.dynamics.weight, model.dynamics.bias, model.process_noise.log_scale, model.initial.loc,
        model.initial.log_scale, model.read_out.weight, model.read_out.bias, model.observation.log_sd,
    )  # fmt: skip
    for parameter in chosen:
        place = (0,) * parameter.dim()
        with torch.no_grad():
            original, step, values = parameter[place].clone(), 1e-5, []
            for sign in (1, -1):
                parameter[place] = original + sign * step
                values.append(evidences(model, recs).sum())
            parameter[place] = original
        slope = (values[0] - values[1]) / (2 * step)
        assert np.isclose(parameter.grad[place].item(), slope, rtol=1e-5, atol=1e-6)


def test_posterior_of_a_fit_is_the_smoother(problem):
    """pm.posterior's draws: means and variances within standard errors, log likelihoods from the rates."""
    recs, model, guide = problem
    num = 4_000
    tree = pm.posterior(as_fit(model, guide), recs, num_samples=num, log_likelihood=True)
    for name, recording in recs.items():
        latents = tree[f"{name}/posterior"]["latents"].values[0].astype(float)
        rates = tree[f"{name}/posterior"]["rates"].values[0].astype(float)
        density = tree[f"{name}/log_likelihood"]["observations"].values[0]
        c, d, r = parameters(model, name)[3:6]
        for k in range(recording.num_trials):
            y = trial(recording, k)
            _, means, covs, _ = kalman(y, *parameters(model, name))
            variance = covs.diagonal(axis1=1, axis2=2)
            z = latents[:, k, : len(y)]
            assert (np.abs(z.mean(0) - means) < SIGMAS * np.sqrt(variance / num)).all()
            assert (np.abs(z.var(0) / variance - 1) < SIGMAS * np.sqrt(2 / num)).all()
            np.testing.assert_allclose(rates[:, k, : len(y)], z @ c.T + d, rtol=1e-4, atol=1e-4)
            expected = np.nansum(norm(z @ c.T + d, np.sqrt(r)).logpdf(y), axis=(1, 2))
            np.testing.assert_allclose(density[:, k], expected, rtol=1e-3, atol=1e-3)


def test_forecast_of_a_fit_is_the_kalman_prediction(problem):
    """Moments of forecasts from `context` bins, within standard errors, beyond the end of the data too."""
    recs, model, guide = problem
    num, context, horizon = 4_000, 3, 6
    with pytest.warns(UserWarning, match="end before context"):
        tree = pm.forecast(as_fit(model, guide), recs, context=context, horizon=horizon, num_samples=num)
    for name, recording in recs.items():
        group = tree[f"{name}/predictions"]
        a, b, q, c, d, *_ = parameters(model, name)
        for k in group["trial"].values:
            *_, (mean, cov) = kalman(trial(recording, k, context), *parameters(model, name))
            for h in range(horizon):
                mean, cov = a @ mean + b, a @ cov @ a.T + np.diag(q)
                z = group["latents"].sel(trial=k).values[0, :, h].astype(float)
                variance = cov.diagonal()
                assert (np.abs(z.mean(0) - mean) < SIGMAS * np.sqrt(variance / num)).all()
                error = np.sqrt((np.outer(variance, variance) + cov**2) / num)
                assert (np.abs((z - mean).T @ (z - mean) / num - cov) < SIGMAS * error).all()
                rates = group["rates"].sel(trial=k).values[0, :, h]
                np.testing.assert_allclose(rates, z @ c.T + d, rtol=1e-4, atol=1e-4)


def test_model_is_rebuilt_from_its_config_and_neurons(problem):
    recs, model, guide = problem
    again = type(model)(model.neurons, **model.config).double()
    again.load_state_dict(model.state_dict())
    batch = recs.batch(model.names, dtype=torch.float64)
    q, p = (g.latents_posterior(batch) for g in (guide, pm.guides.ExactSmoother(again)))
    assert torch.equal(q.mean, p.mean)


def test_exact_smoother_refuses_another_model():
    recs = recordings()
    with pytest.raises(ValueError, match=r"needed a LinearGaussian, got MetaSSM"):
        pm.guides.ExactSmoother(pm.models.MetaSSM(recs, latent_dim=2, embedding_dim=1))
