"""A model and its guide built again from their classes and configurations: from a file, or for other recordings."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from pyro_metassm import _machine as machine
from pyro_metassm.neurons import NeuronTable


def construct(cls: type, config: dict, first: Any) -> Any:
    """``cls(first, **config)``; ``first`` is a table of neurons for a model, the model for a guide.

    Raises:
        ValueError: what is not a module with a configuration, or cannot be built from it.
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module) and isinstance(config, dict)):
        raise ValueError(f"needed a module and its configuration, got {cls!r} and {config!r}")
    known, takes_any = parameters_of(cls)
    # A subclass that fixes an argument of its base no longer takes it, while the base still records it.
    arguments = {key: value for key, value in config.items() if takes_any or key in known}
    try:
        return cls(first, **arguments)
    except Exception as error:
        raise ValueError(
            f"{cls.__name__} cannot be built from its configuration {arguments}: {_of(error)}; its constructor takes "
            "a table of neurons (or the model) first, and self.config holds its other arguments"
        ) from error


def _of(error: Exception) -> str:
    return str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"


def parameters_of(cls: type) -> tuple[list[str], bool]:
    """Names of a constructor's arguments after the first, and whether it takes any others."""
    parameters = list(inspect.signature(cls).parameters.values())
    named = [p.name for p in parameters[1:] if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    return named, any(p.kind is p.VAR_KEYWORD for p in parameters)


def check_config(what: str, module: Any) -> None:
    """Raise ``ValueError`` if the module's ``config`` lacks an argument of its constructor."""
    lacking = [name for name in parameters_of(type(module))[0] if name not in module.config]
    if lacking:
        raise ValueError(
            f"{what}.config: needed every argument of {type(module).__name__}'s constructor to build it again, "
            f"got no {', '.join(lacking)}; add them there (self.config |= {{...}}), or now to fit.{what}.config"
        )


def build(specifications: list[tuple[type, dict]], neurons: NeuronTable) -> tuple[Any, Any]:
    """Model and guide anew from their classes and configurations; the random state is left as it was."""
    with machine.random_forked():
        model = construct(*specifications[0], neurons)
        return model, construct(*specifications[1], model)


def afresh(model, guide, recs, seed: int) -> tuple[Any, Any]:
    """A model and a guide as their constructors make them, random numbers from ``seed``, started from ``recs``.

    What does not require a gradient is no start but given: it is kept as these have it. The random state is left as it
    was.

    Args:
        model, guide: of any training, left as they are.
        recs: recordings of the model.
        seed: of the new parameters.

    Raises:
        ValueError: modules that cannot be built from their ``config``, or that hold other tensors than they then have.
    """
    (model_class, config), (guide_class, of_guide) = _specifications(model, guide)
    known = all(name in recs for name in model.names)
    with machine.random_forked():
        torch.manual_seed(seed)
        fresh = construct(model_class, config, recs.select(model.names) if known else model.neurons)
        made = fresh, construct(guide_class, of_guide, fresh)
    if not known and hasattr(fresh, "observation"):  # as the constructor does with data of all recordings
        fresh.observation.start(recs)
    for source, target in zip((model, guide), made, strict=True):
        like = next(source.parameters(), next(model.parameters()))
        target.to(like.device, like.dtype).train(source.training)
        old, new = source.state_dict(), target.state_dict()
        changed = sorted(k for k in old.keys() | new.keys() if _shape(old, k) != _shape(new, k))
        if changed:
            raise ValueError(
                f"{type(source).__name__} cannot be started afresh: it holds other tensors than its constructor makes "
                f"of these recordings ({', '.join(changed[:5])}); make them in the constructor"
            )
        with torch.no_grad():
            for before, parameter in zip(source.parameters(), target.parameters(), strict=True):
                if not before.requires_grad:
                    parameter.copy_(before).requires_grad_(False)
    return made


def _shape(state: dict, key: str):
    return state[key].shape if key in state else None


def for_recordings(model, guide, neurons: NeuronTable) -> tuple[Any, Any]:
    """A model and a guide for other recordings, with everything shared as in these.

    What belongs to neurons and recordings is taken from these where they know the recording, and fresh elsewhere.

    Args:
        model, guide: of any recordings.
        neurons: the table of the new ones' recordings.

    Raises:
        ValueError: modules that cannot be built from their ``config``, or that hold other tensors than they then have.
    """
    made, reference = build(_specifications(model, guide), neurons), next(model.parameters())
    for source, target, per in zip((model, guide), made, tables(model, guide), strict=True):
        target.to(reference.device, reference.dtype).train(source.training)
        state = source.state_dict()
        if state.keys() != target.state_dict().keys():
            changed = ", ".join(sorted(state.keys() ^ target.state_dict().keys())[:5])
            raise ValueError(
                f"{type(source).__name__} cannot be built for other recordings: it holds other tensors than its "
                f"constructor makes ({changed}); make them in the constructor"
            )
        target.load_state_dict(target.state_dict() | {k: v for k, v in state.items() if k not in per})
        _copy_rows(source, target, per, model.neurons, neurons)
    return made


def joined(first: tuple[Any, Any], second: tuple[Any, Any]) -> tuple[Any, Any]:
    """Model and guide of all recordings of two pairs; what they share is the first's."""
    one, other = (model.neurons for model, _ in (first, second))
    neurons = NeuronTable(one.names + other.names, one.num_neurons + other.num_neurons)
    made = for_recordings(*first, neurons)
    for source, target, per in zip(second, made, tables(*second), strict=True):
        _copy_rows(source, target, per, other, neurons)
    return made


def tables(model, guide) -> list[dict[str, str]]:
    """Which tensors of either are tables: their names, and whether a row is a ``"recording"`` or a ``"neuron"``.

    Raises:
        ValueError: a tensor that depends on the recordings in another way; modules that cannot be built again.
    """
    probe = _probe(model)
    others = build(_specifications(model, guide), probe)
    return [_tables(*pair, model.neurons, probe) for pair in zip((model, guide), others, strict=True)]


def deviations(module) -> list[nn.Parameter]:
    """The tables of a model or a guide in which recordings deviate from what they share."""
    return [p for key, p in module.named_parameters() if key.startswith(module.deviations)]


def tables_of(model) -> dict[str, str]:
    """As :func:`tables`, of the model alone."""
    probe = _probe(model)
    with machine.random_forked():
        other = construct(type(model), model.config, probe)
    return _tables(model, other, model.neurons, probe)


def _probe(model) -> NeuronTable:
    """Recordings whose numbers, of them and of neurons, are none of the model's."""
    recordings, extra = len(model.names) + 1, model.neurons.total + 2
    return NeuronTable([f"{n}" for n in range(recordings)], [extra] + [1] * (recordings - 1))


def _tables(source, other, neurons: NeuronTable, probe: NeuronTable) -> dict[str, str]:
    """The tensors that have another size in another pair."""
    shapes, own = other.state_dict(), {}
    for key, value in source.state_dict().items():
        shape = shapes[key].shape if key in shapes else value.shape
        if shape == value.shape:
            continue
        sizes = {
            "recording": (len(neurons.names), len(probe.names)),
            "neuron": (neurons.total, probe.total),
        }
        both = (*value.shape[:1], *shape[:1]) if shape[1:] == value.shape[1:] else ()
        per = next((what for what, pair in sizes.items() if pair == both), None)
        if per is None:
            raise ValueError(
                f"{type(source).__name__}.{key}: needed a tensor whose first dimension is the recordings or all "
                f"neurons, or one that depends on neither, got {tuple(value.shape)}, and {tuple(shape)} built from "
                f"its configuration for {len(probe.names)} recordings of {probe.total} neurons"
            )
        own[key] = per
    return own


def _specifications(model, guide) -> list[tuple[type, dict]]:
    for what, module in (("model", model), ("guide", guide)):
        check_config(what, module)
    return [(type(module), module.config) for module in (model, guide)]


@torch.no_grad()
def _copy_rows(source, target, tables: dict[str, str], old: NeuronTable, new: NeuronTable) -> None:
    state, fresh = source.state_dict(), target.state_dict()  # views of the modules' own tensors
    for key, per in tables.items():
        for name in [name for name in old.names if name in new.names]:
            fresh[key][_rows(new, name, per)] = state[key][_rows(old, name, per)]


def _rows(neurons: NeuronTable, name: str, per: str) -> slice:
    if per == "neuron":
        return neurons.slice(name)
    row = neurons.names.index(name)
    return slice(row, row + 1)
