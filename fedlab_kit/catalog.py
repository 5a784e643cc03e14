"""What a user registers by name, and what code a name stands for: a digest of all definitions that it reaches."""

from __future__ import annotations

import ast
import builtins
import dis
import enum
import functools
import hashlib
import importlib.metadata
import logging
import os
import pathlib
import random
import re
import sys
import sysconfig
import threading
import types
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import lru_cache
from operator import attrgetter, itemgetter, methodcaller
from typing import Any, NamedTuple, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])

MODELS: dict[str, Callable[..., Any]] = {}
"""Name -> `f(shape, classes) -> nn.Module`; `shape` is that of one sample, without the batch."""

DATASETS: dict[str, Callable[..., Any]] = {}
"""Name -> `f() -> Dataset`."""

_TABLES: dict[str, dict[str, Any]] = {"model": MODELS, "dataset": DATASETS}
_PACKAGE = __name__.partition(".")[0]


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


def add_table(kind: str, table: dict[str, Any]) -> None:
    """Tell the catalog of things that are registered by name elsewhere."""
    _TABLES[kind] = table


def is_built_in(thing: Any) -> bool:
    """Say whether a function or class belongs to the package, so that every process knows it."""
    return home_of(thing).partition(".")[0] == _PACKAGE


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


_DECIDES = ("compression/*.py", "federation/*.py", "wire/*.py", "data.py", "hands.py", "models.py", "partition.py")
_SOURCES = {
    str(file.relative_to(pathlib.Path(__file__).parent)): file.read_bytes()  # now, while it is what is loaded
    for pattern in _DECIDES
    for file in sorted(pathlib.Path(__file__).parent.glob(pattern))
}


@lru_cache(maxsize=1)
def code() -> str:
    """Return the digest of the package's own code that decides weights, as it was when this process began."""
    return code_digest(_SOURCES)


def code_digest(sources: Mapping[str, bytes]) -> str:
    """Return a SHA-256 (hex) of source files by name: of their syntax trees, without docstrings and comments."""
    digest = hashlib.sha256()
    for name in sorted(sources):
        words: list[object] = [name]
        _flatten(ast.parse(sources[name]), words)
        digest.update(repr(words).encode())
    return digest.hexdigest()


def _flatten(node: ast.AST, words: list[object]) -> None:
    """Add a syntax tree to a list, without text that stands alone; `ast.dump` takes twice as long."""
    words.append(type(node).__name__)
    for field in node._fields:
        value = getattr(node, field, None)
        for one in value if type(value) is list else [value]:
            if type(one) is ast.Expr and isinstance(one.value, ast.Constant) and isinstance(one.value.value, str):
                continue
            if isinstance(one, ast.AST):
                _flatten(one, words)
            elif one is not None:
                words.append(one)
        words.append(field)


class Unknowable(ValueError):
    """A definition whose value cannot be told, so that nothing made with it can be found again by its name.

    The message is one line with the way to it, e.g. "model 'mine' -> Net.forward -> HELPER: a generator ...".
    """


def fingerprint(thing: Any, name: str = "it") -> str:
    """Return a SHA-256 (hex) of a function, class or value, and of all definitions that it reaches.

    Code counts by what it does, not by its file, line or name; what it reads (defaults, closures, globals, classes,
    modules of a user's own) by content; what is installed by name and version, the package's own things by name,
    see `code`. Equal in every process that runs the same code. `name` begins the way in an error. Nothing is pickled,
    and nothing of a user's is called. Raises Unknowable for what has no value: a generator, an open file, `eval`.
    """
    walk = _Walk([name], {})
    try:
        walk.visit(thing)
    except RecursionError:
        raise Unknowable(f"{name}: it is nested too deeply to be told apart from a later one") from None
    return walk.sha.hexdigest()


def current(kind: str, name: str) -> str:
    """Return the fingerprint of a registered function as it is now, and tell `stamp` if it has changed."""
    function = lookup(kind, name)
    known, before, edits = _TOLD.get((kind, name), (None, "", 0))
    try:
        found = fingerprint(function, f"{kind} {name!r}")
    except Unknowable:  # it may have been edited: nobody can tell
        _TOLD[kind, name] = function, "", edits + 1
        raise
    _TOLD[kind, name] = function, found, edits + (before != found) if known is function else 0
    return found


