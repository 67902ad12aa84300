"""What a fit will do, said once: its sizes before it starts, its speed and how long it takes after the first steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from torch import nn

from pyro_metassm.recordings import Recordings

AFTER = 10  # steps: the first ones compile and allocate


class Announcement:
    """Says what a fit will do.

    Args:
        say: takes a line.
        recs: the training data.
        modules: whose parameters are trained.
        num_steps: of SVI, all of them.
        trials_per_step, recordings_per_step: None for all.
    """

    def __init__(
        self,
        say: Callable[[str], None],
        recs: Recordings,
        modules: Iterable[nn.Module],
        num_steps: int,
        trials_per_step: int | None = None,
        recordings_per_step: int | None = None,
    ):
        self.say, self.num_steps = say, num_steps
        parameters = sum(p.numel() for module in modules for p in module.parameters() if p.requires_grad)
        neurons = sum(recording.num_neurons for recording in recs.values())
        self.bins = bins_of_step(recs, trials_per_step, recordings_per_step)
        self.steps, self.began = 0, 0.0
        say(
            f"fit: {len(recs)} recordings, {recs.num_trials:,} trials, {neurons:,} neurons, {parameters:,} parameters, "
            f"{num_steps:,} steps of about {self.bins:,.0f} bins"
        )

    def after_step(self, step: int) -> None:
        """Is told of each step, and says how fast they are once the first have passed."""
        self.steps += 1
        if self.steps == AFTER:
            self.began = time.perf_counter()
        if self.steps == 2 * AFTER:
            each = (time.perf_counter() - self.began) / AFTER
            left = self.num_steps - step
            self.say(
                f"fit: {self.bins / each:,.0f} bins per second, {minutes(each * left)} for {left:,} more steps"
            )


def bins_of_step(
    recs: Recordings, trials_per_step: int | None = None, recordings_per_step: int | None = None
) -> float:
    """Bins of a usual step, on average over the recordings and trials drawn."""
    each = [
        float(r.lengths.mean()) * min(r.num_trials, trials_per_step or r.num_trials) for r in recs.values()
    ]
    return sum(each) * min(1.0, (recordings_per_step or len(each)) / len(each))


def minutes(seconds: float) -> str:
    """A duration as people say it."""
    return f"about {seconds / 60:.1f} minutes" if seconds >= 60 else f"about {seconds:.0f} seconds"
