"""The studies: their data, ceilings and tables, and tiny ones from end to end."""

import html.parser
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyro
import pytest
import torch
import xarray as xr
from scipy.integrate import solve_ivp

import pyro_metassm as pm
from pyro_metassm import cli
from pyro_metassm.experiments import (
    bifurcations,
    chaos,
    controls,
    harder,
    limit_cycles,
    maps,
    methods,
    oracle,
    scores,
    study,
    systems,
    tables,
)
from pyro_metassm.experiments.methods import Method, Sizes, Steps
from pyro_metassm.experiments.scores import Scoring
from pyro_metassm.experiments.settings import Settings
from pyro_metassm.experiments.systems import Bifurcations, LimitCycles
from pyro_metassm.reporting import html as page

NUMBERS = {"num_train": 5, "num_test": 4, "num_adapt": 3, "num_bins": 24, "num_neurons": (5, 8)}
TINY = Settings(
    family=Bifurcations(
        damping=(-0.6, 0.0), stiffness=(-1.0, 1.0), mu=(-0.5, 0.5), unseen_duffing=2, unseen_hopf=1, **NUMBERS
    ),
    steps=Steps(
        warm_start_steps=6,
        num_steps=2,
        trials_per_step=2,
        num_starts=6,
        search_steps=4,
        adapt_steps=2,
        plain_steps=3,
        plain_adapt_steps=3,
    ),
    scoring=Scoring(context=8, horizon=6, k=4, num_samples=3),
    shots=(1, 2),
    draws=(2, 1),
    shown=2,
)
NAMES = ["meta", "single", "shared-plain", "odd"]
ODD = "<b>odd</b> & \"quoted\" 'é'"
TIMED = {"seconds.csv", "metrics.json", "index.html"}  # hold how long it took


def quiet(text: str) -> None:
    pass


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    """The folder of a bifurcation study."""
    out = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(methods.METHODS, "odd", Method(ODD, pm.models.GEPS))
        bifurcations.run(out, names=NAMES, settings=TINY, say=quiet)
    return out


# ---- data ------------------------------------------------------------------------------------------------


def test_families_are_what_the_issue_says():
    family = Bifurcations(num_train=2, num_test=1, num_adapt=2)
    recs = family.known(1, seed=0)
    kinds = [recs.truth[name].attrs["system"] for name in recs.names]
    assert (kinds.count("duffing"), kinds.count("hopf")) == (20, 11)
    assert all(30 <= r.num_neurons <= 100 and r.num_bins == 300 for r in recs.values())
    adapt, test = family.held_out()
    assert adapt.names == test.names and not set(adapt.names) & set(recs.names)
    assert [adapt.truth[n].attrs["system"] for n in adapt.names].count("duffing") == 4 and len(adapt) == 6
    assert (adapt[adapt.names[0]].num_trials, test[test.names[0]].num_trials) == (2, 1)
    others = replace(family, held_out_seed=7).unseen(1)
    assert not set(others.names) & set(adapt.names)


def test_draws_of_trials_are_nested_and_know_their_truth():
    pool, _ = TINY.family.held_out()
    few, more = (systems.few_trials(pool, n, 2, seed=3) for n in (1, 3))
    assert few.names == tuple(f"{name} #{draw}" for draw in (0, 1) for name in pool.names)
    for name in few.names:
        trials = more[name].observations
        assert any(np.array_equal(few[name].observations[0], trial) for trial in trials)
        assert few.truth[name].sizes["trial"] == 1


def test_controls_are_no_members_of_the_family():
    pool, _ = TINY.family.held_out()
    recs = controls.unrelated(pool, seed=0)
    backwards, process = recs.names
    origin = backwards.removesuffix(" reversed")
    assert pool.truth[origin].attrs["a"] == min(pool.truth[n].attrs.get("a", 9.0) for n in pool.names)
    assert np.array_equal(recs[backwards].observations[:, ::-1], pool[origin].observations)
    assert np.array_equal(recs.truth[backwards]["latents"][:, ::-1], pool.truth[origin]["latents"])
    assert recs[process].observations.shape == pool[origin].observations.shape


