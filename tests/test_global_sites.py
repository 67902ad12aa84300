"""Sites of all recordings and the edits of docs/edits.md: densities by hand, one count in the ELBO, the same draws."""

import ast
import copy
import dataclasses
import re
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from fits import QUICK
from problems import recordings
from pyro import poutine
from pyro.nn import PyroSample
from scipy import stats
from torch.distributions import kl_divergence

import pyro_metassm as pm
from pyro_metassm.distributions import MarkovPath, RolloutPath
from pyro_metassm.elbo import SequentialELBO
from pyro_metassm.global_sites import GlobalPosterior, Program
from pyro_metassm.observations import counted

DOUBLE = torch.float64
SIZES = {"latent_dim": 2, "embedding_dim": 2, "hidden_dim": 5}
PAGE = Path(__file__).parents[1] / "docs" / "edits.md"


def classes_of_the_page() -> SimpleNamespace:
    """What docs/edits.md defines, without what it does with it."""
    code = "\n".join(re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL))
    kept = [
        node for node in ast.parse(code).body if isinstance(node, ast.ClassDef | ast.Import | ast.ImportFrom)
    ]
    namespace: dict = {"__name__": __name__}
    exec(compile(ast.Module(kept, []), "edits.md", "exec"), namespace)
    return SimpleNamespace(**namespace)


edits = classes_of_the_page()
MORE = {"ByCondition": {"conditions": ["go", "stop"]}, "Driven": {"input_dim": 2}}
WITH_SITES = ["Horseshoe", "BySubject", "ByCondition", "HeavyTails", "BayesianReadOut"]


@pytest.fixture(scope="module")
def recs() -> pm.Recordings:
    return pm.Recordings(
        pm.Recording(
            name,
            r.observations,
            bin_width=r.bin_width,
            lengths=r.lengths,
            condition=["stop", "go", "go", "stop"][: r.num_trials],
            attrs={"subject": "ada" if name == "b" else "bob"},
        )
        for name, r in recordings().items()
    )


@pytest.fixture(scope="module")
def driven() -> pm.Recordings:
    rng = np.random.default_rng(1)
    return pm.Recordings(
        pm.Recording(n, r.observations, bin_width=r.bin_width, lengths=r.lengths,
                     inputs=rng.normal(size=(r.num_trials, r.num_bins, 2)))
        for n, r in recordings().items()
    )  # fmt: skip


def made(name: str, recs, dtype=DOUBLE, seed: int = 0):
    """A model of the page and its guide, every parameter moved from where it starts."""
    torch.manual_seed(seed)
    model = getattr(edits, name)(recs, **SIZES, **MORE.get(name, {}))
    guide = pm.guides.DKF(model, hidden_dim=4)
    guide.read_in.start(recs)
    with torch.no_grad():
        for parameter in (*model.parameters(), *guide.parameters()):
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.to(dtype).eval(), guide.to(dtype).eval()


def batch_of(model, recs, **choice):
    return recs.batch(model.names, dtype=DOUBLE, **choice)


def nodes(model, guide, batch) -> dict:
    """The sites of the model at a draw of the guide."""
    with torch.no_grad():
        trace = poutine.trace(guide).get_trace(batch)
        return poutine.trace(poutine.replay(model, trace=trace)).get_trace(batch).nodes


def numbers(site) -> tuple[np.ndarray, np.ndarray]:
    """The value of a site and its log density."""
    return site["value"].numpy(), site["fn"].log_prob(site["value"]).numpy()


# ---- densities of the page's edits, by hand -------------------------------------------------------------------


def test_horseshoe(recs):
    model, guide = made("Horseshoe", recs)
    sites = nodes(model, guide, batch_of(model, recs))
    tau, log_tau = numbers(sites["tau"])
    local, log_local = numbers(sites["local"])
    e, log_e = numbers(sites["embedding"])
    assert np.allclose(log_tau, stats.halfcauchy.logpdf(tau, scale=0.5).sum())
    assert np.allclose(log_local, stats.halfcauchy.logpdf(local).sum())
    assert np.allclose(log_e, stats.norm.logpdf(e, scale=tau * local).sum(-1)) and log_e.shape == (3, 1)


def test_recordings_of_one_subject_share_a_centre(recs):
    model, guide = made("BySubject", recs)
    choice = {"names": ["c", "b"]}  # another order than the model's rows, and not all
    sites = nodes(model, guide, batch_of(model, recs, **choice))
    center, log_center = numbers(sites["center"])
    spread, log_spread = numbers(sites["spread"])
    e, log_e = numbers(sites["embedding"])
    assert np.allclose(log_center, stats.norm.logpdf(center).sum())
    assert np.allclose(log_spread, stats.halfnorm.logpdf(spread, scale=0.5).sum())
    bob, ada = 1, 0  # c and b; subjects in alphabetical order
    expected = [stats.norm.logpdf(e[row, 0], center[s], spread).sum() for row, s in enumerate((bob, ada))]
    assert np.allclose(log_e[:, 0], expected)


