"""Maps of the recordings, trajectories on grids, exponents, spectra and divergences, beside what is known of them."""

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from fits import QUICK, parts
from known_maps import WIDTH, Duffing, Henon, Linear, NormalForm, fit_of
from pyro.nn import PyroSample
from scipy.signal import periodogram

import pyro_metassm as pm
from pyro_metassm.analysis import activity


@pytest.fixture(scope="module")
def fitted():
    model, guide = parts(recs := pm.simulate.limit_cycles([3.0, 4.0], num_trials=4, num_steps=24))
    return pm.fit(model, guide, recs, **QUICK), recs


# ---- the map of the recordings ---------------------------------------------------------------------------------------


def test_distances_are_those_of_linear_flows():
    """``f_e(z) = exp(mu dt) R(w dt) z`` near 0: ``|f_a - f_b|^2 = |exp(mu_a + i w_a) - exp(mu_b + i w_b)|^2 |z|^2``."""
    e = {"a": (-0.5, 2.0), "b": (-0.5, 2.0), "c": (-0.5, 3.0), "d": (-0.2, 2.0)}
    fit = fit_of(NormalForm, e, sd=0.02, initial_sd=1e-3, noise=1e-5)
    found = pm.analysis.embedding_map(fit, num_draws=0, attrs={"kind": dict.fromkeys("abcd", "x")})
    at = np.array(list(e.values()))
    assert found["embedding"].values[0] == pytest.approx(at) and found["mean"].values == pytest.approx(at)
    assert found["covariance"].values == pytest.approx(np.tile(0.02**2 * np.eye(2), (4, 1, 1)))
    assert found["distance"].values[0] == pytest.approx(np.linalg.norm(at[:, None] - at, axis=-1))
    factor = np.exp((at[:, 0] + 1j * at[:, 1]) * WIDTH)
    ratio = np.abs(factor[:, None] - factor) ** 2 / np.abs(factor - 1) ** 2  # of the flow of the first
    apart, flow = found["dynamics_distance"].values[0], found["flow"].values[0]
    # |z|^2 differs between the states of the two recordings, whose means are those that `flow` has.
    square = flow / np.abs(factor - 1) ** 2 * WIDTH**2
    for a in range(4):
        for b in range(4):
            true = np.abs(factor[a] - factor[b]) ** 2 * (square[a] + square[b]) / 2 / WIDTH**2
            assert apart[a, b] == pytest.approx(true, rel=1e-5, abs=1e-15)
    assert apart[0, 1] == 0 and ratio[0, 2] > 0
    assert found["kind"].values.tolist() == ["x"] * 4
    drawn = pm.analysis.embedding_map(fit, num_draws=30)
    assert drawn["embedding"].std("draw").values == pytest.approx(np.full((4, 2), 0.02), rel=0.5)


def test_attributes_of_recordings(fitted):
    fit, recs = fitted
    found = pm.analysis.embedding_map(fit, recs, attrs=("velocity", "system"), num_draws=2)
    assert found["velocity"].values.tolist() == [3.0, 4.0]
    with pytest.raises(ValueError, match="needed 'day' of every recording, got none of w=3, w=4"):
        pm.analysis.embedding_map(fit, recs, attrs=["day"])
    with pytest.raises(ValueError, match="needed recs for their attrs"):
        pm.analysis.embedding_map(fit, attrs=["velocity"])


def test_what_each_direction_changes():
    """Of the normal form near 0 the speed is ``|exp((mu + i w) dt) - 1| |z| / dt`` and areas shrink by ``-2 mu``."""
    fit = fit_of(NormalForm, {"a": (-0.5, 2.0), "b": (-0.3, 3.0)}, initial_sd=1e-3, noise=1e-5)
    found = pm.analysis.sensitivity(fit, np.array([-0.5, 2.0])).isel(draw=0)
    assert found["contraction"].item() == pytest.approx(1.0, rel=1e-4)
    assert found["contraction_gradient"].values == pytest.approx([-2.0, 0.0], abs=1e-3)
    speed = lambda mu, w: np.abs(np.exp((mu + 1j * w) * WIDTH) - 1)
    h = 1e-5
    slopes = np.array([speed(-0.5 + h, 2) - speed(-0.5 - h, 2), speed(-0.5, 2 + h) - speed(-0.5, 2 - h)]) / (
        2 * h
    )
    relative = found["speed_gradient"].values / found["speed"].item()
    assert relative == pytest.approx(slopes / speed(-0.5, 2), rel=1e-2)
    well = pm.analysis.sensitivity(fit_of(Duffing, {"a": (-0.5, 0.02), "b": (-0.5, 0.9)}, initial_sd=2.5),
                                   np.array([-0.5, 0.02]), step=0.5).isel(draw=0)  # fmt: skip
    assert well["num_fixed_points"] == 1 and well["num_fixed_points_near"].values.tolist() == [[1, 1], [3, 1]]
    with pytest.raises(ValueError, match="step above 0"):
        pm.analysis.sensitivity(fit, "a", step=0.0)


