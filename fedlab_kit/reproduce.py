"""The code that makes an artifact again: a user's own definitions as source text, then three lines."""

from __future__ import annotations
import __future__

import ast
import inspect
import linecache
import sys
import textwrap
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from math import isfinite
from types import FunctionType, ModuleType
from typing import Any

import torch

from fedlab_kit import catalog
from fedlab_kit.code_reading import origin_of
from fedlab_kit.experiment import Experiment, Recipe
from fedlab_kit.identity import Unknowable
from fedlab_kit.run import StoredRun
from fedlab_kit.runs import identify, parts

KINDS = ("model", "dataset", "codec", "codec")
CO_FUTURE_ANNOTATIONS = __future__.annotations.compiler_flag


def reproduce(run: StoredRun, recipe: Recipe, digest: str) -> str:
    """Return the code that trains and compresses the same artifact again: a user's definitions, then three lines.

    What cannot be carried along is named at the top with the reason; so is code that has changed since the run.
    """
    carried = Carried()
    for experiment in run.experiment.lineage:
        for kind, name, thing in zip(KINDS, _names(experiment), parts(experiment), strict=True):
            if not catalog.is_built_in(thing):
                carried.register(kind, name, thing)
    head = [
        f"fedlab-kit {version('fedlab-kit')}, torch {torch.__version__}.",
        "On the same kind of processor the file's SHA-256 is",
        digest,
        *_changed(run),
        *(f"Not carried along, define it yourself: {name} ({why})." for name, why in carried.missing.items()),
    ]
    return (
        "\n".join(f"# {line}".rstrip() for line in head)
        + carried.text()
        + "\nfrom fedlab_kit import Experiment, Recipe, compress, train\n\n"
        + f"run = train({run.experiment!r})\nartifact = compress(run, {recipe!r})\n"
    )


def _names(experiment: Experiment) -> tuple[str, str, str, str]:
    return experiment.model, experiment.dataset, experiment.uplink, experiment.downlink


def _changed(run: StoredRun) -> list[str]:
    """Say so when the run was made by other code than what is at hand now."""
    if run.older:
        return ["Made by older code of fedlab-kit: today's makes another file."]
    try:
        same = identify(run.experiment) == run.key
    except Unknowable as error:
        return [f"The store could not keep this run: {error}."]
    except ValueError:
        same = False
    return [] if same else ["A definition, the data or a version is another one now than when this run was made."]


class Carried:
    """A user's definitions and all they need as source text, in an order that runs; `missing` says what is not there.

    Every definition is taken from where Python read it; what it names in its module is taken along: functions and
    classes by source, constants of Python's by value, what is installed and the package's own by import.
    """

    def __init__(self) -> None:
        self.missing: dict[str, str] = {}
        self._known: dict[str, Any] = {}
        self._lines: list[str] = []
        self._future = ""

    def text(self) -> str:
        """Return the definitions as lines of code, "" if there are none."""
        return "\n\n".join(["", *self._future.splitlines(), *self._lines, ""]) if self._lines else ""

    def register(self, kind: str, name: str, thing: Any) -> None:
        """Take along what is registered under a name, and the line that registers it where no decorator does."""
        own = getattr(thing, "__name__", "")
        if (self._known.get(own) is thing) or not own.isidentifier():
            own or self.missing.setdefault(name, "it is neither a function nor a class")
            return
        decorated = self._need(own, thing)
        if own not in self.missing and not decorated:
            self._lines.append(f"import fedlab_kit\n\nfedlab_kit.{kind}({name!r})({own})")

    def _need(self, name: str, value: Any) -> bool:
        """Take along a value under its name, once; whether its source registers it by a decorator."""
        if name in self._known:
            if self._known[name] is not value:
                self.missing[name] = "two modules mean different things by it"
            return False
        self._known[name] = value
        value = inspect.unwrap(value) if callable(value) else value  # below its decorators, which the source has
        own = str(getattr(value, "__name__", name))
        home = own if isinstance(value, ModuleType) else catalog.home_of(value)
        installed = origin_of(home)
        if isinstance(value, ModuleType):
            self._lines.append(f"import {home} as {name}" if "." in home or home != name else f"import {name}")
            if not installed:
                self.missing[name] = f"a module of your own: put {home} where this file finds it"
        elif isinstance(value, type | FunctionType) and not installed:
            return self._define(name, value)
        elif module := next((m for m in (home, getattr(value, "__module__", None)) if _is_in(m, own, value)), None):
            self._lines.append(f"from {module} import {own}" + (f" as {name}" if own != name else ""))
        elif _is_plain(value):
            self._lines.append(f"{name} = {value!r}")
        else:
            self.missing[name] = f"a {type(value).__name__} has no source"
        return False

    def _define(self, name: str, value: Any) -> bool:
        """Take along a function's or class's source: what it reads while it is defined first, the rest behind it."""
        found = (value, *vars(value).values()) if isinstance(value, type) else (value,)
        functions = [f for f in map(inspect.unwrap, found) if isinstance(f, FunctionType)]
        try:
            text, called, decorators, node = _source(value, functions)
        except (SyntaxError, ValueError):
            self.missing[name] = "Python does not have its source as a definition"
            return False
        if free := sorted({free for f in functions for free in f.__code__.co_freevars} - {"__class__"}):
            self.missing[name] = f"it takes {', '.join(free)} from the function around it"
            return False
        if any(f.__code__.co_flags & CO_FUTURE_ANNOTATIONS for f in functions):
            self._future = "from __future__ import annotations"
        inside = functions[0].__globals__ if functions else vars(sys.modules[value.__module__])
        at_once, every = set(_reads(node, bodies=False)), set(_reads(node, bodies=True))
        self._take(at_once - {called}, inside)
        self._lines.append(text if called == name else f"{text}\n\n\n{name} = {called}")
        self._take(every - at_once - {called}, inside)
        return bool(decorators)

    def _take(self, names: set[str], inside: Mapping[str, Any]) -> None:
        for name in sorted(names):
            if name in inside and not name.startswith("__"):
                self._need(name, inside[name])


