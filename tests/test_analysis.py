"""What is said about dynamics, beside maps of which it is known; models and input that it is not said of."""

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from fits import QUICK, parts
from known_maps import WIDTH, Duffing, Known, Linear, NormalForm, fit_of
from pyro.nn import PyroSample

import pyro_metassm as pm
from pyro_metassm.analysis._region import Region

# ---- flow -----------------------------------------------------------------------------------------------------------


def test_the_flow_is_the_maps():
    fit = fit_of(NormalForm, {"x": (0.5, 3.0)}, sd=0.05)
    field = pm.analysis.flow_field(
        fit, "x", grid=(np.linspace(-1, 1, 5), np.linspace(-2, 2, 7)), num_draws=20
    )
    assert dict(field["displacement"].sizes) == {"draw": 20, "y": 7, "x": 5, "axis": 2}
    z = torch.tensor([[0.5, -2.0]], dtype=torch.float64)
    place = field.isel(x=3, y=0)
    one = pm.analysis.flow_field(
        fit, np.array([0.5, 3.0]), grid=(np.linspace(-1, 1, 5), np.linspace(-2, 2, 7))
    )
    e = [torch.tensor(v, dtype=torch.float64) for v in (0.5, 3.0)]
    true = (NormalForm.step(z, e) - z)[0].numpy()
    assert one["displacement"].isel(x=3, y=0, draw=0).values == pytest.approx(true, abs=1e-12)
    assert one["speed"].isel(x=3, y=0).item() == pytest.approx(np.linalg.norm(true) / WIDTH, rel=1e-12)
    # To first order in the embedding's sd, over both of its dimensions.
    change = [(NormalForm.step(z, [e[0] + a, e[1] + b]) - NormalForm.step(z, e))[0].numpy() for a, b in
              ((0.05, 0), (0, 0.05))]  # fmt: skip
    expected = np.sqrt(np.square(change).sum(0))
    # Of 20 draws: 4 standard errors.
    assert place["displacement_sd"].values == pytest.approx(expected, rel=0.6)
    assert place["speed_mean"].item() == pytest.approx(place["speed"].mean().item())
    wide = pm.analysis.flow_field(
        fit, "x", grid=(np.linspace(-9, 9, 25), np.linspace(-9, 9, 25)), num_draws=0
    )
    assert wide["visited"][12, 12] and not wide["visited"][0].any() and wide["density"][0].max() < 1e-6
    assert field["density"].max() == 1 and bool(field["visited"][3, 2])


def test_a_plane_of_principal_axes_is_a_turned_plane_of_latents():
    fit = fit_of(Linear, {"x": (0.0,)}, latent_dim=3)
    grid = (np.linspace(-1, 1, 3), np.linspace(-1, 1, 4))
    field = pm.analysis.flow_field(fit, "x", grid=grid, plane=(0, 2), principal=True, num_draws=0)
    axes, center = field["axes"].values, field["center"].values
    assert axes @ axes.T == pytest.approx(np.eye(2), abs=1e-12) and axes @ center == pytest.approx(
        [0, 0], abs=1e-12
    )
    z = center + np.stack(np.meshgrid(*grid), -1) @ axes
    change = z @ Linear.matrix.numpy().T - z
    assert field["displacement"].values[0] == pytest.approx(change @ axes.T, abs=1e-12)
    assert field["speed"].values[0] == pytest.approx(np.linalg.norm(change, axis=-1) / WIDTH)
    plain = pm.analysis.flow_field(fit, "x", plane=(2, 0), num_draws=0)
    assert plain["axes"].values.tolist() == [[0, 0, 1], [1, 0, 0]] and plain["center"].values[
        [0, 2]
    ].tolist() == [0, 0]


