"""Evaluation on held-out worlds: does a video stay sharp, keep its theme and obey the controls?"""

from .evaluation import evaluate
from .measure import Measurement
from .report import Report

__all__ = ["Measurement", "Report", "evaluate"]
