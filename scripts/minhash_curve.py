"""
Does banding find what its formula says? Pairs of documents of known similarity, measured.

    python scripts/minhash_curve.py --plot curve.png

Writes pairs of texts that share a known number of word 5-grams (Jaccard index s from 0.05 to 1, computed from the
sets), and counts how many share a band: with 14 bands of 8 rows, as in datatrove, and with minillm's own, against
1 - (1 - s^rows)^bands; and how many the NearIndex drops, which compares all minima of what shares a band.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, installed or not

import numpy as np

import scripts.command_line as command_line
from minillm.data.dedup import BANDS, ROWS, SHINGLE, NearIndex, collision_probability, minhash, signature
from minillm.extras import extra

BANDINGS = [(14, 8), (BANDS, ROWS)]


def parse(arguments):
    parser = command_line.Parser(description="Measure how often MinHash bands collide, against the formula.")
    parser.add_argument("--pairs", type=int, default=3800, metavar="N", help="pairs of documents (3800)")
    parser.add_argument("--threshold", type=float, default=0.7, metavar="S", help="of the NearIndex (0.7)")
    parser.add_argument("--seed", type=int, default=0, help="(0)")
    parser.add_argument("--plot", metavar="FILE.png", help="draw it, too (needs matplotlib)")
    options = parser.parse_args(arguments)
    if options.pairs < 19:
        parser.error(f"--pairs must be at least 19, one for each row of the table, and is {options.pairs}")
    return options


def random_words(rng, count):
    return [f"w{number:x}" for number in rng.integers(1 << 60, size=count).tolist()]


def random_pair(rng, s):
    """Two texts whose word 5-grams have a Jaccard index near s: they share one stretch, at different places."""
    grams = int(rng.integers(60, 400))  # of each
    shared = round(2 * grams * s / (1 + s))
    common = random_words(rng, shared + SHINGLE - 1 if shared else 0)
    texts = []
    for _ in range(2):
        own = random_words(rng, grams + SHINGLE - 1 - len(common))
        at = int(rng.integers(len(own) + 1))
        texts.append(" ".join([*own[:at], *common, *own[at:]]))
    return texts


def jaccard(a, b):
    """The Jaccard index of the word 5-grams of two texts of lower-case words, from the sets themselves."""
    a, b = ({*zip(*(text.split()[i:] for i in range(SHINGLE)), strict=False)} for text in (a, b))
    return len(a & b) / len(a | b)


def share_a_band(a, b, bands, rows):
    """Whether two arrays of minima are equal in any whole band."""
    return bool((a == b)[: bands * rows].reshape(bands, rows).all(1).any())


def measure(pairs, threshold, seed):
    """s (pairs,), collisions (bandings, pairs) bool, dropped (pairs,) bool."""
    rng = np.random.default_rng(seed)
    s, collisions, dropped = [], [], []
    for wanted in np.linspace(0.05, 1, pairs):
        a, b = random_pair(rng, wanted)
        s.append(jaccard(a, b))
        minima = minhash(a), minhash(b)
        collisions.append([share_a_band(*minima, *banding) for banding in BANDINGS])
        index = NearIndex(threshold)
        index.add(signature(a))
        dropped.append(index.add(signature(b)) is not None)
    return np.array(s), np.array(collisions).T, np.array(dropped)


def summarise(s, hit, banding):
    """The measured and the predicted frequency of `hit`, and two standard deviations of a binomial count's share."""
    p = collision_probability(s, *banding)
    return hit.mean(), p.mean(), 2 * np.sqrt((p * (1 - p)).sum()) / len(s)


def rows_of_table(s, collisions, dropped):
    """One row for each twentieth of s: s, pairs, (measured, predicted, 2 sigma) of each banding, share dropped."""
    bins = np.clip((20 * s).astype(int), 1, 19)
    for n in np.unique(bins):
        here = bins == n
        curves = [summarise(s[here], hit[here], banding) for hit, banding in zip(collisions, BANDINGS, strict=True)]
        yield s[here].mean(), int(here.sum()), curves, dropped[here].mean()


def plot(path, table, threshold):
    figure = extra("matplotlib.figure", "plot").Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.subplots()
    x, grid = [row[0] for row in table], np.linspace(0, 1, 300)
    for i, (banding, colour) in enumerate(zip(BANDINGS, ("tab:gray", "tab:blue"), strict=True)):
        name = "{} bands of {} rows".format(*banding)
        axes.plot(grid, collision_probability(grid, *banding), color=colour, label=f"{name}: $1-(1-s^r)^b$")
        measured, _, sigma = np.array([row[2][i] for row in table]).T
        axes.errorbar(x, measured, sigma, fmt="o", color=colour, markersize=4, capsize=2, label=f"{name}: measured")
    axes.plot(x, [row[3] for row in table], "s--", color="tab:red", markersize=4, label="dropped by NearIndex")
    axes.axvline(threshold, color="tab:red", linewidth=0.8, linestyle=":", label=f"threshold {threshold:g}")
    axes.set(xlabel="Jaccard index s of word 5-grams", ylabel="share of pairs", xlim=(0, 1.01), ylim=(-0.02, 1.02))
    axes.set_title("Pairs of documents that share a band, and that are dropped")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=130)


def run(options):
    s, collisions, dropped = measure(options.pairs, options.threshold, options.seed)
    table = list(rows_of_table(s, collisions, dropped))
    heads = "".join("   {:>3}x{}: measured predicted 2 sigma".format(*banding) for banding in BANDINGS)
    print(f"    s pairs{heads}   dropped")
    for mean, count, curves, share in table:
        cells = "".join(f"{measured:18.3f} {predicted:9.3f} {sigma:7.3f}" for measured, predicted, sigma in curves)
        print(f"{mean:5.3f} {count:5}{cells} {share:9.3f}")
    print(f"of {(s >= 0.8).sum()} pairs with s >= 0.8, {(dropped & (s >= 0.8)).sum()} are dropped")
    print(f"of {(s <= 0.5).sum()} pairs with s <= 0.5, {(dropped & (s <= 0.5)).sum()} are dropped")
    if options.plot:
        plot(options.plot, table, options.threshold)


if __name__ == "__main__":
    command_line.run(run, parse(None))
