"""What the comparison in benchmarks/learning.py rests on, and the parts of probe.py and step_time.py."""

import argparse
import contextlib
import multiprocessing
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import data_utils
import main
from support import UserError, corpus
from xlnet import XLNet, prediction_loss

sys.path.insert(0, str(Path(main.__file__).parent / "benchmarks"))
import learning
import probe
import step_time
from neighbours import FiveGram, Unigram

DATA = str(Path(main.__file__).parent / "data.txt")
SMALL = ["--data", DATA, "--n_layer", "2", "--train_steps", "9"]


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
    """A held-out text of a few windows."""
    path = tmp_path_factory.mktemp("valid") / "valid.txt"
    path.write_text("".join(Path(DATA).read_text().splitlines(keepends=True)[:70]))
    return str(path)


def prepare(words, valid, *flags):
    return learning.prepare(learning.find_variant(words), [*SMALL, *flags], valid)


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


# ---------------------------------------------------------------- learning.py: variants


OWN = """
from data_utils import Loader
from xlnet import XLNet

class MyLoader(Loader):
    pass

class MyXLNet(XLNet):
    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self.offset = torch.nn.Parameter(torch.ones(1))

class Neither:
    pass
"""


@pytest.fixture
def own(tmp_path):
    """A file with classes of one's own, in a folder whose name has a space."""
    path = tmp_path / "of mine" / "own.py"
    path.parent.mkdir()
    path.write_text(f"import torch{OWN}")
    return path


def argv_of(words):
    return main.read_flags(learning.find_variant(words).flags.split())[0]


def test_flags_are_variants():
    """One or several, and behind a name or a class, whose own flags they replace; a switch has no value."""
    assert argv_of("learning_rate=1e-3").learning_rate == 1e-3 and argv_of("init_std=0").init_std == 0
    args = argv_of("num_predict=170 decay_method=poly bf16")
    assert (args.num_predict, args.decay_method, args.bf16) == (170, "poly", True)
    collator = learning.find_variant("collator learning_rate=2e-3")
    assert collator.loader_class is learning.Collated and len(collator.judged_on) == 2
    args = argv_of("transformers clip=0.5 learning_rate=2e-3")
    assert (args.clip, args.learning_rate, args.mem_len, args.rows) == (0.5, 2e-3, 0, 1)
    assert learning.find_variant("mem_len=0") == learning.VARIANTS["mem_len=0"]
    masked = learning.find_variant("[MASK] in the content stream bi_data=True")
    assert masked == learning.VARIANTS["[MASK] in the content stream"]._replace(flags="--bi_data=True")


@pytest.mark.parametrize(
    "words, message",
    [
        (
            "learning_rates=1",
            "--variants 'learning_rates=1': 'learning_rates' is no flag of main.py; give flag=value, FI",
        ),
        ("learning_rate 1e-3", "'1e-3' is no flag of main.py"),
        ("help", "'help' is no flag"),
        (
            "learning_rate=fast",
            "--variants 'learning_rate=fast': argument --learning_rate: 'fast' will not do; give a nu",
        ),
        ("bi_data", "--variants 'bi_data': argument --bi_data: expected one argument"),
        ("perm_size=200", "--variants 'perm_size=200': --perm_size 200 must divide --reuse_len 256"),
        ("collator batch_size=2", "--rows 1 is no multiple of --batch_size 2"),
        ("bf16 seed=1", "--variants 'bf16 seed=1': seed is the same for all variants; leave it out"),
        ("init_checkpoint=out", "init_checkpoint is the same for all variants"),
        ("tokenizer=xlnet", "tokenizer is the same for all variants"),
        ("five-gram clip=1", "--variants 'five-gram clip=1': counts take no flags; give 'five-gram'"),
        ("five-grams", "'five-grams' is no flag"),
        ("nowhere.py:Mine", "--variants nowhere.py:Mine: there is no file nowhere.py"),
        ("{own}:Neither", "own.py:Neither is no class; give one derived from data_utils.Loader or xlnet.XLNet"),
        ("{own}:Missing bf16", "own.py:Missing is no class"),
        ("{own}:MyLoader init=no", "argument --init: invalid choice: 'no'"),
    ],
)
def test_a_wrong_variant_is_refused_before_any_run(made, valid, own, words, message):
    """With what is wrong and the remedy, also if it comes last."""
    command = ["--updates", "1", "--data", DATA, "--valid", valid, "--variants", "default"]
    with pytest.raises(UserError) as error:
        learning.benchmark([*command, words.format(own=own)])
    assert message in str(error.value) and made == []