def stamp(kind: str, name: str) -> tuple[Callable[..., Any], int]:
    """Return what caches are keyed by: the registered function, and how often `current` saw what it reaches change."""
    known, _, edits = _TOLD.get((kind, name), (None, "", 0))
    return (function := lookup(kind, name)), edits if known is function else 0


_TOLD: dict[tuple[str, str], tuple[Callable[..., Any] | None, str, int]] = {}


class _Code(NamedTuple):
    """What a code object does, as a digest, and what it reads, nested code included.

    `bare` are the names of all kinds whose value is used other than by an attribute. `imports` (name, level, alias) are
    those inside functions; `alias` is what a module itself is called there, "" where only things of it are. `words` are
    its texts.
    """

    digest: str
    globals: frozenset[str]
    attributes: frozenset[str]
    bare: frozenset[str]
    imports: frozenset[tuple[str, int, str]]
    words: frozenset[str]


_HIDES = {"eval", "exec", "globals", "compile", "__import__", "import_module"}
_ALL_OF_IT = {"getattr", "vars", "dir", "attrgetter", "__dict__", "__getattribute__", "getmembers", "import_module"}
_BY_NAME = {  # kinds of things, and what of the package finds one by its name
    "codec": {"make", "CODECS"},
    "dataset": {"load", "lookup", "DATASETS"},
    "model": {"build", "lookup", "MODELS"},
}
_PLACE = {"__qualname__", "__module__", "__firstlineno__", "__static_attributes__", "__doc__"}  # stored in class bodies
_LEFT_OUT = _PLACE | {
    "__dict__", "__weakref__", "__annotations__", "__annotate__", "__annotate_func__", "__annotations_cache__",
    "__abstractmethods__", "_abc_impl", "__type_params__", "__parameters__", "__orig_bases__", "__name__",
    "_autograd_function_id",
}  # fmt: skip
_MODULE_FACTS = {"__name__", "__file__", "__doc__", "__spec__", "__loader__", "__package__", "__path__", "__builtins__"}


@lru_cache(maxsize=4096)
def _read(code: types.CodeType) -> _Code:
    """Take a code object apart, instruction by instruction, so that constants count by value and not by place."""
    walk = _Walk([code.co_name], {})
    walk.put(code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags & 0x3FF)
    walk.put(*code.co_varnames, "|", *code.co_freevars, "|", *code.co_cellvars, "|", code.co_exceptiontable)
    names, attributes, bare, imports = set[str](), set[str](), set[str](), set[tuple[str, int, str]]()
    aliases: dict[str, str] = {}
    words = {word for word in code.co_consts if isinstance(word, str)}
    steps = [step for step in dis.get_instructions(code) if step.opname != "EXTENDED_ARG"]
    place = {step.offset: number for number, step in enumerate(steps)}
    for number, step in enumerate(steps):
        after = steps[number + 1] if number + 1 < len(steps) else step
        if after.opname == "STORE_NAME" and after.argval in _PLACE:
            continue  # where a class was written, and how it is called there
        walk.put(step.opname)
        if step.opcode in dis.hasconst:
            walk.visit(step.argval)
            if isinstance(step.argval, types.CodeType):
                inner = _read(step.argval)
                names |= inner.globals
                attributes |= inner.attributes
                bare |= inner.bare
                imports |= inner.imports
                words |= inner.words
        elif step.opcode in dis.hasjrel or step.opcode in dis.hasjabs:
            walk.put(place.get(step.argval, step.argval))
        elif step.opcode in dis.haslocal or step.opcode in dis.hasfree or step.opcode in dis.hasname:
            walk.put(step.argval)
        else:
            walk.put(step.arg)
        by_name = "LOAD_" in step.opname and step.opname != "LOAD_CLOSURE" and step.opcode not in dis.hasconst
        if by_name and not after.opname.startswith(("LOAD_ATTR", "LOAD_METHOD")):
            bare.update(_named(step))
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"):
            names.add(step.argval)
        elif step.opname == "IMPORT_NAME":
            level, things = (before.argval for before in steps[number - 2 : number])
            alias = "" if things else next(_named(s)[0] for s in steps[number:] if s.opname.startswith("STORE_"))
            imports.add((step.argval, level if isinstance(level, int) else 0, alias))
        elif step.opcode in dis.hasname:
            attributes.add(step.argval)
            if step.opname == "IMPORT_FROM":
                aliases[_named(after)[0]] = step.argval
    bare |= {aliases[name] for name in bare & aliases.keys()}
    return _Code(walk.sha.hexdigest(), *map(frozenset, (names, attributes, bare, imports, words)))  # type: ignore[arg-type]


