"""The numbers of the studies: errors of flows, maps of the embedding, tables, pages and verdicts."""

import numpy as np
import pyro
import pytest
import torch
import xarray as xr
from scipy.integrate import solve_ivp
from tiny_study import ODD, Texts

import pyro_metassm as pm
from pyro_metassm.experiments import (
    bifurcations,
    limit_cycles,
    maps,
    scores,
    tables,
)
from pyro_metassm.experiments.methods import Method
from pyro_metassm.reporting import html as page

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


def test_spearman_against_scipy():
    from scipy.stats import spearmanr

    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 15))
    assert limit_cycles.spearman(x, y) == pytest.approx(spearmanr(x, y).statistic)
