"""What a checkpoint has learnt: a small classification with its features, and its guesses for ten held-out blanks.

    python benchmarks/corpus.py
    python main.py --data corpus/train.txt --valid corpus/valid.txt --output_dir out --train_steps 6000
    python benchmarks/probe.py --checkpoint out/checkpoint-6000

The task: in which of four half centuries was a passage of 64 word pieces written? Passages for training and testing
come from different documents. A logistic regression is fitted on the mean of the last hidden states, of the checkpoint
and of the same model with random weights, and on counts of word pieces, with a few labels and with many.
"""

import argparse
import sys
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
import data_utils
import main
from xlnet import XLNet, read_config

PASSAGE = 64  # word pieces
BEGINS = (1850, 1900, 1950)  # of the second, third and fourth class


def passages(tokenizer):
    """Return ids [n, PASSAGE], the class and the document of each, at most 20 from a document."""
    ids, label, document = [], [], []
    for number, (name, sentences) in enumerate(tqdm(corpus.documents().items(), leave=False, disable=None)):
        pieces = [piece for sentence in sentences[:200] for piece in tokenizer.tokenize(sentence)][: 20 * PASSAGE]
        for begin in range(0, len(pieces) - PASSAGE + 1, PASSAGE):
            ids.append(tokenizer.convert_tokens_to_ids(pieces[begin : begin + PASSAGE]))
            label.append(np.searchsorted(BEGINS, int(name[:4]), side="right"))
            document.append(number)
    return np.array(ids), np.array(label), np.array(document)


@torch.no_grad()
def features(model, ids):
    """Return the mean of the last hidden states of each passage: [n, d_model]."""
    batches = torch.from_numpy(ids).split(64)
    return torch.cat([model.hidden(batch.t())[0].mean(dim=0) for batch in tqdm(batches, leave=False, disable=None)])


def classify(model, untrained, tokenizer):
    ids, label, document = passages(tokenizer)
    rng = np.random.default_rng(0)
    tested = np.isin(document, rng.permutation(document.max() + 1)[: (document.max() + 1) // 4])
    counts = np.zeros((len(ids), len(tokenizer.vocab)), dtype=np.float32)
    np.add.at(counts, (np.arange(len(ids))[:, None], ids), 1)
    kinds = {
        "features of the checkpoint": (features(model, ids), StandardScaler()),
        "features of random weights": (features(untrained, ids), StandardScaler()),
        "counts of word pieces (tf-idf)": (counts, TfidfTransformer()),
    }
    sizes = (40, 200, (~tested).sum())
    draws = {size: [rng.permutation(np.flatnonzero(~tested))[:size] for _ in range(5 if size < (~tested).sum() else 1)]
             for size in sizes}
    majority = np.bincount(label[tested]).max() / tested.sum()
    print(f"\nHalf century of a passage: {tested.sum()} passages of unseen documents, largest class {majority:.2f}\n\n"
          f"| accuracy with so many labels | {' | '.join(map(str, sizes))} |\n|---|---|---|---|")
    for name, (x, scaler) in kinds.items():
        accuracies = []
        for size in sizes:
            scores = [make_pipeline(scaler, LogisticRegression(max_iter=2000)).fit(x[train], label[train])
                      .score(x[tested], label[tested]) for train in draws[size]]
            accuracies.append(f"{np.mean(scores):.2f}")
        print(f"| {name} | {' | '.join(accuracies)} |", flush=True)


@torch.no_grad()
def guess(model, ids, blank):
    """Return the five likeliest ids for one place of a window, which nobody sees, and their probabilities."""
    inp = torch.from_numpy(ids)[:, None]
    perm_mask = torch.zeros(len(inp), len(inp), 1)
    perm_mask[:, blank] = 1
    is_blank = (torch.arange(len(inp)) == blank).float()[:, None]
    logits, _ = model(inp, perm_mask=perm_mask, target_mapping=torch.tensor([[blank]]), inp_q=is_blank)
    probability, best = logits.flatten().softmax(dim=0).topk(5)
    return best.tolist(), probability.tolist()


def fill_blanks(model, tokenizer, vocab, path, count=10, before=96, after=32):
    """Print guesses of the query stream for whole words of held-out text."""
    ids = main.load_text("valid", [path], main.settle({}), tokenizer, vocab).ids.astype(np.int64)
    pieces = {i: piece for piece, i in tokenizer.vocab.items()}
    words = [i for i in range(before, len(ids) - after) if pieces[ids[i]].isalpha() and vocab.word_start[ids[i + 1]]]
    print("\n| held-out text | it was | the five likeliest |\n|---|---|---|")
    for at in np.sort(np.random.default_rng(0).choice(words, count, replace=False)):
        around = ids[at - 8 : at], ids[at + 1 : at + 7]
        text = [" ".join(pieces[i] for i in part).replace(" ##", "") for part in around]
        best = zip(*guess(model, ids[at - before : at + after], before))
        guesses = ", ".join(f"{pieces[i]} {probability:.2f}" for i, probability in best)
        print(f"| {text[0]} \\_\\_ {text[1]} | {pieces[ids[at]]} | {guesses} |")


def benchmark():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="folder of a checkpoint")
    parser.add_argument("--valid", default="corpus/valid.txt", help="held-out text (default: %(default)s)")
    options = parser.parse_args()
    tokenizer = data_utils.load_tokenizer(options.checkpoint)
    model = XLNet.from_pretrained(options.checkpoint).eval()
    torch.manual_seed(0)
    untrained = XLNet(**read_config(options.checkpoint)).eval()
    classify(model, untrained, tokenizer)
    fill_blanks(model, tokenizer, data_utils.vocabulary(tokenizer), options.valid)


if __name__ == "__main__":
    benchmark()
