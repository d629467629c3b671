"""Failure signatures in a report: counted, with evidence; what could not be judged is said."""

import pytest

from raylab.job.settings import list_settings, resolve_target, with_settings
from raylab.report.failures import tell_failures
from raylab.report.parts import MissingError, Study
from raylab.results.tables import now, write_rows
from raylab.statistics.analysis import default_target, list_arms
from raylab.statistics.diagnosis import SIGNATURES

# RankMe and uniformity of an arm, and of Gaussian vectors.
HEALTHY = {"rankme": (20.0, 30.0), "uniformity": (-2.0, -3.5)}
COLLAPSED = {"rankme": (1.0, 30.0), "uniformity": (-0.01, -3.5)}


@pytest.fixture
def make_study(make_job, tmp_path):
    def make(arms):
        job = make_job("mlm", {"search": {"design": "grid", "space": {"pretrain.learning_rate": [*arms]}}})
        (tmp_path / job.name).mkdir()
        (tmp_path / job.name / "job.yaml").write_text(f"name: {job.name}\n")
        for rate, metrics in arms.items():
            settings = list_settings(with_settings(job, {"pretrain.learning_rate": rate}))
            row = {"arm": f"arm{rate:g}", "seed": 0, "phase": "fixed", "status": "complete", "rung": 2, "num_rungs": 2}
            row |= {"started_at": now(), "updated_at": now()}
            write_rows(tmp_path, job.name, "trials", f"arm{rate:g}-0", [settings | row])
            rows = [
                {
                    "rung": 2,
                    "task": "severity",
                    "split": "validation",
                    "metric": name,
                    "value": value,
                    "reference": other,
                }
                for name, (value, other) in metrics.items()
            ]
            write_rows(tmp_path, job.name, "geometry", f"arm{rate:g}-0", rows)
        target = default_target(job)
        return Study(tmp_path, job, target, resolve_target(job, target), list_arms(tmp_path, job))

    return make


def test_a_metric_of_another_version_is_passed_over(make_study):
    section = tell_failures(make_study({1e-3: HEALTHY, 1e-2: COLLAPSED | {"later_metric": (1.0, 2.0)}}))
    assert section.lead[0].startswith("1 of 2 arms show a signature of failure: collapse (1), counted")


def test_what_is_found_is_told_with_its_evidence_and_first(make_study):
    section = tell_failures(make_study({1e-3: HEALTHY, 1e-2: COLLAPSED}))
    assert section.lead[0].startswith("1 of 2 arms show a signature of failure: collapse (1), counted")
    unjudged = 2 * (len(SIGNATURES) - 1)  # nothing but RankMe and uniformity was measured
    assert f"{unjudged} of {2 * len(SIGNATURES)} could not be judged" in section.lead[0]
    summary, found = (part.rows for part in section.parts[1:])
    assert {row["signature"]: (row["found"], row["not_judged"], row["looked_at"]) for row in summary} == {
        name: (1, 0, 2) if name == "collapse" else (0, 2, 2) for name in SIGNATURES
    }
    first = [found[0][name] for name in ("settings", "signature", "found")]
    assert first == ["learning_rate=0.01", "collapse", "found"]
    assert "rankme 1, rankme_gaussian 30" in found[0]["evidence"]
    assert {row["found"] for row in found[1:]} == {"not judged"}
    assert len(found) == 1 + unjudged


def test_none_found_is_said(make_study):
    section = tell_failures(make_study({1e-3: HEALTHY}))
    assert section.lead[0].startswith(f"None of {len(SIGNATURES)} signatures of failure was found in 1 arms.")
    assert section.parts[1].rows[0]["found"] == 0


def test_without_geometry_it_is_missing(make_study):
    with pytest.raises(MissingError, match="no complete trial with geometry"):
        tell_failures(make_study({1e-3: {}}))
