"""Images in, video and figures out; no networks."""
