"""Smaller models beside their originals: bytes, speed and accuracy on pictures, speech and text; one layer beside torchao's.

    MULTIMODAL_WEIGHTS=FOLDER uv run benchmarks/smaller.py --folder RUNS --write        about 6 CPU-minutes on one thread
    uv run benchmarks/smaller.py --quick                                                does it run?

It trains a classifier of digits and a small CTC model on spoken digits, once: their runs are in --folder, and so are the tables of
parts that are done (--part does one). SmolLM2-135M is that of MULTIMODAL_WEIGHTS, which was made of 4-bit weights; without it the
same shape has fresh weights, and no perplexity is given. Speeds are CPU time on one thread, the best of several rounds in which all
forms take turns. `pip install torchao` adds its layers.
"""

import math
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks import report, script
from benchmarks.data import digits_8x8, spoken, text_of
from benchmarks.fetched_weights import NotFetched, ready
from benchmarks.speech import greedy, heard
from multimodal import CTC, Core, Model, NextToken, Recipe, Task, Tokens, evaluate, fit, layers, override, quantize
from multimodal.norm import Norm
from multimodal.quantization import FORMS
from multimodal_tokenizers import AudioFrames, Ids, ImagePatches, Labels, TextBytes

LABEL, HEAR, WRITE = "image -> label", "audio -> text", "text -> text"
ORIGINAL = "float32"
LAYER = (576, 3072)  # inputs and outputs of the layer that torchao's are compared on: SmolLM2's gate and up


