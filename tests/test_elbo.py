"""The ELBO: unbiased under sub-sampling, what counts how often, analytic against sampled."""

import itertools

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from problems import garbage, linear_gaussian, recordings
from pyro import poutine
from test_linear_gaussian import evidences

import pyro_metassm as pm
from pyro_metassm.distributions import MarkovPath, RolloutPath
from pyro_metassm.elbo import SequentialELBO
from pyro_metassm.recordings import Recording, Recordings

SIGMAS = 5.0
DOUBLE = torch.float64


class Shifted(pm.guides.ExactSmoother):
    """The exact smoother with a q(e) of each recording that is not the prior: an ELBO without noise, KL(e) > 0."""

    def forward(self, batch):
        model = self.model
        loc = 0.3 * (1.0 + batch.recording.to(DOUBLE))[:, None, None].expand(-1, 1, model.embedding_dim)
        with model.recording_plate(batch):
            pyro.sample("embedding", dist.Normal(loc, 0.5).to_event(1))
            with model.trial_plate(batch), poutine.scale(scale=batch.trial_scale):
                pyro.sample("latents", self.latents_posterior(batch))


def kl_of(row: int, embedding_dim: int) -> float:
    """KL(Normal(loc, 0.5) || Normal(0, 1)) of a recording in `Shifted`."""
    loc = 0.3 * (1 + row)
    return embedding_dim * 0.5 * (0.25 + loc**2 - 1 - np.log(0.25))


@pytest.fixture
def problem():
    recs = recordings()
    model = linear_gaussian(recs)
    return recs, model, Shifted(model)


def subsets(size: int, number: int) -> list[list[int]]:
    return [list(c) for c in itertools.combinations(range(size), min(number, size))]


@pytest.mark.parametrize(
    "num_recordings, num_trials", [(None, 1), (None, 2), (1, None), (2, None), (1, 2), (2, 1)]
)
def test_average_over_all_sub_samples_is_the_full_elbo(problem, num_recordings, num_trials):
    """Enumeration: the mini-batch ELBO, and each of its parts, is unbiased over a uniform choice of the batch."""
    recs, model, guide = problem
    full = SequentialELBO().terms(model, guide, recs.batch(model.names, dtype=DOUBLE))
    expected = evidences(model, recs).sum() - sum(kl_of(r, 2) for r in range(3))
    np.testing.assert_allclose(full.elbo.item(), expected, rtol=1e-10)
    values, kls = [], []
    for rows in subsets(len(recs), num_recordings or len(recs)):
        names = [recs.names[r] for r in rows]
        choices = itertools.product(*(subsets(recs[n].num_trials, num_trials or 99) for n in names))
        by_trials = []
        for trials in choices:
            batch = recs.batch(
                model.names, names=names, trials=dict(zip(names, trials, strict=True)), dtype=DOUBLE
            )
            by_trials.append(SequentialELBO().terms(model, guide, batch))
        values.append(np.mean([t.elbo.item() for t in by_trials]))
        kls.append(np.mean([t.kl["embedding"].item() for t in by_trials]))
        assert np.allclose(
            [t.by_recording.sum().item() for t in by_trials], [t.elbo.item() for t in by_trials]
        )
    np.testing.assert_allclose(np.mean(values), full.elbo.item(), rtol=1e-10)
    np.testing.assert_allclose(np.mean(kls), full.kl["embedding"].item(), rtol=1e-10)
    assert len(values) * len(by_trials) > 1 and (np.std(values) > 1e-3 or num_recordings is None)


