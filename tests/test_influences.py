"""The report's sections on settings: effects of designs, importances of searches, spans with their documents."""

import datetime
import itertools

import numpy as np
import pytest

from raylab.job.designs import list_points
from raylab.job.settings import list_settings, resolve_target, with_settings
from raylab.report.conclusions import tell_arms
from raylab.report.drawing import render
from raylab.report.influences import compute_means, tell_effects
from raylab.report.origins import tell_provenance
from raylab.report.parts import MissingError, Plot, Study, Table
from raylab.report.searches import tell_search
from raylab.report.surfaces import tell_spans
from raylab.results.tables import write_rows
from raylab.statistics.analysis import default_target, list_arms

START = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
CELL = {"task": "severity", "metric": "f1_macro", "shots": 2, "frozen_layers": "all", "probe": "logistic"}
HOT, ANCHORS, SAMPLING = (f"pretrain.declutr.{name}" for name in ("temperature", "num_anchors", "sampling"))
SPAN, RATE = "pretrain.declutr.max_span", "pretrain.learning_rate"
SEARCHED = {
    HOT: {"low": 0.01, "high": 1.0, "log": True},
    SAMPLING: ["any", "adjacent", "subsuming"],
    SPAN: {"low": 8, "high": 40},
    ANCHORS: [1, 2],
}


@pytest.fixture
def study_of(tmp_path):
    """`study_of(job)`: what the sections read of a job."""

    def read(job):
        target = default_target(job)
        return Study(tmp_path, job, target, resolve_target(job, target), list_arms(tmp_path, job))

    return read


@pytest.fixture
def write(tmp_path):
    """`write(job, values, "arm", 0, [0.4, 0.5])`: a complete trial with these values of its draws."""

    def write_trial(job, values, arm, seed, draws, phase="fixed", spans=None, metric="f1_macro"):
        row = {
            **list_settings(with_settings(job, values)), "arm": arm, "seed": seed, "phase": phase, "rung": 1,
            "status": "complete", "num_rungs": 1, "started_at": START, "effective_spans": spans,
            "target_values": [float(np.mean(draws))],
        }  # fmt: skip
        write_rows(tmp_path, job.name, "trials", f"{arm}-{seed}", [row])
        shared = {**CELL, "metric": metric, "rung": 1, "split": "validation"}
        rows = [{**shared, "draw": draw, "value": float(value)} for draw, value in enumerate(draws)]
        write_rows(tmp_path, job.name, "scores", f"{arm}-{seed}", rows)

    return write_trial


@pytest.fixture
def sweep(make_job, write):
    """`sweep("factorial", space, mean)`: a job whose every arm ran, and its values: settings -> seeds x draws."""

    def run(design, space, mean, num_seeds=9, noise=0.01):
        rng = np.random.default_rng(0)
        job = make_job("declutr", {"search": {"design": design, "space": space, "seeds": list(range(num_seeds))}})
        shared, found = rng.normal(0, 0.05, (num_seeds, 1)), {}
        for number, values in enumerate(list_points(job)):
            settings = list_settings(with_settings(job, values))
            drawn = mean(settings) + shared + rng.normal(0, noise, (num_seeds, 2))
            found[tuple(settings[name] for name in space)] = drawn
            for seed in range(num_seeds):
                write(job, values, f"arm{number}", seed, drawn[seed])
        return job, found

    return run


def plots_of(section):
    return {part.name: part for part in section.parts if isinstance(part, Plot)}


def planted(settings):
    """Heat helps, two anchors help more where it is hot; sampling does nothing."""
    hot, two = settings[HOT] == 0.1, settings[ANCHORS] == 2
    return 0.5 + 0.1 * hot + 0.03 * two + 0.06 * (hot and two)


