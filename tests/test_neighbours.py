"""benchmarks/neighbours.py: models of transformers get the batches of its examples, and counts are Kneser-Ney's."""

import collections
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import main
from xlnet import XLNet, prediction_loss

sys.path.insert(0, str(Path(main.__file__).parent / "benchmarks"))
import neighbours
from neighbours import Bert, Collated, CollatedForBert, CollatedForPeer, FiveGram, Peer, Unigram

DATA = str(Path(main.__file__).parent / "data.txt")
CHUNKS = ["--data", DATA, "--n_layer", "2", "--train_steps", "9", "--mem_len", "0", "--rows", "1"]


def sharpen(model):
    """Make the weights larger: an untrained model hardly looks at its input."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(5)


def loss_of(model, batch):
    batch = dict(batch)
    target, target_mask = batch.pop("target"), batch.pop("target_mask")
    logits, mems = model(**batch)
    assert mems == [None] * 2
    return prediction_loss(logits, target, target_mask)


# ---------------------------------------------------------------- transformers' collators and models


@pytest.mark.slow
def test_the_collator_means_the_same_to_both_models():
    """With the same weights, our loss of a collated batch is that of transformers' model as run_plm.py calls it."""
    ours, theirs = main.prepare(CHUNKS, Collated), main.prepare(CHUNKS, CollatedForPeer, Peer)
    sharpen(theirs.model)
    ours.model.load_state_dict(theirs.model.our_weights())
    for step in range(3):
        collated = theirs.loader.collated(step)
        output = theirs.model.peer(**collated, use_mems=False)  # with labels, as the Trainer passes them
        for run in (ours, theirs):
            loss = loss_of(run.model, run.loader.batch(step))
            torch.testing.assert_close(loss, output.loss, rtol=1e-5, atol=1e-5)
        masked = collated["labels"][0] != -100
        assert torch.equal(ours.loader.batch(step)["inp_q"][:, 0] > 0, masked)
        assert (collated["input_ids"][0, masked] == ours.tokenizer.vocab["[MASK]"]).all()
        assert masked.sum() == len(ours.loader.batch(step)["target"]) > 20
    assert np.array_equal(ours.loader.chunks.ravel(), ours.text.ids[: ours.loader.chunks.size])


