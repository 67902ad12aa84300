"""A study: methods trained on a family of systems and adapted to unseen recordings, piece by piece, in a folder.

Every piece (a fit, an adaptation, a control) is a file that is either there and complete or not there: a study that
was interrupted goes on where it stopped, with the same result.
"""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch

from pyro_metassm import _checks as checks
from pyro_metassm import saving
from pyro_metassm.experiments import controls, methods, scores
from pyro_metassm.experiments.methods import Method
from pyro_metassm.experiments.settings import Settings
from pyro_metassm.experiments.systems import Family, few_trials, renamed, tag
from pyro_metassm.recordings import Recordings
from pyro_metassm.result import Fit
from pyro_metassm.writing import write_json

Say = Callable[[str], None]


@dataclass(frozen=True)
class Piece:
    """One piece of a study: what is done, and where its result goes."""

    kind: Literal["fit", "adapted", "control"]
    name: str
    method: Method
    settings: Settings
    seed: int
    shots: int
    out: Path

    @property
    def folder(self) -> Path:
        return folder_of(self.out, self.name, self.seed)

    @property
    def path(self) -> Path:
        return self.folder / (
            f"{self.kind}-{self.shots}.json" if self.kind == "adapted" else f"{self.kind}.json"
        )

    @property
    def saved(self) -> Path:
        """The folder of the fit: as trained, or as adapted."""
        return self.path.with_suffix("")

    def __str__(self) -> str:
        what = {"fit": "trained", "adapted": f"adapted with {self.shots}", "control": "negative control"}
        return f"{self.name}, seed {self.seed}: {what[self.kind]}"


Results = dict[tuple[str, int], dict[str, dict]]
"""By method and seed, the pieces ``"fit"``, ``"control"``, ``"1"``, ``"8"``, ...: ``rows`` and ``seconds``."""


def run(
    settings: Settings,
    chosen: Mapping[str, Method],
    seeds: Sequence[int],
    out: Path,
    *,
    controlled: Iterable[str] = (),
    workers: int = 1,
    say: Say = print,
) -> Results:
    """Do what is not yet done of a study, and read all of it.

    Args:
        settings: of the study.
        chosen: its methods by name.
        seeds: of the training data, the fits and the trials drawn to adapt with.
        out: folder of the study.
        controlled: methods that are also adapted to the negative controls.
        workers: processes at work, a thread each; spare ones are given to a fit as threads.
        say: is told of every finished piece.

    Raises:
        ValueError: a folder that holds a study of other settings, a method without the one whose fit it takes.
    """
    checks.integers(
        0,
        held_out_seed=settings.family.held_out_seed,
        **{f"seeds[{i}]": seed for i, seed in enumerate(seeds)},
    )
    for name, method in chosen.items():
        if method.trained_as is not None and method.trained_as not in chosen:
            raise ValueError(f"methods: {name} takes the fit of {method.trained_as}; choose that one, too")
    settings.claim(out)
    parts = [(name, method, seed) for seed in seeds for name, method in chosen.items()]
    fits = [
        Piece("fit", name, method, settings, seed, 0, out) for name, method, seed in parts if trains(method)
    ]
    others = [
        Piece("adapted", name, method, settings, seed, shots, out)
        for name, method, seed in parts
        for shots in settings.shots
    ]
    others += [
        Piece("control", name, method, settings, seed, 0, out)
        for name, method, seed in parts
        if name in controlled
    ]
    missing = [[piece for piece in wave if not piece.path.is_file()] for wave in (fits, others)]
    with _processes(min(workers, max(map(len, missing)))) as pool:
        for wave in missing:  # what is adapted was trained before
            _do(wave, pool, workers, say)
    training.cache_clear()
    held_out.cache_clear()
    results: Results = {(name, seed): {} for name, _, seed in parts}
    for piece in (*fits, *others):
        key = str(piece.shots) if piece.kind == "adapted" else piece.kind
        results[piece.name, piece.seed][key] = json.loads(piece.path.read_text(encoding="utf-8"))
    return results


def part_of(name: str, say: Say) -> Say:
    """Tells the same, of a part of something larger."""
    return lambda text: say(f"{text} ({name})")


def trains(method: Method) -> bool:
    """Whether a method has a fit to training recordings of its own."""
    return method.shares and method.trained_as is None


# One at a time: the pieces of a seed come one after the other.


@lru_cache(maxsize=1)
def training(family: Family, seed: int) -> tuple[Recordings, Recordings]:
    return family.training(seed)


