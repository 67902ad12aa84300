"""NWB files of the layouts of public data sets: counts and behaviour by brute force, and what is read of them."""

import numpy as np
import pytest

pytest.importorskip("pynwb")

import h5py
import nwb_layouts as layouts
import pynwb
from test_io import same

import pyro_metassm as pm

CENTRE_OUT = {"align_to": "move_onset_time", "window": (-0.14, 0.56), "bin_width": 0.02}
MAZE = {"align_to": "move_onset_time", "window": (-0.25, 0.45), "bin_width": 0.005}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nwb")
    makers = {"centre_out": layouts.centre_out, "maze": layouts.maze, "benchmark": layouts.benchmark}
    return {name: (folder / f"{name}.nwb", make(folder / f"{name}.nwb")) for name, make in makers.items()}


def brute_force(train, event, window, width):
    """Counts by a loop over the spikes, with edges half a microsecond off what round-off could touch."""
    relative = np.round((train - event - window[0]) / width, 7)
    inside = (relative >= 0) & (relative < round((window[1] - window[0]) / width))
    counts = np.zeros(round((window[1] - window[0]) / width))
    for k in np.floor(relative[inside]).astype(int):
        counts[k] += 1
    return counts


def test_centre_out(files):
    path, truth = files["centre_out"]
    rec = pm.read_nwb(
        path,
        **CENTRE_OUT,
        lag=0.1,
        behavior="Velocity/cursor_vel",
        where={"result": "R"},
        units={"quality": "good"},
        condition="target_id",
    )
    rewarded = np.flatnonzero(truth["trials"]["result"] == "R")
    events = truth["trials"]["move_onset_time"][rewarded]
    assert rec.name == "centre_out" and rec.observations.shape == (8, 35, 4) and rec.mask.all()
    assert rec.neuron_ids.tolist() == [100, 102, 103, 104]
    for n, unit in enumerate((0, 2, 3, 4)):
        for k, event in enumerate(events):
            expected = brute_force(truth["trains"][unit], event, (-0.14, 0.56), 0.02)
            np.testing.assert_array_equal(rec.values[k, :, n], expected)
    np.testing.assert_array_equal(rec.condition, truth["trials"]["target_id"][rewarded])
    # Two samples a bin, 100 ms later; sin and cos are smooth, their means lie within their second differences.
    centres = events[:, None] - 0.14 + 0.02 * np.arange(35) + 0.01 + 0.1
    np.testing.assert_allclose(rec.behavior[..., 0], np.sin(centres), atol=0.012)
    np.testing.assert_allclose(rec.behavior[..., 1], np.cos(centres), atol=0.012)
    assert rec.attrs["neurons"]["location"].tolist() == ["M1", "M1", "PMd", "M1"]
    assert rec.attrs["neurons"]["electrode_group"].tolist()[2] == "group_PMd"
    assert rec.attrs["subject"] == "C" and rec.attrs["behavior_names"] == ["cursor_vel_0", "cursor_vel_1"]
    np.testing.assert_array_equal(
        rec.attrs["trials"]["go_cue_time"], truth["trials"]["go_cue_time"][rewarded]
    )


def test_coordinates_go_along_to_xarray_and_through_files(files, tmp_path):
    rec = pm.read_nwb(files["centre_out"][0], **CENTRE_OUT)
    dataset = rec.to_xarray()
    assert dataset["location"].dims == ("neuron",) and dataset["location"].values[1] == "PMd"
    assert dataset["neuron"].values.tolist() == [100, 101, 102, 103, 104]
    rec = pm.read_nwb(files["centre_out"][0], **CENTRE_OUT, name="a", behavior="cursor_vel")
    pm.io.write_npz(rec, tmp_path / "a.npz")
    pm.io.write_netcdf(rec, tmp_path / "a.nc")
    assert all(same(pm.io.read(tmp_path / f"a.{suffix}"), rec) for suffix in ("npz", "nc"))


def test_the_maze_with_ragged_columns_and_trials_chosen_by_a_function(files):
    path, truth = files["maze"]
    rec = pm.read_nwb(
        path,
        align_to="move_begins_time",
        window=(-0.2, 0.6),
        bin_width=0.02,
        behavior=["Position/Hand", "Eye"],
        where=lambda trials: (trials["discard_trial"] == 0) & (trials["task_success"] == 1),
        condition="maze_condition",
    )
    assert rec.num_trials == 6 and rec.attrs["left_in_file"] == ["target_position"]
    assert rec.attrs["behavior_names"] == ["Hand_0", "Hand_1", "Eye_0", "Eye_1"]
    assert rec.attrs["trials"]["hit_target_position"].shape == (6, 2)
    events = truth["trials"]["move_begins_time"][truth["trials"]["discard_trial"] == 0]
    start = events[:, None] - 0.2 + 0.02 * np.arange(40)
    # Twenty samples from the edge on, a millisecond apart: their mean time is 9.5 ms later (the half, of an edge sample
    # that round-off puts into the next bin).
    np.testing.assert_allclose(rec.behavior[..., 0], start + 0.0095 + 1, atol=0.001)
    np.testing.assert_allclose(rec.behavior[..., 3], -start - 0.0095, atol=0.001)
    assert rec.attrs["neurons"]["electrode_group"].tolist() == ["PMd"] * 4


