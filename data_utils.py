"""The data pipeline: rows of a text -> windows -> masked spans -> factorization orders -> batches.

    batchify        text            -> rows, half of them read backwards with bi_data, in turns of batch_size rows
    create_feature  row, window     -> input, seg_id, is_masked: tokens, segments, and which tokens to predict
    permute         feature         -> what the model takes: a fresh order as ranks, and the targets
    Loader          text, step      -> the batch of a step: one window of each row whose turn it is
    prefetch        loader          -> the batches of successive steps, each made while the previous one is in use

`make_permute` writes the order out as a mask; `ranks_to_mask` says what ranks mean.

Sources: the paper, arXiv:1906.08237, sections 2.2, 2.5 and 3.1, and zihangdai/xlnet, data_utils.py ("official").
Official records also store each position's next token and whether B follows A. No loss uses them, so they are left out.
A pass over the text is an epoch. A turn is the batch_size rows that one step reads; turns alternate from step to step.
Functions draw from the numpy Generator passed in; Loader makes one from seed, visit and row.
"""

import bisect
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch

from support.corpus import Text, Vocabulary

MAX_GRAM = 5  # longest span, in word pieces
# By default there are at most 16 turns. If there is more than one, each row has at least 32 windows.
MAX_TURNS, TURN_WINDOWS = 16, 32

# ---------------------------------------------------------------- rows


class Row(NamedTuple):
    """A contiguous part of a text, read in one direction: views of the text's arrays."""

    ids: np.ndarray  # [row_len] int
    cuts: np.ndarray  # [n_cuts] int64, in the row's direction: text positions where a sentence begins
    backward: bool
    origin: int = 0  # text position where the row begins
    number: int = 0  # among all rows of the text, the backward ones last

    def cut(self, i: int) -> int:
        """Return the position in the row at which a sentence begins; 0 < cut(0) < cut(1) < ... < row_len."""
        return abs(int(self.cuts[i]) - self.origin)

    def find_cut(self, position: int) -> int:
        """Return the index of the first cut at a position or after it, len(cuts) if there is none."""
        return bisect.bisect_left(range(len(self.cuts)), position, key=self.cut)


def batchify(ids: np.ndarray, cuts: np.ndarray, n_rows: int, batch_size: int, bi_data: bool) -> list[list[Row]]:
    """Cut a text into n_rows rows of equal length, batch_size of them for each turn.

    With bi_data the second half of a turn holds the rows of the first half, read backwards.

    ids: [n_tokens]; cuts: [n_sentences - 1], where every sentence but the first begins
    -> n_rows / batch_size turns, each a list of batch_size rows; the end of the text that fills no row is dropped
    Source: official batchify and create_tfrecords, where n_rows is batch_size.
    """
    directions = 2 if bi_data else 1
    n_forward, forward_batch = n_rows // directions, batch_size // directions
    row_len = len(ids) // n_forward
    forward, backward = [], []
    for number in range(n_forward):
        begin, end = number * row_len, (number + 1) * row_len
        first_cut, last_cut = np.searchsorted(cuts, (begin + 1, end))
        row_ids, row_cuts = ids[begin:end], cuts[first_cut:last_cut]
        forward.append(Row(row_ids, row_cuts, backward=False, origin=begin, number=number))
        backward.append(Row(row_ids[::-1], row_cuts[::-1], backward=True, origin=end, number=n_forward + number))

    turns = []
    for first in range(0, n_forward, forward_batch):
        turn = forward[first : first + forward_batch]
        if bi_data:
            turn += backward[first : first + forward_batch]
        turns.append(turn)
    return turns


