"""`python -m ipa.tools.pair`, and training on its index: from pictures and from a feature cache the same."""

import json
import random
import re
from pathlib import Path

import pytest
import tiny
import torch
from composing import composed
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from PIL import Image
from tars import png, saved, write_tar
from test_precompute import train_batches

from ipa.data.rejects import Reason
from ipa.errors import UserError
from ipa.tools.inspect.findings import inspect
from ipa.tools.pair import pair
from ipa.tools.precompute.run import precompute
from ipa.training.parts import build_model

STRIP = "data.pairs.strip=[json.style]"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 samples of four styles in two shards; every tenth has half a picture, every seventh no caption."""
    folder, draw = tmp_path_factory.mktemp("shards"), random.Random(0)
    for shard in range(2):
        members = []
        for n in range(20):
            small = Image.frombytes("RGB", (4, 4), draw.randbytes(48))
            picture = saved(small.resize((20, 24), Image.Resampling.BICUBIC), "PNG")
            metadata = {"style": f"style{draw.randrange(4)}", "twin": n if n < 5 else 100 * shard + n}
            content = {"json": json.dumps(metadata).encode()}
            content |= {} if n % 7 == 6 else {"txt": f"thing {n}, style1, style2".encode()}
            content["png"] = picture[:60] if n % 10 == 9 else picture
            members += [(f"{shard}{n:03d}.{extension}", data) for extension, data in content.items()]
        write_tar(folder / f"{shard}.tar", members)
    return folder


@pytest.fixture(scope="module")
def parts(shards: Path, base_folder: Path, clip_name: str) -> list[str]:
    return [
        *("recipe=demo", f"base.path={base_folder}", f"encoder.name={clip_name}", "resampler.width=16"),
        *("resampler.heads=1", f"data.train={shards}", "data.val=null", "data.background=null", STRIP),
    ]


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory, parts: list[str]) -> Path:
    out = tmp_path_factory.mktemp("features") / "made"
    precompute(composed("precompute", *parts, f"out={out}", "num_workers=0", "device=cpu", "keep=[pooled,reference]"))
    return out


@pytest.mark.parametrize("experiment", ["decoupled_global", "decoupled_fine_grained"])
def test_pairs_of_a_cache_are_those_of_the_pictures(
    experiment: str, features: Path, parts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also the partners that could not be decoded are the same, and so are the stripped captions."""
    by = ["by=[twin,style]", "differ=null", "workers=1"]
    about = pair(composed("pair", *parts, *by, f"out={tmp_path}/pictures"))
    cached_about = pair(composed("pair", *parts, *by, f"cache={features}", f"out={tmp_path}/features"))
    assert about["fingerprint"] == cached_about["fingerprint"]
    assert "pairs by twin: 10 of 36 samples have a partner" in capsys.readouterr().out

    lanes = ["data.num_workers=0", "++data.window=8", "data.lanes.ranks=1", "data.lanes.workers=1"]
    paired = [f"experiment={experiment}", *parts, *lanes, "data.pairs.by=[twin,style]", "data.pairs.self=0.1"]
    online = composed("train", *paired, f"data.pairs.index={tmp_path}/pictures")
    cached = composed("train", *paired, "data=cache", f"data.train={features}", f"data.pairs.index={tmp_path}/features")
    model = tiny.shake(build_model(online))
    model.adapter.install()
    rejects: dict[str, int] = {}
    for pictures, cache in zip(train_batches(online, model, 8), train_batches(cached, model, 8), strict=True):
        assert (cache.keys, cache.shards, cache.text) == (pictures.keys, pictures.shards, pictures.text)
        assert cache.position == pictures.position
        assert cache.rejects.get(Reason.BROKEN_PARTNER) == pictures.rejects.get(Reason.BROKEN_PARTNER)
        assert torch.equal(cache.reference_B3HW, pictures.reference_B3HW)
        rejects |= cache.rejects
        with torch.no_grad():
            torch.testing.assert_close(model.errors(cache).error_B, model.errors(pictures).error_B, rtol=2e-3, atol=0)
        assert all(text.startswith("thing") and not text.endswith(",") for text in cache.text)
    assert rejects[Reason.BROKEN_PARTNER]


def test_a_cache_needs_an_index_of_its_own_and_the_captions_that_it_was_made_with(
    features: Path, parts: list[str], tmp_path: Path
) -> None:
    cached = [*parts, "data=cache", f"data.train={features}", "data.pairs.by=style"]
    with pytest.raises(
        InstantiationException, match=r"ipa\.tools\.pair data\.train=PICTURES cache=CACHE by=style out=FILE"
    ):
        instantiate(composed("train", *cached).data)
    pair(composed("pair", *parts, "by=style", "workers=1", f"out={tmp_path}/x"))
    with pytest.raises(InstantiationException, match=r"is the index of pictures, and data\.train has features"):
        instantiate(composed("train", *cached, f"data.pairs.index={tmp_path}/x").data)
    with pytest.raises(InstantiationException, match=r"choices: pairs\.strip 0 terms and 1 entries, \w+, not None"):
        instantiate(composed("train", *cached, "data.pairs.by=null", "data.pairs.strip=[]").data)


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        ([], "by=null: give an entry of the metadata"),
        (["by=artist"], r"by=artist: none of 40 samples has json\.artist\. The metadata in 0\.tar have style, twin"),
        (["data=cache", "data.train=FEATURES", "by=style"], "a feature cache has no metadata: give the pictures"),
        (["data.train=OTHER", "cache=FEATURES", "by=style"], "the cache of train has no shard 7.tar"),
    ],
)
def test_mistakes_are_named(overrides, complaint: str, parts, features: Path, tmp_path: Path) -> None:
    write_tar(tmp_path / "other/7.tar", [("1.txt", b"it"), ("1.png", png())])
    given = [each.replace("FEATURES", str(features)).replace("OTHER", f"{tmp_path}/other") for each in overrides]
    with pytest.raises(UserError, match=complaint):
        pair(composed("pair", *parts, *given, "workers=1", f"out={tmp_path}/x"))
    assert not list(tmp_path.glob("*x*"))


def test_inspect_shows_the_pairs_and_what_was_taken_out_of_the_captions(
    parts: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level("INFO", "ipa")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    own = ["data.num_workers=0", "data.pairs.by=style", "samples=null", "pictures=5", f"out={tmp_path / 'sheet.png'}"]
    inspect(composed("inspect", *parts, *own))
    said = capsys.readouterr().out

    assert "pairs by style: 36 of 36 samples have a partner here; 4 groups" in caplog.text
    assert "data.pairs.strip changed " in said and "of 36 captions; 0 are empty now" in said
    assert re.search(r"removed: style\d \(\d+\), style\d \(\d+\)\n", said)
    assert re.search(r"'thing \d+, style1, style2' → 'thing \d+, style\d'\n", said)
    assert Image.open(tmp_path / "sheet.png").height > 128
