"""Search spaces: which are refused, and how points are drawn from the others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from distrec.errors import InputError
from distrec.tuning.space import Range, grid, load_spaces, parse_space, random_point, size


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize(("low", "high"), [(1.0, 2.0), (1e-4, 1e-1), (3.0, 300.0)])
def test_a_range_is_covered_evenly_on_its_scale(low: float, high: float, log: bool) -> None:
    values = [Range(low=low, high=high, log=log).at(fraction) for fraction in np.linspace(0, 1, 1001)[:-1]]
    assert values[0] == low
    assert max(values) < high
    steps = np.diff(np.log(values) if log else values)
    np.testing.assert_allclose(steps, steps.mean(), rtol=0.05)


@pytest.mark.parametrize("log", [False, True])
def test_whole_numbers_include_both_ends(log: bool) -> None:
    values = [Range(low=1, high=7, integer=True, log=log).at(fraction) for fraction in np.linspace(0, 1, 5000)[:-1]]
    assert set(values) == set(range(1, 8))
    assert all(isinstance(value, int) for value in values)
    if not log:
        assert np.bincount(values)[1:].min() > 0.9 * 5000 / 7


def test_a_space_of_lists_is_drawn_without_repetition() -> None:
    space = parse_space({"a.x": [1, 2, 3], "a.y": [[1], [1, 2]], "b": ["p", "q"]}, "space")
    points = [random_point(space, (seed,), number) for seed in (1, 2) for number in range(12)]
    for drawn in (points[:12], points[12:]):
        assert sorted(map(repr, drawn)) == sorted(map(repr, grid(space)))
    assert points[:12] != points[12:]
    assert size(space) == 12
    assert random_point(space, (1,), 12) is None


def test_points_of_ranges_depend_on_seed_and_number_alone() -> None:
    space = parse_space({"lr": {"low": 1e-4, "high": 1e-1, "log": True}, "k": [1, 2]}, "space")
    first = [random_point(space, (7, "m"), number) for number in range(20)]
    assert first == [random_point(space, (7, "m"), number) for number in range(20)]
    assert len({repr(point) for point in first}) == 20
    assert first != [random_point(space, (7, "n"), number) for number in range(20)]
    with pytest.raises(InputError, match="has a range, which has no grid"):
        grid(space)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{}", "holds no space"),
        ("published: {}", "space 'published' has no keys"),
        ("published: {optimizer.lr: 1e-3}", "key 'optimizer.lr' is 0.001; give a list of different values, or a range"),
        ("published: {optimizer.lr: []}", "give a list of different values"),
        ("published: {optimizer.lr: [1e-3, 0.001]}", "give a list of different values"),
        ("published: {optimizer.lr: {low: 2, high: 1}}", "must have 'low' below 'high'"),
        ("published: {optimizer.lr: {low: 0, high: 1, log: true}}", "must have 'low' above 0 with 'log: true'"),
        ("published: {method.layers: {low: 0.5, high: 3, integer: true}}", "must have whole numbers"),
        ("published: {optimizer.lr: {low: 1, hihg: 2}}", "optimizer.lr.high' is missing"),
        ("published: {train.seed: [1, 2]}", "key 'train.seed' is not searched"),
        ("published: {method.name: [stair, bprmf]}", "key 'method.name' is not searched"),
    ],
)
def test_an_invalid_search_space_is_refused(text: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "search.yaml").write_text(text)
    with pytest.raises(InputError, match=told):
        load_spaces(tmp_path / "search.yaml")
