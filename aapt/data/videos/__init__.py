"""Clips from the user's videos: sources, decoding, cutting, sidecars, encoding."""
