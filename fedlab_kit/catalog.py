"""What a user registers by name: models and data sets, from a notebook cell or a file of one's own."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])

MODELS: dict[str, Callable[..., Any]] = {}
"""Name -> `f(shape, classes) -> nn.Module`; `shape` is that of one sample, without the batch."""

DATASETS: dict[str, Callable[..., Any]] = {}
"""Name -> `f() -> Dataset`."""

_TABLES = {"model": MODELS, "dataset": DATASETS}


def model(target: Function | str) -> Any:
    """Register a function `f(shape, classes) -> nn.Module` as a model, under its own or a given name.

    Write `@model` or `@model("2nn")` above it. Registering a name again replaces it, so that a notebook cell can be
    run again; the name of a built-in model raises ValueError.
    """
    return _register("model", target)


def dataset(target: Function | str) -> Any:
    """Register a function `f() -> Dataset` as a data set: `@dataset` or `@dataset("name")`, with `model`'s rules."""
    return _register("dataset", target)


def lookup(kind: str, name: str) -> Callable[..., Any]:
    """Return the registered function of a `kind` ("model" or "dataset"); ValueError lists the names that exist."""
    table = _TABLES[kind]
    if name not in table:
        raise ValueError(f"{kind} must be one of {', '.join(sorted(table))}, got {name!r}")
    return table[name]


def source(function: Callable[..., Any]) -> str:
    """Return the source text of a registered function, which is part of what identifies a run.

    Raises ValueError where Python does not have it.
    """
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):
        raise ValueError(
            f"the source of {function.__qualname__!r} is not available: define it in a notebook cell or a file"
        ) from None


def is_built_in(thing: Any) -> bool:
    """Say whether a function or class belongs to the package, so that every process knows it."""
    return (thing.__module__ or "").split(".")[0] == __name__.split(".")[0]


def _register(kind: str, target: Function | str) -> Any:
    if isinstance(target, str):
        return lambda function: _add(kind, target, function)
    return _add(kind, target.__name__, target)


def _add(kind: str, name: str, function: Function) -> Function:
    existing = _TABLES[kind].get(name)
    if existing is not None and is_built_in(existing) and not is_built_in(function):
        raise ValueError(f"{kind} {name!r} is built in and cannot be replaced: choose another name")
    _TABLES[kind][name] = function
    return function
