"""What every test starts from: one thread, an empty run store, and no slow test unless it is asked for."""

from pathlib import Path

import pytest
import torch
from hypothesis import settings
from worlds import register

from fedlab_kit import catalog

ROOT = Path(__file__).resolve().parents[1]

torch.set_num_threads(1)
settings.register_profile("kit", deadline=None, derandomize=True)  # deterministic and never timed
settings.load_profile("kit")
register()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-slow", action="store_true", help="also run the tests marked slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--run-slow"):
        return
    slow = [item for item in items if "slow" in item.keywords]
    config.hook.pytest_deselected(items=slow)
    items[:] = [item for item in items if "slow" not in item.keywords]


@pytest.fixture(scope="session", autouse=True)
def _store_of_the_session(tmp_path_factory: pytest.TempPathFactory) -> object:
    """Fixtures that outlive one test share this store; the project's own runs/ is never touched."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDLAB_RUNS", str(tmp_path_factory.mktemp("session-runs")))
        yield


@pytest.fixture(autouse=True)
def runs_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty run store for this test alone; returns its folder."""
    folder = tmp_path / "runs"
    monkeypatch.setenv("FEDLAB_RUNS", str(folder))
    return folder


@pytest.fixture(autouse=True)
def _catalog_as_it_was() -> object:
    """What a test registers is gone after it, so that no test depends on those that ran before it in its process."""
    before = {kind: dict(table) for kind, table in catalog.TABLES.items()}
    yield
    for kind, table in catalog.TABLES.items():
        table.clear()
        table.update(before[kind])
