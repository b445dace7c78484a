"""What a training run will need, before it is started: memory by part, tokens/s, days. docs/plan.md states the model."""

from multimodal.count.gpus import GPU, GPUS, find_gpu
from multimodal.count.memory import Memory, Work, rank_memory
from multimodal.count.parts import Flops, outlined, token_flops
from multimodal.count.planning import TrainingPlan, plan
from multimodal.count.speed import Range
from multimodal.count.streams import StreamFacts, count_stream, given_stream

__all__ = [
    "GPU",
    "GPUS",
    "Flops",
    "Memory",
    "Range",
    "StreamFacts",
    "TrainingPlan",
    "Work",
    "count_stream",
    "find_gpu",
    "given_stream",
    "outlined",
    "plan",
    "rank_memory",
    "token_flops",
]
