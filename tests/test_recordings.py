"""Many recordings: which go together, how they are divided, and what a batch holds."""

import dataclasses
import doctest

import numpy as np
import pytest
import torch
import xarray as xr
from made_recordings import LENGTHS, array, full, plain, same

import pyro_metassm._batch
import pyro_metassm._recording
import pyro_metassm.recordings
from pyro_metassm.recordings import Recording, Recordings, sample_trials

RNG = np.random.default_rng(0)
ONES = np.ones((3, 4, 2))


# --- many recordings ---


def many() -> Recordings:
    truth = {"b": xr.Dataset({"latents": (("trial", "time", "latent_dim"), RNG.normal(size=(5, 8, 2)))})}
    return Recordings([plain("a", 20), plain("b", 5), plain("c", 9, 7, 4)], truth=truth)


def test_recordings_are_an_ordered_mapping():
    recs = many()
    assert recs.names == tuple(recs) == ("a", "b", "c") and len(recs) == 3 and "a" in recs and "z" not in recs
    assert recs.num_trials == 34 and recs.bin_width == 0.02
    assert recs.select(["c", "a"]).names == ("c", "a") and recs.select("b").names == ("b",)
    assert recs.drop(["b"]).names == recs.drop(recs.select("b")).names == ("a", "c")
    assert list(recs.select(["b", "c"]).truth) == ["b"] and recs.drop("b").truth == {}
    assert "\n" in repr(recs)
    for call in (lambda: recs["z"], lambda: recs.select(["z"]), lambda: recs.drop(["z"])):
        with pytest.raises(KeyError, match="no recording 'z'; there are 'a', 'b', 'c'"):
            call()


def test_recordings_that_do_not_go_together_are_refused():
    with pytest.raises(ValueError, match="at least one Recording"):
        Recordings([])
    with pytest.raises(ValueError, match="at least one Recording"):
        Recordings(["a"])
    with pytest.raises(ValueError, match="recording 'a': needed one recording of a name"):
        Recordings([plain("a"), plain("b"), plain("a")])
    with pytest.raises(
        ValueError, match=r"recording 'b': needed the bin width of 'a' \(0.02 s\), got 0.01 s"
    ):
        Recordings([plain("a"), Recording("b", ONES, bin_width=0.01)])
    with pytest.raises(
        ValueError, match=r"recording 'b': needed as many dims of inputs as 'a' has \(0\), got 2"
    ):
        Recordings([plain("a"), plain("b", inputs=np.ones((6, 8, 2)))])
    with pytest.raises(ValueError, match="a truth with"):
        Recordings([plain("a")], truth={"a": xr.Dataset({"latents": ("trial", np.ones(5))})})
    with pytest.raises(KeyError, match="no recording 'z'"):
        Recordings([plain("a")], truth={"z": xr.Dataset()})


def test_split_is_by_trial_and_of_each_recording_alone():
    recs = Recordings([plain("a", 20), plain("b", 5), plain("c", 2)])
    train, test = recs.split(0.25, seed=3)
    assert [recording.num_trials for recording in test.values()] == [5, 1, 1]
    for name in recs:
        together = np.concatenate([train[name].values, test[name].values])
        order = [np.flatnonzero((recs[name].values == trial).all(axis=(1, 2)))[0] for trial in together]
        assert sorted(order) == list(range(recs[name].num_trials))
        first = train[name].num_trials
        assert order[:first] == sorted(order[:first]) and order[first:] == sorted(order[first:])
    again, alone = recs.split(0.25, seed=3), recs.select(["a"]).split(0.25, seed=3)
    for other in (again, alone):
        assert same(other[0]["a"], train["a"]) and same(other[1]["a"], test["a"])
    assert not same(recs.split(0.25, seed=4)[1]["a"], test["a"])
    assert recs.split(0.99)[0]["a"].num_trials == 1
    twin = Recordings([Recording("a2", recs["a"].values, bin_width=0.02)]).split(0.25, seed=3)[1]["a2"]
    assert not np.array_equal(twin.values, test["a"].values)  # another name, another split
    for fraction in (0, 1, -0.1, np.nan):
        with pytest.raises(ValueError, match="between 0 and 1"):
            recs.split(fraction)
    with pytest.raises(ValueError, match="recording 'one': needed at least 2 trials to split, got 1"):
        Recordings([plain("one", 1)]).split()


