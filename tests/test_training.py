"""pm.fit: reproducible, without side effects, resumable, and clear about what went wrong."""

import copy

import numpy as np
import pyro
import pytest
import torch
from fits import QUICK, assert_same, parts, state
from problems import recordings

import pyro_metassm as pm
from pyro_metassm.recordings import Recording, Recordings
from pyro_metassm.trainer import Options, Trainer

# ---- determinism, side effects ----------------------------------------------------------------------------------


@pytest.mark.parametrize("warm_start", [True, False])
@pytest.mark.parametrize("family", [pm.likelihoods.Gaussian, pm.likelihoods.Poisson])
def test_a_seed_gives_the_same_fit(warm_start, family):
    recs = recordings(counts=family is pm.likelihoods.Poisson)
    model, guide = parts(recs, family)
    options = QUICK | {"recordings_per_step": 2, "warm_start": warm_start}
    torch.manual_seed(1)
    first = pm.fit(model, guide, recs, seed=3, **options)
    torch.manual_seed(2)  # the state around it does not matter
    np.random.default_rng(5).random(3)
    second = pm.fit(model, guide, recs, seed=3, **options)
    assert_same(first, second)
    third = pm.fit(model, guide, recs, seed=4, **options)
    assert not np.array_equal(first.history["elbo"], third.history["elbo"])
    assert (first.seed, third.seed) == (3, 4)


def test_a_fit_leaves_everything_as_it_was(recs):
    model, guide = parts(recs)
    before = copy.deepcopy(state(model, guide))
    modes = [m.training for m in (*model.modules(), *guide.modules())]
    values = {name: r.values.copy() for name, r in recs.items()}
    torch.manual_seed(11)
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()
    threads, dtype, settings = torch.get_num_threads(), torch.get_default_dtype(), dict(pyro.settings.get())
    fit = pm.fit(model, guide, recs, validation=recs, validation_every=2, num_threads=2, **QUICK)
    assert all(torch.equal(v, before[k]) for k, v in state(model, guide).items())
    assert [m.training for m in (*model.modules(), *guide.modules())] == modes
    assert all(p.grad is None for p in (*model.parameters(), *guide.parameters()))
    assert all(np.array_equal(recs[name].values, v) for name, v in values.items())
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), numpy_state, strict=True))
    assert (torch.get_num_threads(), torch.get_default_dtype()) == (threads, dtype)
    assert dict(pyro.settings.get()) == settings and len(pyro.get_param_store()) == 0
    # The result is of copies that belong together.
    assert fit.model is not model and fit.guide.model is fit.model and guide.model is model
    shared = {p.data_ptr() for p in (*model.parameters(), *guide.parameters())}
    assert shared.isdisjoint(p.data_ptr() for p in (*fit.model.parameters(), *fit.guide.parameters()))
    assert not fit.model.training and not fit.guide.training


def test_a_fit_that_fails_leaves_everything_as_it_was(recs, monkeypatch):
    model, guide = parts(recs)
    torch.manual_seed(11)
    rng, threads = torch.get_rng_state(), torch.get_num_threads()

    def fails(self, *args):
        torch.rand(3)
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "take_step", fails)
    with pytest.raises(KeyboardInterrupt):
        pm.fit(model, guide, recs, num_threads=2, **QUICK)
    assert torch.equal(torch.get_rng_state(), rng) and torch.get_num_threads() == threads
    assert not pyro.settings.get("module_local_params")


# ---- what is learned, and its history ---------------------------------------------------------------------------


