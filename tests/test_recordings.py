"""Recordings: what comes in, what is refused and in which words, and what a batch holds."""

import copy
import doctest
import pickle
import warnings

import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st

import pyro_metassm._batch
import pyro_metassm._recording
import pyro_metassm.recordings
from pyro_metassm.recordings import Recording, Recordings, sample_trials

RNG = np.random.default_rng(0)
LENGTHS = (5, 9, 7)


def array(trials: int = 6, time: int = 8, neurons: int = 3) -> np.ndarray:
    return (
        np.random.default_rng([trials, time, neurons]).normal(size=(trials, time, neurons)).astype(np.float32)
    )


def plain(name: str = "x", trials: int = 6, time: int = 8, neurons: int = 3, **more) -> Recording:
    return Recording(name, array(trials, time, neurons), bin_width=0.02, **more)


def full(name: str = "full", seed: int = 0) -> Recording:
    """A recording with all there is: unequal lengths, missing bins and neurons, every optional field."""
    rng = np.random.default_rng(seed)
    observations = [rng.poisson(1.0, (time, 4)).astype(np.float64) for time in LENGTHS]
    observations[0][2] = np.nan
    observations[1][:, 3] = np.nan
    return Recording(
        name,
        observations,
        bin_width=0.01,
        mask=[np.arange(time) != 1 for time in LENGTHS],
        inputs=[rng.normal(size=(time, 2)) for time in LENGTHS],
        behavior=[np.where(rng.random((time, 2)) < 0.2, np.nan, 1.5) for time in LENGTHS],
        condition=["left", "", "rechts ü"],
        neuron_ids=np.array(["a", "bb", "c", "d"], dtype=object),
        held_out_neurons=[1],
        attrs={
            "behavior_names": ["x", "y"],
            "area": np.array(["V1", "M1", "V1", "PMd"]),
            "depth": np.array([0.1, np.nan, 3.0, 4.0], dtype=np.float32),
            "nested": {"none": None, "tiny": 1e-300, "pair": (1, True)},
            "trials": {"reaction": np.array([0.3, np.nan, 0.5])},
        },
    )


def same(a: Recording, b: Recording) -> bool:
    one, two = a.to_xarray(), b.to_xarray()
    dtypes = all(one[key].dtype == two[key].dtype for key in one.variables)
    return one.identical(two) and dtypes and a.lengths.tolist() == b.lengths.tolist()


# --- what comes in ---


@pytest.mark.parametrize(
    ("given_dtype", "kept"),
    [
        ("uint8", "float32"),
        ("int64", "float32"),
        ("bool", "float32"),
        ("float16", "float32"),
        ("float32", "float32"),
        ("float64", "float64"),
    ],
)
def test_integers_become_float32_and_floats_stay(given_dtype, kept):
    counts = RNG.integers(0, 2, (4, 5, 2)).astype(given_dtype)
    for observations in (counts, list(counts), torch.from_numpy(counts)):
        recording = Recording("x", observations, bin_width=0.02)
        assert recording.values.dtype == recording.observations.dtype == kept
        np.testing.assert_array_equal(recording.values, counts.astype(kept))
    assert (
        Recording("x", torch.ones(2, 3, 4, dtype=torch.bfloat16), bin_width=0.02).values.dtype == np.float32
    )


def test_tensors_with_gradients_and_masked_arrays_come_in():
    tensor = torch.ones(2, 3, 4, requires_grad=True)
    assert Recording("x", tensor, bin_width=0.02).values.sum() == 24
    hidden = np.ma.masked_array(np.ones((2, 3, 4), dtype=int), mask=np.zeros((2, 3, 4), dtype=bool))
    hidden[0, 1, 2] = np.ma.masked
    assert not Recording("x", hidden, bin_width=0.02).mask[0, 1, 2]


