"""The flags: their defaults, how a checkpoint fixes some of them, and the one line that a mistake gets."""

import math
import os
import re
import tempfile
from pathlib import Path

import pytest
import torch

import main
import xlnet
from support import UserError, flags

ROOT = Path(main.__file__).parent


def complete(*words, world_size=1):
    """Return the flags of a command line with all defaults."""
    args = flags.parse(words)
    flags.fill_defaults(args, world_size)
    return args


# ---------------------------------------------------------------- defaults


def test_defaults_are_the_documented_ones():
    """Every flag of a command line without words; README and docs promise these values."""
    args = complete()
    assert args.data == [str(ROOT / "data.txt")] and Path(args.cache_dir).name == "xlnet"
    assert {name: value for name, value in vars(args).items() if name not in ("data", "cache_dir")} == {
        "tokenizer": "bert-base-uncased",
        "seq_len": 512,
        "reuse_len": 256,
        "perm_size": 256,
        "bi_data": False,
        "mask_alpha": 6,
        "mask_beta": 1,
        "num_predict": 85,
        "mem_len": 384,
        "n_layer": 6,
        "n_head": 4,
        "d_head": 8,
        "d_model": 32,
        "d_inner": 32,
        "dropout": 0.0,
        "dropatt": 0.0,
        "ff_activation": "relu",
        "attn_type": "bi",
        "clamp_len": -1,
        "same_length": False,
        "init": "local",
        "init_std": None,
        "batch_size": 1,
        "rows": None,
        "optimizer": "adamw",
        "learning_rate": 4e-3,
        "weight_decay": 0.01,
        "adam_epsilon": 1e-8,
        "warmup_steps": 0,
        "decay_method": "constant",
        "min_lr_ratio": 0.0,
        "clip": 0.25,
        "grad_accum_steps": 1,
        "num_step": 100,
        "train_steps": None,
        "seed": 0,
        "device": "auto",
        "bf16": False,
        "compile": False,
        "output_dir": None,
        "save_steps": None,
        "save_total_limit": 3,
        "resume": None,
        "init_checkpoint": None,
        "valid": None,
        "eval_steps": None,
        "eval_only": False,
        "log_steps": 1,
        "tensorboard": False,
    }


@pytest.mark.parametrize(
    "words, world_size, batch_size",
    [("", 1, 1), ("--bi_data True", 1, 2), ("", 3, 3), ("--bi_data 1", 3, 6), ("--batch_size 12", 3, 12)],
)
def test_default_batch_is_the_smallest(words, world_size, batch_size):
    """One row for each process, with bi_data one in each direction; a given size stays."""
    args = complete(*words.split(), world_size=world_size)
    assert args.batch_size == batch_size
    flags.check(args, world_size)


@pytest.mark.parametrize(
    "words, expected",
    [
        ("--seq_len 128", {"reuse_len": 64, "perm_size": 64, "num_predict": 21, "mem_len": 96}),
        ("--seq_len 128 --reuse_len 32", {"reuse_len": 32, "perm_size": 32, "num_predict": 21, "mem_len": 96}),
        ("--seq_len 512 --reuse_len 384 --mem_len 0", {"reuse_len": 384, "perm_size": 128, "mem_len": 0}),
        ("--seq_len 10", {"reuse_len": 5, "perm_size": 5, "num_predict": 1, "mem_len": 7}),
        ("--seq_len 600 --reuse_len 584 --perm_size 8", {"num_predict": 33}),  # 16 tokens behind inp hold 16 targets
        ("--d_model 64", {"d_head": 16, "d_inner": 64}),
        ("--d_model 256", {"d_head": 64, "d_inner": 256, "learning_rate": 2.5e-4}),
        ("--d_model 768 --n_head 12", {"d_head": 64}),
        ("--d_model 64 --d_head 8", {"d_head": 8}),
        ("--optimizer muon --d_model 256", {"learning_rate": 3e-3}),
        ("--init_checkpoint model --optimizer muon", {"learning_rate": 7.5e-4}),
        ("--init_checkpoint model", {"learning_rate": 1e-3}),
        ("--init_checkpoint model --d_model 256", {"learning_rate": 6.3e-5}),
        ("--init_checkpoint model --d_model 768", {"learning_rate": 1.4e-5}),
        ("--init_checkpoint model --learning_rate 4e-3", {"learning_rate": 4e-3}),
    ],
)
def test_defaults_follow_other_flags(words, expected):
    """One flag alone makes a run: lengths follow seq_len, a head d_model; a trained model has a lower rate."""
    args = complete(*words.split())
    assert {name: vars(args)[name] for name in expected} == expected
    flags.check(args, 1)