# ---- grids -----------------------------------------------------------------------------------------------------------


def test_trajectories_on_a_grid_are_the_maps_iterated():
    fit = fit_of(NormalForm, {"a": (0.5, 2.0), "b": (0.5, 4.0)})
    start = np.array([0.3, -0.4])
    found = pm.analysis.interpolate(
        fit, "a", num_bins=8, spacing=0.5, initial=start, num_draws=3, decoder=lambda y: y[..., :2] + 1.0
    )
    assert found["rates"].sizes == {"draw": 3, "row": 3, "column": 3, "time": 8, "neuron": 6}
    e, z = found["embedding"].values, found["latents"].values
    middle = e[:, 1, 1]
    # r = 1 here: the recordings' embeddings lie 1 from their mean.
    assert e - middle[:, None, None] == pytest.approx(
        np.broadcast_to(np.stack(np.meshgrid([-0.5, 0, 0.5], [-0.5, 0, 0.5]), -1), e.shape), abs=1e-6
    )
    state = np.broadcast_to(start, z[..., 0, :].shape)
    for t in range(8):
        assert z[..., t, :] == pytest.approx(state, abs=1e-12)
        columns = [torch.as_tensor(e[..., k]) for k in (0, 1)]
        state = NormalForm.step(torch.as_tensor(state.copy()), columns).numpy()
    weight = fit.model.read_out.weight[:6].detach().numpy()
    assert found["rates"].values == pytest.approx(
        z @ weight.T + fit.model.read_out.bias[:6].detach().numpy(), abs=1e-6
    )
    assert found["decoded"].values == pytest.approx(found["rates"].values[..., :2] + 1.0)
    assert found["time"].values == pytest.approx(np.arange(8) * WIDTH)
    bare = pm.analysis.interpolate(fit, np.array([0.5, 2.0]), size=1, plane=(1, 0))
    assert "rates" not in bare and bare["latents"].values[0, 0, 0, 0].tolist() == [0.0, 0.0]
    named = pm.analysis.interpolate(
        fit, np.array([0.5, 2.0]), size=5, spacing=0.5, plane=(1, 0), recording="b", initial=start
    )
    assert named["embedding"].values[0, 0, 4] == pytest.approx([-0.5, 3.0], abs=1e-6)
    line = pm.analysis.interpolate(fit_of(Linear, {"x": (0.0,)}, latent_dim=3), "x", num_bins=1, num_draws=0)
    assert line["latents"].shape == (1, 1, 3, 1, 3)


def test_grids_that_are_none():
    fit = fit_of(NormalForm, {"a": (0.5, 2.0), "b": (0.5, 4.0)})
    for options, message in (
        ({"size": 2}, "odd size"),
        ({"plane": (0, 2)}, "plane of two of the 2 embedding dimensions"),
        ({"plane": (1, 1)}, "plane of two"),
        ({"initial": np.zeros(3)}, r"first state \(2,\), got shape \(3,\)"),
        ({"recording": "c"}, "got 'c'"),
        ({"decoder": lambda y: y[0]}, "needed a decoder from"),
        ({"num_bins": 0}, "num_bins"),
        *(({"spacing": value}, "needed a spacing above 0") for value in (0, -1.0, np.nan, "far")),
    ):
        with pytest.raises(ValueError, match=message):
            pm.analysis.interpolate(fit, "a", num_draws=2, **options)
    with pytest.raises(ValueError, match="got several"):
        pm.analysis.interpolate(fit, ["a", "b"])
    with pytest.raises(ValueError, match="whose rates the decoder takes"):
        pm.analysis.interpolate(fit, np.zeros(2), decoder=lambda y: y)


# ---- exponents -------------------------------------------------------------------------------------------------------


