"""Write the instructor's page, answers.md: every exercise with its solution, read from the notebooks themselves.

The solutions stand folded in the notebooks and nowhere else; tests/test_exercises.py holds each against its check.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[1]
EXERCISE = re.compile(r"\*\*Exercise (\d\d-\d)\*\* \((\d+) minutes\)\.")
FOLD = re.compile(r"<details><summary>(\w+)</summary>\n+(.*?)\n+</details>", re.DOTALL)


def exercises(notebook: Path) -> Iterator[tuple[str, int, str]]:
    """Yield each exercise of a notebook: its number, its minutes, and the task with hint and solution unfolded."""
    for cell in nbformat.read(notebook, as_version=4).cells:
        if cell.cell_type == "markdown" and (found := EXERCISE.search(cell.source)):
            yield found[1], int(found[2]), FOLD.sub(r"*\1.*\n\n\2", cell.source[found.end() :].strip())


def page(notebooks: list[Path]) -> str:
    """Return the whole page as Markdown, one section a notebook that has exercises."""
    sections = []
    for notebook in notebooks:
        if found := list(exercises(notebook)):
            title = nbformat.read(notebook, as_version=4).cells[0].source.splitlines()[0].lstrip("# ")
            head = f"## {title}\n\nExercises: {len(found)}, {sum(minutes for _, minutes, _ in found)} minutes."
            sections += [head, *(f"### {number} ({minutes} minutes)\n\n{text}" for number, minutes, text in found)]
    return "\n\n".join(["# Answers to the exercises", "For instructors; `make answers` wrote this.", *sections]) + "\n"


if __name__ == "__main__":
    target = ROOT / "answers.md"
    target.write_text(page(sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))), encoding="utf-8")
    print(f"{target.name} holds every exercise with its solution")