def test_the_benchmark_with_held_out_units_and_splits(files):
    path, truth = files["benchmark"]
    rec = pm.read_nwb(
        path,
        **MAZE,
        behavior="hand_vel",
        where={"split": ["train"]},
        condition=["trial_type", "trial_version"],
    )
    assert rec.held_out_neurons.tolist() == [False] * 4 + [True] * 2 and rec.num_bins == 140
    assert rec.num_trials == (truth["trials"]["split"] == "train").sum() and rec.mask.all()
    assert rec.condition[:3].tolist() == ["0|0", "1|1", "2|0"]
    assert rec.attrs["behavior_names"] == ["hand_vel_x", "hand_vel_y"]
    seen = pm.read_nwb(path, **MAZE, held_out="heldout").held_out_neurons
    np.testing.assert_array_equal(seen, rec.held_out_neurons)


def test_outside_of_the_observed_intervals_is_missing_not_zero(files):
    path, truth = files["benchmark"]
    window = (-1.0, 1.0)  # trials last from 0.9 s before the event to 0.9 s behind it
    rec = pm.read_nwb(path, align_to="move_onset_time", window=window, bin_width=0.05)
    starts = -1.0 + 0.05 * np.arange(40)
    inside = (starts > -0.9 - 1e-6) & (starts + 0.05 < 0.9 + 1e-6)
    assert (rec.mask == inside[None, :, None]).all() and 0 < inside.sum() < 40
    total = sum(
        ((train >= event - 0.9) & (train < event + 0.9)).sum()
        for train in truth["trains"]
        for event in truth["trials"]["move_onset_time"]
    )
    assert rec.values.sum() == total


def test_whole_trials_have_their_own_lengths(tmp_path):
    stop = np.array([4.5, 7.31, 9.0, 13.5])
    truth = layouts.centre_out(tmp_path / "a.nwb", num_trials=4, stop_time=stop)
    rec = pm.read_nwb(tmp_path / "a.nwb", bin_width=0.1, behavior="cursor_vel")
    assert rec.lengths.tolist() == [25, 23, 10, 25]
    edges = 5.0 + 0.1 * np.arange(24)
    expected = np.histogram(truth["trains"][0], edges)[0]  # its last bin is closed: no spike is exactly there
    np.testing.assert_array_equal(rec.values[1, :23, 0], expected)
    assert not rec.mask[1, 23:].any() and np.isnan(rec.behavior[1, 23:]).all()


def test_invalid_times_and_the_end_of_a_session_are_missing(tmp_path):
    path = tmp_path / "a.nwb"
    truth = layouts.centre_out(path, num_trials=3)
    with pynwb.NWBHDF5IO(path, "a") as io:
        nwb = io.read()
        nwb.add_invalid_time_interval(start_time=3.0, stop_time=3.05)
        io.write(nwb)
    lost = sum(((train >= 3.0) & (train < 3.1)).sum() for train in truth["trains"])
    with pytest.warns(
        UserWarning, match=f"{lost} spikes in the windows lie where their unit was not observed"
    ):
        rec = pm.read_nwb(path, align_to="start_time", window=(0.0, 2.0), bin_width=0.1)
    assert (~rec.mask).sum(1)[:, 0].tolist() == [1, 0, 0] and not rec.mask[0, 10].any()
    last_one = {"where": lambda t: t.index == 2}
    with pytest.warns(UserWarning, match="spikes in the windows lie where"):  # those of the bin that is cut
        late = pm.read_nwb(path, align_to="start_time", window=(0.0, 5.0), bin_width=0.1, **last_one)
    last = max(train[-1] for train in truth["trains"])
    known = max(last, 10.5)  # the last trial stops there
    assert late.mask[0, :, 0].sum() == int(np.floor((known - 8.0) / 0.1 + 1e-6))


def test_only_what_is_needed_is_read(files, monkeypatch):
    """The bytes taken from the file's data sets, counted at h5py: neither other units nor the rest of a series."""
    path, truth = files["centre_out"]
    taken: dict[str, int] = {}
    get = h5py.Dataset.__getitem__

    def counting(self, key, **more):
        value = get(self, key, **more)
        taken[self.name] = taken.get(self.name, 0) + np.size(value)
        return value

    monkeypatch.setattr(h5py.Dataset, "__getitem__", counting)
    few = {"where": lambda t: t.index < 2, "units": {"id": [101]}}
    pm.read_nwb(path, **CENTRE_OUT, behavior="Velocity/cursor_vel", **few)
    assert taken["/units/spike_times"] == len(truth["trains"][1])
    samples = taken["/processing/behavior/Velocity/cursor_vel/data"]
    assert 2 * 2 * 70 <= samples <= 2 * 2 * 73 < truth["velocity"].size / 10
    assert not any("cursor_pos/data" in name for name in taken)


def test_files_elsewhere(files):
    fsspec = pytest.importorskip("fsspec")
    path, _ = files["centre_out"]
    memory = fsspec.filesystem("memory")
    memory.pipe("/here/far.nwb", path.read_bytes())
    try:
        far = pm.read_nwb("memory://here/far.nwb", **CENTRE_OUT)
        near = pm.read_nwb(path, **CENTRE_OUT, name="far")
        assert far.to_xarray().identical(near.to_xarray())
        with pytest.raises(FileNotFoundError):
            pm.read_nwb("memory://here/none.nwb", **CENTRE_OUT)
    finally:
        memory.rm("/here", recursive=True)


def test_result_trees_have_the_coordinates_of_the_neurons(files):
    from pyro_metassm import trees

    rec = pm.read_nwb(files["centre_out"][0], **CENTRE_OUT)
    data = trees.recording_groups(rec, {})["constant_data"]
    assert data["electrode_group"].dims == ("neuron",) and data["location"].values.tolist() == rec.attrs["neurons"][
        "location"
    ].tolist()  # fmt: skip
