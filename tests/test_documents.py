"""The documents: their commands run, in order, for a few steps, in a copy of the project; what they show is true."""

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
sys.path.insert(0, str(Path(main.__file__).parent / "docs"))
import figures
import learning
import record
import step_time

ROOT = Path(main.__file__).parent
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
}
README = PAGES["README.md"]
EVERYTHING = "\n".join(PAGES.values())


def commands_of(page):
    """Return the commands that a page tells its reader to paste, one a line."""
    blocks = [block for language, block in re.findall(r"^```(\w*)\n(.*?)^```", page, re.S | re.M) if not language]
    lines = [line for block in blocks for line in re.sub(r" *\\\n +", " ", block).split("\n")]
    return [line.split("  #")[0].strip() for line in lines if re.match(r"(python|torchrun|pip) ", line)]


COMMANDS = {name: commands_of(page) for name, page in PAGES.items()}
ALL_COMMANDS = [command for commands in COMMANDS.values() for command in commands]
SHORT = {  # appended to a command; of two values of a flag the last one counts
    "corpus.py": "",
    "gpu.py": "--device cpu --no_tests",
    "make_vocabulary.py": "",
    "learning.py": "--seeds 0 --jobs 1 --data long.txt --valid short.txt --csv t.csv --png t.png",
    "record.py": "--seeds 0 --data long.txt --valid short.txt --test short.txt --csv r.csv",
    "grammar.py": "",
    "probe.py": "",
    "step_time.py": "--steps 1 --shapes default --batch_size 1 --dropout 0",
    "pipeline.py": "--passes 1",
    "checkpoint_cost.py": "--steps 2 --pairs 1",
    "large_text.py": "--megabytes 1 --processes 1 --steps 2",
    "figures.py": "",
    "fill_blank.py": "",
    "finetune.py": "--epochs 1",
    "show_order.py": "",
    "variant.py": "--train_steps 2",
}
ONCE = {"learning.py", "step_time.py"}  # started once as a program; their other flags have tests below


def script(command):
    found = re.search(r"\w+\.py", command)
    return found.group() if found else ""


# ---------------------------------------------------------------- commands


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A small model in the form of the released XLNet, with a SentencePiece vocabulary."""
    released = tmp_path_factory.mktemp("released") / "xlnet-base-cased"
    run(f"python examples/make_vocabulary.py data.txt --output_dir {released} --size 600", ROOT)
    config = transformers.XLNetConfig(vocab_size=600, d_model=32, n_layer=2, n_head=4, d_inner=32)
    transformers.XLNetLMHeadModel(config).save_pretrained(released)
    published = json.loads((released / "config.json").read_text(encoding="utf-8"))
    published |= {"mem_len": None, "reuse_len": None}
    (released / "config.json").write_text(json.dumps(published), encoding="utf-8")
    return released


@pytest.fixture
def clone(tmp_path, monkeypatch, released):
    """A copy of the project, in which the released XLNet is in a folder of its name, which comes before the hub."""
    clone = tmp_path / "clone"
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").split()
    left_out = {".git", "tests", *(name.strip("/") for name in ignored)}
    shutil.copytree(ROOT, clone, ignore=lambda where, names: left_out & set(names))
    text = (clone / "data.txt").read_text(encoding="utf-8")
    (clone / "long.txt").write_text(text * 10, encoding="utf-8")
    (clone / "short.txt").write_text("".join(text.splitlines(keepends=True)[:70]), encoding="utf-8")
    shutil.copytree(released, clone / "xlnet" / "xlnet-base-cased")
    monkeypatch.chdir(clone)
    return clone


def run(command, folder):
    """Run a command as a reader does; return what it prints."""
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(command, shell=True, cwd=folder, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, f"{command}\n{done.stderr}"
    return done.stdout


def shortened(command):
    """Return a benchmark's command with few updates, the first two variants of a list, and the flags of SHORT."""
    command = re.sub(r"--updates \d+", "--updates 2", command)
    command = re.sub(r"--minutes \d+( \d+)*", "--minutes 0.01", command)
    command = re.sub(r"(--variants (?:\"[^\"]+\"|\S+) (?:\"[^\"]+\"|\S+)).*?(?= --|$)", r"\1", command)
    return f"{command} {SHORT[script(command)]}"


