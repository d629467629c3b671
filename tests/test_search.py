"""The search driven by hand: trials are rows written to the tables, nothing is trained and Ray is not needed."""

import datetime
import itertools
import math
import warnings

import numpy as np
import pytest

from raylab.base.identity import name_arm
from raylab.base.mistakes import JobError
from raylab.job.designs import list_points
from raylab.job.settings import list_measures, list_settings, with_settings
from raylab.job.specs import ADAPTIVE
from raylab.results.tables import list_trials, read_trial, write_rows
from raylab.search.search import MOST_HELD, MOST_REPEATS, Search, is_current, list_refused, name_refused, read_values

START = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
SECONDS = itertools.count()
TARGET = {"task": "severity"}
SURFACE = {
    "pretrain.learning_rate": {"low": 1e-5, "high": 1e-2, "log": True},
    "pretrain.declutr.temperature": {"low": 0.01, "high": 1.0, "log": True},
}
BASE = {"pretrain.learning_rate": 1e-5, "pretrain.declutr.temperature": 1.0}  # the worst of it


def compute_surface(values):
    """Best, 0, at a learning rate of 1e-3 and a temperature of 0.05."""
    values = BASE | values
    return -(math.log10(values["pretrain.learning_rate"] / 1e-3) ** 2) - (
        math.log10(values["pretrain.declutr.temperature"] / 0.05) ** 2
    )


class Driver:
    """A sweep without trials: each request becomes a row of `trials` with the value that `measure` gives."""

    def __init__(self, job, results, measure=lambda request: compute_surface(request.values)):
        self.job, self.results, self.measure = job, results, measure
        self.requests, self.refused = [], []
        self.rebuild()

    def rebuild(self):
        """The search as a process that was started just now has it."""
        self.search = Search(self.job, self.results, self.name_point, self.record)

    def record(self, request, error):
        """As a sweep does: a row for a point that can't work."""
        self.refused.append((request, error))
        row = {
            **list_refused(self.job, request.values), "arm": request.arm, "phase": request.phase,
            "seed": request.seed, "status": "infeasible", "error": error,
            "started_at": START + datetime.timedelta(seconds=next(SECONDS)),
        }  # fmt: skip
        write_rows(self.results, self.job.name, "trials", f"{request.arm}-{request.seed}", [row])

    def name_point(self, values):
        job = with_settings(self.job, values)
        return name_arm(
            list_settings(job), data_digest="data", encoder_digest="encoder", searched=self.job.search.space
        )

    def write(self, request, status, value=None, rung=1, **columns):
        trial_id = f"{request.arm}-{request.seed}"
        known = read_trial(self.results, self.job.name, trial_id)
        started = START + datetime.timedelta(seconds=next(SECONDS))
        row = {
            **list_measures(with_settings(self.job, request.values)),
            "arm": request.arm,
            "phase": request.phase,
            "seed": request.seed,
            "status": status,
            "rung": rung,
            "num_rungs": 2,
            "target_values": list(value) if isinstance(value, tuple) else [value],
            "started_at": known["started_at"] if known else started,
            **columns,
        }
        write_rows(self.results, self.job.name, "trials", trial_id, [row])
        return trial_id, read_trial(self.results, self.job.name, trial_id)

    def next(self):
        request = self.search.next_request()
        if request is not None:
            self.requests.append(request)
        return request

    def finish(self, request, status="complete", value=None, rung=2):
        value = self.measure(request) if value is None and status in ("complete", "stopped") else value
        self.search.finish(*self.write(request, status, value, rung))

    def run(self, most=10_000):
        """Every trial, one after another; the requests of this call."""
        before = len(self.requests)
        for _ in range(most):
            try:
                request = self.next()
            except StopIteration:
                break
            self.finish(request)
        return self.requests[before:]

    def list_done(self):
        rows = list_trials(self.results, self.job.name)
        return sorted((row["arm"], row["seed"], row["phase"]) for row in rows if row["status"] == "complete")


@pytest.fixture
def make_driver(make_job, tmp_path):
    """`make_driver({"search.num_arms": 4})`: a search over the surface, DeCLUTR, without any trial yet."""

    def make(changes=None, folder=tmp_path, **arguments):
        search = {"design": "random", "num_arms": 4, "targets": [TARGET], "space": SURFACE}
        changes = {"search": search, **(changes or {})}
        return Driver(make_job("declutr", changes), folder, **arguments)

    return make


def drain(search):
    """What is asked for before anything has finished."""
    found = []
    while True:
        try:
            request = search.next_request()
        except StopIteration:
            return found
        if request is None:
            return found
        found.append(request)


def make_grid(make_job, space, changes=None):
    return make_job("declutr", {"search": {"design": "grid", "space": space}, **(changes or {})})


# Points


