"""Cascades: scores by hand, curves of small tables, what routing recovers, calibration of known probabilities."""

import builtins
import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, stats

from edgelab.deployments.hybrid.routing import curves, scores
from edgelab.deployments.hybrid.routing.curves import (
    GapError,
    Recovery,
    apgr,
    at_random,
    compare,
    cpt,
    curve,
    held_out,
    oracle,
    pgr,
    routed,
    threshold_for_accuracy,
    threshold_for_share,
)
from edgelab.deployments.hybrid.routing.gap import RoutingError, estimate, gap, items_needed, weights_of
from edgelab.deployments.hybrid.routing.scores import (
    SCORES,
    LearnMissing,
    answer_scores,
    calibrate,
    choice_scores,
    error_of_perfect,
    expected_calibration_error,
    features,
    learn_router,
    reliability,
)

# Eight items: three that only the cloud gets right, one that only the edge does, two both, two neither.
EDGE = np.array([0, 0, 0, 1, 1, 1, 0, 0], dtype=bool)
CLOUD = np.array([1, 1, 1, 0, 1, 1, 0, 0], dtype=bool)
ORACLE = oracle(EDGE, CLOUD)


def drawn(items=2000, seed=0, weak=0.5, strong=0.75, knowing=1.0):
    """Edge and cloud that are right independently, and a score that knows about the edge: its logit plus noise."""
    random = np.random.default_rng(seed)
    chance = random.beta(2 * weak, 2 * (1 - weak), items)
    score = np.log(chance / (1 - chance)) * knowing + random.normal(0, 1, items)
    return random.random(items) < chance, random.random(items) < strong, score


# Scores


def test_scores_of_an_answer_by_hand():
    """Two tokens: one certain among four, and the second of 0.5, 0.3, 0.1, 0.1."""
    probabilities = np.array([[1.0, 0, 0, 0], [0.5, 0.3, 0.1, 0.1]])
    with np.errstate(divide="ignore"):
        logits = np.log(probabilities) + 3
    logits[0] = [60, 0, 0, 0]
    found = answer_scores(logits, [0, 1], quantile=0.25)
    chosen = [0, math.log(0.3)]
    assert found == pytest.approx(
        {
            "mean": sum(chosen) / 2,
            "minimum": chosen[1],
            "quantile": 0.75 * chosen[1],
            "entropy": (0.5 * math.log(0.5) + 0.3 * math.log(0.3) + 0.2 * math.log(0.1)) / 2,
            "margin": (60 + math.log(0.5 / 0.3)) / 2,
        }
    )
    assert tuple(found) == SCORES
    hidden = np.append(logits, np.full((2, 1), -np.inf), 1)  # a token that cannot be
    assert answer_scores(hidden, [0, 1], quantile=0.25) == pytest.approx(found)


@given(st.integers(0, 100))
def test_surer_logits_have_higher_scores(seed):
    """Twice the logits of likeliest tokens: surer in every way."""
    logits = np.random.default_rng(seed).normal(0, 2, (6, 20))
    once, twice = (answer_scores(factor * logits, logits.argmax(1)) for factor in (1, 2))
    assert all(twice[name] > once[name] for name in SCORES)


CHOICES = [[-2.0, -2.0], [-1.0, -1.0, -1.0, -3.0], [-5.0, -2.0]]  # sums -4, -6, -7


def test_scores_of_a_choice_by_hand():
    """Per byte the second is the likeliest, by the sum the first, which is the shortest."""
    chosen, found = choice_scores(CHOICES, [10, 20, 30], quantile=0.5)
    score = np.array([-0.4, -0.3, -7 / 30])
    assert chosen == 2
    weights = np.exp(20 * score) / np.exp(20 * score).sum()
    assert found == pytest.approx(
        {
            "mean": -7 / 30,
            "minimum": -5,
            "quantile": -3.5,
            "entropy": float((weights * np.log(weights)).sum()),
            "margin": 0.3 - 7 / 30,
        }
    )
    chosen, found = choice_scores(CHOICES, None)
    assert chosen == 0 and found["mean"] == -4 and found["margin"] == 2 and found["minimum"] == -2