def test_lyapunov_exponents():
    rates = np.array([0.5, -1.0, -2.0])
    # The other directions have shrunk by exp(1.5 * 6) before growth is measured, for 54 s.
    found = chaos.lyapunov_exponent(lambda z: rates * z, np.zeros((4, 3)), num_steps=6000)
    assert found == pytest.approx(0.5, abs=1e-5)
    # As published; here a mean over 64 paths of 27 s.
    assert 1 / chaos.attractor(28.0)[2] == pytest.approx(0.906, abs=0.03)


def test_lorenz_latents_are_standardised():
    recs = chaos.Lorenz(rho=(28.0, 40.0), num_bins=100).known(64, seed=0)
    for name in recs.names:
        z = recs.truth[name]["latents"].values
        # Paths change their lobe every 0.7 s or so: means over 64 paths of 3 s have a standard error of about 0.08.
        assert np.abs(z.mean((0, 1))).max() < 0.35 and np.abs(z.std((0, 1)) - 1).max() < 0.2


# ---- ceilings --------------------------------------------------------------------------------------------


def r2_by_step(target: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    error = np.square(target - predicted).sum((0, 2))
    return 1 - error / np.square(target - target.mean(0, keepdims=True)).sum((0, 2))


def by_solve_ivp(derivative, recs, name: str, context: int, horizon: int) -> np.ndarray:
    """The forecast from the true state, by SciPy's integrator."""
    truth, width = recs.truth[name], recs.bin_width
    times = width * np.arange(1, horizon + 1)
    paths = [
        solve_ivp(lambda t, z: derivative(*z), (0, times[-1]), z, t_eval=times, rtol=1e-10, atol=1e-12).y.T
        for z in truth["latents"].values[:, context - 1]
    ]
    return np.stack(paths) @ truth["read_out"].values


@pytest.mark.parametrize(
    ("recs", "derivative"),
    [
        (
            pm.simulate.duffing([(-0.3, -0.8)], num_trials=6, num_steps=20, num_neurons=7),
            lambda x, v: (v, -0.3 * v - x * (-0.8 + 0.1 * x**2)),
        ),
        (
            pm.simulate.hopf([0.7], num_trials=6, num_steps=20, num_neurons=7),
            lambda x, v: (v, -x + (0.7 - x**2) * v),
        ),
    ],
    ids=["duffing", "hopf"],
)
def test_ceilings_against_another_integrator(recs, derivative):
    (name,) = recs.names
    found = oracle.ceilings(recs, context=8, horizon=10)[name]
    target = recs[name].observations[:, 8:18].astype(np.float64)
    expected = r2_by_step(target, by_solve_ivp(derivative, recs, name, 8, 10))
    assert np.allclose(found, expected, atol=1e-5)  # Runge-Kutta's error at steps of 25 ms
    assert expected.min() < 0.999


def test_the_ceiling_of_a_lorenz_system_against_another_integrator():
    recs = chaos.lorenz([30.0], num_trials=6, num_bins=14, num_neurons=(6, 6))
    (name,) = recs.names
    mean, sd = (np.array(recs.truth[name].attrs[key]) for key in ("mean", "sd"))

    def derivative(*w):
        x, y, z = mean + sd * np.array(w)
        return np.array([10 * (y - x), x * (30 - z) - y, x * y - 8 / 3 * z]) / sd

    expected = r2_by_step(
        recs[name].observations[:, 6:14].astype(np.float64), by_solve_ivp(derivative, recs, name, 6, 8)
    )
    assert np.allclose(oracle.ceilings(recs, context=6, horizon=8)[name], expected, atol=1e-4)


def test_the_ceiling_of_a_limit_cycle_follows_eulers_rule():
    recs = pm.simulate.limit_cycles([4.0], num_trials=6, num_steps=20, num_neurons=7)
    truth = recs.truth["w=4"]
    x, y = truth["latents"].values[:, 9].T
    predicted = []
    for _ in range(5):
        for _ in range(3):
            pull = 2.0 - x**2 - y**2
            x, y = x + 0.01 * (x * pull - 4.0 * y), y + 0.01 * (y * pull + 4.0 * x)
        predicted.append(np.stack([x, y], -1) @ truth["read_out"].values)
    target = recs["w=4"].observations[:, 10:15].astype(np.float64)
    expected = r2_by_step(target, np.stack(predicted, 1))
    assert np.allclose(oracle.ceilings(recs, context=10, horizon=5)["w=4"], expected, atol=1e-9)


def test_ceilings_of_controls():
    """Without process noise the reversed system leads back along its path; the process decays as it is known to."""
    given = {"num_trials": 6, "num_steps": 20, "num_neurons": 7, "process_noise": 0.0}
    recs = pm.simulate.duffing([(-0.4, -1.0)], **given)
    backwards = controls.reversed_in_time(recs, recs.names[0])
    (name,) = backwards.names
    target = backwards[name].observations[:, 8:14].astype(np.float64)
    expected = r2_by_step(target, backwards.truth[name]["rates"].values[:, 8:14])
    assert np.allclose(oracle.ceilings(backwards, context=8, horizon=6)[name], expected, atol=1e-5)
    process = controls.ornstein_uhlenbeck(recs[recs.names[0]], seed=0)
    (name,) = process.names
    z = process.truth[name]["latents"].values[:, 7, None]
    decay = np.exp(-0.05 * np.arange(1, 7) / controls.RELAXATION)[:, None]
    expected = r2_by_step(
        process[name].observations[:, 8:14].astype(np.float64),
        z * decay @ process.truth[name]["read_out"].values,
    )
    assert np.allclose(oracle.ceilings(process, context=8, horizon=6)[name], expected, atol=1e-5)


def test_the_ceiling_of_counts_is_of_log_rates():
    given = {"num_trials": 6, "num_steps": 20, "num_neurons": 7, "process_noise": 0.0}
    recs = pm.simulate.hopf([0.5], noise="poisson", **given)
    found = oracle.ceilings(recs, context=8, horizon=10, counts=True)["hopf mu=0.5"]
    assert np.allclose(found, 1.0, atol=1e-6)  # without process noise the true rates are known


# ---- flows -----------------------------------------------------------------------------------------------


class KnownFlow(pm.models.MetaSSM):
    """The displacement over a bin of ``x' = v, v' = a v - x (b + c x^2)``, times ``scale``, in latents ``x W + w``."""

    scale = 1.0

    def displacement(self, x: np.ndarray) -> np.ndarray:
        vector = lambda t, z: [z[1], -0.3 * z[1] - z[0] * (-0.8 + 0.1 * z[0] ** 2)]
        ends = [solve_ivp(vector, (0, 0.05), point, rtol=1e-10, atol=1e-12).y[:, -1] for point in x]
        return np.array(ends) - x

    def transition(self, z, dynamics):
        x = (z.double().numpy().reshape(-1, 2) - FRAME[1]) @ np.linalg.inv(FRAME[0])
        change = self.scale * self.displacement(x) @ FRAME[0]
        after = z + torch.as_tensor(change).reshape(z.shape).to(z.dtype)
        return pyro.distributions.Normal(after, 1.0).to_event(1)


FRAME = np.array([[1.5, -0.4], [0.3, 0.8]]), np.array([0.7, -2.0])


@pytest.mark.parametrize("scale", [1.0, 2.0, 0.0])
def test_the_error_of_a_flow_that_is_known(scale, monkeypatch):
    recs = pm.simulate.duffing([(-0.3, -0.8)], num_trials=3, num_steps=20, num_neurons=4)
    (name,) = recs.names
    assert recs.bin_width == 0.05
    model = KnownFlow(recs, latent_dim=2, embedding_dim=1)
    fit = pm.fit(model, pm.guides.DKF(model), recs, num_steps=0, warm_start=False, progress=False)
    fit.model.scale = scale
    truth = recs.truth[name]["latents"].values
    latents = (truth @ FRAME[0] + FRAME[1])[None, None]
    dims = ("trial", "time", "latent_dim")
    of_posterior = xr.Dataset({"latents": (("chain", "draw", *dims), latents)})
    of_posterior["time"] = 0.05 * np.arange(20)
    constant = xr.Dataset({"true_latents": ((*dims[:2], "truth_dim"), truth)})
    tree = xr.DataTree.from_dict({f"{name}/posterior": of_posterior, f"{name}/constant_data": constant})
    monkeypatch.setattr(scores, "posterior", lambda *given, **options: tree)
    flow_r2, alignment_r2 = scores.flow_scores(fit, recs, seed=0)
    made = {"rows": [{"recording": name, "flow_r2": flow_r2, "alignment_r2": alignment_r2}]}
    (row,) = tables.flow_errors({("m", 0): {"fit": made}})
    true = model.displacement(truth.reshape(-1, 2))
    # Each displacement is as many times too long, or short, as the scale says; in float32.
    expected = (scale - 1) ** 2 * np.square(true).sum() / np.square(true - true.mean(0)).sum()
    assert row["flow_error"] == pytest.approx(expected, rel=1e-4, abs=1e-7)
    assert row["alignment_r2"] == pytest.approx(1.0) and row["n_s"] is None


def test_summaries_of_flow_errors():
    rows = [
        {"method": "m", "n_s": n, "seed": 0, "recording": name, "flow_error": error, "alignment_r2": 0.9}
        for n, name, error in (
            (None, "a", 0.1),
            (None, "b", 0.3),
            (4, "c", 0.2),
            (4, "c", 0.4),
            (4, "d", np.inf),
        )
    ]
    known, few = tables.flow_summary(rows)
    assert known["mean"] == pytest.approx(0.2) and known["worst"] == pytest.approx(0.3)
    assert few["mean"] == pytest.approx((0.3 + 2.0) / 2) and few["worst"] == 2.0
    assert few["sem"] == pytest.approx(np.std([0.3, 2.0], ddof=1) / np.sqrt(2))
    assert (known["alignment_r2"], few["num"]) == (pytest.approx(0.9), 2)
    (line,) = tables.flows_by_method([known, few], {"m": Method("ours")})
    assert line == {"method": "ours", "trained on": "0.200 ± 0.100", "n_s = 4": "1.150 ± 0.850"}


# ---- the embedding as a map ------------------------------------------------------------------------------


def test_quadratic_fits():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(12, 2))
    y = np.column_stack([1 + x[:, 0] * x[:, 1] - x[:, 0] ** 2, x[:, 1]])
    assert maps.quadratic_r2(x, y) == pytest.approx((1.0, 1.0))
    y = y + rng.normal(size=y.shape)
    design = np.column_stack([np.ones(12), x, x[:, 0] ** 2, x[:, 0] * x[:, 1], x[:, 1] ** 2])
    left_out = np.zeros_like(y)
    for row in range(12):
        rest = np.arange(12) != row
        left_out[row] = design[row] @ np.linalg.lstsq(design[rest], y[rest], rcond=None)[0]
    fitted = design @ np.linalg.lstsq(design, y, rcond=None)[0]
    total = np.square(y - y.mean(0)).sum()
    expected = [1 - np.square(y - z).sum() / total for z in (fitted, left_out)]
    assert maps.quadratic_r2(x, y) == pytest.approx(tuple(expected))
    assert np.isnan(maps.quadratic_r2(x[:6], y[:6])).all()


