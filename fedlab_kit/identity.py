"""What a name stands for: a digest of a function, class or value and of all definitions that it reaches.

Whatever is met consists of parts, by its kind (`_KINDS`); one walk feeds a digest with them, depth first.
"""

from __future__ import annotations

import copyreg
import enum
import functools
import hashlib
import logging
import os
import sys
import threading
import types
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any, TypeVar

import torch

from fedlab_kit import catalog
from fedlab_kit.catalog import home_of
from fedlab_kit.code_reading import origin_of, read
from fedlab_kit.definitions import LEFT_OUT, At, Unknowable, Used, definition, function, method, module, named, pairs


def fingerprint(thing: Any, name: str = "it") -> str:
    """Return a SHA-256 (hex) of a function, class or value, and of all definitions that it reaches.

    Code counts by what it does, not by its file, line or name; what it reads (defaults, closures, globals, classes,
    modules of a user's own) by content; what is installed by name and version, the package's own things by name,
    see `own_code`. Equal in every process that runs the same code. `name` begins the way in an error. Nothing is
    pickled, and nothing of a user's is called. Raises Unknowable for what has no value: a generator, a file, `eval`.
    """
    walk = _Walk([name], {})
    try:
        walk.visit(thing)
    except RecursionError:
        raise Unknowable(f"{name}: it is nested too deeply to be told apart from a later one") from None
    except Unknowable as error:
        steps = [step for step in walk.way if step]
        way = [s for s, after in zip(steps, [*steps[1:], ""], strict=True) if after.partition(".")[0] != s]
        raise Unknowable(f"{' -> '.join(way)}: {error}") from None
    return walk.sha.hexdigest()


def current(kind: str, name: str) -> str:
    """Return the fingerprint of a registered function as it is now, and keep it for `stamp`."""
    function = catalog.lookup(kind, name)
    _LAST[kind, name] = function, object()  # nobody can tell yet
    found = fingerprint(function, f"{kind} {name!r}")
    _LAST[kind, name] = function, found
    return found


def stamp(kind: str, name: str) -> tuple[Callable[..., Any], object]:
    """Return what caches are keyed by: the registered function, and what `current` last found of what it reaches."""
    if _LAST.get((kind, name), (None,))[0] is not catalog.lookup(kind, name):
        with suppress(Unknowable):
            current(kind, name)
    return _LAST[kind, name]


_LAST: dict[tuple[str, str], tuple[Callable[..., Any], object]] = {}


class _Walk:
    """Feeds one digest; what was seen before counts by its number, which ends cycles."""

    def __init__(self, way: list[str], seen: dict[Any, tuple[int, Any]]) -> None:
        self.way, self.seen, self.sha = way, seen, hashlib.sha256()

    def put(self, *words: str | bytes) -> None:
        """Feed words, each with its length, so that no two lists of words are the same bytes."""
        for word in words:
            data = word if isinstance(word, bytes) else word.encode("utf-8", "surrogatepass")
            self.sha.update(b"%d:" % len(data))
            self.sha.update(data)

    def visit(self, thing: Any) -> None:
        """Feed anything."""
        step, thing = thing if type(thing) is At else ("", thing)
        self.way.append(step)
        kind = type(thing)
        if type(kind) is type and kind in _ATOMS:
            plain = kind in (str, bytes)
            self.put(kind.__name__, thing if plain else hex(thing) if kind is int else repr(thing))
        elif kind is tuple:  # by value alone: the compiler shares equal ones or not, as it likes
            self.feed("tuple", thing)
        elif kind is types.CodeType:
            self.feed("code", read(thing).does)
        elif kind is frozenset:
            self.put("set", *sorted(map(self.apart, thing)))
        elif (key := (id(thing.module), thing.by) if kind is Used else id(thing)) in self.seen:
            self.put("again", str(self.seen[key][0]))
        else:
            self.seen[key] = len(self.seen), thing  # which keeps it alive
            self.feed("of", next(parts for kinds, parts in _KINDS if issubclass(kind, kinds))(thing))
        self.way.pop()

    def feed(self, word: str, parts: Iterable[Any]) -> None:
        """Feed parts in their order, between a word and an end."""
        self.put(word)
        for part in parts:
            self.visit(part)
        self.put("end")

    def apart(self, thing: Any) -> str:
        """Return a digest of an element of a set, whose order means nothing."""
        walk = _Walk(self.way, self.seen if type(thing) in _ATOMS else dict(self.seen))
        walk.visit(thing)
        return walk.sha.hexdigest()


def _instance(thing: Any) -> Iterator[Any]:
    """Any other object: what it holds as a container or number, or what it is made again with, and its attributes."""
    kind = type(thing)
    base = next((one for one in _CONTAINERS if issubclass(kind, one)), object)
    mro = type.__getattribute__(kind, "__mro__")
    slots = {name: slot for one in mro for name, slot in vars(one).items() if type(slot) is types.MemberDescriptorType}
    extra = len(slots) + (kind.__dictoffset__ != 0) + (kind.__weakrefoffset__ > 0)
    hidden = kind.__basicsize__ > base.__basicsize__ + 8 * extra or kind.__itemsize__ != base.__itemsize__
    if (hidden or base is object) and (made := _made_with(thing)):
        return _known(thing, made)
    if hidden:
        raise Unknowable(f"a {kind.__name__} has no value that could be told again later")
    attributes = _attributes(thing)
    for name, slot in slots.items():
        with suppress(AttributeError):  # nothing is there
            attributes[name] = slot.__get__(thing, kind)
    for name, value in attributes.items():
        if "_hooks" in str(name) and type(value) in (dict, OrderedDict):  # numbered anew in every process
            attributes[name] = list(value.values())
    return _known(thing, _contents(thing, base), attributes)


