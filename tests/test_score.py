"""`score.py` on a device: every bad table, card or model is answered in one line, and good ones are read right."""

import csv
import hashlib
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from fedlab_kit.deployment import score
from fedlab_kit.deployment.score import Model, harmless, main

NAMES = ["age", "dose", "size"]
WEIGHTS = np.float32([[1, -1], [0.5, 0], [0, 2]])
CARD = {
    "input": {"name": "x", "dtype": "float32", "shape": [3], "features": NAMES},
    "data": {"classes": ["sick", "well"]},
    "preprocess": {"mean": [0.0, 0.0, 0.0], "std": [1.0, 2.0, 3.0]},
}
LARGEST = [helper.make_node("ReduceMax", ["x"], ["a"], axes=[1]), helper.make_node("Concat", ["a", "a"], ["y"], axis=1)]
ROWS = np.float32([[1.5, 0, 0], [-1.5, 0, 0.25], [2, -3, 1]])


def graph(name: str = "x", kind: int = TensorProto.FLOAT, shape: object = ("n", 3), nodes: object = None) -> bytes:
    """A file that multiplies by `WEIGHTS`, or does what other nodes say."""
    kept = [numpy_helper.from_array(WEIGHTS, "w"), numpy_helper.from_array(np.float32([[np.nan], [0], [0]]), "v")]
    made = helper.make_graph(
        nodes or [helper.make_node("MatMul", [name, "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info(name, kind, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        kept,
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()


def install(folder: Path, content: bytes | None = None, **card: object) -> str:
    """Put a model and its card into a folder; returns the model's path."""
    content = graph() if content is None else content
    (folder / "model.onnx").write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    (folder / "model.onnx.json").write_text(json.dumps({**CARD, "digest": digest, **card}))
    return str(folder / "model.onnx")


def said(folder: Path, content: bytes | str, capsys: pytest.CaptureFixture) -> tuple[list[dict], str]:
    """Score a file of these bytes; returns the rows that were printed and what went wrong."""
    file = folder / "rows.csv"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    code = main([install(folder), str(file)])
    out, error = capsys.readouterr()
    assert (code == 1) is bool(error) and (not out if code else out.startswith("class,probability,problem\n"))
    assert not error or (error.startswith("error: ") and error.count("\n") == 1 and len(error) < 1000)
    return list(csv.DictReader(io.StringIO(out))), error


def test_it_scores_what_numpy_computes(tmp_path, capsys):
    rows, _ = said(tmp_path, "size,age,dose\n0,1.5,0\n0.25,-1.5,0\n1,2,-3\n", capsys)
    logits = ROWS @ WEIGHTS
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert [row["class"] for row in rows] == [CARD["data"]["classes"][best] for best in logits.argmax(1)]
    assert [float(row["probability"]) for row in rows] == pytest.approx(shares.max(1).tolist())


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbfage,dose,size\r\n1.5,0,0\r\n-1.5,0,0.25\r\n2,-3,1\r\n",  # marked, as Excel does
        "age;dose;size\n1,5;0;0\n-1,5;0;0,25\n2;-3;1\n",  # Excel where a comma is decimal
        b"\xef\xbb\xbfage;dose;size\r\n1.5;0;0\r\n-1.5;0;0.25\r\n2;-3;1\r\n",  # semicolons and points
        'age,dose,size\n"1.5",0,0\n-1.5, 0,.25\n\n2,-3e0,1\n\n\n',  # quotes, spaces, lines without anything
        "age,dose,size\r1.5,0,0\r-1.5,0,0.25\r2,-3,1",  # lines as on an old Macintosh
    ],
)
def test_one_table_in_many_hands(content, tmp_path, capsys):
    expected, _ = said(tmp_path, "age,dose,size\n1.5,0,0\n-1.5,0,0.25\n2,-3,1\n", capsys)
    assert len(expected) == 3 and said(tmp_path, content, capsys) == (expected, "")


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("1,2", "2 cells where the header has 3"),
        ("1,5,0,0", "4 cells where the header has 3"),  # a decimal comma without quotes
        ('"1,5",0,0', "age is missing or no number"),
        ("1_5,0,0", "age is missing or no number"),
        ("inf,0,0", "age is inf, more than 20 standard deviations from the training mean"),
        ("nan,0,0", "age is missing or no number"),
        ("1e999,0,0", "age is inf, more than 20 standard deviations from the training mean"),
        ("=1+1,0,0", "age is missing or no number"),
        (",,", "age is missing or no number"),
    ],
)
def test_a_bad_row_has_its_reason_and_the_others_their_class(line, problem, tmp_path, capsys):
    rows, _ = said(tmp_path, f"age,dose,size\n1.5,0,0\n{line}\n2,-3,1\n", capsys)
    assert [row["problem"] for row in rows] == ["", problem, ""]
    assert [row["class"] == "" for row in rows] == [False, True, False]


