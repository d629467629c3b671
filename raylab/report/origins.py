"""What the numbers rest on and cost: the corpus' hygiene, time and reuse, versions, and how to get any row again."""

import json
import shlex
from typing import Any

from raylab.base.counts import FEWEST, show_count
from raylab.job.jobs import dump_yaml
from raylab.job.settings import label_values
from raylab.report.parts import Code, MissingError, Part, Section, Study, Table, ask, name_arm
from raylab.results.queries import list_ranked, open_tables
from raylab.results.ranking import BASELINE
from raylab.results.tables import SETTING_COLUMNS
from raylab.store.storage import is_mirror, name_results

Row = dict[str, Any]
_WORST = ("problem", "look", "ok")


def tell_hygiene(study: Study) -> Section:
    """The checks of the corpus, the worst first: shares, and counts of rows from 10 on."""
    connection = open_tables(study.results, "hygiene", study.job.name)
    rows = ask(
        connection,
        """
        select verdict, check_name as "check", table_name as "table", split, "class", num_rows as rows,
            num_checked as checked, share, value, look_above, problem_above
        from hygiene where job = ? order by all
        """,
        [study.job.name],
    )
    if not rows:
        raise MissingError("the corpus was not checked; 'raylab plan' and 'raylab run' do that")
    rows.sort(key=lambda row: (_WORST.index(row["verdict"]), row["check"], -(row["value"] or 0)))
    counts = {verdict: sum(row["verdict"] == verdict for row in rows) for verdict in _WORST}
    poor = len(rows) - counts["ok"]
    lead = [
        f"{len(rows)} checks: {counts['problem']} problems, {counts['look']} to look at, {counts['ok']} ok."
        + (" Scores are to be read beside the problems." if counts["problem"] else "")
    ]
    columns = {
        "verdict": "verdict", "check": "check", "table": "table", "split": "split", "class": "class", "rows": "rows",
        "share": "share", "value": "value", "problem_above": "problem above",
    }  # fmt: skip
    title = "Checks that are not ok, the worst first" if poor else "Checks, all of them ok"
    table = Table("hygiene", title, [_hide_small(row) for row in rows], columns, shown=min(poor, 30) or 5)
    about = "What each check counts, why it matters and what to do is printed by 'raylab plan'. No text is in it."
    return Section("hygiene", "Corpus hygiene", lead, [table, about])


def _hide_small(row: Row) -> Row:
    """Of fewer than 10 rows neither the number nor the share is told: either would tell the other."""
    if row["checked"] < FEWEST:
        row = row | {"checked": show_count(row["checked"])}
    if not 0 < row["rows"] < FEWEST:
        return row
    hidden: Row = {"rows": show_count(row["rows"]), "share": None}
    # Most checks' value is that share.
    return row | hidden | ({"value": None} if row["value"] == row["share"] else {})


def tell_cost(study: Study) -> Section:
    """What the job took, by arm, and what shared stages saved."""
    connection = open_tables(study.results, "trials stages curves", study.job.name)
    found = ask(
        connection,
        f"""
        select t.arm, count(*) as trials, count(*) filter (where t.status = 'complete') as complete,
            sum(t.wall_seconds) as wall_seconds, sum(t.gpu_seconds) as gpu_seconds,
            sum(t.num_tokens)::bigint as tokens, sum(t.flops) as flops, coalesce(sum(u.stages), 0)::bigint as stages,
            coalesce(sum(u.reused), 0)::bigint as reused, coalesce(sum(u.saved), 0.0) as saved_seconds,
            max(t.peak_memory_bytes) as peak_memory_bytes, avg(c.tokens_per_second) as tokens_per_second,
            avg(c.mfu) as mfu
        from trials t left join (
            select trial_id, count(*) as stages, count(*) filter (where reused) as reused, sum(saved_seconds) as saved
            from stages where job = $1 group by trial_id
        ) u using (trial_id) left join (
            select trial_id, median(value) filter (where metric = 'train_tokens_per_second') as tokens_per_second,
                median(value) filter (where metric = 'train_mfu') as mfu
            from curves where job = $1 group by trial_id
        ) c using (trial_id)
        where t.job = $1 and t.arm not like '{BASELINE}%' group by t.arm order by wall_seconds desc, t.arm
        """,
        [study.job.name],
    )
    searched = [f'any_value("{name}") as "{name}"' for name in study.job.search.space]
    settings = ask(
        connection, f"select {', '.join(['arm', *searched])} from trials where job = ? group by arm", [study.job.name]
    )
    # Arms of a search that were not confirmed have no label of a ranking.
    labels = {row.pop("arm"): label_values(row) for row in settings}
    rows: list[Row] = [
        {"label": study.arms.labels.get(row["arm"]) or labels[row["arm"]] or row["arm"]} | row for row in found
    ]
    kinds = ask(
        connection,
        """
        select kind, count(*) as used, count(*) filter (where reused) as reused,
            sum(wall_seconds) filter (where not reused) as wall_seconds, sum(saved_seconds) as saved_seconds
        from stages where job = ? group by kind order by wall_seconds desc nulls last, kind
        """,
        [study.job.name],
    )
    states = ask(
        connection,
        f"""
        select phase, status, count(*) as trials from trials
        where job = ? and arm not like '{BASELINE}%' group by all order by all
        """,
        [study.job.name],
    )
    wall, gpu, saved = (
        sum(row[name] or 0.0 for row in rows) for name in ("wall_seconds", "gpu_seconds", "saved_seconds")
    )
    lead = [
        f"{sum(row['trials'] for row in rows):,} trials of {len(rows):,} arms took {tell_time(wall)} of trial time"
        + (f", {tell_time(gpu)} of GPU time" if gpu else "")
        + f", {sum(row['tokens'] or 0 for row in rows):,} tokens of pre-training. Shared stages were reused "
        f"{sum(row['reused'] for row in rows):,} times, which saved {tell_time(saved)}"
        + (f", {saved / (wall + saved):.0%} of what all would have taken." if wall + saved else ".")
    ]
    columns = {
        "label": "arm", "trials": "trials", "wall_seconds": "seconds", "gpu_seconds": "GPU seconds",
        "tokens": "tokens", "flops": "FLOPs", "tokens_per_second": "tokens/s", "mfu": "MFU",
        "reused": "stages reused", "saved_seconds": "seconds saved",
    }  # fmt: skip
    parts: list[Part] = [Table("states", "Trials by phase and state", states)]
    if kinds:
        parts.append(Table("stages", "Stages by kind: used, reused, seconds", kinds))
    parts.append(Table("cost", "Arms by trial time", rows, columns, shown=10))
    parts.append(
        "Tokens/s of pre-training: the median over the points of a curve. MFU: needed FLOPs a second, as a share of "
        "what the device reaches in a large matrix product."
    )
    return Section("cost", "Cost, and what reuse saved", lead, parts)


