"""A fit that stops: at numbers that are not finite, and to be taken up again from a checkpoint."""

import itertools

import numpy as np
import pytest
import torch
from fits import QUICK, assert_parameters, assert_same, parts, state
from problems import recordings

import pyro_metassm as pm
from pyro_metassm.recordings import Recording, Recordings
from pyro_metassm.training import Trainer


@pytest.fixture(scope="module")
def recs() -> Recordings:
    return recordings()


def test_a_non_finite_loss_names_recording_and_step(recs, monkeypatch):
    """One recording's observations become huge after three steps: the fit stops there with its last good state."""
    model, guide = parts(recs)
    batches, original = itertools.count(1), Trainer.batch

    def batch(self, *args, **kwargs):
        made = original(self, *args, **kwargs)
        if next(batches) > 4:  # one is of the check of the program
            made.observations[made.names.index("b")] = 3e38
        return made

    good = pm.fit(model, guide, recs, **(QUICK | {"num_steps": 40}))
    monkeypatch.setattr(Trainer, "batch", batch)
    with pytest.raises(
        pm.NonFiniteLossError, match=r"loss was not finite at step 4, recording\(s\) b;"
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


def test_numbers_that_are_fetched_later_tell_the_same(recs, tmp_path, monkeypatch):
    """As on a GPU: steps are looked at four at a time, and the last good state is the one looked at last."""
    model, guide = parts(recs)
    options = {"warm_start": False, "num_steps": 10, "progress": False}
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
    with pytest.raises(pm.NonFiniteLossError, match="at step 7") as caught:
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

    original = pm.training.SequentialELBO.terms
    monkeypatch.setattr(pm.training.SequentialELBO, "terms", elbo)
    with pytest.raises(pm.NonFiniteLossError, match="at step 1, recording") as caught:
        pm.fit(model, guide, recs, **QUICK)
    monkeypatch.undo()
    assert_parameters(caught.value.fit, started)


def test_the_last_good_state_is_the_one_before_the_step_that_spoiled_it(recs, monkeypatch):
    """A step that leaves a parameter not a number: the fit goes back to the parameters before that step."""
    model, guide = parts(recs)
    good = pm.fit(model, guide, recs, warm_start=False, num_steps=5, progress=False)
    states, original = [], torch.optim.Adam.step

    def step(self, *args, **kwargs):
        states.append([p.detach().clone() for group in self.param_groups for p in group["params"]])
        original(self, *args, **kwargs)
        if len(states) == 3:
            self.param_groups[-1]["params"][0].data.fill_(torch.nan)

    monkeypatch.setattr(torch.optim.Adam, "step", step)
    with pytest.raises(pm.NonFiniteLossError, match="at step 4") as caught:
        pm.fit(model, guide, recs, warm_start=False, num_steps=5, progress=False)
    fit = caught.value.fit
    kept = {p.data_ptr(): p for p in (*fit.model.parameters(), *fit.guide.parameters())}.values()
    assert (
        sum(any(torch.equal(p, s) for s in states[2] if s.shape == p.shape) for p in kept)
        == len(kept)
        == len(states[2])
    )
    assert np.array_equal(fit.history["elbo"], good.history["elbo"][:3])


def test_a_non_finite_gradient_stops_too(recs, monkeypatch):
    model, guide = parts(recs)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *args, **kwargs: torch.tensor(float("nan")))
    with pytest.raises(
        pm.NonFiniteLossError, match=r"gradient was not finite at step 1, recording\(s\) a, b, c"
    ):
        pm.fit(model, guide, recs, warm_start=False, num_steps=2, progress=False)


class Crash(Exception):
    pass


