"""What the comparison in benchmarks/learning.py rests on, and the parts of probe.py and step_time.py."""

import argparse
import contextlib
import multiprocessing
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import data_utils
import main
from support import corpus
from xlnet import XLNet, prediction_loss

sys.path.insert(0, str(Path(main.__file__).parent / "benchmarks"))
import learning
import probe
import step_time

DATA = str(Path(main.__file__).parent / "data.txt")
SMALL = ["--data", DATA, "--n_layer", "2", "--train_steps", "9"]


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
    """A held-out text of a few windows."""
    path = tmp_path_factory.mktemp("valid") / "valid.txt"
    path.write_text("".join(Path(DATA).read_text().splitlines(keepends=True)[:70]))
    return str(path)


def make(name, valid, *words):
    return learning.prepare(learning.VARIANTS[name], [*SMALL, *words], valid)


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
    return prediction_loss(logits, target, target_mask), mems


# ---------------------------------------------------------------- learning.py: transformers' collator and model


@pytest.mark.slow
def test_the_collator_means_the_same_to_both_models(valid):
    """With the same weights, our loss of a collated batch is that of transformers' model as run_plm.py calls it."""
    (ours, _), (theirs, _) = make("collator", valid), make("transformers", valid)
    sharpen(theirs.model)
    ours.model.load_state_dict(learning.our_weights(theirs.model))
    for step in range(3):
        collated = theirs.loader.collated(step)
        output = theirs.model.peer(**collated, use_mems=False)  # with labels, as the Trainer passes them
        for run in (ours, theirs):
            loss, mems = loss_of(run.model, run.loader.batch(step))
            torch.testing.assert_close(loss, output.loss, rtol=1e-5, atol=1e-5)
            assert mems == [None] * 2
        masked = collated["labels"][0] != -100
        assert torch.equal(ours.loader.batch(step)["inp_q"][:, 0] > 0, masked)
        assert (collated["input_ids"][0, masked] == ours.tokenizer.vocab["[MASK]"]).all()
        assert masked.sum() == len(ours.loader.batch(step)["target"]) > 20
    assert np.array_equal(ours.loader.chunks.ravel(), ours.text.ids[: ours.loader.chunks.size])


def test_the_peer_starts_as_its_config_says(valid):
    """Weights are those that transformers draws after the run's seed, with the shape of the flags."""
    run, _ = make("transformers", valid, "--seed", "3", "--d_inner", "48", "--ff_activation", "gelu")
    torch.manual_seed(3)
    config = learning.transformers.XLNetConfig(
        vocab_size=30522, d_model=32, n_layer=2, n_head=4, d_inner=48, ff_activation="gelu", dropout=0.0
    )
    fresh = learning.transformers.XLNetLMHeadModel(config).state_dict()
    assert run.model.peer.state_dict().keys() == fresh.keys()
    assert all(torch.equal(weight, fresh[name]) for name, weight in run.model.peer.state_dict().items())
    assert run.args.clip == 1.0


@pytest.mark.parametrize("name", ["collator", "transformers"])
def test_every_chunk_once_before_any_again(valid, name):
    """A pass is every chunk, each pass in another order; a batch is the same again, and no generator moves."""
    run, _ = make(name, valid, "--seed", "3")
    loader, state = run.loader, torch.get_rng_state()
    again = [loader.batch(step) for step in (5, 2)]
    assert all(torch.equal(again[0][key], value) for key, value in loader.batch(5).items())
    assert not torch.equal(again[0]["perm_mask"], again[1]["perm_mask"])
    assert torch.equal(torch.get_rng_state(), state)

    seen = []
    loader.collate = lambda examples: seen.append(tuple(examples[0]["input_ids"].tolist()))
    for step in range(2 * loader.pass_len):
        loader.collated(step)
    first, second = seen[: loader.pass_len], seen[loader.pass_len :]
    assert sorted(first) == sorted(second) == sorted(map(tuple, loader.chunks.tolist())) and first != second


# ---------------------------------------------------------------- learning.py: judging


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["default", "bi_data", "one segment", "collator", "transformers", "mem_len 0", "dropout 0.1"]
)
def test_judging_changes_nothing(name, valid):
    """Every variant can be judged in the middle of a run, which then goes on as if it had not been."""
    held_out, last_losses = [], []
    for judged in (False, True):
        run, judge = make(name, valid)
        with contextlib.closing(main.train(run, main.make_reporter(run, silent=True))) as steps:
            for _ in range(3):
                next(steps)
                if judged:
                    held_out.append(judge.held_out_loss(run.model))
            last_losses.append(float(next(steps)["loss"]))
    assert last_losses[0] == last_losses[1]
    assert len(set(held_out)) == 3 and all(8 < loss < 11 for loss in [*held_out, *last_losses])


