"""Maps of validation embeddings by class, before and after pre-training: two principal components of each space."""

import textwrap
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from raylab.base.counts import FEWEST
from raylab.base.identity import digest
from raylab.data.corpus import VALIDATION, open_rows
from raylab.evaluation.draws import list_draws
from raylab.job.blocks import Evaluate
from raylab.report.drawing import list_styles, start_figure, wrap_label
from raylab.report.parts import MissingError, Plot, Row, Section, Study, Table
from raylab.report.picks import Pick, list_best, pick_encoders
from raylab.results.queries import list_ranked
from raylab.results.tables import read_rows, read_trial
from raylab.store.stages import FOLDER, list_stages, name_stage, open_stage, peek_key, peek_stage

Floats = NDArray[np.float64]
MOST_POINTS = 2000
# More would not be told apart.
MOST_CLASSES = 10
EMBEDDINGS = "embeddings.npy"
OTHERS = "other classes"
_LIGHT = "#d9d9d9"


class Space(NamedTuple):
    """The embeddings of an encoder on some rows of a task: what they are called, and the id of their stage."""

    label: str
    stage_id: str
    seed: int


class Map(NamedTuple):
    """A space as it is drawn: places [n, 2], the share of the variance on each axis, and shares between classes."""

    space: Space
    places: Floats
    shown: tuple[float, float]
    between: float
    between_map: float
    dimensions: int


class Classes(NamedTuple):
    """Which validation rows are drawn, as places among them, and the class of each: a code of `names`, -1 for others.

    Only classes of at least 10 validation rows have a name; so have the others together, or they are left out.
    """

    rows: NDArray[np.int64]
    codes: NDArray[np.int64]
    names: list[str]
    others: int


def tell_maps(study: Study) -> Section:
    """Two principal components of the validation embeddings by class: the start, the base arm and the best arm."""
    task = study.cell["task"]
    spaces, corpus = _find_spaces(study, task)
    if not spaces:
        raise MissingError(f"no embeddings of {task} are kept of the best arm or the base arm")
    chosen, places = _open_rows(study, task, spaces[0], corpus)
    maps = []
    for space in spaces:
        folder = open_stage(study.results, space.stage_id, EMBEDDINGS)
        if folder is not None:
            x = np.load(folder / EMBEDDINGS, mmap_mode="r")[places].astype(np.float64)
            maps.append(_project(space, x, chosen.codes))
    named = chosen.codes >= 0
    rows: list[Row] = [
        {"encoder": found.space.label, "class": chosen.names[code] if code >= 0 else OTHERS,
         "x": float(f"{x:.4g}"), "y": float(f"{y:.4g}")}
        for found in maps for code, (x, y) in zip(chosen.codes.tolist(), found.places.tolist(), strict=True)
    ]  # fmt: skip
    # Not in the order of the corpus.
    rows.sort(key=lambda row: tuple(row.values()))
    chance = (len(chosen.names) - 1) / max(1, int(named.sum()) - 1)
    told = "; ".join(f"{found.space.label}: {found.between:.1%}" for found in maps)
    lead = [
        f"Of the variance of {task}'s validation embeddings, this share lies between the {len(chosen.names)} classes "
        f"shown, over all dimensions: {told} ({chance:.1%} by chance)."
    ]
    caution = (
        "Each map is a principal component analysis of its own, of embeddings of length 1: distances within a map mean "
        "something, places and scales of two maps do not compare. It shows only the stated share of the variance: what "
        "overlaps here may be apart in other dimensions, and one seed is shown. Trust the shares over all dimensions, "
        "and the metrics of the space, over what a map suggests."
    )
    columns = {"encoder": "encoder", "seed": "seed", "points": "points", "dimensions": "dimensions",
               "shown": "variance shown", "between_map": "between classes, in the map",
               "between": "between classes, all dimensions", "chance": "by chance"}  # fmt: skip
    table = [
        {"encoder": found.space.label, "seed": found.space.seed, "points": len(found.places),
         "dimensions": found.dimensions, "shown": sum(found.shown), "between_map": found.between_map,
         "between": found.between, "chance": chance}
        for found in maps
    ]  # fmt: skip
    figure = Plot("maps", f"Validation embeddings of {task} by class, seed {spaces[0].seed}",
                  _describe(task, maps, chosen), _draw(maps, chosen), rows, raster=True)  # fmt: skip
    few = f"{OTHERS.capitalize()} (light grey) are those with under {FEWEST} validation rows, which are not named"
    few += f", and those after the {MOST_CLASSES} largest." if chosen.others > 1 else "."
    notes = [caution, *([few] if chosen.others else [])]
    return Section("maps", "Maps of the embeddings", lead, [*notes, figure, Table("spaces", "Spaces drawn", table, columns)])


