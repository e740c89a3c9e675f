import pytest
import torch

from ipa.adapter.heads import GlobalHead
from ipa.types import Features


def test_tokens_are_a_normalised_linear_map_of_the_pooled_embedding() -> None:
    head = GlobalHead(embedding_width=12, context_width=16, num_tokens=3)
    pooled = torch.randn(2, 12)
    rows = (pooled @ head.proj.weight.T + head.proj.bias).view(2, 3, 16)
    centred = rows - rows.mean(-1, keepdim=True)
    expected = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()

    torch.testing.assert_close(head(Features(pooled_BE=pooled)), expected)


def test_the_head_is_the_published_one() -> None:
    with torch.device("meta"):
        head = GlobalHead(embedding_width=1024, context_width=768)

    shapes = {name: tuple(tensor.shape) for name, tensor in head.state_dict().items()}
    assert shapes == {"proj.weight": (3072, 1024), "proj.bias": (3072,), "norm.weight": (768,), "norm.bias": (768,)}
    assert (head.uses, head.no_image, head.norm.eps) == ("pooled", "zeros", 1e-5)


def test_the_time_makes_no_difference() -> None:
    head, features = GlobalHead(12, 16), Features(pooled_BE=torch.randn(2, 12))

    assert torch.equal(head(features), head(features, torch.tensor([1, 999])))


def test_features_in_half_precision_are_read() -> None:
    head = GlobalHead(12, 16)

    assert head(Features(pooled_BE=torch.randn(2, 12, dtype=torch.bfloat16))).dtype == torch.float32


def test_no_tokens_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match=r"tokens\.num_tokens=0: .*the paper has 4"):
        GlobalHead(12, 16, num_tokens=0)
