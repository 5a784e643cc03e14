"""The order of the rooms: a module imports only modules that stand above it in fedlab_kit/README.md, the one list."""

import ast
import re
from pathlib import Path

import fedlab_kit

ROOT = Path(fedlab_kit.__file__).parent
ORDER = [line.split("`")[1] for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| `")]
EMPTY = {"compression", "federation", "deployment", "scale", "lab"}  # packages that hold no code to be imported


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imported(path: Path) -> set[str]:
    """The package's own modules that a file imports, wherever in the file it does so."""
    here = name_of(path).split(".")
    package = here if path.name == "__init__.py" else here[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            up = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*(["fedlab_kit"] if node.level else []), *up, *([node.module] if node.module else [])])
            names = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        else:
            continue
        found |= {name.removeprefix("fedlab_kit.") for name in names if name.startswith("fedlab_kit.")}
    return found & {name_of(file) for file in ROOT.rglob("*.py")}


def test_imports_point_upwards():
    rank = {name: number for number, name in enumerate(ORDER)}
    for path in ROOT.rglob("*.py"):
        name = name_of(path)
        if name == "" or name.startswith("lab.exercises"):  # the public face and the exercises see everything
            continue
        for other in imported(path) - {name} - EMPTY:
            if (name, other) == ("runs", "scale.flower"):  # `train` opens it when asked for engine="flower"
                continue
            assert name in EMPTY or rank[other] < rank[name], f"{name} imports {other}, which stands below it"


def test_every_module_has_its_place():
    modules = {name_of(path) for path in ROOT.rglob("*.py")} - EMPTY - {""}
    assert {name for name in modules if not name.startswith("lab.exercises")} == set(ORDER)
    assert len(ORDER) == len(set(ORDER))


def test_the_rounds_and_the_compression_touch_no_widget_and_no_disk():
    for room in ("compression", "federation", "wire"):
        for path in (ROOT / room).glob("*.py"):
            tree = ast.walk(ast.parse(path.read_text()))
            calls = {ast.unparse(node.func) for node in tree if isinstance(node, ast.Call)}
            assert not calls & {"open", "Path"} and not imported(path) & {"files", "store", "runs"}, path
            assert not any(word in path.read_text() for word in ("ipywidgets", "matplotlib", "safetensors")), path


def test_no_pickle_no_eval():
    for path in ROOT.rglob("*.py"):
        calls = {ast.unparse(node.func) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)}
        assert not calls & {"eval", "exec", "pickle.loads", "pickle.load", "torch.load", "torch.save"}, path


def test_every_file_that_the_readme_names_is_there():
    text = (ROOT.parent / "README.md").read_text()
    named = set(re.findall(r"`((?:\w+/)*\w+\.py)`", text)) - {"score.py", "reproduce.py"}  # what an export holds
    assert [name for name in named if not any((base / name).exists() for base in (ROOT, ROOT.parent))] == []