def _named(step: dis.Instruction) -> tuple[Any, ...]:
    """Return the names that an instruction is about: one, or two of locals."""
    return step.argval if type(step.argval) is tuple else (step.argval,)


class _Walk:
    """Feeds one digest with definitions, depth first; what was seen before counts by its number, which ends cycles."""

    def __init__(self, way: list[str], seen: dict[Any, tuple[int, Any]]) -> None:
        self.way, self.seen, self.sha = way, seen, hashlib.sha256()

    def put(self, *words: object) -> None:
        """Feed words, each with its length, so that no two lists of words are the same bytes."""
        for word in words:
            data = word if isinstance(word, bytes) else str(word).encode("utf-8", "surrogatepass")
            self.sha.update(b"%d:%b" % (len(data), data))

    def visit(self, thing: Any, step: str = "") -> None:
        """Feed anything; `step` names it on the way there."""
        self.way.append(step)
        kind = type(thing)
        if type(kind) is type and kind in _ATOMS:
            self.put(kind.__name__, _ATOMS[kind](thing))
        elif kind is types.CodeType:
            self.put("code", _read(thing).digest)
        elif kind is tuple:  # by value alone: the compiler shares equal ones or not, as it likes
            self.items("tuple", thing)
        elif kind is frozenset:
            self.unordered(thing)
        elif not self.again(id(thing), thing):
            next(feed for kinds, feed in _FEEDS if issubclass(kind, kinds))(self, thing)
        self.way.pop()

    def again(self, key: Any, thing: Any) -> bool:
        """Whether a thing was seen, and if so feed its number; else remember it, and keep it alive."""
        if key in self.seen:
            self.put("again", self.seen[key][0])
            return True
        self.seen[key] = len(self.seen), thing
        return False

    def refuse(self, what: str) -> Any:
        """Raise Unknowable with the way to what cannot be told."""
        steps = [step for step in self.way if step]
        way = [s for s, after in zip(steps, [*steps[1:], ""], strict=True) if after.partition(".")[0] != s]
        raise Unknowable(f"{' -> '.join(way)}: {what}")

    def items(self, word: str, things: Iterable[Any]) -> None:
        """Feed things in their order."""
        listed = list(things)
        self.put(word, len(listed))
        for thing in listed:
            self.visit(thing)

    def unordered(self, things: Iterable[Any]) -> None:
        """Feed things sorted by their own digests."""
        digests = []
        for thing in list(things):
            walk = _Walk(list(self.way), self.seen if type(thing) in _ATOMS else dict(self.seen))
            walk.visit(thing)
            digests.append(walk.sha.hexdigest())
        self.put("set", *sorted(digests))

    def pairs(self, table: Mapping[Any, Any], owner: str = "") -> None:
        """Feed keys and values in their order."""
        self.put("dict", len(table))
        for key, value in list(table.items()):
            self.visit(key)
            self.visit(value, f"{owner}{key}" if type(key) is str else "")

    def named(self, thing: Any, module: Any, name: Any) -> bool:
        """Feed what is installed, or the package's, by name and version, if that name really leads to it."""
        if type(module) is not str or type(name) is not str or not (origin := origin_of(module)):
            return False
        found: Any = sys.modules.get(module)
        for part in name.split("."):
            found = vars(found).get(part) if isinstance(found, type | types.ModuleType) else None
        if found is thing or (isinstance(found, staticmethod | classmethod) and found.__func__ is thing):
            self.put("named", origin, module, name)
            return True
        return False

    def module(self, thing: types.ModuleType, used: _Code | None = None) -> None:
        """Feed a module: what is installed by name and version, a user's own by what code uses of it (None: all)."""
        table, names = vars(thing), None if used is None else used.attributes
        if origin := origin_of(thing.__name__):
            self.put("module", origin, thing.__name__)
            own = [name for name in names or () if type(table.get(name)) is types.FunctionType]
            own = [name for name in own if not origin_of(home_of(table[name]))]  # put there by a user
        else:
            wanted = table if names is None else {*names, "__getattr__"}  # which makes what is not there
            own = [name for name in wanted if name in table and name not in _MODULE_FACTS]
        if own and not self.again((id(thing), used), thing):
            for name in sorted(own):
                self.put(name)
                self.part(table[name], name, used, f"{thing.__name__}.{name}")

    def part(self, value: Any, name: str, used: _Code | None, step: str) -> None:
        """Feed a value that code reads by name; of a module that it hands nowhere only the attributes that it names."""
        if issubclass(type(value), types.ModuleType):
            self.way.append(step)
            self.module(value, None if used and name in used.bare else used)
            self.way.pop()
        else:
            self.visit(value, step)

    def function(self, thing: types.FunctionType) -> None:
        """Feed a function's code and all that it reads; an installed one's name and what it carries."""
        origin, read = origin_of(home_of(thing)), _read(thing.__code__)
        if origin and self.named(thing, thing.__globals__["__name__"], thing.__code__.co_qualname):
            return
        self.put("function", origin or read.digest, thing.__code__.co_qualname if origin else "")
        self.visit(thing.__defaults__, "its default")
        self.visit(thing.__kwdefaults__, "its default")
        used = None if _ALL_OF_IT & (read.globals | read.attributes) else read
        for name, cell in zip(thing.__code__.co_freevars, thing.__closure__ or (), strict=True):
            try:
                self.part(cell.cell_contents, name, used, name)
            except ValueError as error:
                if isinstance(error, Unknowable):
                    raise
                self.put("empty")
        self.pairs({name: thing.__dict__[name] for name in sorted(thing.__dict__)})
        if not origin:
            self.globals(thing.__globals__, read, used)
            self.registered(thing, read)

    def globals(self, table: dict[str, Any], read: _Code, used: _Code | None) -> None:
        """Feed what a function's code reads from its module, from Python, and by an import of its own."""
        for name in sorted(read.globals - _MODULE_FACTS):
            if name in table:
                self.put("global", name)
                self.part(table[name], name, used, name)
            elif name in _HIDES:
                self.refuse(f"what {name}() reaches cannot be told from the code: name it there")
            else:
                self.put("builtin" if hasattr(builtins, name) else "unbound", name)
        for name, level, alias in sorted(read.imports):
            if level:
                package = str(table.get("__package__") or "").split(".")
                name = ".".join([*package[: len(package) - level + 1], *([name] if name else [])])
            self.put("import", name)
            found = sys.modules.get(name)
            if found is None and not origin_of(name):
                self.refuse(f"module {name!r} is not imported yet: import it above the function")
            if found is not None:
                top, whole = name.partition(".")[0], alias in read.bare
                self.module(sys.modules[top], None if whole and alias == top else used)
                self.module(found, None if whole else used)
        if "modules" in read.attributes and table.get("sys") is sys:
            self.refuse("what sys.modules reaches cannot be told from the code: import it by name")
        if "import_module" in read.attributes | read.globals:
            self.refuse("what import_module() reaches cannot be told from the code: import it by name")

    def definition(self, thing: type) -> None:
        """Feed a class: its metaclass, its bases, and what stands in its body."""
        table = dict(type.__getattribute__(thing, "__dict__"))
        if self.named(thing, type.__getattribute__(thing, "__module__"), type.__getattribute__(thing, "__qualname__")):
            for name in sorted(table):
                if type(table[name]) is types.FunctionType and not origin_of(home_of(table[name])):
                    self.visit(table[name], f"{thing.__name__}.{name}")  # put there by a user
            return
        if not thing.__flags__ & 1 << 9:  # a type of C code
            if not origin_of(thing.__module__):
                self.refuse(f"type {thing.__name__} is compiled code of a module that is not installed")
            self.put("type", thing.__name__)
            return
        self.put("class")
        self.visit(type(thing), "its metaclass")
        self.items("bases", type.__getattribute__(thing, "__bases__"))
        for name in sorted(name for name in table if name not in _LEFT_OUT and not name.startswith("__pydantic_")):
            self.put(name)
            self.visit(table[name], f"{thing.__name__}.{name}")

    def method(self, thing: Any) -> None:
        """Feed a bound method; one that an installed module shares, as `random.shuffle`, by its name."""
        owner, function = thing.__self__, getattr(thing, "__func__", None)
        home = owner.__name__ if isinstance(owner, types.ModuleType) else type(owner).__module__
        name = function.__name__ if function else thing.__name__
        if self.named(thing, home, name) or self.named(thing, getattr(thing, "__module__", None), name):
            return
        if isinstance(owner, types.ModuleType):
            self.refuse(f"{home}.{name} is compiled code of a module that is not installed")
        self.put("method", name)
        self.visit(function)
        self.visit(owner)

    def instance(self, thing: Any) -> None:
        """Feed any other object: its class, what it holds as a container or number, and its attributes."""
        kind = type(thing)
        base = next((one for one in _CONTAINERS if issubclass(kind, one)), object)
        slots = {
            name: slot
            for one in type.__getattribute__(kind, "__mro__")
            for name, slot in vars(one).items()
            if type(slot) is types.MemberDescriptorType
        }
        extra = len(slots) + (kind.__dictoffset__ > 0) + (kind.__weakrefoffset__ > 0)
        if kind.__basicsize__ > base.__basicsize__ + 8 * extra or kind.__itemsize__ != base.__itemsize__:
            if origin_of(kind.__module__) and self.named(
                thing, getattr(thing, "__module__", None), getattr(thing, "__name__", None)
            ):
                return
            self.refuse(f"a {kind.__name__} has no value that could be told again later")
        self.put("instance", base.__name__)
        self.visit(kind, kind.__name__)
        self.contents(thing, base)
        attributes = dict(self.attributes(thing))
        for name, slot in slots.items():
            try:
                attributes[name] = slot.__get__(thing, kind)
            except AttributeError:
                self.put("unset", name)
        for name in sorted(attributes.keys() - _LEFT_OUT, key=str):
            value = attributes[name]
            self.put(name)  # hooks of a module are numbered anew in every process
            self.visit(list(value.values()) if "_hooks" in str(name) and type(value) in _HOOKS else value, f".{name}")

    def contents(self, thing: Any, base: type) -> None:
        """Feed what an object holds as a container or number of Python's, past its own class."""
        if issubclass(base, dict):
            self.pairs(dict(dict.items(thing)))
            self.visit(getattr(thing, "default_factory", None) if base is defaultdict else None)
        elif base in (list, tuple, deque):
            self.items(base.__name__, base.__iter__(thing))
            self.put(thing.maxlen if base is deque else "")
        elif base in (set, frozenset):
            self.unordered(base.__iter__(thing))
        elif base is random.Random:
            self.visit(random.Random.getstate(thing))
        elif base is not object:
            self.put(base.__repr__(thing))

    def member(self, thing: Any) -> None:
        """Feed a constant of an enumeration, by name and value."""
        self.visit(type(thing), type(thing).__name__)
        self.put(thing._name_)
        self.visit(thing._value_)

    def parts(self, thing: Any) -> None:
        """Feed what is known to consist of its parts."""
        kind = next(kinds for kinds, _ in _PARTS if issubclass(type(thing), kinds))
        self.items(type(thing).__name__, dict(_PARTS)[kind](thing))
        own = not origin_of(type(thing).__module__)
        if own:
            self.visit(type(thing), type(thing).__name__)
        if own or isinstance(thing, functools.partial | threading.local):
            local = isinstance(thing, threading.local)  # whose attributes are this thread's
            attributes = vars(thing) if local else self.attributes(thing)
            self.pairs({name: attributes[name] for name in sorted(attributes.keys() - _LEFT_OUT, key=str)})

    def registered(self, thing: types.FunctionType, read: _Code) -> None:
        """Feed what a function may look up by name in the package: what its text names, or all of that kind."""
        kinds = [kind for kind, words in _BY_NAME.items() if words & (read.globals | read.attributes)]
        seen = [thing.__globals__[name] for name in read.globals if name in thing.__globals__]
        for cell in thing.__closure__ or ():
            with suppress(ValueError):  # an empty one
                seen.append(cell.cell_contents)
        modules = [value.__name__ for value in seen if issubclass(type(value), types.ModuleType)]
        functions = [home_of(value) for value in seen if type(value) in (types.FunctionType, type)]
        homes = [*modules, *functions, *(name for name, *_ in read.imports)]
        ours = any(home.partition(".")[0] == _PACKAGE for home in homes)
        if kinds and (ours or any(value is table for value in seen for table in _TABLES.values())):
            for kind in kinds:
                users = [name for name, value in _TABLES[kind].items() if not is_built_in(value)]
                for name in sorted(set(users) & read.words or users):
                    self.put(kind, name)
                    self.visit(_TABLES[kind][name], f"{kind} {name!r}")

    @staticmethod
    def attributes(thing: Any) -> dict[str, Any]:
        """Return an object's own attributes, past whatever its class makes of the question."""
        try:
            return object.__getattribute__(thing, "__dict__")
        except AttributeError:
            return {}


