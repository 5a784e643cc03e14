"""Hands: pictures in the hand of the client that they belong to, the same on every machine, and measured so."""

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import ndimage
from sklearn.metrics import recall_score

import fedlab_kit as fk
from fedlab_kit import catalog, runs
from fedlab_kit.data import load
from fedlab_kit.federation.setup import task
from fedlab_kit.hands import INK, SLANT, STROKES, THICK, TURN, Hand, hands, written
from fedlab_kit.partition import data_of, partition, shards_of

PLAIN = Hand(turn=0.0, slant=0.0, thickness=0.0, ink=1.0, strokes=0)
FIELD = fk.Experiment(
    dataset="tiny_images", model="mlp", clients=4, clients_per_round=3, partition="hands", rounds=3, lr=0.05
)


def pictures(shape=(5, 2, 28, 24)):
    noise = np.random.default_rng(0).integers(0, 256, shape)
    return ndimage.uniform_filter(noise, (0, 0, 3, 3)).astype(np.uint8)  # as smooth as writing


def draw(hand, x, seed=0):
    return written(x, hand, np.random.default_rng(seed))


def test_a_plain_hand_changes_nothing_and_a_right_angle_is_numpys():
    x = pictures()
    assert np.array_equal(draw(PLAIN, x), x)
    square = x[..., :24, :]
    assert np.array_equal(draw(replace(PLAIN, turn=90.0), square), np.rot90(square, 1, (2, 3)))


@pytest.mark.parametrize(("turn", "slant"), [(30.0, 0.0), (-25.0, 0.0), (0.0, 0.5), (20.0, -0.4)])
def test_turned_and_slanted_pictures_are_scipys_to_within_the_rounding(turn, slant):
    x = pictures()
    found = draw(replace(PLAIN, turn=turn, slant=slant), x).astype(int)
    angle, middle = np.radians(turn), (np.array(x.shape[2:]) - 1) / 2
    forward = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]] @ np.array([[1, 0], [-slant, 1]])
    back = np.linalg.inv(forward)
    for picture, ours in zip(x.reshape(-1, 28, 24), found.reshape(-1, 28, 24), strict=True):
        theirs = ndimage.affine_transform(
            picture.astype(float), back, middle - back @ middle, order=1, mode="grid-constant"
        )
        assert abs(theirs - ours).max() < 8 and abs((theirs - ours).mean()) < 1  # 1/32 of a pixel, rounded down


@pytest.mark.parametrize(("thickness", "neighbours"), [(1.0, ndimage.grey_dilation), (-1.0, ndimage.grey_erosion)])
def test_a_whole_step_of_thickness_is_grey_dilation_or_erosion(thickness, neighbours):
    x, cross = pictures(), ndimage.generate_binary_structure(2, 1)
    expected = neighbours(x, footprint=cross[None, None], mode="nearest")
    assert np.array_equal(draw(replace(PLAIN, thickness=thickness), x), expected)
    half = draw(replace(PLAIN, thickness=thickness / 2), x).astype(int)
    assert abs(2 * half - x - expected).max() <= 1


