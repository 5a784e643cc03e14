"""What code says: what a code object does and which names it reads, where a module is from, and the package's own."""

from __future__ import annotations

import ast
import dis
import hashlib
import importlib.machinery
import importlib.metadata
import sys
import sysconfig
import types
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from fedlab_kit.catalog import PACKAGE


class Reading(NamedTuple):
    """What a code object does, and what it reads, nested code included.

    `does` are its instructions, with constants by value and not by place. `bare` are the names of all kinds whose value
    is used other than by an attribute. `imports` (name, level, alias) are those inside functions; `alias` is what a
    module itself is called there, "" where only things of it are. `words` are its texts.
    """

    does: tuple[Any, ...]
    globals: frozenset[str]
    attributes: frozenset[str]
    bare: frozenset[str]
    imports: frozenset[tuple[str, int, str]]
    words: frozenset[str]

    @property
    def names(self) -> frozenset[str]:
        """Whatever it calls by name, from its module or of something else."""
        return self.globals | self.attributes


PLACE = frozenset({"__qualname__", "__module__", "__firstlineno__", "__static_attributes__", "__doc__"})
"""What stands in a class's body about where that was written, and how it is called there."""

_GLOBAL = ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS")
_BY_VALUE = {*dis.hasconst, *dis.haslocal, *dis.hasfree, *dis.hasname}
_JUMPS = {*dis.hasjrel, *dis.hasjabs}


@lru_cache(maxsize=4096)
def read(code: types.CodeType) -> Reading:
    """Take a code object apart, instruction by instruction."""
    steps = [step for step in dis.get_instructions(code) if step.opname != "EXTENDED_ARG"]
    pairs = list(zip(steps, [*steps[1:], steps[-1]], strict=True))
    named = [step for step in steps if step.opcode in dis.hasname and step.opname not in (*_GLOBAL, "IMPORT_NAME")]
    mine = (
        {step.argval for step in steps if step.opname in _GLOBAL},
        {step.argval for step in named},
        {name for step, after in pairs if _is_bare(step, after) for name in _names(step)},
        {_import(steps[number - 2 :]) for number, step in enumerate(steps) if step.opname == "IMPORT_NAME"},
        {word for word in code.co_consts if isinstance(word, str)},
    )
    nested = [read(inner)[1:] for inner in code.co_consts if isinstance(inner, types.CodeType)]
    names, attributes, bare, imports, words = (
        frozenset[Any]().union(*sets) for sets in zip(mine, *nested, strict=True)
    )
    aliases = {_names(after)[0]: step.argval for step, after in pairs if step.opname == "IMPORT_FROM"}
    bare |= {aliases[name] for name in bare & aliases.keys()}
    return Reading(_does(code, pairs), names, attributes, bare, imports, words)


def _does(code: types.CodeType, pairs: list[tuple[dis.Instruction, dis.Instruction]]) -> tuple[Any, ...]:
    """Return all that decides what code does, as values; jumps lead to the number of an instruction."""
    place = {step.offset: number for number, (step, _) in enumerate(pairs)}
    counts = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags & 0x3FF)
    does: list[Any] = [counts, code.co_varnames, code.co_freevars, code.co_cellvars, code.co_exceptiontable]
    for step, after in pairs:
        if not (after.opname == "STORE_NAME" and after.argval in PLACE):
            argument = step.argval if step.opcode in _BY_VALUE else step.arg
            does += step.opname, place.get(step.argval, argument) if step.opcode in _JUMPS else argument
    return tuple(does)


def _is_bare(step: dis.Instruction, after: dis.Instruction) -> bool:
    """Whether an instruction loads a named value of which not just an attribute is taken."""
    by_name = "LOAD_" in step.opname and step.opname != "LOAD_CLOSURE" and step.opcode not in dis.hasconst
    return by_name and not after.opname.startswith(("LOAD_ATTR", "LOAD_METHOD"))


def _import(steps: list[dis.Instruction]) -> tuple[str, int, str]:
    """Return name, level and alias of an import, from the instruction that loads its level on."""
    level, things, name = (step.argval for step in steps[:3])
    alias = "" if things else next(_names(step)[0] for step in steps if step.opname.startswith("STORE_"))
    return name, level if isinstance(level, int) else 0, alias


def _names(step: dis.Instruction) -> tuple[Any, ...]:
    """Return the names that an instruction is about: one, or two of locals."""
    return step.argval if type(step.argval) is tuple else (step.argval,)


def origin_of(module: str) -> str:
    """Return what stands for all content of a module: Python, a distribution or the package; "" for a user's own."""
    top = module.partition(".")[0]
    if top in (PACKAGE, "__main__"):
        return top if top == PACKAGE else ""
    found = sys.modules.get(top)
    file = getattr(found, "__file__", None) or next(iter(getattr(found, "__path__", ())), "")
    return _installed(top, file, found is not None)


@lru_cache(maxsize=4096)
def _installed(top: str, file: str, loaded: bool) -> str:
    """Say where the file of a module, not yet loaded perhaps, is from: what `origin_of` returns."""
    if not loaded and top not in sys.builtin_module_names:
        spec = importlib.machinery.PathFinder.find_spec(top)
        file = (spec.origin or next(iter(spec.submodule_search_locations or ()), "")) if spec else ""
    if {"site-packages", "dist-packages"} & set(Path(file).parts):
        return _distribution(top)
    standard = file and Path(file).is_relative_to(sysconfig.get_path("stdlib"))
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


_HERE = Path(__file__).parent
_DECIDES = ("compression/*.py", "federation/*.py", "wire/*.py", "data.py", "hands.py", "models.py", "partition.py")
_SOURCES = {  # now, while it is what is loaded
    str(file.relative_to(_HERE)): file.read_bytes() for names in _DECIDES for file in sorted(_HERE.glob(names))
}


@lru_cache(maxsize=1)
def own_code() -> str:
    """Return the digest of the package's own code that decides weights, as it was when this process began."""
    return code_digest(_SOURCES)


def code_digest(sources: Mapping[str, bytes]) -> str:
    """Return a SHA-256 (hex) of source files by name: of their syntax trees, without docstrings and comments."""
    digest = hashlib.sha256()
    for name in sorted(sources):
        tree = ast.parse(sources[name])
        for node in ast.walk(tree):
            if isinstance(body := getattr(node, "body", None), list):
                node.body = [one for one in body if not _is_text(one)]  # type: ignore[attr-defined]
        digest.update(repr((name, ast.dump(tree))).encode())
    return digest.hexdigest()


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
