"""What the comparison in benchmarks/learning.py rests on."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import data_utils
import main
import xlnet

sys.path.insert(0, str(Path(main.__file__).parent / "benchmarks"))
import learning
import probe

DATA = str(Path(main.__file__).parent / "data.txt")


def make(name, **flags):
    kind, variant_flags = learning.VARIANTS[name]
    small = {"data": [DATA], "n_layer": 2, "train_steps": 9}
    return kind(main.settle(small | variant_flags | flags))


def test_the_collator_means_the_same_to_both_models():
    """With the same weights, the cost of a collated batch is that of transformers' model as run_plm.py calls it."""
    ours, theirs = make("collator"), make("transformers")
    ours.model.load_state_dict(
        {name.removeprefix("transformer."): weight for name, weight in theirs.model.state_dict().items()})
    for step in range(3):
        torch.manual_seed(step)  # of the collator
        mine = ours.load_batch(step)
        torch.manual_seed(step)
        batch = theirs.load_batch(step)
        loss, _, mems = ours.forward(dict(mine), None)
        torch.testing.assert_close(loss, theirs.forward(batch, None)[0], rtol=1e-5, atol=1e-5)
        assert mems == [None] * 2
        masked = batch["labels"][0] != -100
        assert (batch["input_ids"][0, masked] == ours.mask_id).all() and masked.sum() == len(mine["target"]) > 20
    assert np.array_equal(ours.chunks.ravel(), ours.text.ids[: ours.chunks.size])


def test_every_chunk_once_before_any_again():
    run = make("transformers", seed=3)
    seen = []
    run.collate = lambda examples: seen.append(tuple(examples[0]["input_ids"].tolist()))
    for step in range(2 * len(run.chunks)):
        run.collated(step)
    first, second = seen[: len(run.chunks)], seen[len(run.chunks) :]
    assert sorted(first) == sorted(second) == sorted(map(tuple, run.chunks.tolist())) and first != second


@pytest.mark.parametrize("name", ["default", "bi_data", "one segment", "collator", "transformers", "mem_len 0"])
def test_judging_changes_nothing(name):
    """Every variant can be judged in the middle of a run, which then goes on as if it had not been."""
    costs = []
    for judged in (False, True):
        run = make(name)
        batches = learning.judged_batches(run, DATA)[:2]
        torch.manual_seed(0)
        for _ in range(3):
            run.train_step()
            if judged:
                costs.append(run.judge(batches))
        costs.append(run.train_step()["cost"].item())
    assert costs[0] == costs[-1] and len(set(costs[1:4])) == 3 and all(8 < cost < 11 for cost in costs)


def test_transformers_weights_are_the_ones_judged():
    """By our model, which must hold them, and judge them as the model that was trained."""
    run = make("transformers")
    batches = learning.judged_batches(run, DATA)[:2]
    judged = run.judge(batches)
    assert all(torch.equal(weight, run.ours.state_dict()[name.removeprefix("transformer.")])
               for name, weight in run.model.state_dict().items())
    assert isinstance(run.ours, xlnet.XLNet) and not isinstance(run.model, xlnet.XLNet)
    run.network = run.ours
    mask_id = run.tokenizer.vocab["[MASK]"]
    seen = [{key: value for key, value in batch.items() if key != "seg_id"} for batch in batches]
    corrupted = [batch | {"inp_k": torch.where(batch["inp_q"] > 0, mask_id, batch["inp_k"])} for batch in seen]
    assert judged == min(run.evaluate(map(dict, seen)), run.evaluate(map(dict, corrupted)))


def test_one_segment_is_contiguous_text():
    run = make("one segment")
    batch = run.load_batch(1)
    assert batch["inp_k"][:510, 0].tolist() == run.text.ids[256 : 256 + 510].tolist() and "seg_id" not in batch
    assert batch["inp_k"][510:, 0].tolist() == [run.vocab.sep_id, run.vocab.cls_id]
    assert torch.equal(batch["target"][:80, 0], batch["inp_k"][batch["target_mapping"][:80, 0], 0])


