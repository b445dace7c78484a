"""What a training run needs, before it is started: parameters, FLOPs, and memory by part. docs/plan.md states the model."""

from multimodal.count.flops import Flops, token_flops
from multimodal.count.memory import MemoryUse, Work, rank_memory
from multimodal.count.planning import GPU, GPUS, TrainingPlan, find_gpu, plan
from multimodal.count.streams import StreamStats, count_stream, stream_of_length

__all__ = [
    "GPU",
    "GPUS",
    "Flops",
    "MemoryUse",
    "StreamStats",
    "TrainingPlan",
    "Work",
    "count_stream",
    "find_gpu",
    "plan",
    "rank_memory",
    "stream_of_length",
    "token_flops",
]
