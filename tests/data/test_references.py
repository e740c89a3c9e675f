"""How many references a sample has, and which."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from tars import Members, good, png, write_tar

from ipa.data.addresses import Address
from ipa.data.datamodule import ShardDataModule
from ipa.data.images.augment import Augmentation
from ipa.data.images.references import References
from ipa.types import Batch

COLOURS = ("red", "lime", "blue")
NAMES = [f"{colour}.png" for colour in COLOURS]


def at(index: int, epoch: int = 0) -> Address:
    return Address(0, epoch, "train", "0.tar", index)


def sample(key: str, number: int) -> Members:
    """With a reference in each of the first ``number`` colours."""
    references = [(f"{key}.{colour}.png", png(colour=colour)) for colour in COLOURS[:number]]
    return [*good(key), *references]


def batches(folder: Path, number: int = 4, **options: Any) -> list[Batch]:
    members = [member for i in range(12) for member in sample(f"k{i:02d}", 1 + i % 3)]
    train = write_tar(folder / "0.tar", members)
    data = ShardDataModule(train, batch_size=6, num_workers=0, reference=NAMES, **options)
    data.fit_to(image_size_px=16, reference_size_px=8, latent_shape=(4, 8, 8))
    loader = iter(data.train_dataloader())
    return [next(loader) for _ in range(number)]


def colours_of(batch: Batch, row: int) -> list[str]:
    """The colours of a sample's references."""
    assert batch.reference_B3HW is not None
    pictures = [batch.reference_B3HW[row]]
    if batch.more is not None:
        pictures += list(batch.more.reference_R3HW[batch.more.row_R == row])
    return [COLOURS[int(picture.float().mean((1, 2)).argmax())] for picture in pictures]


def test_numbers_have_the_given_chances() -> None:
    references = References((5, 3, 2))
    counts = Counter(references.number(at(i)) for i in range(2000))

    assert references.most == 3
    assert [counts[n] / 2000 for n in (1, 2, 3)] == pytest.approx([0.5, 0.3, 0.2], abs=0.03)
    assert References((1, 0, 0)).most == References().most == 1


def test_chosen_references_differ_and_each_can_be_first() -> None:
    references, offered = References((0, 0, 1)), ["a", "b", "c", "d"]
    chosen = [tuple(references.choose(offered, at(i))) for i in range(100)]

    assert all(len(set(each)) == 3 for each in chosen) and len(set(chosen)) == 24
    assert [each[0] for each in chosen] == [References().choose(offered, at(i))[0] for i in range(100)]
    assert sorted(references.choose(["a", "b"], at(0))) == ["a", "b"] and references.choose(["a"], at(0)) == ["a"]


@pytest.mark.parametrize("chances", [[], [0, 0], [1, -1], ["one"], [float("inf")], [1e308, 1e308], 1, None])
def test_chances_that_are_none_are_refused(chances: Any) -> None:
    with pytest.raises(ValueError, match=r"data\.references\.chances"):
        References(chances)


def test_batches_have_what_each_sample_has_up_to_the_drawn_number(tmp_path: Path) -> None:
    for batch in batches(tmp_path, references=References((0, 0, 1))):
        assert batch.more is not None and batch.more.slots == 2
        for row, key in enumerate(batch.keys):
            found = colours_of(batch, row)
            assert sorted(found) == sorted(COLOURS[: 1 + int(key[1:]) % 3])
            slots = batch.more.slot_R[batch.more.row_R == row].tolist()
            assert slots == list(range(len(found) - 1))


def test_one_reference_each_is_what_it_was(tmp_path: Path) -> None:
    one, several = batches(tmp_path), batches(tmp_path, references=References((0.4, 0.3, 0.3)))
    numbers = Counter[int]()
    for plain, more in zip(one, several, strict=True):
        assert plain.more is None and plain.keys == more.keys
        assert plain.reference_B3HW is not None and more.reference_B3HW is not None
        assert torch.equal(plain.reference_B3HW, more.reference_B3HW)
        assert torch.equal(plain.draws.noise_BCHW, more.draws.noise_BCHW)
        numbers.update(len(colours_of(more, row)) for row in range(6))
    assert set(numbers) == {1, 2, 3}


def test_references_of_a_sample_are_augmented_apart(tmp_path: Path) -> None:
    augment = Augmentation(brightness=0.5)
    (batch,) = batches(tmp_path, 1, references=References((0, 0, 1)), augment=augment)
    assert batch.more is not None and batch.reference_B3HW is not None
    values = [batch.reference_B3HW[row].max() for row in range(6)] + [x.max() for x in batch.more.reference_R3HW]
    assert len({int(value) for value in values}) > len(batch)


def test_more_references_than_members_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"up to 4 references, but train has only red\.png, lime\.png, blue\.png"):
        batches(tmp_path, references=References((0, 0, 0, 1)))
    with pytest.raises(ValueError, match="up to 2 references, but train has only the picture itself"):
        ShardDataModule(write_tar(tmp_path / "1.tar", good("a")), references=References((1, 1)))


def test_members_beyond_the_maximum_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="ipa.data.datamodule"):
        found = batches(tmp_path, references=References((0, 1)))

    assert "up to 2 of the references red.png, lime.png, blue.png" in caplog.text
    assert {len(colours_of(batch, row)) for batch in found for row in range(6)} == {1, 2}
