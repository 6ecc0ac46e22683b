"""A training run in a folder: resuming, ranks, files, plans, monitoring."""
