"""Report a run: lines on stdout, a progress bar, metrics.csv, TensorBoard events and loss.png.

A problem with metrics.csv or loss.png, or a full disk under stdout, is a warning and does not end the run.
"""

import contextlib
import csv
import errno
import gc
import math
import os
import statistics
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from tqdm import tqdm

from support import warn
from support.processes import peak_memory

COLUMNS = (
    "pass", "step", "loss", "learning_rate", "gradient_norm", "tokens_per_second", "data_wait", "peak_memory",
    "validation_loss",
)  # fmt: skip
RECENT = 20  # steps over which speeds are averaged
LONG = 600  # seconds; a longer run prints how long it will take
DRAW_INTERVAL = 10  # least seconds between two drawings of loss.png, which takes a third of a second


class Reporter:
    """Reports each step when its numbers have arrived.

    On cuda and xpu reports are one step late: the CPU prepares and reports while the GPU computes.

    first_step, last_step: steps done before this start, and in the whole run
    pass_loss: sum of the losses so far in the epoch that this start continues
    pass_len: steps of a pass over the text, which is an epoch; tokens_per_step: of the text, in all processes
    output_dir: folder of metrics.csv and loss.png, or None; tensorboard: write event files there too
    log_steps: steps per printed line, which shows their mean loss
    device: the device of the steps; silent: report nothing, in all processes but the first
    """

    def __init__(
        self,
        first_step: int,
        pass_loss: float,
        last_step: int,
        pass_len: int,
        tokens_per_step: int,
        device: torch.device,
        output_dir: str | None = None,
        tensorboard: bool = False,
        silent: bool = False,
        log_steps: int = 1,
    ):
        self.pass_len, self.tokens_per_step, self.silent = pass_len, tokens_per_step, silent
        self.first_step, self.last_step, self.log_steps = first_step, last_step, log_steps
        self.device = device
        self.lag = 1 if device.type in ("cuda", "xpu") else 0  # how many steps a report may be late
        self.began = time.perf_counter()  # when the step began
        self.waited = 0.0  # seconds that the step has waited for data
        self.recent: deque[tuple[float, float]] = deque(maxlen=RECENT)  # seconds of each step, and of its waiting
        self.unprinted: list[float] = []  # losses of the steps since the last line
        self.reader_is_gone = False  # nobody reads stdout any more
        self.waiting: list[tuple[dict[str, Any], torch.Event | None]] = []
        self.pass_loss = pass_loss  # sum of the losses of this pass
        self.last: dict[str, Any] = {}  # metrics of the last step reported
        # the row not yet in metrics.csv, the same dict as `last`: `validation` may still add its loss
        self.row: dict[str, Any] | None = None
        self.drawn_at = -math.inf  # when loss.png was drawn
        self.is_stale = False  # loss.png is older than the last checkpoint
        self.output_dir = None if silent else output_dir
        self.file = self.events = None
        if self.output_dir and tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # takes seconds, and only this flag needs the package

            self.events = SummaryWriter(self.output_dir, purge_step=first_step + 1)
        if self.output_dir:
            path = Path(self.output_dir) / "metrics.csv"
            try:
                self.file = open_metrics(path, first_step)
            except OSError as error:
                warn(f"{path}: {error.strerror}; no rows are written")
        self.progress = tqdm(
            initial=first_step, total=last_step, unit="step", leave=False, disable=True if silent else None
        )

    def begin_step(self) -> None:
        """Start the clock of a step."""
        self.began, self.waited = time.perf_counter(), 0.0

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Count the time of the with block as waiting for data."""
        began = time.perf_counter()
        yield
        self.waited += time.perf_counter() - began

    def end_step(self, metrics: dict[str, Any], wait: bool = False) -> list[dict[str, Any]]:
        """Take the metrics of a step (numbers and tensors), and report the steps that have arrived.

        On a GPU that is the previous step; with `wait` also this one.

        metrics: pass and step from 1, loss, and after an update learning_rate and gradient_norm
        -> the metrics of the steps reported now, as plain numbers
        """
        if self.waiting:  # so that a GPU is never more than one step behind
            self.waiting[-1][1].synchronize()
        metrics = metrics | self.speed()
        for name, value in metrics.items():
            if isinstance(value, torch.Tensor):
                metrics[name] = value.detach().to("cpu", non_blocking=self.lag > 0)
        arrived = None
        if self.lag:
            arrived = torch.Event(self.device)
            arrived.record()
        self.waiting.append((metrics, arrived))

        reported = []
        while len(self.waiting) > (0 if wait else self.lag):
            metrics, arrived = self.waiting.pop(0)
            if arrived is not None:
                arrived.synchronize()
            numbers = {
                name: float(value) if isinstance(value, torch.Tensor) else value for name, value in metrics.items()
            }
            self.report(numbers)
            reported.append(numbers)
        return reported

    def speed(self) -> dict[str, float]:
        """Return the speed metrics over the recent steps, up to this one; peak_memory is in MB."""
        self.recent.append((time.perf_counter() - self.began, self.waited))
        seconds, waited = (sum(column) for column in zip(*self.recent, strict=True))
        speed = {"tokens_per_second": len(self.recent) * self.tokens_per_step / seconds, "data_wait": waited / seconds}
        peak = None if self.device.type == "cpu" else peak_memory(self.device)
        return speed if peak is None else speed | {"peak_memory": peak}

    def report(self, metrics: dict[str, Any]) -> None:
        """Print the line of a step, and pass its numbers on to metrics.csv and TensorBoard."""
        self.flush()
        self.last = self.row = metrics
        step_of_epoch = (metrics["step"] - 1) % self.pass_len + 1
        if step_of_epoch == 1:
            self.pass_loss = 0.0
        self.pass_loss += metrics["loss"]
        self.unprinted.append(metrics["loss"])
        if metrics["step"] % self.log_steps == 0 or metrics["step"] == self.last_step:
            loss = statistics.fmean(self.unprinted)
            self.unprinted.clear()
            self.line(f"Number of Epoch: {metrics['pass']:04d} in {step_of_epoch:04d} Step cost = {loss:.6f}")
        self.progress.update()
        if metrics["step"] == self.first_step + RECENT:
            self.tell_duration()
        self.add_events(COLUMNS[2:])

    def tell_duration(self) -> None:
        """Print on stderr how long the rest of the run will take, if longer than LONG."""
        steps = self.last_step - self.last["step"]
        seconds = steps * sum(seconds for seconds, _ in self.recent) / RECENT
        if seconds > LONG and not self.silent:
            hours = f"{seconds / 3600:,.1f} hours" if seconds > 7200 else f"{seconds / 60:.0f} minutes"
            self.progress.clear()
            warn(f"the other {steps:,} steps will take about {hours}; --num_step or --train_steps ends a run sooner")

    def validation(self, loss: float) -> None:
        """Report the loss on the validation set after the last step reported, or before the first."""
        self.last["validation_loss"] = loss
        perplexity = torch.tensor(loss, dtype=torch.float64).exp()  # may be infinite
        self.line(f"Validation loss = {loss:.6f} perplexity = {perplexity:.2f}")
        self.add_events(("validation_loss",))

    def add_events(self, names: tuple[str, ...]) -> None:
        """Pass the named metrics of the last step on to TensorBoard."""
        if self.events:
            for name in names:
                if name in self.last:
                    self.events.add_scalar(name, self.last[name], self.last.get("step", self.first_step))

    def line(self, text: str) -> None:
        """Print a line to stdout, above the progress bar."""
        if not self.silent:
            with self.progress.external_write_mode():
                try:
                    print(text, flush=True)
                except OSError as error:
                    if error.errno in (errno.EPIPE, errno.EINVAL):  # python main.py | head; Windows says EINVAL
                        self.reader_is_gone = True
                    else:
                        warn(f"stdout: {error.strerror}; no more lines are printed")
                    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def flush(self) -> None:
        """Write the row of the last step reported to metrics.csv."""
        if self.file and self.row:
            try:
                csv.DictWriter(self.file, COLUMNS).writerow(self.row)
                self.file.flush()
            except OSError as error:
                warn(f"{self.file.name}: {error.strerror}; no more rows are written")
                with contextlib.suppress(OSError):  # closing writes what is left
                    self.file.close()
                self.file = None
        self.row = None

    def draw_if_due(self) -> None:
        """Draw loss.png unless that was DRAW_INTERVAL seconds ago or less; then a later call or `close` draws it."""
        self.is_stale = time.perf_counter() - self.drawn_at <= DRAW_INTERVAL
        if not self.is_stale:
            self.draw()

    def draw(self) -> None:
        """Draw loss.png from metrics.csv, where matplotlib is installed."""
        self.flush()
        if self.file:
            try:
                draw_loss(Path(self.output_dir))
            except OSError as error:
                warn(f"{self.output_dir}/loss.png: {error.strerror}; it is not drawn")
        self.drawn_at = time.perf_counter()

    def close(self) -> None:
        """End the progress bar, draw loss.png if it is stale, and close all files."""
        self.flush()
        if self.is_stale:
            self.draw()
        self.progress.close()
        if self.file:
            self.file.close()
        if self.events:
            self.events.close()


def open_metrics(path: Path, step: int) -> TextIO:
    """Return metrics.csv open for appending, without the rows of steps after `step`, which the run will repeat."""
    kept = [row for row in read_rows(path) if int(row["step"]) <= step] if step else []
    temporary = path.with_suffix(".tmp")
    with open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(kept)
    os.replace(temporary, path)
    return open(path, "a", newline="", encoding="utf-8")


def read_rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a metrics.csv, as text by COLUMNS.

    Skips torn rows: a crash, a full disk or an editor may have damaged the file. The file may have other columns, or be
    missing.
    """
    if not path.exists():
        return []
    header, *lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    names = header.split(",") if header.startswith("pass,step,loss") else COLUMNS
    rows = []
    for line in lines[:-1]:  # after the last line end there is nothing or a torn row
        cells = line.split(",")
        row = dict.fromkeys(COLUMNS, "") | dict(zip(names, cells, strict=False))
        if len(cells) == len(names) and is_whole(row):
            rows.append({name: row[name] for name in COLUMNS})
    return rows