def make_stand_ins(command, clone):
    """Copy the record's model of a hundredth of a minute to the name that it has after ten minutes."""
    for path in re.findall(r"\bout/record/[\w.-]+", command):
        if not (clone / path).exists():
            shutil.copytree(clone / "out" / "record" / "muon-128-0.01-0", clone / path)


def train(command, capsys):
    """Run a command of main.py for two updates, or two more, and count the lines that it prints."""
    trains, resumes = "--eval_only" not in command, "--resume" in command
    extra = ["--train_steps", "4" if resumes else "2"] if trains else []
    if command.startswith("torchrun "):
        out = run(f"{command} {' '.join(extra)}", ".")
    else:
        capsys.readouterr()
        words = [path for word in shlex.split(command)[2:] for path in glob.glob(word) or [word]]
        main.main([*words, *extra])
        out = capsys.readouterr().out
    assert out.count("Step cost") == (2 if trains else 0), command


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, commands in COMMANDS.items() if commands])
def test_commands_of_a_page(clone, capsys, name):
    """One after the other, as a reader pastes them from a fresh clone; training in this process."""
    for command in COMMANDS[name]:
        if command.startswith(("pip ", "python -m ")):
            continue
        make_stand_ins(command, clone)
        if script(command) == "main.py":
            train(command, capsys)
        elif script(command) not in ONCE:
            run(shortened(command), clone)


@pytest.mark.slow
@pytest.mark.parametrize("program", sorted(ONCE))
def test_programs_that_are_started_once(clone, program):
    """The first command of a benchmark that the documents start with many flags."""
    run(shortened(next(command for command in ALL_COMMANDS if script(command) == program)), clone)


@pytest.mark.slow
@pytest.mark.parametrize("command", sorted({command for command in ALL_COMMANDS if script(command) == "learning.py"}))
def test_comparisons(clone, monkeypatch, capsys, command):
    """The commands of learning.py, whose program the test above starts, in this process: the first two variants."""

    def make_runs(options, tasks):
        learning.start_worker(multiprocessing.Value("i", 0), threads=1)
        for task in tasks:
            learning.append(options.csv, learning.train(task))

    monkeypatch.setattr(learning, "make_runs", make_runs)
    learning.benchmark(shlex.split(shortened(command))[2:])
    assert len(re.findall(r"^\| .* \| 1 \| \d", capsys.readouterr().out, re.M)) == 2  # variants, of one seed


@pytest.mark.parametrize(
    "command, rows",
    [
        ("--batch_size 1 2 4 8 --shapes default --dropout 0 --steps 10", 4),
        ("--growth --dropout 0 --steps 4", 7),
    ],
)
def test_flags_of_the_step_benchmark(monkeypatch, capsys, command, rows):
    """Those that the documents name, all but the measuring."""
    assert f"step_time.py {command}\n" in EVERYTHING
    times = {name: [0.1, 0.2] for name in step_time.MODELS}
    monkeypatch.setattr(step_time, "compare", lambda *args: (times, dict.fromkeys(step_time.MODELS, 1), 1e9))
    step_time.benchmark(command.split())
    assert len(re.findall(r"^\| .*, batch \d", capsys.readouterr().out, re.M)) == rows


def test_variants_exist():
    """learning.py knows every name and every flag after --variants."""
    n_variants = 0
    for command in ALL_COMMANDS:
        words = shlex.split(command)
        if "--variants" in words:
            names = words[words.index("--variants") + 1 :]
            names = list(itertools.takewhile(lambda word: not word.startswith("--"), names))
            assert len(names) > 1
            for name in names:
                learning.find_variant(name)  # raises UserError
                n_variants += 1
    assert n_variants > 10


