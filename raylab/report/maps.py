"""Maps of validation embeddings by class, before and after pre-training: two principal components of each space."""

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from raylab.base.counts import FEWEST
from raylab.base.identity import digest
from raylab.data.corpus import VALIDATION, open_rows
from raylab.evaluation.draws import list_draws
from raylab.job.blocks import Evaluate
from raylab.report.drawing import list_styles, start_figure
from raylab.report.parts import MissingError, Plot, Row, Section, Study, Table
from raylab.report.picks import START, Pick, list_best, pick_encoders, tell_picks, write_title
from raylab.results.tables import list_summaries, read_rows, read_trial
from raylab.store.stages import list_stages, name_stage, open_stage, peek_key, peek_stage
from raylab.training.rungs import name_start

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Floats = NDArray[np.float64]
MOST_POINTS = 2000
# More would not be told apart.
MOST_CLASSES = 10
LONGEST_NAME = 50
EMBEDDINGS = "embeddings.npy"
OTHERS = "other classes"
_LIGHT = "#d9d9d9"


class Space(NamedTuple):
    """The kept embeddings of an encoder: as what it is shown, its arm, their stage, and the key of its evaluation.

    `between`: of a rung on the way.
    """

    role: str
    label: str
    stage_id: str
    evaluated: Mapping[str, Any]
    between: bool = False


class Map(NamedTuple):
    """A space as it is drawn: places [n, 2], the share of the variance on each axis, and what lies between classes."""

    space: Space
    places: Floats
    shown: tuple[float, float]
    between: float
    between_map: float
    dimensions: int


class Classes(NamedTuple):
    """Which validation rows are drawn, as places among them, and the class of each: a code of `names`, -1 for others.

    The names are of the largest classes, of 10 validation rows or more. Under 10 others are left out.
    """

    rows: NDArray[np.int64]
    codes: NDArray[np.int64]
    names: list[str]


def tell_maps(study: Study) -> Section:
    """Two principal components of the validation embeddings by class: the start, the base arm and the best arm."""
    task = study.cell["task"]
    spaces = _find_spaces(study, task)
    if not spaces:
        raise MissingError(f"no embeddings of {task} are kept of the best arm or the base arm; run the job again")
    chosen, rows = _open_classes(study, task, spaces[-1])
    maps = []
    for space in spaces:
        path, places = _find_file(study, space.stage_id), _find_places(study, space, rows, chosen)
        if path is not None and places is not None:
            maps.append(project(space, np.load(path, mmap_mode="r")[places].astype(np.float64), chosen.codes))
    if not maps:
        raise MissingError(f"which rows of {task} the kept embeddings are of can't be told; run the job again")
    points: list[Row] = [
        {"encoder": found.space.role, "class": chosen.names[code] if code >= 0 else OTHERS,
         "x": float(f"{x:.4g}"), "y": float(f"{y:.4g}")}
        for found in maps for code, (x, y) in zip(chosen.codes.tolist(), found.places.tolist(), strict=True)
    ]  # fmt: skip
    # Not in the order of the corpus.
    points.sort(key=lambda row: tuple(row.values()))
    chance = (len(chosen.names) - 1) / max(1, int((chosen.codes >= 0).sum()) - 1)
    told = "; ".join(f"{found.space.role} {found.between:.1%}" for found in maps)
    lead = [
        f"Of the variance of {task}'s validation embeddings this share lies between the {len(chosen.names)} classes "
        f"shown, over all dimensions: {told} (by chance {chance:.1%})."
    ]
    caution = (
        "Each map is a principal component analysis of its own, of embeddings of length 1: distances within a map mean "
        "something, places and scales of two maps do not compare. It shows only the stated share of the variance, of "
        "one seed: what overlaps here may be apart in other dimensions. Trust the shares over all dimensions, and the "
        "metrics of the spaces, over a map's looks. A number stands at the mean of its class where that is apart "
        "from all others."
    )
    columns = {"encoder": "encoder", "seed": "seed", "points": "points", "dimensions": "dimensions",
               "shown": "variance shown", "between_map": "between classes, map",
               "between": "between classes, all dimensions", "chance": "by chance"}  # fmt: skip
    table: list[Row] = [
        {"encoder": found.space.role, "seed": found.space.evaluated["seed"], "points": len(found.places),
         "dimensions": found.dimensions, "shown": sum(found.shown), "between_map": found.between_map,
         "between": found.between, "chance": chance}
        for found in maps
    ]  # fmt: skip
    title = f"Validation embeddings of {task} by class, seed {maps[-1].space.evaluated['seed']}"
    figure = Plot("maps", title, _describe(maps, chosen), _draw(maps, chosen), points, raster=True)
    few = (
        f"Light grey: classes with under {FEWEST} validation rows, which are not named, those after the "
        f"{MOST_CLASSES} largest, and rows whose class is not known."
    )
    shown = [Pick(found.space.role, found.space.label, "") for found in maps]
    notes = [tell_picks(shown), caution, *([few] if (chosen.codes < 0).any() else [])]
    return Section(
        "maps", "Maps of the embeddings", lead, [*notes, figure, Table("spaces", "Spaces drawn", table, columns)]
    )