def test_transformers_weights_are_the_ones_judged(valid):
    """In our model, which must hold them; their own model gives the same loss; the better of two windows counts."""
    run, judge = make("transformers", valid)
    sharpen(run.model)
    judged = judge.held_out_loss(run.model)
    ours = judge.run.model
    assert isinstance(ours, XLNet) and not isinstance(run.model, XLNet)
    for name, weight in run.model.peer.state_dict().items():
        assert torch.equal(weight, ours.state_dict()[name.removeprefix("transformer.")])

    default = main.prepare(["--valid", valid]).valid_loader
    assert default.pass_len >= 2
    losses = []
    for with_mask in (False, True):
        total = n_target = 0.0
        for step in range(default.pass_len):
            batch = default.batch(step)
            del batch["seg_id"]
            if with_mask:
                batch["inp_k"][batch["inp_q"] > 0] = run.tokenizer.vocab["[MASK]"]
            batch["perm_mask"] = torch.from_numpy(
                data_utils.ranks_to_mask(batch.pop("rank")[:, 0].numpy(), batch.pop("inp_q")[:, 0].numpy())
            )[:, :, None]
            positions = batch["target_mapping"]
            one_hot = torch.nn.functional.one_hot(positions.clamp(min=0), 512) * (positions >= 0)[:, :, None]
            batch["target_mapping"] = one_hot.permute(0, 2, 1).float()
            with torch.no_grad():
                loss, _ = loss_of(run.model.eval(), batch)
            n = batch["target_mask"].sum().item()
            total, n_target = total + loss.item() * n, n_target + n
        losses.append(total / n_target)
    assert judged == pytest.approx(min(losses), abs=1e-5) and abs(losses[0] - losses[1]) > 1e-3
    of_each = [main.evaluate(ours, loader, run.device) for loader in judge.loaders]
    assert of_each == pytest.approx(losses, abs=1e-5)


@pytest.mark.parametrize("name", ["default", "bi_data"])
def test_judged_is_what_valid_has_at_default_flags(name, valid):
    """Read forwards, whatever the flags of the run."""
    run, judge = make(name, valid, "--num_predict", "42", "--seed", "1")
    held_out = judge.held_out_loss(run.model)
    run.model.bi_data = False
    assert held_out == main.evaluate(run.model, main.prepare(["--valid", valid]).valid_loader, run.device)
    assert not judge.run.model.bi_data


def test_one_segment_is_contiguous_text(valid):
    """Also in a batch of several rows, and backwards; it is judged without segment ids."""
    run, judge = make("one segment", valid, "--bi_data", "True")
    batch = run.loader.batch(1)
    for member, ids in enumerate((run.text.ids, run.text.ids[::-1])):
        assert batch["inp_k"][:510, member].tolist() == ids[256 : 256 + 510].tolist()
        assert batch["inp_k"][510:, member].tolist() == [run.vocab.sep_id, run.vocab.cls_id]
        n_target = int(batch["target_mask"][:, member].sum())
        positions = batch["target_mapping"][:n_target, member]
        assert n_target > 80 and positions.max() < 510
        assert torch.equal(batch["target"][:n_target, member], batch["inp_k"][positions, member])
    assert "seg_id" not in batch and "seg_id" not in judge.loaders[0].batch(0)


# ---------------------------------------------------------------- learning.py: the csv and the table


@pytest.fixture
def made(monkeypatch):
    """Make the benchmark's runs in this process; return a list that counts them, a number for each call."""

    def make_runs(options, tasks):
        counts.append(len(tasks))
        learning.start_worker(multiprocessing.Value("i", 0), threads=1)
        for task in tasks:
            learning.append(options.csv, learning.train(task))

    counts = []
    monkeypatch.setattr(learning, "make_runs", make_runs)
    return counts