def test_a_mistake_is_one_line():
    """On stderr, with exit status 2 and no usage."""
    command = [sys.executable, learning.__file__, "--updates", "1", "--variants", "clips=1"]
    command += ["--data", DATA, "--valid", DATA]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 2 and ended.stderr.startswith("learning.py: error: --variants 'clips=1': 'clips'")
    assert ended.stderr.count("\n") == 1 and ended.stdout == ""


def test_classes_of_your_own_are_variants(own, valid):
    """A Loader makes the batches and a model is judged in itself; both take flags."""
    run, judge = prepare(f"{own}:MyLoader mem_len=16", valid)
    assert type(run.loader).__name__ == "MyLoader" and run.args.mem_len == 16 and type(run.model) is XLNet
    assert type(judge.loaders[0]) is data_utils.Loader
    run, judge = prepare(f"{own}:MyXLNet", valid)
    assert type(run.model).__name__ == type(judge.run.model).__name__ == "MyXLNet"
    assert 8 < judge.held_out_loss(run.model) < 11
    assert type(run.loader) is data_utils.Loader


def test_a_class_of_your_own_is_named_with_its_version(own):
    """Another file is another variant; the name means the class again, and names of other variants are their words."""
    name = learning.name_in_csv(f"{own}:MyLoader   clip=1")
    assert re.fullmatch(re.escape(f"{own}:MyLoader@") + "[0-9a-f]{8} clip=1", name)
    assert learning.name_in_csv(name) == name and learning.find_variant(name).flags == "--clip=1"
    own.write_text(own.read_text() + "# changed\n")
    assert learning.name_in_csv(name) != name
    assert learning.name_in_csv(" one  segment clip=1") == "one segment clip=1"


def test_shuffled_windows_are_those_of_default(valid):
    """The same windows and targets in each pass, in an order of its own."""
    (shuffled, _), (default, _) = prepare("shuffled windows", valid), prepare("default", valid)

    def windows(loader, epoch):
        steps = range(epoch * loader.pass_len, (epoch + 1) * loader.pass_len)
        batches = [loader.batch(step) for step in steps]
        return [(*batch["inp_k"][:, 0].tolist(), *batch["rank"][:, 0].tolist()) for batch in batches]

    assert default.args.mem_len == shuffled.args.mem_len == 384 and default.loader.pass_len > 5
    for epoch in range(2):
        assert windows(shuffled.loader, epoch) != windows(default.loader, epoch)
        assert sorted(windows(shuffled.loader, epoch)) == sorted(windows(default.loader, epoch))
    begins = [[window[:256] for window in windows(shuffled.loader, epoch)] for epoch in range(2)]  # inp, the same text
    assert sorted(begins[0]) == sorted(begins[1]) and begins[0] != begins[1]


def test_mask_in_the_content_stream_changes_nothing_else(valid):
    """The content stream has [MASK] at the targets, and nowhere else; the targets are the same tokens."""
    (masked, judge), (default, _) = prepare("[MASK] in the content stream", valid), prepare("default", valid)
    for step in (0, 3):
        batch, expected = masked.loader.batch(step), default.loader.batch(step)
        is_target = expected["inp_q"] > 0
        assert (batch["inp_k"][is_target] == default.tokenizer.vocab["[MASK]"]).all() and is_target.sum() > 80
        assert torch.equal(batch.pop("inp_k")[~is_target], expected.pop("inp_k")[~is_target])
        assert batch.keys() == expected.keys() and all(torch.equal(batch[name], expected[name]) for name in batch)
    assert vars(masked.args) == vars(default.args)
    assert [type(loader) for loader in judge.loaders] == [data_utils.Loader, learning.MaskedTargets]


