"""Files: what is written comes back, what is no recording is refused with the file's name, real files load."""

import doctest
import io
import json
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import xarray as xr

import pyro_metassm.io
import pyro_metassm.io.netcdf
import pyro_metassm.io.npz
from pyro_metassm.io import read, read_netcdf, read_npz, write_netcdf, write_npz
from pyro_metassm.recordings import Recording, Recordings


def counts(**more) -> Recording:
    rng = np.random.default_rng(0)
    mask = np.ones((6, 9), dtype=bool)
    mask[2, 5:] = mask[3, 4] = False
    return Recording("counts", rng.poisson(2.0, (6, 9, 4)), bin_width=0.02, mask=mask, **more)


def full() -> Recording:
    rng = np.random.default_rng(1)
    observations = rng.normal(size=(6, 9, 4))
    observations[1, 3, 2] = np.nan
    return Recording(
        "full",
        observations,
        bin_width=1 / 3,
        lengths=[9, 9, 9, 9, 9, 9],
        inputs=rng.normal(size=(6, 9, 2)).astype(np.float32),
        behavior=np.where(rng.random((6, 9, 3)) < 0.1, np.nan, 0.5),
        condition=["a", "b", "", "d", "e", "ß"],
        neuron_ids=[4, 3, 2, 1],
        held_out_neurons=[2],
        attrs={"behavior_names": ["vx", "vy", "x"], "brain_area": np.array(["V1", "M", "M", "M"]), "n": 1},
    )


def same(a: Recording, b: Recording) -> bool:
    one, two = a.to_xarray(), b.to_xarray()
    return one.identical(two) and all(one[key].dtype == two[key].dtype for key in one.variables)


RECORDINGS = {
    "counts": counts(),
    "large counts": Recording("large", counts().values * 1e5, bin_width=0.02),
    "fractions": Recording("fractions", counts().values / 2, bin_width=0.02),
    "unobserved end": Recording("end", counts().observations, bin_width=0.02, lengths=np.full(6, 9)),
    "full": full(),
}


@pytest.mark.parametrize("recording", RECORDINGS.values(), ids=RECORDINGS.keys())
@pytest.mark.parametrize(("write", "suffix"), [(write_npz, "npz"), (write_netcdf, "nc")])
def test_what_is_written_comes_back(recording, write, suffix, tmp_path):
    path = tmp_path / f"{recording.name}.{suffix}"
    write(recording, path)
    assert same(read(path), recording)
    write(recording.take([0]), str(path))  # replaces the file
    assert read(str(path)).num_trials == 1