def _numeric(walk: _Walk, thing: Any) -> None:
    """Feed values of numpy, torch and pandas, where these are loaded; anything else is an instance."""
    kind, top = type(thing), ""
    for one in type.__getattribute__(kind, "__mro__"):
        top = str(type.__getattribute__(one, "__module__")).partition(".")[0]
        if top in _LOADED and one is not object:
            if _LOADED[top](walk, thing, sys.modules[top]):
                if one is not kind and not origin_of(kind.__module__):
                    walk.visit(kind, kind.__name__)
                    walk.pairs(walk.attributes(thing))
                return
            break
    walk.instance(thing)


def _torch(walk: _Walk, thing: Any, torch: Any) -> bool:
    kind = type(thing)
    if issubclass(kind, torch.Tensor):
        with torch._C.DisableTorchFunctionSubclass(), torch.no_grad():
            if thing.layout != torch.strided or thing.device.type == "meta" or thing.is_quantized:
                walk.refuse(f"a tensor of layout {thing.layout} on {thing.device.type} has no bytes to compare")
            plain = thing.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
            walk.put("tensor", thing.dtype, tuple(thing.shape), thing.requires_grad, thing.device.type)
            walk.put(hashlib.sha256(plain.view(torch.uint8).numpy().tobytes()).hexdigest())
            if given := walk.attributes(thing):  # those that a user has given it
                walk.pairs({name: given[name] for name in sorted(given)})
    elif issubclass(kind, torch.Generator):
        walk.put("generator", thing.device)
        walk.visit(torch.Generator.get_state(thing))
    elif kind in (torch.dtype, torch.device, torch.layout, torch.memory_format):
        walk.put(kind.__name__, str(thing))
    else:
        return False
    return True