def _find_spaces(study: Study, task: str) -> tuple[list[Space], str]:
    """The spaces to draw, each once, all of one seed and corpus; and the digest of the task's rows."""
    ranked = list_best(study)
    picks = [pick for pick in pick_encoders(study, ranked) if pick.rung is None]
    trials: dict[str, dict[int, str]] = {}
    for row in list_ranked(study.results, study.job.name):
        trials.setdefault(row["arm"], {})[row["seed"]] = row["trial_id"]
    shared = set.intersection(*(set(trials[pick.arm]) for pick in picks)) or set(trials[ranked[0]])
    seed, found, corpora = min(shared), {}, {}
    for pick in picks:
        if seed not in trials[pick.arm]:
            continue
        for label, stage_id, rows in _list_kept(study, pick, trials[pick.arm][seed], task):
            found.setdefault(stage_id, Space(label, stage_id, seed))
            corpora[stage_id] = rows
    wanted = next((corpora[stage_id] for stage_id in reversed(found)), "")
    return [space for stage_id, space in found.items() if corpora[stage_id] == wanted], wanted


def _list_kept(study: Study, pick: Pick, trial_id: str, task: str) -> list[tuple[str, str, str]]:
    """The kept embeddings of a trial on a task, before and after: label, stage, and digest of the task's rows.

    Before is the start, if any job has embedded it on the same rows; else the first rung that was measured.
    """
    results, name = study.results, study.job.name
    trial = read_trial(results, name, trial_id)
    stages = read_rows(results, name, "stages", trial_id)
    tokens: dict[str, int] = {}
    embedded: dict[str, tuple[str, str]] = {}
    for row in stages:
        info, key = peek_stage(results, row["stage_id"]), peek_key(results, row["stage_id"])
        if info is None or key is None:
            continue
        if row["kind"] == "pretrain":
            tokens[row["stage_id"]] = info["tokens"]
        elif row["kind"] == "evaluate" and key["task"] == task and "embed" in info["used"]:
            embedded[key["encoder"]] = (info["used"]["embed"], key["rows"])
    total = trial["num_tokens"] if trial is not None else None
    last = next((of for encoder, of in embedded.items() if tokens.get(encoder) == total), None)
    if last is None:
        return []
    after = [(pick.label, *last)] if _is_kept(study, last[0]) else []
    start = next((encoder for encoder, count in tokens.items() if count == 0), None)
    if start is None or not total:
        return after
    key, origin = peek_key(results, last[0]), peek_key(results, start)
    if key is not None and origin is not None:
        for encoder in (start, f"start-{origin['encoder']}"):
            stage_id = name_stage("embed", key | {"encoder": encoder})
            if _is_kept(study, stage_id):
                return [("start, before pre-training", stage_id, last[1]), *after]
    first = min((encoder for encoder in embedded if 0 < tokens.get(encoder, 0) < total), key=tokens.__getitem__, default="")
    if first and _is_kept(study, embedded[first][0]):
        label = f"{pick.label}, after {tokens[first]:,} of {total:,} tokens"
        return [(label, *embedded[first]), *after]
    return after


def _is_kept(study: Study, stage_id: str) -> bool:
    return peek_stage(study.results, stage_id) is not None and open_stage(study.results, stage_id, EMBEDDINGS) is not None


def _open_rows(study: Study, task: str, space: Space, corpus: str) -> tuple[Classes, NDArray[np.int64]]:
    """The validation rows to draw, and their places among the embedded rows. Raises MissingError."""
    results = study.results
    for stage_id in list_stages(results, "corpus"):
        info = peek_stage(results, stage_id)
        if info is not None and info["digests"].get(f"task:{task}") == corpus:
            break
    else:
        raise MissingError(f"the classes of {task}'s rows are not kept any more; run the job again")
    if open_stage(results, stage_id) is None:
        raise MissingError(f"the classes of {task}'s rows are not kept any more; run the job again")
    rows = open_rows(results / FOLDER / stage_id, task)
    validation = np.flatnonzero(rows["part"] == VALIDATION)
    key = peek_key(results, space.stage_id)
    needed = next(
        (found for found in _list_needed(study, task, rows, validation, space.seed)
         if key is not None and digest(found.tolist()) == key["rows"]), None,
    )  # fmt: skip
    if needed is None:
        raise MissingError(f"which rows of {task} the kept embeddings are of can't be told: shots or draws have changed")
    chosen = choose_rows(rows["label"][validation], info["classes"][task])
    return chosen, np.searchsorted(needed, validation[chosen.rows])