def test_no_command_is_left_out():
    """Every program that a page starts is run here; fourteen commands train, one of them with torchrun."""
    training = [command for command in ALL_COMMANDS if script(command) == "main.py"]
    assert len(training) == 14 and sum(command.startswith("torchrun ") for command in training) == 1
    for command in ALL_COMMANDS:
        if not command.startswith(("pip ", "python -m ")):
            assert script(command) == "main.py" or script(command) in SHORT, command


def test_requirements_named_exist():
    """`pip install -r` names a file; other packages are those of requirements-dev.txt."""
    lines = (ROOT / "requirements-dev.txt").read_text(encoding="utf-8").splitlines()
    known = {re.split(r"[<>=]", line)[0] for line in lines}
    for command in ALL_COMMANDS:
        if command.startswith("pip "):
            for word in shlex.split(command)[2:]:
                assert word == "-r" or (ROOT / word).is_file() or re.split(r"[<>=]", word)[0] in known, command


def test_models_named_are_those_that_the_record_saves():
    """A folder below out/record belongs to an entry, its minutes and a seed."""
    folders = set(re.findall(r"\bout/record/([\w.-]+)", EVERYTHING))
    assert folders
    for folder in folders:
        entry, minutes, seed = folder.rsplit("-", 2)
        flags_of_entry = record.ENTRIES[entry].flags
        assert record.Attempt(entry, flags_of_entry, float(minutes), int(seed)).folder(Path()).name == folder


# ---------------------------------------------------------------- what is shown


def test_the_readme_is_of_one_sitting():
    """It is no longer than 230 lines; more stands in docs/."""
    assert len(README.splitlines()) <= 230