def test_bert_has_the_loss_that_transformers_says():
    """Of the batches of run_mlm.py, with labels, and its gradients: the head only skips other positions."""
    run = main.prepare(CHUNKS, CollatedForBert, Bert)
    sharpen(run.model)
    for step in range(3):
        loss = loss_of(run.model, run.loader.batch(step))
        ours = torch.autograd.grad(loss, list(run.model.parameters()), allow_unused=True)
        theirs_loss = run.model.peer(**run.loader.collated(step)).loss
        theirs = torch.autograd.grad(theirs_loss, list(run.model.parameters()), allow_unused=True)
        torch.testing.assert_close(loss, theirs_loss, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_bert_predicts_a_share_of_the_tokens():
    """15% of them; of these 80% are [MASK], about 10% another token. Without the mask, the text is as it was."""
    run = main.prepare([*CHUNKS, "--seed", "1"], CollatedForBert, Bert)
    counts = collections.Counter()
    for step in range(20 * run.loader.pass_len):
        batch = run.loader.batch(step)
        positions, target = batch["target_mapping"][:, 0], batch["target"][:, 0]
        shown = batch["inp_k"][positions, 0]
        is_mask = shown == run.tokenizer.vocab["[MASK]"]
        counts["mask"] += int(is_mask.sum())
        counts["other"] += int((~is_mask & (shown != target)).sum())
        counts["target"] += len(target)
        counts["token"] += len(batch["inp_k"])
        whole = batch["inp_k"].clone()
        whole[positions, 0] = target
        assert (run.loader.chunks == whole[:, 0].numpy()).all(axis=1).any()
    assert counts["target"] / counts["token"] == pytest.approx(0.15, abs=0.01)  # 3 standard deviations of 70,000 draws
    assert counts["mask"] / counts["target"] == pytest.approx(0.8, abs=0.02)
    assert counts["other"] / counts["target"] == pytest.approx(0.1, abs=0.02)


def test_models_start_as_their_configs_say():
    """Weights are those that transformers draws after the run's seed, with the shape and dropout of the flags."""
    argv = [
        *CHUNKS,
        "--seed",
        "3",
        "--d_inner",
        "48",
        "--ff_activation",
        "gelu",
        "--dropout",
        "0.2",
        "--dropatt",
        "0.1",
    ]
    shape = {"vocab_size": 30522, "n_layer": 2, "n_head": 4}
    xlnet_config = transformers.XLNetConfig(**shape, d_model=32, d_inner=48, ff_activation="gelu", dropout=0.2)
    bert_config = transformers.BertConfig(
        vocab_size=30522,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        hidden_act="gelu",
        hidden_dropout_prob=0.2,
        attention_probs_dropout_prob=0.1,
    )
    for model_class, of_transformers, config in (
        (Peer, transformers.XLNetLMHeadModel, xlnet_config),
        (Bert, transformers.BertForMaskedLM, bert_config),
    ):
        model = main.prepare(argv, model_class=model_class).model
        torch.manual_seed(3)
        fresh = of_transformers(config).state_dict()
        assert type(model.peer) is of_transformers and model.peer.state_dict().keys() == fresh.keys()
        assert all(torch.equal(weight, fresh[name]) for name, weight in model.peer.state_dict().items())
        own, expected = model.peer.config.to_dict(), config.to_dict()
        assert {name for name in expected if own[name] != expected[name]} <= {"architectures", "dtype"}


@pytest.mark.parametrize("loader_class", [Collated, CollatedForPeer, CollatedForBert])
def test_every_chunk_once_before_any_again(loader_class):
    """A pass is every chunk, each pass in another order; a batch is the same again, and no generator moves."""
    run = main.prepare([*CHUNKS, "--seed", "3"], loader_class)
    loader, state = run.loader, torch.get_rng_state()
    again = [loader.batch(step) for step in (5, 2)]
    assert all(torch.equal(again[0][key], value) for key, value in loader.batch(5).items())
    assert not torch.equal(again[0]["inp_k"], again[1]["inp_k"])
    assert torch.equal(torch.get_rng_state(), state)

    seen = []
    loader.collate = lambda examples: seen.append(tuple(examples[0]["input_ids"].tolist()))
    for step in range(2 * loader.pass_len):
        loader.collated(step)
    first, second = seen[: loader.pass_len], seen[loader.pass_len :]
    assert sorted(first) == sorted(second) == sorted(map(tuple, loader.chunks.tolist())) and first != second


def test_saved_models_are_read_again(tmp_path):
    """A Peer by our XLNet and by transformers', a Bert by BertForMaskedLM, with the same weights."""
    peer, bert = (main.prepare(CHUNKS, model_class=model_class).model for model_class in (Peer, Bert))
    for name, model in (("peer", peer), ("bert", bert)):
        (tmp_path / name).mkdir()
        model.save_pretrained(tmp_path / name, pad_token_id=0, summary_type="first")
    ours = XLNet.from_pretrained(tmp_path / "peer").state_dict()
    assert ours.keys() == peer.our_weights().keys()
    assert all(torch.equal(weight, ours[name]) for name, weight in peer.our_weights().items())
    theirs = transformers.XLNetLMHeadModel.from_pretrained(tmp_path / "peer")
    assert (theirs.config.pad_token_id, theirs.config.summary_type) == (0, "first")
    for model, again in (
        (peer, theirs),
        (bert, transformers.BertForMaskedLM.from_pretrained(tmp_path / "bert")),
    ):
        assert all(torch.equal(weight, again.state_dict()[name]) for name, weight in model.peer.state_dict().items())


# ---------------------------------------------------------------- counts of five tokens


def a_text(length=400, n_token=7, seed=0):
    """A text in which n-grams of all lengths come again."""
    rng = np.random.default_rng(seed)
    return np.minimum(rng.geometric(0.4, size=length), n_token - 1)  # token 0 never occurs


def naive(text, n_token, context, token, discounts):
    """Return p(token | context) by the definition, an n-gram at a time."""
    text = tuple(int(each) for each in text)

    def grams(n):
        return [text[i : i + n] for i in range(len(text) - n + 1)]

    def count(gram):
        if len(gram) == 5:
            return grams(5).count(gram)
        return len({longer[0] for longer in grams(len(gram) + 1) if longer[1:] == gram})

    def p(context):
        shorter = p(context[1:]) if context else 1 / n_token
        counts = {w: count((*context, w)) for w in range(n_token)}
        total = sum(counts.values())
        if total == 0:
            return shorter
        taken = {w: discounts[min(each, 3)] for w, each in counts.items()}
        return (counts[token] - taken[token] + sum(taken.values()) * shorter) / total

    return p(tuple(context))


def test_probabilities_are_those_of_the_definition(monkeypatch):
    """With discounts by count, after contexts of all lengths, seen and not, and for a token that never occurs."""
    discounts = np.array([0, 0.5, 0.7, 0.9])
    monkeypatch.setattr(neighbours, "discounts", lambda count: discounts)
    text = a_text(60)
    model = FiveGram(text, 7)
    contexts = [[], [1], [2, 1], [5, 5], text[10:13].tolist(), text[20:24].tolist(), [6, 6, 6, 1], [0, 1, 1, 2]]
    contexts.append(text[-4:].tolist())  # nothing follows it
    for context in contexts:
        for token in range(7):
            expected = naive(text, 7, context, token, discounts)
            assert model.log_probs([*context, token])[-1] == pytest.approx(np.log(expected), rel=1e-12)


@pytest.mark.parametrize("seed, n_token", [(0, 7), (1, 50)])
def test_probabilities_sum_to_one(seed, n_token):
    """Over the whole vocabulary, after any context, with discounts of their own."""
    text = a_text(3000, n_token, seed)
    model = FiveGram(text, n_token)
    rng = np.random.default_rng(seed)
    contexts = [text[i : i + n].tolist() for n in range(5) for i in rng.integers(2990, size=4)]
    contexts += [rng.integers(n_token, size=4).tolist() for _ in range(10)]
    for context in contexts:
        total = sum(np.exp(model.log_probs([*context, token])[-1]) for token in range(n_token))
        assert total == pytest.approx(1, abs=1e-12)


def test_unigrams_are_frequencies():
    """Each entry counts once more than it occurs, and the tokens before make no difference."""
    probability = np.exp(Unigram(np.array([2, 0, 2, 2]), 4).log_probs(np.array([0, 1, 2, 3, 2])))
    assert probability == pytest.approx(np.array([2, 1, 4, 1, 4]) / 8, rel=1e-12)


def test_four_tokens_before_count():
    """The fifth before does not; all tokens of a text get what each gets alone."""
    text = a_text()
    model = FiveGram(text, 7)
    ids = a_text(40, seed=3)
    at_once = model.log_probs(ids)
    for i in range(40):
        assert at_once[i] == model.log_probs(ids[max(0, i - 4) : i + 1])[-1]
    seen = text[50:55].tolist()
    alone = model.log_probs(seen)[-1]
    for place in range(4):
        changed = [*seen]
        changed[place] = 0
        assert model.log_probs(changed)[-1] != alone


def test_discounts_are_those_of_the_paper():
    """D1, D2 and D3+ by hand; 0.75 where a count of counts is 0."""
    count = np.repeat([0, 1, 2, 3, 4, 5], [3, 40, 12, 6, 4, 2])
    y = 40 / (40 + 24)
    expected = [0, 1 - 2 * y * 12 / 40, 2 - 3 * y * 6 / 12, 3 - 4 * y * 4 / 6]
    assert neighbours.discounts(count) == pytest.approx(expected)
    assert neighbours.discounts(np.array([1, 2, 3, 7])).tolist() == [0, 0.75, 0.75, 0.75]