def test_density_is_that_of_scipy():
    from scipy.stats import gaussian_kde

    from pyro_metassm.analysis.flow import _density

    states = np.random.default_rng(0).multivariate_normal([1, 2], [[2, 0.6], [0.6, 1]], 300)
    points = np.stack(np.meshgrid(np.linspace(-2, 4, 7), np.linspace(0, 4, 5)), -1)
    true = gaussian_kde(states.T)(points.reshape(-1, 2).T).reshape(5, 7)
    # Scott's width of SciPy is of the covariance over n - 1.
    assert _density(states, points) == pytest.approx(true / true.max(), abs=5e-3)


def test_visited_states_are_those_of_the_data_where_they_are_given():
    model, guide = parts(recs := pm.simulate.limit_cycles([3.0, 4.0], num_trials=4, num_steps=20))
    fit = pm.fit(model, guide, recs, **QUICK)
    one = pm.analysis.flow_field(fit, "w=3", num_draws=0, recs=recs)
    tree = pm.posterior(fit, recs, num_samples=50)
    z = tree["w=3/posterior"]["latents"].mean(("chain", "draw")).values.reshape(-1, 2)
    low, high = np.quantile(z, [0.005, 0.995], axis=0)
    spread = tree["w=3/posterior"]["latents"].std(("chain", "draw")).max().item()
    ends = np.array([[one["x_value"][0], one["y_value"][0]], [one["x_value"][-1], one["y_value"][-1]]])
    margin = 0.1 * (high - low)
    assert ends == pytest.approx(np.stack([low - margin, high + margin]), abs=4 * spread)
    everywhere = pm.analysis.flow_field(fit, np.zeros(1), recs=recs)  # no recording's: all of them
    assert np.isfinite(everywhere["speed"]).all()
    with pytest.raises(ValueError, match=r"needed recording 'w=3' in recs, got w=4"):
        pm.analysis.flow_field(fit, "w=3", recs=recs.select(["w=4"]))


def test_a_region_knows_its_axes():
    rng = np.random.default_rng(0)
    z = rng.normal(size=(4000, 3)) * [3.0, 1.0, 0.1] @ np.linalg.qr(rng.normal(size=(3, 3)))[0] + 5.0
    region = Region.of(z)
    assert region.sd == pytest.approx([3.0, 1.0, 0.1], rel=0.05)
    assert region.scale == pytest.approx(np.sqrt(np.var(z, axis=0).sum()))
    assert region.contains(z).all() and not region.contains(z.mean(0) + 20 * region.axes[2] * region.sd[2])
    assert region.nearest(z[:5]).tolist() == [0] * 5
    few = Region.of(z[:2])  # fewer states than latents
    assert few.axes @ few.axes.T == pytest.approx(np.eye(3), abs=1e-9)


# ---- global sites, other models, bad input ---------------------------------------------------------------------------


def test_draws_of_a_global_site_go_with_those_of_the_embedding():
    class Scaled(Duffing):
        def __init__(self, recordings, **options):
            super().__init__(recordings, **options)
            self.shift = PyroSample(dist.Normal(0.0, 1.0).expand([1]).to_event(1))

        def transition(self, z, dynamics):
            return dist.Normal(dynamics(z) + 0.001 * self.shift.unsqueeze(-2), self.process_noise()).to_event(
                1
            )

    fit = fit_of(Scaled, {"x": (-1.0, 1.0)}, sd=1e-6)
    with torch.no_grad():
        fit.guide.global_sites.loc["shift"].fill_(3.0)
        fit.guide.global_sites.log_scale["shift"].fill_(np.log(0.5))
    found = pm.analysis.fixed_points(fit, "x", num_draws=40, num_starts=8)
    # z2 = -shift / dt in a fixed point: near Normal(-0.06, 0.01^2), to second order in dt.
    z2 = found["position"].isel(fixed_point=0, latent_dim=1).values
    assert z2.mean() == pytest.approx(-0.06, abs=5 * 0.01 / np.sqrt(40)) and z2.std() == pytest.approx(
        0.01, rel=0.5
    )
    middle = pm.analysis.fixed_points(fit, "x", num_draws=0)
    assert middle["position"].values[0, 0, 1] == pytest.approx(-0.06, rel=0.1)