# ---------------------------------------------------------------- learning.py: judging


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "default",
        "bi_data=True",
        "one segment",
        "collator",
        "transformers",
        "bert",
        "mem_len=0",
        "dropout=0.1 dropatt=0.1",
        "shuffled windows",
        "[MASK] in the content stream",
    ],  # fmt: skip
)
def test_judging_changes_nothing(name, valid):
    """Every variant can be judged in the middle of a run, which then goes on as if it had not been."""
    held_out, last_losses = [], []
    for judged in (False, True):
        run, judge = prepare(name, valid)
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
    run, judge = prepare("transformers", valid)
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


@pytest.mark.parametrize("name", ["default", "bi_data=True", "seq_len=128 reuse_len=32", "shuffled windows"])
def test_judged_is_what_valid_has_at_default_flags(name, valid):
    """Read forwards, whatever the flags of the run."""
    run, judge = prepare(name, valid, "--num_predict", "42", "--seed", "1")
    held_out = judge.held_out_loss(run.model)
    run.model.bi_data, run.model.reuse_len = False, 256
    if "seq_len" in name:
        run.model.mem_len = 384
    assert held_out == main.evaluate(run.model, main.prepare(["--valid", valid]).valid_loader, run.device)
    assert not judge.run.model.bi_data


@pytest.mark.slow
def test_bert_is_judged_on_the_same_targets(valid):
    """By its own logits, with [MASK] in place of all targets of a window, and without memory."""
    run, judge = prepare("bert", valid)
    sharpen(run.model)
    default = main.prepare(["--valid", valid]).valid_loader
    total = n_target = 0.0
    for step in range(default.pass_len):
        batch = default.batch(step)
        is_target = batch["inp_q"] > 0
        ids = batch["inp_k"].masked_fill(is_target, run.tokenizer.vocab["[MASK]"])
        with torch.no_grad():
            logits = run.model.peer.eval()(input_ids=ids.t()).logits[0]
        nll = torch.nn.functional.cross_entropy(logits, batch["inp_k"][:, 0], reduction="none")[is_target[:, 0]]
        total, n_target = total + nll.sum().item(), n_target + len(nll)
    assert judge.held_out_loss(run.model) == pytest.approx(total / n_target, abs=1e-5) and n_target > 160


def test_counts_are_judged_on_the_same_targets(tmp_path):
    """Each target after the four tokens before it: those of its window, at the window's beginning those of the text."""

    def number(tokens):  # differs for all contexts
        return sum(7**k * int(token) for k, token in enumerate(tokens))

    class LastFive(FiveGram):
        def __init__(self):
            pass

        def log_probs(self, ids):
            return np.array([-float(number(ids[max(0, i - 4) : i + 1])) for i in range(len(ids))])

    (tmp_path / "long.txt").write_text(4 * Path(DATA).read_text())
    run = main.prepare(["--valid", str(tmp_path / "long.txt")])
    loader, text = run.valid_loader, run.valid_text.ids
    row_len = len(text) // len(loader.turns)
    losses, at_beginning = [], 0
    for step in range(loader.pass_len):
        batch, turn = loader.batch(step), loader.turn(step)
        begin = step // len(loader.turns) * 256
        before = text[turn * row_len :][:begin][-4:] if begin else text[:0]
        ids = [*before.tolist(), *batch["inp_k"][:, 0].tolist()]
        for position in batch["target_mapping"][batch["target_mask"][:, 0] > 0, 0].tolist():
            place = position + len(before)
            at_beginning += position == 0 and begin > 0
            losses.append(number(ids[max(0, place - 4) : place + 1]))
    assert learning.loss_of_counts(LastFive(), loader) == pytest.approx(np.mean(losses), rel=1e-12)
    assert at_beginning > 3


