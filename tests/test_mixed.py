"""Several families in one model: each neuron as its own family has it, through everything that is done with a fit."""

import copy
from functools import partial

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from fits import QUICK, assert_parameters
from members import LIKELIHOODS
from problems import garbage, recordings

import pyro_metassm as pm
from pyro_metassm.likelihoods import (
    Bernoulli,
    Gamma,
    Gaussian,
    LowRankGaussian,
    Mixed,
    NegativeBinomial,
    Poisson,
)
from pyro_metassm.neurons import NeuronTable, ReadIn
from pyro_metassm.observations import counted, observed
from pyro_metassm.read_outs import Units, fit_read_outs
from pyro_metassm.recordings import Recording, Recordings

DOUBLE = torch.float64
# But for the order of vectorised operations.
same = partial(torch.testing.assert_close, rtol=1e-13, atol=1e-13)
FAMILY = LIKELIHOODS["Mixed"]  # b: Gaussian; of the others "unit" Poisson, the rest Gamma
KINDS = {"a": [1, 2, 2], "b": [0] * 5, "c": [1]}


def started(recs, family=FAMILY):
    torch.manual_seed(0)
    made = family(NeuronTable.of(recs)).double()
    made.start(recs)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter))
    return made


def alone(made, recording, kind):
    """The family of some neurons of a recording, of these alone, with their parameters."""
    own = np.array(KINDS[recording.name]) == kind
    part = list(made.parts.values())[kind]
    single = type(part)(NeuronTable([recording.name], [int(own.sum())])).double()
    rows = made.neurons.slice(recording.name)
    state = {k: v[rows][torch.from_numpy(own)] for k, v in part.state_dict().items() if k != "neurons.index"}
    single.load_state_dict(state)
    return single, own


@pytest.mark.parametrize("names", [["c", "a", "b"], ["a", "c"], ["b"], ["c"]])
@pytest.mark.parametrize("draws", [(), (4,)])
def test_every_neuron_has_the_density_of_its_own_family(names, draws):
    recs = recordings(kind="mixed")
    made = started(recs)
    assert made.kinds.tolist() == [kind for name in recs for kind in KINDS[name]]
    batch = recs.select(names).batch(recs.names, dtype=DOUBLE)
    x = torch.randn(*draws, *batch.observations.shape, dtype=DOUBLE)
    y = made(x, batch.recording)
    assert y.batch_shape == x.shape and y.event_shape == ()
    trials = observed(y, batch.mask).log_prob(batch.observations)
    each = observed(y, batch.mask).y
    filled = pm.observations.in_support(each, batch.observations, batch.mask)
    density, expected = each.log_prob(filled), torch.zeros_like(trials)
    for r, name in enumerate(batch.names):
        for kind in set(KINDS[name]):
            single, own = alone(made, recs[name], kind)
            own = torch.from_numpy(np.flatnonzero(own))
            one = single(x[..., [r], :, :, :][..., own], torch.tensor([0]))
            value, mask = (v[[r]][..., own] for v in (batch.observations, batch.mask))
            filled_too = pm.observations.in_support(one, value, mask)
            theirs = one.log_prob(filled_too)
            found = density[..., [r], :, :, :][..., own]
            same(found[..., mask], theirs[..., mask])
            same(y.mean[..., [r], :, :, :][..., own], one.mean)
            same(y.variance[..., [r], :, :, :][..., own], one.variance)
            expected[..., r, :] += (theirs * mask).sum((-1, -2)).squeeze(-2)
    torch.testing.assert_close(trials, expected, rtol=1e-12, atol=1e-12)


def test_where_the_host_does_not_wait_for_a_device_it_is_the_same(monkeypatch):
    """There every family is asked about all recordings, since numbers of neurons are not read."""
    recs = recordings(kind="mixed")
    made = started(recs)
    batch = recs.batch(recs.names, dtype=DOUBLE)
    x = torch.randn(batch.observations.shape, dtype=DOUBLE)
    real = batch.mask.any(1).any(1)[:, None, None, :].expand(x.shape)
    found = []
    for _ in range(2):
        y = made(x, batch.recording)
        density = observed(y, batch.mask).log_prob(batch.observations)
        found.append((density, y.mean[real], y.discrete[real[:, 0, 0]]))
        monkeypatch.setattr(NeuronTable, "counts", lambda *args: None)
    assert all(part.rows is None for part in y.parts) and len(y.parts) == 3
    for one, other in zip(*found, strict=True):
        same(one, other)


