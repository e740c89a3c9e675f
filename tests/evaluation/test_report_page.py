"""The page: it opens offline, is the same for the same input, escapes text, and shows the right curves and images."""

import base64
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from report_folder import scored, write_demo, write_items, write_json, write_run, write_skipped

from ipa.errors import UserError
from ipa.evaluation.report.curves import describe, draw, find_charts, line_style, phrase
from ipa.evaluation.report.files import write_report
from ipa.evaluation.report.page import make_page
from ipa.evaluation.report.pictures import Shown, choose_items, choose_system, extremes
from ipa.evaluation.report.reading import Evaluation, read_evaluation
from ipa.evaluation.report.table import make_table

VOID = {"img", "meta", "wbr"}
HOSTILE = """</style></td><script>alert("1")</script> & 'quoted' {{ 7 * 7 }} """


class Checked(HTMLParser):
    """Fails unless elements are closed in order; collects attributes that load something, ids and tags."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loads: list[str] = []
        self.ids: set[str] = set()
        self.tags: list[str] = []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action")]
        self.ids |= {value or "" for name, value in attrs if name == "id"}
        assert not [name for name, _ in attrs if name.startswith("on")]
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def page_of(folder: Path, **shown: object) -> str:
    evaluation = read_evaluation(folder)
    return make_page(evaluation, make_table(evaluation), Shown(**shown))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Only to be read."""
    return write_demo(tmp_path_factory.mktemp("demo"))


@pytest.fixture(scope="module")
def evaluation(demo: Path) -> Evaluation:
    return read_evaluation(demo)


@pytest.fixture(scope="module")
def page(demo: Path) -> str:
    return page_of(demo)


def test_the_page_loads_nothing_and_closes_what_it_opens(page: str) -> None:
    checked = Checked(page)

    addresses = {address.partition(",")[0] for address in checked.loads if not address.startswith("#")}
    assert addresses == {"data:image/webp;base64", "data:image/svg+xml;base64"}
    assert {address[1:] for address in checked.loads if address.startswith("#")} == checked.ids
    assert not {"link", "iframe", "object"} & set(checked.tags)
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest", page)


def test_everything_is_on_the_page(page: str) -> None:
    assert "&lt;item3&gt; &amp; more" in page and "<item3>" not in page
    assert "skipped: download it | from &lt;there&gt; and give path=FOLDER" in page
    assert "CLIP-I against λ" in page and "Closest to their image prompts" in page
    assert "abc123" in page and "2.15.0" in page and "f00d" in page


def test_text_of_the_user_cannot_break_the_page(tmp_path: Path, page: str) -> None:
    """Neither markup in labels, captions, ids, settings and reasons, nor templates, nor $, which matplotlib reads."""
    label, item = "a<u>&\"'$x_{$" + "long" * 40, "<i>'\"&"
    items = [{"id": item, "captions": [HOSTILE + "w" * 500], "reference": "references/a.png"}]
    benchmark = {"name": HOSTILE, "settings": {HOSTILE: HOSTILE}}
    write_json(tmp_path / "items.json", {"benchmark": benchmark, "num_seeds": 1, "items": items})
    for scale in (0.0, 1.0):
        run = {"method": {"name": HOSTILE, "source": HOSTILE}, "sampling": {"scale": scale}}
        write_run(tmp_path, f"{label}{scale}", scored(scale, {item: 0.5}, fid=HOSTILE), [f"{item}_0"], **run)
    write_skipped(tmp_path, "skipped", HOSTILE)

    hostile = page_of(tmp_path)

    checked = Checked(hostile)
    assert set(checked.tags) <= {*Checked(page).tags} and checked.tags.count("script") == 1
    assert "&lt;script&gt;alert" in hostile and "{{ 7 * 7 }}" in hostile
    assert hostile.count("data:image/svg+xml") == 2


def test_files_are_the_same_for_the_same_input(tmp_path: Path) -> None:
    """Also in another folder, and when they are written again."""
    folders, shown = [write_demo(tmp_path / name) for name in ("one", "two")], Shown(rows=1, best=1)

    written = [
        {path.name: path.read_bytes() for path in write_report(folder, shown).parent.iterdir() if path.is_file()}
        for folder in (*folders, folders[0])
    ]

    assert set(written[0]) == {"items.json", "results.json", "results.csv", "table.md", "report.html"}
    assert written[0] == written[1] == written[2]


def test_only_skipped_systems_make_a_page_too(tmp_path: Path) -> None:
    write_items(tmp_path, ["a"])
    write_skipped(tmp_path, "mine", "download the weights")

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