@pytest.mark.parametrize("crash_at", [5, 8])
def test_a_fit_is_resumed_where_it_stopped(recs, tmp_path, monkeypatch, crash_at):
    """A crash between two checkpoints; what is taken up ends in the same numbers to the bit."""
    model, guide = parts(recs)
    options = QUICK | {"num_steps": 11, "recordings_per_step": 2, "validation": recs, "validation_every": 2}
    expected = pm.fit(model, guide, recs, **options)
    original = Trainer.take_step

    def take_step(self, *args):
        if self.step == crash_at:
            raise Crash
        original(self, *args)

    monkeypatch.setattr(Trainer, "take_step", take_step)
    with pytest.raises(Crash):
        pm.fit(model, guide, recs, checkpoint=tmp_path, checkpoint_every=2, **options)
    taken = []

    def counted(self, *args):
        taken.append(self.step)
        original(self, *args)

    monkeypatch.setattr(Trainer, "take_step", counted)
    resumed = pm.fit(model, guide, recs, checkpoint=tmp_path, checkpoint_every=2, **options)
    assert taken == list(range(crash_at - crash_at % 2, 11))  # from the last checkpoint, not from the start
    assert_same(resumed, expected)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.safetensors"]
    # Once it has ended, it is read and not run again.
    taken.clear()
    assert_same(pm.fit(model, guide, recs, checkpoint=tmp_path, checkpoint_every=2, **options), expected)
    assert taken == []


def test_the_last_good_state_after_a_resume_is_the_checkpoint(recs, tmp_path, monkeypatch):
    """A first step that fails after a resume leaves the state that was saved, not the random one before it."""
    model, guide = parts(recs)
    options = {"warm_start": False, "num_steps": 6, "trials_per_step": 2, "progress": False}
    states, original = [], Trainer.take_step

    def take_step(self, *args):
        if self.step == 4:
            states.append({k: v.clone() for k, v in state(self.model, self.guide).items()})
            raise Crash
        original(self, *args)

    monkeypatch.setattr(Trainer, "take_step", take_step)
    with pytest.raises(Crash):
        pm.fit(model, guide, recs, checkpoint=tmp_path, checkpoint_every=4, **options)
    monkeypatch.setattr(Trainer, "take_step", original)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *args, **kwargs: torch.tensor(float("nan")))
    with pytest.raises(pm.NonFiniteLossError, match="at step 5") as caught:
        pm.fit(model, guide, recs, checkpoint=tmp_path, checkpoint_every=4, **options)
    fit = caught.value.fit
    assert len(fit.history["step"]) == 4
    assert [k for k, v in state(fit.model, fit.guide).items() if not torch.equal(v, states[0][k])] == []


def test_checkpoints_do_not_change_the_fit(recs, tmp_path):
    model, guide = parts(recs)
    plain = pm.fit(model, guide, recs, **QUICK)
    assert_same(
        pm.fit(model, guide, recs, checkpoint=tmp_path / "new" / "folder", checkpoint_every=1, **QUICK), plain
    )


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 1},
        {"num_steps": 7},
        {"trials_per_step": 1},
        {"learning_rate": 0.02},
        {"recordings_per_step": 1},
        {"clip_norm": 2.0},
        {"update_penalty": 0.0},
    ],
)
def test_another_specification_is_not_resumed(recs, tmp_path, other):
    model, guide = parts(recs)
    options = QUICK | {"warm_start": False, "checkpoint": tmp_path}
    pm.fit(model, guide, recs, **options)
    with pytest.raises(
        ValueError, match=f"another specification.*{next(iter(other))}.*choose another folder"
    ):
        pm.fit(model, guide, recs, **(options | other))


def test_another_model_or_other_data_are_not_resumed(recs, tmp_path):
    options = QUICK | {"warm_start": False, "checkpoint": tmp_path}
    pm.fit(*parts(recs), recs, **options)
    model = pm.models.MetaSSM(recs, latent_dim=2, embedding_dim=1, hidden_dim=9)
    with pytest.raises(ValueError, match="another specification"):
        pm.fit(model, pm.guides.DKF(model, hidden_dim=6), recs, **options)
    with pytest.raises(ValueError, match="another specification"):
        pm.fit(*parts(recs), recs.drop(["a"]), **options)
    values = recs["a"].observations.copy()
    values[np.isfinite(values)] += 1.0  # the same shapes, other data
    changed = Recordings(
        [Recording("a", values, bin_width=recs["a"].bin_width), *(recs[n] for n in recs.names[1:])]
    )
    with pytest.raises(ValueError, match=r"another specification \(it differs in recordings\.a"):
        pm.fit(*parts(recs), changed, **options)


def test_a_damaged_checkpoint_is_named(recs, tmp_path):
    (tmp_path / "checkpoint.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(ValueError, match="needed a safetensors file of a fit"):
        pm.fit(*parts(recs), recs, checkpoint=tmp_path, **QUICK)