def _find_spaces(study: Study, task: str) -> list[Space]:
    """The spaces to draw, each once: the start, then the base and the best arm, of one seed and of the same rows.

    Where no start of that seed is kept, one of another seed is shown; else rungs on the way stand for it.
    """
    picks = [pick for pick in pick_encoders(study, list_best(study)) if pick.rung is None]
    trials: dict[str, dict[int, str]] = {}
    for row in list_summaries(study.results, study.job.name):
        if row["status"] == "complete" and (row["phase"] in ("fixed", "confirm") or row["arm"] not in study.arms.rows):
            trials.setdefault(row["arm"], {})[row["seed"]] = row["trial_id"]
    trained = [pick for pick in picks if START not in pick.role]
    shared = set.intersection(*(set(trials[pick.arm]) for pick in trained or picks)) or set(trials[picks[-1].arm])
    seed = min(shared)
    start = next((pick for pick in picks if START in pick.role), None)
    known = start if start is not None and start.arm in study.arms.rows else Pick(START, "before pre-training", "")
    found: dict[str, Space] = {}
    for pick in trained:
        if seed in trials[pick.arm]:
            for space in _list_kept(study, pick, trials[pick.arm][seed], task, known):
                taken = any(other.role == space.role for other in found.values())
                found.setdefault(
                    space.stage_id, space._replace(role=f"{space.role} of {pick.role}") if taken else space
                )
    if start is not None and not any(START in space.role for space in found.values()):
        own = trials[start.arm]
        near = seed if seed in own else min(own)
        other = start if near == seed else start._replace(label=f"{start.label}, seed {near}")
        found |= {space.stage_id: space for space in _list_kept(study, other, own[near], task, known)}
    if any(START in space.role for space in found.values()):
        found = {stage_id: space for stage_id, space in found.items() if not space.between}
    spaces = sorted(found.values(), key=lambda space: START not in space.role)
    return [space for space in spaces if space.evaluated["rows"] == spaces[-1].evaluated["rows"]]


def _list_kept(study: Study, pick: Pick, trial_id: str, task: str, start: Pick) -> list[Space]:
    """The kept embeddings of a trial on a task, before and after.

    Before is the start, shown as `start`, if any job has embedded it on the same rows; else the first rung measured.
    """
    results, name = study.results, study.job.name
    trial, tokens = read_trial(results, name, trial_id), {}
    embedded: dict[str, Space] = {}
    for row in read_rows(results, name, "stages", trial_id):
        info, key = peek_stage(results, row["stage_id"]), peek_key(results, row["stage_id"])
        if info is None or key is None:
            continue
        if row["kind"] == "pretrain":
            tokens[row["stage_id"]] = info["tokens"]
        elif row["kind"] == "evaluate" and key["task"] == task and "embed" in info["used"]:
            embedded[key["encoder"]] = Space(pick.role, pick.label, info["used"]["embed"], key)
    total = trial["num_tokens"] if trial is not None else None
    last = next((space for encoder, space in embedded.items() if tokens.get(encoder) == total), None)
    if last is None:
        return []
    after = [last] if _find_file(study, last.stage_id) else []
    first = next((encoder for encoder, count in tokens.items() if count == 0), None)
    if first is None or not total:
        return after
    key, origin = peek_key(results, last.stage_id), peek_key(results, first)
    if key is not None and origin is not None:
        for encoder in (first, name_start(origin["encoder"])):
            stage_id = name_stage("embed", key | {"encoder": encoder})
            if _find_file(study, stage_id):
                return [Space(start.role, start.label, stage_id, last.evaluated), *after]
    measured = sorted((tokens[encoder], encoder) for encoder in embedded if 0 < tokens.get(encoder, 0) < total)
    for count, encoder in measured[:1]:
        space = embedded[encoder]
        if _find_file(study, space.stage_id):
            role = f"{pick.role}, after {count / total:.0%} of its tokens"
            return [space._replace(role=role, between=True), *after]
    return after