def test_draws_are_of_the_families():
    recs = recordings(kind="mixed", missing=False)
    made = started(recs)
    batch = recs.batch(recs.names, dtype=DOUBLE)
    y = made(torch.zeros_like(batch.observations), batch.recording)
    drawn = y.sample((4000,))
    real = batch.mask.any(1).any(1)
    assert y.support.check(drawn).all() and not y.support.is_discrete
    assert not y.support.check(-drawn.abs() - 0.5)[:, 0, :, :, :3].any()  # neither counts nor positive
    assert torch.equal(
        y.discrete & real,
        torch.tensor([[True, False, False, False, False], [False] * 5, [True] + [False] * 4]),
    )
    error = (drawn.mean(0) - y.mean) / (y.variance / 4000).sqrt().clamp(min=1e-9)
    assert error[real[:, None, None, :].expand(error.shape)].abs().max() < 5.5  # of a few hundred


class Unbounded(Poisson):
    def forward(self, predictor, recording):
        return dist.Poisson(predictor.exp())


def test_gradients_are_finite_where_another_family_has_none():
    """Predictors of field potentials in microvolts, of which exp is infinite; anything where values are missing."""
    recs = recordings(kind="mixed")
    family = Mixed.of({"*": {"unit": Unbounded, "ca 1": Gaussian, "*": Gamma}})
    made = family(NeuronTable.of(recs))
    made.start(recs)
    batch = garbage(recs.batch(recs.names), -1e4)
    for level in (0.0, 1e4):
        x = torch.randn(batch.observations.shape)
        x[0, ..., 1] += level
        x.requires_grad_()
        density = observed(made(x, batch.recording), batch.mask).log_prob(batch.observations)
        density.sum().backward()
        assert density.isfinite().all() and x.grad.isfinite().all()
        assert (x.grad[~batch.mask] == 0).all() and (x.grad[batch.mask] != 0).any()
        assert all(p.grad is None or p.grad.isfinite().all() for p in made.parameters())


def test_neurons_start_by_their_own_family():
    """Each as a model of that family alone starts it; parameters and read-outs alike."""
    recs = recordings(kind="mixed", shapes={"a": (3, (30, 30)), "b": (5, (30, 20))}, missing=False)
    z = torch.randn(2, 2, 30, 2)
    models = {}
    for family in (FAMILY, Gaussian):
        torch.manual_seed(0)
        models[family] = pm.models.MetaSSM(recs, latent_dim=2, embedding_dim=1, likelihood=family)
        fit_read_outs(models[family], z, recs.batch(recs.names), torch.Generator(), num_steps=0)
    mixed, gaussian = models.values()
    rows = mixed.neurons.slice("b")  # by least squares
    torch.testing.assert_close(mixed.read_out.weight[rows], gaussian.read_out.weight[rows])
    torch.testing.assert_close(
        mixed.observation.parts["Gaussian"].log_sd[rows], gaussian.observation.log_sd[rows]
    )
    assert (mixed.read_out.weight[mixed.neurons.slice("a")] == 0).all()
    y = recs["a"].values
    expected = np.log(y.mean((0, 1)))  # but for half a count
    np.testing.assert_allclose(mixed.read_out.bias[:3].detach(), expected, atol=0.01)
    ceiling = mixed.observation.parts["Gamma"].log_ceiling[1:3]
    np.testing.assert_allclose(ceiling, np.log(2 * y.max((0, 1))[1:]), rtol=1e-6)


