"""What users do, from start to end, with the commands that they type in a clone of the project. Offline and small."""

import csv
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import sentencepiece
import torch
import transformers
from test_hub import Hub

import main

ROOT = Path(main.__file__).parent
PROJECT = ("main.py", "xlnet.py", "data_utils.py", "data.txt", "support", "examples", "vocab")
SMALL = "--seq_len 32 --n_layer 1 --d_model 16 --device cpu"
LINE = re.compile(r"^Number of Epoch: .* = (\S+)$", re.M)
VALIDATION = re.compile(r"^Validation loss = (\S+) ", re.M)
FILLING = re.compile(r"^ +\d+ +\d+ +(\S+) +\S+  (.+)$", re.M)
ROUNDING = 1e-5  # of losses near 10 in float32, and of gradients near 1, which processes add up in another order
pytestmark = pytest.mark.slow


# ---------------------------------------------------------------- typing commands


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """The files of the project in a folder, where commands are typed."""
    return copy_project(tmp_path / "clone")


def copy_project(folder: Path) -> Path:
    folder.mkdir()
    for name in PROJECT:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder)
    return folder


def start(command: str, folder: Path, environment: dict[str, str] | None = None) -> subprocess.Popen:
    """Start a command as typed in a folder; python and torchrun are those that run the tests."""
    environment = dict(environment or os.environ)
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    pipe = subprocess.PIPE
    return subprocess.Popen(shlex.split(command), cwd=folder, env=environment, stdout=pipe, stderr=pipe, text=True)


def run(command: str, folder: Path, environment: dict[str, str] | None = None) -> str:
    """Run a command to its end, which must be good and without a word on stderr; return what it prints."""
    with start(command, folder, environment) as process:
        out, err = process.communicate(timeout=120)
    warnings = [line for line in err.splitlines() if ".py: " in line]
    assert process.returncode == 0 and not warnings, f"{command}\n{err}"
    return out


def wait_for_steps(process: subprocess.Popen, n_steps: int) -> None:
    """Wait until a run has told so many more steps; it must not end before."""
    while n_steps > 0:
        line = process.stdout.readline()
        assert line, process.stderr.read()
        if LINE.match(line):
            n_steps -= 1


