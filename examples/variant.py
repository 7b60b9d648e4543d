"""A variant of XLNet in a few lines: it predicts the targets of a window in reading order, not in a random one.

    python examples/variant.py --data my.txt --output_dir out

It takes all flags of main.py. Targets see the same given tokens as before, but of the targets only those that precede
them in the row. To change the model instead, derive a class from xlnet.XLNet and pass it as model_class.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import main
from data_utils import Loader, Row


class ReadingOrderLoader(Loader):
    """Batches whose ranks follow the text."""

    def example(self, row: Row, window: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        example = super().example(row, window, rng)
        rank, position = example["rank"], np.arange(self.seq_len)
        is_inp = position < self.reuse_len
        is_given = rank == np.where(is_inp, -1, self.reuse_len)  # ranks as in data_utils.permute
        in_reading_order = np.where(is_inp, position, position + 1)
        example["rank"] = np.where(is_given, rank, in_reading_order)
        return example


if __name__ == "__main__":
    main.main(loader_class=ReadingOrderLoader)