def test_features_are_in_the_order_of_names():
    rows = [choice_scores(CHOICES, [10, 20, 30])[1], choice_scores(CHOICES, None)[1]]
    table = features([rows[0], dict(reversed(rows[1].items()))])
    assert table.shape == (2, 5)
    assert table[1].tolist() == [rows[1][name] for name in SCORES]


def test_scores_of_what_is_none():
    with pytest.raises(RoutingError, match=r"2 tokens needs logits of the shape \(2, vocabulary\)"):
        answer_scores(np.zeros((3, 8)), [1, 2])
    with pytest.raises(RoutingError, match="0 tokens"):
        answer_scores(np.zeros((0, 8)), [])
    with pytest.raises(RoutingError, match="1 candidates"):
        choice_scores(CHOICES[:1], [3])
    with pytest.raises(RoutingError, match="3 candidates and 2 sizes"):
        choice_scores(CHOICES, [3, 4])
    with pytest.raises(RoutingError, match="at least 1"):
        choice_scores(CHOICES, [3, 0, 4])


# Curves


def test_curve_by_hand():
    found = curve([1, 0, 0, 1], [1, 1, 1, 0], [0.9, 0.2, 0.4, 0.7])
    assert found.share.tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert found.accuracy.tolist() == [0.5, 0.75, 1, 0.75, 0.75]
    assert found.threshold.tolist() == [-np.inf, 0.4, 0.7, 0.9, np.inf]
    for share, accuracy, threshold in zip(found.share, found.accuracy, found.threshold, strict=True):
        sent, right = routed([1, 0, 0, 1], [1, 1, 1, 0], [0.9, 0.2, 0.4, 0.7], threshold)
        assert (sent.mean(), right.mean()) == (share, accuracy)


def test_items_of_equal_score_go_together():
    """Three of a score of 1 and one of 2: the curve has a point behind each score, and is straight between them."""
    found = curve([0, 0, 1, 1], [1, 1, 0, 1], [1, 1, 1, 2])
    assert found.share.tolist() == [0, 0.75, 1] and found.accuracy.tolist() == [0.5, 0.75, 0.75]
    assert found.threshold.tolist() == [-np.inf, 2, np.inf]


def test_a_straight_line_between_is_what_drawing_among_equals_gives():
    random = np.random.default_rng(3)
    score = np.array([0, 0, 0, 0, 1, 1, 1, 1.0])
    broken = [curve(EDGE, CLOUD, score + 1e-3 * random.random(8)).accuracy for _ in range(4000)]
    tied = curve(EDGE, CLOUD, score)
    expected = np.interp(np.arange(9) / 8, tied.share, tied.accuracy)
    assert np.abs(np.mean(broken, 0) - expected).max() < 0.01


def test_the_same_score_for_all_is_random_routing():
    one = curve(EDGE, CLOUD, np.ones(8))
    assert one.share.tolist() == [0, 1] and one.accuracy.tolist() == [3 / 8, 5 / 8]
    assert apgr(one.share, one.accuracy) == 0.5
    assert pgr(one.share, one.accuracy, 0.3) == pytest.approx(0.3)
    assert cpt(one.share, one.accuracy, 0.8) == pytest.approx(0.8)


def test_random_scores_recover_half_on_average():
    found = [
        apgr(one.share, one.accuracy)
        for seed in range(3000)
        if (one := curve(EDGE, CLOUD, at_random(8, seed)))
    ]
    assert abs(np.mean(found) - 0.5) < 4 * np.std(found) / math.sqrt(len(found))
    assert np.std(found) > 0.2


