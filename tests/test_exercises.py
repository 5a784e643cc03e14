"""Every exercise: right, wrong and empty answers, and the solutions that are folded into the notebooks."""

import ast
import re
from importlib import import_module
from itertools import pairwise
from pathlib import Path

import answers_06
import nbformat
import onnx
import pytest

import fedlab_kit as fk
from fedlab_kit.lab import exercises
from fedlab_kit.lab.exercises import check
from fedlab_kit.models import build

NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "notebooks").glob("*.ipynb"))
SOLUTION = re.compile(r"<details>.*?```python\n(.*?)```.*?</details>", re.DOTALL)
CHECK = re.compile(r'fk\.check\("(\d\d-\d)", ')

ANSWERS = [import_module(path.stem) for path in sorted(Path(__file__).parent.glob("answers_*.py"))]
RIGHT = {name: answers for module in ANSWERS for name, answers in module.RIGHT.items()}
WRONG = {name: cases for module in ANSWERS for name, cases in module.WRONG.items()}
EMPTY = [None, ..., "", [], ()]


def made(answer):
    """The answer, trained first where it is one that has to be: in the store of the test that asks."""
    return answer.make() if isinstance(answer, answers_06.Late) else answer


@pytest.fixture(autouse=True)
def shared_store(runs_folder, monkeypatch, tmp_path_factory):
    """Answers that are about one and the same run shall not train it each time."""
    monkeypatch.setenv("FEDLAB_RUNS", str(tmp_path_factory.getbasetemp() / "exercise-runs"))


def test_every_exercise_is_tried_here():
    with pytest.raises(ValueError, match=r"^exercise must be one of 00-1, 01-1, .*, got '99-1'$"):
        check("99-1", 1)
    assert set(RIGHT) == set(WRONG) == set(exercises._GRADES)


@pytest.mark.parametrize(("name", "answer"), [(name, a) for name, answers in RIGHT.items() for a in answers])
def test_a_right_answer_is_confirmed_in_the_same_words_each_time(name, answer, capsys):
    answer = made(answer)
    check(name, answer)
    said = capsys.readouterr().out
    assert said.startswith(f"{name}: right. ") and said.count("\n") == 1
    check(name, answer)
    assert capsys.readouterr().out == said


@pytest.mark.parametrize(
    ("name", "answer", "hint"), [(name, *case) for name, answers in WRONG.items() for case in answers]
)
def test_a_wrong_or_malformed_answer_gets_the_hint_that_fits(name, answer, hint, capsys):
    check(name, made(answer))
    said = capsys.readouterr().out
    assert said.startswith(f"{name}: not yet. ") and said.count("\n") == 1
    assert hint in said


@pytest.mark.parametrize("name", RIGHT)
@pytest.mark.parametrize("answer", EMPTY, ids=repr)
def test_an_empty_answer_is_told_what_to_do(name, answer, capsys):
    check(name, answer)
    assert capsys.readouterr().out.startswith(f"{name}: no answer yet. ")


def test_the_sizes_that_exercises_ask_for_are_those_of_files(capsys):
    recipe = fk.Recipe(prune="channel", prune_ratio=0.6)
    narrow = fk.compress(build("cnn", (1, 28, 28), 10, seed=1), recipe, dataset="digits")
    check("02-3", recipe)
    assert f"The file has {narrow.bytes:,} bytes" in capsys.readouterr().out
    low = fk.compress(build("mlp", (1, 28, 28), 10, seed=1), fk.Recipe(dtype="int4"), dataset="digits")
    tensors = onnx.load(low.path).graph.initializer
    first = sum(len(tensor.raw_data) for tensor in tensors if len(tensor.dims) > 1 and tensor.dims[0] == 128)
    check("03-3", 8 * first / (128 * 784))
    assert f"right. {first:,} bytes for 100,352 weights" in capsys.readouterr().out


def exercise_cells() -> list:
    """One case for each check in a notebook: its setup cell, its cell, and the markdown just before it."""
    cases = []
    for path in NOTEBOOKS:
        cells = nbformat.read(path, as_version=4).cells
        setup = next(cell.source for cell in cells if cell.cell_type == "code")
        for before, cell in pairwise(cells):
            if name := CHECK.search(cell.source) if cell.cell_type == "code" else None:
                cases.append(pytest.param(setup, before, cell, id=name[1]))
    return cases


def test_every_exercise_of_a_notebook_stands_in_it_once():
    numbers = tuple(path.stem[:2] for path in NOTEBOOKS)
    assert sorted(case.id for case in exercise_cells()) == sorted(name for name in RIGHT if name.startswith(numbers))


@pytest.mark.parametrize(("setup", "before", "cell"), exercise_cells())
def test_the_folded_solution_is_right_and_needs_only_the_first_cell(setup, before, cell, capsys):
    (solution,) = SOLUTION.findall(before.source)
    asked = ast.unparse(ast.parse(cell.source).body[-1])
    names: dict = {}
    exec(setup, names)
    exec(solution, names)
    assert eval(asked, names) is None  # a value would be shown below the verdict
    assert ": right. " in capsys.readouterr().out


@pytest.mark.parametrize(("setup", "before", "cell"), exercise_cells())
def test_the_cell_as_it_is_handed_out_has_no_answer(setup, before, cell):
    said = "".join(output.get("text", "") for output in cell.outputs)
    assert "no answer yet" in said or "returns nothing yet" in said
