"""Other people's checkpoints to ours: names, layouts, kinds, and a streamed conversion."""
