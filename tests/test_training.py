"""pm.fit: reproducible, without side effects, resumable, and clear about what went wrong."""

import copy
import itertools

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from problems import recordings

import pyro_metassm as pm
from pyro_metassm.recordings import Recording, Recordings
from pyro_metassm.training import Trainer

QUICK = {"num_steps": 6, "warm_start_steps": 4, "trials_per_step": 2, "progress": False}


@pytest.fixture(scope="module")
def recs() -> Recordings:
    return recordings()


def parts(recs, likelihood=pm.likelihoods.Gaussian, seed=0, **more):
    torch.manual_seed(seed)
    model = pm.models.MetaSSM(
        recs, latent_dim=2, embedding_dim=1, hidden_dim=8, likelihood=likelihood, **more
    )
    return model, pm.guides.DKF(model, hidden_dim=6)


def state(model, guide) -> dict[str, torch.Tensor]:
    both = {f"model.{k}": v for k, v in model.state_dict().items()}
    return both | {f"guide.{k}": v for k, v in guide.state_dict().items()}


def assert_same(a: pm.Fit, b: pm.Fit) -> None:
    """The same parameters, embeddings and history to the bit (but for the time it took)."""
    one, other = state(a.model, a.guide), state(b.model, b.guide)
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    assert torch.equal(a.statistics, b.statistics)
    assert set(a.history) == set(b.history) and len(a.history["step"]) == len(b.history["step"])
    for name in set(a.history) - {"seconds"}:
        assert np.array_equal(a.history[name].values, b.history[name].values, equal_nan=True), name


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


# ---- stopping and resuming --------------------------------------------------------------------------------------


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


def assert_parameters(a: pm.Fit, b: pm.Fit) -> None:
    one, other = state(a.model, a.guide), state(b.model, b.guide)
    assert [k for k in one if not torch.equal(one[k], other[k])] == []


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
    with pytest.raises(
        ValueError, match=r"recording 'b'.*make the model with it"
    ):  # after the guide has been started, too
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


# ---- edits of the model -----------------------------------------------------------------------------------------


class StudentPrior(pm.models.MetaSSM):
    def embedding_prior(self):
        return dist.StudentT(4.0, torch.zeros(self.embedding_dim), 1.0).to_event(1)


class MixturePrior(pm.models.MetaSSM):
    def embedding_prior(self):
        component = dist.Normal(torch.tensor([[-1.0], [1.0]]), 0.5).to_event(1)
        return dist.MixtureSameFamily(dist.Categorical(torch.ones(2) / 2), component)


class Overdispersed(pm.models.MetaSSM):
    def likelihood(self, predictor, recording):
        return dist.NegativeBinomial(torch.full_like(predictor, 5.0), logits=predictor)


class HeavyTails(pm.models.MetaSSM):
    def transition(self, z, dynamics):
        return dist.StudentT(4.0, dynamics(z), self.process_noise()).to_event(1)


class EmbeddedStart(pm.models.MetaSSM):
    def initial_state(self, e):
        return dist.Normal(self.initial.loc + e.mean(-1, keepdim=True), self.initial.scale).to_event(1)


@pytest.mark.parametrize("kind", [StudentPrior, MixturePrior, Overdispersed, HeavyTails, EmbeddedStart])
@pytest.mark.parametrize("warm_start", [True, False])
def test_edits_of_the_model_train(kind, warm_start):
    recs = recordings(counts=kind is Overdispersed)
    torch.manual_seed(0)
    model = kind(recs, latent_dim=2, embedding_dim=1, hidden_dim=8)
    guide = pm.guides.DKF(model, hidden_dim=6)
    fit = pm.fit(model, guide, recs, warm_start=warm_start, **(QUICK | {"num_steps": 20}))
    assert np.isfinite(fit.history["elbo"]).all() and len(fit.history["step"]) == 20
    tree = pm.forecast(fit, recs, context=2, horizon=3, num_samples=3)
    assert np.isfinite(tree["b/predictions"]["rates"]).all()
