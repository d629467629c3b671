"""Signatures of failure in the embedding spaces, by stated rules: what was found, and what could not be judged."""

from raylab.base.mistakes import JobError
from raylab.report.parts import MissingError, Part, Row, Section, Study, Table
from raylab.statistics.diagnosis import SIGNATURES, diagnose_job


def tell_failures(study: Study) -> Section:
    """Which arms show a signature of failure, with its evidence; of every arm with a complete trial."""
    try:
        found = diagnose_job(study.results, study.job.name)
    except JobError as error:
        raise MissingError("; ".join(error.problems)) from None
    ranked = {arm: place for place, arm in enumerate(study.arms.rows)}
    rows = [_row(study, row) for row in found if row["found"] is not False]
    rows.sort(key=lambda row: (row["found"] != "found", ranked.get(row["arm"], len(ranked)), row["task"]))
    arms = {row["arm"] for row in found}
    shown = {row["arm"] for row in found if row["found"]}
    summary: list[Row] = [
        {
            "signature": name,
            "found": sum(row["found"] is True for row in found if row["signature"] == name),
            "not_judged": sum(row["found"] is None for row in found if row["signature"] == name),
            "looked_at": sum(row["signature"] == name for row in found),
            "rule": signature.rule,
        }
        for name, signature in SIGNATURES.items()
    ]
    told = [f"{row['signature']} ({row['found']})" for row in summary if row["found"]]
    unjudged = sum(row["found"] is None for row in found)
    lead = [
        (f"{len(shown)} of {len(arms)} arms show a signature of failure: {', '.join(told)}, counted by arm and task."
         if shown else f"None of {len(SIGNATURES)} signatures of failure was found in {len(arms)} arms.")
        + (f" {unjudged:,} of {len(found):,} could not be judged, as numbers that they need were not measured."
           if unjudged else "")
    ]  # fmt: skip
    columns = {"signature": "signature", "found": "found", "not_judged": "not judged", "looked_at": "looked at",
               "rule": "rule"}  # fmt: skip
    parts: list[Part] = [
        "Looked at: every arm with a complete trial, also those of a search that were not confirmed; last rung, "
        "validation, mean over seeds. A signature is a reason to look, not a proof; none is no proof of health.",
        Table("signatures", "Signatures by rule, counted by arm and task", summary, columns),
    ]
    if rows:
        columns = {"settings": "arm", "task": "task", "signature": "signature", "found": "found",
                   "evidence": "evidence", "missing": "not measured"}  # fmt: skip
        parts.append(Table("failures", "Found, or not judged", rows, columns, shown=10))
    return Section("failures", "Signatures of failure", lead, parts)


def _row(study: Study, row: Row) -> Row:
    return {
        "settings": study.arms.labels.get(row["arm"]) or row["settings"] or row["arm"],
        "arm": row["arm"],
        "task": row["task"],
        "signature": row["signature"],
        "found": "found" if row["found"] else "not judged",
        "evidence": ", ".join(f"{name} {value:.4g}" for name, value in row["evidence"].items()),
        "missing": ", ".join(row["missing"]),
    }