def _numpy(walk: _Walk, thing: Any, numpy: Any) -> bool:
    kind = type(thing)
    if issubclass(kind, numpy.ndarray | numpy.generic):
        plain = numpy.asarray(thing)
        walk.put("array", "" if kind is numpy.ndarray else kind.__name__, plain.dtype.descr, plain.shape)
        if issubclass(kind, numpy.ma.MaskedArray):
            walk.visit(numpy.ma.getmaskarray(thing))
        if plain.dtype.hasobject:
            walk.items("objects", plain.reshape(-1).tolist())
        else:
            walk.put(hashlib.sha256(plain.tobytes()).hexdigest())
    elif issubclass(kind, numpy.dtype):
        walk.put("dtype", thing.descr)
    elif kind is numpy.random.Generator:
        walk.visit(thing.bit_generator.state)
    elif kind is numpy.random.RandomState:
        walk.visit(thing.get_state(legacy=False))
    elif kind is numpy.ufunc and vars(numpy).get(thing.__name__) is thing:
        walk.put("ufunc", thing.__name__)
    else:
        return False
    return True


def _pandas(walk: _Walk, thing: Any, pandas: Any) -> bool:
    kind = type(thing)
    if kind not in (pandas.DataFrame, pandas.Series) and not issubclass(kind, pandas.Index):
        return False
    table = thing if kind is pandas.DataFrame else thing.to_frame()
    walk.put(kind.__name__, *(str(dtype) for dtype in table.dtypes))
    for column in (table.columns, table.index, *(table.iloc[:, number] for number in range(table.shape[1]))):
        walk.visit(column.to_numpy())
    return True