def test_named_dims_may_come_in_any_order():
    observations, mask = array(), RNG.random((6, 8, 3)) < 0.9
    mask[:, 0] = True
    behavior = RNG.normal(size=(6, 8, 2))
    recording = Recording(
        "x",
        xr.DataArray(observations, dims=("trial", "time", "neuron")).transpose("neuron", "trial", "time"),
        bin_width=0.02,
        mask=xr.DataArray(mask, dims=("trial", "time", "neuron")).transpose("time", "neuron", "trial"),
        behavior=xr.DataArray(behavior, dims=("trial", "time", "axis")).transpose("axis", "time", "trial"),
    )
    np.testing.assert_array_equal(recording.values, np.where(mask, observations, 0))
    np.testing.assert_array_equal(recording.behavior, behavior)
    by_position = Recording("x", xr.DataArray(observations, dims=("epoch", "bin", "unit")), bin_width=0.02)
    np.testing.assert_array_equal(by_position.values, observations)
    with pytest.raises(ValueError, match="rename the dims"):
        Recording("x", xr.DataArray(observations, dims=("epoch", "time", "unit")), bin_width=0.02)


def test_missing_values_are_replaced_once_and_stay_missing():
    observations = array()
    observations[0, 3, 1] = observations[2, 7] = np.nan
    mask = np.ones((6, 8), dtype=bool)
    mask[4, 2] = False
    observations[4, 2, 0] = np.inf  # nobody looks behind the mask
    recording = Recording("x", observations, bin_width=0.02, mask=mask)
    missing = np.isnan(observations)
    missing[4, 2] = True
    np.testing.assert_array_equal(recording.mask, ~missing)
    np.testing.assert_array_equal(np.isnan(recording.observations), missing)
    np.testing.assert_array_equal(recording.values, np.where(missing, 0, observations))
    assert recording.lengths.tolist() == [8, 8, 7, 8, 8, 8]  # a gap within a trial does not end it


def test_lengths_are_those_given_else_the_last_observed_bin():
    listed = Recording("x", [np.ones((time, 2)) for time in LENGTHS], bin_width=0.02)
    assert listed.lengths.tolist() == [5, 9, 7] and listed.num_bins == 9
    late = [np.ones((time, 2)) for time in LENGTHS]
    late[1][-3:] = np.nan
    assert Recording("x", late, bin_width=0.02).lengths.tolist() == [5, 9, 7]
    padded = np.full((2, 10, 3), np.nan)
    padded[0, :4], padded[1, :7] = 1, 1
    assert Recording("x", padded, bin_width=0.02).lengths.tolist() == [4, 7]
    assert Recording("x", padded, bin_width=0.02, lengths=[10, 7]).lengths.tolist() == [10, 7]
    with pytest.raises(ValueError, match=r"no observation past a trial's length, got some in trials 1;"):
        Recording("x", padded, bin_width=0.02, lengths=[10, 6])


def test_many_trials_in_a_list():
    assert Recording("x", [np.ones((3, 1))] * 200, bin_width=0.02).num_trials == 200


def test_everything_is_read_only_and_owned():
    observations, behavior = array(), RNG.normal(size=(6, 8, 2))
    recording = Recording("x", observations, bin_width=0.02, behavior=behavior, inputs=behavior)
    observations[:], behavior[:] = 7, 7
    assert not (recording.values == 7).any() and not (recording.behavior == 7).any()
    for key in ("values", "observations", "mask", "lengths", "inputs", "behavior", "held_out_neurons"):
        with pytest.raises(ValueError, match="read-only"):
            getattr(recording, key)[0] = 0
    with pytest.raises(AttributeError, match="read-only"):
        recording.bin_width = 1.0


def test_repr_is_one_line():
    # Missing of 21 bins x 4 neurons: a bin of every trial, one more of trial 0, neuron 3 in trial 1's other bins.
    share = f"{100 * (3 * 4 + 4 + 8) / (21 * 4):.2g}"
    assert repr(full()) == (
        f"Recording('full': 3 trials x 5-9 bins x 4 neurons (1 held out), 10 ms bins, {share}% missing)"
    )