def test_a_single_embedding_has_the_draws_of_the_global_sites():
    recs = pm.simulate.limit_cycles([3.0, 4.0], num_trials=4, num_steps=20)
    model, guide = parts(recs)
    plain = pm.fit(model, guide, recs, **QUICK)
    fit = pm.revise(plain, recs, num_trials=4, num_rounds=1)
    e = np.zeros(fit.model.embedding_dim)
    found = pm.analysis.flow_field(fit, e, grid=3, num_draws=5, recs=recs)
    assert found.sizes["draw"] == 5 and np.ptp(found["displacement"].values, axis=0).max() > 0
    # The same draws of the last layer as beside five equal draws of the embedding.
    same = pm.analysis.flow_field(fit, np.tile(e, (5, 1)), grid=3, num_draws=5, recs=recs)
    np.testing.assert_array_equal(found["displacement"], same["displacement"])
    assert pm.analysis.flow_field(fit, e, grid=3, num_draws=0, recs=recs).sizes["draw"] == 1
    assert pm.analysis.flow_field(plain, e, grid=3, num_draws=5, recs=recs).sizes["draw"] == 1
    along = pm.analysis.bifurcation(fit, 0, num_points=3, num_draws=4, recs=recs, with_cycles=False)
    assert along.sizes["draw"] == 4 and np.ptp(along["embedding"].values, axis=0).max() == 0


def test_dynamics_of_a_fit_are_those_that_its_paths_follow():
    """A learned model, in C and in float64: what is iterated is the mean of its transition."""
    model, guide = parts(recs := pm.simulate.limit_cycles([3.0, 4.0], num_trials=4, num_steps=20))
    fit = pm.fit(model, guide, recs, **QUICK)
    found = pm.analysis.fixed_points(fit, "w=4", num_draws=3)
    field = pm.analysis.flow_field(
        fit, "w=4", num_draws=0, grid=(np.array([0.3, 0.4]), np.array([-0.2, 0.5]))
    )
    loc = fit.statistics[1, :1].reshape(1, 1, 1)
    with torch.no_grad():
        z = torch.tensor([0.4, 0.5]).reshape(1, 1, 1, 2)
        mean = fit.model.transition(z, fit.model.adapt_dynamics(loc)).mean - z
    assert field["displacement"].values[0, 1, 1] == pytest.approx(mean.flatten().numpy(), abs=1e-5)
    for draw in range(3):
        for point in found["position"].values[draw]:
            if np.isfinite(point).all():
                assert np.isfinite(point).all()


def test_recordings_with_dynamics_of_their_own_go_by_name():
    recs = pm.simulate.limit_cycles([3.0, 4.0], num_trials=4, num_steps=20)
    model = pm.models.SingleSession(recs, latent_dim=2, embedding_dim=1, hidden_dim=8)
    fit = pm.fit(model, pm.guides.DKF(model, hidden_dim=6), recs, **QUICK)
    both = pm.analysis.flow_field(fit, ["w=3", "w=4"], grid=(np.arange(3.0), np.arange(3.0)), num_draws=2)
    assert float(abs(both["displacement"][0] - both["displacement"][1]).max()) > 0
    assert float(both["speed_sd"].max()) == 0
    assert pm.analysis.limit_cycles(fit, "w=3", num_draws=2, num_bins=20).sizes["draw"] == 2
    with pytest.raises(ValueError, match="needed a recording's name, got an embedding"):
        pm.analysis.flow_field(fit, np.zeros(1))