def metrics(output_dir: Path) -> list[dict[str, str]]:
    """Return the rows of metrics.csv without the columns of time."""
    with open(output_dir / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        for name in ("tokens_per_second", "data_wait", "peak_memory"):
            del row[name]
    return rows


def curve(output_dir: Path) -> list[float]:
    """Return the loss and the norm of the gradient of each step."""
    return [float(row[name]) for row in metrics(output_dir) for name in ("loss", "gradient_norm")]


def fillings(out: str) -> list[tuple[float, str]]:
    """Return the probabilities and words that fill_blank.py prints, the likeliest first."""
    found = [(float(probability), words) for probability, words in FILLING.findall(out)]
    probabilities = [probability for probability, _ in found]
    assert len(found) == 5 and probabilities == sorted(probabilities, reverse=True) and sum(probabilities) <= 1.001, out
    return found


def new_files(folder: Path) -> set[str]:
    """Return what commands have left in a clone, beside the files of the project."""
    return {path.name for path in folder.iterdir()} - set(PROJECT)


def sentences() -> list[str]:
    return [line for line in (ROOT / "data.txt").read_text().splitlines() if line]


# ---------------------------------------------------------------- a page


def test_a_page(clone: Path) -> None:
    """A page becomes a model that beats word frequencies and fills a blank; nothing is left but the folder named."""
    out = run(f"python main.py {SMALL} --seq_len 64 --num_step 4 --output_dir out", clone)
    first, *steps, mean, end = out.splitlines()
    n_windows = int(re.search(r"data\.txt: 4,015 tokens, .*; (\d+) windows an epoch", first).group(1))
    assert len(steps) == 4 * n_windows == len(metrics(clone / "out"))
    assert all(LINE.match(line) for line in steps) and LINE.match(steps[-1]).group().startswith("Number of Epoch: 0004")
    loss, of_frequency, of_blind = map(float, re.findall(r": (\d+\.\d+)", mean))
    assert loss < of_frequency < of_blind
    assert end == f"The model is in out/checkpoint-{4 * n_windows}"

    answer = run('python examples/fill_blank.py out "She worked at ___ table by the north window ."', clone)
    assert fillings(answer)[0][1] == "the"
    assert new_files(clone) == {"out"}


# ---------------------------------------------------------------- your own text


def write_own_text(path: Path) -> None:
    """Write 40 documents of sentences of data.txt, drawn at random; the last one alone has elephants."""
    rng = random.Random(0)
    documents = [rng.choices(sentences(), k=30) for _ in range(40)]
    documents[-1] = [f"Elephant, {sentence}" for sentence in documents[-1]]
    path.write_text("\n\n".join("\n".join(document) for document in documents) + "\n")


def test_own_text(clone: Path) -> None:
    """A run that SIGTERM stops goes on to the last bit; the documents held out are told, evaluated, never trained on.

    A pass has every window of the text, so its batches show what is trained on.
    """
    write_own_text(clone / "own.txt")
    words = f"{SMALL} --valid 0.025 --batch_size 16 --num_step 1 --eval_steps 30"
    out = run(f"python main.py --data own.txt {words} --output_dir unbroken", clone)
    n_trained, n_held_out = sizes(out)
    assert 0.02 < n_held_out / (n_trained + n_held_out) < 0.04
    unbroken = metrics(clone / "unbroken")
    evaluated = [f"{float(row['validation_loss']):.6f}" for row in unbroken if row["validation_loss"]]
    assert evaluated == VALIDATION.findall(out) and len(evaluated) == len(unbroken) // 30 + 1

    with start(f"python main.py --data own.txt {words} --output_dir out", clone) as process:
        wait_for_steps(process, 40)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    stopped = int(re.search(r"saved out/checkpoint-(\d+); go on with --resume out", err).group(1))
    assert 40 <= stopped < len(unbroken)
    out = run("python main.py --output_dir out --resume", clone)
    assert sizes(out) == (n_trained, n_held_out) and len(LINE.findall(out)) == len(unbroken) - stopped
    assert metrics(clone / "out") == unbroken

    prepared = main.prepare(["--data", str(clone / "own.txt"), *words.split()])
    (elephant,) = prepared.tokenizer.convert_tokens_to_ids(["elephant"])
    loader, valid_loader = prepared.loader, prepared.valid_loader
    assert loader.pass_len == len(unbroken) and (len(prepared.text.ids), len(prepared.valid_text.ids)) == sizes(out)
    assert not any((loader.batch(step)["inp_k"] == elephant).any() for step in range(loader.pass_len))
    assert all((valid_loader.batch(step)["inp_k"] == elephant).any() for step in range(valid_loader.pass_len))
    assert new_files(clone) == {"own.txt", "unbroken", "out"}


def sizes(out: str) -> tuple[int, int]:
    """Return how many tokens the first line of a run tells, to train on and held out."""
    found = re.match(r"XLNet of .*\.txt: ([\d,]+) tokens, .*; validation: ([\d,]+) tokens\n", out)
    n_trained, n_held_out = (int(number.replace(",", "")) for number in found.groups())
    return n_trained, n_held_out


# ---------------------------------------------------------------- your own language

# subjects, verbs and objects of each language, in its order of words
LANGUAGES = {
    "German": (["Die schöne Katze", "Der große Bär", "Müllers Söhne"], ["hört", "wählt", "prüft"], ["Öl", "Äpfel"]),
    "Spanish": (["El señor Núñez", "La niña", "Mi tía"], ["comió", "llevó", "pidió"], ["piñas", "jamón", "café"]),
    "Japanese": (
        ["ねこが", "カエルが", "がくせいが"],
        ["さかなを", "バナナを", "ほしを"],
        ["たべる", "みる", "かぞえる"],
    ),
}


def write_own_language(path: Path) -> None:
    """Write 300 numbered sentences with accents and kana in five documents."""
    rng = random.Random(0)
    lines = []
    for _ in range(300):
        words = [rng.choice(choices) for choices in LANGUAGES[rng.choice(list(LANGUAGES))]]
        lines.append(f"{rng.randrange(100)} {' '.join(words)} .")
    path.write_text("\n\n".join("\n".join(lines[first : first + 60]) for first in range(0, 300, 60)), encoding="utf-8")


def test_own_language(clone: Path) -> None:
    """transformers gives a text with accents and kana the ids of training, and each blank gets words of its language.

    The vocabulary is that of the text, used by the command that make_vocabulary.py proposes.
    """
    write_own_language(clone / "own.txt")
    out = run("python examples/make_vocabulary.py own.txt --output_dir vocabulary --size 100", clone)
    use = re.search(r"use it: (python main\.py .*)$", out, re.M).group(1)
    assert use == "python main.py --data own.txt --tokenizer vocabulary"
    words = "--seq_len 32 --n_layer 2 --batch_size 8 --learning_rate 0.008 --train_steps 400 --log_steps 100"
    out = run(f"{use} {words} --device cpu --output_dir out", clone)
    assert ", 0.0% unknown," in out.splitlines()[0] and len(LINE.findall(out)) == 4

    flags = f"--data {clone}/own.txt --tokenizer {clone}/vocabulary --seq_len 32"
    of_training = main.prepare(shlex.split(flags)).text.ids.tolist()
    tokenizer = transformers.AutoTokenizer.from_pretrained(clone / "out" / "checkpoint-400")
    ids = []
    for line in (clone / "own.txt").read_text(encoding="utf-8").split("\n"):
        ids += tokenizer.encode(line or "<eod>", add_special_tokens=False)
    assert ids == of_training

    text = "7 Die schöne Katze hört ___ . 7 ねこが さかなを ___ ."
    answer = run(f"python examples/fill_blank.py out '{text}' --pieces 3 --top 1", clone)
    of_three_pieces = re.findall(r"^ +(\d) +3 +\S+ +\S+  (\w+)  \(", answer, re.M)
    assert [blank for blank, _ in of_three_pieces] == ["1", "2"]
    for language, (_, word) in zip(("German", "Japanese"), of_three_pieces, strict=True):
        assert word in LANGUAGES[language][-1], answer
    assert new_files(clone) == {"own.txt", "vocabulary", "out"}


# ---------------------------------------------------------------- a released model


@pytest.fixture
def released(tmp_path: Path) -> Path:
    """A folder in which someone/tiny-xlnet is a model with the files of the released XLNets."""
    folder = tmp_path / "models" / "someone" / "tiny-xlnet"
    folder.mkdir(parents=True)
    sentencepiece.SentencePieceTrainer.train(  # source: official README, spm_train
        sentence_iterator=iter(sentences()),
        model_prefix=str(folder / "spiece"),
        vocab_size=500,
        control_symbols=["<cls>", "<sep>", "<pad>", "<mask>", "<eod>"],
        user_defined_symbols=["<eop>", ".", "(", ")", '"', "-", "–", "£", "€"],
        minloglevel=2,
    )
    (folder / "spiece.vocab").unlink()
    torch.manual_seed(0)
    config = transformers.XLNetConfig(vocab_size=500, d_model=32, n_layer=1, n_head=4, d_inner=64, dropout=0)
    model = transformers.XLNetLMHeadModel(config)
    config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return tmp_path / "models"


def test_a_released_model(clone: Path, released: Path, tmp_path: Path) -> None:
    """A model of the hub is evaluated, trained on, better for it, fine-tuned, and asked; it is downloaded once."""
    *documents, last = (clone / "data.txt").read_text().split("\n\n")
    (clone / "domain.txt").write_text("\n\n".join(documents))
    (clone / "held_out.txt").write_text(last)
    examples = [f"{line}\t{place}" for place in (0, 1) for line in documents[place].strip().split("\n")]
    (clone / "sentences.tsv").write_text("\n".join(examples) + "\n")

    with Hub(released) as hub:
        environment = hub.environment(tmp_path / "home")
        name = "--init_checkpoint someone/tiny-xlnet --seq_len 64 --device cpu"
        out = run(f"python main.py {name} --eval_only --valid held_out.txt", clone, environment)
        (before,) = VALIDATION.findall(out)
        words = "--data domain.txt --valid held_out.txt --train_steps 80 --batch_size 2 --output_dir out"
        out = run(f"python main.py {name} {words}", clone, environment)
        assert fillings(run('python examples/fill_blank.py someone/tiny-xlnet "two ___ days"', clone, environment))
        assert hub.downloads() == {"config.json": 1, "spiece.model": 1, "pytorch_model.bin": 1}
    assert VALIDATION.findall(out)[0] == before
    assert float(VALIDATION.findall(out)[-1]) < float(before) - 0.3

    out = run("python examples/finetune.py out sentences.tsv --output_dir classifier --epochs 4", clone)
    of_epochs = [float(loss) for loss in re.findall(r"^epoch \d of 4: loss (\S+), validation accuracy", out, re.M)]
    assert of_epochs[-1] < of_epochs[0] and out.startswith("no --valid")
    classifier = transformers.pipeline("text-classification", str(clone / "classifier"), device="cpu")
    assert classifier(documents[0].split("\n")[0])[0]["label"] in ("0", "1")

    assert fillings(run('python examples/fill_blank.py out "It took her ___ days to work it out."', clone))
    assert new_files(clone) == {"domain.txt", "held_out.txt", "sentences.tsv", "out", "classifier"}


# ---------------------------------------------------------------- several processes and machines

SHARED = f"{SMALL} --batch_size 2 --train_steps 50 --save_steps 15"


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


@pytest.fixture(scope="module")
def of_one_process(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The curve of an unbroken run in one process."""
    folder = copy_project(tmp_path_factory.mktemp("one") / "clone")
    run(f"python main.py {SHARED} --output_dir out", folder)
    return curve(folder / "out")


def test_two_processes_to_one(clone: Path, of_one_process: list[float]) -> None:
    """One process goes on where two were killed, with the losses and gradients of an unbroken run."""
    port = free_port()
    with start(f"torchrun --nproc_per_node 2 --master_port {port} main.py {SHARED} --output_dir out", clone) as agent:
        wait_for_steps(agent, 1)
        everyone = [agent, *psutil.Process(agent.pid).children(recursive=True)]
        wait_for_steps(agent, 17)
        for each in everyone:
            each.kill()
        agent.communicate(timeout=60)
    assert len(everyone) == 3 and not (clone / "out" / "checkpoint-50").exists()

    out = run("python main.py --output_dir out --resume", clone)
    after = int(re.search(r"^Resuming from \S+, after step (\d+) of 50$", out, re.M).group(1))
    assert 15 <= after < 50 and len(LINE.findall(out)) == 50 - after
    assert curve(clone / "out") == pytest.approx(of_one_process, abs=ROUNDING)


def test_a_refusal_under_torchrun(clone: Path) -> None:
    """torchrun's last lines hold the line that names the flag, and the command fails."""
    with start(f"torchrun --nproc_per_node 2 --master_port {free_port()} main.py --seq_len 3", clone) as agent:
        out, err = agent.communicate(timeout=60)
    assert agent.returncode != 0 and out == ""
    assert any("--seq_len: '3' will not do" in line for line in err.splitlines()[-15:]), err
    assert new_files(clone) == set()


def test_two_machines(clone: Path, of_one_process: list[float], tmp_path: Path) -> None:
    """Two machines that share the output folder compute what one process does; each tokenizes for itself."""
    port = free_port()
    nodes = []
    for rank in (0, 1):
        place = f"--nnodes 2 --node_rank {rank} --nproc_per_node 1 --master_addr 127.0.0.1 --master_port {port}"
        cache = os.environ | {"XDG_CACHE_HOME": str(tmp_path / f"cache{rank}")}
        nodes.append(start(f"torchrun {place} main.py {SHARED} --output_dir {tmp_path}/out", clone, cache))
    for rank, node in enumerate(nodes):
        out, err = node.communicate(timeout=120)
        assert node.returncode == 0, err
        assert len(LINE.findall(out)) == (50 if rank == 0 else 0)
        assert len([path for path in (tmp_path / f"cache{rank}" / "xlnet").iterdir() if path.is_dir()]) == 1
    assert curve(tmp_path / "out") == pytest.approx(of_one_process, abs=ROUNDING)