def test_history_tells_of_every_step(recs):
    model, guide = parts(recs)
    fit = pm.fit(model, guide, recs, validation=recs, validation_every=4, **(QUICK | {"num_steps": 10}))
    history = fit.history
    expected = {
        "elbo",
        "log_likelihood",
        "kl_latents",
        "kl_embedding",
        "gradient_norm",
        "seconds",
        "learning_rate",
    }
    assert set(history) == expected | {"validation_elbo"}
    assert all(history[name].dims == ("step",) for name in history)
    assert history["step"].values.tolist() == list(range(1, 11))
    assert all(np.isfinite(history[name]).all() and history[name].dtype == np.float64 for name in expected)
    parts_sum = history["log_likelihood"] - history["kl_latents"] - history["kl_embedding"]
    np.testing.assert_allclose(history["elbo"], parts_sum, rtol=1e-5)
    assert (history["seconds"] > 0).all() and (history["gradient_norm"] > 0).all()
    # Validation where it was asked for, and at the end.
    assert np.flatnonzero(np.isfinite(history["validation_elbo"])).tolist() == [3, 7, 9]
    # One cycle: up to the peak, down to nearly nothing.
    rate = history["learning_rate"].values
    assert rate.max() <= 1e-2 and rate.argmax() < 3 and rate[-1] < 0.05 * rate.max()
    assert not [name for name in pm.fit(model, guide, recs, **QUICK).history if "validation" in name]
    assert (
        history.attrs["svi_seconds"] >= history["seconds"].sum() * 0.999
        and history.attrs["warm_start_seconds"] > 0
    )


def test_validation_does_not_touch_the_training(recs):
    model, guide = parts(recs)
    without = pm.fit(model, guide, recs, **QUICK)
    with_it = pm.fit(model, guide, recs, validation=recordings(seed=9), validation_every=1, **QUICK)
    assert all(
        torch.equal(v, state(without.model, without.guide)[k])
        for k, v in state(with_it.model, with_it.guide).items()
    )
    assert np.array_equal(without.history["elbo"], with_it.history["elbo"])


def test_zero_steps_is_the_start(recs):
    model, guide = parts(recs)
    cold = pm.fit(model, guide, recs, **(QUICK | {"num_steps": 0, "warm_start": False}))
    before = state(model, guide)
    changed = {k for k, v in state(cold.model, cold.guide).items() if not torch.equal(v, before[k])}
    assert changed <= {f"guide.read_in.{k}" for k in ("center", "scale", "counts", "started")}
    assert cold.history.sizes.get("step", 0) == 0
    warm = pm.fit(model, guide, recs, **(QUICK | {"num_steps": 0}))
    assert not torch.equal(warm.guide.read_in.weight, guide.read_in.weight)


def test_training_improves_the_elbo():
    recs = pm.simulate.limit_cycles([-3.0, 3.0], num_trials=8, num_steps=30, num_neurons=(6, 9))
    model, guide = parts(recs)
    for warm_start in (True, False):
        options = {"num_steps": 60, "warm_start_steps": 40, "warm_start": warm_start, "progress": False}
        elbo = pm.fit(model, guide, recs, **options).history["elbo"].values
        assert elbo[-10:].mean() > elbo[:10].mean() + 5 * (elbo[-10:].std() + elbo[:10].std()) / 10**0.5


def test_recordings_without_a_part_in_the_training_are_left_as_they_were(recs):
    model, guide = parts(recs)
    fit = pm.fit(model, guide, recs.select(["b"]), **QUICK)
    assert fit.names == ("a", "b", "c")
    assert fit.statistics[[0, 2]].isnan().all() and fit.statistics[1].isfinite().all()  # embeddings not known
    for name in ("a", "c"):
        rows = model.neurons.slice(name)
        assert torch.equal(fit.model.read_out.weight[rows], model.read_out.weight[rows])


@pytest.mark.parametrize("size", [1, 3, 99])
def test_statistics_in_chunks_are_those_of_all_trials(size, monkeypatch):
    """Means over the trials that have data for the guide, however many are worked on at a time."""
    held_out, y = [0], np.random.default_rng(0).normal(size=(4, 6, 2))
    y[2, :, 1] = np.nan  # a trial of which the guide sees nothing
    recs = Recordings([Recording("a", y, bin_width=0.02, held_out_neurons=held_out), recordings()["b"]])
    model, guide = parts(recs)
    guide.read_in.start(recs)
    batch = recs.batch(model.names)
    _, frame, share = guide.common_space(batch)
    assert (share > 0).any(-2).sum() == 3 + 2
    with torch.no_grad():
        expected = guide.embedding_statistics(frame, share, batch)

    def chunks(recs, name, *_):
        rows = list(range(recs[name].num_trials))
        return [rows[first : first + size] for first in range(0, len(rows), size)]

    monkeypatch.setattr(pm.result, "trial_chunks", chunks)
    torch.testing.assert_close(pm.result.embedding_statistics(model, guide, recs), expected)


