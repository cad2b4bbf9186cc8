import pytest
import torch
from torch.nn import functional as F
from transformers import EomtConfig, EomtForUniversalSegmentation

from wsss_hf.models.mask_classifiers import load_segmentation_model, pixel_logits, square_side

CONFIG = EomtConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=32, num_blocks=1)


@pytest.fixture
def queries():
    """Class logits (2, 5, 4) and mask logits (2, 5, 6, 7)."""
    generator = torch.Generator().manual_seed(0)
    return [3 * torch.randn(2, 5, *shape, generator=generator) for shape in ((4,), (6, 7))]


def test_their_softmax_is_the_share_of_each_class_in_the_masks_that_cover_a_pixel(queries):
    classes, masks = queries
    cover = F.interpolate(masks, (12, 14), mode="bilinear").sigmoid()
    scores = torch.stack([(classes.softmax(-1)[:, :, k, None, None] * cover).sum(dim=1) for k in range(3)], dim=1)
    share = pixel_logits(classes, masks, (12, 14)).softmax(dim=1)
    torch.testing.assert_close(share, scores / scores.sum(dim=1, keepdim=True))


def test_half_precision_around_it_changes_nothing(queries):
    with torch.autocast("cpu", torch.bfloat16):
        within = pixel_logits(*queries, (12, 14))
    assert torch.equal(within, pixel_logits(*queries, (12, 14)))
    assert pixel_logits(*(logits.bfloat16() for logits in queries), (6, 7)).dtype == torch.float32


@pytest.mark.parametrize("height", [-60.0, -80.0, -1000.0])
def test_pixels_that_no_mask_covers_stay_finite_and_teach_while_they_can(queries, height):
    classes, masks = (logits.requires_grad_() for logits in queries)
    logits = pixel_logits(classes, masks + height, (6, 7))
    F.cross_entropy(logits, torch.zeros(2, 6, 7, dtype=torch.long)).backward()
    assert logits.isfinite().all() and classes.grad.isfinite().all() and masks.grad.isfinite().all()
    assert classes.grad.any() == (height > -100)


@pytest.mark.parametrize("named", [False, True])
def test_a_loaded_mask_classifier_gives_logits_and_is_saved_as_it_was(tmp_path, named):
    EomtForUniversalSegmentation(CONFIG).save_pretrained(tmp_path / "published")
    model = load_segmentation_model(tmp_path / "published").eval()
    pixel_values = torch.randn(2, 3, 32, 32)
    output = model(pixel_values=pixel_values) if named else model(pixel_values)
    assert output.logits.shape == (2, 2, 32, 32) and square_side(model) == 32
    model.save_pretrained(tmp_path / "saved")
    plain = EomtForUniversalSegmentation.from_pretrained(tmp_path / "saved").eval()(pixel_values)
    assert torch.equal(plain.masks_queries_logits, output.masks_queries_logits) and "logits" not in plain