def test_oracle_and_worst_by_hand():
    """The oracle rises by 3/8 until a share of 3/8, stays, and falls by 1/8 on the last eighth."""
    best = curve(EDGE, CLOUD, ORACLE)
    assert best.share.tolist() == [0, 3 / 8, 7 / 8, 1] and best.accuracy.tolist() == [
        3 / 8,
        6 / 8,
        6 / 8,
        5 / 8,
    ]
    above = 3 / 8 * 3 / 8 / 2 + 4 / 8 * 3 / 8 + 1 / 8 * (3 / 8 + 2 / 8) / 2
    assert 1 < apgr(best.share, best.accuracy) == pytest.approx(above / (2 / 8))
    assert pgr(best.share, best.accuracy, 0.5) == 1.5
    assert cpt(best.share, best.accuracy, 0.5) == pytest.approx(1 / 8)
    assert cpt(best.share, best.accuracy, 1.5) == pytest.approx(3 / 8)
    assert cpt(best.share, best.accuracy, 1.6) == np.inf
    worst = curve(EDGE, CLOUD, -ORACLE)
    assert apgr(worst.share, worst.accuracy) == pytest.approx(
        1 - above / (2 / 8)
    )  # the same curve, turned round
    assert cpt(worst.share, worst.accuracy, 0.5) == pytest.approx(1 - 1 / 8)


@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.integers(0, 5)), min_size=1, max_size=12))
def test_curves_end_where_one_answers_all_and_lie_below_the_oracle(items):
    edge, cloud, score = (np.array(column) for column in zip(*items, strict=True))
    found, best = curve(edge, cloud, score), curve(edge, cloud, oracle(edge, cloud))
    assert found.share[[0, -1]].tolist() == [0, 1]
    assert found.accuracy[0] == pytest.approx(edge.mean()) and found.accuracy[-1] == pytest.approx(
        cloud.mean()
    )
    assert (found.accuracy <= np.interp(found.share, best.share, best.accuracy) + 1e-9).all()
    worst = curve(edge, cloud, -oracle(edge, cloud))
    assert (found.accuracy >= np.interp(found.share, worst.share, worst.accuracy) - 1e-9).all()


@given(
    st.lists(st.tuples(st.booleans(), st.booleans(), st.integers(0, 5)), min_size=1, max_size=12),
    st.floats(0, 1),
)
def test_recovered_shares_are_those_of_an_integral(items, at):
    edge, cloud, score = (np.array(column) for column in zip(*items, strict=True))
    weak, strong = edge.mean(), cloud.mean()
    if strong <= weak:
        return
    one = curve(edge, cloud, score)
    area = integrate.quad(
        lambda share: np.interp(share, one.share, one.accuracy), 0, 1, points=one.share[1:-1], limit=200
    )[0]
    assert apgr(one.share, one.accuracy) == pytest.approx((area - weak) / (strong - weak), abs=1e-6)
    recovered = pgr(one.share, one.accuracy, at)
    assert recovered == pytest.approx(
        (np.interp(at, one.share, one.accuracy) - weak) / (strong - weak), abs=1e-6
    )
    assert pgr(one.share, one.accuracy, 0) == 0 and pgr(one.share, one.accuracy, 1) == pytest.approx(1)
    smallest = cpt(one.share, one.accuracy, float(recovered))
    assert smallest <= at + 1e-6
    grid = np.linspace(0, max(smallest - 1e-6, 0), 50)
    below = [pgr(one.share, one.accuracy, share) for share in grid]
    assert smallest == 0 or max(below) < recovered + 1e-9


# The gap and its interval


def test_gap_by_hand():
    found = gap(EDGE, CLOUD)
    assert found.value == 2 / 8 and found.changed == 4 / 8 and found.items == 8
    assert found.low < 0 < found.high and not found.clear
    assert found.needed == math.ceil(7.8489 * 0.5 / 0.25**2)
    assert gap(CLOUD, EDGE).needed is None


def test_items_needed_of_published_settings():
    assert items_needed(0.05, 0.2) == 628
    assert items_needed(0.02, 0.2) == 3925
    for difference, changed in ((0.3, 0.2), (0.0, 0.2), (-0.1, 0.2), (0.1, 1.2)):
        with pytest.raises(RoutingError, match="share of changed items"):
            items_needed(difference, changed)