@lru_cache(maxsize=1)
def held_out(family: Family) -> tuple[Recordings, Recordings]:
    return family.held_out()


def make(piece: Piece, num_threads: int | None = None) -> float:
    """Make a piece and write it; returns the seconds that it took."""
    begin = time.perf_counter()
    piece.folder.mkdir(parents=True, exist_ok=True)
    if piece.kind != "fit":
        training.cache_clear()  # large, and no longer needed
    rows = {"fit": _train, "adapted": _adapt, "control": _control}[piece.kind](piece, num_threads)
    seconds = time.perf_counter() - begin
    write_json({"seconds": seconds, "rows": rows}, piece.path)
    return seconds


def _train(piece: Piece, num_threads: int | None) -> list[dict]:
    s = piece.settings
    recs, test = training(s.family, piece.seed)
    fit = methods.train(piece.method, recs, s.sizes, s.steps, piece.seed, num_threads)
    fit.save(piece.saved)
    return scores.rows(
        fit, test, s.scoring, counts=s.family.counts, embeds=piece.method.embeds, seed=piece.seed
    )


def _adapt(piece: Piece, num_threads: int | None) -> list[dict]:
    s = piece.settings
    pool, test = held_out(s.family)
    num_draws = s.draws[s.shots.index(piece.shots)]
    return _adapt_to(piece, pool, test, piece.shots, num_draws, num_threads, keep=piece.shots == s.shown)


def _control(piece: Piece, num_threads: int | None) -> list[dict]:
    s = piece.settings
    pool, test = held_out(s.family)
    one, other = (controls.unrelated(recs, s.family.held_out_seed + n) for n, recs in enumerate((pool, test)))
    shots = s.shown if s.shown in s.shots else s.shots[-1]
    return _adapt_to(piece, one, other, shots, s.draws[s.shots.index(shots)], num_threads)


def _adapt_to(
    piece: Piece,
    pool: Recordings,
    test: Recordings,
    shots: int,
    num_draws: int,
    num_threads,
    keep: bool = False,
) -> list[dict]:
    s = piece.settings
    known = None
    if piece.method.shares:
        known = trained(piece.out, piece.method.trained_as or piece.name, piece.seed)
    new = few_trials(pool, shots, num_draws, piece.seed)
    fit = methods.adapt(piece.method, known, new, s.sizes, s.steps, piece.seed, num_threads)
    if keep:
        fit.save(piece.saved)
    rows = []
    for draw in range(num_draws):
        drawn = renamed(test, tag(draw))
        scored = [
            row
            for one, names in methods.corrected(piece.method, fit, new, drawn.names)
            for row in scores.rows(
                one,
                drawn.select(names),
                s.scoring,
                counts=s.family.counts,
                embeds=piece.method.embeds,
                seed=piece.seed,
            )
        ]
        rows += [
            row | {"recording": row["recording"].removesuffix(tag(draw)), "draw": draw} for row in scored
        ]
    return rows


@contextmanager
def _processes(number: int) -> Iterator[ProcessPoolExecutor | None]:
    """Processes that work on pieces, a thread each; None where one is enough: this one."""
    if number <= 1:
        yield None
        return
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
    with ProcessPoolExecutor(number, context, torch.set_num_threads, (1,)) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _do(pieces: list[Piece], pool: ProcessPoolExecutor | None, workers: int, say: Say) -> None:
    """Make the pieces, one after the other or side by side; a worker without a piece is a thread for another's."""
    if pool is None or len(pieces) <= 1:
        for piece in pieces:
            say(f"{make(piece, workers):7.1f} s  {piece}")
        return
    waiting = {pool.submit(make, piece, max(1, workers // len(pieces))): piece for piece in pieces}
    for done in as_completed(waiting):
        say(f"{done.result():7.1f} s  {waiting[done]}")


def folder_of(out: Path, name: str, seed: int) -> Path:
    """Where the pieces of a method and seed are."""
    return out / "pieces" / f"{name}-seed{seed}"


def trained(out: Path, name: str, seed: int) -> Fit:
    """The saved fit to the training recordings."""
    return saving.load(folder_of(out, name, seed) / "fit")


def adapted(out: Path, name: str, seed: int, shots: int) -> Fit | None:
    """The saved fit of an adaptation (of ``settings.shown`` trials), if there is one."""
    path = folder_of(out, name, seed) / f"adapted-{shots}"
    return saving.load(path) if path.is_dir() else None
