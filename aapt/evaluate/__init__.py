"""Evaluation on worlds or clips that no training has seen.

Does a video stay sharp, keep its theme and follow its controls?
"""

from .evaluation import evaluate
from .measure import Measurement
from .report import Report

__all__ = ["Measurement", "Report", "evaluate"]