_LOADED = {"torch": _torch, "numpy": _numpy, "pandas": _pandas}
_HOOKS = (dict, OrderedDict)
_ATOMS: dict[type, Callable[[Any], Any]] = {
    **dict.fromkeys((type(None), type(...), type(NotImplemented)), lambda thing: ""),
    **dict.fromkeys((bool, int), lambda thing: hex(thing)),
    **dict.fromkeys((str, bytes), lambda thing: thing),
    float: float.hex,
    complex: lambda thing: f"{thing.real.hex()} {thing.imag.hex()}",
}
_CONTAINERS: tuple[type, ...] = (
    OrderedDict, defaultdict, dict, list, tuple, deque, set, frozenset, str, bytes, bytearray, int, float, complex,
    random.Random,
)  # fmt: skip
_CALLED = (types.MethodType, types.BuiltinFunctionType, types.MethodWrapperType)
_OF_C = (
    types.WrapperDescriptorType, types.MethodDescriptorType, types.ClassMethodDescriptorType,
    types.GetSetDescriptorType, types.MemberDescriptorType,
)  # fmt: skip
_BY_TYPE = (
    logging.Logger, type(threading.Lock()), type(threading.RLock()), threading.local, type(_Code.digest), TypeVar,
    type(os.environ), weakref.WeakKeyDictionary, weakref.WeakValueDictionary, weakref.WeakSet,
)  # fmt: skip
_PARTS: tuple[tuple[Any, Callable[[Any], list[Any]]], ...] = (
    (_OF_C, lambda thing: [thing.__name__, thing.__objclass__]),
    (property, lambda thing: [thing.fget, thing.fset, thing.fdel]),
    ((staticmethod, classmethod), lambda thing: [thing.__func__]),
    (functools.partial, lambda thing: [thing.func, thing.args, thing.keywords]),
    (functools._lru_cache_wrapper, lambda thing: [thing.__wrapped__]),
    (weakref.ReferenceType, lambda thing: [thing()]),
    (_BY_TYPE, lambda thing: []),
    ((itemgetter, attrgetter, methodcaller), lambda thing: [thing.__reduce__()]),
    (pathlib.PurePath, lambda thing: [pathlib.PurePath.__str__(thing)]),
    (re.Pattern, lambda thing: [thing.pattern, thing.flags]),
    (slice, lambda thing: [thing.start, thing.stop, thing.step]),
    (range, lambda thing: [thing.start, thing.stop, thing.step]),
    (types.MappingProxyType, lambda thing: [dict(thing)]),
    ((types.GenericAlias, types.UnionType), lambda thing: []),  # annotations decide nothing
)
_FEEDS: tuple[tuple[Any, Callable[[_Walk, Any], None]], ...] = (
    (types.ModuleType, _Walk.module),
    (types.FunctionType, _Walk.function),
    (enum.Enum, _Walk.member),
    (type, _Walk.definition),
    (_CALLED, _Walk.method),
    (tuple(kind for kinds, _ in _PARTS for kind in (kinds if isinstance(kinds, tuple) else (kinds,))), _Walk.parts),
    (object, _numeric),
)


