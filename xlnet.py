"""XLNet: a Transformer-XL that predicts tokens in any order, by two streams of attention.

The content stream `h` holds what every position says; the query stream `g` holds what can be told about a
position without looking at its token. Both share all weights; `g` predicts, and is thrown away after pretraining.
They run through a layer as the rows of one tensor, h above g: what differs is where a row may look.
Sources: the paper, arXiv:1906.08237, sections 2.3 to 2.5, Transformer-XL, arXiv:1901.02860, section 3.3 and
appendix B, and zihangdai/xlnet, modeling.py ("official" below). The official names are kept: `r_w_bias` and
`r_r_bias` are Transformer-XL's u and v.

Axes, in every einsum and every shape:
    i  query: a position (qlen), or a row of both streams: qlen positions, then num_predict slots
    j  key position (klen = mlen + qlen)           r  relative distance, from klen down (rlen)
    b  batch (bsz)                                 n  head (n_head)
    d  width of a head (d_head)                    h  width of the model (d_model)
"""

import inspect
import itertools
import json
import math
import pickle
from pathlib import Path
from typing import NamedTuple, Optional

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

ACTIVATIONS = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),  # what the official code calls gelu
}
BLOCKED = -1e30  # added to a score: nothing is left of it after the softmax (official)
SEGMENTS = 8  # segment ids are below this; three are used, and matrix units like multiples of 8
LOCAL_DISTANCES = (-1, 1, -2, 2, -3, 3, -4, 4)  # query minus key: 1 is the token before, -1 the one after


def frequencies(d_model, device=None):
    """Return the angular frequencies of the position features, from 1 down, in radians per token: [d_model / 2]."""
    return 10000 ** (-torch.arange(0, d_model, 2.0, device=device) / d_model)


