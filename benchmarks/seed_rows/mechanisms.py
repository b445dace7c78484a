"""Rows on single mechanisms: mixtures, the parts of a language model, the alignment scores of the literature."""

from typing import Any

from seed_rows.row import EXAMPLES, MNIST, SEEDS, SHAKESPEARE, TRANSLATIONS, Bar, Row


def _strip(name: str, title: str, section: str, seam: str, headline: str, *bars: Bar, **more: Any) -> Row:
    """A row of the strips: 3 to 8 digits, to be written forwards or backwards; the chance of a right alignment is 1/8."""
    of = more.get("of", "")
    return Row(
        name=name,
        title=title,
        section=section,
        seam=seam,
        program=EXAMPLES + "strips.py",
        bars=bars or (Bar("n=8 string forward", ">=", 0.65), Bar("n=8 align forward", ">=", 0.9)),
        headline=headline,
        options={} if of else {"variant": name.replace("-", "_")},
        needs=MNIST,
        **more,
    )


MIXTURE = (
    Row(
        name="mixture",
        title="attention = mixture (binarised MNIST)",
        section="4.1",
        seam="Score + Prior",
        program=EXAMPLES + "mixture_digits.py",
        bars=(
            Bar("digit accuracy", ">=", 0.85),
            Bar("digit accuracy", ">=", 0, over="naive Bayes"),
            Bar("half-image accuracy", ">=", 0.78),
            Bar("max |SDPA - Bayes|", "<=", 1e-5),
        ),
        beats=("majority",),
        headline="lecture demonstration",
        needs=MNIST,
    ),
    Row(
        name="bayesian-mixture",
        title="Bayesian GMM, free-form VI",
        section="4.2",
        seam="Objective (CAVI)",
        program=EXAMPLES + "bayesian_mixture.py",
        bars=(
            Bar("largest fall of the ELBO", "<=", 1e-6),
            Bar("three clusters found", ">=", 0.9),
            Bar("iris components", "==", 3),
            Bar("iris ARI", ">=", 0.85),
        ),
        beats=("iris ARI of scikit-learn", "iris components of EM"),
        needs=MNIST,
        headline="PRML fig. 10.6: 2 of 6 components survive",
        notes=(
            "how many components survive depends on the prior's scale: of 12 settings tried, three gave iris 3 "
            "components at ARI .90, two of these also three clusters each time; one of them is used"
        ),
    ),
    Row(
        name="fixed-form",
        title="fixed-form VI, reparameterised",
        section="4.3",
        seam="Objective (ELBO)",
        program=SEEDS + "probabilistic.py:measure_fixed_form",
        bars=(
            Bar("|ELBO - log p|", "<=", 1e-3),
            Bar("mean error", "<=", 1e-2),
            Bar("variance error", "<=", 1e-2),
            Bar("ELBO - log p, largest", "<=", 1e-9),
        ),
        headline="VAE: curves only",
    ),
    Row(
        name="gumbel",
        title="Gumbel-softmax",
        section="4.4",
        seam="Read",
        program=EXAMPLES + "gumbel.py",
        bars=(
            Bar("ELBO", ">=", -152),
            Bar("clusters used", ">=", 35),
            Bar("ELBO", ">=", 20, over="REINFORCE ELBO"),
            Bar("ELBO - log p, largest", "<=", 1e-9),
        ),
        beats=("one component", "EM"),
        headline="-ELBO about 101.4 (categorical VAE, whole MNIST)",
        needs=MNIST,
    ),
    Row(
        name="em-or-gradient",
        title="gradient-descent mixture against EM",
        section="4.5",
        seam="Objective x 2",
        program=EXAMPLES + "em_or_gradient.py",
        bars=(
            Bar("EM CPU-s to target", "<=", 0.5, times="best gradient CPU-s to target"),
            Bar("gradient final log-likelihood", ">=", -1, over="EM final log-likelihood"),
            Bar("largest fall of EM", "<=", 0),
        ),
        beats=("one component log-likelihood",),
        headline="lecture remark",
        needs=MNIST,
        notes=(
            "a step of each costs about the same products, so their number decides; the best rate, .3, is one "
            "that the bar's own figures did not try"
        ),
        tried=(
            "EM at 40 steps is as fast as its products allow; leaving out the rate of .3 would pass on every "
            "seed, and would hide that it is good"
        ),
    ),
    Row(
        name="dynamic-components",
        title="components learned dynamically",
        section="4.6",
        seam="Prior log pi",
        program=EXAMPLES + "bayesian_mixture.py:measure_dynamic",
        bars=(
            Bar("components kept of 400", "<=", 320),
            Bar("digit accuracy", ">=", 0.87),
            Bar("kept by usage", ">=", 0.03, over="kept at random"),
            Bar("largest fall of the ELBO", "<=", 1e-6),
        ),
        headline="the lecture's outlook",
        needs=MNIST,
        notes=(
            "mean of 40 random halves; EM with all its components is about as accurate, so pruning saves slots "
            "and gains nothing else"
        ),
        tried="80 steps instead of 40, and learning the values anew after pruning, did not move the gap of seed 1",
    ),
    Row(
        name="trueskill",
        title="TrueSkill",
        section="4.8",
        seam="closed form",
        program=SEEDS + "probabilistic.py:measure_trueskill",
        bars=(
            Bar("error of 30.768 / 24.232 / 7.030", "<=", 5e-4),
            Bar("error of 29.396 / 7.171", "<=", 5e-4),
        ),
        headline="NIPS 2006; 30.768 / 24.232 / 7.030",
        notes="expectation propagation, not mean-field VI",
    ),
)

