"""Training data: real videos, encoded into shards, and the bundled world's procedural scenes."""
