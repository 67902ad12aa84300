"""What the hooks of a model must return, and in words what they do not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.distributions import Distribution

from pyro_metassm.global_sites import declared, prior_draws
from pyro_metassm.recordings import Batch

Shape = tuple[int, ...]


def wrong_hooks(model, batch: Batch) -> list[str]:
    """What is wrong with what a model's hooks return on a batch, of the first hook that is wrong.

    They are called one by one as the program calls them; and where the model has global sites, with many draws of these
    at once, as posteriors and forecasts do.
    """
    found = _first(_wrong(model, batch, {}, ()))
    if found or not declared(model):
        return found
    sizes = {len(batch.names), batch.num_trials, batch.num_bins, batch.num_bins - 1, batch.width, 1, 2}
    number = next(n for n in range(3, 99) if n not in sizes | {model.latent_dim, model.embedding_dim})
    draws = prior_draws(model, number)
    return [
        f"with {number} draws of the global sites at once, {text}; a site of event (d,) is then (draws, 1, 1, d): take "
        "rows of a table with self.rows(table, index), and x.unsqueeze(-2) of what meets states (..., R, K, T, d)"
        for text in _first(_wrong(model, batch, draws, (number,)))
    ]


def _first(found: Iterable[str | None]) -> list[str]:
    return next(([text] for text in found if text), [])


def _wrong(model, batch: Batch, values: dict[str, Tensor], draws: Shape) -> Iterator[str | None]:
    """For every hook in turn what is wrong with it, or None."""
    with model.given(values or {name: draw[0, 0, 0] for name, draw in prior_draws(model, 1).items()}):
        recordings, trials = (*draws, len(batch.names), 1), (*draws, len(batch.names), batch.num_trials)
        like, bins = next(model.parameters()), batch.num_bins
        who, latents, embedding = type(model).__name__, (model.latent_dim,), (model.embedding_dim,)

        def prior():
            return model.embedding_prior_of(batch.recording)

        yield _check(f"{who}.embedding_prior", prior, recordings, embedding, expands=True)
        e = torch.randn(*recordings, *embedding, dtype=like.dtype, device=like.device)
        yield _check(f"{who}.initial_state", lambda: model.initial_state(e), trials, latents, expands=True)
        for part in (model.trial_embedding, model.path_prior):
            yield _stops(f"{who}.{part.__name__}", partial(part, e, batch))
        path = model.path_prior(e, batch)
        z = 0.1 * torch.randn(*trials, bins, *latents, dtype=like.dtype, device=like.device)
        for steps in (1, bins - 1)[: bins - 1]:  # as the loop calls it, and the density
            into, before = slice(1, steps + 1), z[..., :steps, :]
            yield _check(f"{who}.transition", partial(path.into, into, before), (*trials, steps), latents)

        def likelihood():
            return model.likelihood(model.read_out(z, batch.recording, batch.width), batch.recording)

        yield _check(f"{who}.likelihood", likelihood, (*trials, bins), (batch.width,), joint=None)


def _check(
    what: str,
    call: Callable[[], object],
    batch: Shape,
    event: Shape,
    *,
    expands: bool = False,
    joint: bool | None = True,
) -> str | None:
    """What is wrong with a distribution over ``(*batch, *event)``; ``joint`` None leaves it to it what is one event."""
    if found := _stops(what, call):
        return found
    y = call()
    if joint is None and isinstance(y, Distribution) and not y.event_shape:
        batch, event = (*batch, *event), ()
    more = " or one that expands to it" if expands else ""
    needed = f"{what}: needed a Distribution with event shape {event} and batch shape {batch}{more}"
    if not isinstance(y, Distribution):
        return f"{needed}, got {type(y).__name__}"
    own, its_event = tuple(y.batch_shape), tuple(y.event_shape)
    if its_event == event and (own == batch or (expands and _expands(own, batch))):
        return None
    hint = (
        f"; use .to_event({len(event)})"
        if its_event == () and own[-len(event) or None :] == event != ()
        else ""
    )
    return f"{needed}, got event shape {its_event} and batch shape {own}{hint}"


def _stops(what: str, call: Callable[[], object]) -> str | None:
    try:
        call()
    except Exception as error:
        return f"{what} stops with an error: {type(error).__name__}: {error}"
    return None


def _expands(shape: Shape, target: Shape) -> bool:
    try:
        return torch.broadcast_shapes(shape, target) == torch.Size(target)
    except RuntimeError:
        return False
