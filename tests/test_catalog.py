from __future__ import annotations

import importlib
import os
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fedlab_kit as fk
from fedlab_kit import catalog, code_reading, data, identity, models
from fedlab_kit.runs import identify
from fedlab_kit.wire import CODECS


@pytest.fixture(autouse=True)
def _clean_catalog() -> Iterator[None]:
    tables: tuple[dict[str, Any], ...] = catalog.MODELS, catalog.DATASETS, CODECS
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
    assert {"2nn", "cnn", "half_mlp", "logistic", "mlp", "resnet", "student"} <= set(
        message[21:].replace(",", "").split()
    )
    assert "\n" not in message


CELL = """
import functools, random, threading
from enum import Enum
import numpy
import torch
from torch import nn
import fedlab_kit as fk

WIDTH = 8
KINDS = {"alpha", "beta", "gamma", "delta"}
TABLE = torch.arange(6.0)
ROW = numpy.ones(6)
RNG = numpy.random.default_rng(3)
LOCK = threading.Lock()

class Shade(Enum):
    LIGHT = 1
    DARK = 2

class Meta(type):
    def __call__(cls, *values):
        return super().__call__(*values)

class Base(nn.Module):
    def last(self, x):
        return x * 1.0

def gate(limit):
    def inner(x, slope=1.0):
        return x.clamp(min=limit) * slope
    return inner

relu = gate(0.0)
first = functools.partial(nn.Linear, bias=True)

@functools.lru_cache
def helper(kind):
    return 1.0 if kind in {"alpha", "beta", "gamma"} else 2.0

def doubled(function):
    @functools.wraps(function)
    def wrapper(*values):
        return 2 * function(*values)
    return wrapper

class Net(Base, metaclass=Meta):
    scale = 1.0
    def __init__(self, inputs, classes):
        super().__init__()
        self.a, self.b = first(inputs, WIDTH), nn.Linear(WIDTH, classes)
        self.shade, self.path = Shade.LIGHT, None
    @property
    def gain(self):
        return 1.0
    @staticmethod
    def shift(x):
        return x + 0.0
    @doubled
    def forward(self, x):
        def squash(x):
            return x * 1.0
        with LOCK:
            ends = [helper(kind) for kind in sorted(KINDS)]
        x = (x + TABLE + torch.from_numpy(ROW).float()) * self.gain * self.scale * ends[0]
        return self.last(self.shift(squash(self.b(relu(self.a(x))))))

@fk.model("mine")
def mine(shape, classes, depth=1, *, bias=0.0):
    class Local(Net):
        gains = 1, 2
        def forward(self, x):
            self.seen, self.other, self.third = 1, 2, 3
            return super().forward(x) + bias
    return Local(shape[0], classes)

@fk.codec("mine")
class Mine(fk.Codec):
    step = 2
    def _scaled(self, vector):
        return vector * self.step
    def encode(self, vector, rng):
        return self._scaled(vector).numpy().tobytes()
    def decode(self, body, size):
        return torch.from_numpy(numpy.frombuffer(body, numpy.float32).copy()) / self.step
"""
EDITS = {
    "class body": ("self.shift(squash(", "(squash("),
    "helper": ("else 2.0", "else 3.0"),
    "set in a helper": ('{"alpha", "beta", "gamma"} else', '{"alpha", "beta"} else'),
    "module constant": ("WIDTH = 8", "WIDTH = 9"),
    "global set": (', "delta"}', "}"),
    "closure": ("gate(0.0)", "gate(0.1)"),
    "default argument": ("slope=1.0", "slope=1.1"),
    "default of what is registered": ("depth=1", "depth=2"),
    "default of a keyword": ("bias=0.0", "bias=0.1"),
    "class in a function": ("+ bias", "- bias"),
    "class attribute": ("scale = 1.0", "scale = 1.5"),
    "method of a codec": ("vector * self.step", "vector * self.step + 0"),
    "attribute of a codec": ("step = 2", "step = 4"),
    "base class": ("return x * 1.0\n\ndef gate", "return x * 1.5\n\ndef gate"),
    "metaclass": ("return super().__call__(*values)", "return super(Meta, cls).__call__(*values)"),
    "nested function": ("            return x * 1.0", "            return x * 2.0"),
    "global tensor": ("arange(6.0)", "arange(6.0) / 2"),
    "dtype of an array": ("numpy.ones(6)", "numpy.ones(6, numpy.float32)"),
    "argument of a partial": ("bias=True", "bias=False"),
    "property": ("return 1.0\n    @static", "return 1.1\n    @static"),
    "static method": ("return x + 0.0", "return x + 0.1"),
    "decorator": ("return 2 * function", "return 3 * function"),
    "enumeration": ("LIGHT = 1", "LIGHT = 3"),
    "attribute of the model": ("self.path = Shade.LIGHT, None", "self.path = Shade.LIGHT, 5"),
}
MOVED = {
    "cell run again": lambda text: text,
    "lines moved": lambda text: "\n" * 40 + text.replace("\n\n", "\n\n\n# a remark\n"),
    "what nobody reads": lambda text: text + "\nUNUSED = 5\n",
    "order": lambda text: text.replace("WIDTH = 8\n", "").replace("\nKINDS", "\nWIDTH = 8\nKINDS"),
}
SMALL = fk.Experiment(dataset="blobs", partition="dirichlet", clients=3, clients_per_round=3, rounds=1)
MINE = SMALL.replace(model="mine", uplink="mine")