def test_thousands_and_decimals_in_one_cell_are_no_number(tmp_path, capsys):
    rows, _ = said(tmp_path, "age;dose;size\n1.234,5;0;0\n1,5;0;0\n", capsys)
    assert [row["problem"] for row in rows] == ["age is missing or no number", ""]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", r"missing 'age', 'dose', 'size'"),
        ("\n\n", r"missing 'age', 'dose', 'size'"),
        ("age,dose\n", r"missing 'size'$"),
        ("age,dose,size,note\n1,2,3,x\n", r"unknown 'note'$"),
        ("age,dose,size,\n1,2,3,\n", r"unknown ''$"),
        ("age,age,dose,size\n1,1,2,3\n", r"different names, got age, age, dose, size$"),
        ("age\tdose\tsize\n1\t2\t3\n", r"missing 'age'"),
        (b"age,dose,size\n1,2,\x003\n", r"rows.csv is no text in UTF-8: save it as CSV UTF-8$"),
        ("age,dose,size\n1,2,3\n".encode("utf-16"), r"rows.csv is no text in UTF-8"),
        ("age,dose,size\n1,2,3\n".encode("utf-16-le"), r"rows.csv is no text in UTF-8"),
        ("age,dose,size,größe\n1,2,3,4\n".encode("latin-1"), r"rows.csv is no text in UTF-8"),
        (bytes(range(256)), r"rows.csv is no text in UTF-8"),
        ("age,dose,size\n" + "1" * 200_000 + ",2,3\n", "field larger than field limit"),
        ('age,dose,"si\nze"\n1,2,3\n', r"unknown 'si\\nze'$"),
    ],
)
def test_a_bad_table_is_told_in_one_line(content, told, tmp_path, capsys):
    rows, error = said(tmp_path, content, capsys)
    assert rows == [] and re.search(told, error.strip())


def test_a_header_alone_is_a_table_without_patients(tmp_path, capsys):
    assert said(tmp_path, "age,dose,size\n", capsys) == ([], "")


def test_fifty_thousand_columns_are_looked_up_and_not_searched_for(tmp_path, capsys):
    names = [f"feature {number}" for number in range(50_000)]  # each against each would take minutes
    table = f"{','.join(reversed(names))}\n{','.join(['1'] * 50_000)}\n"
    _, error = said(tmp_path, table, capsys)
    assert re.search(r"unknown 'feature 49999', 'feature 49998', .* and 49995 more$", error.strip())
    card = {"input": {**CARD["input"], "shape": [50_000], "features": names}, "preprocess": {"mean": 0, "std": 1}}
    path = install(tmp_path, graph(shape=("n", 50_000), nodes=LARGEST), **card)
    assert main([path, str(tmp_path / "rows.csv")]) == 0
    assert capsys.readouterr().out == "class,probability,problem\nsick,0.5,\n"


@pytest.mark.parametrize(
    "change",
    [
        {"input": None},
        {"input": []},
        {"input": {**CARD["input"], "shape": 3}},
        {"input": {**CARD["input"], "shape": [True]}},
        {"input": {**CARD["input"], "shape": [4]}},
        {"input": {**CARD["input"], "shape": []}},
        {"input": {**CARD["input"], "features": "ads"}},
        {"input": {**CARD["input"], "features": [["age"], "dose", "size"]}},
        {"input": {**CARD["input"], "features": None}},
        {"input": {**CARD["input"], "dtype": 32}},
        {"input": {"dtype": "float32", "shape": [3], "features": NAMES}},
        {"data": {"classes": 2}},
        {"data": {"classes": []}},
        {"data": {"classes": ["sick", 1]}},
        {"data": {"classes": ["sick", "\ud800"]}},
        {"data": {"classes": {"sick": 0, "well": 1}}},
        {"preprocess": {"mean": ["0", "0", "0"], "std": [1.0, 2.0, 3.0]}},
        {"preprocess": {"mean": 0.0, "std": True}},
        {"preprocess": {"mean": 0.0, "std": float("nan")}},
        {"preprocess": {"mean": 0.0, "std": 0}},
        {"preprocess": {"mean": 10**400, "std": 1}},
        {"preprocess": {"mean": [0.0, 0.0], "std": [1.0, 2.0]}},
        {"preprocess": {"mean": [[0.0]], "std": 1.0}},
        {"preprocess": {"mean": 0.0}},
        {"preprocess": "none"},
    ],
)
def test_a_card_with_another_thing_in_its_place_is_damaged(change, tmp_path):
    with pytest.raises(ValueError, match=r"^the model card of .*model\.onnx is damaged: compress again$"):
        Model(install(tmp_path, **change))


