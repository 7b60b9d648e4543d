"""Measure the cost of checkpoints at default flags: the time of one, and runs with and without --save_steps 50.

    python benchmarks/checkpoint_cost.py

The two kinds of run alternate, so that a noisy machine disturbs both alike. Each run is timed from the first step to
the last, including its checkpoints, metrics.csv and loss.png.
"""

import argparse
import contextlib
import dataclasses
import io
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import main
from support import checkpoint


def temporary_folder() -> tempfile.TemporaryDirectory:
    """Return a temporary folder for a run; this process keeps it locked, so Windows deletes only a part of it."""
    return tempfile.TemporaryDirectory(ignore_cleanup_errors=True)


def timed_run(n_steps: int, *argv: str) -> float:
    """Return the seconds that n_steps steps take."""
    run = main.prepare(["--train_steps", str(n_steps), *argv])
    with contextlib.redirect_stdout(io.StringIO()), contextlib.closing(main.make_reporter(run)) as reporter:
        begin = time.perf_counter()
        for _ in main.train(run, reporter):
            pass
        return time.perf_counter() - begin


def time_of_saving(count: int) -> list[float]:
    """Return the seconds that each of `count` checkpoints takes, with memory and optimizer, but without loss.png."""
    with temporary_folder() as folder:
        timed_run(3, "--output_dir", folder)
        run = main.prepare(["--output_dir", folder, "--resume"])
        optimizer = main.make_optimizer(run.model, run.args)
        memory = checkpoint.restore(run.state, run.loader.members, run.model, optimizer, run.device)
        without_folder = argparse.Namespace(**vars(run.args) | {"output_dir": None})
        seconds = []
        with contextlib.closing(main.make_reporter(dataclasses.replace(run, args=without_folder))) as reporter:
            for step in range(run.first_step + 1, run.first_step + 1 + count):
                begin = time.perf_counter()
                main.save_checkpoint(run, step, memory, optimizer, reporter)
                seconds.append(time.perf_counter() - begin)
    return seconds


def benchmark(argv: Sequence[str] | None = None) -> None:
    """Read the flags, time checkpoints and runs, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100, help="steps of a run (default: 100)")
    parser.add_argument("--pairs", type=int, default=4, help="runs of either kind (default: 4)")
    options = parser.parse_args(argv)
    without, with_checkpoints = [], []
    timed_run(5)  # warms up
    for _ in range(options.pairs):
        without.append(timed_run(options.steps))
        with temporary_folder() as folder:
            with_checkpoints.append(timed_run(options.steps, "--save_steps", "50", "--output_dir", folder))
    rows = {
        "a checkpoint": time_of_saving(10),
        f"{options.steps} steps, no checkpoints": without,
        f"{options.steps} steps, --save_steps 50": with_checkpoints,
    }
    print("| default flags | seconds, median (least to most) |\n|---|---|")
    for name, values in rows.items():
        print(f"| {name} | {statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f}) |")
    ratios = [longer / shorter for shorter, longer in zip(without, with_checkpoints, strict=True)]
    print(f"\nWith checkpoints a run takes {statistics.median(ratios):.3f} times as long (median of pairs).")


if __name__ == "__main__":
    benchmark()