def _find_file(study: Study, stage_id: str) -> Path | None:
    folder = open_stage(study.results, stage_id, EMBEDDINGS)
    return None if folder is None else folder / EMBEDDINGS


def _open_classes(study: Study, task: str, space: Space) -> tuple[Classes, dict[str, NDArray[Any]]]:
    """The validation rows to draw, with their classes; and the coded rows. Raises MissingError."""
    for stage_id in list_stages(study.results, "corpus"):
        info = peek_stage(study.results, stage_id)
        if info is not None and info["digests"].get(f"task:{task}") == space.evaluated["rows"]:
            folder = open_stage(study.results, stage_id)
            if folder is not None:
                rows = open_rows(folder, task)
                labels = rows["label"][rows["part"] == VALIDATION]
                return choose_rows(labels, info["classes"][task]), rows
    raise MissingError(f"the classes of {task}'s rows are not kept; run the job again")


def _find_places(
    study: Study, space: Space, rows: dict[str, NDArray[Any]], chosen: Classes
) -> NDArray[np.int64] | None:
    """Where the chosen validation rows stand among the embedded ones, which are those and the draws' training rows."""
    asked = space.evaluated
    evaluate = Evaluate(shots=tuple(asked["evaluate"]["shots"]), draws=asked["evaluate"]["draws"])
    validation = np.flatnonzero(rows["part"] == VALIDATION)
    draws = list_draws(rows, asked["task"], evaluate, asked["seed"])
    needed = np.unique(np.concatenate([validation, *(draw.rows for draw in draws)]))
    key = peek_key(study.results, space.stage_id)
    if key is None or key["rows"] != digest(needed.tolist()):
        return None
    return np.searchsorted(needed, validation[chosen.rows])


def choose_rows(labels: NDArray[Any], names: Sequence[str]) -> Classes:
    """At most 2,000 of the rows with labels int64 [n], or int8 [n, L], where a class is a set of labels.

    Raises MissingError where under two classes could be drawn.
    """
    if labels.ndim == 2:
        sets, of = np.unique(labels, axis=0, return_inverse=True)
        titles = [" + ".join(name for name, has in zip(names, row, strict=True) if has == 1) or "none" for row in sets]
        codes = np.where((labels < 0).any(axis=1), -1, of.reshape(-1))
    else:
        titles, codes = list(names), labels.astype(np.int64)
    sizes = np.bincount(codes[codes >= 0], minlength=len(titles))
    largest = [code for code in np.argsort(-sizes, kind="stable") if sizes[code] >= FEWEST][:MOST_CLASSES]
    places = np.full(len(titles) + 1, -1)
    places[largest] = np.arange(len(largest))
    codes = places[codes]
    kept = np.arange(len(codes))
    if (codes < 0).sum() < FEWEST:
        kept = kept[codes >= 0]
    if len(largest) < 2:
        raise MissingError(f"under two classes have {FEWEST} validation rows: in smaller ones a patient might be known")
    kept = np.sort(np.random.default_rng(0).permutation(kept)[:MOST_POINTS])
    return Classes(kept, codes[kept], [titles[code] for code in largest])


def project(space: Space, x: Floats, codes: NDArray[np.int64]) -> Map:
    """Rows x [n, D], made of length 1, on their first two principal components; codes [n], -1 for no class shown."""
    from sklearn.decomposition import PCA

    length = np.linalg.norm(x, axis=1, keepdims=True)
    x = x / np.where(length > 0, length, 1.0)
    # Not randomised: the same places each time.
    pca = PCA(n_components=min(2, *x.shape), svd_solver="full")
    with np.errstate(invalid="ignore", divide="ignore"):  # all of one place
        places = pca.fit_transform(x)
    places = np.pad(places, ((0, 0), (0, 2 - places.shape[1])))
    first, second = (float(share) for share in [*np.nan_to_num(pca.explained_variance_ratio_), 0.0][:2])
    return Map(space, places, (first, second), share_between(x, codes), share_between(places, codes), x.shape[1])


