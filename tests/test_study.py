"""Studies: the same budget for each arm, judging seeds that tuning never sees, and a verdict at the stated rate."""

import json
from threading import Event

import numpy as np
import pytest
from scipy import stats
from torch import nn

import fedlab_kit as fk
from fedlab_kit.arms import seeded
from fedlab_kit.files import StoreError
from fedlab_kit.runs import history
from fedlab_kit.study import Study

SMALL = fk.Experiment(
    dataset="blobs", partition="dirichlet", model="logistic", clients=4, clients_per_round=4, rounds=1, lr=0.05
)
ARMS = {"prox": SMALL.replace(strategy="fedprox"), "plain": SMALL}
RATES = {"lr": [0.01, 0.1]}


class Times(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return self.factor * x


def said(value):
    """Outcomes that a function of experiment and recipe makes up."""
    return lambda arms: [{"value": value(experiment, recipe)} for experiment, recipe in arms]


def test_the_plan_and_then_the_choice_are_on_disk_before_what_depends_on_them():
    study, asked = Study(ARMS, RATES, seeds=[1, 2], judge=[3, 4, 5]), []

    def outcomes(arms):
        asked.append([(e.strategy, e.lr, e.seed) for e, _ in arms])
        written = sorted(file.name for file in study.folder.iterdir())
        assert written == ["plan.json"] if len(asked) == 1 else ["choice.json", "plan.json"]
        return said(lambda e, _: e.lr if e.strategy == "fedprox" else -e.lr)(arms)

    finding = study.run(outcomes=outcomes)
    assert asked[0] == [(s, lr, seed) for s in ("fedprox", "fedavg") for lr in (0.01, 0.1) for seed in (1, 2)]
    assert asked[1] == [(s, lr, seed) for s, lr in (("fedprox", 0.1), ("fedavg", 0.01)) for seed in (3, 4, 5)]
    assert finding.chosen == {"prox": {"lr": 0.1}, "plain": {"lr": 0.01}}
    assert json.loads((study.folder / "choice.json").read_text())["chosen"] == finding.chosen
    assert Study.load(study.folder / "plan.json") == study
    assert repr(finding).startswith("prox with lr=0.1 minus plain with lr=0.01: accuracy ")


def test_no_judging_run_exists_until_the_choice_is_written(runs_folder):
    study, seen = Study(ARMS, RATES, seeds=[1], judge=[2, 3]), []

    def watch(done, of, words):
        seeds = {run.experiment.seed for run in history()[0]}
        seen.append((sorted(seeds), (study.folder / "choice.json").exists()))

    finding = study.run(progress=watch)
    assert ([1], False) in seen and ([1, 2, 3], True) in seen
    assert all(chosen or seeds == [1] for seeds, chosen in seen)
    assert len(finding.table) == 2 * 2 * 1 + 2 * 2 and history()[1] == []


@pytest.mark.parametrize("judging", [0.0, 1.0, float("nan")])
def test_what_the_judging_seeds_say_does_not_change_the_choice(judging):
    rng = np.random.default_rng(1)
    tuned = {(s, lr, seed): rng.random() for s in ("fedprox", "fedavg") for lr in (0.01, 0.1) for seed in (1, 2)}
    study = Study(ARMS, RATES, seeds=[1, 2], judge=[3, 4])
    finding = study.run(outcomes=said(lambda e, _: tuned.get((e.strategy, e.lr, e.seed), judging)))
    for name, strategy in (("prox", "fedprox"), ("plain", "fedavg")):
        means = [np.mean([tuned[strategy, lr, seed] for seed in (1, 2)]) for lr in (0.01, 0.1)]
        assert finding.chosen[name] == {"lr": (0.01, 0.1)[int(np.argmax(means))]}


def test_fewest_failures_then_the_mean_then_the_first():
    grid, nan = {"lr": [0.3, 0.1, 0.2]}, float("nan")
    found = {0.3: [0.5, 0.5], 0.1: [1.0, nan], 0.2: [0.4, 0.6]}

    def chosen(measure, **found_by_lr):
        table = {**found, **{float(f"0.{key[1:]}"): value for key, value in found_by_lr.items()}}
        study = Study(ARMS, grid, seeds=[1, 2], judge=[3, 4], measure=measure)
        return study.run(outcomes=said(lambda e, _: table[e.lr][e.seed - 1] if e.seed < 3 else 0.5)).chosen["plain"]

    assert chosen("accuracy") == {"lr": 0.3}  # of two equal means the first; the best run's setting failed once
    assert chosen("recall of a", _2=[0.5, 0.6]) == {"lr": 0.2}
    assert chosen("loss", _2=[0.5, 0.4]) == {"lr": 0.2}
    assert chosen("bytes", _3=[nan, nan], _2=[nan, nan]) == {"lr": 0.1}


def test_two_arms_that_are_the_same_stay_undecided():
    study = Study({"a": SMALL, "b": SMALL}, RATES, seeds=[1], judge=[2, 3, 4])
    finding = study.run()
    assert (finding.verdict, finding.difference, finding.low, finding.high) == ("undecided", 0, 0, 0)
    for margin in (-0.01, 0.01):
        assert Study({"a": SMALL, "b": SMALL}, judge=[2, 3, 4], margin=margin).run().verdict == "undecided"


def test_a_known_difference_is_supported_as_often_as_students_power_says_and_none_is_not():
    """The outcome is a normal number by seed, common to both arms, one of its own for each, and the true difference."""
    seeds, true = range(8), 1.5
    power = stats.nct.sf(stats.t.ppf(0.975, 7), 7, true / np.sqrt(2) * np.sqrt(8))
    verdicts, held = {0.0: [], true: []}, 0
    for pair in range(50):
        for truth in verdicts:
            noise = np.random.default_rng([pair, int(2 * truth)]).normal(size=(3, 8))
            values = {"fedprox": truth + noise[0] + 5 * noise[2], "fedavg": noise[1] + 5 * noise[2]}
            study = Study(ARMS, judge=seeds, measure="loss")
            finding = study.run(outcomes=said(lambda e, _, values=values: values[e.strategy][e.seed]))
            verdicts[truth].append(finding.verdict)
            held += finding.low <= truth <= finding.high
    likely = stats.binom(50, power).interval(0.999)
    assert 0.7 < power < 0.8 and likely[0] <= verdicts[true].count("supported") <= likely[1]
    assert verdicts[0.0].count("undecided") >= stats.binom(50, 0.95).ppf(0.001)
    assert held >= stats.binom(100, 0.95).ppf(0.001)


def test_the_interval_is_scipys_of_pairs_and_the_claim_is_held_against_the_margin():
    rng = np.random.default_rng(0)
    values = {"fedprox": rng.normal(0.3, 0.1, 6), "fedavg": rng.normal(0, 0.1, 6)}
    interval = stats.ttest_rel(values["fedprox"], values["fedavg"]).confidence_interval()
    for margin, verdict in ((0.0, "supported"), (0.3, "undecided"), (0.9, "not supported")):
        study = Study(ARMS, judge=range(6), margin=margin, measure="loss")
        finding = study.run(outcomes=said(lambda e, _: values[e.strategy][e.seed]))
        assert (finding.low, finding.high) == pytest.approx(tuple(interval)) and finding.verdict == verdict
    line = f"prox minus plain: loss {finding.difference:+.4g}, 95 % interval {finding.low:+.4g} to {finding.high:+.4g} "
    assert repr(finding) == line + "(Student's t, mean over 6 seeds, paired); above 0.9: not supported"
    back = Study(ARMS, judge=range(6), contrast=("plain", "prox"), measure="loss")
    finding = back.run(outcomes=said(lambda e, _: values[e.strategy][e.seed]))
    assert (-finding.high, -finding.low) == pytest.approx(tuple(interval)) and finding.verdict == "not supported"


def test_a_run_that_diverges_is_a_row_and_counts_as_the_worst():
    @fk.model
    def steep(shape, classes):
        return nn.Sequential(nn.Linear(6, 6), Times(1e38), nn.Linear(6, classes))

    arms = {"plain": SMALL, "wild": SMALL.replace(model="steep", rounds=2)}
    finding = Study(arms, judge=[1, 2]).run()
    wild = finding.table[finding.table.arm == "wild"]
    assert set(wild.status) == {"diverged"} and set(wild.value) == {0.0} and all(wild.note.str.len() > 10)
    assert "2 of 4 runs failed" in repr(finding) and "\n" not in repr(finding)
    finding = Study(arms, judge=[1, 2], measure="loss").run()
    assert (finding.low, finding.high, finding.verdict) == (-np.inf, np.inf, "undecided")
    assert set(finding.table[finding.table.arm == "wild"].value) == {np.inf}


def test_what_cannot_be_run_at_all_is_an_error_and_no_verdict():
    with pytest.raises(ValueError, match=r"^model must be one of .*, got 'cnnn'$"):
        Study({"plain": SMALL, "typo": SMALL.replace(model="cnnn")}, judge=[1, 2]).run()
    with pytest.raises(ValueError, match=r"^arms must be such that they can be run, 'own' is not: normalization must"):
        Study({"plain": SMALL, "own": SMALL.replace(normalization="own")}, judge=[1, 2]).run()
    with pytest.raises(ValueError, match=r"^measure must name a class of blobs \(a, b, c\), got 'd'$"):
        Study(ARMS, judge=[1, 2], measure="recall of d").run()
    with pytest.raises(ValueError, match=r"^measure must return a number, got 'good'$"):
        Study(ARMS, judge=[1, 2], measure=lambda run: "good").run()


def test_a_damaged_store_is_no_outcome(runs_folder):
    study = Study(ARMS, judge=[1, 2])
    study.run()
    for file in runs_folder.glob("*/*.safetensors"):
        file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(StoreError, match="damaged"):
        study.run()


def test_an_interrupted_study_goes_on_where_it_was():
    study, stop = Study(ARMS, RATES, seeds=[1], judge=[2, 3]), Event()
    with pytest.raises(TimeoutError, match="run it again to go on"):
        study.run(stop, progress=lambda done, of, words: done == 3 and stop.set())
    trained = []
    finding = study.run(progress=lambda done, of, words: words == "experiments trained" and trained.append(of))
    assert trained == [1, 4, 4, 4, 4] and len(finding.table) == 8
    trained.clear()
    again = study.run(progress=lambda done, of, words: words == "experiments trained" and trained.append(of))
    assert not trained and again.table.equals(finding.table) and repr(again) == repr(finding)


def test_another_choice_than_before_is_told():
    study = Study(ARMS, RATES, seeds=[1], judge=[2, 3])
    study.run(outcomes=said(lambda e, _: e.lr))
    with pytest.warns(UserWarning, match=r"choice.json held another choice: code, data or outcomes have changed since"):
        study.run(outcomes=said(lambda e, _: -e.lr))


def test_one_file_runs_it_again(tmp_path):
    teacher = SMALL.replace(model="mlp", seed=99)
    arms = {"taught": (SMALL.replace(teacher=teacher), fk.Recipe(dtype="int8")), "alone": SMALL}
    study = Study(arms, {"temperature": np.array([1.0, 4.0])}, [1], range(2, 4), margin=0.01, measure="recall of b")
    study.save(tmp_path / "study.json")
    loaded = Study.load(tmp_path / "study.json")
    assert loaded == study and loaded.digest == study.digest and loaded.tune == {"temperature": [1.0, 4.0]}
    content = (tmp_path / "study.json").read_text()
    (tmp_path / "study.json").write_text(content.replace('"margin": 0.01', '"margin": 0.0'))
    with pytest.raises(ValueError, match=r"study.json holds no study: it was changed after it was written$"):
        Study.load(tmp_path / "study.json")
    with pytest.raises(ValueError, match=r"nothing.json holds no study: "):
        Study.load(tmp_path / "nothing.json")
    with pytest.raises(ValueError, match="measure must be a name to be saved, got the function"):
        Study(ARMS, judge=[1, 2], measure=lambda run: run.accuracy).save(tmp_path / "study.json")


def test_every_field_changes_the_digest():
    base = {"arms": ARMS, "tune": RATES, "seeds": [1], "judge": [2, 3]}
    others = [
        {"arms": {**ARMS, "plain": SMALL.replace(rounds=2)}}, {"tune": {"lr": [0.01]}}, {"seeds": [9]},
        {"judge": [2, 4]}, {"contrast": ["plain", "prox"]}, {"margin": 0.1}, {"measure": "loss"},
        {"measure": lambda run: run.accuracy}, {"measure": lambda run: -run.accuracy},
    ]  # fmt: skip
    assert len({Study(**{**base, **other}).digest for other in [{}, *others]}) == 10


def test_measures_are_those_of_the_file_where_there_is_one_and_of_the_run_elsewhere():
    recipe = fk.Recipe(dtype="int2")
    arms, seeds = {"file": (SMALL, recipe), "run": SMALL}, [1, 2]

    def values(measure):
        table = Study(arms, judge=seeds, measure=measure).run().table
        return [list(table[table.arm == name].value) for name in arms]

    runs = [fk.train(SMALL.replace(seed=seed)) for seed in seeds]
    files = [fk.compress(run, recipe) for run in runs]
    assert values("accuracy") == [[file.accuracy for file in files], [run.accuracy for run in runs]]
    assert values("bytes") == [[f.bytes for f in files], [fk.compress(run, fk.Recipe()).bytes for run in runs]]
    assert values("uplink_bytes") == [[run.uplink_bytes for run in runs]] * 2
    assert values(lambda what: isinstance(what, fk.Artifact)) == [[1, 1], [0, 0]]
    held = runs[0].dataset.validation
    mine = held.y == 1
    answers = [file.predict(held.x[mine]).argmax(1) for file in files]
    correct = [run.records[-1].correct[1] / run.records[-1].total[1] for run in runs]
    assert values("recall of b") == [[(a == 1).mean() for a in answers], correct]
    assert values("loss")[1] == [run.records[-1].loss for run in runs]


def test_what_is_tuned_may_be_a_field_of_the_recipe():
    study = Study(ARMS, {"lr": [0.1], "prune_ratio": [0.9, 0.5]}, seeds=[1], judge=[2, 3])
    finding = study.run(outcomes=said(lambda e, recipe: recipe.prune_ratio * e.lr))
    assert finding.chosen == {name: {"lr": 0.1, "prune_ratio": 0.9} for name in ARMS}
    assert len(finding.table) == 2 * 2 + 2 * 2


def test_a_seed_goes_to_the_parents_that_share_it():
    own, fixed = SMALL.replace(seed=7), SMALL.replace(seed=99)
    child = seeded(SMALL.replace(seed=7, start=own, teacher=fixed), 3)
    assert (child.seed, child.start.seed, child.teacher.seed) == (3, 3, 99)
    assert seeded(SMALL.replace(seed=1, start=SMALL.replace(seed=1, start=own)), 5).start.start == own


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"arms": [SMALL, SMALL]}, "arms must be experiments by name, got "),
        ({"arms": {1: SMALL, 2: SMALL}}, "arms must be experiments by name, got "),
        ({"tune": ["lr"]}, r"tune must be lists of values by field, got \['lr'\]"),
        ({"arms": {"a": SMALL}}, r"contrast must be two of the arms \(a\), got \('a',\)"),
        (
            {"arms": {"a": SMALL, "b": "cnn"}},
            "arms must be an Experiment, or an Experiment and a Recipe, got 'cnn'",
        ),
        ({"tune": {"depth": [1]}}, "tune must name fields of Experiment or Recipe other than seed, got 'depth'"),
        ({"tune": {"seed": [1]}}, "tune must name fields of Experiment or Recipe other than seed, got 'seed'"),
        ({"tune": {"lr": []}}, "tune must give at least one value for lr, got none"),
        ({"tune": {"lr": [0.1, -1.0]}}, r"lr must be above 0 and at most 10, got -1.0 \(arm 'prox'\)"),
        ({"tune": {"clients": [2]}}, r"clients_per_round must be at most clients \(2\), got 4 \(arm 'prox'\)"),
        ({"seeds": []}, r"seeds must be at least 1 different seeds, got \[\]"),
        ({"seeds": [2]}, "judge must be other seeds than those that tune, got 2 in both"),
        ({"judge": [2]}, r"judge must be at least 2 different seeds, got \[2\]"),
        ({"judge": [2, 2]}, r"judge must be at least 2 different seeds, got \[2, 2\]"),
        ({"judge": 3}, "judge must be a list of whole numbers, got 3"),
        ({"judge": [2, 3.5]}, r"judge must be a list of whole numbers, got \[2, 3.5\]"),
        ({"judge": [-2, 3]}, r"seed must be a whole number, at least 0 and at most 4294967295, got -2 \(arm 'prox'\)"),
        ({"contrast": ("prox", "other")}, r"contrast must be two of the arms \(prox, plain\), got \('prox', 'other'\)"),
        ({"contrast": ("prox", "prox")}, "contrast must be two of the arms"),
        ({"margin": float("nan")}, "margin must be a number, got nan"),
        ({"margin": "1"}, "margin must be a number, got '1'"),
        ({"measure": "f1"}, "measure must be a function or one of accuracy, recall of <class>, loss, .*, got 'f1'"),
    ],
)
def test_a_wrong_plan_is_one_line_that_names_the_field(wrong, words):
    plan = {"arms": ARMS, "tune": RATES, "seeds": [1], "judge": [2, 3], **wrong}
    with pytest.raises(ValueError, match=f"^{words}") as caught:
        Study(**plan)
    assert "\n" not in str(caught.value)
