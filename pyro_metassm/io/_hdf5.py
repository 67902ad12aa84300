"""A look at an HDF5 file before it is read: what it claims, and that everything that it holds is its own."""

from __future__ import annotations

import math
import os
from typing import Any

import h5py
import numpy as np

from pyro_metassm.io._files import LARGEST, refuse_claims

MOST_OBJECTS = 10_000
LONG = 2**24  # bytes
PIECE = 64  # texts of any length read at a time, to see how long they are
CHUNK = 4096  # bytes that HDF5 takes for each chunk that it reads, be it one that was never written (3,928 measured)


def inspect(path: str | os.PathLike[str], largest: int) -> None:
    """Refuse a file that would take more memory than it may, or that would have other files read.

    Links into other files, data that lie in other files and virtual data sets are refused: who sends a file is not to
    have others read by it. Sizes are those that the file claims, unpacked; texts of variable length, of which many may
    be the same place in the file, are read a few at a time until they are too many.

    Args:
        path: the file.
        largest: bytes that it may claim.

    Raises:
        ValueError: what is refused.
        OSError: no HDF5 file.
    """
    size = os.path.getsize(path)
    with h5py.File(path, "r") as file:
        seen: set[Any] = set()
        groups: list[h5py.Group] = [file]
        claimed = 0
        while groups:
            group = groups.pop()
            claimed += _attributes(group, size)
            for name in group:
                item = own(group, name)
                address = h5py.h5o.get_info(item.id).addr
                if address in seen:
                    continue
                seen.add(address)
                if len(seen) > MOST_OBJECTS:
                    raise ValueError(f"needed at most {MOST_OBJECTS} objects, got more")
                if isinstance(item, h5py.Group):
                    groups.append(item)
                elif isinstance(item, h5py.Dataset):
                    claimed += to_read(item)
                    _check_scales(item, name)
                    claimed += _attributes(item, size)
                    refuse_claims(claimed, size, largest)
                    if item.dtype.hasobject:
                        claimed += _texts(item, size, largest)
        refuse_claims(claimed, size, largest)


def own(group: h5py.Group, name: str) -> Any:
    """What a group has of this name; refused is what another file, or another place, has.

    Raises:
        ValueError: A link that is no hard one, or data that lie in another file.
    """
    link = group.get(name, getlink=True)
    if not isinstance(link, h5py.HardLink):
        raise ValueError(f"{name!r}: needed data in the file itself, got a {type(link).__name__}")
    return refuse_foreign(group[name])


def refuse_foreign(item: Any) -> Any:
    """The item, if its data lie in its own file.

    Raises:
        ValueError: They do not.
    """
    if isinstance(item, h5py.Dataset) and (item.external or item.is_virtual):
        raise ValueError(f"{item.name!r}: needed data in the file itself, got data that lie in another file")
    return item


