"""Trials that the model draws: where they come from, and that only the guide learns from them."""

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from adapted_fits import FIT, SMALL, some
from fits import parts
from problems import recordings

import pyro_metassm as pm
from pyro_metassm import adapter, simulated_trials
from pyro_metassm.distributions import RolloutPath
from pyro_metassm.elbo import SequentialELBO


@pytest.fixture(scope="module")
def counts() -> pm.Fit:
    recs = recordings(counts=True)
    return pm.fit(*parts(recs, pm.likelihoods.Poisson), recs, **FIT)


def drawn_once(fit, recs, monkeypatch):
    """The batch, the terms of the ELBO, the paths behind simulated trials, and these."""
    batch, seen, draw = recs.batch(fit.names), [], simulated_trials.observations

    def watched(model, z, batch):
        seen.append(z)
        return draw(model, z, batch)

    monkeypatch.setattr(simulated_trials, "observations", watched)
    torch.manual_seed(1)
    terms = SequentialELBO().terms(fit.model, fit.guide, batch)
    return batch, terms, simulated_trials.like(batch, fit.model, terms), seen[0]


def test_paths_are_the_models_or_those_found_and_observations_are_theirs(counts, monkeypatch):
    rng = np.random.default_rng(0)
    y = rng.poisson(1.0, (2000, 3, 3)).astype(float)
    y[:, 1, 2] = np.nan
    recs = pm.Recordings([pm.Recording("a", y, bin_width=0.02)])
    batch, terms, simulated, z = drawn_once(counts, recs, monkeypatch)
    found = (z == terms.values["latents"]).all(-1).all(-1)[0]
    number = int((~found).sum())
    assert abs(number - 1000) < 5 * 500**0.5
    # Those of the model: the first state is its Normal, the noise of a step is its own.
    drawn, noise = z[0][~found], counts.model.process_noise()
    with torch.no_grad():
        step = counts.model.adapt_dynamics(terms.embedding)(drawn[None, :, :-1].flatten(1, 2))
    shock = (drawn[:, 1:].flatten(0, 1) - step.flatten(0, -2)) / noise
    first = (drawn[:, 0] - counts.model.initial.loc) / counts.model.initial.scale
    for standard in (shock.detach(), first.detach()):
        assert standard.shape[0] >= number and standard.dim() == 2
        assert (standard.mean(0).abs() < 5 / len(standard) ** 0.5).all()
        assert ((standard.square().mean(0) - 1).abs() < 5 * (2 / len(standard)) ** 0.5).all()
    # Observations are counts of their rates where something was seen, and nothing elsewhere.
    rate = counts.model.likelihood(
        counts.model.read_out(z, batch.recording, batch.width), batch.recording
    ).mean.detach()
    residual = (simulated.observations - rate).where(batch.mask, 0.0)
    rates = rate.where(batch.mask, 0.0)
    assert (residual.sum((1, 2)).abs() < 5 * rates.sum((1, 2)).sqrt()).all()
    assert not simulated.observations[~batch.mask].any()
    assert torch.equal(simulated.mask, batch.mask)
    # The guide is told the embedding that they were drawn at.
    given = counts.guide.embedding_posterior(simulated.embedding_statistics)
    torch.testing.assert_close(given.mean, terms.embedding)
    assert float(given.base_dist.scale.max()) < 2e-3


def test_paths_that_run_away_are_kept_within_bounds(counts, monkeypatch):
    recs = some(counts=True)
    batch = pm.Recordings([recs["x"]._replace(name="a")]).batch(["a"])
    for value in (float("nan"), float("inf"), 1e9):
        path = dist.Normal(torch.zeros(1, *batch.time_mask.shape[1:], 2), 1.0)
        path.sample = lambda shape, value=value: torch.full((1, *batch.time_mask.shape[1:], 2), value)
        monkeypatch.setattr(counts.model, "path_prior", lambda e, batch, path=path: path)
        z = simulated_trials.paths(counts.model, torch.zeros(1, 1, 1), batch)
        assert z.isfinite().all() and z.abs().max() <= simulated_trials.BOUND