@pytest.mark.slow
def test_runs_that_stand_in_the_csv_are_not_made_again(tmp_path, made, valid, capsys):
    """A second call with one seed more makes only that, and tabulates both; a call without seeds makes none."""
    table, picture = tmp_path / "t.csv", tmp_path / "t.png"
    command = ["--updates", "2", "--data", DATA, "--valid", valid, "--variants", "default", "mem_len 0"]
    command += ["--csv", str(table), "--png", str(picture), "--seeds"]
    for seeds in (["0"], ["0", "1"], []):
        learning.benchmark([*command, *seeds])
        out = capsys.readouterr()
        assert ("2 curves are in" in out.err) == (len(seeds) == 2)
    assert made == [2, 2, 0] and picture.stat().st_size > 10_000
    rows = learning.read(table)
    assert {(row["variant"], row["seed"]) for row in rows} == {(v, s) for v in ("default", "mem_len 0") for s in "01"}
    assert [int(row["updates"]) for row in rows] == [1, 2] * 4
    ends = [float(row["held_out_loss"]) for row in rows if row["variant"] == "mem_len 0" and row["updates"] == "2"]
    last = out.out.splitlines()[-1]
    assert last.startswith("| mem_len 0 | 2 | 2 |") and f"| {np.mean(ends):.3f} |" in last

    metrics = main.main(["--data", DATA, "--valid", valid, "--train_steps", "2"])  # what "default" and seed 0 mean
    [end] = [row for row in rows if (row["variant"], row["seed"], row["updates"]) == ("default", "0", "2")]
    assert float(end["held_out_loss"]) == pytest.approx(metrics["validation_loss"], abs=1e-4)
    assert float(end["training_loss"]) == pytest.approx(metrics["loss"], abs=1e-4)


def test_no_table_mixes_targets(tmp_path, made, valid, capsys):
    """A curve judged on other targets is made again and left out of the table; a line says so."""
    table = tmp_path / "t.csv"
    text = learning.text_of(argparse.Namespace(data=DATA, valid=valid))
    row = dict.fromkeys(learning.COLUMNS, "1") | {"text": text, "shape": "32", "budget": "1 updates"}
    row |= {"variant": "default", "seed": "0", "held_out_loss": "99"}
    learning.append(table, [row])
    command = ["--updates", "1", "--data", DATA, "--valid", valid, "--variants", "default"]
    learning.benchmark([*command, "--csv", str(table), "--png", str(tmp_path / "t.png")])
    out = capsys.readouterr()
    assert made == [1] and [row["targets"] for row in learning.read(table)] == ["1", learning.TARGETS]
    held_out = float(learning.read(table)[1]["held_out_loss"])
    assert out.out.splitlines()[-1].startswith(f"| default | 1 | 1 | {held_out:.3f} |") and 8 < held_out < 11
    assert out.err == "learning.py: left out 1 curves that were judged on other targets\n"


def test_each_curve_names_its_commit(tmp_path, made, valid, capsys, monkeypatch):
    """A curve that is in the csv already is told with its commit; so old figures do not pass for new ones."""
    command = ["--updates", "1", "--data", DATA, "--valid", valid, "--variants", "default"]
    command += ["--csv", str(tmp_path / "t.csv"), "--png", str(tmp_path / "t.png")]
    monkeypatch.setattr(learning, "commit", lambda: "abc123")
    learning.benchmark(command)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(learning, "commit", lambda: "def456")
    learning.benchmark(command)
    line = f"learning.py: 1 curves are in {tmp_path}/t.csv already, of commit abc123\n"
    assert made == [1, 0] and capsys.readouterr().err == line


def test_the_commit_is_that_of_git():
    """Seven digits or more, and a mark if files differ; nothing where there is no git."""
    assert re.fullmatch(r"([0-9a-f]{7,}(-dirty)?)?", learning.commit())


@pytest.mark.parametrize("changed", ["data", "valid"])
def test_a_text_is_named_by_its_content(tmp_path, changed):
    """Another text of the same name, trained on or held out, is another text."""
    paths = {name: tmp_path / f"{name}.txt" for name in ("data", "valid")}
    for path in paths.values():
        path.write_text("the cat sat\n")
    options = argparse.Namespace(**paths)
    before = learning.text_of(options)
    paths[changed].write_text("the cat sad\n")
    assert before.startswith("data.txt ") and learning.text_of(options) != before


def test_a_csv_with_other_columns_is_refused(tmp_path, made, valid, capsys):
    """With one line, before any run; the results of this repository have the columns and the mark of old targets."""
    table = tmp_path / "t.csv"
    table.write_text("text,shape,budget,variant,seed\n")
    with pytest.raises(SystemExit) as end:
        learning.benchmark(["--updates", "1", "--data", DATA, "--valid", valid, "--csv", str(table)])
    assert end.value.code == 2 and f"--csv {table} has not the columns" in capsys.readouterr().err and made == []
    assert {row["targets"] for row in learning.read(learning.RESULTS / "learning.csv")} <= {"1", learning.TARGETS}


# ---------------------------------------------------------------- probe.py


