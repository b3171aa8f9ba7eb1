"""`olmo watch`: a run while it is trained, in the terminal or as a page on this machine."""

from __future__ import annotations

import sys
import threading
import time
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from olmo.config import read_project_config
from olmo.inspect.run import suggest_runs
from olmo.report.html import compress, render
from olmo.report.run_page import RunPage
from olmo.report.runs import RunState, find_state, format_age
from olmo.report.series import (
    DATA_WAIT,
    HELDOUT,
    HELDOUT_ANSWERS,
    HELDOUT_BITS,
    LOSS,
    MEMORY,
    NORM,
    PACE,
    RATE,
    SPEED,
    MetricsFollower,
    Series,
    find_metrics,
    smooth,
    thin,
)
from olmo.runtime.log import describe_error, format_bytes, format_count, format_duration, log
from olmo.store.lease import held_names
from olmo.store.stage import current_store

NARROW, PLOT_ROWS = 110, 14  # columns for two plots side by side; rows of a plot
MARKS = (("braille", "gray"), ("hd", "blue"), ("hd", "red"))  # of curves, in order


def watch(run: str, /, page: bool = False, port: int = 0, interval: float = 2.0) -> None:
    """Show a run while it is trained: curves, speed, time left, memory, waiting for data.

    It reads what the run writes to its folder, on whatever machine that is, and ends with the run.
    A run that is killed and resumed is followed, too. With --page it serves the run's page on this
    machine only, which draws new metrics as they come.

    Args:
        run: name of a run
        page: serve a page, and print its address
        port: of the page; 0 for a free one
        interval: s between two looks

    Example:
        olmo watch olmo-tiny
        olmo watch olmo-tiny --page
    """
    if (state := look(run)).state == "not begun":
        if run in (read_project_config().get("runs") or {}):
            command = f"uv run snakemake checkpoints/{run}/final"
            raise ValueError(f"{run} has not begun; start it: {command}")
        raise ValueError(f"expected a run, found {run!r}; {suggest_runs(run)}")
    if page:
        if not 0 <= port < 1 << 16:
            raise ValueError(f"expected a --port from 0 to 65535, found {port}")
        serve(run, port)
    elif sys.stdout.isatty():
        follow(run, interval)
    else:
        metrics = MetricsFollower(partial(find_metrics, Path("checkpoints", run)))
        metrics.update()
        print("\n".join(frame(state, metrics.series, 80)))


def look(run: str) -> RunState:
    price = read_project_config().get("price") or {}
    return find_state(run, held_names(current_store().root / "leases"), price)