def test_kinds_are_scaled_apart():
    """The units of one kind change nothing: neither features of the read-in nor the size of read-outs."""
    rng = np.random.default_rng(0)
    y = np.concatenate([rng.poisson(2.0, (6, 20, 3)), rng.normal(size=(6, 20, 2))], -1)
    table, kinds = NeuronTable(["a"], [5]), torch.tensor([0, 0, 0, 1, 1])
    features = []
    for unit in (1.0, 250.0):
        recs = Recordings([Recording("a", y * [1, 1, 1, unit, unit], bin_width=0.02)])
        read_in = ReadIn(table, 4)
        read_in.start(recs, kinds)
        assert read_in.counts.tolist() == [True, True, True, False, False]
        features.append(read_in.features(recs.batch(["a"])))
    torch.testing.assert_close(*features, rtol=1e-4, atol=1e-4)
    square = features[0].square().mean((0, 1, 2))
    torch.testing.assert_close(torch.stack([square[:3].mean(), square[3:].mean()]), torch.ones(2))
    rows = torch.randn(5, 3)
    scale = torch.tensor([1.0, 1, 1, 250, 250]).unsqueeze(-1)
    one, other = (Units.of([r], [kinds], 2)(r, kinds) for r in (rows, rows * scale))
    torch.testing.assert_close(one, other)
    assert torch.equal(Units.of([rows], [kinds * 0], 1)(rows, kinds * 0), rows)  # one kind: as they are


@pytest.fixture(scope="module")
def pool():
    """Spikes in one recording, calcium in another, both in a third: of the same family of limit cycles."""
    rng = np.random.default_rng(0)
    options = {
        "num_trials": 24,
        "num_steps": 40,
        "num_neurons": 25,
        "mean_count": (0.5, 1.0),
        "noise": "poisson",
    }
    counts = pm.simulate.limit_cycles([3.0, 4.0, 5.0], **options)
    made, rates = [], {}
    for name, old in zip(("spikes 1", "calcium 1", "both"), counts.names, strict=True):
        y, rate = counts[old].values.copy(), counts.truth[old]["rates"].values
        calcium = {"spikes 1": slice(0, 0), "calcium 1": slice(0, 25), "both": slice(15, 25)}[name]
        y[..., calcium] = 20.0 * rng.gamma(4.0, rate[..., calcium] / 4.0)
        rate[..., calcium] *= 20.0
        ids = [f"{'roi' if n in range(25)[calcium] else 'unit'} {n}" for n in range(25)]
        made.append(Recording(name, y, bin_width=counts.bin_width, neuron_ids=ids))
        rates[name] = rate
    return Recordings(made), rates


POOL = Mixed.of({"spikes*": Poisson, "calcium*": Gamma, "both": {"unit*": Poisson, "roi*": Gamma}})


@pytest.fixture(scope="module")
def fit(pool):
    torch.manual_seed(0)
    model = pm.models.MetaSSM(pool[0], latent_dim=2, embedding_dim=1, hidden_dim=24, likelihood=POOL)
    options = {"num_steps": 80, "warm_start_steps": 150, "progress": False}
    return pm.fit(model, pm.guides.DKF(model, hidden_dim=16), pool[0], **options)


def test_a_fit_recovers_the_rates_of_both(fit, pool):
    """Most of the variance of the logarithms of the true rates."""
    recs, rates = pool
    for name, recording in recs.items():
        found = np.log(pm.metrics.mean_rates(fit, recs, name, num_samples=20))
        for kind in np.unique(kinds := fit.model.observation.kinds_in(recording)):
            score = pm.metrics.r2(np.log(rates[name][..., kinds == kind]), found[..., kinds == kind])
            assert score > 0.8, (name, kind, score)


