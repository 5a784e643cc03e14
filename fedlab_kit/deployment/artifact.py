"""`compress`: a trained model and a recipe in, a file on disk that the runtime has loaded back and measured out."""

from __future__ import annotations

import hashlib
import zlib
from base64 import b64decode, b64encode
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, fields
from functools import cache, cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from fedlab_kit import catalog, data
from fedlab_kit.code_reading import code_digest
from fedlab_kit.compression.channels import TURN
from fedlab_kit.compression.prune import prune
from fedlab_kit.deployment import calibration, convert, measure
from fedlab_kit.deployment.measure import squeeze as squeeze
from fedlab_kit.deployment.onnx_export import export
from fedlab_kit.deployment.score import matrix, probabilities, read
from fedlab_kit.deployment.subject import Subject, remedy, subject_of
from fedlab_kit.experiment import Experiment, Recipe
from fedlab_kit.files import StoreError, at, is_number, read_json, sweep_up, write_bytes, write_json
from fedlab_kit.models import Draws, flops
from fedlab_kit.partition import data_of
from fedlab_kit.run import Run
from fedlab_kit.settings import complaint
from fedlab_kit.store import when_and_where

_PACKAGES = ("torch", "torch-pruning", "onnx", "onnxruntime", "zstandard")  # besides the code, they decide a file
_SOURCES = {file.name: file.read_bytes() for file in Path(__file__).parent.glob("*.py")}  # while it is what is loaded


@dataclass(frozen=True, eq=False)
class Artifact:
    """A deployed file and what was measured on it.

    `bytes` is the file's size, `zstd_bytes` that of `<name>.onnx.zst` beside it, `accuracy` with its 95 % `interval`
    the runtime's on the validation split, `recall` that of each class there (None without a sample), `missing_recall`
    the mean over classes that no client holds (None where all are held). `lost` is what the fp32 file of the same model
    answers better, in points of accuracy on the same samples, with its 95 % interval `lost_interval` (paired, see
    `statistics.paired_loss`); `changed` counts the samples that the two answer differently. `latency_ms` is one raw
    sample's median and `latency_spread_ms` the distance between its quartiles, `throughput` samples per second in
    batches of 64. `sparsity` is the share of zeros among the stored weights, `flops` are the float graph's on one
    sample. `note` says when a recipe did not do what its name promises; `card` is the model card beside the file.
    """

    path: Path
    digest: str
    bytes: int
    zstd_bytes: int
    accuracy: float
    interval: tuple[float, float]
    recall: tuple[float | None, ...]
    missing_recall: float | None
    lost: float
    lost_interval: tuple[float, float]
    changed: int
    latency_ms: float
    latency_spread_ms: float
    throughput: float
    threads: int
    sparsity: float
    parameters: int
    flops: int
    note: str
    card: dict[str, Any] = field(repr=False)
    _session: Any = field(default=None, repr=False)
    _dataset: data.Dataset | None = field(default=None, repr=False)

    @cached_property
    def session(self) -> Any:
        """The file opened in onnxruntime. Raises StoreError when it is no longer the one that was measured."""
        return self._session or measure.open_session(_stored(self.path, self.digest)[0])

    @property
    def answers(self) -> np.ndarray:
        """The class that the file gave each sample it was measured on, int64 [n], as its card keeps them."""
        return _unpacked(self.card["answers"])

    @property
    def baseline(self) -> np.ndarray:
        """The classes that the fp32 file of the same model gave the same samples, int64 [n]."""
        return _unpacked(self.card["baseline"])

    @cached_property
    def dataset(self) -> data.Dataset:
        """The data it was measured on. ValueError where they are registered under no name, or are others now."""
        if self._dataset is not None:
            return self._dataset
        about, asked = self.card["data"], self.card["experiment"]
        name = (asked or {}).get("dataset", about["name"])
        if name not in catalog.DATASETS:
            raise ValueError(f"{self.path.name} was measured on dataset {name!r}: register that with fk.dataset first")
        found = data_of(Experiment(**asked)) if asked else data.load(name)
        if found.digest != about["digest"]:
            raise ValueError(f"dataset {found.name!r} is another one now than when {self.path.name} was measured on it")
        return found

    def predict(self, x: Any) -> np.ndarray:
        """Class probabilities float32 [n, classes] for raw samples [n, ...], typed as the data set stores them.

        A DataFrame's columns are found by their names. Raises ValueError naming columns, type, shape or the sample
        that is wrong.
        """
        raw = matrix(x, self.card["input"])
        if raw.dtype.kind == "f" and not np.isfinite(raw).all():
            row = int(np.flatnonzero(~np.isfinite(raw).reshape(len(raw), -1).all(axis=1))[0])
            raise ValueError(f"x must have a number everywhere, sample {row} has a value that is missing or infinite")
        return probabilities(measure.logits(self.session, raw))

    def test(self) -> tuple[float, tuple[float, float]]:
        """Open the test split: measure the file's accuracy on it, with its interval, and write both on the card."""
        accuracy, interval = measure.accuracy(self.session, self.dataset.filled("test"))
        opened = self.card.get("test", {}).get("opened", 0) + 1  # each look at it makes the next choice less blind
        self.card["test"] = {"accuracy": accuracy, "interval": list(interval), "opened": opened}
        write_json(_beside(self.path)[0], self.card)
        return accuracy, interval


