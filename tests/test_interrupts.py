"""Ctrl-C, by real signals: the fit so far after the step, at once the second time, and nothing of it stays."""

import os
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from fits import QUICK, assert_parameters, assert_same, parts, state

import pyro_metassm as pm
from pyro_metassm import _interrupts as interrupts
from pyro_metassm import _machine as machine
from pyro_metassm.trainer import Trainer
from pyro_metassm.warm_start import DynamicsFirst

pytestmark = pytest.mark.skipif(
    threading.current_thread() is not threading.main_thread(), reason="only the main thread gets signals"
)
LONG = QUICK | {"num_steps": 12}


@pytest.fixture(autouse=True)
def handler_stays():
    # A shell's background jobs ignore Ctrl-C.
    found = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, found)


def press() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def pressed(monkeypatch, at: int, times: int = 1) -> None:
    """Ctrl-C in the midst of a step, counted from 0."""
    original = Trainer.batch

    def batch(self, *args, **kwargs):
        if self.step == at and "names" in kwargs:
            for _ in range(times):
                press()
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "batch", batch)


def test_ctrl_c_returns_the_fit_so_far(recs, monkeypatch):
    expected = pm.fit(*parts(recs), recs, **LONG)
    pressed(monkeypatch, at=3)
    with pytest.warns(UserWarning, match=r"interrupted at step 4 of 12, this is the fit so far$"):
        fit = pm.fit(*parts(recs), recs, **LONG)
    monkeypatch.undo()
    assert fit.attrs["interrupted_at"] == 4
    assert np.array_equal(fit.history["elbo"], expected.history["elbo"][:4])
    assert not fit.model.training and fit.statistics.isfinite().all()
    assert np.isfinite(pm.posterior(fit, recs, num_samples=2)["b/posterior"]["latents"]).any()


def test_ctrl_c_saves_the_state_and_the_same_call_goes_on(recs, tmp_path, monkeypatch):
    expected = pm.fit(*parts(recs), recs, **LONG)
    pressed(monkeypatch, at=3)
    with pytest.warns(UserWarning, match="step 4 of 12, this is the fit so far; the same call again goes on"):
        pm.fit(*parts(recs), recs, **LONG, checkpoint=tmp_path, checkpoint_every=5)
    monkeypatch.undo()
    assert "step_00000004.safetensors" in [path.name for path in tmp_path.iterdir()]
    resumed = pm.fit(*parts(recs), recs, **LONG, checkpoint=tmp_path, checkpoint_every=5)
    assert_same(resumed, expected)
    assert "interrupted_at" not in resumed.attrs


def test_ctrl_c_in_the_start_cuts_it_short(recs, tmp_path, monkeypatch):
    """What was started so far is a fit of no steps, and no state to be resumed."""
    options = QUICK | {"warm_start_steps": 30}
    expected = pm.fit(*parts(recs), recs, **options)
    calls, original = [], DynamicsFirst.loss

    def loss(self, *args):
        calls.append(1)
        if len(calls) == 5:
            press()
        return original(self, *args)

    monkeypatch.setattr(DynamicsFirst, "loss", loss)
    with pytest.warns(UserWarning, match=r"interrupted at step 0 of 6, this is the fit so far$"):
        fit = pm.fit(*parts(recs), recs, **options, checkpoint=tmp_path)
    monkeypatch.undo()
    assert len(calls) == 5 and fit.history.sizes["step"] == 0
    assert all(v.isfinite().all() for v in state(fit.model, fit.guide).values())
    assert pm.posterior(fit, recs, num_samples=2)["posterior"]["embedding"].notnull().all()
    assert_same(pm.fit(*parts(recs), recs, **options, checkpoint=tmp_path), expected)


def test_a_second_ctrl_c_raises_at_once(recs, monkeypatch):
    model, guide = parts(recs)
    before = {k: v.clone() for k, v in state(model, guide).items()}
    pressed(monkeypatch, at=3, times=2)
    with pytest.raises(KeyboardInterrupt):
        pm.fit(model, guide, recs, **LONG)
    assert all(torch.equal(v, before[k]) for k, v in state(model, guide).items())


def test_ctrl_c_ends_all_restarts(recs, monkeypatch):
    pressed(monkeypatch, at=3)
    options = LONG | {"warm_start": False}
    with pytest.warns(UserWarning, match="interrupted at step 4 of 12|R-hat tells nothing"):
        restarts = pm.fit_restarts(*parts(recs), recs, num_restarts=3, validation=recs, **options)
    assert len(restarts.fits) == 1 and restarts.best.attrs["interrupted_at"] == 4