def test_planted_effects_and_one_interaction_are_named_and_nothing_else(sweep, study_of):
    space = {HOT: [0.05, 0.1], ANCHORS: [1, 2], SAMPLING: ["any", "adjacent"]}
    job, found = sweep("factorial", space, planted)
    section = tell_effects(study_of(job))
    assert section.lead[0].startswith("3 of 6 effects at task=severity, ")
    # The base arm has 2 anchors and 0.05.
    assert [sentence.partition(":")[0] for sentence in section.lead[1:]] == [
        "temperature 0.05 to 0.1 raises the score",
        "num_anchors 2 to 1 lowers the score",
        "temperature 0.05 to 0.1 adds less where num_anchors 2 to 1 is done too",
    ]
    assert "sampling" not in " ".join(section.lead)
    means = {point: values.mean() for point, values in found.items()}

    def over(place, level):
        return np.mean([mean for point, mean in means.items() if point[place] == level])

    forest = plots_of(section)["effects-forest"]
    effects = {(row["setting"], row["with"]): row for row in forest.rows}
    assert len(effects) == 6
    assert effects[HOT, None]["difference"] == pytest.approx(over(0, 0.1) - over(0, 0.05))
    assert effects[ANCHORS, None]["difference"] == pytest.approx(over(1, 1) - over(1, 2))
    assert {key for key, row in effects.items() if row["shown"]} == {(HOT, None), (ANCHORS, None), (HOT, ANCHORS)}
    assert f"temperature 0.05 to 0.1 {over(0, 0.1) - over(0, 0.05):+.3g} [" in forest.alt
    assert "sampling" not in forest.alt


def test_the_forest_fills_what_is_shown(sweep, study_of):
    job, _ = sweep("factorial", {HOT: [0.05, 0.1], ANCHORS: [1, 2], SAMPLING: ["any", "adjacent"]}, planted)
    plot = plots_of(tell_effects(study_of(job)))["effects-forest"]
    panel = plot.figure.axes[0]
    marks = [line for line in panel.lines if line.get_marker() in ("o", "s") and len(line.get_xdata()) == 1]
    labels = [label.get_text() for label in panel.get_yticklabels()]
    drawn = {
        label: (float(mark.get_xdata()[0]), mark.get_markerfacecolor() == "black")
        for label, mark in zip(labels, marks, strict=True)
    }
    told = {
        f"{row['setting'].rpartition('.')[2]} {row['from']} to {row['to']}": (row["difference"], row["shown"])
        for row in plot.rows
        if row["with"] is None
    }
    assert {label: drawn[label] for label in told} == told
    assert sum(shown for _, shown in drawn.values()) == 3
    assert all(render(plot.figure))


def test_levels_and_pairs_are_drawn_at_their_means(sweep, study_of):
    job, found = sweep("factorial", {HOT: [0.05, 0.1], ANCHORS: [1, 2]}, planted)
    plots = plots_of(tell_effects(study_of(job)))
    hot = np.stack([found[0.1, 1], found[0.1, 2]]).mean((0, 2))
    [row] = [row for row in plots["effects-levels"].rows if (row["setting"], row["level"]) == (HOT, "0.1")]
    assert row["mean"] == pytest.approx(hot.mean())
    half = 2.306004 * hot.std(ddof=1) / 3  # t of 8 degrees of freedom, nine seeds
    assert (row["low"], row["high"]) == pytest.approx((hot.mean() - half, hot.mean() + half))
    pairs = {(row["level"], row["with_level"]): row["mean"] for row in plots["effects-interactions"].rows}
    assert pairs == {
        (f"{level:g}", str(anchors)): pytest.approx(values.mean()) for (level, anchors), values in found.items()
    }
    assert f"temperature 0.1, num_anchors 2: {found[0.1, 2].mean():.3f}" in plots["effects-interactions"].alt


def test_too_few_seeds_name_nothing(sweep, study_of):
    job, _ = sweep("grid", {HOT: [0.05, 0.1], ANCHORS: [1, 2]}, planted, num_seeds=3)
    section = tell_effects(study_of(job))
    [told] = section.lead
    assert told.startswith("None of 3 effects at ")
    assert told.endswith("is shown: with 3 seeds p is never under 0.25, at least 7 are needed for so many.")
    assert "None is shown." in plots_of(section)["effects-forest"].alt


def test_single_changes_have_no_panels_of_levels(sweep, study_of):
    space = {"pretrain.objective": ["mlm", "none"], HOT: [0.1]}
    worth = {"declutr": 0.6, "mlm": 0.5, "none": 0.4}
    job, found = sweep("one_factor", space, lambda settings: worth[settings["pretrain.objective"]])
    section = tell_effects(study_of(job))
    assert set(plots_of(section)) == {"effects-forest"}
    assert section.lead[0].startswith("2 of 3 effects")
    first = found["none", None].mean() - found["declutr", 0.05].mean()
    assert section.lead[1].startswith(f"objective declutr to none lowers the score: {first:+.3g} [")


