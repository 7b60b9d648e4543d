"""Runs that are stopped, killed, damaged and gone on with, and what transformers makes of their checkpoints."""

import contextlib
import csv
import hashlib
import itertools
import json
import multiprocessing
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import data_utils
import main
from xlnet import XLNet

ROOT = Path(main.__file__).parent
# 18 windows a pass over the text below
SMALL = ("--seq_len 32 --reuse_len 16 --perm_size 8 --mem_len 24 --num_predict 6 --n_layer 2 --n_head 2 --d_head 4 "
         "--d_model 8 --d_inner 8 --dropout 0.1 --dropatt 0.1").split()


@pytest.fixture(scope="module", autouse=True)
def short_text(tmp_path_factory):
    """A text of 18 windows, the default of these tests."""
    folder = tmp_path_factory.mktemp("text")
    lines = (ROOT / "data.txt").read_text().splitlines()
    (folder / "text.txt").write_text("\n".join(lines[:17]) + "\nThat was the end of it.\n")
    (folder / "valid.txt").write_text("\n".join(lines[100:112]) + "\n")
    return folder


@pytest.fixture
def run(short_text, tmp_path, capsys):
    """Run main.main with small flags in tmp_path/<name>; return its metrics and the cost lines it printed."""

    def run(name, *flags, new=True):
        first = [*SMALL, "--data", str(short_text / "text.txt")] if new else ["--resume"]
        capsys.readouterr()
        metrics = main.main([*first, "--output_dir", str(tmp_path / name), *map(str, flags)])
        out = capsys.readouterr().out
        return metrics, re.findall(r"^(?:Number of Epoch|Validation).*", out, re.M)

    return run


def weights(checkpoint):
    return XLNet.from_pretrained(checkpoint).state_dict()


def equal(one, other):
    return all(torch.equal(one[name], other[name]) for name in one | other)


def rows(folder, without=("tokens_per_second",)):
    with open(Path(folder) / "metrics.csv", newline="") as file:
        return [{key: value for key, value in row.items() if key not in without} for row in csv.DictReader(file)]


# ---------------------------------------------------------------- going on


@pytest.mark.parametrize("k, steps, flags", [
    (7, 36, ""),
    (18, 36, ""),
    (25, 36, "--bi_data True --batch_size 2"),
    (18, 36, "--bi_data True"),
    (7, 36, "--grad_accum_steps 4"),
    (18, 36, "--grad_accum_steps 4 --bi_data True"),
    (2, 30, "--rows 3"),  # the third row has no memory yet
    (25, 32, "--rows 4 --bi_data True"),
    (9, 36, "--mem_len 0 --warmup_steps 5 --decay_method cos --eval_steps 4 --valid {valid}"),
])
def test_k_steps_and_the_rest_are_all_steps(run, tmp_path, short_text, monkeypatch, k, steps, flags):
    """Stopped after k steps, inside a pass, at its end, in an accumulation, a run goes on to the last bit."""
    flags = flags.format(valid=short_text / "valid.txt").split()
    metrics, unbroken = run("unbroken", *flags, "--num_step", 2)

    write = main.Log.write
    monkeypatch.setattr(main.Log, "write", lambda log, metrics: (
        write(log, metrics), metrics["step"] == k and os.kill(os.getpid(), signal.SIGTERM)))
    with pytest.raises(SystemExit) as stop:
        run("broken", *flags, "--num_step", 2)
    assert stop.value.code == 143
    monkeypatch.undo()
    metrics_of_the_rest, rest = run("broken", new=False)
    assert metrics_of_the_rest["mean_cost"] == metrics["mean_cost"]

    assert len(rows(tmp_path / "unbroken")) == steps  # two passes
    assert rest == unbroken[-len(rest):] and sum("Number" in line for line in rest) == steps - k
    assert rows(tmp_path / "broken") == rows(tmp_path / "unbroken")
    last = main.checkpoints(tmp_path / "unbroken")[0].name
    assert equal(weights(tmp_path / "unbroken" / last), weights(tmp_path / "broken" / last))


