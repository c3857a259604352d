"""Pictures of a run for the documents: the live view at 80 and 140 columns, the report on a desk, on a phone and in the dark.

    python -m tools.pictures RUN [--out docs/pictures]

RUN is a run folder. The live view is drawn from its recorded events, as it was after two thirds of the updates; the report by
Chromium, which the system's package manager installs.
"""

from __future__ import annotations

import argparse
import io
import shutil
import subprocess
from pathlib import Path

from rich.console import Console

from oldlogits.record.event_log import read_events
from oldlogits.record.events import RunStarted, Updated
from oldlogits.record.folder import RunFolder
from oldlogits.record.live.view import LiveView
from oldlogits.record.report.page import write_report

WIDTHS = (80, 140)
LOOKS = {
    "desktop": (1280, 1500, ()),
    "phone": (500, 1500, ()),
    "dark": (1280, 1500, ("--blink-settings=preferredColorScheme=0",)),
}


def live(run: Path, width: int) -> str:
    """Return the live view of a run as SVG, `width` columns wide."""
    events = list(read_events(RunFolder(path=run).events))
    updates = [event for event in events if isinstance(event, Updated)]
    last = updates[2 * len(updates) // 3]
    with LiveView(total_updates=len(updates), title=f"oldlogits: {run.name}", console=Console(file=io.StringIO())) as view:
        for event in events:
            view.emit(event)
            if event is last:
                break
        metrics = [update.metrics for update in updates[: updates.index(last) + 1]]
        seconds = sum(one["time/update_s"] + one.get("time/between_s", 0.0) for one in metrics)
        view._progress.tasks[0].start_time = view._progress.get_time() - seconds
        console = Console(record=True, width=width, file=io.StringIO(), force_terminal=True)
        started = next(event for event in events if isinstance(event, RunStarted))
        console.print(view._panel())
    return console.export_svg(title=f"{started.variant}, {width} columns")


def report(page: Path, out: Path, look: str) -> None:
    """Draw the report's first screen."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        raise SystemExit("there is no Chromium: install the system's package chromium")
    width, height, flags = LOOKS[look]
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *flags]
    subprocess.run([*command, f"--window-size={width},{height}", f"--screenshot={out}", page.as_uri()], check=True)


def main() -> None:
    """Draw all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, default=Path("docs/pictures"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for width in WIDTHS:
        (options.out / f"live-{width}.svg").write_text(live(options.run, width), encoding="utf-8")
    page = write_report(options.run.absolute())
    for look in LOOKS:
        report(page, options.out / f"report-{look}.png", look)


if __name__ == "__main__":
    main()