def run_cell(text: str, file: str = "cell 1", name: str = "__main__") -> dict[str, Any]:
    """What a kernel does with a cell: a code object of its own file name, run in the namespace of `__main__`."""
    namespace = {"__name__": name}
    exec(compile(text, file, "exec"), namespace)
    return namespace


def key(text: str, experiment: fk.Experiment = MINE, **where: str) -> str:
    run_cell(text, **where)
    return identify(experiment)


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_anywhere_makes_another_key(edit: str) -> None:
    old, new = EDITS[edit]
    assert CELL.count(old) == 1
    assert key(CELL) != key(CELL.replace(old, new))


@pytest.mark.parametrize("role", ["teacher", "start"])
@pytest.mark.parametrize("edit", ["class body", "global tensor", "method of a codec"])
def test_an_edit_of_what_a_parent_reaches_makes_another_key(role: str, edit: str) -> None:
    child = (SMALL if role == "teacher" else SMALL.replace(model="mine")).replace(**{role: MINE})
    assert key(CELL, child) != key(CELL.replace(*EDITS[edit]), child)


@pytest.mark.parametrize("move", MOVED)
def test_the_same_code_has_the_same_key_wherever_it_stands(move: str) -> None:
    assert key(CELL) == key(MOVED[move](CELL), file="cell 2") == key(CELL, file="mine.py", name="mine")


