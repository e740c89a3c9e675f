"""Networks of the optional metrics: real ones at tiny size, and what is said when one is missing."""

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from metric_samples import images, told
from omegaconf import OmegaConf
from transformers import Dinov2Config, Dinov2Model, ViTConfig, ViTModel

from ipa.errors import MissingWeights
from ipa.metrics.aesthetic import AestheticScore, load_head
from ipa.metrics.clip import ClipScorer
from ipa.metrics.image_metric import ImageMetric, ImageSimilarity
from ipa.metrics.networks import DinoNetwork, DreamSimNetwork, InceptionNetwork, download

CONF = Path(__file__).resolve().parents[2] / "conf" / "metric"
SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 16, "patch_size": 4}


@pytest.fixture(params=[(Dinov2Model, Dinov2Config), (ViTModel, ViTConfig)], ids=["dinov2", "dino"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    model, config = request.param
    model(config(**SIZES)).save_pretrained(tmp_path / "dino")
    return tmp_path / "dino"


def test_dino_features_are_the_class_tokens_of_prepared_pictures(folder: Path) -> None:
    from torchvision.transforms.functional import normalize

    network = DinoNetwork.from_pretrained(str(folder), size_px=20, crop_px=16)
    given = images(1, size_px=20)
    prepared = normalize((given + 1) / 2, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])[..., 2:18, 2:18]
    with torch.no_grad():
        expected_BE = network.transformer(prepared).last_hidden_state[:, 0]

    torch.testing.assert_close(network.embed_images(given), F.normalize(expected_BE), rtol=0, atol=1e-5)
    metric = ImageSimilarity(network, "dinov2")
    metric.update(given, given)
    assert told(metric) == pytest.approx({"dinov2": 1})
    metric.update(given, images(2))
    assert told(metric)["dinov2"] < 0.999


def test_dino_with_missing_weights_is_refused(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    weights = load_file(file)
    del weights["layernorm.weight"]
    save_file(weights, file, metadata={"format": "pt"})

    with pytest.raises(ValueError, match=r"1 weights are missing, layernorm\.weight"):
        DinoNetwork.from_pretrained(str(folder))
    for path in ("facebook/dinov2-base", str(folder / "nowhere")):
        with pytest.raises(MissingWeights, match=rf"network\.path={path}: "):
            DinoNetwork.from_pretrained(path)


def test_missing_packages_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for package in ("torch_fidelity", "dreamsim"):
        monkeypatch.setitem(sys.modules, package, None)

    with pytest.raises(MissingWeights, match=r"torch-fidelity: pip install -e '.\[fid\]'"):
        InceptionNetwork.from_pretrained()
    with pytest.raises(MissingWeights, match="pip install dreamsim"):
        DreamSimNetwork.from_pretrained(tmp_path)


def test_a_file_that_cannot_be_downloaded_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("torch.hub._hub_dir", str(tmp_path))
    source = tmp_path / "nowhere.pth"

    with pytest.raises(MissingWeights, match=rf"Download {source.as_uri()} .* into {tmp_path}/checkpoints"):
        download(source.as_uri(), "w.pth")
    source.write_bytes(b"weights")
    assert download(source.as_uri(), "w.pth").read_bytes() == b"weights"
    source.unlink()
    assert download(source.as_uri(), "w.pth").is_file()


@pytest.mark.slow
def test_inception_reads_its_file_as_torch_fidelity_does(tmp_path: Path) -> None:
    """Full size, at random: the features of images of the network's own size are the library's."""
    fidelity = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    with pytest.MonkeyPatch.context() as patch:  # it has no way to start at random
        patch.setattr(fidelity, "load_state_dict_from_url", lambda *names, **options: {})
        patch.setattr(fidelity.FeatureExtractorInceptionV3, "load_state_dict", lambda self, weights: None)
        library = fidelity.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    torch.save(library.state_dict(), tmp_path / "inception.pth")
    network = InceptionNetwork.from_pretrained(str(tmp_path / "inception.pth"))
    given = images(1, count=2, size_px=299)

    levels = ((given + 1) * 127.5).round().to(torch.uint8)
    torch.testing.assert_close(network.embed_images(given), library(levels)[0])
    assert network.embed_images([given[0, :, :200], given[1]]).shape == (2, 2048)
    with pytest.raises(MissingWeights, match=r"nowhere\.pth: no such file; download https"):
        InceptionNetwork.from_pretrained(str(tmp_path / "nowhere.pth"))


def save_head(path: Path, width: int) -> torch.nn.Sequential:
    """As published: linear layers with dropout between them."""
    layers = torch.nn.Sequential(
        torch.nn.Linear(width, 8), torch.nn.Dropout(0.2), torch.nn.Linear(8, 4), torch.nn.Linear(4, 1)
    )
    torch.save({f"layers.{name}": value for name, value in layers.state_dict().items()}, path)
    return layers.eval()


def test_aesthetic_score_is_the_heads(scorer: ClipScorer, tmp_path: Path) -> None:
    head = save_head(tmp_path / "head.pth", 12)
    metric = AestheticScore(scorer, load_head(str(tmp_path / "head.pth")))
    metric.update(images(1), images(2))
    with torch.no_grad():
        expected = head(scorer.embed_images(images(1)))[:, 0]

    torch.testing.assert_close(metric.per_item()["aesthetic"], expected)
    assert not list(metric.parameters()) and not list(metric.children())


def test_aesthetic_heads_that_do_not_fit_or_are_missing_are_told(scorer: ClipScorer, tmp_path: Path) -> None:
    save_head(tmp_path / "head.pth", 768)
    with pytest.raises(ValueError, match="width 768, the scorer gives 12"):
        AestheticScore(scorer, load_head(str(tmp_path / "head.pth"))).update(images(1), images(1))
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"no layers\.N\.weight in it, but weight"):
        load_head(str(tmp_path / "other.pth"))
    for path in (str(tmp_path / "nowhere.pth"), "owner/name/head.pth", "head.pth"):
        with pytest.raises(MissingWeights, match=rf"aesthetic head path={path}.*[Gg]ive"):
            load_head(path)


@pytest.mark.parametrize("name", sorted(path.stem for path in CONF.glob("*.yaml")))
def test_configurations_make_metrics_or_tell_what_is_missing(name: str, clip_name: str, tmp_path: Path) -> None:
    cfg = OmegaConf.load(CONF / f"{name}.yaml")
    judge = {"_target_": "ipa.metrics.clip.load_scorer", "name": clip_name}
    if name in ("clip", "border", "fid_judge", "kid_judge"):
        metric = instantiate(OmegaConf.create({"judge": judge, "metric": cfg}).metric)
        metric.update(images(1), images(2), [["cat"]] * 6)
        assert isinstance(metric, ImageMetric)
        assert set(metric.compute()) == set(metric.higher)
    elif name == "dinov2":
        with pytest.raises(InstantiationException, match=r"network\.path=facebook/dinov2-base") as told_by:
            instantiate(cfg)
        assert isinstance(told_by.value.__cause__, MissingWeights)
