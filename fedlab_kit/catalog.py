"""What a user registers by name: models and data sets, and whatever another module adds a table for."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])

MODELS: dict[str, Callable[..., Any]] = {}
"""Name -> `f(shape, classes) -> nn.Module`; `shape` is that of one sample, without the batch."""

DATASETS: dict[str, Callable[..., Any]] = {}
"""Name -> `f() -> Dataset`."""

TABLES: dict[str, dict[str, Any]] = {"model": MODELS, "dataset": DATASETS}
"""Kind -> all that is registered of it."""

PACKAGE = __name__.partition(".")[0]


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
    table = TABLES[kind]
    if name not in table:
        raise ValueError(f"{kind} must be one of {', '.join(sorted(table))}, got {name!r}")
    return table[name]


def add_table(kind: str, table: dict[str, Any]) -> None:
    """Tell the catalog of things that are registered by name elsewhere."""
    TABLES[kind] = table


def is_built_in(thing: Any) -> bool:
    """Say whether a function or class belongs to the package, so that every process knows it."""
    return home_of(thing).partition(".")[0] == PACKAGE


def home_of(thing: Any) -> str:
    """Return the name of the module that holds a function's code, a class, or an object's class."""
    if type(thing) is types.FunctionType:
        return str(thing.__globals__.get("__name__", ""))
    return str((thing if isinstance(thing, type) else type(thing)).__module__ or "")


def _register(kind: str, target: Function | str) -> Any:
    if isinstance(target, str):
        return lambda function: _add(kind, target, function)
    return _add(kind, target.__name__, target)


def _add(kind: str, name: str, function: Function) -> Function:
    existing = TABLES[kind].get(name)
    if existing is not None and is_built_in(existing) and not is_built_in(function):
        raise ValueError(f"{kind} {name!r} is built in and cannot be replaced: choose another name")
    TABLES[kind][name] = function
    return function
