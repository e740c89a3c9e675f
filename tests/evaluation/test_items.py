"""What is asked: items of every benchmark, and seeds that are each picture's own."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import tiny
from conftest import compose
from PIL import Image
from tars import good, png, write_tar

from ipa.errors import UserError
from ipa.evaluation.benchmarks import CocoBenchmark, FolderBenchmark, Item, ShardBenchmark, plan
from ipa.evaluation.generation import announce
from ipa.evaluation.methods.ip_adapter import IPAdapterMethod
from ipa.evaluation.methods.method import Prompt
from ipa.sampling import SamplingOptions

ITEMS = [Item("a", ("one", "two")), Item("b", ("three",))]


def test_a_plan_has_every_picture_once_with_a_seed_of_its_own() -> None:
    tasks = plan(ITEMS, 3, 0, "caption")
    assert [task.file for task in tasks] == [f"pictures/{i}_{n}.png" for i in "ab" for n in range(3)]
    assert [task.text for task in tasks] == ["one"] * 3 + ["three"] * 3
    assert len({task.seed for task in tasks}) == 6


def test_seeds_depend_on_the_item_alone_and_what_cannot_be_asked_is_refused() -> None:
    """Neither other items nor more pictures of each change the seeds."""
    seeds = {(task.item.id, task.number): task.seed for task in plan(ITEMS, 3, 0, "empty")}
    others = {(task.item.id, task.number): task.seed for task in plan(ITEMS[::-1], 2, 0, "empty")}
    assert all(seeds[key] == seed for key, seed in others.items())
    assert plan(ITEMS, 1, 1, "empty")[0].seed != seeds["a", 0]
    with pytest.raises(UserError, match=r"1 items have no caption \(c"):
        plan([*ITEMS, Item("c", ())], 1, 0, "caption")
    with pytest.raises(UserError, match=r"1 items have ids that cannot name files \('\.\./c'"):
        plan([Item("../c", ()), Item("a/b", ())], 1, 0, "empty")


def test_a_folder_gives_its_pictures_by_name(prompts: Path) -> None:
    benchmark = FolderBenchmark("folder", str(prompts))
    items = benchmark.items()
    assert [item.id for item in items] == [f"picture{n}" for n in range(5)]
    assert items[0].captions == ("thing 0", "another word for it") and items[2].captions == ()
    assert benchmark.read(items[3]).shape == (3, 50, 20)
    assert len(FolderBenchmark("folder", str(prompts), limit=2).items()) == 2


def test_a_folder_that_is_none_is_told(tmp_path: Path) -> None:
    """Or has two images of one name; what macOS leaves next to them is no image."""

    def refused(folder: Path, message: str) -> None:
        with pytest.raises(UserError, match=message):
            FolderBenchmark("folder", str(folder)).items()

    refused(tmp_path / "nowhere", "give a folder with images")
    refused(tmp_path, "give a folder with images")
    for name in ("a.png", "b.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    (tmp_path / "._a.png").write_bytes(b"left by macOS")
    (tmp_path / "a.txt").write_bytes("\ufeffein Café\n".encode())
    assert FolderBenchmark("folder", str(tmp_path)).items() == [Item("a", ("ein Café",)), Item("b", ())]
    (tmp_path / "b.txt").write_bytes("Café".encode("latin-1"))
    refused(tmp_path, r"b\.txt is not UTF-8: byte 3 ")
    Image.new("RGB", (4, 4)).save(tmp_path / "a.jpg")
    refused(tmp_path, "differ only in their extension")


def test_shards_give_their_good_samples(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "0.tar", [*good("a", "red heart"), ("b.png", png()), *good("c")])
    benchmark = ShardBenchmark("mine", shard)
    assert [(item.id, item.captions) for item in benchmark.items()] == [("a", ("red heart",)), ("c", ("a thing",))]
    assert benchmark.read(benchmark.items()[0]).shape == (3, 8, 10)
    other = write_tar(tmp_path / "1.tar", [("a.png", b"no png"), ("a.txt", b"a thing")])
    broken = ShardBenchmark("mine", other)
    with pytest.raises(UserError, match="benchmark=mine: sample a "):
        broken.read(broken.items()[0])
    with pytest.raises(UserError, match="two samples have the key a"):
        ShardBenchmark("mine", [shard, other]).items()
    assert len(ShardBenchmark("mine", [shard, other], limit=1).items()) == 1


def coco(folder: Path) -> tuple[Path, Path]:
    """Three pictures, the second with two captions, the third missing."""
    folder.joinpath("val2017").mkdir()
    for number in (7, 9):
        Image.new("RGB", (6, 5), "teal").save(folder / "val2017" / f"{number:012d}.jpg")
    images = [{"id": number, "file_name": f"{number:012d}.jpg"} for number in (9, 7, 12)]
    told = [(7, "a  dog\n"), (9, "a cat"), (9, "the cat"), (12, "gone")]
    annotations = [{"image_id": number, "caption": caption} for number, caption in told]
    (folder / "captions.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    return folder / "val2017", folder / "captions.json"


def test_coco_gives_pictures_by_id_with_all_captions(tmp_path: Path) -> None:
    images, annotations = coco(tmp_path)
    benchmark = CocoBenchmark("coco2017", str(images), str(annotations), limit=2)
    items, settings = benchmark.items(), benchmark.settings
    assert [item.id for item in items] == ["000000000007", "000000000009"]
    assert [item.captions for item in items] == [("a dog",), ("a cat", "the cat")]
    assert benchmark.read(items[0]).shape == (3, 5, 6)
    Image.new("RGB", (60, 50), "teal").save(images / "000000000007.jpg")  # a resized copy is another benchmark
    assert CocoBenchmark("coco2017", str(images), str(annotations), limit=2).settings != settings


def test_coco_that_is_not_whole_is_told(tmp_path: Path) -> None:
    images, annotations = coco(tmp_path)
    with pytest.raises(UserError, match=r"1 of the 3 images in captions\.json are missing \(0+12"):
        CocoBenchmark("coco2017", str(images), str(annotations)).items()
    with pytest.raises(UserError, match=r"annotations_trainval2017\.zip"):
        CocoBenchmark("coco2017", str(images), str(tmp_path / "nowhere.json")).items()
    for content, message in (("[]", "holds a list"), ('{"images": [7]}', "is not a file of captions")):
        annotations.write_text(content)
        with pytest.raises(UserError, match=message):
            CocoBenchmark("coco2017", str(images), str(annotations)).items()


def test_a_long_evaluation_on_a_cpu_is_announced(adapter: Path, caplog: pytest.LogCaptureFixture) -> None:
    method, prompt = IPAdapterMethod.from_pretrained(str(adapter)), Prompt(tiny.make_pictures(1, 20)[0], "", 0)
    announce("x", method, prompt, SamplingOptions(num_steps=50), count=2)
    assert not caplog.text
    announce("x", method, prompt, SamplingOptions(num_steps=50), count=10_000_000)
    assert re.search(r"x: 10000000 images of 50 steps take up to [1-9]\d+ minutes.* num_seeds=", caplog.text)


@pytest.mark.parametrize(
    ("overrides", "name"), [([], "pictures-seeds4"), (["benchmark.limit=5", "num_seeds=1"], "pictures-limit5-seeds1")]
)
def test_a_folders_results_are_named_after_it_and_the_settings(overrides: list[str], name: str) -> None:
    cfg = compose("benchmark=folder", "benchmark.folder=some/pictures/", *overrides)
    assert cfg.benchmark.name == "pictures" and Path(cfg.out).parts[-2:] == ("evaluation", name)
