"""The instructor's page holds every exercise of every notebook, with its solution unfolded."""

import importlib.util
import re
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))

spec = importlib.util.spec_from_file_location("answers", ROOT / "tools" / "answers.py")
answers = importlib.util.module_from_spec(spec)
spec.loader.exec_module(answers)


def test_every_check_has_its_solution_on_the_page_once():
    sources = [cell.source for path in NOTEBOOKS for cell in nbformat.read(path, as_version=4).cells]
    checks = [number for source in sources for number in re.findall(r'^fk\.check\("(\d\d-\d)"', source, re.MULTILINE)]
    page = answers.page(NOTEBOOKS)
    assert re.findall(r"^### (\d\d-\d) \(\d+ minutes\)$", page, re.MULTILINE) == checks and len(checks) >= 15
    assert page.count("*Solution.*") == len(checks) and "<details>" not in page and "</details>" not in page
    solutions = [code for source in sources for code in re.findall(r"```python\n.*?```", source, re.DOTALL)]
    assert [code for code in solutions if code not in page] == []


def test_a_section_by_hand(tmp_path):
    task = (
        "Some text before.\n\n**Exercise 42-1** (3 minutes). Add one and one.\n\n"
        "<details><summary>Hint</summary>\n\nTwo.\n\n</details>\n\n"
        "<details><summary>Solution</summary>\n\n```python\nanswer = 1 + 1\n```\n\n</details>"
    )
    cells = [nbformat.v4.new_markdown_cell(text) for text in ("# 42. Sums\n\nIntroduction.", task)]
    path = tmp_path / "42_sums.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    assert answers.page([path]).split("make answers` wrote this.\n\n")[1] == (
        "## 42. Sums\n\nExercises: 1, 3 minutes.\n\n### 42-1 (3 minutes)\n\nAdd one and one.\n\n"
        "*Hint.*\n\nTwo.\n\n*Solution.*\n\n```python\nanswer = 1 + 1\n```\n"
    )
