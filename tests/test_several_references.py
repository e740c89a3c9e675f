"""Batches whose samples have different numbers of references: what is absent has no part in anything."""

from dataclasses import replace

import pytest
import tiny
import torch
from torch import Tensor

from ipa.model import IPAdapterModel
from ipa.types import Batch, MoreReferences

COUNTS = (1, 3, 2)
HEADS = ["global", "fine_grained", "full"]


def make_batch(counts: tuple[int, ...] = COUNTS, slots: int = 2, **drops: bool) -> Batch:
    rows = [(row, slot) for row, count in enumerate(counts) for slot in range(count - 1)]
    row_R, slot_R = torch.tensor(rows).T
    pixels = tiny.make_pictures(len(rows), tiny.REFERENCE_PX, seed=5)
    return replace(tiny.make_batch(len(counts), **drops), more=MoreReferences(pixels, row_R, slot_R, slots))


def installed(head: str) -> IPAdapterModel:
    model = tiny.shake(tiny.make_model(head=head))
    model.adapter.install()
    return model


def references_of(batch: Batch, row: int) -> list[Tensor]:
    assert batch.reference_B3HW is not None and batch.more is not None
    return [batch.reference_B3HW[row], *batch.more.reference_R3HW[batch.more.row_R == row]]


def unpadded(model: IPAdapterModel, batch: Batch) -> Tensor:
    """error_B, each sample by itself with the concatenated tokens of its references, as in sampling."""
    draws, errors = batch.draws, []
    x0 = model.posterior_of(batch).sample(draws.posterior_noise_BCHW)
    corrupted = model.family.corrupt(x0, draws.noise_BCHW, draws.time_B)
    for row, text in enumerate(batch.text):
        one = slice(row, row + 1)
        images = [model.encode_reference(each[None]) for each in references_of(batch, row)]
        images = [model.no_image(1)] if draws.drop_image_B[row] else images
        tokens = model.image_tokens(*images, t_B=corrupted.time_B[one])
        encoded = model.family.encode_text([text])
        prediction = model.predict(corrupted.noisy[one], corrupted.time_B[one], encoded, tokens, 1.0)
        errors.append((prediction - corrupted.target[one]).square().mean())
    return torch.stack(errors)


@pytest.mark.parametrize("head", HEADS)
def test_padded_references_equal_the_unpadded_computation(head: str) -> None:
    model, batch = installed(head), make_batch()
    with torch.no_grad():
        several = model.errors(batch).error_B
        torch.testing.assert_close(several, unpadded(model, batch), rtol=1e-6, atol=0)
        alone = model.errors(replace(batch, more=None)).error_B
        wider = replace(batch, more=replace(batch.more, slots=5))
        torch.testing.assert_close(model.errors(wider).error_B, several, rtol=1e-6, atol=0)

    assert ((several - alone).abs() > 1e-4).tolist() == [False, True, True]


def test_a_dropped_image_leaves_no_image_alone() -> None:
    model, batch = installed("global"), make_batch(drop_image=True)
    with torch.no_grad():
        torch.testing.assert_close(model.errors(batch).error_B, unpadded(model, batch), rtol=1e-6, atol=0)
        plain = model.errors(tiny.make_batch(drop_image=True)).error_B
        torch.testing.assert_close(model.errors(batch).error_B, plain, rtol=1e-6, atol=0)


def test_absent_tokens_have_neither_influence_nor_gradient() -> None:
    model = installed("global")
    latents, t_B, text, tokens = tiny.make_inputs(model)
    tokens = torch.cat([tokens, 1e3 * torch.randn_like(tokens)], 1).requires_grad_()
    present_BT = torch.ones(tokens.shape[:2], dtype=torch.bool)
    present_BT[:, 4:] = False
    prediction = model.predict(latents, t_B, text, tokens, 1.0, present_BT)
    (gradient,) = torch.autograd.grad(prediction.square().sum(), tokens)
    with torch.no_grad():
        torch.testing.assert_close(prediction, model.predict(latents, t_B, text, tokens[:, :4], 1.0))
        off = model.predict(latents, t_B, text, tokens, 0.0, present_BT)
        assert torch.equal(off, model.predict(latents, t_B, text, None, 0.0))

    assert gradient[:, :4].abs().min() > 0 and not gradient[:, 4:].any()


def test_recomputed_blocks_leave_out_the_same_tokens() -> None:
    gradients = []
    for recomputes in (False, True):
        model = installed("global")
        if recomputes:
            model.checkpoint_gradients()
        gradients.append(torch.autograd.grad(model.errors(make_batch()).loss, model.trained()))

    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected)


def test_all_references_of_a_sample_move_to_its_neighbour() -> None:
    batch = make_batch()
    moved = batch.with_neighbours_image()

    for row in range(3):
        before = references_of(batch, row - 1 if row else 2)
        assert all(map(torch.equal, references_of(moved, row), before)) and len(before) == COUNTS[row - 1]
