"""Measure how many windows a second each part of the data pipeline makes on one core.

    python benchmarks/pipeline.py

Each part is timed over all windows of data.txt, in many passes; the table gives medians and quartiles. The batch of a
step holds one window for each row. The model computes while the next batch is made.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data_utils
import main


def parts_of(loader: data_utils.Loader) -> dict[str, Callable[[int], object]]:
    """Return the parts of the pipeline by name; each is a function of a window's number."""
    [[row]] = loader.turns
    rng = np.random.default_rng(0)
    targets = (loader.num_predict, loader.mask_alpha, loader.mask_beta)
    features = list(data_utils.create_data(row, loader.vocab, loader.seq_len, loader.reuse_len, *targets, rng))

    def create_feature(window: int) -> object:
        return data_utils.create_feature(row, window, loader.vocab, loader.seq_len, loader.reuse_len, *targets, rng)

    def permute(window: int) -> object:
        return data_utils.permute(features[window], loader.reuse_len, loader.perm_size, loader.num_predict, rng)

    def make_permute(window: int) -> object:
        return data_utils.make_permute(
            features[window], loader.reuse_len, loader.seq_len, loader.perm_size, loader.num_predict, rng
        )

    return {
        "segments and spans (`create_feature`)": create_feature,
        "order and targets (`permute`)": permute,
        "both, stacked and seeded (`Loader.batch`)": loader.batch,
        "the order as a mask (`make_permute`)": make_permute,
    }


def benchmark(argv: Sequence[str] | None = None) -> None:
    """Read the flags, time each part, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passes", type=int, default=100, help="passes over the text (default: 100)")
    passes = parser.parse_args(argv).passes
    loader = main.prepare(["--device", "cpu"]).loader
    parts = parts_of(loader)
    milliseconds: dict[str, list[float]] = {name: [] for name in parts}
    for _ in tqdm(range(passes), leave=False, disable=None):
        for name, part in parts.items():  # alternating, so that a noisy machine disturbs all alike
            begin = time.perf_counter()
            for window in range(loader.pass_len):
                part(window)
            milliseconds[name].append(1000 * (time.perf_counter() - begin) / loader.pass_len)
    print(
        f"| {loader.seq_len} tokens, {loader.num_predict} of them predicted | ms a window, median (quartiles) | "
        f"windows a second |\n|---|---|---|"
    )
    for name, values in milliseconds.items():
        low, median, high = np.percentile(values, (25, 50, 75))
        print(f"| {name} | {median:.2f} ({low:.2f} to {high:.2f}) | {1000 / median:,.0f} |")


if __name__ == "__main__":
    benchmark()
