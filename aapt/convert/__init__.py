"""Checkpoints of other projects to ours: names, layouts, kinds, and a streamed conversion."""