def test_one_segment_is_contiguous_text(valid):
    """Also in a batch of several rows, and backwards; it is judged without segment ids."""
    run, judge = prepare("one segment bi_data=True", valid)
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
    command = ["--updates", "2", "--data", DATA, "--valid", valid, "--variants", "default", "mem_len=0"]
    command += ["--csv", str(table), "--png", str(picture), "--seeds"]
    for seeds in (["0"], ["0", "1"], []):
        learning.benchmark([*command, *seeds])
        out = capsys.readouterr()
        assert ("2 curves are in" in out.err) == (len(seeds) == 2)
    assert made == [2, 2, 0] and picture.stat().st_size > 10_000
    rows = learning.read(table)
    assert {(row["variant"], row["seed"]) for row in rows} == {(v, s) for v in ("default", "mem_len=0") for s in "01"}
    assert [int(row["updates"]) for row in rows] == [1, 2] * 4
    ends = [float(row["held_out_loss"]) for row in rows if row["variant"] == "mem_len=0" and row["updates"] == "2"]
    last = out.out.splitlines()[-1]
    assert last.startswith("| mem_len=0 | 2 | 2 |") and f"| {np.mean(ends):.3f} |" in last

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
    assert out.err.splitlines()[-1] == "learning.py: left out 1 curves that were judged on other targets"


def test_each_curve_names_its_commit(tmp_path, made, valid, capsys, monkeypatch):
    """A curve that is in the csv already is told with its commit; so old figures do not pass for new ones."""
    command = ["--updates", "1", "--data", DATA, "--valid", valid, "--variants", "default"]
    command += ["--csv", str(tmp_path / "t.csv"), "--png", str(tmp_path / "t.png")]
    monkeypatch.setattr(learning, "commit", lambda: "abc123")
    learning.benchmark(command)
    assert capsys.readouterr().err == "learning.py: 1 runs to make: default (0)\n"
    monkeypatch.setattr(learning, "commit", lambda: "def456")
    learning.benchmark([*command, "--seeds", "0", "1"])
    lines = [
        f"learning.py: 1 curves are in {tmp_path}/t.csv already, of commit abc123: default (0)\n",
        "learning.py: 1 runs to make: default (1)\n",
    ]
    assert made == [1, 1] and capsys.readouterr().err == "".join(lines)


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


def test_a_csv_with_other_columns_is_refused(tmp_path, made, valid):
    """With one line, before any run; the results of this repository have the columns and the mark of old targets."""
    table = tmp_path / "t.csv"
    table.write_text("text,shape,budget,variant,seed\n")
    with pytest.raises(UserError, match=f"--csv {re.escape(str(table))} has not the columns"):
        learning.benchmark(["--updates", "1", "--data", DATA, "--valid", valid, "--csv", str(table)])
    assert made == []
    assert {row["targets"] for row in learning.read(learning.RESULTS / "learning.csv")} <= {"1", learning.TARGETS}


def test_every_curve_of_this_repository_has_a_name_that_works():
    """So it is found when its variant is asked for again."""
    for name in {row["variant"] for row in learning.read(learning.RESULTS / "learning.csv")}:
        assert learning.name_in_csv(name) == name
        learning.check_variant(name, argparse.Namespace(data=DATA, shape="32"))


