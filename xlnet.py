"""XLNet: a Transformer-XL that predicts tokens in any order, with two streams of attention.

The content stream `h` encodes every position with its token; the query stream `g` encodes a position without looking
at its token, and makes the prediction there. Both streams share all weights; `g` is dropped after pretraining.
A layer runs both as one tensor of queries, h before g. The streams differ only in which keys a query may see.
Sources: the paper, arXiv:1906.08237, sections 2.3 to 2.5; Transformer-XL, arXiv:1901.02860, section 3.3 and
appendix B; zihangdai/xlnet, modeling.py ("official" below). The official names are kept: `r_w_bias` and `r_r_bias`
are Transformer-XL's u and v.

Axes, in every einsum, and in the comments on shapes:
    i  query (n_query): the qlen positions of the content stream, then the num_predict slots of the query stream
    j  key (klen = mlen + qlen): the memory, then the content stream
    r  relative distance (rlen), from klen down
    b  batch (bsz)                                 n  head (n_head)
    d  width of a head (d_head)                    h  width of the model (d_model)
    f  frequency (n_frequency)                     s  sine or cosine (2)
"""

import functools
import itertools
import json
import math
import pickle
import reprlib
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

ACTIVATIONS = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": functools.partial(F.gelu, approximate="tanh"),  # the official code's gelu
}
BLOCKED = -1e30  # added to a score, it makes the softmax exactly 0 (official)
SEGMENTS = 8  # segment ids are below 8; three are used, and matrix units are faster with multiples of 8
LOCAL_DISTANCES = (-1, 1, -2, 2, -3, 3, -4, 4)  # query minus key: 1 is the token before, -1 the one after


# ---------------------------------------------------------------- relative positions


def frequencies(d_model: int) -> Tensor:
    """Return the angular frequencies of the position features, from 1 down, in radians per token: [d_model / 2]."""
    return 10000 ** (-torch.arange(0, d_model, 2, dtype=torch.float64) / d_model)