@pytest.mark.parametrize(
    "words, advice", [("--seq_len 129", "130 --reuse_len 65"), ("--reuse_len 250", "512 --reuse_len 256")]
)
def test_a_window_without_blocks_is_a_mistake(words, advice):
    """Blocks of a token or two would be predicted from left to right, another model; perm_size can ask for it."""
    with pytest.raises(UserError, match=f"tokens to permute; try --seq_len {advice}, or give --perm_size"):
        complete(*words.split())
    assert complete(*words.split(), "--perm_size", "1").perm_size == 1


@pytest.mark.parametrize("text, expected", [("0.01", 0.01), ("1e-2", 0.01), ("1", None), ("0", None), ("a.txt", None)])
def test_a_share_or_a_file(text, expected):
    """A number between 0 and 1 is a share of the text."""
    assert flags.share(text) == expected


def test_a_file_with_the_name_of_a_share(tmp_path, monkeypatch):
    """It is the file, and its path in a checkpoint is absolute; a share stays a share."""
    monkeypatch.chdir(tmp_path)
    assert fixed_flags("--valid", "0.5")["valid"] == "0.5"
    (tmp_path / "0.5").write_text("")
    assert flags.share("0.5") is None and fixed_flags("--valid", "0.5")["valid"] == f"{tmp_path}/0.5"


def test_an_end_by_updates_needs_no_passes():
    """num_step is 100 only if neither end is given; --num_epoch is another name for it."""
    assert (complete("--train_steps", "7").num_step, complete("--train_steps", "7").train_steps) == (None, 7)
    assert complete("--num_epoch", "3").num_step == complete("--num_step", "3").num_step == 3


