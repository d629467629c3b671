"""A synthetic corpus of clinical-looking notes whose structure is known: for demos, tests and benchmarks.

A patient has a latent condition and three problems drawn from the condition's mix. Each note has its main one of them;
each sentence is about one, and the next sentence mostly stays with it. Words come from short lists under one Zipf law:
a list per problem, severity, outcome and category. Drugs, people, dates and a few words recur inside a note, so that
two spans of one note resemble each other more than spans of two notes of a class. All names and figures are made up.
"""

import contextlib
import itertools
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raylab.data.language import (
    CATEGORIES,
    LIST_SLOTS,
    NUM_PROBLEMS,
    SERVICES,
    SLOTS,
    STRENGTH,
    TASKS,
    Language,
    build_language,
    draw,
)

WARDS = ["north", "east", "south", "west"]
GOLD_COLUMNS = {"note_id": pa.string(), "problems": pa.list_(pa.string())}
UNCODED_PATIENTS = 4  # every fourth patient's notes have no row in gold.parquet
COLUMNS = ["note_id", "patient", "text", "category", "ward", "service", *TASKS]
MIN_WORDS = 30
ROW_GROUP = 5_000  # notes held in memory at once: about 8 MB of text

CONDITION_SHARES = np.array([0.22, 0.19, 0.17, 0.15, 0.14, 0.13])
SEVERITY_SHARES = np.array([0.4, 0.35, 0.25])
CATEGORY_SHARES = np.array([0.14, 0.3, 0.22, 0.22, 0.12])
MEDIAN_WORDS = np.array([330.0, 110.0, 100.0, 190.0, 160.0])
SIGMA_WORDS = np.array([0.65, 0.5, 0.45, 0.6, 0.55])  # of the logarithm of the length
SERVICE_TIE = 0.7  # chance that the service is the one of the condition; otherwise any, uniformly
OUTCOME_CHANCE = 0.9  # chance that the outcome is the one that the rule gives
PROBLEMS_A_PATIENT = 3
PROBLEM_SHARES = np.array([0.5, 0.3, 0.2])  # of a note's turns; each note puts the patient's problems in its own order
SWITCH = 0.3  # chance that a sentence turns to another problem of the note


