"""The suggested dims against grids of which the answer is known, and drift against what was planted."""

import doctest
import math

import numpy as np
import pytest
import xarray as xr

import pyro_metassm as pm
from pyro_metassm import drifting, suggesting

QUICK = {"num_steps": 3, "warm_start_steps": 3, "num_samples": 3, "progress": False}


def cell(co, forecast, noise=0.0, seed=0):
    """Scores of one recording of 50 trials of 10 spikes, of these bits per spike, with noise of its own."""
    rng = np.random.default_rng(seed)
    size = np.full(50, 10.0)
    made = {}
    for score, value in (("co_smoothing", co), ("forecast", forecast)):
        errors = noise * rng.normal(size=50)
        made[score] = {"a": [(10 * value + errors - errors.mean()).tolist(), size.tolist()]}
    return made


def test_the_smallest_within_one_standard_error_is_chosen():
    # Noise of 1 in each of two cells of 50 trials: a difference has a standard error of sqrt(2 / 50) / 10 = 0.02.
    grid = {
        (2, 1): cell(0.10, 0.100, 1.0, 1),  # co-smoothing is far below
        (4, 1): cell(0.298, 0.050, 1.0, 2),  # forecasts are
        (4, 2): cell(0.299, 0.199, 1.0, 3),
        (8, 1): cell(0.30, 0.200, 1.0, 4),
        (8, 2): cell(0.31, 0.210, 1.0, 5),
    }
    table, chosen = suggesting._choose(grid)
    assert chosen == (4, 2)
    assert table["suggested"].tolist() == [False, False, True, False, False]
    assert table["within"].tolist() == [False, False, True, True, True]
    assert (
        table["co_smoothing_se"].iloc[2] == pytest.approx(0.02, rel=0.35)
        and table["co_smoothing_se"].iloc[4] == 0
    )
    assert table["co_smoothing"].tolist() == pytest.approx([0.1, 0.298, 0.299, 0.3, 0.31])
    # Without noise no other is within: the best itself; where none is by both, co-smoothing decides.
    sure = {c: cell(*v) for c, v in {(2, 1): (0.1, 0.1), (4, 1): (0.3, 0.2)}.items()}
    assert suggesting._choose(sure)[1] == (4, 1)
    apart = {c: cell(*v) for c, v in {(2, 1): (0.1, 0.3), (4, 1): (0.3, 0.1)}.items()}
    assert suggesting._choose(apart)[1] == (4, 1)


@pytest.fixture(scope="module")
def recs():
    return pm.simulate.limit_cycles(
        [2.0, 5.0], num_trials=12, num_steps=16, num_neurons=(6, 8), noise="poisson", mean_count=(0.5, 2.0)
    )


def test_a_grid_resumes_and_is_of_one_problem(recs, tmp_path, monkeypatch):
    grid = {"latent_dim": (1, 2), "embedding_dim": (1,), "hidden_dim": 8, "folder": tmp_path}
    found = pm.suggest_dims(recs, **grid, **QUICK)
    assert found.unit == "bits per spike" and (found.latent_dim, found.embedding_dim) in {(1, 1), (2, 1)}
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "latent-1-embedding-1.json", "latent-2-embedding-1.json", "problem.json",
    ]  # fmt: skip
    monkeypatch.setattr(suggesting._Problem, "fit", lambda *args, **more: pytest.fail("fitted again"))
    again = pm.suggest_dims(recs, **grid, **QUICK)
    assert again.table.equals(found.table)
    with pytest.raises(ValueError, match="the same recordings and options"):
        pm.suggest_dims(recs, **grid, **{**QUICK, "num_steps": 4})
    with pytest.raises(ValueError, match="the same recordings and options"):
        pm.suggest_dims(recs.select(["w=2"]), **grid, **QUICK)
    others = [
        pm.Recording(name, r.observations, bin_width=r.bin_width, held_out_neurons=[0])
        for name, r in recs.items()
    ]
    with pytest.raises(ValueError, match="the same recordings and options"):  # other neurons to predict
        pm.suggest_dims(pm.Recordings(others), **grid, **QUICK)
    axes = found.plot()
    assert [ax.get_xlabel() for ax in axes] == ["latent_dim"] * 2 and "bits per spike" in axes[0].get_ylabel()


def test_scores_of_a_cell_are_those_of_metrics(recs):
    problem = suggesting._Problem.of(recs, None, 6, 5, 0.25, 3, 0, {"num_steps": 2, "warm_start_steps": 2})
    fit = problem.fit(latent_dim=2, embedding_dim=1)
    found = problem.scores(latent_dim=2, embedding_dim=1)
    co = pm.metrics.co_bps(fit, problem.test, num_samples=3)
    fp = pm.metrics.fp_bps(fit, problem.test, context=6, horizon=5, num_samples=3)
    for name in recs:
        assert problem.test[name].held_out_neurons.sum() == max(1, round(recs[name].num_neurons / 4))
        for score, of in (("co_smoothing", co), ("forecast", fp)):
            gains, size = map(np.sum, found[score][name])
            assert gains / size == pytest.approx(float(of.sel(recording=name)), abs=1e-6)