def test_default_cache_dir_follows_the_environment(monkeypatch):
    """xlnet in $XDG_CACHE_HOME; in ~/.cache where that is not set, or empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert flags.default_cache_dir() == os.path.join("/caches", "xlnet")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    for name in ("HOME", "USERPROFILE"):  # of Windows
        monkeypatch.setenv(name, "/home/ada")
    assert Path(flags.default_cache_dir()) == Path("/home/ada/.cache/xlnet")


def test_a_user_without_a_home_has_a_cache(monkeypatch):
    """In the folder for temporary files, and not in one named ~."""
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as where there is no HOME and no entry
    assert flags.default_cache_dir() == os.path.join(tempfile.gettempdir(), "xlnet")


@pytest.mark.parametrize(
    "text, value", [("True", True), ("yes", True), ("1", True), ("false", False), ("No", False), ("0", False)]
)
def test_words_for_true_and_false(text, value):
    """In any case; "False" is not true, as it is with type=bool."""
    assert flags.parse(["--bi_data", text]).bi_data is value


@pytest.mark.slow
def test_help_names_every_flag_and_its_default(capsys, monkeypatch):
    """--help shows each flag with a help text and the default that the parser has, and ends with status 0."""
    monkeypatch.setenv("COLUMNS", "1000")  # no line breaks inside a help text
    with pytest.raises(SystemExit) as stop:
        main.main(["--help"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0 and shown.startswith("usage: main.py")
    parser = flags.build_parser()
    assert {action.dest for action in parser._actions} == {"help", *vars(complete())}
    for action in parser._actions:
        text = action.help % {"default": action.default}
        assert text and text in shown and action.option_strings[-1] in shown
        has_value = action.nargs != 0  # unlike a switch
        if has_value and action.default is not None:
            assert f"(default: {action.default})" in text


# ---------------------------------------------------------------- what a checkpoint fixes


def fixed_flags(*words):
    """Return the flags in the checkpoint of a run with this command line."""
    return flags.with_absolute_paths(complete(*words))


def test_flags_not_given_are_those_of_the_checkpoint():
    """Not the defaults; a flag may be given again with the same value."""
    fixed = fixed_flags("--d_model", "64", "--seed", "3", "--bf16", "--bi_data", "True")
    args = flags.parse(["--resume", "--seed", "3"], fixed, "out/checkpoint-7")
    assert (args.d_model, args.seed, args.bf16, args.bi_data, args.batch_size) == (64, 3, True, True, 2)
    assert args.resume == ""
    assert vars(flags.parse([], fixed, "out/checkpoint-7")) == fixed


MAY_CHANGE = {  # another value on the command line, and what is parsed
    "num_step": ("7", 7),
    "train_steps": ("7", 7),
    "save_steps": ("7", 7),
    "save_total_limit": ("7", 7),
    "eval_steps": ("7", 7),
    "eval_only": (None, True),
    "log_steps": ("7", 7),
    "device": ("cpu", "cpu"),
    "data": ("other.txt", ["other.txt"]),
    "tokenizer": ("other", "other"),
    "valid": ("other.txt", "other.txt"),
    "output_dir": ("other", "other"),
    "resume": ("other", "other"),
    "cache_dir": ("other", "other"),
    "tensorboard": (None, True),
}
MUST_STAY = {
    "seq_len": ("64", 64),
    "reuse_len": ("64", 64),
    "perm_size": ("64", 64),
    "bi_data": ("True", True),
    "mask_alpha": ("7", 7),
    "mask_beta": ("2", 2),
    "num_predict": ("7", 7),
    "mem_len": ("0", 0),
    "n_layer": ("7", 7),
    "n_head": ("7", 7),
    "d_head": ("7", 7),
    "d_model": ("8", 8),
    "d_inner": ("7", 7),
    "dropout": ("0.5", 0.5),
    "dropatt": ("0.5", 0.5),
    "ff_activation": ("gelu", "gelu"),
    "attn_type": ("uni", "uni"),
    "clamp_len": ("7", 7),
    "same_length": ("True", True),
    "init": ("normal", "normal"),
    "init_std": ("0.5", 0.5),
    "batch_size": ("7", 7),
    "rows": ("7", 7),
    "learning_rate": ("0.5", 0.5),
    "weight_decay": ("0.5", 0.5),
    "adam_epsilon": ("0.5", 0.5),
    "warmup_steps": ("7", 7),
    "decay_method": ("cos", "cos"),
    "optimizer": ("muon", "muon"),
    "min_lr_ratio": ("0.5", 0.5),
    "clip": ("0.5", 0.5),
    "grad_accum_steps": ("7", 7),
    "seed": ("7", 7),
    "bf16": (None, True),
    "compile": (None, True),
    "init_checkpoint": ("other", "other"),
}


def test_a_flag_may_change_or_must_stay():
    """The two tables hold every flag."""
    assert sorted([*MAY_CHANGE, *MUST_STAY]) == sorted(vars(complete()))


@pytest.mark.parametrize("name", MAY_CHANGE | MUST_STAY)
def test_which_flags_may_change(name):
    """End, intervals, device and places of files; any other is refused with both values and the checkpoint's name."""
    fixed = fixed_flags("--data", "text.txt")
    text, value = (MAY_CHANGE | MUST_STAY)[name]
    command = [f"--{name}"] if text is None else [f"--{name}", text]
    if name in MAY_CHANGE:
        assert getattr(flags.parse(command, fixed, "out/checkpoint-7"), name) == value
        return
    with pytest.raises(UserError) as error:
        flags.parse(command, fixed, "out/checkpoint-7")
    expected = f"--{name} {value} contradicts out/checkpoint-7, where it is {fixed[name]}; leave it out"
    assert str(error.value) == expected


@pytest.mark.parametrize(
    "words, expected",
    [
        ("", (4, 9)),
        ("--num_step 6", (6, None)),
        ("--train_steps 6", (None, 6)),
        ("--num_epoch 2 --train_steps 3", (2, 3)),
    ],
)
def test_a_new_end_replaces_both(words, expected):
    """A run that ended after passes can go on to a number of updates, and the other way round."""
    args = flags.parse(words.split(), fixed_flags("--num_step", "4", "--train_steps", "9"), "out/checkpoint-7")
    assert (args.num_step, args.train_steps) == expected