def write_notes(
    directory: Path,
    *,
    num_notes: int = 2000,
    seed: int = 0,
    label_noise: float = 0.05,
    max_words: int = 3000,
) -> dict[str, Any]:
    """Write `notes.parquet`, `gold.parquet` and `synth.json` into `directory`; return the counts.

    A row of the notes is a note: COLUMNS, all strings. `patient` is the group to split by. `category` shows in the
    text, `service` depends on the condition, `ward` on nothing. `label_noise` is the share of labels, in each task by
    itself, that are replaced by another class of the task, uniformly; it changes neither the text nor the metadata. A
    note has MIN_WORDS to `max_words` words, split at blanks. The first notes are the same for any `num_notes`.
    A row of the gold labels is a note of three in four patients: `note_id` and `problems`, the list of the three
    problems, of 18, that its patient has; they have no noise.
    Memory does not grow with `num_notes`: rows leave in groups of ROW_GROUP. Each file is replaced whole, or left as
    it was.

    Returns {"notes", "patients", "words", "gold": int, "classes": {task: {class: notes with that label}}}.
    `synth.json` holds the arguments, the true structure and that summary, and no note.
    Raises ValueError, before anything is written, for an argument out of range.
    """
    _check_arguments(num_notes=num_notes, seed=seed, label_noise=label_noise, max_words=max_words)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    language = build_language(seed)
    classes: dict[str, Counter[str]] = {task: Counter({name: 0 for name in names}) for task, names in TASKS.items()}
    num_patients = num_words = num_done = num_gold = 0
    rows: dict[str, list[str]] = {column: [] for column in COLUMNS}
    gold: dict[str, list[Any]] = {column: [] for column in GOLD_COLUMNS}
    schema = pa.schema([pa.field(column, pa.string(), nullable=False) for column in COLUMNS])
    gold_schema = pa.schema(GOLD_COLUMNS)
    beside, gold_beside = (directory / f".{name}.parquet.{os.getpid()}" for name in ("notes", "gold"))
    try:
        with (
            pq.ParquetWriter(
                beside, schema, compression="zstd", use_dictionary=[c for c in COLUMNS if c not in ("note_id", "text")]
            ) as writer,
            pq.ParquetWriter(gold_beside, gold_schema, compression="zstd") as gold_writer,
        ):
            while num_done < num_notes:
                notes, lengths, problems = _build_patient(
                    language, seed=seed, patient=num_patients, label_noise=label_noise, max_words=max_words
                )
                take = min(len(lengths), num_notes - num_done)
                for column, values in notes.items():
                    rows[column].extend(values[:take])
                for task, counter in classes.items():
                    counter.update(notes[task][:take])
                if num_patients % UNCODED_PATIENTS != UNCODED_PATIENTS - 1:
                    gold["note_id"].extend(notes["note_id"][:take])
                    gold["problems"].extend([problems] * take)
                num_patients += 1
                num_words += int(lengths[:take].sum())
                num_done += take
                if len(rows["text"]) >= ROW_GROUP or num_done == num_notes:
                    table = pa.table(rows, schema=schema)
                    writer.write_table(table.slice(0, ROW_GROUP), row_group_size=ROW_GROUP)
                    if num_done == num_notes and table.num_rows > ROW_GROUP:
                        writer.write_table(table.slice(ROW_GROUP), row_group_size=ROW_GROUP)
                    rows = {column: values[ROW_GROUP:] for column, values in rows.items()}
                    num_gold += len(gold["note_id"])
                    gold_writer.write_table(pa.table(gold, schema=gold_schema))
                    gold = {column: [] for column in gold}
        os.replace(beside, directory / "notes.parquet")
        os.replace(gold_beside, directory / "gold.parquet")
    finally:
        for path in (beside, gold_beside):
            with contextlib.suppress(FileNotFoundError):
                path.unlink()
    summary: dict[str, Any] = {
        "notes": num_done,
        "patients": num_patients,
        "words": num_words,
        "gold": num_gold,
        "classes": {task: dict(counter) for task, counter in classes.items()},
    }
    arguments = {"num_notes": num_notes, "seed": seed, "label_noise": label_noise, "max_words": max_words}
    described = {"arguments": arguments, "structure": _describe(language), "summary": summary}
    beside = directory / f".synth.json.{os.getpid()}"
    try:
        beside.write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
        os.replace(beside, directory / "synth.json")
    finally:
        with contextlib.suppress(FileNotFoundError):
            beside.unlink()
    return summary


def _check_arguments(*, num_notes: int, seed: int, label_noise: float, max_words: int) -> None:
    """Raise one ValueError that names every argument out of range."""
    mistakes = []
    if num_notes < 1:
        mistakes.append(f"num_notes is {num_notes}: it must be at least 1")
    if seed < 0:
        mistakes.append(f"seed is {seed}: it must be at least 0")
    if not 0 <= label_noise < 1:
        mistakes.append(f"label_noise is {label_noise}: it must be at least 0 and less than 1")
    if max_words < MIN_WORDS:
        mistakes.append(f"max_words is {max_words}: it must be at least {MIN_WORDS}, the shortest note")
    if mistakes:
        raise ValueError("; ".join(mistakes))


