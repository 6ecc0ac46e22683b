"""A procedural first-person world, rendered with exact controls and camera poses."""