def test_held_out_neurons_by_index_or_mask():
    by_index, by_mask = plain(held_out_neurons=[0, -1]), plain(held_out_neurons=np.array([True, False, True]))
    assert by_index.held_out_neurons.tolist() == by_mask.held_out_neurons.tolist() == [True, False, True]
    assert not plain().held_out_neurons.any() and not plain(held_out_neurons=[]).held_out_neurons.any()


# --- what is refused, in which words ---

ONES = np.ones((3, 4, 2))
WITH_INF, EMPTY_TRIAL, INPUT_GAP = ONES.copy(), ONES.copy(), ONES.copy()
WITH_INF[1, 2, 0] = np.inf
EMPTY_TRIAL[[0, 2]] = np.nan
INPUT_GAP[2, 1] = np.nan


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"observations": np.ones((3, 4))},
            r"shape \(trials, time, neurons\), or a list .* got shape \(3, 4\);",
        ),
        ({"observations": [np.ones(4)] * 3}, r"shape \(time_k, neurons\), got shape \(4,\) in trial 0"),
        (
            {"observations": [np.ones((4, 2)), np.ones((4, 3))]},
            r"same number of neurons .* 2 in trial 0 and 3 in tri",
        ),
        (
            {"observations": WITH_INF},
            r"finite observations, got infinity \(first in trial 1, bin 2, neuron 0\)",
        ),
        ({"observations": EMPTY_TRIAL}, r"observation in every trial, got none in 2 of 3 trials \(0, 2\)"),
        ({"observations": [np.ones((4, 2)), np.ones((0, 2))]}, r"none in 1 of 2 trials \(1\)"),
        ({"observations": []}, "at least one trial, got an empty list"),
        ({"observations": np.ones((0, 4, 2))}, r"at least one trial, bin and neuron, got shape \(0, 4, 2\)"),
        ({"observations": np.ones((3, 0, 2))}, "at least one trial, bin and neuron"),
        ({"observations": np.ones((3, 4, 0))}, "at least one trial, bin and neuron"),
        ({"observations": ONES.astype(complex)}, "real numbers, got dtype complex128"),
        ({"observations": np.full((3, 4, 2), "1")}, "real numbers, got dtype <U1"),
        ({"observations": np.full((3, 4, 2), None)}, "real numbers, got dtype object"),
        ({"observations": [[[1, 2], [1]]]}, "as an array of numbers"),
        ({"bin_width": 0}, "positive, finite bin_width"),
        ({"bin_width": -0.02}, "positive, finite bin_width"),
        ({"bin_width": np.nan}, "positive, finite bin_width"),
        ({"bin_width": "fast"}, "a bin_width in seconds, got 'fast'"),
        ({"bin_width": 20}, "got 20; pass seconds; if these are milliseconds, bin_width=0.02"),
        ({"bin_width": 5}, "pass seconds"),
        ({"name": ""}, "a name, got ''"),
        ({"name": 3}, "a name, got 3"),
        ({"name": "a/b"}, 'without "/"'),
        ({"name": ".."}, "nodes of the result tree"),
        ({"name": "posterior"}, "no group of ArviZ"),
        ({"name": "unconstrained_posterior"}, "no group of ArviZ"),
        ({"mask": np.ones((3, 5), bool)}, r"mask of shape \(3, 4\) or \(3, 4, 2\), got shape \(3, 5\)"),
        ({"mask": np.full((3, 4), 0.5)}, "a bool mask, got dtype float64"),
        ({"mask": np.full((3, 4), 2)}, "a bool mask"),
        ({"mask": np.zeros((3, 4), bool)}, r"none in 3 of 3 trials \(0, 1, 2\)"),
        ({"mask": [np.ones(4, bool)] * 2}, "a mask for 3 trials, .* got 2 trials with 4, 4 bins"),
        ({"mask": [np.ones(5, bool)] * 3}, "each as long as its observations"),
        ({"mask": [np.ones((4, 2), bool), np.ones(4, bool), np.ones(4, bool)]}, "one rank and width"),
        ({"condition": [1, 2]}, r"condition of shape \(3,\), got shape \(2,\)"),
        ({"condition": [1, "a", None]}, "condition"),
        ({"condition": np.array([1, None, 2], dtype=object)}, "condition of numbers or str"),
        ({"condition": np.ones(3, complex)}, "condition of numbers or str"),
        ({"neuron_ids": ["a", "b", "c"]}, r"neuron_ids of shape \(2,\), got shape \(3,\)"),
        ({"neuron_ids": ["a", "a"]}, "different neuron_ids, got a more than once"),
        ({"behavior": np.ones((2, 4, 1))}, "behavior for 3 trials, got 2 trials"),
        ({"behavior": np.ones((3, 5, 1))}, "behavior with 4 bins, got 5 bins"),
        ({"behavior": np.ones((3, 4))}, r"behavior of shape \(trials, time, dims\)"),
        ({"behavior": np.ones((3, 4, 0))}, "behavior with at least one column"),
        ({"behavior": [np.ones((n, 1)) for n in (4, 3, 4)]}, r"\(4 bins in trial 1\), got 3 bins"),
        ({"behavior": np.full((3, 4, 1), np.inf)}, "finite behavior"),
        ({"inputs": INPUT_GAP}, r"finite inputs in every bin .* got NaN \(first in trial 2, bin 1\)"),
        ({"inputs": np.full((3, 4, 1), -np.inf)}, "finite inputs"),
        ({"lengths": [4, 4]}, r"lengths as integers \(3,\)"),
        ({"lengths": [4, 4, 5]}, "lengths from 1 to 4"),
        ({"held_out_neurons": [2]}, r"integer indices below 2, got .* up to 2"),
        ({"held_out_neurons": np.ones(3, bool)}, r"bool \(2,\)"),
        ({"held_out_neurons": [0.5]}, "held_out_neurons as bool"),
        ({"held_out_neurons": [True, True]}, "all of them held out"),
        ({"attrs": {"when": object()}}, "attrs of str, numbers, .* got a object"),
        ({"attrs": {"a": {1: 2}}}, "attrs of str"),
        ({"attrs": {"trials": {"x": [1, 2]}}}, r"attrs\[\"trials\"\]\['x'\] of 3 rows"),
        ({"attrs": {"trials": 3}}, "as a dict of arrays"),
    ],
)
def test_refused(arguments, message):
    defaults = {"name": "x", "observations": ONES, "bin_width": 0.02}
    with pytest.raises(ValueError, match=message) as caught:
        Recording(**(defaults | arguments))
    assert str(caught.value).startswith("recording ") and ": needed " in str(caught.value)