def test_trials_of_a_condition_share_an_embedding(recs):
    model, guide = made("ByCondition", recs)
    plain = pm.models.MetaSSM(recs, **SIZES).double()
    plain.load_state_dict(model.state_dict())
    batch = batch_of(model, recs, names=["b", "a"], trials={"a": [2, 0]})
    sites = nodes(model, guide, batch)
    e, z, offset = (sites[name]["value"] for name in ("embedding", "latents", "offset"))
    density = sites["latents"]["fn"].log_prob(z)
    for row, name in enumerate(("b", "a")):
        for k, trial in enumerate((0, 1) if name == "b" else (2, 0)):
            code = ("go", "stop").index(recs[name].condition[trial])
            own = (e + offset[model.names.index(name), code]).clone()
            expected = plain.path_prior(own, batch).log_prob(z)[row, k]
            assert torch.allclose(density[row, k], expected, rtol=1e-10)
    log_offset = numbers(sites["offset"])[1]
    assert np.allclose(log_offset, stats.norm.logpdf(offset.numpy(), scale=0.3).sum())


def scales(name: str, model, sites) -> torch.Tensor:
    """Standard deviations, or Student's scales, of every step ``(R, K, T - 1, d)``, as the equations have them."""
    noise = model.process_noise.log_scale.exp()
    z, e = sites["latents"]["value"][..., :-1, :], sites["embedding"]["value"]
    if name == "NoiseOfRecording":
        rows = [noise * model.log_factor[row].exp() for row in range(len(z))]
        return torch.stack(rows)[:, None, None].expand(z.shape)
    if name == "NoiseOfEmbedding":
        return (noise * torch.tanh(e @ model.log_factor.weight.mT).exp()).unsqueeze(-2).expand(z.shape)
    if name == "NoiseOfState":
        return noise * torch.tanh(z @ model.log_factor.weight.mT).exp()
    return noise.expand(z.shape)


@pytest.mark.parametrize("name", ["NoiseOfRecording", "NoiseOfEmbedding", "NoiseOfState", "HeavyTails"])
@torch.no_grad()
def test_noise_of_the_transition(recs, name):
    model, guide = made(name, recs)
    batch = batch_of(model, recs)
    sites = nodes(model, guide, batch)
    z, e = sites["latents"]["value"], sites["embedding"]["value"]
    mean, scale = (x.numpy() for x in (model.dynamics(e)(z[..., :-1, :]), scales(name, model, sites)))
    after = z[..., 1:, :].numpy()
    if name == "HeavyTails":
        steps = stats.t.logpdf(after, 2.0 + sites["tails"]["value"].numpy(), mean, scale)
    else:
        steps = stats.norm.logpdf(after, mean, scale)
    first = stats.norm.logpdf(z[..., 0, :].numpy(), model.initial.loc.numpy(), model.initial.scale.numpy())
    exists = batch.time_mask.numpy()
    expected = first.sum(-1) * exists[..., 0] + (steps.sum(-1) * exists[..., 1:]).sum(-1)
    assert np.allclose(numbers(sites["latents"])[1], expected, rtol=1e-10)


@torch.no_grad()
def test_the_first_state_of_an_embedding(recs):
    model, _ = made("EmbeddedStart", recs)
    e = torch.randn(3, 1, 2, dtype=DOUBLE)
    p = model.initial_state(e)
    assert torch.allclose(p.mean, model.initial.loc + e @ model.shift.weight.mT, rtol=1e-12)


@torch.no_grad()
def test_inputs_drive_the_bin_that_they_are_in(driven):
    model, guide = made("Driven", driven)
    batch = batch_of(model, driven)
    sites = nodes(model, guide, batch)
    z, e = sites["latents"]["value"], sites["embedding"]["value"]
    f, noise = model.dynamics(e), model.process_noise.log_scale.exp()
    density = sites["latents"]["fn"].log_prob(z)
    first = dist.Normal(model.initial.loc, model.initial.scale)
    for r, name in enumerate(model.names):
        for k, length in enumerate(driven[name].lengths):
            u = torch.tensor(driven[name].inputs[k])
            total = first.log_prob(z[r, k, 0]).sum()
            for t in range(1, length):
                mean = f(z[:, :, t - 1 : t])[r, k, 0] + model.drive.weight @ u[t]
                total = total + dist.Normal(mean, noise).log_prob(z[r, k, t]).sum()
            assert torch.allclose(density[r, k], total, rtol=1e-9)


@torch.no_grad()
def test_bayesian_read_outs(recs):
    model, guide = made("BayesianReadOut", recs)
    batch = batch_of(model, recs)
    sites = nodes(model, guide, batch)
    weight, log_weight = numbers(sites["read_out.weight"])
    assert np.allclose(log_weight, stats.norm.logpdf(weight).sum())
    for r, name in enumerate(model.names):
        rows = model.neurons.slice(name)
        expected = sites["latents"]["value"][r].numpy() @ weight[rows].T + model.read_out.bias[rows].numpy()
        predictor = sites["_RETURN"]["value"][r, ..., : recs[name].num_neurons].numpy()
        assert np.allclose(predictor, expected, rtol=1e-9)