def test_a_run_can_go_on_from_another_folder(tmp_path, monkeypatch):
    """Paths in a checkpoint are absolute; the name of a bundled tokenizer stays a name."""
    monkeypatch.chdir(tmp_path)
    words = ["--data", "a.txt", "b/c.txt", "--valid", "v.txt", "--tokenizer", "vocab.txt", "--cache_dir", "cache"]
    fixed = fixed_flags(*words)
    assert fixed["data"] == [f"{tmp_path}/a.txt", f"{tmp_path}/b/c.txt"]
    assert (fixed["valid"], fixed["tokenizer"]) == (f"{tmp_path}/v.txt", f"{tmp_path}/vocab.txt")
    assert fixed["cache_dir"] == f"{tmp_path}/cache"
    assert fixed_flags()["tokenizer"] == "bert-base-uncased" and fixed_flags()["valid"] is None


# ---------------------------------------------------------------- mistakes


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder of unusable texts, vocabularies and models."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "empty.txt").write_bytes(b"")
    (folder / "model").mkdir()
    xlnet.XLNet(30).save_pretrained(folder / "model")
    config = folder / "model" / "config.json"
    config.write_text(config.read_text().replace('"n_layer": 6', '"n_layer": "2"'))
    (folder / "short.txt").write_text("the cat sat on the mat\n")
    (folder / "latin1.txt").write_bytes("fine\ncaf\u00e9\n".encode("latin-1"))
    (folder / "plain_vocab.txt").write_text("[PAD]\n[UNK]\nthe\ncat\n")
    (folder / "mixed_vocab.txt").write_text("[PAD]\n<unk>\n[CLS]\n[SEP]\nthe\ncat\n")
    return folder