def best(work: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """By name, the least CPU seconds of a round; all take turns, after one round that does not count."""
    found = dict.fromkeys(work, math.inf)
    for i in range(rounds + 1):
        for name, run in work.items():
            start = time.process_time()
            run()
            found[name] = min(found[name], time.process_time() - start) if i else math.inf
    return found


def forms(model: Model) -> dict[str, Model]:
    return {ORIGINAL: model, **{to: quantize(model, to) for to in FORMS}}


def size(model: Model) -> str:
    return f"{sum(t.numel() * t.element_size() for t in model.state_dict().values()) / 1e6:,.2f} MB"


def forward(model: Model, stream: Any) -> Callable[[], Any]:
    def run() -> Any:
        with model.inference_mode():
            return model.logits(stream)

    return run


def rated(count: float, seconds: dict[str, float]) -> dict[str, str]:
    """Per second, and beside the original."""
    return {name: f"{count / s:,.0f} ({seconds[ORIGINAL] / s:.2f}x)" for name, s in seconds.items()}


def pictures(args: Namespace) -> str:
    """The classifier of handwritten digits; a stratified fifth is held out."""
    train, test = digits_8x8(args.seed)
    test = test[:40] if args.quick else test
    kinds = {
        "image": ImagePatches(patch=2, channels=1, mean=0.3, std=0.37),
        "label": Labels([str(n) for n in range(10)]),
    }
    model = Model(kinds, Core.tiny(), [LABEL], seed=args.seed)
    recipe = Recipe(steps=2 if args.quick else 600, batch=64, lr=2e-3, ema=0.98, weight_decay=0.1)
    trained(model, {LABEL: train}, recipe, args, "digits")
    made, stream = forms(model), model.pack(LABEL, test)
    seconds = best({name: forward(m, stream) for name, m in made.items()}, args.rounds)
    rates = rated(len(test), seconds)
    head = ["digits", "weights", "pictures/s", "right", "loss"]
    rows = []
    for name, m in made.items():
        found = evaluate(m, LABEL, test)
        rows.append([name, size(m), rates[name], f"{found['exact']:.2%}", f"{found['loss']:.4f}"])
    return script.table(head, rows)


def speech(args: Namespace) -> str:
    """Spoken digits, read by CTC; takes 0 to 4 of each speaker are held out."""
    import jiwer

    train, test = ([{**row, "text": row["label"]} for row in part] for part in spoken(args.quick))
    model = Model(
        {"audio": AudioFrames(rate_hz=8000, mels=40), "text": TextBytes()},
        Core(width=128, depth=4, heads=4),
        [Task(HEAR, CTC())],
        seed=args.seed,
    )
    recipe = Recipe(steps=2 if args.quick else 350, batch=16, optimizer="muon", lr=3e-3, ema=0.97, warmup=0.1)
    trained(model, {HEAR: train}, recipe, args, "speech")
    made, stream = forms(model), model.pack(HEAR, test[:20], answers=False)
    length_s = sum(len(sample["audio"][0]) / sample["audio"][1] for sample in test[:20])
    rates = rated(length_s, best({name: forward(m, stream) for name, m in made.items()}, args.rounds))
    wanted, rows = [sample["text"] for sample in test], []
    for name, m in made.items():
        rate = jiwer.cer(wanted, heard(m, test, greedy))
        rows.append([name, size(m), rates[name], f"{rate:.2%}", f"{evaluate(m, HEAR, test)['loss']:.4f}"])
    return script.table(["spoken digits, CTC", "weights", "seconds of sound/s", "wrong characters", "loss"], rows)


def text(args: Namespace) -> str:
    """SmolLM2-135M: perplexity on the beginning of tiny Shakespeare, a prompt of 256 tokens, and 16 tokens of one answer."""
    model, real = language_model(args.quick)
    kind = model.packer.tokenizers["text"]
    if real:
        tokens = kind(text_of("tinyshakespeare.txt.gz")[:4000])
    else:
        tokens = Tokens(torch.randint(1000, (1000,), generator=torch.Generator().manual_seed(0)), kind.places(1000))

    def part(start: int, end: int) -> Tokens:
        return Tokens(tokens.content[start:end], kind.places(end - start))

    count = 64 if args.quick else 512
    sample, prompt = {"text": part(0, 1), "answer": part(1, count)}, {"text": part(0, 16 if args.quick else 256)}
    first = {"text": part(0, 8)}
    made = forms(model)
    stream = model.pack(WRITE, [prompt], answers=False)
    rounds = max(1, args.rounds // 2)
    reads = rated(len(stream), best({name: forward(m, stream) for name, m in made.items()}, rounds))

    def write(m: Model) -> Callable[[], Any]:
        return lambda: m.generate(WRITE, [first], max_tokens=16)

    writes = rated(16, best({name: write(m) for name, m in made.items()}, rounds))
    held, rows = model.pack(WRITE, [sample]), []
    for name, m in made.items():
        with m.inference_mode():
            loss = float(m.loss(held))
        rows.append([name, size(m), reads[name], writes[name], f"{math.exp(loss):.3f}" if real else "-"])
    title = "SmolLM2-135M" if real else "shape of SmolLM2-135M"
    return script.table(
        [title, "weights", "read tokens/s", "written tokens/s", f"perplexity of {count - 1} tokens"], rows
    )


def language_model(quick: bool) -> tuple[Model, bool]:
    """(the model, whether its weights are real)."""
    from multimodal import pretrained

    try:
        if not quick:
            return pretrained(ready("smollm2")).model(), True
    except (NotFetched, OSError):
        pass
    core = Core(
        width=576,
        depth=2 if quick else 30,
        heads=9,
        kv_heads=3,
        mlp_width=1536,
        norm=Norm(eps=1e-5),
        qk_norm=False,
        rotary_split=(1, 0, 0),
        block=(layers.SelfAttention(), layers.MLP()),
    )
    head = NextToken(tied=True, start_ids=(), stop_id=2, bias=False)
    return Model({"text": Ids(1000 if quick else 49152)}, core, [Task(WRITE, head)]).eval(), False


def one_layer(args: Namespace) -> str:
    """One layer, at one row (writing) and at 64 (reading), beside torchao's, where it is installed."""
    from multimodal.quantization import QuantizedLinear

    inputs, outputs = (64, 128) if args.quick else LAYER
    plain = torch.nn.Linear(inputs, outputs, bias=False).requires_grad_(False)
    made: dict[str, Any] = {ORIGINAL: plain}
    for to in FORMS:
        made[to] = QuantizedLinear(plain, to)
        made[to].fill(plain.weight)
    made |= torchao_layers(plain)
    wanted = plain(x := torch.randn(64, inputs, generator=torch.Generator().manual_seed(0)))
    seconds = {}
    for rows in (1, 64):
        some = x[:rows]
        with torch.inference_mode():
            seconds[rows] = best({name: lambda m=m, some=some: m(some) for name, m in made.items()}, 4 * args.rounds)
    lines = []
    for name, module in made.items():
        error = float((module(x) - wanted).norm() / wanted.norm())
        lines.append([name, *(f"{1e3 * seconds[rows][name]:.2f}" for rows in seconds), f"{error:.1e}"])
    return script.table([f"a layer {inputs} -> {outputs}", "ms, 1 row", "ms, 64 rows", "error"], lines)


def torchao_layers(plain: torch.nn.Linear) -> dict[str, torch.nn.Module]:
    try:
        import torchao.quantization as ao  # pyright: ignore[reportMissingImports]  pip install torchao
    except ImportError:
        return {}
    found = {}
    configs = {
        "torchao int8, weights": ao.Int8WeightOnlyConfig(),
        "torchao int8, dynamic inputs": ao.Int8DynamicActivationInt8WeightConfig(),
    }
    for name, config in configs.items():
        module = torch.nn.Sequential(torch.nn.Linear(*plain.weight.T.shape, bias=False)).requires_grad_(False)
        module[0].weight.copy_(plain.weight)
        ao.quantize_(module, config)
        found[name] = module
    return found


def trained(model: Model, data: dict[str, Any], recipe: Recipe, args: Namespace, name: str) -> None:
    folder = None if args.folder is None else args.folder / name
    with script.cpu_time(f"  {name} trained in"):
        fit(
            model,
            data,
            override(recipe, device="cpu"),
            folder=folder,
            resume=folder is not None,
            seed=args.seed,
            quiet=True,
        )
    model.eval()


PARTS: Sequence[Callable[[Namespace], str]] = (pictures, speech, text, one_layer)


def main() -> None:
    options = script.parser(__doc__, "folder", "seed", "write")
    options.add_argument("--quick", action="store_true")
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--part", choices=[part.__name__ for part in PARTS])
    args = script.parsed(options)
    args.rounds = 1 if args.quick else args.rounds
    tables = []
    for part in PARTS:
        if args.part in (None, part.__name__):
            done = args.folder and args.folder / f"{part.__name__}.md"
            if done and done.is_file():
                tables.append(done.read_text(encoding="utf-8"))
            else:
                tables.append(part(args))
                if done:
                    done.write_text(tables[-1], encoding="utf-8")
            print(tables[-1], flush=True)
    if args.write:
        report.keep("smaller", "Smaller models", "uv run benchmarks/smaller.py --write", "\n".join(tables))


if __name__ == "__main__":
    main()
