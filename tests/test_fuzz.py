"""Random flags, legal and not: a run trains with finite losses, or ends with one line that names a flag.

FUZZ=2000 python -m pytest tests/test_fuzz.py tries as many command lines, and others each time.
"""

import contextlib
import csv
import io
import math
import os
import random
import re
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

import main

WORDS = "the cat sat on a mat and saw two dogs run by . ##s ##ing".split()
NUMBERS = ["", "0", "-1", "1", "2", "3", "1.5", "-0.5", "1e-9", "1e30", "1e400", "nan", "inf", "abc", "None", "'"]
NUMBERS += [str(10**10), str(10**20), str(2**63), str(2**64), "9" * 400]
SIZES = ["1", "2", "3", "4", "6", "16"]
FILES = ["text.txt", "short.txt", "empty.txt", "vocab.txt", "nowhere", "nowhere/too", "folder", "", " ", "x" * 300]
FILES += ["/dev/null", "text.txt/x"]
BOOLS = ["True", "False", "yes", "0", "maybe", "", "2"]
NOT_DRAWN = {"compile", "eval_only", "log_steps"}  # a minute; no training; fewer lines, which the test counts
VALUES = {  # of each other flag, legal ones and others
    "data": FILES,
    "cache_dir": [*FILES, "cache"],
    "tokenizer": [*FILES, "bert-base-uncased", "bert"],
    "seq_len": [*NUMBERS, "12", "24", "1000"],
    "reuse_len": [*NUMBERS, "12", "24", "1000"],
    "perm_size": [*NUMBERS, "4", "8", "12", "1000"],
    "bi_data": BOOLS,
    "mask_alpha": [*NUMBERS, *SIZES],
    "mask_beta": [*NUMBERS, *SIZES],
    "num_predict": [*NUMBERS, *SIZES],
    "mem_len": [*NUMBERS, *SIZES, "1000000"],
    "n_layer": [*NUMBERS, *SIZES],
    "n_head": [*NUMBERS, *SIZES],
    "d_head": [*NUMBERS, *SIZES],
    "d_model": [*NUMBERS, *SIZES],
    "d_inner": [*NUMBERS, *SIZES],
    "dropout": [*NUMBERS, "0.1", "0.99", "0.999"],
    "dropatt": [*NUMBERS, "0.1", "0.99", "0.999"],
    "ff_activation": ["relu", "gelu", "gelu_new", "silu", ""],
    "attn_type": ["bi", "uni", "", "Bi"],
    "clamp_len": [*NUMBERS, *SIZES],
    "same_length": BOOLS,
    "init": ["local", "normal", "", "zeros"],
    "init_std": [*NUMBERS, "0.02", "1000000"],
    "batch_size": [*NUMBERS, *SIZES],
    "rows": [*NUMBERS, *SIZES],
    "optimizer": ["adamw", "muon", "", "sgd"],
    "learning_rate": [*NUMBERS, "1e-4", "8", "1000000"],
    "weight_decay": [*NUMBERS, "0.1", "1000000"],
    "adam_epsilon": [*NUMBERS, "1e-6", "1000000"],
    "warmup_steps": [*NUMBERS, *SIZES, "1000000000"],
    "decay_method": ["constant", "poly", "cos", "", "linear"],
    "min_lr_ratio": [*NUMBERS, "0.1"],
    "clip": [*NUMBERS, "1e-30", "1000000"],
    "grad_accum_steps": [*NUMBERS, *SIZES, "1000000000"],
    "num_step": [*NUMBERS, *SIZES],
    "train_steps": [*NUMBERS, *SIZES],
    "seed": [*NUMBERS, str(2**32), str(2**63 - 1)],
    "device": ["auto", "cpu", "gpu", ""],
    "bf16": [None],
    "output_dir": [*FILES, "out"],
    "save_steps": [*NUMBERS, *SIZES],
    "save_total_limit": [*NUMBERS, *SIZES],
    "resume": FILES,
    "init_checkpoint": FILES,
    "valid": FILES,
    "eval_steps": [*NUMBERS, *SIZES],
    "tensorboard": [None],
}