COUNTS = (
    "seq_len reuse_len perm_size mask_alpha mask_beta num_predict num_step n_layer n_head d_head d_model d_inner "
    "batch_size rows train_steps grad_accum_steps save_steps eval_steps"
).split()
MISTAKES = [
    ("--data nowhere.txt", ["--data nowhere.txt", "No such file"]),
    ("--data {files}", ["--data", "Is a directory", "give a text file"]),
    ("--data {files}/empty.txt", ["--data", "empty.txt", "holds no text"]),
    ("--data {files}/short.txt", ["--data", "has 6 tokens", "needs 512"]),
    ("--data {files}/short.txt --bi_data True --batch_size 6", ["has 6 tokens", "needs 1536", "--batch_size"]),
    ("--data {files}/latin1.txt", ["--data", "line 2 is not UTF-8"]),
    ("--valid {files}/none.txt", ["--valid", "none.txt", "No such file"]),
    ("--valid {files}/short.txt", ["--valid", "has 6 tokens", "needs 512"]),
    ("--data {files}/short.txt --valid 0.5", ["--valid 0.5", "short.txt is one document", "blank lines"]),
    ("--valid 1.5", ["--valid 1.5", "No such file", "a share between 0 and 1"]),
    ("--lr 1e-3", ["unrecognized arguments: --lr 1e-3", "--help lists all flags"]),
    ("--tokenizer {files}/short.txt", ["--tokenizer", "is no vocabulary", "--data"]),
    ("--eval_only", ["--eval_only needs --valid"]),
    ("--eval_only --valid 0.5", ["--eval_only needs --valid, and --init_checkpoint or --resume"]),
    ("--eval_only --init_checkpoint nowhere", ["--init_checkpoint nowhere is no folder here"]),
    (
        "--tokenizer gpt2",
        ["--tokenizer gpt2", "bert-base-uncased", "bert-large-uncased", "bert-base-cased", "bert-large-cased"],
    ),
    ("--tokenizer {files}", ["--tokenizer", "no known tokenizer"]),
    ("--tokenizer {files}/plain_vocab.txt", ["--tokenizer", "no [SEP] and no [CLS]"]),
    ("--tokenizer {files}/mixed_vocab.txt", ["--tokenizer", "no [UNK]"]),
    ("--tokenizer {files}/latin1.txt", ["--tokenizer", "not a vocabulary"]),
    ("--bi_data maybe", ["--bi_data", "maybe", "True or False"]),
    ("--perm_size 200", ["--perm_size 200", "--reuse_len 256", "try 128 or 256"]),
    ("--perm_size 512", ["--perm_size 512", "try 256"]),
    ("--reuse_len 300 --perm_size 100", ["--perm_size 100", "--reuse_len 300", "212", "try 4"]),
    ("--reuse_len 509", ["--reuse_len 509", "at most 508"]),
    ("--num_predict 513", ["--num_predict 513", "at most 512"]),
    ("--reuse_len 64 --perm_size 64 --num_predict 129", ["--num_predict 129", "at most 128"]),
    ("--reuse_len 480 --perm_size 32 --num_predict 66", ["--num_predict 66", "at most 65"]),
    ("--mask_alpha 2 --mask_beta 3", ["--mask_beta 3", "--mask_alpha 2", "at most 2"]),
    ("--batch_size 3 --bi_data True", ["--batch_size 3", "--bi_data True", "try 4"]),
    ("--rows 5 --batch_size 2", ["--rows 5", "--batch_size 2", "try 4"]),
    ("--rows 1 --bi_data True", ["--rows 1", "--batch_size 2", "try 2"]),
    ("--rows 8", ["data.txt", "4015 tokens and needs 4096", "smaller --seq_len or --rows"]),
    ("--rows 16 --bi_data True", ["needs 4096", "smaller --seq_len or --rows"]),
    (
        "--grad_accum_steps 9 --train_steps 3 --num_step 1 --seq_len 2048 --reuse_len 256",
        ["--grad_accum_steps 9", "the 8 steps", "at most"],
    ),
    ("--weight_decay 251", ["--weight_decay 251", "--learning_rate 0.004", "at most 250"]),
    ("--d_model 33", ["--d_model 33", "try 34"]),
    ("--mem_len -1", ["--mem_len", "-1", "at least 0"]),
    ("--clamp_len -2", ["--clamp_len", "-2", "at least -1"]),
    ("--dropout 1", ["--dropout", "1", "at most 0.999"]),
    ("--dropatt nan", ["--dropatt", "nan", "at most 0.999"]),
    ("--learning_rate -0.1", ["--learning_rate", "-0.1", "at least 0"]),
    ("--min_lr_ratio 2", ["--min_lr_ratio 2", "at most 1"]),
    ("--adam_epsilon 0", ["--adam_epsilon", "'0'", "at least 1e-15"]),
    ("--seq_len 12.5", ["--seq_len", "12.5", "a whole number"]),
    ("--seq_len 4", ["--seq_len", "'4'", "at least 5"]),
    ("--seq_len_ 12", ["--seq_len_"]),
    ("--seq 128", ["--seq"]),  # no abbreviations
    ("--init zeros", ["--init", "zeros", "local"]),
    ("--output_dir {files}/new --d_head 9", ["--d_head 9", "--d_model 32", "Hugging Face", "try --d_head 8"]),
    ("--output_dir {files}/new --n_head 5", ["--n_head 5 times --d_head 6", "try --n_head 4 or 8 without --d_head"]),
    ("--output_dir {files}/short.txt", ["--output_dir", "a folder to write to"]),
    ("--save_steps 3", ["--save_steps 3", "--output_dir"]),
    ("--tensorboard", ["--tensorboard", "--output_dir"]),
    ("--eval_steps 3", ["--eval_steps 3", "--valid"]),
    ("--init_checkpoint {files}/model", ["--init_checkpoint", "config.json sets n_layer to '2'"]),
    ("--init_checkpoint {files}", ["--init_checkpoint", "config.json", "the folder of an XLNet"]),
    *((f"--{name} {value}", [f"--{name}", value, "at least"]) for value in ("0", "-3") for name in COUNTS),
]


def assert_mistake(capsys, argv, words):
    """A command line ends with status 2, nothing on stdout, and one line on stderr that holds all of `words`."""
    with pytest.raises(SystemExit) as stop:
        main.main(argv)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == ""
    assert err.startswith("main.py: error: ") and err.count("\n") == 1 and err.endswith("\n")
    for word in words:
        assert word in err