@pytest.mark.slow
def test_counts_are_one_row_of_the_table(tmp_path, made, valid, capsys):
    """Whatever the seeds, they are counted once; the row has their loss on the targets of all others."""
    command = ["--updates", "1", "--data", DATA, "--valid", valid, "--variants", "default", "unigram", "five-gram"]
    command += ["--seeds", "3", "4", "--csv", str(tmp_path / "t.csv"), "--png", str(tmp_path / "t.png")]
    for _ in range(2):
        learning.benchmark(command)
    assert made == [4, 0]
    run = main.prepare(["--data", DATA, "--valid", valid])
    out, err = capsys.readouterr()
    for name, model, line in zip(("unigram", "five-gram"), (Unigram, FiveGram), out.splitlines()[-2:], strict=True):
        loss = learning.loss_of_counts(model(run.text.ids, run.vocab.size), run.valid_loader)
        assert re.search(re.escape(f"| {name} | 1 | 0 | {loss:.3f} |  | ") + r"[-+]\S+ \|  \|$", line)
    assert "4 runs to make: default (3, 4), unigram, five-gram\n" in err


# ---------------------------------------------------------------- learning.py: runs


def test_threads_are_those_given(monkeypatch):
    """Shared by the runs at once, each has one at least; no more than the cores that may be used."""
    monkeypatch.setattr(learning.joblib, "cpu_count", lambda: 8)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    assert [learning.threads_of_worker(jobs) for jobs in (1, 2, 4, 9)] == [6, 3, 1, 1]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 20)
    assert learning.threads_of_worker(2) == 4


@pytest.fixture
def clock(monkeypatch):
    """Replace training by a clock: a step takes `full` seconds, half of it while a memory is not full."""

    def train(run, reporter):
        for step in range(1, run.last_step + 1):
            clock.now += clock.full if step > clock.filled else clock.full / 2
            clock.steps += 1
            yield {"step": step, "loss": torch.tensor(5.0)}

    clock = argparse.Namespace(now=0.0, steps=0, full=2.0, filled=32)
    monkeypatch.setattr(learning, "time", argparse.Namespace(perf_counter=lambda: clock.now))
    monkeypatch.setattr(main, "train", train)
    monkeypatch.setattr(learning, "PROGRESS", multiprocessing.Value("i", 0), raising=False)
    monkeypatch.setattr(learning.Judge, "held_out_loss", lambda judge, model: 6.0)
    return clock


@pytest.mark.parametrize("flags, filled", [("--rows 16 --mem_len 384", 32), ("--rows 1 --mem_len 0", 0)])
def test_steps_within_some_seconds(clock, monkeypatch, flags, filled):
    """As many as fit into 97%, by the speed with a full memory; a twentieth of the seconds is spent on that."""
    clock.filled = filled
    run = main.prepare([*SMALL[:4], "--seq_len", "32", "--train_steps", "99999", "--mem_len", "24", "--rows", "16"])
    run = argparse.Namespace(**vars(run) | {"last_step": 99999})
    run.args.mem_len, run.args.reuse_len = (384, 256) if filled else (0, 256)
    run.loader.turns = [None] * (16 if filled else 1)
    monkeypatch.setattr(main, "make_reporter", lambda run, silent: None)
    assert learning.steps_within(lambda: run, 20_000) == 9700
    assert 0.05 * 20_000 <= clock.now < 0.05 * 20_000 + 2
    clock.now = clock.steps = 0
    assert learning.steps_within(lambda: run, 10) == 4  # too short to fill the memory
    assert clock.steps == max(filled, learning.LEAST_TIMED) + learning.LEAST_TIMED
    run.args.grad_accum_steps = 3
    assert learning.steps_within(lambda: run, 20_000) == 9700 // 3


