"""Every command of the README runs, for a few steps, in a folder as the README supposes it; what it shows is true."""

import glob
import itertools
import json
import multiprocessing
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
import transformers
from nbclient import NotebookClient

import data_utils
import main
from support import flags

sys.path.insert(0, str(Path(main.__file__).parent / "benchmarks"))
import learning
import step_time

ROOT = Path(main.__file__).parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = [block for language, block in re.findall(r"^```(\w*)\n(.*?)^```", README, re.S | re.M) if not language]
COMMANDS = [
    line.removeprefix("$ ")
    for block in BLOCKS
    for line in re.sub(r" *\\\n +", " ", block).split("\n")
    if re.match(r"(\$ )?(python|torchrun) ", line) and " -c " not in line
]
ELSEWHERE = ("main.py", "show_order.py")  # and these need a checkpoint; other tests have them
ELSEWHERE += ("probe.py", "finetune.py", "fill_blank.py")
SHORT = {  # what is appended, and so counts
    "corpus.py": "",
    "gpu.py": "--device cpu --no_tests",
    "make_vocabulary.py": "--size 500 --output_dir made",
    "learning.py": "--seeds 0 --jobs 1 --data long.txt --valid short.txt --csv t.csv --png t.png",
    "step_time.py": "--steps 1 --shapes default --batch_size 1 --dropout 0",
    "pipeline.py": "--passes 1",
    "checkpoint_cost.py": "--steps 2 --pairs 1",
    "large_text.py": "--megabytes 1 --processes 1 --steps 2",
    "figures.py": "--passes 1",
}


def script(command):
    return re.search(r"\w+\.py", command).group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A copy of the project with the files that a reader is supposed to have."""
    folder = tmp_path_factory.mktemp("readme") / "project"
    shutil.copytree(ROOT, folder, ignore=lambda where, names: {".git", "corpus", "out", "tests"} & set(names))
    text = (folder / "data.txt").read_text()
    short = "".join(text.splitlines(keepends=True)[:70])
    for name in ("books", "corpus"):
        (folder / name).mkdir()
    for name in ("my.txt", "domain.txt", "books/1.txt", "books/2.txt", "corpus/train.txt"):
        (folder / name).write_text(text * 2)
    for name in ("corpus/valid.txt", "short.txt"):
        (folder / name).write_text(short)
    (folder / "held_out.txt").write_text(text + short)  # enough for eight rows
    (folder / "long.txt").write_text(text * 10)
    shutil.copytree(folder / "vocab", folder / "vocabulary")
    shutil.copy(folder / "vocab" / "bert-base-uncased.txt", folder / "vocabulary" / "vocab.txt")
    released = folder / "xlnet" / "xlnet-base-cased"  # a folder comes before a name at the hub
    config = transformers.XLNetConfig(vocab_size=30522, d_model=32, n_layer=2, n_head=4, d_inner=32)
    transformers.XLNetLMHeadModel(config).save_pretrained(released)
    shutil.copy(folder / "vocab" / "bert-base-uncased.txt", released / "vocab.txt")
    published = json.loads((released / "config.json").read_text()) | {"mem_len": None, "reuse_len": None}
    (released / "config.json").write_text(json.dumps(published))
    return folder


def run(command, folder, extra=""):
    """Run a command, with more flags behind it, as a reader does; return what it prints."""
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    command = f"{command} {extra}"
    done = subprocess.run(command, shell=True, cwd=folder, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, f"{command}\n{done.stderr}"
    return done.stdout


def shortened(command):
    """Return a benchmark's command with few updates, the first two variants of a list, and the flags of SHORT."""
    command = re.sub(r"--updates \d+", "--updates 2", command)
    command = re.sub(r"--minutes \d+", "--minutes 0.01", command)
    command = re.sub(r"(--variants default (?:\"[^\"]+\"|\S+)).*?(?=--|$)", r"\1 ", command)
    return f"{command} {SHORT[script(command)]}"


# ---------------------------------------------------------------- commands


@pytest.mark.slow
def test_commands_that_train(folder, monkeypatch, capsys):
    """One after the other; --resume goes on with what the one before has left; all but torchrun in this process."""
    monkeypatch.chdir(folder)
    training = [command for command in COMMANDS if script(command) == "main.py"]
    assert len(training) == 10 and sum(command.startswith("torchrun ") for command in training) == 1
    for command in training:
        resumed = "--resume" in command
        if not resumed:
            shutil.rmtree(folder / "out", ignore_errors=True)
        trains = "--eval_only" not in command
        extra = "--num_step 1 --train_steps 4" if resumed else "--train_steps 2" if trains else ""
        program, *words = shlex.split(f"{command} {extra}")
        if program == "torchrun":
            out = run(command, folder, extra)
        else:
            main.main([path for word in words[1:] for path in glob.glob(word) or [word]])
            out = capsys.readouterr().out
        assert out.count("Step cost") == (2 if trains else 0), command