def compress(
    model: Run | Subject | nn.Module,
    recipe: Recipe,
    folder: Path | str | None = None,
    client: int | None = None,
    dataset: data.Dataset | str | None = None,
) -> Artifact:
    """Prune, export, quantize, write, load back and measure; the files go to `folder` or the run's `artifacts/`.

    The same model and recipe give the same bytes. Where clients keep their normalization to themselves, `client` says
    whose model it is; its accuracy is then that on this client's part of the validation samples.

    `model` may also be a trained float32 module of one's own that maps prepared samples to logits, which is not
    changed: `dataset`, a registered name or a Dataset, says what it is measured and calibrated on; its files go to
    `modules/` beside the runs. Raises ValueError when the recipe or the model makes it impossible, StoreError when a
    file cannot be written; nothing half-written stays behind. Threads take turns: no latency is measured meanwhile.
    """
    with TURN:
        subject = subject_of(model, client, dataset)
        with Draws(0).inside() if subject.facts["module"] else nullcontext():  # its owner's random numbers stay
            try:
                return _compress(subject, recipe, folder)
            except (ValueError, OSError):
                raise
            except Exception as error:  # another library's, on a network it does not know: in one line all the same
                raise ValueError(
                    f"model {subject.name} cannot be compressed so: {complaint(error)}{remedy(subject.model)}"
                ) from error


def recall(
    model: Run | Subject | nn.Module, recipe: Recipe, dataset: data.Dataset | str | None = None
) -> Artifact | None:
    """Return what `compress` made of the same model and recipe before, opened from its card; None if it is to be made.

    That is so when code or versions that decide it have changed. On another machine than its card's the latency alone
    is measured again. Raises StoreError, naming the file, when one of its files is cut or altered.
    """
    subject = subject_of(model, dataset=dataset)
    path = _place(subject, recipe, None)
    card_file, compressed = _beside(path)
    if not subject.lasting or not card_file.exists():
        return None
    try:
        if not _same(card := read_json(card_file), subject, recipe):
            return None
        _stored(path, card["digest"])
        if compressed.stat().st_size != card["measured"]["zstd_bytes"]:
            raise StoreError(f"{compressed} is cut or altered")
    except (OSError, TypeError, LookupError) as error:
        raise StoreError(f"{path} or a file beside it is cut or altered") from error
    found = _artifact(path, card, None, subject.dataset)
    if card["machine"] == when_and_where()["machine"]:
        return found
    with TURN:
        card["measured"] |= measure.speed(found.session, subject.held)
    card |= when_and_where()
    write_json(card_file, card)
    return _artifact(path, card, found.session, subject.dataset)