def test_counts_are_small_in_an_npz(tmp_path):
    write_npz(counts(), tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz", allow_pickle=False) as file:
        assert file["spikes"].dtype == np.uint8 and file["mask"].shape == (6, 9)


def layout(**changes) -> dict:
    """A small file of the shared layout; a value of None leaves a key out."""
    rng = np.random.default_rng(0)
    mask = np.ones((6, 9), dtype=bool)
    mask[2, 5:] = False
    arrays = {
        "spikes": rng.poisson(1.0, (6, 9, 4)).astype(np.uint8) * mask[..., None].astype(np.uint8),
        "mask": mask,
        "condition": np.arange(6, dtype=np.int16),
        "behavior": rng.normal(size=(6, 9, 2)).astype(np.float32),
        "behavior_names": np.array(["vx", "vy"]),
        "bin_width_s": 0.1,
        "session": "Monkey_2020-01-01",
        "licence": "CC0",
        "meta_json": json.dumps({"a": 1}),
        "brain_area": np.array(["V1", "M1", "M1", "V1"]),
        "feedback": np.array([1, -1, 1, 1, -1, 1], dtype=np.int8),
        "freeze": np.zeros((6, 9), dtype=bool),
    }
    return {key: value for key, value in (arrays | changes).items() if value is not None}


def test_an_npz_of_the_shared_layout(tmp_path):
    arrays = layout()
    np.savez(tmp_path / "monkey_1.npz", **arrays)
    recording = read_npz(tmp_path / "monkey_1.npz")
    assert recording.name == "monkey_1" and recording.bin_width == 0.1
    assert read_npz(tmp_path / "monkey_1.npz", name="other").name == "other"
    np.testing.assert_array_equal(recording.values, arrays["spikes"])
    np.testing.assert_array_equal(recording.mask, np.broadcast_to(arrays["mask"][..., None], (6, 9, 4)))
    np.testing.assert_array_equal(recording.condition, arrays["condition"])
    np.testing.assert_array_equal(recording.behavior, arrays["behavior"])
    assert recording.lengths.tolist() == [9, 9, 5, 9, 9, 9]
    attrs = recording.attrs
    assert attrs["behavior_names"] == ["vx", "vy"] and attrs["licence"] == "CC0"
    assert attrs["session"] == "Monkey_2020-01-01" and json.loads(attrs["meta_json"]) == {"a": 1}
    assert attrs["brain_area"].tolist() == ["V1", "M1", "M1", "V1"]
    assert attrs["left_in_file"] == ["freeze"]
    assert recording.take([1]).attrs["trials"]["feedback"].tolist() == [-1]


def test_an_axis_in_doubt_is_not_guessed(tmp_path):
    square = layout(spikes=np.ones((6, 9, 6), np.uint8), brain_area=np.array(list("abcdef")))
    np.savez(tmp_path / "a.npz", **square)
    attrs = read_npz(tmp_path / "a.npz").attrs
    assert "trials" not in attrs and attrs["feedback"].shape == attrs["brain_area"].shape == (6,)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"spikes": None}, "needed spikes, mask, bin_width_s, got no spikes but .*'behavior'"),
        ({"mask": None, "bin_width_s": None}, "got no mask, bin_width_s"),
        ({"spikes": np.ones((6, 9))}, r"shape \(trials, time, neurons\)"),
        ({"mask": np.ones((6, 8), bool)}, r"a mask of shape \(6, 9\)"),
        ({"condition": np.arange(5)}, r"condition of shape \(6,\)"),
        ({"behavior": np.ones((6, 3, 2))}, "behavior with 9 bins"),
        ({"bin_width_s": 20.0}, "pass seconds"),
        ({"bin_width_s": np.ones(3)}, "a bin_width in seconds"),
        ({"bin_width_s": "20 ms"}, "a bin_width in seconds"),
        ({"spikes": np.array([None, 1], dtype=object)}, "allow_pickle|[Oo]bject arrays"),
        ({"attributes": "{"}, "Expecting property name"),
    ],
)
def test_an_npz_that_is_no_recording(changes, message, tmp_path):
    path = tmp_path / "bad.npz"
    np.savez(path, **layout(**changes))
    with pytest.raises(ValueError, match=message) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_broken_files(tmp_path):
    good = tmp_path / "good.npz"
    np.savez_compressed(good, **layout())
    data = good.read_bytes()
    for number, content in enumerate(
        (b"", b"no zip at all", data[: len(data) // 2], data[:200] + data[230:])
    ):
        path = tmp_path / f"{number}.npz"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"{number}\.npz: no recording in an .npz file"):
            read(path)
    damaged = bytearray(data)
    start = data.index(b"spikes.npy") + len("spikes.npy")
    damaged[start + 30 : start + 60] = bytes(30)
    (tmp_path / "damaged.npz").write_bytes(damaged)
    with pytest.raises(ValueError, match=r"damaged\.npz: no recording"):
        read(tmp_path / "damaged.npz")
    with pytest.raises(FileNotFoundError, match=r"none\.npz"):
        read(tmp_path / "none.npz")


def test_a_file_that_claims_too_much_is_refused_before_it_is_read(tmp_path, monkeypatch):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": (10**6, 10**6, 10**6)}
    )
    with zipfile.ZipFile(tmp_path / "lie.npz", "w") as archive:
        archive.writestr("spikes.npy", header.getvalue() + b"few bytes")
    with pytest.raises(ValueError, match=r"needed all of spikes.npy, got less than its header says"):
        read(tmp_path / "lie.npz")
    np.savez_compressed(tmp_path / "bomb.npz", **layout())
    write_netcdf(counts(), tmp_path / "bomb.nc")
    for module, name in ((pyro_metassm.io.npz, "bomb.npz"), (pyro_metassm.io.netcdf, "bomb.nc")):
        monkeypatch.setattr(module, "LARGEST", 100)
        with pytest.raises(ValueError, match="needed at most 100 bytes"):
            read(tmp_path / name)