def home_of(thing: Any) -> str:
    """Return the name of the module that holds a function's code, a class, or an object's class."""
    if type(thing) is types.FunctionType:
        return str(thing.__globals__.get("__name__", ""))
    return str((thing if isinstance(thing, type) else type(thing)).__module__ or "")


def origin_of(module: str) -> str:
    """Return what stands for all content of a module: Python, a distribution or the package; "" for a user's own."""
    top = module.partition(".")[0]
    if top in (_PACKAGE, "__main__"):
        return top if top == _PACKAGE else ""
    found = sys.modules.get(top)
    file = getattr(found, "__file__", None) or next(iter(getattr(found, "__path__", ())), "")
    return _installed(top, file, found is not None)


@lru_cache(maxsize=4096)
def _installed(top: str, file: str, loaded: bool) -> str:
    """Say where the file of a module, not yet loaded perhaps, is from: what `origin_of` returns."""
    if not loaded and top not in sys.builtin_module_names:
        spec = importlib.machinery.PathFinder.find_spec(top)
        file = (spec.origin or next(iter(spec.submodule_search_locations or ()), "")) if spec else ""
    parts = pathlib.Path(file).parts
    if {"site-packages", "dist-packages"} & set(parts):
        return _distribution(top)
    standard = file and pathlib.Path(file).is_relative_to(sysconfig.get_path("stdlib"))
    if standard or top in sys.builtin_module_names or (not file and top in sys.stdlib_module_names):
        return "python {}.{}".format(*sys.version_info)
    return ""


def _distribution(top: str) -> str:
    """Return name and version of what is installed under a module's name, "" where nobody knows its version."""
    try:
        return f"{top} {importlib.metadata.version(top)}"
    except importlib.metadata.PackageNotFoundError:
        names = importlib.metadata.packages_distributions().get(top, [])
        return " ".join(f"{name} {importlib.metadata.version(name)}" for name in sorted(names))