def test_take_trials_is_nested_and_of_each_recording_alone():
    recs = many()
    few, more = recs.take_trials(2, seed=1), recs.take_trials(4, seed=1)
    assert [recording.num_trials for recording in few.values()] == [2, 2, 2]
    for name in recs:
        within = [(more[name].values == trial).all(axis=(1, 2)).any() for trial in few[name].values]
        assert all(within)
        assert same(recs.select([name]).take_trials(2, seed=1)[name], few[name])
    assert not same(recs.take_trials(2, seed=2)["a"], few["a"])
    with pytest.raises(ValueError, match="recording 'b': needed 6 trials, got 5"):
        recs.take_trials(6)
    with pytest.raises(ValueError, match="at least 1"):
        recs.take_trials(0)


def test_the_truth_goes_along():
    values = array(5, 8, 3)
    truth = {
        "b": xr.Dataset({"rates": (("trial", "time", "neuron"), values), "read_out": ("neuron", np.ones(3))})
    }
    recs = Recordings([Recording("b", values, bin_width=0.02), plain("a")], truth=truth)
    for part in (*recs.split(0.4), recs.take_trials(2), recs.crop(2, 6), recs.take_trials(3).crop(1, None)):
        np.testing.assert_array_equal(part.truth["b"]["rates"], part["b"].values)
        assert part.truth["b"].sizes["neuron"] == 3


# --- batches ---


def test_a_batch_holds_the_chosen_trials_padded():
    recs = Recordings([full("p"), full("q", seed=1), full("r", seed=2)])
    trials = {"r": np.array([2, 0]), "p": [1]}
    batch = recs.batch(["z", "r", "q", "p"], trials=trials, names=["r", "p"], dtype=torch.float64)
    assert batch.names == ("r", "p") and batch.recording.tolist() == [1, 3] and batch.num_recordings == 3
    assert batch.observations.shape == batch.mask.shape == (2, 2, 9, 4) and batch.time_mask.shape == (2, 2, 9)
    assert batch.observations.dtype == batch.inputs.dtype == batch.trial_scale.dtype == torch.float64
    assert batch.trial_scale.tolist() == [[1.5], [3.0]] and batch.num_neurons == (4, 4)
    assert batch.held_in.tolist() == [[True, False, True, True]] * 2
    assert batch.time_mask.sum(-1).tolist() == [[7, 5], [9, 0]]
    for r, name in enumerate(batch.names):
        for k, trial in enumerate(trials[name]):
            time = recs[name].lengths[trial]
            for got, kept in (
                (batch.observations, recs[name].values),
                (batch.mask, recs[name].mask),
                (batch.inputs, recs[name].inputs),
            ):
                np.testing.assert_array_equal(got[r, k, :time], kept[trial, :time])
    exists = batch.time_mask[..., None]
    for padded in (batch.observations, batch.mask, batch.inputs):
        assert not (padded * ~exists).any()
    assert not (batch.observations * ~batch.mask).any() and batch.embedding_statistics is None


def test_a_batch_of_unequal_recordings_is_all_of_them_by_default():
    recs = Recordings([plain("a", 4, 6, 5), plain("b", 2, 9, 3)])
    batch = recs.batch(recs.names)
    assert batch.observations.shape == (2, 4, 9, 5) and batch.observations.dtype == torch.float32
    np.testing.assert_array_equal(batch.observations[0, :, :6], recs["a"].values)
    np.testing.assert_array_equal(batch.observations[1, :2, :, :3], recs["b"].values)
    assert batch.mask.sum().item() == 4 * 6 * 5 + 2 * 9 * 3
    assert batch.time_mask.sum().item() == 4 * 6 + 2 * 9
    assert batch.held_in.tolist() == [[True] * 5, [True] * 3 + [False] * 2]
    assert batch.inputs is None and batch.trial_scale.tolist() == [[1.0], [1.0]]
    moved = batch.to("meta")
    assert moved.observations.is_meta and moved.held_in.is_meta and moved.inputs is None
    assert moved.names == batch.names


