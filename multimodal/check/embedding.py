"""Checks of the module that `embed` makes: what it reads, where its first weights come from, and where it may run."""

import copy
import unittest
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from multimodal.check.cases import TokenizerCase, close_tokens, perturbed
from multimodal.check.report import Check, ConformanceError, promise, want
from multimodal.check.tokenizers import embedded
from multimodal.composite import Composite
from multimodal.tokenizer import Tokens, describe
from multimodal.tower import Tower

CHECKS: list[Check] = []
PARTS = "the parts of a composite are embedded by modules of their own: check the tokenizers of its parts too"
MOST_FEATURES, MOST_IDS = 64, 4096  # that are tried one by one
SMALLEST, LARGEST = 1e-6, 1e3  # root mean square of embedded rows, between which a core can train


def _kept(case: TokenizerCase) -> bool:
    """Whether each row depends on its own content only, so that any rows may be embedded."""
    return not getattr(case.embed(), "reads_places", False)


@promise(CHECKS, basic=True)
def embed_pure(case: TokenizerCase) -> None:
    """Embedding changes nothing in the content that it is given, and gives the same rows each time."""
    embed, content = case.embed(), case.tokens[0].content
    for module in (embed.train(), embed.eval()):
        given = content.clone()
        with torch.no_grad():
            rows = embedded(case, module, case.tokens[:1], given)
            want(
                torch.equal(given, content), "embed changes its content in place, which others read too; work on a copy"
            )
            again = embedded(case, module, case.tokens[:1], given)
    want(
        torch.equal(rows, again),
        "embed gives other rows the next time, in evaluation mode; it must draw or count nothing there",
    )


