"""
Which tiles attention's CUDA kernels are fastest with on this GPU: candidates beside those of kernels/attention.py.

    python scripts/tune_attention.py [--dtype bfloat16] [--rounds 5] [--json tiles.json]

A tile is (rows that a block owns, rows of those it streams, warps, blocks at once, way), as in attention.TILES. All
candidates take turns on the sizes that bench_kernels.py times (16 K tokens of width 2048), and each has to give what
attention's own tiles give. The backward is timed as a whole, with one of its kernels on other tiles. What wins belongs
into the table, with the numbers in the commit.
"""

import contextlib
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, installed or not

import scripts.command_line as command_line
from minillm.kernels import attention, cuda
from minillm.kernels.device import check_device
from scripts.bench_kernels import TOLERANCE, distance, example, fresh, median_on_gpu, told

# {(kernel, head size): tiles to try}; those of kernels/attention.py are tried anyway
CANDIDATES = {
    ("forward", 64): [(128, 64, 8, 2, "WGMMA"), (64, 128, 4, 3, "WGMMA"), (192, 128, 12, 1, "WGMMA")],
    ("forward", 128): [(192, 64, 12, 1, "WGMMA"), (192, 80, 12, 1, "WGMMA"), (128, 128, 8, 1, "WGMMA")],
    ("queries", 64): [(128, 48, 8, 2, "WGMMA"), (64, 80, 4, 3, "WGMMA")],
    ("queries", 128): [(128, 64, 8, 1, "WGMMA"), (128, 80, 8, 1, "WGMMA")],
    ("keys", 64): [(128, 128, 8, 1, "WGMMA")],
    ("keys", 128): [(128, 64, 8, 1, "WGMMA")],
}
SIZES = {64: "gpu", 128: "gpu, D = 128"}


def table_of(tile):
    return attention.WGMMA_TILES if tile[-1] == "WGMMA" else attention.TILES


class Candidate:
    """One of attention's kernels with other tiles; calling it runs the forward or the whole backward."""

    def __init__(self, kernel, D, tile):
        self.kernel, self.D, self.tile = kernel, D, tile
        with self.in_place():
            self.source = attention.source_of_tiles()

    @contextlib.contextmanager
    def in_place(self, source=None):
        """Context manager: attention takes these tiles, from this Source if one is given."""
        tiles = table_of(self.tile)[self.kernel]
        before, of_before = tiles[self.D], attention.SOURCE
        tiles[self.D], attention.SOURCE = self.tile, source or of_before
        try:
            yield
        finally:
            tiles[self.D], attention.SOURCE = before, of_before

    def __call__(self, *arguments):
        run = attention.cuda_forward if self.kernel == "forward" else attention.cuda_backward
        with self.in_place(self.source):
            return run(*arguments, wgmma=self.tile[-1] == "WGMMA")


def candidates(hopper):
    """{(kernel, head size): Candidates, attention's own first}."""
    return {
        (kernel, D): [
            Candidate(kernel, D, tile)
            for tile in [attention.TILES[kernel][D], attention.WGMMA_TILES[kernel][D], *others]
            if hopper or tile[-1] != "WGMMA"
        ]
        for (kernel, D), others in CANDIDATES.items()
    }


def tune(options):
    found = candidates(cuda.backend.architecture() == cuda.HOPPER)
    cuda.compile_ahead({one.source for some in found.values() for one in some})
    noted, wrong = {"date": time.strftime("%Y-%m-%d"), "command": " ".join(sys.argv), "rows": []}, 0
    print(f"{'kernel':<10}{'D':>4}   {'tiles':<34}{'us':>10}{'TFLOP/s':>10}{'/ own':>8}")
    for (kernel, D), some in found.items():
        timed = attention.forward if kernel == "forward" else attention.backward
        args, _ = example(timed, 0, SIZES[D], options.dtype, "cuda")
        sets, own, calls, bad = [fresh(args) for _ in range(4)], some[0](*args), {}, {}
        for one in some:
            with told(timed, str(one.tile), bad):
                if not distance(one(*args), own) <= 2 * TOLERANCE[options.dtype]:
                    raise RuntimeError("other results than with attention's own tiles")
                calls[one.tile] = one, sets, {}
        seconds = median_on_gpu(calls, options.rounds)
        for tile, taken in seconds.items():
            rate = timed.operations(*args) / taken / 1e12
            against = taken / seconds.get(some[0].tile, taken)
            print(f"{kernel:<10}{D:>4}   {tile!s:<34}{1e6 * taken:>10.1f}{rate:>10.1f}{against:>7.2f}x", flush=True)
            noted["rows"].append({"kernel": kernel, "D": D, "tile": tile, "seconds": taken})
        wrong += len(bad)
        if options.json:
            options.json.write_text(json.dumps(noted, indent=1) + "\n", encoding="utf-8")
    if wrong:
        sys.exit(f"{wrong} tiles are wrong or failed, and were not timed")


def parse():
    parser = command_line.Parser(description="Which tiles attention's CUDA kernels are fastest with on this GPU.")
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there, too")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    try:
        check_device("cuda")
    except (ValueError, ModuleNotFoundError) as error:
        parser.error(str(error))
    return options


def main():
    command_line.run(tune, parse())


if __name__ == "__main__":
    main()
