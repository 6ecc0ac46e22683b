"""The data of the bundled tiny world: a procedural scene with exact camera poses."""