# ---- tables and pages ------------------------------------------------------------------------------------


def test_tables_survive_a_file(tmp_path):
    rows = [{"name": "a, \"b\"\n'c'", "n": 1, "r2": 0.1 + 0.2, "none": None, "low": -np.inf}]
    tables.write(tmp_path / "t.csv", rows)
    assert tables.read(tmp_path / "t.csv") == rows


def test_summaries():
    rows = [
        {"method": "m", "n_s": 1, "seed": seed, "recording": name, "r2": r2, "ceiling": 0.9}
        for seed, name, r2 in (
            (0, "a", 0.5),
            (0, "a", 0.7),
            (0, "b", -50.0),
            (1, "a", 0.8),
            (1, "b", -np.inf),
        )
    ]
    (row,) = tables.summary(rows)
    each = np.array([0.6, -1.0, 0.8, -1.0])
    assert row["mean"] == pytest.approx(each.mean()) and row["worst"] == -1.0 and row["num"] == 4
    assert row["sem"] == pytest.approx(each.std(ddof=1) / 2) and row["ceiling"] == pytest.approx(0.9)


def test_pages_escape_what_they_are_given():
    cell = page.table([{ODD: ODD, "n": 0.12345}])
    parser = Texts()
    parser.feed(cell + page.figure('a"b<.png', ODD) + page.links(["x&y.csv"]))
    assert ODD in parser.texts and "0.123" in parser.texts and "b" not in parser.tags
    assert parser.sources == ["a%22b%3C.png", "x%26y.csv"]


