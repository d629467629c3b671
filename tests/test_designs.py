"""Which arms a fixed design has: its points listed, without running any."""

import typing

import pytest

from raylab.base.identity import name_arm
from raylab.base.mistakes import JobError
from raylab.job.designs import FIXED, check_design, count_trials, list_changes, list_levels, list_points
from raylab.job.settings import list_settings, with_settings
from raylab.job.specs import ADAPTIVE, Search
from raylab.search.samplers import SAMPLERS

RATE, SPAN = "pretrain.learning_rate", "pretrain.declutr.max_span"


def make_design(make_job, design, space, changes=None):
    return make_job("declutr", {"search": {"design": design, "space": space}, **(changes or {})})


def make_grid(make_job, space, changes=None):
    return make_design(make_job, "grid", space, changes)


def name_point(job, values):
    changed = with_settings(job, values)
    return name_arm(list_settings(changed), data_digest="d", encoder_digest="e", searched=job.search.space)


def test_every_design_is_fixed_or_has_a_sampler():
    named = set(typing.get_args(Search.model_fields["design"].annotation))
    assert named == {*FIXED, *SAMPLERS}
    assert set(ADAPTIVE) == set(SAMPLERS)


# Grids


def test_a_grid_lists_conditional_points_once_and_in_order(make_job):
    space = {
        "pretrain.objective": ["none", "mlm", "declutr"],
        "pretrain.learning_rate": [1e-4, 1e-3],
        "pretrain.declutr.max_span": {"low": 8, "high": 24, "step": 8},
        "pretrain.declutr.sampling": {"choices": ["any", "adjacent"], "when": {"pretrain.declutr.max_span": [8, 24]}},
    }
    expected = [{"pretrain.objective": "none"}]
    expected += [{"pretrain.objective": "mlm", "pretrain.learning_rate": rate} for rate in (1e-4, 1e-3)]
    for rate in (1e-4, 1e-3):
        for span in (8, 16, 24):
            point = {
                "pretrain.objective": "declutr", "pretrain.learning_rate": rate, "pretrain.declutr.max_span": span
            }  # fmt: skip
            expected += (
                [point] if span == 16 else [{**point, "pretrain.declutr.sampling": s} for s in ("any", "adjacent")]
            )
    assert list(list_points(make_grid(make_job, space))) == expected


def test_the_order_in_the_file_does_not_hide_a_setting(make_job):
    space = {"pretrain.declutr.max_span": [16, 24], "pretrain.objective": ["mlm", "declutr"]}
    points = list(list_points(make_grid(make_job, space)))
    assert points == [
        {"pretrain.objective": "mlm"},
        {"pretrain.objective": "declutr", "pretrain.declutr.max_span": 16},
        {"pretrain.objective": "declutr", "pretrain.declutr.max_span": 24},
    ]


def test_a_condition_on_a_setting_that_is_not_read_does_not_hold(make_job):
    space = {
        "pretrain.objective": ["mlm", "declutr"],
        "pretrain.declutr.max_span": [16, 24],
        "pretrain.learning_rate": {"choices": [1e-4, 1e-3], "when": {"pretrain.declutr.max_span": 24}},
    }
    points = list(list_points(make_grid(make_job, space)))
    assert points[0] == {"pretrain.objective": "mlm"}
    assert [len(point) for point in points] == [1, 2, 3, 3]


def test_stepped_ranges_hold_the_listed_values(make_job):
    space = {
        "pretrain.warmup_fraction": {"low": 0.1, "high": 0.35, "step": 0.1},
        "pretrain.declutr.num_positives": {"low": 1, "high": 3},
    }
    points = list(list_points(make_grid(make_job, space)))
    assert [tuple(point.values()) for point in points] == [(w, n) for w in (0.1, 0.2, 0.3) for n in (1, 2, 3)]
    assert all(isinstance(point["pretrain.declutr.num_positives"], int) for point in points)


# Around the base arm: the tiny job's DeCLUTR has a learning rate of 1e-3, spans to 24, 2 anchors and 2 positives


