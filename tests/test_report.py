import json
import math
import re
from html.parser import HTMLParser

import matplotlib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm import report
from minillm.report import (
    Cell,
    Details,
    Facts,
    Figure,
    Heading,
    Line,
    Panel,
    Samples,
    Table,
    Text,
    columns_of,
    draw,
    metric_panel,
    page,
    plot,
    read_metrics,
    shown,
    table_lines,
    visible,
)

EVIL = '</div><script>alert(\'1\')</script>" onload="x" &amp; $x$ \0\x1b[31m\r\ud800\u2028\u202e{{ 7 * 7 }}'


def run(folder, rows, tail=""):
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + tail, encoding="utf-8")
    return folder


class Walk(HTMLParser):
    """Reads a page: every tag is closed in its turn, and nothing is fetched from elsewhere."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.text, self.ids = [], [], [], []
        self.feed(html)
        self.close()
        assert self.open == []
        assert len(self.ids) == len(set(self.ids))
        self.text = "".join(self.text)

    def handle_starttag(self, tag, attributes):
        self.handle_startendtag(tag, attributes)
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        self.ids += filter(None, [attributes.get("id")])
        assert not attributes.keys() & {"src", "srcset", "data", "onload", "xmlns", "xlink:href"}
        assert attributes.get("href", "#").startswith("#")
        for value in attributes.values():
            assert "url(" not in value or "url(#" in value

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def everything(text, number):
    """One of each block, with this text in each of its places."""
    lines = [Line(text, [1, 2], [number, 2.0]), Line(text, [1], [3], held_out=True)]
    first, second = (Figure(draw([Panel(text, lines, text, text, reference=(text, y))]), text) for y in (1.0, 1.5))
    table = Table([text, "n"], [[text, number], [Cell(text, strong=True), None]], text, notes=text)
    samples = Samples([text, "b"], [(text, [text, Cell(text, strong=True)], text), ("p", ["", None], None)], text)
    blocks = [Facts({text: text, "n": number}), Text(text + "\n\n" + text), table, samples]
    return [
        *blocks,
        first,
        Heading(text),
        Details(text, [*blocks, second, Details(text, {text: text, "n": number, "l": [1, text]})]),
    ]


# ------------------------------------------------------------------ curves


def test_metrics_come_back_as_curves(tmp_path):
    rows = [{"step": 0, "eval_loss": 3.0}, {"step": 10, "loss": 2.5, "gone": None}, {"step": 20, "loss": 2.0}]
    curves = read_metrics(run(tmp_path / "a", rows, tail='{"step": 30, "lo'))  # killed in the middle of a line
    assert curves == {"eval_loss": ([0], [3.0]), "loss": ([10, 20], [2.5, 2.0])}
    with pytest.raises(ValueError, match=r"has no metrics.jsonl"):
        read_metrics(tmp_path)


def test_a_plot_is_a_picture(tmp_path):
    a = run(tmp_path / "a", [{"step": s, "loss": 3 - s / 10, "eval_loss": 3 - s / 11} for s in range(10)])
    b = run(tmp_path / "b", [{"step": s, "loss": 3 - s / 20, "objective/kl": s} for s in range(10)])
    path = plot([a, b], tmp_path / "x.png")
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000
    assert plot([b], tmp_path / "y.svg", ["objective/kl"]).read_text(encoding="utf-8").count("objective/kl")
    with pytest.raises(ValueError, match="no run has 'lose'; there are eval_loss, loss, objective/kl"):
        plot([a, b], tmp_path / "x.png", ["lose"])
    with pytest.raises(ValueError, match="nothing to draw"):
        plot([run(tmp_path / "c", [{"step": 1, "length": 3}])], tmp_path / "x.png")
    with pytest.raises(ValueError, match="there are no panels"):
        draw([])


def test_a_plot_shows_what_was_asked_for(tmp_path):
    a = run(tmp_path / "1/a", [{"step": s, "loss": 3.0, "eval_loss": 3.0, "eval_kl": 1.0} for s in range(3)])
    b = run(tmp_path / "2/a", [{"step": s, "loss": 2.0} for s in range(3)])  # the same name: another line all the same
    texts = lambda *names: re.findall(r">([^<>]+)</text>", plot([a, b], tmp_path / "x.svg", names).read_text("utf-8"))
    assert {"a", "a, held out", "loss", "kl"} <= set(texts()) and "eval_kl" not in texts()
    assert "2/a" in texts()
    assert "a, held out" not in texts("loss") and "kl" not in texts("loss")
    assert "a" not in texts("eval_loss") and "a, held out" in texts("eval_loss")


def test_a_panel_of_a_metric():
    runs = {"a": {"loss": ([1, 2], [3.0, 2.0]), "eval_loss": ([0], [4.0])}, "b": {"loss": ([1], [5.0])}}
    a, held_out, b = Line("a", [1, 2], [3.0, 2.0]), Line("a", [0], [4.0], True), Line("b", [1], [5.0])
    assert metric_panel("Loss", runs, "loss", log=True) == Panel("Loss", [a, held_out, b], log=True)
    assert metric_panel("Loss", runs, "loss", ("eval_",)).lines == [held_out]
    with pytest.raises(ValueError, match="no run has 'kl'; there are eval_loss, loss"):
        metric_panel("KL", runs, "kl")


def test_one_label_has_one_colour():
    panels = [
        Panel("x", [Line("a", [1, 2], [1, 2])]),
        Panel("y", [Line("b", [1, 2], [1, 2]), Line("a", [1], [2], True)]),
    ]
    first, second = draw(panels).split("</svg>")[:2]
    assert [colour in first for colour in report.COLOURS[:2]] == [True, False]
    assert [colour in second for colour in report.COLOURS[:2]] == [True, True]
    assert re.search(f"<use[^>]*{report.COLOURS[0]}", second)  # the held-out one's dots
    many = draw([Panel("", [Line(str(i), [1, 2], [i, i]) for i in range(13)])])  # more labels than colours
    looks = re.findall(
        r'style="fill: none; (?:stroke-dasharray: ([^;]*);[^"]*)?stroke: (#\w+);[^"]*stroke-width: 1.4', many
    )
    assert len(looks) >= 13 and len(set(looks)) == 13


def test_long_lines_are_thinned_and_smoothed():
    steps = np.arange(50_000)
    values = np.random.default_rng(0).normal(size=50_000)
    values[20_000:30_000] = np.nan
    values[40_321] = 50.0
    x, y = report.thin(steps, values)
    assert len(x) <= 400 and list(x) == sorted(set(x))
    assert np.nanmax(y) == 50 and np.nanmin(y) == np.nanmin(values) and np.isnan(y).any()
    assert np.array_equal(y, values[x], equal_nan=True)
    x, y = report.running_mean(steps, values + 7)
    assert x[0] == 0 and x[-1] == 49_999 and np.isnan(y[(x > 21_000) & (x < 29_000)]).all()
    assert np.allclose(y[(x < 19_000) | (x > 42_000)], 7, atol=0.25)
    assert np.allclose(report.running_mean(steps[:201], 2.0 * steps[:201])[1][5:-5], 2 * steps[5:195], atol=2.5)
    lines = [Line("a", steps, values), Line("b", steps, values + 1), Line("b", steps, values, held_out=True)]
    assert len(draw([Panel("long", lines, log=True)])) < 100_000


@pytest.mark.parametrize(
    "panel",
    [
        Panel("no line", []),
        Panel("no values", [Line("a", [], []), Line("b", [1, 2], [None, math.nan])], reference=("r", 2)),
        Panel("no logarithm", [Line("a", [1, 2], [0.0, -math.inf])], log=True),
        Panel("one", [Line("a", [1, 2, 3], [None, 5.0, math.inf])], log=True),
        Panel("as steps of prepare", [Line("a", ["read", "clean", "read"], [1.0, 2.0, 3.0])]),
        Panel("decades", [Line("_a", [1.5, 2, 3], [1e-9, 1.0, 1e12])], log=True),
    ],
    ids=lambda panel: panel.title,
)
def test_gaps_and_empty_lines_are_drawn(panel, recwarn):
    svg = draw([panel])
    Walk(svg)
    assert ("no values" in svg) == ("no " in panel.title)
    assert "nan" not in svg and "inf" not in svg and "mathdefault" not in svg
    assert "_a" not in [line.label for line in panel.lines] or ">_a<" in svg.replace(" ", "")
    assert not list(recwarn)


def test_logarithmic_axes_have_numbers():
    def ticks(*values):
        svg = draw([Panel("x", [Line("a", list(range(len(values))), values)], log=True)])
        axis = svg[svg.rindex(">step<") :]  # what follows the x axis
        return set(re.findall(r">([\d.e+]+)</text>", axis))

    assert {"2"} < ticks(1.6, 3.4) and len(ticks(1.6, 3.4)) > 3
    assert {"1", "2", "5", "10", "20"} <= ticks(1.0, 30.0) and {"1", "1000", "1e+06"} <= ticks(1.0, 1e6)


def test_a_line_needs_a_step_for_each_value():
    with pytest.raises(ValueError, match="loss: base has 2 steps and 3 values"):
        draw([Panel("loss", [Line("base", [1, 2], [1, 2, 3])])])


# ------------------------------------------------------------------ tables


def test_numbers_are_short():
    cases = {12345: "12,345", 0.45395: "0.4540", 45.779: "45.78", 1234.5: "1,234", -0.5: "-0.5000", 1.2e-5: "1.2e-05"}
    cases |= {0.0: "0.0000", 3e8: "3.0e+08", None: "–", "0.5": "0.5", Cell(7, True): "7", (1, "a"): "1, a"}
    cases |= {math.nan: "nan", -math.inf: "-inf", np.float32(0.5): "0.5000", np.int64(1000): "1,000", True: "True"}
    assert {value: shown(value) for value in cases} == cases


def test_a_table_of_lines():
    rows = [["base", 1.549, None], ["日本語", Cell(10.25, strong=True), "a\nb\x1b\u2028"]]
    assert table_lines(["model", "bits", "note"], rows) == [
        "model    bits  note",
        "──────  ─────  ─────────────",
        "base    1.549  –",
        "日本語  10.25  a b\\x1b\\u2028",
    ]
    assert table_lines(["a", "b"], [], "rl", 20) == ["a  b", "─  ─"]
    cut = table_lines(["prompt", "n"], [["日" * 30, 1_000_000], ["word " * 30, 2]], width=30)
    assert cut[2] == "日" * 9 + "…  1,000,000" and cut[3] == "word word word wor…          2"
    with pytest.raises(ValueError, match="row 2 has 1 cells, and the table has 2 columns"):
        table_lines(["a", "b"], [[1, 2], [1]])
    with pytest.raises(ValueError, match="align has to be 2 letters l or r, and is 'lrr'"):
        table_lines(["a", "b"], [[1, 2]], "lrr")


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 6), st.integers(10, 60))
def test_no_line_of_a_table_is_too_wide(data, columns, width):
    row = st.lists(st.one_of(st.text(max_size=80), st.floats(), st.none()), min_size=columns, max_size=columns)
    rows = data.draw(st.lists(row, max_size=4))
    lines = table_lines(["name"] * columns, rows, width=width)
    assert len(lines) == len(rows) + 2 and max(map(columns_of, lines)) <= width
    assert all("\n" not in line and visible(line) == line for line in lines)


# ------------------------------------------------------------------ a page


def test_a_page_needs_nothing_else_and_means_what_was_said(tmp_path):
    headings = [Heading(name) for name in ("one", "two", "two", "four")]
    path = page(tmp_path / "report.html", "A <run>", [*headings, *everything("a < b\n\nc", 0.5)], "said\u2028below")
    html = path.read_text(encoding="utf-8")
    walk = Walk(html)
    assert "http" not in html and "@import" not in html and "metadata" not in html
    assert [walk.tags.count(tag) for tag in ("h1", "nav", "svg", "style")] == [1, 1, 2, 1]
    assert report.INK not in html and "currentColor" in html  # the ink of a dark page
    assert "<dd>0.5</dd>" in html  # a setting is exact
    assert "A <run>" in walk.text and "said\\u2028below" in walk.text and walk.text.count("0.5000") >= 4
    assert 'name="viewport"' in html and 'charset="utf-8"' in html and "font-family: system-ui" in html
    assert '<td class="r">–</td>' in html and '<td class="l strong">a &lt; b\n\nc</td>' in html
    assert "nav" not in Walk(page(path, "x", headings[:3]).read_text(encoding="utf-8")).tags
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_text_from_anywhere_stays_text(tmp_path):
    path = page(tmp_path / "x.html", EVIL, everything(EVIL, math.nan), EVIL)
    html = path.read_text(encoding="utf-8")  # a half of a surrogate pair could not be written
    walk = Walk(html)
    assert "script" not in walk.tags and "<script" not in html
    shape = lambda html: re.sub(r"part-\d+|p[0-9a-f]{8}\w*|[\d.-]+", "", " ".join(Walk(html).tags))
    plain = page(tmp_path / "y.html", "x", everything("x y", math.nan), "x").read_text(encoding="utf-8")
    assert sorted(set(walk.tags)) == sorted(set(Walk(plain).tags)) and shape(html).count("td") == shape(plain).count(
        "td"
    )
    assert not set(html) & set("\0\x1b\r\u2028\u202e")
    assert walk.text.count(visible(EVIL)) > 20
    assert r"\x00\x1b[31m\r\ud800\u2028\u202e{{ 7 * 7 }}" in visible(EVIL)
    assert visible("a\tb\n\xa0\u3000é👩\u200d💻") == "a\tb\n\xa0\u3000é👩\u200d💻"
    page(path, "x", [Figure("<svg onload=x>")])  # a picture that draw did not make
    assert "svg" not in Walk(path.read_text(encoding="utf-8")).tags


def test_the_same_page_is_the_same_bytes(tmp_path, monkeypatch):
    blocks = lambda: [*everything("a", 1.5), Figure(draw([Panel("other", [Line("a", [1, 2], [2, 1], True)])]))]
    first = page(tmp_path / "x.html", "t", blocks()).read_bytes()
    monkeypatch.setitem(matplotlib.rcParams, "axes.titlelocation", "left")  # the user's own style
    assert page(tmp_path / "y.html", "t", blocks()).read_bytes() == first
    assert matplotlib.rcParams["axes.titlelocation"] == "left"
    Walk(first.decode())  # with two pictures, whose ids differ
    panels = [Panel("x", [Line("a", [1, 2], [1, 2])])]
    for kind in ("png", "svg", "pdf"):
        written = []
        for day in "12":
            monkeypatch.setenv("SOURCE_DATE_EPOCH", day + "00000")  # matplotlib's clock
            written.append(draw(panels, tmp_path / f"{day}.{kind}").read_bytes())
        assert written[0] == written[1]


@pytest.mark.parametrize(
    "block, error, message",
    [
        (Table(["a"], [[1, 2]]), ValueError, "row 1 has 2 cells, and the table has 1 columns"),
        (Samples(["a", "b"], [("p", ["x"], "")]), ValueError, "row 1 has 1 cells, and the table has 2 columns"),
        ("some text", TypeError, "a page is made of blocks, and 'some text' is none"),
        (Details("d", ["x"]), TypeError, "a page is made of blocks, and 'x' is none"),
    ],
)
def test_an_error_leaves_the_old_page(tmp_path, block, error, message):
    path = page(tmp_path / "x.html", "old", [])
    with pytest.raises(error, match=message):
        page(path, "new", [Text("fine"), block])
    assert "old" in path.read_text(encoding="utf-8") and list(tmp_path.iterdir()) == [path]


def test_a_page_that_can_not_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    path = page(tmp_path / "x.html", "old", [])

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report.os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        page(path, "new", [])
    assert "old" in path.read_text(encoding="utf-8") and list(tmp_path.iterdir()) == [path]