def test_means_are_of_arms_alike_in_all_else():
    levels = {
        "mlm": {"objective": "mlm", "span": None, "rate": 1},
        "short": {"objective": "declutr", "span": 16, "rate": 1},
        "long": {"objective": "declutr", "span": 64, "rate": 1},
        "alone": {"objective": "declutr", "span": 64, "rate": 2},
    }
    scores = {arm: {0: {0: value}} for arm, value in {"mlm": 1.0, "short": 2.0, "long": 4.0, "alone": 100.0}.items()}
    found = compute_means(levels, scores, ["objective"])
    assert {cell: mean.mean for cell, mean in found.items()} == {("mlm",): 1.0, ("declutr",): 3.0}
    found = compute_means(levels, scores, ["span"])
    assert {cell: mean.mean for cell, mean in found.items()} == {(16,): 2.0, (64,): 4.0}
    # No arm of 16 at rate 2.
    assert compute_means(levels, scores, ["span", "rate"]) == {}
    assert compute_means({}, {}, ["span"]) == {}


@pytest.fixture
def search(make_job, write):
    """`search(40)`: a job that searched so many arms, three of them confirmed with the base arm, and their values."""
    from optuna.samplers import RandomSampler
    from optuna.study import create_study

    from raylab.search.samplers import suggest_point

    def run(num_arms, mode="max", space=SEARCHED):
        rng = np.random.default_rng(0)
        targets = [{"task": "severity", "mode": mode}]
        search = {"design": "random", "num_arms": num_arms, "space": space, "targets": targets,
                  "confirm": {"top": 3, "seeds": [1, 2]}}  # fmt: skip
        job = make_job("declutr", {"search": search})
        study, found = create_study(sampler=RandomSampler(seed=0)), {}
        for number in range(num_arms):
            values = suggest_point(study.ask(), job)
            value = 0.5 + 0.1 * np.log10(values[HOT]) + rng.normal(0, 0.005)
            kept = 4000 // (values.get(SPAN, 8) * values.get(ANCHORS, 1))
            spans = {"documents": kept, "share": kept / 1000, "shrunk": 0, "median_max_span": 8.0, "mean_max_span": 8.0}
            write(job, values, f"arm{number}", 0, [value], "search", spans)
            found[f"arm{number}"] = (values, value)
        best = sorted(found, key=lambda arm: found[arm][1], reverse=mode == "max")[:3]
        for place, arm in enumerate(best):
            for seed in (1, 2):
                # On fresh seeds the second is the best.
                write(job, found[arm][0], arm, seed, [(0.6, 0.7, 0.5)[place]], "confirm")
        for seed in (1, 2):
            write(job, {}, "base", seed, [0.4], "confirm")
        return job, found, best

    return run


def test_importances_are_told_by_both_methods_and_as_no_ablation(search, study_of):
    job, _, _ = search(40)
    section = tell_search(study_of(job))
    assert "not an ablation" in section.lead[0]
    cell = "task=severity, metric=f1_macro, shots=2, frozen_layers=all, probe=logistic"
    assert section.lead[1].startswith(f"Values here are of {cell}, on the search's seeds: those of the best are too")
    plot = plots_of(section)["importances"]
    largest = {}
    for row in plot.rows:
        largest.setdefault(row["method"], (row["setting"], row["importance"]))
    assert {setting for setting, _ in largest.values()} == {HOT}
    for method, (_, share) in largest.items():
        assert f"temperature ({share:.2f} of 1) by {method}" in section.lead[2]
        assert f"{method}: temperature {share:.2f}" in plot.alt
        assert any(part.startswith(f"{method}: ") and "not an ablation" in part for part in section.parts[:2])
    bars = [bar for container in plot.figure.axes[0].containers for bar in container]
    assert len(bars) == 2 * 4
    assert {bar.get_hatch() for bar in bars} == {"", "////"}
    assert {round(bar.get_width(), 6) for bar in bars} == {round(row["importance"], 6) for row in plot.rows}
    assert all(render(plot.figure))


