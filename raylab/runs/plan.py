"""What a job would run and what the corpus makes of its settings: counted from the token stores, before any GPU."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table as Grid

from raylab.base.identity import digest
from raylab.base.mistakes import JobError
from raylab.data.corpus import DOCUMENTS, TRAIN, VALIDATION, metadata_fields, open_rows
from raylab.data.labels import to_array
from raylab.data.tokens import open_tokens
from raylab.evaluation.draws import draw_shots
from raylab.job.designs import count_trials, list_levels, list_points
from raylab.job.explanations import explain
from raylab.job.settings import OBJECTIVE_BLOCKS, list_boundaries, list_settings, possible_values, with_settings
from raylab.job.specs import ADAPTIVE, Choices, Job, TrialSpec
from raylab.results.tables import list_trials
from raylab.runs.hygiene import check_corpus, print_hygiene
from raylab.runs.preparation import Preparation, make_spec, name_point, prepare
from raylab.runs.rates import Work, plan_time, share_work, tell_time
from raylab.statistics.analysis import count_family
from raylab.statistics.comparisons import count_least_seeds, find_smallest_p
from raylab.store.stages import FOLDER, open_stage, peek_stage, read_info
from raylab.training.batches import cut_pieces, describe_spans
from raylab.training.rungs import list_rungs

BYTES_A_WEIGHT = 4
BYTES_A_STATE = 2


def plan_job(job: Job, results: Path) -> dict[str, Any]:
    """Arms, trials, tokens, disk and time; what the corpus holds; spans and documents kept; settings that can't work.

    Plain values. Tokenises where no store is there yet; a job planned before is read from the stores.
    """
    preparation = prepare(job, results)
    base = make_spec(preparation, {}, job.search.seeds[0], "fixed")
    found: dict[str, Any] = {"job": job.name, "design": job.search.design}
    found |= _plan_arms(preparation)
    found["comparisons"] = plan_comparisons(job)
    found |= _plan_states(preparation, base)
    untrained = found["trials"] - found["trials_with_pretraining"]
    found["evaluated_encoders"] = found["pretrainings"] * job.pretrain.rungs + untrained
    found["corpus"] = _describe_tables(preparation, base)
    found["spans"] = _describe_spans(preparation, base)
    found["hygiene"] = check_corpus(preparation, base)
    return found


def _plan_arms(preparation: Preparation) -> dict[str, Any]:
    job, results = preparation.job, preparation.results
    infeasible: list[str] = []
    seeds, confirm = job.search.seeds, job.search.confirm
    known: set[str] | None = None
    if job.search.design in ADAPTIVE:
        # Which arms a search will ask for isn't known: each may have a pre-training of its own.
        arms = job.search.num_arms or 0
        trials = count_trials(job, arms)
        needed = trials if possible_values(job, "pretrain.objective") != {"none"} else 0
        pretrainings, found, tokens = needed, 0, needed * job.pretrain.num_tokens
        work = share_work(job, tokens)
    else:
        points: list[dict[str, Any]] = []
        known = set()
        for values in list_points(job):
            try:
                arm, _ = name_point(preparation, values)
            except JobError as error:
                infeasible.append(error.problems[0])
                continue
            if arm not in known:
                known.add(arm)
                points.append(values)
        arms = len(points)
        trials = count_trials(job, arms)
        needed, chains = _plan_pretrainings(preparation, points)
        pretrainings, found = len(chains), sum(there for there, _ in chains.values())
        work = [part for there, part in chains.values() if not there]
        tokens = sum(part.longest for part in work)
    started = {*seeds, *(confirm.seeds if confirm else ())}
    done = [
        row
        for row in list_trials(results, job.name)
        if row["status"] == "complete" and not row["arm"].startswith("baseline")
        # Not what an earlier form of the job asked for.
        and row["seed"] in started and (known is None or row["phase"] == "confirm" or row["arm"] in known)
    ]  # fmt: skip
    weights = _weight_bytes(job, preparation)
    rungs, running = job.pretrain.rungs, job.resources.max_concurrent_trials or 1
    return {
        "arms": arms,
        "trials": trials,
        "trials_done": len(done),
        "trials_with_pretraining": needed,
        "pretrainings": pretrainings,
        "pretrainings_found": found,
        "encoder_starts": len(started),
        "tokens": tokens,
        # While it runs all rungs stay, and AdamW's two numbers a weight of those that train.
        "disk_bytes": weights * (pretrainings * rungs + 2 * running),
        "disk_kept_bytes": weights * pretrainings * (rungs if job.limits.checkpoints == "all" else 1),
        "disk_free_bytes": shutil.disk_usage(next(p for p in (results, *results.parents) if p.exists())).free,
        "cant_work": infeasible,
    } | plan_time(preparation, work, max(trials - len(done), 0))


def plan_comparisons(job: Job) -> dict[str, Any]:
    """The seeds that the declared comparisons need at least, the seeds on which arms are ranked, and warnings.

    So many can show a difference that is there on every seed; how many a smaller one takes depends on its spread.
    """
    confirm, design = job.search.confirm, job.search.design
    given = len(job.search.seeds) if design not in ADAPTIVE else len(confirm.seeds) if confirm else 0
    family = count_family(job)
    needed = {"primary": count_least_seeds() if job.analysis.primary is not None else None,
              "exploratory": count_least_seeds(family) if family else None}  # fmt: skip
    where = "search.confirm.seeds" if design in ADAPTIVE else "search.seeds"
    warnings = []
    if design in ADAPTIVE and confirm is None:
        warnings.append("search.confirm is not set: no arm is confirmed on fresh seeds, so none is ranked or compared")
        needed = dict.fromkeys(needed)
    for role, least in needed.items():
        if least is not None and given < least:
            what = "the primary comparison" if role == "primary" else f"{family} exploratory comparisons"
            warnings.append(
                f"{where}: {given} can't show {what} (p is never under {find_smallest_p(given):.2g}); "
                f"{least} are needed at least"
            )
    return {"seeds": given, "family": family, "seeds_at_least": needed, "warnings": warnings}


def tell_comparisons(found: Mapping[str, Any]) -> str | None:
    """How many seeds the declared comparisons need, of `plan_comparisons`; None where nothing is compared."""
    family = found["family"]
    named = {"primary": "the primary one", "exploratory": f"{family} exploratory one{'s' * (family > 1)}"}
    needed = [f"{least} for {named[role]}" for role, least in found["seeds_at_least"].items() if least is not None]
    if not needed:
        return None
    return (
        f"comparisons: {found['seeds']} seeds an arm; needed at least: {', '.join(needed)}; "
        "'raylab compare' estimates what smaller differences take"
    )


def _plan_pretrainings(
    preparation: Preparation, points: list[dict[str, Any]]
) -> tuple[int, dict[tuple[str, int], tuple[bool, Work]]]:
    """How many trials need a pre-training; and each that is needed once: whether it is there, and its work."""
    chains: dict[tuple[str, int], tuple[bool, Work]] = {}
    job, needed = preparation.job, 0
    for values in points:
        _, arm_job = name_point(preparation, values)
        if arm_job.pretrain.objective == "none":
            continue
        # What of the settings a pre-training reads: arms that are equal in it share it.
        read = {name: v for name, v in list_settings(arm_job).items() if not name.startswith("evaluate.")}
        for seed in job.search.seeds:
            needed += 1
            key = (digest(read), seed)
            if key not in chains:
                known = False
                if not job.corpus.split.vary or seed == job.search.seeds[0]:  # else its tokens would have to be made
                    last = list_rungs(make_spec(preparation, values, seed, "fixed"))[-1]
                    known = peek_stage(preparation.results, last.stage_id) is not None
                size = arm_job.pretrain.num_tokens
                chains[key] = (known, Work(arm_job, values, size, size))
    return needed, chains


def _weight_bytes(job: Job, preparation: Preparation) -> int:
    """Bytes of an encoder's weights."""
    config = job.encoder.config
    if config is not None and job.encoder.tokenizer is not None:
        layer = 4 * config.hidden_size**2 + 2 * config.hidden_size * config.intermediate_size
        embeddings = (job.encoder.tokenizer.vocab_size + job.corpus.max_length) * config.hidden_size
        return BYTES_A_WEIGHT * (config.num_hidden_layers * layer + embeddings + config.hidden_size**2)
    start = make_spec(preparation, {}, job.search.seeds[0], "fixed").encoder_path
    files = Path(start or "").glob("*.safetensors") if start and Path(start).is_dir() else ()
    return sum(file.stat().st_size for file in files)


