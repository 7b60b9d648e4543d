"""The command as a user meets it: what it prints, what it learns, what it says to mistakes."""

import contextlib
import math
import os
import re
import subprocess
import sys
import termios
from pathlib import Path

import numpy as np
import pytest
import torch

import main
from xlnet import XLNet

ROOT = Path(main.__file__).parent
LINE = re.compile(r"Number of Epoch: (\d{4}) in (\d{4}) Step cost = (\d+\.\d{6})")
SMALL = ("--seq_len 64 --reuse_len 32 --perm_size 32 --mem_len 48 --num_predict 10 --dropout 0.1 "
         "--dropatt 0.1").split()


def run(capsys, *flags):
    """Run main.main and return its metrics, its first line, and (pass, step, cost) of every cost line."""
    metrics = main.main([*SMALL, *flags])
    out = capsys.readouterr().out.splitlines()
    costs = [LINE.match(line).groups() for line in out[1:-1]]
    return metrics, out[0], [(int(epoch), int(step), float(cost)) for epoch, step, cost in costs]


# ---------------------------------------------------------------- what it prints and learns


def test_readme_command_runs_verbatim_from_anywhere(tmp_path):
    """The documented command, its first passes, in a directory with nothing but a copy of data.txt."""
    (tmp_path / "data.txt").write_bytes((ROOT / "data.txt").read_bytes())
    command = "--data ./data.txt --tokenizer bert-base-uncased --seq_len 512 --reuse_len 256 --perm_size 256 " \
              "--bi_data True --mask_alpha 6 --mask_beta 1 --num_predict 85 --mem_len 384 --num_step 100"
    assert command in re.sub(r" \\\n +", " ", (ROOT / "README.md").read_text())
    done = subprocess.run([sys.executable, ROOT / "main.py", *command.split(), "--train_steps", "3"], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    lines = done.stdout.splitlines()
    assert len(lines) == 5 and "1,052,378 parameters on c" in lines[0] and "14 windows a pass" in lines[0]
    assert lines[1].startswith("Number of Epoch: 0001 in 0001 Step cost = 10.")
    assert lines[3].startswith("Number of Epoch: 0001 in 0003 Step cost = 10.")


def test_readme_shows_what_is_printed(tmp_path):
    """The output in the README is that of plain `python main.py`, from any folder; other machines round otherwise."""
    shown = re.search(r"\$ python main.py\n(.*?)\n\.\.\.", (ROOT / "README.md").read_text(), re.S).group(1).splitlines()
    assert len(shown) >= 4
    command = [sys.executable, ROOT / "main.py", "--device", "cpu"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    printed = [process.stdout.readline().rstrip("\n") for _ in shown]
    process.kill()
    process.wait()
    assert printed[0] == shown[0]
    for ours, theirs in zip(printed[1:], shown[1:]):
        assert ours.split("= ")[0] == theirs.split("= ")[0]
        assert float(ours.split("= ")[1]) == pytest.approx(float(theirs.split("= ")[1]), abs=0.01)


@pytest.mark.parametrize("seed", range(3))
def test_first_cost_is_that_of_guessing(capsys, seed):
    """Between 10.0 and 10.7, where ln(30522) is 10.3, at the default model and windows."""
    main.main(["--train_steps", "1", "--seed", str(seed)])
    cost = float(LINE.match(capsys.readouterr().out.splitlines()[1]).group(3))
    assert 10.0 < cost < 10.7


def test_it_leaves_the_plateau(capsys):
    """On short windows, 12 passes bring the cost far below the unigram entropy."""
    metrics = main.main(["--seq_len", "128", "--reuse_len", "64", "--perm_size", "64", "--num_predict", "21",
                         "--mem_len", "96", "--num_step", "12"])
    assert metrics["mean_cost"] < metrics["unigram_entropy"] - 1
    assert "Mean cost of pass 12" in capsys.readouterr().out


def test_lines_count_passes_and_windows(capsys):
    """A line a window: passes from 1, windows from 1 in each; --num_epoch is --num_step."""
    metrics, first, costs = run(capsys, "--num_epoch", "2", "--rows", "1")
    per_pass = int(re.search(r"(\d+) windows a pass", first).group(1))
    assert per_pass == (4015 - 64) // 32 + 1
    assert [cost[:2] for cost in costs] == [(e, s) for e in (1, 2) for s in range(1, per_pass + 1)]
    assert metrics["step"] == 2 * per_pass and metrics["pass"] == 2
    assert metrics["cost"] == pytest.approx(costs[-1][2], abs=1e-6)
    assert metrics["mean_cost"] == pytest.approx(np.mean([cost for e, _, cost in costs if e == 2]), abs=1e-5)


def test_train_steps_counts_updates(capsys):
    """--train_steps alone goes on over as many passes as it takes; with --num_step the earlier end holds."""
    metrics, _, costs = run(capsys, "--train_steps", "3", "--grad_accum_steps", "2")
    assert metrics["updates"] == 3 and metrics["step"] == len(costs) == 6
    metrics, _, costs = run(capsys, "--train_steps", "130", "--rows", "1")
    assert costs[-1][:2] == (2, 130 - 124) and metrics["pass"] == 2
    metrics, _, costs = run(capsys, "--train_steps", "999", "--num_step", "1", "--rows", "1")
    assert len(costs) == metrics["step"] == 124


def test_the_same_seed_prints_the_same_lines(capsys):
    flags = ["--train_steps", "8", "--bi_data", "True"]
    same = [run(capsys, *flags, "--seed", "5")[2] for _ in range(2)]
    assert same[0] == same[1] != run(capsys, *flags, "--seed", "6")[2]


def test_accumulation_is_the_mean_of_windows(capsys, monkeypatch):
    """Two windows with --grad_accum_steps 2 make one update, with the mean of their gradients."""
    gradients = []
    step = torch.optim.AdamW.step

    def spy(optimizer):
        gradients.append(torch.cat([p.grad.flatten() for group in optimizer.param_groups for p in group["params"]]))
        return step(optimizer)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    flags = ["--learning_rate", "0", "--dropout", "0", "--dropatt", "0", "--clip", "0"]
    run(capsys, *flags, "--train_steps", "2")
    run(capsys, *flags, "--train_steps", "1", "--grad_accum_steps", "2")
    torch.testing.assert_close(gradients[2], (gradients[0] + gradients[1]) / 2)
    run(capsys, *flags[:-2], "--clip", "0.001", "--train_steps", "1")
    assert gradients[3].norm() == pytest.approx(0.001, rel=1e-3)


@pytest.mark.parametrize("rows, per_pass", [(1, 124), (3, 3 * 40)])
def test_memory_is_carried_and_reset_each_pass(capsys, monkeypatch, rows, per_pass):
    """A row has no memory at its first window of a pass, and at every other what its last turn returned."""
    given, returned = [], []
    forward = XLNet.forward

    def spy(model, *args, mems=None, **kwargs):
        given.append(mems)
        logits, new_mems = forward(model, *args, mems=mems, **kwargs)
        returned.append(new_mems)
        return logits, new_mems

    monkeypatch.setattr(XLNet, "forward", spy)
    run(capsys, "--train_steps", "126", "--rows", str(rows))
    first = [step for step in range(126) if step % per_pass < rows]
    assert [step for step in range(126) if given[step] is None] == first
    assert all(given[step] is returned[step - rows] for step in range(126) if step not in first)


def test_rows_take_turns():
    """Each step has the next window of the next row; a long text is cut into more rows, a page is not."""
    run = main.Run(arguments(*SMALL, "--rows", "3"))
    row_len = len(run.text.ids) // 3
    for step in range(12):
        row, window = step % 3, step // 3
        begin = row * row_len + 32 * window
        assert run.load_batch(step)["inp_k"][:32, 0].tolist() == run.text.ids[begin : begin + 32].tolist()
    assert main.Run(arguments()).args.rows == 1
    assert main.Run(arguments(*SMALL)).args.rows == 3  # 125 windows, 32 and more in each
    assert main.Run(arguments(*SMALL, "--batch_size", "2")).args.rows == 2
    tiny = "--seq_len 16 --reuse_len 4 --perm_size 4 --num_predict 2".split()
    assert main.Run(arguments(*tiny)).args.rows == 16


@pytest.mark.parametrize("changed", [0, 1])
def test_memory_of_a_row_never_reaches_another(changed):
    """Two rows a step, two turns: with other text in one row, the memory of the three others stays as it was."""
    mems = []
    for other in (False, True):
        run = main.Run(arguments(*SMALL, "--dropout", "0", "--dropatt", "0", "--learning_rate", "0", "--rows", "4",
                                 "--batch_size", "2"))
        if other:
            row = run.groups[1][changed]
            run.groups[1][changed] = row._replace(ids=np.roll(row.ids, 7))
        for _ in range(8):
            run.train_step()
        mems.append([torch.stack(turn) for turn in run.mems])
    assert torch.equal(mems[0][0], mems[1][0])
    assert torch.equal(mems[0][1][:, :, 1 - changed], mems[1][1][:, :, 1 - changed])
    assert not torch.equal(mems[0][1][:, :, changed], mems[1][1][:, :, changed])


def test_a_batch_depends_on_text_seed_and_step_alone(capsys):
    """Made ahead, or asked for out of order: the same; of another step or seed: others."""

    def batches(*steps, seed="3"):
        one = main.Run(arguments("--seed", seed))
        return [one.load_batch(step) for step in steps]

    def equal(one, other):
        return all(torch.equal(one[key], other[key]) for key in one)

    first, next_pass = batches(5, 5 + 14)
    assert equal(first, batches(5)[0]) and not equal(first, batches(5, seed="4")[0])
    assert torch.equal(first["inp_k"][:256], next_pass["inp_k"][:256])  # the same text
    assert not torch.equal(first["perm_mask"], next_pass["perm_mask"])  # in another order
    one = main.Run(arguments("--seed", "3"))
    for one.step, expected in zip(range(2, 6), batches(2, 3, 4, 5)):
        assert equal(one.next_batch(), expected)


def test_bfloat16_learns_the_same(capsys):
    """200 steps of a small run: the mean cost of the last 20 is within 1% of float32's."""
    means = []
    for flags in ([], ["--bf16"]):
        costs = run(capsys, "--train_steps", "200", "--learning_rate", "0.01", *flags)[2]
        means.append(np.mean([cost for _, _, cost in costs[-20:]]))
    assert means[0] < 7 and means[0] != means[1] and means[1] == pytest.approx(means[0], rel=0.01)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("flags", [[], ["--bf16"]])
def test_a_gpu_is_never_waited_for(flags):
    """PyTorch raises an error where a step waits for the device."""
    one = main.Run(arguments("--device", "cuda", *flags))
    for _ in range(3):
        one.train_step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        metrics = [one.train_step() for _ in range(3)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(5 < each["cost"].item() < 12 for each in metrics)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("flags", [[], ["--bf16"]])
def test_a_gpu_trains_like_a_cpu(capsys, flags):
    """200 steps, dropout off: the mean cost of the last 20 is within 1% of the CPU's in float32; lines in order."""
    means = []
    for device in (["--device", "cpu"], ["--device", "cuda", *flags]):
        costs = run(capsys, "--train_steps", "200", "--dropout", "0", "--dropatt", "0", *device)[2]
        assert [124 * (epoch - 1) + window for epoch, window, _ in costs] == list(range(1, 201))
        means.append(np.mean([cost for _, _, cost in costs[-20:]]))
    assert means[1] == pytest.approx(means[0], rel=0.01)


# ---------------------------------------------------------------- small functions


def arguments(*flags):
    return main.settle(vars(main.build_parser().parse_args(flags)))


@pytest.mark.parametrize("flags, expected", [
    ("--learning_rate 8 --decay_method constant --warmup_steps 0", [8, 8, 8, 8, 8, 8]),
    ("--learning_rate 8 --decay_method constant --warmup_steps 4", [2, 4, 6, 8, 8, 8]),
    ("--learning_rate 8 --decay_method poly --warmup_steps 0", [8, 6.4, 4.8, 3.2, 1.6, 0]),
    ("--learning_rate 8 --decay_method poly --warmup_steps 2", [4, 8, 8, 16 / 3, 8 / 3, 0]),
    ("--learning_rate 8 --decay_method poly --warmup_steps 0 --min_lr_ratio 0.5", [8, 7.2, 6.4, 5.6, 4.8, 4]),
    ("--learning_rate 8 --decay_method cos --warmup_steps 1", [8, 8, 6.828427, 4, 1.171573, 0]),
    ("--learning_rate 8 --decay_method cos --warmup_steps 9", [8 / 9, 16 / 9, 24 / 9, 32 / 9, 40 / 9, 48 / 9]),
])
def test_schedules(flags, expected):
    """Six updates of each schedule, written out."""
    args = arguments(*flags.split())
    assert [main.get_lr(update, args, 6) for update in range(6)] == pytest.approx(expected, abs=1e-6)


def test_parameter_groups_cover_everything_once():
    """No decay on biases, r_w_bias and its kin, and LayerNorm; decay on the rest."""
    model = XLNet(50, n_layer=1)
    decayed, kept = main.parameter_groups(model, 0.01)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.01, 0)
    name = {id(p): n for n, p in model.named_parameters()}
    assert sorted(name[id(p)] for p in decayed["params"] + kept["params"]) == sorted(name.values())
    assert sorted(name[id(p)].removeprefix("layer.0.") for p in kept["params"]) == [
        "ff.layer_1.bias", "ff.layer_2.bias", "ff.layer_norm.bias", "ff.layer_norm.weight", "lm_loss.bias",
        "rel_attn.layer_norm.bias", "rel_attn.layer_norm.weight", "rel_attn.r_r_bias", "rel_attn.r_s_bias",
        "rel_attn.r_w_bias"]


def test_unigram_entropy():
    assert main.unigram_entropy(np.array([0, 2, 1, 0, 1])) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(4))


@pytest.mark.parametrize("flags", [
    "", "--batch_size 3", "--bi_data True", "--seq_len 2048 --reuse_len 32 --perm_size 32 --num_predict 64"])
def test_default_rows_have_enough_windows(flags):
    """One turn, or as many as leave every row 32 windows, and not one more if that did too; at most 16."""
    args = arguments(*flags.split())
    found = set()
    for n_tokens in range(4000, 600_000, 977):
        def windows(turns):
            row_len = n_tokens // (args.batch_size * turns // (2 if args.bi_data else 1))
            return main.data_utils.n_windows(row_len, args.seq_len, args.reuse_len)

        turns = main.default_rows(n_tokens, args) // args.batch_size
        found.add(turns)
        assert turns == 1 or windows(turns) >= 32
        assert turns == 16 or windows(turns + 1) < 32
    assert found == set(range(1, 17))


def test_lm_loss_ignores_empty_slots():
    """The mean over real targets only; 0, not a division by 0, where there is none."""
    logits = torch.tensor([[[0.0, 0.0]], [[9.0, -9.0]]])
    target, weight = torch.tensor([[0], [1]]), torch.tensor([[1.0], [0.0]])
    assert main.lm_loss(logits, target, weight).item() == pytest.approx(math.log(2))
    assert main.lm_loss(logits, target, torch.zeros(2, 1)).item() == 0


def test_lm_loss_of_bfloat16_logits_is_not_rounded():
    logits, target, weight = torch.randn(3, 1, 7).bfloat16(), torch.ones(3, 1).long(), torch.ones(3, 1)
    assert torch.equal(main.lm_loss(logits, target, weight), main.lm_loss(logits.float(), target, weight))


def test_defaults_are_the_documented_ones():
    args = arguments()
    assert args.data == [str(ROOT / "data.txt")] and Path(args.cache_dir).name == "xlnet"
    assert {key: value for key, value in vars(args).items() if key not in ("data", "cache_dir")} == dict(
        tokenizer="bert-base-uncased", seq_len=512, reuse_len=256, perm_size=256, bi_data=False,
        mask_alpha=6, mask_beta=1, num_predict=85, mem_len=384, num_step=100, train_steps=None, n_layer=6, n_head=4,
        d_head=8, d_model=32, d_inner=32, dropout=0.0, dropatt=0.0, ff_activation="relu", attn_type="bi", clamp_len=-1,
        same_length=False, init="local", init_std=None, batch_size=1, rows=None, weight_decay=0.01, adam_epsilon=1e-8,
        seed=0, device="auto", learning_rate=4e-3, warmup_steps=0, decay_method="constant", min_lr_ratio=0.0, clip=0.25,
        grad_accum_steps=1, output_dir=None, save_steps=None, save_total_limit=3, resume=None, init_checkpoint=None,
        valid=None, eval_steps=None, tensorboard=None, bf16=None, compile=None)
    assert arguments("--bi_data", "True").batch_size == 2


# ---------------------------------------------------------------- mistakes


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    (folder / "empty.txt").write_bytes(b"")
    (folder / "short.txt").write_text("the cat sat on the mat\n")
    (folder / "latin1.txt").write_bytes("fine\ncaf\u00e9\n".encode("latin-1"))
    (folder / "plain_vocab.txt").write_text("[PAD]\n[UNK]\nthe\ncat\n")
    (folder / "mixed_vocab.txt").write_text("[PAD]\n<unk>\n[CLS]\n[SEP]\nthe\ncat\n")
    return folder


@pytest.mark.parametrize("flags, words", [
    ("--data nowhere.txt", ["--data nowhere.txt", "No such file"]),
    ("--data {files}", ["--data", "Is a directory", "give a text file"]),
    ("--data {files}/empty.txt", ["--data", "empty.txt", "holds no text"]),
    ("--data {files}/short.txt", ["--data", "has 6 tokens", "needs 512"]),
    ("--data {files}/short.txt --bi_data True --batch_size 6", ["has 6 tokens", "needs 1536", "--batch_size"]),
    ("--data {files}/latin1.txt", ["--data", "line 2 is not UTF-8"]),
    ("--tokenizer gpt2", ["--tokenizer gpt2", "bert-base-uncased", "bert-large-uncased", "bert-base-cased",
                          "bert-large-cased"]),
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
    ("--mask_alpha 2 --mask_beta 3", ["--mask_beta 3", "--mask_alpha 2"]),
    ("--batch_size 3 --bi_data True", ["--batch_size 3", "--bi_data True", "try 4"]),
    ("--rows 5 --batch_size 2", ["--rows 5", "--batch_size 2", "try 4"]),
    ("--rows 1 --bi_data True", ["--rows 1", "--batch_size 2", "try 2"]),
    ("--rows 8", ["data.txt", "4015 tokens and needs 4096", "smaller --seq_len or --rows"]),
    ("--rows 16 --bi_data True", ["needs 4096", "smaller --seq_len or --rows"]),
    ("--d_model 33", ["--d_model 33", "try 34"]),
    ("--mem_len -1", ["--mem_len", "-1", "at least 0"]),
    ("--dropout 1", ["--dropout", "1", "below 1"]),
    ("--dropatt nan", ["--dropatt", "nan", "below 1"]),
    ("--learning_rate -0.1", ["--learning_rate", "-0.1", "at least 0"]),
    ("--min_lr_ratio 2", ["--min_lr_ratio 2", "at most 1"]),
    ("--seq_len 12.5", ["--seq_len", "12.5", "a whole number"]),
    ("--seq_len_ 12", ["--seq_len_"]),
    ("--seq 128", ["--seq"]),
    ("--init zeros", ["--init", "zeros", "local"]),
    *((f"--{name} {value}", [f"--{name}", value, "at least"]) for value in ("0", "-3") for name in (
        "seq_len reuse_len perm_size mask_alpha mask_beta num_predict num_step n_layer n_head d_head d_model d_inner "
        "batch_size rows train_steps grad_accum_steps").split()),
])
def test_a_mistake_gets_one_line(capsys, files, flags, words):
    """Exit status 2, nothing on stdout, and one line that names the flag, the value and the remedy."""
    with pytest.raises(SystemExit) as stop:
        main.main(flags.format(files=files).split())
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == ""
    assert err.count("\n") == 1 and err.endswith("\n")
    for word in words:
        assert word in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_where_there_is_none(capsys):
    with pytest.raises(SystemExit) as stop:
        main.main(["--device", "cuda"])
    assert stop.value.code == 2 and "--device cuda" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [
    "--perm_size 128", "--reuse_len 508 --perm_size 4 --num_predict 9", "--num_predict 512", "--mask_beta 6",
    "--mem_len 0", "--reuse_len 128 --perm_size 128",
    "--num_predict 1", "--attn_type uni --same_length true --clamp_len 9", "--batch_size 4 --bi_data yes",
])
def test_extreme_but_legal_flags_run(capsys, flags):
    metrics = main.main([*flags.split(), "--train_steps", "2"])
    assert 9 < metrics["cost"] < 12


