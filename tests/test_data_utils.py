"""The pipeline by its properties, for any legal flags, and against the official code's loops written out."""

import math
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import data_utils
from data_utils import Loader, Row, prefetch
from support.corpus import Text, Vocabulary

SEP, CLS = 98, 99
N_TOKEN = 100
SIZES = dict(seq_len=32, reuse_len=16, num_predict=6, mask_alpha=6, mask_beta=1)


def make_row(rng, row_len, word_share=0.7, sentence=12, backward=False):
    """Return a row of random ids below SEP, sentences of about `sentence` tokens, and a vocabulary for it."""
    word_start = rng.random(N_TOKEN) < word_share
    word_start[[SEP, CLS]] = True
    cuts = np.flatnonzero(rng.random(row_len) < 1 / sentence)
    row = Row(rng.integers(SEP, size=row_len), cuts[cuts > 0], backward)
    return row, Vocabulary(N_TOKEN, SEP, CLS, None, None, 0, CLS, SEP, word_start, "")


@st.composite
def legal_flags(draw):
    """Any flags that support.flags.check lets pass, on small windows."""
    perm_size = draw(st.integers(1, 8))
    reuse_len = perm_size * draw(st.integers(1, 6))
    other_len = perm_size * draw(st.integers(-(-4 // perm_size), 4 + -(-4 // perm_size)))
    mask_beta = draw(st.integers(1, 4))
    return dict(
        seq_len=reuse_len + other_len,
        reuse_len=reuse_len,
        perm_size=perm_size,
        num_predict=draw(st.integers(1, min(2 * reuse_len, 2 * other_len + 1))),
        mask_beta=mask_beta,
        mask_alpha=draw(st.integers(mask_beta, 10)),
    )


@settings(max_examples=300, deadline=None)
@given(legal_flags(), st.integers(0, 2**32), st.integers(0, 40), st.integers(1, 30), st.booleans())
def test_every_window_is_as_designed(flags, seed, extra, sentence, backward):
    """Lengths, segments in order, SEP and CLS in place, targets equal to the tokens there, empty slots weightless."""
    rng = np.random.default_rng(seed)
    seq_len, reuse_len, num_predict = flags["seq_len"], flags["reuse_len"], flags["num_predict"]
    row, vocab = make_row(rng, seq_len + extra, sentence=sentence, backward=backward)
    perm_size = flags.pop("perm_size")
    features = list(data_utils.create_data(row, vocab, rng=rng, **flags))
    assert len(features) == extra // reuse_len + 1
    for i, feature in enumerate(features):
        ids, seg_id, is_masked = feature["input"], feature["seg_id"], feature["is_masked"]
        assert len(ids) == len(seg_id) == len(is_masked) == seq_len
        assert np.array_equal(ids[:reuse_len], row.ids[i * reuse_len : (i + 1) * reuse_len])
        assert (np.diff(seg_id) >= 0).all() and set(seg_id) == {0, 1, 2} and (seg_id == 2).sum() == 1
        assert not seg_id[:reuse_len].any()
        sep_a = np.flatnonzero(seg_id == 0)[-1]
        assert [ids[sep_a], *ids[-2:]] == [SEP, SEP, CLS] and np.isin(ids, [SEP, CLS]).sum() == 3
        a = ids[reuse_len:sep_a]  # A goes on from inp
        assert len(a) > 0 and np.array_equal(a, row.ids[(i + 1) * reuse_len :][: len(a)])
        assert is_masked.sum() == num_predict
        assert is_masked[:reuse_len].sum() == num_predict - num_predict // 2

        batch = data_utils.make_permute(feature, reuse_len, seq_len, perm_size, num_predict, rng)
        check_permutation(batch, feature, reuse_len, perm_size, num_predict)


def check_permutation(batch, feature, reuse_len, perm_size, num_predict):
    """Hold make_permute's result against its definition, position by position."""
    seq_len = len(feature["input"])
    shapes = dict(
        inp_k=(seq_len,),
        inp_q=(seq_len,),
        perm_mask=(seq_len, seq_len),
        target_mapping=(num_predict,),
        target=(num_predict,),
        target_mask=(num_predict,),
        seg_id=(seq_len,),
    )
    assert {key: tuple(tensor.shape) for key, tensor in batch.items()} == shapes
    functional = np.isin(feature["input"], [SEP, CLS])
    is_target = feature["is_masked"] & ~functional
    in_order = feature["is_masked"] | functional
    filled = int(is_target.sum())
    assert batch["target_mapping"].tolist() == [*np.flatnonzero(is_target), *[-1] * (num_predict - filled)]
    assert batch["target"][:filled].tolist() == feature["input"][is_target].tolist()
    assert not batch["target"][filled:].any()
    assert batch["target_mask"].tolist() == [1] * filled + [0] * (num_predict - filled)
    assert batch["inp_q"].tolist() == is_target.tolist()
    assert batch["inp_k"].tolist() == feature["input"].tolist()  # no mask token is ever fed in

    sees = batch["perm_mask"].numpy() == 0
    assert not sees[:reuse_len, reuse_len:].any() and sees[reuse_len:, :reuse_len].all()
    for part in (range(reuse_len), range(reuse_len, seq_len)):
        for i in part:
            for j in part:
                if not in_order[j]:  # a given token is seen by all
                    assert sees[i, j]
                elif not in_order[i]:  # and sees no other
                    assert not sees[i, j]
                elif i == j:
                    assert sees[i, i] == functional[i]
                else:  # of two in the order exactly one comes first; the later block is the later one
                    assert sees[i, j] != sees[j, i]
                    block_i, block_j = (i - part[0]) // perm_size, (j - part[0]) // perm_size
                    if block_i != block_j:
                        assert sees[i, j] == (block_i > block_j)
        # an order has no circles: the numbers of those seen are all different
        ranks = [sum(sees[i, j] for j in part if in_order[j] and j != i) for i in part if in_order[i]]
        assert sorted(ranks) == list(range(len(ranks)))


def test_mask_of_four_tokens_by_hand():
    """The example of ranks_to_mask's docstring: "the cat sat [SEP]" in the order sat, [SEP], cat."""

    class Order:
        def permutation(self, n):
            assert n == 4
            return np.array([2, 3, 0, 1])  # the place of the, cat, sat, [SEP] in the order

    rank, is_target = data_utils.local_perm(
        np.array([False, True, True, False]), np.array([False, False, False, True]), perm_size=4, rng=Order()
    )
    assert rank.tolist() == [-1, 3, 0, 1]
    mask = data_utils.ranks_to_mask(rank, is_target)
    assert mask.astype(int).tolist() == [[0, 1, 1, 1], [0, 1, 0, 0], [0, 1, 1, 1], [0, 1, 0, 0]]
    assert is_target.tolist() == [False, True, True, False]


def test_orders_are_shared_by_blocks_and_fresh_at_each_visit():
    """Every block of perm_size has the same order; all 6 orders of 3 are about equally frequent."""
    rng = np.random.default_rng(0)
    everything, nothing = np.ones(9, dtype=bool), np.zeros(9, dtype=bool)
    counts = {}
    for _ in range(6000):
        mask = data_utils.ranks_to_mask(*data_utils.local_perm(everything, nothing, perm_size=3, rng=rng))
        blocks = [mask[b : b + 3, b : b + 3] for b in (0, 3, 6)]
        assert (blocks[0] == blocks[1]).all() and (blocks[0] == blocks[2]).all()
        order = tuple(mask[:3, :3].sum(axis=1))
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 6
    assert all(abs(count - 1000) < 5 * math.sqrt(6000 / 6 * 5 / 6) for count in counts.values())


# ---------------------------------------------------------------- segments


def split_by_scanning(row, begin_idx, tot_len, rng):
    """The official loops over single tokens, with the draws in the order of data_utils.split_a_and_b."""
    data_len = len(row.ids)
    starts = np.isin(np.arange(data_len + 1), row.cuts)
    cut_points, end_idx = [], begin_idx + 1
    while end_idx < data_len:
        if starts[end_idx]:
            if end_idx - begin_idx >= tot_len:
                break
            cut_points.append(end_idx)
        end_idx += 1
    a_end = rng.choice(np.array(cut_points)) if cut_points else end_idx
    if cut_points and rng.random() < 0.5:
        b_begin, b_end = a_end, end_idx
    else:
        b_len = max(1, tot_len - (a_end - begin_idx))
        b_begin = rng.integers(data_len - b_len + 1)
        b_end = b_begin + b_len
        while b_begin > 0 and not starts[b_begin]:
            b_begin -= 1
        while b_end < data_len and not starts[b_end]:
            b_end += 1
    while a_end - begin_idx + b_end - b_begin > tot_len:
        if a_end - begin_idx > b_end - b_begin:
            a_end -= 1
        else:
            b_end -= 1
    return row.ids[begin_idx:a_end], row.ids[b_begin:b_end]


@settings(max_examples=500, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 60), st.integers(0, 60), st.integers(1, 40), st.integers(1, 40))
def test_segments_equal_the_official_loops(seed, tot_len, begin_idx, extra, sentence):
    """Binary search and arithmetic give what scanning and trimming one token at a time gives."""
    row, _ = make_row(np.random.default_rng(seed), begin_idx + tot_len + extra, sentence=sentence)
    ours = data_utils.split_a_and_b(row, begin_idx, tot_len, np.random.default_rng(seed))
    official = split_by_scanning(row, begin_idx, tot_len, np.random.default_rng(seed))
    assert np.array_equal(ours[0], official[0]) and np.array_equal(ours[1], official[1])
    assert len(ours[0]) + len(ours[1]) == tot_len and len(ours[0]) > 0


def test_b_follows_a_half_of_the_time():
    """Over 20,000 draws where there is a cut, within five standard errors; never where there is none."""
    rng = np.random.default_rng(1)
    cuts = np.arange(10, 100_000, 10)
    row = Row(np.arange(100_000), cuts, backward=False)
    follows = 0
    for _ in range(20_000):
        a, b = data_utils.split_a_and_b(row, 5000, 40, rng)
        assert (b[0] % 10 == 0) and 1 <= len(a) <= 39
        follows += 5000 < b[0] < 5040
    # a random B begins there with a probability of 4 in 10,000
    assert abs(follows / 20_000 - 0.5) < 5 * math.sqrt(0.25 / 20_000) + 4e-4
    uncut = Row(np.arange(100_000), np.array([200, 70_000]), backward=False)
    assert not any(5000 < data_utils.split_a_and_b(uncut, 5000, 40, rng)[1][0] < 5040 for _ in range(200))


# ---------------------------------------------------------------- span masks


def sample_mask_by_scanning(word_start, mask_alpha, mask_beta, goal, rng, reverse):
    """The official loops over single tokens, with the draws in the order of data_utils.sample_mask."""
    seg_len = len(word_start)
    starts = list(word_start[::-1] if reverse else word_start)
    mask = [False] * seg_len
    pvals = [1 / n for n in range(1, 6)]
    lengths = rng.choice(np.arange(1, 6), size=goal, p=np.array(pvals) / sum(pvals))
    places = rng.random(goal)
    draw = num_predict = cur_len = 0
    spans = []
    while cur_len < seg_len and num_predict < goal:
        n = min(int(lengths[draw]), goal - num_predict)
        ctx_size = (n * mask_alpha) // mask_beta
        l_ctx = int(places[draw] * ctx_size)
        draw += 1
        beg = cur_len + l_ctx
        while beg < seg_len and not starts[beg]:
            beg += 1
        if beg >= seg_len or beg + n >= seg_len:
            break
        spans.append((beg, n))
        for i in range(beg, beg + n):
            mask[i] = True
        num_predict += n
        cur_len = beg + n + ctx_size - l_ctx
    free = [i for i in range(seg_len) if not mask[i]]
    for i in rng.choice(free, size=goal - num_predict, replace=False):
        mask[i] = True
    return np.array(mask[::-1] if reverse else mask), spans


@settings(max_examples=500, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 80), st.floats(0, 1), st.integers(1, 4), st.integers(0, 6), st.booleans())
def test_masks_equal_the_official_loops(seed, seg_len, word_share, mask_beta, more, reverse):
    """Also on text without a single word start, and with every token to be predicted."""
    rng = np.random.default_rng(seed)
    word_start = rng.random(seg_len) < word_share
    goal = int(rng.integers(0, seg_len + 1))
    arguments = (word_start, mask_beta + more, mask_beta, goal)
    ours = data_utils.sample_mask(*arguments, np.random.default_rng(seed), reverse=reverse)
    official, spans = sample_mask_by_scanning(*arguments, np.random.default_rng(seed), reverse)
    assert np.array_equal(ours, official) and ours.sum() == goal
    read = ours[::-1] if reverse else ours
    text = word_start[::-1] if reverse else word_start
    for beg, n in spans:
        assert text[beg] and read[beg : beg + n].all()


def test_span_lengths_follow_one_over_length():
    """Over 20,000 spans in text of whole words: P(L) ~ 1/L, L in 1..5, each within five standard errors."""
    rng = np.random.default_rng(2)
    counts = np.zeros(7)
    while counts.sum() < 20_000:
        # far more room than the goal needs: no single pieces are filled in, and spans never touch each other
        mask = data_utils.sample_mask(np.ones(20_000, dtype=bool), 6, 1, 1000, rng)
        edges = np.flatnonzero(np.diff(np.concatenate([[0], mask, [0]])))
        lengths = edges[1::2] - edges[::2]
        counts += np.bincount(lengths[:-1], minlength=7)  # the last span is cut to reach the goal
    expected = np.array([1 / n for n in range(1, 6)]) / sum(1 / n for n in range(1, 6))
    assert counts[0] == counts[6] == 0
    share = counts[1:6] / counts.sum()
    assert (abs(share - expected) < 5 * np.sqrt(expected * (1 - expected) / counts.sum())).all()


def test_spans_begin_at_words_and_end_where_their_length_says():
    """With words of three pieces every span begins at a multiple of three, read from the end if reversed."""
    rng = np.random.default_rng(3)
    word_start = np.arange(3000) % 3 == 0
    for reverse in (False, True):
        starts = word_start[::-1] if reverse else word_start  # how such words lie in a backward row
        mask = data_utils.sample_mask(starts, 6, 1, 100, rng, reverse=reverse)
        read = mask[::-1] if reverse else mask
        begins = np.flatnonzero(np.diff(np.concatenate([[0], read.astype(int)])) == 1)
        assert len(begins) > 20 and (begins % 3 == 0).all()


# ---------------------------------------------------------------- rows


def cuts_of(row):
    return [row.cut(i) for i in range(len(row.cuts))]


def test_batchify_cuts_like_the_official_code():
    """Contiguous rows of equal length, then with bi_data the same ones reversed, sentences and all."""
    ids, cuts = np.arange(20, 33), np.array([2, 4, 6, 9])
    [plain] = data_utils.batchify(ids, cuts, n_rows=2, batch_size=2, bi_data=False)
    assert [row.ids.tolist() for row in plain] == [list(range(20, 26)), list(range(26, 32))]
    assert [cuts_of(row) for row in plain] == [[2, 4], [3]] and not any(row.backward for row in plain)

    [both] = data_utils.batchify(ids, cuts, n_rows=4, batch_size=4, bi_data=True)
    assert [row.ids.tolist() for row in both[:2]] == [row.ids.tolist() for row in plain]
    assert [row.ids.tolist() for row in both[2:]] == [row.ids[::-1].tolist() for row in plain]
    assert [row.backward for row in both] == [False, False, True, True]
    for forward, backward in zip(both[:2], both[2:], strict=True):
        sentences = np.split(forward.ids, cuts_of(forward))
        backwards = np.split(backward.ids, cuts_of(backward))
        assert [s.tolist() for s in backwards] == [s[::-1].tolist() for s in sentences[::-1]]


@pytest.mark.parametrize("bi_data", [False, True])
def test_rows_take_turns(bi_data):
    """Turn after turn, the forward rows are the text in its order; with bi_data each has its backward twin."""
    ids, cuts = np.arange(100), np.arange(3, 100, 7)
    turns = data_utils.batchify(ids, cuts, n_rows=12, batch_size=4, bi_data=bi_data)
    assert [len(turn) for turn in turns] == [4, 4, 4]
    forward = [row for turn in turns for row in (turn[:2] if bi_data else turn)]
    assert np.concatenate([row.ids for row in forward]).tolist() == list(range(96))
    for turn in turns if bi_data else ():
        assert [row.backward for row in turn] == [False, False, True, True]
        assert all(row.ids.tolist() == twin.ids[::-1].tolist() for row, twin in zip(turn[:2], turn[2:], strict=True))


@pytest.mark.parametrize(
    "n_rank, bi_data, expected",
    [(1, False, [[0, 1, 2, 3]]), (2, False, [[0, 1], [2, 3]]), (2, True, [[0, 2], [1, 3]]), (1, True, [[0, 1, 2, 3]])],
)
def test_processes_share_the_rows(n_rank, bi_data, expected):
    """Each place belongs to one process; with bi_data a process has as many forward rows as their backward twins."""
    parts = [data_utils.members_of_process(4, bi_data, rank, n_rank) for rank in range(n_rank)]
    assert parts == expected
    larger = [data_utils.members_of_process(24, bi_data, rank, 3) for rank in range(3)]
    assert sorted(sum(larger, [])) == list(range(24))
    for part in larger:
        assert len(part) == 8 and part == sorted(part)
        if bi_data:
            assert [place + 12 for place in part[:4]] == part[4:]


@pytest.mark.parametrize("world_size, sizes", [(3, [2, 1, 1]), (5, [1, 1, 1, 1, 0])])
def test_rows_that_cannot_be_shared_evenly(world_size, sizes):
    """Each row still belongs to one process, its backward twin to the same; the last processes have fewer, or none."""
    parts = [data_utils.members_of_process(4, False, rank, world_size) for rank in range(world_size)]
    assert [len(part) for part in parts] == sizes and sum(parts, []) == [0, 1, 2, 3]
    both = [data_utils.members_of_process(8, True, rank, world_size) for rank in range(world_size)]
    assert both == [part + [4 + place for place in part] for part in parts]


@given(st.integers(100, 300_000), st.integers(1, 40), st.booleans())
def test_rows_of_an_evaluation(n_tokens, batch_size, bi_data):
    """As many as the text allows at 32 windows a row, whatever the batch; as many together as the batch allows."""
    directions = 2 if bi_data else 1
    n_rows, together = data_utils.evaluation_rows(n_tokens, directions * batch_size, bi_data, 32, 16)
    assert n_rows == data_utils.evaluation_rows(n_tokens, directions, bi_data, 32, 16)[0]
    assert n_rows % together == 0 and n_rows in [directions * n for n in (1, 2, 4, 8, 16)]
    if n_rows > directions:
        assert data_utils.n_windows(n_tokens * directions // n_rows, 32, 16) >= 32
    if n_rows < 16 * directions:  # twice as many rows would be too short, or the text is
        assert data_utils.n_windows(n_tokens * directions // (2 * n_rows), 32, 16) < 32
    assert together <= directions * batch_size and (2 * together > directions * batch_size or together == n_rows)


# ---------------------------------------------------------------- batches


def make_loader(n_tokens=2000, seed=0, changed=None, twice=False, **flags):
    """Return a loader of a random text.

    changed: begin and end of a stretch of it that is different; twice: after the text comes the same text again
    """
    row, vocab = make_row(np.random.default_rng(0), n_tokens)
    ids, cuts = row.ids.copy(), row.cuts
    if changed:
        begin, end = changed
        ids[begin:end] = (ids[begin:end] + 1) % SEP
    if twice:
        ids, cuts = np.tile(ids, 2), np.concatenate([cuts, cuts + n_tokens])
    text = Text(ids, cuts, cuts[:0], np.bincount(ids, minlength=N_TOKEN), "")
    flags = {"n_rows": 2, "batch_size": 2, "bi_data": False} | flags
    return Loader(text, vocab, seed=seed, perm_size=8, **SIZES, **flags)


def same(batch, other):
    return batch.keys() == other.keys() and all(torch.equal(batch[name], other[name]) for name in batch)


def column(batch, member):
    return {name: tensor[:, member] for name, tensor in batch.items()}


def test_batches_stack_rows_and_are_made_lazily():
    """Member b of a batch is the next window of row b; making one batch reads only that."""
    loader = make_loader(10_000_000, n_rows=4, batch_size=4, bi_data=True)
    [rows] = loader.turns
    shapes = {"inp_k": 32, "inp_q": 32, "rank": 32, "seg_id": 32, "target_mapping": 6, "target": 6, "target_mask": 6}
    begin = time.process_time()
    for window in range(2):
        batch = loader.batch(window)
        assert {name: tuple(tensor.shape) for name, tensor in batch.items()} == {k: (n, 4) for k, n in shapes.items()}
        for b in range(4):
            part = rows[b].ids[16 * window : 16 * window + 16]
            assert torch.equal(batch["inp_k"][:16, b], torch.from_numpy(part.copy()))
    assert time.process_time() - begin < 1
    assert make_loader(200, n_rows=4, batch_size=4, bi_data=True).pass_len == (100 - 32) // 16 + 1


def test_turns_and_windows_by_hand():
    """Rows of three turns, five windows each: every step reads the next window of the next turn, and then anew."""
    loader = make_loader(6 * 100, n_rows=6, batch_size=2)
    ids = np.concatenate([row.ids for turn in loader.turns for row in turn])
    assert loader.pass_len == 15 and len(loader.turns) == 3
    by_hand = [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1), (0, 2), (1, 2), (2, 2), (0, 3), (1, 3), (2, 3), (0, 4)]
    by_hand += [(1, 4), (2, 4), (0, 0), (1, 0)]
    for step, (turn, window) in enumerate(by_hand):
        assert loader.turn(step) == turn
        inp_k = loader.batch(step)["inp_k"]
        for member in range(2):
            begin = 100 * (2 * turn + member) + 16 * window
            assert inp_k[:16, member].tolist() == ids[begin : begin + 16].tolist()


def test_a_batch_depends_on_text_seed_step_and_place_alone():
    """Batches are the same again, in any order, from another loader; each of the four changes them."""
    loader = make_loader(n_rows=4)
    batches = [loader.batch(step) for step in range(6)]
    torch.manual_seed(1)  # global generators have no part in it
    np.random.seed(1)
    again = make_loader(n_rows=4)
    for step in (5, 0, 3, 3, 1):
        assert same(again.batch(step), batches[step]) and same(loader.batch(step), batches[step])

    other_seed, next_pass = make_loader(n_rows=4, seed=1).batch(2), loader.batch(2 + loader.pass_len)
    for other in (other_seed, next_pass):  # the same stretch of text, with other targets and another order
        assert torch.equal(other["inp_k"][:16], batches[2]["inp_k"][:16])
        assert not torch.equal(other["rank"], batches[2]["rank"])
    twins = make_loader(twice=True).batch(0)  # two rows of the same text
    assert torch.equal(*twins["inp_k"][:16].T)
    assert not torch.equal(*twins["rank"].T) and not torch.equal(*twins["inp_q"].T)

    # The rows of the first turn are the first and the second 500 tokens.
    changed = make_loader(n_rows=4, changed=(500, 1000)).batch(2)
    assert same(column(changed, 0), column(batches[2], 0)) and not same(column(changed, 1), column(batches[2], 1))


@pytest.mark.parametrize("bi_data", [False, True])
def test_rows_are_the_same_in_batches_of_any_size(bi_data):
    """A row gives the same windows, targets and orders, however many others a step reads beside it."""

    def windows(batch_size):
        loader = make_loader(n_rows=8, batch_size=batch_size, bi_data=bi_data)
        found = {}
        for step in range(loader.pass_len + 2 * len(loader.turns)):
            batch, rows = loader.batch(step), loader.turns[loader.turn(step)]
            for member, row in enumerate(rows):
                found[row.number, step // len(loader.turns)] = column(batch, member)
        return found

    whole, parts = windows(8), windows(2)
    assert whole.keys() == parts.keys() and {number for number, _ in whole} == set(range(8))
    assert all(same(whole[key], parts[key]) for key in whole)
    assert not same(whole[0, 0], whole[1, 0])


def test_a_process_without_a_row_has_empty_batches():
    """As in the evaluation of a short text by many processes; it makes as many steps as the others."""
    loader = make_loader(members=[])
    assert loader.pass_len == make_loader().pass_len
    assert list(prefetch(loader, range(3), torch.device("cpu"))) == [{}] * 3


@pytest.mark.parametrize("bi_data", [False, True])
def test_a_share_of_the_members_gives_the_same_columns(bi_data):
    """What one process of several loads is its part of the whole batch; the rows of a batch are not alike."""
    whole = make_loader(n_rows=8, batch_size=4, bi_data=bi_data)
    for members in ([0, 2], [1, 3], [3], [2, 1]):
        share = make_loader(n_rows=8, batch_size=4, bi_data=bi_data, members=members)
        assert share.pass_len == whole.pass_len
        for step in (0, 1, 5):
            batch = whole.batch(step)
            assert same({name: tensor[:, members] for name, tensor in batch.items()}, share.batch(step))
            assert len(batch["rank"].unique(dim=1)[0]) == 4


@pytest.mark.parametrize(
    "n_tokens, flags, message",
    [
        (63, {}, "has 63 tokens and needs 64, a window of --seq_len 32 .* smaller --seq_len or --batch_size"),
        (127, {"n_rows": 4}, "has 127 tokens and needs 128, .* smaller --seq_len or --rows"),
        (31, {"bi_data": True}, "has 31 tokens and needs 32, .* or a smaller --seq_len$"),
    ],
)
def test_a_text_that_is_too_short(n_tokens, flags, message):
    """The error says how many tokens there are, how many are needed, and what else would do; one more is enough."""
    with pytest.raises(ValueError, match=message):
        make_loader(n_tokens, **flags)
    assert make_loader(n_tokens + 1, **flags).pass_len == flags.get("n_rows", 2) // 2


class Recorder:
    """A loader whose batch is the number of the step; it records the steps made and by which thread."""

    def __init__(self):
        self.made, self.threads = [], set()

    def batch(self, step):
        if step == 13:
            raise RuntimeError("thirteen")
        self.made.append(step)
        self.threads.add(threading.current_thread())
        return {"step": torch.tensor(step)}


def wait_until(condition):
    """Return whether a condition becomes true within five seconds."""
    deadline = time.monotonic() + 5
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.001)
    return condition()


def test_prefetch_yields_the_batches_in_order():
    """Every step of a range once, wherever it begins; no step, no batch; an error of the loader reaches the caller."""
    cpu = torch.device("cpu")
    assert [int(batch["step"]) for batch in prefetch(Recorder(), range(3, 9), cpu)] == [3, 4, 5, 6, 7, 8]
    assert list(prefetch(Recorder(), range(4, 4), cpu)) == []
    loader = make_loader()
    for step, batch in enumerate(prefetch(loader, range(loader.pass_len), cpu)):
        assert same(batch, loader.batch(step)) and all(tensor.device == cpu for tensor in batch.values())
    batches = prefetch(Recorder(), range(11, 20), cpu)
    assert [int(next(batches)["step"]) for _ in range(2)] == [11, 12]
    with pytest.raises(RuntimeError, match="thirteen"):
        next(batches)


def test_prefetch_is_one_batch_ahead():
    """Another thread makes the next batch while the caller has this one, and nothing beyond it."""
    loader = Recorder()
    batches = prefetch(loader, range(5), torch.device("cpu"))
    assert loader.made == []
    for step in range(5):
        next(batches)
        coming = list(range(min(step + 2, 5)))
        assert wait_until(lambda coming=coming: loader.made == coming)
        time.sleep(0.02)
        assert loader.made == coming
    assert len(loader.threads) == 1 and threading.main_thread() not in loader.threads


def test_closing_prefetch_early_ends_its_thread():
    """Also where the caller stops in the middle of the range."""
    loader = Recorder()
    batches = prefetch(loader, range(1000), torch.device("cpu"))
    next(batches)
    [thread] = loader.threads
    assert thread.is_alive()
    batches.close()
    assert not thread.is_alive() and loader.made in ([0], [0, 1])