def test_counts_are_checked_where_they_must_be_counts():
    plain_counts = Recording("x", RNG.poisson(1.0, (4, 5, 3)), bin_width=0.02)
    plain_counts.check_counts()
    full().check_counts()  # missing values are no reason to complain
    for bad in (-1.0, 0.5):
        counts = np.ones((4, 5, 3))
        counts[2, 3, 1] = counts[3, 3, 1] = bad
        recording = Recording("x", counts, bin_width=0.02, neuron_ids=["a", "b", "c"])
        with pytest.raises(ValueError, match=rf"got {bad:g} in trial 2, bin 3, neuron 1 \(b\) and 1 more"):
            recording.check_counts()


# --- parts of a recording, and back from files ---


def test_take_keeps_all_that_belongs_to_a_trial():
    recording = full()
    taken = recording.take([2, 0])
    assert taken.lengths.tolist() == [7, 5] and taken.num_bins == recording.num_bins
    for key in ("values", "mask", "observations", "inputs", "behavior", "condition"):
        np.testing.assert_array_equal(getattr(taken, key), getattr(recording, key)[[2, 0]])
    np.testing.assert_array_equal(taken.attrs["trials"]["reaction"], [0.5, 0.3])
    assert recording.attrs["trials"]["reaction"].shape == (3,)
    assert taken.held_out_neurons.tolist() == recording.held_out_neurons.tolist()
    assert same(recording.take(np.array([True, False, True])), recording.take([0, -1]))
    for wrong in ([], [False, False, False], [3], [0.0], 1):
        with pytest.raises(ValueError, match="recording 'full': needed"):
            recording.take(wrong)