def test_verdicts_come_from_the_numbers():
    def row(name, kind, error):
        numbers = {"draw": 0, "rollout_error": error, "r2": 0.5, "ceiling": 0.9}
        return {"seed": 0, "method": "meta", "recording": name, "kind": kind, **numbers}

    rows = [row("a", "held out", 0.01), row("b", "held out", 0.02)]
    rows += [row("c", "unrelated", 0.2), row("d", "unrelated", 0.015)]
    odd, alike = bifurcations.verdicts(rows)
    assert "10.0 times" in odd and odd.count("100%") and "says that it does not fit" in odd
    assert "0.8 times" in alike and "does not tell it from the family" in alike
    assert bifurcations.verdicts(rows[:2]) == []


class Texts(html.parser.HTMLParser):
    """The texts, tags and addresses of a page."""

    def __init__(self):
        super().__init__()
        self.texts, self.tags, self.sources = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for key, value in attrs if key in ("src", "href")]

    def handle_data(self, data):
        self.texts.append(data)


# ---- methods ---------------------------------------------------------------------------------------------


def test_the_plain_adaptation_leaves_what_is_shared():
    recs, _ = TINY.family.training(seed=0)
    pool, _ = TINY.family.held_out()
    fit = methods.train(methods.METHODS["meta-plain"], recs, Sizes(), TINY.steps, seed=0)
    new = systems.few_trials(pool, 2, 1, seed=0)
    adapted = methods.adapt_plainly(fit, new, TINY.steps, seed=0)
    assert adapted.names == new.names and adapted.history.sizes["step"] == TINY.steps.plain_adapt_steps
    tables_of = {"read_out.weight", "read_out.bias", "observation.log_sd"}
    state = fit.model.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in adapted.model.state_dict().items() if k not in tables_of)
    encoder = fit.guide.rnn.state_dict()
    assert all(torch.equal(v, encoder[k]) for k, v in adapted.guide.rnn.state_dict().items())
    untrained = methods.adapt_plainly(fit, new, replace(TINY.steps, plain_adapt_steps=0), seed=0)
    assert not torch.equal(untrained.model.read_out.weight, adapted.model.read_out.weight)