@pytest.mark.parametrize("mode", ["max", "min"])
def test_each_searched_arm_is_a_line_across_its_settings(search, study_of, mode):
    job, found, best = search(30, mode)
    plot = plots_of(tell_search(study_of(job)))["search-coordinates"]
    [lines] = plot.figure.axes[0].collections
    segments = np.array(lines.get_segments())
    assert segments.shape == (30, 5, 2)
    order = sorted(found, key=lambda arm: found[arm][1], reverse=mode == "min")
    # Worst first, and lightest; best last, and up.
    rows = [row["arm"] for row in plot.rows]
    assert rows == order[::-1]
    shades = lines.get_colors()[:, 0]
    assert (np.diff(shades) <= 0).all()
    assert shades[0] - shades[-1] > 0.4
    values = np.array([found[arm][1] for arm in order])
    share = (values - values.min()) / np.ptp(values)
    np.testing.assert_allclose(segments[:, -1, 1], share if mode == "max" else 1 - share, atol=1e-9)
    heat = np.array([np.log10(found[arm][0][HOT] / 0.01) / 2 for arm in order])
    np.testing.assert_allclose(segments[:, 0, 1], heat, atol=1e-9)
    levels = np.array([["any", "adjacent", "subsuming"].index(found[arm][0][SAMPLING]) / 2 for arm in order])
    assert np.abs(segments[:, 1, 1] - levels).max() < 0.05
    # The confirmed ones, best on the fresh seeds first; the base arm was not searched.
    ranks = {row["arm"]: row["confirmed_rank"] for row in plot.rows if row["confirmed_rank"] is not None}
    wanted = [best[place] for place in ((1, 0, 2) if mode == "max" else (2, 0, 1))]
    assert sorted(ranks, key=ranks.get) == wanted
    thick = [line for line in plot.figure.axes[0].lines if line.get_color() == "black" and line.get_linewidth() > 2]
    np.testing.assert_allclose(thick[0].get_ydata(), segments[order.index(wanted[0]), :, 1])
    assert f"Thick: 1. confirmed {0.7 if mode == 'max' else 0.5:.3f}: " in plot.alt


def test_arms_that_do_not_read_a_setting_stand_under_its_axis(search, study_of):
    space = {**SEARCHED, SPAN: {**SEARCHED[SPAN], "when": {SAMPLING: "any"}}}
    job, found, _ = search(30, space=space)
    plot = plots_of(tell_search(study_of(job)))["search-coordinates"]
    segments = np.array(plot.figure.axes[0].collections[0].get_segments())
    values = [found[row["arm"]][0] for row in reversed(plot.rows)]
    place = list(job.search.space).index(SPAN)
    assert [y < -0.1 for y in segments[:, place, 1]] == [SPAN not in own for own in values]
    assert [row[SPAN] is None for row in reversed(plot.rows)] == [SPAN not in own for own in values]
    assert "not read" in [text.get_text() for text in plot.figure.axes[0].texts]


def test_freeze_depths_are_levels_and_the_best_are_those_of_the_searched_target(make_job, write, study_of):
    space = {"evaluate.frozen_layers": ["all", "1", "none"], RATE: {"low": 1e-4, "high": 1e-2, "log": True}}
    target = {"task": "severity", "metric": "accuracy"}
    search = {"design": "random", "num_arms": 6, "space": space, "targets": [target],
              "confirm": {"top": 2, "seeds": [1]}}  # fmt: skip
    job = make_job("mlm", {"search": search, "analysis": {"primary": "winner vs base at metric=f1_macro"}})
    for number in range(6):
        values = {"evaluate.frozen_layers": ("all", "1", "none")[number % 3], RATE: 10 ** (-4 + number / 3)}
        write(job, values, f"arm{number}", 0, [number / 10], "search", metric="accuracy")
        if number in (0, 3):
            write(job, values, f"arm{number}", 1, [0.1 + number / 10], "confirm", metric="accuracy")
    plot = plots_of(tell_search(study_of(job)))["search-coordinates"]
    texts = [text.get_text() for text in plot.figure.axes[0].texts]
    assert {"all", "1", "none"} <= set(texts)
    assert [row["confirmed_rank"] for row in plot.rows] == [None, None, 1, None, None, 2]
    assert "Thick: 1. confirmed 0.400: " in plot.alt


def test_a_narrow_range_keeps_its_axis(search, study_of):
    job, _, _ = search(12, space={HOT: {"low": 0.06, "high": 0.09, "log": True}, ANCHORS: [1, 2]})
    plot = plots_of(tell_search(study_of(job)))["search-coordinates"]
    segments = np.array(plot.figure.axes[0].collections[0].get_segments())
    assert segments.shape == (12, 3, 2)
    assert {"0.06", "0.09"} <= {text.get_text() for text in plot.figure.axes[0].texts}


