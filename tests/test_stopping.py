"""Numbers that are not finite: single steps are skipped, several in a row end a fit at its last good state."""

import itertools
import warnings

import numpy as np
import pytest
import torch
from fits import QUICK, assert_parameters, assert_same, parts, state
from problems import recordings

import pyro_metassm as pm
from pyro_metassm.trainer import Trainer
from pyro_metassm.warm_start import DynamicsFirst


def spoiled(monkeypatch, bad, recording="b", trial=1, value=3e38) -> None:
    """Make the observations of a trial of a recording huge in these steps."""
    original = Trainer.batch

    def batch(self, *args, **kwargs):
        made = original(self, *args, **kwargs)
        if self.step + 1 in bad and recording in kwargs.get("names", ()):
            made.observations[made.names.index(recording), kwargs["trials"][recording] == np.array(trial)] = (
                value
            )
        return made

    monkeypatch.setattr(Trainer, "batch", batch)


@pytest.mark.parametrize("settle_every", [1, 4])
def test_a_bad_step_is_skipped_and_told(recs, monkeypatch, settle_every):
    """Nothing moves in it, Adam's moments neither; the fit goes on, and says which step, recording and trial it was."""
    model, guide = parts(recs)
    options = {"warm_start": False, "num_steps": 8, "trials_per_step": 2, "progress": False}
    good = pm.fit(model, guide, recs, **options)
    spoiled(monkeypatch, {4, 6})
    # Looked at later, the data are good again here, and nothing tells the trials apart: they share an embedding.
    trials = {4: [1], 6: [1] if settle_every == 1 else [0, 1]}
    states, original, init = [], Trainer.take_step, Trainer.__init__

    def take_step(self):
        adam = self.optimizer.state_dict()["state"]
        moments = [v.clone() for s in adam.values() for v in s.values()]
        states.append([p.detach().clone() for p in self.parameters] + moments)
        original(self)

    def later(self, *args):
        init(self, *args)
        self.settle_every = settle_every

    monkeypatch.setattr(Trainer, "take_step", take_step)
    monkeypatch.setattr(Trainer, "__init__", later)
    with pytest.warns(UserWarning, match=r"2 of 8 steps skipped.* step 4, recording\(s\) b \(trial 1\)"):
        fit = pm.fit(model, guide, recs, **options)
    assert [all(map(torch.equal, a, b)) for a, b in itertools.pairwise(states) if len(a) == len(b)] == [
        step in (4, 6) for step in range(2, 8)
    ]
    assert fit.attrs["skipped"] == [
        {"step": step, "what": "loss", "trials": {"b": trials[step]}} for step in (4, 6)
    ]
    assert fit.history.attrs["num_skipped"] == 2 and good.history.attrs["num_skipped"] == 0
    assert np.flatnonzero(np.isnan(fit.history["elbo"])).tolist() == [3, 5]
    assert np.array_equal(fit.history["elbo"][:3], good.history["elbo"][:3])
    assert np.array_equal(fit.history["learning_rate"], good.history["learning_rate"])  # the schedule goes on
    assert all(v.isfinite().all() for v in state(fit.model, fit.guide).values())


def test_five_bad_steps_in_a_row_end_the_fit(recs, monkeypatch):
    """One recording's observations become huge after three steps: the fit ends with its last good state."""
    model, guide = parts(recs)
    good = pm.fit(model, guide, recs, **(QUICK | {"num_steps": 40}))
    spoiled(monkeypatch, range(4, 100))
    with pytest.raises(
        pm.NonFiniteLossError,
        match=r"loss was not finite at step 4, recording\(s\) b \(trial 1\), nor at the 4",
    ) as caught:
        pm.fit(model, guide, recs, **(QUICK | {"num_steps": 40}))
    monkeypatch.undo()
    fit = caught.value.fit
    assert isinstance(fit, pm.Fit) and len(fit.history["step"]) == 3
    assert np.array_equal(fit.history["elbo"], good.history["elbo"][:3])
    assert all(v.isfinite().all() for v in state(fit.model, fit.guide).values())
    tree = pm.posterior(fit, recs, num_samples=2)
    assert np.isfinite(tree["a/posterior"]["rates"].values[..., 0, :3, :]).all()
    assert isinstance(caught.value, RuntimeError)


