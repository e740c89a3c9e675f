"""The page: opens offline, is the same for the same input, and shows the right curves and pictures."""

import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from report_folder import scored, write_demo, write_items, write_run

from ipa.evaluation.report.curves import draw, ticks
from ipa.evaluation.report.elements import Html, element
from ipa.evaluation.report.files import write_report
from ipa.evaluation.report.page import Shown, make_page
from ipa.evaluation.report.pictures import choose_items, choose_system, extremes
from ipa.evaluation.report.reading import read_evaluation
from ipa.evaluation.report.sweeps import find_charts, phrase
from ipa.evaluation.report.table import make_table

VOID = {"img", "meta"}


class Checked(HTMLParser):
    """Elements must close in order; collects what the page would load."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action")]
        assert tag not in ("link", "iframe", "object")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def page_of(folder: Path, **shown: object) -> str:
    evaluation = read_evaluation(folder)
    return make_page(evaluation, make_table(evaluation), Shown(**shown))  # type: ignore[arg-type]


def test_the_page_loads_nothing_and_closes_what_it_opens(tmp_path: Path) -> None:
    checked = Checked()
    page = page_of(write_demo(tmp_path))

    checked.feed(page)

    assert not checked.open
    assert {address.partition(",")[0] for address in checked.loads if not address.startswith("#")} == {
        "data:image/webp;base64"
    }
    assert all(f'id="{address[1:]}"' in page for address in checked.loads if address.startswith("#"))
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest", page)


def test_all_is_in_the_page(tmp_path: Path) -> None:
    page = page_of(write_demo(tmp_path))

    assert "&lt;item3&gt; &amp; more" in page and "<item3>" not in page
    assert "skipped: download it | from &lt;there&gt; and give path=FOLDER" in page
    assert "CLIP-I against λ" in page and "Nearest to their prompts" in page
    assert "abc123" in page and "2.15.0" in page and "f00d" in page


def test_files_are_the_same_for_the_same_input(tmp_path: Path) -> None:
    """Also in another folder, and when they are written again."""
    folders = [write_demo(tmp_path / name) for name in ("one", "two")]

    written = [
        {path.name: path.read_bytes() for path in write_report(folder).parent.iterdir() if path.is_file()}
        for folder in (*folders, folders[0])
    ]

    assert set(written[0]) == {"items.json", "results.json", "results.csv", "table.md", "report.html"}
    assert written[0] == written[1] == written[2]


def test_only_skipped_systems_make_a_page_too(tmp_path: Path) -> None:
    write_items(tmp_path, ["a"])
    write_run(tmp_path, "mine", None, [], status="skipped", reason="download the weights")

    page = page_of(tmp_path)

    assert "skipped: download the weights" in page and "<img" not in page


def test_curves_join_runs_that_differ_in_one_setting_alone(tmp_path: Path) -> None:
    write_items(tmp_path, ["a"])
    for scale, guidance in ((0.0, 2.0), (1.0, 2.0), (1.0, 5.0)):
        write_run(tmp_path, f"{scale}{guidance}", scored(scale), sampling={"scale": scale, "guidance": guidance})
    write_run(tmp_path, "other", scored(0.3), method={"source": "other"}, sampling={"scale": 0.5, "guidance": 3.0})
    write_run(tmp_path, "slower", scored(0.3), sampling={"num_steps": 20, "scale": 0.5, "guidance": 3.0})

    charts = find_charts(read_evaluation(tmp_path))

    assert [(chart.axis, chart.metric) for chart in charts] == [
        (axis, metric) for axis in ("scale", "guidance") for metric in ("clip_i", "clip_t")
    ]
    (series,) = charts[0].series
    assert [(x, score.value) for x, score in series.points] == [(0.0, 0.0), (1.0, 1.0)]
    assert series.title == "IP-Adapter, adapter, steps 50, guidance 2"


def test_curves_of_one_system_have_names_of_their_own(tmp_path: Path) -> None:
    write_items(tmp_path, ["a"])
    for number, source in enumerate(("demo/base", "demo/build/fluent/base")):
        method = {"source": source}
        for scale in (0.0, 1.0):
            sampling, files = {"scale": scale}, {"adapter": 32 * f"{number}a"}
            write_run(tmp_path, f"{number}{scale}", scored(scale), method=method, sampling=sampling, files=files)

    series = find_charts(read_evaluation(tmp_path))[0].series

    assert [each.title for each in series] == ["IP-Adapter, demo/base", "IP-Adapter, fluent/base"]


def test_a_file_that_was_trained_on_is_told_by_its_hash(tmp_path: Path) -> None:
    write_items(tmp_path, ["a"])
    for number, source in enumerate(("a.bin", "a.bin", "b.bin")):
        for scale in (0.0, 1.0):
            run = {"method": {"source": source}, "sampling": {"scale": scale}, "files": {"adapter": 32 * f"{number}a"}}
            write_run(tmp_path, f"{number}{scale}", scored(scale), **run)

    series = find_charts(read_evaluation(tmp_path))[0].series

    names = [f"IP-Adapter, {each}" for each in ("a, adapter 0a0a0a0a", "a, adapter 1a1a1a1a", "b, adapter 2a2a2a2a")]
    assert [each.title for each in series] == names


@pytest.mark.parametrize(
    ("name", "value", "others", "told"),
    [
        ("method.source", "runs/one/adapter.safetensors", ["runs/two/adapter.safetensors"], "one/adapter"),
        ("method.source", "a/one.bin", ["a/two.bin"], "one"),
        ("method.source", "base", ["demo/base"], "base"),
        ("files.adapter", "0123456789abcdef", ["fedcba9876543210"], "adapter 01234567"),
    ],
)
def test_a_difference_is_told_as_short_as_it_can_be(name: str, value: str, others: list[str], told: str) -> None:
    assert phrase(name, value, [value, *others]) == told


def test_what_does_not_change_pictures_does_not_part_a_curve(tmp_path: Path) -> None:
    write_items(tmp_path, ["a"])
    for scale, device in ((0.0, "cpu"), (1.0, "gpu")):
        run = {"device": device, "seconds": 9.5 + scale, "batch_size": int(4 + scale)}
        guidance = 2 if scale else 2.0  # as a command line and a file have it
        write_run(tmp_path, device, scored(scale), sampling={"scale": scale, "guidance": guidance}, **run)

    assert len(find_charts(read_evaluation(tmp_path))[0].series[0].points) == 2


def test_a_chart_is_well_formed_and_stays_inside(tmp_path: Path) -> None:
    for chart in find_charts(read_evaluation(write_demo(tmp_path))):
        picture = ElementTree.fromstring(draw(chart)).find("svg")
        assert picture is not None
        _, _, width, height = map(float, picture.attrib["viewBox"].split())
        circles = picture.findall(".//circle")
        assert len(circles) == 3
        assert all(0 < float(c.attrib["cx"]) < width and 0 < float(c.attrib["cy"]) < height for c in circles)


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.5), (0.41, 0.4101), (-3.0, 120.0), (1e-5, 2e-5)])
def test_ticks_are_a_few_round_numbers_inside(low: float, high: float) -> None:
    found = ticks(low, high)

    assert 2 <= len(found) <= 8 and low <= found[0] and found[-1] <= high + 1e-12
    assert len({f"{value:g}" for value in found}) == len(found)


def test_items_of_the_grid_depend_on_the_seed_alone(tmp_path: Path) -> None:
    evaluation = read_evaluation(write_demo(tmp_path))

    chosen = [[item.id for item in choose_items(evaluation, 3, seed)] for seed in range(8)]

    assert chosen[0] == [item.id for item in choose_items(evaluation, 3, 0)]
    assert len({tuple(ids) for ids in chosen}) > 1 and all(ids == sorted(ids) for ids in chosen)
    assert len(choose_items(evaluation, 99, 0)) == 6


def test_best_and_worst_are_apart_and_in_order(tmp_path: Path) -> None:
    evaluation = read_evaluation(write_demo(tmp_path))
    system = choose_system(evaluation, None)
    assert system is not None and system.label == "mine-1.0"

    best, worst = extremes(evaluation, system, 4)

    assert [item.id for item in best] == ["item5", "item4", "item3"]
    assert [item.id for item in worst] == ["item0", "item1", "item2"]


def test_a_system_without_scores_has_no_best(tmp_path: Path) -> None:
    evaluation = read_evaluation(write_demo(tmp_path))

    with pytest.raises(ValueError, match=r"system=style has no CLIP-I.*mine-0, mine-0\.5, mine-1\.0"):
        choose_system(evaluation, "style")


def test_rows_are_left_out_where_pictures_take_too_much(tmp_path: Path) -> None:
    write_demo(tmp_path)

    page = page_of(tmp_path, rows=6, best=0, limit_mb=0.0015)

    rows = page.count('class="words" title="item')
    assert 0 < rows < 6
    assert f"{rows} of 6 image prompts" in page and f"{6 - rows} are left out" in page


def test_a_picture_that_is_gone_or_broken_leaves_a_gap(tmp_path: Path) -> None:
    pictures = write_demo(tmp_path) / "mine-0" / "pictures"
    (pictures / "item0_0.png").unlink()
    (pictures / "item1_0.png").write_bytes(b"no picture")
    for path in (tmp_path / "style").glob("pictures/*"):
        path.unlink()

    assert page_of(tmp_path, rows=6, best=0).count("no picture") == 2


def test_text_is_escaped_and_html_is_not() -> None:
    inside = element("b", "a < b & c")

    assert inside == "<b>a &lt; b &amp; c</b>" and isinstance(inside, Html)
    assert element("p", inside, " > ", class_="x", title='say "a"', hidden=True, open=False) == (
        '<p class="x" title="say &quot;a&quot;" hidden><b>a &lt; b &amp; c</b> &gt; </p>'
    )
