"""Differences between compared values, each with its tolerance."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Row:
    """One compared key. It holds if `difference <= tolerance`; NaN never holds."""

    key: str
    difference: float
    tolerance: float
    measure: str

    @property
    def holds(self) -> bool:
        return bool(self.difference <= self.tolerance)


def recorded_key(row: Row) -> str:
    """The fixture's key of a row; some keys are compared in two ways."""
    return row.key.split(" ")[0]


def absolute(key: str, found: np.ndarray, wanted: np.ndarray, tolerance: float) -> Row:
    """Largest absolute difference."""
    return Row(key, _largest(found, wanted), tolerance, "max |difference|")


def relative(key: str, found: np.ndarray, wanted: np.ndarray, tolerance: float) -> Row:
    """Largest difference relative to the wanted value, element by element (scalars and losses)."""
    found, wanted = _both(found, wanted)
    return Row(key, float(np.max(np.abs(found - wanted) / np.maximum(np.abs(wanted), 1e-30))), tolerance, "relative")


def of_largest(key: str, found: np.ndarray, wanted: np.ndarray, tolerance: float) -> Row:
    """Largest difference relative to the tensor's largest entry (gradients)."""
    scale = max(float(np.abs(wanted).max()), 1e-30)
    return Row(key, _largest(found, wanted) / scale, tolerance, "of largest entry")


def trained(key: str, found: np.ndarray, wanted: np.ndarray, tolerance: float, lr: float) -> list[Row]:
    """Weights after steps: 99.9 % of elements within `tolerance`, all within the learning rate."""
    found, wanted = _both(found, wanted)
    difference = np.abs(found - wanted).ravel()
    quantile = float(np.quantile(difference, 0.999, method="higher")) if np.isfinite(difference).all() else np.nan
    return [
        Row(key, quantile, tolerance, "99.9 % of elements"),
        Row(key, _largest(found, wanted), lr, "every element, lr"),
    ]


def entries(
    key: str, found: dict[tuple[int, int], float], wanted: dict[tuple[int, int], float], tolerance: float
) -> Row:
    """Sparse matrices; an entry that only one of them has differs by its whole value."""
    keys = found.keys() | wanted.keys()
    largest = max((abs(found.get(k, 0.0) - wanted.get(k, 0.0)) for k in keys), default=0.0)
    return Row(key, largest, tolerance, "max |difference|")


def _both(found: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    if found.shape != wanted.shape:
        raise ValueError(f"shapes differ: {found.shape} and {wanted.shape}")
    return found, wanted


def _largest(found: np.ndarray, wanted: np.ndarray) -> float:
    found, wanted = _both(found, wanted)
    return float(np.max(np.abs(found - wanted), initial=0.0))


def table(rows: list[Row]) -> str:
    """One line per row, and a closing count."""
    width = max(len(row.key) for row in rows)
    lines = [f"{'key':{width}}  {'difference':>10}  {'tolerance':>10}  measure"]
    for row in rows:
        verdict = "" if row.holds else "   EXCEEDED"
        lines.append(f"{row.key:{width}}  {row.difference:10.2e}  {row.tolerance:10.2e}  {row.measure}{verdict}")
    exceeded = sum(not row.holds for row in rows)
    lines.append(f"{len(rows) - exceeded} of {len(rows)} within tolerance")
    return "\n".join(lines)