def test_a_part_of_a_batch_is_the_batch_of_that_part():
    recs = Recordings([full("p"), full("q", seed=1), full("r", seed=2)])
    statistics = torch.arange(6.0).reshape(3, 2)
    batch = dataclasses.replace(recs.batch(recs.names), embedding_statistics=statistics)
    part = batch.part(slice(1, 3), slice(2), slice(5))
    few = recs.select(["q", "r"]).crop(0, 5)
    expected = few.batch(recs.names, trials={name: [0, 1] for name in few})
    for field in dataclasses.fields(batch):
        got, want = getattr(part, field.name), getattr(expected, field.name)
        if field.name == "conditions":
            assert [list(own) for own in got] == [list(own) for own in want]
        elif field.name == "embedding_statistics":
            assert torch.equal(got, statistics[1:])
        elif field.name == "trial_scale":  # what a step counts a trial for does not change
            assert torch.equal(got, batch.trial_scale[1:])
        elif isinstance(got, torch.Tensor):
            assert torch.equal(got, want), field.name
        elif field.name != "num_recordings":
            assert got == want, field.name
    assert part.num_recordings == 3
    whole = batch.part()
    assert torch.equal(whole.observations, batch.observations) and whole.conditions is not None


def test_a_batch_is_cut_to_the_longest_trial_chosen_and_is_no_view():
    recs = Recordings([Recording("x", [np.ones((time, 2)) for time in LENGTHS], bin_width=0.02)])
    batch = recs.batch(["x"], trials={"x": [0, 2]})
    assert batch.observations.shape == (1, 2, 7, 2)
    batch.observations.fill_(9)
    assert (recs["x"].values <= 1).all() and (recs.batch(["x"]).observations <= 1).all()


def test_batches_that_cannot_be():
    recs = many()
    with pytest.raises(
        ValueError,
        match=r"recording 'b': needed a recording that the model .*\('a', 'c'\).*make the model with it",
    ):
        recs.batch(["a", "c"])
    with pytest.raises(ValueError, match="each recording once and trials of these only"):
        recs.batch(recs.names, names=["a", "a"])
    with pytest.raises(ValueError, match="each recording once and trials of these only"):
        recs.batch(recs.names, names=["a"], trials={"b": [0]})
    with pytest.raises(ValueError, match="each recording once"):
        recs.batch(recs.names, names=[])
    with pytest.raises(
        ValueError, match=r"recording 'b': needed indices of its 5 trials, got .*out of bounds"
    ):
        recs.batch(recs.names, trials={"b": [5]})
    with pytest.raises(ValueError, match="at least one, got none"):
        recs.batch(recs.names, trials={"b": []})
    with pytest.raises(KeyError, match="no recording 'z'"):
        recs.batch(recs.names, names=["z"])


def test_trials_are_sampled_uniformly_without_replacement():
    recs = many()
    rng = np.random.default_rng(0)
    draws = 2000
    times = np.zeros(20)
    chosen = {name: 0 for name in recs}
    for _ in range(draws):
        names, trials = sample_trials(recs, 6, rng, recordings_per_step=2)
        assert len(names) == 2 and list(names) == sorted(names) and set(trials) == set(names)
        for name in names:
            chosen[name] += 1
            assert len(set(trials[name].tolist())) == len(trials[name]) == min(6, recs[name].num_trials)
        times[trials.get("a", [])] += 1
    # Binomial counts: five standard deviations.
    for count in chosen.values():
        assert abs(count - draws * 2 / 3) < 5 * (draws * 2 / 9) ** 0.5
    share = 6 / 20
    assert (np.abs(times - chosen["a"] * share) < 5 * (chosen["a"] * share * (1 - share)) ** 0.5).all()
    names, trials = sample_trials(recs, None, rng)
    assert names == recs.names and [len(trials[name]) for name in names] == [20, 5, 9]
    first, second = (sample_trials(recs, 3, np.random.default_rng(1))[1]["a"].tolist() for _ in range(2))
    assert first == second
    for bad in ((0, None), (3, 0)):
        with pytest.raises(ValueError, match="at least 1"):
            sample_trials(recs, bad[0], rng, recordings_per_step=bad[1])


def test_the_mini_batch_sum_is_unbiased():
    """The scaled sum over a batch, averaged over all batches there can be, is the sum over all trials."""
    recs = Recordings([plain("a", 4)])
    pairs = [(i, j) for i in range(4) for j in range(i)]
    sums = [
        (batch.trial_scale[..., None, None] * batch.observations.double()).sum().item()
        for batch in (recs.batch(["a"], trials={"a": list(pair)}) for pair in pairs)
    ]
    assert np.mean(sums) == pytest.approx(recs["a"].values.sum(dtype=np.float64), rel=1e-12)


@pytest.mark.parametrize(
    "module",
    [pyro_metassm.recordings, pyro_metassm._recording, pyro_metassm._batch],
    ids=lambda m: m.__name__,
)
def test_examples(module):
    assert doctest.testmod(module).failed == 0