def write_files(folder):
    """Write a vocabulary of 18 pieces, a text of 300 words, and files that are neither."""
    rng = random.Random(0)
    text = [rng.choice(WORDS[:-2]) + rng.choice(["", "", "\n"]) for _ in range(300)]
    (folder / "vocab.txt").write_text("\n".join(["[UNK]", "[CLS]", "[SEP]", *WORDS]))
    (folder / "text.txt").write_text(" ".join(text))
    (folder / "short.txt").write_text("the cat sat\n")
    (folder / "empty.txt").write_text("")
    (folder / "folder").mkdir()


@st.composite
def legal_runs(draw):
    """Return flags of a small run that trains."""
    perm_size = draw(st.integers(4, 8))
    reuse_blocks, rest_blocks = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    reuse_len, rest_len = reuse_blocks * perm_size, rest_blocks * perm_size
    n_head, d_head = draw(st.integers(1, 3)), 2 * draw(st.integers(1, 3))
    run = {
        "data": "text.txt",
        "tokenizer": "vocab.txt",
        "cache_dir": "cache",
        "seq_len": reuse_len + rest_len,
        "reuse_len": reuse_len,
        "perm_size": perm_size,
        "num_predict": draw(st.integers(1, min(2 * reuse_len, 2 * rest_len + 1))),
        "mem_len": draw(st.integers(0, 40)),
        "n_layer": draw(st.integers(1, 3)),
        "n_head": n_head,
        "d_head": d_head,
        "d_model": n_head * d_head,
        "d_inner": draw(st.integers(1, 16)),
        "num_step": draw(st.integers(1, 3)),
        "train_steps": draw(st.integers(1, 3)),
    }
    if draw(st.booleans()):
        run |= {"valid": "text.txt", "eval_steps": draw(st.integers(1, 4))}
    return run


@st.composite
def other_flags(draw, most):
    """Return up to `most` flags with any of their values."""
    names = draw(st.lists(st.sampled_from(sorted(VALUES)), max_size=most, unique=True))
    return {name: draw(st.sampled_from(VALUES[name])) for name in names}


def arguments(run):
    """Return a command line; the value None is that of a switch."""
    return [word for name, value in run.items() for word in [f"--{name}", value] if word is not None]


def run_or_refuse(run):
    """Run a command line and check what it may do; return whether it trained."""
    argv = [str(word) for word in arguments(run)]
    note(f"main.py {argv}")
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            metrics = main.main(argv)
        except SystemExit as stop:
            metrics, status = None, stop.code
    out, err = out.getvalue(), err.getvalue()
    note(out + err)
    if metrics is None:
        assert status == 2 and out == ""
        assert re.fullmatch(r"main\.py: error: .*--[a-z].*\n", err)
        return False
    losses = [float(loss) for loss in re.findall(r"cost = (\S+)", out)]
    assert losses and all(math.isfinite(loss) for loss in losses)
    assert "Error" not in err and "Warning" not in err
    return True


def test_every_flag_is_drawn():
    assert {*VALUES, *NOT_DRAWN} == set(vars(main.flags.parse([])))


@pytest.mark.slow
@settings(
    max_examples=int(os.environ.get("FUZZ", 100)),
    derandomize="FUZZ" not in os.environ,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
@given(
    legal_runs(),
    other_flags(most=3),
    st.sampled_from(["nothing", "resume", "init_checkpoint"]),
    legal_runs(),
    other_flags(most=2),
)
def test_a_run_trains_or_names_a_flag(first, others, then, second, other_of_second):
    """Also a run that goes on from the checkpoint of another, or starts from its weights; metrics.csv has each step."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        write_files(Path(folder))
        if then != "nothing":
            first = first | {"output_dir": "out"}
        trained = run_or_refuse(first | others)
        checkpoints = sorted(Path(folder).glob("out/checkpoint-*"))
        if then == "nothing" or not trained or not checkpoints:
            return
        if then == "resume":
            run = {"resume": None, "output_dir": "out", "num_step": 3, "train_steps": 4}
        else:
            of_checkpoint = ("n_layer", "n_head", "d_head", "d_model", "d_inner", "tokenizer")
            run = {name: value for name, value in second.items() if name not in of_checkpoint}
            run |= {"init_checkpoint": str(checkpoints[0]), "output_dir": "out2"}
        run_or_refuse(run | other_of_second)
        for path in Path(folder).glob("out*/metrics.csv"):
            steps = [int(row["step"]) for row in csv.DictReader(path.open())]
            assert steps == list(range(1, len(steps) + 1))