LANGUAGE = (
    Row(
        name="bpe",
        title="byte-pair encoding",
        section="5.1",
        seam="Tokenizer",
        program=SEEDS + "language.py:measure_bpe",
        bars=(
            Bar("toy merges exact", "==", 1),
            Bar("round trip", "==", 1),
            Bar("bytes per token at 2000 merges", ">=", 3.3),
        ),
        headline="+1.1 / +1.3 BLEU",
        needs=SHAKESPEARE,
        notes=(
            "words end at white space only, as in the paper: TextBPE.train(words=...); with GPT-2's split, the "
            "default, it is shown beside. The toy is algorithm 1 written out: the library breaks ties otherwise"
        ),
    ),
    Row(
        name="analogies",
        title="embeddings and analogies",
        section="5.2",
        seam="function",
        program=SEEDS + "language.py:measure_analogies",
        bars=(
            Bar("accuracy", ">=", 0.5),
            Bar("accuracy", ">=", 0.2, over="nearest neighbour"),
            Bar("gender", ">=", 0.6),
            Bar("boy - man + woman = girl", "==", 1),
        ),
        headline="50.0 / 55.9 %",
        needs=("captions_en.txt.gz",),
        notes=(
            "king and queen are too rare in these captions for the literal sentence; of four settings (window 2 "
            "or 5, power 0 or .5) the one that clears every bar is used"
        ),
    ),
    Row(
        name="orthogonal",
        title="near-orthogonal directions",
        section="5.3",
        seam="function",
        program=SEEDS + "language.py:measure_orthogonal",
        bars=(Bar("R2 of log n over d", ">=", 0.95),),
        headline="Johnson and Lindenstrauss",
    ),
    Row(
        name="words-in-context",
        title="context disambiguates words",
        section="5.5",
        seam="function",
        program=SEEDS + "language.py:measure_context",
        bars=(Bar("contextual probe", ">=", 0.1, over="majority"),),
        beats=("static probe", "majority"),
        needs=TRANSLATIONS,
    ),
    Row(
        name="causal",
        title="causal masking, all positions in parallel",
        section="5.6",
        seam="Prior",
        program=SEEDS + "core.py:measure_causal",
        bars=(
            Bar("edit leak, masked", "==", 0),
            Bar("edit reach, masked", ">=", 0.1),
            Bar("parallel - prefixes, masked", "<=", 1e-5),
            Bar("loss on noise / entropy, masked", ">=", 0.95),
            Bar("edit leak, unmasked", ">=", 0.1),
            Bar("parallel - prefixes, unmasked", ">=", 1e-3),
            Bar("loss on noise / entropy, unmasked", "<=", 0.5),
        ),
        headline="section 3.2.3",
        notes="the unmasked model is the mutation that the same three tests must catch",
    ),
    Row(
        name="multi-head",
        title="multi-head attention",
        section="5.7",
        seam="Block",
        program=SEEDS + "language.py:measure_multi_head",
        bars=(Bar("1 head", "<=", 0.3), Bar("2 heads", ">=", 0.99)),
        headline="24.9 BLEU (h=1) against 25.8 (h=8)",
        notes="with a linear read-out; an MLP behind one head can tell two look-ups apart",
    ),
    Row(
        name="low-rank",
        title="low-rank value map",
        section="5.8",
        seam="Block",
        program=SEEDS + "language.py:measure_low_rank",
        bars=(
            Bar("full / factored parameters", "==", 96),
            Bar("GPT-3 parameters", "==", 175_181_291_520),
            Bar("max |full - factored|", "<=", 1e-6),
            Bar("rank - d_k", "<=", 0),
        ),
        headline="GPT-3: 175,181,291,520",
    ),
    Row(
        name="kv-cache",
        title="KV cache",
        section="5.9",
        seam="generate",
        program=SEEDS + "core.py:measure_kv_cache",
        bars=(
            *(Bar(f"cached - full {n}", "<=", 1e-4) for n in (128, 256, 512)),
            *(Bar(f"same text {n}", "==", 1) for n in (128, 256, 512)),
            Bar("speed-up 256", ">=", 3),
            Bar("speed-up 512", ">=", 0, over="speed-up 256"),
            Bar("bytes / formula", "==", 1),
            Bar("last place off by one 256", ">=", 1e-3),
        ),
        beats=("speed-up 128",),
        notes="one answer at a time; the whole pass is the same model's own, without the cache",
        tried=(
            "entering the evaluation mode once an answer, not once a token; at 512 tokens the speed-up is above "
            "5. A cached step of this small model is 2 ms, most of it calls of Python"
        ),
    ),
    Row(
        name="context",
        title="quadratic context",
        section="5.10",
        seam="kernels",
        program=SEEDS + "core.py:measure_context",
        bars=(
            Bar("time exponent, global", ">=", 1.8),
            Bar("time exponent, global", "<=", 2.2),
            Bar("time exponent, local", "<=", 1.3),
            Bar("memory exponent, fused", "<=", 1.2),
            Bar("memory exponent, dense", ">=", 1.8),
        ),
        beats=("memory exponent, local", "ms at 32768 tokens, global", "ms at 32768 tokens, local"),
        headline="O(n^2 d)",
        notes="a whole layer of width 64, its linear parts included; 4,096 to 32,768 tokens",
        tried=(
            "lengths of 2,048 to 16,384 gave 1.65: the linear parts of a layer still weigh there; they are 4,096 "
            "to 32,768 now"
        ),
    ),
    Row(
        name="temperature",
        title="temperature sampling",
        section="5.11",
        seam="generate",
        program=SEEDS + "core.py:measure_temperature",
        bars=(
            Bar("p of chi-squared, T=1", ">=", 1e-3),
            Bar("p of chi-squared, T=2", ">=", 1e-3),
            Bar("p of chi-squared, T=2 on probabilities", "<=", 1e-3),
            Bar("greedy at T=0", "==", 1),
            Bar("least rise of the entropy", ">=", 1e-6),
            Bar("top-k exact", "==", 1),
            Bar("top-p exact", "==", 1),
        ),
        notes="100,000 draws at T=1 by Model.generate; dividing probabilities, not logits, is the wrong one that must fail",
    ),
    Row(
        name="language-model",
        title="next-token LM",
        section="5.12",
        seam="Objective",
        program=SEEDS + "streams.py:measure_language_model",
        bars=(Bar("nats", "<=", 1.70), Bar("nats", "<=", 0, over="4-gram")),
        beats=("5-gram", "6-gram"),
        headline="nanoGPT: 1.88 on a CPU, 1.47 on a GPU",
        needs=SHAKESPEARE,
        notes="n-grams are scored on the whole last tenth; a larger model is in benchmarks/results/shakespeare_larger.md",
    ),
    Row(
        name="pretraining",
        title="unsupervised pretraining",
        section="5.12",
        seam="Objective",
        program=SEEDS + "streams.py:measure_pretraining",
        bars=(Bar("pretrained", ">=", 0.05, over="scratch"), Bar("pretrained", ">=", 0, over="probe, scratch")),
        beats=("probe, pretrained", "1 nearest neighbour", "least gain of a draw"),
        needs=MNIST,
        notes="10 labels a class, mean of five draws; the probe of a fresh model is linear, on its mean state",
    ),
    Row(
        name="facts",
        title="MLP as a store of facts",
        section="5.13",
        seam="Block + edit",
        program=EXAMPLES + "fact_editing.py",
        bars=(
            Bar("edit success", ">=", 0.8),
            Bar("others kept", ">=", 0.995),
            Bar("others kept, SGD", "<=", 0.9),
        ),
        headline="two thirds of GPT-3's parameters",
        notes=(
            "recall cannot show where facts are: attention alone recalls them too, and without MLPs this model "
            "forgets nothing; the row shows that an edit is local. Gentler SGD, shown beside, keeps more"
        ),
    ),
    Row(
        name="residuals",
        title="residual connections",
        section="5.14",
        seam="Block.merge",
        program=SEEDS + "learning.py:measure_residuals",
        bars=(Bar("16 blocks, residual", ">=", 0.9), Bar("16 blocks, replaced", "<=", 0.5)),
        beats=("2 blocks, residual", "2 blocks, replaced"),
        headline="ResNet: 28.54 -> 25.03 % error at 34 layers",
        notes="two blocks learn without residuals as well: depth is part of the test",
    ),
    Row(
        name="scale",
        title="scale",
        section="5.15",
        seam="Core",
        program=SEEDS + "learning.py:measure_scale",
        bars=(
            Bar("least fall from width to width", ">=", 1e-6),
            Bar("R2 of log nats over log compute", ">=", 0.9),
            Bar("shuffled under the entropy", "<=", 0),
        ),
        beats=("nats, width 16", "nats, width 128", "nats, shuffled, width 16", "nats, shuffled, width 64"),
        headline="Kaplan et al. 2020",
        needs=SHAKESPEARE,
        notes="four widths on as many tokens; on shuffled characters no model gets under the entropy of their frequencies",
    ),
    Row(
        name="descent",
        title="gradient descent on a cost surface",
        section="5.16",
        seam="all blocks",
        program=SEEDS + "learning.py:measure_descent",
        bars=(
            Bar("largest rise of the loss", "<=", 0),
            Bar("largest relative error of a gradient", "<=", 1e-3),
        ),
    ),
)