def _build_patient(
    language: Language, *, seed: int, patient: int, label_noise: float, max_words: int
) -> tuple[dict[str, list[str]], np.ndarray, list[str]]:
    """All notes of one patient: a list a column, the words a note [notes], and the patient's problems.

    Depends on nothing but the arguments.
    """
    rng = np.random.default_rng([seed, 1, patient])
    n = 1 + min(int(rng.negative_binomial(3, 0.45)), 11)
    condition = int(draw(np.cumsum(CONDITION_SHARES), rng.random(1))[0])
    severity = draw(np.cumsum(SEVERITY_SHARES), rng.random(n))
    rule = severity >= language.threshold[condition]
    outcome = np.where(rng.random(n) < OUTCOME_CHANCE, rule, ~rule).astype(int)
    category = draw(np.cumsum(CATEGORY_SHARES), rng.random(n))
    ward = rng.integers(len(WARDS), size=n)
    tied = rng.random(n) < SERVICE_TIE
    service = np.where(tied, language.service_of[condition], rng.integers(len(SERVICES), size=n))
    columns = {
        "note_id": [f"n{patient:07d}-{i:02d}" for i in range(n)],
        "patient": [f"p{patient:07d}"] * n,
        "text": [],
        "category": [CATEGORIES[i] for i in category],
        "ward": [WARDS[i] for i in ward],
        "service": [SERVICES[i] for i in service],
    }
    for (task, names), true in zip(TASKS.items(), (np.full(n, condition), severity, outcome), strict=True):
        # Both draws are made whatever the noise, so that text and metadata are the same at any noise.
        replaced, other = rng.random(n) < label_noise, rng.integers(1, len(names), size=n)
        columns[task] = [names[i] for i in np.where(replaced, (true + other) % len(names), true)]
    wanted = np.exp(rng.normal(np.log(MEDIAN_WORDS[category]), SIGMA_WORDS[category]))
    num_words = np.clip(wanted, MIN_WORDS, max_words).astype(int)
    columns["text"], problems = _build_texts(language, rng, condition, severity, outcome, category, num_words)
    return columns, num_words, [f"problem_{i:02d}" for i in sorted(problems.tolist())]