def test_the_guide_alone_gets_a_gradient(counts, monkeypatch):
    names = ["a", "b"]
    batch = recordings(counts=True).select(names).batch(counts.names)
    model, guide, elbo = (
        counts.model.requires_grad_(True),
        counts.guide.requires_grad_(True),
        SequentialELBO(),
    )
    model.zero_grad(), guide.zero_grad(), torch.manual_seed(2)
    simulated_trials.guide_elbo(elbo, model, guide, batch).backward()
    found = {key: p.grad for key, p in guide.named_parameters()}
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    guide.zero_grad(), torch.manual_seed(2)
    elbo.terms(model, guide, batch).elbo.backward()
    for key, p in guide.named_parameters():
        if p.grad is None:
            assert found[key] is None or not found[key].any(), key
        else:
            torch.testing.assert_close(found[key], p.grad)
    assert any(g is not None and g.any() for g in found.values())
    monkeypatch.setattr(elbo, "terms", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        simulated_trials.guide_elbo(elbo, model, guide, batch)
    assert all(p.requires_grad for p in model.parameters())
    model.zero_grad(), guide.zero_grad()
    model.requires_grad_(False), guide.requires_grad_(False)


def test_read_ins_learn_from_them_and_read_outs_do_not(counts, monkeypatch):
    """One step of Adam, whose first is the gradient's sign: the weight of simulated trials moves read-ins alone."""

    def adapted(weight, num_steps=1):
        monkeypatch.setattr(adapter, "SIMULATED", weight)
        return pm.adapt(counts, some(counts=True), **(SMALL | {"num_steps": num_steps}))

    start, without, more = adapted(0.0, 0), adapted(0.0), adapted(100.0)
    old = counts.model.neurons.total
    for table in (lambda f: f.model.read_out.weight, lambda f: f.model.read_out.bias):
        assert not torch.equal(table(start)[old:], table(without)[old:])
        torch.testing.assert_close(table(without), table(more), rtol=1e-3, atol=1e-5)
    read_ins = [f.guide.read_in.weight[old:] for f in (start, without, more)]
    assert ((read_ins[1] - read_ins[0]).sign() != (read_ins[2] - read_ins[0]).sign()).any()


@pytest.mark.parametrize(
    ("family", "train", "number"),
    [
        (pm.likelihoods.Poisson, ("read_in", "read_out"), 3),
        (pm.likelihoods.Poisson, "read_out", 0),
        (pm.likelihoods.Gaussian, ("read_in", "read_out"), 0),
    ],
)
def test_when_there_are_any(family, train, number, monkeypatch):
    of_counts = family is pm.likelihoods.Poisson
    recs = recordings(counts=of_counts)
    fit = pm.fit(*parts(recs, family), recs, **FIT)
    seen, like = [], simulated_trials.like

    def watched(*arguments):
        seen.append(1)
        return like(*arguments)

    monkeypatch.setattr(simulated_trials, "like", watched)
    pm.adapt(fit, some(counts=of_counts), train=train, **SMALL)
    assert len(seen) == number


def test_neurons_are_hidden_from_the_guide_and_nothing_is_rolled_out(monkeypatch):
    """As its ``neuron_dropout`` says, while it is adapted; the dynamics, which roll-outs teach, are given."""
    recs = recordings(counts=True)
    model, _ = parts(recs, pm.likelihoods.Poisson)
    guide = pm.guides.DKF(model, hidden_dim=6, neuron_dropout=0.9, rollout_probability=0.9)
    fit = pm.fit(model, guide, recs, **FIT)
    new, shares, paths = some(counts=True), [], []
    shared, path = pm.guides.DKF.common_space, pm.guides.DKF.latents_posterior

    def seen(self, batch):
        shares.append((self.training, int(batch.mask.sum())))
        return shared(self, batch)

    def posterior(self, *arguments):
        paths.append(path(self, *arguments))
        return paths[-1]

    monkeypatch.setattr(pm.guides.DKF, "common_space", seen)
    monkeypatch.setattr(pm.guides.DKF, "latents_posterior", posterior)
    adapted = pm.adapt(fit, new, trials_per_step=None, **SMALL)
    every = sum(int(r.mask.sum()) for r in new.values())
    assert all(number < every for training, number in shares if training)
    assert (
        sum(training for training, _ in shares) == 2 * SMALL["num_steps"]
    )  # trials seen, and simulated ones
    assert max(number for training, number in shares if not training) == every
    assert paths and all(isinstance(q, RolloutPath) and q.rollout is None for q in paths)
    assert not adapted.guide.training and not adapted.model.training


def test_read_outs_are_regressed_anew_half_way_and_learn_slowly(counts, monkeypatch):
    """They are then modes under the prior of most evidence given paths of the guide as it is by then."""
    seen, models, tune = [], [], adapter.with_own_tuning

    def watched(prior, model, z, batch):
        new = tune(prior, model, z, batch)
        models.append(model)
        seen.append((new, z, batch, [p.detach().clone() for p in model.read_out.parameters()]))
        return new

    monkeypatch.setattr(adapter, "with_own_tuning", watched)
    rates, slow = [], adapter.Adapter.rates

    def of(self):
        found = slow(self)
        rates.append([found.get(id(p)) for p in self.model.read_out.parameters()])
        return found

    monkeypatch.setattr(adapter.Adapter, "rates", of)
    new = some(counts=True)
    pm.adapt(counts, new, **(SMALL | {"num_steps": 8}))
    assert rates == [[adapter.SLOW] * 2]
    ((prior, z, batch, (weight, bias)),) = seen
    assert batch.mask.sum() == sum(int(r.mask.sum()) for r in new.values())
    # The slope of the log posterior of every neuron's read-out, written out for counts of rates with a ceiling,
    # `e^c sigmoid(x - c)`, vanishes there.
    first, ceiling_of = 0, models[0].likelihood(batch.observations, batch.recording).log_ceiling
    for r, name in enumerate(batch.names):
        number, precision = batch.num_neurons[r], torch.linalg.inv(prior.own[name].double())
        for n in range(number):
            c, d = weight[first + n].double(), bias[first + n].double()
            at = batch.mask[r, ..., n]
            x = torch.cat([z[r][at], torch.ones_like(z[r][at][:, :1])], -1).double()
            row = torch.cat([c, d[None]])
            ceiling = ceiling_of[r, 0, 0, n].double()
            rate = ceiling.exp() * (x @ row - ceiling).sigmoid()
            error = batch.observations[r, ..., n][at] - rate
            data = x.mT @ (error * (ceiling - x @ row).sigmoid())
            pull = precision @ (row - prior.mean.double())
            assert (data - pull).abs().max() < 0.05 * (1 + pull.abs().max()), (name, n)
        first += number
    seen.clear()
    pm.adapt(counts, new, train="read_in", **(SMALL | {"num_steps": 8}))
    assert not seen


def test_the_usual_course_is_that_of_the_data(counts, fit, monkeypatch):
    """Fifty steps of real numbers and of counts after ``smooth_counts``; other counts have farther to go."""
    for family, new, expected in ((fit, some(), (50, 3e-3)), (counts, some(counts=True), (500, 2e-2))):
        asked, init = [], adapter.Trainer.__init__

        def watched(self, model, guide, recs, options, *rest, asked=asked, init=init):
            asked.append((options.num_steps, options.learning_rate))
            init(self, model, guide, recs, options, *rest)
            self.step = options.num_steps  # enough is known

        with monkeypatch.context() as patch:
            patch.setattr(adapter.Trainer, "__init__", watched)
            pm.adapt(family, new, num_starts=5, search_steps=4, progress=False)
            pm.adapt(
                family, new, num_starts=5, search_steps=4, progress=False, num_steps=7, learning_rate=0.1
            )
        assert asked == [expected, (7, 0.1)]