def test_a_longer_run_is_a_short_one_and_its_rest(run, tmp_path):
    """--num_step and --train_steps may grow when a run goes on; an end inside an accumulation loses nothing."""
    _, unbroken = run("unbroken", "--num_step", 3, "--grad_accum_steps", 4)
    _, first = run("broken", "--num_step", 1, "--grad_accum_steps", 4)
    _, second = run("broken", "--num_step", 2, new=False)
    _, third = run("broken", "--num_step", 3, new=False)
    assert first + second + third == unbroken
    _, updates = run("updates", "--train_steps", 3, "--grad_accum_steps", 4)
    _, more = run("updates", "--train_steps", 5, new=False)
    assert updates + more == unbroken[:20]


def child(argv):
    sys.modules["matplotlib.figure"] = None  # a picture at every step would take most of the time
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        torch.set_num_threads(1)
        main.main(argv)


def test_killed_at_random_moments(tmp_path, short_text):
    """SIGKILL at any moment, a save at every step: each time the run goes on, and the log is that of one run.

    KILLS=50 in the environment kills more often.
    """
    kills = int(os.environ.get("KILLS", 8))
    passes = 2 + kills // 4
    folder, unbroken = str(tmp_path / "killed"), str(tmp_path / "unbroken")
    argv = [*SMALL, "--data", str(short_text / "text.txt"), "--save_steps", "1", "--num_step", str(passes)]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["main", "torch._dynamo"])  # which the first update imports

    def start(*argv):
        process = context.Process(target=child, args=(argv,))
        process.start()
        return process

    start(*argv, "--output_dir", unbroken).join()
    chance = random.Random(0)
    for _ in range(kills):
        have = main.checkpoints(folder)[:1]
        process = start("--output_dir", folder, "--resume") if have else start(*argv, "--output_dir", folder)
        while main.checkpoints(folder)[:1] == have and process.is_alive():
            time.sleep(0.001)  # at least one step forward each time
        time.sleep(chance.random() * 0.2)
        process.kill()
        process.join()
        assert main.damage(main.checkpoints(folder)[0]) is None
    start("--output_dir", folder, "--resume").join()
    assert len(rows(folder)) == 18 * passes and rows(folder) == rows(unbroken)
    assert equal(weights(main.checkpoints(folder)[0]), weights(main.checkpoints(unbroken)[0]))