def tell_time(seconds: float) -> str:
    """A time for people."""
    for size, unit in ((3600.0, "hours"), (60.0, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:,.1f} seconds"


def tell_provenance(study: Study) -> Section:
    """Which data, code and devices made the ranked arms, their trials, the job file, and how to get a row again."""
    job = study.job
    listed = ", ".join(f't."{name}"' for name in SETTING_COLUMNS)
    found = ask(
        open_tables(study.results, "trials", job.name),
        f"""
        select trial_id, arm, seed, phase, status, data_digest, code_version, device, attempts,
            strftime(started_at, '%Y-%m-%d %H:%M') as started, {listed}
        from trials t where job = ? and arm not like '{BASELINE}%' order by arm, seed
        """,
        [job.name],
    )
    # Of a search only the confirmation ranks: the arms' own searched trials stand under what the search found.
    ranked = {row["trial_id"] for row in list_ranked(study.results, job.name)}
    rows = [row for row in found if row["arm"] in study.arms.rows and row["trial_id"] in ranked]
    if not rows:
        raise MissingError("no ranked arm has a complete trial")
    about = []
    for name, title in (("data_digest", "data"), ("code_version", "code"), ("device", "devices")):
        values = sorted({row[name] or "unknown" for row in rows})
        about.append(f"{title.capitalize()}: {'; '.join(values)}.")
    lead = [
        f"Each of {len(rows):,} ranked trials names the data, code and device that made it."
        + ("" if len({row["data_digest"] for row in rows}) == 1 else " They are not all of one data set.")
        + ("" if len({row["code_version"] for row in rows}) == 1 else " They are not all of one version of the code.")
    ]
    best = next(iter(sorted(rows, key=lambda row: list(study.arms.rows).index(row["arm"]))))
    columns = {"trial_id": "trial", "label": "arm", "seed": "seed", "phase": "phase", "device": "device",
               "started": "started (UTC)"}  # fmt: skip
    shown = [{"label": name_arm(study, row["arm"])} | row for row in rows]
    return Section(
        "provenance", "Where the numbers come from", lead,
        [
            *about,
            "To get a row again, run its arm alone on its seed, as a job of another name. On CPU, with the same data "
            f"and versions, its values are the same to the last digit. For trial {best['trial_id']}"
            + (f", with the job below as {job.name}.yaml:" if is_mirror(study.results) else ":"),
            Code(tell_again(study, best)),
            Table("trials", "Ranked trials; the file has all their settings", shown, columns, shown=10),
            "The job as it was run:",
            Code(dump_yaml(job)),
        ],
    )  # fmt: skip


def tell_again(study: Study, row: Row) -> str:
    """The command that runs one trial's arm and seed again, from the job file kept beside the results."""
    job = study.job
    search: Row = {"design": "grid", "seeds": [row["seed"]]}
    # What a search has and a single arm refuses; null takes it away.
    left = ("space", "num_arms", "confirm", "early_stopping", "sampler_seed")
    search |= {name: None for name in left if name in job.search.model_fields_set}
    changes: Row = {"name": f"{job.name}-again", "search": search}
    if job.analysis.primary is not None:
        changes["analysis"] = None
    for name in job.search.space:
        if row[name] is not None:
            value = row[name]
            changes[name] = json.loads(value) if isinstance(value, str) and value[:1] in "[{" else value
    given = [f"--set {shlex.quote(f'{name}={json.dumps(value)}')}" for name, value in changes.items()]
    file = f"{job.name}.yaml" if is_mirror(study.results) else f"{name_results(study.results)}/{job.name}/job.yaml"
    lines = [f"raylab run {shlex.quote(file)} --results again", *given]
    return " \\\n  ".join(lines)
