"""States that are damaged, forged or of another machine: told, and never taken up in silence."""

import json
from pathlib import Path

import pytest
import torch
from crashing import SHORT, Crash, crashed, names
from fits import assert_same, parts
from safetensors import safe_open
from safetensors.torch import save_file

import pyro_metassm as pm
from pyro_metassm import checkpoints, writing

DAMAGES = {
    "cut": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "no file of a fit": lambda data: b"\xff" * 64,
    "a bit of a number": lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:],
    "a digit of the header": lambda data: data.replace(b'step\\\\": 4,', b'step\\\\": 3,', 1),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_is_told_and_the_one_before_is_taken(recs, tmp_path, monkeypatch, damage):
    expected = pm.fit(*parts(recs), recs, **SHORT)
    crashed(recs, tmp_path, monkeypatch)
    last = tmp_path / "step_00000004.safetensors"
    spoiled = DAMAGES[damage](last.read_bytes())
    if damage == "a digit of the header":
        text = safe_open(last, "pt").metadata()["checkpoint"]
        spoiled = last.read_bytes().replace(
            *(json.dumps(t).encode() for t in (text, text.replace('"step": 4', '"step": 3')))
        )
    assert spoiled != last.read_bytes()
    last.write_bytes(spoiled)
    with pytest.warns(
        UserWarning, match=r"step_00000004.*(cannot be read|is damaged).* taken up from step_00000002"
    ):
        resumed = pm.fit(*parts(recs), recs, **SHORT, checkpoint=tmp_path, checkpoint_every=2)
    assert_same(resumed, expected)
    assert names(tmp_path) == [".lock", "step_00000004.safetensors", "step_00000006.safetensors"]


def test_a_damaged_state_is_not_kept_in_place_of_a_good_one(recs, tmp_path, monkeypatch):
    crashed(recs, tmp_path, monkeypatch)
    (tmp_path / "step_00000004.safetensors").write_bytes(b"")
    with pytest.warns(UserWarning, match="taken up from step_00000002"), monkeypatch.context() as patch:
        patch.setattr(writing, "commit", once(writing.commit))
        with pytest.raises(Crash):
            pm.fit(*parts(recs), recs, **SHORT, checkpoint=tmp_path, checkpoint_every=3)
    assert names(tmp_path)[:3] == [".lock", "step_00000002.safetensors", "step_00000003.safetensors"]
    assert "step_00000004.safetensors" not in names(tmp_path)


def once(function):
    """A function that works once."""
    calls = []

    def called(*args):
        if calls:
            raise Crash
        calls.append(args)
        return function(*args)

    return called


def test_without_a_state_that_can_be_read_nothing_is_done(recs, tmp_path, monkeypatch):
    crashed(recs, tmp_path, monkeypatch)
    for path in tmp_path.glob("*.safetensors"):
        path.write_bytes(b"\xff" * 64)
    before = names(tmp_path)
    with pytest.raises(ValueError, match=r"needed a safetensors file of a fit.*no other state.*start afresh"):
        pm.fit(*parts(recs), recs, **SHORT, checkpoint=tmp_path)
    assert names(tmp_path) == before


def forged(path: Path, tensors=None, **changes) -> None:
    """The state with another header, signed as its own."""
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["checkpoint"]) | changes
        tensors = {key: file.get_tensor(key) for key in file.keys()} | (tensors or {})  # noqa: SIM118
    text = json.dumps({key: value for key, value in header.items() if value is not ...})
    save_file(tensors, path, {"checkpoint": text, "digest": checkpoints._digest(text, tensors)})


def test_other_formats_and_what_is_no_state_are_refused(recs, tmp_path, monkeypatch):
    crashed(recs, tmp_path, monkeypatch)
    last = tmp_path / "step_00000004.safetensors"
    good = last.read_bytes()
    for change, message in (
        ({"format": 2}, "needed format 1, got 2, written by another version.*choose another folder"),
        ({"specification": "?"}, "needed the state of this fit, got that of another"),
        ({"seconds": []}, "needed the state of a fit"),
        ({"step": ...}, "needed the state of a fit"),
    ):
        forged(last, **change)
        with pytest.raises(ValueError, match=f"{last}: {message}"):
            pm.fit(*parts(recs), recs, **SHORT, checkpoint=tmp_path)
        last.write_bytes(good)


@pytest.mark.parametrize("key", ["format", "environment", "specification"])
def test_what_a_state_says_is_not_printed_as_it_is(key, recs, tmp_path, monkeypatch):
    """NUL and colours of a terminal, in a refusal and in a warning."""
    crashed(recs, tmp_path, monkeypatch)
    last, bad = tmp_path / "step_00000004.safetensors", "\0\x1b[31m"
    with safe_open(last, "pt") as file:
        there = json.loads(file.metadata()["checkpoint"])[key]
    part = "device" if key == "environment" else "model"
    forged(last, **{key: there | {part: bad} if isinstance(there, dict) else bad})
    told = pytest.warns(UserWarning) if key == "environment" else pytest.raises(ValueError)
    with told as caught:
        pm.fit(*parts(recs), recs, **SHORT, checkpoint=tmp_path)
    text = str(caught[0].message if key == "environment" else caught.value)
    assert "??[31m" in text and text.isprintable()


def test_a_state_of_another_machine_is_taken_up_and_told(recs, tmp_path, monkeypatch):
    """One that was written with a GPU goes on without."""
    expected = pm.fit(*parts(recs), recs, **SHORT)
    crashed(recs, tmp_path, monkeypatch)
    for path in tmp_path.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            there = json.loads(file.metadata()["checkpoint"])["environment"]
        forged(path, {"rng_cuda": torch.zeros(16, dtype=torch.uint8)}, environment=there | {"device": "cuda"})
    with pytest.warns(UserWarning, match=r"written elsewhere \(device: cpu here, cuda there\)"):
        resumed = pm.fit(*parts(recs), recs, **SHORT, checkpoint=tmp_path)
    assert_same(resumed, expected)
