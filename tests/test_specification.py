"""What a fit and its data say of themselves: all that decides the numbers, and nothing else."""

import json

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from problems import recordings

import pyro_metassm as pm
from pyro_metassm import specification
from pyro_metassm.recordings import Recording, Recordings
from pyro_metassm.trainer import Options


def data(**changed) -> Recordings:
    """Two recordings with everything that a fit reads, one thing of the first changed."""
    rng = np.random.default_rng(0)
    fields = {
        "observations": rng.poisson(2.0, (4, 6, 3)) * 1.0,
        "bin_width": 0.02,
        "inputs": rng.normal(size=(4, 6, 2)),
        "condition": ["x", "y", "x", "y"],
        "neuron_ids": ["u", "v", "w"],
        "mask": np.ones((4, 6), bool),
        "held_out_neurons": [0],
        "lengths": np.array([6, 6, 6, 5]),
    }
    fields["mask"][3, 5] = False
    other = Recording("b", fields["observations"], bin_width=0.02, inputs=fields["inputs"])
    return Recordings([Recording("a", **(fields | changed)), other])


class Inputs(pm.models.MetaSSM):
    """A user's model, with a number of its own."""

    gain = 0.5

    def transition(self, z, dynamics, inputs):
        return dist.Normal(
            dynamics(z) + self.gain * inputs.mean(-1, keepdim=True), self.process_noise()
        ).to_event(1)


def told(recs=None, *, change=None, options=None, seed=0, validation=None, every=1, **more) -> dict:
    recs = data() if recs is None else recs
    torch.manual_seed(seed)
    model = Inputs(recs, latent_dim=2, embedding_dim=1, hidden_dim=5, **more)
    guide = pm.guides.DKF(model, hidden_dim=4)
    if change is not None:
        change(model, guide)
    options = {"num_steps": 6, "trials_per_step": 2, "recordings_per_step": None, "learning_rate": 0.01,
               "warm_start": True, "warm_start_steps": 4, "clip_norm": 1.0, "update_penalty": 0.0,
               "seed": 0} | (options or {})  # fmt: skip
    return json.loads(
        json.dumps(specification.specification(model, guide, recs, Options(**options), validation, every))
    )


def test_a_specification_is_the_same_for_the_same_fit_whatever_the_random_start():
    assert told() == told(seed=1)
    assert told(every=1) == told(every=2)  # nothing is validated


def test_what_is_at_its_default_is_left_out_so_that_a_later_option_ends_no_run():
    found = told()
    assert found["model.config"].keys() == {"latent_dim", "embedding_dim", "hidden_dim"}
    assert found["guide.config"].keys() == {
        "read_in_dim",
        "hidden_dim",
    }  # the former is worked out from the model
    assert "neuron_dropout" not in found["guide.attributes"]
    assert told(rank=2)["model.config"]["rank"] == 2


CHANGES = {
    "recordings.a": [
        {"recs": data(observations=np.ones((4, 6, 3)))},
        {"recs": data(bin_width=0.02 * (1 + 1e-7))},
        {"recs": data(inputs=np.ones((4, 6, 2)))},
        {"recs": data(condition=["x", "y", "x", "x"])},
        {"recs": data(condition=None)},
        {"recs": data(neuron_ids=["u", "v", "z"])},
        {"recs": data(held_out_neurons=[1])},
        {"recs": data(lengths=np.array([6, 6, 6, 6]))},
        {"recs": data(mask=np.arange(24).reshape(4, 6) % 23 > 0)},
    ],
    "order of recordings": [{"recs": data().select(["b", "a"])}],
    "options": [{"options": {"seed": 1}}, {"options": {"warm_start_steps": 5}}],
    "validation": [{"validation": data()}],
    "model.config": [{"likelihood": pm.likelihoods.Poisson}, {"rank": 2}],
    "model.fixed.process_noise": [{"change": lambda m, g: m.process_noise.requires_grad_(False)}],
    "model.attributes": [{"change": lambda m, g: setattr(m, "gain", 0.25)}],
    "guide.attributes": [{"change": lambda m, g: setattr(g, "rollout_probability", 0.125)}],
    "guide.fixed.smoothing": [{"change": lambda m, g: g.smoothing.fill_(1.5)}],
    "guide.trained": [{"change": lambda m, g: (m.double(), g.double())}],
}


@pytest.mark.parametrize(
    ("where", "other"), [(where, other) for where, others in CHANGES.items() for other in others]
)
def test_a_specification_has_everything_that_decides_the_numbers(where, other):
    assert where in specification.differences(told(**other), told(), limit=99)


def test_validation_is_part_of_a_specification():
    one = {"validation": data(), "every": 2}
    assert told(**one) == told(**one) != told(**(one | {"every": 3}))
    assert told(**one) != told(validation=data(condition=None), every=2)


def test_values_that_are_frozen_count_and_those_that_are_trained_do_not():
    def frozen(value):
        def change(model, guide):
            with torch.no_grad():
                model.process_noise.log_scale.fill_(value)
            model.process_noise.requires_grad_(False)

        return change

    assert told(change=frozen(0.5)) == told(change=frozen(0.5), seed=2) != told(change=frozen(0.25))


def test_a_class_of_the_user_counts_with_its_source(tmp_path, monkeypatch):
    """An edited hook is another model; a comment is not."""
    monkeypatch.syspath_prepend(tmp_path)
    recs, found = recordings(), []
    text = "import pyro_metassm as pm\nclass Mine(pm.models.MetaSSM):\n    def initial_state(self, e):\n"
    bodies = {"same": "return super().initial_state(e)", "comment": "# mine\n        return super().initial_state( e )",
              "edited": "return super().initial_state(2 * e)"}  # fmt: skip
    for name, body in bodies.items():
        (tmp_path / f"mine_{name}.py").write_text(f"{text}        {body}\n")
        cls = __import__(f"mine_{name}").Mine
        model = cls(recs, latent_dim=2, embedding_dim=1)
        found.append(specification._sources(model)[f"mine_{name}.Mine"])
    assert found[0] == found[1] != found[2] and None not in found
    namespace: dict = {}
    exec(
        "import pyro_metassm as pm\nclass Prompt(pm.models.MetaSSM): pass",
        namespace | {"__name__": "nowhere"},
        namespace,
    )
    assert specification._source(namespace["Prompt"]) is None