@pytest.mark.parametrize("command, words", MISTAKES)
def test_a_mistake_gets_one_line(capsys, files, command, words):
    """Exit status 2, nothing on stdout, and one line that names the flag, the value and the remedy."""
    assert_mistake(capsys, command.format(files=files).split(), words)
    assert not (files / "new").exists()  # a mistake leaves no folder


@pytest.mark.parametrize("name", ["data", "cache_dir", "tokenizer", "output_dir", "init_checkpoint", "valid"])
def test_an_empty_name_is_a_mistake(capsys, name):
    """An unset shell variable is not silently the same as no flag."""
    assert_mistake(capsys, [f"--{name}", ""], [f"--{name}: ''", "give a name, or leave the flag out"])


@pytest.mark.parametrize("name", ["data", "cache_dir", "tokenizer", "output_dir", "init_checkpoint", "valid"])
def test_a_name_that_is_not_utf_8_is_a_mistake(capsys, name):
    """A checkpoint could not hold it, and the run could not go on."""
    assert_mistake(capsys, [f"--{name}", "caf\udce9"], [f"--{name}: 'caf\\udce9' is not UTF-8; rename it"])


ABSURD = [  # a value, and the largest that is allowed
    *((f"--{name} 1{'0' * digits}", 2**20) for name in ("seq_len", "mem_len", "num_predict") for digits in (9, 12)),
    *((f"--{name} {'7' * 20}", 2**20) for name in ("clamp_len", "mask_alpha", "perm_size", "reuse_len")),
    *((f"--{name} 1000000000000", 2**16) for name in ("batch_size", "rows")),
    *((f"--{name} 1000000000", 2**16) for name in ("d_model", "n_head", "d_head", "d_inner")),
    ("--n_layer 100000", 1000),
    (f"--seed {2**64}", 2**63 - 1),
    *((f"--{name} {'9' * 400}", 10**9) for name in ("warmup_steps", "grad_accum_steps", "train_steps", "num_step")),
    (f"--save_steps {'9' * 5000}", 10**9),  # more digits than int() reads
    *((f"--learning_rate {value}", 1e6) for value in ("inf", "nan", "1e400", "1e7")),
    *((f"--{name} 1e300", 1e6) for name in ("weight_decay", "clip", "init_std", "adam_epsilon", "min_lr_ratio")),
]


@pytest.mark.parametrize("command, most", ABSURD, ids=[f"{command[:30]}" for command, _ in ABSURD])
def test_an_absurd_number_gets_one_line(capsys, command, most):
    """It names the flag, the beginning of the value, and the largest value that is allowed."""
    flag, value = command.split()
    assert_mistake(capsys, [flag, value], [flag, f": '{value[:12]}", f"at most {most}"])


@pytest.mark.parametrize(
    "command, words",
    [
        (
            "--n_layer 1000 --d_model 512 --n_head 8 --d_head 64 --d_inner 2048",
            ["--n_layer 1000", "--d_model 512", "14 GB of weights", "8 GB"],
        ),
        ("--n_layer 1 --d_model 65536 --d_head 1 --d_inner 1", ["30,522 word pieces", "8 GB of weights", "8 GB"]),
        ("--seq_len 20000 --reuse_len 10000 --perm_size 10000", ["--seq_len 20000", "17 GB of attention", "8 GB"]),
        ("--batch_size 1000", ["--batch_size 1000", "11 GB of attention", "8 GB", "give a smaller"]),
    ],
)
def test_what_no_memory_holds_is_a_mistake(capsys, monkeypatch, command, words):
    """Weights and scores are estimated, before anything is allocated, and compared with the machine's memory."""
    monkeypatch.setattr(flags, "memory_of_machine", lambda: 8e9)
    assert_mistake(capsys, command.split(), words)


