"""Trials in dicts and in MATLAB files of both kinds: the same recording, and clear words where there is none."""

import h5py
import numpy as np
import pytest
import scipy.io

import pyro_metassm as pm

LENGTHS = (7, 4, 9)


def trials():
    rng = np.random.default_rng(0)
    return [
        {
            "spikes": rng.poisson(1.0, (bins, 3)).astype(float),
            "hand": rng.normal(size=(bins, 2)),
            "target": float(k),
            "side": ("left", "right", "up")[k],
            "events": np.arange(k + 1.0),
        }
        for k, bins in enumerate(LENGTHS)
    ]


HOW = {"bin_width": 0.02, "behavior": "hand", "condition": "side"}


def expected(rec, given=None):
    for k, trial in enumerate(trials() if given is None else given):
        np.testing.assert_array_equal(rec.values[k, : LENGTHS[k]], trial["spikes"])
        np.testing.assert_allclose(rec.behavior[k, : LENGTHS[k]], trial["hand"], rtol=1e-6)
    assert rec.lengths.tolist() == list(LENGTHS) and rec.condition.tolist() == ["left", "right", "up"]
    assert rec.attrs["trials"]["target"].tolist() == [0, 1, 2] and rec.attrs["left_in_file"] == ["events"]
    return True


def test_a_list_of_dicts_and_a_dict_of_lists():
    several = trials()
    assert expected(pm.from_dict("a", several, **HOW))
    assert expected(pm.from_dict("a", {key: [t[key] for t in several] for key in several[0]}, **HOW))
    turned = [t | {"spikes": t["spikes"].T, "hand": t["hand"].T} for t in several]
    assert expected(pm.from_dict("a", turned, neuron_first=True, **HOW))


def test_arrays_of_trials():
    y = np.random.default_rng(0).poisson(1.0, (4, 6, 3))
    fields = {"counts": y, "rt": np.arange(4.0)[None], "other": np.ones(3), "pulse": np.ones((4, 6, 1))}
    rec = pm.from_dict(
        "a",
        fields,
        bin_width=0.02,
        observations="counts",
        condition="rt",
        inputs="pulse",
        held_out_neurons=[1],
    )
    np.testing.assert_array_equal(rec.values, y)
    assert rec.condition.tolist() == [0, 1, 2, 3] and rec.attrs["left_in_file"] == ["other"]
    turned = pm.from_dict("a", {"spikes": y.transpose(0, 2, 1)}, bin_width=0.02, neuron_first=True)
    np.testing.assert_array_equal(turned.values, y)


def matlab_7(path, several):
    scipy.io.savemat(path, {"trials": several, "date": "2013-10-03"}, do_compression=True)


def matlab_73(path, several):
    """A struct array as MATLAB writes it: for each field a table of references, arrays transposed."""
    with h5py.File(path, "w", userblock_size=512) as file:
        store, group = file.create_group("#refs#"), file.create_group("trials")
        group.attrs["MATLAB_class"] = np.bytes_("struct")
        for field in several[0]:
            table = group.create_dataset(field, (1, len(several)), dtype=h5py.ref_dtype)
            for k, trial in enumerate(several):
                value = trial[field]
                text = isinstance(value, str)
                array = np.array([[ord(c)] for c in value], np.uint16) if text else np.atleast_2d(value).T
                item = store.create_dataset(f"{field}{k}", data=array)
                item.attrs["MATLAB_class"] = np.bytes_("char" if text else "double")
                table[0, k] = item.ref
        date = file.create_dataset("date", data=np.array([[ord(c)] for c in "2013"], np.uint16))
        date.attrs["MATLAB_class"] = np.bytes_("char")


@pytest.mark.parametrize("write", [matlab_7, matlab_73])
def test_a_struct_array_of_trials(write, tmp_path):
    write(tmp_path / "m.mat", trials())
    rec = pm.read_mat(tmp_path / "m.mat", variable="trials", **HOW)
    assert expected(rec) and rec.name == "m"
    assert pm.read_mat(tmp_path / "m.mat", variable="trials", name="b", **HOW).name == "b"
    with pytest.raises(ValueError, match="needed a variable 'data', got only date, trials"):
        pm.read_mat(tmp_path / "m.mat", variable="data", **HOW)
    with pytest.raises(
        ValueError, match=r"needed a field 'counts', got only events, hand, side, spikes, target"
    ):
        pm.read_mat(tmp_path / "m.mat", variable="trials", observations="counts", **HOW)


