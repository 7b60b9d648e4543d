"""What checkpoints cost at default flags: the time of one, and a run with --save_steps 50 beside one without.

    python benchmarks/checkpoint_cost.py

The two kinds of run alternate, so that a noisy machine disturbs both alike; each is timed from the first step to the
last, its checkpoints, metrics.csv and loss.png included.
"""

import argparse
import contextlib
import io
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import main


def timed_run(steps, *flags):
    """Return the seconds that `steps` steps take."""
    run = main.Run(main.settle(vars(main.build_parser().parse_args(["--train_steps", str(steps), *flags]))))
    begin = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        main.train(run)
    return time.perf_counter() - begin


def time_of_saving(count):
    """Return the seconds that each of `count` checkpoints of a run takes, memory and optimizer state included."""
    folder = tempfile.mkdtemp()
    run = main.Run(main.settle({"train_steps": 3, "output_dir": folder}))
    with contextlib.redirect_stdout(io.StringIO()):
        main.train(run)
    seconds = []
    for _ in range(count):
        begin = time.perf_counter()
        main.save_checkpoint(run, run.state_dict())
        seconds.append(time.perf_counter() - begin)
    shutil.rmtree(folder)
    return seconds


def benchmark():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="steps of a run (default: 100)")
    parser.add_argument("--pairs", type=int, default=4, help="runs of either kind (default: 4)")
    options = parser.parse_args()
    seconds = {"no checkpoints": [], "--save_steps 50": []}
    timed_run(5)
    for _ in range(options.pairs):
        seconds["no checkpoints"].append(timed_run(options.steps))
        folder = tempfile.mkdtemp()
        seconds["--save_steps 50"].append(timed_run(options.steps, "--save_steps", "50", "--output_dir", folder))
        shutil.rmtree(folder)
    saving = time_of_saving(10)
    print("| default flags | seconds, median (least to most) |\n|---|---|")
    for name, values in ("a checkpoint", saving), *seconds.items():
        name = f"{options.steps} steps, {name}" if name in seconds else name
        print(f"| {name} | {statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f}) |")
    ratios = [with_ / without for without, with_ in zip(*seconds.values())]
    print(f"\nWith checkpoints a run takes {statistics.median(ratios):.3f} times as long (median of pairs).")


if __name__ == "__main__":
    benchmark()
