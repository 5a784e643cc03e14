"""Tables of patients: checked, encoded, split and normalized hospital by hospital; and the two built-in data sets."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlab_kit import download, patients, site_tables
from fedlab_kit.data import SPLITS, load
from fedlab_kit.download import DataError
from fedlab_kit.partition import partition
from fedlab_kit.site_tables import Column, Hospital, Moments, Schema, admit, admit_all, assemble, stratified

SMALL = Schema((Column("age", 0, 120), Column("pain", 1, 3, kinds=(1, 2, 3))), label=Column("sick", 0, 4))


def table(rows: int = 12, **changes: list[object]) -> pd.DataFrame:
    """`rows` good patients, aged 40 and up, every third sick."""
    number = np.arange(rows)
    columns = {"age": 40 + number, "pain": 1 + number % 3, "sick": 2 * (number % 3 == 0)}
    return pd.DataFrame({**columns, **changes}).astype(str)


def of(name: str, sick: int, healthy: int, seed: int = 0) -> Hospital:
    x = np.random.default_rng(seed).normal(5, 2, (sick + healthy, 3))
    return Hospital(name, x, np.repeat([1, 0], [sick, healthy]))


# admit


def test_a_table_is_encoded_by_hand() -> None:
    found = admit("north", table(), SMALL)
    assert SMALL.features == ("age", "pain=2", "pain=3")
    assert found.x[:4].tolist() == [[40, 0, 0], [41, 1, 0], [42, 0, 1], [43, 0, 0]]
    assert found.y.tolist() == [1, 0, 0] * 4 and sum(found.left_out.values()) == 0


def test_rows_that_cannot_be_used_are_left_out_and_counted_once() -> None:
    ages = ["?", "", "forty", 999, -1, *range(50, 60)]
    pains = ["1"] * 5 + ["?", "7", *["1"] * 8]
    found = admit("north", table(15, age=ages, pain=pains), SMALL)
    assert found.left_out == {"missing value": 3, "not a number": 1, "out of range": 3}
    assert found.x[:, 0].tolist() == list(range(52, 60))


def test_a_missing_column_is_named_with_those_that_are_there() -> None:
    with pytest.raises(DataError, match="site 'north' lacks the column 'pain'; it has age, sick"):
        admit("north", table().drop(columns="pain"), SMALL)


@pytest.mark.parametrize("renamed", ["pains", "PAIN"])
def test_a_renamed_column_is_recognized(renamed: str) -> None:
    with pytest.raises(DataError, match=rf"lacks the column 'pain'; is '{renamed}' it, renamed\?"):
        admit("north", table().rename(columns={"pain": renamed}), SMALL)


def test_too_few_usable_rows_are_refused_with_the_counts() -> None:
    with pytest.raises(DataError, match=r"at least 8 usable rows, got 2 \(10 missing value, 0 not a .*, 0 out of"):
        admit("north", table(age=["?"] * 10 + [50, 51]), SMALL)


def test_the_other_hospitals_go_on_without_one_whose_table_is_wrong() -> None:
    tables = {"north": table(), "south": table().drop(columns="age"), "west": table(20)}
    with pytest.warns(UserWarning, match="left out: site 'south' lacks the column 'age'"):
        admitted = admit_all(tables, SMALL)
    assert [hospital.name for hospital in admitted] == ["north", "west"]
    with pytest.warns(UserWarning), pytest.raises(DataError, match="none of the 1 sites could be admitted"):
        admit_all({"south": tables["south"]}, SMALL)


# assemble


def test_a_hospital_without_a_positive_case_takes_part() -> None:
    built = assemble(
        "toy", ("no", "yes"), ("a", "b", "c"), [of("north", 10, 20), of("south", 0, 10)], (0.5, 0.2, 0.1), 0
    )
    for name in SPLITS:
        split = getattr(built, name)
        assert (split.site == 1).any() and not split.y[split.site == 1].any()
    assert len(partition(built, "site", 2, 1.0, 0)) == 2


def test_normalization_from_merged_sums_is_that_of_the_pooled_table() -> None:
    parts = [np.random.default_rng(k).normal(100 * k, 10, (20 + k, 5)) for k in range(4)]
    merged = sum((Moments.of(part) for part in parts[1:]), Moments.of(parts[0]))
    pooled = np.concatenate(parts)
    recipe = merged.preprocess()
    assert np.allclose(recipe.mean, pooled.mean(0), rtol=0, atol=1e-6)
    assert np.allclose(recipe.std, pooled.std(0), rtol=0, atol=1e-6)


def test_assembled_data_are_normalized_over_the_training_parts_alone() -> None:
    built = assemble(
        "toy", ("no", "yes"), ("a", "b", "c"), [of("north", 40, 40), of("south", 9, 31, 1)], (0.5, 0.2, 0.1), 3
    )
    x = built.preprocess(built.train.x).double()
    assert torch.allclose(x.mean(0), torch.zeros(3, dtype=torch.float64), atol=1e-6)
    assert torch.allclose(x.std(0, correction=0), torch.ones(3, dtype=torch.float64), atol=1e-6)


def test_a_feature_that_never_varies_keeps_its_unit() -> None:
    recipe = Moments.of(np.full((9, 1), 0.1)).preprocess()
    assert recipe.std == (1.0,) and recipe.mean == (pytest.approx(0.1),)


@given(
    sizes=st.lists(st.integers(0, 30), min_size=2, max_size=4).filter(sum),
    share=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_every_part_has_its_size_and_its_share_of_each_label(sizes: list[int], share: float, seed: int) -> None:
    total = sum(sizes)
    y = (np.arange(total) < share * total).astype(int)
    part = stratified(y, np.array(sizes), np.random.default_rng(seed))
    assert np.bincount(part, minlength=len(sizes)).tolist() == sizes
    for number, size in enumerate(sizes):
        assert abs(y[part == number].sum() - y.sum() * size / total) <= 2


def test_a_single_case_falls_anywhere() -> None:
    y = np.array([0] + [1] * 9)
    where = [stratified(y, np.array([6, 4]), np.random.default_rng(seed))[0] for seed in range(100)]
    assert 20 < sum(where) < 60


# hospitals


def test_hospitals_are_the_same_bytes_everywhere() -> None:
    """A change here changes every stored run and the committed notebooks: make it on purpose."""
    assert load("hospitals").digest == "b9c95ab963bc977eb6bf4d2dac4ba60016fbb56cf20246914c999269c22631c8"


def test_hospitals_have_the_stated_patients() -> None:
    built = load("hospitals")
    assert [len(getattr(built, name)) for name in SPLITS] == [312, 86, 28, 143]
    x, y, site = (torch.cat([getattr(getattr(built, name), part) for name in SPLITS]) for part in ("x", "y", "site"))
    for number, (name, (sick, healthy, _, _)) in enumerate(patients.WARDS.items()):
        assert built.sites[number] == name
        assert torch.bincount(y[site == number]).tolist() == [healthy, sick]
    assert len(x.unique(dim=0)) == 569


def test_hospitals_come_from_scikit_learns_file() -> None:
    from sklearn.datasets import load_breast_cancer

    x, malignant = patients._bundled()
    expected = load_breast_cancer()
    assert np.array_equal(x, expected.data) and np.array_equal(malignant, 1 - expected.target)
    assert list(patients.CELLS[:10]) == list(expected.feature_names[:10])
    assert np.allclose(patients.SPREADS, x[:, patients.READ].std(0, ddof=1), rtol=1e-3)


def test_the_rural_microscope_reads_by_the_stated_gain_and_offset() -> None:
    x, _ = patients._bundled()
    rural = load("hospitals").train
    read = rural.x[rural.site == 3].double().numpy()
    back = (read[:, patients.READ] - 0.5 * np.array(patients.SPREADS)) / 1.1
    for row, rest in zip(back, read[:, 10:20], strict=True):
        original = np.isclose(x[:, 10:20], rest, rtol=1e-6).all(1)
        assert np.allclose(x[original][:, patients.READ], row, rtol=1e-5, atol=1e-7)


def test_another_split_holds_the_same_patients() -> None:
    first, other = patients.wards(0), patients.wards(1)
    assert first.digest != other.digest

    def everybody(built: object) -> torch.Tensor:
        return torch.cat([getattr(built, name).x for name in SPLITS]).sort(0).values

    assert torch.equal(everybody(first), everybody(other))


# heart


def made_up(rows: int) -> str:
    """A file in the published format: 14 columns, the last but one to three of them unknown, every second sick."""
    good = [f"{40 + n},1,{1 + n % 4},130,2{n % 10}0,0,{n % 3},150,0,1.{n % 10},?,?,?,{n % 2}" for n in range(rows)]
    return "\n".join([*good, "63,1,?,145,233,1,2,150,0,2.3,3,0,6,0"]) + "\n"


def test_heart_reads_the_published_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "heart_disease"
    folder.mkdir()
    md5 = {}
    for rows, file in zip((30, 20, 12, 16), patients.HEART.md5, strict=True):
        (folder / file).write_text(made_up(rows))
        md5[file] = hashlib.md5((folder / file).read_bytes()).hexdigest()
    monkeypatch.setenv("FEDLAB_DATA", str(tmp_path))
    monkeypatch.setattr(patients, "HEART", download.Source("heart_disease", (), md5))
    built = patients.clinics(seed=0, shares=(0.48, 0.15, 0.03))
    assert built.features[8:] == ("cp=2", "cp=3", "cp=4", "restecg=1", "restecg=2") and built.shape == (13,)
    assert torch.bincount(built.test.site).tolist() == [11, 7, 5, 6]  # 30 - floor(.66 * 30) and so on
    assert sum(len(getattr(built, name)) for name in SPLITS) == 78


def test_a_damaged_heart_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "heart_disease"
    folder.mkdir()
    (folder / "processed.cleveland.data").write_text("63,1\n")
    monkeypatch.setenv("FEDLAB_DATA", str(tmp_path))
    with pytest.raises(DataError, match=r"processed\.cleveland\.data must have the MD5 2d91a8ff"):
        patients.clinics(seed=0, shares=(0.48, 0.15, 0.03))


@pytest.mark.slow
def test_the_real_heart_has_the_published_numbers() -> None:
    """740 patients, of them 199/104, 172/89, 30/16 and 85/45 to learn and to test, as FLamby states."""
    if not (Path(os.environ.get("FEDLAB_DATA", "")) / "heart_disease").is_dir():
        pytest.skip("UCI Heart Disease is not here: set FEDLAB_DATA to a folder that holds heart_disease/")
    built = patients.clinics(seed=0, shares=(0.66, 0.0, 0.0))
    assert torch.bincount(built.train.site).tolist() == [199, 172, 30, 85]
    assert torch.bincount(built.test.site).tolist() == [104, 89, 16, 45]
    y, site = (torch.cat([getattr(getattr(built, name), part) for name in SPLITS]) for part in ("y", "site"))
    assert torch.bincount(y[site == 2]).tolist() == [1, 45]
    assert len(y) == 740 and site_tables.FEWEST < 16