def test_so_many_items_show_the_gap_in_four_of_five_cases():
    """5 points where a fifth of the items changes: McNemar's test at 5 %, on 628 items, many times."""
    random = np.random.default_rng(0)
    won, lost, _ = random.multinomial(items_needed(0.05, 0.2), [0.125, 0.075, 0.8], 4000).T
    shown = np.abs(won - lost) / np.sqrt(won + lost) > stats.norm.ppf(0.975)
    assert shown.mean() == pytest.approx(0.8, abs=0.025)


def test_interval_of_the_gap_is_about_that_of_student():
    edge, cloud, _ = drawn()
    found = gap(edge, cloud)
    theirs = stats.ttest_1samp(cloud.astype(float) - edge, 0).confidence_interval(0.95)
    assert (found.low, found.high) == (
        pytest.approx(theirs.low, abs=2e-3),
        pytest.approx(theirs.high, abs=2e-3),
    )


def test_groups_are_drawn_whole_and_widen_the_interval():
    """Every item five times over: five times the items, and no more is known."""
    edge, cloud = (np.repeat(one, 5) for one in drawn(200)[:2])
    groups = np.repeat(np.arange(200), 5)
    once, grouped, loose = gap(edge[::5], cloud[::5]), gap(edge, cloud, groups), gap(edge, cloud)
    assert grouped.high - grouped.low == pytest.approx(once.high - once.low)
    assert loose.high - loose.low < 0.6 * (grouped.high - grouped.low)
    assert (weights_of(1000, groups, 20).reshape(20, 200, 5).std(-1) == 0).all()
    assert (weights_of(7, None, 20).sum(1) == 7).all()
    with pytest.raises(RoutingError, match="Groups of shape"):
        gap(edge, cloud, groups[:-1])


def test_a_gap_that_is_not_clear_is_refused_with_the_items_it_takes():
    with pytest.raises(GapError, match=r"\+25\.0 points .* of 8 items .* about 63 items would show"):
        Recovery(EDGE, CLOUD, ORACLE)
    with pytest.raises(GapError, match=r"-25\.0 points .* give a cloud that is better"):
        Recovery(CLOUD, EDGE, ORACLE)
    with pytest.raises(GapError, match=r"\+0\.0 points"):
        Recovery(EDGE, EDGE, ORACLE)


# Recovery


@pytest.fixture(scope="module")
def items():
    return drawn()


def test_recovery_by_a_score_lies_between_random_and_oracle(items):
    edge, cloud, score = items
    found, best = Recovery(edge, cloud, score), Recovery(edge, cloud, oracle(edge, cloud))
    blind = Recovery(edge, cloud, at_random(len(edge)))
    assert blind.apgr().low < 0.5 < blind.apgr().high
    assert 0.55 < found.apgr().low < found.apgr().value < found.apgr().high < best.apgr().low
    assert best.apgr().value > 1
    assert found.pgr(0).value == 0 and found.pgr(1).value == pytest.approx(1)
    assert found.pgr(0.3).low > 0.3
    assert found.cpt(0.5).value < 0.4 and found.cpt(0.5).low < found.cpt(0.5).value < found.cpt(0.5).high
    assert found.cpt(0).value == 0 and found.cpt(5).value == found.cpt(5).low == math.inf
    lead = found.lead(blind)
    assert lead.low > 0 and lead.value == pytest.approx(found.apgr().value - blind.apgr().value)
    own = found.lead(found)
    assert (own.value, own.low, own.high) == (0, 0, 0)
    with pytest.raises(RoutingError, match="same items"):
        found.lead(Recovery(edge[1:], cloud[1:], score[1:]))
    with pytest.raises(RoutingError, match=r"cloud share of -0\.1"):
        found.pgr(-0.1)


