"""The model against the official code's outputs, transformers' XLNet, naive loops, and what must not leak."""

import ast
import copy
import inspect
import itertools
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from torch.overrides import TorchFunctionMode

import data_utils
import xlnet
from xlnet import XLNet, prediction_loss

GOLDEN = sorted((Path(__file__).parent / "golden").glob("*.npz"))


def randomize(model, std=0.3):
    """Give every parameter, the zero biases too, a random value, so that none can be left out unnoticed."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=std)
    return model


def random_feature(rng, seq_len=24, reuse_len=12, num_predict=8, n_token=50):
    """Return a window of random tokens, as create_feature does."""
    other = seq_len - reuse_len
    a_len = int(rng.integers(1, other - 3))
    is_masked = np.zeros(seq_len, dtype=bool)
    is_masked[rng.choice(seq_len, num_predict, replace=False)] = True
    return {
        "input": rng.integers(n_token, size=seq_len),
        "is_masked": is_masked,
        "seg_id": np.repeat([0, 1, 2], [reuse_len + a_len + 1, other - a_len - 2, 1]),
    }


def random_window(rng, seq_len=24, reuse_len=12, perm_size=6, num_predict=8, n_token=50):
    """Return a window of random tokens as make_permute gives it, with a batch axis of 1."""
    feature = random_feature(rng, seq_len, reuse_len, num_predict, n_token)
    batch = data_utils.make_permute(feature, reuse_len, seq_len, perm_size, num_predict, rng)
    return {key: tensor.unsqueeze(-1) for key, tensor in batch.items()}


def with_shift(config):
    """Return arguments of XLNet that give the same scores by way of `rel_shift`: no distance reaches the clamp_len."""
    return config if config.get("clamp_len", -1) > 0 else config | {"clamp_len": 10_000}


def stack(members):
    """Return one batch of windows that have a batch axis each."""
    return {key: torch.cat([member[key] for member in members], dim=-1) for key in members[0]}


def given_to_model(batch):
    return {key: value for key, value in batch.items() if key not in ("target", "target_mask")}


def call(model, batch, mems=None):
    return model(**given_to_model(batch), mems=mems)


# ---------------------------------------------------------------- the official code


def official_array(golden, kind, name):
    """Return weight (kind "w") or gradient ("g") `name` of our model from an official file."""
    if name == "lm_loss.bias":
        return golden[f"{kind}/lm_loss/bias"]
    if name == "word_embedding.weight":
        return golden[f"{kind}/transformer/word_embedding/lookup_table"]
    if name == "mask_emb":
        return golden[f"{kind}/transformer/mask_emb/mask_emb"]
    _, layer, block, *rest = name.split(".")
    if rest[0] in ("r_w_bias", "r_r_bias", "r_s_bias", "seg_embed"):
        return golden[f"{kind}/transformer/{rest[0]}"][int(layer)]
    prefix = f"{kind}/transformer/layer_{layer}/{block}"
    if rest[0] == "layer_norm":
        return golden[f"{prefix}/LayerNorm/{'gamma' if rest[1] == 'weight' else 'beta'}"]
    if block == "rel_attn":
        return golden[f"{prefix}/{rest[0]}/kernel"]
    return golden[f"{prefix}/{rest[0]}/kernel"].T if rest[1] == "weight" else golden[f"{prefix}/{rest[0]}/bias"]


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
@pytest.mark.parametrize("form", ["one-hot", "positions", "shift"])
def test_official_outputs_and_gradients(path, form):
    """Hidden states, losses, memories to 1e-5 and every gradient to 1e-4 of its norm, as the official code has them."""
    golden = np.load(path)
    config = ast.literal_eval(str(golden["config"]))
    model = XLNet(**with_shift(config) if form == "shift" else config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(official_array(golden, "w", name)))

    given = {key[3:]: torch.from_numpy(golden[key]) for key in golden.files if key.startswith("in/")}
    target, target_mask = given.pop("target"), given.pop("target_mask")
    if "mems" in given:
        given["mems"] = list(given["mems"])
    if form == "positions":
        given["target_mapping"] = given["target_mapping"].argmax(dim=1)
    hidden, new_mems = model.hidden(**given)
    logits = model.lm_loss(hidden)
    loss = prediction_loss(logits, target, target_mask)
    loss.backward()

    def near(ours, key):
        np.testing.assert_allclose(ours.detach().numpy(), golden[key], rtol=0, atol=1e-5)

    near(hidden, "out/output")
    near(loss, "out/loss")
    near(F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view_as(target), "out/token_loss")
    near(torch.stack(new_mems), "out/new_mems")
    for name, parameter in model.named_parameters():
        official = torch.from_numpy(official_array(golden, "g", name))
        assert (parameter.grad - official).norm() <= 1e-4 * official.norm(), name


@pytest.mark.parametrize("clamp_len", [-1, 2])
def test_gradients_equal_finite_differences(clamp_len):
    """In float64, for every parameter and the memory; gelu, because relu has no derivative at 0."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    model = XLNet(
        7,
        n_layer=2,
        n_head=2,
        d_head=2,
        d_inner=3,
        d_model=4,
        dropout=0,
        dropatt=0,
        reuse_len=3,
        mem_len=2,
        ff_activation="gelu",
        clamp_len=clamp_len,
    )
    randomize(model.double())
    batch = random_window(rng, seq_len=8, reuse_len=3, perm_size=1, num_predict=4, n_token=7)
    names = [name for name, _ in model.named_parameters()]
    mems = [torch.randn(2, 1, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]

    def loss(*values):
        given = given_to_model(batch) | {"mems": list(values[:2])}
        logits, _ = torch.func.functional_call(model, dict(zip(names, values[2:], strict=True)), kwargs=given)
        return prediction_loss(logits, batch["target"], batch["target_mask"])

    assert torch.autograd.gradcheck(loss, (*mems, *model.parameters()))


# ---------------------------------------------------------------- transformers

CASES = {
    "memory and segments": dict(),
    "first step, no memory": dict(mlen=0),
    "mem_len 0": dict(mlen=0, mem_len=0),
    "bi_data": dict(bi_data=True),
    "bi_data, clamp_len": dict(bi_data=True, clamp_len=5),
    "clamp_len": dict(clamp_len=4),
    "uni": dict(attn_type="uni", bsz=1),  # theirs adds the two masks in place, which fails for more than one row
    "uni, same_length, clamp_len": dict(attn_type="uni", same_length=True, clamp_len=7, bsz=1),
    "uni, same_length, short memory": dict(attn_type="uni", same_length=True, mlen=3, bsz=1),
    "gelu": dict(ff_activation="gelu"),
    "gelu_new": dict(ff_activation="gelu_new"),
    "reuse_len 0": dict(reuse_len=0),
    "no segments": dict(segments=False),
    "padding": dict(padding=True),
    "one stream": dict(streams=1),
    "one stream, no memory, padding": dict(streams=1, mlen=0, padding=True),
    "one stream, uni, bi_data": dict(streams=1, attn_type="uni", bi_data=True, permuted=False),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("direction", ["theirs to ours", "ours to theirs"])
@pytest.mark.parametrize("form", ["plain", "shift"])
def test_transformers_parity(case, direction, form):
    """Weights copied either way give the same logits, memories and gradients as XLNetLMHeadModel, to 1e-5."""
    torch.manual_seed(1)
    rng = np.random.default_rng(1)
    options = {
        "mlen": 10,
        "mem_len": 10,
        "reuse_len": 12,
        "attn_type": "bi",
        "bi_data": False,
        "clamp_len": -1,
        "same_length": False,
        "ff_activation": "relu",
        "segments": True,
        "padding": False,
        "streams": 2,
        "bsz": 2,
        "permuted": True,
    } | case
    mlen, bsz, streams = options.pop("mlen"), options.pop("bsz"), options.pop("streams")
    segments, padding, permuted = options.pop("segments"), options.pop("padding"), options.pop("permuted")
    ours_options = with_shift(options) if form == "shift" else options
    ours = XLNet(50, n_layer=3, n_head=2, d_head=8, d_inner=24, d_model=16, dropout=0, dropatt=0, **ours_options)
    theirs = transformers.XLNetLMHeadModel(
        transformers.XLNetConfig(
            vocab_size=50, n_layer=3, n_head=2, d_inner=24, d_model=16, dropout=0, use_mems_train=True, **options
        )
    )
    prefixed = {name if name.startswith("lm_loss") else f"transformer.{name}" for name in ours.state_dict()}
    assert prefixed == set(theirs.state_dict())
    if direction == "theirs to ours":
        randomize(theirs)
        ours.load_state_dict({name.removeprefix("transformer."): w for name, w in theirs.state_dict().items()})
    else:
        randomize(ours)
        theirs.load_state_dict(
            {name if name.startswith("lm_loss") else f"transformer.{name}": w for name, w in ours.state_dict().items()}
        )

    batch = stack([random_window(rng) for _ in range(bsz)])
    target = batch.pop("target")
    weight = batch.pop("target_mask")
    if streams == 1:
        batch["inp_q"] = batch["target_mapping"] = None
        target, weight = batch["inp_k"], torch.ones(batch["inp_k"].shape)
    if not segments:
        batch["seg_id"] = None
    if not permuted:
        batch["perm_mask"] = None
    input_mask = None
    if padding:
        input_mask = torch.zeros(24, bsz)
        input_mask[20:, 0] = 1
    mems = [torch.randn(mlen, bsz, 16) for _ in range(3)] if mlen else None

    logits, new_mems = ours(**batch, input_mask=input_mask, mems=mems)
    one_hot = None
    if streams == 2:  # an empty slot is all zeros there
        positions = batch["target_mapping"]
        one_hot = F.one_hot(positions.clamp(min=0), 24) * (positions >= 0)[:, :, None]
        one_hot = one_hot.permute(1, 0, 2).float()
    output = theirs(
        input_ids=batch["inp_k"].t(),
        token_type_ids=None if batch["seg_id"] is None else batch["seg_id"].t(),
        input_mask=None if input_mask is None else input_mask.t(),
        mems=mems,
        perm_mask=batch["perm_mask"].permute(2, 0, 1) if permuted else None,
        target_mapping=one_hot,
        use_mems=options["mem_len"] > 0,
    )
    # float32, values of order 1, three layers: rounding is of order 1e-6
    torch.testing.assert_close(logits, output.logits.transpose(0, 1), rtol=1e-5, atol=1e-5)
    if options["mem_len"]:
        torch.testing.assert_close(new_mems, list(output.mems), rtol=1e-5, atol=1e-5)
    else:
        assert new_mems == [None] * 3

    prediction_loss(logits, target, weight).backward()
    prediction_loss(output.logits.transpose(0, 1), target, weight).backward()
    theirs_grad = {name.removeprefix("transformer."): p.grad for name, p in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        if theirs_grad[name] is None:
            assert parameter.grad is None, name
        elif parameter.grad is None:
            assert not theirs_grad[name].any(), name
        else:
            torch.testing.assert_close(parameter.grad, theirs_grad[name], rtol=1e-4, atol=1e-6, msg=name)


# ---------------------------------------------------------------- parts


def test_rel_shift_example():
    """The grid of the docstring."""
    x, position = torch.arange(10.0).expand(1, 1, 3, 10), torch.tensor([[4, 5, 6]])
    expected = [[3, 4, 5, 6, 7, 8, 9], [2, 3, 4, 5, 6, 7, 8], [1, 2, 3, 4, 5, 6, 7]]
    assert xlnet.rel_shift(x, position, klen=7)[0, 0].tolist() == expected


@pytest.mark.parametrize("mlen", [0, 5])
@pytest.mark.parametrize("first_part", [0, 2, 6])
def test_query_blocks_equal_a_loop(mlen, first_part):
    """Each query of each block has the mask of its position; the content stream sees itself, an empty slot nothing.

    The mask of a blind query is 0 everywhere.
    """
    torch.manual_seed(0)
    qlen, klen = 6, 6 + mlen
    blocked = torch.rand(2, qlen, klen) < 0.5
    blocked[:, :first_part, mlen + first_part :] = True
    blocked[1, 4] = True
    positions = torch.tensor([[4, 4], [-1, 5]])  # [num_predict, bsz]
    blocks = xlnet.query_blocks(blocked, positions, first_part, torch.float32)
    n_keys = [block.attn_mask.size(3) for block in blocks]
    assert n_keys == ([mlen + 2, klen, klen] if first_part == 2 else [klen, klen])

    for b in range(2):
        rows = []
        for block, n_key in zip(blocks, n_keys, strict=True):
            for mask, blind in zip(block.attn_mask[b, 0], block.blind[b, 0, :, 0], strict=True):
                assert ((mask == 0) | (mask == xlnet.BLOCKED)).all()
                assert (mask == 0).all() or not blind
                seen = F.pad((mask == 0) & ~blind, (0, klen - n_key))
                assert blind == (not seen.any())
                rows.append(seen.tolist())
        expected = []
        for i in range(qlen):
            expected.append([j == mlen + i or not blocked[b, i, j] for j in range(klen)])
        for i in positions[:, b].tolist():
            expected.append([i >= 0 and not blocked[b, i, j] for j in range(klen)])
        assert rows == expected


@pytest.mark.parametrize("reuse_len", [0, 2])
def test_ranks_leave_out_keys_that_the_first_part_never_sees(reuse_len, monkeypatch):
    """With ranks the first reuse_len positions have the memory and each other as keys; with a matrix, all keys."""
    seen = []
    attention = xlnet.attention

    def spy(q, k, v, attn_mask, *others):
        seen.append(tuple(attn_mask.shape[2:]))
        return attention(q, k, v, attn_mask, *others)

    monkeypatch.setattr(xlnet, "attention", spy)
    model = XLNet(50, n_layer=1, reuse_len=reuse_len)
    mems = [torch.zeros(5, 1, 32)]
    inp_k = torch.zeros(6, 1, dtype=torch.int64)
    model(inp_k, mems=mems, rank=inp_k)
    assert seen == ([(6, 11)] if reuse_len == 0 else [(2, 7), (4, 11)])
    seen.clear()
    model(inp_k, mems=mems, perm_mask=torch.zeros(6, 6, 1))
    assert seen == [(6, 11)]


@pytest.mark.parametrize("d_model", [4, 32, 64, 256, 768])
@pytest.mark.parametrize("klen", [1, 24, 896])
def test_few_frequencies_give_all(klen, d_model):
    """Sines and cosines of all frequencies, at every distance, are sums of those of the few, to 3e-7."""
    few, mix = xlnet.few_frequencies(klen, d_model)
    for distance in torch.arange(-klen, klen + 1).split(100):
        sines, cosines = xlnet.position_features(distance, few).chunk(2, dim=1)
        all_sines, all_cosines = xlnet.position_features(distance, xlnet.frequencies(d_model)).chunk(2, dim=1)
        torch.testing.assert_close(sines @ mix, all_sines, rtol=0, atol=3e-7)
        torch.testing.assert_close(cosines @ mix, all_cosines, rtol=0, atol=3e-7)
    assert mix.norm(dim=0).max() < 5  # a sum of large terms that cancel would be inexact in float32
    if klen == 896:
        assert len(few) == {4: 2, 32: 16, 64: 28, 256: 68, 768: 136}[d_model]


def test_rotate_turns_positions_into_distances():
    """The inner product with the features of position j is that of x with the features of the distance i - j."""
    torch.manual_seed(1)
    x, frequency = torch.randn(8, dtype=torch.float64), xlnet.frequencies(8)
    for i, j in (0, 0), (5, 2), (-3, 40):
        of_i, of_j, of_distance = (xlnet.position_features(torch.tensor(n), frequency) for n in (i, j, i - j))
        torch.testing.assert_close(xlnet.rotate(x, of_i) @ of_j, x @ of_distance)


@pytest.mark.parametrize("d_model, n_head", [(32, 4), (64, 4), (256, 4), (768, 12)])
def test_positions_give_the_scores_of_distances(d_model, n_head):
    """With 384 tokens of memory: logits within 1e-5 of the largest, every gradient within 1e-4 of its norm."""
    torch.manual_seed(2)
    shape = dict(n_layer=2, n_head=n_head, d_head=d_model // n_head, d_inner=d_model, d_model=d_model)
    plain = XLNet(50, **shape, dropout=0, dropatt=0, bi_data=True)
    shift = XLNet(50, **with_shift(shape), dropout=0, dropatt=0, bi_data=True)
    shift.load_state_dict(plain.state_dict())
    rng = np.random.default_rng(2)
    batch = stack([random_window(rng, seq_len=512, reuse_len=256, perm_size=256, num_predict=85) for _ in range(2)])
    mems = [torch.randn(384, 2, d_model) for _ in range(2)]
    logits, expected = call(plain, batch, mems)[0], call(shift, batch, mems)[0]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    gradients = loss_and_gradients(plain, batch, mems)[1]
    expected_gradients = loss_and_gradients(shift, batch, mems)[1]
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        assert (ours - theirs).norm() <= 1e-4 * theirs.norm()


def test_relative_positional_encoding_equals_a_loop():
    """Each entry is the sine or cosine of distance * 10000^(-2k / d_model), the sign turned in the second half."""
    encoding = xlnet.relative_positional_encoding(qlen=3, klen=5, d_model=6, clamp_len=4, bi_data=True, bsz=4)
    assert encoding.shape == (8, 4, 6)
    for r in range(8):
        for b in range(4):
            distance = max(-4, min(4, 5 - r)) * (-1 if b >= 2 else 1)
            angles = [distance * 10000 ** (-2 * k / 6) for k in range(3)]
            expected = [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            assert encoding[r, b].tolist() == pytest.approx(expected, abs=1e-6)


def test_create_mask_example():
    """With a query 3 long and a memory of 2, without and with same_length."""
    assert xlnet.create_mask(3, 2, False).int().tolist() == [[0, 0, 0, 1, 1], [0, 0, 0, 0, 1], [0, 0, 0, 0, 0]]
    assert xlnet.create_mask(3, 2, True).int().tolist() == [[0, 0, 0, 1, 1], [1, 0, 0, 0, 1], [1, 1, 0, 0, 0]]


@pytest.mark.parametrize("form", ["plain", "shift"])
def test_rel_attn_core_equals_a_loop(form):
    """The three scores of the paper, written out for every query and key; a query that sees nothing reads nothing.

    Four successive positions, and then position 2 twice more, as slots of the query stream; the last sees nothing.
    """
    torch.manual_seed(2)
    qlen, mlen, d_head, d_model = 4, 2, 3, 4
    klen = qlen + mlen
    attn = randomize(xlnet.RelativeAttention(d_model=d_model, n_head=2, d_head=d_head, dropout=0, dropatt=0), std=1)
    position = mlen + torch.tensor([[0, 1, 2, 3, 2, 2]])
    q, k, v = torch.randn(1, 2, 6, d_head), torch.randn(1, 2, klen, d_head), torch.randn(1, 2, klen, d_head)
    visible = torch.rand(6, klen) < 0.7
    visible[:, 0] = True
    visible[5] = False
    mask = torch.where(visible, 0.0, xlnet.BLOCKED)[None, None]
    blind = ~visible.any(dim=1)[None, None, :, None]
    blocks = [
        xlnet.QueryBlock(mask[:, :, :4], blind[:, :, :4]),
        xlnet.QueryBlock(mask[:, :, 4:], blind[:, :, 4:]),
    ]
    seg_q, seg_k = torch.randint(3, (6,)), torch.randint(3, (klen,))
    one_hot_q, one_hot_k = (F.one_hot(seg, xlnet.SEGMENTS)[None, None].float() for seg in (seg_q, seg_k))
    features, mix = xlnet.position_tables(klen, d_model, torch.device("cpu"), torch.float32)
    queries = xlnet.Queries(position, features[position][:, None], one_hot_q, blocks)
    pos_emb = None
    if form == "shift":
        pos_emb = xlnet.relative_positional_encoding(qlen, klen, d_model, -1, False, bsz=1).float()
    keys = xlnet.Keys(features[None, None], one_hot_k, mix, pos_emb)
    out = attn.rel_attn_core(q, k, v, queries, keys)
    assert not out[0, :, 5].any()

    def score(n, query, j):
        content = (q[0, n, query] + attn.r_w_bias[n]) @ k[0, n, j]
        distance = xlnet.position_features(position[0, query] - j, xlnet.frequencies(d_model)).float()
        by_distance = (q[0, n, query] + attn.r_r_bias[n]) @ (distance @ attn.r[:, n])
        segment = (q[0, n, query] + attn.r_s_bias[n]) @ attn.seg_embed[int(seg_q[query] != seg_k[j]), n]
        return (content + by_distance + segment) / math.sqrt(d_head)

    for n in range(2):
        for query in range(5):
            seen = [j for j in range(klen) if visible[query, j]]
            prob = torch.stack([score(n, query, j) for j in seen]).softmax(dim=0)
            torch.testing.assert_close(out[0, n, query], prob @ v[0, n, seen], rtol=1e-4, atol=1e-5)


class AsOn(TorchFunctionMode):
    """Let tensors say that they are on another device."""

    def __init__(self, device):
        self.device = torch.device(device)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return self.device if func == torch.Tensor.device.__get__ else func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_call_of_a_fused_kernel_computes_the_same(dtype):
    """Output and gradients, with a mask, a row that sees nothing and keys beyond the mask; dropout when training."""
    torch.manual_seed(17)
    mask = torch.where(torch.rand(2, 1, 5, 6) < 0.5, xlnet.BLOCKED, 0.0).to(dtype)
    mask[0, :, 2] = xlnet.BLOCKED
    given = [torch.randn(2, 3, n, width, dtype=dtype, requires_grad=True) for n, width in ((5, 8), (9, 8), (9, 4))]
    out = xlnet.attention(*given, mask, dropatt=0.5, training=False)
    expected = torch.autograd.grad(out.square().sum(), given)
    with AsOn("cuda"):
        fused = xlnet.attention(*given, mask, dropatt=0.5, training=False)
        dropped = xlnet.attention(*given, mask, dropatt=0.5, training=True)
    tolerance = dict(rtol=1e-4, atol=1e-5) if dtype == torch.float32 else dict(rtol=0.05, atol=0.05)  # 8 bits
    torch.testing.assert_close(fused, out, **tolerance)
    torch.testing.assert_close(torch.autograd.grad(fused.square().sum(), given), expected, **tolerance)
    assert not torch.allclose(dropped, out, rtol=0.1)


def test_a_mac_computes_attention_without_the_fused_call(monkeypatch):
    """There the call returned values as wide as the queries, until PyTorch 2.12."""
    monkeypatch.setattr(xlnet.F, "scaled_dot_product_attention", None)
    q, k, v, mask = (torch.randn(size) for size in ((2, 3, 5, 8), (2, 3, 9, 8), (2, 3, 9, 4), (2, 1, 5, 9)))
    plain = xlnet.attention(q, k, v, mask, dropatt=0.0, training=True)
    with AsOn("mps"):
        assert torch.equal(xlnet.attention(q, k, v, mask, dropatt=0.0, training=True), plain)


@pytest.mark.parametrize(
    "prev, mem_len, reuse_len, expected",
    [
        (None, 0, 3, None),
        (None, 9, 3, [0, 1, 2]),
        (None, 2, 3, [1, 2]),
        (None, 9, 0, [0, 1, 2, 3, 4]),
        ([10, 11], 9, 3, [10, 11, 0, 1, 2]),
        ([10, 11], 4, 3, [11, 0, 1, 2]),
        ([10, 11], 2, 0, [3, 4]),
    ],
)
def test_cache_mem_table(prev, mem_len, reuse_len, expected):
    """The last mem_len of old memory and the first reuse_len inputs, without a gradient."""
    current = torch.arange(5.0, requires_grad=True)
    memory = xlnet.cache_mem(current, None if prev is None else torch.tensor(prev).float(), mem_len, reuse_len)
    assert (memory if memory is None else memory.tolist()) == expected
    assert memory is None or not memory.requires_grad


@pytest.mark.parametrize("mlen", [0, 4])
def test_memory_keeps_nothing_else_alive(mlen):
    """The storage of what is remembered is as large as itself, whatever it was cut from."""
    current = torch.randn(10, 2, 3)
    memory = xlnet.cache_mem(current, torch.randn(mlen, 2, 3) if mlen else None, mem_len=6, reuse_len=7)
    assert memory.shape == (6, 2, 3)
    assert memory.untyped_storage().nbytes() == memory.numel() * memory.element_size()
    memory.zero_()  # nor does a change of it reach the stream
    assert current.all()


@pytest.mark.parametrize("rate", [0.0, 0.001, 0.1, 0.5, 0.999])
def test_dropout_has_the_rate_and_the_mean_of_dropout(rate):
    """Over a million values, also where the rate is no multiple of 1/256; five standard errors of a Bernoulli mean."""
    torch.manual_seed(3)
    x = torch.ones(1001, 999, requires_grad=True)  # a size that eight does not divide
    dropped = xlnet.dropout(x, rate, training=True)
    kept = dropped != 0
    error = 5 * math.sqrt(rate * (1 - rate) / x.numel())
    assert abs(kept.float().mean() - (1 - rate)) <= error
    torch.testing.assert_close(dropped[kept], torch.full_like(dropped[kept], 1 / (1 - rate)))
    dropped.sum().backward()
    torch.testing.assert_close(x.grad, dropped.detach())
    # neighbours are independent: of two adjacent values both are kept as often as chance has it
    for one, other in (kept[:, 1:], kept[:, :-1]), (kept[1:], kept[:-1]):
        assert abs((one & other).float().mean() - (1 - rate) ** 2) <= 3 * error
    assert xlnet.dropout(x, rate, training=False) is x


def test_dropout_acts_in_training_only():
    """Each of the two rates alone changes a training step, and nothing changes an evaluation."""
    batch = random_window(np.random.default_rng(4))
    for rates in (dict(dropout=0.5, dropatt=0), dict(dropout=0, dropatt=0.5)):
        torch.manual_seed(4)
        model = XLNet(50, n_layer=2, reuse_len=12, **rates)
        assert not torch.equal(call(model, batch)[0], call(model, batch)[0])
        model.eval()
        assert torch.equal(call(model, batch)[0], call(model, batch)[0])


@pytest.mark.parametrize("clamp_len", [-1, 9])
def test_dropout_acts_where_it_does_officially(monkeypatch, clamp_len):
    """On embeddings, positions, attention weights, attention output, twice in the feed-forward layer, the output.

    Officially the positions are those of distances. Here they are those of keys, with clamp_len both.
    """
    seen, dropout = [], xlnet.dropout

    def spy(x, rate, training):
        seen.append(tuple(x.shape))
        return dropout(x, rate, training)

    monkeypatch.setattr(xlnet, "dropout", spy)
    queries, slots, inner = (24 + 8, 1, 32), (8, 1, 32), 20  # queries: of both streams
    keys = (1, 24, 2 * len(xlnet.few_frequencies(64, 32)[0]))
    model = XLNet(50, n_layer=2, n_head=4, d_inner=inner, clamp_len=clamp_len)
    call(model, random_window(np.random.default_rng(0)))
    expected = [queries, keys] if clamp_len < 0 else [queries, keys, (48, 1, 32)]
    expected += [(1, 4, 24, 24), (1, 4, 8, 24)]  # attention weights of each stream
    expected += [queries, (24 + 8, 1, inner), queries]
    expected += [(1, 4, 8, 24), slots, (8, 1, inner), slots]  # the last layer has no content stream
    expected += [slots]
    assert sorted(seen) == sorted(expected)


def test_bi_data_reads_backwards():
    """A text in the forward half and the same text reversed in the backward half get the same logits, reversed."""
    torch.manual_seed(5)
    rng = np.random.default_rng(5)
    model = randomize(XLNet(50, n_layer=2, bi_data=True)).eval()
    window = random_window(rng)
    forward = {key: window[key] for key in ("inp_k", "seg_id", "perm_mask", "inp_q")}
    backward = {key: tensor.flip(0) for key, tensor in forward.items()}
    backward["perm_mask"] = backward["perm_mask"].flip(1)
    logits, _ = model(**{key: torch.cat([forward[key], backward[key]], dim=-1) for key in forward})
    torch.testing.assert_close(logits[:, 0], logits[:, 1].flip(0), rtol=1e-4, atol=1e-5)
    plain, _ = model(**{key: torch.cat([backward[key], backward[key]], dim=-1) for key in forward})
    assert not torch.allclose(plain[:, 0], plain[:, 1], atol=1e-3)  # the direction does matter


def test_empty_slot_changes_nothing():
    """An empty slot leaves the other slots' logits as they are, and adds nothing to the loss."""
    rng = np.random.default_rng(6)
    model = randomize(XLNet(50, n_layer=2)).eval()
    batch = random_window(rng, num_predict=8)
    filled = (batch["target_mapping"] >= 0).squeeze()
    full, _ = call(model, batch)
    longer = batch | {
        "target_mapping": F.pad(batch["target_mapping"], (0, 0, 0, 3), value=-1),
        "target": F.pad(batch["target"], (0, 0, 0, 3)),
        "target_mask": F.pad(batch["target_mask"], (0, 0, 0, 3)),
    }
    padded, _ = call(model, longer)
    torch.testing.assert_close(padded[:8][filled], full[filled])
    loss = prediction_loss(full, batch["target"], batch["target_mask"])
    torch.testing.assert_close(prediction_loss(padded, longer["target"], longer["target_mask"]), loss)


def test_prediction_loss_ignores_empty_slots():
    """The loss is the mean over real targets only; where there is none it is 0, not a division by 0."""
    logits = torch.tensor([[[0.0, 0.0]], [[9.0, -9.0]]])
    target, weight = torch.tensor([[0], [1]]), torch.tensor([[1.0], [0.0]])
    assert prediction_loss(logits, target, weight).item() == pytest.approx(math.log(2))
    assert prediction_loss(logits, target, torch.zeros(2, 1)).item() == 0


def test_prediction_loss_of_bfloat16_logits_is_not_rounded():
    """It is the loss of the same logits in float32, to the bit."""
    torch.manual_seed(15)
    logits, target, weight = torch.randn(3, 1, 7).bfloat16(), torch.ones(3, 1).long(), torch.ones(3, 1)
    assert torch.equal(prediction_loss(logits, target, weight), prediction_loss(logits.float(), target, weight))


@pytest.mark.parametrize(
    "flags, call_with, words",
    [
        (dict(d_model=31), dict(), "d_model 31 must be even"),
        (dict(attn_type="both"), dict(), "'bi' or 'uni'"),
        (dict(bi_data=True), dict(), "batch size 1 must be even"),
        (dict(), dict(target_mapping=torch.zeros(2, 1, dtype=torch.int64)), "needs inp_q"),
        (dict(), dict(perm_mask=torch.zeros(4, 4, 1), rank=torch.zeros(4, 1)), "perm_mask and rank"),
    ],
)
def test_wrong_calls_are_named(flags, call_with, words):
    """The message names the argument at fault."""
    with pytest.raises(ValueError, match=words):
        XLNet(50, **flags)(torch.zeros(4, 1, dtype=torch.int64), **call_with)


# ---------------------------------------------------------------- the order as ranks, bfloat16, compiled, on a GPU


def with_ranks(seed, reuse_len=12, perm_size=6, num_predict=8):
    """Return the same random window twice, with a batch axis of 1: with the order as a mask, and as ranks."""
    feature = random_feature(np.random.default_rng(seed), reuse_len=reuse_len, num_predict=num_predict)
    masked = data_utils.make_permute(feature, reuse_len, 24, perm_size, num_predict, np.random.default_rng(seed))
    ranked = data_utils.permute(feature, reuse_len, perm_size, num_predict, np.random.default_rng(seed))
    return (
        {key: tensor.unsqueeze(-1) for key, tensor in masked.items()},
        {key: torch.from_numpy(array).unsqueeze(-1) for key, array in ranked.items()},
    )


def loss_and_gradients(model, batch, mems=None):
    model.zero_grad()
    loss = prediction_loss(call(model, batch, mems)[0], batch["target"], batch["target_mask"])
    loss.backward()
    return loss, [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("mlen", [0, 7])
@pytest.mark.parametrize("reuse_len", [12, 0])
@pytest.mark.parametrize("form", ["slots", "a slot at every position", "one stream"])
def test_ranks_mean_what_the_mask_means(mlen, reuse_len, form):
    """The same logits, memory and gradients, though keys that the first part may not see are left out."""
    torch.manual_seed(11)
    model = randomize(XLNet(50, n_layer=3, reuse_len=reuse_len, mem_len=7, dropout=0, dropatt=0))
    pairs = [with_ranks(seed) for seed in (0, 1)]
    masked, ranked = stack([pair[0] for pair in pairs]), stack([pair[1] for pair in pairs])
    assert "rank" not in masked and "perm_mask" not in ranked
    for batch in masked, ranked:
        if form != "slots":
            batch["target_mapping"] = None
            batch["target"], batch["target_mask"] = batch["inp_k"], batch["inp_q"]
        if form == "one stream":  # not even a target sees itself in a mask, and the content stream does
            batch["inp_q"] = None
    mems = [torch.randn(mlen, 2, 32) for _ in range(3)] if mlen else None
    for ours, expected in zip(call(model, ranked, mems), call(model, masked, mems), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    _, gradients = loss_and_gradients(model, ranked, mems)
    _, expected_gradients = loss_and_gradients(model, masked, mems)
    for ours, expected in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", range(10))
def test_a_target_leaks_to_nobody_before_it_with_ranks_either(seed):
    """Every position, bit for bit, the keys left out included; half of the windows under bfloat16."""
    torch.manual_seed(seed)
    batch, ranked = with_ranks(seed, num_predict=24 if seed % 4 == 0 else 8, perm_size=[1, 3, 12][seed % 3])
    model = randomize(XLNet(50, n_layer=3, reuse_len=12)).eval()
    mems = [torch.randn(7, 1, 32) for _ in range(3)] if seed % 2 else None

    def model_with_ranks(**given):
        with torch.autocast("cpu", torch.bfloat16, enabled=seed % 2 == 0):
            return model(**given | {"perm_mask": None, "rank": ranked["rank"]})

    assert_moves_who_sees(model_with_ranks, batch, (batch["inp_q"][:, 0] > 0).nonzero().flatten().tolist(), mems)


def test_bfloat16_is_near():
    """Loss within 1% of float32's, gradients within 5% of their norm: eight bits of mantissa through three layers."""
    torch.manual_seed(12)
    model = XLNet(50, n_layer=3, reuse_len=12, dropout=0, dropatt=0)
    _, batch = with_ranks(0)
    loss, gradients = loss_and_gradients(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        half_loss, half_gradients = loss_and_gradients(model, batch)
    assert half_loss.item() == pytest.approx(loss.item(), rel=0.01) and half_loss.item() != loss.item()
    assert half_loss.dtype == torch.float32  # neither the sum nor the printed loss is rounded
    ours, expected = (torch.cat([g.flatten() for g in grads]) for grads in (half_gradients, gradients))
    assert (ours - expected).norm() <= 0.05 * expected.norm()


@pytest.mark.parametrize("d_model", [32, 256])
def test_bfloat16_scores_are_no_worse_than_those_of_shift(d_model):
    """Products of positions move the last hidden states no further from float32 than projected distances do."""
    torch.manual_seed(16)
    shape = dict(n_layer=2, d_model=d_model, d_head=d_model // 4, dropout=0, dropatt=0)
    plain, shift = XLNet(50, **shape), XLNet(50, **with_shift(shape))
    shift.load_state_dict(plain.state_dict())
    given = given_to_model(random_window(np.random.default_rng(16), 512, 256, 256, 85))
    given["mems"] = [torch.randn(384, 1, d_model) for _ in range(2)]
    error = {}
    with torch.no_grad():
        exact, _ = plain.hidden(**given)
        for model in plain, shift:
            with torch.autocast("cpu", torch.bfloat16):
                hidden, _ = model.hidden(**given)
            error[model] = (hidden - exact).norm() / exact.norm()
    assert 1e-4 < error[plain] <= 1.1 * error[shift] < 0.01


class OperandTypes(TorchFunctionMode):
    """Record the types of both operands of every product written with @, before autocast changes them."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.Tensor.matmul, torch.Tensor.__matmul__):
            self.seen.append((args[0].dtype, args[1].dtype))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("enabled, dtype", [(True, torch.bfloat16), (False, torch.float32)])
def test_attention_products_take_the_type_of_autocast(enabled, dtype):
    """No float32 bias, segment or mask turns their operands into float32.

    Two products in each block of queries, each layer.
    """
    model = XLNet(50, n_layer=2, reuse_len=12)
    inputs = with_ranks(0)[1], [torch.randn(7, 1, 32) for _ in range(2)]
    call(model, *inputs)  # makes the cached tables, with products in float64
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled), OperandTypes() as products:
        call(model, *inputs)
    n_blocks = 3 + 1  # both parts and the slots; the slots in the last layer
    assert products.seen == [(dtype, dtype)] * 2 * n_blocks


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_compiled_is_the_same():
    """Loss and every gradient, with memory; dropout on the compiled model has its own random numbers."""
    torch.manual_seed(13)
    model = XLNet(50, n_layer=2, reuse_len=12, dropout=0, dropatt=0)
    _, batch = with_ranks(0)
    mems = [torch.randn(7, 1, 32) for _ in range(2)]
    expected = loss_and_gradients(model, batch, mems)
    model.compile(dynamic=False)
    torch.testing.assert_close(loss_and_gradients(model, batch, mems), expected, rtol=1e-4, atol=1e-6)


def distance(one, other):
    """Return the norm of the difference of two lists of tensors over that of the second."""
    one, other = (torch.cat([tensor.cpu().flatten() for tensor in tensors]) for tensors in (one, other))
    return ((one - other).norm() / other.norm()).item()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("mlen", [0, 7])
@pytest.mark.parametrize("bi_data", [False, True])
def test_a_gpu_computes_the_same(mlen, bi_data):
    """Loss and gradients; in bfloat16 as close to float32 as a CPU in bfloat16. Without memory some see nothing."""
    torch.set_float32_matmul_precision("highest")  # a run in this process may have set TF32
    torch.manual_seed(14)
    model = XLNet(50, n_layer=3, reuse_len=12, dropout=0, dropatt=0, bi_data=bi_data)
    batch = stack([with_ranks(seed)[1] for seed in (0, 1)])
    mems = [torch.randn(mlen, 2, 32) for _ in range(3)] if mlen else None
    results = {}
    for device, bf16 in itertools.product(("cpu", "cuda"), (False, True)):
        inputs = {key: tensor.to(device) for key, tensor in batch.items()}
        memory = mems and [mem.to(device) for mem in mems]
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            results[device, bf16] = loss_and_gradients(copy.deepcopy(model).to(device), inputs, memory)

    loss, gradients = results["cpu", False]
    gpu_loss, gpu_gradients = results["cuda", False]
    assert gpu_loss.item() == pytest.approx(loss.item(), rel=1e-4)
    for one, other in zip(gpu_gradients, gradients, strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-3, atol=1e-5)
    gpu_loss, gpu_gradients = results["cuda", True]
    assert gpu_loss.item() == pytest.approx(loss.item(), rel=1e-2)
    assert distance(gpu_gradients, gradients) < 2 * distance(results["cpu", True][1], gradients)


# ---------------------------------------------------------------- initial weights


@pytest.mark.parametrize("d_model, n_head", [(32, 4), (256, 4)])
@pytest.mark.parametrize("init", ["local", "normal"])
def test_first_loss_is_that_of_guessing(d_model, n_head, init):
    """At every width the logits start small: the loss is near ln(n_token), 10.3 for BERT's vocabulary."""
    torch.manual_seed(7)
    rng = np.random.default_rng(7)
    model = XLNet(30522, n_layer=2, n_head=n_head, d_head=d_model // n_head, d_model=d_model, init=init)
    losses = []
    for _ in range(5):
        batch = random_window(rng, n_token=30522)
        losses.append(prediction_loss(call(model, batch)[0], batch["target"], batch["target_mask"]).item())
    assert 10.2 < np.mean(losses) < 10.7


@pytest.mark.parametrize("d_model, d_head", [(32, 8), (256, 64), (768, 64)])
def test_local_heads_start_at_their_distance(d_model, d_head):
    """The position score of each head is largest, and near 10, at one of -1, 1, -2, 2, ..., taken in turn."""
    torch.manual_seed(8)
    model = XLNet(50, n_layer=3, n_head=4, d_head=d_head, d_model=d_model, init="local")
    encoding = xlnet.relative_positional_encoding(30, 30, d_model, -1, False, bsz=1)[
        :, 0
    ].float()  # distances 30 to -29
    found = []
    for layer in model.layer:
        attn = layer.rel_attn
        score = torch.einsum("rh,hnd,nd->nr", encoding, attn.r, attn.r_r_bias) / math.sqrt(d_head)
        found += (30 - score.argmax(dim=1)).tolist()
        assert ((score.max(dim=1).values - 10).abs() < 2.5).all()  # the random rest of the weights adds to it
    assert found == [-1, 1, -2, 2, -3, 3, -4, 4, -1, 1, -2, 2]


def test_init_draws_what_it_says():
    """Weights have the standard deviation asked for, biases are 0, LayerNorm is 1 and 0."""
    torch.manual_seed(9)
    model = XLNet(2000, n_layer=1, d_model=64, init="normal", init_std=0.3)
    for name, parameter in model.named_parameters():
        if name.endswith("layer_norm.weight"):
            assert (parameter == 1).all(), name
        elif name.endswith(".bias"):
            assert (parameter == 0).all(), name
        else:
            assert parameter.std().item() == pytest.approx(0.3, rel=5 / math.sqrt(parameter.numel())), name
    assert XLNet(2000, init="normal").word_embedding.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert XLNet(2000, d_model=768).word_embedding.weight.std().item() == pytest.approx(0.018, rel=0.05)


# ---------------------------------------------------------------- leaks


@pytest.mark.parametrize("form", ["perm_mask", "rank"])
def test_polarity_by_hand(form):
    """perm_mask 1 hides a position and 0 shows it; a higher rank hides it and a lower one shows it.

    The target is position 0: it sees neither itself nor position 1, and it sees position 2.
    """
    torch.manual_seed(15)
    model = randomize(XLNet(50, n_layer=1, reuse_len=0)).eval()
    order = {
        "perm_mask": torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0], [1.0, 1.0, 0.0]])[:, :, None],
        "rank": torch.tensor([[1], [2], [0]]),
    }
    given = {form: order[form], "target_mapping": torch.tensor([[0]]), "inp_q": torch.tensor([[1.0], [0.0], [0.0]])}
    before, _ = model(torch.tensor([[7], [8], [9]]), **given)
    moved = []
    for position in range(3):
        inp_k = torch.tensor([[7], [8], [9]])
        inp_k[position] = 20
        after, _ = model(inp_k, **given)
        moved.append(not torch.equal(before, after))
    assert moved == [False, False, True]


def with_another_token(batch, position):
    inp_k = batch["inp_k"].clone()
    inp_k[position] = (inp_k[position] + 1) % 50
    return dict(batch, inp_k=inp_k)


def assert_moves_who_sees(model, batch, positions, mems=None):
    """Changing the token at each position moves the logits of the targets that may see it, and not a bit of others."""
    before, _ = call(model, batch, mems)
    slots = (batch["target_mask"][:, 0] > 0).nonzero().flatten().tolist()
    for position in positions:
        after, _ = call(model, with_another_token(batch, position), mems)
        for slot in slots:
            sees = batch["perm_mask"][batch["target_mapping"][slot, 0], position, 0] == 0
            assert torch.equal(before[slot], after[slot]) != sees, (position, slot)


@pytest.mark.parametrize("seed", range(20))
def test_a_target_leaks_to_nobody_before_it(seed):
    """Changing a target's token moves neither its own logits nor those of targets before it, and moves the others'.

    Bit for bit: what is blocked has weight 0, not little weight. With and without memory; with num_predict as large
    as fits, where the first target of all may see nothing.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    num_predict = 24 if seed % 4 == 0 else int(rng.integers(2, 12))
    batch = random_window(rng, num_predict=num_predict, perm_size=[1, 3, 12][seed % 3])
    model = randomize(XLNet(50, n_layer=3)).eval()
    mems = [torch.randn(7, 1, 32) for _ in range(3)] if seed % 2 else None
    assert_moves_who_sees(model, batch, (batch["inp_q"][:, 0] > 0).nonzero().flatten().tolist(), mems)


@pytest.mark.parametrize("seed", range(5))
def test_a_visible_token_is_seen(seed):
    """Changing a context token moves the logits of every target that may see it, and of no other."""
    torch.manual_seed(seed)
    batch = random_window(np.random.default_rng(seed))
    model = randomize(XLNet(50, n_layer=3)).eval()
    assert_moves_who_sees(model, batch, (batch["inp_q"][:, 0] == 0).nonzero().flatten().tolist())


@pytest.mark.parametrize("seed", range(5))
def test_memory_carries_what_was_cached_and_nothing_else(seed):
    """A token of the previous window moves the next one's logits if it is in the first reuse_len, else not."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = randomize(XLNet(50, n_layer=3, reuse_len=12, mem_len=12)).eval()
    previous, batch = random_window(rng), random_window(rng)
    slots = batch["target_mask"][:, 0] > 0
    before, _ = call(model, batch, call(model, previous)[1])
    for position in range(24):
        after, _ = call(model, batch, call(model, with_another_token(previous, position))[1])
        assert torch.equal(before[slots], after[slots]) == (position >= 12), position


def test_rows_of_a_batch_are_strangers():
    """A change in one row of a batch, its memory included, moves nothing in another row."""
    rng = np.random.default_rng(10)
    model = randomize(XLNet(50, n_layer=2)).eval()
    batch = stack([random_window(rng) for _ in range(3)])
    mems = [torch.randn(5, 3, 32) for _ in range(2)]
    before, before_mems = call(model, batch, mems)
    changed = dict(batch, inp_k=batch["inp_k"].clone())
    changed["inp_k"][:, 1] = 3
    other_mems = [mem.clone() for mem in mems]
    for mem in other_mems:
        mem[:, 1] += 1
    after, after_mems = call(model, changed, other_mems)
    for row in (0, 2):
        assert torch.equal(before[:, row], after[:, row])
        assert all(torch.equal(a[:, row], b[:, row]) for a, b in zip(before_mems, after_mems, strict=True))
    assert not torch.equal(before[:, 1], after[:, 1])


# ---------------------------------------------------------------- files


def write_tiny(folder, config=(), weights=()):
    """Write a model of two layers into a folder, with other entries in config.json and other weights; None: without."""
    XLNet(30, n_layer=2).save_pretrained(folder)
    entries = json.loads((folder / "config.json").read_text()) | dict(config)
    (folder / "config.json").write_text(json.dumps(entries))
    tensors = load_file(folder / "model.safetensors") | dict(weights)
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / "model.safetensors")


SIZES = ("vocab_size", "n_layer", "n_head", "d_head", "d_inner", "d_model")
WRONG_ENTRIES = [
    *((name, value) for name in SIZES for value in ("2", 2.0, True, [2], 0, -1, 10**9, 10**30, float("nan"))),
    *((name, value) for name in ("mem_len", "reuse_len") for value in ("9", 9.5, False, {}, -1, 10**12)),
    *(("clamp_len", value) for value in ("9", 9.0, True, -2, 10**20)),
    *((name, value) for name in ("dropout", "dropatt") for value in ("0.1", True, -0.1, 1, float("inf"), [])),
    *((name, value) for name in ("bi_data", "same_length") for value in ("False", 0, 1, 0.0, [])),
    *((name, value) for name in ("attn_type", "ff_activation") for value in (0, True, ["bi"], {}, "silu", "")),
    *((name, value) for name in ("untie_r", "tie_word_embeddings") for value in (False, "True", 1, [])),
    *(("layer_norm_eps", value) for value in (1e-5, "1e-12", 0)),
    *(("model_type", value) for value in ("bert", 1, ["xlnet"], None)),
    *((name, None) for name in ("vocab_size", "n_layer", "n_head", "d_model", "d_inner", "ff_activation")),
]


@pytest.mark.parametrize("name, value", WRONG_ENTRIES)
def test_a_wrong_entry_of_config_json_is_named(tmp_path, name, value):
    """Another type, a number out of all reason, another kind of XLNet, a missing size: ValueError, in one line."""
    write_tiny(tmp_path, config={name: value})
    with pytest.raises(ValueError, match=rf"\b{name}\b") as error:
        XLNet.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "7", '"xlnet"', "\x00", "{'n_layer': 2}", "\udcff", "{}", "9" * 5000, "[" * 10**5]
)
def test_a_config_json_that_is_none_is_named(tmp_path, text):
    """Not JSON, not UTF-8, not an object, or without entries."""
    write_tiny(tmp_path)
    (tmp_path / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match="config.json") as error:
        xlnet.read_config(tmp_path)
    assert "\n" not in str(error.value)


def test_entries_may_be_whole_numbers_or_null(tmp_path):
    """0 is a dropout; null, and no entry, mean the argument's default, for d_head d_model / n_head."""
    write_tiny(tmp_path, config={"dropout": 0, "mem_len": None, "d_head": None, "untie_r": None})
    arguments = xlnet.read_config(tmp_path)
    assert arguments["dropout"] == 0 and "mem_len" not in arguments and arguments["d_head"] == 8


def test_config_json_takes_what_the_constructor_does():
    """All arguments but those of the initial weights have an entry."""
    names = set(inspect.signature(XLNet).parameters) - {"n_token", "init", "init_std"} | {"vocab_size"}
    assert names == set(xlnet.ENTRIES)


@pytest.mark.parametrize(
    "name, value", [("n_layer", 1), ("n_layer", 3), ("n_layer", 1000), *((n, 2**16) for n in SIZES if n != "n_layer")]
)
def test_sizes_are_compared_before_memory_is_allocated(tmp_path, monkeypatch, name, value):
    """A model of the wrong size is not made; with fewer layers than the weights it would be another model."""
    write_tiny(tmp_path, config={name: value})
    monkeypatch.setattr(XLNet, "__init__", lambda *_, **__: pytest.fail("a model was made"))
    with pytest.raises(ValueError, match="n_layer" if name == "n_layer" else "not of the shape .*config.json"):
        XLNet.from_pretrained(tmp_path)


Q = "transformer.layer.1.rel_attn.q"


@pytest.mark.parametrize(
    "weight, words",
    [
        *((torch.zeros(32, 4, 8, dtype=dtype), str(dtype)) for dtype in (torch.int64, torch.int8, torch.bool)),
        (torch.zeros(32, 4, 8).to(torch.float8_e4m3fn), "torch.float8_e4m3fn"),
        (torch.full((32, 4, 8), math.nan), "infinity or nan"),
        (torch.full((32, 4, 8), 1e300, dtype=torch.float64), "infinity or nan"),  # too large for float32
        (torch.zeros(32, 32), "not of the shape"),
        (None, "missing"),
    ],
    ids=str,
)
def test_a_wrong_weight_is_named(tmp_path, weight, words):
    """Numbers that are no floats, or not finite in float32, do not silently become weights."""
    write_tiny(tmp_path, weights={Q: weight})
    with pytest.raises(ValueError, match=rf"the weight layer.1.rel_attn.q .*{words}"):
        XLNet.from_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_other_precision_are_read(tmp_path, dtype):
    """They become float32."""
    weight = torch.randn(32, 4, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    write_tiny(tmp_path, weights={Q: weight})
    assert torch.equal(XLNet.from_pretrained(tmp_path).layer[1].rel_attn.q, weight.float())


def test_a_head_of_its_own_is_refused(tmp_path):
    """lm_loss.weight may be there if it is the embedding; otherwise the model would predict something else."""
    write_tiny(tmp_path)
    embedding = load_file(tmp_path / "model.safetensors")["transformer.word_embedding.weight"]
    write_tiny(tmp_path, weights={"transformer.word_embedding.weight": embedding, "lm_loss.weight": embedding.clone()})
    assert torch.equal(XLNet.from_pretrained(tmp_path).lm_loss.weight, embedding)
    for other in (embedding + 1, embedding[:9], embedding.to(torch.float8_e4m3fn)):
        write_tiny(tmp_path, weights={"lm_loss.weight": other})
        with pytest.raises(ValueError, match="lm_loss.weight is not the embedding"):
            XLNet.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "content",
    [b"", b"PK\x03\x04 and no more", b"version https", b"\x80\x02.", [torch.zeros(2)], {"a": 1}, torch.zeros(2)],
    ids=str,
)
def test_a_pytorch_model_that_is_none_is_named(tmp_path, content):
    """A damaged file, or one that holds something other than named tensors."""
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(ValueError, match="pytorch_model.bin"):
        xlnet.read_weights(tmp_path)
