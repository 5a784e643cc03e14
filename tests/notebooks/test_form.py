"""What every notebook keeps to, so that strict nbval compares something and a learner can read it."""

import re
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

# Each of these fails strict nbval on a correct notebook: nbval is no front end and does not clear or redirect output.
NOT_COMPARABLE = re.compile(r"clear_output|\binteract(ive)?\(|\bOutput\(|tqdm")
REMOTE_PICTURE = re.compile(r"!\[[^\]]*\]\(\s*https?://|<(?:img|script|link)[^>]+(?:src|href)=[\"']?https?://")
ABSOLUTE_PATH = re.compile(
    r"(?<![\w.:/<])/(?:home|root|tmp|Users|usr|opt|work|mnt|var|private|content)/|\b[A-Z]:\\\\?\w"
)
HEADER = re.compile(
    r"# (\d)\. .+\n\nYou will (.+)\.\n\nStands on (.+)\. Reading takes \d+ minutes; "
    r"all cells together run in about \d*[05] seconds the first time, on two cores and offline\.\n"
)


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request: pytest.FixtureRequest) -> NotebookNode:
    return nbformat.read(request.param, as_version=4)


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def tags(cell: NotebookNode) -> list[str]:
    return cell.metadata.get("tags", [])


def texts(cell: NotebookNode) -> list[str]:
    """The source of a cell and every text that it put out."""
    found = [cell.source]
    for output in cell.get("outputs", []):
        found.append(output.get("text", ""))
        found += [str(value) for kind, value in output.get("data", {}).items() if kind.startswith("text/")]
    return found


def test_is_valid_and_names_the_one_kernel(notebook):
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"


def test_metadata_hold_nothing_that_changes_from_run_to_run(notebook):
    assert set(notebook.metadata) <= {"kernelspec", "language_info"}
    assert set(notebook.metadata.get("language_info", {})) <= {"name"}
    assert all(set(cell.metadata) <= {"tags"} for cell in notebook.cells)
    kinds = {kind for cell in code_cells(notebook) for output in cell.outputs for kind in output.get("data", {})}
    assert "application/vnd.jupyter.widget-view+json" not in kinds


def test_was_run_from_top_to_bottom(notebook):
    counts = [cell.execution_count for cell in code_cells(notebook)]
    assert counts == list(range(1, len(counts) + 1))


def test_no_cell_failed_or_warned(notebook):
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    assert [output for output in outputs if output.output_type == "error"] == []
    assert [output.text for output in outputs if output.get("name") == "stderr"] == []


def test_is_short_enough_to_read(notebook):
    assert 15 <= len(notebook.cells) <= 45
    for cell in code_cells(notebook):
        lines = [line for line in cell.source.splitlines() if not line.startswith("%%")]
        assert len(lines) <= 10, cell.source
    assert all(cell.source.strip() for cell in notebook.cells)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_begins_with_a_title_what_you_will_do_what_it_stands_on_and_the_time(path):
    first = nbformat.read(path, as_version=4).cells[0]
    paragraphs = [" ".join(lines.split()) for lines in first.source.split("\n\n")]
    number, goals, before = HEADER.match("\n\n".join([*paragraphs, ""])).groups()
    assert first.cell_type == "markdown" and number == str(int(path.stem[:2]))
    assert len(re.findall(r"\*\*[a-z ]+\*\*", goals)) >= 3, goals
    named = re.findall(r"\[notebook (\d\d)\]\((\w+)\.ipynb\)", before)
    assert all(link.startswith(earlier) and earlier < path.stem for earlier, link in named)
    assert {link for _, link in named} <= {path.stem for path in NOTEBOOKS}
    assert bool(named) == (path.stem[:2] != "00"), "every notebook but the first stands on an earlier one"


def test_nearly_all_cells_are_compared(notebook):
    cells = code_cells(notebook)
    ignored = [cell for cell in cells if "nbval-ignore-output" in tags(cell)]
    assert len(ignored) <= len(cells) / 5
    for cell in cells:
        assert not {"nbval-skip", "raises-exception"} & set(tags(cell))
        assert "NBVAL_" not in cell.source


def test_at_most_one_figure_in_five_is_left_out_of_the_comparison(notebook):
    compared = [cell for cell in code_cells(notebook) if "nbval-ignore-output" not in tags(cell)]
    printed = "\n".join(text for cell in compared for text in texts(cell)[1:])
    figures = re.findall(r"(≈ ?)?[-+]?\b\d[\d,.]*", printed)
    assert 5 * sum(map(bool, figures)) <= len(figures)


def test_an_ignored_cell_is_followed_by_a_strict_one(notebook):
    cells = code_cells(notebook)
    ignored = ["nbval-ignore-output" in tags(cell) for cell in cells]
    for cell, this, following in zip(cells, ignored, [*ignored[1:], True], strict=True):
        assert not (this and following), f"no compared cell asserts the band of:\n{cell.source}"


def test_uses_nothing_that_strict_nbval_cannot_compare(notebook):
    for cell in code_cells(notebook):
        assert not NOT_COMPARABLE.search(cell.source), cell.source


def test_needs_no_network_and_names_no_machine(notebook):
    for cell in notebook.cells:
        for text in texts(cell):
            assert not REMOTE_PICTURE.search(text), text
            assert not ABSOLUTE_PATH.search(text), text


@pytest.mark.parametrize(
    ("pattern", "caught", "allowed"),
    [
        (ABSOLUTE_PATH, "saved to /home/ann/x.onnx", "see runs/x.onnx, ../data and https://example.org/home/x"),
        (ABSOLUTE_PATH, r"C:\Users\ann", "accuracy: 0.9"),
        (REMOTE_PICTURE, "![x](https://example.org/x.png)", "[a link](https://example.org) ![x](x.png)"),
        (REMOTE_PICTURE, '<img src="http://example.org/x.png">', '<img src="data:image/png;base64,AA">'),
        (NOT_COMPARABLE, "@interact(x=1)\n", "interaction = 1"),
    ],
)
def test_the_patterns_catch_what_they_are_for(pattern, caught, allowed):
    assert pattern.search(caught)
    assert not pattern.search(allowed)