def test_exponents_of_a_linear_map_are_its_eigenvalues():
    found = pm.analysis.lyapunov(
        fit_of(Linear, {"x": (0.0,)}, latent_dim=3), np.zeros(1), num_bins=300, num_starts=2
    )
    true = np.sort(np.log(np.abs(np.linalg.eigvals(Linear.matrix.numpy()))) / WIDTH)[::-1]
    # The pair turns: over 300 bins its exponents are known to the log of its eigenvectors' condition over the time.
    assert found["exponents"].values[0] == pytest.approx(true, abs=2 * np.log(3) / (300 * WIDTH))
    assert found["dimension"].item() == 0 and found["exponents"].values.sum() == pytest.approx(
        true.sum(), abs=1e-6
    )


def test_exponents_of_henon():
    fit = fit_of(Henon, {"x": (1.4, 0.3)}, initial_sd=0.1, noise=1e-4)
    found = pm.analysis.lyapunov(fit, np.array([1.4, 0.3]), num_bins=700, num_starts=48).isel(draw=0)
    first, second = found["exponents"].values * WIDTH
    assert first == pytest.approx(0.419, abs=0.01)  # Sprott (2003), Chaos and Time-Series Analysis
    assert first + second == pytest.approx(np.log(0.3), abs=1e-9)  # the determinant is -b everywhere
    assert found["dimension"].item() == pytest.approx(1 + first / abs(second))


def test_exponents_of_a_cycle():
    found = pm.analysis.lyapunov(fit_of(NormalForm, {"x": (0.5, 3.0)}), np.array([0.5, 3.0]), num_bins=200)
    assert found["exponents"].values[0] == pytest.approx([0.0, -1.0], abs=2e-3)
    assert found["dimension"].item() <= 1.01


# ---- simulated beside real -------------------------------------------------------------------------------------------


def test_the_divergence_of_normals_is_their_closed_form():
    """Kernels widen both: ``N(0, 1 + 1)`` and ``N(m, 4 + 1)`` in units of the kernel."""
    rng = np.random.default_rng(0)
    p, q = rng.normal(0, 1, (1000, 1)), rng.normal(1, 2, (1000, 1))
    true = 0.5 * (np.log(5 / 2) + (2 + 1) / 5 - 1)
    found = [activity._divergence(p, q, np.random.default_rng(k)) for k in range(10)]
    assert np.mean(found) == pytest.approx(true, abs=0.05)
    assert activity._divergence(p, p, rng) == 0


def test_paths_of_other_dynamics_diverge(fitted, monkeypatch):
    rng = np.random.default_rng(0)
    fit = fit_of(NormalForm, {"x": (0.5, 3.0), "y": (-2.0, 3.0)}, noise=0.01)
    recs = pm.Recordings(
        pm.Recording(name, rng.normal(size=(6, 60, 6)), bin_width=WIDTH) for name in ("x", "y")
    )
    e = [torch.tensor(v, dtype=torch.float64) for v in (0.5, 3.0)]
    z = torch.as_tensor(rng.normal(size=(6, 2)))
    path = [z]
    for _ in range(59):
        path.append(NormalForm.step(path[-1], e) + 0.01 * torch.as_tensor(rng.normal(size=(6, 2))))
    trials = list(torch.stack(path, 1).numpy())
    monkeypatch.setattr(activity, "trial_latents", lambda *_: trials)
    found = pm.analysis.state_divergence(fit, recs, num_draws=4)
    right, wrong = found["divergence"].sel(recording="x"), found["divergence"].sel(recording="y")
    assert right.max() < 0.5 < 2.0 < wrong.min() and found["reference"].sel(recording="x") > right.mean()
    spectra = pm.analysis.power_spectra(fit, recs, num_draws=4)
    apart = spectra["distance"]  # both oscillate at w; one of them dies out in half a second
    assert apart.sel(recording="x").max() < 0.05 < 0.1 < apart.sel(recording="y").min()
    with pytest.raises(ValueError, match="width above 0"):
        pm.analysis.state_divergence(fit, recs, width=0)


def test_spectra_are_those_of_scipy():
    x = np.random.default_rng(0).normal(size=(3, 40, 2)).cumsum(1)
    frequency, power = periodogram(x, 1 / WIDTH, np.hanning(42)[1:-1], detrend="constant", axis=1)
    assert activity._spectrum(x, WIDTH) == pytest.approx(power.mean(0), rel=1e-9)
    odd = periodogram(x[:, :39], 1 / WIDTH, np.hanning(41)[1:-1], detrend="constant", axis=1)[1]
    assert activity._spectrum(x[:, :39], WIDTH) == pytest.approx(odd.mean(0), rel=1e-9)
    assert len(frequency) == 21


