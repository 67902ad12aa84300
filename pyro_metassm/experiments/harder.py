"""Harder variants of the bifurcation study with our method, and the way from the paper's recipe to ours."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pyro_metassm.experiments import bifurcations, report, study, tables
from pyro_metassm.experiments.chaos import Lorenz
from pyro_metassm.experiments.methods import METHODS, Method
from pyro_metassm.experiments.scores import Scoring
from pyro_metassm.experiments.settings import Settings
from pyro_metassm.experiments.systems import Family
from pyro_metassm.experiments.tables import Row
from pyro_metassm.reporting import html as page

TITLE = "Harder variants, and what each part of the recipe is worth"

OURS = {name: METHODS[name] for name in ("meta", "meta-revised")}
ABLATION = {
    "plain": Method("paper's plain recipe: random start, SVI at a small rate; adapted by SVI", plain=True),
    "plain-cycle": Method("+ one cycle of the rate, up to 1e-2", plain=True, fit={"learning_rate": 1e-2}),
    "plain-search": Method(
        "+ adapted by the search for frames", plain=True, trained_as="plain-cycle", adapts_plainly=False
    ),
    "start": Method(
        "start from the data, no SVI; adapted by SVI alone", fit={"num_steps": 0}, adapts_plainly=True
    ),
    "start-svi": Method("+ SVI", adapts_plainly=True),
    "search": Method(
        "+ adapted by the search for frames, no SVI", trained_as="start-svi", adapt={"num_steps": 0}
    ),
    "ours": Method("+ SVI of read-ins and read-outs: our method", trained_as="start-svi"),
    "revised": replace(OURS["meta-revised"], label="+ revised", trained_as="start-svi"),
    "one-start": Method(
        "our method, one start of the search", trained_as="start-svi", adapt={"num_starts": 1}
    ),
    "read-in": Method("our method, read-ins alone", trained_as="start-svi", adapt={"train": ("read_in",)}),
    "read-out": Method("our method, read-outs alone", trained_as="start-svi", adapt={"train": ("read_out",)}),
    "embedding": Method(
        "our method, embedding alone", trained_as="start-svi", adapt={"train": ("embedding",)}
    ),
    "all": Method(
        "our method, embedding as well",
        trained_as="start-svi",
        adapt={"train": ("read_in", "read_out", "embedding")},
    ),
}


@dataclass(frozen=True)
class Variant:
    """A study beside the main one.

    Attributes:
        label: for people.
        settings: of the study.
        methods: our method, or the steps of the way to it.
    """

    label: str
    settings: Settings
    methods: Mapping[str, Method] = field(default_factory=lambda: OURS)


def variants(base: Settings) -> dict[str, Variant]:
    """All of them, of the size of a bifurcation study; its family gives the numbers of trials and bins."""

    def changed(label: str, *methods: Mapping[str, Method], **family: Any) -> Variant:
        return Variant(label, replace(base, family=replace(base.family, **family)), *methods)

    neurons = (base.family.num_neurons[1],) * 2
    # States of counts are uncertain bin by bin. A guide whose bins are independent given the data then teaches dynamics
    # that are too slow, and contexts of forecasts are rare in its training: SVI loses what the start had.
    given: dict[str, Any] = {"fit": {"smooth_counts": True, "num_steps": 0}, "adapt": {"num_steps": 0}}
    started = {name: replace(method, **given) for name, method in OURS.items()}
    counts: dict[str, Any] = {"noise": "poisson", "num_neurons": neurons}
    sizes = {name: getattr(base.family, name) for name in Family.__dataclass_fields__}
    lorenz = replace(
        base,
        family=Lorenz(**sizes),
        sizes=replace(base.sizes, latent_dim=3),
        scoring=replace(base.scoring, k=None),
    )
    return {
        "poisson-0.2": changed(
            "Poisson counts, 0.2 per bin (R2 of log rates)", started, mean_count=(0.2, 0.2), **counts
        ),
        "poisson-1": changed(
            "Poisson counts, 1 per bin (R2 of log rates)", started, mean_count=(1.0, 1.0), **counts
        ),
        "noise-10": changed("observation variance x 10", noise_sd=base.family.noise_sd * 10**0.5),
        "noise-100": changed("observation variance x 100", noise_sd=base.family.noise_sd * 10),
        "latent-4": Variant(
            "latent dimension 4 for a true 2", replace(base, sizes=replace(base.sizes, latent_dim=4))
        ),
        "lorenz": Variant("Lorenz systems, one Lyapunov time ahead", lorenz),
        "ablation": Variant("the way from the paper's plain recipe to ours", base, ABLATION),
    }


FULL = replace(bifurcations.FULL, shots=(1, 8, 16), draws=(5, 3, 1), shown=0)
SMALL = replace(bifurcations.SMALL, draws=(1, 1), shown=0)
NAMES = tuple(variants(FULL))


def run(
    out: str | Path,
    *,
    parts: Sequence[str] | None = None,
    seeds: Sequence[int] = (0,),
    held_out_seed: int = Family.held_out_seed,
    small: bool = False,
    settings: Settings | None = None,
    workers: int = 1,
    say: study.Say = print,
) -> dict:
    """Do the variants, or what is left of them, and write their table and page.

    Args:
        out, seeds, held_out_seed, small, settings, workers, say: as of
            :func:`pyro_metassm.experiments.bifurcations.run`.
        parts: names of variants (:data:`NAMES`); None for all.

    Returns:
        what ``metrics.json`` holds.

    Raises:
        ValueError: an unknown variant, or a folder with a study of other settings.
    """
    base = settings or (SMALL if small else FULL)
    known = variants(replace(base, family=replace(base.family, held_out_seed=held_out_seed)))
    names = list(dict.fromkeys(NAMES if parts is None else parts))
    if not names or not set(names) <= set(known):
        raise ValueError(f"parts: needed some of {', '.join(known)}, got {', '.join(names) or 'none'}")
    out = report.folder(out)
    rows: list[Row] = []
    seconds: list[Row] = []
    for name in names:
        variant = known[name]
        tell = study.part_of(name, say)
        results = study.run(variant.settings, variant.methods, seeds, out / name, workers=workers, say=tell)
        rows += [{"variant": name} | row for row in table(results, variant.settings.scoring)]
        seconds += [{"variant": name} | row for row in tables.seconds(results)]
    tables.write(out / "harder.csv", rows)
    tables.write(out / "seconds.csv", seconds)
    numbers = {
        "table": rows,
        "variants": {name: known[name].label for name in names},
        "methods": {name: method.label for part in names for name, method in known[part].methods.items()},
        "seeds": list(seeds),
        "settings": {name: known[name].settings.as_json() for name in names},
    }
    page.write(out / "index.html", TITLE, _parts(rows, {name: known[name] for name in names}, seeds))
    say(tables.text([{k: v for k, v in row.items() if k not in ("median", "num")} for row in rows]))
    say(f"tables and index.html in {out}")
    return report.write_metrics(tables.plain(numbers), out)


def table(results: study.Results, scoring: Scoring) -> list[Row]:
    """Summaries by method and ``n_s``; ``n_s`` 0 stands for test trials of the recordings trained on."""
    known = [
        {"seed": seed, "method": name, "n_s": 0, "recording": row["recording"]}
        | {key: row[key][row["k"] - 1] for key in ("r2", "ceiling")}
        for (name, seed), made in results.items()
        for row in made.get("fit", {"rows": []})["rows"]
    ]
    return tables.summary([*known, *tables.adaptations(results)])


def _parts(rows: Sequence[Row], known: Mapping[str, Variant], seeds: Sequence[int]) -> Iterable[str]:
    yield page.paragraph(
        f"Forecast R2, mean and standard error over recordings and seeds ({', '.join(map(str, seeds))}), with its "
        "ceiling in brackets: a forecast from the true state with the true dynamics, against the same targets. "
        f"Scores below {tables.FLOOR:g} count as {tables.FLOOR:g}."
    )
    for name, variant in known.items():
        cells = {(row["method"], row["n_s"]): row for row in rows if row["variant"] == name}
        shots = sorted({n for _, n in cells})
        k = variant.settings.scoring.k
        yield page.heading(f"{variant.label}" + ("" if k is None else f", {k} bins ahead"))
        yield page.table(
            [
                {"method": method.label}
                | {("trained on" if n == 0 else f"n_s = {n}"): _cell(cells.get((key, n))) for n in shots}
                for key, method in variant.methods.items()
            ]
        )
    yield page.heading("All numbers")
    yield page.links(["harder.csv", "seconds.csv", "metrics.json"])


def _cell(row: Row | None) -> str:
    return "" if row is None else f"{tables.plus_minus(row)} ({row['ceiling']:.3f})"