def slug(heading):
    """Return the anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    """Files and pictures exist, and so do the headings that a link names."""
    for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[name]):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / name).parent / path if path else ROOT / name
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)", file.read_text(encoding="utf-8"), re.M)
            assert anchor in map(slug, headings), target


def test_every_picture_is_shown():
    """docs/ holds no picture that no page shows."""
    for path in (ROOT / "docs").glob("*.png"):
        assert re.search(rf"\]\([\w/]*{path.name}\)", EVERYTHING), path


def test_flags_named_exist():
    """Every --flag in a sentence or a table is one of main.py, or of a program that the page names."""
    known = set(re.findall(r"--\w+", flags.build_parser().format_help()))
    for name, page in PAGES.items():
        of_programs = set()
        for program in re.findall(r"\b(\w+\.py)\b", page):
            for path in (*ROOT.glob(f"benchmarks/{program}"), *ROOT.glob(f"examples/{program}")):
                of_programs |= set(re.findall(r"\"(--\w+)\"", path.read_text(encoding="utf-8")))
        of_others = {"--nnodes", "--nproc_per_node", "--rdzv_backend", "--rdzv_endpoint", "--check"}  # torchrun, ruff
        for flag in re.findall(r"(?<![\w-])--\w+", page):
            assert flag in known | of_programs | of_others, f"{name}: {flag}"


def test_presets_are_flags():
    """The flags of every preset go together."""
    presets = dict(re.findall(r"^\| ([\w ,']+) \| `(--[^`]+)` \|", PAGES["docs/your-text.md"], re.M))
    assert len(presets) == 3
    for preset in presets.values():
        main.read_flags(preset.split())
    for preset, entry in ("ten minutes", "muon-128"), ("an hour", "muon-192"):
        assert presets[preset].startswith(f"{record.ENTRIES[entry].flags} --train_steps ")


def test_commands_for_a_large_text_are_the_preset():
    """Both commands of the two gigabytes: base, its text and its length."""
    commands = re.findall(r"^ +(python main.py --data my.txt .*?[^\\])$", PAGES["docs/your-text.md"], re.S | re.M)
    assert len(commands) == 2
    [preset] = re.findall(r"^\| base, .* \| `(--[^`]+)` \|", PAGES["docs/your-text.md"], re.M)
    base, defaults = vars(flags.parse(preset.split())), vars(flags.parse([]))
    own = {"data", "tokenizer", "valid", "log_steps", "output_dir"}
    for command, length in zip(commands, ({"train_steps", "warmup_steps"}, set()), strict=True):
        given = vars(flags.parse(shlex.split(command.replace("\\\n", ""))[2:]))
        assert given["train_steps"] and {name for name in base if given[name] != base[name]} <= own | length
        assert given | {name: defaults[name] for name in own} | {name: base[name] for name in length} == base


def test_one_entry_has_the_same_flags_everywhere():
    """muon-128, in the record, the README, the comparison with neighbours and the picture of it."""
    entry = flags.parse(record.ENTRIES["muon-128"].flags.split())
    ours = figures.HERO[0][0]
    assert f'"{ours}"' in PAGES["docs/experiments.md"]
    assert flags.parse(learning.find_variant(ours).flags.split()) == entry
    [command] = [command for command in COMMANDS["README.md"] if "muon" in command]
    of_readme = vars(flags.parse(shlex.split(command)[2:]))
    same = set(vars(entry)) - {"data", "valid", "output_dir", "train_steps"}
    assert {name: of_readme[name] for name in same} == {name: vars(entry)[name] for name in same}


@pytest.mark.slow
def test_the_terminal_view_is_the_one_shown():
    """Byte for byte; the README shows the first rows."""
    shown = re.findall(r"```\n(python \S*show_order.py .*)\n```\n\n```text\n(.*?)```", EVERYTHING, re.S)
    assert shown
    for command, output in shown:
        assert run(command, ROOT) == output
    [part] = re.findall(r"```text\n( +place .*?)\.\.\.\n```", README, re.S)
    assert part in shown[0][1]


def test_the_flags_shown_are_those_of_help(monkeypatch):
    """Word by word; blanks and the form of "--num_step, --num_epoch" depend on Python."""
    monkeypatch.setenv("COLUMNS", "120")
    text = flags.build_parser().format_help().replace("--num_step, ", "--num_step N, ")
    assert " ".join(text[text.index("\ndata:\n") :].split()) in " ".join(PAGES["docs/flags.md"].split())


def test_the_order_worked_by_hand():
    """The example of ranks_to_mask: the, given; sat, first; [SEP], second; cat, last."""
    shown = data_utils.ranks_to_mask.__doc__
    rows = re.findall(r"^ +(?:the|cat|sat|SEP) +([01]) +([01]) +([01]) +([01]) ", shown, re.M)
    mask = data_utils.ranks_to_mask(np.array([-1, 3, 0, 1]), np.array([False, True, True, False]))
    assert np.array_equal(np.array(rows, dtype=int), mask)


def test_names_in_code_exist():
    """Functions, arguments and weights that how-it-works.md names are in the files of the model and the data."""
    files = [ROOT / name for name in ("xlnet.py", "data_utils.py", "main.py")]
    words = set(re.findall(r"\w+", "".join(path.read_text(encoding="utf-8") for path in files)))
    names = re.findall(r"`(?:\w+\.)?([a-z]\w*_\w+|prefer_distance|permute|rotate)`", PAGES["docs/how-it-works.md"])
    assert len(names) > 15
    for name in names:
        assert name in words, name


@pytest.mark.slow
def test_the_notebook_runs(clone):
    """With two epochs instead of forty; text, window and order, which no rounding changes, are those stored in it."""
    notebook = nbformat.read(clone / "docs" / "walkthrough.ipynb", as_version=4)
    shown = [output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any('"--num_step", "40"' in cell.source for cell in notebook.cells)
    for cell in notebook.cells:
        cell.source = cell.source.replace('"--num_step", "40"', '"--num_step", "2"')
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(clone / "docs")}}).execute()
    again = [output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", [])]
    assert shown[:3] == again[:3] and len(shown) == len(again)
