from __future__ import annotations

from collections.abc import Iterator

import pytest
from torch import nn

from fedlab_kit import catalog, data, models


@pytest.fixture(autouse=True)
def _clean_catalog() -> Iterator[None]:
    tables = catalog.MODELS, catalog.DATASETS
    saved = [dict(table) for table in tables]
    yield
    for table, content in zip(tables, saved, strict=True):
        table.clear()
        table.update(content)


def test_both_spellings_of_the_decorator_register_and_return_the_function() -> None:
    @catalog.model
    def plain(shape: tuple[int, ...], classes: int) -> nn.Module:
        return nn.Linear(1, 1)

    @catalog.dataset("given name")
    def other() -> None: ...

    assert catalog.lookup("model", "plain") is plain
    assert catalog.lookup("dataset", "given name") is other
    assert "other" not in catalog.DATASETS


def test_registering_again_replaces() -> None:
    def first() -> None: ...
    def second() -> None: ...

    catalog.dataset("mine")(first)
    catalog.dataset("mine")(second)
    assert catalog.lookup("dataset", "mine") is second


def test_built_ins_cannot_be_replaced() -> None:
    def mine() -> None: ...

    with pytest.raises(ValueError, match="model 'cnn' is built in and cannot be replaced: choose another name"):
        catalog.model("cnn")(mine)
    with pytest.raises(ValueError, match="dataset 'digits' is built in"):
        catalog.dataset("digits")(mine)
    assert catalog.lookup("model", "cnn") is models.cnn
    assert catalog.lookup("dataset", "digits") is data.digits


def test_a_user_model_may_share_its_name_with_a_dataset() -> None:
    def digits(shape: tuple[int, ...], classes: int) -> None: ...

    assert catalog.lookup("model", catalog.model(digits).__name__) is digits


def test_lookup_lists_what_exists() -> None:
    with pytest.raises(ValueError) as error:
        catalog.lookup("model", "resnet50")
    message = str(error.value)
    assert message.startswith("model must be one of ") and message.endswith("got 'resnet50'")
    assert {"2nn", "cnn", "logistic", "mlp", "resnet", "student"} <= set(message[21:].replace(",", "").split())
    assert "\n" not in message


def test_source_is_the_text_that_defines_the_function() -> None:
    def mine() -> int:
        return 41 + 1

    assert "return 41 + 1" in catalog.source(mine)


def test_source_that_python_does_not_have_is_a_clear_error() -> None:
    namespace: dict[str, object] = {}
    exec("def ghost(): pass", namespace)
    with pytest.raises(ValueError, match="the source of 'ghost' is not available"):
        catalog.source(namespace["ghost"])