@torch.no_grad()
def test_linear_and_gated_dynamics(recs):
    e, z = torch.randn(3, 1, 2, dtype=DOUBLE), torch.randn(3, 4, 5, 2, dtype=DOUBLE)
    linear = made("Linear", recs)[0].dynamics
    ((u, v),) = linear.hypernetwork(e)
    matrix = torch.eye(2) + linear.layer.weight + v[:, 0] @ u[:, 0].mT
    expected = torch.einsum("rij,rktj->rkti", matrix, z) + linear.layer.bias
    assert torch.allclose(linear(e)(z), expected, rtol=1e-10)
    powers = [expected[:, :, :1]]
    for _ in range(2):
        powers.append(torch.einsum("rij,rktj->rkti", matrix, powers[-1]) + linear.layer.bias)
    assert torch.allclose(linear(e).rollout(z[:, :, :1], 3), torch.cat(powers, -2), rtol=1e-10)
    assert torch.allclose(linear(e).update_norm(), ((v @ u.mT) ** 2).sum((-1, -2)).mean())

    gated = made("Gated", recs)[0].dynamics
    weights = [u @ v.mT for u, v in gated.hypernetwork(e)]
    s = torch.nn.functional.silu

    def layer(x, linear, update=0.0):
        return torch.matmul(x, linear.weight.mT + update) + linear.bias

    hidden = s(layer(s(layer(z, gated.candidate[0], weights[0])), gated.candidate[1], weights[1]))
    h = z + layer(hidden, gated.candidate[2])
    g = torch.sigmoid(layer(s(layer(z, gated.gate[0], weights[2])), gated.gate[1]))
    assert torch.allclose(gated(e)(z), (1 - g) * z + g * h, rtol=1e-10)
    norms = sum((w**2).sum((-1, -2)).mean() for w in weights)
    assert torch.allclose(gated(e).update_norm(), norms)


# ---- the ELBO ---------------------------------------------------------------------------------------------------


def terms(model, guide, batch):
    with torch.no_grad():
        return SequentialELBO().terms(model, guide, batch)


def test_a_global_site_counts_once_in_every_sub_sample(recs):
    model, guide = made("BySubject", recs)
    q = guide.global_sites.distribution("center").base_dist
    by_hand = (0.5 * (q.scale**2 + q.loc**2 - 1) - q.scale.log()).sum().detach()  # KL from Normal(0, 1)
    choices = [{}, {"names": ["b"]}, {"names": ["a", "c"], "trials": {"a": [1], "c": [0, 3]}}]
    for choice in choices:
        found = terms(model, guide, batch_of(model, recs, **choice))
        assert torch.allclose(found.kl["center"], by_hand, rtol=1e-12)
        assert torch.allclose(found.elbo, found.log_likelihood - sum(found.kl.values()))
    # All recordings' terms at the same draws: those of sub-samples of one average to the whole.
    names = model.names
    draws = guide.global_sites()
    e, z = (torch.randn(3, *shape, 2, dtype=DOUBLE) for shape in ((1,), (4, 9)))

    def at(rows: list[int]) -> torch.Tensor:
        batch = batch_of(model, recs, names=[names[row] for row in rows])
        shape = (batch.num_trials, batch.num_bins)
        trace = poutine.Trace()
        for name, value in {
            **draws,
            "embedding": e[rows],
            "latents": z[rows][:, : shape[0], : shape[1]],
        }.items():
            trace.add_node(name, name=name, type="sample", is_observed=False, value=value, infer={})
        found = terms(model, poutine.replay(guide, trace=trace), batch)
        return found.elbo + found.kl["center"] + found.kl["spread"]

    assert torch.allclose(torch.stack([at([row]) for row in range(3)]).mean(), at([0, 1, 2]), rtol=1e-10)


