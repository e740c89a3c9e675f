import pytest

from ipa.metrics.clip import ClipScorer


@pytest.fixture(scope="session")
def scorer(clip_name: str) -> ClipScorer:
    return ClipScorer.from_pretrained(clip_name)