def test_crop_is_a_window_of_bins():
    recording = full()
    cropped = recording.crop(3, 8)
    assert cropped.lengths.tolist() == [2, 5, 4] and cropped.num_bins == 5
    for key in ("values", "mask", "observations", "inputs", "behavior"):
        np.testing.assert_array_equal(getattr(cropped, key), getattr(recording, key)[:, 3:8])
    assert same(recording.crop(None, None), recording) and same(recording.crop(0, 99), recording)
    with pytest.raises(ValueError, match=r"in bins 5 to 8, got none in 1 of 3 trials \(0\)"):
        recording.crop(5, None)
    for start, stop in ((4, 4), (-1, 5), (9, None)):
        with pytest.raises(ValueError, match="a window within 9 bins"):
            recording.crop(start, stop)


def test_round_trips_lose_nothing(tmp_path):
    for recording in (
        full(),
        plain(),
        plain(neuron_ids=[5, 3, 9], condition=np.arange(6, dtype=np.int16) > 2),
    ):
        dataset = recording.to_xarray()
        assert same(Recording.from_xarray(dataset), recording)
        dataset.to_netcdf(tmp_path / "r.nc", engine="h5netcdf")
        with xr.open_dataset(tmp_path / "r.nc", engine="h5netcdf") as stored:
            back = Recording.from_xarray(stored.load())
        assert same(back, recording)
        for copied in (pickle.loads(pickle.dumps(recording)), copy.deepcopy(recording)):
            assert same(copied, recording) and not copied.values.flags.writeable
    attrs = Recording.from_xarray(full().to_xarray()).attrs
    assert attrs["nested"] == {"none": None, "tiny": 1e-300, "pair": [1, True]}
    assert attrs["depth"].dtype == np.float32 and attrs["area"].tolist() == ["V1", "M1", "V1", "PMd"]


@given(data=st.data())
def test_any_recording_survives_xarray(data):
    lengths = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    neurons = data.draw(st.integers(1, 3))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    trials = [rng.normal(size=(time, neurons)) for time in lengths]
    for trial in trials:
        trial[1:][rng.random(trial[1:].shape) < 0.3] = np.nan
    recording = Recording("x", trials, bin_width=0.02, condition=rng.integers(0, 9, len(lengths)))
    assert recording.lengths.tolist() == lengths
    assert same(Recording.from_xarray(recording.to_xarray()), recording)
    assert same(recording.take(range(len(lengths))), recording)


def test_from_xarray_says_what_is_missing():
    dataset = full().to_xarray()
    with pytest.raises(ValueError, match=r"got none of \['name', 'observations'\]"):
        Recording.from_xarray(xr.Dataset(attrs={"bin_width": 0.02}))
    minimal = dataset[["observations"]].drop_vars("neuron")
    assert Recording.from_xarray(minimal).num_trials == 3


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


# --- the summary ---