def test_a_method_may_take_the_fit_of_another(tmp_path):
    chosen = {"a": Method("a"), "b": Method("b", trained_as="a", adapt={"num_steps": 0})}
    results = study.run(replace(TINY, shots=(1,), draws=(1,)), chosen, [0], tmp_path, say=quiet)
    assert "fit" in results["a", 0] and "fit" not in results["b", 0]
    with pytest.raises(ValueError, match="takes the fit of a"):
        study.run(TINY, {"b": chosen["b"]}, [0], tmp_path, say=quiet)


def test_settings_that_do_not_go_together():
    with pytest.raises(ValueError, match="number of draws"):
        replace(TINY, draws=(1,))
    with pytest.raises(ValueError, match="at most 3 trials"):
        replace(TINY, shots=(1, 4))
    with pytest.raises(ValueError, match="context and horizon"):
        replace(TINY, scoring=Scoring())


# ---- from end to end -------------------------------------------------------------------------------------


def test_the_table_is_that_of_the_forecasts(done):
    table = {(row["method"], row["n_s"]): row for row in tables.read(done / "table1.csv")}
    assert set(table) == {(name, n) for name in NAMES for n in (1, 2)}
    forecasts = tables.read(done / "forecast.csv")
    unseen = {row["recording"] for row in forecasts}
    assert len(unseen) == 3 and len(forecasts) == len(NAMES) * 3 * (2 + 1) * TINY.scoring.horizon
    for (name, n), row in table.items():
        r2, tops = [], []
        for recording in unseen:
            found = [
                r for r in forecasts
                if (r["method"], r["n_s"], r["recording"], r["k"]) == (name, n, recording, 4)
            ]  # fmt: skip
            assert len(found) == dict(zip(TINY.shots, TINY.draws, strict=True))[n]
            r2.append(np.mean([max(r["r2"], -1.0) for r in found]))
            tops.append(np.mean([r["ceiling"] for r in found]))
        assert row["mean"] == pytest.approx(np.mean(r2)) and row["ceiling"] == pytest.approx(np.mean(tops))
        assert row["sem"] == pytest.approx(np.std(r2, ddof=1) / np.sqrt(3))
    adaptations = tables.read(done / "adaptation.csv")
    assert all(
        (row["rollout_error"] is None) == (row["method"] in ("single", "shared-plain")) for row in adaptations
    )
    assert all(row["flow_r2"] <= 1 and row["alignment_r2"] <= 1 for row in adaptations)


