"""What a run tells: lines, metrics.csv, TensorBoard, a picture; and that a problem with a file does not end a run."""

import csv
import gc
import importlib.util
import itertools
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import main
from support import report
from support.report import COLUMNS, Reporter, open_metrics

ROOT = Path(main.__file__).parent
LINE = "Number of Epoch: {:04d} in {:04d} Step cost = {:.6f}"
needs_full_disk = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")


def make_reporter(output_dir=None, first_step=0, pass_loss=0.0, device="cpu", **more):
    """Return the reporter of a run of 10 steps, 3 of them a pass."""
    output_dir = None if output_dir is None else str(output_dir)
    return Reporter(first_step, pass_loss, 10, 3, 64, torch.device(device), output_dir, **more)


def report_steps(reporter, steps, wait=True):
    """Report steps whose loss is ten times their number, as tensors."""
    for step in steps:
        reporter.begin_step()
        metrics = {"pass": (step - 1) // 3 + 1, "step": step, "loss": torch.tensor(10.0 * step)}
        reporter.end_step(metrics | {"learning_rate": 0.5, "gradient_norm": torch.tensor(2.0)}, wait)


def read(folder):
    """Return the rows of metrics.csv, as text, without those of speed and memory."""
    with open(folder / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert all(list(row) == list(COLUMNS) for row in rows)
    for row in rows:
        for name in ("tokens_per_second", "data_wait", "peak_memory"):
            del row[name]
    return rows


# ---------------------------------------------------------------- lines


def test_a_line_a_step(capsys):
    """As the port printed it: passes and windows count from 1, a cost has six decimals."""
    report_steps(make_reporter(), range(1, 6))
    lines = capsys.readouterr().out.splitlines()
    assert lines == [LINE.format(*each) for each in [(1, 1, 10), (1, 2, 20), (1, 3, 30), (2, 1, 40), (2, 2, 50)]]
    assert lines[0] == "Number of Epoch: 0001 in 0001 Step cost = 10.000000"


def test_lines_of_several_steps(capsys, tmp_path):
    """Every third step has a line, with the mean loss of three; the last step too; metrics.csv has a row a step."""
    reporter = make_reporter(tmp_path, log_steps=3)
    report_steps(reporter, range(1, 11))
    reporter.close()
    lines = capsys.readouterr().out.splitlines()
    assert lines == [LINE.format(*each) for each in [(1, 3, 20), (2, 3, 50), (3, 3, 80), (4, 1, 100)]]
    assert len(read(tmp_path)) == 10


@pytest.mark.parametrize(
    "seconds, words", [(0.01, ""), (1.0, "16 minutes"), (60.0, "16.3 hours"), (3600.0, "980.0 hours")]
)
def test_a_long_run_says_how_long(monkeypatch, capsys, seconds, words):
    """After twenty steps of this start, on stderr; a short one says nothing."""
    clock = itertools.count(step=seconds)
    monkeypatch.setattr(report, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    reporter = Reporter(100, 0.0, 1100, 3, 64, torch.device("cpu"))
    report_steps(reporter, range(101, 131))
    err = capsys.readouterr().err
    assert err == (
        words
        and f"main.py: the other 980 steps will take about {words}; --num_step or --train_steps ends a run sooner\n"
    )


def test_speeds_are_means_of_the_recent_steps(monkeypatch):
    """Tokens a second of twenty steps, of which the first are slower than the later ones."""
    reporter = make_reporter()
    seconds = [3.0] * 10 + [1.0] * 20
    ends = list(itertools.accumulate(seconds))
    clock = itertools.chain.from_iterable(zip([0.0, *ends], ends, strict=False))  # begin and end of each step
    monkeypatch.setattr(report, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    speeds = []
    for step in range(1, 31):
        reporter.begin_step()
        [numbers] = reporter.end_step({"pass": 1, "step": step, "loss": 1.0})
        speeds.append(numbers["tokens_per_second"])
    assert (
        speeds[9] == pytest.approx(64 / 3) and speeds[19] == pytest.approx(64 / 2) and speeds[29] == pytest.approx(64)
    )


def test_the_memory_of_an_accelerator_is_told(monkeypatch):
    """In MB; of a CPU nothing is told."""
    monkeypatch.setattr(report, "peak_memory", lambda device: 123.0)
    assert make_reporter(device="mps").speed()["peak_memory"] == 123.0
    assert "peak_memory" not in make_reporter().speed()


def test_numbers_of_a_step_come_back(monkeypatch):
    """end_step returns plain numbers: tokens a second since begin_step, and the share of time that waited for data."""
    reporter = make_reporter()
    times = iter([100.0, 100.5, 101.5, 102.0])
    monkeypatch.setattr(report, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    reporter.begin_step()
    with reporter.waiting_for_data():
        pass
    [numbers] = reporter.end_step({"pass": 1, "step": 1, "loss": torch.tensor(2.5)})
    speed = {"tokens_per_second": 64 / 2, "data_wait": 0.5}
    assert numbers == {"pass": 1, "step": 1, "loss": 2.5, **speed}
    assert type(numbers["loss"]) is float and reporter.last == numbers


def test_validation_is_told_after_its_step(capsys):
    """Its perplexity is the exponential of the loss, in two decimals."""
    reporter = make_reporter()
    report_steps(reporter, [1])
    reporter.validation(2.0)
    assert capsys.readouterr().out.splitlines()[1] == "Validation loss = 2.000000 perplexity = 7.39"
    assert reporter.last["validation_loss"] == 2.0


def test_a_huge_validation_loss_is_told(capsys):
    """Its perplexity is infinite, and no error."""
    reporter = make_reporter()
    report_steps(reporter, [1])
    reporter.validation(1000.0)
    assert "Validation loss = 1000.000000 perplexity = inf" in capsys.readouterr().out


def test_the_loss_of_a_pass_is_added_up(capsys):
    """From the sum at the start, when a run goes on within a pass; a new pass starts at 0."""
    reporter = make_reporter(first_step=1, pass_loss=7.0)
    sums = []
    for step in range(2, 6):
        report_steps(reporter, [step])
        sums.append(reporter.pass_loss)
    assert sums == [7 + 20, 7 + 20 + 30, 40, 40 + 50]


def test_one_process_alone_reports(capsys, tmp_path):
    """A silent reporter prints and writes nothing, and still knows its numbers."""
    reporter = make_reporter(tmp_path, tensorboard=True, silent=True)
    report_steps(reporter, [1, 2])
    reporter.validation(3.0)
    reporter.line("words")
    reporter.draw()
    reporter.close()
    assert capsys.readouterr() == ("", "") and list(tmp_path.iterdir()) == []
    assert reporter.pass_loss == 30 and reporter.last["validation_loss"] == 3.0


def test_a_gpu_is_one_step_ahead(monkeypatch, capsys):
    """A step is reported when the next one ends, or at once with `wait`; before each report its numbers arrive.

    A stand-in for the GPU's events says what is waited for.
    """
    waited = []

    class Event:
        def __init__(self, device):
            assert device == torch.device("cuda")

        def record(self):
            self.number = len(events)
            events.append(self)

        def synchronize(self):
            waited.append(self.number)

    events = []
    monkeypatch.setattr(torch, "Event", Event)
    reporter = make_reporter(device="cuda")
    printed = []
    for step, wait in (1, False), (2, False), (3, True), (4, False), (5, True):
        report_steps(reporter, [step], wait)
        printed.append([line[-9:] for line in capsys.readouterr().out.splitlines()])
        assert waited[-1:] != [step - 1] or wait  # a step is not waited for when it has just begun
    assert printed == [[], ["10.000000"], ["20.000000", "30.000000"], [], ["40.000000", "50.000000"]]
    assert set(waited) == {0, 1, 2, 3, 4}


# ---------------------------------------------------------------- metrics.csv


def test_a_row_a_step(tmp_path):
    """With the documented columns; what a step does not have is empty: rate and norm without an update, validation."""
    reporter = make_reporter(tmp_path)
    reporter.begin_step()
    reporter.end_step({"pass": 1, "step": 1, "loss": torch.tensor(10.0)})
    report_steps(reporter, [2])
    reporter.validation(3.5)
    report_steps(reporter, [3])
    reporter.close()
    cells = ("pass", "step", "loss", "learning_rate", "gradient_norm", "validation_loss")
    expected = [
        ["1", "1", "10.0", "", "", ""],
        ["1", "2", "20.0", "0.5", "2.0", "3.5"],
        ["1", "3", "30.0", "0.5", "2.0", ""],
    ]
    assert read(tmp_path) == [dict(zip(cells, row, strict=True)) for row in expected]


def test_a_row_is_written_with_the_next_step_or_a_flush(tmp_path):
    """The row of a step waits for its validation; a checkpoint flushes it, so metrics.csv lacks none of its steps."""
    reporter = make_reporter(tmp_path)
    report_steps(reporter, [1])
    assert read(tmp_path) == []
    report_steps(reporter, [2])
    assert [row["step"] for row in read(tmp_path)] == ["1"]
    reporter.flush()
    reporter.flush()
    assert [row["step"] for row in read(tmp_path)] == ["1", "2"]
    reporter.close()
    assert [row["step"] for row in read(tmp_path)] == ["1", "2"]


@pytest.mark.parametrize("step, kept", [(0, 0), (1, 1), (3, 3), (5, 5), (9, 5)])
def test_rows_of_later_steps_are_dropped(tmp_path, step, kept):
    """They are made again; a new run starts with no row. Rows that stay are the same to the letter."""
    reporter = make_reporter(tmp_path)
    report_steps(reporter, range(1, 6))
    reporter.close()
    before = (tmp_path / "metrics.csv").read_text().splitlines()
    open_metrics(tmp_path / "metrics.csv", step).close()
    assert (tmp_path / "metrics.csv").read_text().splitlines() == before[: 1 + kept]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


def test_metrics_that_are_gone_begin_anew(tmp_path):
    """A run goes on from a checkpoint without metrics.csv."""
    open_metrics(tmp_path / "metrics.csv", 5).close()
    assert read(tmp_path) == []


@pytest.mark.parametrize("end", ["1", "1,", "1,3", "1,3,30.0,0.5"])
def test_a_row_cut_short_ends_no_run(tmp_path, end):
    """A full disk may leave part of a row; a run goes on from a later step, and draws its picture."""
    reporter = make_reporter(tmp_path)
    report_steps(reporter, [1, 2])
    reporter.close()
    with open(tmp_path / "metrics.csv", "a") as file:
        file.write(end)
    reporter = make_reporter(tmp_path, first_step=4)
    report_steps(reporter, [5, 6])
    reporter.draw()
    reporter.close()
    steps = [row["step"] for row in read(tmp_path)]
    assert steps[:2] == ["1", "2"] and steps[-2:] == ["5", "6"]


HEADER = ",".join(COLUMNS)


@pytest.mark.parametrize(
    "content, steps",
    [
        (b"", []),
        (b"pass,st", []),
        (bytes(range(256)), []),
        (f"{HEADER}\r\n1,1,5.0,0.1,2.0,9.0,,,\r\n1,2,5.0,0.1,2.0,9.0,,,3.".encode(), [1]),  # no line end: torn
        (f"{HEADER}\r\n1,1,5.0,0.1,2.0,9.0,,,\r\n1,2,5.0,0.1\r\n1,3,5.0,,,9.0,,,\r\n".encode(), [1, 3]),
        (f"{HEADER}\r\n1,1,5.0,0.1,2.0,9.0,,,\r\n\x00\x00\x00\n\n1,3,5.0,x,,9.0,,,\r\n".encode(), [1]),
        (f"{HEADER[4:]}\r\n1,1,5.0,0.1,2.0,9.0,,,\r\n".encode(), [1]),  # the first line is damaged, the rows are not
        (b"pass,step,loss,memory\n1,1,5.0,7\n1,2,5.0,8\n", [1, 2]),  # of another version
    ],
)
def test_damaged_metrics_end_no_run(tmp_path, capsys, content, steps):
    """Whole rows stay, torn ones are dropped; a run goes on from a later step, and draws its picture."""
    (tmp_path / "metrics.csv").write_bytes(content)
    reporter = make_reporter(tmp_path, first_step=4)
    report_steps(reporter, [5])
    (tmp_path / "loss.png").unlink(missing_ok=True)
    reporter.draw()
    reporter.close()
    assert [int(row["step"]) for row in read(tmp_path)] == [*steps, 5]
    assert (tmp_path / "loss.png").exists() and capsys.readouterr().err == ""


@pytest.mark.skipif(os.name == "nt", reason="Windows does not let anyone remove a file that a run has open")
@pytest.mark.parametrize("harm", ["emptied", "removed", "replaced"])
def test_metrics_harmed_during_a_run_end_no_run(tmp_path, capsys, harm):
    """Lines and later rows go on; the picture shows what is left, or a line says why there is none."""
    reporter = make_reporter(tmp_path)
    report_steps(reporter, [1, 2])
    if harm == "emptied":
        (tmp_path / "metrics.csv").write_text("")
    else:
        (tmp_path / "metrics.csv").unlink()
    if harm == "replaced":
        (tmp_path / "metrics.csv").mkdir()
    reporter.draw()
    report_steps(reporter, [3])
    reporter.draw()
    reporter.close()
    out, err = capsys.readouterr()
    assert out.count("Number of Epoch") == 3
    assert all("loss.png: " in line for line in err.splitlines())


@pytest.mark.parametrize(
    "name, obstacle", [("metrics.csv", "folder"), pytest.param("metrics.tmp", "full disk", marks=needs_full_disk)]
)
def test_metrics_that_cannot_be_opened_end_no_run(tmp_path, capsys, name, obstacle):
    """One line on stderr; lines on stdout are there all the same."""
    if obstacle == "folder":
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).symlink_to("/dev/full")
    reporter = make_reporter(tmp_path)
    report_steps(reporter, [1, 2])
    reporter.draw()
    reporter.close()
    out, err = capsys.readouterr()
    assert out.count("Number of Epoch") == 2
    assert err.startswith("main.py: ") and err.count("\n") == 1 and "metrics" in err


@needs_full_disk
def test_metrics_that_cannot_be_written_end_no_run(tmp_path, capsys):
    """One line on stderr with the reason; lines on stdout go on, and so do checkpoints and their picture."""
    reporter = make_reporter(tmp_path)
    reporter.file.close()
    reporter.file = open("/dev/full", "w")
    report_steps(reporter, range(1, 6))
    reporter.draw()
    reporter.close()
    out, err = capsys.readouterr()
    assert out.count("Number of Epoch") == 5
    assert err == "main.py: /dev/full: No space left on device; no more rows are written\n"


# ---------------------------------------------------------------- pictures and events


def test_a_picture_of_any_number_of_steps(tmp_path):
    """loss.png is drawn anew each time, from the first step on, with and without validation."""
    reporter = make_reporter(tmp_path)
    pictures = set()
    for step in (1, 2, 3):
        report_steps(reporter, [step])
        if step > 1:
            reporter.validation(3.0)
        reporter.draw()
        pictures.add((tmp_path / "loss.png").read_bytes())
    reporter.close()
    assert len(pictures) == 3 and all(picture[:4] == b"\x89PNG" for picture in pictures)


def test_pictures_take_little_of_a_run(tmp_path, monkeypatch):
    """loss.png is drawn at the first save, then once in ten seconds at most; the end draws it only if it is stale."""
    drawn = []
    monkeypatch.setattr(report, "draw_loss", drawn.append)
    for times, expected, at_end in (([1.0, 2.0, 10.9, 11.1, 15.0], [1, 1, 1, 2, 2], 3), ([1.0], [1], 1)):
        reporter = make_reporter(tmp_path)
        report_steps(reporter, [1])
        counts = []
        for now in times:
            monkeypatch.setattr(report.time, "perf_counter", lambda now=now: now)
            reporter.draw_if_due()
            counts.append(len(drawn))
        monkeypatch.undo()
        monkeypatch.setattr(report, "draw_loss", drawn.append)
        reporter.close()
        assert counts == expected and drawn == at_end * [tmp_path]
        drawn.clear()


def test_a_picture_leaves_nothing_in_memory(tmp_path):
    """Its parts refer to each other, and a run that draws at every save would grow until Python collects them."""
    reporter = make_reporter(tmp_path)
    report_steps(reporter, [1, 2])
    gc.disable()
    try:
        reporter.draw()
        left = [each for each in gc.get_objects() if type(each).__name__ in ("Figure", "Axes", "RendererAgg")]
    finally:
        gc.enable()
    reporter.close()
    assert (tmp_path / "loss.png").exists() and left == []


def test_no_picture_without_matplotlib(tmp_path, monkeypatch, capsys):
    """And no word about it: the rows are there."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    reporter = make_reporter(tmp_path)
    report_steps(reporter, [1])
    reporter.draw()
    reporter.close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"] and capsys.readouterr().err == ""


@needs_full_disk
def test_a_picture_that_cannot_be_written_ends_no_run(tmp_path):
    """On a full disk the run goes on without it."""
    (tmp_path / "loss.png").symlink_to("/dev/full")
    reporter = make_reporter(tmp_path)
    report_steps(reporter, [1])
    reporter.draw()
    report_steps(reporter, [2])
    reporter.close()
    assert len(read(tmp_path)) == 2


@pytest.mark.slow
def test_events_are_what_the_rows_are(tmp_path):
    """TensorBoard has each number under its column's name, at its step; a run that goes on purges what it repeats."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reporter = make_reporter(tmp_path, tensorboard=True)
    report_steps(reporter, range(1, 5))
    reporter.validation(3.5)
    reporter.close()
    reporter = make_reporter(tmp_path, first_step=2, tensorboard=True)
    report_steps(reporter, [3])
    reporter.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert set(events.Tags()["scalars"]) == set(COLUMNS[2:]) - {"peak_memory"}  # of a GPU
    assert [(each.step, each.value) for each in events.Scalars("loss")] == [(1, 10.0), (2, 20.0), (3, 30.0)]


def test_events_need_their_package(tmp_path, monkeypatch, capsys):
    """Without TensorBoard --tensorboard gets one line, status 2."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tensorboard" else find_spec(name))
    with pytest.raises(SystemExit) as stop:
        main.main(["--output_dir", str(tmp_path), "--tensorboard", "--train_steps", "1"])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and "pip install tensorboard" in err


# ---------------------------------------------------------------- a run


@pytest.mark.slow
def test_metrics_and_picture_of_a_run(tmp_path, capsys):
    """A row a step with the cost that is printed, the learning rate of the schedule, validation, and loss.png."""
    text = (ROOT / "data.txt").read_text()
    (tmp_path / "text.txt").write_text(text[:2000])
    (tmp_path / "valid.txt").write_text(text[5000:6000])
    out = tmp_path / "out"
    command = (
        f"--data {tmp_path}/text.txt --valid {tmp_path}/valid.txt --output_dir {out} --seq_len 32 --reuse_len 16 "
        "--perm_size 8 --num_predict 6 --n_layer 1 --d_model 8 --d_head 2 --num_step 2 --warmup_steps 4 --clip 0.5"
    )
    metrics = main.main(command.split())
    lines = capsys.readouterr().out.splitlines()
    rows = read(out)
    costs = [line.rsplit(" ", 1)[1] for line in lines if "Step cost" in line]
    assert [f"{float(row['loss']):.6f}" for row in rows] == costs
    assert [row["step"] for row in rows] == [str(step) for step in range(1, 1 + len(rows))]
    pass_len = len(rows) // 2
    assert [row["pass"] for row in rows] == ["1"] * pass_len + ["2"] * pass_len
    assert [float(row["learning_rate"]) for row in rows[:5]] == pytest.approx([1e-3, 2e-3, 3e-3, 4e-3, 4e-3])
    assert all(float(row["gradient_norm"]) > 0 for row in rows)
    assert [row["step"] for row in rows if row["validation_loss"]] == [str(pass_len), str(2 * pass_len)]
    assert metrics["validation_loss"] == float(rows[-1]["validation_loss"])
    assert metrics["loss"] == float(rows[-1]["loss"])
    assert (out / "loss.png").read_bytes()[:4] == b"\x89PNG"
