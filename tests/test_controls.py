"""Controls follow their fields: value, name, slider, error, hint."""

from threading import Thread
from typing import Literal

import ipywidgets as widgets
import pytest

from fedlab_kit.catalog import MODELS
from fedlab_kit.experiment import Experiment, Recipe
from fedlab_kit.lab.control import Number, fields_with_control
from fedlab_kit.lab.controls import Controls, fold, validate
from fedlab_kit.settings import Settings, knob


def controls(**changes: object) -> Controls:
    return Controls(Experiment(**changes))


@pytest.mark.parametrize("owner", [Experiment, Recipe])
def test_every_field_has_a_named_control_with_help(owner):
    made = Controls(owner())
    for name in fields_with_control(owner):
        control, info = made[name], owner.model_fields[name]
        assert control.field.description == info.title
        assert info.description in control.field.tooltip and "Allowed:" in control.field.tooltip
        assert control.value == info.default
    assert made.settings(owner) == owner() and made.errors == {}


def test_only_widgets_with_an_accessible_name_take_the_keyboard():
    made = controls()
    for control in (made[name] for name in fields_with_control(Experiment)):
        assert isinstance(control.field, widgets.Dropdown | widgets.IntText | widgets.FloatText)
        if isinstance(control, Number) and control.slider is not None:
            assert "fedlab-slider" in control.slider._dom_classes and not control.slider.readout


def test_a_new_field_brings_its_control_with_it():
    class Oven(Settings):
        heat: float = knob(0.5, "Heat", "data", ge=0, le=1, span=(0, 1), step=0.1)
        mode: Literal["top", "bottom"] = knob("top", "Mode", "data")
        spare: Experiment | None = knob(None, "Spare", "data")

    made = Controls(Oven())
    made["heat"].value = 2.0
    assert made.errors == {"heat": "heat must be at least 0 and at most 1, got 2.0"}
    assert made["mode"].field.options == ("top", "bottom")
    assert fields_with_control(Oven) == ["heat", "mode"]


def test_choices_come_from_the_literal_or_the_catalog():
    made = controls()
    assert made["partition"].field.options == ("iid", "dirichlet", "shards", "site", "hands")
    assert set(made["model"].field.options) == set(MODELS)
    assert "mine" in controls(model="mine")["model"].field.options


def test_missing_classes_are_chosen_by_name():
    made = controls(missing=(3, 5))
    field = made["missing"].field
    assert [label for label, _ in field.options] == ["none", *"0123456789", "3, 5"] and field.label == "3, 5"
    field.label = "none"
    assert made.settings(Experiment).missing == ()
    field.label = "4"
    assert made.settings(Experiment).missing == (4,)


def test_slider_and_field_follow_each_other():
    rounds = controls()["rounds"]
    rounds.value = 30
    assert rounds.slider.value == 30
    rounds.slider.value = 12
    assert rounds.value == 12


def test_a_value_beyond_the_slider_is_kept():
    made = controls()
    made["alpha"].value = 500.0
    assert made["alpha"].value == 500 and made["alpha"].slider.value == pytest.approx(100)
    assert made.settings(Experiment).alpha == 500 and made.errors == {}


@pytest.mark.parametrize(("name", "typed", "rounded"), [("alpha", 0.8, 10**-0.1), ("dropout", 0.52, 0.5)])
def test_a_typed_value_outlives_the_browsers_rounding_of_the_slider(name, typed, rounded):
    control = controls()[name]
    control.value = typed
    control.slider.value = rounded
    assert control.value == typed


def test_a_dragged_logarithmic_slider_gives_round_numbers():
    lr = controls()["lr"]
    lr.slider.value = 0.0123456
    assert lr.value == 0.012


def test_arrow_keys_step_by_the_first_digit_on_a_logarithmic_scale():
    alpha = controls()["alpha"]
    steps = []
    for value in (0.5, 0.1, 0.15, 20.0):
        alpha.value = value
        steps.append(alpha.field.step)
    assert steps == pytest.approx([0.1, 0.05, 0.1, 10])


def test_a_wrong_value_is_answered_beside_its_control_and_taken_back_when_mended():
    made = controls()
    made["lr"].value = -3.0
    assert made["lr"].value == -3
    assert made["lr"].note.value == (
        '<div role="alert" class="fedlab-error">lr must be above 0 and at most 10, got -3.0</div>'
    )
    assert made["lr"].note.layout.display != "none" and "fedlab-wrong" in made["lr"].field._dom_classes
    assert made.settings(Experiment).lr == Experiment().lr
    made["lr"].value = 0.2
    assert made["lr"].note.layout.display == "none" and "fedlab-wrong" not in made["lr"].field._dom_classes
    assert made.settings(Experiment).lr == 0.2 and made.errors == {}


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_no_number_upsets_a_logarithmic_slider(value):
    made = controls()
    made["alpha"].value = value
    assert list(made.errors) == ["alpha"]