def test_the_divergence_of_a_log_normal_is_analytic_and_of_others_sampled():
    class Sites(Program):
        def __init__(self):
            super().__init__()
            self.positive = PyroSample(dist.LogNormal(torch.tensor([0.3, -1.0]), 0.5).to_event(1))
            self.share = PyroSample(dist.Dirichlet(torch.ones(3)))
            self.chance = PyroSample(dist.Beta(2.0, 3.0))
            self.above = PyroSample(lambda self: dist.Normal(self.chance, 1.0))

    torch.manual_seed(0)
    model = Sites()
    posterior = GlobalPosterior(model)
    q, p = posterior.distribution("positive"), dist.LogNormal(torch.tensor([0.3, -1.0]), 0.5).to_event(1)
    loc = posterior.loc["positive"]
    by_hand = (
        (0.1**2 + (loc - torch.tensor([0.3, -1.0])) ** 2) / (2 * 0.5**2) - 0.5 - np.log(0.1 / 0.5)
    ).sum()
    assert torch.allclose(kl_divergence(q, p), by_hand)
    drawn = posterior()
    assert {k: tuple(v.shape) for k, v in drawn.items()} == {
        "positive": (2,),
        "share": (3,),
        "chance": (),
        "above": (),
    }
    assert torch.allclose(drawn["share"].sum(), torch.tensor(1.0)) and 0 < drawn["chance"] < 1
    assert posterior.distribution("share").event_shape == (3,)
    # A density of a mapped Normal: change of variables, by hand for the probability.
    x = drawn["chance"].detach()
    u, scale = torch.logit(x), 0.1
    log_q = dist.Normal(posterior.loc["chance"], scale).log_prob(u) - (x * (1 - x)).log()
    assert torch.allclose(posterior.distribution("chance").log_prob(x), log_q, rtol=1e-4)


def test_gradients_vanish_at_the_best_mean_field_posterior():
    r"""``c ~ N(0, 1)``, ``e_i ~ N(c, s^2)``, ``y_i ~ N(e_i, v^2)``: Gaussian, with precision ``L``.

    The best mean-field Normal has the exact means and variances ``1 / L_jj`` (Bishop, 2006, 10.1.2).
    """
    s, v, y = 0.8, 0.6, torch.tensor([1.3, -0.4, 0.9, 2.0], dtype=DOUBLE)
    num = len(y)
    precision = torch.diag(
        torch.cat([torch.tensor([1 + num / s**2]), torch.full((num,), s**-2 + v**-2)])
    ).double()
    precision[0, 1:] = precision[1:, 0] = -(s**-2)
    mean = torch.linalg.solve(precision, torch.cat([torch.zeros(1), y / v**2]).double())
    sd = precision.diagonal().rsqrt()

    class Hierarchy(Program):
        def __init__(self):
            super().__init__()
            self.center = PyroSample(dist.Normal(torch.zeros(1, dtype=DOUBLE), 1.0).to_event(1))

        def forward(self):
            self.global_sites()
            with pyro.plate("recording", num, dim=-2):
                e = pyro.sample("embedding", dist.Normal(self.center, s).to_event(1))
                pyro.sample("y", dist.Normal(e, v).to_event(1), obs=y[:, None, None])

    model = Hierarchy()
    posterior = GlobalPosterior(model).double()
    e_loc, e_scale = (torch.nn.Parameter(x[1:, None, None].clone()) for x in (mean, sd.log()))
    with torch.no_grad():
        posterior.loc["center"].copy_(mean[:1]), posterior.log_scale["center"].copy_(sd[:1].log())

    def guide():
        posterior()
        with pyro.plate("recording", num, dim=-2):
            pyro.sample("embedding", dist.Normal(e_loc, e_scale.exp()).to_event(1))

    parameters = [posterior.loc["center"], posterior.log_scale["center"], e_loc, e_scale]

    def gradients(draws: int) -> torch.Tensor:
        rows = []
        for _ in range(draws):
            grads = torch.autograd.grad(SequentialELBO().terms(model, guide).elbo, parameters)
            rows.append(torch.cat([g.flatten() for g in grads]))
        return torch.stack(rows)

    torch.manual_seed(0)
    found = gradients(300)
    error = found.std(0) / len(found) ** 0.5
    assert (found.mean(0).abs() <= 4 * error + 1e-12).all()
    with torch.no_grad():
        posterior.loc["center"].add_(0.5)  # and nowhere else
    moved = gradients(30)
    assert moved[:, 0].mean() < -5 * (moved[:, 0].std() / 30**0.5)


# ---- draws ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fits(recs, driven) -> dict[str, pm.Fit]:
    """By name of the edit; two of them start from the data."""
    found = {}
    for name in [*WITH_SITES, "Driven"]:
        data = driven if name == "Driven" else recs
        torch.manual_seed(0)
        model = getattr(edits, name)(data, **SIZES, **MORE.get(name, {}))
        options = QUICK | {"warm_start": name in ("BySubject", "Driven"), "recordings_per_step": 2}
        found[name] = pm.fit(model, pm.guides.DKF(model, hidden_dim=4), data, **options)
    return found


