"""Exact full ranking over all items with metrics, slices and a report; bit-identical at any number of workers."""

from distrec.evaluation.ranking import Evaluator, Ranked

__all__ = ["Evaluator", "Ranked"]