def test_a_grid_is_asked_for_as_it_is_listed(make_job, tmp_path):
    space = {
        "pretrain.objective": ["mlm", "declutr"],
        "pretrain.warmup_fraction": {"low": 0.1, "high": 0.35, "step": 0.1},
        "pretrain.declutr.num_positives": {"low": 1, "high": 3, "when": {"pretrain.objective": "declutr"}},
    }
    job = make_grid(make_job, space, {"search.seeds": [3, 1]})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        requests = drain(Driver(job, tmp_path).search)
    points = list(list_points(job))
    assert len(points) == 12
    assert [request.values for request in requests] == [point for point in points for _ in range(2)]
    assert [request.seed for request in requests] == [3, 1] * 12
    assert {request.phase for request in requests} == {"fixed"}
    assert len({request.arm for request in requests}) == 12


def test_lists_are_choices(make_job, tmp_path):
    space = {"evaluate.shots": [[2], [2, 4], ["full"]], "evaluate.frozen_layers": ["all", "none"]}
    driver = Driver(make_grid(make_job, space), tmp_path, lambda request: 0.5)
    points = list(list_points(driver.job))
    assert [request.values for request in driver.run()] == points
    assert len(points) == 6
    for row in list_trials(tmp_path, "tiny"):
        assert read_values(driver.job, row) in points
    driver.rebuild()
    assert driver.run() == []