@pytest.mark.parametrize("name", WITH_SITES)
def test_the_tree_has_the_global_sites(fits, recs, name):
    fit = fits[name]
    tree = pm.posterior(fit, recs, num_samples=5, chunk_size=1)
    ahead = pm.forecast(fit, recs.select(["b"]), context=3, horizon=2, num_samples=5)
    prior = pm.prior_predictive(fit.model, recs, num_samples=5)
    sites = set(fit.guide.global_sites.transforms)
    for group in (tree["posterior"], prior["prior"]):
        assert set(group.data_vars) == {"embedding"} | sites
        assert all(np.isfinite(group[site]).all() for site in sites)
    for site in sites:  # the same draws, whatever recordings are looked at
        dims = tree["posterior"][site].dims
        assert dims[2:] == fit.model.dims.get(site, (f"{site}_dim_0",))
        there = tree["posterior"][site]
        there = there.sel(recording=["b"]) if "recording" in dims else there
        assert np.array_equal(ahead["posterior"][site], there)
        q = fit.guide.global_sites.distribution(site)
        value = torch.tensor(tree["posterior"][site].values[0])
        assert q.log_prob(value).isfinite().all() and value.std(0).min() > 0  # draws differ
    if name == "BySubject":
        assert list(tree["posterior"]["center"].coords["subject"]) == ["ada", "bob"]
        theirs = tree["posterior"].coords["recording_subject"]
        assert theirs.dims == ("recording",) and theirs.values.tolist() == ["bob", "ada", "bob"]


def test_arviz_reads_the_hyper_parameters(fits, recs, tmp_path):
    import arviz

    tree = pm.posterior(fits["BySubject"], recs, num_samples=4)
    rows = arviz.summary(pm.to_arviz(tree), var_names=["center"], kind="stats").index
    assert [str(row) for row in rows] == [
        "center[ada, 0]",
        "center[ada, 1]",
        "center[bob, 0]",
        "center[bob, 1]",
    ]
    tree = pm.posterior(fits["BayesianReadOut"], recs, num_samples=2)
    tree.to_netcdf(tmp_path / "tree.nc")
    with xr.open_datatree(tmp_path / "tree.nc") as read:
        assert np.array_equal(read["posterior"]["read_out.weight"], tree["posterior"]["read_out.weight"])


def test_rates_are_those_of_the_same_draw(fits, recs):
    """Rates are latents times the read-out of the same draw: in a posterior in chunks, and in a forecast."""
    fit = fits["BayesianReadOut"]
    weight = pm.posterior(fit, recs, num_samples=4)["posterior"]["read_out.weight"].values[0]
    for tree, group in (
        (pm.posterior(fit, recs, num_samples=4, chunk_size=2), "posterior"),
        (pm.forecast(fit, recs, context=2, horizon=2, num_samples=4), "predictions"),
    ):
        for name in fit.names:
            rows, part = fit.model.neurons.slice(name), tree[name][group]
            bias = fit.model.read_out.bias[rows].detach().numpy()
            expected = np.einsum("sktd,snd->sktn", part["latents"].values[0], weight[:, rows]) + bias
            assert np.allclose(part["rates"].values[0], expected, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_forecasts_read_the_inputs_of_their_bins(fits, driven):
    fit = fits["Driven"]
    model = copy.deepcopy(fit.model)
    model.dynamics_of = lambda e, recording: lambda z: 0.5 * z  # a linear system: what an input adds is known
    with torch.no_grad():
        model.drive.weight.copy_(torch.tensor([[1.0, 0.0], [2.0, -1.0]]))
    fit = dataclasses.replace(fit, model=model, guide=copy.deepcopy(fit.guide))
    fit.guide._model = (model,)
    r, change = driven["c"], np.array([0.7, -0.2])
    inputs = r.inputs.copy()
    inputs[1, 2] += change  # trial 1, the first bin to be forecast
    inputs[2, 4] += change
    more = pm.Recordings(
        [pm.Recording("c", r.observations, bin_width=r.bin_width, lengths=r.lengths, inputs=inputs)]
    )
    options = {"context": 2, "horizon": 7, "num_samples": 3}
    with pytest.warns(UserWarning, match="recording 'c': the inputs of 4 of 4 trials end before bin 9"):
        one, other = (
            pm.forecast(fit, data, **options)["c/predictions"]["latents"]
            for data in (driven.select(["c"]), more)
        )
    difference = (other - one).values[0]
    step = np.array([[1.0, 0.0], [2.0, -1.0]]) @ change
    for row, first in ((0, 9), (1, 0), (2, 2), (3, 9)):
        for ahead in range(7):
            expected = 0.5 ** (ahead - first) * step if ahead >= first else np.zeros(2)
            assert np.allclose(difference[:, row, ahead], expected, atol=1e-5), (row, ahead)


def test_roll_outs_of_the_guide_read_the_inputs_of_their_bins():
    torch.manual_seed(0)
    u, loc = torch.randn(2, 3, 9, 1, dtype=DOUBLE), torch.randn(2, 3, 9, 2, dtype=DOUBLE)
    initial = dist.Normal(torch.zeros(2, dtype=DOUBLE), 1.0).to_event(1)

    def transition(z, inputs):
        return dist.Normal(0.9 * z + inputs * torch.tensor([1.0, -2.0]), 1e-9).to_event(1)

    prior = MarkovPath(initial.expand([2, 3]), transition, 9, None, u)
    for share in (0.3, 0.8, 1.0):
        rollout = torch.rand(2, 3, 9) < share
        z = RolloutPath(loc, torch.full_like(loc, 1e-9), prior, rollout).rsample()
        rollout[..., 0] = False
        previous = torch.cat([loc[..., :1, :], z[..., :-1, :]], -2)
        expected = torch.where(rollout.unsqueeze(-1), 0.9 * previous + u * torch.tensor([1.0, -2.0]), loc)
        assert torch.allclose(z, expected, atol=1e-6)
    drawn = prior.sample()
    expected = 0.9 * drawn[..., :-1, :] + u[..., 1:, :] * torch.tensor([1.0, -2.0])
    assert torch.allclose(drawn[..., 1:, :], expected, atol=1e-6)


# ---- what is done with a fit ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*WITH_SITES, "Driven"])
def test_fits_are_saved_with_their_global_sites(fits, recs, driven, name, tmp_path):
    fit, data = fits[name], driven if name == "Driven" else recs
    fit.save(tmp_path)
    again = pm.load(tmp_path, custom=[type(fit.model)])
    one, other = (pm.posterior(f, data, num_samples=2) for f in (fit, again))
    assert one["posterior"].to_dataset().equals(other["posterior"].to_dataset())
    assert one["b/posterior"].to_dataset().equals(other["b/posterior"].to_dataset())


ADAPT = {"num_steps": 2, "num_starts": 4, "search_steps": 4, "progress": False}


@pytest.mark.parametrize("name", ["Horseshoe", "HeavyTails"])
def test_new_recordings_leave_shared_sites_as_they_are(recs, name):
    old = recs.drop(["b"])
    model = getattr(edits, name)(old, **SIZES)
    fit = pm.fit(model, pm.guides.DKF(model, hidden_dim=4), old, warm_start=False, **QUICK)
    adapted = pm.adapt(fit, recs.select(["b"]), **ADAPT)
    one, other = (f.guide.global_sites.state_dict() for f in (fit, adapted))
    assert all(torch.equal(one[key], other[key]) for key in one | other)
    tree = pm.forecast(adapted, recs, context=2, horizon=2, num_samples=2)
    assert np.isfinite(tree["b/predictions"]["rates"]).all()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("ByCondition", "got offset with rows for recordings or neurons"),
        ("BayesianReadOut", "got read_out.weight with rows for recordings or neurons"),
        ("BySubject", "needed a model that can be made for other recordings"),
    ],
)
def test_what_new_recordings_cannot_be_given_is_said(fits, recs, name, said):
    r = recs["b"]
    new = pm.Recordings([pm.Recording("new", r.observations, bin_width=r.bin_width, lengths=r.lengths)])
    with pytest.raises(ValueError, match=f"adapt: .*{said}"):
        pm.adapt(fits[name], new, **ADAPT)


