"""How good answers are: named measures, their intervals, the worst answers, a report, and calibration."""

from multimodal.measures.answered import Answered
from multimodal.measures.evaluation import Evaluation
from multimodal.measures.named import MEASURES, Measure

__all__ = ["MEASURES", "Answered", "Evaluation", "Measure"]
