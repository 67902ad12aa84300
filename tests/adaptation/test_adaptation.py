"""Few-shot adaptation: what a fit knew is untouched, and what cannot be adapted is refused."""

import dataclasses

import numpy as np
import pytest
import torch
from adapted_fits import FIT, SMALL, check_finite, check_old, some
from fits import assert_same, parts, state
from problems import recordings

import pyro_metassm as pm
from pyro_metassm import adaptation, adapter
from pyro_metassm.elbo import SequentialELBO
from pyro_metassm.recordings import Recordings


@pytest.fixture(scope="module")
def adapted(fit) -> pm.Fit:
    return pm.adapt(fit, some(), **SMALL)


# ---- what the fit knew -----------------------------------------------------------------------------------


def test_everything_that_the_fit_knew_is_as_it_was(fit, adapted):
    check_old(fit, adapted)
    assert adapted.names == (*fit.names, "x", "y") and adapted.model.neurons.num_neurons == (3, 5, 1, 4, 2)
    check_finite(adapted)
    assert not adapted.model.training and not adapted.guide.training
    assert all(p.requires_grad for module in (adapted.model, adapted.guide) for p in module.parameters())


def test_the_fit_given_is_left_alone(fit):
    tensors = {key: value.clone() for key, value in state(fit.model, fit.guide).items()}
    flags = [p.requires_grad for module in (fit.model, fit.guide) for p in module.parameters()]
    history, attrs, statistics = fit.history.copy(deep=True), dict(fit.attrs), fit.statistics.clone()
    fit.model.train()
    torch.manual_seed(11)
    random = torch.get_rng_state()
    pm.adapt(fit, some(), train=adaptation.PARTS, **SMALL)
    assert torch.equal(torch.get_rng_state(), random)  # and the rest of what is global: see conftest.py
    assert fit.model.training and not fit.guide.training
    fit.model.eval()
    assert all(torch.equal(value, tensors[key]) for key, value in state(fit.model, fit.guide).items())
    assert flags == [p.requires_grad for module in (fit.model, fit.guide) for p in module.parameters()]
    assert fit.history.identical(history) and fit.attrs == attrs and torch.equal(fit.statistics, statistics)


def test_old_recordings_are_read_and_forecast_as_before_to_the_bit(old, fit, adapted):
    both = old.select(["c", "a"])
    for call in (
        lambda fit: pm.posterior(fit, both, num_samples=3, predictive=True, log_likelihood=True),
        lambda fit: pm.forecast(fit, both, context=2, horizon=3, num_samples=3),
    ):
        before, after = call(fit), call(adapted)
        assert before.children.keys() == after.children.keys()
        for name in ("posterior", "a", "c"):
            assert before[name].isomorphic(after[name])
            assert before[name].to_dataset().identical(after[name].to_dataset())
            for path in before[name].groups:
                if "sample_stats" not in path:
                    assert before[path].to_dataset().identical(after[path].to_dataset()), path


def test_new_recordings_can_be_read_and_forecast(adapted):
    new = some()
    tree = pm.posterior(adapted, new, num_samples=3)
    assert tree["posterior"]["recording"].values.tolist() == ["x", "y"]
    assert np.isfinite(
        pm.forecast(adapted, new, context=1, horizon=3, num_samples=3)["y/predictions/rates"]
    ).all()


# ---- the same again --------------------------------------------------------------------------------------


def test_a_seed_gives_the_same_adaptation(fit, adapted):
    torch.manual_seed(7)
    np.random.default_rng(3)
    assert_same(pm.adapt(fit, some(), **SMALL), adapted)
    other = pm.adapt(fit, some(), **SMALL, seed=1)
    assert not torch.equal(other.statistics, adapted.statistics) and other.seed == 1


def test_threads_do_not_matter(fit, adapted):
    assert_same(pm.adapt(fit, some(), **SMALL, num_threads=3), adapted)


def test_the_prior_is_of_the_recordings_that_the_fit_has_seen(old, monkeypatch):
    """In any order; rows of recordings that the model knows and that were not trained on say nothing."""
    fit = pm.fit(*parts(old.select(["c", "a", "b"])), old.select(["a", "b"]), **FIT)
    seen, search = {}, adaptation.few_shot.search

    def watched(*arguments, **options):
        seen.update(options)
        return search(*arguments, **options)

    monkeypatch.setattr(adaptation.few_shot, "search", watched)
    pm.adapt(fit, some(), **SMALL)
    rows = torch.cat([fit.model.read_out.weight, fit.model.read_out.bias.unsqueeze(-1)], -1)
    rows = torch.cat([rows[fit.model.neurons.slice(name)] for name in ("b", "a")]).detach()
    assert torch.equal(seen["embeddings"], fit.statistics[[1, 2], :1])  # of a and b
    covariance = rows[:, :2].mT @ rows[:, :2] / 8
    torch.testing.assert_close(seen["prior"].mean[2], rows[:, 2].mean())
    torch.testing.assert_close(seen["prior"].covariance[:2, :2], covariance, rtol=1e-2, atol=1e-2)