def _build_texts(
    language: Language,
    rng: np.random.Generator,
    condition: int,
    severity: np.ndarray,
    outcome: np.ndarray,
    category: np.ndarray,
    num_words: np.ndarray,
) -> tuple[list[str], np.ndarray]:
    """The texts of one patient's notes, and the numbers of the patient's problems.

    severity, outcome, category and num_words are [notes]. All notes at once: the cost is that of the array calls, not
    of the words.
    """
    n = len(num_words)
    gumbel = -np.log(-np.log(rng.random(NUM_PROBLEMS)))
    problems = np.argsort(-(np.log(language.mix[condition]) + gumbel))[:PROBLEMS_A_PATIENT]  # without replacement
    drugs = rng.choice(language.drugs, PROBLEMS_A_PATIENT)
    doses = language.numbers[5 * rng.integers(1, 41, PROBLEMS_A_PATIENT)]
    of_note = np.argsort(rng.random((n, PROBLEMS_A_PATIENT)), axis=1)
    people = rng.choice(language.people, (n, 2))
    dates = language.dates[
        (rng.integers(len(language.dates)) + np.cumsum(rng.integers(1, 30, n))) % len(language.dates)
    ]
    ranks = rng.integers(8, 48, (n, PROBLEMS_A_PATIENT, 2))  # words of middling frequency, to stand out in the note
    recurring = language.table[language.first_row["topic"] + problems[of_note]][
        np.arange(n)[:, None, None], np.arange(PROBLEMS_A_PATIENT)[None, :, None], ranks
    ]

    # Sentences: enough of the shortest kind, then cut where the note has its words.
    num_sentences = num_words // int(language.lengths.min()) + 1
    note = np.repeat(np.arange(n), num_sentences)
    first = np.concatenate([[0], np.cumsum(num_sentences)[:-1]])
    total = len(note)
    template = language.template_order[category[note], draw(language.template_law, rng.random(total))]
    headed = rng.random(total) < 0.1
    headed[first] = True
    template = template + headed * (len(language.lengths) // 2)
    turns = rng.random(total) < SWITCH
    turns[first] = True
    place = draw(np.cumsum(PROBLEM_SHARES), rng.random(total))[
        np.maximum.accumulate(np.where(turns, np.arange(total), 0))
    ]
    ends = np.cumsum(language.lengths[template])
    begins = ends - language.lengths[template]
    begins, ends = begins - begins[first][note], ends - begins[first][note]
    draw_two = rng.integers(2, size=(2, total))
    vital = language.numbers[np.clip(rng.normal(70 + 25 * severity[note], 25), 1, 300).astype(int)]
    keep = begins < num_words[note]
    note, template, place, begins, ends = note[keep], template[keep], place[keep], begins[keep], ends[keep]
    draw_two, vital = draw_two[:, keep], vital[keep]
    lengths = np.minimum(ends, num_words[note]) - begins

    # What each slot means in each sentence, in the order of SLOTS: a row of the table, or the word itself.
    which = of_note[note, place]
    problem, row, zeros = problems[which], language.first_row, np.zeros(len(note), dtype=np.int64)
    source = np.stack(
        [
            row["topic"] + problem,
            row["phrase_a"] + problem,
            row["phrase_b"] + problem,
            row["modifier"] + severity[note],
            row["course"] + outcome[note],
            row["style"] + category[note],
            row["header"] + category[note],
            zeros + row["general"],
            zeros + row["join"],
            drugs[which],
            doses[which],
            dates[note],
            people[note, draw_two[0]],
            recurring[note, place, draw_two[1]],
            vital,
        ]
    )
    stop = np.cumsum(lengths)
    start = stop - lengths
    sentence = np.repeat(np.arange(len(note)), lengths)
    word = language.slots[np.arange(len(sentence)) + (language.starts[template] - start)[sentence]]
    open_slots = np.flatnonzero(word < 0)
    slot = -word[open_slots] - 1
    value = source[slot, sentence[open_slots]]
    draws = rng.random((2, len(slot)))
    second = np.flatnonzero(slot == SLOTS.index("phrase_b"))
    draws[:, second] = draws[:, second - 1]
    value = np.where(draws[0] < STRENGTH[slot], value, language.neutral[slot])
    listed = slot < len(LIST_SLOTS)
    value[listed] = language.table[value[listed], draw(language.law, draws[1][listed])]
    word[open_slots] = value

    form = np.zeros(len(word), dtype=np.int64)
    form[start] += 2
    form[stop - 1] += 1
    pieces = language.words[form, word].tolist()
    bounds = np.concatenate([[0], np.cumsum(num_words)]).tolist()
    return ["".join(pieces[a:b]).rstrip() for a, b in itertools.pairwise(bounds)], problems


def _describe(language: Language) -> dict[str, Any]:
    """The true structure, for synth.json: what a study of these notes should be able to find."""
    conditions = TASKS["condition"]
    return {
        "classes": TASKS,
        "group": "patient",
        "related": {
            "category": "the text: headers, style words, templates and length",
            "service": "the condition",
            "ward": "nothing",
        },
        "shares": {
            "condition": CONDITION_SHARES.tolist(),
            "severity": SEVERITY_SHARES.tolist(),
            "category": dict(zip(CATEGORIES, CATEGORY_SHARES.tolist(), strict=True)),
        },
        "median_words": dict(zip(CATEGORIES, MEDIAN_WORDS.tolist(), strict=True)),
        "service_tie": SERVICE_TIE,
        "service_of_condition": {name: SERVICES[language.service_of[i]] for i, name in enumerate(conditions)},
        "outcome_rule": {
            "readmitted_from_severity": {
                name: TASKS["severity"][language.threshold[i]] for i, name in enumerate(conditions)
            },
            "chance_that_the_rule_holds": OUTCOME_CHANCE,
        },
        "problem_mix_of_condition": dict(zip(conditions, np.round(language.mix, 6).tolist(), strict=True)),
        "problems_a_patient": PROBLEMS_A_PATIENT,
        "gold": f"the patient's problems, on the notes of all but every {UNCODED_PATIENTS}th patient",
        "problem_shares_of_a_note": PROBLEM_SHARES.tolist(),
        "chance_to_switch_problem": SWITCH,
        "chance_of_the_own_list": LIST_SLOTS,
        "vocabulary": int(language.words.shape[1]),
    }
