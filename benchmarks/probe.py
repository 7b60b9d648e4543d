"""Probe a checkpoint: classify passages by its features, and print its guesses for ten blanks in held-out text.

    python benchmarks/corpus.py
    python main.py --data corpus/train.txt --valid corpus/valid.txt --output_dir out --train_steps 6000
    python benchmarks/probe.py --checkpoint out/checkpoint-6000

The task: in which of four half centuries was a passage of 64 word pieces written? Passages for training and testing
come from different documents. A logistic regression is fitted on three kinds of features: the mean of the checkpoint's
last hidden states, the same mean with random weights, and counts of word pieces. Each is fitted with few labels and
with many.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from sklearn.feature_extraction.text import TfidfTransformer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import corpus

from support.corpus import Tokenizer, Vocabulary, load_text, load_tokenizer, vocabulary
from support.flags import default_cache_dir
from xlnet import XLNet, read_config

PASSAGE = 64  # word pieces
BEGINS = (1850, 1900, 1950)  # of the second, third and fourth class
FEW_LABELS = (40, 200)
DRAWS = 5  # random training sets of each such size


def passages(tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the ids [n, PASSAGE], the class and the document of each passage; a document gives at most 20."""
    ids, label, document = [], [], []
    for number, (name, sentences) in enumerate(tqdm(corpus.documents().items(), leave=False, disable=None)):
        pieces = [piece for sentence in sentences[:200] for piece in tokenizer.tokenize(sentence)][: 20 * PASSAGE]
        for begin in range(0, len(pieces) - PASSAGE + 1, PASSAGE):
            ids.append(tokenizer.convert_tokens_to_ids(pieces[begin : begin + PASSAGE]))
            label.append(np.searchsorted(BEGINS, int(name[:4]), side="right"))
            document.append(number)
    return np.array(ids), np.array(label), np.array(document)


@torch.no_grad()
def features(model: XLNet, ids: np.ndarray) -> np.ndarray:
    """Return the mean of the last hidden states of each passage: [n, d_model]."""
    batches = torch.from_numpy(ids).split(64)
    means = [model.hidden(batch.t())[0].mean(dim=0) for batch in tqdm(batches, leave=False, disable=None)]
    return torch.cat(means).numpy()


def count_pieces(ids: np.ndarray, n_token: int) -> np.ndarray:
    """Return how often each piece occurs in each passage: [n, n_token]."""
    counts = np.zeros((len(ids), n_token), dtype=np.float32)
    np.add.at(counts, (np.arange(len(ids))[:, None], ids), 1)
    return counts


def classify(model: XLNet, untrained: XLNet, tokenizer: Tokenizer) -> None:
    """Print the accuracy with each kind of features, on documents that the classifier did not train on."""
    ids, label, document = passages(tokenizer)
    rng = np.random.default_rng(0)
    n_document = document.max() + 1
    is_tested = np.isin(document, rng.permutation(n_document)[: n_document // 4])
    kinds = {
        "features of the checkpoint": (features(model, ids), StandardScaler()),
        "features of random weights": (features(untrained, ids), StandardScaler()),
        "counts of word pieces (tf-idf)": (count_pieces(ids, len(tokenizer.vocab)), TfidfTransformer()),
    }
    trainable = np.flatnonzero(~is_tested)
    draws = {}  # size -> training sets of that size, as indices of passages
    for size in (*FEW_LABELS, len(trainable)):
        n_draw = DRAWS if size < len(trainable) else 1
        draws[size] = [rng.permutation(trainable)[:size] for _ in range(n_draw)]
    majority = np.bincount(label[is_tested]).max() / is_tested.sum()
    print(
        f"\nHalf century of a passage: {is_tested.sum()} passages of unseen documents, largest class {majority:.2f}\n\n"
        f"| accuracy with so many labels | {' | '.join(map(str, draws))} |\n|---|---|---|---|"
    )
    for name, (x, scaler) in kinds.items():
        accuracies = []
        for samples in draws.values():
            scores = []
            for train in samples:
                classifier = make_pipeline(scaler, LogisticRegression(max_iter=2000))
                classifier.fit(x[train], label[train])
                scores.append(classifier.score(x[is_tested], label[is_tested]))
            accuracies.append(f"{np.mean(scores):.2f}")
        print(f"| {name} | {' | '.join(accuracies)} |", flush=True)


@torch.no_grad()
def guess(model: XLNet, ids: np.ndarray, blank: int) -> tuple[list[int], list[float]]:
    """Return the five likeliest ids at the blank of a window, and their probabilities; no position sees the blank."""
    inp = torch.from_numpy(ids)[:, None]
    perm_mask = torch.zeros(len(inp), len(inp), 1)
    perm_mask[:, blank] = 1  # 1 = must not see
    is_blank = (torch.arange(len(inp)) == blank).float()[:, None]
    logits, _ = model(inp, perm_mask=perm_mask, target_mapping=torch.tensor([[blank]]), inp_q=is_blank)
    probability, best = logits.flatten().softmax(dim=0).topk(5)
    return best.tolist(), probability.tolist()


def fill_blanks(
    model: XLNet,
    tokenizer: Tokenizer,
    vocab: Vocabulary,
    path: str,
    count: int = 10,
    before: int = 96,
    after: int = 32,
) -> None:
    """Print guesses of the query stream for whole words of held-out text.

    count: number of words; before, after: pieces of text around each word
    """
    ids = load_text("valid", [path], default_cache_dir(), tokenizer, vocab).ids.astype(np.int64)
    pieces = {i: piece for piece, i in tokenizer.vocab.items()}
    words = [i for i in range(before, len(ids) - after) if pieces[ids[i]].isalpha() and vocab.word_start[ids[i + 1]]]
    print("\n| held-out text | it was | the five likeliest |\n|---|---|---|")
    for at in np.sort(np.random.default_rng(0).choice(words, count, replace=False)):
        around = ids[at - 8 : at], ids[at + 1 : at + 7]
        text = [" ".join(pieces[i] for i in part).replace(" ##", "") for part in around]
        best, probabilities = guess(model, ids[at - before : at + after], before)
        guesses = ", ".join(f"{pieces[i]} {p:.2f}" for i, p in zip(best, probabilities, strict=True))
        print(f"| {text[0]} \\_\\_ {text[1]} | {pieces[ids[at]]} | {guesses} |")


def benchmark(argv: Sequence[str] | None = None) -> None:
    """Read the flags, and print the accuracies and the guesses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="folder of a checkpoint")
    parser.add_argument("--valid", default="corpus/valid.txt", help="held-out text (default: %(default)s)")
    options = parser.parse_args(argv)
    tokenizer = load_tokenizer(options.checkpoint)
    model = XLNet.from_pretrained(options.checkpoint).eval()
    torch.manual_seed(0)
    untrained = XLNet(**read_config(options.checkpoint)).eval()
    classify(model, untrained, tokenizer)
    fill_blanks(model, tokenizer, vocabulary(tokenizer), options.valid)


if __name__ == "__main__":
    benchmark()
