"""A fit that ends before its time is taken up again where it stopped, to the bit; what is not its own is refused."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from fits import QUICK, assert_same, parts
from problems import recordings
from safetensors import safe_open
from safetensors.torch import save_file

import pyro_metassm as pm
from pyro_metassm import checkpoints, specification, writing
from pyro_metassm.checkpoints import Run
from pyro_metassm.recordings import Recording, Recordings
from pyro_metassm.trainer import Options, Trainer

SHORT = {"warm_start": False, "num_steps": 6, "trials_per_step": 2, "progress": False}


@pytest.fixture(scope="module")
def recs() -> Recordings:
    return recordings()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class Crash(Exception):
    pass


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


# ---- what a specification says ------------------------------------------------------------------------------


def data(**changed) -> Recordings:
    """Two recordings with everything that a fit reads, one thing of the first changed."""
    rng = np.random.default_rng(0)
    fields = {
        "observations": rng.poisson(2.0, (4, 6, 3)) * 1.0,
        "bin_width": 0.02,
        "inputs": rng.normal(size=(4, 6, 2)),
        "condition": ["x", "y", "x", "y"],
        "neuron_ids": ["u", "v", "w"],
        "mask": np.ones((4, 6), bool),
        "held_out_neurons": [0],
        "lengths": np.array([6, 6, 6, 5]),
    }
    fields["mask"][3, 5] = False
    other = Recording("b", fields["observations"], bin_width=0.02, inputs=fields["inputs"])
    return Recordings([Recording("a", **(fields | changed)), other])


class Inputs(pm.models.MetaSSM):
    """A user's model, with a number of its own."""

    gain = 0.5

    def transition(self, z, dynamics, inputs):
        return dist.Normal(
            dynamics(z) + self.gain * inputs.mean(-1, keepdim=True), self.process_noise()
        ).to_event(1)


def told(recs=None, *, change=None, options=None, seed=0, validation=None, every=1, **more) -> dict:
    recs = data() if recs is None else recs
    torch.manual_seed(seed)
    model = Inputs(recs, latent_dim=2, embedding_dim=1, hidden_dim=5, **more)
    guide = pm.guides.DKF(model, hidden_dim=4)
    if change is not None:
        change(model, guide)
    options = {"num_steps": 6, "trials_per_step": 2, "recordings_per_step": None, "learning_rate": 0.01,
               "warm_start": True, "warm_start_steps": 4, "clip_norm": 1.0, "update_penalty": 0.0,
               "seed": 0} | (options or {})  # fmt: skip
    return json.loads(
        json.dumps(specification.specification(model, guide, recs, Options(**options), validation, every))
    )


def test_a_specification_is_the_same_for_the_same_fit_whatever_the_random_start():
    assert told() == told(seed=1)
    assert told(every=1) == told(every=2)  # nothing is validated


CHANGES = {
    "recordings.a": [
        {"recs": data(observations=np.ones((4, 6, 3)))},
        {"recs": data(bin_width=0.02 * (1 + 1e-7))},
        {"recs": data(inputs=np.ones((4, 6, 2)))},
        {"recs": data(condition=["x", "y", "x", "x"])},
        {"recs": data(condition=None)},
        {"recs": data(neuron_ids=["u", "v", "z"])},
        {"recs": data(held_out_neurons=[1])},
        {"recs": data(lengths=np.array([6, 6, 6, 6]))},
        {"recs": data(mask=np.arange(24).reshape(4, 6) % 23 > 0)},
    ],
    "order of recordings": [{"recs": data().select(["b", "a"])}],
    "options": [{"options": {"seed": 1}}, {"options": {"warm_start_steps": 5}}],
    "validation": [{"validation": data()}],
    "model.config": [{"likelihood": pm.likelihoods.Poisson}, {"rank": 2}],
    "model.fixed.process_noise": [{"change": lambda m, g: m.process_noise.requires_grad_(False)}],
    "model.attributes": [{"change": lambda m, g: setattr(m, "gain", 0.25)}],
    "guide.attributes": [{"change": lambda m, g: setattr(g, "rollout_probability", 0.125)}],
    "guide.fixed.smoothing": [{"change": lambda m, g: g.smoothing.fill_(1.5)}],
    "guide.trained": [{"change": lambda m, g: (m.double(), g.double())}],
}


@pytest.mark.parametrize(
    ("where", "other"), [(where, other) for where, others in CHANGES.items() for other in others]
)
def test_a_specification_has_everything_that_decides_the_numbers(where, other):
    assert where in specification.differences(told(**other), told(), limit=99)


def test_validation_is_part_of_a_specification():
    one = {"validation": data(), "every": 2}
    assert told(**one) == told(**one) != told(**(one | {"every": 3}))
    assert told(**one) != told(validation=data(condition=None), every=2)


def test_values_that_are_frozen_count_and_those_that_are_trained_do_not():
    def frozen(value):
        def change(model, guide):
            with torch.no_grad():
                model.process_noise.log_scale.fill_(value)
            model.process_noise.requires_grad_(False)

        return change

    assert told(change=frozen(0.5)) == told(change=frozen(0.5), seed=2) != told(change=frozen(0.25))


def test_a_class_of_the_user_counts_with_its_source(tmp_path, monkeypatch):
    """An edited hook is another model; a comment is not."""
    monkeypatch.syspath_prepend(tmp_path)
    recs, found = recordings(), []
    text = "import pyro_metassm as pm\nclass Mine(pm.models.MetaSSM):\n    def initial_state(self, e):\n"
    bodies = {"same": "return super().initial_state(e)", "comment": "# mine\n        return super().initial_state( e )",
              "edited": "return super().initial_state(2 * e)"}  # fmt: skip
    for name, body in bodies.items():
        (tmp_path / f"mine_{name}.py").write_text(f"{text}        {body}\n")
        cls = __import__(f"mine_{name}").Mine
        model = cls(recs, latent_dim=2, embedding_dim=1)
        found.append(specification._sources(model)[f"mine_{name}.Mine"])
    assert found[0] == found[1] != found[2] and None not in found
    namespace: dict = {}
    exec(
        "import pyro_metassm as pm\nclass Prompt(pm.models.MetaSSM): pass",
        namespace | {"__name__": "nowhere"},
        namespace,
    )
    assert specification._source(namespace["Prompt"]) is None


# ---- damage, disks, other processes -------------------------------------------------------------------------


def crashed(recs, folder, monkeypatch, at=5) -> None:
    """A fit that leaves the states 2 and 4."""
    original = Trainer.take_step

    def take_step(self):
        if self.step == at:
            raise Crash
        original(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "take_step", take_step)
        with pytest.raises(Crash):
            pm.fit(*parts(recs), recs, **SHORT, checkpoint=folder, checkpoint_every=2)


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
        ({"rates": []}, "needed the state of a fit"),
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