def test_runs_that_stand_in_the_csv_are_not_made_again(tmp_path, monkeypatch, capsys):
    """A second call with one seed more makes only that, and tabulates both; a call without seeds makes none."""
    made = []
    make_runs = learning.make_runs
    monkeypatch.setattr(
        learning, "make_runs", lambda options, tasks: made.append(len(tasks)) or make_runs(options, tasks))
    valid = tmp_path / "valid.txt"
    valid.write_text("".join(Path(DATA).read_text().splitlines(keepends=True)[:70]))
    command = ["learning.py", "--updates", "2", "--data", DATA, "--valid", str(valid), "--variants", "default",
               "mem_len 0", "--csv", str(tmp_path / "t.csv"), "--png", str(tmp_path / "t.png"), "--seeds"]
    for seeds in (["0"], ["0", "1"], []):
        monkeypatch.setattr(sys, "argv", [*command, *seeds])
        learning.benchmark()
    assert made == [2, 2, 0] and (tmp_path / "t.png").stat().st_size > 10_000
    rows = learning.read(tmp_path / "t.csv")
    assert {(row["variant"], row["seed"]) for row in rows} == {(v, s) for v in ("default", "mem_len 0") for s in "01"}
    assert [int(row["updates"]) for row in rows] == [1, 2] * 4
    last = capsys.readouterr().out.splitlines()[-1]
    ends = [float(row["held_out_cost"]) for row in rows if row["variant"] == "mem_len 0" and row["updates"] == "2"]
    assert last.startswith("| mem_len 0 | 2 | 2 |") and f"| {np.mean(ends):.3f} |" in last


def test_a_guess_depends_on_all_of_the_window_but_the_blank():
    torch.manual_seed(0)
    model = xlnet.XLNet(n_token=50, n_layer=3, n_head=2, d_head=4, d_inner=8, d_model=8, dropout=0.0, dropatt=0.0)
    ids = np.random.default_rng(0).integers(50, size=12)
    before = probe.guess(model.eval(), ids, 5)
    for place in range(12):
        changed = ids.copy()
        changed[place] = (ids[place] + 1) % 50
        assert (probe.guess(model, changed, 5)[1] == before[1]) == (place == 5)
    best, probability = before
    assert len(set(best)) == 5 and probability == sorted(probability, reverse=True) and 0 < sum(probability) < 1


def test_passages_are_classified_on_documents_that_were_not_trained_on(monkeypatch, capsys):
    """Words that tell the half century: counts are always right. Words that tell the document only: never better."""
    words = ["red", "green", "blue", "white"]
    century = {f"{1800 + 50 * (n % 4)}-{n}": [f"{words[n % 4]} " * 200] for n in range(32)}
    tokenizer = data_utils.load_tokenizer("bert-base-uncased")
    monkeypatch.setattr(probe.corpus, "documents", lambda: century)
    ids, label, document = probe.passages(tokenizer)
    assert ids.shape == (32 * 3, 64) and label.tolist() == [n % 4 for n in range(32) for _ in range(3)]
    assert document.tolist() == [n for n in range(32) for _ in range(3)]

    model = main.Run(main.settle({"n_layer": 1, "device": "cpu"})).model.eval()
    probe.classify(model, model, tokenizer)
    rows = [line.split("|")[2:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [float(accuracy) for accuracy in rows[-1]] == [1.0] * 3
    assert rows[1] == rows[2]  # the same model twice

    names = [piece for piece in tokenizer.vocab if piece.isalpha() and len(piece) == 6][:32]
    monkeypatch.setattr(probe.corpus, "documents", lambda: {
        name: [f"{word} " * 200] for word, name in zip(names, century)})
    probe.classify(model, model, tokenizer)
    last = capsys.readouterr().out.splitlines()[-1].split("|")[2:-1]
    assert max(map(float, last)) < 0.7