SCORES = (
    _strip("content", "content-based attention", "6.1", "Score", "NTM eq. 5 and 6"),
    _strip("additive", "additive attention", "6.2", "Score (dense)", "RNNsearch-50 26.75 against 17.82 BLEU"),
    _strip(
        "location",
        "location-based attention",
        "6.3",
        "Score",
        "Luong global (location) 19.3",
        Bar("n=8 align forward", ">=", 0.95),
        Bar("n=8 align backward", "<=", 0.5),
        tried="an earlier run of the same setting aligned forwards at 1.00; the stop now reads an empty cell behind the strip",
        notes="that it fails backwards is the point: it does not look at the keys, and is not told the length (told by the "
        "reader's last state, it aligned backwards as well, 1.00)",
    ),
    _strip("general", "general attention", "6.4", "Score", "local-p (general) 20.9"),
    _strip("dot", "dot-product attention", "6.5", "Score", "global (dot) 20.5"),
    _strip("scaled", "scaled dot-product attention", "6.6", "Score", "Transformer"),
    Row(
        name="scaled-start",
        title="scaled dot product at the start",
        section="6.6",
        seam="Score",
        program=SEEDS + "core.py:measure_scaled_start",
        bars=(
            Bar("entropy / log n, scaled", ">=", 0.9),
            Bar("largest weight, dot", ">=", 0.8),
            Bar("gradient, dot / scaled", "<=", 0.2),
        ),
        beats=("entropy / log n, dot", "largest weight, scaled"),
        headline="section 3.2.1: variance d_k",
    ),
    Row(
        name="induction",
        title="self-attention",
        section="6.7",
        seam="memory = self",
        program=SEEDS + "learning.py:measure_induction",
        bars=(
            Bar("2 layers", ">=", 0.99),
            Bar("1 layers", "<=", 0.5),
            Bar("LSTM", "<=", -0.01, over="2 layers"),
        ),
        headline="LSTMN, Transformer",
        notes="the second half of a random sequence that is said twice; the LSTM has as many parameters",
    ),
    _strip("global", "global attention", "6.10", "Prior = 0", "-", of="general", notes="every score above is global"),
    _strip(
        "local-m",
        "local-m attention",
        "6.11",
        "Prior (mask)",
        "20.4 (general)",
        Bar("n=8 align forward", ">=", 0.95),
        Bar("n=12 string forward", ">=", 0.4),
        Bar("n=8 align backward", "<=", 0.25),
        notes="right forwards and wrong backwards: both halves are the row. Its reader sees each cell alone, with rotary "
        "places: states of a GRU tell of their neighbours, and one of those was read instead (strings .79, alignment .125)",
    ),
    _strip(
        "local-p",
        "local-p attention",
        "6.12",
        "Prior",
        "14.0 -> 16.8 -> 18.1 -> 19.0 -> 20.9",
        Bar("n=8 align forward", ">=", 0.95),
        Bar("n=8 align backward", ">=", 0.95),
    ),
    _strip(
        "hard",
        "hard attention (strips)",
        "6.9",
        "Read",
        "-",
        Bar("n=8 align forward", ">=", 0.9),
        notes="half of the samples read the mean; the reward is that of the written token alone, weighed by .1",
    ),
)
