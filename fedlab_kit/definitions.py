"""What definitions consist of: functions, classes, modules and methods, each as the parts that decide what it does."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from typing import Any, NamedTuple

from fedlab_kit import catalog
from fedlab_kit.catalog import PACKAGE, home_of
from fedlab_kit.code_reading import PLACE, Reading, origin_of, read


class Unknowable(ValueError):
    """A definition whose value cannot be told, so that nothing made with it can be found again by its name.

    The message is one line with the way to it, e.g. "model 'mine' -> Net.forward -> HELPER: a generator ...".
    """


class At(NamedTuple):
    """A part, with what it is called on the way to it."""

    step: str
    thing: Any


class Used(NamedTuple):
    """A module of which code takes some attributes."""

    module: types.ModuleType
    by: Reading


LEFT_OUT = PLACE | {
    "__dict__", "__weakref__", "__annotations__", "__annotate__", "__annotate_func__", "__annotations_cache__",
    "__abstractmethods__", "_abc_impl", "__type_params__", "__parameters__", "__orig_bases__", "__name__",
    "_autograd_function_id",
}  # fmt: skip
"""Attributes that decide nothing, or stand elsewhere."""

_MODULE_FACTS = {"__name__", "__file__", "__doc__", "__spec__", "__loader__", "__package__", "__path__", "__builtins__"}
_HIDES = {"eval", "exec", "globals", "compile", "__import__"}
_ALL_OF_IT = {"getattr", "vars", "dir", "attrgetter", "__dict__", "__getattribute__", "getmembers", "import_module"}
_BY_NAME = {  # kinds of things, and what of the package finds one by its name
    "codec": {"make", "CODECS"},
    "dataset": {"load", "lookup", "DATASETS"},
    "model": {"build", "lookup", "MODELS"},
}


def named(thing: Any, module: Any, name: Any) -> tuple[str, ...]:
    """Return what stands for a thing of an installed module or the package, if that name really leads to it; or ()."""
    if type(module) is not str or type(name) is not str or not (origin := origin_of(module)):
        return ()
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = vars(found).get(part) if isinstance(found, type | types.ModuleType) else None
    own = found is thing or (isinstance(found, staticmethod | classmethod) and found.__func__ is thing)
    return (origin, module, name) if own else ()


def module(thing: types.ModuleType, by: Reading | None = None) -> Iterator[Any]:
    """A module: what is installed by name and version, a user's own by what code uses of it (None: all)."""
    table, names = vars(thing), None if by is None else by.attributes
    if origin := origin_of(thing.__name__):
        yield from (origin, thing.__name__)
        wanted = [name for name in names or () if _of_a_user(table.get(name))]
    else:
        wanted = [name for name in table if names is None or name in names or name == "__getattr__"]
    wanted = sorted(set(wanted) - _MODULE_FACTS)
    yield from pairs({name: _by(table[name], by, name) for name in wanted}, f"{thing.__name__}.")


def _by(value: Any, by: Reading | None, name: str) -> Any:
    """Return a value that code reads by name; of a module that it hands nowhere only the attributes that it names."""
    if by is None or name in by.bare or not issubclass(type(value), types.ModuleType):
        return value
    return Used(value, by)


def _of_a_user(thing: Any) -> bool:
    """Whether something is a function that no installed module holds: found in one, a user has put it there."""
    return type(thing) is types.FunctionType and not origin_of(home_of(thing))


def function(thing: types.FunctionType) -> Iterator[Any]:
    """A function's code and all that it reads; of an installed one its name and what it carries."""
    origin, code = origin_of(home_of(thing)), thing.__code__
    if origin and (by_name := named(thing, thing.__globals__["__name__"], code.co_qualname)):
        yield by_name
        return
    reading = read(code)
    by = None if _ALL_OF_IT & reading.names else reading
    yield (origin, code.co_qualname) if origin else code
    yield At("its default", thing.__defaults__)
    yield At("its default", thing.__kwdefaults__)
    cells = zip(code.co_freevars, thing.__closure__ or (), strict=True)
    closure = {name: cell.cell_contents for name, cell in cells if cell != types.CellType()}  # an empty one
    yield from pairs({name: _by(value, by, name) for name, value in closure.items()})
    yield from pairs({name: thing.__dict__[name] for name in sorted(thing.__dict__)})
    if not origin:
        table = thing.__globals__
        yield from _globals(table, reading, by)
        seen = [*closure.values(), *(table[name] for name in reading.globals if name in table)]
        yield from _registered(seen, reading)