def to_read(dataset: h5py.Dataset) -> int:
    """Bytes that all of a data set takes to read: its numbers, and what HDF5 keeps of each chunk while it reads.

    Chunks count more than numbers if they are tiny: ten million bytes in chunks of 16 are 2.3 GiB while they are read.
    """
    shape = dataset.shape or ()
    chunks = dataset.chunks and math.prod(-(-n // c) for n, c in zip(shape, dataset.chunks, strict=True))
    return math.prod(shape) * dataset.dtype.itemsize + CHUNK * (chunks or 0)


def inspect_links(file: h5py.File, largest: int = LARGEST) -> None:
    """As `inspect` of a large file of which little is to be read: what it claims is asked of chunks and attributes.

    Links within the file are followed to where they lead; `refuse_reading` asks for what is read after that.

    Raises:
        ValueError: What is refused.
    """
    size, claimed = file.id.get_filesize(), 0
    seen: set[Any] = set()
    groups: list[h5py.Group] = [file]
    while groups:
        group = groups.pop()
        claimed += _read_attributes(group, size, largest)
        for name in group:
            if isinstance(group.get(name, getlink=True), h5py.SoftLink):
                continue  # leads to what is looked at, or nowhere
            item = own(group, name)
            address = h5py.h5o.get_info(item.id).addr
            if address in seen:
                continue
            seen.add(address)
            if isinstance(item, h5py.Group):
                groups.append(item)
            elif isinstance(item, h5py.Dataset):
                claimed += _read_attributes(item, size, largest)
                if item.chunks:  # one is unpacked, whatever is read
                    refuse_claims(math.prod(item.chunks) * item.dtype.itemsize, size, largest)
            refuse_claims(claimed, size, largest)


def refuse_reading(*several: Any, largest: int = LARGEST) -> None:
    """Refuse data of HDF5 that claim, all together, more than their file may; others are in memory.

    Raises:
        ValueError: They do, or they lie in another file.
    """
    claimed = 0
    for data in several:
        dataset = getattr(data, "dataset", data)
        if isinstance(dataset, h5py.Dataset):
            refuse_foreign(dataset)
            size = dataset.file.id.get_filesize()
            claimed += to_read(dataset)
            refuse_claims(claimed, size, largest)
            if h5py.check_string_dtype(dataset.dtype) or h5py.check_vlen_dtype(dataset.dtype):
                claimed += _texts(dataset, size, largest) if dataset.dtype.hasobject else 0
                refuse_claims(claimed, size, largest)


def _check_scales(dataset: h5py.Dataset, name: str) -> None:
    """Refuse dimension scales of other kinds than HDF5 makes: it reads them unseen, into memory that is not theirs."""
    attrs = dataset.attrs
    kinds = {
        key: attrs.get_id(key)
        for key in ("DIMENSION_LIST", "REFERENCE_LIST", "CLASS", "NAME")
        if key in attrs
    }
    for key, found in kinds.items():
        dtype, shape = found.dtype, found.shape
        match key:
            case "DIMENSION_LIST":
                inner = h5py.check_vlen_dtype(dtype)
                good = inner is not None and h5py.check_ref_dtype(inner) is h5py.Reference
                good = good and shape == (dataset.ndim,)
            case "REFERENCE_LIST":
                good = dtype.names == ("dataset", "dimension") and len(shape) == 1
                good = good and h5py.check_ref_dtype(dtype["dataset"]) is h5py.Reference
                good = good and dtype["dimension"].kind in "iu" and dtype["dimension"].itemsize == 4
            case _:
                good = h5py.check_string_dtype(dtype) is not None and shape == ()
        if not good:
            raise ValueError(f"{name!r}: needed {key} as HDF5 writes it, got {dtype} of shape {shape}")


def _attributes(item: h5py.HLObject, size: int) -> int:
    """Bytes of the attributes of a group or data set; texts of any length count as if they were long."""
    total, long = 0, min(size, LONG)
    for name in item.attrs:
        found = item.attrs.get_id(name)
        many = math.prod(found.shape)
        total += many * found.dtype.itemsize + (many - 1) * long * found.dtype.hasobject
    return total


def _read_attributes(item: h5py.HLObject, size: int, largest: int) -> int:
    """Bytes of the attributes, which are read if those of each by itself cannot be too many."""
    total = 0
    for name in item.attrs:
        found = item.attrs.get_id(name)
        many = math.prod(found.shape or ())
        total += many * found.dtype.itemsize
        if found.dtype.hasobject and many > 1:
            refuse_claims(many * min(size, LONG), size, largest)
            values = np.ravel(item.attrs[name]).tolist()
            total += sum(len(value) for value in values if isinstance(value, (str, bytes, np.ndarray)))
    return total


def _texts(dataset: h5py.Dataset, size: int, largest: int) -> int:
    """Bytes of all texts (or lists) of a data set, read piece by piece."""
    total = 0
    if dataset.ndim == 0:
        return len(dataset[()])
    for first in range(0, len(dataset), PIECE):
        total += sum(len(item) for item in dataset[first : first + PIECE].ravel())
        refuse_claims(total, size, largest)
    return total
