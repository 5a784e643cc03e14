"""Exercises that check themselves: `check("01-1", answer)` confirms a right answer or gives a hint.

Each notebook has one module here, named after its number. The truth is worked out from the package when it is asked
for, so that it cannot drift away from what a notebook shows.
"""

from __future__ import annotations

from collections.abc import Callable, Sized
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from fedlab_kit.experiment import Experiment

COURSE = Experiment(dataset="digits", partition="dirichlet", rounds=20)  # what the course works on
Grade = Callable[[Any], str]
"""Takes an answer, returns what to say about a right one, raises `Hint` with what to say about another."""

_GRADES: dict[str, Grade] = {}


class Hint(Exception):
    """What to think about next, for an answer that is not right yet: one sentence or two."""


def check(name: str, answer: Any) -> None:
    """Print a confirmation or a hint for an answer to the exercise `name`, "01-2" say.

    Nothing is returned, so that the cell shows the verdict alone. No answer, whatever its type or value, raises an
    error. ValueError lists the exercises if there is none of that name.
    """
    grade = _lookup(name)
    if _empty(answer):
        print(f"{name}: no answer yet. Put yours in place of the dots and run the cell again.")
        return
    try:
        print(f"{name}: right. {grade(answer)}")
    except Hint as hint:
        print(f"{name}: not yet. {hint}")


def exercise(name: str) -> Callable[[Grade], Grade]:
    """Register the function below as what grades the exercise `name`."""

    def register(grade: Grade) -> Grade:
        _GRADES[name] = grade
        return grade

    return register


def number(answer: Any, what: str) -> float:
    """Return the answer as a finite number; `what` says in the hint what is asked for, "a number of bytes" say."""
    try:
        value = float(answer)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise Hint(f"This takes {what}, not {_kind(answer)}.") from None
    if isinstance(answer, str | bool) or value - value != 0:
        raise Hint(f"This takes {what}, not {answer!r}.")
    return value


def call(answer: Any, *arguments: Any) -> Any:
    """Return what the learner's function gives for `arguments`; what goes wrong inside it becomes a hint."""
    if not callable(answer):
        raise Hint(f"Give the function itself, by its name without brackets, not {_kind(answer)}.")
    try:
        result = answer(*arguments)
    except Exception as error:
        raise Hint(f"Your function raised {type(error).__name__}: {error}") from None
    if result is None or result is ...:
        raise Hint("Your function returns nothing yet: write what it computes after `return`.")
    return result


def _lookup(name: str) -> Grade:
    if not _GRADES:
        for module in iter_modules(__path__):
            import_module(f"{__name__}.{module.name}")
    if name not in _GRADES:
        raise ValueError(f"exercise must be one of {', '.join(sorted(_GRADES))}, got {name!r}")
    return _GRADES[name]


def _empty(answer: Any) -> bool:
    return answer is None or answer is ... or (isinstance(answer, Sized) and _length(answer) == 0)


def _length(answer: Sized) -> int:
    """The length, or 1 for what has none after all: a tensor of one number has the method and no length."""
    try:
        return len(answer)
    except TypeError:
        return 1


def _kind(answer: Any) -> str:
    name = type(answer).__name__
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"