def summary(recording: Recording) -> tuple[dict, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        table = Recordings([recording]).summary()
    assert all(entry.category is UserWarning and entry.filename == __file__ for entry in caught)
    return {key: value.item() for key, value in table.data_vars.items()}, [str(w.message) for w in caught]


def counts(
    trials: int = 40, time: int = 50, neurons: int = 20, mean: float = 0.5, seed: int = 0
) -> np.ndarray:
    return np.random.default_rng(seed).poisson(mean, (trials, time, neurons)).astype(np.float32)


def test_summary_counts_and_keeps_quiet_about_sound_data():
    observations = counts()
    observations[3, 30:] = np.nan
    observations[5, 10] = np.nan
    table, messages = summary(Recording("x", observations, bin_width=0.02))
    assert messages == []
    assert table["num_trials"] == 40 and table["num_neurons"] == 20 and table["trials_per_neuron"] == 2
    assert (table["bins_min"], table["bins_max"]) == (30, 50)
    assert table["missing_fraction"] == pytest.approx(1 / (39 * 50 + 30))
    assert table["mean_per_bin"] == pytest.approx(np.nanmean(observations), rel=1e-6)
    assert table["silent_neurons"] == table["duplicated_neurons"] == 0


@pytest.mark.parametrize("shape", [(1, 1, 1), (12, 20, 4)])
def test_summary_of_neurons_that_are_all_silent(shape):
    table, messages = summary(Recording("x", np.zeros(shape), bin_width=0.02))
    assert table["silent_neurons"] == shape[-1] and table["duplicated_neurons"] == 0
    assert f"{shape[-1]} of {shape[-1]} neurons are silent" in messages[0]


def test_summary_finds_silent_and_duplicated_neurons_in_one_warning():
    observations = counts()
    observations[..., 4] = 0
    observations[..., 5] = np.nan
    observations[..., 7] = observations[..., 9] = observations[..., 2]  # one neuron three times
    observations[..., 11] = 2 * observations[..., 10] + 1  # correlation is 1
    observations[..., 13] = observations[..., 12]
    observations[:, ::5, 13] += 1  # correlation is not
    table, messages = summary(Recording("x", observations, bin_width=0.02))
    assert (table["silent_neurons"], table["duplicated_neurons"]) == (2, 3)
    assert len(messages) == 1 and messages[0].startswith(
        "recording 'x': 2 of 20 neurons are silent or constant ("
    )
    assert "3 neurons duplicate another one" in messages[0]


@pytest.mark.parametrize(("noise", "found"), [(0.01, 1), (0.2, 0)])
def test_a_duplicate_is_told_by_its_correlation(noise, found):
    rng = np.random.default_rng(0)
    values = rng.normal(size=(20, 50, 30))
    values[..., 17] = values[..., 3] + noise * rng.normal(size=(20, 50))  # 1 - correlation = noise^2 / 2
    assert summary(Recording("x", values, bin_width=0.02))[0]["duplicated_neurons"] == found


def test_summary_finds_drift_but_not_missing_neurons():
    observations = counts(seed=1)
    drifting = np.random.default_rng(2).poisson(np.linspace(0.2, 0.8, 40)[:, None, None], (40, 50, 20))
    table, messages = summary(Recording("x", drifting, bin_width=0.02))
    assert table["drift"] == pytest.approx(0.6 / 0.5, abs=0.1) and table["drift_correlation"] > 0.9
    assert len(messages) == 1 and "drifts by +1" in messages[0]
    loud = observations.copy()
    loud[..., :10] += 5
    loud[:20, :, :10] = np.nan  # loud neurons come late: no drift of any neuron
    table, messages = summary(Recording("x", loud, bin_width=0.02))
    assert abs(table["drift"]) < 0.1 and messages == []


def test_summary_finds_few_counts_and_few_trials():
    table, messages = summary(Recording("x", counts(mean=0.005, trials=60), bin_width=0.02))
    assert table["mean_per_bin"] < 0.01 and len(messages) == 1 and "counts per bin on average" in messages[0]
    _, messages = summary(Recording("x", counts(trials=4), bin_width=0.02))
    assert len(messages) == 1 and messages[0].startswith("recording 'x': only 4 trials (pool it")
    _, messages = summary(Recording("x", counts(trials=1), bin_width=0.02))
    assert len(messages) == 1 and messages[0].startswith("recording 'x': only 1 trials (")
    signed = np.random.default_rng(0).normal(size=(20, 30, 5))  # a mean of zero is nothing to warn of
    assert summary(Recording("x", signed, bin_width=0.02))[1] == []


def found(observations, **more) -> str:
    """What the summary finds, in words; the table's own copy of them is the same."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        table = Recordings([Recording("x", observations, bin_width=0.02, **more)]).summary()
    told = [str(w.message).removeprefix("recording 'x': ") for w in caught]
    assert told == ([str(table["findings"].item()).replace("\n", "; ")] if told else [])
    return told[0] if told else ""


def test_summary_finds_each_planted_defect_and_no_other():
    """Defects planted one by one in sound counts: the finding with its number, and nothing else."""
    rng = np.random.default_rng(5)
    sound = rng.poisson(np.exp(0.5 * rng.normal(size=(60, 50, 1))) * rng.gamma(4.0, 0.2, 20)).astype(
        np.float32
    )
    assert found(sound) == ""
    rare = sound.copy()
    rare[..., 3] = 0
    rare[7, 9, 3] = rare[40, 2, 3] = 1  # 2 spikes in 60 s
    assert found(rare).startswith("1 of 20 neurons fire below 0.1 Hz (") and ";" not in found(rare)
    double = sound.copy()
    double[..., 4] = double[..., 8]
    double[..., 4] += rng.random((60, 50)) < 0.03  # the same unit with spikes of its own
    assert found(double).startswith("1 neurons share their spikes with another one (") and ";" not in found(
        double
    )
    broken = sound.copy()
    broken[[13, 31]] = 0
    assert found(broken).startswith("2 of 60 trials are out of line with the others (13, 31: ")
    swapped = sound.copy()
    swapped[:, :, 0] += 3
    swapped[22] = swapped[22][:, ::-1] * 4 * (np.arange(20) % 2)  # other neurons, the same activity about
    assert "(22: " in found(swapped)
    fading = sound * np.where(np.arange(60)[:, None, None] < 30, 1, np.arange(20) >= 6)
    assert found(fading).startswith("6 of 20 neurons drift by more than 100%")
    fine = (rng.random((60, 50, 20)) < 0.008).astype(np.float32)
    assert "make them up to 7 times as wide" in found(fine)
    few = rng.poisson(1.0, (12, 5, 20)).astype(np.float32)
    assert found(few).startswith("only 3 bins for each of 20 neurons in 12 trials (")


@pytest.mark.parametrize("seed", range(6))
def test_summary_has_nothing_to_say_of_simulated_recordings(seed):
    """Latents that trials share, conditions, slow rates and strong ones: none of it is a defect."""
    rng = np.random.default_rng(seed)
    time = np.linspace(0, 2 * np.pi, 60)
    phase = rng.uniform(0, 2 * np.pi, (80, 1))
    latents = np.stack([np.sin(time + phase), np.cos(2 * time + phase)], -1)
    log_rate = latents @ rng.normal(size=(2, 15)) + rng.normal(-0.5, 0.7, 15)
    assert found(rng.poisson(np.exp(log_rate))) == ""
    assert found(log_rate + 0.05 * rng.normal(size=log_rate.shape)) == ""  # smooth, and nearly noiseless


def test_summary_warns_once_for_each_recording():
    recs = Recordings([plain("a", 4), plain("b", 20), plain("c", 3)])
    with pytest.warns(UserWarning) as caught:
        table = recs.summary()
    assert [str(entry.message).split(":")[0] for entry in caught] == ["recording 'a'", "recording 'c'"]
    assert table["recording"].values.tolist() == ["a", "b", "c"] and table.attrs["bin_width"] == 0.02


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
