"""Exact full ranking over all items, its metrics, slices and report; the same bits at any number of workers."""

from distrec.evaluation.ranking import Evaluator, Ranked

__all__ = ["Evaluator", "Ranked"]