def _compress(subject: Subject, recipe: Recipe, folder: Path | str | None) -> Artifact:
    sample = subject.dataset.preprocess(subject.held.x[:2])
    model, pruning = prune(subject.model, sample, recipe, subject.name)
    converted = _converted(subject, recipe, model)
    path = _place(subject, recipe, folder)
    card_file, compressed = _beside(path)
    sweep_up(path.parent, "*.onnx*")
    try:
        content = converted.SerializeToString(deterministic=True)
        write_bytes(path, content, listed=False)
        squeezed, level = squeeze(content)
        write_bytes(compressed, squeezed, listed=False)
        session = measure.open_session(path)
        answers = measure.answers(session, subject.held)
        baseline = _baseline(subject, recipe, answers, folder)
        missing = (subject.facts["experiment"] or {}).get("missing", ())
        before, after = (sum(p.numel() for p in m.parameters()) for m in (subject.model, model))
        card = {
            **subject.about(recipe),
            "accuracy_batch": measure.WHOLE,
            **_made_by(),
            "runtime": {"onnxruntime": f">={measure.oldest_runtime(converted)}"},
            "zstd_level": level,
            "parameters_before": before,
            "digest": hashlib.sha256(content).hexdigest(),
            "answers": _packed(answers),
            "baseline": _packed(baseline),
            "measured": {
                "bytes": path.stat().st_size,
                "zstd_bytes": compressed.stat().st_size,
                **measure.judged(answers, baseline, subject.held, len(subject.dataset.classes), missing),
                **measure.speed(session, subject.held),
                "sparsity": measure.sparsity(converted),
                "parameters": after,
                "flops": flops(model, sample),
                "note": "; ".join(filter(None, [pruning, *_notes(recipe, model, converted)])),
            },
            **when_and_where(),
        }
        write_json(card_file, card)
    except BaseException:
        for file in (path, card_file, compressed):
            file.unlink(missing_ok=True)
        raise
    return _artifact(path, card, session, subject.dataset)


def load(path: Path | str) -> Artifact:
    """Open an artifact again. Raises StoreError, naming the file, when it or its card is missing, cut or altered."""
    content, card = _stored(at(path))
    return _artifact(at(path), card, measure.open_session(content), None)


def _stored(path: Path, digest: str | None = None) -> tuple[bytes, dict[str, Any]]:
    """Return an artifact's bytes and its card. Raises StoreError when they are not whole, or not those of `digest`."""
    try:
        content, card = read(path)
        check_card(card)
    except ValueError as error:
        raise StoreError(str(error)) from error
    except (TypeError, LookupError) as error:
        raise StoreError(f"the model card of {path} is damaged ({error}): compress again") from error
    if digest not in (None, card["digest"]):
        raise StoreError(f"{path} is another one than was measured: compress again")
    return content, card


def check_card(card: dict[str, Any]) -> None:
    """Raise TypeError or LookupError for a card that lacks a figure or a word, or has another type in its place."""
    measured = card["measured"]
    (low, high), (least, most) = measured["interval"], measured["lost_interval"]
    numbers = [low, high, least, most]
    numbers += [measured[one.name] for one in fields(Artifact) if one.type in ("int", "float")]
    numbers += [share for share in (*measured["recall"], measured["missing_recall"]) if share is not None]
    words = [*(card[name] for name in ("when", "machine", "digest", "answers", "baseline")), measured["note"]]
    if not all(is_number(number) for number in numbers):
        raise TypeError(f"numbers are expected, got {numbers!r:.200}")
    if not all(isinstance(word, str) for word in words):
        raise TypeError(f"text is expected, got {words!r:.200}")


def slug(recipe: Recipe) -> str:
    """A recipe as a part of a file's name, e.g. "channel-0.5-int8-static"."""
    pruning = [recipe.prune, f"{recipe.prune_ratio}"] if recipe.prune_ratio else []
    low = recipe.dtype in ("int4", "int2")
    how = [recipe.quantization] if recipe.dtype == "int8" else ["ends"] if low and recipe.keep == "ends" else []
    calibration = [recipe.calibration] if how == ["static"] and recipe.calibration != "minmax" else []
    return "-".join([*pruning, recipe.dtype, *how, *calibration])


def _converted(subject: Subject, recipe: Recipe, model: nn.Module) -> Any:
    """Export a pruned model and convert it, for static int8 with the ranges that the clients measured."""
    graph, ranges = export(model, subject.dataset.preprocess, subject.dataset.validation.x), None
    if (recipe.dtype, recipe.quantization) == ("int8", "static"):
        ranges = calibration.calibrate(graph, subject.calibration(), recipe.calibration)
    return convert.convert(graph, recipe.dtype, ranges, recipe.keep)


