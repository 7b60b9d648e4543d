"""The record: what is judged, for how long an entry trains, and what the csv and the table say."""

import csv
import itertools
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import main
from support import UserError

sys.path.insert(0, str(Path(main.__file__).parent / "benchmarks"))
import corpus
import learning
import record

TINY = "--n_layer 1 --d_model 8 --n_head 2 --d_inner 8"
SHORT = "--seq_len 64 --mem_len 48 --batch_size 2"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with three texts, parts of data.txt."""
    monkeypatch.chdir(tmp_path)
    Path("corpus").mkdir()
    page = Path(main.__file__).parent.joinpath("data.txt").read_text(encoding="utf-8")
    Path("corpus/train.txt").write_text(page, encoding="utf-8")
    Path("corpus/valid.txt").write_text(page[2000:], encoding="utf-8")
    Path("corpus/test.txt").write_text(page[:-2000], encoding="utf-8")
    return tmp_path


def run_record(*words, entry=f"{TINY} {SHORT}"):
    record.benchmark(["--minutes", "0.02", "--csv", "record.csv", "--entries", entry, *words])


def rows():
    with open("record.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def trained(*words):
    return main.prepare(["--train_steps", "1", *TINY.split(), *words])


# ---------------------------------------------------------------- judging


def test_every_entry_has_the_same_targets(here):
    """Windows, memory and optimizer of an entry change nothing; the score is that of --valid at default flags."""
    torch.manual_seed(0)
    plain = trained("--valid", "corpus/valid.txt")
    other = trained("--seq_len", "64", "--num_predict", "30", "--mask_alpha", "3", "--seed", "5", "--dropout", "0.5")
    other.model.load_state_dict(plain.model.state_dict())
    expected = main.evaluate(plain.model, plain.valid_loader, plain.device)
    assert record.judge(plain, "corpus/valid.txt").loss == pytest.approx(expected)
    assert record.judge(other, "corpus/valid.txt").loss == pytest.approx(expected)
    assert record.judge(plain, "corpus/test.txt").loss != pytest.approx(expected)


def test_without_memory_it_is_judged_without(here):
    """A model that never had a memory gets none."""
    run = trained("--mem_len", "0")
    alone = trained("--mem_len", "0", "--valid", "corpus/valid.txt")
    alone.model.load_state_dict(run.model.state_dict())
    expected = main.evaluate(alone.model, alone.valid_loader, alone.device)
    assert record.judge(run, "corpus/valid.txt").loss == pytest.approx(expected)


def test_bits_per_byte(here, tmp_path):
    """A model that guesses blindly: log2(n_token) bits a piece, and five bytes a piece with the space before it."""
    Path("corpus/plain.txt").write_text("\n".join(200 * ["that when from they have were"]), encoding="utf-8")
    run = trained()
    torch.nn.init.zeros_(run.model.word_embedding.weight)
    score = record.judge(run, "corpus/plain.txt")
    assert score.loss == pytest.approx(math.log(run.vocab.size), rel=1e-4)
    assert score.bits_per_byte == pytest.approx(math.log2(run.vocab.size) / 5, rel=2e-3) and score.unknown == 0


# ---------------------------------------------------------------- training


def test_training_stops_at_its_minutes(monkeypatch):
    """At --train_steps if they fit, else at the end of the minutes; accumulated steps are not updates."""
    clock = itertools.count()  # a second a call
    monkeypatch.setattr(record, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    flags = [*TINY.split(), *SHORT.split()]
    for fitting, expected in (3, 3), (10**6, 20):
        monkeypatch.setattr(learning, "steps_within", lambda make_run, seconds, fitting=fitting: fitting)
        run, n_updates, seconds = record.train(flags, 20)
        assert n_updates == expected and seconds == pytest.approx(expected + 1, abs=1)
    run, n_updates, _ = record.train([*flags, "--grad_accum_steps", "4"], 20)
    assert n_updates == 5


@pytest.mark.parametrize("fitting, is_cut", [(3, False), (10**6, True)])
def test_a_decay_that_is_cut_short_is_told(monkeypatch, capsys, fitting, is_cut):
    """A line on stderr says that the minutes were over before the learning rate had decayed."""
    clock = itertools.count()  # a second a call
    monkeypatch.setattr(record, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    monkeypatch.setattr(learning, "steps_within", lambda make_run, seconds: fitting)
    record.train([*TINY.split(), *SHORT.split(), "--decay_method", "poly"], 20)
    told = "the minutes were over at step 20 of 1000000, before the learning rate had decayed"
    assert (told in capsys.readouterr().err) == is_cut


def test_a_run_is_made_once(here, capsys):
    """Its row has what identifies it; a second call prints the same table, another seed adds a row."""
    run_record("--save", "models")
    [row] = rows()
    assert (row["entry"], row["flags"], row["minutes"], row["seed"]) == ("", f"{TINY} {SHORT}", "0.02", "0")
    assert row["judged_on"] == "valid.txt" and int(row["updates"]) > 0 and 0 < float(row["seconds"]) < 10
    assert 5 < float(row["loss"]) < 12 and 1 < float(row["bits_per_byte"]) < 6
    [folder] = Path("models").iterdir()
    assert {"config.json", "model.safetensors", "vocab.txt"} <= {path.name for path in folder.iterdir()}
    table = capsys.readouterr().out
    assert f"| {float(row['loss']):.3f} |" in table and f"`{TINY} {SHORT}`" in table
    run_record()
    assert rows() == [row] and capsys.readouterr().out == table
    run_record("--seeds", "0", "1")
    one, other = rows()
    assert one == row and other["seed"] == "1"
    mean = (float(one["loss"]) + float(other["loss"])) / 2
    assert f"| {mean:.3f} |" in capsys.readouterr().out
    run_record("--seeds", "2", "--final")  # one run, two judgements
    _, _, valid, test = rows()
    assert (valid["judged_on"], test["judged_on"]) == ("valid.txt", "test.txt")
    assert valid["seconds"] == test["seconds"] and valid["loss"] != test["loss"]
    run_record("--seeds", "1", "--final")  # judged on valid.txt before, which must not count twice
    assert [(row["seed"], row["judged_on"]) for row in rows()[4:]] == [("1", "test.txt")]


@pytest.mark.parametrize(
    "entry, words",
    [
        ("nobody", "'nobody' is no name of an entry; give flags, or one of default"),
        ("--seed 3", "--seed is set by record.py; leave it out"),
        ("--init_checkpoint out", "leave it out"),
        ("--n_layer 0", "--n_layer"),
    ],
)
def test_a_wrong_entry_is_refused(here, entry, words):
    with pytest.raises(UserError, match=words):
        run_record(entry=entry)
    assert not Path("record.csv").exists()


def test_weights_are_not_overwritten(here, monkeypatch):
    """Told before anything trains: ten minutes would be lost."""
    monkeypatch.setattr(record, "train", lambda *args: pytest.fail("it trains"))
    Path("models", record.Attempt("", f"{TINY} {SHORT}", 0.02, 0).folder(Path()).name).mkdir(parents=True)
    with pytest.raises(UserError, match="--save models: .* exists; give another folder"):
        run_record("--save", "models")


def test_named_entries_are_right():
    """Each can be run, and is worth a line of explanation."""
    for name, entry in record.ENTRIES.items():
        record.check_entry(name)
        assert entry.why


# ---------------------------------------------------------------- the text


def test_held_out_documents_are_apart():
    """Three documents in valid.txt, three others in test.txt, the rest to train on, in the same order each time."""
    names = [f"{year}-address" for year in range(1800, 1840)]
    parts = corpus.split(names)
    assert sorted(sum(parts.values(), [])) == names
    assert len(parts["valid.txt"]) == len(parts["test.txt"]) == 3
    assert corpus.split(reversed(names)) == parts
