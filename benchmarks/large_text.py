"""What a large text costs: tokenizing on one process and on all cores, the next start, and memory.

    python benchmarks/large_text.py
    python benchmarks/large_text.py --megabytes 100 1000 --processes 2 --folder large

Writes a synthetic text of each size, seeded: words of BERT's vocabulary and made-up ones, as frequent as Zipf's law has
them, in sentences of 5 to 40 words, 20 sentences a document. For each, `python main.py --train_steps 1` with an empty
cache, then some more steps with a full one: seconds to the first step, and the most memory that the command and its
processes have had at once (resident; a page of the text that is mapped counts as long as nobody needs its place).
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data_utils

MAIN = Path(data_utils.__file__).with_name("main.py")
KINDS, FREQUENT = 300_000, 15_000  # of words in all, and from the vocabulary


def write(path, megabytes):
    """Write a text of about so many million bytes, in parts of 13, or smaller ones if it is small."""
    rng = np.random.default_rng(0)
    pieces = (data_utils.VOCAB_DIR / "bert-base-uncased.txt").read_text(encoding="utf-8").split()
    whole = rng.permutation([piece for piece in pieces if piece.isascii() and piece.isalpha()])[:FREQUENT]
    made_up = ["".join(rng.choice(whole, 2)) for _ in range(KINDS - len(whole))]
    words = np.concatenate([whole, made_up])
    share = 1 / np.arange(1, KINDS + 1)
    share /= share.sum()
    with open(path, "w", encoding="utf-8") as file, tqdm(
        desc=path.name, total=megabytes, unit="MB", leave=False, disable=None
    ) as progress:
        while file.tell() < megabytes * 10**6:
            lengths = rng.integers(5, 41, size=min(20_000, 2_000 * megabytes))
            sentences = np.split(words[rng.choice(KINDS, size=lengths.sum(), p=share)], np.cumsum(lengths)[:-1])
            for i, sentence in enumerate(sentences, start=1):
                file.write(" ".join(sentence).capitalize() + (".\n\n" if i % 20 == 0 else ".\n"))
            progress.update(file.tell() / 10**6 - progress.n)


def run(data, cache, steps, processes):
    """Return the seconds to the first step's line, and the peak in MB of the memory of all processes together."""
    command = [sys.executable, str(MAIN), "--data", str(data), "--cache_dir", str(cache), "--train_steps", str(steps)]
    environment = os.environ | {"LOKY_MAX_CPU_COUNT": str(processes)}
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    peak = 0

    def watch():
        nonlocal peak
        me = psutil.Process(process.pid)
        while process.poll() is None:
            resident = 0
            for each in [me, *me.children(recursive=True)]:
                try:
                    resident += each.memory_info().rss
                except psutil.NoSuchProcess:
                    pass
            peak = max(peak, resident)
            time.sleep(0.05)

    watcher = threading.Thread(target=watch)
    watcher.start()
    seconds = next(time.perf_counter() - begin for line in process.stdout if line.startswith("Number of Epoch"))
    process.stdout.read()
    watcher.join()
    assert process.wait() == 0
    return seconds, peak / 2**20


def benchmark():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", nargs="+", type=int, default=[10, 100, 1000], help="(default: 10 100 1000)")
    parser.add_argument("--processes", nargs="+", type=int, default=[1, len(os.sched_getaffinity(0))],
                        help="that tokenize (default: 1, and one a core)")
    parser.add_argument("--steps", type=int, default=200, help="of the second run (default: 200)")
    parser.add_argument("--folder", type=Path, help="where texts are written and kept (default: a temporary folder)")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp())
    folder.mkdir(exist_ok=True)
    texts = [MAIN.with_name("data.txt")]
    for megabytes in options.megabytes:
        texts.append(folder / f"{megabytes}.txt")
        if not texts[-1].exists():
            write(texts[-1], megabytes)
    print("| text, MB | processes | first start, s to the first step | MB/s | peak MB | next start, s | "
          f"peak MB, {options.steps} steps |\n|---|---|---|---|---|---|---|")
    for path in texts:
        megabytes = path.stat().st_size / 10**6
        for processes in options.processes:
            cache = Path(tempfile.mkdtemp(dir=folder))
            first, peak = run(path, cache, 1, processes)
            again, peak_training = run(path, cache, options.steps, processes)
            speed = f"{megabytes / (first - again):.1f}" if first > again + 1 else ""  # a page is no measure
            print(f"| {megabytes:.4g} | {processes} | {first:.1f} | {speed} | {peak:.0f} | {again:.1f} | "
                  f"{peak_training:.0f} |", flush=True)
            shutil.rmtree(cache)
    if not options.folder:
        shutil.rmtree(folder)


if __name__ == "__main__":
    benchmark()
