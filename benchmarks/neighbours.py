"""Models that learning.py compares with ours: transformers' XLNet and BERT, a unigram and a 5-gram model.

Peer       XLNetLMHeadModel, with the batches of transformers' example run_plm.py
Bert       BertForMaskedLM, with the batches of transformers' example run_mlm.py
Unigram    how often each token occurs: what a model on the plateau knows
FiveGram   Kneser-Ney counts; it reads from left to right and has nothing to train

`Peer` and `Bert` have the constructor, the `forward` and the `save_pretrained` that main.py expects of a model. Their
batches come from `Chunks`: contiguous text, without memory, segments, [SEP] or [CLS].
"""

import functools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from data_utils import Loader, Row
from support import corpus
from xlnet import at_positions

transformers.utils.logging.disable_progress_bar()  # of saving, which takes no time
MASKED = 0.15  # share of the tokens that BERT predicts, arXiv:1810.04805
ORDER = 5  # tokens in a FiveGram's longest count


@functools.cache
def bert_tokenizer() -> transformers.PreTrainedTokenizerBase:
    """Return transformers' tokenizer with the vocabulary of default flags."""
    with tempfile.TemporaryDirectory() as folder:
        corpus.load_tokenizer("bert-base-uncased").save(folder)
        return transformers.AutoTokenizer.from_pretrained(folder)


# ---------------------------------------------------------------- batches of transformers' collators


class Chunks(Loader):
    """Shuffled chunks of the text, one a batch, masked by a collator of transformers.

    A pass reads every chunk once, in a new order each time. A subclass sets the collator and makes its model's batch.
    """

    collator: Callable[..., Any]  # called with the tokenizer

    def __init__(self, text: corpus.Text, vocab: corpus.Vocabulary, **settings: Any):
        super().__init__(text, vocab, **settings)
        self.pass_len = len(text.ids) // self.seq_len
        self.chunks = text.ids[: self.pass_len * self.seq_len].reshape(-1, self.seq_len)
        self.collate = self.collator(bert_tokenizer())

    def collated(self, step: int) -> dict[str, Tensor]:
        """Return the collator's batch of a step, under the collator's names."""
        epoch, index = divmod(step, self.pass_len)
        order = np.random.default_rng([self.seed, epoch]).permutation(self.pass_len)
        chunk = torch.from_numpy(self.chunks[order[index]].astype(np.int64))
        # Collators draw from torch's global generator, in the thread that makes the batches. Dropout in the model draws
        # from it too, so its state must be restored. With dropout on, the draws depend on the timing of the threads.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(np.random.default_rng([self.seed, step]).integers(2**63)))
            return self.collate([{"input_ids": chunk}])


def targets_of(labels: Tensor) -> dict[str, Tensor]:
    """Return the targets of a collator's only row under the names of our batches.

    labels: [1, seq_len] int, -100 = no target
    """
    positions = (labels[0] != -100).nonzero()  # [n_target, 1]
    return {
        "target_mapping": positions,
        "target": labels.t()[positions[:, 0]],
        "target_mask": torch.ones(len(positions), 1),
    }


class Collated(Chunks):
    """The batches of run_plm.py for our model: [MASK] in place of every target, and the order as a mask."""

    collator = transformers.DataCollatorForPermutationLanguageModeling

    def batch(self, step: int) -> dict[str, Tensor]:
        collated = self.collated(step)
        return {
            "inp_k": collated["input_ids"].t(),
            "inp_q": (collated["labels"] != -100).t().float(),
            "perm_mask": collated["perm_mask"].permute(1, 2, 0),
        } | targets_of(collated["labels"])


class CollatedForPeer(Collated):
    """The same batches in run_plm.py's layout for transformers' model: every position has a slot in the query stream.

    target_mapping: [seq_len, seq_len, 1], the collator's own; target_mask: [seq_len, 1], 1 = target
    """

    def batch(self, step: int) -> dict[str, Tensor]:
        collated = self.collated(step)
        labels = collated["labels"].t()
        return {
            "inp_k": collated["input_ids"].t(),
            "perm_mask": collated["perm_mask"].permute(1, 2, 0),
            "target_mapping": collated["target_mapping"].permute(1, 2, 0),
            "target": labels.clamp(min=0),
            "target_mask": (labels != -100).float(),
        }


class CollatedForBert(Chunks):
    """The batches of run_mlm.py: of the tokens to predict, 80% become [MASK], 10% a random token, and 10% stay."""

    collator = functools.partial(transformers.DataCollatorForLanguageModeling, mlm_probability=MASKED)

    def batch(self, step: int) -> dict[str, Tensor]:
        collated = self.collated(step)
        return {"inp_k": collated["input_ids"].t()} | targets_of(collated["labels"])


