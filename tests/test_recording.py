"""A recording: what comes in, what is refused and in which words, and what goes along with its trials."""

import copy
import pickle

import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st
from made_recordings import LENGTHS, array, full, plain, same

from pyro_metassm.recordings import Recording

RNG = np.random.default_rng(0)


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
