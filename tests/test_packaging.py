"""pyproject.toml, constraints.txt and environment.yml say the same, and so does what is installed here."""

import ast
import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
ENVIRONMENT = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
DIRECT = [Requirement(line) for line in sum(EXTRAS.values(), PROJECT["dependencies"])]


def read_pins() -> dict[str, str]:
    """Name -> exact version, from constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line.split("==") for line in lines if line and not line.startswith("#")]
    assert all(len(pin) == 2 for pin in pins), "constraints.txt holds nothing but name==version"
    return {canonicalize_name(name): version for name, version in pins}


PINS = read_pins()


def installed_closure(requirements: list[Requirement]) -> dict[str, str]:
    """Name -> installed version of everything that these requirements bring; what is not installed is left out."""
    found: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    todo = [(requirement, extra) for requirement in requirements for extra in (*requirement.extras, "")]
    while todo:
        requirement, extra = todo.pop()
        name = canonicalize_name(requirement.name)
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        found[name] = distribution.version
        for line in distribution.requires or []:
            needed = Requirement(line)
            if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                todo += [(needed, inner) for inner in (*needed.extras, "")]
    return found


@pytest.mark.parametrize("requirement", DIRECT, ids=lambda requirement: requirement.name)
def test_every_direct_dependency_has_bounds_that_its_pin_meets(requirement):
    operators = {part.operator for part in requirement.specifier}
    assert operators == {"=="} if requirement.name == "torch" else ">=" in operators
    assert PINS[canonicalize_name(requirement.name)] in requirement.specifier


def test_everything_that_set_up_installs_is_pinned():
    installed = installed_closure(DIRECT)
    assert installed.keys() <= PINS.keys()
    other = {name: version for name, version in installed.items() if Version(version).public != PINS[name]}
    assert other == {}, "installed in other versions than constraints.txt says: run make setup"


@pytest.mark.parametrize("python", ["3.11.2", "3.12.0", "3.13.0"])  # 3.11.2 is Debian 12's own
def test_every_pinned_release_runs_on_the_supported_pythons(python):
    needs = {name: importlib.metadata.metadata(name).get("Requires-Python") for name in installed_closure(DIRECT)}
    assert [name for name, range_ in needs.items() if range_ and python not in SpecifierSet(range_)] == []


def test_torch_is_exactly_the_pinned_one_and_no_cuda_comes_with_it():
    assert PINS["torch"] == "2.13.0"
    assert Version(importlib.metadata.version("torch")).public == "2.13.0"
    assert not [name for name in PINS if name.startswith(("nvidia", "cuda", "triton"))]


def test_conda_and_binder_install_the_same():
    python = next(line for line in ENVIRONMENT if str(line).startswith("python="))
    assert python.removeprefix("python=") in SpecifierSet(PROJECT["requires-python"])
    (pip,) = [entry["pip"] for entry in ENVIRONMENT if isinstance(entry, dict)]
    assert [line for line in pip if not line.startswith("--extra-index-url ")] == ["-c constraints.txt", "-e ."]
    assert "https://download.pytorch.org/whl/cpu" in pip[0]


def test_set_up_accepts_the_pythons_that_the_project_supports():
    lowest, highest = re.search(r"\((\d, \d+)\) <= .* < \((\d, \d+)\)", (ROOT / "tools/setup.sh").read_text()).groups()
    assert PROJECT["requires-python"] == f">={lowest},<{highest}".replace(", ", ".")


def test_lab_needs_nothing_of_the_scale_extra():
    assert [Requirement(line).name for line in EXTRAS["scale"]] == ["flwr", "cryptography"]
    assert "flwr" not in [Requirement(line).name for line in PROJECT["dependencies"] + EXTRAS["test"]]


def test_whatever_the_package_imports_is_declared():
    """What is here by chance, because another library needs it today, may be gone tomorrow."""
    base = {canonicalize_name(Requirement(line).name) for line in PROJECT["dependencies"]}
    scale = base | {canonicalize_name(Requirement(line).name) for line in EXTRAS["scale"]} | {"ray"}  # flwr's choice
    brings = importlib.metadata.packages_distributions()
    undeclared = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in (ROOT / "fedlab_kit").rglob("*.py")
        for name in imported(path) - sys.stdlib_module_names - {"fedlab_kit"}
        if not {canonicalize_name(one) for one in brings.get(name, [name])}
        & (scale if "scale" in path.relative_to(ROOT).parts else base)
    }
    assert undeclared == set()


def imported(path: Path) -> set[str]:
    """The top-level modules that a file imports, wherever in the file it does so."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module.partition(".")[0])
    return found
