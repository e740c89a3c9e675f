"""The scorer against transformers and open_clip's own preprocessing."""

from pathlib import Path

import numpy as np
import open_clip
import pytest
import tiny
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ipa.errors import MissingWeights
from ipa.metrics.clip import ClipScorer
from ipa.metrics.image_metric import fit_square
from ipa.types import to_unit_range


@pytest.fixture
def pixels() -> Tensor:
    return to_unit_range(tiny.make_pictures(7, tiny.REFERENCE_PX))


def test_image_embeddings_are_those_of_transformers(scorer: ClipScorer, pixels: Tensor) -> None:
    vision = tiny.make_vision(tiny.make_encoder())
    with torch.no_grad():
        theirs = F.normalize(vision(((pixels + 1) / 2 - scorer.mean) / scorer.std).image_embeds, dim=-1)

    ours = scorer.embed_images(pixels.requires_grad_())
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert not ours.requires_grad


def test_text_embeddings_are_those_of_open_clip(scorer: ClipScorer, clip_name: str) -> None:
    texts = ["cat", "a red dog", ""]
    clip, tokenizer = tiny.make_clip(), open_clip.get_tokenizer(clip_name)
    with torch.no_grad():
        theirs = clip.encode_text(tokenizer(texts), normalize=True)
    ours = scorer.embed_texts(texts)

    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert (ours[0] - ours[1]).norm() > 0.01


@pytest.mark.parametrize("size", [(48, 48), (40, 64), (51, 37), (12, 12), (24, 30)])
def test_pictures_of_other_sizes_are_fitted_as_open_clip_does(
    scorer: ClipScorer, clip_name: str, size: tuple[int, int]
) -> None:
    height, width = size
    # far from black and white, where theirs would also clip between the two directions
    smooth = F.interpolate(torch.rand(1, 3, 5, 5), (height, width), mode="bicubic").clamp(0.25, 0.75)
    image = Image.fromarray((smooth[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8))
    _, preprocess = open_clip.create_model_from_pretrained(clip_name, return_transform=True)
    theirs = preprocess(image)
    pixels = to_unit_range(torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None])
    fitted = ((fit_square(pixels, tiny.REFERENCE_PX) + 1) / 2 - scorer.mean) / scorer.std

    assert fitted.shape == (1, 3, tiny.REFERENCE_PX, tiny.REFERENCE_PX)
    # theirs rounds to whole levels after each direction, and divides by about 0.26
    torch.testing.assert_close(fitted[0], theirs, rtol=0, atol=1.5 / 255 / 0.26)


def test_pictures_of_several_sizes_are_embedded_as_each_alone(scorer: ClipScorer) -> None:
    images = [to_unit_range(tiny.make_pictures(1, size_px))[0] for size_px in (24, 40, 31)]
    images[1] = images[1][:, :30]
    alone = torch.cat([scorer.embed_images(image[None]) for image in images])

    torch.testing.assert_close(scorer.embed_images(images, batch_size=2), alone, rtol=0, atol=1e-5)


def test_weights_that_cannot_be_had_are_told_with_the_ways_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MissingWeights, match=rf"judge\.name=local-dir:{tmp_path}: .*open_clip_config\.json"):
        ClipScorer.from_pretrained(f"local-dir:{tmp_path}")

    def fail(*names: object, **options: object) -> None:
        raise RuntimeError("Failed to download weights for tag 'openai': no route")

    monkeypatch.setattr("open_clip.create_model", fail)
    with pytest.raises(MissingWeights, match=r"judge\.pretrained=openai: .*judge\.name=local-dir.*judge=null"):
        ClipScorer.from_pretrained("ViT-L-14-quickgelu", "openai")