def test_scores_are_of_the_neurons_that_they_are_for(fit, pool):
    recs, _ = pool
    kinds = {name: fit.model.observation.kinds_in(r) for name, r in recs.items()}
    for name in recs:
        assert np.array_equal(counted(fit.model, name), kinds[name] == 0)
    draws = {"num_samples": 5}
    rates = {name: pm.metrics.mean_rates(fit, recs, name, **draws) for name in recs}
    bits, r2 = pm.metrics.rate_bps(fit, recs, **draws), pm.metrics.reconstruction_r2(fit, recs, **draws)
    ahead = pm.metrics.fp_bps(fit, recs, context=20, **draws)
    for name, chosen in {"spikes 1": slice(0, 25), "both": slice(0, 15)}.items():
        expected = pm.metrics.bits_per_spike(rates[name][..., chosen], recs[name].values[..., chosen])
        assert float(bits.sel(recording=name)) == pytest.approx(expected)
    assert np.isnan(bits.sel(recording="calcium 1")) and np.isnan(ahead.sel(recording="calcium 1"))
    for name, chosen in {"spikes 1": slice(0, 25), "calcium 1": slice(0, 25), "both": slice(15, 25)}.items():
        expected = pm.metrics.r2(recs[name].values[..., chosen], rates[name][..., chosen])
        assert float(r2.sel(recording=name)) == pytest.approx(expected)
    table = pm.compare({"a": fit, "b": fit}, recs, num_samples=5).loc["a"]
    trials = 24 * np.array([bits.sel(recording=name) for name in ("spikes 1", "both")]).mean() / 24
    assert table["bits_per_spike", "mean"] == pytest.approx(trials, rel=1e-5)


def test_densities_and_probabilities_are_not_compared(fit, pool):
    other = copy.deepcopy(fit)
    other.model.observation.kind.fill_(1)
    with pytest.warns(UserWarning, match=r"\['a', 'b'\] \(densities\) and \['a'\] \(counts\)"):
        pm.compare({"a": fit, "b": other}, pool[0], num_samples=2)


def test_files_keep_the_families(fit, pool, tmp_path):
    """Without `custom`: by the names of the library's families."""
    fit.save(tmp_path)
    loaded = pm.load(tmp_path)
    assert_parameters(fit, loaded)
    family = loaded.model.config["likelihood"]
    assert issubclass(family, Mixed) and dict(family.families) == dict(POOL.families)
    assert [type(p) for p in loaded.model.observation.parts.values()] == [Poisson, Gamma]
    assert "Mixed(Poisson, Gamma)" in loaded.model.describe()
    draws = [
        pm.posterior(f, pool[0], num_samples=2, predictive=True, log_likelihood=True) for f in (fit, loaded)
    ]
    for name in pool[0]:
        draws[0][name].dataset.identical(draws[1][name].dataset)
        y = draws[0][f"{name}/posterior_predictive"]["observations"].values
        assert np.isfinite(y).all() and (y >= 0).all()


def test_a_new_recording_has_the_family_that_its_name_says(fit, pool):
    recs, _ = pool
    quick = {"num_steps": 4, "num_starts": 8, "search_steps": 6, "progress": False}
    new = {
        name: Recordings([Recording(name, recs[old].values[:4], bin_width=recs.bin_width)])
        for name, old in {"calcium 2": "calcium 1", "spikes 2": "spikes 1", "other": "spikes 1"}.items()
    }
    adapted = pm.adapt(pm.adapt(fit, new["calcium 2"], **quick), new["spikes 2"], **quick)
    kinds = adapted.model.observation.kinds
    assert kinds[adapted.model.neurons.slice("calcium 2")].unique().tolist() == [1]
    assert kinds[adapted.model.neurons.slice("spikes 2")].unique().tolist() == [0]
    for key, value in fit.model.observation.state_dict().items():
        if key.endswith("index"):
            continue
        assert torch.equal(adapted.model.observation.state_dict()[key][: len(value)], value)
    with pytest.raises(ValueError, match=r"recording 'other': needed a name that .*'calcium\*'.*got 'other'"):
        pm.adapt(fit, new["other"], **quick)
    told = pm.adapt(fit, new["other"], likelihood=Poisson, **quick)
    assert told.model.observation.kinds[-25:].unique().tolist() == [0]
    assert told.model.config["likelihood"].families == {**POOL.families, "other": Poisson}
    pm.forecast(told, new["other"], context=20, horizon=5, num_samples=2)
    with pytest.raises(
        ValueError, match=r"family that the fit has, Mixed\(Poisson, Gamma\), got Mixed\(.*Gaussian"
    ):
        pm.adapt(fit, new["other"], likelihood=Gaussian, **quick)