def test_an_adapted_fit_is_saved_and_loaded(adapted, tmp_path):
    adapted.save(tmp_path)
    again = pm.load(tmp_path)
    assert_same(again, adapted)
    assert again.names == adapted.names and again.attrs == adapted.attrs
    with pytest.raises(
        ValueError, match=r"needed recordings in the fit's bins of 0.02 s, got bins of 0.05 s"
    ):
        pm.adapt(again, coarse(), **SMALL)


def test_an_adapted_fit_can_be_adapted(fit, tmp_path):
    new = some()
    first = pm.adapt(fit, new.select(["y"]), **SMALL)
    second = pm.adapt(first, new.select(["x"]), **SMALL)
    check_old(first, second)
    assert second.names == (*fit.names, "y", "x")
    assert set(second.attrs["adaptation"]) == {"x", "y"} and set(first.attrs["adaptation"]) == {"y"}
    second.save(tmp_path)
    assert_same(pm.load(tmp_path), second)


# ---- parts -----------------------------------------------------------------------------------------------

READ_IN = {"guide.read_in.weight", "guide.read_in.bias"}
READ_OUT = {"model.read_out.weight", "model.read_out.bias", "model.observation.log_sd"}


@pytest.mark.parametrize(
    "train", ["read_in", ("read_out",), ("embedding",), ["read_in", "embedding"], adaptation.PARTS], ids=str
)
def test_svi_moves_the_parts_that_it_is_asked_to_move(fit, train):
    """Against no steps of it, which differ in nothing else."""
    start, end = (pm.adapt(fit, some(), train=train, **(SMALL | {"num_steps": n})) for n in (0, 3))
    before, after = state(start.model, start.guide), state(end.model, end.guide)
    moved = {key for key, value in after.items() if not torch.equal(value, before[key])}
    chosen = {train} if isinstance(train, str) else set(train)
    assert moved == (READ_IN if "read_in" in chosen else set()) | (
        READ_OUT if "read_out" in chosen else set()
    )
    check_old(fit, end)
    # The embedding is what the read-in makes of the data, or free.
    assert torch.equal(start.statistics[3:], end.statistics[3:]) == (chosen == {"read_out"})
    # No frame to find.
    assert set(end.attrs["adaptation"]) == (set() if chosen == {"embedding"} else {"x", "y"})
    assert (start.history.sizes["step"], end.history.sizes["step"]) == (0, 3)


@pytest.mark.parametrize(("counts", "of_read_in", "of_read_out"), [(False, 0.1, 1.0), (True, 1.0, 0.1)])
def test_what_a_start_has_found_moves_at_a_tenth_of_the_rate(counts, of_read_in, of_read_out):
    """A first step of Adam is the rate of its group, whatever the gradient: of read-ins found by the search, without a
    prior, and of read-outs found by a regression under the prior of most evidence."""
    old, new = recordings(counts=counts), some(counts=counts)
    known = pm.fit(*parts(old, pm.likelihoods.Poisson if counts else pm.likelihoods.Gaussian), old, **FIT)
    start, end = (pm.adapt(known, new, **(SMALL | {"num_steps": n})) for n in (0, 1))
    before, after = state(start.model, start.guide), state(end.model, end.guide)
    read_in, read_out = (
        float((after[key] - before[key]).abs().max())
        for key in ("guide.read_in.weight", "model.read_out.weight")
    )
    rate = float(end.history["learning_rate"][0])
    assert rate > 0
    assert (read_in, read_out) == pytest.approx((of_read_in * rate, of_read_out * rate), rel=0.01)


def test_a_free_embedding_without_effect_becomes_its_prior(old):
    """Where dynamics do not read it, its part of the ELBO is minus its divergence from Normal(0, 1)."""
    model = pm.models.SharedDynamics(old, latent_dim=2, embedding_dim=2, hidden_dim=4)
    fit = pm.fit(model, pm.guides.DKF(model, hidden_dim=4), old, **FIT)
    options = {"train": "embedding", "progress": False, "trials_per_step": 2}
    free = pm.adapt(fit, some(), num_steps=140, learning_rate=0.1, **options)
    expected = torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(2, 4)
    torch.testing.assert_close(free.statistics[3:], expected, atol=0.05, rtol=0)  # as far as Adam has come
    assert 0 <= float(free.history["kl_embedding"][-1]) < 4 * 0.05**2  # each term e^2 / 2 or (v - 1)^2 / 4
    assert (pm.adapt(fit, some(), num_steps=0, **options).statistics[3:] - expected).abs().max() > 0.5


