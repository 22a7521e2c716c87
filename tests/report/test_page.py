"""The page of a federation: its text, and what a real browser makes of it."""

import base64
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from helpers.records import HOSTILE, federation, hostile, large, long_names

from lightning_fedfisher.report.charts.registry import charts
from lightning_fedfisher.report.page import write_report
from lightning_fedfisher.results.record import FederationRecord

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
)
RECORDS = {
    "usual": federation,
    "large": large,
    "hostile": hostile,
    "long": long_names,
    "alone": lambda: federation(clients=1, layers=["only"]),
    "eight": lambda: federation(
        classes=12,
        layers=[f"layer{k}" for k in range(20)],
        names=[f"{k}-{'client' * 5}-{k}" for k in range(8)],
    ),
}


class _Text(HTMLParser):
    """The text of a page, tag by tag, without its scripts' and styles'."""

    def __init__(self, page):
        super().__init__()
        self.open, self.texts, self.cells = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        if not {"script", "style"} & set(self.open):
            self.texts.append(data)
            if {"td", "th"} & set(self.open):
                self.cells[-1] += data


def _page(record, folder):
    write_report(record, folder / "report.html")
    return (folder / "report.html").read_text(encoding="utf-8")


def _rows(page):
    cells = _Text(page).cells
    return {cells[at]: cells[at + 1 : at + 8] for at in range(0, 8 * (len(cells) // 8), 8)}


def test_the_table_compares_methods(tmp_path):
    rows = _rows(_page(federation(), tmp_path))
    assert rows["fedfisher"] == [
        "★ best: 71.0", "★ best: 1.290", "★ best: 12.9", "2.40", "1.50", "2.50", "★ best: 0",
    ]  # fmt: skip
    assert rows["fedavg"][0] == "40.0"
    assert rows["fedfisher_kfac"][-1] == "500"
    assert rows["best single client"] == ["66.0", "1.340", "13.4", *["\u2013"] * 4]


def test_the_table_has_no_column_that_nobody_knows(tmp_path):
    bare = replace(federation().merges[0], score=None, client_seconds=None)
    page = _page(FederationRecord("t", [], [bare]), tmp_path)
    titles = ["Method", "Upload, × FedAvg", "Server, s", "Labels"]  # noqa: RUF001
    assert _Text(page).cells[:8] == [*titles, "fedfisher", "2.40", "2.50", "0"]
    assert "Methods compared" not in page


def test_what_reads_alike_is_equally_good(tmp_path):
    record = federation()
    first, second, third = record.merges
    second = replace(second, score=first.score)
    rows = _rows(_page(replace(record, merges=[first, second, third]), tmp_path))
    assert [rows[name][0][0] for name in ("fedfisher", "fedavg", "fedfisher_kfac")] == [*"★★7"]


def test_key_numbers_stand_above(tmp_path):
    record = federation()
    merges = [replace(record.merges[0], upload_bytes=2_420_000, fedavg_bytes=1_000_000)]
    text = " ".join(_Text(_page(replace(record, merges=merges), tmp_path)).texts)
    for part in ("71.0%", "best client 66.0%", "2.42\u00d7", "2.42 MB a client", "2.50 s", "torch"):
        assert part in text


def test_a_page_without_numbers(tmp_path):
    page = _page(FederationRecord("Nothing yet", [], []), tmp_path)
    assert "Nothing yet" in page
    assert "<svg" not in page
    assert "Plotly" not in page
    assert len(page) < 20_000


def test_a_page_is_whole_and_refers_to_nothing(tmp_path):
    page = _page(federation(), tmp_path)
    assert '<html lang="en">' in page
    assert "default-src 'none'" in page
    outside = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    assert not re.search(r"(src|href)=|https?:|url\(|@import", outside)
    assert len(page) < 6_000_000


def test_strangers_text_is_text(tmp_path):
    page = _page(replace(hostile(), config={HOSTILE[1]: {"a": HOSTILE[0]}}), tmp_path)
    for text in HOSTILE[:2]:
        assert text not in page
    assert not re.search("[\u2028\u2029\u202e]", page)
    assert not re.search(r"<img|onerror=alert\(1\)>", page)
    for told in re.findall(r'<script type="application/json">(.*?)</script>', page, re.DOTALL):
        json.loads(told)


def test_half_a_character_is_no_obstacle(tmp_path):
    page = _page(federation(names=["\ud800"], title="\udfff"), tmp_path)
    assert "client" in page


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    for name, make in RECORDS.items():
        write_report(make(), folder / f"{name}.html")
    return folder


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not (CHROMIUM and DRIVER):
        pytest.skip("chromium and chromedriver are not installed")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('browser')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, Service(DRIVER))
    yield driver
    driver.quit()


def _emulate(browser, width=1280, dark=False, media=""):
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": [scheme]})
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def _open(browser, pages, name, **emulated):
    _emulate(browser, **emulated)
    for kind in ("browser", "performance"):
        browser.get_log(kind)
    browser.get((pages / f"{name}.html").as_uri())
    # Margins are found by drawing; after two frames all is where it stays.
    browser.execute_async_script(
        "const done = arguments[0]; requestAnimationFrame(() => requestAnimationFrame(done))"
    )


TEXTS = """
return [...document.querySelectorAll(".plot")].map((plot, at) => {
  const kinds = ".xtick text, .ytick text, .xtitle, .ytitle, .legendtext, .annotation-text";
  const texts = [...plot.querySelectorAll(kinds + ", .cbaxis text, .heatmap-label text")];
  const box = ({left, top, right, bottom}) => ({left, top, right, bottom});
  return {
    plot: box(plot.getBoundingClientRect()),
    texts: texts.filter(text => text.textContent).map(text => (
      {text: text.textContent, ...box(text.getBoundingClientRect())})),
  };
})
"""


def _overlap(one, other):
    across = min(one["right"], other["right"]) - max(one["left"], other["left"])
    down = min(one["bottom"], other["bottom"]) - max(one["top"], other["top"])
    return across > 1 and down > 3  # lines of text are higher than their letters


@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("name", RECORDS)
def test_page_in_a_browser(browser, pages, name, width):
    _open(browser, pages, name, width=width)
    wide = browser.execute_script(
        "const width = document.documentElement.clientWidth;"
        "return [...document.body.querySelectorAll('*')].filter(e => !e.closest('.scroll table')"
        " && e.getBoundingClientRect().right > width + 1).map(e => e.outerHTML.slice(0, 99))"
    )
    assert wide == []
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    expected = [panel for chart in charts(RECORDS[name]()) for panel in chart.panels]
    sizes = browser.execute_script(
        "return [...document.querySelectorAll('.plot')].map(plot => {"
        " const box = plot.querySelector('svg.main-svg').getBoundingClientRect();"
        " return [box.width, box.height, plot.querySelectorAll('path, image').length]})"
    )
    assert len(sizes) == len(expected)
    for across, up, marks in sizes:
        assert across > 250
        assert 140 < up <= 640
        assert marks
    for plot in browser.execute_script(TEXTS):
        inside, texts = plot["plot"], plot["texts"]
        assert texts
        for at, text in enumerate(texts):
            assert text["left"] >= inside["left"] - 1, text
            assert text["right"] <= inside["right"] + 1, text
            assert text["top"] >= inside["top"] - 1, text
            assert text["bottom"] <= inside["bottom"] + 1, text
            assert [o["text"] for o in texts[:at] if _overlap(text, o)] == [], text["text"]
    assert browser.get_log("browser") == []
    asked = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [a["params"]["request"]["url"] for a in asked if a["method"].endswith("WillBeSent")]
    assert {url for url in urls if not url.startswith("data:")} == {browser.current_url}


def test_names_are_text_in_a_browser(browser, pages):
    _open(browser, pages, "hostile")
    assert browser.title == f"{HOSTILE[0]}: federation report"
    assert browser.execute_script("return document.querySelectorAll('img, b b').length") == 0
    shown = browser.execute_script(
        "return [...document.querySelectorAll('.legendtext')].map(text => text.textContent)"
    )
    assert {HOSTILE[0], HOSTILE[2], HOSTILE[4], "(no name)"} <= set(shown)


def test_full_names_are_told_on_hover(browser, pages):
    _open(browser, pages, "long")
    told = browser.execute_script(
        "const plot = document.querySelector('#loss .plot');"
        "Plotly.Fx.hover(plot, [{curveNumber: 1, pointNumber: 0}]);"
        "return plot.querySelector('.hoverlayer').textContent"
    )
    assert long_names().clients[1].name in told
    assert "epoch 1" in told


def test_charts_have_alternative_text(browser, pages):
    _open(browser, pages, "usual")
    found = browser.execute_script(
        "return [...document.querySelectorAll('.plot')].map(p => [p.role, p.ariaLabel])"
    )
    expected = [
        ["img", chart.title + (f": {panel.heading}" if panel.heading else "")]
        for chart in charts(federation())
        for panel in chart.panels
    ]
    assert found == expected
    assert browser.execute_script(
        "return [...document.querySelectorAll('th')].every(th => ['row', 'col'].includes(th.scope))"
    )


COLOURS = """
const read = (element, what) => getComputedStyle(element)[what].match(/[0-9.]+/g).map(Number);
const all = (kinds, what) => [...document.querySelectorAll(kinds)].map(e => read(e, what));
return {
  page: read(document.body, "backgroundColor"),
  text: all("h1, h2, h3, p, dt, dd, th, td, summary, footer", "color"),
  drawn: all(".xtick text, .ytick text, .xtitle, .legendtext, .annotation-text", "fill"),
  lines: all(".shapelayer path, .scatterlayer .js-line", "stroke"),
}
"""


def _light(colour):
    channels = [c / 255 for c in colour[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(part * c for part, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def _contrast(one, other):
    low, high = sorted((_light(one), _light(other)))
    return (high + 0.05) / (low + 0.05)


def _check_colours(browser, dark):
    found = browser.execute_script(COLOURS)
    page = found["page"]
    assert _light(page) < 0.02 if dark else _light(page) > 0.9
    assert min(_contrast(page, colour) for colour in found["text"] + found["drawn"]) >= 4.5
    assert min(_contrast(page, colour) for colour in found["lines"]) >= 3


def test_charts_follow_the_theme_while_open(browser, pages):
    _open(browser, pages, "usual")
    _check_colours(browser, dark=False)
    _emulate(browser, dark=True)
    _check_colours(browser, dark=True)
    _emulate(browser, dark=True, media="print")
    _check_colours(browser, dark=False)


def test_numbers_in_cells_can_be_read(browser, pages):
    _open(browser, pages, "usual")
    shown = browser.execute_script(
        "return [...document.querySelectorAll('.heatmap-label text')].map("
        "t => getComputedStyle(t).fill)"
    )
    assert set(shown) == {"rgb(0, 0, 0)", "rgb(255, 255, 255)"}


@pytest.mark.parametrize("name", ["usual", "large"])
def test_page_in_print(browser, pages, name):
    _open(browser, pages, name, dark=True)
    browser.execute_script("dispatchEvent(new Event('beforeprint'))")
    _emulate(browser, width=794, media="print", dark=True)
    high, wide = browser.execute_script(
        "return ['height', 'width'].map(what => Math.max(...[...document.querySelectorAll("
        "'section.chart, .plot svg')].map(e => e.getBoundingClientRect()[what])))"
    )
    millimetre = 96 / 25.4
    assert high <= (297 - 28) * millimetre
    assert wide <= (210 - 28) * millimetre
    browser.execute_script("dispatchEvent(new Event('afterprint'))")
    _emulate(browser, dark=True)
    printed = browser.execute_cdp_cmd("Page.printToPDF", {"preferCSSPageSize": True})["data"]
    pdf = base64.b64decode(printed)
    assert pdf.startswith(b"%PDF")
    assert 3 <= len(re.findall(rb"/Type\s*/Page\b", pdf)) <= 10


def test_the_package_needs_no_extra():
    code = (
        "import sys; sys.modules |= dict.fromkeys(('plotly', 'jinja2', 'selenium'));"
        "from lightning_fedfisher.cli import main, inspect, verify, merge, report, dashboard"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