@pytest.mark.parametrize("text", ["", "[]", "null", "{", '"digest"', '{"digest": 1}', "[" * 100_000, "\udcff", "{}"])
def test_a_card_that_is_none_is_told_in_one_line(text, tmp_path, capsys):
    path = install(tmp_path)
    Path(f"{path}.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    assert main([path, "none.csv"]) == 1
    out, error = capsys.readouterr()
    assert out == "" and re.fullmatch(r"error: \S*model\.onnx (cannot be opened|is truncated or altered).*\n", error)


NOT_A_NUMBER = [helper.make_node("MatMul", ["x", "v"], ["a"]), helper.make_node("Concat", ["a", "a"], ["y"], axis=1)]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "is nothing that onnxruntime"),
        (b"no graph", "is nothing that onnxruntime"),
        (graph()[:-30], "is nothing that onnxruntime"),
        (graph(name="input"), r"takes \[\('input', 'tensor\(float\)', \[3\]\)\], its model card says \[\('x', "),
        (graph(shape=("n", 4), nodes=LARGEST), r"takes \[\('x', 'tensor\(float\)', \[4\]\)\], its model card says"),
        (graph(kind=TensorProto.UINT8, nodes=[helper.make_node("Cast", ["x"], ["y"], to=1)]), r"takes .*uint8"),
        (graph(nodes=[helper.make_node("Identity", ["x"], ["y"])]), r"must answer numbers \[1, 2\], got \[1, 3\]"),
        (graph(nodes=[helper.make_node("MatMul", ["w", "w"], ["y"])]), "is nothing that onnxruntime|the model fails"),
        (graph(nodes=[helper.make_node("Reshape", ["x", "x"], ["y"])]), "is nothing that onnxruntime|the model fails"),
    ],
)
def test_a_model_that_is_none_is_told_in_one_line(content, told, tmp_path, capfd):
    (tmp_path / "rows.csv").write_text("age,dose,size\n1,2,3\n")
    assert main([install(tmp_path, content), str(tmp_path / "rows.csv")]) == 1
    out, error = capfd.readouterr()  # what the runtime prints by itself, too
    assert out == "" and error.startswith("error: ") and error.count("\n") == 1 and re.search(told, error)


def test_an_answer_that_is_no_number_is_no_class(tmp_path):
    [answer] = Model(install(tmp_path, graph(nodes=NOT_A_NUMBER))).score({name: ["1"] for name in NAMES})
    assert answer == {"class": None, "probability": None, "problem": "the model's answer is no number"}


@pytest.mark.skipif(not hasattr(score.os, "mkfifo"), reason="has no pipes with names")
def test_nobody_waits_at_a_pipe_or_reads_a_hole(tmp_path):
    score.os.mkfifo(tmp_path / "pipe.onnx")
    (tmp_path / "folder.onnx").mkdir()
    with (tmp_path / "hole.onnx").open("wb") as hole:
        hole.truncate(10 << 30)
    (tmp_path / "link.onnx").symlink_to(install(tmp_path))
    (tmp_path / "link.onnx.json").symlink_to(tmp_path / "model.onnx.json")
    assert Model(tmp_path / "link.onnx").card["input"]["name"] == "x"  # a device may keep its versions so
    for name, told in {"pipe": "no regular", "folder": "no regular", "hole": "larger than 2,147,483,648 bytes"}.items():
        with pytest.raises(ValueError, match=told):
            Model(tmp_path / f"{name}.onnx")


@pytest.mark.parametrize(
    "text", ["=1+1", "+a", "-a", "@SUM(A1)", "\t=1", "\r=1", "a;=1+1", "a\n@b", "'=1", "＝1+1", "a,-b"]
)
def test_no_text_begins_a_formula_and_all_of_it_is_found_again(text):
    safe = harmless(text)
    cells = re.split(r"[;,\t\r\n]", safe)  # as any spreadsheet may split it
    assert not any(cell.startswith(tuple("=+-@＝＋－＠")) for cell in cells)
    assert re.sub(r"(^|[;,\t\r\n])'", r"\1", safe) == text


@pytest.mark.parametrize(
    "value", [-1.5, 3, True, None, "-1.5", "+2e3", "plain", "a - b", "", "don't", "channel-0.5-int8"]
)
def test_numbers_and_plain_words_stay_as_they_are(value):
    assert harmless(value) is value or harmless(value) == value


def test_a_class_or_a_column_that_is_a_formula_is_printed_as_text(tmp_path, capsys):
    card = {"data": {"classes": ["=cmd|' /C calc'!A0", "well"]}}
    card["input"] = {**CARD["input"], "features": ["@age", "dose", "size"]}
    (tmp_path / "rows.csv").write_text("@age,dose,size\n9,0,0\n?,0,0\n")
    assert main([install(tmp_path, **card), str(tmp_path / "rows.csv")]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["class"] for row in rows] == ["'=cmd|' /C calc'!A0", ""]
    assert [row["problem"] for row in rows] == ["", "'@age is missing or no number"]