def _globals(table: dict[str, Any], reading: Reading, by: Reading | None) -> Iterator[Any]:
    """What a function's code reads from its module, from Python, and by an import of its own."""
    hidden = [f"{name}()" for name in sorted(reading.globals & _HIDES - table.keys())]
    hidden += ["import_module()"] if "import_module" in reading.names else []
    hidden += ["sys.modules"] if "modules" in reading.attributes and table.get("sys") is sys else []
    if hidden:
        raise Unknowable(f"what {hidden[0]} reaches cannot be told from the code: name it there, or import it by name")
    for name in sorted(reading.globals - _MODULE_FACTS):
        yield name, name in table  # what is not is Python's, or nothing yet
        if name in table:
            yield At(name, _by(table[name], by, name))
    for name, level, alias in sorted(reading.imports):
        if level:
            package = str(table.get("__package__") or "").split(".")
            name = ".".join([*package[: len(package) - level + 1], *([name] if name else [])])
        yield name
        if found := sys.modules.get(name):
            top = name.partition(".")[0]
            yield _by(sys.modules[top], by, alias if alias == top else "")
            yield _by(found, by, alias)
        elif not origin_of(name):
            raise Unknowable(f"module {name!r} is not imported yet: import it above the function")


def _registered(seen: list[Any], reading: Reading) -> Iterator[Any]:
    """What code that sees these values may look up by name in the package: what its text names, or all of a kind."""
    homes = [*map(_home, seen), *(name for name, *_ in reading.imports)]
    ours = any(home.partition(".")[0] == PACKAGE for home in homes)
    for kind in (kind for kind, words in _BY_NAME.items() if ours and words & reading.names):
        users = [name for name, value in catalog.TABLES[kind].items() if not catalog.is_built_in(value)]
        wanted = sorted(set(users) & reading.words or users)
        yield from pairs({name: catalog.TABLES[kind][name] for name in wanted}, f"{kind} ")


def _home(value: Any) -> str:
    """Return the module that a module, function, class or table of the catalog's is or belongs to, "" for the rest."""
    if any(value is table for table in catalog.TABLES.values()):
        return PACKAGE
    if issubclass(type(value), types.ModuleType):
        return str(value.__name__)
    return home_of(value) if type(value) in (types.FunctionType, type) else ""


def definition(thing: type) -> Iterator[Any]:
    """A class: its metaclass, its bases, and what stands in its body."""
    table = dict(type.__getattribute__(thing, "__dict__"))
    body = sorted(name for name in table if name not in LEFT_OUT and not name.startswith("__pydantic_"))
    module, name = (type.__getattribute__(thing, word) for word in ("__module__", "__qualname__"))
    if by_name := named(thing, module, name):
        yield by_name
        body = [name for name in sorted(table) if _of_a_user(table[name])]
    elif not thing.__flags__ & 1 << 9:  # a type of C code
        if not origin_of(thing.__module__):
            raise Unknowable(f"type {thing.__name__} is compiled code of a module that is not installed")
        yield thing.__name__
        return
    else:
        yield At("its metaclass", type(thing))
        yield type.__getattribute__(thing, "__bases__")
    yield from pairs({name: table[name] for name in body}, f"{thing.__name__}.")


def method(thing: Any) -> Iterator[Any]:
    """A bound method; one that an installed module shares, as `random.shuffle`, by its name."""
    owner, function = thing.__self__, getattr(thing, "__func__", None)
    home = owner.__name__ if isinstance(owner, types.ModuleType) else type(owner).__module__
    name = function.__name__ if function else thing.__name__
    if by_name := named(thing, home, name) or named(thing, getattr(thing, "__module__", None), name):
        yield by_name
    elif isinstance(owner, types.ModuleType):
        raise Unknowable(f"{home}.{name} is compiled code of a module that is not installed")
    else:
        yield from (name, function, owner)


def pairs(table: dict[Any, Any], owner: str = "") -> Iterator[Any]:
    """The keys and values of a dictionary in their order; `owner` stands before a key on the way to its value."""
    yield len(table)
    for key, value in table.items():
        yield key
        yield At(f"{owner}{key}" if type(key) is str else "", value)
