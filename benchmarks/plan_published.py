"""Training runs that others have published, with their sources: what benchmarks/plan.py compares the plan with."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import multimodal as mm
from multimodal.count import StreamFacts, Work, find_gpu, given_stream, outlined, rank_memory, token_flops
from multimodal.count.speed import step_time, utilisation
from multimodal.tokenizer import Tokenizer

HOURS = 3600.0
TPU_V4 = 275e12  # bfloat16 FLOP/s of a chip: Jouppi et al. 2023, table 4


@dataclass(frozen=True)
class Row:
    """One figure: published, and planned from the best case to the worst (one number twice where nothing is assumed)."""

    what: str
    published: float
    planned: tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Published:
    """A run: its model in our blocks (a plain MLP of 4 D is a gated one of 8/3 D), GPUs, and what was reported.

    hours: GPU-hours for `tokens`; speed: tokens/s of each GPU; mfu: with speed, of `peak` FLOP/s; gib: memory of each GPU;
    flops: of the whole training.
    """

    name: str
    source: str
    verified: bool
    billions: float
    core: mm.Core
    vocab: int
    length: int
    gpu: str = "a100-80"
    gpus: int = 8
    step_tokens: float = 4e6  # of all GPUs together
    micro_tokens: float | None = None  # of each GPU; None: those of a step at once
    tokens: float = 0.0
    hours: float | None = None
    speed: float | None = None
    mfu: float | None = None
    peak: float = 0.0
    gib: float | None = None
    flops: float | None = None
    checkpointing: bool = True

    def model(self, ids: Callable[[int], Tokenizer]) -> mm.Model:
        with outlined():
            return mm.Model({"id": ids(self.vocab)}, self.core, [mm.Task("-> id", mm.NextToken())])

    def rows(self, model: mm.Model) -> list[Row]:
        facts = given_stream(model, self.length)
        flops = token_flops(model, facts)
        found = []
        if self.flops is not None:
            found.append(Row("training FLOPs", self.flops, (flops.training * self.tokens,) * 2))
        if self.mfu is not None and self.speed is not None:
            mine = 100 * self.speed * flops.training / self.peak
            found.append(Row("MFU %, from the published tokens/s and our FLOPs", self.mfu, (mine, mine)))
        elif self.hours is not None or self.speed is not None:
            best, worst = self.planned_speed(model, facts)
            if self.hours is not None:
                real = self.tokens / self.hours / HOURS
                found.append(Row(f"tokens/s a GPU ({self.hours:,.0f} GPU-hours)", real, (best, worst)))
            if self.speed is not None:
                found.append(Row("tokens/s a GPU", self.speed, (best, worst)))
        if self.gib is not None:
            sizes = [
                rank_memory(model, facts, replace(self.work(), checkpointing=again)).total / 2**30
                for again in (True, False)
            ]
            found.append(Row("GiB a GPU, checkpointing of all blocks to none", self.gib, (sizes[0], sizes[1])))
        return found

    def work(self) -> Work:
        mine = self.step_tokens / self.gpus
        micro = self.micro_tokens or mine
        return Work(
            tokens=micro,
            micro_batches=round(mine / micro),
            processes=self.gpus,
            parallel="fsdp" if self.billions > 1 else "ddp",
            half=True,
            cuda=True,
            checkpointing=self.checkpointing,
            cast_by_fsdp=self.billions > 1,
        )

    def planned_speed(self, model: mm.Model, facts: StreamFacts) -> tuple[float, float]:
        """Tokens/s of each GPU."""
        work, flops, gpu = self.work(), token_flops(model, facts), find_gpu(self.gpu)
        total = sum(p.numel() for p in model.parameters())
        outside = total - sum(p.numel() for p in model.core.blocks.parameters())  # type: ignore[union-attr]
        each = flops.training + (flops.again if work.checkpointing else 0)
        seconds = step_time(gpu, work, total, outside, self.core.depth, each).total
        tokens = work.tokens * work.micro_batches
        return tokens / seconds.best, tokens / seconds.worst


def _llama(width: int, depth: int, heads: int, hidden: int, kv_heads: int | None = None) -> mm.Core:
    return mm.Core(width=width, depth=depth, heads=heads, kv_heads=kv_heads, mlp_width=hidden, qk_norm=False)


LLAMA_7B = _llama(4096, 32, 32, 11008)
LLAMA_13B = _llama(5120, 40, 40, 13824)
LLAMA_33B = _llama(6656, 60, 52, 17920)
LLAMA_65B = _llama(8192, 80, 64, 22016)
LLAMA2_70B = _llama(8192, 80, 64, 28672, 8)
LLAMA3_8B = _llama(4096, 32, 32, 14336, 8)
LLAMA3_405B = _llama(16384, 126, 128, 53248, 8)
_LLAMA1 = "Touvron et al. 2023, arXiv 2302.13971, table 15 and section 2.4"
_LLAMA2 = "Llama 2 model card, July 2023"
_TITAN = "torchtitan, benchmarks/llama3_h100_202412_torchtitan.md, December 2024, tables 1 and 3"
_PALM = mm.Core(
    width=18432,
    depth=118,
    heads=48,
    kv_heads=1,
    mlp_width=73728,
    block=(mm.layers.SelfAttention(key_width=256, value_width=256), mm.layers.MLP()),
)


def _llama1(
    name: str, billions: float, core: mm.Core, tokens: float, hours: float, speed: float | None = None
) -> Published:
    return Published(
        name=name,
        source=_LLAMA1,
        verified=True,
        billions=billions,
        core=core,
        vocab=32000,
        length=2048,
        gpus=2048,
        tokens=tokens,
        hours=hours,
        speed=speed,
    )


def _llama2(name: str, billions: float, core: mm.Core, hours: float) -> Published:
    return Published(
        name=name,
        source=_LLAMA2,
        verified=True,
        billions=billions,
        core=core,
        vocab=32000,
        length=4096,
        gpus=1024,
        tokens=2e12,
        hours=hours,
    )


def _titan(name: str, gpus: int, speed: float, gib: float) -> Published:
    return Published(
        name=name,
        source=_TITAN,
        verified=True,
        billions=8.03,
        core=LLAMA3_8B,
        vocab=128256,
        length=8192,
        gpu="h100",
        gpus=gpus,
        step_tokens=gpus * 16384.0,
        speed=speed,
        gib=gib,
        checkpointing=False,
    )


RUNS = (
    Published(
        name="GPT-3 175B",
        source="Brown et al. 2020, arXiv 2005.14165, table D.1",
        verified=False,
        billions=174.6,
        core=mm.Core(width=12288, depth=96, heads=96, mlp_width=32768),
        vocab=50257,
        length=2048,
        tokens=300e9,
        flops=3.14e23,
    ),
    Published(
        name="PaLM 540B, 6144 TPU v4",
        source="Chowdhery et al. 2022, arXiv 2204.02311, section 4.1",
        verified=False,
        billions=540.35,
        core=_PALM,
        vocab=256000,
        length=2048,
        speed=238.3e3 / 6144,
        mfu=46.2,
        peak=TPU_V4,
    ),
    Published(
        name="nanoGPT, GPT-2 124M, 8 A100",
        source="nanoGPT README and config/train_gpt2.py, 2022: about 4 days for 600,000 steps of 491,520 tokens",
        verified=True,
        billions=0.124,
        core=mm.Core(width=768, depth=12, heads=12, mlp_width=2048, qk_norm=False),
        vocab=50304,
        length=1024,
        gpu="a100-40",
        step_tokens=491520,
        micro_tokens=12288,
        tokens=600_000 * 491_520.0,
        hours=8 * 4 * 24.0,
        checkpointing=False,
    ),
    _llama1("LLaMA 7B", 6.7, LLAMA_7B, 1.0e12, 82_432),
    _llama1("LLaMA 13B", 13.0, LLAMA_13B, 1.0e12, 135_168),
    _llama1("LLaMA 33B", 32.5, LLAMA_33B, 1.4e12, 530_432),
    _llama1("LLaMA 65B, 2048 A100", 65.2, LLAMA_65B, 1.4e12, 1_022_362, 380),
    _llama2("Llama 2 7B", 6.74, LLAMA_7B, 184_320),
    _llama2("Llama 2 13B", 13.0, LLAMA_13B, 368_640),
    _llama2("Llama 2 70B", 69.0, LLAMA2_70B, 1_720_320),
    Published(
        name="Llama 3.1 8B",
        source="Llama 3.1 model card, July 2024: 1.46 M H100 hours, over 15 T tokens",
        verified=True,
        billions=8.03,
        core=LLAMA3_8B,
        vocab=128256,
        length=8192,
        gpu="h100",
        gpus=1024,
        tokens=15e12,
        hours=1.46e6,
    ),
    Published(
        name="Llama 3.1 405B, 16384 H100",
        source="Grattafiori et al. 2024, arXiv 2407.21783, section 3.3: MFU 38 to 43 %; 30.84 M hours: model card",
        verified=False,
        billions=405.9,
        core=LLAMA3_405B,
        vocab=128256,
        length=8192,
        gpu="h100",
        gpus=16384,
        step_tokens=16e6,
        tokens=15.6e12,
        hours=30.84e6,
    ),
    _titan("torchtitan, Llama 3.1 8B, 8 H100, eager", 8, 5762, 82.4),
    _titan("torchtitan, Llama 3.1 8B, 8 H100, compiled", 8, 6667, 77.0),
    _titan("torchtitan, Llama 3.1 8B, 128 H100, eager", 128, 5605, 67.0),
    _titan("torchtitan, Llama 3.1 8B, 128 H100, compiled", 128, 6514, 62.0),
)


@dataclass(frozen=True, kw_only=True)
class Towers:
    """A CLIP run: two cores, one over patches of pictures of 224 x 224 and one over 77 words, and pictures a second of all GPUs."""

    name: str
    patch: int
    picture: mm.Core
    words: mm.Core
    gpus: int
    speed: float
    checkpointing: bool = False
    source: str = "open_clip's trained_models_info.csv (Cherti et al. 2022, arXiv 2212.07143, appendix), JUWELS Booster, A100 40 GB"

    def row(self) -> Row:
        tokens = (224 // self.patch) ** 2 + 1
        forward = self.picture.flops(tokens, tokens) + self.words.flops(77, 39)
        forward += 2.0 * tokens * 3 * self.patch**2 * self.picture.width
        parameters = self.picture.parameters + self.words.parameters
        gpu = find_gpu("a100-40")
        used = utilisation(gpu, parameters, True)
        second = gpu.peak(True) / (forward * (4 if self.checkpointing else 3))
        return Row("pictures/s a GPU", self.speed / self.gpus, (second * used.best, second * used.worst))


def _vit(width: int, depth: int, heads: int) -> mm.Core:
    return mm.Core(width=width, depth=depth, heads=heads, mlp_width=-(-8 * width // 3), qk_norm=False)


CLIPS = (
    Towers(name="CLIP ViT-B/32", patch=32, picture=_vit(768, 12, 12), words=_vit(512, 12, 8), gpus=128, speed=52724.0),
    Towers(name="CLIP ViT-B/16", patch=16, picture=_vit(768, 12, 12), words=_vit(512, 12, 8), gpus=176, speed=54580.6),
    Towers(
        name="CLIP ViT-L/14",
        patch=14,
        picture=_vit(1024, 24, 16),
        words=_vit(768, 12, 12),
        gpus=768,
        speed=60327.9,
        checkpointing=True,
    ),
)
