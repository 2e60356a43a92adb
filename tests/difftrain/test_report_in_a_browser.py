"""The report in a real, headless Chromium, where one is installed."""

import re

import pytest

from browser import CHROMIUM, chromium
from difftrain.reporting.page.writing import write_report
from made_records import make_run

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed"),
    pytest.mark.xdist_group("browser"),
]
HOSTILE = "</script><script>alert(1)</script></pre><img src=http://example.org/x.png onerror=alert(2)>"


@pytest.fixture(scope="module")
def page():
    with chromium() as opened:
        yield opened


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """Reports of one run, of a hostile one, of one step, and of two runs."""
    folder = tmp_path_factory.mktemp("reports")
    one, two = make_run(folder / "one"), make_run(folder / "two", seed=3, learning_rate=2e-3)
    hostile = make_run(folder / "<img src=x onerror=alert(3)>", data=HOSTILE.replace("/", "|"))
    (hostile / "samples").mkdir()
    (hostile / "samples/step-00000040-001.txt").write_text(HOSTILE)
    first = make_run(folder / "first", until=0)
    return {
        "one": write_report([one]),
        "hostile": write_report([hostile], folder / "hostile.html"),
        "first": write_report([first]),
        "both": write_report([one, two], folder / "both.html"),
    }


@pytest.mark.parametrize("name", ["one", "hostile", "first", "both"])
@pytest.mark.parametrize("width", [400, 1280])
def test_a_page_opens_without_an_error_a_request_or_an_overflow_and_every_picture_has_marks(
    page, reports, name, width
):
    page.show(reports[name], width=width)
    assert page.problems == []
    assert page.requests == [reports[name].resolve().as_uri()]
    marks = page.ask(
        "[...document.querySelectorAll('figure')].map((f) => f.querySelectorAll('.marks path').length)"
    )
    assert len(marks) >= (5 if name == "first" else 12)
    assert all(marks)
    assert page.ask("document.documentElement.scrollWidth") <= width
    assert (
        page.ask("document.querySelectorAll('img, script:not([type])').length") == 1
    )  # the page's own script


def test_arrow_keys_read_values_and_escape_ends_it(page, reports):
    page.show(reports["one"])
    page.ask("document.querySelector('#picture-0 svg').focus()")
    readout = "document.querySelector('#picture-0 .readout').textContent"
    note = page.ask(readout)
    page.press("End")
    assert page.ask(readout).startswith("step 40: ")
    page.press("ArrowLeft")
    assert page.ask(readout).startswith("step 39: ")
    assert "validation, no penalties 1.45 (step 30)" in page.ask(readout)
    page.press("Home")
    assert "validation, no penalties 2.8" in page.ask(readout)
    page.press("Escape")
    assert page.ask(readout) == note


def test_every_control_is_a_button_or_field_that_the_keyboard_reaches(page, reports):
    page.show(reports["one"])
    assert page.ask("[...document.querySelectorAll('figure svg[role=img]')].every((s) => s.tabIndex === 0)")
    page.ask("document.querySelector('#picture-0 .legend button').focus()")
    assert page.ask("document.activeElement.getAttribute('aria-pressed')") == "true"
    page.ask("document.activeElement.click()")
    assert page.ask("document.activeElement.getAttribute('aria-pressed')") == "false"
    assert (
        page.ask("getComputedStyle(document.querySelector('#picture-0 g[data-line=\"0\"]')).display")
        == "none"
    )


def test_the_pointer_reads_a_value_too(page, reports):
    page.show(reports["one"])
    box = page.ask(
        "(({x, y, width, height}) => [x, y, width, height])(document.querySelector('#picture-0 svg').getBoundingClientRect())"
    )
    page.call(
        "Input.dispatchMouseEvent", type="mouseMoved", x=box[0] + box[2] * 0.5, y=box[1] + box[3] * 0.5
    )
    assert page.ask("document.querySelector('#picture-0 .readout').textContent").startswith("step 18: ")


def test_a_log_axis_and_smoothing_move_the_marks_that_they_are_for(page, reports):
    page.show(reports["one"])
    paths = "[...document.querySelectorAll('#picture-0 .stroke')].map((p) => p.getAttribute('d'))"
    before = page.ask(paths)
    page.ask(
        "document.querySelector('#smoothing').value = 0.9; document.querySelector('#smoothing').dispatchEvent(new Event('input'))"
    )
    smoothed = page.ask(paths)
    assert [a == b for a, b in zip(before, smoothed, strict=True)] == [False] * 3 + [
        True
    ] * 3  # training alone
    page.ask(
        "document.querySelector('#smoothing').value = 0; document.querySelector('#smoothing').dispatchEvent(new Event('input'))"
    )
    for path, written in zip(page.ask(paths), before, strict=True):  # drawn by the page as by its writer
        numbers = [[float(number) for number in re.findall(r"[\d.]+", each)] for each in (path, written)]
        assert numbers[0] == pytest.approx(numbers[1], abs=0.11)
    page.ask("document.querySelector('#picture-0 .scale').click()")
    assert all(a != b for a, b in zip(before, page.ask(paths), strict=True))
    assert page.ask("getComputedStyle(document.querySelector('#picture-0 .linear')).display") == "none"
    assert page.problems == []


@pytest.mark.parametrize(
    ("scheme", "media", "is_dark"),
    [("light", "screen", False), ("dark", "screen", True), ("dark", "print", False)],
)
def test_dark_and_light_follow_the_reader_and_print_is_light(page, reports, scheme, media, is_dark):
    page.show(reports["one"], scheme=scheme, media=media)
    light = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)[0]"
    assert (page.ask(light) < 128) == is_dark
    assert (
        page.ask("getComputedStyle(document.body).color.match(/\\d+/g).map(Number)[0]") > 128
    ) == is_dark
    if media == "screen":
        page.ask("document.querySelector('#theme').click()")
        assert (page.ask(light) < 128) != is_dark
