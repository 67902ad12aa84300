"""What a fit does to the process while it runs, and that nothing of it stays."""

import pytest
import torch
from fits import QUICK, assert_same, parts
from problems import recordings

import pyro_metassm as pm
from pyro_metassm import _machine as machine
from pyro_metassm import blocks, native


def test_threads_are_as_before_even_after_an_error():
    before = torch.get_num_threads(), native.threads
    with pytest.raises(ZeroDivisionError), machine.threads(3):
        assert (torch.get_num_threads(), native.threads) == (1, 3)
        raise ZeroDivisionError
    assert (torch.get_num_threads(), native.threads) == before


def test_a_fit_is_the_same_to_the_bit_on_any_number_of_threads(monkeypatch):
    """With work small enough that every thread gets some."""
    monkeypatch.setattr(blocks, "LARGE", 0)
    monkeypatch.setattr(blocks, "CACHED", 20)
    recs = recordings()
    fits = [pm.fit(*parts(recs), recs, **QUICK, num_threads=number) for number in (1, 3)]
    assert_same(*fits)


@pytest.mark.skipif(machine._glibc() is None, reason="another C library")
def test_freed_memory_stays_for_the_next_step():
    """A large tensor made again comes from the pages of the last one, and goes back to the system at the end."""
    import resource

    def faults() -> int:
        begin = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(20_000_000)  # 80 MB, some 20,000 pages
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - begin

    with machine.memory_kept():
        fresh = faults()
        # Small objects made between may take a piece of it, now and then.
        kept = min(faults() for _ in range(5))
    assert kept < 0.2 * fresh or fresh < 2_000  # few where the system hands out large pages


def test_elsewhere_memory_is_left_alone(monkeypatch):
    monkeypatch.setattr(machine.platform, "system", lambda: "Darwin")
    assert machine._glibc() is None
    with machine.memory_kept():
        pass