def test_the_last_step_may_be_the_one(recs, monkeypatch):
    expected = pm.fit(*parts(recs), recs, **QUICK)
    pressed(monkeypatch, at=5)
    with pytest.warns(UserWarning, match="interrupted at step 6 of 6"):
        fit = pm.fit(*parts(recs), recs, **QUICK)
    assert_parameters(fit, expected)


@pytest.mark.parametrize("what", ["adapt", "posterior", "waiting"])
def test_elsewhere_ctrl_c_raises_and_leaves_nothing_behind(recs, monkeypatch, what):
    """In an adaptation, in draws, and in a fit that waits for that of another thread."""
    model, guide = parts(recs.drop(["a"]))
    fit = pm.fit(model, guide, recs.drop(["a"]), **QUICK)
    before, number = torch.get_rng_state(), torch.get_num_threads()
    held, done = threading.Event(), threading.Event()

    def hold():
        with machine.alone():
            held.set()
            done.wait(30)

    if what == "adapt":
        pressed(monkeypatch, at=1)
        with pytest.raises(KeyboardInterrupt):
            few = {"num_steps": 3, "num_starts": 2, "search_steps": 2, "progress": False}
            pm.adapt(fit, recs.select(["a"]), **few)
    elif what == "posterior":
        monkeypatch.setattr(type(fit.guide), "forward", lambda *args, **kwargs: press())
        monkeypatch.setattr(type(fit.model), "forward", lambda *args, **kwargs: press())
        with pytest.raises(KeyboardInterrupt):
            pm.posterior(fit, recs.drop(["a"]), num_samples=2)
    else:
        other, timer = threading.Thread(target=hold), threading.Timer(0.1, press)
        other.start(), held.wait(30), timer.start()
        try:
            with pytest.raises(KeyboardInterrupt):
                pm.fit(model, guide, recs.drop(["a"]), **QUICK)
        finally:
            done.set(), other.join(), timer.join()
    assert torch.equal(before, torch.get_rng_state()) and torch.get_num_threads() == number
    free = []

    def ask():
        free.append(machine._lock.acquire(timeout=5))
        if free[-1]:
            machine._lock.release()

    asking = threading.Thread(target=ask)
    monkeypatch.undo()
    asking.start(), asking.join()
    assert free == [True]


def test_another_thread_leaves_the_handler_alone():
    seen = []

    def work():
        with interrupts.deferred() as stop:
            seen.append((signal.getsignal(signal.SIGINT), stop.requested))

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(before, False)]


@pytest.mark.parametrize("ignored", [signal.SIG_IGN, signal.SIG_DFL])
def test_a_process_that_ignores_the_signal_goes_on_doing_so(ignored):
    before = signal.signal(signal.SIGINT, ignored)
    try:
        with interrupts.deferred() as stop:
            assert signal.getsignal(signal.SIGINT) is ignored
            if ignored is signal.SIG_IGN:
                press()
            assert not stop.requested
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_handler_is_put_back_after_an_error():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ZeroDivisionError), interrupts.deferred():
        assert signal.getsignal(signal.SIGINT) is not before
        raise ZeroDivisionError
    assert signal.getsignal(signal.SIGINT) is before


CELL = """
import warnings
import pyro_metassm as pm
recs = pm.simulate.limit_cycles([2.5, 5.0], num_trials=8, num_steps=20)
model = pm.models.MetaSSM(recs, latent_dim=2, embedding_dim=1)
print("ready", flush=True)
fit = pm.fit(model, pm.guides.DKF(model), recs, num_steps=10**6, warm_start=False, progress=False)
print("returned", fit.attrs["interrupted_at"] == fit.history.sizes["step"])
"""


NOTEBOOK = """
import sys, threading
from jupyter_client import KernelManager

manager = KernelManager(kernel_name="python3")
manager.start_kernel(extra_arguments=["--colors=NoColor"])
client = manager.blocking_client()
client.start_channels()
client.wait_for_ready(timeout=120)

def output(message):
    text = message["content"].get("text", "")
    print(text, end="")
    if "ready" in text:
        threading.Timer(5.0, manager.interrupt_kernel).start()

reply = client.execute_interactive(sys.argv[1], timeout=300, output_hook=output)
print(reply["content"]["status"])
client.stop_channels()
manager.shutdown_kernel(now=True)
"""


@pytest.mark.slow
def test_a_notebook_has_the_fit_so_far():
    """A kernel as a notebook has it: the cell that was interrupted goes on after the fit.

    In a process of its own, since the client leaves event loops open.
    """
    pytest.importorskip("jupyter_client")
    call = [sys.executable, "-c", NOTEBOOK, CELL]
    ran = subprocess.run(call, capture_output=True, text=True, timeout=500)
    assert ran.returncode == 0, ran.stderr
    assert "returned True" in ran.stdout and "interrupted at step" in ran.stdout
    assert ran.stdout.rstrip().endswith("ok")
