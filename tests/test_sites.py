"""What a model and a guide do not have in common is said in words, before a fit; a model is told as text."""

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_metassm as pm

SIZES = {"latent_dim": 2, "embedding_dim": 1, "hidden_dim": 4}


@pytest.fixture(scope="module")
def recs():
    return pm.simulate.limit_cycles([2.5, 5.0], num_trials=4, num_steps=12, num_neurons=(5, 7), seed=0)


def dkf(model, kind=pm.guides.DKF):
    return kind(model, hidden_dim=4)


class WithScale(pm.models.MetaSSM):
    """A model with a latent site more."""

    def forward(self, batch):
        pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        return super().forward(batch)


def sampling(name, distribution):
    class Guide(pm.guides.DKF):
        def forward(self, batch):
            pyro.sample(name, distribution)
            return super().forward(batch)

    return Guide


class Wide(pm.models.MetaSSM):
    """An embedding prior that is one size larger than the model says."""

    def embedding_prior(self):
        return dist.Normal(torch.zeros(self.embedding_dim + 1), 1.0).to_event(1)


class Positive(pm.models.MetaSSM):
    def embedding_prior(self):
        return dist.LogNormal(torch.zeros(self.embedding_dim), 1.0).to_event(1)


class Broken(pm.models.MetaSSM):
    def transition(self, z, dynamics):
        raise ZeroDivisionError("by nothing")


class ByTrial(pm.models.MetaSSM):
    """The embedding drawn for every trial, which the guide does not."""

    def forward(self, batch):
        with self.recording_plate(batch), self.trial_plate(batch):
            e = pyro.sample("embedding", self.embedding_prior())
            z = pyro.sample("latents", self.path_prior(e, batch))
            predictor = self.read_out(z, batch.recording, batch.width)
            y = self.likelihood(predictor, batch.recording)
            pyro.sample("observations", y.mask(batch.mask).to_event(2), obs=batch.observations)
        return predictor


@pytest.mark.parametrize("kind", [pm.models.MetaSSM, pm.models.SingleSession])
def test_nothing_is_said_where_all_is_well(recs, kind):
    model = kind(recs, **SIZES)
    guide = dkf(model)
    before = {k: v.clone() for k, v in guide.state_dict().items()}
    torch.manual_seed(3)
    assert pm.guides.check(model, guide, recs) == []
    drawn = torch.rand(())
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(()))  # nobody's random numbers were used
    assert all(torch.equal(v, before[k]) for k, v in guide.state_dict().items())


@pytest.mark.parametrize(
    ("model", "guide", "said"),
    [
        (WithScale, pm.guides.DKF, ["the guide lacks the model's latent site(s) ['scale']"]),
        (pm.models.MetaSSM, sampling("scale", dist.Normal(0.0, 1.0)), ["samples ['scale'], which the model"]),
        (WithScale, sampling("scale", dist.LogNormal(0.0, 1.0)), []),
        (WithScale, sampling("scale", dist.Normal(-9.0, 0.1)), ["'scale'", "LogNormal excludes"]),
        (WithScale, sampling("scale", dist.LogNormal(torch.zeros(3), 1.0)), ["one batch shape", "(3,)"]),
        (
            WithScale,
            sampling("scale", dist.LogNormal(torch.zeros(3), 1.0).to_event(1)),
            ["one event shape", "() and (3,)"],
        ),
        (Broken, pm.guides.DKF, ["stops with an error", "ZeroDivisionError: by nothing"]),
        (ByTrial, pm.guides.DKF, ["'embedding'", "same plates", "['recording', 'trial']"]),
    ],
)
def test_what_does_not_match_is_named(recs, model, guide, said):
    model = model(recs, **SIZES)
    guide = dkf(model, guide)
    found = pm.guides.check(model, guide, recs)
    assert len(found) == bool(said) or "batch shape" in found[0]
    assert all(part in found[0] for part in said)
    options = {"num_steps": 1, "warm_start": False, "progress": False}
    if said:  # a fit says the same, before its first step
        with pytest.raises(ValueError) as error:
            pm.fit(model, guide, recs, **options)
        assert found[0] in str(error.value)
    else:
        pm.fit(model, guide, recs, **options)


def test_an_embedding_of_another_size_is_told(recs):
    model = Wide(recs, **SIZES)
    (found,) = pm.guides.check(model, dkf(model), recs)
    assert found.startswith("Wide.embedding_prior: needed a Distribution with event shape (1,)")
    assert "got event shape (2,) and batch shape ()" in found


def test_values_outside_the_prior_are_told(recs):
    torch.manual_seed(0)
    model = Positive(recs, **SIZES)
    found = [text for _ in range(8) for text in pm.guides.check(model, dkf(model), recs)]
    assert any("'embedding'" in text and "LogNormal excludes" in text for text in found)


def test_recordings_that_the_model_does_not_know(recs):
    model = pm.models.MetaSSM(recs, **SIZES)
    others = pm.simulate.limit_cycles([1.0], num_trials=2, num_steps=12, seed=1)
    (found,) = pm.guides.check(model, dkf(model), others)
    assert "do not go with the model" in found and "w=1" in found


# ---- the model as text ------------------------------------------------------------------------------------


def lines(text):
    return [" ".join(line.split()) for line in text.splitlines()]


def test_a_model_is_told_as_text(recs):
    model = pm.models.MetaSSM(recs, **SIZES, likelihood=pm.likelihoods.Gaussian)
    text = lines(model.describe())
    neurons = sum(r.num_neurons for r in recs.values())
    assert text[0].startswith("MetaSSM of 2 recordings with") and "rank 1" in text[0]
    assert "embedding Normal recording embedding_dim 1" in text
    assert "latents MarkovPath recording, trial time, latent_dim 2" in text
    assert "observations Normal (observed) recording, trial time, neuron" in text
    assert f"read_out {3 * neurons} each neuron" in text
    assert f"observation {neurons} each neuron" in text
    assert "process_noise 2 all together" in text
    assert text[-1] == f"in all {sum(p.numel() for p in model.parameters()):,}"


def test_a_joint_distribution_shows_as_what_it_is(recs):
    text = lines(pm.models.MetaSSM(recs, **SIZES, likelihood=pm.likelihoods.LowRankGaussian).describe())
    assert "observations LowRankMultivariateNormal (observed) recording, trial time, neuron" in text


def test_edits_show(recs):
    class Edited(WithScale):
        def transition(self, z, dynamics):
            return dist.StudentT(4.0, dynamics(z), self.process_noise()).to_event(1)

    text = lines(Edited(recs, **SIZES).describe())
    assert "scale LogNormal none a number" in text
    assert "next StudentT" in text and "first Normal" in text


def test_dynamics_of_recordings_show(recs):
    assert any(
        line.startswith("dynamics") and line.endswith("each recording")
        for line in lines(pm.models.SingleSession(recs, **SIZES).describe())
    )


def test_a_model_that_cannot_be_built_again_is_told_without_owners(recs):
    class Own(pm.models.MetaSSM):
        def __init__(self, recordings, *, needed, **options):
            super().__init__(recordings, **options)

    text = lines(Own(recs, needed=1, **SIZES).describe())
    assert "parameters numbers" in text and not any("each neuron" in line for line in text)