@promise(CHECKS)
def embed_reads_all(case: TokenizerCase) -> None:
    """Every feature changed changes a row; every id of the vocabulary has a row of its own."""
    t, embed, content = case.tokenizer, perturbed(case.embed()), case.tokens[0].content
    if isinstance(t, Composite):
        raise unittest.SkipTest(PARTS)
    if isinstance(t, Tower):
        raise unittest.SkipTest("a tower has slots that a value need not fill, and axes that its core need not read")
    with torch.no_grad():
        if t.vocab_size is None:
            rows, size = embedded(case, embed, case.tokens[:1]), content.shape[1]
            for f in range(0, size, -(-size // MOST_FEATURES)):
                other = content.clone()
                other[:, f] += 1
                changed = embedded(case, embed, case.tokens[:1], other)
                want(
                    not torch.equal(rows, changed),
                    f"embed gives the same rows whatever feature {f} of {size} is; use it, or leave it out of the content",
                )
        elif _kept(case):
            ids = torch.arange(0, t.vocab_size, -(-t.vocab_size // MOST_IDS))
            ids = torch.cat([ids, torch.tensor([t.vocab_size - 1])]).unique()
            try:
                rows = embed(ids)
            except (IndexError, RuntimeError) as error:
                raise ConformanceError(
                    f"embed has no row for some of the ids 0..{t.vocab_size - 1}: {error}"
                ) from error
            count = len(rows.unique(dim=0))
            want(count == len(ids), f"embed gives {len(ids)} ids only {count} different rows: ids share a row")


@promise(CHECKS)
def embed_by_seed(case: TokenizerCase) -> None:
    """First weights come from torch's generator: the same seed gives the same, another seed goes on; every module has its own."""

    def made(seed: int) -> tuple[nn.Module, Tensor]:
        torch.manual_seed(seed)
        return case.embed(), torch.rand(1)

    (first, then), (again, _), (_, later) = made(1), made(1), made(2)
    own = {p.data_ptr() for p in first.parameters() if p.numel()}
    shared = [name for name, p in again.named_parameters() if p.data_ptr() in own]
    want(not shared, f"two calls of embed share the weights {', '.join(shared)}: make new ones for every model")
    weights = zip(first.state_dict().items(), again.state_dict().values(), strict=True)
    other = [name for (name, a), b in weights if not torch.equal(a, b)]
    want(
        not other,
        f"the same seed gives other first weights {', '.join(other)}; draw them from torch's global generator",
    )
    want(
        not torch.equal(then, later),
        "embed seeds torch's global generator: every part made after it gets the same numbers",
    )


@promise(CHECKS)
def embed_scale(case: TokenizerCase) -> None:
    """Embedded rows are of a size that a core can train on: neither thousands, as of raw samples or dates, nor almost nothing."""
    with torch.no_grad():
        rows = embedded(case, case.embed(), case.tokens)
    size = float(rows.double().square().mean().sqrt())
    largest = (
        ""
        if case.tokenizer.vocab_size is not None
        else f", of features up to {float(case.tokens[0].content.abs().max()):.3g}"
    )
    want(
        SMALLEST <= size <= LARGEST,
        f"embedded rows are {size:.2g} in size (root mean square){largest}: bring features to about -1..1 in encode",
    )


@promise(CHECKS)
def embed_moves(case: TokenizerCase) -> None:
    """The module that embed makes runs in bfloat16, and on any device: its forward makes no tensors in float32 or on the CPU."""
    if isinstance(case.tokenizer, Composite):
        raise unittest.SkipTest(PARTS)
    content, made = case.tokens[0].content, case.embed().eval()
    full = getattr(made, "full_precision", False)
    half = content if full or not content.is_floating_point() else content.bfloat16()
    with torch.no_grad():
        try:
            rows = embedded(case, copy.deepcopy(made).bfloat16(), case.tokens[:1], half)
        except RuntimeError as error:
            raise ConformanceError(
                f"embed fails in bfloat16: {error}; make its tensors in the type of its weights"
            ) from error
        want(rows.isfinite().all(), "embed gives NaN or infinity in bfloat16")
        if not _kept(case):
            return
        tensors = {name for module in made.modules() for name, x in vars(module).items() if isinstance(x, Tensor)}
        with _Made() as watched:
            made(content)
        if not watched.names | tensors:  # everything is a parameter, a buffer or computed from the content
            return
        try:  # tensors without numbers, which do not mix with those of the CPU, as those of a GPU do not
            made.to("meta")(content.to("meta"))
        except NotImplementedError:  # it asks for a number, as of a size
            return
        except RuntimeError as error:
            want(
                "device" not in str(error),
                f"embed does not follow its weights to another device: {str(error).splitlines()[0]} Give "
                f"{', '.join(sorted(watched.names | tensors))} device=content.device, or register it as a buffer",
            )


class _Made(TorchFunctionMode):
    """The names of functions that are asked for a tensor without a device."""

    MAKE = (
        torch.arange,
        torch.zeros,
        torch.ones,
        torch.full,
        torch.empty,
        torch.eye,
        torch.linspace,
        torch.rand,
        torch.randn,
    )

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (*self.MAKE, torch.tensor) and (kwargs or {}).get("device") is None:
            self.names.add(f"torch.{func.__name__}")
        return func(*args, **(kwargs or {}))


@promise(CHECKS)
def embed_causal(case: TokenizerCase) -> None:
    """Where the kind is causal, the rows of the first tokens of a value do not depend on its later ones."""
    if not case.tokenizer.causal or _kept(case):
        return
    embed = case.embed().eval()
    for value, tokens in zip(case.values, case.tokens, strict=True):
        if (half := len(tokens) // 2) == 0:
            continue
        x, vocab = tokens.content.clone(), case.tokenizer.vocab_size
        x[half:] = (x[half:] + 1) % vocab if vocab is not None else x[half:] * 0.5 + 0.25
        with torch.no_grad():
            rows, others = embedded(case, embed, [tokens]), embedded(case, embed, [Tokens(x, tokens.position_NA)])
        same = close_tokens(*(Tokens(r[:half], tokens.position_NA[:half]) for r in (rows, others)))
        want(
            same,
            f"causal=True, but the embedded first {half} tokens of {describe(value)} change with later ones: pad a convolution in "
            "front, or take causal=True off",
        )