LEARNING = sorted(command for command in COMMANDS if script(command) == "learning.py")
STEP_TIME = [command for command in COMMANDS if "step_time.py --" in command]  # their flags have a test of their own
OTHERS = sorted({command for command in COMMANDS if script(command) in SHORT} - {*LEARNING[1:], *STEP_TIME})


@pytest.mark.slow
@pytest.mark.parametrize("command", OTHERS)
def test_other_commands(folder, command):
    """Each program as a reader starts it."""
    run(shortened(command), folder)


@pytest.mark.slow
@pytest.mark.parametrize("command", LEARNING[1:])
def test_other_comparisons(folder, monkeypatch, capsys, command):
    """The other commands of learning.py, whose program the test above starts, in this process."""

    def make_runs(options, tasks):
        learning.start_worker(multiprocessing.Value("i", 0), threads=1)
        for task in tasks:
            learning.append(options.csv, learning.train(task))

    monkeypatch.setattr(learning, "make_runs", make_runs)
    monkeypatch.chdir(folder)
    _, _, *argv = shlex.split(shortened(command))
    learning.benchmark(argv)
    assert len(re.findall(r"^\| .* \| 1 \| \d", capsys.readouterr().out, re.M)) == 2  # variants, of one seed


@pytest.mark.parametrize(
    "command, rows",
    [
        ("--batch_size 1 2 4 8 --shapes default --dropout 0", 4),
        ("--growth --dropout 0", 7),
    ],
)
def test_flags_of_the_step_benchmark(monkeypatch, capsys, command, rows):
    """Those that the README names, all but the measuring."""
    assert command in README
    times = {name: [0.1, 0.2] for name in step_time.MODELS}
    monkeypatch.setattr(step_time, "compare", lambda *args: (times, dict.fromkeys(step_time.MODELS, 1), 1e9))
    step_time.benchmark(command.split())
    assert len(re.findall(r"^\| .*, batch \d", capsys.readouterr().out, re.M)) == rows


def test_variants_exist():
    """learning.py knows every name and every flag after --variants."""
    for command in COMMANDS:
        words = iter(shlex.split(command))
        if "--variants" in words:  # which goes on behind it
            names = list(itertools.takewhile(lambda word: not word.startswith("--"), words))
            assert len(names) > 1
            for name in names:
                learning.find_variant(name)  # which raises UserError


def test_no_command_is_left_out():
    """Each program that the README starts is run here, or named as tested elsewhere."""
    for command in COMMANDS:
        assert script(command) in SHORT or script(command) in ELSEWHERE, command


# ---------------------------------------------------------------- what is shown


@pytest.mark.slow
def test_the_terminal_view_is_the_one_shown(folder):
    """Byte for byte."""
    commands = [command for command in COMMANDS if script(command) == "show_order.py"]
    assert commands
    for command in commands:
        assert f"$ {command}\n{run(command, folder)}```" in README


def test_the_flags_shown_are_those_of_help(monkeypatch):
    """Blanks and the way in which two names are put aside, which depend on Python."""
    monkeypatch.setenv("COLUMNS", "120")
    text = flags.build_parser().format_help().replace("--num_step, ", "--num_step N, ")
    assert " ".join(text[text.index("\ndata:\n") :].split()) in " ".join(README.split())


def test_the_order_worked_by_hand():
    """The README's example: the, given; sat, first; [SEP], second; cat, last."""
    rows = re.findall(r"^ +(?:the|cat|sat|SEP) +([01]) +([01]) +([01]) +([01]) ", README, re.M)
    mask = data_utils.ranks_to_mask(np.array([-1, 3, 0, 1]), np.array([False, True, True, False]))
    assert np.array_equal(np.array(rows, dtype=int), mask)


@pytest.mark.slow
def test_the_notebook_runs(folder):
    """With two passes for forty; text, window and order, which do not depend on rounding, are those stored in it."""
    notebook = nbformat.read(folder / "docs" / "walkthrough.ipynb", as_version=4)
    shown = [output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", [])]
    for cell in notebook.cells:
        cell.source = cell.source.replace('"--num_step", "40"', '"--num_step", "2"')
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder / "docs")}}).execute()
    again = [output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", [])]
    assert shown[:3] == again[:3] and len(shown) == len(again)