def test_fits_with_global_sites_are_compared(fits, recs):
    table = pm.compare(
        {name: fits[name] for name in ("Horseshoe", "HeavyTails")}, recs, context=2, horizon=2, num_samples=4
    )
    assert np.isfinite(table[("elbo", "mean")]).all()


class DrawnDispersion(pm.models.MetaSSM):
    def __init__(self, recordings, **options):
        super().__init__(recordings, **options)
        self.count = PyroSample(dist.LogNormal(1.0, 0.5).expand([1]).to_event(1))

    def likelihood(self, predictor, recording):
        return dist.NegativeBinomial(self.count.unsqueeze(-2), logits=predictor)


def test_what_a_model_counts_leaves_the_random_state_alone():
    """Its likelihood is called outside of the program, where it draws the site that it reads."""
    recs = recordings(counts=True)
    torch.manual_seed(0)
    model = DrawnDispersion(recs, **SIZES)
    random = torch.get_rng_state()
    assert all(counted(model, name).all() for name in recs)
    assert torch.equal(torch.get_rng_state(), random)


# ---- the start, and where priors live ---------------------------------------------------------------------------


def test_sites_are_parameters_while_a_model_starts(recs):
    model, guide = made("BySubject", recs)
    posterior, before = guide.global_sites, set(dict(model.named_parameters()))
    medians = {name: value.detach().clone() for name, value in posterior.medians().items()}
    with posterior.as_parameters(model):
        assert set(dict(model.named_parameters())) - before == {"center", "spread"}
        assert torch.equal(model.center, medians["center"])
        assert model.center.requires_grad and not model.spread.requires_grad  # bounded: it stays
        with torch.no_grad():
            model.center.add_(1.0)
    assert set(dict(model.named_parameters())) == before
    assert torch.equal(posterior.medians()["center"], medians["center"] + 1)
    assert torch.allclose(posterior.medians()["spread"], medians["spread"])
    assert set(model.global_sites()) == {"center", "spread"}


