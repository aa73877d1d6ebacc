"""The HTML report in a real browser: no console errors, nothing blank, nothing wider than the screen."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_run import PLACES, fake_run

pytest.importorskip("matplotlib", reason="pip install 'spec-recipes[report]'")
from PIL import Image

from speculators.facts import VerifierFacts
from speculators.report.gather import gather
from speculators.report.html import page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not on PATH (Debian: apt-get install chromium)"),
]
QUIET = ("--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync")
PHONE, DESK = 390, 1280
# The page measures itself, because a screenshot does not show what lies beyond its right edge. It does so within a
# frame, because a window without a screen is never narrower than 500.
MEASURE = """<script>addEventListener("load", () => {
  const wide = [...document.querySelectorAll("svg, .scroll, p, figure, summary")]
    .filter(part => part.getBoundingClientRect().right > innerWidth + 0.5).length;
  parent.postMessage([innerWidth, document.documentElement.scrollWidth, wide].join(" "), "*");
});</script></body>"""
FRAME = """<!DOCTYPE html><iframe style="border: 0; width: {width}px; height: 800px" src="measured.html"></iframe>
<script>addEventListener("message", size => document.documentElement.dataset.size = size.data);</script>"""

Browse = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, tiny_verifier: Path) -> Path:
    """The page of two runs, one of them interrupted."""
    home, facts = tmp_path_factory.mktemp("browser"), VerifierFacts.read(tiny_verifier / "config.json")
    whole = fake_run(home, facts)
    other = fake_run(home, facts, "schedule.optimizer.lr=5e-3", rate=0.64, places=PLACES[:1])
    (other / "train.json").unlink()
    file = home / "report.html"
    file.write_text(page(gather([whole, other])), encoding="utf-8")
    return file


@pytest.fixture
def browse(tmp_path: Path) -> Browse:
    """Runs Chromium headless, with a profile of its own."""

    def call(file: Path, *arguments: str, width: int, height: int = 1600) -> subprocess.CompletedProcess[str]:
        fixed = ("--headless", "--no-sandbox", *QUIET, "--hide-scrollbars", f"--user-data-dir={tmp_path / 'profile'}")
        size = f"--window-size={width},{height}"
        command = [str(CHROMIUM), *fixed, "--enable-logging=stderr", "--v=0", size, *arguments, file.as_uri()]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)

    return call


def console(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.parametrize("width", [PHONE, DESK])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_renders_without_console_errors(
    report: Path, browse: Browse, tmp_path: Path, width: int, scheme: str
) -> None:
    """On a phone and on a desk, light and dark: the background fits the scheme, with ink and colours on it."""
    shot = tmp_path / "shot.png"
    prefer = f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}"
    done = browse(report, prefer, f"--screenshot={shot}", width=width)
    assert console(done) == []
    image = Image.open(shot).convert("RGB")
    assert image.width == width
    paper = sum(image.getpixel((2, 2))) / 3
    assert paper < 60 if scheme == "dark" else paper > 240
    # The lower half has plots: a blank page, or plots whose colours were not resolved, have a handful of greys.
    colours = image.crop((0, 800, width, 1600)).getcolors(maxcolors=1 << 20)
    vivid = sum(count for count, (red, green, blue) in colours if max(red, green, blue) - min(red, green, blue) > 80)
    assert len(colours) > 100
    assert vivid > 200


@pytest.mark.parametrize("width", [PHONE, DESK])
def test_nothing_is_wider_than_the_screen(report: Path, browse: Browse, tmp_path: Path, width: int) -> None:
    """Tables scroll in their own boxes; plots, texts and boxes end where the screen does."""
    frame = tmp_path / "frame.html"
    frame.write_text(FRAME.format(width=width), encoding="utf-8")
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", report.read_text(encoding="utf-8"))
    (tmp_path / "measured.html").write_text(text.replace("</body>", MEASURE), encoding="utf-8")
    size = re.search(r'data-size="(\d+) (\d+) (\d+)"', browse(frame, "--dump-dom", width=DESK).stdout)
    assert size is not None
    assert [int(number) for number in size.groups()] == [width, width, 0]


def test_the_policy_of_the_page_is_obeyed(report: Path, browse: Browse, tmp_path: Path) -> None:
    """A script in the page does not run, and the console reports it, which the tests above rely on."""
    evil = tmp_path / "evil.html"
    script = "<script>document.documentElement.dataset.script = 'ran'</script></body>"
    evil.write_text(report.read_text(encoding="utf-8").replace("</body>", script), encoding="utf-8")
    done = browse(evil, "--dump-dom", width=DESK)
    assert 'data-script="ran"' not in done.stdout
    assert any("Content Security Policy" in line for line in console(done))
