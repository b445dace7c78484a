"""What a training run will need, before it is started: memory by part, tokens/s, days. docs/plan.md states the model."""

from multimodal.plan.gpus import GPU, GPUS, find_gpu
from multimodal.plan.memory import Memory, Work, rank_memory
from multimodal.plan.parts import Flops, outlined, token_flops
from multimodal.plan.planning import TrainingPlan, plan
from multimodal.plan.speed import Range
from multimodal.plan.streams import StreamFacts, count_stream, given_stream

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
