"""The report in a real browser, light, dark and narrow, and what can be known of its look without one."""

import re
import shutil
import struct
import subprocess
from importlib import resources

import pytest

from oldlogits.record.report.comparison import write_comparison
from oldlogits.record.report.page import write_report

from ..waiting import HUNG_S

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
CSS = resources.files("oldlogits.record.report").joinpath("templates/report.css").read_text(encoding="utf-8")


def palettes():
    """The colours of both schemes by name."""
    light, dark = re.findall(r":root \{(.*?)\}", CSS, flags=re.DOTALL)
    found = dict(re.findall(r"--(\w+): (#[0-9a-f]{6});", light))
    return {"light": found, "dark": found | dict(re.findall(r"--(\w+): (#[0-9a-f]{6});", dark))}


def luminance(colour):
    """WCAG 2.2, relative luminance."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def contrast(one, other):
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_contrast_is_that_of_the_standard_examples():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#767676", "#ffffff") == pytest.approx(4.54, abs=0.01)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_has_a_contrast_of_at_least_4_5(scheme):
    colours = palettes()[scheme]
    pairs = [(text, ground) for text in ("text", "muted", "good", "bad") for ground in ("page", "surface")]
    pairs += [("text", f"t{i}") for i in range(6)]
    pairs += [(f"c{i}", "surface") for i in range(4)]
    assert {
        pair: contrast(colours[pair[0]], colours[pair[1]]) for pair in pairs if contrast(*map(colours.get, pair)) < 4.5
    } == {}


def test_series_are_told_apart_without_colour():
    patterns = re.findall(r"\.line\.c(\d) \{ stroke-dasharray: ([\d ]+); \}", CSS)
    assert [number for number, _ in patterns] == ["1", "2", "3", "4"]
    assert len({pattern for _, pattern in patterns}) == 4


def test_every_picture_has_a_label_and_is_reached_by_the_keyboard(fake_run):
    page = write_report(fake_run(4)).read_text(encoding="utf-8")
    pictures = re.findall(r"<svg[^>]*>", page)
    assert pictures
    assert all('role="img"' in one and 'tabindex="0"' in one and re.search(r'aria-label="[^"]{10,}"', one) for one in pictures)


def test_verdict_and_curve_come_before_the_cards(fake_run):
    page = write_report(fake_run(4)).read_text(encoding="utf-8")
    assert page.index('class="verdict') < page.index("<h3>Reward</h3>") < page.index('class="cards"')


def picture(url, out, *, width, height, flags=()):
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *flags]
    command += [f"--window-size={width},{height}", f"--screenshot={out}", url]
    subprocess.run(command, check=True, capture_output=True, timeout=HUNG_S)
    data = out.read_bytes()
    return struct.unpack(">II", data[16:24]), len(data)


@pytest.mark.slow
@pytest.mark.skipif(
    CHROMIUM is None, reason="there is no Chromium on this machine: install chromium from the system's packages"
)
def test_a_browser_draws_the_report_and_the_comparison_in_every_scheme_and_width(fake_run, tmp_path):
    one = fake_run(6)
    other = shutil.copytree(one, one.with_name("other"))
    pages = {"report": write_report(one), "comparison": write_comparison([one, other], tmp_path / "comparison.html")}
    looks = {"light": (1280, 2000, ()), "phone": (420, 2000, ()), "dark": (1280, 2000, ("--force-dark-mode",))}
    sizes = {}
    for name, page in pages.items():
        for look, (width, height, flags) in looks.items():
            out = tmp_path / f"{name}-{look}.png"
            drawn, sizes[name, look] = picture(page.as_uri(), out, width=width, height=height, flags=flags)
            assert drawn == (width, height)
    blank = tmp_path / "blank.html"
    blank.write_text("<!doctype html><title>x</title>")
    _, empty = picture(blank.as_uri(), tmp_path / "blank.png", width=1280, height=2000)
    assert min(sizes.values()) > 4 * empty, "a page with nothing on it is far smaller"
