"""The short form of the fuzzer: some hundred hostile files for every reader, and the attacks that have a name."""

import io
import json
import sys
import warnings
import zipfile
from pathlib import Path

import h5py
import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import watching
from hostile import recording
from hostile_files import made
from hostile_hdf5 import Hdf5
from hostile_netcdf import NetCDF

import pyro_metassm as pm
from pyro_metassm import _attributes as attributes

# Few where a case costs much. "old_mat" is left to the long form: the compiled reader of scipy can end the process.
CASES = {
    "npz": 120, "netcdf": 25, "zarr": 40, "nlb": 30, "mat": 30, "nwb": 4, "fit": 40, "checkpoint": 8,
    "settings": 60,
}  # fmt: skip
# The next state is written; a fit goes on, and the signatures that the suite checks are compiled at first use.
MAY = {"checkpoint": ("os.remove", "os.rename", "exec", "compile")}


@pytest.mark.parametrize("name", CASES)
def test_hostile_files_are_refused_by_name(name, monkeypatch):
    # Bytes of the container are left to the long form: libhdf5 reads them, in C, and may take the process with it.
    monkeypatch.setattr(NetCDF, "raw", False)
    monkeypatch.setattr(Hdf5, "raw", False)
    folder = watching.folder_of(name)
    try:
        target = made(name, folder)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            watching.warm(target, 3)
            report = watching.Report()

            @hypothesis.settings(
                max_examples=CASES[name], database=None, suppress_health_check=list(hypothesis.HealthCheck)
            )
            @hypothesis.given(st.randoms(use_true_random=False))
            def run(rng):
                target.write(rng)
                watching.case(target, report, f"{name} {report.cases}", may=MAY.get(name, ()))
                assert report.failures == []

            run()
    finally:
        watching.clear(folder)
    assert report.cases >= CASES[name] // 2 and report.outcomes["refused"] > 0


def test_the_watch_sees_what_is_forbidden(tmp_path):
    """A reader that runs code, imports, opens another file, returns rubbish, or fails without words is caught."""

    class Bad(NetCDF):
        def read(self):
            return self.act()

    bad = Bad(tmp_path)

    def wrong(act) -> str:
        bad.act, report = act, watching.Report()
        watching.case(bad, report, "case")
        return " ".join(report.failures)

    def refused():
        raise ValueError("no name")

    good = recording()
    assert wrong(lambda: good) == ""
    assert "exec" in wrong(lambda: exec("1") or good)
    assert "pickle.find_class" in wrong(lambda: __import__("pickle").loads(b"cbuiltins\nlen\n.") and good)
    assert "import of no_such" in wrong(lambda: _tried("no_such_module") or good)
    assert "open of" in wrong(lambda: open("/etc/hostname").close() or good)
    assert "does not name the file" in wrong(refused)
    assert "ZeroDivisionError" in wrong(lambda: 1 / 0)
    assert "a str" in wrong(lambda: "x")
    assert "data of another file" in wrong(lambda: recording(1))


def _tried(name: str) -> None:
    try:
        __import__(name)
    except ImportError:
        return


# ---- attacks that have a name ------------------------------------------------------------------------------------


def members(path: Path) -> dict[str, bytes]:
    pm.io.write_npz(recording(), path)
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def npz(path: Path, packing: int = zipfile.ZIP_DEFLATED, **changed: bytes) -> Path:
    parts = members(path) | {f"{name}.npy": data for name, data in changed.items()}
    with zipfile.ZipFile(path, "w", packing) as archive:
        for name, data in parts.items():
            archive.writestr(name, data)
    return path


def announced(description: str, shape: str, length: int | None = None) -> bytes:
    text = f"{{'descr': {description}, 'fortran_order': False, 'shape': {shape}}}\n".encode()
    size = len(text) if length is None else length
    return b"\x93NUMPY\x02\x00" + size.to_bytes(4, "little") + text


@pytest.mark.parametrize(
    ("spikes", "message"),
    [
        (announced("'|S0'", "(1000000000000,)"), "needed numbers or text"),
        (announced("'|u1'", "(1000000, 1000000)"), "less than its header says"),
        (announced("'|u1'", "(-1, 4)"), "less than its header says"),
        (announced("'|O'", "(1,)"), "needed numbers or text"),
        (announced("('<f4', (1000, 1000))", "(1,)"), "needed numbers or text"),
        (announced("'|u1'", "(1,)", length=2**32 - 1) + bytes(10**5), "a header of at most 10000 bytes"),
    ],
)
def test_arrays_that_claim_what_they_are_not(spikes, message, tmp_path):
    path = npz(tmp_path / "a.npz", spikes=spikes)
    with pytest.raises(ValueError, match=message) as caught:
        pm.io.read(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_a_small_file_may_not_claim_much(tmp_path):
    """Half a gigabyte of zeros in half a megabyte: refused before it is unpacked."""
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        out, {"descr": "|u1", "fortran_order": False, "shape": (512, 2**10, 2**10)}
    )
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("spikes.npy", "w") as file:
            file.write(out.getvalue())
            for _ in range(512):
                file.write(bytes(2**20))
        archive.writestr("mask.npy", b"")
    before = watching.peak()
    with pytest.raises(ValueError, match="at most 512 bytes for each byte of the file"):
        pm.io.read(path)
    assert watching.peak() - before < 2**26
    with h5py.File(tmp_path / "a.nc", "w") as file:  # never written: all of it is the fill value
        file.create_dataset("observations", (1000, 1000, 1000), "u1", chunks=(10, 10, 10))
    with pytest.raises(ValueError, match="at most 512 bytes for each byte of the file"):
        pm.io.read(tmp_path / "a.nc")
    with pytest.raises(ValueError, match="packed otherwise"):
        pm.io.read(npz(tmp_path / "b.npz", zipfile.ZIP_LZMA))