def test_real_activity_beside_a_fits(fitted):
    fit, recs = fitted
    spectra = pm.analysis.power_spectra(fit, recs, num_draws=2)
    assert spectra["simulated"].dims == ("recording", "draw", "frequency", "component")
    assert spectra["frequency"].values[1] == pytest.approx(1 / (24 * 0.03))
    divergence = pm.analysis.state_divergence(fit, recs, num_draws=2)
    assert np.isfinite(divergence["divergence"]).all() and np.isfinite(divergence["reference"]).all()
    with pytest.raises(ValueError, match="at least 8 bins, got one of 5"):
        pm.analysis.power_spectra(fit, recs.crop(0, 5))


def test_shares_of_variance_are_those_of_the_predictor(fitted):
    fit, recs = fitted
    found = pm.analysis.variance_explained(fit, recs, num_draws=2)
    of_means = pm.analysis.variance_explained(fit, recs, num_draws=0).isel(draw=0)
    assert found["share"].dims == ("recording", "draw", "component")
    assert found["cumulative"].values[..., -1] == pytest.approx(1.0)
    for name in recs:
        weight = fit.model.read_out.weight[fit.model.neurons.slice(name)].detach().numpy()
        means = np.concatenate(activity.trial_latents(fit, recs, name, 0))
        draws = pm.posterior(fit, recs, num_samples=2)[name]["posterior"]["latents"].isel(chain=0)
        draws = draws.transpose("draw", "trial", "time", "latent_dim").values.reshape(2, -1, 2)
        # float32 draws, and the sums of them that float32 made
        for z, one in ((means, of_means), *((z, found.isel(draw=k)) for k, z in enumerate(draws))):
            one = one.sel(recording=name)
            x = (z - z.mean(0)) @ weight.T
            variance = np.square(np.linalg.svd(x, compute_uv=False))[:2]
            assert one["share"].values == pytest.approx(variance / variance.sum(), abs=1e-5)
            assert one["sd"].values == pytest.approx(np.sqrt(variance / x.size), rel=1e-3, abs=1e-5)
            assert one["participation"].item() == pytest.approx(
                variance.sum() ** 2 / np.square(variance).sum(), rel=1e-4
            )
            held = z.copy()
            held[:, 0] = held[:, 0].mean()
            left = np.var(held @ weight.T, axis=0).sum() / np.var(z @ weight.T, axis=0).sum()
            assert one["of_latent"].values[0] == pytest.approx(1 - left, abs=1e-5)
            component = (one["direction"].values[0] @ weight.T) / np.linalg.norm(
                one["direction"].values[0] @ weight.T
            )
            assert np.var(x @ component) == pytest.approx(variance[0] / len(x), rel=1e-4)


class BayesianReadOut(pm.models.MetaSSM):
    def __init__(self, recs, **sizes):
        super().__init__(recs, **sizes)
        shape = self.read_out.weight.shape
        self.read_out.weight = PyroSample(dist.Normal(0.0, 1.0).expand(shape).to_event(2))
        self.dims["read_out.weight"] = ("neuron_of_all", "latent_dim")


def test_a_read_out_with_a_prior_gives_each_draw_its_own_shares():
    recs = pm.simulate.limit_cycles([3.0, 4.0], num_trials=4, num_steps=16)
    model = BayesianReadOut(recs, latent_dim=2, embedding_dim=1, hidden_dim=8)
    fit = pm.fit(model, pm.guides.DKF(model, hidden_dim=6), recs, **QUICK)
    found = pm.analysis.variance_explained(fit, recs, num_draws=3)
    tree = pm.posterior(fit, recs, num_samples=3)
    weights = tree["posterior"]["read_out.weight"].values[0]
    assert np.ptp(weights, axis=0).min() > 0
    for name in recs:
        own = weights[:, fit.model.neurons.slice(name)]
        latents = tree[name]["posterior"]["latents"].isel(chain=0)
        draws = latents.transpose("draw", "trial", "time", "latent_dim").values.reshape(3, -1, 2)
        for k, (z, weight) in enumerate(zip(draws, own, strict=True)):
            variance = np.square(np.linalg.svd((z - z.mean(0)) @ weight.T, compute_uv=False))[:2]
            share = found["share"].sel(recording=name).values[k]
            assert share == pytest.approx(variance / variance.sum(), abs=1e-5)
