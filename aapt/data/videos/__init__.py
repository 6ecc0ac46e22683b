"""Clips from the user's videos."""