@pytest.mark.parametrize("how", ["external link", "soft link", "external data", "virtual data"])
def test_a_netcdf_file_cannot_have_another_file_read(how, tmp_path):
    secret, path = tmp_path / "secret.nc", tmp_path / "a.nc"
    for each in (secret, path):
        pm.io.write_netcdf(recording(), each)
    with h5py.File(path, "r+") as file:
        shape = file["observations"].shape
        del file["observations"]
        match how:
            case "external link":
                file["observations"] = h5py.ExternalLink("secret.nc", "/observations")
            case "soft link":
                file["observations"] = h5py.SoftLink("/mask")
            case "external data":
                file.create_dataset("observations", shape, "u1", external=[(str(secret), 0, 216)])
            case "virtual data":
                layout = h5py.VirtualLayout(shape, "f8")
                layout[:] = h5py.VirtualSource(str(secret), "observations", shape)
                file.create_virtual_dataset("observations", layout)
    with pytest.raises(ValueError, match=r"a\.nc: .*needed data in the file itself"):
        pm.io.read(path)


def test_dimension_scales_of_another_kind_are_not_given_to_hdf5(tmp_path):
    """It frees memory that is not its own when the list is of numbers: heap corruption, found by the fuzzer."""
    path = tmp_path / "a.nc"
    pm.io.write_netcdf(recording(), path)
    with h5py.File(path, "r+") as file:
        del file["mask"].attrs["DIMENSION_LIST"]
        file["mask"].attrs["DIMENSION_LIST"] = np.ones(3, ">f4")
    with pytest.raises(ValueError, match="needed DIMENSION_LIST as HDF5 writes it"):
        pm.io.read(path)


def test_one_long_text_among_many_short_ones(tmp_path):
    """As an array each would take the room of the longest: here 8 GB."""
    many = ["a" * 10**6, *[""] * 1999]
    with pytest.raises(ValueError, match="short texts"):
        pm.Recording("a", np.ones((2000, 1, 1)), bin_width=0.02, condition=many)
    with pytest.raises(ValueError, match="short texts"):
        pm.Recording("a", np.ones((2000, 1, 1)), bin_width=0.02, attrs={"trials": {"cue": many}})
    text = json.dumps({"cue": {"__array__": "<U9", "shape": [2000], "data": many}})
    with pytest.raises(ValueError, match="short texts"):
        attributes.from_json(text)


@pytest.mark.parametrize(
    "entry",
    [
        {"__array__": "O", "shape": [1], "data": [{}]},
        {"__array__": "V1000000000", "shape": [1], "data": [1]},
        {"__array__": "(100000,100000)f4", "shape": [1], "data": [0]},
        {"__array__": "|S1000000000", "shape": [1], "data": ["a"]},
        {"__array__": "<f8", "shape": [10**12], "data": [0]},
        {"__array__": "<f8", "shape": [-1], "data": [1]},
        {"__array__": "<f8"},
    ],
    ids=str,
)
def test_arrays_in_attributes_that_are_none(entry):
    with pytest.raises(ValueError, match=r"^attributes: needed"):
        attributes.from_json(json.dumps({"a": entry}))


@pytest.mark.parametrize("name", ["..", "a/b", "..\\a", "a\0", "a\nb", "posterior", " "])
def test_names_that_could_be_places(name):
    with pytest.raises(ValueError, match="needed a name"):
        pm.Recording(name, np.ones((2, 3, 1)), bin_width=0.02)


def test_nothing_of_torch_is_imported_for_a_precision_that_a_file_names(tmp_path):
    recs = pm.simulate.limit_cycles([2.5], num_trials=2, num_steps=4, num_neurons=2)
    model = pm.models.MetaSSM(recs, latent_dim=1, embedding_dim=1, hidden_dim=2)
    fit = pm.fit(
        model, pm.guides.DKF(model, hidden_dim=2), recs, num_steps=1, warm_start=False, progress=False
    )
    fit.save(tmp_path)
    header = json.loads((tmp_path / "fit.json").read_text())
    # Torch imports it when asked for.
    (tmp_path / "fit.json").write_text(json.dumps(header | {"dtype": "_inductor"}))
    before = set(sys.modules)
    with pytest.raises(ValueError, match="needed dtype float32 or float64, got '_inductor'"):
        pm.load(tmp_path)
    assert not {name for name in set(sys.modules) - before if name.startswith("torch")}