def follow(run: str, interval: float) -> None:
    """Redraw in place until the run is done, or Ctrl-C."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    metrics, console = MetricsFollower(partial(find_metrics, Path("checkpoints", run))), Console()
    with Live(console=console, auto_refresh=False) as live:
        while True:
            state = look(run)
            metrics.update()
            lines = frame(state, metrics.series, console.width)
            live.update(Text.from_ansi("\n".join(lines)), refresh=True)
            if state.state == "done":
                return
            time.sleep(interval)


def frame(state: RunState, series: dict[str, Series], width: int) -> list[str]:
    """The lines that show a run in a terminal of `width` columns."""
    last = {name: one.values[-1] for name, one in series.items()}
    is_tuned = HELDOUT_ANSWERS in series  # its training loss counts the questions, too
    heldout = HELDOUT_ANSWERS if is_tuned else HELDOUT
    memory = next((name for name in MEMORY if name in last), MEMORY[0])
    head = [f"{state.name}: {state.state}"]
    if state.step is not None:
        head.append(f"step {state.step:,}" + (f"/{state.steps:,}" if state.steps else ""))
    if (left := time_left(state, series)) is not None:
        head.append(f"{format_duration(left)} left")
    if state.last_change and state.state != "done":
        head.append(f"last step {format_age(time.time() - state.last_change)} ago")
    shown = {
        "loss on all tokens" if is_tuned else "loss": (LOSS, "{:.4f}".format),
        "held-out answers" if is_tuned else "held-out": (heldout, "{:.4f}".format),
        "bits/byte": (HELDOUT_BITS, "{:.4f}".format),
        "lr": (RATE, "{:.2e}".format),
        "grad norm": (NORM, "{:.2f}".format),
        "tokens/s/device": (SPEED, format_count),
        "waits for data": (DATA_WAIT, "{:.1%}".format),
        "memory": (memory, lambda megabytes: format_bytes(megabytes * 1e6)),
    }
    numbers = [f"{name} {write(last[key])}" for name, (key, write) in shown.items() if key in last]
    return [", ".join(head), *plots(series, heldout, width), *wrap(numbers, width)]


def time_left(state: RunState, series: dict[str, Series]) -> float | None:
    """s to the last step, at the speed of the last steps; None if that is not known."""
    is_known = state.state == "running" and state.steps and state.step is not None
    if not is_known or PACE not in series or not series[PACE].values[-1]:
        return None
    assert state.steps and state.step is not None
    return (state.steps - state.step) / series[PACE].values[-1]


def wrap(words: list[str], width: int) -> list[str]:
    """Words in lines of at most `width` columns."""
    lines = [""]
    for word in words:
        if lines[-1] and len(lines[-1]) + 2 + len(word) > width:
            lines.append("")
        lines[-1] += "  " * bool(lines[-1]) + word
    return lines


def plots(series: dict[str, Series], heldout: str, width: int) -> list[str]:
    """The loss, and where there are columns for it the speed beside it."""
    if LOSS not in series:
        return []
    noisy = series[LOSS]
    mean = Series("training, smoothed", noisy.steps, smooth(noisy.values))
    losses = [thin(noisy, width), thin(mean, width)]
    title = "loss: each step gray, smoothed blue"
    if heldout == HELDOUT_ANSWERS:
        title = title.replace("loss", "loss on all tokens")
    elif heldout in series:
        losses.append(series[heldout])
        title += ", held-out red"
    if width < NARROW or SPEED not in series:
        return plot(title, losses, width)
    left = plot(title, losses, 2 * width // 3)
    right = plot("tokens/s/device", [thin(series[SPEED], width)], width // 3)
    return [a + b for a, b in zip(left, right, strict=True)]


def plot(title: str, curves: list[Series], width: int) -> list[str]:
    """A plot of PLOT_ROWS lines with ANSI colors."""
    import plotext

    figure = plotext.figure
    figure.clear()
    figure.theme("colorless")
    figure.plot_size(width, PLOT_ROWS)
    figure.title(title)
    for curve, (code, color) in zip(curves, MARKS, strict=False):
        pairs = zip(curve.steps, curve.values, strict=True)
        finite = [(step, value) for step, value in pairs if value - value == 0]
        if finite:
            marker = plotext.marker(code, pixel=plotext.pixel(color))
            signal = figure.signal(*map(list, zip(*finite, strict=True)), marker=marker)
            signal.lines()
            figure.draw(signal)
    steps = [curve.steps[end] for curve in curves for end in (0, -1)]
    ticks = sorted({min(steps) + i * (max(steps) - min(steps)) // 4 for i in range(5)})
    figure.ruler("x").ticks(ticks, [f"{step:,}" for step in ticks])
    return str(figure.build()).splitlines()[:PLOT_ROWS]


def serve(run: str, port: int) -> None:
    """Serve the page of a run on this machine until Ctrl-C."""
    server = PageServer(run, port)
    print(f"http://127.0.0.1:{server.server_port}/   (Ctrl-C ends it)", flush=True)
    server.serve_forever()


class PageServer(ThreadingHTTPServer):
    """Two addresses, on loopback: / is the page, /data what its program draws."""

    daemon_threads = True

    def __init__(self, run: str, port: int = 0) -> None:
        self.page, self.lock = RunPage(run), threading.Lock()
        self.metrics = MetricsFollower(partial(find_metrics, self.page.folder))
        super().__init__(("127.0.0.1", port), PageHandler)

    def refresh(self) -> None:
        """Read what the run has written since the last time."""
        self.metrics.update()
        state = look(self.page.name)
        if state.state != self.page.state.state:  # with its end comes its record
            self.page = RunPage(self.page.name)
        self.page.series, self.page.state = self.metrics.series, state

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exc_info()[1]
        if isinstance(error, Exception) and not isinstance(error, ConnectionError):
            log.error(f"the page is not served: {describe_error(error)}")  # else a browser left

    def html(self) -> str:
        with self.lock:
            self.refresh()
            context = self.page.context() | {"is_live": True}
            return render("run.html", context, self.page.data(), is_live=True)

    def data(self, known: str | None) -> tuple[str, str | None]:
        """(version, data); no data for the version that is known."""
        with self.lock:
            self.refresh()
            version = f'"{self.metrics.version}-{self.page.state.state.replace(" ", "-")}"'
            if version == known:
                return version, None
            return version, compress(self.page.curves())


class PageHandler(BaseHTTPRequestHandler):
    server: PageServer

    def do_GET(self) -> None:
        # A page elsewhere whose name leads here (DNS rebinding) is refused.
        host = (self.headers.get("Host") or "").partition(":")[0]
        if host not in ("127.0.0.1", "localhost"):
            self.send_error(403, "expected a request to 127.0.0.1")
        elif self.path == "/":
            self.answer(self.server.html(), "text/html; charset=utf-8")
        elif self.path == "/data":
            version, data = self.server.data(self.headers.get("If-None-Match"))
            if data is None:
                self.send_response(304)
                self.end_headers()
            else:
                self.answer(data, "text/plain", {"ETag": version})
        else:
            self.send_error(404)

    def answer(self, text: str, kind: str, headers: dict[str, str] | None = None) -> None:
        body = text.encode()
        self.send_response(200)
        fields = {"Content-Type": kind, "Content-Length": str(len(body))}
        for name, value in (fields | {"Cache-Control": "no-store"} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass
