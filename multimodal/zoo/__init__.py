"""Whole systems out of papers, built of the framework's parts; nothing outside imports them."""

from multimodal.zoo.pruning import pruned
from multimodal.zoo.temporal_conv import TemporalConv
from multimodal.zoo.turing_machine import TuringMachine

__all__ = ["TemporalConv", "TuringMachine", "pruned"]
