"""The report: one page that needs nothing else, whose figures are drawn and whose numbers are those of the tables."""

import base64
import csv
import html
import re
import shlex
import shutil

import pyarrow.parquet as pq
import pytest
import yaml

from raylab.cli import main
from raylab.report.report import SECTIONS
from raylab.results.queries import query
from raylab.results.tables import SCHEMAS, write_rows


def call(*arguments):
    with pytest.raises(SystemExit) as end:
        main([*arguments])
    return end.value.code


@pytest.fixture(scope="module")
def results(tiny_job, tmp_path_factory):
    """A small ablation, run: two objectives on three seeds, two freeze depths, two numbers of shots."""
    folder = tmp_path_factory.mktemp("report")
    table = {**tiny_job["corpus"]["documents"], "id": "note_id"}
    tasks = {name: {**task, "id": "note_id"} for name, task in tiny_job["corpus"]["tasks"].items()}
    job = {
        **tiny_job,
        "corpus": {**tiny_job["corpus"], "documents": table, "tasks": tasks},
        "evaluate": {**tiny_job["evaluate"], "shots": [2, 4], "frozen_layers": ["all", "none"],
                     "fine_tune": {"steps": 3}},
        "search": {"space": {"pretrain.objective": ["mlm", "none"]}, "design": "grid", "seeds": [0, 1, 2],
                   "targets": [{"task": "severity", "shots": 4, "frozen_layers": "all"}]},
        "analysis": {"primary": "objective=none vs objective=mlm at shots=4"},
    }  # fmt: skip
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(job))
    assert call("run", str(path), "--results", str(folder / "results"), "--here") == 0
    return folder / "results"


@pytest.fixture(scope="module")
def report(results, tmp_path_factory):
    folder = tmp_path_factory.mktemp("written") / "tiny-report"
    assert call("report", "tiny", "--results", str(results), "--output", str(folder)) == 0
    return folder


def read_csv(path):
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def read_page(report):
    return (report / "report.html").read_text()


def test_the_page_has_a_section_a_subject_and_needs_nothing_else(report):
    page = read_page(report)
    left_out = page.partition('id="left-out"')[2]
    for name in SECTIONS:
        assert f'<h2 id="{name}">' in page or f"<p>{name.capitalize()}: " in left_out, name
    assert "<script" not in page
    assert not re.search(r"""(src|href)="(?!data:|#|tables/|figures/)""", page)
    for link in re.findall(r'href="((?:tables|figures)/[^"]+)"', page):
        assert (report / link).stat().st_size > 0


def test_the_cost_tells_how_fast_arms_trained(results, report):
    """Of the arm that trained, the mean over seeds of the median of its curve; of the other nothing."""
    sql = "select median(value) as v from curves where metric = '{}' group by job, trial_id order by trial_id"
    by_name = {row["label"]: row for row in read_csv(report / "tables" / "cost.csv")}
    for column, metric in (("tokens_per_second", "train_tokens_per_second"), ("mfu", "train_mfu")):
        values = query(results, sql.format(metric)).column("v").to_pylist()
        assert len(values) == 3
        assert float(by_name["objective=mlm"][column]) == pytest.approx(sum(values) / 3)
        assert by_name["objective=none"][column] == ""


def test_every_figure_is_drawn_and_told(report):
    pictures = re.findall(r'<img src="data:(image/[a-z+]+);base64,([^"]+)"[^>]* alt="([^"]+)"', read_page(report))
    assert (
        len(pictures) == len(list((report / "figures").glob("*.svg"))) == len(list((report / "figures").glob("*.png")))
    )
    assert len(pictures) >= 3
    for kind, content, told in pictures:
        start = base64.b64decode(content)[:200]
        assert (b"<?xml" in start) if kind == "image/svg+xml" else start.startswith(b"\x89PNG")
        assert re.search(r"\d", told)


def test_the_ranked_arms_are_those_of_the_tables(results, report):
    listed = {row["arm"]: row for row in read_csv(report / "tables" / "arms.csv")}
    asked = query(
        results,
        """
        select arm, mean, low, high, seeds from arms
        where job = 'tiny' and task = 'severity' and split = 'validation' and metric = 'f1_macro' and shots = 4
            and (frozen_layers = 'all' or frozen_layers is null)
        """,
    ).to_pylist()
    assert len(asked) == len(listed) == 4
    for row in asked:
        found = listed[row["arm"]]
        assert int(found["num_seeds"]) == row["seeds"]
        for name in ("mean", "low", "high"):
            assert float(found[name]) == pytest.approx(row[name], abs=1e-9)
    means = [float(row["mean"]) for row in listed.values()]
    assert means == sorted(means, reverse=True)


def test_the_grid_is_that_of_the_tables(results, report):
    listed = read_csv(report / "tables" / "grid.csv")
    assert {(row["frozen_layers"], row["shots"]) for row in listed} == {
        (depth, shots) for depth in ("all", "none") for shots in ("2", "4")
    }
    for row in listed:
        [asked] = query(
            results,
            f"""select avg(value) as mean from seeds where arm = '{row["arm"]}' and shots = {row["shots"]}
            and frozen_layers = '{row["frozen_layers"]}' and probe = '{row["probe"]}' and metric = 'f1_macro'
            and task = 'severity' and split = 'validation'""",
        ).to_pylist()
        assert float(row["mean"]) == pytest.approx(asked["mean"], abs=1e-9)
    # All layers train at depth `none`, the head alone at `all`.
    updated = {row["frozen_layers"]: int(row["parameters_updated"]) for row in listed}
    assert updated["none"] > updated["all"]