def test_the_estimate_of_weights_is_just_below_their_number(monkeypatch):
    """A shape is refused if and only if the machine lacks memory for 95 to 100 % of its weights."""
    n_token = 500
    args = complete(*"--n_layer 3 --d_model 64 --n_head 4 --d_head 24 --d_inner 80 --seq_len 16".split())
    model = xlnet.XLNet(n_token, n_layer=3, d_model=64, n_head=4, d_head=24, d_inner=80)
    n_bytes = 4 * sum(parameter.numel() for parameter in model.parameters())
    monkeypatch.setattr(flags, "memory_of_machine", lambda: n_bytes)
    flags.check_memory(args, n_token, 1)
    monkeypatch.setattr(flags, "memory_of_machine", lambda: 0.95 * n_bytes)
    with pytest.raises(UserError, match="--d_head 24"):
        flags.check_memory(args, n_token, 1)


def test_scores_are_counted_for_each_process(monkeypatch):
    """Two processes share the rows of a batch, and each needs memory for its own."""
    monkeypatch.setattr(flags, "memory_of_machine", lambda: 2 * 512**2 * (1 + 5 * 4))
    flags.check_memory(complete("--batch_size", "2"), 2, 2)
    with pytest.raises(UserError, match="--batch_size 2"):
        flags.check_memory(complete("--batch_size", "2"), 2, 1)


def test_memory_of_this_machine():
    """More than 100 MB and less than 100 TB, or infinity: bytes, not pages or kilobytes."""
    assert 1e8 < flags.memory_of_machine() < 1e14 or flags.memory_of_machine() == math.inf


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_where_there_is_none(capsys):
    """One line, status 2."""
    with pytest.raises(SystemExit) as stop:
        main.main(["--device", "cuda"])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and "--device cuda" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "command",
    [
        "--reuse_len 508 --perm_size 4 --num_predict 9",  # the rest is one block of A, [SEP], [SEP], [CLS]
        "--reuse_len 480 --perm_size 32 --num_predict 65",
        "--num_predict 512",
        "--num_predict 1",
        "--mask_beta 6",
        "--mem_len 0",
        "--perm_size 128",
        "--reuse_len 128 --perm_size 128",
        "--attn_type uni --same_length true --clamp_len 9",
        "--batch_size 4 --bi_data yes",
        "--dropout 0.99 --dropatt 0.99 --learning_rate 0 --min_lr_ratio 1",
    ],
)
def test_extreme_but_legal_flags_run(tmp_path, command):
    """The values next to those that are refused; a loss near that of guessing blindly."""
    words = sorted(set(re.findall(r"\w+|\S", (ROOT / "data.txt").read_text().lower())))
    pieces = ["[UNK]", "[CLS]", "[SEP]", *words]
    (tmp_path / "vocab.txt").write_text("\n".join(pieces))
    small = ["--tokenizer", str(tmp_path), "--n_layer", "1", "--d_model", "8", "--train_steps", "2"]
    metrics = main.main([*small, *command.split()])
    assert metrics["loss"] == pytest.approx(math.log(len(pieces)), abs=1)  # two updates change less than that


def test_near_values_are_proposed():
    """The common divisors next below and above."""
    assert flags.nearest_divisors(200, 256, 256) == "128 or 256"
    assert flags.nearest_divisors(1000, 12, 18) == "6"
    assert flags.nearest_divisors(4, 12, 18) == "3 or 6"
    assert flags.nearest_divisors(3, 10**9, 10**9) == "2 or 4"  # without a billion trials


def test_a_mistake_is_told_once_a_machine(capsys, monkeypatch):
    """Of several processes on a machine, only the first prints the line; each has status 2."""
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit) as stop:
        main.main(["--seq_len", "4"])
    assert stop.value.code == 2 and capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    "words, elements",
    [
        ("--d_model 768 --n_head 12", 30522 * 768),  # the embedding's gradient
        ("--batch_size 4", 2 * 85 * 30522),  # logits of the rows of one of two processes
        ("--seq_len 2048 --n_head 8 --num_predict 9", 8 * 1024 * (2048 + 1536)),  # scores: two rows share the processes
    ],
)
def test_largest_tensor(words, elements):
    """In bytes of float32, by hand."""
    batch = [] if "batch_size" in words else ["--batch_size", "2"]
    args, _, _ = main.read_flags([*words.split(), *batch])
    assert flags.largest_tensor(args, n_token=30522, world_size=2) == 4 * elements