@pytest.mark.parametrize("design", ADAPTIVE)
def test_values_lie_in_their_ranges(make_driver, design):
    space = {
        "pretrain.learning_rate": {"low": 1e-5, "high": 1e-2, "log": True},
        "pretrain.declutr.num_positives": {"low": 1, "high": 9, "step": 2},
        "pretrain.declutr.max_span": {"low": 8, "high": 24, "log": True},
        "pretrain.weight_decay": {"low": 0.0, "high": 0.25, "step": 0.1},
        "pretrain.warmup_fraction": {"low": 0.0, "high": 0.5},
    }
    driver = make_driver(
        {"search": {"design": design, "num_arms": 40, "targets": [TARGET], "space": space},
         "pretrain.declutr.num_anchors": 1, "pretrain.num_tokens": 20_000},
        measure=lambda request: float(np.sin(request.seed)),
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        values = [request.values for request in driver.run()]
    assert len(values) == 40
    rates = np.array([point["pretrain.learning_rate"] for point in values])
    assert rates.min() >= 1e-5
    assert rates.max() <= 1e-2
    assert (rates < 1e-4).mean() > 0.1  # a log range: a linear one has 1 % there
    assert {point["pretrain.declutr.num_positives"] for point in values} <= {1, 3, 5, 7, 9}
    assert {point["pretrain.weight_decay"] for point in values} == {0.0, 0.1, 0.2}
    spans = {point["pretrain.declutr.max_span"] for point in values}
    assert spans <= set(range(8, 25))
    assert all(isinstance(span, int) for span in spans)
    assert all(0 <= point["pretrain.warmup_fraction"] <= 0.5 for point in values)


# Samplers


@pytest.mark.parametrize("design", ADAPTIVE)
def test_a_sampler_seed_reproduces_a_search(make_driver, tmp_path, design):
    def run(seed, folder):
        changes = {"search.design": design, "search.sampler_seed": seed, "search.num_arms": 12}
        return [request.values for request in make_driver(changes, tmp_path / folder).run()]

    first = run(0, "a")
    assert run(0, "b") == first
    assert run(1, "c") != first
    assert len({str(values) for values in first}) == 12


def test_tpe_beats_random(make_driver, tmp_path):
    best = {
        design: [
            max(
                compute_surface(request.values)
                for request in make_driver(
                    {"search.design": design, "search.sampler_seed": seed, "search.num_arms": 25},
                    tmp_path / f"{design}{seed}",
                ).run()
            )
            for seed in range(8)
        ]
        for design in ("tpe", "random")
    }
    assert np.mean(best["tpe"]) > np.mean(best["random"])
    assert np.sum(np.array(best["tpe"]) > best["random"]) >= 5
    assert np.mean(best["tpe"]) > -0.03


def test_minimise(make_driver, tmp_path):
    """The same search of the negated surface is the mirror image: the same points, the same arms confirmed."""
    runs = {}
    for mode, sign in (("max", 1), ("min", -1)):
        driver = make_driver(
            {
                "search.design": "tpe",
                "search.num_arms": 15,
                "search.targets": [{**TARGET, "mode": mode}],
                "search.confirm": {"top": 2, "seeds": [5]},
            },
            tmp_path / mode,
            measure=lambda request, sign=sign: sign * (compute_surface(request.values) if request.values else -9.0),
        )
        runs[mode] = [(request.values, request.phase) for request in driver.run()]
    assert runs["min"] == runs["max"]
    best = sorted(runs["min"][:15], key=lambda pair: -compute_surface(pair[0]))[:2]
    assert [values for values, phase in runs["min"] if phase == "confirm"] == [*(values for values, _ in best), {}]


def test_an_arm_is_worth_the_mean_of_its_seeds_told_once(make_driver):
    driver = make_driver({"search.seeds": [0, 1], "search.num_arms": 2})
    first, second = driver.next(), driver.next()
    assert first.arm == second.arm
    told = lambda: [trial.value for trial in driver.search.study.get_trials() if trial.state.name == "COMPLETE"]  # noqa: E731
    driver.finish(first, value=0.25)
    assert told() == []
    assert driver.search.scores == {}
    driver.finish(second, value=0.75)
    assert told() == [0.5]
    assert driver.search.scores == {first.arm: (0.5,)}
    driver.run()
    assert len(told()) == 2


def test_trials_side_by_side_get_different_arms(make_driver):
    for design in ADAPTIVE:
        assert len({request.arm for request in drain(make_driver({"search.design": design}).search)}) == 4


# Confirmation, failures, ends


def test_the_best_and_the_base_arm_are_confirmed_after_the_search(make_driver):
    driver = make_driver(
        {"search.num_arms": 6, "search.confirm": {"top": 2, "seeds": [8, 9]}},
        measure=lambda request: compute_surface(request.values) if request.values else -9.0,
    )
    assert driver.search.num_planned == 6 + 3 * 2
    open_requests = drain(driver.search)
    assert [request.phase for request in open_requests] == ["search"] * 6
    for request in open_requests[:-1]:
        driver.finish(request)
    assert driver.search.next_request() is None, "the search still runs"
    driver.finish(open_requests[-1])
    confirmed = driver.run()
    best = sorted(open_requests, key=lambda request: -compute_surface(request.values))[:2]
    arms = [*(request.arm for request in best), driver.name_point({})]
    assert [(r.arm, r.seed, r.phase) for r in confirmed] == [(arm, s, "confirm") for s in (8, 9) for arm in arms]
    assert driver.search.scores.keys() == {request.arm for request in open_requests}


def test_a_base_arm_among_the_best_is_confirmed_once(make_driver):
    space = {"pretrain.declutr.temperature": [0.05, 0.1]}
    driver = make_driver(
        {"search": {"design": "random", "num_arms": 2, "targets": [TARGET], "space": space,
                    "confirm": {"top": 2, "seeds": [9]}}},
        measure=lambda request: request.values["pretrain.declutr.temperature"],
    )  # fmt: skip
    requests = driver.run()
    assert [request.phase for request in requests] == ["search", "search", "confirm", "confirm"]
    assert driver.name_point({}) in {request.arm for request in requests[:2]}
    assert len({request.arm for request in requests}) == 2


def test_stopped_trials_are_pruned_and_never_confirmed(make_driver):
    driver = make_driver({"search.num_arms": 3, "search.seeds": [0, 1], "search.confirm": {"top": 3, "seeds": [9]}})
    for index in range(6):
        request = driver.next()
        if index == 3:  # one seed of the second arm, though its value is the best
            driver.finish(request, "stopped", value=100.0, rung=1)
        else:
            driver.finish(request)
    stopped = driver.requests[3].arm
    states = [trial.state.name for trial in driver.search.study.get_trials()]
    assert states == ["COMPLETE", "PRUNED", "COMPLETE"]
    assert list(driver.search.study.get_trials()[1].intermediate_values) == [1]
    assert driver.search.scores.keys() == {request.arm for request in driver.requests} - {stopped}
    confirmed = driver.run()
    assert {request.phase for request in confirmed} == {"confirm"}
    assert len(confirmed) == 3
    assert stopped not in {request.arm for request in confirmed}


def test_failed_and_infeasible_trials_have_no_value(make_driver):
    driver = make_driver({"search.num_arms": 4, "search.confirm": {"top": 4, "seeds": [9]}})
    requests = [driver.next() for _ in range(4)]
    driver.finish(requests[0], "failed")
    driver.finish(requests[1], "infeasible")
    driver.search.finish(f"{requests[2].arm}-{requests[2].seed}", None)
    driver.finish(requests[3])
    told = driver.search.study.get_trials()
    assert [trial.state.name for trial in told] == ["FAIL", "COMPLETE", "FAIL", "COMPLETE"]
    assert [trial.number for trial in told if any(value > 0 for value in trial.constraints.values())] == [1]
    assert driver.search.scores.keys() == {requests[3].arm}
    assert [request.arm for request in driver.run()] == [requests[3].arm, driver.name_point({})]

    # A trial that failed is tried again; one that can't work is not; one that left no row is open.
    driver.rebuild()
    again = [request for request in driver.run() if request.phase == "search"]
    assert [request.arm for request in again] == [requests[0].arm, *(r.arm for r in again[1:])]
    assert requests[1].arm not in {request.arm for request in again}


# Points that can't work

WIDE = {"pretrain.declutr.max_span": [16, 24, 512]}  # 512 exceeds max_length


@pytest.mark.parametrize("design", ["grid", "one_factor", "factorial", *ADAPTIVE])
def test_an_infeasible_point_is_noted_recorded_and_passed_over(make_job, tmp_path, design):
    search = {"design": design, "space": WIDE, "seeds": [3, 4]}
    if design in ADAPTIVE:
        search |= {"num_arms": 3, "targets": [TARGET]}
    driver = Driver(make_job("declutr", {"search": search}), tmp_path, lambda request: 0.5)
    asked = driver.run()
    spans = {with_settings(driver.job, request.values).pretrain.declutr.max_span for request in asked}
    assert spans == {16, 24}
    assert len(asked) == 4
    assert any("pretrain.declutr.max_span: 512" in note for note in driver.search.notes)
    ((request, error),) = driver.refused
    assert (request.values, request.seed) == ({"pretrain.declutr.max_span": 512}, 3)
    assert request.phase == ("search" if design in ADAPTIVE else "fixed")
    assert error.startswith("pretrain.declutr.max_span: 512")
    assert len(request.arm) == 12
    assert request.arm not in {other.arm for other in asked}
    # Once in the tables, it is not told again, and is no arm of the job.
    driver.rebuild()
    assert driver.run() == []
    assert len(driver.refused) == 1
    row = read_trial(tmp_path, "tiny", f"{request.arm}-3")
    assert (row["status"], row["pretrain.declutr.max_span"], row["pretrain.objective"]) == (
        "infeasible",
        512,
        "declutr",
    )
    assert not is_current(driver.job, row, driver.name_point)


def test_a_refused_point_is_named_by_itself_and_the_settings_of_the_job(make_job):
    def name(values, changes=None):
        return name_refused(make_job("declutr", {"search.space": WIDE, **(changes or {})}), values)

    wide = {"pretrain.declutr.max_span": 512}
    assert name(wide) == name(dict(wide), {"name": "other", "search.seeds": [7], "resources.workers": 2})
    others = [name({"pretrain.declutr.max_span": 400}), name(wide, {"pretrain.learning_rate": 0.5})]
    assert len({name(wide), *others}) == 3


def test_a_point_that_works_since_is_asked_for(make_job, tmp_path):
    search = {"design": "random", "space": WIDE, "num_arms": 3, "targets": [TARGET]}
    roomy = {"corpus.max_length": 1024, "pretrain.batch_tokens": 4096, "pretrain.num_tokens": 12_000}
    Driver(make_job("declutr", {"search": search}), tmp_path, lambda request: 0.5).run()
    driver = Driver(make_job("declutr", {"search": search, **roomy}), tmp_path, lambda request: 0.5)
    assert sorted(request.values["pretrain.declutr.max_span"] for request in driver.run()) == [16, 24, 512]
    assert driver.refused == []


def run_half(make_driver, folder, design, seed, by_name):
    """A search of 40 arms where temperatures over 0.1, half of the space, can't work, refused by name or by trials.

    Returns the driver and the share of points, after the first ten, that can't work.
    """
    driver = make_driver(
        {"search.design": design, "search.sampler_seed": seed, "search.num_arms": 40}, folder,
        measure=lambda request: -(math.log10(request.values["pretrain.learning_rate"] / 1e-3) ** 2),
    )  # fmt: skip
    plain, asked = driver.name_point, []

    def name_point(values):
        asked.append(values["pretrain.declutr.temperature"] > 0.1)
        if by_name and asked[-1]:
            raise JobError(["pretrain.declutr.temperature: too warm"])
        return plain(values)

    driver.search.name_point = name_point
    while True:
        try:
            request = driver.next()
        except StopIteration:
            break
        driver.finish(request, "infeasible" if request.values["pretrain.declutr.temperature"] > 0.1 else "complete")
    return driver, np.mean(asked[10:])


@pytest.mark.parametrize("by_name", [True, False])
def test_samplers_avoid_what_can_not_work(make_driver, tmp_path, by_name):
    """Half of the space is infeasible: random search keeps asking for it, the others learn."""
    shares = {
        design: np.mean([
            run_half(make_driver, tmp_path / f"{design}{seed}", design, seed, by_name)[1] for seed in range(4)
        ])
        for design in ADAPTIVE
    }  # fmt: skip
    assert 0.35 < shares["random"] < 0.65
    assert shares["tpe"] < shares["random"] - 0.15
    assert shares["nsga2"] < shares["random"] - 0.1


@pytest.mark.parametrize("design", ADAPTIVE)
def test_an_infeasible_arm_is_never_the_best(make_driver, tmp_path, design):
    driver, _ = run_half(make_driver, tmp_path, design, 0, by_name=False)
    infeasible = {row["arm"] for row in list_trials(tmp_path, "tiny") if row["status"] == "infeasible"}
    assert infeasible
    assert not infeasible & driver.search.scores.keys()
    assert driver.search.study.best_trial.params["pretrain.declutr.temperature"] <= 0.1


def test_an_arm_with_one_infeasible_seed_has_no_value(make_driver):
    driver = make_driver({"search.num_arms": 2, "search.seeds": [0, 1]})
    requests = drain(driver.search)
    driver.finish(requests[0], "infeasible")
    for request in requests[1:]:
        driver.finish(request)
    assert driver.search.scores.keys() == {requests[2].arm}


@pytest.mark.parametrize("design", ADAPTIVE)
def test_a_space_that_is_used_up_ends_the_search(make_driver, design):
    space = {"pretrain.declutr.num_positives": {"low": 1, "high": 3}}
    driver = make_driver(
        {"search": {"design": design, "num_arms": 10, "targets": [TARGET], "space": space}},
        measure=lambda request: 0.5,
    )
    assert sorted(request.values["pretrain.declutr.num_positives"] for request in driver.run()) == [1, 2, 3]
    assert driver.search.notes == [
        f"the space gave {MOST_REPEATS} known or infeasible arms in a row: the search ends with 3 of 10 arms"
    ]


# Held and retried trials


@pytest.mark.parametrize("design", ["grid", *ADAPTIVE])
def test_a_held_trial_lets_others_pass_and_keeps_its_place(make_driver, design):
    space = {"pretrain.declutr.temperature": [0.1 * step for step in range(1, 10)]}
    changes = {"search": {"design": design, "space": space, "targets": [TARGET]}}
    if design != "grid":
        changes["search"]["num_arms"] = 6
    driver = make_driver(changes)
    first = driver.search.next_request()
    driver.search.retry(f"{first.arm}-{first.seed}")
    second = driver.search.next_request(held=lambda request: request.arm == first.arm)
    assert second.arm != first.arm
    assert driver.search.next_request() == first
    assert drain(driver.search)
    assert driver.search.next_request() is None


def test_few_arms_are_asked_for_while_all_are_held(make_driver):
    driver = make_driver({"search.num_arms": 9, "search.seeds": [0], "search.confirm": {"top": 1, "seeds": [5]}})
    looked = []
    for _ in range(3):
        assert driver.search.next_request(held=lambda request: looked.append(request.arm) or True) is None
    assert len(set(looked)) == len(driver.search.arms) == MOST_HELD == 4
    assert driver.search.running == {}
    assert [request.arm for request in drain(driver.search)][:4] == looked[:4]
    driver = make_driver({"search.num_arms": 9, "search.seeds": [0, 1, 2]})
    assert driver.search.next_request(held=lambda request: True) is None
    assert len(driver.search.queue) == 3
    # A fixed design knows its points: one far down the list may run.
    space = {"pretrain.declutr.temperature": [0.1 * step for step in range(1, 10)]}
    driver = make_driver({"search": {"design": "grid", "space": space}})
    last = driver.search.next_request(held=lambda request: request.values["pretrain.declutr.temperature"] < 0.85)
    assert last.values["pretrain.declutr.temperature"] == pytest.approx(0.9)
    assert driver.search.next_request(held=lambda request: True) is None
    assert len(drain(driver.search)) == 8


def test_a_held_trial_keeps_a_search_from_its_end(make_driver):
    driver = make_driver({"search.num_arms": 2, "search.confirm": {"top": 1, "seeds": [5]}})
    first = driver.next()
    driver.finish(first)
    held = lambda request: True  # noqa: E731
    assert driver.search.next_request(held) is None, "nothing runs, but one is held"
    driver.finish(driver.next())
    assert driver.search.next_request(held) is None
    confirmed = driver.run()
    assert {request.phase for request in confirmed} == {"confirm"}
    with pytest.raises(StopIteration):
        driver.search.next_request(held)


def test_a_trial_whose_process_died_is_next_again(make_driver):
    driver = make_driver({"search.confirm": {"top": 1, "seeds": [5]}})
    requests = drain(driver.search)
    for request in requests[1:3]:
        driver.search.retry(f"{request.arm}-{request.seed}")
    assert drain(driver.search) == [requests[2], requests[1]]
    assert driver.search.running.keys() == {f"{request.arm}-{request.seed}" for request in requests}
    for request in requests:
        driver.finish(request)
    confirmed = driver.search.next_request()
    driver.search.retry(f"{confirmed.arm}-{confirmed.seed}")
    assert driver.search.next_request() == confirmed


# Several targets


def compute_two(request):
    """Two values that can't both be best: one likes low temperatures, one high ones; a wrong rate costs both."""
    values = BASE | request.values
    off = abs(math.log10(values["pretrain.learning_rate"] / 1e-3))
    temperature = math.log10(values["pretrain.declutr.temperature"])
    return -temperature - off, temperature - off


TWO = [TARGET, {**TARGET, "metric": "accuracy"}]


@pytest.mark.parametrize("design", ["random", "tpe"])  # nsga2's order of equals depends on the sign
def test_a_mirrored_target_gives_the_same_search(make_driver, tmp_path, design):
    runs = {}
    for mode, sign in (("max", 1), ("min", -1)):
        changes = {
            "search.design": design, "search.num_arms": 30, "search.targets": [TARGET, {**TWO[1], "mode": mode}],
            "search.confirm": {"top": 5, "seeds": [5]},
        }  # fmt: skip
        driver = make_driver(
            changes, tmp_path / mode, measure=lambda r, sign=sign: (compute_two(r)[0], sign * compute_two(r)[1])
        )
        runs[mode] = [(request.values, request.phase) for request in driver.run()]
        assert len(driver.search.scores) == 30
    assert runs["max"] == runs["min"]


def test_the_first_front_is_confirmed_the_least_crowded_first(make_driver):
    values = [(0.0, 0.0), (1.0, 6.0), (0.0, 10.0), (10.0, 0.0), (4.0, 5.0), (0.5, 5.5)]
    driver = make_driver(
        {"search.num_arms": 6, "search.targets": TWO, "search.confirm": {"top": 3, "seeds": [8]}},
        measure=lambda request: (0.0, 0.0),
    )
    requests = drain(driver.search)
    for request, pair in zip(requests, values, strict=True):
        driver.finish(request, value=pair)
    assert driver.search.scores[requests[1].arm] == (1.0, 6.0)
    confirmed = driver.run()
    # The two ends, then (4, 5), whose neighbours lie 0.9 and 0.6 of the widths apart, before (1, 6).
    chosen = [requests[2].arm, requests[3].arm, requests[4].arm, driver.name_point({})]
    assert [request.arm for request in confirmed] == chosen


def test_nsga2_finds_a_better_front_than_random(make_driver, tmp_path):
    """By the mean of the rates' distances from the best of all: the front has 0."""
    means = {}
    for design in ("nsga2", "random"):
        off = []
        for seed in range(4):
            changes = {"search.design": design, "search.sampler_seed": seed, "search.num_arms": 60}
            driver = make_driver({**changes, "search.targets": TWO}, tmp_path / f"{design}{seed}", measure=compute_two)
            rates = [request.values["pretrain.learning_rate"] for request in driver.run()]
            off.append(np.mean(np.abs(np.log10(np.array(rates[30:]) / 1e-3))))
        means[design] = np.mean(off)
    assert means["nsga2"] < means["random"] - 0.1


def test_a_trial_without_one_of_its_targets_has_no_value(make_driver):
    driver = make_driver({"search.num_arms": 3, "search.targets": TWO})
    requests = drain(driver.search)
    driver.finish(requests[0], value=(0.5, None))
    driver.finish(requests[1], value=(0.5,))  # of a time when the job had one target
    driver.finish(requests[2], value=(0.5, 0.25))
    assert driver.search.scores == {requests[2].arm: (0.5, 0.25)}


def test_a_search_without_any_value_says_so(make_driver):
    driver = make_driver({"search.num_arms": 2, "search.targets": TWO, "search.confirm": {"top": 1, "seeds": [5]}})
    for request in drain(driver.search):
        driver.finish(request, value=(0.5, None))
    assert [request.arm for request in driver.run()] == [driver.name_point({})]
    assert "no arm ran to the end with a value of every target" in driver.search.notes[0]


def test_what_was_measured_for_other_targets_runs_again(make_driver):
    """From its stages, mostly: what was stopped for one target may be good for another."""
    driver = make_driver({"search.num_arms": 2})
    driver.finish(driver.next(), "stopped", value=0.5, rung=1)
    driver.finish(driver.next())
    driver = make_driver({"search.num_arms": 3, "search.targets": TWO}, measure=compute_two)
    assert len(driver.run()) == 3
    assert len(driver.search.scores) == 3


# Designs around the base arm

AROUND = {
    "one_factor": ({"pretrain.declutr.max_span": [16, 24], "pretrain.declutr.num_positives": [1, 3]}, 4),
    "leave_one_out": ({"pretrain.mlm.weight": [0.0], "pretrain.declutr.num_positives": [1]}, 3),
    "factorial": ({"pretrain.declutr.max_span": [16, 20], "pretrain.objective": ["declutr"]}, 3),
}


@pytest.mark.parametrize("design", AROUND)
def test_designs_around_the_base_run_every_arm_on_every_seed(make_job, tmp_path, design):
    space, num_arms = AROUND[design]
    job = make_job("declutr", {"search": {"design": design, "space": space, "seeds": [4, 2]}})
    driver = Driver(job, tmp_path, lambda request: 0.5)
    assert driver.search.num_planned == num_arms * 2
    asked = driver.run(most=3)
    driver.rebuild()
    asked += driver.run()
    points = list(list_points(job))
    assert [request.values for request in asked] == [point for point in points for _ in range(2)]
    assert [(request.seed, request.phase) for request in asked] == [(4, "fixed"), (2, "fixed")] * num_arms
    assert asked[0].arm == driver.name_point({})
    rows = list(list_trials(tmp_path, "tiny"))
    assert [read_values(job, row) for row in rows] == [request.values for request in asked]
    assert all(is_current(job, row, driver.name_point) for row in rows)
    # An arm that differs from the base in two settings, or in another value, is of no such design.
    for values in ({name: listed[0] for name, listed in space.items()}, {"pretrain.declutr.max_span": 22}):
        request = asked[0]._replace(values=values, arm=driver.name_point(values))
        row = driver.write(request, "complete", 0.5)[1]
        assert is_current(job, row, driver.name_point) == (design == "factorial" and len(values) == 2)


# Going on from the tables

CONDITIONAL = {
    "pretrain.objective": ["mlm", "declutr"],
    "pretrain.declutr.min_document_length": [None, 200],
    "pretrain.learning_rate": {"low": 1e-5, "high": 1e-2, "log": True},
    "pretrain.weight_decay": {"low": 0.0, "high": 0.3, "step": 0.1},
    "evaluate.shots": [[2], [2, 4]],
}


@pytest.mark.parametrize("design", ["grid", *ADAPTIVE])
@pytest.mark.parametrize("left_open", [False, True])
def test_a_search_rebuilt_after_every_trial_is_complete_and_repeats_nothing(make_job, tmp_path, design, left_open):
    search = {"design": design, "seeds": [0, 1], "space": CONDITIONAL}
    if design == "grid":
        search["space"] = CONDITIONAL | {"pretrain.learning_rate": [1e-4], "pretrain.weight_decay": [0.1]}
    else:
        search |= {"num_arms": 5, "targets": [TARGET], "confirm": {"top": 2, "seeds": [5]}}
    changes = {"search": search, "pretrain.declutr.min_document_length": 150}

    def measure(request):
        return math.sin(1e5 * request.values.get("pretrain.learning_rate", 0.0)) + 0.1 * request.seed

    job = make_job("declutr", changes)
    whole, broken = Driver(job, tmp_path / "whole", measure), Driver(job, tmp_path / "broken", measure)
    whole.run()
    for turn in range(1000):
        broken.rebuild()
        try:
            request = broken.next()
        except StopIteration:
            break
        if left_open and turn % 2 == 0:  # killed under way: the row stays `running`
            broken.write(request, "running", rung=0)
            broken.rebuild()
            again = broken.search.next_request()
            open_ones = {(r.arm, r.seed, r.phase): r.values for r in [again, *broken.search.queue]}
            assert open_ones[request.arm, request.seed, request.phase] == request.values
            broken.rebuild()
            while request not in broken.search.running.values():
                broken.next()
        broken.finish(request)
    assert broken.list_done() == sorted({(r.arm, r.seed, r.phase) for r in whole.requests})
    assert broken.list_done() == whole.list_done()
    if design != "grid":
        assert len(broken.list_done()) in (5 * 2 + 2, 5 * 2 + 3)


@pytest.mark.parametrize("design", ADAPTIVE)
@pytest.mark.parametrize("targets", [1, 2])
def test_a_resumed_search_asks_for_the_arms_of_an_unbroken_one(make_driver, tmp_path, design, targets):
    """Point by point, with points that can't work and points that come twice among them."""
    space = {
        "pretrain.declutr.max_span": [8, 16, 24, 512],
        "pretrain.declutr.num_positives": {"low": 1, "high": 4},
        "pretrain.declutr.sampling": ["any", "adjacent"],
    }

    def measure(request):
        values = request.values
        found = values["pretrain.declutr.max_span"] / 24, -float(values["pretrain.declutr.num_positives"])
        return (found[0] + found[1],) if targets == 1 else found

    search = {"design": design, "num_arms": 14, "targets": TWO[:targets], "space": space}
    whole, broken = (make_driver({"search": search}, tmp_path / name, measure=measure) for name in ("whole", "broken"))
    whole.run()
    assert len(whole.requests) == 14
    for _ in range(200):
        broken.rebuild()
        try:
            request = broken.next()
        except StopIteration:
            break
        broken.finish(request)
    assert whole.refused
    assert [request.values for request in broken.requests] == [request.values for request in whole.requests]
    assert [request.values for request, _ in broken.refused] == [request.values for request, _ in whole.refused]


def test_a_long_random_search_goes_on_after_a_break(make_driver):
    """The sampler must not start again with the numbers of its first arms, which would end the search."""
    driver = make_driver({"search.num_arms": MOST_REPEATS + 15})
    driver.run(most=MOST_REPEATS + 5)
    driver.rebuild()
    assert len(driver.run()) == 10
    assert driver.search.notes == []


def test_what_was_open_side_by_side_is_asked_for_again(make_driver):
    driver = make_driver({"search.num_arms": 5})
    requests = drain(driver.search)
    for request in requests[:4]:
        driver.write(request, "running", rung=0)
    driver.finish(requests[1])
    driver.rebuild()
    asked = drain(driver.search)
    expected = [requests[0], requests[2], requests[3], requests[4]]
    assert [(request.values, request.seed) for request in asked] == [(r.values, r.seed) for r in expected]


def test_more_arms_and_more_seeds_run_only_what_is_missing(make_driver):
    first = make_driver({"search.num_arms": 4, "search.seeds": [0]}).run()
    more = make_driver({"search.num_arms": 6, "search.seeds": [0]}).run()
    assert len(more) == 2
    assert not {request.arm for request in more} & {request.arm for request in first}
    seeds = make_driver({"search.num_arms": 6, "search.seeds": [0, 7]}).run()
    assert {(request.arm, request.seed) for request in seeds} == {(request.arm, 7) for request in (*first, *more)}
    assert len(seeds) == 6
    assert make_driver({"search.num_arms": 6, "search.seeds": [0, 7]}).run() == []


def test_more_points_of_a_grid_run_only_what_is_missing(make_job, tmp_path):
    def run(rates, seeds):
        job = make_grid(make_job, {"pretrain.learning_rate": rates}, {"search.seeds": seeds})
        found = Driver(job, tmp_path, lambda request: 0.5).run()
        return [(request.values["pretrain.learning_rate"], request.seed) for request in found]

    assert run([1e-4, 1e-3], [0]) == [(1e-4, 0), (1e-3, 0)]
    assert run([1e-4, 5e-4, 1e-3], [0, 1]) == [(1e-4, 1), (5e-4, 0), (5e-4, 1), (1e-3, 1)]


@pytest.mark.parametrize("design", ADAPTIVE)
def test_more_shots_make_every_trial_due_again(make_driver, design):
    changes = {"search.design": design, "search.confirm": {"top": 1, "seeds": [9]}}
    first = make_driver(changes).run()
    again = make_driver({**changes, "evaluate.shots": [2, 4]}).run()
    assert [(r.arm, r.seed, r.phase) for r in again] == [(r.arm, r.seed, r.phase) for r in first]
    assert make_driver({**changes, "evaluate.shots": [2, 4]}).run() == []


def test_rows_outside_a_changed_space_are_left_alone(make_driver):
    driver = make_driver({"search.num_arms": 6})
    rates = [request.values["pretrain.learning_rate"] for request in driver.run()]
    low = sorted(rates)[3]
    narrower = {**SURFACE, "pretrain.learning_rate": {"low": low, "high": 1e-2, "log": True}}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        driver = make_driver({"search.num_arms": 6, "search.space": narrower})
        asked = driver.run()
    assert len(asked) == 3
    assert all(low <= request.values["pretrain.learning_rate"] for request in asked)
    # A setting that is searched since: the old arms are no points of this space.
    wider = {**narrower, "pretrain.declutr.num_positives": [3, 4]}
    driver = make_driver({"search.num_arms": 6, "search.space": wider})
    assert len(driver.run()) == 6


def test_a_wrong_value_in_a_row_is_not_a_point(make_driver):
    driver = make_driver()
    request = driver.next()
    driver.write(request, "complete", 0.5, **{"pretrain.max_grad_norm": 2.0, "arm": "another"})
    driver.rebuild()
    assert driver.search.arms == {}
    with pytest.raises(JobError):
        driver.name_point({"pretrain.declutr.max_span": 512})


def test_an_arm_that_lost_a_seed_is_not_compared_by_the_others(make_driver):
    driver = make_driver({"search.num_arms": 3, "search.seeds": [0, 1], "search.confirm": {"top": 1, "seeds": [9]}})
    lucky = driver.next()
    driver.finish(lucky, value=0.99)
    driver.finish(driver.next(), "failed")
    driver.run()
    assert lucky.arm not in driver.search.scores
    assert lucky.arm not in {request.arm for request in driver.requests if request.phase == "confirm"}
    assert driver.search.arms[lucky.arm].trial.study.trials[0].state.name == "FAIL"
