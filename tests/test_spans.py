import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from raylab.training.spans import SAMPLING, Spans, effective_spans, sample_spans


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    """Settings that can work and documents that are just long enough or longer."""
    num_anchors = draw(st.integers(1, 4))
    min_span = draw(st.integers(1, 20))
    max_span = min_span + draw(st.integers(0, 40))
    shortest = 2 * num_anchors * min_span
    extra = draw(st.lists(st.one_of(st.integers(0, 5), st.integers(0, 400)), min_size=1, max_size=30))
    return {
        "lengths": shortest + np.array(extra),
        "rows": np.array(draw(st.lists(st.integers(0, 2**40), min_size=len(extra), max_size=len(extra)))),
        "seed": draw(st.integers(0, 2**63 - 1)),
        "num_anchors": num_anchors,
        "num_positives": draw(st.integers(1, 4)),
        "max_span": max_span,
        "min_span": min_span,
    }


def sample_many(num: int, length: int, sampling: str = "any", seed: int = 0, **changes: int) -> Spans:
    options = {"num_anchors": 2, "num_positives": 2, "max_span": 256, "min_span": 32} | changes
    return sample_spans(np.full(num, length), np.arange(num), seed, sampling=sampling, **options)


def assert_equal(first: Spans, second: Spans) -> None:
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("sampling", SAMPLING)
@settings(max_examples=150, deadline=None)
@given(case=cases())
def test_spans_keep_the_rules(sampling, case):
    spans = sample_spans(**case, sampling=sampling)
    num, num_anchors, num_positives = len(case["lengths"]), case["num_anchors"], case["num_positives"]
    assert spans.anchor_start.shape == spans.anchor_length.shape == (num, num_anchors)
    assert spans.positive_start.shape == spans.positive_length.shape == (num, num_anchors, num_positives)
    assert all(part.dtype == np.int64 for part in spans)

    tokens = case["lengths"][:, None, None]
    longest = np.array([min(case["max_span"], length // (2 * num_anchors)) for length in case["lengths"]])
    np.testing.assert_array_equal(effective_spans(case["lengths"], num_anchors, case["max_span"]), longest)
    start, length = spans.anchor_start[:, :, None], spans.anchor_length[:, :, None]
    end = start + length
    positive_start, positive_length = spans.positive_start, spans.positive_length
    positive_end = positive_start + positive_length

    # Inside the document, of allowed length.
    for first, last in ((start, end), (positive_start, positive_end)):
        assert (first >= 0).all()
        assert (last <= tokens).all()
    for lengths in (length, positive_length):
        assert (lengths >= case["min_span"]).all()
        assert (lengths <= longest[:, None, None]).all()
    # Anchors apart, positives off the other anchors.
    assert (np.diff(spans.anchor_start, axis=1) >= 2 * longest[:, None]).all()
    for anchor in range(num_anchors):
        for other in range(num_anchors):
            if anchor != other:
                before = positive_end[:, anchor] <= start[:, other]
                after = positive_start[:, anchor] >= end[:, other]
                assert (before | after).all()
    if num_anchors == 1:
        assert (np.maximum(start, tokens - end) >= longest[:, None, None]).all()
    # The strategy's own rule.
    if sampling == "any":
        assert (positive_end >= start).all()
        assert (positive_start <= end).all()
    elif sampling == "adjacent":
        assert ((positive_end == start) | (positive_start == end)).all()
    else:
        assert sampling == "subsuming"
        assert (positive_start >= start).all()
        assert (positive_end <= end).all()


@pytest.mark.parametrize("sampling", SAMPLING)
@settings(max_examples=60, deadline=None)
@given(case=cases(), data=st.data())
def test_spans_do_not_depend_on_batches_or_order(sampling, case, data):
    lengths, rows = case.pop("lengths"), case.pop("rows")
    whole = sample_spans(lengths, rows, sampling=sampling, **case)
    order = np.array(data.draw(st.permutations(range(len(lengths)))))
    assert_equal(
        sample_spans(lengths[order], rows[order], sampling=sampling, **case), Spans(*(part[order] for part in whole))
    )
    size = data.draw(st.integers(1, len(lengths)))
    batches = [
        sample_spans(lengths[first : first + size], rows[first : first + size], sampling=sampling, **case)
        for first in range(0, len(lengths), size)
    ]
    assert_equal(Spans(*(np.concatenate(parts) for parts in zip(*batches, strict=True))), whole)


@pytest.mark.parametrize("num_anchors", [1, 2, 3])
def test_lengths_follow_the_betas(num_anchors):
    # Spans so wide that rounding down does not show.
    min_span, max_span = 10, 1_000_010
    spans = sample_many(4000, 10_000_000, num_anchors=num_anchors, min_span=min_span, max_span=max_span)
    for anchor in range(num_anchors):
        scaled = (spans.anchor_length[:, anchor] - min_span + 0.5) / (max_span - min_span)
        assert stats.kstest(scaled, stats.beta(4, 2).cdf).pvalue > 1e-4
        for positive in range(2):
            scaled = (spans.positive_length[:, anchor, positive] - min_span + 0.5) / (max_span - min_span)
            assert stats.kstest(scaled, stats.beta(2, 4).cdf).pvalue > 1e-4


def test_draws_of_one_document_are_independent():
    spans = sample_many(4000, 100_000, max_span=10_000)
    middle = spans.positive_start - spans.anchor_start[:, :, None]
    columns = [spans.anchor_length, spans.positive_length.reshape(4000, 4)]
    correlations = np.corrcoef(np.concatenate(columns, axis=1).T) - np.eye(6)
    assert np.abs(correlations).max() < 0.08  # five standard errors
    assert abs(np.corrcoef(middle[:, 0, 0] / spans.anchor_length[:, 0], middle[:, 1, 0])[0, 1]) < 0.08


def test_seeds_give_other_spans():
    first, second = sample_many(500, 5000), sample_many(500, 5000, seed=1)
    for one, other in zip(first, second, strict=True):
        assert (one == other).mean() < 0.1


def test_one_anchor_starts_uniformly_on_both_sides_of_the_gap():
    # 20 tokens, spans of 8 only: starts 0..4 leave 8 tokens after the anchor, 8..12 leave them before; 5..7 do neither.
    spans = sample_many(20_000, 20, num_anchors=1, min_span=8, max_span=8)
    counts = np.bincount(spans.anchor_start[:, 0], minlength=13)
    expected = [0, 1, 2, 3, 4, 8, 9, 10, 11, 12]
    assert counts[5:8].sum() == 0
    assert stats.chisquare(counts[expected]).pvalue > 1e-4


def test_one_anchor_starts_uniformly_without_a_gap():
    spans = sample_many(20_000, 40, num_anchors=1, min_span=8, max_span=8)
    counts = np.bincount(spans.anchor_start[:, 0])
    assert len(counts) == 33
    assert stats.chisquare(counts).pvalue > 1e-4


def test_many_anchors_start_uniformly_over_feasible_places():
    # Free tokens: n - 2 * 2 * 8 - 8; the starts without the forced distances are order statistics over them.
    num_tokens, span = 100_040, 8
    spans = sample_many(4000, num_tokens, num_anchors=3, min_span=span, max_span=span)
    free = num_tokens - 2 * 2 * span - span
    for anchor in range(3):
        scaled = (spans.anchor_start[:, anchor] - 2 * span * anchor + 0.5) / (free + 1)
        assert stats.kstest(scaled, stats.beta(anchor + 1, 3 - anchor).cdf).pvalue > 1e-4


def test_any_reaches_every_start_equally():
    # An anchor of 8 and positives of 8, where the document's ends do not cut the range: 17 offsets from -8 to 8.
    spans = sample_many(30_000, 1000, num_anchors=1, num_positives=1, min_span=8, max_span=8)
    start = spans.anchor_start[:, 0]
    inner = (start >= 8) & (start <= 1000 - 16)
    counts = np.bincount((spans.positive_start[:, 0, 0] - start)[inner] + 8, minlength=17)
    assert len(counts) == 17
    assert stats.chisquare(counts).pvalue > 1e-4


def test_adjacent_takes_both_sides_equally_where_both_fit():
    spans = sample_many(20_000, 1000, "adjacent", num_anchors=1, num_positives=1, min_span=8, max_span=8)
    start = spans.anchor_start[:, 0]
    inner = (start >= 8) & (start <= 1000 - 16)
    before = (spans.positive_start[:, 0, 0] < start)[inner]
    assert abs(before.mean() - 0.5) < 2.5 / np.sqrt(len(before))  # five standard errors


def test_subsuming_cuts_positives_to_the_anchor():
    free, cut = sample_many(2000, 2000, "any"), sample_many(2000, 2000, "subsuming")
    np.testing.assert_array_equal(cut.anchor_length, free.anchor_length)
    assert (free.positive_length > free.anchor_length[:, :, None]).any()
    np.testing.assert_array_equal(cut.positive_length, np.minimum(free.positive_length, free.anchor_length[:, :, None]))


def test_short_documents_are_counted():
    lengths = np.array([127, 128, 5, 4000])
    options = {"num_anchors": 2, "num_positives": 1, "max_span": 64, "min_span": 32, "sampling": "any"}
    with pytest.raises(ValueError, match=r"2 of 4 documents have fewer than 128 tokens"):
        sample_spans(lengths, np.arange(4), 0, **options)
    sample_spans(lengths[[1, 3]], np.arange(2), 0, **options)


def test_all_bad_settings_are_reported_at_once():
    with pytest.raises(ValueError, match="num_anchors") as caught:
        sample_many(1, 100, "beside", num_anchors=0, num_positives=-1, max_span=3, min_span=4)
    for pattern in ("num_anchors is 0", "num_positives is -1", "max_span is 3", "'beside'.*any, adjacent, subsuming"):
        assert re.search(pattern, str(caught.value))
    with pytest.raises(ValueError, match="min_span is 0"):
        sample_many(1, 100, min_span=0)
    with pytest.raises(ValueError, match="shape"):
        sample_spans(
            np.full(3, 999), np.arange(2), 0, num_anchors=1, num_positives=1, max_span=9, min_span=3, sampling="any"
        )


def test_no_documents_give_no_spans():
    assert sample_many(0, 100).positive_start.shape == (0, 2, 2)