@pytest.mark.parametrize(
    "words, full, updates, is_cut",
    [
        ("default", 1.0, 600, False),  # until the minutes are over
        ("decay_method=cos", 1.0, 582, False),  # all that were planned, in 97% of them
        ("decay_method=cos", 0.5, 582, False),  # of a machine that was slower while it was measured
        ("decay_method=cos", 2.0, 300, True),
        ("grad_accum_steps=2", 1.0, 300, False),
    ],
)
def test_minutes_end_a_run(clock, monkeypatch, capsys, valid, words, full, updates, is_cut):
    """After the planned updates or when they are over, and a line says if that was too soon; a curve is whole."""
    monkeypatch.setattr(learning, "steps_within", lambda make_run, seconds: int(0.97 * seconds))
    clock.full, clock.filled = full, 0
    options = argparse.Namespace(
        data=DATA, valid=valid, shape="32", updates=None, minutes=10, save=None, variants=[words], seeds=[0]
    )
    curve = learning.train(learning.Task(options, words, "0"))
    assert len(curve) == learning.POINTS and curve[-1]["updates"] == str(updates)
    assert float(curve[-1]["seconds"]) <= 600 and curve[0]["budget"] == "10 minutes"
    line = (
        f"learning.py: {words}, seed 0: the minutes were over at step 300 of 582, before the learning rate had decayed"
    )
    assert capsys.readouterr().err.splitlines() == ([line] if is_cut else [])


@pytest.mark.slow
def test_weights_are_saved_as_a_checkpoint_has_them(tmp_path, made, valid, capsys):
    """A folder a run, with the vocabulary, that loads where it should; nothing is overwritten."""
    variants = ["shuffled windows init=normal", "transformers", "bert"]
    command = ["--updates", "1", "--data", DATA, "--valid", valid, "--variants", *variants]
    command += ["--csv", str(tmp_path / "t.csv"), "--png", str(tmp_path / "t.png"), "--save", str(tmp_path / "saved")]
    learning.benchmark(command)
    ours, theirs, bert = (
        tmp_path / "saved" / name for name in ("shuffled-windows-init-normal-0", "transformers-0", "bert-0")
    )
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == sorted([ours.name, theirs.name, bert.name])
    main.main(["--data", DATA, "--output_dir", str(tmp_path / "out"), "--train_steps", "1", "--init", "normal"])
    checkpoint = tmp_path / "out" / "checkpoint-1"
    for name in ("config.json", "vocab.txt", "tokenizer_config.json"):
        assert (ours / name).read_text() == (checkpoint / name).read_text()

    [end] = [row for row in learning.read(tmp_path / "t.csv") if row["variant"] == variants[0]]
    argv = ["--eval_only", "--valid", valid, "--init_checkpoint", str(ours)]
    assert main.main(argv)["validation_loss"] == pytest.approx(float(end["held_out_loss"]), abs=1e-4)
    for folder in (ours, theirs):
        weights = XLNet.from_pretrained(folder).state_dict()
        peer, info = transformers.XLNetLMHeadModel.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"] and torch.equal(peer.lm_loss.weight, weights["lm_loss.weight"])
    model, info = transformers.BertForMaskedLM.from_pretrained(bert, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for folder in (ours, theirs, bert):
        assert transformers.AutoTokenizer.from_pretrained(folder)("the cat").input_ids == [101, 1996, 4937, 102]

    (tmp_path / "t.csv").unlink()
    with pytest.raises(UserError, match=r"--save .*: .*/transformers-0 exists; give another folder"):
        learning.benchmark([*command[:7], *command[8:]])
    assert made == [3]


def fail(task):
    """Stands in for `train`."""
    if task.seed == "0":
        raise main.NotFinite("the loss is nan")
    return [learning.row_of(task, held_out_loss="1")]


@pytest.mark.slow
def test_a_run_that_fails_does_not_end_the_others(tmp_path, monkeypatch, valid, capfd):
    """Its line is on stderr, and the curves of the others are in the csv."""
    monkeypatch.setattr(learning, "train", fail)
    options = argparse.Namespace(
        data=DATA, valid=valid, shape="32", updates=1, minutes=None, jobs=1, csv=tmp_path / "t.csv"
    )
    learning.make_runs(options, [learning.Task(options, "clip=0", seed) for seed in ("0", "1")])
    assert [row["seed"] for row in learning.read(options.csv)] == ["1"]
    assert "learning.py: clip=0, seed 0: the loss is nan\n" in capfd.readouterr().err


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