def test_kl_of_the_embedding_counts_once_a_recording(problem):
    recs, model, guide = problem

    def kl(recs, **choice):
        return (
            SequentialELBO()
            .terms(model, guide, recs.batch(model.names, dtype=DOUBLE, **choice))
            .kl["embedding"]
            .item()
        )

    by_recording = [kl_of(r, 2) for r in range(3)]
    assert np.isclose(kl(recs), sum(by_recording))
    # Twice the trials, or one of them: the same.
    doubled = Recordings([r.take(list(range(r.num_trials)) * 2) for r in recs.values()])
    assert kl(doubled) == kl(recs)
    assert kl(recs, trials={name: [0] for name in recs}) == kl(recs)
    # Some recordings stand for all: times M / R.
    for rows in subsets(3, 1) + subsets(3, 2):
        names = [recs.names[r] for r in rows]
        assert np.isclose(kl(recs, names=names), 3 / len(rows) * sum(by_recording[r] for r in rows))


def test_trial_terms_count_for_all_trials(problem):
    """Twice the same trials, twice the trial terms; one of two equal trials stands for both."""
    recs, model, _ = problem
    guide = pm.guides.ExactSmoother(model)
    twice = Recordings([r.take([0, 0]) for r in recs.values()])
    once = Recordings([r.take([0]) for r in recs.values()])
    elbos = [
        SequentialELBO().terms(model, guide, batch).elbo.item()
        for batch in (
            twice.batch(model.names, dtype=DOUBLE),
            twice.batch(model.names, dtype=DOUBLE, trials={name: [1] for name in recs}),
            once.batch(model.names, dtype=DOUBLE),
        )
    ]
    np.testing.assert_allclose(elbos, [elbos[0], elbos[0], elbos[0] / 2], rtol=1e-12)


def dkf(model, **more):
    torch.manual_seed(1)
    guide = pm.guides.DKF(model, hidden_dim=8, **more).double()
    with torch.no_grad():  # a posterior of its own for every bin
        for parameter in guide.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return guide


class SampledELBO(SequentialELBO):
    """The same with the log ratio at the sample in place of every divergence."""

    def terms(self, model, guide, *args):
        guide_trace = poutine.trace(guide).get_trace(*args)
        model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args)
        return model_trace.log_prob_sum(), guide_trace.log_prob_sum()


@pytest.mark.parametrize("rollout_probability", [0.0, 0.5])
def test_analytic_and_sampled_divergences_agree(rollout_probability):
    """E[elbo with analytic KL] = E[log p - log q]: paired differences have mean zero within their standard error."""
    recs = recordings()
    model = linear_gaussian(recs)
    guide = dkf(model, rollout_probability=rollout_probability)
    batch = recs.batch(model.names, dtype=DOUBLE, trials={"a": [0, 1], "c": [1]}, names=["c", "a"])
    differences, ours = [], []
    with torch.no_grad():
        for seed in range(200):
            torch.manual_seed(seed)
            terms = SequentialELBO().terms(model, guide, batch)
            torch.manual_seed(seed)
            log_p, log_q = SampledELBO().terms(model, guide, batch)
            assert terms.log_likelihood.isfinite()
            differences.append((terms.elbo - (log_p - log_q)).item())
            ours.append(sum(terms.kl.values()).item())
    error = np.std(differences) / len(differences) ** 0.5
    assert abs(np.mean(differences)) < SIGMAS * error
    assert error < 0.05 * np.mean(ours)  # it would see a term that is lost or counted twice


