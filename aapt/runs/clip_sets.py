"""The sets of clips of a run."""

from collections.abc import Callable

from ..data.clips import Clips


class ClipSets(dict):
    """Sets of clips by name, each opened at its first use."""

    def __init__(self, open_set: Callable[[str], Clips]):
        super().__init__()
        self.open_set = open_set

    def __missing__(self, name: str) -> Clips:
        self[name] = self.open_set(name)
        return self[name]