def test_a_fit_of_one_family_has_no_other(fit, pool):
    recs = recordings()
    model = pm.models.MetaSSM(recs, latent_dim=2, embedding_dim=1, hidden_dim=4)
    plain = pm.fit(model, pm.guides.DKF(model, hidden_dim=5), recs, **QUICK)
    with pytest.raises(ValueError, match="needed none for a fit of one family, Gaussian"):
        pm.adapt(plain, pool[0], likelihood=Gaussian, progress=False)


def test_a_subclass_names_its_families_too():
    class Mine(Mixed):
        families = {"*": {"unit": NegativeBinomial, "*": Gaussian}}

    recs = recordings(kind="mixed")
    model = pm.models.MetaSSM(recs, latent_dim=2, embedding_dim=1, hidden_dim=4, likelihood=Mine)
    fit = pm.fit(model, pm.guides.DKF(model, hidden_dim=5), recs, **QUICK)
    assert np.isfinite(fit.history["elbo"]).all()


class OtherPoisson(Poisson):
    pass


OtherPoisson.__name__ = "Poisson"


@pytest.mark.parametrize(
    "families, words",
    [
        ({}, "got {}"),
        (Poisson, "got <class"),
        ({"a": "poisson"}, "got 'a': 'poisson'"),
        ({"a": {}}, "got 'a': {}"),
        ({1: Poisson}, "got 1: "),
        ({"a": {"b": {"c": Poisson}}}, "got 'b': {'c'"),
        ({"a": pm.likelihoods.Likelihood}, "got 'a': "),
        ({"a": Mixed.of({"*": Poisson})}, r"got 'a': .*Mixed\(Poisson\)"),
        ({"a": LowRankGaussian}, "each neuron on its own, got LowRankGaussian"),
        ({"a": Poisson, "b": OtherPoisson}, "two called Poisson"),
    ],
)
def test_what_is_no_mapping_to_families_is_refused(families, words):
    with pytest.raises(ValueError, match=rf"Mixed: needed .*{words}"):
        Mixed.of(families)


@pytest.mark.parametrize(
    "families, ids, words",
    [
        ({"b": Poisson}, None, r"a name that .*\['b'\] matches, got 'a'; rename"),
        ({"a": {"unit*": Poisson}}, None, r"neuron_ids, by which .*\['unit\*'\], got none; pass"),
        ({"a": {"unit*": Poisson}}, ["unit 1", "lfp 1"], r"neuron_ids that .*\['unit\*'\] matches, got lfp 1; "),
        ({"*": Bernoulli}, None, "only 0 and 1 for a Bernoulli likelihood, got 3 in trial 0, bin 0, neuron 1 "),
        (
            {"a": {"u": Poisson, "v": Bernoulli}}, ["u", "v"],
            r"only 0 and 1 for a Bernoulli likelihood, got 3 in trial 0, bin 0, neuron 1 \(v\) and 2 more",
        ),
    ],
)  # fmt: skip
def test_recordings_that_do_not_go_with_the_families_are_refused(families, ids, words):
    y = np.broadcast_to([1.0, 3.0], (1, 3, 2))
    recs = Recordings([Recording("a", y, bin_width=0.02, neuron_ids=ids)])
    with pytest.raises(ValueError, match=rf"recording 'a': needed .*{words}"):
        pm.models.MetaSSM(recs, latent_dim=2, embedding_dim=1, likelihood=Mixed.of(families))


def test_exact_names_come_before_patterns_and_these_in_their_order():
    family = Mixed.of({"*": Poisson, "a*": Gamma, "ab": Gaussian, "a[1]": Bernoulli})
    made = family(NeuronTable(["x"], [1]))
    recs = [Recording(name, np.ones((1, 2, 1)), bin_width=0.02) for name in ("ab", "a[1]", "ac", "q")]
    assert [int(made.kinds_in(r)[0]) for r in recs] == [2, 3, 0, 0]