def test_the_declared_question_and_its_verdict_come_first(report):
    page = html.unescape(read_page(report))
    first = page.partition('id="question"')[2].partition("</section>")[0]
    asked, verdict = re.findall(r"<p>(.*?)</p>", first)[:2]
    assert asked == "Declared in the job file (analysis.primary): objective=none vs objective=mlm at shots=4?"
    assert "before the data were seen, the tables can't tell" in first
    # Three seeds can't show anything.
    assert verdict.startswith("Primary: Not shown that objective=none and objective=mlm differ")
    assert "3 seeds can't show it, as p is never under 0.25" in verdict


def test_no_text_of_a_document_is_in_any_file(report, tiny_job):
    texts = pq.read_table(tiny_job["corpus"]["documents"]["path"])["text"].to_pylist()
    runs = {" ".join(words[i : i + 4]) for words in map(str.split, texts) for i in range(0, len(words) - 3, 2)}
    written = [path for path in report.rglob("*") if path.suffix in (".html", ".csv")]
    assert len(written) > 5
    for path in written:
        words = path.read_text().split()
        assert not runs & {" ".join(words[i : i + 4]) for i in range(len(words) - 3)}, path.name


def test_any_row_can_be_run_again(results, report, tmp_path, monkeypatch):
    page = html.unescape(read_page(report))
    command = re.search(r"<pre[^>]*><code>(raylab run .*?)</code>", page, re.S)
    words = shlex.split(command[1].replace("\\\n", " "))
    monkeypatch.chdir(tmp_path)
    assert call(*words[1:], "--here") == 0
    sql = "select * exclude (job, train_seconds) from scores where trial_id = '{}' order by all"
    [trial] = query(tmp_path / "again", "select trial_id from trials where arm not like 'baseline:%'").to_pylist()
    again = query(tmp_path / "again", sql.format(trial["trial_id"])).to_pylist()
    assert again
    assert again == query(results, sql.format(trial["trial_id"]) + "").to_pylist()


def test_writing_again_replaces_a_report_and_nothing_else(results, report, tmp_path, capsys):
    folder = tmp_path / "out"
    shutil.copytree(report, folder)
    (folder / "tables" / "old.csv").write_text("left over")
    assert call("report", "tiny", "--results", str(results), "--output", str(folder)) == 0
    assert not (folder / "tables" / "old.csv").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    other = tmp_path / "other"
    other.mkdir()
    (other / "mine.txt").write_text("mine")
    capsys.readouterr()
    assert call("report", "tiny", "--results", str(results), "--output", str(other)) == 2
    assert "holds no report" in capsys.readouterr().err
    assert (other / "mine.txt").read_text() == "mine"


def test_a_job_without_an_ended_arm_has_no_report(results, tmp_path, capsys):
    (tmp_path / "results" / "tiny").mkdir(parents=True)
    shutil.copy(results / "tiny" / "job.yaml", tmp_path / "results" / "tiny")
    assert call("report", "tiny", "--results", str(tmp_path / "results"), "--output", str(tmp_path / "out")) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_counts_under_ten_are_told_nowhere(results, tmp_path):
    copied = tmp_path / "results"
    shutil.copytree(results, copied, ignore=shutil.ignore_patterns("_stages"))
    row = dict.fromkeys(SCHEMAS["hygiene"].names) | {
        "table_name": "severity", "check_name": "near_duplicates", "split": "train", "class": "label=rare",
        "num_rows": 7, "num_checked": 1_013, "share": 7 / 1_013, "value": 7 / 1_013, "verdict": "look",
        "look_above": 0.001, "problem_above": 0.01,
    }  # fmt: skip
    write_rows(
        copied, "tiny", "hygiene", "corpus",
        [row, row | {"class": "label=common", "num_rows": 12, "value": 0.5},
         row | {"class": "label=tiny", "num_rows": 0, "num_checked": 6, "share": 0.0, "value": 0.0}],
    )  # fmt: skip
    assert call("report", "tiny", "--results", str(copied), "--output", str(tmp_path / "out")) == 0
    listed = {row["class"]: row for row in read_csv(tmp_path / "out" / "tables" / "hygiene.csv")}
    rare, common, small = (listed[f"label={name}"] for name in ("rare", "common", "tiny"))
    assert (small["rows"], small["checked"]) == ("0", "<10")
    assert (rare["rows"], rare["share"], rare["value"]) == ("<10", "", "")
    assert (common["rows"], common["value"]) == ("12", "0.5")


@pytest.mark.skipif(shutil.which("chromium") is None, reason="Debian's chromium is not installed")
def test_a_browser_shows_it_without_a_complaint(report):
    from playwright.sync_api import sync_playwright

    said, asked = [], []
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1100, "height": 900})
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto((report / "report.html").as_uri())
        drawn = page.evaluate("[...document.images].map(image => image.complete && image.naturalWidth > 100)")
        named = page.evaluate("[...document.querySelectorAll('[id]')].map(element => element.id)")
        wide = page.evaluate("document.documentElement.scrollWidth")
        browser.close()
    assert said == []
    assert [url for url in asked if not url.startswith("data:")] == [(report / "report.html").as_uri()]
    assert len(drawn) >= 3
    assert all(drawn)
    assert len(named) == len(set(named))
    assert wide <= 1100
