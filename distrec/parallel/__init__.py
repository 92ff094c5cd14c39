"""Who owns which row, and moving rows between their owners: partitions, exchanges, merged top-K.

Convention of every collective here, and of the losses built on them (promise 1 of docs/design.md): a rank's loss is its
*share*, the sum over ranks is the objective, and gradients are those of that sum.
"""
