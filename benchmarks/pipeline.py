"""Windows a second that the data pipeline makes on one core, by its parts.

    python benchmarks/pipeline.py

Each part is timed over all windows of data.txt, again and again; the table gives medians with the quartiles around
them. A step's batch is a window for each member; the model computes while the next one is made.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data_utils
import main


def benchmark():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passes", type=int, default=100, help="passes over the text (default: 100)")
    passes = parser.parse_args().passes
    run = main.Run(main.settle({"device": "cpu"}))
    seq_len, reuse_len, perm_size, num_predict, *mask = main.sizes(run.args).values()
    rng = np.random.default_rng(0)
    features = list(data_utils.create_data(run.groups[0][0], run.vocab, seq_len, reuse_len, num_predict, *mask, rng))
    parts = {
        "segments and spans (`create_feature`)": lambda window: data_utils.create_feature(
            run.groups[0][0], window, run.vocab, seq_len, reuse_len, num_predict, *mask, rng),
        "order and targets (`permute`)": lambda window: data_utils.permute(
            features[window], reuse_len, perm_size, num_predict, rng),
        "both, stacked and seeded (`Run.load_batch`)": run.load_batch,
        "the order as a mask (`make_permute`)": lambda window: data_utils.make_permute(
            features[window], reuse_len, seq_len, perm_size, num_predict, rng),
    }
    milliseconds = {name: [] for name in parts}
    for _ in tqdm(range(passes), leave=False, disable=None):
        for name, part in parts.items():  # alternating, so that a noisy machine disturbs all alike
            begin = time.perf_counter()
            for window in range(run.pass_len):
                part(window)
            milliseconds[name].append(1000 * (time.perf_counter() - begin) / run.pass_len)
    print(f"| {seq_len} tokens, {num_predict} of them predicted | ms a window, median (quartiles) | windows a second |")
    print("|---|---|---|")
    for name, values in milliseconds.items():
        low, median, high = np.percentile(values, (25, 50, 75))
        print(f"| {name} | {median:.2f} ({low:.2f} to {high:.2f}) | {1000 / median:,.0f} |")


if __name__ == "__main__":
    benchmark()