def test_flow_errors_are_of_every_fit_and_adaptation(done):
    rows = tables.read(done / "flow_error.csv")
    trained = [row for row in rows if row["n_s"] is None]
    assert {row["method"] for row in trained} == set(NAMES) - {"single"} and len(trained) == 3 * 6
    adapted = {(r["method"], r["n_s"], r["draw"], r["recording"]): r for r in rows if r["n_s"] is not None}
    given = tables.read(done / "adaptation.csv")
    assert len(adapted) == len(given) == len(NAMES) * 3 * (2 + 1)
    for row in given:
        error = adapted[row["method"], row["n_s"], row["draw"], row["recording"]]["flow_error"]
        assert error == pytest.approx(1 - row["flow_r2"])
    # The saved fit gives what was written when it was made.
    _, test = TINY.family.training(seed=0)
    one = test.select(["hopf mu=0.5"]).crop(0, 14)
    flow_r2, _ = scores.flow_scores(study.trained(done, "meta", 0), one, seed=0)
    (row,) = (r for r in trained if (r["method"], r["recording"]) == ("meta", "hopf mu=0.5"))
    assert row["flow_error"] == pytest.approx(1 - flow_r2, rel=1e-4)
    text = (done / "index.html").read_text(encoding="utf-8")
    for row in json.loads((done / "metrics.json").read_text())["flow_error"]:
        assert row["mean"] <= 2.0 and f"<td>{tables.plus_minus(row)}</td>" in text