def _plan_states(preparation: Preparation, base: TrialSpec) -> dict[str, Any]:
    """Bytes of the hidden states that one evaluated encoder keeps, half precision, for all tasks and freeze depths."""
    job, seed, total = preparation.job, base.seed, 0
    boundaries = list_boundaries(job)
    for task in job.evaluate.tasks or job.corpus.tasks if boundaries else ():
        table = open_rows(preparation.results / FOLDER / base.corpus, task)
        part, labels, groups = (table[name] for name in ("part", "label", "group"))
        train = np.flatnonzero(part == TRAIN)
        rows = [np.flatnonzero(part == VALIDATION)]
        for shots in job.evaluate.shots:
            number = None if shots == "full" else shots
            for draw in range(job.evaluate.draws if number else 1):
                rows.append(train[draw_shots(labels[train], groups[train], number, seed=seed, task=task, draw=draw)])
        folder = open_stage(preparation.results, base.tokens[task])
        assert folder is not None
        needed = np.unique(np.concatenate(rows))
        pieces = cut_pieces(open_tokens(folder).lengths, needed, job.corpus.max_length, job.corpus.long_documents)
        total += int((pieces.length + 2).sum()) * _hidden_size(job, base) * BYTES_A_STATE * len(boundaries)
    return {"state_bytes": total}