def test_float64_models_are_trained_in_float64(recs):
    model, guide = parts(recs)
    fit = pm.fit(model.double(), guide.double(), recs, **QUICK)
    assert fit.dtype == torch.float64 and fit.model.read_out.weight.dtype == torch.float64


# ---- arguments --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bad",
    [
        {"num_steps": -1},
        {"num_steps": 2.5},
        {"warm_start_steps": -1},
        {"learning_rate": 0.0},
        {"learning_rate": -1e-3},
        {"learning_rate": float("inf")},
        {"learning_rate": float("nan")},
        {"trials_per_step": 0},
        {"recordings_per_step": 0},
        {"clip_norm": 0.0},
        {"clip_norm": -1.0},
        {"update_penalty": -1.0},
        {"kl_warmup_steps": -1},
        {"kl_warmup_steps": 2.5},
        {"kl_warmup_steps": 7},
        {"validation_every": 0, "validation": True},
        {"checkpoint_every": 0, "checkpoint": True},
    ],
    ids=str,
)
def test_arguments_out_of_range(recs, tmp_path, bad):
    given = {"validation": recs, "checkpoint": tmp_path}
    bad = {k: given[k] if v is True else v for k, v in bad.items()}
    with pytest.raises(ValueError, match=next(iter(bad))):
        pm.fit(*parts(recs), recs, **(QUICK | bad))


def test_an_unknown_recording_is_pointed_to_adapt(recs):
    model, guide = parts(recs.drop(["b"]))
    with pytest.raises(ValueError, match=r"recording 'b'.*make the model with it"):
        pm.fit(model, guide, recs, **QUICK)
    fit = pm.fit(model, guide, recs.drop(["b"]), **QUICK)
    # After the guide has been started, too.
    with pytest.raises(ValueError, match=r"recording 'b'.*make the model with it"):
        pm.fit(fit.model, fit.guide, recs, **QUICK)


@pytest.mark.parametrize("what", ["name", "counts"])
def test_validation_is_checked_before_the_training(what, monkeypatch):
    recs = recordings(counts=True)
    model, guide = parts(recs, pm.likelihoods.Poisson)
    monkeypatch.setattr(Trainer, "warm_start", lambda *args: pytest.fail("trained before it was checked"))
    bad = Recordings([Recording("q" if what == "name" else "b", np.full((2, 4, 5), 0.5), bin_width=0.02)])
    with pytest.raises(ValueError, match=r"make the model with it" if what == "name" else "counts"):
        pm.fit(model, guide, recs, validation=bad, **QUICK)


@pytest.mark.parametrize(
    "shapes",
    [{"a": (1, (1,))}, {"a": (3, (2, 2))}, {"a": (1, (9,)), "b": (2, (1, 4))}, {"a": (2, (3, 3, 3, 3))}],
    ids=str,
)
@pytest.mark.parametrize("counts", [False, True])
def test_the_smallest_recordings_are_fitted(shapes, counts):
    recs = recordings(counts=counts, shapes=shapes, missing=False)
    family = pm.likelihoods.NegativeBinomial if counts else pm.likelihoods.Gaussian
    fit = pm.fit(*parts(recs, family), recs, **QUICK)
    assert all(v.isfinite().all() for v in state(fit.model, fit.guide).values())