class MaskedTargets(Loader):
    """The windows of our model with [MASK] in place of the targets in the content stream: no target sees another."""

    def example(self, row: Row, window: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        example = super().example(row, window, rng)
        example["inp_k"] = np.where(example["inp_q"] > 0, bert_tokenizer().mask_token_id, example["inp_k"])
        return example


class WindowsForBert(MaskedTargets):
    """The windows on which Bert is judged: the inputs of MaskedTargets that Bert takes, [SEP] and [CLS] included."""

    def example(self, row: Row, window: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        example = super().example(row, window, rng)
        return {name: example[name] for name in ("inp_k", "target_mapping", "target", "target_mask")}


# ---------------------------------------------------------------- models of transformers


class Peer(nn.Module):
    """transformers' XLNetLMHeadModel, initialized as XLNetConfig says, with the signature of our model.

    It takes the batches of CollatedForPeer and keeps no memory, as in run_plm.py.
    """

    def __init__(
        self,
        n_token: int,
        n_layer: int,
        n_head: int,
        d_model: int,
        d_inner: int,
        ff_activation: str,
        dropout: float,
        **others: Any,  # of our model; XLNetConfig keeps its defaults
    ):
        super().__init__()
        config = transformers.XLNetConfig(
            vocab_size=n_token,
            n_layer=n_layer,
            n_head=n_head,
            d_model=d_model,
            d_inner=d_inner,
            ff_activation=ff_activation,
            dropout=dropout,
        )
        self.peer = transformers.XLNetLMHeadModel(config)

    def forward(
        self, inp_k: Tensor, perm_mask: Tensor, target_mapping: Tensor, mems: list[None] | None = None
    ) -> tuple[Tensor, list[None]]:
        """Return the logits of all positions, [len, bsz, n_token], and None for each layer's memory; see XLNet.forward.

        target_mapping: [num_predict, len, bsz], one-hot along len
        """
        output = self.peer(
            input_ids=inp_k.t(),
            perm_mask=perm_mask.permute(2, 0, 1),
            target_mapping=target_mapping.permute(2, 0, 1),
            use_mems=False,
        )
        return output.logits.transpose(0, 1), [None] * self.peer.config.n_layer

    def our_weights(self) -> dict[str, Tensor]:
        """Return the weights under the names of our model, which computes the same numbers with them, but faster."""
        return {name.removeprefix("transformer."): weight for name, weight in self.peer.state_dict().items()}

    def save_pretrained(self, directory: str | Path, **config: Any) -> None:
        """Write the inner model, with further entries of config.json; our XLNet and transformers' can read it."""
        self.peer.config.update(config)
        self.peer.save_pretrained(directory)


class Bert(nn.Module):
    """transformers' BertForMaskedLM, initialized as BertConfig says, with the signature of our model.

    It takes the batches of CollatedForBert and WindowsForBert, which have one segment, and keeps no memory. It has
    BertConfig's 512 positions.
    """

    def __init__(
        self,
        n_token: int,
        n_layer: int,
        n_head: int,
        d_model: int,
        d_inner: int,
        ff_activation: str,
        dropout: float,
        dropatt: float,
        **others: Any,  # of our model; BertConfig keeps its defaults
    ):
        super().__init__()
        config = transformers.BertConfig(
            vocab_size=n_token,
            num_hidden_layers=n_layer,
            num_attention_heads=n_head,
            hidden_size=d_model,
            intermediate_size=d_inner,
            hidden_act=ff_activation,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropatt,
        )
        self.peer = transformers.BertForMaskedLM(config)

    def forward(
        self, inp_k: Tensor, target_mapping: Tensor, mems: list[None] | None = None
    ) -> tuple[Tensor, list[None]]:
        """Return the logits of the targets, [num_predict, bsz, n_token], and None for the memory of each layer.

        The head computes only these positions: the numbers are the same, and a step is faster.

        inp_k: [len, bsz] int; target_mapping: [num_predict, bsz] int, the position of each target, -1 = empty slot
        Source: google-research/bert, run_pretraining.py, gather_indexes.
        """
        hidden = self.peer.bert(input_ids=inp_k.t()).last_hidden_state  # [bsz, len, d_model]
        logits = self.peer.cls(at_positions(hidden, target_mapping.t().clamp(min=0)))
        return logits.transpose(0, 1), [None] * self.peer.config.num_hidden_layers

    def save_pretrained(self, directory: str | Path, **config: Any) -> None:
        """Write the inner model, which transformers' BertForMaskedLM can read; its config.json is already whole."""
        self.peer.save_pretrained(directory)


# ---------------------------------------------------------------- counts


class Unigram:
    """The frequency of each token in a text, with one more occurrence of each entry of the vocabulary.

    ids: [n_tokens] int, the text; n_token: size of the vocabulary
    """

    def __init__(self, ids: np.ndarray, n_token: int):
        count = 1 + np.bincount(ids, minlength=n_token)
        self.log_share = np.log(count / count.sum())

    def log_probs(self, ids: np.ndarray) -> np.ndarray:
        """Return the natural logarithm of the probability of each token: [len(ids)]."""
        return self.log_share[ids]


class Grams(NamedTuple):
    """All n-grams of one length n in a text, numbered in the order of their keys, with statistics of their last token.

    A context is the (n-1)-gram before the last token. Its number is that in the Grams of length n-1; 0 if n is 1.
    share and left have an extra entry at -1, for an n-gram or a context that is not in the text.
    """

    keys: np.ndarray  # [n_grams] int64, ascending: number of the context * n_token + last token
    share: np.ndarray  # [n_grams + 1], discounted count / sum of the counts after the same context
    left: np.ndarray  # [n_contexts + 1], share that the discounts after a context leave to the shorter context

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Return the number of the n-gram with each key, -1 if it is not in the text."""
        number = np.searchsorted(self.keys, keys).clip(max=len(self.keys) - 1)
        return np.where(self.keys[number] == keys, number, -1)


class FiveGram:
    """A 5-gram model with interpolated modified Kneser-Ney smoothing.

    For a token w after a context c of n - 1 tokens, n from 1 to 5:

        p_n(w | c) = (a(c w) - D(a(c w))) / a(c) + left(c) p_{n-1}(w | c without its first token)

    a(c w) is the count of c w if n is 5; for smaller n it is the number of different tokens before c w in the text.
    a(c) is the sum of a(c w) over w. D is the discount: three numbers, for a = 1, a = 2 and a > 2. left(c) makes the
    probabilities of all w sum to 1. If c is not in the text, p_n = p_{n-1}; p_0 = 1 / n_token.

    ids: [n_tokens] int, the text, at least five tokens; n_token: size of the vocabulary
    Source: Chen and Goodman, An empirical study of smoothing techniques for language modeling, Computer Speech &
    Language 13 (1999), section 3.
    """

    def __init__(self, ids: np.ndarray, n_token: int):
        self.n_token = n_token
        ids = np.asarray(ids, dtype=np.int64)
        # for each n: the keys of all n-grams, the first position of each, and the number of the n-gram at each token
        texts = [np.unique_all(ids)]
        for n in range(2, ORDER + 1):
            texts.append(np.unique_all(texts[-1].inverse_indices[:-1] * n_token + ids[n - 1 :]))

        self.grams = [weigh(texts[0].values, np.zeros_like(texts[0].values), 1, continuations(*texts[:2]))]
        for n in range(2, ORDER + 1):
            shorter, this = texts[n - 2], texts[n - 1]
            count = this.counts if n == ORDER else continuations(this, texts[n])
            self.grams.append(weigh(this.values, this.values // n_token, len(shorter.values), count))

    def log_probs(self, ids: Sequence[int]) -> np.ndarray:
        """Return the natural logarithm of the probability of each token, given up to four before it: [len(ids)]."""
        ids = np.asarray(ids, dtype=np.int64)
        context = np.zeros_like(ids)
        p = np.full(len(ids), 1 / self.n_token)
        for grams in self.grams:
            found = grams.find(context * self.n_token + ids)
            p = grams.share[found] + grams.left[context] * p
            context = np.concatenate([[-1], found[:-1]])  # the n-gram before each token; the first token has none
        return np.log(p)


def continuations(this: Any, longer: Any) -> np.ndarray:
    """Return how many different tokens stand before each n-gram of a text: [n_grams] int.

    this, longer: the results of np.unique_all for the n-grams, and for those with one token more
    """
    without_first_token = this.inverse_indices[longer.indices + 1]  # of each longer n-gram
    return np.bincount(without_first_token, minlength=len(this.values))


def weigh(keys: np.ndarray, context: np.ndarray, n_contexts: int, count: np.ndarray) -> Grams:
    """Return the n-grams of one length with their discounted shares.

    keys, context, count: [n_grams]; context: the number of each n-gram's context
    """
    taken = discounts(count)[count.clip(max=3)]
    total = np.bincount(context, weights=count, minlength=n_contexts)  # 0 after a context that only ends the text
    left = np.ones(n_contexts)
    np.divide(np.bincount(context, weights=taken, minlength=n_contexts), total, out=left, where=total > 0)
    share = np.zeros(len(keys))
    np.divide(count - taken, total[context], out=share, where=count > 0)
    return Grams(keys, np.append(share, 0.0), np.append(left, 1.0))


def discounts(count: np.ndarray) -> np.ndarray:
    """Return the discounts of counts 0, 1, 2, and 3 or more: [4]; a text that is too small gets the usual 0.75.

    Source: Chen and Goodman, equation (26).
    """
    n1, n2, n3, n4 = np.bincount(count, minlength=5)[1:5]  # how many n-grams have a count of 1, 2, 3, 4
    if min(n1, n2, n3, n4) > 0:
        y = n1 / (n1 + 2 * n2)
        found = np.array([0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
        if found[1:].min() > 0:
            return found
    return np.array([0, 0.75, 0.75, 0.75])
