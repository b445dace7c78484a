"""Digits written from their label, and spoken from text, read by judges that never saw anything written.

    uv run benchmarks/writing.py pictures            about 8 CPU-minutes
    uv run benchmarks/writing.py sounds              about 10 CPU-minutes

pictures: mnist_t10k (8,000 to learn from, 2,000 real ones to compare with); sounds: fsdd.zip; both in the folder MULTIMODAL_DATA.
Leaves pictures, or folders of WAV files, in --folder.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import soundfile
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchaudio.transforms import MelSpectrogram

import multimodal as mm
from benchmarks import script
from benchmarks.data import DATA, example
from multimodal_tokenizers import AudioFrames, Codes, ImagePatches, Labels, TextBytes

DRAW, SAY = "label -> drawing", "text speaker -> sound"
RATE_HZ = 8000
CORE = mm.Core(width=128, depth=4, heads=4, dropout=0.1)
RECIPE = mm.Recipe(steps=1000, batch=64, lr=3e-3, optimizer="muon", ema=0.99, checkpoint_every=200)


def judge(
    pictures: Sequence[Tensor], digits: Sequence[int], disturbed: Callable[[Tensor], Tensor], steps: int, seed: int
) -> nn.Module:
    """A small convolutional network that reads single-channel pictures (Y, X) of one size; plain PyTorch, trained on real ones."""
    torch.manual_seed(seed)
    widths = (1, 24, 48, 96)
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.3), nn.Linear(384, 10))
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    target = torch.tensor(digits)
    for _ in range(steps):
        which = torch.randint(len(pictures), (64,))
        batch = torch.stack([disturbed(pictures[i]) for i in which.tolist()])[:, None]
        optimizer.zero_grad()
        F.cross_entropy(network(batch), target[which], label_smoothing=0.05).backward()
        optimizer.step()
        schedule.step()
    return network.eval()


@torch.no_grad()
def share_read(network: nn.Module, pictures: Sequence[Tensor], digits: Sequence[int]) -> float:
    """The share of pictures that the judge reads as these digits."""
    read = torch.cat([network(torch.stack(list(pictures[i : i + 200]))[:, None]) for i in range(0, len(pictures), 200)])
    return float((read.argmax(-1) == torch.tensor(digits)).float().mean())


def shifted(picture_YX: Tensor) -> Tensor:
    """Moved by up to two pixels."""
    down, right = torch.randint(-2, 3, (2,)).tolist()
    return picture_YX.roll((down, right), (0, 1))


def nearest(pictures: Tensor, known: Tensor, *, same: bool = False) -> float:
    """Median over pictures of the Euclidean distance to the nearest known one."""
    distance = torch.cdist(pictures.flatten(1), known.flatten(1))
    if same:
        distance.fill_diagonal_(float("inf"))
    return float(distance.amin(1).median())


def write_pictures(args: argparse.Namespace) -> None:
    images, digits, test_images, test_digits = example("sets").mnist()

    def new_model() -> mm.Model:
        patches = ImagePatches(patch=4, channels=1, position="rotary", size=(28, 28))
        label = Labels(tuple("0123456789"))
        if args.features:
            task = mm.Task(DRAW, mm.FlowMatching(width=128, depth=2))
            return mm.Model({"label": label, "drawing": patches}, CORE, [task], seed=args.seed)
        codes = Codes.train(patches, list(images), size=512, quiet=True)
        return mm.Model({"label": label, "drawing": codes}, CORE, [DRAW], seed=args.seed)

    rows = [{"label": str(d), "drawing": x} for x, d in zip(images, digits, strict=True)]
    data = {DRAW: mm.Blanked(rows, ("label",))}
    model = script.trained(args, new_model, data, mm.override(RECIPE, steps=args.steps or 1000))

    real, held_out = ([torch.from_numpy(x.copy()).float() / 255 for x in xs] for xs in (images, test_images))
    reader = judge(real, digits.tolist(), shifted, 900, seed=1)
    print(f"the judge reads {share_read(reader, held_out, test_digits.tolist()):.2%} of 2,000 real held-out digits")
    coded = model.packer.tokenizers["drawing"]
    coded_back = [coded.decode(coded(x))[0].clamp(0, 1) for x in test_images[:1000]]
    print(f"and {share_read(reader, coded_back, test_digits[:1000].tolist()):.2%} of 1,000 of them after coding")
    asked = [i % 10 for i in range(args.count)]
    start = time.process_time()
    for guidance, temperature in ((1.0, 1.0), (2.0, 1.0), (2.0, 0.8), (3.0, 1.0)):
        answers = model.generate(
            DRAW,
            [{"label": str(d)} for d in asked],
            temperature=temperature,
            guidance=guidance,
            seed=args.seed,
            batch=256,
        )
        drawn = [a.value[0].clamp(0, 1) for a in answers]
        pile, known, held = torch.stack(drawn), torch.stack(real), torch.stack(held_out[: len(drawn)])
        print(
            f"guidance {guidance}, temperature {temperature}: {share_read(reader, drawn, asked):.2%} of {len(asked)} read as "
            f"asked; nearest training picture {nearest(pile, known):.2f} (real held-out {nearest(held, known):.2f}), "
            f"nearest other drawing {nearest(pile, pile, same=True):.2f} (real {nearest(held, held, same=True):.2f})"
        )
        save_grid(drawn[:100], args.folder / f"digits_guidance_{guidance}_temperature_{temperature}.png")
    print(f"written in {time.process_time() - start:.0f} CPU-s")


def save_grid(pictures: Sequence[Tensor], path: Path) -> None:
    """Ten a row."""
    from torchvision.utils import save_image

    path.parent.mkdir(parents=True, exist_ok=True)
    save_image(torch.stack(list(pictures))[:, None], path, nrow=10)


def heard(wave_S: Tensor) -> Tensor:
    """What the judge of sound sees: log-mel (32, 48) of the sound cut or filled up to 0.77 s, loudness taken off."""
    mel = MelSpectrogram(RATE_HZ, n_fft=256, hop_length=128, n_mels=32)
    wave_S = F.pad(wave_S[:6016], (0, max(0, 6016 - len(wave_S))))
    log = (mel(wave_S) + 1e-4 * wave_S.square().mean().clamp(min=1e-8)).log()
    return (log - log.mean()) / (log.std() + 1e-3)


def moved(picture_YX: Tensor) -> Tensor:
    """A little later, higher, and with bands and times left out."""
    later, higher = int(torch.randint(0, 12, ())), int(torch.randint(-1, 2, ()))
    picture_YX = picture_YX.roll((higher, later), (0, 1)).clone()
    top, left = int(torch.randint(0, 28, ())), int(torch.randint(0, 42, ()))
    picture_YX[top : top + 4] = 0
    picture_YX[:, left : left + 6] = 0
    return picture_YX + 0.2 * torch.randn(())


def write_sounds(args: argparse.Namespace) -> None:
    sound_sets = example("sound_sets")
    sounds = sound_sets.fsdd(DATA / "fsdd.zip", None)
    words = {word: i for i, word in enumerate(sound_sets.DIGITS)}
    speakers = tuple(sorted({clip.speaker for clip in sounds.train}))

    def new_model() -> mm.Model:
        frames = AudioFrames(rate_hz=RATE_HZ, mels=48, hop_ms=16, window_ms=32, stack=1, normalise="fixed")
        tokenizers = {
            "text": TextBytes(),
            "speaker": Labels(speakers),
            "sound": Codes.train(frames, [(clip.wave_S, RATE_HZ) for clip in sounds.train], size=512, quiet=True),
        }
        return mm.Model(tokenizers, CORE, [SAY], seed=args.seed)

    rows = [{"text": c.word, "speaker": c.speaker, "sound": (c.wave_S, RATE_HZ)} for c in sounds.train]
    data = {SAY: mm.Blanked(rows, ("text", "speaker"))}
    model = script.trained(args, new_model, data, mm.override(RECIPE, steps=args.steps or 1500))

    reader = judge([heard(c.wave_S) for c in sounds.train], [words[c.word] for c in sounds.train], moved, 900, seed=1)
    test, right = list(sounds.test), [words[c.word] for c in sounds.test]
    print(
        f"the judge reads {share_read(reader, [heard(c.wave_S) for c in test], right):.2%} of {len(test)} real held-out clips"
    )
    coded = model.packer.tokenizers["sound"]
    back = [coded.decode(coded((c.wave_S, RATE_HZ)))[0] for c in test]
    print(f"and {share_read(reader, [heard(x) for x in back], right):.2%} of them after coding and Griffin-Lim")
    real_s = sum(len(c.wave_S) for c in test) / len(test) / RATE_HZ
    asked = [(word, speakers[i % len(speakers)]) for i in range(args.count // 10) for word in words]
    start = time.process_time()
    for guidance, temperature in ((1.0, 0.7), (1.0, 1.0), (2.0, 0.8), (2.0, 1.0)):
        answers = model.generate(
            SAY,
            [{"text": word, "speaker": speaker} for word, speaker in asked],
            temperature=temperature,
            guidance=guidance,
            max_tokens=120,
            seed=args.seed,
            batch=128,
        )
        waves = [a.value[0] for a in answers]
        length_s = sum(len(x) for x in waves) / len(waves) / RATE_HZ
        share = share_read(reader, [heard(x) for x in waves], [words[word] for word, _ in asked])
        print(
            f"guidance {guidance}, temperature {temperature}: {share:.2%} of {len(asked)} read as asked; "
            f"{length_s:.3f} s long on average (real ones {real_s:.3f}, {length_s / real_s - 1:+.0%})"
        )
        folder = args.folder / f"guidance_{guidance}_temperature_{temperature}"
        folder.mkdir(parents=True, exist_ok=True)
        for i, ((word, speaker), wave_S) in enumerate(list(zip(asked, waves, strict=True))[:40]):
            soundfile.write(folder / f"{word}_{speaker}_{i}.wav", wave_S.numpy(), RATE_HZ)
    print(f"written in {time.process_time() - start:.0f} CPU-s")


def main() -> None:
    options = script.parser(__doc__, "folder", "score", "steps", "seed", folder=Path("writing_run"))
    options.add_argument("what", choices=("pictures", "sounds"))
    options.add_argument(
        "--features", action="store_true", help="write pictures as features (flow matching), not codes"
    )
    options.add_argument("--count", type=int, help="number of pictures or sounds that are written")
    args = script.parsed(options)
    args.count = args.count or (1000 if args.what == "pictures" else 300)
    write_pictures(args) if args.what == "pictures" else write_sounds(args)


if __name__ == "__main__":
    main()