def position_features(x: Tensor, frequency: Tensor) -> Tensor:
    """Return the sines, then the cosines, of positions or distances.

    x: [...], in tokens; frequency: [n_frequency], float64, in radians per token -> [..., 2 n_frequency], float64
    """
    angle = x[..., None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


@functools.lru_cache(maxsize=32)
def few_frequencies(reach: int, d_model: int) -> tuple[Tensor, Tensor]:
    """Return the frequencies that suffice for distances up to `reach`, and how all others follow from them.

    Neighbouring low frequencies differ so little within `reach` that few of them determine the others. The sine of each
    frequency is a weighted sum of the sines of the few, to 5e-7, and its cosine is the same sum of their cosines. For
    896 tokens and width 768, 136 of 384 suffice. QR with column pivoting finds them: the next frequency is always the
    one that the chosen ones explain least.

    -> frequency [n_frequency]; mix [n_frequency, d_model / 2], the weights of the chosen ones in each frequency
    """
    frequency = frequencies(d_model)
    waves = torch.cat(position_features(torch.arange(reach + 1), frequency).chunk(2, dim=1))  # [.., d_model / 2]
    rest = torch.linalg.qr(waves, mode="r").R  # the same inner products in fewer rows
    chosen: list[int] = []
    enough = 3e-7 * rest.norm(dim=0).max()
    while len(chosen) < len(frequency):
        size = rest.norm(dim=0)
        if size.max() < enough and len(chosen) % 4 == 0:  # fused kernels need a multiple of 8 features
            break
        chosen.append(int(size.argmax()))
        direction = F.normalize(rest[:, chosen[-1]], dim=0)
        rest = rest - torch.outer(direction, direction @ rest)
    chosen.sort()
    return frequency[chosen], torch.linalg.lstsq(waves[:, chosen], waves).solution


@torch.compiler.disable
@functools.lru_cache(maxsize=32)
def position_tables(klen: int, d_model: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the features of all key positions and the mix of `few_frequencies`.

    -> [klen, 2 n_frequency], [n_frequency, d_model / 2]
    Positions are counted from the middle key.
    """
    reach = 64 * math.ceil(klen / 64)  # similar lengths share the frequencies, which take a moment to find
    frequency, mix = few_frequencies(reach, d_model)
    features = position_features(torch.arange(klen) - klen // 2, frequency)
    return features.to(dtype).to(device), mix.to(dtype).to(device)  # first the type: a Mac's GPU has no float64


def rotate(x: Tensor, features: Tensor) -> Tensor:
    """Turn the factors of a distance's features into the factors of a key's position features.

    A score is a sum over the frequencies w. For query i and key j:

        A sin(w (i - j)) + B cos(w (i - j)) = [B sin(w i) - A cos(w i)] sin(w j) + [A sin(w i) + B cos(w i)] cos(w j)

    x: [..., 2 n_frequency], the factors A, then B; features: the same shape, of the query's position
    -> the same shape, the factors of the sines, then of the cosines
    """
    a, b = x.chunk(2, dim=-1)
    sin, cos = features.chunk(2, dim=-1)
    return torch.cat([b * sin - a * cos, a * sin + b * cos], dim=-1)


def relative_positional_encoding(qlen: int, klen: int, d_model: int, clamp_len: int, bi_data: bool, bsz: int) -> Tensor:
    """Return the features of every distance between a query and a key: query position minus key position.

    Entry r stands for distance klen - r. Distances run from klen, one more than any pair needs, down to 1 - qlen: the
    first token looks at the last. With bi_data the second half of the batch is read backwards and its distances change
    sign: a distance means the same direction in the text in both halves.

    clamp_len: distances are clipped to +-clamp_len; <= 0 = not clipped
    -> [klen + qlen, bsz, d_model], float64
    Source: Transformer-XL, section 3.3; official relative_positional_encoding.
    """
    distance = torch.arange(klen, -qlen, -1)
    if clamp_len > 0:
        distance = distance.clamp(-clamp_len, clamp_len)
    distance = distance[:, None].repeat(1, bsz)
    if bi_data:
        distance[:, bsz // 2 :] *= -1
    return position_features(distance, frequencies(d_model))


def rel_shift(x: Tensor, position: Tensor, klen: int) -> Tensor:
    """Re-index position scores from distance to key: the query at position i has x[klen - i + j] for key j.

    Three queries at positions 4 to 6 of 7 keys, each entry written as its index r:

        i = 4   0 1 2 3 4 5 6 7 8 9            3 4 5 6 7 8 9
        i = 5   0 1 2 3 4 5 6 7 8 9     ->     2 3 4 5 6 7 8
        i = 6   0 1 2 3 4 5 6 7 8 9            1 2 3 4 5 6 7

    x: [bsz, n_head, n_query, rlen]; position: [bsz, n_query] int, of each query, counted from the first key
    -> [bsz, n_head, n_query, klen]
    Source: Transformer-XL, appendix B.
    """
    index = klen - position[:, None, :, None] + torch.arange(klen, device=x.device)
    return x.gather(3, index.expand(-1, x.size(1), -1, -1))


# ---------------------------------------------------------------- who may see whom


def order_mask(rank: Tensor, inp_q: Tensor | None) -> Tensor:
    """Return the mask that ranks define: no position sees a higher rank, and no query stream its own token.

    rank: [len, bsz] int, as data_utils.permute gives it; inp_q: [len, bsz], 1 = target; None: no targets
    -> [bsz, len (query), len (key)] bool, True = must not see
    This is the mask of training; data_utils.ranks_to_mask writes out the same for one window.
    Source: the paper, section 2.3; official _local_perm.
    """
    rank = rank.t()
    highest_seen = rank if inp_q is None else rank - inp_q.t()  # [bsz, len], by query
    return rank[:, None, :] > highest_seen[:, :, None]


def create_mask(qlen: int, mlen: int, same_length: bool, device: torch.device | None = None) -> Tensor:
    """Return the left-to-right mask of attn_type "uni": [qlen, klen] bool, True = must not see.

    Position i sees all memory and the positions up to i; with same_length only itself and the mlen keys before it.
    Source: official _create_mask.
    """
    ones = torch.ones(qlen, mlen + qlen, dtype=torch.bool, device=device)
    blocked = ones.triu(mlen + 1)
    if same_length:
        blocked |= ones.tril(-1)
    return blocked


def slot_positions(target_mapping: Tensor) -> Tensor:
    """Return the position that each slot predicts: [num_predict, bsz] int, -1 = empty slot.

    target_mapping: these positions, or [num_predict, len, bsz], one-hot along len, all 0 = empty slot
    """
    if target_mapping.dim() == 2:
        return target_mapping
    empty = target_mapping.sum(dim=1) == 0
    return target_mapping.argmax(dim=1).masked_fill(empty, -1)


class QueryBlock(NamedTuple):
    """The mask of a run of adjacent queries; its columns are the first n_key keys: memory, then content stream."""

    # [bsz, 1, n_query, n_key], added to the scores: 0 = may see, BLOCKED = must not see. A blind query has only 0: in
    # bfloat16 a fused kernel of a GPU turns a row of nothing but BLOCKED into gradients of NaN.
    attn_mask: Tensor
    blind: Tensor  # [bsz, 1, n_query, 1] bool, True = sees no key at all


def query_blocks(blocked: Tensor, slots: Tensor | None, first_part: int, dtype: torch.dtype) -> list[QueryBlock]:
    """Return the blocks of the content stream, one or two, then that of the query stream if there is one.

    blocked: [bsz, qlen, klen] bool, True = must not see; a position of the content stream also sees itself
    slots: [num_predict, bsz], the position of each slot, -1 = empty slot, which sees nothing; None: no query stream
    first_part: number of positions at the beginning that see none of the others; their block has fewer keys. 0 =
        unknown
    dtype: of the mask
    """
    qlen, klen = blocked.shape[1:]
    mlen = klen - qlen
    content = blocked.clone()
    content.diagonal(mlen, dim1=1, dim2=2).fill_(False)
    if 0 < first_part < qlen:
        parts = [content[:, :first_part, : mlen + first_part], content[:, first_part:]]
    else:
        parts = [content]
    if slots is not None:
        slots = slots.t()[:, :, None]  # [bsz, num_predict, 1]
        parts.append(blocked.gather(1, slots.clamp(min=0).expand(-1, -1, klen)) | (slots < 0))
    blocks = []
    for part in parts:
        blind = part.all(dim=2, keepdim=True)
        attn_mask = torch.zeros(part.shape, dtype=dtype, device=part.device).masked_fill_(part & ~blind, BLOCKED)
        blocks.append(QueryBlock(attn_mask[:, None], blind[:, None]))
    return blocks


# ---------------------------------------------------------------- the layers


def dropout(x: Tensor, rate: float, training: bool) -> Tensor:
    """Do the same as F.dropout, several times faster on a CPU, where F.dropout draws one Bernoulli variable at a time.

    Each value draws a random byte and is dropped if the byte is below 256 * rate. If 256 * rate is not a whole number,
    every line of x draws whether to round it up or down, so that a value is dropped with a chance of exactly `rate`.
    Above rate 0.99 the threshold might not fit into a byte, so F.dropout is used.

    x: [..., width], float; rate: in [0, 1)
    """
    if not training or rate == 0:
        return x
    if x.device.type != "cpu" or rate > 0.99 or torch.compiler.is_compiling():
        return F.dropout(x, rate)
    size = x.numel()
    bits = torch.empty((size + 7) // 8, dtype=torch.int64).random_(-(2**63), None).view(torch.int8)  # -128 to 127
    threshold = (256 * rate - 128 + torch.rand(*x.shape[:-1], 1)).floor_().to(torch.int8)
    keep = bits[:size].view(x.shape).ge_(threshold)
    return x * keep.to(x.dtype).mul_(1 / (1 - rate))


def cache_mem(curr_out: Tensor, prev_mem: Tensor | None, mem_len: int, reuse_len: int) -> Tensor | None:
    """Return the memory of a layer's input for the next window, or None if mem_len is 0.

    It is detached: no gradient crosses windows, and the time of a step does not grow with the text seen. It is a
    copy: a view would keep the whole stream alive.

    curr_out: [qlen, bsz, d_model]; prev_mem: [mlen, bsz, d_model] or None -> [at most mem_len, bsz, d_model]
    Source: the paper, section 2.4; official _cache_mem.
    """
    if mem_len == 0:
        return None
    if reuse_len > 0:
        curr_out = curr_out[:reuse_len]
    if prev_mem is not None:
        curr_out = torch.cat([prev_mem, curr_out])
    return curr_out[-mem_len:].detach().clone()


def scaled_query(q: Tensor, bias: Tensor) -> Tensor:
    """Return (q + bias) / sqrt(d_head) in the type of q: under autocast a float32 bias would make the sum float32.

    q: [bsz, n_head, n_query, d_head]; bias: [n_head, d_head]
    """
    return (q + bias[:, None].to(q.dtype)) * q.size(3) ** -0.5


def attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor, dropatt: float, training: bool) -> Tensor:
    """Return softmax(q k^T + attn_mask) v over the first n_key keys, with dropout of the attention weights.

    q: [bsz, n_head, n_query, width]; k: [bsz, n_head, klen, width]; v: [bsz, n_head, klen, d_head]
    attn_mask: [bsz, 1 or n_head, n_query, n_key] -> [bsz, n_head, n_query, d_head]
    """
    n_key = attn_mask.size(3)
    if n_key < k.size(2):
        k, v = k[:, :, :n_key], v[:, :, :n_key]
    if q.device.type in ("cuda", "xpu"):
        # PyTorch's fused kernels store no score. The memory-efficient one takes a mask, and queries wider than values,
        # in multiples of 8. On a CPU the fused kernel is slower than the lines below. On a Mac's GPU the call is wrong
        # for queries wider than values before PyTorch 2.12 (github.com/pytorch/pytorch/issues/176767).
        rate = dropatt if training else 0.0
        return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=rate, scale=1.0)
    score = q @ k.mT
    score += attn_mask
    prob = dropout(score.softmax(dim=-1, dtype=score.dtype), dropatt, training)
    return prob @ v


def at_positions(x: Tensor, position: Tensor) -> Tensor:
    """Return the rows of x at some positions: [bsz, klen, width], [bsz, n_query] -> [bsz, n_query, width]."""
    return x.gather(1, position[:, :, None].expand(-1, -1, x.size(2)))


class Queries(NamedTuple):
    """What all layers share about the queries: the content stream, then the query stream."""

    position: Tensor  # [bsz, n_query] int, counted from the first key
    features: Tensor  # [bsz, 1, n_query, 2 n_frequency], of the position
    segment: Tensor | None  # [bsz, 1, n_query, SEGMENTS], one-hot; None: no segments
    blocks: list[QueryBlock]

    def query_stream(self, qlen: int) -> "Queries":
        """Return these without the content stream, which is qlen long."""
        segment = None if self.segment is None else self.segment[:, :, qlen:]
        return Queries(self.position[:, qlen:], self.features[:, :, qlen:], segment, self.blocks[-1:])


class Keys(NamedTuple):
    """What all layers share about the keys: the memory, then the content stream."""

    features: Tensor  # [bsz, 1, klen, 2 n_frequency], of the position
    segment: Tensor | None  # [bsz, 1, klen, SEGMENTS], one-hot; None: no segments
    mix: Tensor  # [n_frequency, d_model / 2], see `few_frequencies`
    pos_emb: Tensor | None  # [rlen, bsz, d_model], for `rel_shift`; None: scores come from the features


class RelativeAttention(nn.Module):
    """Attention by content, relative position and segment, for both streams, with residual and LayerNorm."""

    def __init__(self, d_model: int, n_head: int, d_head: int, dropout: float, dropatt: float) -> None:
        super().__init__()
        self.q = nn.Parameter(torch.empty(d_model, n_head, d_head))
        self.k = nn.Parameter(torch.empty(d_model, n_head, d_head))
        self.v = nn.Parameter(torch.empty(d_model, n_head, d_head))
        self.o = nn.Parameter(torch.empty(d_model, n_head, d_head))
        self.r = nn.Parameter(torch.empty(d_model, n_head, d_head))
        self.r_w_bias = nn.Parameter(torch.empty(n_head, d_head))
        self.r_r_bias = nn.Parameter(torch.empty(n_head, d_head))
        self.r_s_bias = nn.Parameter(torch.empty(n_head, d_head))
        self.seg_embed = nn.Parameter(torch.empty(2, n_head, d_head))
        self.layer_norm = nn.LayerNorm(d_model, eps=1e-12)
        self.dropout, self.dropatt = dropout, dropatt

    def rel_attn_core(self, q: Tensor, k: Tensor, v: Tensor, queries: Queries, keys: Keys) -> Tensor:
        """Return what each query reads from the keys that it may see: the softmax of its scores times v.

        The score of query i and key j is the sum of these terms, divided by sqrt(d_head):

            (a) q_i . k_j    (b) q_i . r    (c) r_w_bias . k_j    (d) r_r_bias . r    (e) (q_i + r_s_bias) . s

        where r is the features of their distance, projected by self.r, and s is seg_embed[0] if they share a segment,
        else seg_embed[1]. `rotate` and one-hot segments make the sum one inner product of a query and a key.

        q: [bsz, n_head, n_query, d_head]; k, v: [bsz, n_head, klen, d_head]
        -> [bsz, n_head, n_query, d_head]
        Source: Transformer-XL, section 3.3, (a) to (d); the paper, section 2.5, (e); official rel_attn_core.
        """
        # (a) + (c)
        q_parts, k_parts = [scaled_query(q, self.r_w_bias)], [k]
        masks = [block.attn_mask for block in queries.blocks]
        sizes = [mask.size(2) for mask in masks]

        # (b) + (d)
        position_q = scaled_query(q, self.r_r_bias)
        if keys.pos_emb is None:
            halves = self.r.unflatten(0, (2, -1))  # of the sines and of the cosines: [2, d_model / 2, n_head, d_head]
            r = torch.einsum("fh,shnd->sfnd", keys.mix, halves).flatten(0, 1)
            factors = torch.einsum("bnid,fnd->bnif", position_q, r)
            q_parts.append(rotate(factors, queries.features))
            k_parts.append(keys.features)
        else:
            k_r = torch.einsum("rbh,hnd->bnrd", keys.pos_emb, self.r)
            scores = rel_shift(position_q @ k_r.mT, queries.position, k.size(2)).split(sizes, dim=2)
            masks = [mask + score[..., : mask.size(3)] for mask, score in zip(masks, scores, strict=True)]

        # (e): The softmax ignores whatever a query adds to all its keys alike. So only the keys of its own segment get
        # a term, (q_i + r_s_bias) . (seg_embed[0] - seg_embed[1]). The query holds this number at the coordinate of
        # its segment, where the keys of that segment hold a 1.
        if queries.segment is not None:
            difference = self.seg_embed[0] - self.seg_embed[1]
            segment_q = torch.einsum("bnid,nd->bni", scaled_query(q, self.r_s_bias), difference)
            q_parts.append(segment_q[..., None] * queries.segment)
            k_parts.append(keys.segment)

        q = torch.cat(q_parts, dim=-1)
        k = torch.cat([part.expand(-1, q.size(1), -1, -1) for part in k_parts], dim=-1)
        attn_vec = []
        for block, q_block, mask in zip(queries.blocks, q.split(sizes, dim=2), masks, strict=True):
            read = attention(q_block, k, v, mask, self.dropatt, self.training)
            # The softmax of a blind query is uniform over all keys, its own token among them: let it read nothing.
            attn_vec.append(read.masked_fill(block.blind, 0))
        return torch.cat(attn_vec, dim=2)

    def two_stream_rel_attn(self, x: Tensor, h: Tensor, mem: Tensor | None, queries: Queries, keys: Keys) -> Tensor:
        """Let the queries of both streams attend to the content stream and its memory, with the same weights.

        For the position z_t that comes t-th in the order:

            g_z_t  <-  Attention(Q = g_z_t, KV = h_z_<t)     the query stream does not see its own token
            h_z_t  <-  Attention(Q = h_z_t, KV = h_z_<=t)    the content stream does

        x: [n_query, bsz, d_model], both streams or one of them; h: [qlen, bsz, d_model], the content stream
        mem: [mlen, bsz, d_model] or None
        -> [n_query, bsz, d_model], with the residual x added, normalized
        Source: the paper, section 2.3, equations for g and h; official two_stream_rel_attn and post_attention.
        """
        cat = h if mem is None else torch.cat([mem, h])
        q = torch.einsum("ibh,hnd->bnid", x, self.q)
        k = torch.einsum("jbh,hnd->bnjd", cat, self.k)
        v = torch.einsum("jbh,hnd->bnjd", cat, self.v)
        attn_vec = self.rel_attn_core(q, k, v, queries, keys)
        out = torch.einsum("bnid,hnd->ibh", attn_vec, self.o)
        return self.layer_norm(x + dropout(out, self.dropout, self.training))


class FeedForward(nn.Module):
    """Position-wise feed-forward network with residual and LayerNorm: [..., d_model] -> [..., d_model]."""

    def __init__(self, d_model: int, d_inner: int, dropout: float, ff_activation: str) -> None:
        super().__init__()
        self.layer_1 = nn.Linear(d_model, d_inner)
        self.layer_2 = nn.Linear(d_inner, d_model)
        self.layer_norm = nn.LayerNorm(d_model, eps=1e-12)
        self.dropout = dropout
        self.activation = ACTIVATIONS[ff_activation]

    def forward(self, x: Tensor) -> Tensor:
        inner = dropout(self.activation(self.layer_1(x)), self.dropout, self.training)  # d_inner wide
        return self.layer_norm(x + dropout(self.layer_2(inner), self.dropout, self.training))


class Layer(nn.Module):
    """Two-stream attention, then the feed-forward network."""

    def __init__(
        self, d_model: int, n_head: int, d_head: int, d_inner: int, dropout: float, dropatt: float, ff_activation: str
    ) -> None:
        super().__init__()
        self.rel_attn = RelativeAttention(d_model, n_head, d_head, dropout, dropatt)
        self.ff = FeedForward(d_model, d_inner, dropout, ff_activation)

    def forward(self, x: Tensor, h: Tensor, mem: Tensor | None, queries: Queries, keys: Keys) -> Tensor:
        """Return the next x: [n_query, bsz, d_model]; arguments as in `two_stream_rel_attn`."""
        return self.ff(self.rel_attn.two_stream_rel_attn(x, h, mem, queries, keys))


# ---------------------------------------------------------------- the model


def prefer_distance(r: Tensor, r_r_bias: Tensor, distance: int, peak: float = 10.0, bias: float = 4.0) -> None:
    """Change one head's position weights in place so that it starts out looking at one distance.

    Let u be a random unit vector and p = sqrt(w) [sin(w distance), cos(w distance)]. Adding p u^T to r and u to
    r_r_bias adds the sum over w of sqrt(w) cos(w (x - distance)) to the score of a key at distance x. This is largest
    at x = distance. The factors make the largest score, after the division by sqrt(d_head), `peak`.

    r: [d_model, d_head]; r_r_bias: [d_head]
    distance: query minus key, in tokens; bias: length of the vector added to r_r_bias
    """
    w = frequencies(r.size(0)).to(r)
    u = F.normalize(torch.randn_like(r_r_bias), dim=0)
    p = torch.cat([w.sqrt() * (w * distance).sin(), w.sqrt() * (w * distance).cos()])
    r += peak * math.sqrt(r.size(1)) / (bias * w.sqrt().sum()) * torch.outer(p, u)
    r_r_bias += bias * u


class XLNet(nn.Module):
    """XLNet with its language-model head.

    The parameters have the names, without "transformer.", and the shapes of transformers' XLNetLMHeadModel.

    n_token: size of the vocabulary; n_layer, n_head, d_head, d_inner, d_model: the shape, d_model even
    dropout, dropatt: rates for hidden states and for attention weights, 0 = off
    attn_type: "bi", or "uni" for a left-to-right Transformer-XL; same_length: with "uni", all tokens see equally far
    bi_data: the second half of the batch is read backwards; the batch size must be even
    clamp_len: longest distance, in tokens; longer ones count as this one; 0 or -1 = no limit
    reuse_len: how many tokens of a window, from its first, enter the memory, 0 = all
    mem_len: how many tokens the memory keeps, 0 = none
    ff_activation: a key of ACTIVATIONS
    init, init_std: see `init_weights`
    """

    def __init__(
        self,
        n_token: int,
        n_layer: int = 6,
        n_head: int = 4,
        d_head: int = 8,
        d_inner: int = 32,
        d_model: int = 32,
        dropout: float = 0.1,
        dropatt: float = 0.1,
        attn_type: str = "bi",
        bi_data: bool = False,
        clamp_len: int = -1,
        same_length: bool = False,
        reuse_len: int = 256,
        mem_len: int = 384,
        ff_activation: str = "relu",
        init: str = "local",
        init_std: float | None = None,
    ) -> None:
        super().__init__()
        if d_model % 2:
            raise ValueError(
                f"d_model {d_model} must be even, half of the position features are sines, half cosines; "
                f"try {d_model + 1}"
            )
        if attn_type not in ("bi", "uni"):
            raise ValueError(f"attn_type {attn_type!r} must be 'bi' or 'uni'")
        if ff_activation not in ACTIVATIONS:
            raise ValueError(f"ff_activation {ff_activation!r} must be one of {', '.join(ACTIVATIONS)}")
        # The entries of transformers' XLNetConfig that the model depends on, dropatt, and the released models' untie_r.
        self.config = {
            "vocab_size": n_token,
            "n_layer": n_layer,
            "n_head": n_head,
            "d_head": d_head,
            "d_inner": d_inner,
            "d_model": d_model,
            "dropout": dropout,
            "dropatt": dropatt,
            "attn_type": attn_type,
            "bi_data": bi_data,
            "clamp_len": clamp_len,
            "same_length": same_length,
            "reuse_len": reuse_len,
            "mem_len": mem_len,
            "ff_activation": ff_activation,
            "untie_r": True,
        }
        self.attn_type, self.bi_data = attn_type, bi_data
        self.clamp_len, self.same_length = clamp_len, same_length
        self.reuse_len, self.mem_len = reuse_len, mem_len

        self.word_embedding = nn.Embedding(n_token, d_model)
        self.mask_emb = nn.Parameter(torch.empty(1, 1, d_model))
        self.layer = nn.ModuleList(
            Layer(d_model, n_head, d_head, d_inner, dropout, dropatt, ff_activation) for _ in range(n_layer)
        )
        self.dropout = dropout
        self.lm_loss = nn.Linear(d_model, n_token)  # the head, under transformers' name; see `prediction_loss`
        self.lm_loss.weight = self.word_embedding.weight  # tied, as in the official pretraining
        self.init_weights(init, init_std)

    @torch.no_grad()
    def init_weights(self, init: str = "local", init_std: float | None = None) -> None:
        """Draw all parameters anew: normal(0, init_std), biases 0, LayerNorm 1 and 0.

        init: "normal" is the start of the official code, except for that of mask_emb. "local" also makes each head
            prefer one distance. Without that nothing tells the query stream, which starts as the same vector at every
            position, to look at its neighbours.
        init_std: None = 0.02 with "normal" (official), 0.5 / sqrt(d_model) with "local". That is 0.09 at width 32 and
            0.018 at width 768. At every width the logits then have a standard deviation of 0.5, and the first loss is
            near that of guessing.
        """
        d_model = self.word_embedding.embedding_dim
        if init_std is None:
            init_std = 0.02 if init == "normal" else 0.5 / math.sqrt(d_model)
        for name, parameter in self.named_parameters():
            if name.endswith("layer_norm.weight"):
                nn.init.ones_(parameter)
            elif name.endswith(".bias"):  # of Linear and LayerNorm; r_w_bias and its kin act as queries: random
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=init_std)
        if init == "local":
            distances = itertools.cycle(LOCAL_DISTANCES)
            for layer in self.layer:
                attn = layer.rel_attn
                for r, r_r_bias in zip(attn.r.unbind(dim=1), attn.r_r_bias, strict=True):  # one head
                    prefer_distance(r, r_r_bias, next(distances))

    def save_pretrained(self, directory: str | Path, **config) -> None:
        """Write config.json, with further entries `config`, and model.safetensors into an existing directory.

        transformers' AutoModel and XLNetLMHeadModel can read them if n_head * d_head is d_model.
        """
        config = {"architectures": ["XLNetLMHeadModel"], "model_type": "xlnet", **self.config, **config}
        content = json.dumps(config, indent=2) + "\n"
        (Path(directory) / "config.json").write_text(content, encoding="utf-8", newline="\n")
        weights = {}
        for name, parameter in self.named_parameters():  # lists the tied weight once
            weights[name if name.startswith("lm_loss.") else f"transformer.{name}"] = parameter.detach()
        save_file(weights, Path(directory) / "model.safetensors", metadata={"format": "pt"})

    @classmethod
    def from_pretrained(cls, directory: str | Path, **overrides) -> "XLNet":
        """Return the model of a directory that `save_pretrained` or transformers wrote, with or without a head.

        overrides: arguments of the constructor that replace those of config.json
        Raises OSError if a file is missing, ValueError if the configuration or the weights are not supported,
        SafetensorError if the weights are damaged.
        """
        arguments = read_config(directory) | overrides
        weights = read_weights(directory)
        weights.setdefault("lm_loss.bias", torch.zeros(arguments["n_token"]))  # XLNetModel has no head
        check_sizes(weights, arguments)
        model = cls(**arguments)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                check_weight(name, weights.get(name), list(parameter.shape))
                parameter.copy_(weights[name])
        return model

    def embed(self, inp_k: Tensor, target_mapping: Tensor | None, inp_q: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the first layer's queries, [n_query, bsz, d_model], and the position of each slot, [num_predict, bsz].

        Arguments as in `forward`. Without inp_q there are no slots: None.
        """
        h = self.word_embedding(inp_k)  # [qlen, bsz, d_model]
        if inp_q is None:
            return h, None
        qlen, bsz = inp_k.shape
        if target_mapping is None:
            slots = torch.arange(qlen, device=inp_k.device)[:, None].expand(qlen, bsz)
            g = torch.where(inp_q[:, :, None] > 0, self.mask_emb, h)
        else:
            slots = slot_positions(target_mapping)
            g = self.mask_emb.expand(slots.size(0), bsz, -1)
        return torch.cat([h, g]), slots

    def blocked_mask(
        self,
        inp_k: Tensor,
        mlen: int,
        input_mask: Tensor | None,
        perm_mask: Tensor | None,
        rank: Tensor | None,
        inp_q: Tensor | None,
    ) -> Tensor:
        """Return who must not see whom in the query stream; `query_blocks` lets the content stream also see itself.

        mlen: length of the memory; the other arguments as in `forward`
        -> [bsz, qlen, klen] bool, True = must not see
        Source: official transformer_xl, "Attention mask".
        """
        qlen, bsz = inp_k.shape
        blocked = torch.zeros(bsz, qlen, mlen + qlen, dtype=torch.bool, device=inp_k.device)
        if self.attn_type == "uni":
            blocked |= create_mask(qlen, mlen, self.same_length, inp_k.device)
        in_window = blocked[:, :, mlen:]  # a view without the memory, which order and padding leave visible
        if perm_mask is not None:
            in_window |= perm_mask.permute(2, 0, 1) > 0
        if rank is not None:
            in_window |= order_mask(rank, inp_q)
        if input_mask is not None:
            in_window |= input_mask.t()[:, None] > 0
        return blocked

    def forward(
        self,
        inp_k: Tensor,
        seg_id: Tensor | None = None,
        input_mask: Tensor | None = None,
        mems: list[Tensor | None] | None = None,
        perm_mask: Tensor | None = None,
        target_mapping: Tensor | None = None,
        inp_q: Tensor | None = None,
        rank: Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Return the logits of the predicted slots, or of every position if there is one stream, and the new memory.

        inp_k: [len, bsz] int, token ids
        seg_id: [len, bsz] int, below SEGMENTS; None: no segments. Memory counts as segment 0
        input_mask: [len, bsz], 1 = padding, which nobody else sees; None: no padding
        mems: list of n_layer [mlen, bsz, d_model], as the previous call returned it; None: no memory
        perm_mask: [len, len, bsz], 1 = position i must not see position j; None: all may be seen
        target_mapping: [num_predict, bsz] int, the position of each slot, -1 = empty slot; or [num_predict, len, bsz],
            the same as one-hot; None: a slot at every position
        inp_q: [len, bsz], 1 = to be predicted; None: content stream only, for fine-tuning and features
        rank: [len, bsz] int, instead of perm_mask: as data_utils.permute gives it, lower for the first reuse_len
            positions than for all others. A position sees its own rank and lower ones, a target only lower ones
        -> logits [num_predict or len, bsz, n_token]; new_mems, list of n_layer [at most mem_len, bsz, d_model], or of
            None if mem_len is 0
        Raises ValueError if perm_mask and rank are both given, if target_mapping is given without inp_q, or if the
        batch is odd with bi_data.
        Source: official transformer_xl and lm_loss.
        """
        hidden, new_mems = self.hidden(inp_k, seg_id, input_mask, mems, perm_mask, target_mapping, inp_q, rank)
        return self.lm_loss(hidden), new_mems

    def hidden(
        self,
        inp_k: Tensor,
        seg_id: Tensor | None = None,
        input_mask: Tensor | None = None,
        mems: list[Tensor | None] | None = None,
        perm_mask: Tensor | None = None,
        target_mapping: Tensor | None = None,
        inp_q: Tensor | None = None,
        rank: Tensor | None = None,
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Return the last hidden states, [num_predict or len, bsz, d_model], and the new memory, as `forward` does."""
        qlen, bsz = inp_k.shape
        if self.bi_data and bsz % 2:
            raise ValueError(f"batch size {bsz} must be even with bi_data, which reads half of it backwards")
        if target_mapping is not None and inp_q is None:
            raise ValueError(
                "target_mapping needs inp_q, which says what to predict; give inp_q or leave target_mapping out"
            )
        if perm_mask is not None and rank is not None:
            raise ValueError("perm_mask and rank both say who must not see whom; give one of them")
        if mems is None:
            mems = [None] * len(self.layer)
        mlen = 0 if mems[0] is None else mems[0].size(0)

        x, slots = self.embed(inp_k, target_mapping, inp_q)
        x = dropout(x, self.dropout, self.training)
        dtype = x.dtype  # of the attention's products
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
        blocked = self.blocked_mask(inp_k, mlen, input_mask, perm_mask, rank, inp_q)
        blocks = query_blocks(blocked, slots, first_part=0 if rank is None else self.reuse_len, dtype=dtype)
        queries, keys = self.queries_and_keys(inp_k, seg_id, mlen, slots, blocks, dtype)

        new_mems = []
        for i, layer in enumerate(self.layer):
            h = x[:qlen]
            new_mems.append(cache_mem(h, mems[i], self.mem_len, self.reuse_len))
            if slots is not None and i + 1 == len(self.layer):
                # Neither the loss nor the memory needs the last layer's content stream: only slots are queries.
                x, queries = x[qlen:], queries.query_stream(qlen)
            x = layer(x, h, mems[i], queries, keys)
        return dropout(x, self.dropout, self.training), new_mems

    def queries_and_keys(
        self,
        inp_k: Tensor,
        seg_id: Tensor | None,
        mlen: int,
        slots: Tensor | None,
        blocks: list[QueryBlock],
        dtype: torch.dtype,
    ) -> tuple[Queries, Keys]:
        """Return the positions and segments of all queries and keys, with the blocks of the queries.

        slots: [num_predict, bsz] int, the position of each slot, or None; dtype: of the attention's products
        """
        qlen, bsz = inp_k.shape
        klen, d_model, device = mlen + qlen, self.word_embedding.embedding_dim, inp_k.device
        position = torch.arange(mlen, klen, device=device).expand(bsz, -1)
        if slots is not None:
            position = torch.cat([position, mlen + slots.t().clamp(min=0)], dim=1)

        features, mix = position_tables(klen, d_model, device, dtype)
        features = features.repeat(bsz, 1, 1)  # [bsz, klen, 2 n]
        if self.bi_data:  # backwards, positions change sign: the sines do too, the cosines do not
            features[bsz // 2 :, :, : features.size(2) // 2] *= -1
        q_features = at_positions(features, position)[:, None]
        k_features = dropout(features, self.dropout, self.training)[:, None]

        q_segment = k_segment = None
        if seg_id is not None:
            segment = F.pad(seg_id, (0, 0, mlen, 0)).t()  # [bsz, klen]; memory counts as segment 0
            one_hot = F.one_hot(segment.long(), SEGMENTS).to(dtype)
            q_segment, k_segment = at_positions(one_hot, position)[:, None], one_hot[:, None]

        pos_emb = None
        if self.clamp_len > 0:  # clipped distances are no product of positions
            pos_emb = relative_positional_encoding(qlen, klen, d_model, self.clamp_len, self.bi_data, bsz)
            pos_emb = dropout(pos_emb.to(dtype).to(device), self.dropout, self.training)
        return Queries(position, q_features, q_segment, blocks), Keys(k_features, k_segment, mix, pos_emb)


def prediction_loss(logits: Tensor, target: Tensor, target_mask: Tensor) -> Tensor:
    """Return the mean of -log p over the real targets, in nats; empty slots weigh nothing.

    logits: [num_predict, bsz, n_token]; target: [num_predict, bsz] int
    target_mask: [num_predict, bsz], 1 = real target, 0 = empty slot
    Source: the paper, section 2.3, equation (5); official two_stream_loss.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # bfloat16 would round the sum
    nll = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
    weight = target_mask.flatten()
    return (nll * weight).sum() / weight.sum().clamp(min=1)


# ---------------------------------------------------------------- files


# Entries of config.json that must have this value; a missing entry means the same value.
FIXED_ENTRIES = {"model_type": "xlnet", "untie_r": True, "tie_word_embeddings": True, "layer_norm_eps": 1e-12}
NEEDED_ENTRIES = ("model_type", "vocab_size", "n_layer", "n_head", "d_model", "d_inner", "ff_activation")
ENTRIES = {  # of config.json: type, least and largest value
    "vocab_size": (int, 1, 2**24),
    "n_layer": (int, 1, 1000),
    "n_head": (int, 1, 2**16),
    "d_head": (int, 1, 2**16),
    "d_inner": (int, 1, 2**16),
    "d_model": (int, 2, 2**16),
    "dropout": (float, 0, 0.999),
    "dropatt": (float, 0, 0.999),
    "attn_type": (str, None, None),
    "bi_data": (bool, None, None),
    "clamp_len": (int, -1, 2**20),
    "same_length": (bool, None, None),
    "reuse_len": (int, 0, 2**20),
    "mem_len": (int, 0, 2**20),
    "ff_activation": (str, None, None),
}


def read_config(directory: str | Path) -> dict:
    """Return the arguments of XLNet's constructor that a directory's config.json sets.

    Null entries are left out. A null mem_len or reuse_len only means that transformers keeps no memory; it does not
    say what pretraining should do.

    Raises OSError if there is no config.json, ValueError with the entry if it does not describe an XLNet with untied
    biases and a tied head, or if a value has the wrong type or is out of limits.
    """
    try:
        config = json.loads((Path(directory) / "config.json").read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise ValueError(f"config.json is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"config.json holds a {type(config).__name__}, not an object with the entries of an XLNet")
    config = {name: value for name, value in config.items() if value is not None}
    for name in NEEDED_ENTRIES:
        if name not in config:
            raise ValueError(f"config.json is not that of an XLNet: it has no {name}")
    for name, value in FIXED_ENTRIES.items():
        if repr(config.get(name, value)) != repr(value):  # 1 is not True
            raise ValueError(
                f"config.json is not that of an XLNet that can be read: its {name} is "
                f"{reprlib.repr(config[name])}, not {value!r}"
            )
    arguments = {name: value for name, value in config.items() if name in ENTRIES}
    for name, value in arguments.items():
        check_entry(name, value)
    arguments["n_token"] = arguments.pop("vocab_size")
    arguments.setdefault("d_head", max(1, arguments["d_model"] // arguments["n_head"]))  # as transformers has it
    return arguments


def check_entry(name: str, value: object) -> None:
    """Raise ValueError if the value of an entry of config.json has another type than in ENTRIES, or is out of limits.

    A float may be written as a whole number; true and false are not numbers.
    """
    kind, least, most = ENTRIES[name]
    is_kind = type(value) is kind or (kind is float and type(value) is int)
    if not is_kind or (least is not None and not least <= value <= most):  # nan too
        limits = "" if least is None else f", from {least} to {most}"
        raise ValueError(
            f"config.json sets {name} to {reprlib.repr(value)}; it must be of type {kind.__name__}{limits}"
        )


def read_weights(directory: str | Path) -> dict[str, Tensor]:
    """Return the weights in a directory by the names of XLNet's parameters, from model.safetensors if it exists.

    lm_loss.weight is left out: it must be the embedding.

    Raises OSError if there are none, ValueError if they are not plain tensors or the head has weights of its own,
    SafetensorError if they are damaged.
    """
    path = Path(directory) / "model.safetensors"
    older = Path(directory) / "pytorch_model.bin"  # of older transformers
    if older.is_file() and not path.is_file():
        try:
            found = torch.load(older, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:
            raise ValueError(
                "pytorch_model.bin holds more than tensors and may run code, or is no file of weights; save the model "
                "again as model.safetensors"
            ) from None
        except Exception:  # torch.load raises anything for a file that torch.save did not write
            raise ValueError("pytorch_model.bin is damaged; fetch or save it again") from None
        if not isinstance(found, dict) or not all(isinstance(tensor, Tensor) for tensor in found.values()):
            raise ValueError("pytorch_model.bin is not a dict of tensors; save the model's state_dict")
    else:
        found = load_file(path)
    weights = {name.removeprefix("transformer."): tensor for name, tensor in found.items()}
    embedding = weights.get("word_embedding.weight")
    head = weights.pop("lm_loss.weight", embedding)
    if embedding is not None and (head.dtype != embedding.dtype or not torch.equal(head, embedding)):
        raise ValueError("lm_loss.weight is not the embedding; only XLNets whose head shares its weights can be read")
    return weights


def check_sizes(weights: dict[str, Tensor], arguments: dict) -> None:
    """Raise ValueError if weights do not fit the sizes that config.json asks for.

    It is called before the model is made: a wrong config.json may ask for any amount of memory.

    weights: by name, as `read_weights` returns them; arguments: of XLNet's constructor
    """
    n_token, d_model, d_inner = arguments["n_token"], arguments["d_model"], arguments["d_inner"]
    shapes = {
        "word_embedding.weight": [n_token, d_model],
        "layer.0.rel_attn.q": [d_model, arguments["n_head"], arguments["d_head"]],
        "layer.0.ff.layer_1.weight": [d_inner, d_model],
    }
    for name, shape in shapes.items():
        if name in weights:  # a variant of the model may lack it
            check_weight(name, weights[name], shape)
    layers = {name.split(".")[1] for name in weights if name.startswith("layer.")}
    if len(layers) != arguments["n_layer"]:
        raise ValueError(f"config.json sets n_layer to {arguments['n_layer']}, and {len(layers)} layers have weights")


def check_weight(name: str, weight: Tensor | None, shape: list[int]) -> None:
    """Raise ValueError if a weight is None or has another shape, if it is not of floats, or if one is not finite."""
    if weight is None or list(weight.shape) != shape:
        raise ValueError(f"the weight {name} is missing, or not of the shape {shape} that config.json asks for")
    if weight.dtype not in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        raise ValueError(f"the weight {name} is of {weight.dtype}; save it as float32, float16 or bfloat16")
    if not weight.float().isfinite().all():
        raise ValueError(f"the weight {name} holds infinity or nan; the run that made it has failed")