@pytest.mark.parametrize("file", ["model.safetensors", "trainer_state.pt", "vocab.txt", "SHA256SUMS"])
@pytest.mark.parametrize("harm", ["truncated", "bit flipped", "missing"])
def test_a_damaged_checkpoint_is_named_and_passed_over(run, tmp_path, capsys, file, harm):
    """The one before it is used; when the step of the damaged one comes again, it is replaced."""
    _, unbroken = run("unbroken", "--num_step", 1)
    run("harmed", "--train_steps", 12, "--save_steps", 4)
    path = tmp_path / "harmed" / "checkpoint-12" / file
    content = bytearray(path.read_bytes())
    if harm == "missing":
        path.unlink()
    else:
        content[len(content) // 2] ^= 4
        path.write_bytes(content[:-100] if harm == "truncated" else content)
    _, rest = run("harmed", "--num_step", 1, "--save_steps", 12, new=False)
    assert rest == unbroken[8:]
    assert main.damage(tmp_path / "harmed" / "checkpoint-12") is None


def test_damage_is_told(run, tmp_path, capsys):
    run("harmed", "--train_steps", 2)
    (tmp_path / "harmed" / "checkpoint-2" / "config.json").write_text("{}")
    with pytest.raises(SystemExit) as stop:
        main.main(["--output_dir", str(tmp_path / "harmed"), "--resume"])
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 2
    assert "checkpoint-2 is damaged: config.json" in lines[0] and "no whole checkpoint" in lines[1]


def test_a_pickle_with_code_is_refused(run, tmp_path, capsys):
    """trainer_state.pt is loaded as tensors and plain values, or not at all."""
    run("harmed", "--train_steps", 2)
    checkpoint = tmp_path / "harmed" / "checkpoint-2"

    class Code:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/was_here",)

    state = torch.load(checkpoint / "trainer_state.pt", weights_only=True)
    torch.save(state | {"costs": Code()}, checkpoint / "trainer_state.pt", pickle_module=pickle)
    digest = hashlib.sha256((checkpoint / "trainer_state.pt").read_bytes()).hexdigest()
    sums = (checkpoint / "SHA256SUMS").read_text()
    (checkpoint / "SHA256SUMS").write_text(re.sub(r"\w+(?=  trainer_state.pt)", digest, sums))
    with pytest.raises(SystemExit) as stop:
        main.main(["--resume", str(checkpoint)])
    assert stop.value.code == 2 and "may run code" in capsys.readouterr().err
    assert not (tmp_path / "was_here").exists()


def test_a_named_checkpoint_and_the_limit(run, tmp_path):
    """--resume NAME goes on from that one, in its folder; the newest save_total_limit are kept, 0 keeps all."""
    _, lines = run("run", "--train_steps", 10, "--save_steps", 2, "--save_total_limit", 0)
    names = [path.name for path in main.checkpoints(tmp_path / "run")]
    assert names == [f"checkpoint-{step}" for step in (10, 8, 6, 4, 2)]
    main.main(["--resume", str(tmp_path / "run" / "checkpoint-4"), "--save_total_limit", "2"])
    assert [path.name for path in main.checkpoints(tmp_path / "run")] == ["checkpoint-10", "checkpoint-8"]
    assert len(rows(tmp_path / "run")) == 10


# ---------------------------------------------------------------- stopping


@pytest.mark.parametrize("signum, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("save", [True, False])
def test_a_signal_finishes_the_step_and_saves(tmp_path, short_text, signum, status, save):
    argv = [*SMALL, "--data", str(short_text / "text.txt"), "--num_step", "1000"]
    process = subprocess.Popen(
        [sys.executable, ROOT / "main.py", *argv, *(["--output_dir", str(tmp_path / "out")] if save else [])],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for _ in range(4):
        process.stdout.readline()
    process.send_signal(signum)
    out, err = process.communicate(timeout=60)
    assert process.returncode == status
    step = 3 + out.count("Number of Epoch")
    saved = f"saved {tmp_path}/out/checkpoint-{step}, --resume goes on" if save else "nothing is saved"
    assert err.startswith(f"main.py: stopped after step {step}; {saved}") and err.count("\n") == 1
    if save:
        assert main.damage(tmp_path / "out" / f"checkpoint-{step}") is None


def test_a_second_signal_kills(short_text, tmp_path):
    """Where the step never ends: the first Ctrl-C waits for it, the second does not."""
    code = ("import main, time, sys; main.Run.forward = lambda *args: print('in step', flush=True) or time.sleep(60); "
            "main.main(sys.argv[1:])")
    process = subprocess.Popen([sys.executable, "-c", code, *SMALL, "--data", str(short_text / "text.txt")], cwd=ROOT,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert any("in step" in line for line in process.stdout)
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode == -signal.SIGINT


def test_a_full_disk_costs_nothing_but_the_rest(tmp_path, short_text):
    """No file may grow beyond 2 MB after the first checkpoint: one line, status 1, and the older one is whole."""
    argv = [*SMALL, "--data", str(short_text / "text.txt"), "--output_dir", str(tmp_path / "out")]
    main.main([*argv, "--train_steps", "3"])
    code = ("import main, resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20)); "
            "main.main(sys.argv[1:])")
    done = subprocess.run([sys.executable, "-c", code, "--output_dir", str(tmp_path / "out"), "--resume",
                           "--train_steps", "6"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "checkpoint-6 cannot be saved" in done.stderr
    assert [path.name for path in (tmp_path / "out").glob("*checkpoint*")] == ["checkpoint-3"]
    assert main.damage(tmp_path / "out" / "checkpoint-3") is None


def test_a_cost_that_is_not_finite_stops_before_the_update(run, tmp_path, monkeypatch, capsys):
    """One line with the step and the window, status 1, the last good checkpoint kept."""
    forward, calls = main.Run.forward, []

    def spoil(self, batch, mems):
        calls.append(1)
        loss, targets, mems = forward(self, batch, mems)
        return (loss * float("nan") if len(calls) == 22 else loss), targets, mems

    monkeypatch.setattr(main.Run, "forward", spoil)
    with pytest.raises(SystemExit) as stop:
        run("run", "--num_step", 3, "--save_steps", 5)
    [line] = capsys.readouterr().err.splitlines()
    assert stop.value.code == 1 and "cost of step 22, window 4 of pass 2, is nan" in line
    assert main.checkpoints(tmp_path / "run")[0].name == "checkpoint-20"
    assert all(torch.isfinite(tensor).all() for tensor in weights(tmp_path / "run" / "checkpoint-20").values())


def test_a_gradient_that_is_not_finite_changes_nothing(capsys, short_text):
    """The cost is fine and its gradient overflows: the update leaves the weights and AdamW's state as they were."""
    args = main.settle(vars(main.build_parser().parse_args([*SMALL, "--data", str(short_text / "text.txt")])))
    one = main.Run(args)
    one.train_step()
    before = [tensor.clone() for tensor in one.model.parameters()]
    moments = [tensor.clone() for state in one.optimizer.state.values() for tensor in state.values()]
    forward = one.forward

    def spoil(batch, mems):
        loss, targets, mems = forward(batch, mems)
        return loss + 0 * (one.model.mask_emb * 0).sqrt().sum(), targets, mems  # 0, whose derivative is 0 * infinity

    one.forward = spoil
    metrics = one.train_step()
    assert metrics["cost"].isfinite() and not metrics["gradient_norm"].isfinite()
    assert all(map(torch.equal, before, one.model.parameters()))
    after = [tensor for state in one.optimizer.state.values() for tensor in state.values()]
    assert all(map(torch.equal, moments, after))
    with pytest.raises(SystemExit) as stop:
        main.Log(one).add(metrics)
    [line] = capsys.readouterr().err.splitlines()
    assert stop.value.code == 1 and "norm of the gradient of step 2, window 2 of pass 1, is nan" in line


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize("flags, words", [
    ("--resume", ["--resume", "--output_dir"]),
    ("--output_dir {tmp}/none --resume", ["no whole checkpoint"]),
    ("--output_dir {tmp}/run", ["--output_dir", "holds a run already", "--resume"]),
    ("--output_dir {tmp}/run --resume --d_model 64", ["--d_model 64", "where it is 8"]),
    ("--output_dir {tmp}/run --resume --seed 3", ["--seed 3", "where it is 0"]),
    ("--output_dir {tmp}/run --resume --train_steps 1", ["at step 2", "end at step 1", "larger"]),
    ("--output_dir {tmp}/run --resume --data {tmp}/other.txt", ["--data", "the text has changed"]),
    ("--output_dir {tmp}/run --resume --tokenizer bert-base-cased", ["--tokenizer", "28996", "30522"]),
    ("--output_dir {tmp}/run --resume --tokenizer {tmp}/mixed", ["--tokenizer", "the vocabulary has changed"]),
    ("--output_dir {tmp}/other.txt", ["--output_dir", "a folder to write to"]),
    ("--output_dir {tmp}/new --d_head 9", ["--d_head 9", "Hugging Face"]),
    ("--save_steps 3", ["--save_steps", "--output_dir"]),
    ("--tensorboard", ["--tensorboard", "--output_dir"]),
    ("--eval_steps 3", ["--eval_steps 3", "--valid"]),
    ("--valid {tmp}/none.txt", ["--valid", "No such file"]),
    ("--valid {tmp}/short.txt", ["--valid", "has 3 tokens", "needs 512"]),
    ("--init_checkpoint {tmp}", ["--init_checkpoint", "config.json"]),
    ("--init_checkpoint {tmp}/run/checkpoint-2 --d_model 16", ["--d_model 16", "where it is 8"]),
    ("--init_checkpoint {tmp}/run/checkpoint-2 --tokenizer bert-base-cased", ["28996", "30522"]),
    ("--grad_accum_steps 9 --train_steps 3 --num_step 1 --seq_len 2048 --perm_size 256", ["--grad_accum_steps 9", "8"]),
])
def test_a_mistake_gets_one_line(run, tmp_path, capsys, flags, words):
    run("run", "--train_steps", 2)
    (tmp_path / "short.txt").write_text("three words here\n")
    (tmp_path / "other.txt").write_text("three words here\n" * 40)
    (tmp_path / "mixed").mkdir()
    pieces = (ROOT / "vocab" / "bert-base-uncased.txt").read_text(encoding="utf-8").splitlines()
    pieces[5000], pieces[5001] = pieces[5001], pieces[5000]
    (tmp_path / "mixed" / "vocab.txt").write_text("\n".join(pieces), encoding="utf-8")
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main.main(flags.format(tmp=tmp_path).split())
    out, err = capsys.readouterr()
    assert (stop.value.code, out, err.count("\n")) == (2, "", 1)
    for word in words:
        assert word in err


def test_a_folder_with_a_tokenizers_name_is_not_that_tokenizer(run, tmp_path, monkeypatch):
    (tmp_path / "bert-base-uncased").mkdir()
    monkeypatch.chdir(tmp_path)
    run("run", "--train_steps", 1)
    state = torch.load(tmp_path / "run" / "checkpoint-1" / "trainer_state.pt", weights_only=True)
    assert state["flags"]["tokenizer"] == "bert-base-uncased"
    run("run", "--train_steps", 2, new=False)


def test_a_huge_validation_cost_is_told(capsys, short_text):
    args = main.settle(vars(main.build_parser().parse_args([*SMALL, "--data", str(short_text / "text.txt")])))
    main.Log(main.Run(args)).write({"pass": 1, "step": 1, "cost": 9.5, "validation_cost": 1000.0})
    assert "Validation cost = 1000.000000 perplexity = inf" in capsys.readouterr().out


def test_tensorboard_where_it_is_not_installed(run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(SystemExit) as stop:
        run("run", "--tensorboard", "--train_steps", 1)
    assert stop.value.code == 2 and "pip install tensorboard" in capsys.readouterr().err


# ---------------------------------------------------------------- what a run leaves


def test_validation_is_the_same_for_the_same_model(run, tmp_path, short_text):
    """Two evaluations agree to the last bit, whatever was trained between; they do not change the training."""
    valid = ["--valid", short_text / "valid.txt"]
    metrics, lines = run("rated", "--train_steps", 6, "--learning_rate", 0, *valid, "--eval_steps", 2)
    costs = [line for line in lines if line.startswith("Validation")]
    assert len(costs) == 3 and len(set(costs)) == 1
    assert len({row["validation_cost"] for row in rows(tmp_path / "rated")} - {""}) == 1
    _, rated = run("one", "--train_steps", 6, *valid, "--eval_steps", 1, "--seed", 4)
    _, plain = run("two", "--train_steps", 6, "--seed", 4)
    assert [line for line in rated if not line.startswith("Validation")] == plain
    cost, perplexity = re.match(r"Validation cost = (\S+) perplexity = (\S+)", rated[-1]).groups()
    assert float(perplexity) == pytest.approx(np.exp(float(cost)), rel=1e-4)


def test_validation_is_the_mean_over_all_targets(run, tmp_path, short_text):
    """Over every window of the file, with memory and without dropout, as a loop over create_batches has it."""
    metrics, _ = run("run", "--train_steps", 2, "--valid", short_text / "valid.txt")
    model = XLNet.from_pretrained(tmp_path / "run" / "checkpoint-2").eval()
    tokenizer = data_utils.load_tokenizer("bert-base-uncased")
    vocab = data_utils.vocabulary(tokenizer)
    text = data_utils.read_text([short_text / "valid.txt"], tokenizer, vocab, tmp_path / "cache")
    [rows] = data_utils.batchify(text.ids, text.cuts, 1, 1, False)
    costs, mems = [], None
    sizes = dict(seq_len=32, reuse_len=16, perm_size=8, num_predict=6, mask_alpha=6, mask_beta=1)
    for batch in data_utils.create_batches(rows, vocab, [np.random.default_rng(0)], **sizes):
        target, target_mask = batch.pop("target"), batch.pop("target_mask")
        logits, mems = model(**batch, mems=mems)
        nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
        costs += nll[target_mask.flatten() > 0].tolist()
    assert metrics["validation_cost"] == pytest.approx(np.mean(costs), rel=1e-5)


def test_metrics_and_picture(run, tmp_path, short_text):
    """A row a step with the documented columns, the learning rate of the schedule, and loss.png."""
    valid = ["--valid", short_text / "valid.txt"]
    metrics, lines = run("run", "--num_step", 2, "--warmup_steps", 4, "--clip", 0.5, "--tensorboard", *valid)
    table = rows(tmp_path / "run", without=())
    assert list(table[0]) == list(main.METRICS)
    printed = [line.split(" = ")[1] for line in lines if line.startswith("Number")]
    assert [f"{float(row['cost']):.6f}" for row in table] == printed
    assert [row["step"] for row in table] == [str(step + 1) for step in range(len(table))]
    assert [float(row["learning_rate"]) for row in table[:5]] == pytest.approx([1e-3, 2e-3, 3e-3, 4e-3, 4e-3])
    assert all(float(row["gradient_norm"]) > 0 and float(row["tokens_per_second"]) > 0 for row in table)
    assert [row["step"] for row in table if row["validation_cost"]] == [str(len(table) // 2), str(len(table))]
    assert metrics["validation_cost"] == float(table[-1]["validation_cost"])
    assert (tmp_path / "run" / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert list((tmp_path / "run").glob("events.out.tfevents.*"))


# ---------------------------------------------------------------- transformers


@pytest.fixture(scope="module")
def trained(tmp_path_factory, short_text):
    """A checkpoint of a short run at the default shape."""
    folder = tmp_path_factory.mktemp("trained")
    main.main(["--seq_len", "64", "--reuse_len", "32", "--perm_size", "32", "--num_predict", "10", "--mem_len", "48",
               "--train_steps", "150", "--output_dir", str(folder)])
    return main.checkpoints(folder)[0]


def test_transformers_loads_a_checkpoint(trained):
    """No missing and no unexpected key, logits within 1e-5 of ours with memory; AutoModel leaves out the head alone."""
    theirs, report = transformers.XLNetLMHeadModel.from_pretrained(trained, output_loading_info=True)
    assert not any(report.values())
    _, report = transformers.AutoModel.from_pretrained(trained, output_loading_info=True)
    assert report.pop("unexpected_keys") == {"lm_loss.bias"} and not any(report.values())
    ours = XLNet.from_pretrained(trained).eval()
    torch.manual_seed(0)
    ids, seg_id = torch.randint(30522, (20, 2)), torch.randint(2, (20, 2))
    perm_mask = (torch.rand(20, 20, 2) < 0.4).float()
    positions = torch.tensor([[3, 4], [7, 9], [12, 11]])
    mems = [torch.randn(9, 2, 32) for _ in range(6)]
    logits, new_mems = ours(ids, seg_id, None, mems, perm_mask, positions, torch.ones(20, 2))
    output = theirs(input_ids=ids.t(), token_type_ids=seg_id.t(), mems=mems, perm_mask=perm_mask.permute(2, 0, 1),
                    target_mapping=torch.nn.functional.one_hot(positions.t(), 20).float(), use_mems=True)
    torch.testing.assert_close(output.logits.transpose(0, 1), logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(list(output.mems), new_mems, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["bert-base-uncased", "bert-base-cased"])
def test_transformers_tokenizes_the_same(tmp_path, name):
    """The same ids for all sentences of data.txt and some with capitals, accents, marks and Han."""
    tokenizer = data_utils.load_tokenizer(name)
    data_utils.save_tokenizer(tokenizer, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "xlnet"}))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    sentences = (ROOT / "data.txt").read_text().split("\n")
    sentences += ["Ça va, NaÏve Über-Straße?", "3.14% of $5 -- (no)!", "上海 and 東京", "don't  stop\tnow"]
    assert len(sentences) > 200
    for sentence in sentences:
        ids = tokenizer.convert_tokens_to_ids(tokenizer.tokenize(sentence))
        assert theirs(sentence, add_special_tokens=False)["input_ids"] == ids, sentence
    assert theirs.sep_token_id == data_utils.vocabulary(tokenizer).sep_id


@pytest.mark.parametrize("head", ["XLNetLMHeadModel", "XLNetModel", "XLNetForSequenceClassification"])
def test_ours_loads_what_transformers_wrote(tmp_path, capsys, head):
    """Logits within 1e-5 of XLNetLMHeadModel's; null entries of the config come from the flags."""
    torch.manual_seed(1)
    config = transformers.XLNetConfig(vocab_size=30522, d_model=16, n_layer=2, n_head=2, d_inner=24, mem_len=None,
                                      reuse_len=None, ff_activation="gelu")
    theirs = getattr(transformers, head)(config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = XLNet.from_pretrained(tmp_path / "theirs", mem_len=0).eval()
    ids = torch.randint(30522, (12, 2))
    if head == "XLNetLMHeadModel":
        torch.testing.assert_close(ours(ids)[0], theirs(ids.t()).logits.transpose(0, 1), rtol=0, atol=1e-5)
    else:
        body = getattr(theirs, "transformer", theirs)
        torch.testing.assert_close(
            ours.hidden(ids)[0], body(ids.t()).last_hidden_state.transpose(0, 1), rtol=0, atol=1e-5)
    argv = ["--init_checkpoint", str(tmp_path / "theirs"), "--output_dir", str(tmp_path / "out")]
    main.main([*argv, "--train_steps", "1"])
    saved = json.loads((tmp_path / "out" / "checkpoint-1" / "config.json").read_text())
    assert (saved["d_model"], saved["n_layer"], saved["d_head"], saved["ff_activation"]) == (16, 2, 8, "gelu")
    assert (saved["mem_len"], saved["reuse_len"]) == (384, 256)


def test_a_run_starts_from_an_earlier_one(run, tmp_path, trained, short_text):
    """--init_checkpoint takes weights, shape and vocabulary, and nothing else."""
    metrics = main.main(["--init_checkpoint", str(trained), "--learning_rate", "0", "--train_steps", "1",
                         "--output_dir", str(tmp_path / "out")])
    assert metrics["step"] == 1
    assert equal(weights(trained), weights(tmp_path / "out" / "checkpoint-1"))
    flags = torch.load(tmp_path / "out" / "checkpoint-1" / "trainer_state.pt", weights_only=True)["flags"]
    assert flags["tokenizer"] == str(trained) and flags["d_model"] == 32


def test_fine_tuning_as_in_the_readme(trained, tmp_path, monkeypatch, capsys):
    """The README's example runs as it stands, and beats the majority class on sentences held out.

    These are 35, of which one seed gets 0.54 right and another 0.77, and a machine that rounds differently changes the
    seeds over: the mean of three is judged, on either half of the sentences.
    """
    example = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S).group(1)
    assert '"out/checkpoint-1400"' in example and "manual_seed(0)" in example
    monkeypatch.chdir(ROOT)
    example = example.replace("out/checkpoint-1400", str(trained))
    swapped = re.sub(r"examples\[(1?)::2\]", lambda half: f"examples[{'' if half[1] else 1}::2]", example)
    assert swapped.count("examples[::2]") == swapped.count("examples[1::2]") == 1
    for seed, halves in itertools.product(range(3), (example, swapped)):
        exec(halves.replace("seed(0)", f"seed({seed})"), {})
    printed = re.findall(r"accuracy (\S+), majority class (\S+)", capsys.readouterr().out)
    accuracy, majority = np.mean([list(map(float, pair)) for pair in printed], axis=0)
    assert len(printed) == 6 and accuracy > majority + 0.1


@pytest.mark.parametrize("change, words", [
    ({"model_type": "bert"}, "not that of an XLNet"),
    ({"untie_r": False}, "untie_r"),
    ({"tie_word_embeddings": False}, "tie_word_embeddings"),
    ({"ff_activation": "silu"}, "ff_activation 'silu' must be one of relu"),
    ({"d_inner": 7}, "is missing, or not"),
])
def test_from_pretrained_names_what_does_not_fit(tmp_path, change, words):
    XLNet(30, n_layer=1).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=words):
        XLNet.from_pretrained(tmp_path)


def test_save_and_load_round_trip(tmp_path):
    """Every weight, and every argument of the constructor."""
    torch.manual_seed(2)
    model = XLNet(30, 1, 2, 4, 12, 8, 0.2, 0.3, "uni", True, 9, True, 5, 6, "gelu_new")
    model.save_pretrained(tmp_path)
    again = XLNet.from_pretrained(tmp_path)
    assert equal(model.state_dict(), again.state_dict()) and again.config == model.config
    assert XLNet.from_pretrained(tmp_path, mem_len=3).mem_len == 3
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"d_head": None}))  # null means d_model / n_head
    assert equal(model.state_dict(), XLNet.from_pretrained(tmp_path).state_dict())