def share_between(x: Floats, codes: NDArray[np.int64]) -> float:
    """The share of the variance of the rows x [n, D] with a class that lies between the means of the classes."""
    x, codes = x[codes >= 0], codes[codes >= 0]
    if not len(x):
        return math.nan
    x = x - x.mean(axis=0)
    sizes = np.bincount(codes)
    sums = np.stack([np.bincount(codes, weights=column) for column in x.T], axis=1)[sizes > 0]
    total = float((x * x).sum())
    return float(((sums**2).sum(axis=1) / sizes[sizes > 0]).sum() / total) if total > 0 else math.nan


def _describe(maps: Sequence[Map], chosen: Classes) -> str:
    """What the maps show, for who does not see them."""
    classes = ", ".join(f"{number} {name}" for number, name in enumerate(chosen.names, 1))
    told = "; ".join(
        f"{found.space.role}: {sum(found.shown):.0%} of the variance is shown, {found.between_map:.0%} of that lies "
        "between the classes" for found in maps
    )  # fmt: skip
    return f"{len(chosen.rows):,} points a map. {told}. Classes, the largest first: {classes}."


def find_apart(means: Floats, spread: float) -> NDArray[np.bool_]:
    """Which of the means [k, 2] of classes stand apart from all others, in a map of so large a spread: bool [k]."""
    distances = np.linalg.norm(means[:, None] - means[None], axis=2) + np.where(np.eye(len(means)), np.inf, 0.0)
    return np.asarray(distances.min(axis=1) >= 0.09 * spread)


def _draw(maps: Sequence[Map], chosen: Classes) -> "Figure":
    """The maps two beside each other; the legend takes the place that is left, or its own below."""
    from matplotlib.lines import Line2D
    from matplotlib.patheffects import withStroke

    styles = list(itertools.islice(list_styles(), len(chosen.names)))
    names = [
        f"{number} {name if len(name) <= LONGEST_NAME else f'{name[:30]} ... {name[-15:]}'}"
        for number, name in enumerate(chosen.names, 1)
    ]
    handles = [
        Line2D([], [], linestyle="", marker=style["marker"], color=style["color"], label=name)
        for name, style in zip(names, styles, strict=True)
    ]
    if (chosen.codes < 0).any():
        handles.append(Line2D([], [], linestyle="", marker=".", color=_LIGHT, label=OTHERS))
    across = max(1, min(5, 130 // (max(map(len, [*names, OTHERS])) + 8)))
    columns = min(2, len(maps))
    lines, below = math.ceil(len(maps) / columns), 0.2 * math.ceil(len(handles) / across)
    figure, panels = start_figure(lines, columns, height=(3.9 if columns > 1 else 5.0) + below / lines)
    size = 22 if len(chosen.rows) <= 300 else 12 if len(chosen.rows) <= 1000 else 8
    for panel, found in zip(panels.flat, maps, strict=False):
        for number in range(-1, len(styles)):
            here = found.places[chosen.codes == number]
            color, marker = (styles[number]["color"], styles[number]["marker"]) if number >= 0 else (_LIGHT, ".")
            panel.scatter(
                here[:, 0], here[:, 1], s=size, color=color, marker=marker, linewidths=0, alpha=0.75, rasterized=True
            )
        drawn = np.unique(chosen.codes[chosen.codes >= 0])
        means = np.array([found.places[chosen.codes == number].mean(axis=0) for number in drawn])
        apart = find_apart(means, float(np.ptp(found.places, axis=0).max()))
        for number, (x, y) in zip(drawn[apart].tolist(), means[apart].tolist(), strict=True):
            panel.text(x, y, str(number + 1), ha="center", va="center", weight="bold", fontsize=10,
                       path_effects=[withStroke(linewidth=3, foreground="white")])  # fmt: skip
        panel.set_aspect("equal", adjustable="datalim")
        panel.locator_params(nbins=5)
        panel.set_title(write_title(found.space.role, found.space.label, columns))
        panel.set_xlabel(f"first component, {found.shown[0]:.0%} of the variance")
        panel.set_ylabel(f"second component, {found.shown[1]:.0%}")
    left = panels.flat[len(maps) :]
    for panel in left:
        panel.set_axis_off()
        panel.legend(handles=handles, loc="center")
    if not len(left):
        figure.legend(handles=handles, loc="outside lower center", ncols=across)
    return figure
