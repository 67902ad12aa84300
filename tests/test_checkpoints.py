"""A fit that ends before its time is taken up again where it stopped, to the bit; full disks, other processes."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from crashing import SHORT, Crash, names
from fits import QUICK, assert_same, parts

import pyro_metassm as pm
from pyro_metassm import writing
from pyro_metassm.checkpoints import Run
from pyro_metassm.recordings import Recording, Recordings
from pyro_metassm.trainer import Trainer


@pytest.mark.parametrize("crash_at", [5, 8])
def test_a_fit_is_resumed_where_it_stopped(recs, tmp_path, monkeypatch, crash_at):
    """A crash between two checkpoints; what is taken up ends in the same numbers to the bit."""
    model, guide = parts(recs)
    options = QUICK | {"num_steps": 11, "recordings_per_step": 2, "validation": recs, "validation_every": 2}
    expected = pm.fit(model, guide, recs, **options)
    original = Trainer.take_step

    def take_step(self, *args):
        if self.step == crash_at:
            raise Crash
        original(self, *args)

    monkeypatch.setattr(Trainer, "take_step", take_step)
    with pytest.raises(Crash):
        pm.fit(model, guide, recs, checkpoint=tmp_path, checkpoint_every=2, **options)
    taken = []

    def counted(self, *args):
        taken.append(self.step)
        original(self, *args)

    monkeypatch.setattr(Trainer, "take_step", counted)
    resumed = pm.fit(model, guide, recs, checkpoint=tmp_path, checkpoint_every=2, **options)
    assert taken == list(range(crash_at - crash_at % 2, 11))  # from the last checkpoint, not from the start
    assert_same(resumed, expected)
    assert names(tmp_path) == [".lock", "step_00000010.safetensors", "step_00000011.safetensors"]
    # Once it has ended, it is read and not run again.
    taken.clear()
    assert_same(pm.fit(model, guide, recs, checkpoint=tmp_path, checkpoint_every=2, **options), expected)
    assert taken == []


def test_a_fit_is_resumed_in_the_midst_of_bad_steps(recs, tmp_path, monkeypatch):
    """What was skipped and the last good state are part of the state: it gives up where an uninterrupted fit does."""
    model, guide = parts(recs)
    options, original = SHORT | {"num_steps": 20}, Trainer.batch

    def batch(self, *args, **kwargs):
        made = original(self, *args, **kwargs)
        if self.step in (2, *range(6, 20)) and kwargs.get("names"):
            made.observations[0] = 3e38
        return made

    monkeypatch.setattr(Trainer, "batch", batch)
    with pytest.raises(pm.NonFiniteLossError) as whole:
        pm.fit(model, guide, recs, **options)
    taken = Trainer.take_step

    def take_step(self):
        if self.step == 9:
            raise Crash
        taken(self)

    monkeypatch.setattr(Trainer, "take_step", take_step)
    with pytest.raises(Crash):
        pm.fit(model, guide, recs, checkpoint=tmp_path, checkpoint_every=4, **options)
    monkeypatch.setattr(Trainer, "take_step", taken)
    with pytest.raises(pm.NonFiniteLossError, match=r"at step 7, .*nor at the 4 steps") as resumed:
        pm.fit(model, guide, recs, checkpoint=tmp_path, checkpoint_every=4, **options)
    assert str(resumed.value) == str(whole.value)
    assert_same(resumed.value.fit, whole.value.fit)


def test_checkpoints_do_not_change_the_fit(recs, tmp_path):
    model, guide = parts(recs)
    plain = pm.fit(model, guide, recs, **QUICK)
    assert_same(
        pm.fit(model, guide, recs, checkpoint=tmp_path / "new" / "folder", checkpoint_every=1, **QUICK), plain
    )


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 1},
        {"num_steps": 7},
        {"trials_per_step": 1},
        {"learning_rate": 0.02},
        {"recordings_per_step": 1},
        {"clip_norm": 2.0},
        {"update_penalty": 0.0},
        {"kl_warmup_steps": 4},
    ],
)
def test_another_specification_is_not_resumed(recs, tmp_path, other):
    model, guide = parts(recs)
    options = QUICK | {"warm_start": False, "checkpoint": tmp_path}
    pm.fit(model, guide, recs, **options)
    with pytest.raises(
        ValueError, match=f"another specification.*{next(iter(other))}.*choose another folder"
    ):
        pm.fit(model, guide, recs, **(options | other))


def test_other_data_are_not_resumed(recs, tmp_path):
    pm.fit(*parts(recs), recs, **SHORT, checkpoint=tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    values = recs["a"].observations.copy()
    values[np.isfinite(values)] += 1.0  # the same shapes, other data
    changed = Recordings(
        [Recording("a", values, bin_width=recs["a"].bin_width), *(recs[n] for n in recs.names[1:])]
    )
    with pytest.raises(ValueError, match=r"another specification \(it differs in recordings\.a"):
        pm.fit(*parts(recs), changed, **SHORT, checkpoint=tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.skipif(sys.platform == "win32", reason="no limits of files there")
def test_a_full_disk_leaves_the_last_state_and_the_fit(recs, tmp_path, monkeypatch):
    """No file may grow beyond 2 kB from the second write on: the first state stays, and is taken up afterwards."""
    expected = pm.fit(*parts(recs), recs, **SHORT)
    limits, saves, original = resource.getrlimit(resource.RLIMIT_FSIZE), [], Run.save

    def save(self, trainer):
        saves.append(trainer.step)
        if len(saves) < 2:
            return original(self, trainer)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
        try:
            return original(self, trainer)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(Run, "save", save)
    with pytest.raises(
        pm.CheckpointError,
        match=r"step_00000004.safetensors: could not be written at step 4: .*still there: step_00000002.*make room",
    ) as caught:
        pm.fit(*parts(recs), recs, **SHORT, checkpoint=tmp_path, checkpoint_every=2)
    assert isinstance(caught.value, OSError)
    assert names(tmp_path) == [".lock", "step_00000002.safetensors"]
    so_far = caught.value.fit
    assert np.array_equal(so_far.history["elbo"], expected.history["elbo"][:4])
    assert np.isfinite(pm.posterior(so_far, recs, num_samples=2)["b/posterior"]["latents"]).any()
    monkeypatch.undo()
    assert_same(pm.fit(*parts(recs), recs, **SHORT, checkpoint=tmp_path, checkpoint_every=2), expected)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_file_is_on_the_disk_before_it_has_its_name_and_its_name_after(tmp_path, monkeypatch):
    """The order of what the system is asked for: data, then the name, then the folder."""
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda fd: (calls.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name), fsync(fd))
    )
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append(f"{a.name} -> {b.name}"), replace(a, b)))
    writing.write_part(tmp_path / "x", b"data")
    assert (tmp_path / "x.part").read_bytes() == b"data" and not (tmp_path / "x").exists()
    writing.commit(tmp_path / "x")
    assert calls == ["x.part", "x.part -> x", tmp_path.name]


def test_one_fit_at_a_time_writes_into_a_folder(recs, tmp_path):
    pytest.importorskip("fcntl")
    with Run(tmp_path, {}), pytest.raises(ValueError, match="a folder that no other fit writes into"):
        pm.fit(*parts(recs), recs, **SHORT, checkpoint=tmp_path)
    pm.fit(*parts(recs), recs, **SHORT, checkpoint=tmp_path)


def test_a_file_is_no_folder(recs, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"needed a folder, got .*choose another"):
        pm.fit(*parts(recs), recs, **SHORT, checkpoint=tmp_path / "file")


def test_a_folder_that_cannot_be_written_is_told_before_the_fit(recs, tmp_path, monkeypatch):
    """Whoever runs the tests may write anywhere, so what stands in the way is a folder in place of the lock."""
    pytest.importorskip("fcntl")
    (tmp_path / "new" / ".lock").mkdir(parents=True)
    with (
        monkeypatch.context() as patch,
        pytest.raises(ValueError, match=r"that can be written, got .*choose another"),
    ):
        patch.setattr(Trainer, "take_step", lambda self: pytest.fail("a step was taken"))
        pm.fit(*parts(recs), recs, **SHORT, checkpoint=tmp_path / "new")
    # One that has ended is read all the same.
    ended = pm.fit(*parts(recs), recs, **SHORT, checkpoint=tmp_path / "old")
    (tmp_path / "old" / ".lock").unlink()
    (tmp_path / "old" / ".lock").mkdir()
    assert_same(pm.fit(*parts(recs), recs, **SHORT, checkpoint=tmp_path / "old"), ended)


def test_fits_that_are_killed_end_in_the_same_bits():
    """Four kills, in writes and at random moments, of tests/reliability/kills.py; `make reliability` does fifty."""
    script = Path(__file__).parent / "reliability" / "kills.py"
    path = os.pathsep.join([str(script.parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, str(script), "--kills", "4", "--num-steps", "12"],
        env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["kills"] == 4 and report["differing"] == []