def test_a_bound_with_roll_outs_is_below_the_evidence():
    """The DKF with roll-outs, after a little training so that it is not trivially loose."""
    recs = recordings()
    model = linear_gaussian(recs)
    guide = dkf(model, rollout_probability=0.2)
    guide.read_in.start(recs)
    expected = evidences(model, recs).sum()
    batch = recs.batch(model.names, dtype=DOUBLE)
    optimizer = torch.optim.Adam(guide.parameters(), lr=0.03)
    torch.manual_seed(0)
    for step in range(250):
        optimizer.param_groups[0]["lr"] = 0.03 * (1 - step / 250)
        loss = SequentialELBO().differentiable_loss(model, guide, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        values = np.array([SequentialELBO().terms(model, guide, batch).elbo.item() for _ in range(200)])
    assert values.mean() + SIGMAS * values.std() / len(values) ** 0.5 < expected
    assert np.median(values) > 1.4 * expected  # in nats, of about -190


def test_roll_outs_are_exact_where_the_posterior_is_the_prior():
    """Only the first bin observed: p(z | y) = p(z_1 | y_1) prod p(z_t | z_{t-1}), which roll-outs represent.

    Then the ELBO with the exact q(z_1) equals the log evidence: its average within a standard error, tightly.
    """
    rng = np.random.default_rng(0)
    y = np.full((1, 6, 3), np.nan)
    y[:, 0] = rng.normal(size=(1, 3))
    recs = Recordings([Recording("a", y, bin_width=0.02, lengths=[6])])
    model = linear_gaussian(recs, latent_dim=1)
    batch = recs.batch(model.names, dtype=DOUBLE)
    c, sd = model.read_out.weight[:, 0], model.observation.log_sd.exp()
    precision = model.initial.scale**-2 + (c**2 / sd**2).sum()
    information = model.initial.scale**-2 * model.initial.loc
    information = information + (c * (torch.as_tensor(y[0, 0]) - model.read_out.bias) / sd**2).sum()
    loc = (information / precision).expand(1, 1, 6, 1)
    scale = (precision**-0.5).expand(1, 1, 6, 1)

    def guide(batch, rollout):
        with model.recording_plate(batch):
            e = pyro.sample("embedding", model.embedding_prior())
            with model.trial_plate(batch):
                pyro.sample("latents", RolloutPath(loc, scale, model.path_prior(e, batch), rollout))

    expected = evidences(model, recs).sum()
    with torch.no_grad():
        exact, loose = (
            np.array([
                SequentialELBO().terms(model, lambda b, r=rollout: guide(b, r), batch).elbo.item() for _ in range(200)
            ])
            for rollout in (torch.ones(1, 1, 6, dtype=torch.bool), None)
        )  # fmt: skip
    assert abs(exact.mean() - expected) < SIGMAS * exact.std() / 200**0.5
    # Without roll-outs, factorised bins are a strict bound.
    assert loose.mean() + SIGMAS * loose.std() / 200**0.5 < expected
    assert exact.std() / 200**0.5 < 0.1 * abs(expected)


@pytest.mark.parametrize("counts", [False, True])
def test_parts_add_up_by_term_and_by_recording(counts):
    recs = recordings(counts=counts)
    family = pm.likelihoods.Poisson if counts else pm.likelihoods.Gaussian
    torch.manual_seed(0)
    model = pm.models.MetaSSM(recs, latent_dim=2, embedding_dim=2, likelihood=family)
    guide = pm.guides.DKF(model)
    for names in (("a", "b", "c"), ("c",), ("c", "b")):
        torch.manual_seed(0)
        terms = SequentialELBO().terms(model, guide, recs.batch(model.names, names=names))
        assert set(terms.kl) == {"embedding", "latents"}
        assert torch.equal(terms.elbo, terms.log_likelihood - sum(terms.kl.values()))
        assert terms.by_recording.shape == (len(names),) and not terms.by_recording.requires_grad
        torch.testing.assert_close(terms.by_recording.sum(), terms.elbo.detach())
        assert terms.embedding.shape == (len(names), 1, 2)
    # Each recording's part is the ELBO of that recording alone.
    guide = pm.guides.ExactSmoother(linear := linear_gaussian(recordings()))
    recs = recordings()
    together = SequentialELBO().terms(linear, guide, recs.batch(linear.names, dtype=DOUBLE))
    for r, name in enumerate(recs):
        alone = SequentialELBO().terms(linear, guide, recs.select([name]).batch(linear.names, dtype=DOUBLE))
        torch.testing.assert_close(together.by_recording[r], alone.elbo.detach(), rtol=1e-12, atol=0)


def test_what_was_not_observed_counts_nothing():
    """Any finite value there: the same terms and gradients, to the bit; and the gradients are finite."""
    recs = recordings(counts=True)
    assert any(np.isnan(r.observations).any() for r in recs.values())
    model = pm.models.MetaSSM(recs, latent_dim=2, embedding_dim=1, likelihood=pm.likelihoods.NegativeBinomial)
    guide = pm.guides.DKF(model)
    guide.read_in.start(recs)
    results = []
    for value in (0.0, 7.0, 1e5):
        torch.manual_seed(0)
        model.zero_grad(), guide.zero_grad()
        terms = SequentialELBO().terms(model, guide, garbage(recs.batch(model.names), value))
        terms.elbo.backward()
        parameters = [p for p in (*model.parameters(), *guide.parameters()) if p.grad is not None]
        results.append(
            [terms.elbo.detach(), terms.log_likelihood.detach(), *(p.grad.clone() for p in parameters)]
        )
        assert all(x.isfinite().all() for x in results[-1])
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


def test_loss_averages_particles_and_leaves_gradients():
    recs = recordings()
    model = linear_gaussian(recs)
    guide = dkf(model)
    batch = recs.batch(model.names, dtype=DOUBLE)
    torch.manual_seed(0)
    draws = [SequentialELBO().terms(model, guide, batch).elbo for _ in range(3)]
    expected = -torch.stack(draws).mean()
    expected.backward()
    gradients = [p.grad.clone() for p in guide.parameters()]
    guide.zero_grad()
    torch.manual_seed(0)
    assert np.isclose(SequentialELBO(num_particles=3).loss(model, guide, batch), expected.item(), rtol=1e-12)
    assert all(p.grad is None for p in guide.parameters())
    torch.manual_seed(0)
    value = SequentialELBO(num_particles=3).loss_and_grads(model, guide, batch)
    assert np.isclose(value, expected.item(), rtol=1e-12)
    for parameter, gradient in zip(guide.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_the_path_site_is_the_program_unrolled_over_time():
    """Model and guide with a site per bin, in Pyro's own Trace_ELBO terms: the same log densities."""
    recs = recordings(shapes={"a": (3, (4, 4))}, missing=False)
    model = linear_gaussian(recs)
    batch = recs.batch(model.names, dtype=DOUBLE)
    torch.manual_seed(0)
    trace = poutine.trace(model).get_trace(batch)
    z = trace.nodes["latents"]["value"]

    def unrolled():
        with pyro.plate("recording", 1, dim=-2):
            e = pyro.sample("embedding", model.embedding_prior())
            with pyro.plate("trial", 2, dim=-1):
                states = [pyro.sample("z0", model.initial_state(e))]
                for t in range(1, 4):
                    previous = states[-1].unsqueeze(-2)
                    step = model.transition(previous, model.adapt_dynamics(e))
                    step = dist.Normal(
                        step.base_dist.loc.squeeze(-2), step.base_dist.scale.squeeze(-2)
                    ).to_event(1)
                    states.append(pyro.sample(f"z{t}", step))
                for t in range(4):
                    mean = states[t] @ model.read_out.weight.mT + model.read_out.bias
                    y = dist.Normal(mean, model.observation.log_sd.exp()).to_event(1)
                    pyro.sample(f"y{t}", y, obs=batch.observations[:, :, t])

    values = {f"z{t}": z[..., t, :] for t in range(4)} | {"embedding": trace.nodes["embedding"]["value"]}
    other = poutine.trace(poutine.condition(unrolled, data=values)).get_trace()
    torch.testing.assert_close(trace.log_prob_sum(), other.log_prob_sum(), rtol=1e-12, atol=0)
    assert isinstance(trace.nodes["latents"]["fn"], MarkovPath)
    # One site a path: no site per bin.
    assert {n for n, s in trace.nodes.items() if s["type"] == "sample" and getattr(s["fn"], "event_shape", ())} == {
        "embedding", "latents", "observations",
    }  # fmt: skip