def test_a_trial_of_one_bin_or_one_neuron_keeps_its_axes(tmp_path):
    one = [{"spikes": np.ones((1, 2))}, {"spikes": np.ones((5, 2))}]
    scipy.io.savemat(tmp_path / "a.mat", {"trials": one})
    assert pm.read_mat(tmp_path / "a.mat", bin_width=0.1).lengths.tolist() == [1, 5]
    thin = [{"spikes": np.ones((3, 1))}, {"spikes": np.ones((1, 1))}]
    scipy.io.savemat(tmp_path / "b.mat", {"trials": thin})
    assert pm.read_mat(tmp_path / "b.mat", bin_width=0.1).observations.shape == (2, 3, 1)


def test_cells_within_a_struct_and_logicals(tmp_path):
    cells = np.empty(2, dtype=object)
    cells[:] = [np.ones((3, 2)), np.zeros((5, 2))]
    session = {"data": {"spikes": cells, "good": np.array([True, False]), "number": np.array([4, 5])}}
    scipy.io.savemat(tmp_path / "a.mat", {"session": session})
    with h5py.File(tmp_path / "b.mat", "w") as file:
        store, data = file.create_group("#refs#"), file.create_group("session/data")
        cell = data.create_dataset("spikes", (2, 1), dtype=h5py.ref_dtype)
        cell.attrs["MATLAB_class"] = np.bytes_("cell")
        for k, part in enumerate(cells):
            store[f"c{k}"] = part.T
            cell[k, 0] = store[f"c{k}"].ref
        data["good"] = np.array([[1], [0]], np.uint8)
        data["good"].attrs["MATLAB_class"] = np.bytes_("logical")
        data["number"] = np.array([[4.0], [5.0]])
        data["handle"] = np.zeros((1, 1), np.uint8)
        data["handle"].attrs["MATLAB_class"] = np.bytes_("function_handle")
    for name in "ab":
        rec = pm.read_mat(
            tmp_path / f"{name}.mat", variable="session.data", bin_width=0.02, condition="number"
        )
        assert rec.lengths.tolist() == [3, 5] and rec.condition.tolist() == [4, 5]
        assert rec.attrs["trials"]["good"].tolist() == [True, False]
    assert rec.attrs["left_in_file"] == ["handle"]


def test_files_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError):
        pm.read_mat(tmp_path / "none.mat", bin_width=0.02)
    for write in (matlab_7, matlab_73):
        write(tmp_path / "a.mat", trials())
        data = (tmp_path / "a.mat").read_bytes()
        for part in (data[: len(data) // 2], data[:130], b"text", b""):
            (tmp_path / "a.mat").write_bytes(part)
            with pytest.raises(
                ValueError, match=r"a\.mat: (no MATLAB file that can be read|needed variables)"
            ):
                pm.read_mat(tmp_path / "a.mat", bin_width=0.02)
    with h5py.File(tmp_path / "b.mat", "w") as file:
        # Claims what it does not hold.
        file.create_dataset("spikes", (2**20, 2**20, 4), "f8", chunks=(1, 2**10, 4))
    with pytest.raises(ValueError, match="needed at most"):
        pm.read_mat(tmp_path / "b.mat", bin_width=0.02)
    with h5py.File(tmp_path / "c.mat", "w") as file:  # a cell that holds itself
        cell = file.create_dataset("spikes", (1, 1), dtype=h5py.ref_dtype)
        cell.attrs["MATLAB_class"] = np.bytes_("cell")
        cell[0, 0] = cell.ref
    with pytest.raises(ValueError, match="at most 16 deep"):
        pm.read_mat(tmp_path / "c.mat", bin_width=0.02)


@pytest.mark.parametrize(
    ("given", "how", "message"),
    [
        (3, {}, "a dict of fields or a list of a dict a trial, got int"),
        ([], {}, "a dict of fields or a list"),
        (
            [{"spikes": np.ones((2, 2))}, {"hand": 1}],
            {},
            "the same fields in every trial, got hand, spikes not in both",
        ),
        (
            [{"spikes": np.ones(3)}],
            {},
            r"'spikes' of \(time_k, dims\) numbers in each trial, got .*\(3,\) in trial 0",
        ),
        (
            {"spikes": np.ones((3, 2))},
            {},
            r"'spikes' as \(trials, time, dims\), or a list of arrays, got shape \(3, 2\)",
        ),
        ({"spikes": np.ones((3, 2, 2))}, {"condition": "side"}, "a field 'side', got only spikes"),
        (
            {"spikes": np.ones((3, 2, 2)), "s": [1, 2]},
            {"condition": "s"},
            "one number or text a trial in 's'",
        ),
        (
            {"spikes": np.ones((3, 2, 2)), "h": np.ones((2, 2, 1))},
            {"behavior": "h"},
            "behavior for 3 trials, got 2",
        ),
        ({"spikes": np.ones((3, 2, 2))}, {"bin_width": 20}, "milliseconds"),
    ],
)
def test_structures_that_are_no_trials(given, how, message):
    with pytest.raises(ValueError, match=message):
        pm.from_dict("a", given, **({"bin_width": 0.02} | how))