def test_neurons_that_were_never_seen_do_not_hurt():
    y = np.random.default_rng(0).normal(size=(4, 8, 3))
    y[..., 0] = np.nan
    recs = Recordings([Recording("a", y, bin_width=0.02)])
    fit = pm.fit(*parts(recs), recs, **QUICK)
    assert all(v.isfinite().all() for v in state(fit.model, fit.guide).values())
    assert np.isfinite(fit.history["elbo"]).all()


def test_a_fit_trains_on_with_roll_outs(recs, monkeypatch):
    """A fit's guide is in evaluation mode; given to pm.fit again it is trained as any guide."""
    fit = pm.fit(*parts(recs), recs, **QUICK)
    modes = []
    original = Trainer.take_step
    monkeypatch.setattr(
        Trainer, "take_step", lambda self, *a: (modes.append(self.guide.training), original(self, *a))
    )
    pm.fit(
        fit.model,
        fit.guide,
        recs,
        warm_start=False,
        **{k: v for k, v in QUICK.items() if k != "warm_start_steps"},
    )
    assert modes and all(modes)


@pytest.mark.parametrize("number", range(13))
def test_every_number_of_steps_is_possible(recs, number):
    """The cycle of the learning rate has special cases for small totals."""
    fit = pm.fit(
        *parts(recs), recs, num_steps=number, warm_start_steps=number, trials_per_step=1, progress=False
    )
    assert fit.history.sizes.get("step", 0) == number
    assert all(v.isfinite().all() for v in state(fit.model, fit.guide).values())


# ---- what is trained --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("warm_start", [True, False])
def test_what_asks_for_no_gradient_stays(recs, warm_start):
    model, guide = parts(recs)
    model.dynamics.requires_grad_(False), guide.rnn.requires_grad_(False)
    fit = pm.fit(model, guide, recs, **(QUICK | {"warm_start": warm_start}))
    before, after = state(model, guide), state(fit.model, fit.guide)
    same = {key for key in before if torch.equal(before[key], after[key])}
    frozen = {key for key in before if key.startswith(("model.dynamics.", "guide.rnn."))}
    assert frozen <= same and "model.read_out.weight" not in same and "guide.read_in.weight" not in same
    flags = [
        [p.requires_grad for m in pair for p in m.parameters()]
        for pair in ((model, guide), (fit.model, fit.guide))
    ]
    assert flags[0] == flags[1]


def test_a_fit_needs_something_to_train_and_an_amortised_guide(recs):
    model, guide = parts(recs)
    model.requires_grad_(False), guide.requires_grad_(False)
    with pytest.raises(ValueError, match="needed parameters to train"):
        pm.fit(model, guide, recs, **QUICK)
    linear = pm.models.LinearGaussian(recs, latent_dim=2)
    with pytest.raises(ValueError, match=r"needed an AmortizedGuide such as guides.DKF, got ExactSmoother"):
        pm.fit(linear, pm.guides.ExactSmoother(linear), recs, **QUICK)


def test_others_are_trained_along_and_the_penalty_is_on_the_updates(recs):
    model, guide = parts(recs)
    guide.read_in.start(recs)
    other = torch.nn.Parameter(torch.zeros(3))
    options = Options(4, None, None, 1e-2, False, 0, 1.0, 0.5, 0)

    class Pulled(Trainer):
        def penalty(self, terms, batch):
            return super().penalty(terms, batch) + (other - 1.0).square().sum()

    trainer = Pulled(model, guide, recs, options, torch.device("cpu"), [other])
    trainer.take_step()
    assert (other > 0).all() and any(p is other for p in trainer.parameters)
    batch = trainer.batch()
    with torch.no_grad():
        terms = trainer.elbo.terms(model, guide, batch)
        updates = model.dynamics.hypernetwork(terms.embedding)
        norm = sum((u @ v.mT).square().sum((-1, -2)).mean() for u, v in updates)  # the matrices themselves
        torch.testing.assert_close(Trainer.penalty(trainer, terms, batch), 0.5 * norm)
        model.adapt_dynamics = lambda e: lambda z: z  # a plain function has no updates
        assert Trainer.penalty(trainer, terms, batch) == 0.0
