"""The checks of a corpus, each with its definition, why it matters, what to do and its limits: counts and row ids.

The texts of the test split are looked at by `duplicates` and `near_duplicates` alone, which can't be counted without
them; what they find informs nothing: no training, no choice, no other check. The checks of labels learn on training
rows and are scored on validation rows. No text is in what is returned.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from raylab.data.corpus import TEST, TRAIN, VALIDATION
from raylab.data.leaks import (
    MIN_WORD_ROWS,
    OPENING_WORDS,
    SMALLEST_GAIN,
    Leak,
    draw_rows,
    read_openings,
    read_single_words,
)
from raylab.data.overlaps import (
    JACCARD,
    RUN_WORDS,
    SHINGLE_WORDS,
    Ints,
    Words,
    find_near,
    find_shared,
    number_texts,
    read_words,
    take_rows,
)
from raylab.data.tokens import open_tokens
from raylab.job.blocks import PARTS

MAX_IDS = 20
# More groups than this, and than a thousandth of all, make a run of words boilerplate.
SHARED_GROUPS = 5
BIG_GROUP = 0.05
PIECES = 4
READ_ROWS = 5_000

Row = dict[str, Any]
# The classes of a table: how they are called, and which rows are of them.
Classes = Sequence[tuple[str, NDArray[np.bool_]]]


class Check(NamedTuple):
    """A check: what it counts, why that matters, what to do; `value` above these limits is `look` and `problem`."""

    definition: str
    why: str
    what_to_do: str
    look_above: float
    problem_above: float


EQUAL = "the same words in the same order, whatever their case, white space and punctuation"
DEFINITIONS: dict[str, Check] = {
    "duplicates": Check(
        f"rows with {EQUAL}, as an earlier row of the same part (value: share of its rows), or of two parts as a row "
        "of the first one (value: share of the second one's rows)",
        "scores of rows that were trained on tell what was learned by heart; repeats count twice in every mean",
        "leave out the repeats with sql, or give equal texts one group",
        0.0,
        0.02,
    ),
    "near_duplicates": Check(
        f"rows of the second part with a Jaccard of {JACCARD} or more of distinct runs of {SHINGLE_WORDS} words to a "
        "row of the first one, those with the same words left out (value: their share of the second one's rows); pairs "
        "are found by MinHash, which misses under one in a thousand at that Jaccard, and then compared exactly",
        "as duplicates: copied notes and templates carry answers from one side of the split to the other",
        "give copies of one text one group, or leave out all but one with sql",
        0.0,
        0.05,
    ),
    "shared_text": Check(
        f"rows with a run of {RUN_WORDS} words that stands in more than {SHARED_GROUPS} groups, and in more than one "
        "in a thousand of them (value: share of all words that stand in such runs); training and validation rows",
        "boilerplate makes texts of different groups alike, fills the length limit, and feeds contrastive losses with "
        "positives and negatives of the same words",
        "cut it out with sql (regexp_replace)",
        0.05,
        0.3,
    ),
    "groups": Check(
        "rows of the largest group, of the table or of a class (value: their share); evidence: the effective number "
        f"of groups, 1 / sum of squared shares, and how many hold over {BIG_GROUP:.0%}; training and validation rows",
        "a few patients or sites with most rows make results theirs, and splits of other seeds very different",
        "cap the rows a group with sql; use more groups; read intervals as those of few groups",
        0.1,
        0.5,
    ),
    "opening_words": Check(
        f"validation rows whose label TF-IDF with logistic regression tells from the first {OPENING_WORDS} words "
        "alone, learned on training rows (value: its macro-F1 above the majority class, as a share of that of the "
        f"whole text, a difference under {SMALLEST_GAIN} counted as that)",
        "a heading or a question at the beginning gives the label away: every encoder will look good, none is needed",
        "cut the opening off with sql, or take it as the task's floor: compare with the baselines",
        0.8,
        0.95,
    ),
    "one_word": Check(
        "rows of a class that 'the word is there' (or 'is not there') tells; word and rule chosen on training rows by "
        f"F1 among words of {MIN_WORD_ROWS} rows or more (value: F1 on validation rows above that of calling all rows "
        "so, as a share of what is left to 1)",
        "the label is a word's presence: counting words is enough, and an encoder's score says nothing of meaning",
        "look at the rows; mend how the label was made, cut the word out, or take the task as a check of the tools",
        0.7,
        0.95,
    ),
    "cut": Check(
        "rows of more tokens than max_length leaves room for (value: share of all tokens that are never seen; 0 with "
        "long_documents: windows); training and validation rows, also by class",
        "what stands behind the limit trains and classifies nothing; a class of long texts suffers most",
        "raise corpus.max_length, or set corpus.long_documents: windows",
        0.1,
        0.5,
    ),
    "split_words": Check(
        f"rows of {PIECES} tokens a word or more (value: share of words, apart by white space, that the tokenizer cuts "
        f"into {PIECES} pieces or more); training and validation rows",
        "a tokenizer of another language or field spends the length limit on pieces that mean nothing alone",
        "take a tokenizer of this field, train one (encoder.config), or raise vocab_size",
        0.15,
        0.4,
    ),
    "unknown_tokens": Check(
        "rows with a token that stands for whatever the tokenizer can't write (value: share of all tokens)",
        "what is unknown is lost",
        "mend the encoding of the texts, or take a byte-level tokenizer",
        0.001,
        0.02,
    ),
}


def _row(
    check: str,
    split: str,
    rows: Ints,
    checked: int,
    value: float,
    ids: list[str],
    evidence: dict[str, Any],
    title: str | None = None,
) -> Row:
    """A row of the table. `rows` are those found, the most telling ones first."""
    limits = DEFINITIONS[check]
    level = int(value > limits.look_above) + int(value > limits.problem_above)
    return {
        "check_name": check,
        "split": split,
        "class": title,
        "num_rows": len(rows),
        "num_checked": checked,
        "share": len(rows) / checked if checked else 0.0,
        "value": float(value),
        "look_above": limits.look_above,
        "problem_above": limits.problem_above,
        "verdict": ("ok", "look", "problem")[level],
        "evidence": evidence,
        "row_ids": [ids[row] for row in rows[:MAX_IDS]],
    }


OPEN = f"{PARTS[TRAIN]}+{PARTS[VALIDATION]}"
PAIRS = ((TRAIN, VALIDATION), (TRAIN, TEST), (VALIDATION, TEST))


def check_texts(opened: pa.Table, sealed: pa.Table, open_ids: list[str], sealed_ids: list[str]) -> Iterator[Row]:
    """Duplicates and near-duplicates in all parts; text that groups share, and groups that dominate, in open rows."""
    words = read_words(pa.chunked_array([*opened["text"].chunks, *sealed["text"].chunks], pa.large_string()))
    part = np.concatenate([opened["part"].to_numpy(), np.full(len(sealed), TEST)]).astype(np.int64)
    ids = [*open_ids, *sealed_ids]
    numbers = number_texts(words)
    num_texts = int(numbers.max(initial=-1)) + 1
    counts = np.stack([np.bincount(numbers[part == code], minlength=num_texts) for code in range(len(PARTS))])
    yield from _check_equal(part, numbers, counts, ids)
    yield from _check_near(words, part, numbers, counts, ids)
    groups = np.unique(opened["group"].to_numpy(), return_inverse=True)[1]
    yield _check_shared(take_rows(words, np.arange(len(opened))), groups, open_ids)
    yield _check_groups(groups, np.ones(len(groups), dtype=bool), open_ids, None)


def _check_equal(part: Ints, numbers: Ints, counts: Ints, ids: list[str]) -> Iterator[Row]:
    for code, name in enumerate(PARTS):
        rows = np.flatnonzero(part == code)
        first = np.zeros(len(rows), dtype=bool)
        first[np.unique(numbers[rows], return_index=True)[1]] = True
        repeats = rows[~first]
        share = len(repeats) / max(len(rows), 1)
        texts = int((counts[code] > 1).sum())
        yield _row("duplicates", name, repeats, len(rows), share, ids, {"repeated_texts": texts})
    for one, other in PAIRS:
        pairs = int((counts[one] * counts[other]).sum())
        yield _row_of_pair(
            "duplicates", one, other, part, numbers, counts[one] > 0, counts[other] > 0, ids, {"pairs": pairs}
        )


def _row_of_pair(
    check: str,
    one: int,
    other: int,
    part: Ints,
    numbers: Ints,
    in_one: Any,
    in_other: Any,
    ids: list[str],
    more: dict[str, Any],
) -> Row:
    """Rows of part `other` whose text is marked by `in_one`, as those of `one` by `in_other` are counted beside."""
    rows = np.flatnonzero((part == other) & in_one[numbers])
    checked = int((part == other).sum())
    near = int(((part == one) & in_other[numbers]).sum())
    name = f"{PARTS[one]}/{PARTS[other]}"
    counted = {f"rows_{PARTS[one]}": near, f"rows_{PARTS[other]}": len(rows)}
    return _row(check, name, rows, checked, len(rows) / max(checked, 1), ids, more | counted)


def _check_near(words: Words, part: Ints, numbers: Ints, counts: Ints, ids: list[str]) -> Iterator[Row]:
    once = np.unique(numbers, return_index=True)[1]
    sides = ((counts > 0) * np.array([[1], [2], [4]])).sum(axis=0)
    found = find_near(take_rows(words, once), sides)
    for one, other in PAIRS:
        pairs = int(
            (counts[one][found.left] * counts[other][found.right]).sum()
            + (counts[one][found.right] * counts[other][found.left]).sum()
        )
        near = {code: np.zeros(counts.shape[1], dtype=bool) for code in (one, other)}
        for code in near:
            near[code][found.left[counts[code][found.right] > 0]] = True
            near[code][found.right[counts[code][found.left] > 0]] = True
        # near[one]: the texts that are near to one of part `one`.
        more = {"pairs": pairs, "complete": found.complete}
        yield _row_of_pair("near_duplicates", one, other, part, numbers, near[one], near[other], ids, more)


def _check_shared(words: Words, groups: Ints, ids: list[str]) -> Row:
    num_groups = int(groups.max(initial=-1)) + 1
    more_than = max(SHARED_GROUPS, num_groups // 1000)
    shared = find_shared(words, groups, more_than)
    rows = np.flatnonzero(shared.words)
    rows = rows[np.argsort(-shared.words[rows], kind="stable")]
    whole = rows[2 * shared.words[rows] > words.lengths[rows]]
    value = float(shared.words.sum() / max(words.offsets[-1], 1))
    evidence = {
        "more_than_groups": more_than,
        "groups": len(np.unique(groups[rows])),
        "runs": shared.num_runs,
        "rows_over_half": len(whole),
    }
    return _row("shared_text", OPEN, rows, len(groups), value, ids, evidence)


def _check_groups(groups: Ints, here: NDArray[np.bool_], ids: list[str], title: str | None) -> Row:
    """Of some rows, or of all: how many of them the largest group has."""
    sizes = np.bincount(groups[here], minlength=1)
    num = int(sizes.sum())
    rows = np.flatnonzero(here & (groups == sizes.argmax()))
    shares = sizes / max(num, 1)
    evidence = {
        "groups": int((sizes > 0).sum()),
        "effective_groups": float(1 / max((shares**2).sum(), 1e-12)) if num else 0.0,
        "big_groups": int((shares > BIG_GROUP).sum()),
    }
    return _row("groups", OPEN, rows, num, float(shares.max()), ids, evidence, title)


def check_labels(
    opened: pa.Table,
    ids: list[str],
    labels: NDArray[Any] | None,
    names: list[str],
    classes: Classes,
) -> Iterator[Row]:
    """Groups that dominate a class; labels that the opening words or one word give away. Open rows alone."""
    groups = np.unique(opened["group"].to_numpy(), return_inverse=True)[1]
    for title, here in classes:
        yield _check_groups(groups, here, ids, title)
    if labels is None:
        return
    train = opened["part"].to_numpy() == TRAIN
    rows = draw_rows(train)
    words, picked, train = read_words(opened["text"].take(rows)), labels[rows], train[rows]
    found: dict[str, Iterator[Leak]] = {
        "opening_words": read_openings(words, picked, train),
        "one_word": read_single_words(words, picked, train),
    }
    for check, leaks in found.items():
        for leak in leaks:
            of_class = None if leak.class_code is None else f"label={names[leak.class_code]}"
            split = PARTS[VALIDATION] if check == "opening_words" else OPEN
            yield _row(check, split, rows[leak.rows], leak.num_checked, leak.value, ids, leak.evidence, of_class)


def check_tokens(
    texts: pa.ChunkedArray,
    ids: list[str],
    tokens: Path,
    tokenizer: Path,
    room: int,
    windows: bool,
    classes: Classes,
) -> Iterator[Row]:
    """Rows cut by the length limit, words cut into pieces, unknown tokens. Open rows alone.

    tokens and tokenizer: folders of their stages. room: tokens of a text that enter the encoder at once.
    """
    from transformers import AutoTokenizer

    store, speller = open_tokens(tokens), AutoTokenizer.from_pretrained(tokenizer)
    lengths = store.lengths
    for title, here in [(None, np.ones(len(lengths), dtype=bool)), *classes]:
        yield _check_cut(lengths, here, room, windows, ids, title)
    spelled, num_words = _count_spelled(texts)
    pieces = _count_pieces(speller, list(spelled))
    counts = np.array(list(spelled.values()), dtype=np.int64)
    ratio = lengths / np.maximum(num_words, 1)
    rows = np.flatnonzero(ratio >= PIECES)
    yield _row(
        "split_words",
        OPEN,
        rows[np.argsort(-ratio[rows], kind="stable")],
        len(lengths),
        counts[pieces >= PIECES].sum() / max(counts.sum(), 1),
        ids,
        {
            "tokens_per_word": float(lengths.sum() / max(num_words.sum(), 1)),
            "whole_words": float(counts[pieces == 1].sum() / max(counts.sum(), 1)),
        },
    )
    unknown = np.flatnonzero(store.values == (-1 if speller.unk_token_id is None else speller.unk_token_id))
    number = np.bincount(np.searchsorted(store.offsets, unknown, side="right") - 1, minlength=len(lengths))
    rows = np.flatnonzero(number)
    rows = rows[np.argsort(-number[rows], kind="stable")]
    value = len(unknown) / max(len(store.values), 1)
    yield _row("unknown_tokens", OPEN, rows, len(lengths), value, ids, {"tokens": len(unknown)})


def _check_cut(
    lengths: Ints, here: NDArray[np.bool_], room: int, windows: bool, ids: list[str], title: str | None
) -> Row:
    rows = np.flatnonzero(here & (lengths > room))
    rows = rows[np.argsort(-lengths[rows], kind="stable")]
    over, total = int((lengths[rows] - room).sum()), int(lengths[here].sum())
    evidence = {"tokens_over": over, "tokens": total, "room": room}
    value = 0.0 if windows else over / max(total, 1)
    return _row("cut", OPEN, rows, int(here.sum()), value, ids, evidence, title)


def _count_spelled(texts: pa.ChunkedArray) -> tuple[Counter[str], Ints]:
    """How often each word stands in the texts, apart by white space; and the words of each text."""
    spelled: Counter[str] = Counter()
    num = [np.zeros(0, np.int64)]
    for start in range(0, len(texts), READ_ROWS):
        cut = pc.utf8_split_whitespace(texts.slice(start, READ_ROWS).combine_chunks())
        words = cut.flatten()
        words = words.filter(pc.greater(pc.binary_length(words), 0))
        for found in words.value_counts().to_pylist():
            spelled[found["values"]] += found["counts"]
        num.append(pc.list_value_length(cut).to_numpy(zero_copy_only=False).astype(np.int64))
    return spelled, np.concatenate(num)


def _count_pieces(tokenizer: Any, words: list[str]) -> Ints:
    """The tokens of each word, as it stands within a text: behind a space."""
    found = [np.zeros(0, np.int64)]
    for start in range(0, len(words), READ_ROWS):
        some = [f" {word}" for word in words[start : start + READ_ROWS]]
        pieces = tokenizer(
            some, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False
        )["input_ids"]  # fmt: skip
        found.append(np.array([len(piece) for piece in pieces], dtype=np.int64))
    return np.concatenate(found)