def test_resamples_keep_edge_cloud_and_score_of_an_item_together(items):
    """The vectorized curves of resamples are the curves of the items that were drawn."""
    edge, cloud, score = items
    edge, cloud, score = edge[:60], cloud[:60], score[:60].round(1)  # with ties
    weights = weights_of(60, None, 25, seed=4)
    shares, accuracies = curves._curves(edge.astype(float), cloud.astype(float), score, weights)
    for weight, share, accuracy in zip(weights.astype(int), shares, accuracies, strict=True):
        drawn_items = np.repeat(np.arange(60), weight)
        one = curve(edge[drawn_items], cloud[drawn_items], score[drawn_items])
        if one.accuracy[0] != one.accuracy[-1]:
            assert apgr(share, accuracy) == pytest.approx(apgr(one.share, one.accuracy))
            assert pgr(share, accuracy, 0.37) == pytest.approx(pgr(one.share, one.accuracy, 0.37))


def test_intervals_cover_what_they_should():
    """The APGR of a score over all items there are, against intervals from 400 of them at a time."""
    whole = curve(*drawn(200_000, seed=99))
    truth = apgr(whole.share, whole.accuracy)
    covered = 0
    for seed in range(150):
        found = Recovery(*drawn(400, seed=seed), resamples=300).apgr()
        covered += found.low <= truth <= found.high
    assert 0.86 < covered / 150 < 1


def test_resamples_without_a_gap_make_an_interval_wider():
    values = np.linspace(0, 1, 1001)
    plain = estimate(0.5, values)
    unknown = np.zeros(1001, dtype=bool)
    unknown[500:520] = True  # 2 %
    wide = estimate(0.5, values, unknown)
    assert (plain.low, plain.high) == (0.025, 0.975)
    assert wide.low < 0.006 and wide.high > 0.994


# Thresholds


def test_a_threshold_sends_at_most_the_share():
    score = [0.3, 0.1, 0.2, 0.2, 0.4]
    assert threshold_for_share(score, 0.2) == 0.2  # 0.1 goes
    assert threshold_for_share(score, 0.4) == 0.2  # one of two equal ones cannot go alone
    assert threshold_for_share(score, 0.6) == 0.3
    assert threshold_for_share(score, 0) == -math.inf and threshold_for_share(score, 1) == math.inf
    for share in (-0.1, 1.1, math.nan):
        with pytest.raises(RoutingError, match="should be 0 to 1"):
            threshold_for_share(score, share)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=30), st.floats(0, 1))
def test_no_higher_threshold_sends_as_little(score, share):
    score = np.array(score, dtype=float)
    threshold = threshold_for_share(score, share)
    assert (score < threshold).mean() <= share + 1e-9
    higher = [one for one in [*np.unique(score), np.inf] if (score < one).mean() > (score < threshold).mean()]
    assert not higher or (score < higher[0]).mean() > share - 1e-9


def test_a_threshold_for_an_accuracy():
    edge, cloud, score = [1, 0, 0, 1], [1, 1, 1, 0], [0.9, 0.2, 0.4, 0.7]
    assert threshold_for_accuracy(edge, cloud, score, 0.4) == -math.inf
    assert threshold_for_accuracy(edge, cloud, score, 0.75) == 0.4
    assert threshold_for_accuracy(edge, cloud, score, 1.0) == 0.7
    with pytest.raises(
        RoutingError, match=r"accuracy of 0\.900; the best is 0\.500 at a cloud share of 0\.00"
    ):
        threshold_for_accuracy([1, 0, 0, 1], [0, 0, 0, 1], score, 0.9)


def test_what_is_chosen_on_one_part_holds_on_the_other(items):
    edge, cloud, score = items
    chosen = held_out(len(edge), 0.5, seed=1)
    threshold = threshold_for_share(score[chosen], 0.3)
    sent, right = routed(edge[~chosen], cloud[~chosen], score[~chosen], threshold)
    assert sent.mean() == pytest.approx(0.3, abs=0.04)
    assert right.mean() > edge[~chosen].mean() + 0.1
    goal = threshold_for_accuracy(edge[chosen], cloud[chosen], score[chosen], 0.72)
    _, right = routed(edge[~chosen], cloud[~chosen], score[~chosen], goal)
    assert right.mean() == pytest.approx(0.72, abs=0.04)


