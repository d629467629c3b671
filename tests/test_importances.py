"""Importances of searches whose surface is known."""

import numpy as np
import pytest

from raylab.base.mistakes import JobError
from raylab.job.designs import order_space
from raylab.job.settings import list_settings, with_settings
from raylab.results.tables import now, write_rows
from raylab.statistics.importances import compute_importances, list_importances

FLAT = {
    "pretrain.learning_rate": {"low": 1e-5, "high": 1e-2, "log": True},
    "pretrain.weight_decay": {"low": 0.0, "high": 0.3},
}
CONDITIONAL = {
    "pretrain.objective": ["mlm", "declutr"],
    "pretrain.weight_decay": {"low": 0.0, "high": 0.3},
    "pretrain.declutr.temperature": {"low": 0.01, "high": 1.0, "log": True},
    "pretrain.declutr.sampling": ["any", "adjacent"],
}


@pytest.fixture
def make(make_job):
    def build(space, num_arms=40, targets=None):
        search = {
            "design": "random",
            "num_arms": num_arms,
            "space": space,
            "targets": targets or [{"task": "severity"}],
        }
        return make_job("declutr", {"search": search})

    return build


def draw_points(job, num, seed=0):
    """Points of the space by chance, in the order of the settings."""
    import optuna

    from raylab.search.samplers import suggest_point

    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    return [suggest_point(study.ask(), job) for _ in range(num)]


def share(rows, method, setting, within=""):
    [row] = [r for r in rows if (r.method, r.setting, r.within) == (method, setting, within)]
    return row.importance


def test_what_decides_the_value_is_the_most_important_in_both_methods(make):
    job = make(FLAT)
    points = draw_points(job, 60)
    found = [(values, -abs(np.log10(values["pretrain.learning_rate"] / 3e-4))) for values in points]
    rows = compute_importances(job, found, mode="max", target="severity f1_macro")
    for method in ("fANOVA", "PED-ANOVA"):
        assert share(rows, method, "pretrain.learning_rate") > 0.8
        assert sum(row.importance for row in rows if row.method == method) == pytest.approx(1)
    assert all("not an ablation" in row.meaning and row.num_arms == 60 for row in rows)
    assert rows == compute_importances(job, found, mode="max", target="severity f1_macro")


def test_lower_may_be_better(make):
    """The best tenth are the lowest ones: of a value that only there hangs on the rate."""
    job = make(FLAT)
    found = []
    for values in draw_points(job, 100):
        low = values["pretrain.learning_rate"] < 2e-5
        found.append((values, -5.0 if low else values["pretrain.weight_decay"]))
    rows = compute_importances(job, found, mode="min", target="x")
    assert share(rows, "PED-ANOVA", "pretrain.learning_rate") > share(rows, "PED-ANOVA", "pretrain.weight_decay")


def test_what_only_some_arms_read_is_compared_among_those(make):
    job = make(CONDITIONAL)
    points = draw_points(job, 120)
    found = []
    for values in points:
        temperature = values.get("pretrain.declutr.temperature")
        found.append((values, 0.0 if temperature is None else -abs(np.log10(temperature / 0.1))))
    rows = compute_importances(job, found, mode="max", target="x")
    whole = {row.setting for row in rows if row.method == "fANOVA" and not row.within}
    assert whole == {"pretrain.objective", "pretrain.weight_decay"}
    assert share(rows, "fANOVA", "pretrain.declutr.temperature", "objective=declutr") > 0.8
    assert {row.num_arms for row in rows if row.within} == {sum("declutr" in p["pretrain.objective"] for p in points)}
    # Arms of mlm read nothing that the others don't: they have no part of their own.
    assert {row.within for row in rows} == {"", "objective=declutr"}
    ped = {row.setting for row in rows if row.method == "PED-ANOVA"}
    assert ped == set(order_space(job))


def test_a_part_of_several_objectives_is_not_taken_for_all_arms(make):
    space = {"pretrain.objective": ["none", "mlm", "declutr"], "pretrain.learning_rate": FLAT["pretrain.learning_rate"],
             "pretrain.weight_decay": FLAT["pretrain.weight_decay"]}  # fmt: skip
    job = make(space)
    found = [(values, float(number)) for number, values in enumerate(draw_points(job, 60))]
    trained = [values for values, _ in found if values["pretrain.objective"] != "none"]
    rows = compute_importances(job, found, mode="max", target="x")
    sizes = {(row.within, row.num_arms) for row in rows if row.method == "fANOVA"}
    assert sizes == {("", 60), ("those that read learning_rate, weight_decay", len(trained))}
    share(rows, "fANOVA", "pretrain.objective")  # one row: those of the part bear its name


def write_search(job, folder, num, value_of):
    for number, values in enumerate(draw_points(job, num)):
        row = {
            **list_settings(with_settings(job, values)), "arm": f"arm{number}", "seed": 0, "phase": "search",
            "status": "complete", "rung": 1, "num_rungs": 1, "started_at": now(), "target_values": value_of(values),
        }  # fmt: skip
        write_rows(folder, job.name, "trials", f"arm{number}-0", [row])


def test_importances_are_read_from_the_tables_for_each_target(make, tmp_path):
    targets = [{"task": "severity"}, {"task": "severity", "metric": "accuracy"}]
    job = make(FLAT, targets=targets)
    write_search(job, tmp_path, 40, lambda v: [np.log10(v["pretrain.learning_rate"]), v["pretrain.weight_decay"]])
    rows = list_importances(tmp_path, job)
    first = {(row.target, row.method): row.setting for row in reversed(rows)}
    assert first == {
        (f"severity {metric}", method): f"pretrain.{setting}"
        for metric, setting in (("f1_macro", "learning_rate"), ("accuracy", "weight_decay"))
        for method in ("fANOVA", "PED-ANOVA")
    }


def test_equal_values_have_no_importances(make, tmp_path):
    job = make(FLAT)
    write_search(job, tmp_path, 20, lambda v: [0.5])
    with pytest.raises(JobError, match="all arms of tiny have the same value"):
        list_importances(tmp_path, job)
    # Nor a part of the space whose arms are all alike.
    job = make(CONDITIONAL)
    found = [
        (v, 0.0 if "pretrain.declutr.temperature" in v else v["pretrain.weight_decay"]) for v in draw_points(job, 60)
    ]
    rows = compute_importances(job, found, mode="max", target="x")
    assert {row.within for row in rows} == {""}


def test_few_arms_and_fixed_designs_are_refused(make, make_job, tmp_path):
    job = make(FLAT)
    write_search(job, tmp_path, 5, lambda v: [0.5])
    with pytest.raises(JobError, match="5 arms of tiny ran to the end; 10 are needed at least"):
        list_importances(tmp_path, job)
    with pytest.raises(JobError, match=r"is no search \(grid\); its settings have effects instead"):
        list_importances(tmp_path, make_job("mlm"))