def test_the_page_says_what_the_tables_say(done):
    parser = Texts()
    text = (done / "index.html").read_text(encoding="utf-8")
    parser.feed(text)
    assert ODD in parser.texts and "b" not in parser.tags
    for row in tables.read(done / "table1.csv"):
        assert f"{row['mean']:.3f} ± {row['sem']:.3f}" in parser.texts
    for source in parser.sources:
        assert (done / source).is_file() and (done / source).stat().st_size
    assert "http" not in text
    pictures = {"flow.png", "forecast.png", "table1.png", "embedding.png", "trials.png"}
    assert pictures <= set(parser.sources)
    numbers = json.loads((done / "metrics.json").read_text(), parse_constant=lambda c: pytest.fail(c))
    assert numbers["verdicts"] and all(line in parser.texts for line in numbers["verdicts"])
    assert numbers["settings"] == TINY.as_json() and set(numbers["seconds"]) == set(NAMES)


def test_embeddings_of_known_and_new_recordings(done):
    rows = tables.read(done / "embedding.csv")
    assert {row["method"] for row in rows} == {"meta", "odd"}
    of_meta = [row for row in rows if row["method"] == "meta"]
    assert sum(row["n_s"] is None for row in of_meta) == 6 and len(of_meta) == 6 + 3 * 3
    mapped = tables.read(done / "map.csv")
    assert {(row["family"], row["of"]) for row in mapped} == {
        ("duffing", "embedding"), ("duffing", "a"), ("duffing", "b"), ("hopf", "embedding"), ("hopf", "mu"),
    }  # fmt: skip


def test_what_is_there_is_not_done_again_and_the_rest_is_the_same(done, tmp_path, monkeypatch):
    monkeypatch.setitem(methods.METHODS, "odd", Method(ODD, pm.models.GEPS))
    kept = {p: p.stat().st_mtime_ns for p in (done / "pieces").rglob("*.json")}
    before = {p.name: p.read_bytes() for p in done.iterdir() if p.suffix == ".csv"}
    lost = [
        done / "pieces" / "meta-seed0" / "adapted-1.json",
        done / "pieces" / "single-seed0" / "adapted-2.json",
    ]
    for path in lost:
        path.unlink()
    said = []
    bifurcations.run(done, names=NAMES, settings=TINY, say=said.append)
    assert [line.split("  ")[-1] for line in said[:2]] == [
        "meta, seed 0: adapted with 1", "single, seed 0: adapted with 2",
    ]  # fmt: skip
    after = {p.name: p.read_bytes() for p in done.iterdir() if p.suffix == ".csv"}
    assert {n: b for n, b in after.items() if n not in TIMED} == {
        n: b for n, b in before.items() if n not in TIMED
    }
    folders = {path.with_suffix("") for path in lost}
    for path, time in kept.items():
        again = path in lost or path.parent in folders
        assert (path.stat().st_mtime_ns == time) != again, path
    with pytest.raises(ValueError, match=r"study of other settings \(family\)"):
        bifurcations.run(done, names=["meta"], settings=TINY, held_out_seed=5, say=quiet)


@pytest.mark.slow
def test_processes_give_what_one_gives(done, tmp_path):
    names = ["single", "shared-plain"]
    bifurcations.run(tmp_path, names=names, settings=TINY, workers=2, say=quiet)
    ours, theirs = (tables.read(folder / "forecast.csv") for folder in (tmp_path, done))
    assert ours == [row for row in theirs if row["method"] in names]


