"""Settings: what is accepted, how errors are worded, what identifies a value."""

import json
import pickle

import pytest

from fedlab_kit import Experiment, Recipe


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lr": -1}, "lr must be above 0 and at most 10, got -1"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1, got 1.0"),
        ({"alpha": float("nan")}, "alpha must be above 0 and at most 1000, got nan"),
        ({"rounds": 2.5}, "rounds must be a whole number, at least 1 and at most 100000, got 2.5"),
        ({"rounds": "3"}, "rounds must be a whole number, at least 1 and at most 100000, got '3'"),
        ({"clients": True}, "clients must be a whole number, at least 1 and at most 1000000, got True"),
        ({"model": 3}, "model must be text, got 3"),
        ({"clients": 5}, "clients_per_round must be at most clients (5), got 10"),
        ({"partition": "random"}, "partition must be one of iid, dirichlet, shards, site, hands, got 'random'"),
        ({"missing": 3}, "missing must be numbers of classes, such as (3,), got 3"),
        ({"missing": (3, -1)}, "missing must be numbers of classes, such as (3,), got (3, -1)"),
        ({"missing": ("3",)}, "missing must be numbers of classes, such as (3,), got ('3',)"),
        ({"missing": (True,)}, "missing must be numbers of classes, such as (3,), got (True,)"),
    ],
)
def test_wrong_values_are_answered_in_one_line(values, message):
    with pytest.raises(ValueError) as error:
        Experiment(**values)
    assert str(error.value) == message and error.value.field == message.split(" ")[0]


def test_an_unknown_field_lists_the_fields():
    with pytest.raises(ValueError, match="epochs is not a field of Experiment; its fields are dataset, model") as error:
        Experiment(epochs=3)
    assert error.value.field == "epochs"


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"start": Experiment(model="mlp")}, "start"),
        ({"start_recipe": Recipe()}, "start_recipe"),
        ({"teacher": {"lr": -1}}, "lr"),
        ({"teacher": Experiment(normalization="own")}, "normalization"),
        ({"privacy": "client", "strategy": "median"}, "strategy"),
        ({"devices": "sliced", "mask_ratio": 0.5}, "devices"),
    ],
)
def test_an_error_names_the_field_to_mend_also_where_each_field_alone_is_right(values, field):
    with pytest.raises(ValueError) as error:
        Experiment(**values)
    assert error.value.field == field
    assert pickle.loads(pickle.dumps(error.value)).field == field  # another process hands it on


def test_missing_classes_have_one_order_and_survive_json():
    one = Experiment(missing=[5, 3, 5])
    assert one == Experiment(missing=(3, 5)) == Experiment(**json.loads(json.dumps(one.changes())))
    taught = Experiment(teacher=one)
    assert Experiment(**json.loads(json.dumps(taught.changes()))) == taught


def test_recipe_words_its_range():
    with pytest.raises(ValueError, match=r"^prune_ratio must be at least 0 and below 1, got 1\.2$"):
        Recipe(prune_ratio=1.2)


def test_settings_cannot_be_changed_in_place():
    experiment = Experiment()
    with pytest.raises(Exception, match="frozen"):
        experiment.lr = 0.2


def test_replace_validates_and_leaves_the_original():
    experiment = Experiment(seed=3)
    assert experiment.replace(lr=0.5) == Experiment(seed=3, lr=0.5)
    assert experiment.lr == Experiment().lr
    with pytest.raises(ValueError, match="lr must be above 0"):
        experiment.replace(lr=0)


def test_changes_are_the_non_default_fields():
    assert Experiment().changes() == {}
    assert Experiment(model="mlp", lr=1).changes() == {"model": "mlp", "lr": 1.0}
    assert Experiment(**Experiment(model="mlp", lr=1).changes()) == Experiment(model="mlp", lr=1)


def test_repr_reproduces_the_value():
    experiment = Experiment(model="mlp", clients=30)
    assert eval(repr(experiment)) == experiment
    assert str(Recipe(dtype="int8")) == "Recipe(dtype='int8')"


def test_no_field_stands_in_both():
    assert not set(Experiment.model_fields) & set(Recipe.model_fields)


@pytest.mark.parametrize("owner", [Experiment, Recipe])
def test_every_field_describes_itself(owner):
    for name, field in owner.model_fields.items():
        assert field.title, name
        assert field.description and field.description.endswith("."), name
        span = field.json_schema_extra["span"]
        if span:  # a slider's range must be made of values that are accepted
            crowd = {"clients": 100} if name == "clients_per_round" else {}
            owner(**crowd, **{name: type(field.default)(span[1])})


@pytest.mark.parametrize("shared", [("mnist", "mnist_5k"), ("mnist_5k", "mnist")])
def test_a_parent_that_has_seen_this_data_sets_test_pictures_is_refused(shared):
    """At whatever distance: a start's start, and a teacher's start too."""
    seen, asked = shared
    far = Experiment(dataset="digits", start=Experiment(dataset=seen))
    teacher = Experiment(dataset=asked)
    for parents in ({"start": far}, {"start": Experiment(dataset=seen)}):
        with pytest.raises(ValueError, match=f"dataset must not share pictures .* {seen!r}: got {asked!r}"):
            Experiment(dataset=asked, **parents)
    with pytest.raises(ValueError, match="dataset must not share pictures"):
        Experiment(dataset=asked, teacher=Experiment(dataset=asked, start=far))
    assert Experiment(dataset=asked, teacher=teacher, start=teacher).parents == (teacher, teacher)