def _place(subject: Subject, recipe: Recipe, folder: Path | str | None) -> Path:
    return at(folder or subject.home / "artifacts") / f"{subject.stem}-{slug(recipe)}.onnx"


def _artifact(path: Path, card: dict[str, Any], session: Any, dataset: data.Dataset | None) -> Artifact:
    pairs = {name: tuple(card["measured"][name]) for name in ("interval", "lost_interval", "recall")}
    measured = {**card["measured"], **pairs}
    return Artifact(path=path, digest=card["digest"], card=card, **measured, _session=session, _dataset=dataset)


def _same(card: dict[str, Any], subject: Subject, recipe: Recipe) -> bool:
    """Say whether a card is of the same model and recipe, and of today's code."""
    if not {**subject.facts, **_made_by()}.items() <= card.items():
        return False
    return _effect(Recipe(**card["recipe"])) == _effect(recipe)


def _effect(recipe: Recipe) -> dict[str, Any]:
    """What of a recipe matters: how it would prune does not where it prunes nothing."""
    return {**recipe.in_effect(), "prune": recipe.prune_ratio and recipe.prune}


def _baseline(subject: Subject, recipe: Recipe, answers: np.ndarray, folder: Path | str | None) -> np.ndarray:
    """Return what the fp32 file of the same model answers, which is made first where it is not there.

    In memory alone where files go elsewhere than to the subject's home, or where that takes none.
    """
    if _effect(recipe) == _effect(Recipe()):
        return answers
    if "baseline" not in subject.memo:
        found = None
        with suppress(StoreError):
            found = recall(subject, Recipe()) or (None if folder else _compress(subject, Recipe(), None))
        if found is None:
            graph = _converted(subject, Recipe(), subject.model)
            subject.memo["baseline"] = measure.answers(measure.open_session(graph.SerializeToString()), subject.held)
        else:
            subject.memo["baseline"] = found.answers
    known: np.ndarray = subject.memo["baseline"]
    return known


def _packed(classes: np.ndarray) -> str:
    """Answers as the card keeps them: uint32, deflated, in base64."""
    return b64encode(zlib.compress(classes.astype("<u4").tobytes(), 9)).decode()


def _unpacked(text: str) -> np.ndarray:
    return np.frombuffer(zlib.decompress(b64decode(text)), "<u4").astype(np.int64)


@cache
def _made_by() -> dict[str, Any]:
    """What besides model and recipe decides a file and its figures, as it stands on the card."""
    versions = {name: version(name) for name in _PACKAGES}
    return {"code": code_digest(_SOURCES), "versions": versions}


def _notes(recipe: Recipe, model: nn.Module, converted: Any) -> list[str]:
    """Say so when the dtype did not reach all weights, or when neither dtype nor sparsity sees some in the file."""
    weights, notes = list(measure.stored_weights(converted).values()), []
    seen, stayed = sum(w.size for w in weights), sum(w.size for w in weights if w.dtype == np.float32)
    asked = sum(p.numel() for p in model.parameters() if sum(size > 1 for size in p.shape) > 1)
    if recipe.dtype in convert.OPSETS and recipe.keep == "ends" and all(w.dtype == np.int8 for w in weights):
        notes.append(f"keep='ends' leaves no layer for {recipe.dtype}: all weights are in int8")
    elif recipe.dtype != "fp32" and stayed:
        why = f"their values are too large or too small for {recipe.dtype}"
        notes.append(f"{stayed / seen:.1%} of the weights stay fp32: {why}")
    if seen < asked and (recipe.dtype != "fp32" or recipe.prune_ratio):  # a product of one's own, say
        notes.append(
            f"{1 - seen / asked:.1%} of the weights are not seen in the file, by dtype and sparsity: they are used "
            "otherwise than as a layer's weights, folded into others, or not at all"
        )
    return notes


def _beside(path: Path) -> tuple[Path, Path]:
    """The model card and the compressed form that belong to an artifact's file."""
    return path.with_name(f"{path.name}.json"), path.with_name(f"{path.name}.zst")
