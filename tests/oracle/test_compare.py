import numpy as np
import pytest

from tests.oracle.compare import Row, absolute, entries, of_largest, relative, table, trained


def test_each_measure_is_what_its_name_says():
    found, wanted = np.array([1.0, 2.5]), np.array([1.0, 2.0])
    assert absolute("k", found, wanted, 1).difference == 0.5
    assert relative("k", found, wanted, 1).difference == 0.25
    assert of_largest("k", found, np.array([1.0, -4.0]), 1).difference == 6.5 / 4
    assert absolute("k", np.float32(1), np.array(1.0), 0).holds


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_never_holds(bad: float):
    found, wanted = np.array([1.0, bad]), np.array([1.0, 2.0])
    for row in (absolute("k", found, wanted, 1), relative("k", found, wanted, 1), of_largest("k", found, wanted, 1)):
        assert not row.holds
    assert not any(row.holds for row in trained("k", found, wanted, 1.0, 1.0)[:1])


def test_trained_weights_may_stray_in_one_of_a_thousand_elements_and_by_the_learning_rate():
    wanted = np.zeros(5000)
    for strays, far, holds in (
        (0, 0, [True, True]),
        (4, 9e-4, [True, True]),
        (20, 9e-4, [False, True]),
        (1, 2e-3, [True, False]),
    ):
        found = wanted.copy()
        found[:strays] = far
        assert [row.holds for row in trained("k", found, wanted, 1e-5, 1e-3)] == holds


def test_an_entry_on_one_side_only_differs_by_its_value():
    assert entries("k", {(0, 1): 0.5}, {(0, 1): 0.5, (2, 2): -0.3}, 1).difference == 0.3
    assert entries("k", {}, {}, 0).holds


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="shapes differ"):
        absolute("k", np.zeros((2, 1)), np.zeros(2), 1)


def test_the_table_marks_what_is_exceeded_and_counts():
    text = table([Row("a", 0.1, 1, "m"), Row("bb", 2, 1, "m")])
    assert text.splitlines()[-1] == "1 of 2 within tolerance"
    assert text.splitlines()[2].endswith("EXCEEDED")