def test_four_bad_steps_in_a_row_do_not(recs, monkeypatch):
    model, guide = parts(recs)
    spoiled(monkeypatch, {2, 3, 4, 5, 7, 8, 9, 10})
    with pytest.warns(UserWarning, match="8 of 12 steps skipped"):
        pm.fit(model, guide, recs, warm_start=False, num_steps=12, trials_per_step=2, progress=False)


@pytest.mark.parametrize("rate", [1e2, 1e6, 1e30])
@pytest.mark.parametrize("family", [pm.likelihoods.Gaussian, pm.likelihoods.Poisson])
def test_learning_rates_far_too_high_end_in_a_fit_or_an_error_with_one(family, rate):
    counts = recordings(counts=True)
    model, guide = parts(counts, family)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r"fit: \d+ of 30 steps skipped")
            fit = pm.fit(model, guide, counts, **(QUICK | {"num_steps": 30, "learning_rate": rate}))
    except pm.NonFiniteLossError as error:
        assert "try a smaller learning_rate" in str(error)
        fit = error.fit
    assert all(v.isfinite().all() for v in state(fit.model, fit.guide).values())


def test_numbers_that_are_fetched_later_tell_the_same(recs, tmp_path, monkeypatch):
    """As on a GPU: steps are looked at four at a time, and the last good state is the one looked at last."""
    model, guide = parts(recs)
    options = {"warm_start": False, "num_steps": 16, "progress": False}
    expected = pm.fit(model, guide, recs, **options)
    original, states, steps, adam = Trainer.__init__, [], itertools.count(1), torch.optim.Adam.step

    def later(self, *args):
        original(self, *args)
        self.settle_every = 4

    def step(self, *args, **kwargs):
        states.append([p.detach().clone() for group in self.param_groups for p in group["params"]])
        adam(self, *args, **kwargs)
        if next(steps) == 6:
            self.param_groups[-1]["params"][0].data.fill_(torch.nan)

    monkeypatch.setattr(Trainer, "__init__", later)
    assert_same(pm.fit(model, guide, recs, **options), expected)
    assert_same(pm.fit(model, guide, recs, checkpoint=tmp_path, checkpoint_every=3, **options), expected)
    monkeypatch.setattr(torch.optim.Adam, "step", step)
    # Steps 7 to 12 have been looked at when five in a row are seen.
    with pytest.raises(pm.NonFiniteLossError, match=r"at step 7, .* nor at the 5 steps after it") as caught:
        pm.fit(model, guide, recs, **options)
    fit = caught.value.fit
    assert np.array_equal(fit.history["elbo"], expected.history["elbo"][:6])
    kept = {p.data_ptr(): p for p in (*fit.model.parameters(), *fit.guide.parameters())}.values()
    assert all(any(torch.equal(p, s) for s in states[3] if s.shape == p.shape) for p in kept)


def test_the_last_good_state_after_a_warm_start_is_the_started_one(recs, monkeypatch):
    """A first step that fails leaves what the start has learned, not the random state before it."""
    model, guide = parts(recs)
    started = pm.fit(model, guide, recs, **(QUICK | {"num_steps": 0}))

    def elbo(self, *args, **kwargs):
        terms = original(self, *args, **kwargs)
        return type(terms)(terms.elbo * torch.nan, *list(vars(terms).values())[1:])

    original = pm.trainer.SequentialELBO.terms
    monkeypatch.setattr(pm.trainer.SequentialELBO, "terms", elbo)
    with pytest.raises(pm.NonFiniteLossError, match="at step 1, recording") as caught:
        pm.fit(model, guide, recs, **QUICK)
    monkeypatch.undo()
    assert_parameters(caught.value.fit, started)