def test_the_start_reaches_the_posterior_of_the_read_outs():
    """The start of a model with Bayesian read-outs is the plain model's, where that has parameters."""
    recs = pm.simulate.limit_cycles([3.0, 5.0], num_trials=4, num_steps=30, num_neurons=(6, 8))
    weights = []
    for kind in (pm.models.MetaSSM, edits.BayesianReadOut):
        torch.manual_seed(0)
        model = kind(recs, **SIZES)
        fit = pm.fit(model, pm.guides.DKF(model, hidden_dim=4), recs, **(QUICK | {"num_steps": 0}))
        plain = kind is pm.models.MetaSSM
        weights.append(
            fit.model.read_out.weight if plain else fit.guide.global_sites.medians()["read_out.weight"]
        )
    assert torch.allclose(*weights, rtol=1e-4, atol=1e-4)


def test_given_values_are_seen_by_hooks_and_by_nobody_after(recs):
    model, _ = made("Horseshoe", recs, dtype=torch.float32)
    values = {"tau": torch.tensor([3.0]), "local": torch.tensor([1.0, 2.0]), "unknown": torch.ones(1)}
    with model.given(values):
        assert torch.equal(model.embedding_prior().stddev, torch.tensor([3.0, 6.0]))
        with model.given({"tau": torch.tensor([1.0])}):
            assert torch.equal(model.embedding_prior().stddev, torch.tensor([1.0, 2.0]))
        assert torch.equal(model.embedding_prior().stddev, torch.tensor([3.0, 6.0]))
    torch.manual_seed(0)
    assert len({float(model.tau) for _ in range(4)}) == 4  # the prior's again


def test_priors_move_with_the_model(recs):
    model, _ = made("BySubject", recs, dtype=DOUBLE)
    assert {value.dtype for value in model.global_sites().values()} == {DOUBLE}
    for name in ("StudentPrior", "MixturePrior"):  # made for a CPU
        elsewhere = made(name, recs)[0].to("meta")
        with dist.validation_enabled(False):  # a device without numbers
            prior = elsewhere.embedding_prior_of(torch.arange(3, device="meta"))
            assert prior.log_prob(torch.zeros(3, 1, 2, device="meta")).device.type == "meta"


def test_rows_of_a_table():
    table, index = torch.randn(6, 1, 1, 4, 3, 2), (torch.tensor([[3], [0]]), torch.tensor([[0, 1], [2, 2]]))
    many = Program.rows(table, *index)
    assert many.shape == (6, 2, 2, 2)
    for s in range(6):
        assert torch.equal(many[s], Program.rows(table[s, 0, 0], *index))
        assert torch.equal(many[s, 1, 0], table[s, 0, 0, 0, 2])


# ---- errors ---------------------------------------------------------------------------------------------------


def model_with(**hooks):
    return type("Edited", (pm.models.MetaSSM,), hooks)


def with_site(prior, **hooks):
    def __init__(self, recordings, **options):
        pm.models.MetaSSM.__init__(self, recordings, **options)
        self.site = PyroSample(prior)

    return model_with(__init__=__init__, **hooks)


@pytest.mark.parametrize(
    ("hooks", "needed", "came"),
    [
        ({"embedding_prior": lambda self: dist.Normal(torch.zeros(2), 1.0)},
         "Edited.embedding_prior: needed a Distribution with event shape (2,)", "batch shape (2,); use .to_event(1)"),
        ({"embedding_prior": lambda self: torch.zeros(2)}, "Edited.embedding_prior", "got Tensor"),
        ({"initial_state": lambda self, e: dist.Normal(e.sum(), 1.0)},
         "Edited.initial_state: needed a Distribution with event shape (2,)", "got event shape ()"),
        ({"transition": lambda self, z, dynamics: dist.Normal(dynamics(z), 1.0)},
         "Edited.transition: needed a Distribution with event shape (2,) and batch shape (3, 1,", "use .to_event(1)"),
        ({"transition": lambda self, z, dynamics: dist.Normal(dynamics(z)[..., :1], 1.0).to_event(1)},
         "Edited.transition: needed", "got event shape (1,)"),
        ({"transition": lambda self, z, dynamics: dist.Normal(dynamics(z).mean(-2), 1.0).to_event(1)},
         "Edited.transition: needed", "and batch shape (3, 1)"),
        ({"likelihood": lambda self, predictor, recording: dist.Normal(predictor, 1.0).to_event(2)},
         "Edited.likelihood: needed a Distribution with event shape (5,)", "got event shape (7, 5)"),
        ({"likelihood": lambda self, predictor, recording: dist.Normal(predictor[..., :2], 1.0)},
         "Edited.likelihood: needed", "batch shape (3, 1, 7, 2)"),
        ({"initial_state": lambda self, e: e.nothing()}, "Edited.initial_state stops with an error", "AttributeError"),
    ],
)  # fmt: skip
def test_a_hook_of_another_shape_is_named(recs, hooks, needed, came):
    model = model_with(**hooks)(recs, **SIZES)
    guide = pm.guides.DKF(model, hidden_dim=4)
    (found,) = pm.guides.check(model, guide, recs)
    assert needed in found and came in found
    with pytest.raises(ValueError, match=re.escape(needed)):
        pm.fit(model, guide, recs, **QUICK)


