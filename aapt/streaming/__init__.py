"""Video frame after frame: streams and rollouts."""
