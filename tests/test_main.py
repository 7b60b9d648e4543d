"""The command as a user meets it: what it prints and learns; and the training loop, step by step."""

import contextlib
import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data_utils
import main
from main import LENGTHS
from support import UserError, corpus, flags, processes, report
from xlnet import XLNet

ROOT = Path(main.__file__).parent
LINE = re.compile(r"Number of Epoch: (\d{4}) in (\d{4}) Step cost = (\d+\.\d{6})")
SMALL = "--n_layer 2 --n_head 2 --d_head 4 --d_model 8 --d_inner 8 --num_predict 8 --rows 1".split()
PASS_LEN = (4015 - 512) // 256 + 1  # windows of data.txt in one row: 14
SHORT = "--seq_len 64 --reuse_len 32 --perm_size 32 --mem_len 48 --num_predict 10".split()
TINY = "--seq_len 32 --reuse_len 16 --perm_size 8 --mem_len 24 --num_predict 6".split()
DROPOUT = ["--dropout", "0.1", "--dropatt", "0.1"]


def slow(*values):
    """Return parameters of a test that `-m "not slow"` leaves out."""
    return pytest.param(*values, marks=pytest.mark.slow)


def run_command(capsys, *words):
    """Run main.main and return its metrics, its first line, and (pass, window, cost) of every cost line."""
    metrics = main.main(words)
    out = capsys.readouterr().out.splitlines()
    costs = [LINE.match(line).groups() for line in out[1:-2]]
    return metrics, out[0], [(int(epoch), int(window), float(cost)) for epoch, window, cost in costs]


@contextlib.contextmanager
def training(*words):
    """Prepare a run; yield it and its training loop, whose next() makes a step."""
    run = main.prepare(words)
    with (
        contextlib.closing(main.make_reporter(run)) as reporter,
        contextlib.closing(main.train(run, reporter)) as steps,
    ):
        yield run, steps


def equal(one, other):
    """Return whether two dicts hold the same tensors, to the bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# ---------------------------------------------------------------- what it prints and learns


@pytest.mark.slow
def test_readme_command_runs_verbatim_from_anywhere(tmp_path):
    """The documented command, its first passes, in a directory with nothing but a copy of data.txt."""
    (tmp_path / "data.txt").write_bytes((ROOT / "data.txt").read_bytes())
    command = (
        "--data ./data.txt --tokenizer bert-base-uncased --seq_len 512 --reuse_len 256 --perm_size 256 "
        "--bi_data True --mask_alpha 6 --mask_beta 1 --num_predict 85 --mem_len 384 --num_step 100"
    )
    assert command in re.sub(r" \\\n +", " ", (ROOT / "README.md").read_text())
    program = [sys.executable, ROOT / "main.py", *command.split(), "--train_steps", "3"]
    done = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    lines = done.stdout.splitlines()
    assert len(lines) == 6 and "1,052,378 parameters on c" in lines[0] and "28 windows an epoch" in lines[0]
    assert lines[1].startswith("Number of Epoch: 0001 in 0001 Step cost = 10.")
    assert lines[3].startswith("Number of Epoch: 0001 in 0003 Step cost = 10.")


@pytest.mark.slow
def test_readme_shows_what_is_printed(tmp_path):
    """The output in the README is that of plain `python main.py`, from any folder; other machines round otherwise."""
    shown = re.search(r"```text\n(XLNet of .*?)\n\.\.\.", (ROOT / "README.md").read_text(), re.S).group(1).splitlines()
    assert len(shown) >= 4
    command = [sys.executable, ROOT / "main.py", "--device", "cpu"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    printed = [process.stdout.readline().rstrip("\n") for _ in shown]
    process.kill()
    process.wait()
    assert printed[0] == shown[0]
    for ours, theirs in zip(printed[1:], shown[1:], strict=True):
        assert ours.split("= ")[0] == theirs.split("= ")[0]
        assert float(ours.split("= ")[1]) == pytest.approx(float(theirs.split("= ")[1]), abs=0.01)


@pytest.mark.parametrize("seed", [0, slow(1), slow(2)])
def test_first_cost_is_that_of_guessing(capsys, seed):
    """Between 10.0 and 10.7, where ln(30522) is 10.3, at the default model and windows."""
    _, _, [(_, _, cost)] = run_command(capsys, "--train_steps", "1", "--seed", str(seed))
    assert 10.0 < cost < 10.7


@pytest.mark.slow
def test_it_leaves_the_plateau(capsys):
    """On short windows, 12 passes bring the loss far below the unigram entropy."""
    words = "--seq_len 128 --reuse_len 64 --perm_size 64 --num_predict 21 --mem_len 96 --num_step 12".split()
    metrics = main.main(words)
    assert metrics["mean_loss"] < metrics["unigram_entropy"] - 1
    assert "Mean loss of epoch 12" in capsys.readouterr().out


def test_lines_count_passes_and_windows(capsys):
    """A line a window: passes from 1, windows from 1 in each; --num_epoch is --num_step."""
    metrics, first, costs = run_command(capsys, *SMALL, "--num_epoch", "2")
    assert f" {PASS_LEN} windows an epoch, {2 * PASS_LEN} updates" in first
    assert [cost[:2] for cost in costs] == [(epoch, window) for epoch in (1, 2) for window in range(1, 1 + PASS_LEN)]
    assert metrics["step"] == 2 * PASS_LEN and metrics["pass"] == 2
    assert metrics["loss"] == pytest.approx(costs[-1][2], abs=1e-6)
    mean = np.mean([cost for epoch, _, cost in costs if epoch == 2])
    assert metrics["mean_loss"] == pytest.approx(mean, abs=1e-6)  # costs are printed to 1e-6


@pytest.mark.parametrize(
    "words, steps, updates, end",
    [
        ("--train_steps 3 --grad_accum_steps 2", 6, 3, (1, 6)),
        ("--train_steps 16", 16, 16, (2, 2)),
        slow("--train_steps 999 --num_step 1", 14, 14, (1, 14)),
        ("--num_step 1 --grad_accum_steps 4", 14, 3, (1, 14)),
    ],
)
def test_the_earlier_end_holds(capsys, words, steps, updates, end):
    """--train_steps counts updates, over as many passes as it takes; --num_step counts passes."""
    metrics, _, costs = run_command(capsys, *SMALL, *words.split())
    assert metrics["step"] == len(costs) == steps and metrics["updates"] == updates
    assert costs[-1][:2] == end and metrics["pass"] == end[0]
    mean = np.mean([cost for epoch, _, cost in costs if epoch == end[0]])
    assert metrics["mean_loss"] == pytest.approx(mean, abs=1e-6)  # of the last pass alone, costs are printed to 1e-6


def test_the_same_seed_prints_the_same_lines(capsys):
    """With dropout and both directions; another seed prints others."""
    words = [*SHORT, *DROPOUT, "--train_steps", "4", "--bi_data", "True"]
    same = [run_command(capsys, *words, "--seed", "5")[2] for _ in range(2)]
    assert same[0] == same[1] != run_command(capsys, *words, "--seed", "6")[2]


@pytest.mark.slow
def test_bfloat16_learns_the_same(capsys):
    """200 steps of a small run: the mean cost of the last 20 is within 1% of float32's."""
    means = []
    for words in ([], ["--bf16"]):
        costs = run_command(
            capsys, *SHORT, *DROPOUT, "--n_layer", "2", "--train_steps", "200", "--learning_rate", "0.01", *words
        )[2]
        means.append(np.mean([cost for _, _, cost in costs[-20:]]))
    assert means[0] < 7 and means[0] != means[1] and means[1] == pytest.approx(means[0], rel=0.01)