def n_windows(row_len: int, seq_len: int, reuse_len: int) -> int:
    """Return how many windows fit into a row, one every reuse_len tokens; an incomplete last window is dropped."""
    return max(0, (row_len - seq_len) // reuse_len + 1)


def default_rows(n_tokens: int, batch_size: int, bi_data: bool, seq_len: int, reuse_len: int) -> int:
    """Return the default n_rows: batch_size for a page of text, up to MAX_TURNS times as many for a longer text.

    Every row then has at least TURN_WINDOWS windows.
    """
    row_len = seq_len + (TURN_WINDOWS - 1) * reuse_len
    forward_batch = batch_size // 2 if bi_data else batch_size
    turns = n_tokens // (forward_batch * row_len)
    return batch_size * min(MAX_TURNS, max(1, turns))


def evaluation_rows(n_tokens: int, batch_size: int, bi_data: bool, seq_len: int, reuse_len: int) -> tuple[int, int]:
    """Return how many rows a validation text is cut into, and how many of them are evaluated together.

    The first number depends only on the text and the window, so that losses of different batch sizes are comparable. It
    is a power of two such that every row has at least TURN_WINDOWS windows. The second number is the largest power of
    two that batch_size allows. With bi_data both numbers count each row twice.
    """
    directions = 2 if bi_data else 1
    n_forward = power_of_two(default_rows(n_tokens, 1, False, seq_len, reuse_len))
    together = min(n_forward, power_of_two(batch_size // directions))
    return directions * n_forward, directions * together


def power_of_two(n: int) -> int:
    """Return the largest power of two that is not above n."""
    return 1 << (n.bit_length() - 1)


def members_of_process(batch_size: int, bi_data: bool, rank: int, world_size: int) -> list[int]:
    """Return which of a turn's batch_size rows one process of world_size takes: the same share of each direction.

    Shares are equal if world_size divides the rows of a direction; otherwise the first processes take more, and the
    last ones may have none.
    """
    forward_batch = batch_size // 2 if bi_data else batch_size
    forward = np.array_split(np.arange(forward_batch), world_size)[rank].tolist()
    return forward + [forward_batch + member for member in forward] if bi_data else forward


# ---------------------------------------------------------------- windows


def split_a_and_b(row: Row, begin_idx: int, tot_len: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Cut two segments: A goes from begin_idx to the end of a sentence; B follows A, or comes from anywhere.

    B follows A half of the time, but never if no sentence ends within tot_len tokens. Both take whole sentences. Then
    the longer one loses its last token until together they are tot_len long.

    -> ids of A and of B; B is empty if tot_len is 1
    Source: the paper, section 2.5; official _split_a_and_b.
    """
    ids, n_cuts = row.ids, len(row.cuts)
    end_cut = row.find_cut(begin_idx + tot_len)
    # sentences that begin after begin_idx and less than tot_len tokens away
    cut_points = [row.cut(i) for i in range(row.find_cut(begin_idx + 1), end_cut)]
    end_idx = row.cut(end_cut) if end_cut < n_cuts else len(ids)

    a_end = rng.choice(cut_points) if cut_points else end_idx
    if cut_points and rng.random() < 0.5:
        b_begin, b_end = a_end, end_idx
    else:
        b_len = max(1, tot_len - (a_end - begin_idx))
        b_begin = rng.integers(len(ids) - b_len + 1)
        b_end = b_begin + b_len
        # widen to whole sentences
        before, after = row.find_cut(b_begin + 1), row.find_cut(b_end)
        b_begin = row.cut(before - 1) if before > 0 else 0
        b_end = row.cut(after) if after < n_cuts else len(ids)

    # A gets what B leaves: at least half, rounded up, and at most its own length
    a_len = min(a_end - begin_idx, max(tot_len - (b_end - b_begin), (tot_len + 1) // 2))
    return ids[begin_idx : begin_idx + a_len], ids[b_begin : b_begin + tot_len - a_len]


def sample_mask(
    word_start: np.ndarray,
    mask_alpha: int,
    mask_beta: int,
    goal_num_predict: int,
    rng: np.random.Generator,
    reverse: bool = False,
) -> np.ndarray:
    """Choose the tokens to predict: spans of 1 to MAX_GRAM pieces that begin at a word, P(L) ~ 1/L.

    A span of L pieces lies in a context of L * mask_alpha // mask_beta other pieces, so spans cover about mask_beta
    in mask_alpha + mask_beta pieces. Single pieces drawn from the rest fill up to goal_num_predict.

    word_start: [seg_len] bool, in the row's direction, True = a word begins here
    reverse: the row is read backwards; look for spans from its end
    -> [seg_len] bool, True = masked, exactly goal_num_predict of them
    Source: the paper, section 3.1, "we first sample a length L"; official _sample_mask, which counts a span's pieces
    although its comment says words.
    """
    seg_len = len(word_start)
    assert goal_num_predict <= seg_len and 1 <= mask_beta <= mask_alpha
    mask = np.zeros(seg_len, dtype=bool)
    if reverse:
        word_start = word_start[::-1]
    # next_start[p]: the first word that begins at p or later, seg_len if there is none; p in [0, seg_len]
    start_or_end = np.where(word_start, np.arange(seg_len), seg_len)
    next_start = [*np.minimum.accumulate(start_or_end[::-1])[::-1].tolist(), seg_len]

    weight = 1 / np.arange(1, MAX_GRAM + 1)
    lengths = rng.choice(np.arange(1, MAX_GRAM + 1), size=goal_num_predict, p=weight / weight.sum()).tolist()
    places = rng.random(goal_num_predict).tolist()  # of a span in its context: 0 = at the left end

    num_predict = cur_len = 0
    for length, place in zip(lengths, places, strict=True):
        length = min(length, goal_num_predict - num_predict)
        ctx_size = length * mask_alpha // mask_beta
        l_ctx = int(place * ctx_size)
        beg = next_start[min(cur_len + l_ctx, seg_len)]
        end = beg + length
        if length == 0 or end >= seg_len:
            break
        mask[beg:end] = True
        num_predict += length
        cur_len = end + ctx_size - l_ctx

    unmasked = np.flatnonzero(~mask)
    mask[rng.choice(unmasked, size=goal_num_predict - num_predict, replace=False)] = True
    return mask[::-1] if reverse else mask


def mask_window(
    inp: np.ndarray,
    rest: np.ndarray,
    vocab: Vocabulary,
    num_predict: int,
    mask_alpha: int,
    mask_beta: int,
    rng: np.random.Generator,
    reverse: bool = False,
) -> np.ndarray:
    """Return `sample_mask` of both parts of a window, [seq_len] bool; inp gets the larger half of num_predict."""
    goal_rest = num_predict // 2
    goal_inp = num_predict - goal_rest
    mask_inp = sample_mask(vocab.word_start[inp], mask_alpha, mask_beta, goal_inp, rng, reverse)
    mask_rest = sample_mask(vocab.word_start[rest], mask_alpha, mask_beta, goal_rest, rng, reverse)
    return np.concatenate([mask_inp, mask_rest])


def create_feature(
    row: Row,
    window: int,
    vocab: Vocabulary,
    seq_len: int,
    reuse_len: int,
    num_predict: int,
    mask_alpha: int,
    mask_beta: int,
    rng: np.random.Generator,
) -> dict[str, np.ndarray]:
    """Return the feature of one window of a row.

    Window i begins at token i * reuse_len. Its first reuse_len tokens, inp, are the next stretch of the text and
    become memory. The rest is [A, SEP, B, SEP, CLS], where A continues inp:

        input    inp ... inp   A ... A SEP   B ... B SEP   CLS
        seg_id    0  ...  0    0 ... 0  0    1 ... 1  1     2

    -> dict of input: [seq_len] int64; seg_id: [seq_len] int64; is_masked: [seq_len] bool, exactly num_predict True,
    the larger half of them in inp
    Source: the paper, sections 2.4 and 2.5, where CLS stands first; official create_tfrecords, where it is last.
    """
    begin = window * reuse_len
    inp = row.ids[begin : begin + reuse_len]
    a, b = split_a_and_b(row, begin_idx=begin + reuse_len, tot_len=seq_len - reuse_len - 3, rng=rng)
    rest = np.concatenate([a, [vocab.sep_id], b, [vocab.sep_id, vocab.cls_id]])
    return {
        "input": np.concatenate([inp, rest]),
        "is_masked": mask_window(inp, rest, vocab, num_predict, mask_alpha, mask_beta, rng, reverse=row.backward),
        "seg_id": np.repeat([0, 1, 2], [reuse_len + len(a) + 1, len(b) + 1, 1]),
    }


def create_data(
    row: Row,
    vocab: Vocabulary,
    seq_len: int,
    reuse_len: int,
    num_predict: int,
    mask_alpha: int,
    mask_beta: int,
    rng: np.random.Generator,
) -> Iterator[dict[str, np.ndarray]]:
    """Yield the feature of each window of a row, for tests and benchmarks; training calls `create_feature`."""
    for window in range(n_windows(len(row.ids), seq_len, reuse_len)):
        yield create_feature(row, window, vocab, seq_len, reuse_len, num_predict, mask_alpha, mask_beta, rng)


# ---------------------------------------------------------------- orders


def local_perm(
    is_masked: np.ndarray, functional: np.ndarray, perm_size: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Draw a factorization order; return each position's rank in it, and which positions are targets.

    One order of perm_size positions is drawn; every block of that length uses it, and an earlier block comes before a
    later one. Tokens neither masked nor functional (SEP, CLS) are given from the start: their rank is -1. SEP and CLS
    take part in the order as targets do, but are never predicted. Only positions later in the order see them, and with
    them what they have gathered. `ranks_to_mask` says who sees whom.

    is_masked, functional: [part_len] bool; perm_size divides part_len
    -> rank: [part_len] int64, -1 to part_len - 1; is_target: [part_len] bool, masked and not functional
    Source: the paper, sections 2.2 and 2.3; official _local_perm.
    """
    blocks = np.arange(len(is_masked)).reshape(-1, perm_size)  # [n_block, perm_size]
    rank = blocks[:, rng.permutation(perm_size)].ravel()
    return np.where(is_masked | functional, rank, -1), is_masked & ~functional


def ranks_to_mask(rank: np.ndarray, is_target: np.ndarray) -> np.ndarray:
    """Return the perm_mask that ranks mean: no position sees a higher rank, and no query stream its own token.

    Four tokens, "the cat sat [SEP]", targets "cat" and "sat", order sat (0), [SEP] (1), cat (3); "the" is given (-1):

                 the cat sat SEP        1 = the row must not see the column
            the   0   1   1   1         given: sees given tokens
            cat   0   1   0   0         last: sees all but itself
            sat   0   1   1   1         first: sees given tokens
            SEP   0   1   0   0         second: sees the, sat, and itself

    rank: [len] int; is_target: [len] bool -> perm_mask: [len, len] float32
    Training does not need the matrix: it passes ranks, and xlnet.order_mask makes the mask on the device.
    Source: the paper, section 2.3; official _local_perm. The content stream sees itself in any case.
    """
    highest_seen = rank - is_target
    return (rank > highest_seen[:, None]).astype(np.float32)


def permute(
    feature: dict[str, np.ndarray], reuse_len: int, perm_size: int, num_predict: int, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """Turn a feature of `create_feature` into what the model takes, under a fresh factorization order.

    inp comes before the rest: it sees nothing of the rest, and the rest sees all of inp.

    -> dict of arrays:
        inp_k: [seq_len] int64, the tokens, targets included, for the content stream
        inp_q: [seq_len] float32, 1 = target
        rank: [seq_len] int64, each position's rank: -1 for given tokens of inp, 0 to reuse_len - 1 for its others,
            reuse_len for given tokens of the rest, above that for its others
        target_mapping: [num_predict] int64, the position of each target, -1 in an empty slot
        target: [num_predict] int64, the token there, 0 in an empty slot
        target_mask: [num_predict] float32, 1 = target, 0 = empty slot; a masked SEP or CLS leaves its slot empty
        seg_id: [seq_len] int64
    Source: official get_dataset, parser.
    """
    inp_k, is_masked, seg_id = feature["input"], feature["is_masked"], feature["seg_id"]
    functional = np.append(seg_id[1:] != seg_id[:-1], True)  # SEP ends A, SEP ends B, CLS is a segment of its own
    inp, rest = slice(reuse_len), slice(reuse_len, None)
    rank_inp, target_inp = local_perm(is_masked[inp], functional[inp], perm_size, rng)
    rank_rest, target_rest = local_perm(is_masked[rest], functional[rest], perm_size, rng)
    is_target = np.concatenate([target_inp, target_rest])

    filled = np.arange(num_predict) < is_target.sum()  # empty slots are at the end
    target_mapping = np.full(num_predict, -1)
    target_mapping[filled] = np.flatnonzero(is_target)
    return {
        "inp_k": inp_k,
        "inp_q": is_target.astype(np.float32),
        "rank": np.concatenate([rank_inp, reuse_len + 1 + rank_rest]),
        "target_mapping": target_mapping,
        "target": np.where(filled, inp_k[target_mapping], 0),
        "target_mask": filled.astype(np.float32),
        "seg_id": seg_id,
    }


def make_permute(
    feature: dict[str, np.ndarray],
    reuse_len: int,
    seq_len: int,
    perm_size: int,
    num_predict: int,
    rng: np.random.Generator | int | None = None,
) -> dict[str, torch.Tensor]:
    """Do what `permute` does, with the order written out as a mask. Training passes ranks instead.

    rng: numpy Generator, or a seed for a new one
    -> dict of tensors as in `permute`, but perm_mask instead of rank: [seq_len, seq_len] float32, 1 = position i must
    not see position j
    """
    arrays = permute(feature, reuse_len, perm_size, num_predict, np.random.default_rng(rng))
    arrays["perm_mask"] = ranks_to_mask(arrays.pop("rank"), arrays["inp_q"])
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


# ---------------------------------------------------------------- batches


class Loader:
    """The batches of a text, one for each step.

    The text is cut into n_rows rows that take turns: a step reads one window of each of the batch_size rows whose turn
    it is. A pass reads every window once. With two turns:

        step     0  1  2  3  4 ...
        turn     0  1  0  1  0
        window   0  0  1  1  2

    The example of a row at a step depends only on the text, the seed, the row and the number of its earlier visits. So
    batches can be made in any order, and by any number of processes.

    text: its ids and sentence boundaries; vocab: the Vocabulary of the ids
    n_rows: a multiple of batch_size; both count forward and backward rows
    members: the places, 0 to batch_size - 1, of the rows to load; None = all. Memory of a row goes with its place
    Raises ValueError if the text has too few tokens for a window in each row.
    """

    def __init__(
        self,
        text: Text,
        vocab: Vocabulary,
        *,
        n_rows: int,
        batch_size: int,
        bi_data: bool,
        seq_len: int,
        reuse_len: int,
        perm_size: int,
        num_predict: int,
        mask_alpha: int,
        mask_beta: int,
        seed: int,
        members: Sequence[int] | None = None,
    ):
        self.vocab, self.seed, self.batch_size = vocab, seed, batch_size
        self.seq_len, self.reuse_len, self.perm_size = seq_len, reuse_len, perm_size
        self.num_predict, self.mask_alpha, self.mask_beta = num_predict, mask_alpha, mask_beta
        self.members = list(range(batch_size)) if members is None else members
        self.turns = batchify(text.ids, text.cuts, n_rows, batch_size, bi_data)
        windows = n_windows(len(self.turns[0][0].ids), seq_len, reuse_len)
        if windows == 0:
            needed = seq_len * (n_rows // 2 if bi_data else n_rows)
            remedy = "give more text, or a smaller --seq_len"
            if needed > seq_len:
                remedy += " or --rows" if n_rows > batch_size else " or --batch_size"
            raise ValueError(
                f"has {len(text.ids)} tokens and needs {needed}, a window of --seq_len {seq_len} for each row; {remedy}"
            )
        self.pass_len = windows * len(self.turns)  # steps

    def turn(self, step: int) -> int:
        """Return which turn of rows a step reads, 0 to len(turns) - 1."""
        return step % len(self.turns)

    def batch(self, step: int) -> dict[str, torch.Tensor]:
        """Return the batch of a step: the examples of its rows, stacked along a last axis, bsz; {} without members."""
        if not self.members:
            return {}
        rows, window = self.turns[self.turn(step)], step % self.pass_len // len(self.turns)
        examples = []
        for member in self.members:
            row = rows[member]
            rng = np.random.default_rng([self.seed, step // len(self.turns), row.number])
            examples.append(self.example(row, window, rng))
        return {
            name: torch.from_numpy(np.stack([example[name] for example in examples], axis=-1)) for name in examples[0]
        }

    def example(self, row: Row, window: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Return one window of a row as `permute` gives it. A variant of the data overrides this method."""
        feature = create_feature(
            row,
            window,
            self.vocab,
            self.seq_len,
            self.reuse_len,
            self.num_predict,
            self.mask_alpha,
            self.mask_beta,
            rng,
        )
        return permute(feature, self.reuse_len, self.perm_size, self.num_predict, rng)


def prefetch(loader: Loader, steps: range, device: torch.device) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the batch of each step, on the device; a thread makes the next one while the caller uses this one."""
    asynchronous = device.type in ("cuda", "xpu")  # copies from pinned memory, while the thread goes on

    def make(step):
        batch = loader.batch(step)
        if asynchronous:
            batch = {name: tensor.pin_memory() for name, tensor in batch.items()}
        return {name: tensor.to(device, non_blocking=asynchronous) for name, tensor in batch.items()}

    with ThreadPoolExecutor(max_workers=1) as thread:
        coming = deque(thread.submit(make, step) for step in steps[:1])
        for step in steps:
            if step + 1 in steps:
                coming.append(thread.submit(make, step + 1))
            yield coming.popleft().result()