def test_frozen_parts_do_not_change_the_gradients_of_the_others(fit):
    """What a step of SVI takes of the rest is as if all were trained."""
    new = some()
    start = pm.adapt(fit, new, **(SMALL | {"num_steps": 0}))
    batch = new.batch(start.names)
    gradients = []
    for frozen in (False, True):
        for module in (start.model, start.guide):
            for key, parameter in module.named_parameters():
                own = f"{'model' if module is start.model else 'guide'}.{key}" in READ_IN | READ_OUT
                parameter.requires_grad_(own or not frozen)
                parameter.grad = None
        torch.manual_seed(0)
        SequentialELBO().terms(start.model, start.guide, batch).elbo.backward()
        all_parameters = dict(start.model.named_parameters(prefix="model"))
        all_parameters |= dict(start.guide.named_parameters(prefix="guide"))
        gradients.append({key: all_parameters[key].grad for key in READ_IN | READ_OUT})
    for key, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], value, msg=key)


# ---- what is refused -------------------------------------------------------------------------------------


def test_what_cannot_be_adapted_is_refused(old, fit, adapted):
    new = some()

    def refused(words, *arguments, **options):
        with pytest.raises(ValueError, match=words):
            pm.adapt(*arguments, **(SMALL | options))

    refused("recording 'a': needed a recording that the fit does not know", fit, old)
    refused("recording 'y': needed a recording that the fit does not know", adapted, new.select(["y"]))
    refused(r"needed recordings in the fit's bins of 0.02 s, got bins of 0.05 s", fit, coarse())
    refused(
        "train: needed some of read_in, read_out, embedding, got", fit, new, train=("read_in", "dynamics")
    )
    refused("train: needed some of", fit, new, train=())
    refused("train: needed some of", fit, new, train="gain")
    refused("num_starts: needed an integer of at least 1, got 0", fit, new, num_starts=0)
    refused("search_steps: needed an integer of at least 0", fit, new, search_steps=-1)
    refused("num_steps: needed an integer of at least 0", fit, new, num_steps=2.5)
    refused("learning_rate: needed a positive number", fit, new, learning_rate=0.0)
    refused(r"new: needed pm.Recordings\(\[...\]\), got Recording", fit, new["x"])
    counts = recordings(counts=True)
    of_counts = pm.fit(*parts(counts, pm.likelihoods.Poisson), counts, **FIT)
    refused("recording 'x': needed counts", of_counts, new)


def coarse() -> Recordings:
    return Recordings([pm.Recording("z", np.ones((2, 5, 3)), bin_width=0.05)])


def test_models_and_guides_without_what_it_takes_are_refused(old):
    model = pm.models.SingleSession(old, latent_dim=2, embedding_dim=1, hidden_dim=4)
    fit = pm.fit(model, pm.guides.DKF(model, hidden_dim=4), old, **FIT)
    for train in ("embedding", "read_in"):
        with pytest.raises(ValueError, match=r"SingleSession: .* share no dynamics that it could adapt"):
            pm.adapt(fit, some(), train=train, **SMALL)
    exact = pm.models.LinearGaussian(old, latent_dim=2)
    exact = dataclasses.replace(fit, model=exact, guide=pm.guides.ExactSmoother(exact))
    with pytest.raises(
        ValueError, match=r"needed an AmortizedGuide .*, got ExactSmoother, which has no read-in"
    ):
        pm.adapt(exact, some(), **SMALL)


def test_a_loss_that_is_not_finite_stops_at_the_last_good_state(fit, monkeypatch):
    penalty = adapter.Adapter.penalty

    def broken(self, terms, batch):
        if self.step >= 2:
            terms.finite[1:] = False
            object.__setattr__(terms, "elbo", terms.elbo * torch.nan)
        return penalty(self, terms, batch)

    monkeypatch.setattr(adapter.Adapter, "penalty", broken)
    with pytest.raises(pm.NonFiniteLossError, match=r"step 3, recording\(s\) y \(trial") as caught:
        pm.adapt(fit, some(), **(SMALL | {"num_steps": 9}))
    check_old(fit, caught.value.fit)
    check_finite(caught.value.fit)
    assert caught.value.fit.names == (*fit.names, "x", "y") and caught.value.fit.history.sizes["step"] == 2