def test_each_of_two_wrong_values_has_its_own_message():
    made = controls()
    made["lr"].value, made["rounds"].value = -1.0, 0
    assert set(made.errors) == {"lr", "rounds"}
    made["rounds"].value = 5
    assert set(made.errors) == {"lr"} and made.settings(Experiment).rounds == 5


def test_two_fields_that_do_not_fit_are_answered():
    made = controls()
    made["clients"].value = 5
    assert made.errors == {"clients_per_round": "clients_per_round must be at most clients (5), got 10"}
    made["clients_per_round"].value = 5
    settings = made.settings(Experiment)
    assert made.errors == {} and (settings.clients, settings.clients_per_round) == (5, 5)


def test_validate_keeps_what_is_right():
    settings, errors = validate(Experiment(), {"lr": 0.5, "alpha": -1.0})
    assert settings == Experiment(lr=0.5) and list(errors) == ["alpha"]


def test_a_field_without_effect_is_disabled_and_says_when_it_has_one():
    made = controls()
    momentum = made["server_momentum"]
    assert momentum.field.disabled and momentum.slider.disabled
    assert "only with strategy fedavgm" in momentum.note.value
    made["strategy"].value = "fedavgm"
    assert not momentum.field.disabled and not momentum.slider.disabled and momentum.note.layout.display == "none"


def test_a_wrong_value_stays_open_to_correction_when_its_field_loses_its_effect():
    made = controls()
    made["alpha"].value = -1.0
    made["partition"].value = "iid"
    assert not made["alpha"].field.disabled and "alert" in made["alpha"].note.value


def test_an_error_of_the_run_is_shown_beside_the_field_it_names():
    made = controls()
    made.complain("partition must be iid, got 'site'")
    assert 'role="alert"' in made["partition"].note.value
    made.complain("the disk is full")
    made.complain("")


def test_changes_are_told_after_they_were_validated():
    made, seen = controls(), []
    made.changed = lambda owner: seen.append(made.settings(Experiment).rounds)
    made["rounds"].value = 9
    assert seen == [9]


def test_an_unknown_control_is_named():
    with pytest.raises(ValueError, match=r"controls must be among dataset, .*, got 'size'"):
        controls()["size"]


def test_groups_hold_every_other_field_once():
    made = controls()
    titles = [group.children[0].description for group in made.groups(Experiment, without=["lr"])]
    assert titles[:2] == ["Show data and clients", "Show training"] and len(titles) == len(set(titles))
    held = [row for group in made.groups(Experiment, without=["lr"]) for row in group.children[1].children[:-1]]
    assert {id(row) for row in held} == {id(made[n].widget) for n in fields_with_control(Experiment) if n != "lr"}


def test_a_group_opens_and_closes_by_a_button():
    made = controls()
    button, body = fold("training", [made["lr"]]).children
    assert body.layout.display == "none"
    button.click()
    assert body.layout.display != "none" and button.description == "Hide training"
    button.click()
    assert body.layout.display == "none" and button.description == "Show training"


def test_other_settings_are_taken_over_at_once_with_what_has_no_control():
    made = Controls(Experiment(), Recipe(dtype="int8"))
    seen = []
    made.changed = lambda owner: seen.append((owner, made.settings(owner)))
    teacher = Experiment(dataset="blobs", model="mlp", clients=3, clients_per_round=3)
    taken = teacher.replace(model="logistic", teacher=teacher, lr=0.3, strategy="fedadam")
    made["lr"].value = -1.0
    seen.clear()
    made.take(taken)
    assert seen == [(Experiment, taken)] and made.errors == {} and made.settings(Recipe) == Recipe(dtype="int8")
    assert all(made[name].value == getattr(taken, name) for name in fields_with_control(Experiment))
    assert not made["adam_lr"].field.disabled and made["server_lr"].field.disabled
    made["lr"].value = 0.2
    assert made.settings(Experiment) == taken.replace(lr=0.2)


def test_a_model_that_only_another_notebook_registered_is_taken_over_too():
    made = controls()
    made.take(Experiment(model="theirs"))
    assert made.settings(Experiment).model == made["model"].value == "theirs" and "cnn" in made["model"].field.options


def test_two_fields_may_be_changed_in_two_threads():
    """JupyterLab sends the first message of every widget to another thread than the later ones."""
    made = controls()
    fields = ("rounds", "local_epochs", "batch_size", "clients")
    threads = [Thread(target=lambda n=name: [setattr(made[n], "value", v) for v in range(10, 40)]) for name in fields]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(getattr(made.settings(Experiment), name) == 39 for name in fields)
