"""NWB files of the layouts of public data sets: counts and behaviour by brute force, what is read, what is refused."""

import sys

import numpy as np
import pytest

pytest.importorskip("pynwb")

import h5py
import nwb_layouts as layouts
import pynwb
from test_io import same

import pyro_metassm as pm
from pyro_metassm.io import seconds

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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"align_to": "moving"},
            r"needed a column 'moving' of the trials, got only go_cue_time, move_onset_time, ",
        ),
        ({"align_to": "result"}, r"needed times \(s\) in the column 'result', got no number in it"),
        (
            {"align_to": "target_dir"},
            "a column of times .* near their trials, to align to 'target_dir', got 1.5708 in a",
        ),
        (
            {"behavior": "hand_vel"},
            "needed a time series 'hand_vel', got only processing/behavior/Position/cursor_pos",
        ),
        ({"where": {"outcome": 1}}, "needed a column 'outcome' of the trials, got only"),
        ({"where": lambda t: t["outcome"] == 1}, "needed a column 'outcome' of the trials, got only"),
        ({"where": {"result": "X"}}, "needed trials with result = 'X', got none: there result is F, R"),
        ({"where": lambda t: t["target_id"] > 9}, "at least one of the 12 trials, got none after the choice"),
        ({"where": lambda t: [0, 1]}, r"returns bools \(12,\), got int64 of shape \(2,\)"),
        (
            {"units": {"quality": "best"}},
            "needed units with quality = 'best', got none: there quality is good, mua",
        ),
        (
            {"units": {"snr": 3}},
            "a column 'snr' of the units, got only electrode_group, id, location, quality",
        ),
        ({"condition": "targets"}, "a column 'targets' of the trials"),
        ({"held_out": "test"}, "a column 'test' of the units"),
        ({"window": (-140, 560)}, r"a window in seconds, got \(-140, 560\).*window=\(-0.14, 0.56\)"),
        ({"lag": 100}, "a lag under 5 s, got 100; pass seconds; if these are milliseconds, 0.1"),
        ({"bin_width": 20}, "milliseconds, bin_width=0.02"),
        ({"window": (-0.14, 0.57)}, "a window of whole bins"),
        ({"overlap": "no"}, 'overlap="warn" or "error"'),
    ],
)
def test_what_is_refused(files, change, message):
    with pytest.raises(ValueError, match=message):
        pm.read_nwb(files["centre_out"][0], **(CENTRE_OUT | change))


