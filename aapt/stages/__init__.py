"""The training stages, one file each.

A stage holds networks and optimizers; `step(data, step)` is one update and returns its metrics,
`export()` gives the network to keep.
"""