def test_one_factor_is_the_base_and_each_other_value_alone(make_job):
    space = {
        SPAN: [16, 24, 32],
        "pretrain.declutr.num_positives": {"low": 1, "high": 3},
        "pretrain.objective": ["mlm", "declutr"],
        "evaluate.frozen_layers": ["all", "none"],
    }
    job = make_design(make_job, "one_factor", space)
    assert list(list_points(job)) == [
        {},
        {SPAN: 16},
        {SPAN: 32},
        {"pretrain.declutr.num_positives": 1},
        {"pretrain.declutr.num_positives": 3},
        {"pretrain.objective": "mlm"},
        {"evaluate.frozen_layers": "none"},
    ]
    assert len({name_point(job, point) for point in list_points(job)}) == 7


def test_one_factor_takes_a_condition_that_the_base_meets(make_job):
    entry = {"choices": [1e-4], "when": {"pretrain.objective": "declutr"}}
    job = make_design(make_job, "one_factor", {"pretrain.objective": ["mlm", "declutr"], RATE: entry})
    assert list(list_points(job)) == [{}, {"pretrain.objective": "mlm"}, {RATE: 1e-4}]


def test_leave_one_out_is_the_base_and_an_arm_without_each_component(make_job):
    space = {"pretrain.mlm.weight": [0.0], "pretrain.declutr.num_positives": [1], "pretrain.weight_decay": [0.0]}
    points = list(list_points(make_design(make_job, "leave_one_out", space)))
    assert points == [{}, *({name: values[0]} for name, values in space.items())]


def test_a_factorial_crosses_all_levels_the_bases_among_them(make_job):
    space = {SPAN: [16, 32], RATE: [1e-3, 1e-4], "pretrain.weight_decay": {"low": 0.0, "high": 0.2, "step": 0.1}}
    job = make_design(make_job, "factorial", space)
    assert [list_levels(job, name) for name in space] == [[24, 16, 32], [1e-3, 1e-4], [0.0, 0.1, 0.2]]
    points = list(list_points(job))
    assert len(points) == len({name_point(job, point) for point in points}) == 3 * 2 * 3
    settings = [list_settings(with_settings(job, point)) for point in points]
    crossed = [tuple(row[name] for name in space) for row in settings]
    assert crossed == [(s, r, d) for s in (24, 16, 32) for r in (1e-3, 1e-4) for d in (0.0, 0.1, 0.2)]
    base = list_settings(job)
    assert all(row == base | point for row, point in zip(settings, points, strict=True))


def test_a_start_is_crossed_with_that_of_the_base(make_job):
    """The base arm's encoder is from scratch: it has no name that could be given."""
    job = make_design(make_job, "factorial", {"encoder.pretrained": ["some/model"], "pretrain.objective": ["mlm"]})
    assert list(list_points(job)) == [
        {},
        {"pretrain.objective": "mlm"},
        {"encoder.pretrained": "some/model"},
        {"encoder.pretrained": "some/model", "pretrain.objective": "mlm"},
    ]
    assert with_settings(job, {"encoder.pretrained": "some/model"}).encoder.config is None


def test_values_that_say_the_same_as_the_base_are_no_change(make_job):
    space = {"evaluate.frozen_layers": ["all", ["all"], "none"], "pretrain.mlm.weight": [1, 2]}
    job = make_design(make_job, "one_factor", space)
    assert [list_changes(job, name) for name in space] == [["none"], [2]]
    grid = make_grid(make_job, space)
    assert list_levels(grid, "evaluate.frozen_layers") == ["all", ["all"], "none"]