@pytest.mark.parametrize("seed", ["1", "2"])
@pytest.mark.parametrize("way", ["script", "module"])
def test_the_key_is_the_same_in_a_fresh_process_with_another_hash_seed(seed: str, way: str, tmp_path: Path) -> None:
    import worlds

    ask = f"\nimport worlds; worlds.register()\nfrom fedlab_kit.runs import identify\nprint(identify(fk.{MINE!r}))\n"
    (tmp_path / "own.py").write_text(CELL + (ask if way == "script" else ""))
    code = [str(tmp_path / "own.py")] if way == "script" else ["-c", f"import own\nfrom own import fk\n{ask}"]
    folders = os.pathsep.join([str(tmp_path), str(Path(worlds.__file__).parent), str(Path(fk.__file__).parents[1])])
    environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": folders}
    done = subprocess.run([sys.executable, *code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == key(CELL)


def test_what_a_helper_file_holds_counts_as_far_as_it_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = CELL.replace("import numpy\n", "import numpy\nimport own_helpers\n").replace(
        "squash(self.b", "own_helpers.f(self.b"
    )
    monkeypatch.syspath_prepend(tmp_path)
    keys = []
    for number, text in enumerate(["A = 1\ndef f(x): return x * A", "A = 2\ndef f(x): return x * A",
                                   "A = 1\ndef g(): pass\ndef f(x): return x * A"]):  # fmt: skip
        (tmp_path / "own_helpers.py").write_text(f"{text}\n# {'-' * number}")
        monkeypatch.delitem(sys.modules, "own_helpers", raising=False)
        importlib.invalidate_caches()
        keys.append(key(cell))
    assert keys[0] == keys[2] != keys[1]


HANDED = {  # a helper file that is handed on as a value: nobody can tell what becomes of it there
    "by the function": "def f(x): return call(own_helpers, x)",
    "by a nested function": "def f(x):\n def g(x): return call(own_helpers, x)\n return g(x)",
    "by a nested lambda": "def f(x): return (lambda x: call(own_helpers, x))(x)",
    "by a nested class": "def f(x):\n class A:\n  own = own_helpers\n return call(A.own, x)",
    "a part of it": "import own_pkg.part\ndef f(x): return call(own_pkg.part, x)",
    "a part of it by name": "def f(x):\n from own_pkg import part\n return call(part, x)",
    "a part of it under another name": "def f(x):\n from own_pkg import part as own\n return call(own, x)",
    "a part of it under a short name": "def f(x):\n import own_pkg.part as own\n return call(own, x)",
    "a part of it by its long name": "def f(x):\n import own_pkg.part\n return call(own_pkg.part, x)",
    "a part of it with the whole": (
        "import own_pkg.part\ndef inner(p, x): return p.part.h(x)\n"
        "def f(x):\n import own_pkg\n return inner(own_pkg, x)"
    ),
    "as a default": "def f(x, own=own_helpers): return call(own, x)",
    "by a function that imports it": "def f(x):\n import own_helpers\n return call(own_helpers, x)",
    "under another name": "def f(x):\n import own_helpers as own\n return call(own, x)",
    "by a nested function that has it from outside": (
        "def f(x):\n import own_helpers as own\n def g(x): return call(own, x)\n return g(x)"
    ),
    "as an attribute": "import types\nns = types.SimpleNamespace(own=own_helpers)\ndef f(x): return call(ns.own, x)",
    "through a local": "def f(x):\n own = own_helpers\n return call(own, x)",
    "as a closure": "def outer():\n own = own_helpers\n def f(x): return call(own, x)\n return f\nf = outer()",
    "in a list": "ALL = [own_helpers]\ndef f(x): return call(ALL[0], x)",
}


@pytest.mark.parametrize("how", HANDED)
def test_a_module_that_is_handed_on_counts_as_a_whole(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    prints = []
    for number, constant in enumerate((1, 1, 2)):
        (tmp_path / "own_pkg").mkdir(exist_ok=True)
        for file in ("own_helpers.py", "own_pkg/part.py", "own_pkg/__init__.py"):
            (tmp_path / file).write_text(f"def h(x): return x * {constant}\n# {'-' * number}")
        for name in ("own_helpers", "own_pkg", "own_pkg.part"):
            monkeypatch.delitem(sys.modules, name, raising=False)
        importlib.invalidate_caches()
        cell = run_cell(f"import own_helpers\ndef call(module, x): return module.h(x)\n{HANDED[how]}")
        assert cell["f"](1) == constant
        prints.append(identity.fingerprint(cell["f"]))
    assert prints[0] == prints[1] != prints[2]


IMPORTS = {  # where a helper file may be imported, for a call of its f
    "in the function": "def f(x):\n import own_helpers\n return own_helpers.f(x)",
    "by name": "def f(x):\n from own_helpers import f as g\n return g(x)",
    "in a nested function": "def f(x):\n def g(x):\n  import own_helpers\n  return own_helpers.f(x)\n return g(x)",
    "by name, nested twice": (
        "def f(x):\n def g(x):\n  def h(x):\n   from own_helpers import f\n   return f(x)\n  return h(x)\n return g(x)"
    ),
    "in a method": (
        "class A:\n def g(self, x):\n  import own_helpers\n  return own_helpers.f(x)\ndef f(x): return A().g(x)"
    ),
    "in a nested class": (
        "def f(x):\n class A:\n  def g(self, x):\n   import own_helpers as own\n   return own.f(x)\n return A().g(x)"
    ),
    "in a nested class's body": "def f(x):\n class A:\n  from own_helpers import f\n return A.f(x)",
    "in a nested generator": "def f(x):\n def g():\n  import own_helpers\n  yield own_helpers.f(x)\n return next(g())",
}


@pytest.mark.parametrize("where", IMPORTS)
def test_an_import_is_followed_wherever_it_stands(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    prints = []
    for text in (
        "A = 1\ndef f(x): return x * A",
        "A = 2\ndef f(x): return x * A",
        "B = 3\nA = 1\ndef f(x): return x * A",
    ):
        (tmp_path / "own_helpers.py").write_text(f"{text}\n# {'-' * len(prints)}")
        monkeypatch.delitem(sys.modules, "own_helpers", raising=False)
        importlib.invalidate_caches()
        function = run_cell(IMPORTS[where])["f"]
        with pytest.raises(identity.Unknowable, match="module 'own_helpers' is not imported yet"):
            identity.fingerprint(function)
        function(1)
        prints.append(identity.fingerprint(function))
    assert prints[0] == prints[2] != prints[1]


def test_what_the_model_is_built_from_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "bias.npy"
    cell = CELL.replace("    return Local(shape[0], classes)", f"""    import os
    net = Local(shape[0], classes)
    net.power = os.environ.get("POWER")
    nn.init.constant_(net.b.bias, float(numpy.load({str(file)!r})))
    return net""")  # fmt: skip
    np.save(file, 1.0)
    first = key(cell)
    assert first == key(cell)
    np.save(file, 2.0)
    second = key(cell)
    monkeypatch.setenv("POWER", "2")
    assert len({first, second, key(cell)}) == 3


@pytest.mark.parametrize(
    ("put", "what"),
    [
        ("HELPER = (i for i in range(3))", "Net.forward -> HELPER: a generator"),
        ("HELPER = open(__import__('os').devnull)", "Net.forward -> HELPER: a TextIOWrapper"),
        ("HELPER = iter([1])", "Net.forward -> HELPER: a list_iterator"),
        ("def HELPER(): return eval('1')", r"Net.forward -> HELPER: what eval\(\) reaches"),
        ("HELPER = [1, {'a': threading.Thread()._target, 'b': (i for i in '')}]", "HELPER -> b: a generator"),
    ],
)
def test_what_cannot_be_told_is_named_with_the_way_to_it(put: str, what: str) -> None:
    cell = CELL.replace("def squash(x):", "HELPER\n        def squash(x):").replace("class Net", f"{put}\n\nclass Net")
    cell = cell.replace("    @doubled\n", "")
    with pytest.raises(identity.Unknowable, match=f"^model 'mine' -> .*{what}") as error:
        opened = run_cell(cell)["HELPER"]
        try:
            identify(MINE)
        finally:
            getattr(opened, "close", int)()
    assert "\n" not in str(error.value)


def test_nothing_of_a_users_is_called() -> None:
    cell = """
class Loud:
    def _refuse(self, *_): raise AssertionError("called")
    __eq__ = __hash__ = __repr__ = __getstate__ = __reduce_ex__ = __reduce__ = __getattr__ = __bool__ = _refuse
    __class__ = property(_refuse)
    def __init__(self): self.__dict__["a"] = 1
class Quiet(dict):
    __iter__ = items = keys = __len__ = __getitem__ = Loud._refuse
LOUD, QUIET = Loud(), Quiet(a=1)
def f(): return LOUD, QUIET
"""
    first = identity.fingerprint(run_cell(cell)["f"])
    assert first == identity.fingerprint(run_cell(cell)["f"])
    assert first != identity.fingerprint(run_cell(cell.replace('["a"] = 1', '["a"] = 2'))["f"])
    assert first != identity.fingerprint(run_cell(cell.replace("Quiet(a=1)", "Quiet(a=2)"))["f"])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("1", "True"), ("1", "1.0"), ("0.0", "-0.0"), ("'a'", "b'a'"), ("(1, 2)", "[1, 2]"), ("{1: 2}", "{2: 1}"),
        ("{'a': 1, 'b': 2}", "{'b': 2, 'a': 1}"), ("[['a'], 'b']", "[['a', 'b']]"),
        ("torch.zeros(2)", "torch.zeros(1, 2)"), ("types.SimpleNamespace(a=1)", "types.SimpleNamespace(a=2)"),
        ("torch.zeros(2)", "torch.zeros(2, requires_grad=True)"), ("torch.float16", "torch.bfloat16"),
        ("torch.ones(2, dtype=torch.bfloat16)", "torch.ones(2, dtype=torch.float16)"),
        ("torch.Generator().manual_seed(1)", "torch.Generator().manual_seed(2)"),
        ("random.Random(1)", "random.Random(2)"), ("numpy.random.default_rng(1)", "numpy.random.default_rng(2)"),
        ("numpy.random.RandomState(1)", "numpy.random.RandomState(2)"), ("nn.ReLU()", "nn.Tanh()"),
        ("nn.Dropout(0.1)", "nn.Dropout(0.2)"), ("functools.partial(max, 1)", "functools.partial(max, 2)"),
        ("re.compile('a')", "re.compile('a', re.I)"), ("collections.deque([1])", "collections.deque([2])"),
        ("collections.OrderedDict(a=1)", "collections.OrderedDict(a=2)"), ("numpy.sum", "numpy.prod"),
        ("torch.relu", "torch.tanh"), ("[].append", "[1].append"), ("slice(1)", "slice(2)"), ("range(2)", "range(3)"),
        ("pathlib.Path('a')", "pathlib.Path('b')"), ("pandas.DataFrame({'a': [1]})", "pandas.DataFrame({'a': [2]})"),
        ("fk.Preprocess(0.0, 1.0)", "fk.Preprocess(0.0, 2.0)"),
        ("operator.itemgetter(0)", "operator.itemgetter(1)"), ("torch.vmap(lambda x: x)", "torch.vmap(lambda x: -x)"),
        ("numpy.vectorize(lambda x: x)", "numpy.vectorize(lambda x: -x)"), ("abs", "max"),
        ("contextlib.contextmanager(lambda: 1)", "contextlib.contextmanager(lambda: 2)"),
        ("type('A', (), {'__slots__': 'a', 'b': 1})", "type('A', (), {'__slots__': 'a', 'b': 2})"),
        ("lambda *, a=1: a", "lambda *, a=2: a"), ("lambda a=1: a", "lambda a=2: a"),
        ("[w := [1], w]", "[[1], [1]]"),
    ],
)  # fmt: skip
def test_values_that_differ_are_told_apart_and_equal_ones_are_not(one: str, other: str) -> None:
    modules = (
        "import collections, contextlib, functools, operator, pathlib, random, re, types\nimport numpy, pandas, torch"
    )
    cell = f"{modules}\nimport fedlab_kit as fk\nfrom torch import nn\nVALUE = {{}}\ndef f(): return VALUE"
    prints = [identity.fingerprint(run_cell(cell.format(value))["f"]) for value in (one, one, other)]
    assert prints[0] == prints[1] != prints[2]


def test_an_edited_helper_of_a_data_set_is_seen_though_the_data_set_is_not_registered_again() -> None:
    cell = run_cell("""
import worlds, dataclasses, fedlab_kit as fk
def offset(): return 0.0
@fk.dataset
def shifted():
    split = worlds.blobs().train
    return dataclasses.replace(worlds.blobs(), train=fk.Split(split.x + offset(), split.y))
""")
    before, first = identify(SMALL.replace(dataset="shifted")), data.load("shifted").train.x.mean()
    exec("def offset(): return 1.0", cell)
    assert identify(SMALL.replace(dataset="shifted")) != before
    assert float(data.load("shifted").train.x.mean() - first) == pytest.approx(1.0, abs=1e-5)


def test_the_packages_own_code_counts_and_its_comments_and_docstrings_do_not() -> None:
    source = b'"""What it is."""\nA = 1\n"""Its help."""\ndef f(x):\n    """Doc."""\n    return x + A  # why\n'
    same = (
        source.replace(b"What it is", b"Else")
        .replace(b"Its help", b"No")
        .replace(b"Doc.", b"D.")
        .replace(b"# why", b"")
    )
    digest = code_reading.code_digest({"a.py": source})
    assert digest == code_reading.code_digest({"a.py": b"\n\n" + same})
    assert digest != code_reading.code_digest({"a.py": source.replace(b"x + A", b"x - A")})
    assert digest != code_reading.code_digest({"b.py": source}) and len(code_reading.own_code()) == 64


@pytest.mark.parametrize(
    "place", ["A = {}", "def f(x={}):\n    return x", "def f(x):\n    return x[{}]", "f(a, *[{}])"]
)
def test_literals_of_the_packages_own_code_are_told_apart(place: str) -> None:
    literals = "0 1 2 -1 None False True 0.0 -0.0 1.0 0j '' 'a' b'' b'a' () [] {} ... '0' 'None' f'' (0,) [0] {0}"
    digests = [code_reading.code_digest({"a.py": place.replace("{}", one, 1).encode()}) for one in literals.split()]
    assert len(set(digests)) == len(literals.split())


def test_the_digest_covers_the_modules_that_decide_weights() -> None:
    names = set(code_reading._SOURCES)
    assert {
        "data.py",
        "hands.py",
        "models.py",
        "partition.py",
        "federation/rounds.py",
        "wire/frame.py",
        "compression/prune.py",
    } <= names
    assert not names & {"run.py", "experiment.py", "lab/bench.py"}


@pytest.mark.parametrize(
    "layer",
    [
        lambda: nn.GRU(3, 4),
        lambda: nn.LSTM(3, 4, bidirectional=True),
        lambda: nn.MultiheadAttention(8, 2),
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2),
        lambda: nn.Embedding(5, 3),
        lambda: nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3, momentum=None)),
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)),
        lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(3, 4)),
        lambda: nn.ModuleDict({"a": nn.Conv2d(1, 2, 3), "b": nn.PReLU()}),
    ],
)
def test_layers_of_every_kind_can_be_told_again(layer):
    def made(seed):
        torch.manual_seed(seed)
        return identity.fingerprint(layer())

    assert made(1) == made(1) != made(2)