@pytest.mark.parametrize(
    ("sources", "titles"),
    [
        (("demo/base", "demo/build/fluent/base"), ["demo/base", "fluent/base"]),
        # the same file, trained further, is named by its hash
        (("a.bin", "a.bin", "b.bin"), ["a, adapter 0a0a0a0a", "a, adapter 1a1a1a1a", "b, adapter 2a2a2a2a"]),
    ],
    ids=["paths", "hashes"],
)
def test_curves_of_one_system_have_different_names(tmp_path: Path, sources: list[str], titles: list[str]) -> None:
    write_items(tmp_path, ["a"])
    for number, source in enumerate(sources):
        for scale in (0.0, 1.0):
            run = {"method": {"source": source}, "sampling": {"scale": scale}, "files": {"adapter": 32 * f"{number}a"}}
            write_run(tmp_path, f"{number}{scale}", scored(scale), **run)  # type: ignore[arg-type]

    series = find_charts(read_evaluation(tmp_path))[0].series

    assert [each.title for each in series] == [f"IP-Adapter, {title}" for title in titles]


@pytest.mark.parametrize(
    ("name", "value", "others", "expected"),
    [
        ("method.source", "runs/one/adapter.safetensors", ["runs/two/adapter.safetensors"], "one/adapter"),
        ("method.source", "a/one.bin", ["a/two.bin"], "one"),
        ("method.source", "base", ["demo/base"], "base"),
        ("files.adapter", "0123456789abcdef", ["fedcba9876543210"], "adapter 01234567"),
    ],
)
def test_a_setting_is_named_as_short_as_possible(name: str, value: str, others: list[str], expected: str) -> None:
    assert phrase(name, value, [value, *others]) == expected


def test_settings_that_change_no_image_do_not_split_a_curve(tmp_path: Path) -> None:
    write_items(tmp_path, ["a"])
    for scale, device in ((0.0, "cpu"), (1.0, "gpu")):
        run = {"device": device, "seconds": 9.5 + scale, "batch_size": int(4 + scale)}
        guidance = 2 if scale else 2.0  # from a command line, and from a file
        write_run(tmp_path, device, scored(scale), sampling={"scale": scale, "guidance": guidance}, **run)

    assert len(find_charts(read_evaluation(tmp_path))[0].series[0].points) == 2


def test_a_chart_is_an_svg_with_a_line_for_each_series(evaluation: Evaluation) -> None:
    chart = find_charts(evaluation)[0]

    kind, _, content = draw(chart).partition(",")
    drawn = base64.b64decode(content).decode()

    assert kind == "data:image/svg+xml;base64" and ElementTree.fromstring(drawn).tag.endswith("svg")
    assert drawn.count(f"stroke: {line_style(0)[0]}; stroke-width: 2") == 1 and line_style(1)[0] not in drawn
    assert describe(chart) == "CLIP-I against λ.\nIP-Adapter: 0.000 at 0, 0.125 at 0.5, 0.250 at 1."


def test_lines_beyond_the_last_colour_are_dashed() -> None:
    styles = [line_style(number) for number in range(16)]

    assert len(set(styles)) == 16 and {style for _, style in styles[:8]} == {"solid"}


def test_items_of_the_grid_depend_on_the_seed_alone(evaluation: Evaluation) -> None:
    chosen = [[item.id for item in choose_items(evaluation, 3, seed)] for seed in range(8)]

    assert chosen[0] == [item.id for item in choose_items(evaluation, 3, 0)]
    assert len({tuple(ids) for ids in chosen}) > 1 and all(ids == sorted(ids) for ids in chosen)
    assert len(choose_items(evaluation, 99, 0)) == 6


def test_best_and_worst_are_separate_and_in_order(evaluation: Evaluation) -> None:
    system = choose_system(evaluation, None)
    assert system is not None and system.label == "mine-1.0"

    best, worst = extremes(system, evaluation.items, 4)

    assert [item.id for item in best] == ["item5", "item4", "item3"]
    assert [item.id for item in worst] == ["item0", "item1", "item2"]


@pytest.mark.parametrize("label", ["style", "theirs"])
def test_a_system_without_scores_has_no_best(evaluation: Evaluation, label: str) -> None:
    with pytest.raises(UserError, match=rf"system={label}.*CLIP-I.*mine-0, mine-0\.5, mine-1\.0"):
        choose_system(evaluation, label)


def test_rows_are_left_out_if_images_take_too_much(demo: Path) -> None:
    page = page_of(demo, rows=6, best=0, limit_mb=0.0015)

    rows = page.count('class="text" title="item')
    assert 0 < rows < 6
    assert f"{rows} of 6 image prompts" in page and f"{6 - rows} more are left out" in page


def test_a_missing_or_broken_image_leaves_a_gap(tmp_path: Path) -> None:
    pictures = write_demo(tmp_path) / "mine-0" / "pictures"
    (pictures / "item0_0.png").unlink()
    (pictures / "item1_0.png").write_bytes(b"no image")
    for path in (tmp_path / "style").glob("pictures/*"):
        path.unlink()

    assert page_of(tmp_path, rows=6, best=0).count("no image") == 2