@pytest.mark.parametrize("num_steps", [5, 12])
def test_the_last_good_state_is_the_one_before_the_step_that_spoiled_it(recs, monkeypatch, num_steps):
    """A step that leaves a parameter not a number: the fit goes back to before it, whether it gives up or has ended."""
    model, guide = parts(recs)
    options = {"warm_start": False, "num_steps": num_steps, "progress": False}
    good = pm.fit(model, guide, recs, **options)
    states, original = [], torch.optim.Adam.step

    def step(self, *args, **kwargs):
        states.append([p.detach().clone() for group in self.param_groups for p in group["params"]])
        original(self, *args, **kwargs)
        if len(states) == 3:
            self.param_groups[-1]["params"][0].data.fill_(torch.nan)

    monkeypatch.setattr(torch.optim.Adam, "step", step)
    if num_steps == 5:
        with pytest.warns(UserWarning, match="2 of 5 steps skipped"):
            fit = pm.fit(model, guide, recs, **options)
    else:
        with pytest.raises(pm.NonFiniteLossError, match="at step 4") as caught:
            pm.fit(model, guide, recs, **options)
        fit = caught.value.fit
    kept = {p.data_ptr(): p for p in (*fit.model.parameters(), *fit.guide.parameters())}.values()
    assert (
        sum(any(torch.equal(p, s) for s in states[2] if s.shape == p.shape) for p in kept)
        == len(kept)
        == len(states[2])
    )
    assert np.array_equal(fit.history["elbo"][:3], good.history["elbo"][:3])
    assert np.isnan(fit.history["elbo"][3:]).all()


def test_a_non_finite_gradient_is_one_too(recs, monkeypatch):
    """Which recording it comes from the loss does not tell: all of the step's are named."""
    model, guide = parts(recs)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *args, **kwargs: torch.tensor(float("nan")))
    with pytest.raises(
        pm.NonFiniteLossError,
        match=r"gradient was not finite at step 1, recording\(s\) a \(trial 0, 1, 2\), b",
    ) as caught:
        pm.fit(model, guide, recs, warm_start=False, num_steps=6, progress=False)
    assert caught.value.fit.history.sizes["step"] == 0


def test_a_non_finite_gradient_is_traced_to_its_trial(recs, monkeypatch):
    """A root at zero: its value is finite, its slope is not. It stands in one trial's likelihood."""
    model, guide = parts(recs)
    original = type(model).likelihood

    class Root(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return torch.where(gradient == 0, 0.0, torch.inf)

    def likelihood(self, predictor, recording):
        batch = likelihood.batch
        if "b" in batch.names and likelihood.step == 4:
            row = batch.names.index("b")
            spoil = torch.zeros_like(predictor, dtype=torch.bool)
            spoil[row, [k for k, own in enumerate(likelihood.trials["b"]) if own == 1]] = True
            predictor = torch.where(spoil, Root.apply(predictor), predictor)
        return original(self, predictor, recording)

    made = Trainer.batch

    def batch(self, *args, **kwargs):
        likelihood.batch, likelihood.step = made(self, *args, **kwargs), self.step + 1
        likelihood.trials = kwargs.get("trials")
        return likelihood.batch

    monkeypatch.setattr(type(model), "likelihood", likelihood)
    monkeypatch.setattr(Trainer, "batch", batch)
    with pytest.warns(
        UserWarning, match=r"1 of 6 .* gradient was not finite at step 4, recording\(s\) b \(trial 1\);"
    ):
        fit = pm.fit(model, guide, recs, **(QUICK | {"warm_start": False}))
    assert fit.attrs["skipped"] == [{"step": 4, "what": "gradient", "trials": {"b": [1]}}]


def test_bad_steps_of_the_start_are_skipped(recs, monkeypatch):
    """Roll-outs that are not finite, each of them or one, leave finite parameters to begin with."""
    for bad in (range(100), {3}):
        model, guide = parts(recs)
        calls, original = itertools.count(1), DynamicsFirst.loss

        def loss(self, *args, calls=calls, original=original, bad=bad):
            return original(self, *args) * (torch.nan if next(calls) in bad else 1.0)

        monkeypatch.setattr(DynamicsFirst, "loss", loss)
        fit = pm.fit(model, guide, recs, **(QUICK | {"warm_start_steps": 6}))
        assert np.isfinite(fit.history["elbo"]).all()
        monkeypatch.undo()
