"""examples/finetune.py: it learns, saves a model that transformers uses, and answers mistakes in one line."""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from support import UserError, corpus
from xlnet import XLNet

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
import finetune

ROOT = Path(__file__).resolve().parent.parent

ANIMALS, PLACES = "cat dog horse mouse bird".split(), "house river road garden town".split()
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *ANIMALS, *PLACES, *"the a one old big".split()]


@pytest.fixture(scope="module")
def own_sentence_piece(tmp_path_factory):
    """A folder with a SentencePiece model of data.txt."""
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("own")
    sentencepiece.SentencePieceTrainer.train(
        input=str(ROOT / "data.txt"),
        model_prefix=str(folder / "spiece"),
        vocab_size=300,
        control_symbols=["<cls>", "<sep>", "<pad>", "<mask>", "<eod>"],
        minloglevel=2,
    )
    return folder


def make_checkpoint(folder, vocabulary):
    """Write a small random checkpoint as main.py does, and return its folder."""
    folder.mkdir(parents=True)
    tokenizer = corpus.load_tokenizer(vocabulary)
    vocab = corpus.vocabulary(tokenizer)
    torch.manual_seed(0)
    model = XLNet(vocab.size, n_layer=2, n_head=2, d_head=4, d_model=8, d_inner=16)
    model.save_pretrained(folder, **vocab.hugging_face_config())
    tokenizer.save(folder)
    return folder


@pytest.fixture(scope="module")
def word_piece(tmp_path_factory):
    folder = tmp_path_factory.mktemp("word_piece")
    (folder / "vocab.txt").write_text("\n".join(PIECES))
    return make_checkpoint(folder / "out" / "checkpoint-7", folder)


@pytest.fixture(scope="module")
def sentence_piece(tmp_path_factory, own_sentence_piece):
    return make_checkpoint(tmp_path_factory.mktemp("sentence_piece") / "checkpoint-7", own_sentence_piece)


def animals_and_places(n, seed):
    """Return n lines of text and label: a text has an animal or a place, at any position."""
    rng = random.Random(seed)
    lines = []
    for i in range(n):
        words = rng.choices(["the", "a", "one", "old", "big"], k=rng.randint(0, 8))
        words.insert(rng.randint(0, len(words)), rng.choice(ANIMALS if i % 2 else PLACES))
        lines.append(f"{' '.join(words)}\t{'animal' if i % 2 else 'place'}\n")
    return lines


def write_examples(folder):
    (folder / "train.tsv").write_text("text\tlabel\n" + "".join(animals_and_places(160, 0)))
    (folder / "valid.tsv").write_text("".join(animals_and_places(60, 1)))


def run(checkpoint, folder, *flags, output_dir="classifier"):
    finetune.main([str(checkpoint), str(folder / "train.tsv"), "--output_dir", str(folder / output_dir), *flags])


def last_accuracy(out):
    return float([line for line in out.splitlines() if line.startswith("epoch")][-1].split()[-1])


# ---------------------------------------------------------------- learning


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint", ["word_piece", "sentence_piece"])
def test_it_learns_and_transformers_predicts_the_same(request, tmp_path, capsys, checkpoint):
    """It tells animals from places; the pipeline of the saved folder finds the same share, by the labels' names."""
    write_examples(tmp_path)
    flags = "--epochs 20 --learning_rate 0.01 --valid".split()
    run(request.getfixturevalue(checkpoint), tmp_path, *flags, str(tmp_path / "valid.tsv"))
    out, err = capsys.readouterr()
    assert err == ""
    assert "always answering 'place' has validation accuracy 0.500" in out
    assert last_accuracy(out) > 0.9
    valid = finetune.read_examples(str(tmp_path / "valid.tsv"), "--valid")
    pipeline = transformers.pipeline("text-classification", str(tmp_path / "classifier"))
    answers = [answer["label"] for answer in pipeline([example.text for example in valid])]
    correct = [answer == example.label for answer, example in zip(answers, valid, strict=True)]
    assert set(answers) == {"animal", "place"}
    assert sum(correct) / len(correct) == pytest.approx(last_accuracy(out), abs=5e-4)


