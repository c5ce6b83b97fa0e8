"""The page of a report in a real browser: `make test-browser CHROMIUM=PATH`."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from corl_jax.report.command import run_report
from tests.support import report_runs
from tests.support.browser import Browser

pytestmark = pytest.mark.browser

BROKEN = "[...document.images].filter(i => !(i.complete && i.naturalWidth)).length"
SHOWN = "[...document.querySelectorAll('.gallery')][0].querySelectorAll('[data-at=\"{}\"]:not([hidden])').length"  # noqa: E501
MOVE = """(() => {{ const slider = document.querySelector("input[type=range]");
slider.value = {}; slider.dispatchEvent(new Event("input")); }})()"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    runs = [report_runs.write_run(folder / name / "train") for name in ("first", "second")]
    run_report(runs, folder / "report.html", None)
    return folder / "report.html"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.mark.parametrize("width", [1200, 390])
def test_everything_is_loaded_and_nothing_complained_about(browser, page, width, tmp_path):
    browser.open(page.as_uri(), width, 900)
    assert browser.evaluate("document.images.length") > 50
    assert browser.evaluate(BROKEN) == 0
    assert not browser.list_complaints()
    assert browser.list_requests() == [page.as_uri()], "the page asks for nothing else"
    assert browser.evaluate("document.documentElement.scrollWidth") <= width, "no sideways scroll"
    browser.save_screenshot(tmp_path / "page.png")
    pixels = np.asarray(Image.open(tmp_path / "page.png").convert("RGB"))
    assert pixels.shape[:2] == (900, width) and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50


def test_the_slider_shows_one_step_at_a_time(browser, page):
    browser.open(page.as_uri(), 1200, 900)
    cards = len(report_runs.PROMPTS)
    assert [browser.evaluate(SHOWN.format(at)) for at in range(3)] == [0, 0, cards + 1]
    browser.evaluate(MOVE.format(1))
    assert [browser.evaluate(SHOWN.format(at)) for at in range(3)] == [0, cards + 1, 0]
    assert browser.evaluate("document.querySelector('output').textContent") == "step 3"


def test_hostile_text_runs_nowhere(browser, tmp_path):
    run = report_runs.write_run(tmp_path / "run", model={"path": "<img src=x onerror=alert(1)>"})
    run_report([run], tmp_path / "report.html", None)
    browser.open((tmp_path / "report.html").as_uri(), 1200, 900)
    assert browser.evaluate("document.scripts.length") == 1
    assert browser.evaluate(BROKEN) == 0 and not browser.list_complaints()
    assert browser.list_requests() == [(tmp_path / "report.html").as_uri()]