def test_groups_are_cut_whole():
    groups = np.repeat(np.arange(10), [1, 9, 2, 8, 3, 7, 4, 6, 5, 5])
    found = held_out(50, 0.3, groups, seed=2)
    assert len(set(groups[found])) == 3 and not set(groups[found]) & set(groups[~found])
    assert held_out(2, 0.01).sum() == 1
    assert (held_out(50, 0.3, groups, seed=2) == found).all() and (
        held_out(50, 0.3, groups, seed=3) != found
    ).any()
    for bad in ({"items": 1}, {"items": 5, "share": 1.0}, {"items": 5, "groups": [1, 1, 1, 1, 1]}):
        with pytest.raises(RoutingError, match="cannot be cut"):
            held_out(**bad)


def test_items_that_do_not_belong_together():
    with pytest.raises(RoutingError, match=r"edge \(2,\), of the cloud \(3,\) and scores \(2,\)"):
        curve([1, 0], [1, 0, 1], [0.1, 0.2])
    for score in ([0.1, math.nan], [0.1, math.inf], []):
        with pytest.raises(RoutingError, match="finite numbers"):
            curve([1, 0], [1, 0], score)


def test_a_table_of_scores_says_what_each_knows_and_what_it_recovers():
    """40 items, the edge right on the surer half: margin tells them apart, backwards does it the wrong way round."""
    edge, cloud, margin = np.arange(40) >= 20, np.arange(40) % 4 > 0, np.arange(40.0)
    found = compare(edge, cloud, {"backwards": -margin, "same": margin * 0, "margin": margin})
    assert found.index.tolist() == ["margin", "same", "backwards"]
    assert found["AUC"].tolist() == [1, 0.5, 0] and found.loc["same", ["APGR", "half_at"]].tolist() == [
        0.5,
        0.5,
    ]
    own = Recovery(edge, cloud, margin)
    assert found.loc["margin", ["APGR", "low", "high"]].tolist() == [*dataclasses.astuple(own.apgr())]
    assert found.loc["margin", "half_at"] == own.cpt(0.5).value < 0.25
    assert math.isnan(compare(np.zeros(40), cloud, {"margin": margin})["AUC"].item())


# Calibration


def test_isotonic_regression_by_hand():
    """1 0 is pooled to a half, 0 1 is kept; ties count together, and each end has a right and a wrong item more."""
    found = calibrate([1, 2, 3, 4, 5, 5], [0, 1, 0, 1, 1, 0])
    assert found([1, 2, 3]) == pytest.approx([1 / 3, 0.5, 0.5])
    assert found([4, 5]) == pytest.approx([3 / 5, 3 / 5])
    assert found([-10, 10]) == pytest.approx([1 / 3, 3 / 5]) and found(1.5) == pytest.approx(5 / 12)


def test_a_few_items_at_an_end_are_not_called_always_wrong_or_always_right():
    """Laplace's rule: (right + 1) / (items + 2)."""
    found = calibrate(range(8), [0, 0, 0, 0, 1, 1, 1, 1])
    assert found(range(8)) == pytest.approx([1 / 6] * 4 + [5 / 6] * 4)
    assert calibrate([2.0], [1])(2.0) == pytest.approx(3 / 5)


def test_calibration_of_known_probabilities():
    """The score is the logit of the probability of being right: found again, and far from it before."""
    random = np.random.default_rng(0)
    score = random.normal(0, 1.5, 8000)
    truth = 1 / (1 + np.exp(-score))
    right = random.random(8000) < truth
    fitted = calibrate(score[:4000], right[:4000])
    found = fitted(score[4000:])
    assert np.abs(found - truth[4000:]).mean() < 0.03
    assert (np.diff(fitted(np.linspace(-6, 6, 500))) >= 0).all()
    after = expected_calibration_error(found, right[4000:])
    before = expected_calibration_error(1 / (1 + np.exp(-3 * score[4000:])), right[4000:])
    assert after.value < 0.04 < 0.1 < before.low < before.value < before.high
    perfect = expected_calibration_error(truth[4000:], right[4000:])
    chance = error_of_perfect(truth[4000:])
    assert chance.low < perfect.value < chance.high < 0.03


