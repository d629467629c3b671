"""The declared comparison: what it may say, and what is refused."""

import pytest

from raylab.base.mistakes import JobError
from raylab.evaluation.baselines import BASELINES as KNOWN
from raylab.job.jobs import check_job, dump_yaml, load_job
from raylab.job.primary import BASELINES, read_primary
from raylab.job.settings import dump_job, list_settings, resolve_target
from raylab.job.specs import Job

SPACE = {"pretrain.objective": ["none", "mlm", "declutr"]}
SPANS = {"pretrain.declutr.temperature": [0.05, 0.1], "pretrain.declutr.num_anchors": [1, 2]}


@pytest.fixture
def make(make_job):
    """`make("objective=mlm vs base")`: a job that declares it, of a grid over objectives, or another search."""

    def build(primary, search=None, objective="declutr", evaluate=None):
        search = {"design": "grid", "space": SPACE, **(search or {})}
        changes = {"evaluate": evaluate or {"shots": [2, 4, "full"], "frozen_layers": ["all", "1"]}}
        return make_job(objective, {"search": search, "analysis": {"primary": primary}, **changes})

    return build


def refuse(make, *arguments, **options):
    with pytest.raises(JobError) as refused:
        make(*arguments, **options)
    return refused.value.problems


def test_arms_and_cell_are_read(make):
    job = make("objective=declutr vs objective=mlm at shots=4, frozen_layers=1")
    a, b, target = read_primary(job, job.analysis.primary)
    assert (a.values, b.values) == ({"pretrain.objective": "declutr"}, {"pretrain.objective": "mlm"})
    assert resolve_target(job, target) == {
        "task": "severity", "metric": "f1_macro", "class": None, "shots": 4, "frozen_layers": "1", "probe": "mlp"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "a", "b"),
    [
        ("pretrain.objective=mlm vs base", {"pretrain.objective": "mlm"}, {"pretrain.objective": "declutr"}),
        ("objective = none  vs  baseline:tfidf", {"pretrain.objective": "none"}, {}),
    ],
)
def test_ways_to_name_an_arm(make, text, a, b):
    declared = read_primary(make(text), text)
    assert (declared.a.values, declared.b.values) == (a, b)


def test_the_cell_is_that_of_the_first_target_where_it_is_not_said(make):
    target = {"task": "severity", "metric": "accuracy", "shots": 4, "frozen_layers": "1"}
    job = make("objective=declutr vs base at shots=full", {"targets": [target]}, objective="mlm")
    cell = resolve_target(job, read_primary(job, job.analysis.primary).target)
    assert (cell["metric"], cell["shots"], cell["frozen_layers"]) == ("accuracy", None, "1")


def test_what_is_not_named_is_as_in_the_base_arm(make):
    factorial = {"design": "factorial", "space": SPANS}
    job = make("temperature=0.1 vs base", factorial)
    declared = read_primary(job, job.analysis.primary)
    assert (declared.a.values, declared.b.values) == (
        {"pretrain.declutr.temperature": 0.1, "pretrain.declutr.num_anchors": 2},
        {"pretrain.declutr.num_anchors": 2, "pretrain.declutr.temperature": 0.05},
    ) or (declared.a.values, declared.b.values) == ({"pretrain.declutr.temperature": 0.1}, {})
    grid = {
        "design": "grid",
        "space": {"pretrain.declutr.temperature": [0.1, 0.2], "pretrain.declutr.max_span": [20, 22]},
    }
    [problem] = refuse(make, "temperature=0.1 vs temperature=0.2, max_span=20", grid)
    assert problem == (
        "analysis.primary: 'temperature=0.1': 2 arms fit, none with all else as in the base arm; name max_span too"
    )
    make("temperature=0.1, max_span=20 vs temperature=0.2, max_span=20", grid)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("objective=mlm", "'objective=mlm' does not name two arms; write ARM vs ARM"),
        ("base vs base", "'base' and 'base' are the same arm; name two"),
        ("objective=declutr vs base", "are the same arm; name two"),
        ("objectiv=mlm vs base", "'objectiv' is not searched, so no arms differ in it; did you mean 'objective'?"),
        ("max_span=24 vs base", "'max_span' is not searched, so no arms differ in it; searched: pretrain.objective"),
        ("objective=decluttr vs base", "objective=decluttr: no arm has it; did you mean 'declutr'?"),
        ("objective vs base", "'objective' is not KEY=VALUE"),
        ("objective=mlm, objective=none vs base", "'objective' is named twice"),
        ("winner vs base", "'winner' is the best arm of a search, and design grid is none"),
        ("baseline:tf vs base", "'baseline:tf' is no baseline; did you mean 'baseline:tfidf'?"),
        ("objective=mlm vs base at shot=2", "'shot' is no part of a cell; did you mean 'shots'?"),
        ("objective=mlm vs base at shots=many", "shots=many: must be a number above 0, or full"),
        ("objective=mlm vs base at shots=3", "analysis.primary.shots: 3 is not evaluated; valid: "),
        ("objective=mlm vs base at frozen_layers=2", "analysis.primary.frozen_layers: '2' is not evaluated"),
        ("objective=mlm vs base at task=severe", "analysis.primary.task: 'severe' is not evaluated; did you mean"),
        (
            "objective=mlm vs base at metric=f1_makro",
            "analysis.primary.metric: 'f1_makro' is not measured; did you mean",
        ),
        ("objective=mlm vs base at shots=2 at shots=4", "says 'at' twice"),
    ],
)
def test_a_wrong_declaration_is_refused_with_the_nearest_name(make, text, problem):
    [line] = refuse(make, text)
    assert line.startswith("analysis.primary")
    assert problem in line