@pytest.mark.parametrize(
    ("made", "edited"),
    [
        ("class P(property):\n    def __get__(s, o, t=None): return 1.0\nclass A: x = P(len)", ("1.0", "-1.0")),
        (
            "import functools\nclass A(functools.partial):\n    def __call__(s, *a): return 1.0\nA = A(len)",
            ("1.0", "-1.0"),
        ),
        ("import functools\nA = functools.partial(len)\nA.k = 1.0", ("1.0", "-1.0")),
        ("import threading\nclass C(threading.local):\n    s = 1.0\nA = C()", ("1.0", "-1.0")),
        ("import threading\nA = threading.local()\nA.s = 1.0", ("1.0", "-1.0")),
        ("import numpy\nA = numpy.ma.masked_array([1.0, 2.0], mask=[0, 1])", ("[0, 1]", "[1, 0]")),
        ("import numpy\nA = numpy.array([[1.0]])", ("array", "matrix")),
        ("import torch\nA = torch.ones(1)\nA.k = 1.0", ("k = 1.0", "k = -1.0")),
        ("import collections\nA = collections.deque([1.0], maxlen=2)", ("maxlen=2", "maxlen=3")),
        ("import pathlib\nclass C(pathlib.PurePosixPath):\n    s = 1.0\nA = C('a')", ("1.0", "-1.0")),
    ],
)
def test_classes_that_extend_pythons_own_parts_count_by_their_bodies(made, edited):
    def found(text):
        table = {"__name__": "__main__"}
        exec(text, table)
        return identity.fingerprint(table["A"])

    assert found(made) == found(made) != found(made.replace(*edited))