def test_limit_cycles(tmp_path):
    settings = [
        replace(
            TINY, family=LimitCycles(velocities=velocities, **NUMBERS), sizes=Sizes(2, 1), shots=(), draws=()
        )
        for velocities in ((2.0, 5.0), (1.0, 3.0, 5.0))
    ]
    numbers = limit_cycles.run(tmp_path, settings=settings, say=quiet)
    assert {(row["num_recordings"], row["method"]) for row in numbers["table"]} == {
        (m, name) for m in (2, 3) for name in ("meta", "shared")
    }
    assert all(0 <= row["spearman"] <= 1 for row in numbers["rank_correlation"])
    _, test = settings[1].family.training(seed=0)
    tops = oracle.ceilings(test.crop(0, 14), context=8, horizon=6)
    for row in tables.read(tmp_path / "forecast.csv"):
        assert row["num_recordings"] == 2 or row["ceiling"] == tops[row["recording"]][row["k"] - 1]
    parser = Texts()
    parser.feed((tmp_path / "index.html").read_text(encoding="utf-8"))
    assert {"flow_M2.png", "flow_M3.png", "embedding_M3.png", "forecast.png"} <= set(parser.sources)
    assert all((tmp_path / source).is_file() for source in parser.sources)


def test_spearman_against_scipy():
    from scipy.stats import spearmanr

    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 15))
    assert limit_cycles.spearman(x, y) == pytest.approx(spearmanr(x, y).statistic)


@pytest.mark.parametrize(
    "parts",
    [
        ["noise-10", "noise-100", "lorenz"],
        pytest.param([name for name in harder.NAMES if name != "ablation"], marks=pytest.mark.slow),
    ],
    ids=["some", "all"],
)
def test_harder_variants(parts, tmp_path):
    base = replace(TINY, shots=(1,), draws=(1,), shown=0)
    numbers = harder.run(tmp_path, parts=parts, settings=base, say=quiet)
    rows = {(row["variant"], row["n_s"]): row for row in numbers["table"]}
    assert set(rows) == {(variant, n) for variant in parts for n in (0, 1)}
    assert all(np.isfinite(row["mean"]) and row["ceiling"] <= 1 for row in rows.values())
    tops = [rows[variant, 1]["ceiling"] for variant in ("noise-10", "noise-100")]
    assert tops[0] > tops[1]
    made = json.loads((tmp_path / "lorenz" / "pieces" / "meta-seed0" / "adapted-1.json").read_text())
    unseen = replace(harder.variants(base)["lorenz"].settings.family).unseen(1)
    for row in made["rows"]:
        time = unseen.truth[row["recording"]].attrs["lyapunov_time"]
        assert row["k"] == min(round(time / unseen.bin_width), base.scoring.horizon)


@pytest.mark.slow
def test_the_way_to_our_recipe(tmp_path):
    base = replace(TINY, shots=(1,), draws=(1,), shown=0)
    numbers = harder.run(tmp_path, parts=["ablation"], settings=base, say=quiet)
    assert {row["method"] for row in numbers["table"] if row["n_s"] == 1} == set(harder.ABLATION)
    parser = Texts()
    parser.feed((tmp_path / "index.html").read_text(encoding="utf-8"))
    assert all(method.label in parser.texts for method in harder.ABLATION.values())
    for row in numbers["table"]:
        assert f"{tables.plus_minus(row)} ({row['ceiling']:.3f})" in parser.texts


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["bifurcations", "--methods", "meta", "nothing"], "got nothing"),
        (["bifurcations", "--seeds", "-3"], "needed an integer of at least 0, got -3"),
        (["limit_cycles", "--methods", "nothing"], "got nothing"),
        (["harder", "--parts", "nothing"], "got nothing"),
    ],
)
def test_errors_of_the_command_line_are_one_line(arguments, said, tmp_path, capsys):
    assert cli.main(["experiment", *arguments, "--out", str(tmp_path / "out"), "--small"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("metassm: ") and said in lines[0]


def test_the_command_line_goes_on_with_a_study(done, monkeypatch, capsys):
    monkeypatch.setattr(bifurcations, "SMALL", TINY)
    arguments = ["experiment", "bifurcations", "--small", "--out", str(done), "--methods", "meta", "single"]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "Meta-dynamical SSM" in printed and "ceiling" in printed and str(done) in printed
