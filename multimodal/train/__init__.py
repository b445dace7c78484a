"""Training: a plain loop, its recipe, its state on disk, its picture."""

from multimodal.train.callbacks import Answers, Callback, CallbackError, Histograms, View
from multimodal.train.embedding_cache import cached
from multimodal.train.evaluation import calibrate, evaluate
from multimodal.train.hyperparameters import FoundSettings, search
from multimodal.train.job import TrainingJob
from multimodal.train.loop import Run, fit
from multimodal.train.rate_finder import FoundRate, find_lr
from multimodal.train.recipe import Recipe

__all__ = [
    "Answers",
    "Callback",
    "CallbackError",
    "FoundRate",
    "FoundSettings",
    "Histograms",
    "Recipe",
    "Run",
    "TrainingJob",
    "View",
    "cached",
    "calibrate",
    "evaluate",
    "find_lr",
    "fit",
    "search",
]