@pytest.mark.parametrize("way", ["fk.wire.make('inner')", "make('inner')", "fk.wire.CODECS['inner']()"])
def test_what_is_looked_up_by_name_counts_too(way, monkeypatch):
    """A codec that hands on to another codec of a user's is another one when that is edited."""
    import fedlab_kit as fk
    from fedlab_kit.wire import CODECS, make

    monkeypatch.setattr(catalog, "TABLES", {**catalog.TABLES, "codec": dict(CODECS)})

    def found(factor):
        table = {"__name__": "__main__", "fk": fk, "make": make}
        exec(f"class Inner(fk.Codec):\n    def encode(s, v, rng): return v * {factor}", table)
        exec(f"class Outer(fk.Codec):\n    def encode(s, v, rng): return {way}.encode(v, rng)", table)
        catalog.TABLES["codec"]["inner"] = table["Inner"]
        return identity.fingerprint(table["Outer"])

    assert found(1.0) == found(1.0) != found(-1.0)


def test_what_a_module_makes_when_asked_counts_and_sys_modules_is_refused():
    def found(value):
        module = types.ModuleType("lazy")
        exec(f"V = {{'S': {value}}}\ndef __getattr__(name): return V[name]", vars(module))
        table = {"__name__": "__main__", "lazy": module}
        exec("def scale(): return lazy.S", table)
        return identity.fingerprint(table["scale"])

    assert found(1.0) == found(1.0) != found(-1.0)
    table = {"__name__": "__main__"}
    exec("import sys\nK = 1.0\ndef scale(): return sys.modules[__name__].K", table)
    with pytest.raises(identity.Unknowable, match=r"what sys\.modules reaches cannot be told"):
        identity.fingerprint(table["scale"])


@pytest.mark.parametrize("kind", ["model", "dataset"])
def test_lookup_reaches_models_and_data_sets(kind):
    def found(value):
        table = {"__name__": "__main__", "catalog": catalog}
        exec(f"def inner(): return {value}\ndef outer(): return catalog.lookup({kind!r}, 'inner')()", table)
        catalog.TABLES[kind]["inner"] = table["inner"]
        return identity.fingerprint(table["outer"])

    assert found(1.0) == found(1.0) != found(-1.0)
