"""Attacks that have a name, on what other programs write: NWB, MATLAB, the benchmark's tensors, Zarr stores."""

import json
import shutil
import struct
from pathlib import Path

import h5py
import numpy as np
import pytest
from hostile import recording
from hostile_hdf5 import Mat, Nlb, Nwb

import pyro_metassm as pm
from pyro_metassm import saving
from pyro_metassm.checkpoints import _read


@pytest.mark.parametrize("kind", [Nlb, Mat, Nwb])
@pytest.mark.parametrize(
    "how", ["external link", "external data", "virtual data", "never written", "tiny chunks"]
)
def test_no_other_file_is_read_and_no_size_believed(kind, how, tmp_path):
    target = kind(tmp_path)
    name = {"Nlb": "train_spikes_heldin", "Mat": "trials/spikes", "Nwb": "units/spike_times"}[kind.__name__]
    assert isinstance(target.read(), pm.Recording)
    with h5py.File(target.path, "r+") as file:
        shape, kept = file[name].shape, dict(file[name].attrs)
        del file[name]
        message = "needed data in the file itself"
        match how:
            case "external link":
                file[name] = h5py.ExternalLink("secret.h5", f"/{name}")
            case "external data":
                file.create_dataset(name, shape, "f8", external=[(str(target.secret), 0, 8 * np.prod(shape))])
            case "virtual data":
                layout = h5py.VirtualLayout(shape, "f8")
                layout[...] = h5py.VirtualSource(str(target.secret), name, shape)
                file.create_virtual_dataset(name, layout)
            case "never written":
                message = "at most 512 bytes for each byte of the file|at most 17179869184 bytes"
                shape = (10**9,) if kind is Nwb else (1000, 1000, 1000)
                dtype = h5py.ref_dtype if kind is Mat else "f8"
                file.create_dataset(name, shape, dtype, chunks=(10,) * len(shape))
            case "tiny chunks":  # few bytes, but HDF5 takes 2.3 GiB to read them
                message = r"at most 512 bytes for each byte of the file, got 25\d{8} for"
                shape = (10**7,) if kind is Nwb else (1, 10**7)
                file.create_dataset(name, shape, "u1", chunks=(1, 16)[-len(shape) :])
        if how != "external link":
            file[name].attrs.update(kept)
    with pytest.raises(ValueError, match=message) as caught:
        target.read()
    assert str(caught.value).startswith(str(target.path))


def test_tiny_chunks_that_are_there_are_read(tmp_path):
    target = Nlb(tmp_path)
    counts = np.random.default_rng(0).poisson(1.0, (20, 30, 20))
    with h5py.File(target.path, "w") as file:
        file.create_dataset("train_spikes_heldin", data=counts.astype("u1"), chunks=(1, 1, 1))
    assert np.array_equal(pm.read_nlb(target.path, bin_width=0.02).values, counts)


def test_cells_that_hold_themselves(tmp_path):
    """Ten references to the table itself, sixteen deep: a file of some kilobytes, 10^16 cells."""
    target = Mat(tmp_path)
    with h5py.File(target.path, "r+") as file:
        cells = file.create_dataset("loop", (1, 10), dtype=h5py.ref_dtype)
        cells.attrs["MATLAB_class"] = np.bytes_("cell")
        cells[...] = cells.ref
    with pytest.raises(ValueError, match=r"at most 16 deep|at most 512 bytes for each byte"):
        target.read()


@pytest.fixture
def store(tmp_path):
    pytest.importorskip("zarr")
    pm.io.write_zarr(recording(), tmp_path / "a.zarr")
    return tmp_path / "a.zarr"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "codecs",
            [{"name": "numcodecs.pickle"}],
            "arrays as write_zarr makes them, got other kinds or codecs",
        ),
        ("data_type", "string", "other kinds or codecs"),
        ("zarr_format", 2, "needed Zarr of version 3"),
        ("shape", [10**11, 9, 4], r"needed all chunks of values, got \d+ of \d+ missing"),
        ("shape", [6, 10**11, 4], "chunks for a trial"),
        ("shape", [0, 9, 4], r"got a shape \[0, 9, 4\]"),
    ],
)
def test_what_a_store_says_of_its_arrays(store, key, value, message):
    path = store / "r0" / "values" / "zarr.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(ValueError, match=message) as caught:
        pm.io.read(store)
    assert str(caught.value).startswith(str(store))


@pytest.mark.parametrize("name", ["r0", "r0/values", "r0/values/c/0", "r0/values/c/0/0/0", "r0/zarr.json"])
def test_links_out_of_a_store(name, store, tmp_path):
    shutil.copytree(store, tmp_path / "b.zarr")
    place = store / name
    shutil.rmtree(place) if place.is_dir() else place.unlink()
    place.symlink_to(tmp_path / "b.zarr" / name)
    with pytest.raises(ValueError, match="needed data in the store itself"):
        pm.io.read(store)


def test_a_chunk_that_becomes_large(store):
    """64 MiB of zeros in some kilobytes, with a right checksum: refused before it is unpacked."""
    numcodecs, crc = pytest.importorskip("numcodecs"), pytest.importorskip("google_crc32c")
    data = bytes(numcodecs.Zstd(1).encode(bytes(2**26)))
    chunk = next(
        path for path in Path(store / "r0" / "values").rglob("*") if path.name == "0" and path.is_file()
    )
    chunk.write_bytes(data + crc.value(data).to_bytes(4, "little"))
    with pytest.raises(ValueError, match=rf"needed chunks of 1728 bytes, got {2**26}"):
        pm.io.read(store)


def test_what_a_file_calls_its_tensors_is_not_printed_as_it_is(tmp_path):
    """NUL and colours of a terminal, in the messages of the library that reads."""
    header = json.dumps({"a": {"dtype": "F\0\x1b[31m", "shape": [1], "data_offsets": [0, 4]}}).encode()
    content = struct.pack("<Q", len(header)) + header + bytes(4)
    (tmp_path / saving.TENSORS).write_bytes(content)
    (tmp_path / saving.HEADER).write_text("{}")
    (tmp_path / "state.safetensors").write_bytes(content)
    for call in (lambda: pm.load(tmp_path), lambda: _read(tmp_path / "state.safetensors")):
        with pytest.raises(ValueError, match=r"safetensors|no fit") as caught:
            call()
        assert str(tmp_path) in str(caught.value) and str(caught.value).isprintable()
