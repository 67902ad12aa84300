"""Sites of all recordings: one count in the ELBO, and where their priors live."""

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from edits_page import DOUBLE, SIZES, batch_of, edits, made
from fits import QUICK
from pyro import poutine
from pyro.nn import PyroSample
from torch.distributions import kl_divergence

import pyro_metassm as pm
from pyro_metassm.elbo import SequentialELBO
from pyro_metassm.global_sites import GlobalPosterior, Program

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