def test_a_guess_depends_on_all_of_the_window_but_the_blank():
    """Changing any other token moves the probabilities; they are sorted and belong to five ids."""
    torch.manual_seed(0)
    model = XLNet(n_token=50, n_layer=3, n_head=2, d_head=4, d_inner=8, d_model=8, dropout=0.0, dropatt=0.0)
    ids = np.random.default_rng(0).integers(50, size=12)
    before = probe.guess(model.eval(), ids, 5)
    for place in range(12):
        changed = ids.copy()
        changed[place] = (ids[place] + 1) % 50
        assert (probe.guess(model, changed, 5)[1] == before[1]) == (place == 5)
    best, probability = before
    assert len(set(best)) == 5 and probability == sorted(probability, reverse=True) and 0 < sum(probability) < 1


@pytest.mark.slow
def test_passages_are_classified_on_documents_that_were_not_trained_on(monkeypatch, capsys):
    """Words that tell the half century: counts are always right. Words that tell the document only: never better."""
    words = ["red", "green", "blue", "white"]
    century = {f"{1800 + 50 * (n % 4)}-{n}": [f"{words[n % 4]} " * 200] for n in range(32)}
    tokenizer = corpus.load_tokenizer("bert-base-uncased")
    monkeypatch.setattr(probe.corpus, "documents", lambda: century)
    ids, label, document = probe.passages(tokenizer)
    assert ids.shape == (32 * 3, 64) and label.tolist() == [n % 4 for n in range(32) for _ in range(3)]
    assert document.tolist() == [n for n in range(32) for _ in range(3)]

    model = XLNet(len(tokenizer.vocab), n_layer=1).eval()
    probe.classify(model, model, tokenizer)
    rows = [line.split("|")[2:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [float(accuracy) for accuracy in rows[-1]] == [1.0] * 3
    assert rows[1] == rows[2]  # the same model twice

    names = [piece for piece in tokenizer.vocab if piece.isalpha() and len(piece) == 6][:32]
    documents = {name: [f"{word} " * 200] for word, name in zip(names, century, strict=True)}
    monkeypatch.setattr(probe.corpus, "documents", lambda: documents)
    probe.classify(model, model, tokenizer)
    last = capsys.readouterr().out.splitlines()[-1].split("|")[2:-1]
    assert max(map(float, last)) < 0.7


# ---------------------------------------------------------------- step_time.py


class HerePool(contextlib.nullcontext):
    """Stands in for a ProcessPoolExecutor, and calls the function in this process."""

    def __init__(self, *_):
        super().__init__(self)

    def submit(self, function, *args):
        return argparse.Namespace(result=lambda: function(*args))


@pytest.mark.parametrize(
    "model, words, goes_on",
    [
        ("transformers", "DefaultCPUAllocator: can't allocate memory", True),
        ("transformers", "a bug", False),
        ("ours", "DefaultCPUAllocator: can't allocate memory", False),
    ],
)
def test_a_model_that_does_not_fit_has_no_steps(monkeypatch, capsys, model, words, goes_on):
    """If it is transformers', the row says so and has no ratio; any other error ends the benchmark."""

    def start(name, args, device):
        if name == model:
            raise RuntimeError(words)
        return 300.0

    monkeypatch.setattr(step_time, "ProcessPoolExecutor", HerePool)
    monkeypatch.setattr(step_time, "start", start)
    monkeypatch.setattr(step_time, "step", lambda: 0.25)
    monkeypatch.setattr(step_time, "count_flop", lambda *_: 10**9)
    monkeypatch.setattr(step_time, "product_speed", lambda *_: 1e10)
    with contextlib.nullcontext() if goes_on else pytest.raises(RuntimeError, match=words):
        step_time.benchmark(["--shapes", "default", "--dropout", "0", "--steps", "2"])
    row = "| default, batch 1, dropout 0 | 250 (250 to 250) | out of memory |  | 300 |  |  | 1.0 | 0.004 | 40% |"
    assert (row in capsys.readouterr().out) == goes_on


def test_both_models_of_the_step_benchmark_start_alike():
    """Without dropout, the same weights and window give the same logits."""
    args, _, _ = main.read_flags(["--n_layer", "1", "--dropout", "0", "--dropatt", "0"])
    vocab, batches = step_time.load_batches(args, "cpu")
    logits = []
    for name in step_time.MODELS:
        model = step_time.build(name, vocab, args)
        with torch.no_grad():
            found = model(**step_time.inputs_for(name, batches[0]))
        logits.append(found[0] if name == "ours" else found.logits.transpose(0, 1))
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-5)