def test_calibrated_values_are_those_of_scikit_learn():
    from sklearn.isotonic import IsotonicRegression

    random = np.random.default_rng(1)
    score = random.normal(size=300).round(1)
    right = random.random(300) < 1 / (1 + np.exp(-score))
    other = np.linspace(-1, 1, 333)  # away from the ends
    theirs = IsotonicRegression(out_of_bounds="clip").fit(score, right.astype(float)).predict(other)
    np.testing.assert_allclose(calibrate(score, right)(other), theirs, atol=1e-12)


def test_calibration_error_by_hand():
    """Bins [0, 0.5) and [0.5, 1]: off by 0.2 with two items, and by 0.1 with three."""
    confidence, right = [0.1, 0.3, 0.5, 0.7, 1.0], [0, 0, 0, 1, 1]
    expected = (abs(0.4 - 0) + abs(2.2 - 2)) / 5
    assert expected_calibration_error(confidence, right, bins=2).value == pytest.approx(expected)
    shown = reliability(confidence, right, bins=2)
    assert shown["items"].tolist() == [2, 3]
    assert shown["confidence"].tolist() == pytest.approx([0.2, 2.2 / 3])
    assert shown["accuracy"].tolist() == pytest.approx([0, 2 / 3])
    wilson = stats.binomtest(2, 3).proportion_ci(method="wilson")
    assert (shown["low"][1], shown["high"][1]) == (wilson.low, wilson.high)
    assert reliability([0.95, 0.1], [1, 0])["items"].tolist() == [1, 1]
    whole = float(np.abs(shown["confidence"] - shown["accuracy"]) @ shown["items"]) / 5
    assert whole == pytest.approx(expected)


def test_what_is_no_probability():
    with pytest.raises(RoutingError, match=r"from -2 to 0\.5 and should be probabilities"):
        expected_calibration_error([-2, 0.5], [1, 0])
    with pytest.raises(RoutingError, match="same items"):
        calibrate([0.1, 0.2], [1, 0, 1])
    with pytest.raises(RoutingError, match="finite"):
        calibrate([0.1, math.nan], [1, 0])


# The learned router


def test_a_learned_router_finds_the_score_that_matters():
    random = np.random.default_rng(0)
    table = random.normal(size=(4000, 5)) * [1, 1000, 1e-3, 1, 1] + [0, 50, 0, -3, 0]
    chance = 1 / (1 + np.exp(-2 * table[:, 2] / 1e-3))
    right = random.random(4000) < chance
    router = learn_router(table[:2000], right[:2000])
    assert router.weights.argmax() == 2 and np.abs(np.delete(router.weights, 2)).max() < 0.3
    found = router(table[2000:])
    assert found.shape == (2000,) and np.abs(found - chance[2000:]).mean() < 0.03
    assert expected_calibration_error(found, right[2000:]).value < 0.05


def test_a_learned_router_routes_like_the_one_score_that_it_is_given(items):
    """A rising function of the score keeps its order, so that it recovers exactly as much."""
    edge, cloud, score = items
    learned = learn_router(score[:, None], edge)(score[:, None])
    found = Recovery(edge, cloud, learned).lead(Recovery(edge, cloud, score))
    assert (found.value, found.low, found.high) == pytest.approx((0, 0, 0), abs=1e-12)


def test_nothing_to_learn_from():
    with pytest.raises(RoutingError, match="All 3 answers are right"):
        learn_router(np.zeros((3, 2)), [1, 1, 1])
    with pytest.raises(RoutingError, match="All 3 answers are wrong"):
        learn_router(np.zeros((3, 2)), [0, 0, 0])
    with pytest.raises(RoutingError, match=r"shape \(3,\)"):
        learn_router(np.zeros(3), [0, 1, 0])


def test_without_scikit_learn_one_sentence_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def without(name, *given, **more):
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real(name, *given, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    for function in (calibrate, scores.learn_router):
        with pytest.raises(LearnMissing, match=r"scikit-learn.*\[hybrid\]"):
            function([[0.0], [1.0]], [0, 1])