def _made_with(thing: Any) -> tuple[Any, ...]:
    """Return an installed thing's name, or what its class says it is made again with; () where there is neither."""
    kind, mro = type(thing), type.__getattribute__(type(thing), "__mro__")
    if origin_of(kind.__module__) and (
        by_name := named(thing, *(getattr(thing, word, None) for word in ("__module__", "__name__")))
    ):
        return by_name
    ways = [vars(one).get("__reduce__") for one in mro[:-1] if origin_of(home_of(one))]
    way = next(filter(None, ways), copyreg.dispatch_table.get(kind) if type(kind) is type else None)
    if way is None or any("__next__" in vars(one) for one in mro):  # an iterator is used up
        return ()
    made: Any = way(thing)
    return (made,) if type(made) is str else made[1:]


def _contents(thing: Any, base: type) -> Iterator[Any]:
    """What an object holds as a container or number of Python's, past its own class."""
    if issubclass(base, dict):
        yield from pairs(dict(dict.items(thing)))
        yield getattr(thing, "default_factory", None) if base is defaultdict else None
    elif base in (list, tuple, deque):
        yield tuple(base.__iter__(thing))
        yield thing.maxlen if base is deque else None
    elif base in (set, frozenset):
        yield frozenset(thing)
    elif base is not object:
        yield base.__repr__(thing)


def _attributes(thing: Any) -> dict[Any, Any]:
    """Return a copy of an object's own attributes, past whatever its class makes of the question."""
    try:
        return dict(object.__getattribute__(thing, "__dict__"))
    except AttributeError:
        return {}


def _known(thing: Any, parts: Iterable[Any], attributes: dict[Any, Any] | None = None) -> Iterator[Any]:
    """What consists of its class, of parts and of attributes: those given, else what a user's own class adds."""
    kind = type(thing)
    yield At(kind.__name__, kind)
    yield from parts
    if attributes is None:
        attributes = {} if origin_of(kind.__module__) else _attributes(thing)
    yield from pairs({name: attributes[name] for name in sorted(attributes.keys() - LEFT_OUT, key=str)}, ".")


def _tensor(thing: torch.Tensor) -> Iterator[Any]:
    """A tensor by its bytes, and with what a user has given it."""
    with torch._C.DisableTorchFunctionSubclass(), torch.no_grad():
        if thing.layout != torch.strided or thing.device.type == "meta" or thing.is_quantized:
            raise Unknowable(f"a tensor of layout {thing.layout} on {thing.device.type} has no bytes to compare")
        plain = thing.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
        facts = str(thing.dtype), tuple(thing.shape), thing.requires_grad, thing.device.type
        return _known(thing, [facts, plain.view(torch.uint8).numpy().tobytes()], _attributes(thing))


def _other(thing: Any) -> Iterable[Any]:
    """A table of pandas, if that is loaded, by its columns; anything else as an instance."""
    pandas = sys.modules.get("pandas")
    if pandas and type(thing) in (pandas.DataFrame, pandas.Series):
        table = thing if type(thing) is pandas.DataFrame else thing.to_frame()
        columns = (table.iloc[:, number].to_numpy() for number in range(table.shape[1]))
        return [type(thing), *map(str, table.dtypes), table.columns, table.index, *columns]
    return _instance(thing)


_ATOMS = {type(None), type(...), type(NotImplemented), bool, int, float, complex, str, bytes}
_CONTAINERS: tuple[type, ...] = (
    OrderedDict, defaultdict, dict, list, tuple, deque, set, frozenset, str, bytes, bytearray, int, float, complex,
)  # fmt: skip
_BY_TYPE = (
    logging.Logger, type(threading.Lock()), type(threading.RLock()), type(At.step), TypeVar,
    type(os.environ), weakref.WeakKeyDictionary, weakref.WeakValueDictionary, weakref.WeakSet,
    types.GenericAlias, types.UnionType,  # annotations decide nothing
)  # fmt: skip
_KINDS: tuple[tuple[Any, Callable[[Any], Iterable[Any]]], ...] = (
    (Used, lambda thing: module(*thing)),
    (types.ModuleType, module),
    (types.FunctionType, function),
    (enum.Enum, lambda thing: [At(type(thing).__name__, type(thing)), thing._name_, thing._value_]),
    (type, definition),
    ((types.MethodType, types.BuiltinFunctionType, types.MethodWrapperType), method),
    (property, lambda thing: _known(thing, [thing.fget, thing.fset, thing.fdel])),
    ((staticmethod, classmethod), lambda thing: _known(thing, [thing.__func__])),
    (functools._lru_cache_wrapper, lambda thing: _known(thing, [thing.__wrapped__])),
    (weakref.ReferenceType, lambda thing: _known(thing, [thing()])),
    (threading.local, lambda thing: _known(thing, [], dict(vars(thing)))),  # what it is in this thread
    (_BY_TYPE, lambda thing: _known(thing, [])),
    (types.MappingProxyType, lambda thing: [dict(thing)]),
    (torch.Tensor, _tensor),
    (object, _other),
)
"""How a thing of each kind falls into parts, the first that fits."""
