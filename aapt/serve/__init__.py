"""The page to play in, and its server."""