def relative_positional_encoding(qlen, klen, d_model, clamp_len, attn_type, bi_data, bsz, device=None):
    """Return sinusoids of every distance a query can have from a key: query position minus key position.

    Row r stands for distance klen - r: from klen, one beyond the oldest memory, down to the last token as the first
    token sees it. With bi_data the second half of the batch is read backwards and its distances change sign, so
    that in both halves a distance means the same direction in the text.

    -> [rlen, bsz, d_model]; rlen is klen + qlen with attn_type "bi", klen + 1 with "uni", which looks back only
    clamp_len: distances are clipped to +-clamp_len; not clipped if <= 0
    Source: Transformer-XL, section 3.3; official relative_positional_encoding.
    """
    last = -qlen if attn_type == "bi" else -1
    distance = torch.arange(klen, last, -1.0, device=device)  # [rlen]
    if clamp_len > 0:
        distance = distance.clamp(-clamp_len, clamp_len)
    sign = torch.ones(bsz, device=device)
    if bi_data:
        sign[bsz // 2 :] = -1
    angle = torch.einsum("r,b,h->rbh", distance, sign, frequencies(d_model, device))  # d_model / 2 wide
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


def rel_shift(x, klen):
    """Re-index position scores from distance to key position, without copying.

    Row i of the result is row i of x from entry qlen - i on, because query i and key j lie klen - (qlen - i + j)
    apart. Laid out in memory that is the same data read with rows one entry shorter, from entry qlen on. With
    qlen 3, klen 4 and each entry written as its index r:

        row 0   0 1 2 3 4 5 6                 3 4 5 6
        row 1   0 1 2 3 4 5 6        ->       2 3 4 5
        row 2   0 1 2 3 4 5 6                 1 2 3 4

    x: [bsz, n_head, qlen, rlen] -> [bsz, n_head, qlen, klen], a view
    With attn_type "uni" rlen is short and the entries after a query's own position are undefined; they are masked.
    Source: Transformer-XL, appendix B.
    """
    return RelShift.apply(x, klen)


class RelShift(torch.autograd.Function):
    """`rel_shift`, whose gradient is one copy into zeros, where autograd would make one for each change of shape."""

    @staticmethod
    def view(x, klen):
        qlen, rlen = x.shape[2:]
        return x.flatten(2)[:, :, qlen:].unflatten(2, (qlen, rlen - 1))[..., :klen]

    @staticmethod
    def forward(ctx, x, klen):
        ctx.shape = x.shape
        return RelShift.view(x, klen)

    @staticmethod
    def backward(ctx, grad):
        grad_x = grad.new_zeros(ctx.shape)
        RelShift.view(grad_x, grad.size(3)).copy_(grad)
        return grad_x, None


def dropout(x, rate, training):
    """Do what F.dropout does, several times faster on a CPU, where that draws one Bernoulli variable at a time.

    Eight random bits decide on each value: it is dropped if they are below 256 * rate. Where that is not a whole
    number, each row draws to which side to round it, so that the chance of a value is `rate` exactly. Close to rate 1
    the threshold might not fit into eight bits.

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


def cache_mem(curr_out, prev_mem, mem_len, reuse_len):
    """Return what the next window remembers of a layer's input.

    Detached: no gradient crosses windows, so that a step costs the same however far back it can see.

    curr_out: [qlen, bsz, d_model]; prev_mem: [mlen, bsz, d_model] or None -> [<= mem_len, bsz, d_model], None if 0
    Source: the paper, section 2.4; official _cache_mem.
    """
    if mem_len == 0:
        return None
    if reuse_len > 0:
        curr_out = curr_out[:reuse_len]
    if prev_mem is not None:
        curr_out = torch.cat([prev_mem, curr_out])
    return curr_out[-mem_len:].detach()


def create_mask(qlen, mlen, same_length, device=None):
    """Return the left-to-right mask of attn_type "uni": [qlen, klen] bool, True = blocked.

    Position i sees all memory and positions up to i; with same_length only the last mlen of them and itself.
    Source: official _create_mask.
    """
    ones = torch.ones(qlen, mlen + qlen, dtype=torch.bool, device=device)
    blocked = ones.triu(mlen + 1)
    if same_length:
        blocked |= ones.tril(-1)
    return blocked


class Group(NamedTuple):
    """Rows that may look at the same keys: a part of the content stream, or the query stream."""

    rows: slice  # of the axis of rows
    klen: int  # they may look at the first klen keys
    distances: slice  # of the relative distances, those between these rows and these keys
    index: Optional[torch.Tensor]  # [bsz, 1, rows, klen], where each key's distance is; None: rel_shift finds it
    attn_mask: torch.Tensor  # [bsz, 1, rows, klen], added to scores: 0 = visible, BLOCKED = not visible
    blind: torch.Tensor  # [bsz, 1, rows, 1] bool, True = the row sees no key at all


class RelativeAttention(nn.Module):
    """Attention by content, relative position and segment, for both streams, with residual and LayerNorm."""

    def __init__(self, d_model, n_head, d_head, dropout, dropatt):
        super().__init__()
        for name in ("q", "k", "v", "o", "r"):
            self.register_parameter(name, nn.Parameter(torch.empty(d_model, n_head, d_head)))
        for name in ("r_w_bias", "r_r_bias", "r_s_bias"):
            self.register_parameter(name, nn.Parameter(torch.empty(n_head, d_head)))
        self.seg_embed = nn.Parameter(torch.empty(2, n_head, d_head))
        self.layer_norm = nn.LayerNorm(d_model, eps=1e-12)
        self.dropout, self.dropatt = dropout, dropatt

    def rel_attn_core(self, q, k, v, k_r, groups, seg_q, seg_k):
        """Return what each row reads from the keys it may see: the softmax of its scores times v.

        The score of query i and key j is the sum of these terms, divided by sqrt(d_head):

            (a) q_i . k_j    (b) q_i . r    (c) r_w_bias . k_j    (d) r_r_bias . r    (e) (q_i + r_s_bias) . s

        where r is the row of k_r for their distance, and s is seg_embed[0] in one segment, seg_embed[1] across two.

        q: [bsz, n_head, rows, d_head]; k, v: [bsz, n_head, klen, d_head]; k_r: [bsz, n_head, rlen, d_head]
        seg_q: [bsz, 1, rows, SEGMENTS], seg_k: [bsz, 1, klen, SEGMENTS], segments one-hot; None: no segments
        -> [bsz, n_head, rows, d_head]
        Source: Transformer-XL, section 3.3, (a) to (d); the paper, section 2.5, (e); official rel_attn_core.
        """
        scale = q.size(3) ** -0.5
        content, position = (q + self.r_w_bias[:, None]) * scale, (q + self.r_r_bias[:, None]) * scale
        if seg_q is not None:
            # (e): what a row adds to all its keys alike cancels in the softmax, so it is enough to add to the keys of
            # its own segment what they have more than others. The row has that on the coordinate of its segment, where
            # these keys have a 1.
            difference = self.seg_embed[0] - self.seg_embed[1]  # same - other
            segment = torch.einsum("bnid,nd->bni", (q + self.r_s_bias[:, None]) * scale, difference)
            content = torch.cat([content, segment[..., None] * seg_q], dim=-1)
            k = torch.cat([k, seg_k.expand(-1, k.size(1), -1, -1)], dim=-1)

        attn_vec = []
        for group in groups:
            # (a) + (c) + (e): how well the content of the key fits, and its segment
            score = content[:, :, group.rows] @ k[:, :, : group.klen].mT  # [bsz, n_head, rows, klen]

            # (b) + (d): how well its distance fits
            distance = position[:, :, group.rows] @ k_r[:, :, group.distances].mT  # [bsz, n_head, rows, rlen]
            if group.index is None:
                score += rel_shift(distance, group.klen)
            else:
                score += distance.gather(3, group.index.expand(-1, score.size(1), -1, -1))

            score += group.attn_mask
            prob = dropout(score.softmax(dim=-1, dtype=score.dtype), self.dropatt, self.training)
            read = prob @ v[:, :, : group.klen]  # [bsz, n_head, rows, d_head]
            # The softmax of a row that sees nothing is uniform over all keys, its own token among them: read nothing.
            attn_vec.append(read.masked_fill(group.blind, 0))
        return torch.cat(attn_vec, dim=2)

    def two_stream_rel_attn(self, x, h, pos_emb, mem, groups, seg_q, seg_k):
        """Let the rows of both streams attend to the content stream and its memory, with the same weights.

        For the position z_t that comes t-th in the order:

            g_z_t  <-  Attention(Q = g_z_t, KV = h_z_<t)     the query stream does not see its own token
            h_z_t  <-  Attention(Q = h_z_t, KV = h_z_<=t)    the content stream does

        x: [rows, bsz, d_model], both streams or one of them; h: [qlen, bsz, d_model], the content stream;
        pos_emb: [rlen, bsz, d_model]; mem: [mlen, bsz, d_model] or None; the rest as in `rel_attn_core`
        -> [rows, bsz, d_model], with the residual x added, normalized
        Source: the paper, section 2.3, equations for g and h; official two_stream_rel_attn and post_attention.
        """
        cat = h if mem is None else torch.cat([mem, h])
        q = torch.einsum("ibh,hnd->bnid", x, self.q)
        k = torch.einsum("jbh,hnd->bnjd", cat, self.k)
        v = torch.einsum("jbh,hnd->bnjd", cat, self.v)
        k_r = torch.einsum("rbh,hnd->bnrd", pos_emb, self.r)
        attn_vec = self.rel_attn_core(q, k, v, k_r, groups, seg_q, seg_k)
        out = torch.einsum("bnid,hnd->ibh", attn_vec, self.o)
        return self.layer_norm(x + dropout(out, self.dropout, self.training))


class FeedForward(nn.Module):
    """Position-wise feed-forward network with residual and LayerNorm: [..., d_model] -> [..., d_model]."""

    def __init__(self, d_model, d_inner, dropout, ff_activation):
        super().__init__()
        self.layer_1 = nn.Linear(d_model, d_inner)
        self.layer_2 = nn.Linear(d_inner, d_model)
        self.layer_norm = nn.LayerNorm(d_model, eps=1e-12)
        self.dropout = dropout
        self.activation = ACTIVATIONS[ff_activation]

    def forward(self, x):
        inner = dropout(self.activation(self.layer_1(x)), self.dropout, self.training)
        return self.layer_norm(x + dropout(self.layer_2(inner), self.dropout, self.training))


class Layer(nn.Module):
    """Two-stream attention, then the feed-forward network."""

    def __init__(self, d_model, n_head, d_head, d_inner, dropout, dropatt, ff_activation):
        super().__init__()
        self.rel_attn = RelativeAttention(d_model, n_head, d_head, dropout, dropatt)
        self.ff = FeedForward(d_model, d_inner, dropout, ff_activation)

    def forward(self, *inputs):
        """Return the new rows; the inputs are those of `two_stream_rel_attn`."""
        return self.ff(self.rel_attn.two_stream_rel_attn(*inputs))


def prefer_distance(r, r_r_bias, distance, peak=10.0, bias=4.0):
    """Change one head's position weights in place so that it starts out looking at one distance.

    With u a random unit vector and p = sqrt(w) [sin(w distance), cos(w distance)], adding p u^T to r and u to
    r_r_bias adds to the score of a key at distance x the sum over w of sqrt(w) cos(w (x - distance)), which is
    largest at x = distance. The factors make that largest score, after the division by sqrt(d_head), `peak`.

    r: [d_model, d_head]; r_r_bias: [d_head]; distance: query minus key, tokens; bias: length given to r_r_bias
    """
    w = frequencies(r.size(0), r.device)
    u = F.normalize(torch.randn_like(r_r_bias), dim=0)
    p = torch.cat([w.sqrt() * (w * distance).sin(), w.sqrt() * (w * distance).cos()])
    r += peak * math.sqrt(r.size(1)) / (bias * w.sqrt().sum()) * torch.outer(p, u)
    r_r_bias += bias * u


class XLNet(nn.Module):
    """XLNet with its language-model head; parameters have the names, without "transformer.", and shapes of
    transformers' XLNetLMHeadModel.

    n_token: size of the vocabulary; n_layer, n_head, d_head, d_inner, d_model: the shape, d_model even
    dropout, dropatt: rates for hidden states and for attention weights, 0 = off
    attn_type: "bi", or "uni" for a left-to-right Transformer-XL; same_length: with "uni", every token sees equally far
    bi_data: the second half of the batch is read backwards; the batch size must be even
    clamp_len: largest distance told apart, <= 0 = no limit
    reuse_len: tokens of a window, from its beginning, that enter the memory, 0 = all; mem_len: tokens kept, 0 = none
    ff_activation: a key of ACTIVATIONS
    init, init_std: see `init_weights`
    """

    def __init__(self, n_token, n_layer=6, n_head=4, d_head=8, d_inner=32, d_model=32, dropout=0.1, dropatt=0.1,
                 attn_type="bi", bi_data=False, clamp_len=-1, same_length=False, reuse_len=256, mem_len=384,
                 ff_activation="relu", init="local", init_std=None):
        super().__init__()
        if d_model % 2:
            raise ValueError(f"d_model {d_model} must be even: half of the position features are sines, half cosines")
        if attn_type not in ("bi", "uni"):
            raise ValueError(f"attn_type {attn_type!r} must be 'bi' or 'uni'")
        if ff_activation not in ACTIVATIONS:
            raise ValueError(f"ff_activation {ff_activation!r} must be one of {', '.join(ACTIVATIONS)}")
        self.config = dict(  # transformers' names and, dropatt apart, everything of its XLNetConfig that matters here
            vocab_size=n_token, n_layer=n_layer, n_head=n_head, d_head=d_head, d_inner=d_inner, d_model=d_model,
            dropout=dropout, dropatt=dropatt, attn_type=attn_type, bi_data=bi_data, clamp_len=clamp_len,
            same_length=same_length, reuse_len=reuse_len, mem_len=mem_len, ff_activation=ff_activation, untie_r=True,
        )
        self.attn_type, self.bi_data = attn_type, bi_data
        self.clamp_len, self.same_length = clamp_len, same_length
        self.reuse_len, self.mem_len = reuse_len, mem_len

        self.word_embedding = nn.Embedding(n_token, d_model)
        self.mask_emb = nn.Parameter(torch.empty(1, 1, d_model))
        self.layer = nn.ModuleList(
            Layer(d_model, n_head, d_head, d_inner, dropout, dropatt, ff_activation) for _ in range(n_layer)
        )
        self.dropout = dropout
        self.lm_loss = nn.Linear(d_model, n_token)
        self.lm_loss.weight = self.word_embedding.weight  # tied, as in the official pretraining
        self.init_weights(init, init_std)

    @torch.no_grad()
    def init_weights(self, init="local", init_std=None):
        """Draw all parameters anew: normal(0, init_std), biases 0, LayerNorm 1 and 0.

        init: "normal" stops there, as the official code does (mask_emb apart); "local" then lets each head prefer one
        distance, so that the query stream, which starts as the same vector at every position, can tell neighbours apart
        init_std: None = 0.02 with "normal" (official), 0.5 / sqrt(d_model) with "local": 0.09 at width 32, 0.018 at
        width 768, and at every width logits of standard deviation 0.5, a first cost near that of guessing
        """
        d_model = self.word_embedding.embedding_dim
        if init_std is None:
            init_std = 0.02 if init == "normal" else 0.5 / math.sqrt(d_model)
        for name, parameter in self.named_parameters():
            if name.endswith("layer_norm.weight"):
                nn.init.ones_(parameter)
            elif name.endswith(".bias"):  # of Linear and LayerNorm; r_w_bias and its kin are queries, and random
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=init_std)
        if init == "local":
            distances = itertools.cycle(LOCAL_DISTANCES)
            for layer in self.layer:
                for r, r_r_bias in zip(layer.rel_attn.r.unbind(dim=1), layer.rel_attn.r_r_bias):
                    prefer_distance(r, r_r_bias, next(distances))

    def save_pretrained(self, directory, **config):
        """Write config.json, with further entries `config`, and model.safetensors into an existing directory.

        transformers' AutoModel and XLNetLMHeadModel read it as it is, if n_head * d_head is d_model.
        """
        config = {"architectures": ["XLNetLMHeadModel"], "model_type": "xlnet", **self.config, **config}
        (Path(directory) / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        weights = {
            name if name.startswith("lm_loss.") else f"transformer.{name}": parameter.detach()
            for name, parameter in self.named_parameters()  # which has the tied weight once
        }
        save_file(weights, Path(directory) / "model.safetensors", metadata={"format": "pt"})

    @classmethod
    def from_pretrained(cls, directory, **overrides):
        """Return the model of a directory written by `save_pretrained` or by transformers, XLNetModel or with a head.

        overrides: arguments of the constructor that replace those of config.json
        Raises OSError if a file is missing, ValueError if it is no XLNet that can be had here, SafetensorError if the
        weights are damaged.
        """
        arguments = read_config(directory) | overrides
        model = cls(**arguments)
        path = Path(directory) / "pytorch_model.bin"  # of older transformers
        if path.is_file() and not path.with_name("model.safetensors").is_file():
            try:
                found = torch.load(path, map_location="cpu", weights_only=True)
            except pickle.UnpicklingError:
                raise ValueError("pytorch_model.bin holds more than tensors and may run code") from None
        else:
            found = load_file(path.with_name("model.safetensors"))
        weights = {name.removeprefix("transformer."): tensor for name, tensor in found.items()}
        weights.setdefault("lm_loss.bias", torch.zeros(arguments["n_token"]))  # XLNetModel has no head
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name not in weights or weights[name].shape != parameter.shape:
                    raise ValueError(f"{name} is missing, or not {list(parameter.shape)}")
                parameter.copy_(weights[name])
        return model

    def attention_groups(self, qlen, mlen, input_mask, perm_mask, inp_q, positions, like):
        """Return who may look where: the groups of the content stream, then, with positions, that of the query stream.

        positions: [bsz, num_predict], of each slot, -1 for an empty one, which sees nothing; or None
        like: a tensor of the type and on the device wanted
        Source: official transformer_xl, "Attention mask".
        """
        bsz, klen = like.size(1), mlen + qlen
        blocked = torch.zeros(bsz, qlen, klen, dtype=torch.bool, device=like.device)  # memory comes before mlen
        parts = [0, qlen]
        if self.attn_type == "uni":
            blocked |= create_mask(qlen, mlen, self.same_length, like.device)
        if perm_mask is not None and perm_mask.dim() == 3:
            blocked[..., mlen:] |= perm_mask.permute(2, 0, 1) > 0
        elif perm_mask is not None:
            rank = perm_mask.t()
            seen = rank if inp_q is None else rank - inp_q.t()  # what is to be predicted does not see its own rank
            blocked[..., mlen:] |= rank[:, None] > seen[:, :, None]
            if 0 < self.reuse_len < qlen:
                parts = [0, self.reuse_len, qlen]  # the first never look at the second: leave these keys out
        if input_mask is not None:
            blocked[..., mlen:] |= input_mask.t()[:, None] > 0
        attn_mask = like.new_zeros(blocked.shape).masked_fill_(blocked, BLOCKED)[:, None]

        def group(rows, distances, index, mask):
            return Group(rows, mask.size(3), distances, index, mask, blind=mask.amax(dim=3, keepdim=True) < 0)

        query = []
        if positions is not None:
            at = positions[:, None, :, None]
            index = qlen - at + torch.arange(klen, device=like.device)  # as in rel_shift
            index = index.clamp(max=klen if self.attn_type == "uni" else klen + qlen - 1)  # empty, or masked
            mask = attn_mask.gather(2, at.clamp(min=0).expand(-1, 1, -1, klen)).masked_fill(at < 0, BLOCKED)
            query.append(group(slice(qlen, None), slice(None), index, mask))
        # The query stream must guess its own token, the content stream sees itself.
        attn_mask.diagonal(mlen, dim1=2, dim2=3).zero_()
        return [
            group(slice(begin, end), slice(qlen - end, klen + end - begin), None,
                  attn_mask[:, :, begin:end, : mlen + end])
            for begin, end in itertools.pairwise(parts)
        ] + query

    def forward(self, inp_k, seg_id=None, input_mask=None, mems=None, perm_mask=None, target_mapping=None, inp_q=None):
        """Return the logits of the predicted slots, or of every position in single-stream mode, and the new memory.

        inp_k: [len, bsz] int, token ids
        seg_id: [len, bsz] int, or None for no segments; memory counts as segment 0
        input_mask: [len, bsz], 1 = padding, or None
        mems: list of n_layer [mlen, bsz, d_model], or None; what the previous call returned
        perm_mask: [len, len, bsz], 1 = position i must not see j; or the same as ranks, [len, bsz] int, the place of
            every position in the order of data_utils.permute, which puts the first reuse_len before the others; or None
        target_mapping: [num_predict, bsz] int, the position of each slot, -1 for an empty one; or the same as one-hot
            [num_predict, len, bsz]; or None for a slot at every position
        inp_q: [len, bsz], 1 = to be predicted; or None: content stream only, for fine-tuning and features
        -> logits [num_predict or len, bsz, n_token]; new_mems, list of n_layer [at most mem_len, bsz, d_model], or of
            None if mem_len is 0
        Raises ValueError if target_mapping comes without inp_q, or an odd batch with bi_data.
        Source: official transformer_xl and lm_loss.
        """
        hidden, new_mems = self.hidden(inp_k, seg_id, input_mask, mems, perm_mask, target_mapping, inp_q)
        return self.lm_loss(hidden), new_mems

    def hidden(self, inp_k, seg_id=None, input_mask=None, mems=None, perm_mask=None, target_mapping=None, inp_q=None):
        """Do what `forward` does up to the last hidden states: [num_predict or len, bsz, d_model], new_mems."""
        qlen, bsz = inp_k.shape
        device = inp_k.device
        if self.bi_data and bsz % 2:
            raise ValueError(f"batch size {bsz} must be even with bi_data: half of it is read backwards")
        if target_mapping is not None and inp_q is None:
            raise ValueError("target_mapping asks for predictions and needs inp_q, the query stream's input")
        if mems is None:
            mems = [None] * len(self.layer)
        mlen = 0 if mems[0] is None else mems[0].size(0)

        x, positions = self.word_embedding(inp_k), None
        if inp_q is not None and target_mapping is None:
            positions = torch.arange(qlen, device=device).expand(bsz, qlen)
            x = torch.cat([x, torch.where(inp_q[:, :, None] > 0, self.mask_emb, x)])
        elif inp_q is not None:
            if target_mapping.dim() == 3:
                empty = target_mapping.sum(dim=1) == 0
                target_mapping = target_mapping.argmax(dim=1).masked_fill(empty, -1)
            positions = target_mapping.t()
            x = torch.cat([x, self.mask_emb.expand(target_mapping.size(0), bsz, -1)])
        x = dropout(x, self.dropout, self.training)
        groups = self.attention_groups(qlen, mlen, input_mask, perm_mask, inp_q, positions, like=x)

        seg_q = seg_k = None
        if seg_id is not None:
            seg_q, seg_k = seg_id, F.pad(seg_id, (0, 0, mlen, 0))  # memory counts as segment 0
            if positions is not None:
                seg_q = torch.cat([seg_id, seg_id.gather(0, positions.t().clamp(min=0))])
            seg_q, seg_k = (F.one_hot(ids.t().long(), SEGMENTS)[:, None].to(x.dtype) for ids in (seg_q, seg_k))

        pos_emb = relative_positional_encoding(
            qlen, mlen + qlen, x.size(2), self.clamp_len, self.attn_type, self.bi_data, bsz, device
        )
        pos_emb = dropout(pos_emb.to(x.dtype), self.dropout, self.training)

        new_mems = []
        for i, layer in enumerate(self.layer):
            h = x[:qlen]
            new_mems.append(cache_mem(h, mems[i], self.mem_len, self.reuse_len))
            if positions is not None and i + 1 == len(self.layer):
                # The last layer's content stream would feed nothing: neither the loss nor the memory.
                x, groups = x[qlen:], [groups[-1]._replace(rows=slice(None))]
                seg_q = None if seg_q is None else seg_q[:, :, qlen:]
            x = layer(x, h, pos_emb, mems[i], groups, seg_q, seg_k)
        return dropout(x, self.dropout, self.training), new_mems


ARGUMENTS = tuple(inspect.signature(XLNet).parameters)


def read_config(directory):
    """Return the arguments of XLNet's constructor that a directory's config.json sets.

    Null ones are left out; as mem_len and reuse_len they mean that transformers keeps no memory, which says nothing of
    what pretraining should do.

    Raises OSError if there is no config.json, ValueError if it is not that of an XLNet with untied biases and a tied
    head, KeyError if it says nothing of the shape.
    """
    config = json.loads((Path(directory) / "config.json").read_text(encoding="utf-8"))
    if config.get("model_type") != "xlnet" or not config.get("untie_r", True):
        raise ValueError("config.json is not that of an XLNet with untie_r")
    if not config.get("tie_word_embeddings", True):
        raise ValueError("config.json has tie_word_embeddings false, and the head here has the embedding's weights")
    config["n_token"] = config["vocab_size"]
    config["d_head"] = config.get("d_head") or config["d_model"] // config["n_head"]
    return {name: config[name] for name in ARGUMENTS if config.get(name) is not None}