def test_ink_pales_and_clutter_is_straight_strokes_of_full_ink():
    x = pictures()
    assert np.array_equal(draw(replace(PLAIN, ink=0.5), x), x // 2)
    black = np.zeros((400, 1, 28, 28), np.uint8)
    found = draw(replace(PLAIN, strokes=1), black)[:, 0]
    assert set(np.unique(found)) == {0, 255}
    struck = [picture for picture in found if picture.any()]
    assert 160 < len(struck) < 240  # none or one, alike
    for picture in struck:
        rows, columns = np.nonzero(picture)
        middle = np.stack([rows, columns], 1) - [rows.mean(), columns.mean()]
        assert np.linalg.svd(middle, compute_uv=False)[-1] / len(rows) ** 0.5 < 0.6  # no farther from one line
    assert np.array_equal(draw(replace(PLAIN, strokes=1), black), found[:, None])
    assert not np.array_equal(draw(replace(PLAIN, strokes=1), black, seed=1), found[:, None])


def test_hands_spread_each_trait_evenly_over_its_range():
    field = hands(20)
    even = (np.arange(20) + 0.5) / 20
    for name, least, most in (("turn", -TURN, TURN), ("slant", -SLANT, SLANT), ("thickness", -THICK, THICK)):
        found = np.sort([getattr(hand, name) for hand in field])
        np.testing.assert_allclose(found, least + (most - least) * even, atol=1e-9)
    np.testing.assert_allclose(np.sort([hand.ink for hand in field]), INK + (1 - INK) * even)
    assert sorted(np.bincount([hand.strokes for hand in field])) == [6, 7, 7] and STROKES == 2
    assert hands(20) == field != hands(21)[:20]
    assert hands(1)[0] == Hand(0.0, 0.0, 0.0, (1 + INK) / 2, (STROKES + 1) // 2)


def test_the_default_field_has_the_same_bytes_on_every_machine():
    """A change of these digests changes every stored run on hands."""
    found = data_of(fk.Experiment())
    assert found.digest == "58b823645daa047abcc19ea9ecdd8630189678bc7d9b8a268900a54830f1e920"


@pytest.mark.parametrize("split", ["train", "validation", "public", "test"])
def test_every_picture_of_every_split_is_in_its_clients_hand(split):
    raw, found, field = getattr(load("tiny_images"), split), getattr(data_of(FIELD), split), hands(4)
    assert torch.equal(found.y, raw.y) and sorted(set(np.bincount(found.site))) in ([5], [10], [20])
    for client, hand in enumerate(field):
        mine = found.site == client
        calm = written(raw.x[mine].numpy(), replace(hand, strokes=0), np.random.default_rng())
        same = (found.x[mine].numpy() == calm).mean()
        assert same == 1 if hand.strokes == 0 else 0.5 < same < 1  # but for its clutter
        other = written(raw.x[mine].numpy(), replace(field[client - 1], strokes=0), np.random.default_rng())
        assert (found.x[mine].numpy() == other).mean() < 0.5


def test_training_pictures_are_dealt_by_the_seed_and_held_out_ones_alike_for_all():
    one, other = data_of(FIELD), data_of(FIELD.replace(seed=8))
    assert not torch.equal(one.train.site, other.train.site)
    for name in ("validation", "public", "test"):
        a, b = getattr(one, name), getattr(other, name)
        assert torch.equal(a.x, b.x) and torch.equal(a.site, b.site)
    shards = shards_of(FIELD)
    assert all((one.train.site[shard] == client).all() for client, shard in enumerate(shards))
    even = partition(load("tiny_images"), "iid", 4, 1.0, FIELD.seed)
    assert all(torch.equal(a, b) for a, b in zip(shards, even, strict=True))


def test_a_round_tells_how_each_hand_fares_and_a_file_is_measured_on_the_same_pictures():
    run = fk.train(FIELD)
    record, data = run.records[-1], run.dataset
    right = run.model(data.preprocess(data.validation.x)).argmax(1) == data.validation.y
    assert record.correct == tuple(int(right[data.validation.site == c].sum()) for c in range(4))
    assert record.total == (10,) * 4 and run.client_accuracy()[0].tolist() == [hits / 10 for hits in record.correct]
    artifact = fk.compress(run, fk.Recipe())
    assert artifact.accuracy == record.accuracy and artifact.recall == record.recall
    again = fk.deployment.artifact.load(artifact.path)
    assert again.dataset.digest == data.digest != load("tiny_images").digest
    assert torch.equal(again.dataset.validation.x, data.validation.x)


def test_recall_by_class_is_scikit_learns():
    run = fk.train(FIELD)
    data = run.dataset
    found = run.model(data.preprocess(data.validation.x)).argmax(1)
    expected = recall_score(data.validation.y, found, average=None)
    assert run.records[-1].recall == pytest.approx(tuple(expected))
    old = load("tiny_images")
    held = fk.Split(old.validation.x[old.validation.y == 1], old.validation.y[old.validation.y == 1])
    catalog.dataset("light")(lambda: replace(old, name="light", validation=held))
    assert next(iter(fk.rounds(FIELD.replace(dataset="light")))).recall[0] is None


def test_a_run_goes_on_where_it_was_and_a_model_of_ones_own_is_measured_on_ones_own_pictures():
    stop = threading.Event()
    half = fk.train(FIELD, stop, lambda record: stop.set() if record.round == 2 else None)
    assert len(half.records) == 2
    went_on, at_once = fk.train(FIELD), list(fk.rounds(FIELD))
    assert [replace(r, seconds=0) for r in went_on.records] == [replace(r, seconds=0) for r in at_once]
    assert runs.identify(FIELD) != runs.identify(FIELD.replace(partition="iid"))
    own = task(FIELD.replace(model="normed_images", normalization="own"))
    assert torch.equal(own.owner, own.dataset.validation.site)


@catalog.model
def normed_images(shape, classes):
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(144, classes), torch.nn.BatchNorm1d(classes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": "blobs"}, "partition must not be hands for dataset 'blobs': hands write bytes of pictures"),
        ({"clients": 81}, "clients must be 1 to 80 for the hands partition of 80 samples, got 81"),
        ({"missing": (0, 2)}, "missing must be classes 0 to 1 of dataset 'tiny_images', got (0, 2)"),
        ({"missing": (0, 1)}, "missing must leave a class that somebody has a sample of, got (0, 1)"),
        (
            {"clients": 40, "missing": (0,)},
            "dataset 'tiny_images': client 1 has no training samples of the classes that are not missing",
        ),
    ],
)
def test_what_hands_cannot_do_is_one_line(changes, message):
    with pytest.raises(ValueError) as error:
        task(FIELD.replace(**changes))
    assert str(error.value) == message


def test_of_missing_classes_nobody_has_a_sample_and_the_others_lie_as_before():
    data = load("tiny_images")
    for scheme in ("iid", "dirichlet", "hands"):
        full, less = (partition(data, scheme, 4, 100.0, 3, missing) for missing in ((), (1,)))
        for before, after in zip(full, less, strict=True):
            assert after.tolist() == [index for index in before.tolist() if data.train.y[index] != 1]
    kept = data_of(FIELD.replace(missing=(1,)))
    assert (kept.validation.y == 1).any() and torch.equal(kept.train.x, data_of(FIELD).train.x)


def test_the_recall_of_missing_classes_is_in_records_points_and_tables():
    table = fk.sweep(FIELD, {"missing": [(), (1,)]})
    run = fk.train(FIELD.replace(missing=(1,)))
    assert run.records[-1].recall[1] == 0.0 < run.records[-1].recall[0]  # what nobody has seen nobody finds
    assert table["missing_recall"].isna().tolist() == [True, False] and table["missing_recall"][1] == 0.0
    artifact = fk.compress(run, fk.Recipe())
    assert artifact.recall == run.records[-1].recall and artifact.missing_recall == artifact.recall[1]
    assert fk.compress(fk.train(FIELD), fk.Recipe()).missing_recall is None