def test_all_mistakes_are_told_at_once(make):
    assert len(refuse(make, "objectiv=mlm vs objective=nun at shot=2")) == 3
    assert len(refuse(make, "objectiv=mlm vs objective=nun at shots=3, task=severe")) == 4


def test_a_search_takes_values_of_its_space_and_its_winner(make):
    search = {
        "design": "tpe", "num_arms": 4, "targets": [{"task": "severity"}], "confirm": {"top": 2, "seeds": [5, 6]},
        "space": {"pretrain.learning_rate": {"low": 1e-5, "high": 1e-3, "log": True}, **SPACE},
    }  # fmt: skip
    job = make("winner vs base", search)
    assert [arm.special for arm in read_primary(job, job.analysis.primary)[:2]] == ["winner", None]
    make("objective=mlm, learning_rate=1e-4 vs base", search)
    [problem] = refuse(make, "learning_rate=1 vs base", search)
    assert problem == "analysis.primary: learning_rate=1: no arm has it; from 1e-05 to 0.001"


def test_an_inherited_declaration_that_does_not_fit_names_its_removal(make, tmp_path):
    (tmp_path / "base.yaml").write_text(dump_yaml(make("objective=mlm vs base")))
    variant = "base: base.yaml\nsearch: {space: null}\n"
    (tmp_path / "variant.yaml").write_text(variant + "pretrain: {weight_decay: 0.2}\n")
    with pytest.raises(JobError) as refused:
        load_job(tmp_path / "variant.yaml")
    where = "analysis.primary: "
    assert refused.value.problems[-1] == (
        f"{where}is of the job without these changes; name what it has, or write 'analysis: null'"
    )
    (tmp_path / "variant.yaml").write_text(variant + "analysis: null\n")
    assert load_job(tmp_path / "variant.yaml").analysis.primary is None
    (tmp_path / "variant.yaml").write_text(variant + "analysis: {primary: objectiv=mlm vs base}\n")
    with pytest.raises(JobError) as refused:
        load_job(tmp_path / "variant.yaml")
    assert not any("without these changes" in problem for problem in refused.value.problems)


def test_an_override_that_a_declaration_does_not_fit_names_its_removal(make, tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text(dump_yaml(make("objective=mlm vs base at shots=4")))
    with pytest.raises(JobError) as refused:
        load_job(path, overrides={"evaluate.shots": [2]})
    assert refused.value.problems[0].startswith("analysis.primary.shots: 4 is not evaluated; valid: 2")
    assert refused.value.problems[-1].endswith("name what it has, or write 'analysis: null'")
    for name in ("analysis", "analysis.primary"):
        assert load_job(path, overrides={"evaluate.shots": [2], name: None}).analysis.primary is None
    with pytest.raises(JobError) as refused:
        load_job(path, overrides={"analysis.primary": "objective=mln vs base"})
    assert len(refused.value.problems) == 1


def test_the_declaration_is_kept_with_the_job_and_is_no_setting(make, tmp_path):
    job = make("objective=mlm vs base")
    (tmp_path / "job.yaml").write_text(dump_yaml(job))
    assert load_job(tmp_path / "job.yaml").analysis == job.analysis
    assert check_job(dump_job(job)) == job
    assert list_settings(job) == list_settings(make(None))
    assert "family" in Job.model_json_schema()["$defs"]["Analysis"]["properties"]


def test_the_baselines_named_are_those_that_run():
    assert set(BASELINES) == set(KNOWN)