# What is refused: design, space, and what stands in the only line
REFUSED = {
    "a setting that the base's objective does not read": (
        "one_factor", {"pretrain.objective": ["declutr", "metadata"], "pretrain.metadata.weight": [0.5]},
        ["pretrain.metadata.weight: the base arm does not read it", "or use grid"],
    ),
    "a condition that the base does not meet": (
        "one_factor",
        {SPAN: [16, 24], RATE: {"choices": [1e-4], "when": {SPAN: 16}}},
        [f"{RATE}: the base arm does not read it", "change the base so that it does"],
    ),
    "a component with two values": (
        "leave_one_out", {"pretrain.mlm.weight": [0.0, 0.5]}, ["pretrain.mlm.weight: leave_one_out takes one value"],
    ),
    "a component with a range": (
        "leave_one_out", {"pretrain.declutr.num_positives": {"low": 1, "high": 2}},
        ["pretrain.declutr.num_positives: leave_one_out takes one value", "list only that"],
    ),
    "a component that the base leaves out already": (
        "leave_one_out", {"pretrain.declutr.num_positives": [2]}, ["2 is the base arm's own value", "name another"],
    ),
    "a component that the base does not read": (
        "leave_one_out", {"pretrain.objective": ["metadata"], "pretrain.metadata.weight": [0.5]},
        ["pretrain.metadata.weight: the base arm does not read it", "leave_one_out changes one"],
    ),
    "a factorial with a condition": (
        "factorial",
        {"pretrain.objective": ["mlm", "declutr"], RATE: {"choices": [1e-4], "when": {"pretrain.objective": "mlm"}}},
        [f"{RATE}: a factorial crosses every setting", "remove its 'when', or use grid"],
    ),
    "a factorial with a setting that one objective does not read": (
        "factorial", {SPAN: [16], "pretrain.objective": ["mlm", "declutr"]},
        [f"{SPAN}: is not read where pretrain.objective is 'mlm'", "use grid"],
    ),
    "a factorial with a setting that the base's objective does not read": (
        "factorial", {"pretrain.metadata.weight": [0.5], "pretrain.objective": ["metadata"]},
        ["pretrain.metadata.weight: is not read where pretrain.objective is 'declutr'", "use grid"],
    ),
    "a factorial with a setting that one loss does not read": (
        "factorial",
        {"pretrain.metadata.loss": ["cross_entropy", "supervised_contrastive"], "pretrain.metadata.temperature": [0.2]},
        ["pretrain.metadata.temperature: is not read where pretrain.metadata.loss is 'cross_entropy'", "use grid"],
    ),
    "a factorial with what only fine-tuning reads": (
        "factorial", {"evaluate.frozen_layers": ["all", "none"], "evaluate.fine_tune.steps": [7]},
        ["evaluate.fine_tune.steps: is not read where evaluate.frozen_layers is", "use grid"],
    ),
    "a range that can't be listed": (
        "one_factor", {RATE: {"low": 1e-4, "high": 1e-3}}, [f"{RATE}: design one_factor needs 'choices'"],
    ),
    "a space that is not there": ("factorial", {}, ["search: design 'factorial' needs 'space'"]),
    "an odd setting": ("factorial", {"pretrain.objectiv": ["mlm"]}, ["did you mean 'pretrain.objective'?"]),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_space_that_does_not_fit_its_design_is_refused(make_job, case):
    design, space, parts = REFUSED[case]
    metadata = {"pretrain.metadata.field": "category"} if "metadata" in str(space) else {}
    if "loss" in case:
        metadata["pretrain.objective"] = "metadata"
    with pytest.raises(JobError) as caught:
        make_design(make_job, design, space, metadata)
    (line,) = caught.value.problems
    assert line.startswith("search")
    assert all(part in line for part in parts), line


def test_what_does_not_fit_around_the_base_fits_a_grid(make_job):
    """Every space refused above for its design alone: the fix that the line names is one."""
    for design, space, parts in REFUSED.values():
        if any("grid" in part for part in parts):
            changes = {"pretrain.metadata.field": "category"} if "metadata" in str(space) else {}
            if "pretrain.metadata.loss" in space:
                changes["pretrain.objective"] = "metadata"
            job = make_grid(make_job, space, changes)
            assert design != "grid"
            assert check_design(job) == []
            assert list(list_points(job))


def test_trials_are_counted_with_the_confirmation(make_job):
    assert count_trials(make_grid(make_job, {RATE: [1e-4]}, {"search.seeds": [0, 1, 2]}), 5) == 15
    search = {
        "design": "tpe", "num_arms": 4, "targets": [{"task": "severity"}], "space": {RATE: [1e-4]}, "seeds": [0, 1],
        "confirm": {"top": 3, "seeds": [5, 6]},
    }  # fmt: skip
    assert count_trials(make_job("declutr", {"search": search}), 4) == 4 * 2 + (3 + 1) * 2
    assert count_trials(make_job("declutr", {"search": search}), 2) == 2 * 2 + (2 + 1) * 2
