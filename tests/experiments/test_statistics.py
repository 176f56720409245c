import math

import pytest
from scipy import stats

from sdt_diffusion.experiments.statistics import paired_difference, steps_to_reach


class TestPairedDifference:
    def test_a_known_answer(self):
        """Differences 1, 2, 3: mean 2, deviation 1; t of 2 degrees of freedom is 4.303 at 97.5%."""
        found = paired_difference([11, 22, 33], [10, 20, 30])
        assert (found.num_pairs, found.mean, found.deviation) == (3, 2, 1)
        assert found.low == pytest.approx(2 - 4.302653 / math.sqrt(3), abs=1e-5)
        assert found.high == pytest.approx(2 + 4.302653 / math.sqrt(3), abs=1e-5)

    def test_p_is_that_of_scipys_paired_test(self):
        values, baseline = [0.21, 0.25, 0.19, 0.30], [0.22, 0.24, 0.21, 0.33]
        expected = stats.ttest_rel(values, baseline)
        found = paired_difference(values, baseline)
        assert found.p_value == pytest.approx(expected.pvalue)
        interval = expected.confidence_interval(0.95)
        assert (found.low, found.high) == pytest.approx((interval.low, interval.high))

    def test_what_all_pairs_share_does_not_count(self):
        one = paired_difference([1.5, 2.25], [1.0, 2.0])
        assert paired_difference([101.5, 52.25], [101.0, 52.0]) == pytest.approx(one)

    def test_one_pair_has_a_difference_and_no_interval(self):
        found = paired_difference([1.0], [3.0])
        assert found.mean == -2
        assert all(map(math.isnan, (found.deviation, found.low, found.high, found.p_value)))

    def test_equal_differences_are_certain(self):
        assert paired_difference([1.0, 2.0], [1.0, 2.0]).p_value == 1
        assert paired_difference([1.5, 2.5], [1.0, 2.0]).p_value == 0

    @pytest.mark.parametrize(("values", "baseline"), [([], []), ([1], [1, 2]), ([math.nan], [1])])
    def test_what_is_no_pair_is_refused(self, values, baseline):
        with pytest.raises(ValueError, match=r"[Pp]airs"):
            paired_difference(values, baseline)


class TestStepsToReach:
    @pytest.mark.parametrize(("target", "expected"), [(4.0, 10), (3.0, 15), (2.0, 20), (1.5, 25), (9.0, 10)])
    def test_it_is_interpolated_between_points(self, target, expected):
        assert steps_to_reach([10, 20, 30], [4, 2, 1], target) == expected

    def test_the_first_crossing_counts(self):
        assert steps_to_reach([10, 20, 30, 40], [4, 2, 3, 1], 2) == 20

    def test_a_loss_that_is_not_reached_has_no_step(self):
        assert steps_to_reach([10, 20], [4, 2], 1) is None

    def test_steps_that_do_not_rise_are_refused(self):
        with pytest.raises(ValueError, match="rising steps"):
            steps_to_reach([10, 10], [4, 2], 1)