def _hidden_size(job: Job, base: TrialSpec) -> int:
    if job.encoder.config is not None:
        return job.encoder.config.hidden_size
    from transformers import AutoConfig

    size: int = AutoConfig.from_pretrained(base.encoder_path, revision=job.encoder.revision or "main").hidden_size
    return size


def _describe_tables(preparation: Preparation, base: TrialSpec) -> list[dict[str, Any]]:
    """A row a table, and a row a class of it: rows by part, tokens a row and a word, share of rows and tokens cut."""
    split, longest = preparation.split(base.seed), preparation.job.corpus.max_length - 2
    described: list[dict[str, Any]] = []
    for name, table in split.open.items():
        folder = open_stage(preparation.results, base.tokens[name])
        assert folder is not None
        info, lengths = read_info(folder), open_tokens(folder).lengths
        train = table["part"].to_numpy() == TRAIN
        row: dict[str, Any] = {
            "table": name,
            "class": None,
            "counts": split.counts[name],
            "rows": len(lengths),
            "median_tokens": float(np.median(lengths)) if len(lengths) else 0.0,
            "tokens_per_word": info["tokens"] / max(info["words"], 1),
        } | _cut(lengths, longest)
        described.append(row)
        groups = (
            {"label": split.classes[name]}
            if name != DOCUMENTS
            else {f: split.categories[f] for f in metadata_fields(preparation.job)}
        )
        for column, names in groups.items():
            codes = to_array(table[column])
            for code, class_name in enumerate(names):
                members = codes == code if codes.ndim == 1 else codes[:, code] == 1
                here = lengths[members]
                row = {
                    "table": name,
                    "class": f"{column}={class_name}",
                    "counts": {"train": int((train & members).sum())},
                    "rows": len(here),
                    "median_tokens": float(np.median(here)),
                    "tokens_per_word": None,
                }
                described.append(row | _cut(here, longest))
    return described


def _cut(lengths: Any, longest: int) -> dict[str, float]:
    over = np.maximum(lengths - longest, 0)
    return {"rows_cut": float((over > 0).mean()), "tokens_cut": float(over.sum() / max(lengths.sum(), 1))}


def _describe_spans(preparation: Preparation, base: TrialSpec) -> list[dict[str, Any]]:
    """Documents kept and effective spans for every span setting of the job, over all and by metadata class."""
    job = preparation.job
    objectives = {job.pretrain.objective, *_choices(job, "pretrain.objective")}
    if not any("declutr" in OBJECTIVE_BLOCKS[objective] for objective in objectives):
        return []
    folder = open_stage(preparation.results, base.tokens[DOCUMENTS])
    assert folder is not None
    documents = preparation.split(base.seed).open[DOCUMENTS]
    train = documents["part"].to_numpy() == TRAIN
    lengths = open_tokens(folder).lengths
    rows: list[dict[str, Any]] = []
    for settings in _span_settings(job):
        try:
            declutr = job.pretrain.declutr.model_validate(job.pretrain.declutr.model_dump() | settings)
        except ValidationError as error:
            problems = explain(error, ("pretrain", "declutr"))
            rows.append({"settings": settings, "class": None, "cant_work": "; ".join(problems)})
            continue
        everything = describe_spans(lengths[train], declutr)
        note = _broken_rules(job, settings)
        if note is None and not everything["documents"]:
            shortest = declutr.min_document_length or declutr.shortest_document()
            note = f"no training document has {shortest} tokens"
        rows.append({"settings": settings, "class": None, "cant_work": note} | everything)
        for field in metadata_fields(job):
            codes = documents[field].to_numpy()
            for code, value in enumerate(preparation.split(base.seed).categories[field]):
                described = describe_spans(lengths[train & (codes == code)], declutr)
                rows.append({"settings": settings, "class": f"{field}={value}", "cant_work": None} | described)
    return rows