def test_compile_without_a_compiler_gets_one_line(tmp_path):
    environment = dict(os.environ, CXX=str(tmp_path / "g++"), TORCHINDUCTOR_CACHE_DIR=str(tmp_path))
    command = [sys.executable, ROOT / "main.py", *SMALL, "--n_layer", "1", "--device", "cpu", "--compile"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "Step cost" not in done.stdout
    assert "Traceback" not in done.stderr  # PyTorch may warn of itself before
    message = done.stderr.splitlines()[-1]
    assert message.startswith("main.py: error: --compile: ") and "leave it out" in message


def test_ctrl_c_before_the_first_step(monkeypatch, capsys):
    """One line, status 130; once training goes on, see test_runs.py."""

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(main.data_utils, "read_text", interrupt)
    with pytest.raises(SystemExit) as stop:
        main.main([])
    err = capsys.readouterr().err
    assert stop.value.code == 130 and err.count("\n") == 1 and "nothing is saved" in err


def test_a_reader_that_leaves_is_no_error():
    """python main.py | head -2"""
    read, write = os.pipe()
    process = subprocess.Popen([sys.executable, ROOT / "main.py", *SMALL], stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    os.read(read, 1)
    os.close(read)
    _, err = process.communicate(timeout=60)
    assert err == b""


def test_help_names_every_flag_and_its_unit(capsys):
    """--help fits the flags of the parser, each with a help text, and ends with status 0."""
    with pytest.raises(SystemExit) as stop:
        main.main(["--help"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0
    parser = main.build_parser()
    assert {action.dest for action in parser._actions} == {"help", *parser.defaults}
    for action in parser._actions:
        assert action.help and action.option_strings[-1] in shown


def test_a_terminal_gets_a_progress_bar():
    """On a terminal stderr carries a bar and the cost lines stay whole."""
    leader, follower = os.openpty()
    termios.tcsetwinsize(follower, (24, 100))
    process = subprocess.Popen([sys.executable, ROOT / "main.py", *SMALL, "--train_steps", "20"],
                               stdout=subprocess.PIPE, stderr=follower)
    os.close(follower)
    shown = b""
    with contextlib.suppress(OSError):  # which says that the other end is closed
        while part := os.read(leader, 4096):
            shown += part
    out, _ = process.communicate(timeout=60)
    os.close(leader)
    assert b"/20 [" in shown and b"step" in shown
    assert len(LINE.findall(out.decode())) == 20