def test_real_numbers_are_scored_by_their_variance():
    rng = np.random.default_rng(0)
    y, rates = rng.normal(size=(2, 5, 7, 3))
    y[0, 2] = np.nan
    gains, size = map(np.sum, suggesting._gains(rates, y, counts=False))
    assert gains / size == pytest.approx(pm.metrics.r2(y, rates))


class Trial:
    """What the objective asks of an optuna trial."""

    def __init__(self):
        self.user_attrs = {}

    def suggest_int(self, name, low, high, log=False):
        return low

    suggest_float = suggest_int

    def set_user_attr(self, key, value):
        self.user_attrs[key] = value


def test_the_objective_of_a_wider_search(recs):
    options = {"num_steps": (2, 3), "warm_start_steps": 2, "num_samples": 3, "hidden_dim": 8}
    trial = Trial()
    value = pm.search_objective(recs, latent_dim=(2, 3), **options)(trial)
    assert math.isfinite(value) and value == pytest.approx(sum(trial.user_attrs.values()))
    optuna = pytest.importorskip("optuna")
    study = optuna.create_study(direction="maximize")
    study.optimize(pm.search_objective(recs, latent_dim=(2, 3), **options), n_trials=1)
    assert set(study.best_trial.user_attrs) == {"co_smoothing", "forecast"}


@pytest.mark.parametrize("grid", [{"latent_dim": ()}, {"latent_dim": 2}, {"embedding_dim": (0,)}])
def test_grids_that_are_refused(recs, grid):
    with pytest.raises(ValueError, match=next(iter(grid))):
        pm.suggest_dims(recs, **grid, **QUICK)


def test_nothing_to_hold_out_is_said_in_words():
    one, silent = (
        pm.Recording("a", values, bin_width=0.02) for values in (np.ones((8, 9, 1)), np.zeros((8, 9, 4)))
    )
    with pytest.raises(ValueError, match="two or more neurons"):
        pm.suggest_dims(pm.Recordings([one]), latent_dim=(1,), **QUICK)
    with pytest.raises(ValueError, match="held-out neurons with spikes"):
        pm.suggest_dims(pm.Recordings([silent]), latent_dim=(1,), hidden_dim=8, **QUICK)


def test_a_context_without_a_bin_after_it_is_refused(recs):
    """Trials of 16 bins: 16 leave nothing to score, 15 do."""
    options = {"latent_dim": (1,), "embedding_dim": (1,), "hidden_dim": 8, **QUICK}
    with pytest.raises(ValueError, match=r"needed trials of more than context = 16 bins to score, .* has 16"):
        pm.suggest_dims(recs, context=16, **options)
    assert np.isfinite(pm.suggest_dims(recs, context=15, horizon=1, **options).table["forecast"]).all()


def test_drift_is_the_last_third_by_a_fit_of_the_first():
    """Neurons that swap places after half of the trials: the fit of the first third fails on the last one."""
    values = np.random.default_rng(0).poisson(1.0, (36, 10, 4)).astype(float)
    seen = []

    def fit(train):
        seen.append(train)
        return "fit"

    def score(made, trials):
        seen.append(trials)
        means = [float(r.values.mean()) for r in trials.values()]
        return xr.DataArray(means, {"recording": list(trials)}, ("recording",))

    values[24:] += 1
    recs = pm.Recordings([pm.Recording("a", values, bin_width=0.02, condition=np.arange(36))])
    found = pm.drift(fit, recs, score=score)
    train, same, last = seen
    assert sorted([*train["a"].condition, *same["a"].condition]) == list(range(12))
    assert same["a"].num_trials == 3 and last["a"].condition.tolist() == list(range(24, 36))
    assert found["drift"].item() == pytest.approx(float(last["a"].values.mean() - same["a"].values.mean()))
    assert found["drift"].dims == ("recording",)
    with pytest.raises(ValueError, match="a function that makes a fit"):
        pm.drift("fit", recs)
    with pytest.raises(ValueError, match=r"within \(0, 0.5\]"):
        recs.ends(0.6)
    with pytest.raises(ValueError, match="recording 'a'"):
        recs.ends(0.01)


@pytest.mark.parametrize("module", [suggesting, drifting])
def test_examples(module):
    result = doctest.testmod(module)
    assert result.failed == 0 and result.attempted > 0