def _source(value: Any, functions: list[FunctionType]) -> tuple[str, str, list[ast.expr], ast.AST]:
    """Return a definition's source text, the name it gives, its decorators and its syntax tree.

    Found by the line of its own code, since `inspect` knows no class of a notebook. ValueError if it is not there.
    """
    codes = [f.__code__ for f in functions if f.__qualname__.startswith(value.__qualname__)]
    places = [(code.co_filename, code.co_firstlineno) for code in codes]
    home = getattr(sys.modules.get(value.__module__), "__file__", None)
    for file, line in places or [(home or "", 0)]:
        lines = linecache.getlines(file)
        for node in ast.walk(ast.parse("".join(lines))):
            match node:
                case ast.Assign(targets=[ast.Name(id=name)], value=ast.Lambda()):
                    made, decorators = "<lambda>", list[ast.expr]()
                case ast.FunctionDef(name=name, decorator_list=decorators):
                    made = name
                case ast.ClassDef(name=name, decorator_list=decorators):
                    made = name
                case _:
                    continue
            first = min([node.lineno, *(one.lineno for one in decorators)])
            if made == value.__name__ and (first <= line <= (node.end_lineno or 0) or not places):
                return textwrap.dedent("".join(lines[first - 1 : node.end_lineno])).rstrip(), name, decorators, node
    raise ValueError(f"{value.__qualname__} is not to be found as a definition")


def _reads(node: ast.AST, bodies: bool) -> Iterator[str]:
    """Yield the names that a definition reads, with or without the bodies of functions, which run later."""
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
        yield node.id
    later = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    for field, child in ast.iter_fields(node):
        if bodies or not later or field != "body":
            for one in child if isinstance(child, list) else [child]:
                if isinstance(one, ast.AST):
                    yield from _reads(one, bodies)


def _is_in(module: Any, name: str, value: Any) -> bool:
    """Say whether an installed module, or the package, has the value under that name."""
    found = sys.modules.get(module) if isinstance(module, str) and origin_of(module) else None
    return found is not None and vars(found).get(name) is value


def _is_plain(value: Any) -> bool:
    """Say whether a value is a number or text of Python's, or a container of such, which `repr` writes out."""
    if type(value) in (tuple, list, set, frozenset, dict):
        parts = [*value, *value.values()] if type(value) is dict else value
        return all(map(_is_plain, parts)) and bool(len(value) or type(value) not in (set, frozenset))
    return type(value) in (bool, int, str, bytes, type(None)) or (type(value) is float and isfinite(value))