def test_files_that_are_none_or_cut_short(files, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        pm.read_nwb(tmp_path / "none.nwb", **CENTRE_OUT)
    whole = files["centre_out"][0].read_bytes()
    for name, data in (
        ("text", b"no file of this kind"),
        ("short", whole[: len(whole) // 2]),
        ("empty", b""),
    ):
        (tmp_path / f"{name}.nwb").write_bytes(data)
        with pytest.raises(ValueError, match=r"no NWB file that can be read .* cut short"):
            pm.read_nwb(tmp_path / f"{name}.nwb", **CENTRE_OUT)
    with h5py.File(tmp_path / "other.nwb", "w") as file:
        file["x"] = 1
    with pytest.raises(ValueError, match="no NWB file that can be read"):
        pm.read_nwb(tmp_path / "other.nwb", **CENTRE_OUT)
    layouts.write(layouts.new_file(), tmp_path / "bare.nwb")
    with pytest.raises(ValueError, match="needed a table of trials, got none"):
        pm.read_nwb(tmp_path / "bare.nwb", **CENTRE_OUT)
    nwb = layouts.new_file()
    nwb.add_trial(start_time=0.0, stop_time=1.0)
    layouts.write(nwb, tmp_path / "bare.nwb")
    with pytest.raises(ValueError, match="needed units with spike_times, got none"):
        pm.read_nwb(tmp_path / "bare.nwb", **CENTRE_OUT)


def test_trials_without_the_event_and_windows_that_overlap_are_counted(tmp_path):
    onset = np.array([3.2, np.nan, 8.8, 9.1])
    truth = layouts.centre_out(tmp_path / "a.nwb", num_trials=4, move_onset_time=onset)
    with pytest.warns(UserWarning) as caught:
        rec = pm.read_nwb(tmp_path / "a.nwb", **CENTRE_OUT)
    messages = [str(entry.message) for entry in caught]
    both = sum(((train >= 8.96) & (train < 9.36)).sum() for train in truth["trains"])
    assert messages == [
        "recording 'a': 1 of 4 trials have no move_onset_time, and are left out (1)",
        f"recording 'a': 1 of 3 windows begin before an earlier one has ended: {both} spikes stand in two trials or "
        "more",
    ]
    assert rec.num_trials == 3 and rec.attrs["trials"]["target_id"].tolist() == [0, 2, 3]
    keep = {"where": lambda t: t["move_onset_time"].notna()}
    with pytest.raises(ValueError, match=r"needed windows that do not overlap, got 1 of 3 windows"):
        pm.read_nwb(tmp_path / "a.nwb", **CENTRE_OUT, overlap="error", **keep)


def test_times_far_from_their_trials_are_counted(tmp_path):
    layouts.centre_out(tmp_path / "a.nwb", num_trials=4, move_onset_time=np.array([3.0, 6.0, 3.9, 12.0]))
    with pytest.warns(UserWarning, match="1 of 4 times of move_onset_time lie far outside of their trials"):
        pm.read_nwb(tmp_path / "a.nwb", align_to="move_onset_time", window=(0.0, 0.2), bin_width=0.1)


def test_behavior_with_gaps_silent_units_and_empty_labels_are_counted(tmp_path):
    path = tmp_path / "a.nwb"
    nwb = layouts.new_file()
    nwb.add_unit_column(name="quality", description="")
    for unit, quality in enumerate(("good", "", "good")):
        nwb.add_unit(spike_times=[] if unit == 2 else np.arange(-0.05, 20.0, 0.01), quality=quality)
    for start in (1.0, 5.0, 25.0):
        nwb.add_trial(start_time=start, stop_time=start + 1.0)
    velocity = np.arange(600.0)
    velocity[110:131] = np.nan
    nwb.add_acquisition(
        pynwb.TimeSeries(name="speed", data=velocity, rate=100.0, unit="m/s", conversion=0.01)
    )
    layouts.write(nwb, path)
    with pytest.warns(UserWarning) as caught:
        rec = pm.read_nwb(
            path, window=(0.0, 1.0), bin_width=0.05, behavior="acquisition/speed", units={"quality": "good"},
            where=lambda t: t["start_time"] < 20,
        )  # fmt: skip
    messages = [str(entry.message) for entry in caught]
    assert messages == [
        "recording 'a': quality is empty for 1 of 3 units, which are left out",
        "recording 'a': 1 of 2 units have no spikes (2)",
        "recording 'a': 5 spikes lie outside of the session (before its time 0)",
        "recording 'a': behavior is missing (NaN) in 4 of 40 bins",
    ]
    assert np.isnan(rec.behavior[0, :, 0]).nonzero()[0].tolist() == [2, 3, 4, 5]
    assert rec.behavior[0, 0, 0] == pytest.approx(0.01 * np.arange(100, 105).mean())  # in m/s
    with pynwb.NWBHDF5IO(path, "a") as io:
        nwb = io.read()
        nwb.add_invalid_time_interval(start_time=22.0, stop_time=40.0)
        io.write(nwb)
    unseen = r"1 of 3 trials lie where no unit was observed, and are left out \(2\)"
    with pytest.warns(UserWarning, match="spikes lie outside"), pytest.warns(UserWarning, match=unseen):
        rec = pm.read_nwb(path, window=(0.0, 1.0), bin_width=0.05, units={"id": [0]})
    assert rec.num_trials == 2


def test_spikes_outside_of_the_session_and_of_the_intervals_are_counted(tmp_path):
    nwb = layouts.new_file()
    train = np.array([-3.0, 0.5, 1.5, 2.5, 3.5, 4.5, 12.0, 13.0])
    nwb.add_unit(spike_times=train, obs_intervals=[[0.0, 2.0], [2.0, 3.0], [4.0, 10.0]])
    nwb.add_trial(start_time=0.0, stop_time=5.0)
    layouts.write(nwb, tmp_path / "a.nwb")
    with pytest.warns(UserWarning) as caught:
        rec = pm.read_nwb(tmp_path / "a.nwb", bin_width=1.0)
    assert [str(entry.message) for entry in caught] == [
        "recording 'a': 3 spikes lie outside of the session",
        "recording 'a': 1 spikes in the windows lie where their unit was not observed, and are missing",
    ]
    assert rec.mask[0, :, 0].tolist() == [True, True, True, False, True]  # intervals that touch are one
    assert rec.values[0, :, 0].tolist() == [1, 1, 1, 0, 1]


@pytest.mark.parametrize(("module", "path"), [("pynwb", "a.nwb"), ("fsspec", "memory://a.nwb")])
def test_libraries_that_are_not_installed(module, path, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf'{module}.*pip install "pyro-metassm\[nwb\]"'):
        pm.read_nwb(path, **CENTRE_OUT)


def test_a_clock_that_is_set_back_and_a_series_cut_short(tmp_path):
    nwb = layouts.new_file()
    nwb.add_unit(spike_times=np.arange(0.0, 20.0, 0.05))
    nwb.add_trial(start_time=1.0, stop_time=2.0)
    times = np.concatenate([np.arange(0, 5, 0.1), np.arange(3, 6, 0.1)])
    nwb.add_acquisition(pynwb.TimeSeries(name="back", data=times, timestamps=times, unit="m"))
    nwb.add_acquisition(
        pynwb.TimeSeries(name="late", data=times + 50, rate=10.0, starting_time=60.0, unit="m")
    )
    nwb.add_acquisition(pynwb.TimeSeries(name="short", data=times[:3], rate=10.0, unit="m"))
    layouts.write(nwb, tmp_path / "a.nwb")
    how = {"window": (0.0, 1.0), "bin_width": 0.1}
    with pytest.raises(ValueError, match=r"ascending timestamps, got 4\.9 s and then 3 s \(1 times so\)"):
        pm.read_nwb(tmp_path / "a.nwb", **how, behavior="back")
    for name in ("late", "short"):
        with pytest.raises(
            ValueError, match=r"behavior in the windows, got none \(acquisition/.*windows: 1 to 2 s"
        ):
            pm.read_nwb(tmp_path / "a.nwb", **how, behavior=name)


def test_times_in_milliseconds(tmp_path):
    rng = np.random.default_rng(0)
    nwb = layouts.new_file()
    for train in layouts.spike_trains(rng, 3, 120.0):
        nwb.add_unit(spike_times=train * 1000)
    for start in range(0, 100, 10):
        nwb.add_trial(start_time=start * 1000.0, stop_time=start * 1000.0 + 2000.0)
    layouts.write(nwb, tmp_path / "a.nwb")
    with pytest.raises(ValueError, match=r"needed times in seconds, got .* these are milliseconds: divide"):
        pm.read_nwb(tmp_path / "a.nwb", window=(0.0, 1.0), bin_width=0.02)
    nwb = layouts.new_file()
    for train in layouts.spike_trains(rng, 3, 120.0):
        nwb.add_unit(spike_times=train)
    nwb.add_trial(start_time=10_000.0, stop_time=12_000.0)
    layouts.write(nwb, tmp_path / "a.nwb")
    with pytest.raises(
        ValueError, match=r"needed spikes in the windows, got none .*in milliseconds, or on another"
    ):
        pm.read_nwb(tmp_path / "a.nwb", window=(0.0, 1.0), bin_width=0.02)


def test_a_slow_session_is_not_taken_for_milliseconds():
    """One spike in 20 s from the fastest unit, over an hour of usual trials: odd, but possible in seconds."""
    import pandas as pd

    trials = pd.DataFrame({"start_time": [0.0, 10.0], "stop_time": [5.0, 15.0]})
    seconds.check("a", [np.arange(0.0, 3600.0, 20.0)], trials, (0.0, 1.0), 0.0)


def test_result_trees_have_the_coordinates_of_the_neurons(files):
    from pyro_metassm import trees

    rec = pm.read_nwb(files["centre_out"][0], **CENTRE_OUT)
    data = trees.recording_groups(rec, {})["constant_data"]
    assert data["electrode_group"].dims == ("neuron",) and data["location"].values.tolist() == rec.attrs["neurons"][
        "location"
    ].tolist()  # fmt: skip