def test_bad_input_is_named():
    fit = fit_of(NormalForm, {"x": (0.5, 3.0)})
    for call in (pm.analysis.flow_field, pm.analysis.fixed_points, pm.analysis.limit_cycles):
        for at, message in (
            ("y", "needed one of the recordings x that the fit knows, got 'y'"),
            (["x", "y"], "got 'y'"),
            (np.zeros(3), r"embedding \(2,\), draws of it \(draw, 2\) or points .* got shape \(3,\)"),
            (np.zeros((2, 2, 2, 2)), r"got shape \(2, 2, 2, 2\)"),
            (np.array([0.0, np.nan]), "needed finite embeddings"),
            ([], "needed a recording's name"),
            (None, "got None"),
            (np.zeros(2) + 1j, "needed a recording's name"),
        ):
            with pytest.raises(ValueError, match=message):
                call(fit, at)
        with pytest.raises(ValueError, match="num_draws: needed an integer of at least 0"):
            call(fit, "x", num_draws=-1)
        with pytest.raises(ValueError, match="seed: needed an integer of at least 0"):
            call(fit, "x", seed=-1)
        with pytest.raises(ValueError, match=r"needed recs as pm.Recordings\(\[...\]\), got list"):
            call(fit, "x", recs=[])
    for plane in ((0, 2), (0, 0), (0,), (0, 1.0), "xy"):
        with pytest.raises(ValueError, match=r"needed (a plane of two of the 2|two different) latents"):
            pm.analysis.flow_field(fit, "x", plane=plane)
    beyond = np.array([0.0, np.inf])
    for grid in (
        (np.arange(3.0),), (np.arange(3.0), np.zeros(3)), (np.arange(3.0), beyond), "fine", np.zeros((3, 3, 2))
    ):  # fmt: skip
        with pytest.raises(ValueError, match="needed a grid as a number of points"):
            pm.analysis.flow_field(fit, "x", grid=grid)
    with pytest.raises(ValueError, match="grid: needed an integer of at least 2"):
        pm.analysis.flow_field(fit, "x", grid=1)
    for call in (
        pm.analysis.embedding_map,
        pm.analysis.state_divergence,
        pm.analysis.power_spectra,
        pm.analysis.variance_explained,
    ):
        with pytest.raises(ValueError, match="needed recs as"):
            call(fit, "x")
    fit.attrs.clear()
    with pytest.raises(ValueError, match="needed the bin width"):
        pm.analysis.flow_field(fit, "x")
    fit.statistics[0] = torch.nan
    with pytest.raises(ValueError, match="whose embedding it has not inferred"):
        pm.analysis.flow_field(fit, "x")


class Heavy(NormalForm):
    def transition(self, z, dynamics):
        return dist.Cauchy(dynamics(z), 0.1).to_event(1)


class Meanless(NormalForm):
    def transition(self, z, dynamics):
        flow = dist.transforms.affine_autoregressive(2)
        return dist.TransformedDistribution(dist.Normal(dynamics(z), 0.1).to_event(1), [flow])


class Driven(NormalForm):
    def transition(self, z, dynamics, inputs):
        return dist.Normal(dynamics(z) + inputs, 0.1).to_event(1)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Heavy, "needed a transition with a mean.*one that is not finite from Heavy.transition"),
        (Meanless, "needed a transition with a mean.*got none"),
        (Driven, "needed autonomous dynamics, got Driven, whose transition reads inputs"),
    ],
)
def test_a_model_without_a_noise_free_part_is_refused(kind, message):
    fit = fit_of(kind, {"x": (0.5, 3.0)})
    for call in (pm.analysis.flow_field, pm.analysis.fixed_points, pm.analysis.limit_cycles):
        with pytest.raises(ValueError, match=message):
            call(fit, "x")


def test_paths_that_explode_are_said_so():
    class Explodes(Known):
        @staticmethod
        def step(z, e):
            return z * torch.nan + e[0].unsqueeze(-1)

    with pytest.raises(ValueError, match="needed"):
        pm.analysis.fixed_points(fit_of(Explodes, {"x": (0.0,)}), "x")


def test_a_single_latent_has_no_cycle():
    class Line(Known):
        @staticmethod
        def step(z, e):
            return 0.5 * z + 0.0 * e[0].unsqueeze(-1)

    fit = fit_of(Line, {"x": (0.0,)}, latent_dim=1)
    assert pm.analysis.fixed_points(fit, "x", num_draws=2)["position"].values == pytest.approx(
        np.zeros((2, 1, 1))
    )
    with pytest.raises(ValueError, match="two latents or more"):
        pm.analysis.limit_cycles(fit, "x")
