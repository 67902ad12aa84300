"""Whether C is compiled, kept and used for the recurrent encoder."""

import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pyro_metassm import native
from pyro_metassm.guides import gru
from pyro_metassm.guides.gru import BidirectionalGRU
from pyro_metassm.native import gru as compiled_gru

Way = Callable[..., Tensor]
needs_compiler = pytest.mark.skipif(compiled_gru.library(torch.float32) is None, reason="no C compiler")


def chosen(network: BidirectionalGRU, x: Tensor, lengths: Tensor) -> Way:
    weights = (
        network.weight_in,
        network.bias_in,
        network.weight_hidden,
        network.bias_hidden,
        network.weight_out,
    )
    return network._way(x, lengths, *weights)


@needs_compiler
def test_c_is_given_only_what_it_can_read():
    network, lengths = BidirectionalGRU(3, 4, 2), torch.tensor([6, 1])
    x = torch.randn(2, 6, 3)
    assert chosen(network, x, lengths) is network._workspace
    assert chosen(network.double(), x.double(), lengths) is network._workspace
    for wrong in (
        (x, lengths),  # of another type than the weights
        (x.double()[..., :2], lengths),
        (x.double(), lengths + 1),
        (x.double(), lengths[:1]),
        (x.double(), lengths.int()),
        (x.double()[:0], lengths[:0]),
        (x.double().to("meta"), lengths),
    ):
        assert chosen(network, *wrong) is gru.by_loop
    half = network.bfloat16()
    assert chosen(half, x.bfloat16(), lengths) is gru.by_loop
    assert half(x.bfloat16(), lengths).isfinite().all()


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], object]:
    """Compiles a short file, as if this process had not asked before; the cache is in the folder of the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = tmp_path / "short.c"
    source.write_text("int answer(void) { return ANSWER; }")
    fresh = native._load.__wrapped__
    return lambda: fresh(source, ("ANSWER=42",))


def test_switched_off_by_the_environment(monkeypatch):
    monkeypatch.setenv("METASSM_NATIVE", "0")
    network = BidirectionalGRU(3, 4, 2)
    assert chosen(network, torch.randn(2, 6, 3), torch.tensor([6, 1])) is gru.by_loop


def test_without_a_compiler_the_loop_is_used(monkeypatch, caplog, load):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr("shutil.which", lambda name: None)
    with caplog.at_level(logging.DEBUG, native.__name__):
        assert load() is None
    assert "no C compiler" in caplog.text
    monkeypatch.setattr(native, "_load", lambda source, macros: load())
    network, x, lengths = BidirectionalGRU(3, 4, 2), torch.randn(2, 6, 3), torch.tensor([6, 1])
    assert chosen(network, x, lengths) is gru.by_loop
    network(x, lengths).sum().backward()


@pytest.mark.parametrize("compiler", ["false", "true", "sh -c 'echo no licence >&2; exit 3'"])
def test_a_broken_compiler_is_no_compiler(monkeypatch, caplog, tmp_path, load, compiler):
    monkeypatch.setenv("CC", compiler)
    with caplog.at_level(logging.DEBUG, native.__name__):
        assert load() is None
    assert "is not compiled" in caplog.text
    assert "licence" not in compiler or "no licence" in caplog.text
    assert not [*tmp_path.glob("cache/*/*")], "nothing is left behind"


def test_a_wrong_library_is_not_used(monkeypatch, caplog):
    monkeypatch.setattr(
        compiled_gru.Workspace, "__call__", lambda self, *tensors: gru.by_loop(*tensors) * 1.01
    )
    assert not gru._correct.__wrapped__(torch.float32)
    assert "is wrong" in caplog.text
    monkeypatch.setattr(gru, "_correct", lambda dtype: False)
    assert chosen(BidirectionalGRU(3, 4, 2), torch.randn(2, 6, 3), torch.tensor([6, 1])) is gru.by_loop


@needs_compiler
def test_library_is_kept_for_the_next_process(monkeypatch, tmp_path, load):
    assert load().answer() == 42
    folder = tmp_path / "cache" / "pyro_metassm"
    (kept,) = folder.iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr(native, "_compile", lambda *arguments: pytest.fail("compiled again"))
    assert load().answer() == 42
    assert [*folder.iterdir()] == [kept]


@needs_compiler
@pytest.mark.parametrize("reason", ["a file is in the way", "of another user"])
def test_without_a_place_to_keep_it_the_library_is_still_used(monkeypatch, tmp_path, load, reason):
    if reason == "of another user":
        monkeypatch.setattr(os, "getuid", lambda: -1)
    else:
        (tmp_path / "cache").write_text("not a folder")
    assert load().answer() == 42
    assert not [*tmp_path.rglob("*.so")]


FORKED = """
import os, threading
import native
def run():  # both calls must be running at once to get past the barrier
    barrier, seen = threading.Barrier(2, timeout=30), []
    native.on_threads(lambda worker: (barrier.wait(), seen.append(worker)), 2)
    return sorted(seen) == [0, 1]
assert run()
child = os.fork()
if child == 0:
    os._exit(0 if run() else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert run()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_threads_survive_a_fork_and_let_the_interpreter_end():
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORKED]
    done = subprocess.run(
        command, cwd=compiled_gru.SOURCE.parents[1], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
