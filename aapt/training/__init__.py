"""One update: recipes, curricula, losses, forcing and stages; no files."""