@pytest.mark.slow
def test_what_a_user_sees(word_piece, tmp_path):
    """One line for the model, one for the majority class, one for an epoch, one for the end; nothing on stderr."""
    write_examples(tmp_path)
    command = [sys.executable, finetune.__file__, str(word_piece.parent), "train.tsv", "--valid", "valid.tsv"]
    flags = ["--output_dir", "classifier", "--epochs", "1"]
    done = subprocess.run(command + flags, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    model, majority, epoch, end = done.stdout.splitlines()
    assert f"{word_piece}: 160 examples, 2 labels" in model and "'place'" in majority
    assert epoch.startswith("epoch 1 of 1: loss 0.") and "'classifier'" in end


def test_the_same_seed_gives_the_same_weights(word_piece, tmp_path):
    """A run depends on its flags alone: two with one seed save the same bytes, and another seed saves others."""
    write_examples(tmp_path)
    weights = []
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        run(word_piece, tmp_path, "--epochs", "1", "--seed", seed, output_dir=name)
        weights.append((tmp_path / name / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]


def test_examples_are_shuffled(word_piece, tmp_path, monkeypatch):
    """Each epoch takes every training example once, in another order."""
    write_examples(tmp_path)
    seen = []
    encode = finetune.encode

    def spy(examples, *others):
        seen.extend(examples)
        return encode(examples, *others)

    monkeypatch.setattr(finetune, "encode", spy)
    monkeypatch.setattr(finetune, "accuracy", lambda *_: 0.5)
    run(word_piece, tmp_path, "--epochs", "2", "--valid", str(tmp_path / "valid.tsv"))
    train = finetune.read_examples(str(tmp_path / "train.tsv"), "train_file")
    first, second = seen[:160], seen[160:]
    assert sorted(first) == sorted(second) == sorted(train)
    assert first != second and first != train


@pytest.mark.parametrize("checkpoint, side", [("word_piece", "right"), ("sentence_piece", "left")])
def test_padding_changes_no_logit(request, checkpoint, side):
    """A text has the same logits alone and beside a longer one; 1e-5 is far above the rounding of float32."""
    texts = ["the cat", "a dog of the old house in the town by the river and the road"]
    labels = ["no", "yes"]
    torch.manual_seed(0)
    tokenizer, model = finetune.load(request.getfixturevalue(checkpoint), labels)
    for parameter in model.parameters():  # large weights show what a mask lets through
        torch.nn.init.normal_(parameter, std=0.3)
    examples = [finetune.Example(text, "yes") for text in texts]
    batch = finetune.encode(examples, tokenizer, labels, 128)
    alone = finetune.encode(examples[:1], tokenizer, labels, 128)
    n_padding = batch["input_ids"].shape[1] - alone["input_ids"].shape[1]
    padded = batch["attention_mask"][0] == 0
    assert n_padding > 5 and padded.sum() == n_padding
    assert (padded[-n_padding:] if side == "right" else padded[:n_padding]).all()
    with torch.no_grad():
        model.eval()
        together, single = model(**batch).logits, model(**alone).logits
    torch.testing.assert_close(together[:1], single, rtol=0, atol=1e-5)
    assert (together[0] - together[1]).abs().max() > 1e-3


def test_a_long_text_is_cut(word_piece):
    """At most max_len tokens are left, and the class mark is one of them."""
    tokenizer, _ = finetune.load(word_piece, ["no", "yes"])
    batch = finetune.encode([finetune.Example("the cat " * 50, "no")], tokenizer, ["no", "yes"], 10)
    assert batch["input_ids"].shape == (1, 10) and batch["input_ids"][0, 0] == PIECES.index("[CLS]")
    assert batch["labels"].tolist() == [0]


@pytest.mark.parametrize("n_updates", [1, 2, 7, 100])
def test_the_learning_rate_rises_and_falls(n_updates):
    """It peaks at 1 after a tenth of the updates, is never 0, and falls in a straight line."""
    share = finetune.warm_up_and_decay(n_updates)
    values = [share(n_made) for n_made in range(n_updates)]
    n_warmup = max(1, round(n_updates / 10))
    assert values[n_warmup - 1] == 1 == max(values) and min(values) > 0
    falls = [a - b for a, b in zip(values[n_warmup - 1 :], values[n_warmup:], strict=False)]
    assert falls == pytest.approx([1 / (n_updates - n_warmup + 1)] * len(falls))
    assert values[:n_warmup] == pytest.approx([(i + 1) / n_warmup for i in range(n_warmup)])


@pytest.mark.parametrize("width, rate", [(32, 2e-3), (128, 2.5e-4), (768, 1.7e-5)])
def test_the_default_learning_rate(width, rate):
    """It is what --help says for three widths."""
    config = transformers.XLNetConfig(d_model=width, n_head=4)
    assert finetune.default_learning_rate(config) == pytest.approx(rate, rel=0.02)


# ---------------------------------------------------------------- checkpoints and examples


def test_a_runs_folder_means_its_newest_checkpoint(word_piece, tmp_path):
    """Of checkpoint-7 and checkpoint-10 the folder is the second, which comes first in the alphabet."""
    shutil.copytree(word_piece, tmp_path / "checkpoint-7")
    shutil.copytree(word_piece, tmp_path / "checkpoint-10")
    assert finetune.find_checkpoint(str(tmp_path)) == tmp_path / "checkpoint-10"
    assert finetune.find_checkpoint(str(tmp_path / "checkpoint-7")) == tmp_path / "checkpoint-7"


@pytest.mark.parametrize(
    "content",
    [
        "a cat\tanimal\na house\tplace\n",
        "text\tlabel\na cat\tanimal\na house\tplace\n",
        "id\tLabel\tSentence\n1\tanimal\ta cat\n\n2\tplace\ta house",
        "a cat,animal\r\na house,place\r\n",
        'label,text\nanimal,"a cat"\nplace,a house\n',
        "\ufefftext,label\n a cat , animal\na house,place\n",
    ],
)
def test_files_are_read(tmp_path, content):
    """Tabs or commas, with or without names of columns, in any order, with other columns, all give two examples."""
    (tmp_path / "file").write_bytes(content.encode())
    examples = finetune.read_examples(str(tmp_path / "file"), "train_file")
    assert examples == [("a cat", "animal"), ("a house", "place")]


def test_quotes(tmp_path):
    """Between commas quotes hold a text with commas and line ends; between tabs they are characters."""
    (tmp_path / "a.csv").write_bytes(b'"a ""big"" cat,\nold",animal\n')
    assert finetune.read_examples(str(tmp_path / "a.csv"), "train_file") == [('a "big" cat,\nold', "animal")]
    (tmp_path / "a.tsv").write_text('"a big cat\tanimal\nit said, "no"\tanimal\n')
    texts = [example.text for example in finetune.read_examples(str(tmp_path / "a.tsv"), "train_file")]
    assert texts == ['"a big cat', 'it said, "no"']


def test_a_tenth_is_held_out_without_valid(tmp_path, capsys):
    """The two parts are drawn at random, and together they are all examples."""
    write_examples(tmp_path)
    args = finetune.parse(["none", str(tmp_path / "train.tsv"), "--output_dir", "none"])
    train, valid = finetune.read_examples_of(args)
    everything = finetune.read_examples(str(tmp_path / "train.tsv"), "train_file")
    assert len(valid) == 16 and sorted(train + valid) == sorted(everything)
    assert valid != everything[:16] and valid != everything[-16:]
    assert "no --valid: 16 of the 160 examples in" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, words",
    [
        ("out train.tsv --epochs 0", ["--epochs", "'0'", "at least 1"]),
        ("out train.tsv --learning_rate nan", ["--learning_rate", "nan"]),
        ("out nonesuch.tsv", ["train_file nonesuch.tsv", "give a tsv or csv file"]),
        ("out train.tsv --valid nonesuch.tsv", ["--valid nonesuch.tsv"]),
        ("out empty.tsv", ["train_file empty.tsv", "no example"]),
        ("out names.tsv", ["train_file names.tsv", "no example"]),
        ("out one.tsv", ["one.tsv", "one label only", "'animal'"]),
        ("out nolabel.tsv", ["nolabel.tsv", "no column label"]),
        ("out notext.tsv", ["notext.tsv", "no column text or sentence"]),
        ("out short.tsv", ["short.tsv, line 3", "no label in column 2"]),
        ("out quotes.csv", ["quotes.csv, line 2", "mend the quotes"]),
        ("out latin.tsv", ["latin.tsv, line 2", "UTF-8"]),
        ("out train.tsv --valid other.tsv", ["--valid other.tsv", "'plant'", "train.tsv"]),
        ("nonesuch train.tsv", ["checkpoint nonesuch is no folder here", "give a folder"]),
        ("empty train.tsv", ["checkpoint empty", "no model"]),
        ("nothing train.tsv", ["checkpoint nothing", "cannot be loaded"]),
        ("headless train.tsv", ["checkpoint headless", "lacks the weights", "layer.2"]),
        ("unpadded train.tsv", ["checkpoint unpadded", "padding"]),
        ("out train.tsv --output_dir full", ["--output_dir full", "already"]),
        ("out train.tsv --output_dir out", ["--output_dir out", "already"]),
        ("out train.tsv --output_dir train.tsv", ["--output_dir train.tsv", "give a folder"]),
        ("out train.tsv --learning_rate 10 --epochs 50", ["--learning_rate 10", "smaller"]),
    ],
)
def test_a_mistake_gets_one_line(word_piece, tmp_path, monkeypatch, capsys, flags, words):
    """The line names the flag or file, its value and the remedy; exit status 2, no traceback."""
    write_examples(tmp_path)
    files = {
        "empty.tsv": "",
        "names.tsv": "text\tlabel\n",
        "one.tsv": "a cat\tanimal\na dog\tanimal\n",
        "nolabel.tsv": "text\tkind\na cat\tanimal\n",
        "notext.tsv": "label\tword\nanimal\ta cat\n",
        "short.tsv": "a cat\tanimal\na house\tplace\na dog\n",
        "quotes.csv": 'a cat,animal\n"a house,place\n',
        "other.tsv": "a cat\tanimal\nan oak\tplant\n",
    }
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    (tmp_path / "latin.tsv").write_bytes("a cat\tanimal\nMünchen\tplace\n".encode("latin-1"))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(word_piece, "out/checkpoint-7")
    for name in ("empty", "nothing", "full"):
        Path(name).mkdir()
    for name in ("nothing", "full"):
        Path(name, "config.json").write_text("{}")
    shutil.copytree(word_piece, "unpadded")
    Path("unpadded", "vocab.txt").write_text("\n".join(PIECES).replace("[PAD]", "[NONE]"))
    config = json.loads(Path("unpadded", "tokenizer_config.json").read_text())
    Path("unpadded", "tokenizer_config.json").write_text(json.dumps(config | {"pad_token": None}))
    shutil.copytree(word_piece, "headless")
    config = json.loads(Path("headless", "config.json").read_text())
    Path("headless", "config.json").write_text(json.dumps(config | {"n_layer": 3}))
    if "learning_rate 10" in flags:  # a loss that is not a number
        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(float("nan")))
    if "output_dir" not in flags:
        flags += " --output_dir new"
    with pytest.raises(SystemExit) as stop:
        finetune.main(flags.split())
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1
    assert all(word in err for word in words), err


def test_without_transformers(word_piece, monkeypatch):
    """The message names the package and how to install it."""
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match='pip install "transformers>=5,<6"'):
        finetune.load(word_piece, ["no", "yes"])