# ---------------------------------------------------------------- rows, batches and memory


@pytest.mark.parametrize("rows, pass_len", [(1, PASS_LEN), (3, 3 * ((4015 // 3 - 512) // 256 + 1))])
def test_memory_is_carried_and_reset_each_pass(monkeypatch, rows, pass_len):
    """A row has no memory at its first window of a pass, and at every other what its last turn returned."""
    given, returned = [], []
    forward = XLNet.forward

    def spy(model, *inputs, mems=None, **named_inputs):
        given.append(mems)
        logits, new_mems = forward(model, *inputs, mems=mems, **named_inputs)
        returned.append(new_mems)
        return logits, new_mems

    monkeypatch.setattr(XLNet, "forward", spy)
    n_steps = pass_len + 2 * rows
    main.main([*SMALL, "--train_steps", str(n_steps), "--rows", str(rows)])
    first = [step for step in range(n_steps) if step % pass_len < rows]
    assert [step for step in range(n_steps) if given[step] is None] == first
    assert all(given[step] is returned[step - rows] for step in range(n_steps) if step not in first)


def test_rows_take_turns():
    """Each step has the next window of the next row."""
    run = main.prepare([*SMALL, *SHORT, "--rows", "3"])
    row_len = len(run.text.ids) // 3
    for step in range(12):
        row, window = step % 3, step // 3
        begin = row * row_len + 32 * window
        assert run.loader.batch(step)["inp_k"][:32, 0].tolist() == run.text.ids[begin : begin + 32].tolist()


@pytest.mark.parametrize(
    "words, rows",
    [
        ([], 1),
        (SHORT, 3),  # 125 windows, 32 and more in each
        ([*SHORT, "--batch_size", "2"], 2),
        ("--seq_len 16 --reuse_len 4 --perm_size 4 --num_predict 2".split(), 16),
    ],
)
def test_a_long_text_is_cut_into_more_rows(words, rows):
    """data.txt is a page with the default windows, and long with shorter ones."""
    assert main.prepare(words).args.rows == rows


@pytest.mark.parametrize(
    "words", ["", "--batch_size 3", "--bi_data True", "--seq_len 2048 --reuse_len 32 --perm_size 32 --num_predict 64"]
)
def test_default_rows_have_enough_windows(words):
    """One turn, or as many as leave every row 32 windows, and not one more if that did too; at most 16."""
    args = flags.parse(words.split())
    flags.fill_defaults(args, world_size=1)
    sizes = args.batch_size, args.bi_data, args.seq_len, args.reuse_len
    found = set()
    for n_tokens in range(4000, 600_000, 977):

        def windows(turns, n_tokens=n_tokens):
            row_len = n_tokens // (args.batch_size * turns // (2 if args.bi_data else 1))
            return data_utils.n_windows(row_len, args.seq_len, args.reuse_len)

        turns = data_utils.default_rows(n_tokens, *sizes) // args.batch_size
        found.add(turns)
        assert turns == 1 or windows(turns) >= 32
        assert turns == 16 or windows(turns + 1) < 32
    assert found == set(range(1, 17))


@pytest.mark.parametrize("changed", [0, 1])
def test_memory_of_a_row_never_reaches_another(monkeypatch, changed):
    """Two rows a step, two turns: with other text in one row, the memory of the three others stays as it was."""
    returned = []
    forward = XLNet.forward

    def spy(*inputs, **named_inputs):
        logits, mems = forward(*inputs, **named_inputs)
        returned.append(torch.stack(mems))
        return logits, mems

    monkeypatch.setattr(XLNet, "forward", spy)
    memory = []  # of both turns, after eight steps
    for other_text in (False, True):
        words = ["--learning_rate", "0", "--rows", "4", "--batch_size", "2"]
        with training(*SMALL, *SHORT, *words) as (run, steps):
            if other_text:
                row = run.loader.turns[1][changed]
                run.loader.turns[1][changed] = row._replace(ids=np.roll(row.ids, 7))
            for _ in range(8):
                next(steps)
        memory.append(returned[-2:])
    (before_0, before_1), (after_0, after_1) = memory
    same, other = 1 - changed, changed
    assert torch.equal(before_0, after_0)
    assert torch.equal(before_1[:, :, same], after_1[:, :, same])
    assert not torch.equal(before_1[:, :, other], after_1[:, :, other])


def test_a_batch_depends_on_text_seed_and_step_alone():
    """Made ahead, or asked for out of order: the same; of another step or seed: others."""
    loader, again, other = (main.prepare([*SMALL, "--seed", seed]).loader for seed in "334")
    ordered = [loader.batch(step) for step in range(6)]
    first, next_pass = ordered[5], loader.batch(5 + PASS_LEN)
    assert equal(first, again.batch(5)) and not equal(first, other.batch(5))
    assert torch.equal(first["inp_k"][:256], next_pass["inp_k"][:256])  # the same text
    assert not torch.equal(first["rank"], next_pass["rank"])  # in another order
    ahead = list(data_utils.prefetch(again, range(2, 6), torch.device("cpu")))
    assert len(ahead) == 4 and all(map(equal, ahead, ordered[2:]))


# ---------------------------------------------------------------- updates


def test_accumulation_is_the_mean_of_windows(monkeypatch):
    """Two windows with --grad_accum_steps 2 make one update, with the mean of their gradients; clip bounds its norm."""
    gradients = []
    step = torch.optim.AdamW.step

    def spy(optimizer):
        gradients.append(torch.cat([p.grad.flatten() for group in optimizer.param_groups for p in group["params"]]))
        return step(optimizer)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    words = [*SMALL, "--learning_rate", "0"]
    main.main([*words, "--clip", "0", "--train_steps", "2"])
    main.main([*words, "--clip", "0", "--train_steps", "1", "--grad_accum_steps", "2"])
    torch.testing.assert_close(gradients[2], (gradients[0] + gradients[1]) / 2)
    metrics = main.main([*words, "--clip", "0.001", "--train_steps", "1"])
    assert gradients[3].norm() == pytest.approx(0.001, rel=1e-3)
    # what is reported is the norm before clipping; 1e-5: a sum in another order
    assert metrics["gradient_norm"] == pytest.approx(gradients[0].norm().item(), rel=1e-5)


@pytest.mark.parametrize("words, n_rates", [("", 6), ("--grad_accum_steps 2", 3), ("--grad_accum_steps 4", 1)])
def test_each_update_has_the_rate_of_the_schedule(monkeypatch, words, n_rates):
    """Rates count updates, not steps: of the whole run, which --num_step or --train_steps ends."""
    used = []
    step = torch.optim.AdamW.step

    def spy(optimizer):
        used.append([group["lr"] for group in optimizer.param_groups])
        return step(optimizer)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    schedule = "--learning_rate 8e-3 --warmup_steps 1 --decay_method poly --min_lr_ratio 0.5"
    with training(*SMALL, *schedule.split(), "--train_steps", str(n_rates), *words.split()) as (run, steps):
        reported = [metrics["learning_rate"] for metrics in steps if "learning_rate" in metrics]
    expected = [main.get_lr(update, run.args, n_rates) for update in range(n_rates)]
    assert reported == expected and used == [[rate, rate] for rate in expected]


@pytest.mark.parametrize(
    "words, expected",
    [
        ("--learning_rate 8 --decay_method constant --warmup_steps 0", [8, 8, 8, 8, 8, 8]),
        ("--learning_rate 8 --decay_method constant --warmup_steps 4", [2, 4, 6, 8, 8, 8]),
        ("--learning_rate 8 --decay_method poly --warmup_steps 0", [8, 6.4, 4.8, 3.2, 1.6, 0]),
        ("--learning_rate 8 --decay_method poly --warmup_steps 2", [4, 8, 8, 16 / 3, 8 / 3, 0]),
        ("--learning_rate 8 --decay_method poly --warmup_steps 0 --min_lr_ratio 0.5", [8, 7.2, 6.4, 5.6, 4.8, 4]),
        ("--learning_rate 8 --decay_method cos --warmup_steps 1", [8, 8, 6.828427, 4, 1.171573, 0]),
        ("--learning_rate 8 --decay_method cos --warmup_steps 9", [8 / 9, 16 / 9, 24 / 9, 32 / 9, 40 / 9, 48 / 9]),
    ],
)
def test_schedules(words, expected):
    """Six updates of each schedule, written out."""
    args = flags.parse(words.split())
    assert [main.get_lr(update, args, 6) for update in range(6)] == pytest.approx(expected, abs=1e-6)


def test_parameter_groups_cover_everything_once():
    """No decay on biases, r_w_bias and its kin, and LayerNorm; decay on the rest; AdamW's epsilon is the flag's."""
    model = XLNet(50, n_layer=1)
    args = flags.parse(["--weight_decay", "0.02", "--adam_epsilon", "1e-6"])
    decayed, not_decayed = main.make_optimizer(model, args).param_groups
    assert (decayed["weight_decay"], not_decayed["weight_decay"]) == (0.02, 0)
    assert decayed["eps"] == not_decayed["eps"] == 1e-6
    name = {id(p): n for n, p in model.named_parameters()}
    assert sorted(name[id(p)] for p in decayed["params"] + not_decayed["params"]) == sorted(name.values())
    assert sorted(name[id(p)].removeprefix("layer.0.") for p in not_decayed["params"]) == [
        "ff.layer_1.bias",
        "ff.layer_2.bias",
        "ff.layer_norm.bias",
        "ff.layer_norm.weight",
        "lm_loss.bias",
        "rel_attn.layer_norm.bias",
        "rel_attn.layer_norm.weight",
        "rel_attn.r_r_bias",
        "rel_attn.r_s_bias",
        "rel_attn.r_w_bias",
    ]


# ---------------------------------------------------------------- numbers that are not finite


@pytest.mark.parametrize("words", [slow(""), "--grad_accum_steps 4"])  # step 22 with an update, and without
def test_a_loss_that_is_not_finite_stops_before_the_update(tmp_path, monkeypatch, capsys, words):
    """One line with the step and the window, status 1, the last good checkpoint kept; weights stay finite."""
    prediction_loss, calls = main.prediction_loss, []

    def spoil(*inputs):
        calls.append(1)
        return prediction_loss(*inputs) * (float("nan") if len(calls) == 22 else 1)

    monkeypatch.setattr(main, "prediction_loss", spoil)
    monkeypatch.setattr(report, "draw_loss", lambda output_dir: None)  # it would take most of the time
    out = tmp_path / "out"
    command = [*SMALL, "--output_dir", str(out), "--num_step", "3", "--save_steps", "5", *words.split()]
    with pytest.raises(SystemExit) as stop:
        main.main(command)
    [line] = capsys.readouterr().err.splitlines()
    assert stop.value.code == 1 and "loss of step 22, step 8 of epoch 2, is nan" in line
    assert main.checkpoint.checkpoints(out)[0] == out / "checkpoint-20"
    weights = XLNet.from_pretrained(out / "checkpoint-20").state_dict()
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())


def test_a_validation_loss_that_is_not_finite_stops(tmp_path, monkeypatch, capsys, valid):
    """One line and status 1: a run whose model is lost does not end as if all were well."""
    monkeypatch.setattr(main, "evaluate", lambda *args: math.nan)
    with pytest.raises(SystemExit) as stop:
        main.main([*SMALL, *valid, "--train_steps", "6", "--eval_steps", "3"])
    out, err = capsys.readouterr()
    assert stop.value.code == 1 and out.count("Number of Epoch") == 3
    assert err.startswith("main.py: the validation loss after step 3 is nan; start anew") and err.count("\n") == 1


@pytest.mark.parametrize("spoilt", ["loss", "norm of the gradient"])
def test_an_update_that_is_not_finite_changes_nothing(monkeypatch, spoilt):
    """The loss is infinite, or its gradient alone overflows: weights and AdamW's state stay as they were."""
    optimizers = []
    make_optimizer, prediction_loss = main.make_optimizer, main.prediction_loss

    def keep_optimizer(model, args):
        optimizers.append(make_optimizer(model, args))
        return optimizers[-1]

    def spoil(*inputs):
        loss = prediction_loss(*inputs)
        if spoilt == "loss":
            return loss + float("inf")  # its gradient is finite
        return loss + 0 * (run.model.mask_emb * 0).sqrt().sum()  # 0, whose derivative is 0 * infinity

    monkeypatch.setattr(main, "make_optimizer", keep_optimizer)
    with training(*SMALL) as (run, steps):
        next(steps)
        [optimizer] = optimizers

        def state():
            moments = [tensor for each in optimizer.state.values() for tensor in each.values()]
            return [tensor.clone() for tensor in [*run.model.parameters(), *moments]]

        before = state()
        monkeypatch.setattr(main, "prediction_loss", spoil)
        with pytest.raises(main.NotFinite, match=f"the {spoilt} of step 2, step 2 of epoch 1, is (inf|nan); stopped"):
            next(steps)
        assert all(map(torch.equal, before, state()))


# ---------------------------------------------------------------- validation


@pytest.fixture
def valid(tmp_path):
    """A validation text of 16 windows of 32 tokens."""
    lines = (ROOT / "data.txt").read_text().splitlines()
    (tmp_path / "valid.txt").write_text("\n".join(lines[100:112]) + "\n")
    return ["--valid", str(tmp_path / "valid.txt"), *TINY]


def test_validation_is_the_same_for_the_same_model(capsys, valid):
    """Evaluations agree to the last bit, whatever was trained between; they do not change the training."""

    def lines(*words):
        main.main([*SMALL, *TINY, *DROPOUT, "--train_steps", "6", *words])
        first, *lines, _, _ = capsys.readouterr().out.splitlines()
        return lines

    rated = lines(*valid, "--learning_rate", "0", "--eval_steps", "2")
    losses = [line for line in rated if line.startswith("Validation")]
    assert len(losses) == 3 and len(set(losses)) == 1
    assert ["Validation" in line for line in rated] == [False, False, True] * 3

    rated = lines(*valid, "--eval_steps", "1", "--seed", "4")
    plain = lines("--seed", "4")
    assert [line for line in rated if not line.startswith("Validation")] == plain
    loss, perplexity = re.match(r"Validation loss = (\S+) perplexity = (\S+)", rated[-1]).groups()
    assert float(perplexity) == pytest.approx(np.exp(float(loss)), rel=1e-4)  # printed to two decimals


def test_evaluation_has_its_own_interval_and_the_end(capsys, valid):
    """After every --eval_steps steps, a pass by default, and after the last step."""
    for words, expected in ("--eval_steps 4", [4, 8, 10]), ("", [10]):
        main.main([*SMALL, *valid, "--train_steps", "10", *words.split()])
        steps, evaluated = 0, []
        for line in capsys.readouterr().out.splitlines():
            steps += line.startswith("Number of Epoch")
            if line.startswith("Validation"):
                evaluated.append(steps)
        assert evaluated == expected


@pytest.mark.parametrize("words, n_rows", [("", 1), ("--batch_size 4 --bi_data True --rows 4", 2)])
def test_validation_is_the_mean_over_all_targets(valid, words, n_rows):
    """Of every window, with memory and without dropout, as a loop over windows and rows has it, mask written out."""
    run = main.prepare([*SMALL, *valid, *DROPOUT, "--train_steps", "1", *words.split()])
    text = corpus.load_text("valid", [run.args.valid], run.args.cache_dir, run.tokenizer, run.vocab)
    [rows] = data_utils.batchify(text.ids, text.cuts, n_rows, n_rows, run.args.bi_data)
    windows = data_utils.n_windows(len(rows[0].ids), 32, 16)
    assert windows > 3
    model = run.model.eval()
    losses, memory = [], None
    for window in range(windows):
        examples = []
        for place, row in enumerate(rows):
            rng = np.random.default_rng([0, window, place])
            feature = data_utils.create_feature(row, window, run.vocab, 32, 16, 6, 6, 1, rng)
            examples.append(data_utils.make_permute(feature, 16, 32, 8, 6, rng))
        batch = {name: torch.stack([example[name] for example in examples], -1) for name in examples[0]}
        target, target_mask = batch.pop("target"), batch.pop("target_mask")
        logits, memory = model(**batch, mems=memory)
        nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none")
        losses += nll[target_mask.flatten() > 0].tolist()
    loss = main.evaluate(model.train(), run.valid_loader, run.device)
    assert model.training and loss == pytest.approx(np.mean(losses), rel=1e-5)  # float32, summed in another order


@pytest.fixture
def documents(tmp_path):
    """A text of ten documents, whose sentences begin with the number of their document."""
    sentences = (ROOT / "data.txt").read_text().replace("\n\n", "\n").split("\n")[:100]
    texts = ["\n".join(f"{n} {sentence}" for sentence in sentences[10 * n : 10 * n + 10]) for n in range(10)]
    (tmp_path / "text.txt").write_text("\n\n".join(texts) + "\n")
    return tmp_path / "text.txt"


def test_a_share_of_the_text_is_held_out(documents, tmp_path, capsys):
    """The last two documents: no batch of training reads them, evaluation reads them as a text of their own."""
    argv = [*SMALL, *TINY, "--data", str(documents)]
    run = main.prepare([*argv, "--valid", "0.2"])
    whole = main.prepare(argv)
    n_training, n_valid = len(run.text.ids), len(run.valid_text.ids)
    assert n_training + n_valid == len(whole.text.ids)
    assert run.tokenizer.convert_ids_to_tokens([run.valid_text.ids[0]]) == ["8"]
    [training_row], [valid_row] = run.loader.turns[0], run.valid_loader.turns[0]
    assert np.array_equal(training_row.ids, whole.text.ids[:n_training])
    assert np.array_equal(valid_row.ids, whole.text.ids[n_training:])

    begin, end = tmp_path / "begin.txt", tmp_path / "end.txt"
    parts = documents.read_text().split("\n\n")
    begin.write_text("\n\n".join(parts[:8]))
    end.write_text("\n\n".join(parts[8:]))
    by_share = main.main([*argv, "--valid", "0.2", "--train_steps", "3"])
    first = capsys.readouterr().out.splitlines()[0]
    assert f" {n_training:,} tokens" in first and first.endswith(f"; validation: {n_valid:,} tokens")
    by_files = main.main([*SMALL, *TINY, "--data", str(begin), "--valid", str(end), "--train_steps", "3"])
    assert by_share["validation_loss"] == by_files["validation_loss"] and by_share["loss"] == by_files["loss"]


def test_a_share_far_from_the_one_asked_for_is_told(documents, capsys):
    """Documents are whole: of ten, a hundredth is a tenth, and a line says so."""
    main.prepare([*SMALL, *TINY, "--data", str(documents), "--valid", "0.1"])
    assert capsys.readouterr().err == ""
    main.prepare([*SMALL, *TINY, "--data", str(documents), "--valid", "0.01"])
    [line] = capsys.readouterr().err.splitlines()
    assert re.search(r"--valid 0.01: documents are whole, so 0\.1\d* of the text is held out", line)


def test_another_share_is_another_text(documents, tmp_path, capsys):
    """A resumed run keeps its share; with another one it would train on what it was judged on."""
    folder = ["--output_dir", str(tmp_path / "out")]
    main.main([*SMALL, *TINY, "--data", str(documents), "--valid", "0.2", *folder, "--train_steps", "2"])
    resume = [*folder, "--resume", "--train_steps", "4"]
    for words in ["--valid", "0.3"], ["--valid", str(documents)]:
        with pytest.raises(UserError, match="the text has changed since the run began, or the share of it"):
            main.prepare([*resume, *words])
    assert main.main(resume)["step"] == 4


def test_evaluating_alone(documents, tmp_path, capsys, monkeypatch):
    """--eval_only prints the loss that training ended with, of a run or a model, and writes nothing."""
    out = tmp_path / "out"
    texts = [*TINY, "--data", str(documents), "--valid", "0.2"]
    words = ["--output_dir", str(out), "--train_steps", "5", "--batch_size", "2", "--rows", "2"]
    trained = main.main([*SMALL, *texts, *words])
    before = sorted((path, path.stat().st_mtime_ns) for path in out.rglob("*") if path.name != ".lock")
    capsys.readouterr()
    monkeypatch.setattr(main.checkpoint, "open_output_dir", None)  # another process may train there meanwhile
    for words in (
        ["--resume", str(out), "--eval_only"],
        [*texts, "--init_checkpoint", str(out), "--eval_only"],
        ["--data", str(documents), "--valid", "0.2", "--init_checkpoint", str(out), "--eval_only"],  # lengths are saved
        [*texts, "--init_checkpoint", str(out), "--eval_only", "--batch_size", "3"],
    ):
        result = main.main(words)
        lines = capsys.readouterr().out.splitlines()
        assert result["validation_loss"] == pytest.approx(trained["validation_loss"], abs=1e-6)
        assert len(lines) == 2 and re.search(r"; 0.2 of --data: \d+ tokens, .* unigram entropy [\d.]+$", lines[0])
        assert lines[1].startswith(f"Validation loss = {result['validation_loss']:.6f}")
    assert before == sorted((path, path.stat().st_mtime_ns) for path in out.rglob("*") if path.name != ".lock")


def test_evaluating_alone_needs_no_training_text(documents, tmp_path):
    """--eval_only neither reads --data nor needs as many windows in it as --batch_size; the loss is the same."""
    out = tmp_path / "out"
    trained = main.main([*SMALL, *TINY, "--valid", str(documents), "--output_dir", str(out), "--train_steps", "2"])
    words = ["--init_checkpoint", str(out), "--valid", str(documents), "--eval_only", "--batch_size", "99"]
    result = main.main([*words, "--data", str(tmp_path / "no such text"), "--grad_accum_steps", "999"])
    assert result["validation_loss"] == pytest.approx(trained["validation_loss"], abs=1e-6)


def test_stopping_an_evaluation(documents, tmp_path, monkeypatch, capsys):
    """A signal during --eval_only gives one line, which names no step and no folder."""
    out = tmp_path / "out"
    texts = [*TINY, "--data", str(documents), "--valid", "0.2"]
    main.main([*SMALL, *texts, "--output_dir", str(out), "--train_steps", "2"])
    monkeypatch.setattr(main, "evaluate", lambda *inputs: signal.raise_signal(signal.SIGTERM))
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main.main(["--resume", str(out), "--eval_only"])
    assert stop.value.code == 128 + signal.SIGTERM
    assert capsys.readouterr().err == "main.py: stopped before the evaluation was complete\n"


@pytest.mark.parametrize("name, value", [("perm_size", 0), ("perm_size", -8), ("seq_len", 0), ("num_predict", 2**40)])
def test_wrong_lengths_of_a_checkpoint_are_named(documents, tmp_path, name, value):
    """With the entry of config.json; with --seq_len the lengths come from the flags, and the model can be used."""
    out = tmp_path / "out"
    main.main([*SMALL, *TINY, "--data", str(documents), "--output_dir", str(out), "--train_steps", "2"])
    config = out / "checkpoint-2" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {name: value}))
    words = ["--data", str(documents), "--init_checkpoint", str(out / "checkpoint-2")]
    with pytest.raises(UserError, match=f"config.json sets {name} to {value}, .*; give --seq_len"):
        main.prepare(words)
    assert main.prepare([*words, "--seq_len", "32"]).args.perm_size == 16


def test_a_trained_model_is_evaluated_before_it_goes_on(documents, tmp_path, capsys):
    """--init_checkpoint takes the newest checkpoint of a run's folder, its dropout too; a flag given wins."""
    out = tmp_path / "out"
    argv = [*TINY, "--data", str(documents), "--valid", "0.2"]
    words = ["--output_dir", str(out), "--train_steps", "4", "--save_steps", "2"]
    trained = main.main([*SMALL, *argv, *words, "--dropout", "0.2", "--dropatt", "0.3"])
    capsys.readouterr()
    main.main([*argv, "--init_checkpoint", str(out), "--train_steps", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert ["Validation" in line for line in lines] == [False, True, False, False, True, False, False]
    assert float(lines[1].split()[3]) == pytest.approx(trained["validation_loss"], abs=1e-6)
    args = main.prepare([*argv, "--init_checkpoint", str(out)]).args
    assert (args.dropout, args.dropatt, args.learning_rate) == (0.2, 0.3, 1e-3)
    assert main.prepare([*argv, "--init_checkpoint", str(out), "--dropout", "0"]).args.dropout == 0.0
    own = ["--data", str(documents), "--init_checkpoint", str(out)]
    lengths = [vars(main.prepare([*own, *words]).args)[name] for words in ([], ["--seq_len", "64"]) for name in LENGTHS]
    assert lengths == [32, 16, 8, 6, 24] + [64, 32, 32, 10, 48]


def test_a_run_says_where_it_comes_from_and_where_it_goes(tmp_path, capsys):
    """The checkpoint it goes on from; at the end the folder of the model, or the flag that saves it."""
    out = tmp_path / "out"
    main.main([*SMALL, *TINY, "--train_steps", "2", "--output_dir", str(out)])
    assert capsys.readouterr().out.splitlines()[-1] == f"The model is in {out}/checkpoint-2"
    main.main(["--resume", str(out), "--train_steps", "3"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == f"Resuming from {out}/checkpoint-2, after step 2 of 3"
    main.main(["--resume", str(out)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "The run is complete; a larger --num_step or --train_steps continues it" and len(lines) == 5
    main.main([*SMALL, *TINY, "--train_steps", "1"])
    assert capsys.readouterr().out.splitlines()[-1] == "Nothing is saved; --output_dir saves the model in a folder"


@pytest.mark.parametrize(
    "pass_len, valid_len, words, expected",
    [
        (14, 3, "", (14, 14)),
        (10_000, 3, "", (1000, 1000)),
        (100_000, 2000, "", (1000, 10_000)),
        (3000, 2000, "", (1000, 3000)),
        (10_000, None, "", (1000, 1000)),
        (10_000, 3, "--save_steps 7 --eval_steps 9", (7, 9)),
    ],
)
def test_intervals_suit_a_page_and_a_corpus(pass_len, valid_len, words, expected):
    """A pass, but at most a thousand steps; an evaluation that takes long is made less often."""
    args = flags.parse(["--output_dir", "out", "--valid", "valid.txt", *words.split()])
    valid_loader = None if valid_len is None else SimpleNamespace(pass_len=valid_len)
    run = SimpleNamespace(args=args, loader=SimpleNamespace(pass_len=pass_len), valid_loader=valid_loader)
    assert main.intervals(run) == expected


def test_an_accelerator_without_a_skipping_adamw(monkeypatch):
    """Where the fused AdamW does not skip an update, the loop does: nothing changes before the run stops."""
    monkeypatch.setattr(main.processes, "fused_adamw_skips", lambda device: False)
    prediction_loss = main.prediction_loss
    with training(*SMALL, *TINY, "--train_steps", "3") as (run, steps):
        next(steps)
        before = {name: weight.clone() for name, weight in run.model.state_dict().items()}
        monkeypatch.setattr(main, "prediction_loss", lambda *args: prediction_loss(*args) * math.nan)
        with pytest.raises(main.NotFinite):
            next(steps)
        assert equal(before, run.model.state_dict())


# ---------------------------------------------------------------- signals and ends

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
POSIX = pytest.mark.skipif(os.name == "nt", reason="Windows has other signals, shells and terminals")


@pytest.mark.parametrize("signum, status", [(each, 128 + each) for each in SIGNALS])
@pytest.mark.parametrize("save", [True, False])
def test_a_signal_finishes_the_step_and_saves(tmp_path, monkeypatch, capsys, signum, status, save):
    """One line that says where, the status of a process that the signal killed, and the signals' old handlers."""
    prediction_loss, calls = main.prediction_loss, []

    def interrupted(*inputs):
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signum)
        return prediction_loss(*inputs)

    monkeypatch.setattr(main, "prediction_loss", interrupted)
    handlers = [signal.getsignal(each) for each in SIGNALS]
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as stop:
        main.main([*SMALL, *(["--output_dir", str(out)] if save else [])])
    printed, err = capsys.readouterr()
    assert stop.value.code == status and printed.count("Number of Epoch") == 3
    saved = f"saved {out}/checkpoint-3; go on with --resume {out}" if save else "nothing is saved without --output_dir"
    assert err == f"main.py: stopped after step 3; {saved}\n"
    assert [signal.getsignal(each) for each in SIGNALS] == handlers
    if save:
        assert main.checkpoint.damaged_file(out / "checkpoint-3") is None


@POSIX
def test_nohup_is_heeded(monkeypatch):
    """A run that is to ignore SIGHUP goes on after one."""
    prediction_loss = main.prediction_loss

    def hang_up(*inputs):
        signal.raise_signal(signal.SIGHUP)
        return prediction_loss(*inputs)

    monkeypatch.setattr(main, "prediction_loss", hang_up)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert main.main([*SMALL, "--train_steps", "2"])["step"] == 2
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_ends_an_evaluation(tmp_path, monkeypatch, capsys, valid):
    """Between two of its 15 batches, without a validation line; the checkpoint is that of the step before it."""
    forward, evaluated = XLNet.forward, []

    def interrupt(model, *inputs, **named_inputs):
        if not model.training:
            evaluated.append(1)
            if len(evaluated) == 4:
                signal.raise_signal(signal.SIGTERM)
        return forward(model, *inputs, **named_inputs)

    monkeypatch.setattr(XLNet, "forward", interrupt)
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as stop:
        main.main([*SMALL, *valid, "--eval_steps", "2", "--output_dir", str(out)])
    assert stop.value.code == 143 and len(evaluated) == 4
    printed, err = capsys.readouterr()
    assert printed.count("Number of Epoch") == 2 and "Validation" not in printed
    assert "stopped after step 2; saved" in err and main.checkpoint.damaged_file(out / "checkpoint-2") is None


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 9 TiB"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 TiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 TiB\nand a stack"),
    ],
)
def test_no_memory_gets_one_line(monkeypatch, capsys, error):
    """Status 1, and what to lower."""

    def fail(*inputs):
        raise error

    monkeypatch.setattr(main, "prediction_loss", fail)
    with pytest.raises(SystemExit) as stop:
        main.main(SMALL)
    [line] = capsys.readouterr().err.splitlines()
    assert stop.value.code == 1 and "out of memory" in line and "9 TiB; lower --batch_size" in line


@POSIX
@pytest.mark.slow
def test_ctrl_c_in_a_terminal(tmp_path):
    """The process itself: a line, status 130, no traceback."""
    command = [sys.executable, ROOT / "main.py", *SMALL, "--num_step", "1000", "--output_dir", str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for _ in range(4):
        process.stdout.readline()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    step = 3 + out.count("Number of Epoch")
    assert process.returncode == 130
    out = tmp_path / "out"
    assert err == f"main.py: stopped after step {step}; saved {out}/checkpoint-{step}; go on with --resume {out}\n"


@POSIX
@pytest.mark.slow
def test_ctrl_c_during_imports(tmp_path):
    """No traceback, and the status of a program that Ctrl-C has killed."""
    (tmp_path / "torch.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "PYTHONSAFEPATH": "1"}
    command = [sys.executable, ROOT / "main.py"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stdout.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert (process.returncode, err) == (-signal.SIGINT, "")


@POSIX
@pytest.mark.slow
def test_a_second_signal_kills():
    """Where the step never ends: the first Ctrl-C waits for it, the second does not."""
    code = (
        "import main, time, sys; main.prediction_loss = lambda *args: print('in step', flush=True) or time.sleep(60); "
        "main.main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", code, *SMALL]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert any("in step" in line for line in process.stdout)
    process.send_signal(signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.3)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode == -signal.SIGINT


def test_ctrl_c_before_the_first_step(monkeypatch, capsys):
    """One line, status 130."""

    def interrupt(*inputs):
        raise KeyboardInterrupt

    monkeypatch.setattr(corpus, "read_text", interrupt)
    with pytest.raises(SystemExit) as stop:
        main.main([])
    err = capsys.readouterr().err
    assert stop.value.code == 130 and err.count("\n") == 1 and "nothing new is saved" in err


@POSIX
@pytest.mark.slow
def test_a_reader_that_leaves_is_no_error():
    """python main.py | head -2"""
    read, write = os.pipe()
    process = subprocess.Popen([sys.executable, ROOT / "main.py", *SMALL], stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    os.read(read, 1)
    os.close(read)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and err == b""


@POSIX
@pytest.mark.slow
def test_a_reader_that_leaves_stops_a_run_that_saves(tmp_path):
    """python main.py --output_dir out | head -2: as a signal does, with the status of SIGPIPE."""
    out = tmp_path / "out"
    command = [sys.executable, str(ROOT / "main.py"), *SMALL, "--num_step", "1000", "--output_dir", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(60) == 128 + 13
    [newest, *_] = main.checkpoint.checkpoints(out)
    assert err.endswith(f"saved {newest}; go on with --resume {newest.parent}\n") and err.count("\n") == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.slow
def test_a_full_disk_under_stdout_ends_no_run(tmp_path):
    """python main.py --output_dir out > log: one line on stderr, and the checkpoint is there."""
    command = [sys.executable, str(ROOT / "main.py"), *SMALL, "--train_steps", "3", "--output_dir", str(tmp_path)]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0 and (tmp_path / "checkpoint-3").is_dir()
    assert done.stderr == "main.py: stdout: No space left on device; no more lines are printed\n"


@pytest.mark.slow
def test_a_name_that_stdout_cannot_encode_is_escaped(tmp_path):
    """In the first line, where the terminal knows ASCII alone."""
    path = tmp_path / "caf\u00e9.txt"
    path.write_bytes((ROOT / "data.txt").read_bytes())
    command = [sys.executable, str(ROOT / "main.py"), *SMALL, "--train_steps", "1", "--data", str(path)]
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and done.stderr == "" and "; caf\\xe9.txt: 4,015 tokens" in done.stdout


@POSIX
@pytest.mark.slow
def test_a_closed_stderr_is_no_error():
    """python main.py 2>&-"""
    command = f"{sys.executable} {ROOT}/main.py {' '.join(SMALL)} --train_steps 2 2>&-"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.returncode == 0 and len(LINE.findall(done.stdout)) == 2


@POSIX
@pytest.mark.slow
def test_a_terminal_gets_a_progress_bar():
    """On a terminal stderr carries a bar and the cost lines stay whole."""
    import termios  # Windows has none

    leader, follower = os.openpty()
    termios.tcsetwinsize(follower, (24, 100))
    command = [sys.executable, ROOT / "main.py", *SMALL, "--train_steps", "20"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=follower)
    os.close(follower)
    shown = b""
    with contextlib.suppress(OSError):  # which says that the other end is closed
        while part := os.read(leader, 4096):
            shown += part
    out, _ = process.communicate(timeout=60)
    os.close(leader)
    assert b"/20 [" in shown and b"step" in shown
    assert len(LINE.findall(out.decode())) == 20


@pytest.mark.slow
def test_compile_without_a_compiler_gets_one_line(tmp_path):
    """Status 2, the flag and the remedy, no traceback."""
    environment = dict(os.environ, CXX=str(tmp_path / "g++"), TORCHINDUCTOR_CACHE_DIR=str(tmp_path))
    command = [sys.executable, ROOT / "main.py", *SMALL, "--n_layer", "1", "--device", "cpu", "--compile"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "Step cost" not in done.stdout
    assert "Traceback" not in done.stderr  # PyTorch may warn of itself before
    message = done.stderr.splitlines()[-1]
    assert message.startswith("main.py: error: --compile: ") and "leave it out" in message


def test_a_bug_shows_its_traceback(monkeypatch):
    """An error that is nobody's mistake is not caught."""
    monkeypatch.setattr(main, "get_lr", None)
    with pytest.raises(TypeError):
        main.main(SMALL)


# ---------------------------------------------------------------- a GPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("words", [[], ["--bf16"]])
def test_a_gpu_is_never_waited_for(words):
    """PyTorch raises an error where a step waits for the device."""
    with training("--device", "cuda", *words) as (_, steps):
        for _ in range(3):
            next(steps)
        torch.cuda.set_sync_debug_mode("error")
        try:
            metrics = [next(steps) for _ in range(3)]
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert all(5 < each["loss"].item() < 12 for each in metrics)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("words", [[], ["--bf16"]])
def test_a_gpu_trains_like_a_cpu(capsys, words):
    """200 steps, dropout off: the mean cost of the last 20 is within 1% of the CPU's in float32; lines in order."""
    means = []
    for device in (["--device", "cpu"], ["--device", "cuda", *words]):
        costs = run_command(capsys, *SHORT, "--rows", "1", "--train_steps", "200", *device)[2]
        assert [124 * (epoch - 1) + window for epoch, window, _ in costs] == list(range(1, 201))
        means.append(np.mean([cost for _, _, cost in costs[-20:]]))
    assert means[1] == pytest.approx(means[0], rel=0.01)


def test_a_run_sets_precision_and_keeps_freed_memory(monkeypatch):
    """On a CPU; the largest tensor of the default shape and window is that of the logits."""
    found = []
    monkeypatch.setattr(processes, "set_matmul_precision", found.append)
    monkeypatch.setattr(processes, "keep_freed_memory", found.append)
    main.prepare(["--device", "cpu"])
    assert found == [torch.device("cpu"), 4 * 85 * 30522]
