"""What cannot be used is refused by name: the recording, the piece, what was needed, what came, what to do."""

import numpy as np
import pytest

import pyro_metassm as pm
from pyro_metassm.neurons import NeuronTable

Y = np.ones((3, 4, 2))  # trials, bins, neurons

COORDINATES = [
    ({"neuron_ids": ["x", "y", "z"]}, r"neuron_ids of shape \(2,\), got shape \(3,\)"),
    ({"neuron_ids": ["x", "x"]}, "different neuron_ids, got x more than once"),
    ({"condition": [0, 1]}, r"condition of shape \(3,\), got shape \(2,\)"),
    ({"behavior": np.ones((2, 4, 1))}, "behavior for 3 trials, got 2 trials"),
    ({"behavior": np.ones((3, 5, 1))}, "behavior with 4 bins, got 5 bins"),
    ({"behavior": np.ones((3, 4))}, r"behavior of shape \(trials, time, dims\).*, got shape \(3, 4\)"),
    ({"behavior": [np.ones((4, 1))] * 2}, "behavior for 3 trials, got 2 trials"),
    (
        {"behavior": np.ones((3, 4, 2)), "attrs": {"behavior_names": ["x"]}},
        r'attrs\["behavior_names"\] of the 2 dims of the behavior, got 1',
    ),
    ({"inputs": np.ones((2, 4, 1))}, "inputs for 3 trials, got 2 trials"),
    ({"inputs": np.ones((3, 3, 1))}, "inputs with 4 bins, got 3 bins"),
    ({"mask": np.ones((3, 5), bool)}, r"a mask of shape \(3, 4\) or \(3, 4, 2\), got shape \(3, 5\)"),
    ({"lengths": [4, 4]}, r"lengths as integers \(3,\), got .*shape \(2,\)"),
    ({"lengths": [4, 4, 9]}, "lengths from 1 to 4, got 4 to 9"),
    ({"held_out_neurons": [True]}, r"held_out_neurons as bool \(2,\).*, got .*shape \(1,\)"),
    ({"held_out_neurons": [5]}, r"held_out_neurons .* indices below 2, got .*up to 5"),
    ({"attrs": {"trials": {"side": [1, 2]}}}, r"attrs\[\"trials\"\]\['side'\] of 3 rows, got shape \(2,\)"),
]


@pytest.mark.parametrize("given, words", COORDINATES, ids=[" ".join(given) for given, _ in COORDINATES])
def test_coordinates_of_the_wrong_length(given, words):
    with pytest.raises(ValueError, match=rf"^recording 'probe': needed {words}.*; \w+"):
        pm.Recording("probe", Y, bin_width=0.02, **given)


@pytest.mark.parametrize(
    "family",
    [
        "poisson",
        None,
        dict,
        pm.likelihoods,
        pm.likelihoods.Likelihood,
        pm.likelihoods.Mixed,
        pm.likelihoods.Poisson(NeuronTable(["probe"], [2])),
    ],
    ids=str,
)
def test_what_is_no_family_of_observations(family):
    recs = pm.Recordings([pm.Recording("probe", Y, bin_width=0.02)])
    with pytest.raises(ValueError, match=r"^likelihood: needed a class of .*Poisson.*, got "):
        pm.models.MetaSSM(recs, latent_dim=1, embedding_dim=1, likelihood=family)


def test_a_likelihood_hook_of_another_event_shape():
    class Whole(pm.models.MetaSSM):
        def likelihood(self, predictor, recording):
            return super().likelihood(predictor, recording).to_event(2)

    recs = pm.Recordings([pm.Recording("probe", Y, bin_width=0.02)])
    model = Whole(recs, latent_dim=1, embedding_dim=1)
    (found,) = pm.guides.check(model, pm.guides.DKF(model), recs)
    assert "Whole.likelihood: needed a Distribution with event shape (2,)" in found
    with pytest.raises(ValueError, match=r"Whole\.likelihood: needed a Distribution with event shape"):
        pm.fit(model, pm.guides.DKF(model), recs, num_steps=1, progress=False)