@pytest.mark.parametrize("hook", ["transition", "embedding_prior_of"])
def test_a_hook_that_takes_one_draw_alone_is_told(recs, hook):
    """Scales of states without ``unsqueeze``, rows of a table without ``rows``: right in training, not in draws."""

    def transition(self, z, dynamics):
        return dist.Normal(dynamics(z), self.site.exp()).to_event(1)

    def embedding_prior_of(self, recording):
        return dist.Normal(self.site[recording].unsqueeze(-2), 1.0).to_event(1)

    size = [2] if hook == "transition" else [3, 2]
    prior = dist.Normal(0.0, 1.0).expand(size).to_event(len(size))
    model = with_site(prior, **{hook: transition if hook == "transition" else embedding_prior_of})(
        recs, **SIZES
    )
    (found,) = pm.guides.check(model, pm.guides.DKF(model, hidden_dim=4), recs)
    assert "draws of the global sites at once" in found and "self.rows(table, index)" in found
    assert f"Edited.{hook.removesuffix('_of')}" in found


def test_sites_that_have_no_automatic_posterior(recs):
    for prior, said in [
        (
            dist.Normal(torch.zeros(3), 1.0),
            r"'site': needed a prior without a batch shape.*use \.to_event\(1\)",
        ),
        (dist.Poisson(3.0), "'site': needed a prior over numbers that a Normal can be mapped onto"),
    ]:
        with pytest.raises(ValueError, match=said):
            pm.guides.DKF(with_site(prior)(recs, **SIZES))
    model = pm.models.MetaSSM(recs, **SIZES)
    guide = pm.guides.DKF(model, hidden_dim=4)
    model.site = PyroSample(dist.Normal(0.0, 1.0))  # after the guide was made
    (found,) = pm.guides.check(model, guide, recs)
    assert "lacks the model's latent site(s) ['site']" in found and "before the guide is made" in found


def test_conditions_and_inputs_that_are_not_there(recs, driven):
    model = edits.ByCondition(recs, conditions=["go"], **SIZES)
    (found,) = pm.guides.check(model, pm.guides.DKF(model, hidden_dim=4), recs)
    assert "recording 'a': needed trials of the conditions go, got stop" in found
    with pytest.raises(ValueError, match="recording 'a': needed trials of the conditions go, got none"):
        model.trial_embedding(torch.zeros(3, 1, 2), driven.batch(model.names))
    model = edits.Driven(recs, input_dim=2, **SIZES)
    (found,) = pm.guides.check(model, pm.guides.DKF(model, hidden_dim=4), recs)
    assert "Driven.transition: needed recordings with inputs, got a, b, c without" in found


def test_names_of_dims_must_fit(fits, recs):
    fit = dataclasses.replace(fits["Horseshoe"], model=copy.deepcopy(fits["Horseshoe"].model))
    for dims, said in [
        (("embedding_dim", "more"), "a name for each dimension"),
        (("recording",), r"got recording \(3\)"),
    ]:
        fit.model.dims["local"] = dims
        with pytest.raises(ValueError, match=said):
            pm.posterior(fit, recs, num_samples=2)


@pytest.mark.slow
def test_inputs_that_drive_the_latents_improve_forecasts():
    """Damped rotations kicked by pulses: who knows the pulses of the forecast bins forecasts better."""
    rng, found = np.random.default_rng(0), []
    for turn in (0.25, 0.4, 0.55):
        step = 0.97 * np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
        u = (rng.random((24, 40, 1)) < 0.15) * rng.choice([-1.0, 1.0], (24, 40, 1))
        z = rng.normal(size=(24, 40, 2))
        for t in range(1, 40):
            z[:, t] = z[:, t - 1] @ step.T + u[:, t] * [1.0, 0.0] + 0.03 * rng.normal(size=(24, 2))
        y = z @ rng.normal(size=(2, 15)) + 0.1 * rng.normal(size=(24, 40, 15))
        found.append(pm.Recording(f"{turn}", y, bin_width=0.02, inputs=u))
    train, test = pm.Recordings(found).split()
    scores = {}
    for kind, more in ((edits.Linear, {}), (edits.Driven, {"input_dim": 1})):
        torch.manual_seed(0)
        with warnings.catch_warnings():  # the linear one does not read the inputs, and says so
            warnings.simplefilter("ignore", UserWarning)
            model = kind(train, latent_dim=2, embedding_dim=1, hidden_dim=32, **more)
        guide = pm.guides.DKF(model, hidden_dim=32)
        fit = pm.fit(model, guide, train, num_steps=300, warm_start_steps=300, progress=False)
        scores[kind] = pm.metrics.forecast_r2(fit, test, context=20, horizon=10, num_samples=20)[:, -1].mean()
    assert scores[edits.Driven] > scores[edits.Linear] + 0.1