def _broken_rules(job: Job, settings: Mapping[str, Any]) -> str | None:
    """The rules that a span setting breaks beside the job's other settings; those that are searched may yet suit it."""
    try:
        with_settings(
            job, {"pretrain.objective": "declutr"} | {f"pretrain.declutr.{k}": v for k, v in settings.items()}
        )
    except JobError as error:
        own = "pretrain.declutr"
        named = [(problem.split(":")[0], problem) for problem in error.problems]
        kept = [line for name, line in named if name.startswith(own) or name not in job.search.space]
        return "; ".join(kept) or None
    return None


def _choices(job: Job, name: str) -> list[Any]:
    entry = job.search.space.get(name)
    return list(entry.choices) if isinstance(entry, Choices) else []


def _span_settings(job: Job) -> list[dict[str, Any]]:
    """Every combination of the settings that decide which documents are kept: a handful, listed whole."""
    settings: list[dict[str, Any]] = [{}]
    for field in ("num_anchors", "max_span", "min_span", "short_documents", "min_document_length"):
        name = f"pretrain.declutr.{field}"
        values = list_levels(job, name) if name in job.search.space else [getattr(job.pretrain.declutr, field)]
        settings = [{**others, field: value} for others in settings for value in values]
    return settings


def print_plan(found: Mapping[str, Any], console: Console) -> None:
    """The plan for people."""
    console.print(
        f"{found['job']}: {found['design']}, {found['arms']} arms, {found['trials']} trials "
        f"({found['trials_done']} done)",
        highlight=False,
    )
    console.print(
        f"{found['trials_with_pretraining']} trials share {found['pretrainings']} pre-trainings from "
        f"{found['encoder_starts']} encoder starts; {found['pretrainings_found']} are there already, "
        f"{found['tokens']:,} tokens to train on",
        highlight=False,
    )
    console.print(
        f"checkpoints: up to {found['disk_bytes'] / 1e9:.2f} GB while it runs, {found['disk_kept_bytes'] / 1e9:.2f} GB "
        f"kept, of {found['disk_free_bytes'] / 1e9:.0f} GB free",
        highlight=False,
    )
    for line in tell_time(found):
        console.print(line, highlight=False)
    if found["state_bytes"]:
        console.print(
            f"hidden states at freeze depths: {found['state_bytes'] / 1e9:.2f} GB an evaluated encoder, kept until the "
            f"job is done where no task's exceed 1 GiB, of up to {found['evaluated_encoders']} encoders",
            highlight=False,
        )
    for line in found["cant_work"]:
        console.print(f"can't work: {line}", style="red", highlight=False)
    if told := tell_comparisons(found["comparisons"]):
        console.print(told, highlight=False)
    for line in found["comparisons"]["warnings"]:
        console.print(f"comparisons: {line}", style="yellow", highlight=False)
    grid = Grid(title="corpus: training and validation rows")
    for column in (
        "table",
        "class",
        "train",
        "rows",
        "median tokens",
        "tokens a word",
        "rows cut",
        "tokens cut",
        "left out",
    ):
        grid.add_column(column, overflow="fold")
    for row in found["corpus"]:
        counts = row["counts"]
        skipped = {
            k: v for k, v in counts.items() if k not in ("rows", "rows_read", "train", "validation", "test") and v
        }
        ratio = row["tokens_per_word"]
        grid.add_row(
            row["table"], row["class"] or "", str(counts["train"]), str(row["rows"]), f"{row['median_tokens']:.0f}",
            f"{ratio:.2f}" if ratio else "", f"{row['rows_cut']:.1%}", f"{row['tokens_cut']:.1%}",
            ", ".join(f"{v} {k}" for k, v in skipped.items()),
        )  # fmt: skip
    console.print(grid)
    print_hygiene(found["hygiene"], console)
    if found["spans"]:
        grid = Grid(title="DeCLUTR: training documents kept, by span setting")
        for column in ("settings", "class", "kept", "share", "shrunk", "median longest span", ""):
            grid.add_column(column, overflow="fold")
        for row in found["spans"]:
            named = ", ".join(f"{k}={v}" for k, v in row["settings"].items() if v is not None)
            shown = () if "documents" not in row else (
                str(row["documents"]), f"{row['share']:.1%}", str(row["shrunk"]), f"{row['median_max_span']:.0f}",
            )  # fmt: skip
            grid.add_row(named, row["class"] or "all", *(shown or ("", "", "", "")), row["cant_work"] or "")
        console.print(grid)