def is_whole(row: dict[str, str]) -> bool:
    """Return whether a row has a pass, a step and a loss, and numbers in its other cells, which may be empty."""
    try:
        int(row["pass"]), int(row["step"]), float(row["loss"])
        [float(row[name]) for name in COLUMNS if row[name]]
        return True
    except ValueError:
        return False


def draw_loss(output_dir: Path) -> None:
    """Draw loss.png from metrics.csv: the loss of each step, its running mean, and validation."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    rows = read_rows(output_dir / "metrics.csv")
    if not rows:
        return
    names = ("step", "loss", "validation_loss")
    step, loss, validation = (np.array([float(row[name] or "nan") for row in rows]) for name in names)
    width = min(50, len(loss))  # steps of the running mean
    mean = np.convolve(loss, np.full(width, 1 / width), mode="valid")
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss, nats per predicted token")
    axes.plot(step, loss, color="0.8", linewidth=0.8, label="training, each step")
    axes.plot(step[width // 2 :][: len(mean)], mean, label=f"training, mean of {width} steps around")
    evaluated = np.isfinite(validation)
    if evaluated.any():
        axes.plot(step[evaluated], validation[evaluated], marker=".", label="validation")
    axes.legend()
    figure.savefig(output_dir / "loss.png", dpi=100)
    del figure, axes
    gc.collect()  # their parts refer to each other, and hold 50 MB until Python collects them
