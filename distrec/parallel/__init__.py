"""Partitions of rows over ranks, exchanges of rows between ranks, and merged top-K.

All collectives here, and the losses built on them, follow one convention (promise 1 of docs/design.md): a rank's loss
is its *share*, the objective is the sum over ranks, and gradients are those of that sum.
"""