def test_netcdf_that_is_no_recording(tmp_path):
    (tmp_path / "text.nc").write_text("no netCDF")
    xr.Dataset({"a": ("x", np.ones(3))}).to_netcdf(tmp_path / "other.nc", engine="h5netcdf")
    slow = counts().to_xarray().assign_attrs(bin_width=20.0)
    slow.to_netcdf(tmp_path / "slow.nc", engine="h5netcdf")
    for name, message in (
        ("text", "no recording in a netCDF file"),
        ("other", r"got none of \['name', 'bin_width', 'observations'\]"),
        ("slow", "pass seconds"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            read(tmp_path / f"{name}.nc")
        assert str(caught.value).startswith(f"{tmp_path / name}.nc: ")
    with h5py.File(tmp_path / "flat.nc", "w") as file:
        file["observations"] = 3.0
    with pytest.raises(ValueError, match=r"flat\.nc"):
        read_netcdf(tmp_path / "flat.nc")
    with pytest.raises(FileNotFoundError, match=r"none\.nc"):
        read(tmp_path / "none.nc")


def test_suffixes(tmp_path):
    with pytest.raises(ValueError, match=r"a\.mat: needed bins for a MATLAB file.*pm\.read_mat"):
        read(tmp_path / "a.mat")
    with pytest.raises(ValueError, match="got 'no suffix'"):
        read("a")
    with pytest.raises(ValueError, match=r"needed a file ending in \.npz"):
        write_npz(counts(), tmp_path / "a.zip")
    write_netcdf(counts(), tmp_path / "a.NC")
    assert read(tmp_path / "a.NC").num_trials == 6


def test_every_real_recording_loads(data_dir: Path):
    paths = sorted(data_dir.glob("*.npz"))
    assert paths
    for path in paths:
        recording = read(path)
        recording.check_counts()
        with np.load(path, allow_pickle=False) as file:
            spikes, mask = file["spikes"], file["mask"]
            assert (recording.values == spikes * mask[..., None]).all(), path.name
            assert (recording.mask == mask[..., None]).all(), path.name
            assert (
                recording.bin_width == file["bin_width_s"] and recording.attrs["session"] == file["session"]
            )
        assert recording.lengths.tolist() == [np.flatnonzero(trial)[-1] + 1 for trial in mask]


@pytest.mark.parametrize(
    "stem", ["chewie_20131219_100ms_move", "genkin_pmd_choice_20ms", "steinmetz_s16_10ms"]
)
def test_real_recordings_survive_both_formats(stem, data_dir: Path, tmp_path):
    recording = read(data_dir / f"{stem}.npz")
    write_npz(recording, tmp_path / f"{stem}.npz")
    write_netcdf(recording, tmp_path / f"{stem}.nc")
    assert same(read(tmp_path / f"{stem}.npz"), recording) and same(read(tmp_path / f"{stem}.nc"), recording)


def test_the_summary_of_real_recordings(data_dir: Path):
    full, moving = "chewie_20131003_100ms_full", "chewie_20131219_100ms_move"
    recs = Recordings([read(data_dir / f"{stem}.npz") for stem in (full, moving)])
    with pytest.warns(UserWarning, match="silent") as caught:
        table = recs.summary()
    assert len(caught) == 2
    silent = {name: (recs[name].values.max(axis=(0, 1)) == 0).sum() for name in recs}
    assert table["silent_neurons"].values.tolist() == [silent[full], silent[moving]]
    gaps = 1 - recs[moving].mask[..., 0].sum() / recs[moving].lengths.sum()
    assert table["missing_fraction"].sel(recording=moving).item() == pytest.approx(gaps)
    assert recs.batch(recs.names).observations.shape == (2, 180, 14, 174)


@pytest.mark.parametrize(
    "module", [pyro_metassm.io, pyro_metassm.io.npz, pyro_metassm.io.netcdf], ids=lambda m: m.__name__
)
def test_examples(module):
    assert doctest.testmod(module).failed == 0
