"""A procedural puppet: an articulated figure with several looks that moves in several places."""