def test_ranked_trials_and_seeds_are_those_of_the_confirmation(search, write, study_of):
    job, _, _ = search(6)
    listed = {part.name: part for part in tell_provenance(study_of(job)).parts if isinstance(part, Table)}["trials"]
    assert {row["phase"] for row in listed.rows} == {"confirm"}
    assert len(listed.rows) == 4 * 2
    told = tell_arms(study_of(job)).lead
    assert len(told) == 1
    write(job, {}, "base", 3, [0.4], "confirm")
    assert tell_arms(study_of(job)).lead[1].startswith("The arms have 2 to 3 seeds")


def test_few_arms_have_lines_and_no_importances(search, study_of):
    job, _, _ = search(6)
    section = tell_search(study_of(job))
    assert "Importances: 6 arms of tiny ran to the end; 10 are needed at least." in section.parts
    assert set(plots_of(section)) == {"search-coordinates"}


def test_designs_and_searches_have_each_their_own_section(search, sweep, study_of):
    job, _, _ = search(6)
    with pytest.raises(MissingError, match=r"the arms of a search \(random\) are no design"):
        tell_effects(study_of(job))
    job, _ = sweep("grid", {HOT: [0.05, 0.1]}, lambda settings: 0.5)
    with pytest.raises(MissingError, match=r"is no search \(grid\)"):
        tell_search(study_of(job))
    with pytest.raises(MissingError, match=r"\(max_span with num_anchors or min_span with num_positives\)"):
        tell_spans(study_of(job))


def test_each_cell_of_a_surface_is_the_mean_of_its_arms(search, study_of):
    space = {**SEARCHED, SPAN: [8, 16, 24]}
    job, found, _ = search(40, space=space)
    section = tell_spans(study_of(job))
    [plot] = plots_of(section).values()
    cells = {}
    for values, value in found.values():
        cells.setdefault((values[SPAN], values[ANCHORS]), []).append(value)
    assert len(cells) == 6
    for row in plot.rows:
        span, anchors = int(row["max_span"]), int(row["num_anchors"])
        assert row["mean_value"] == pytest.approx(np.mean(cells[span, anchors]))
        assert row["num_arms"] == len(cells[span, anchors])
        assert row["documents_kept"] == 4000 // (span * anchors)
    image = plot.figure.axes[0].images[0].get_array()
    wanted = [[np.mean(cells[span, anchors]) for span in (8, 16, 24)] for anchors in (1, 2)]
    np.testing.assert_allclose(image, wanted)
    best = max(cells, key=lambda cell: np.mean(cells[cell]))
    assert f"best {np.mean(cells[best]):.3f} at max_span {best[0]} and num_anchors {best[1]} (" in section.lead[0]
    assert "chosen by their results" in section.parts[0]
    assert all(render(plot.figure))


def test_many_lengths_are_drawn_as_ranges_that_hold_each_arm_once(search, study_of):
    job, found, _ = search(40)
    [plot] = plots_of(tell_spans(study_of(job))).values()
    assert sum(row["num_arms"] for row in plot.rows) == 40
    for row in plot.rows:
        low, _, high = row["max_span"].partition(" to ")
        inside = [
            value
            for values, value in found.values()
            if int(low) <= values[SPAN] <= int(high) and values[ANCHORS] == int(row["num_anchors"])
        ]
        assert row["num_arms"] == len(inside)
        assert row["mean_value"] == pytest.approx(np.mean(inside))


def test_a_design_has_a_surface_of_its_ranked_arms(sweep, study_of):
    space = {SPAN: [8, 16], ANCHORS: [1, 2], HOT: [0.05, 0.1]}
    job, found = sweep("grid", space, planted, num_seeds=2)
    section = tell_spans(study_of(job))
    [plot] = plots_of(section).values()
    for row, (span, anchors) in zip(plot.rows, itertools.product((8, 16), (1, 2)), strict=True):
        wanted = np.mean([values.mean() for point, values in found.items() if point[:2] == (span, anchors)])
        assert (row["max_span"], row["num_anchors"], row["num_arms"]) == (str(span), str(anchors), 2)
        assert row["mean_value"] == pytest.approx(wanted)
    # Without what was kept of the documents there is one map.
    assert len(plot.figure.axes) == 1
    assert "chosen by their results" not in section.parts[0]
