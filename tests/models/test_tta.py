import pytest
import torch
from torch.nn import functional as F

from wsss_hf.inference.cam_maps import average_maps, label_confidence, label_map, localize
from wsss_hf.models.image_processing_wsss import WsssImageProcessor
from wsss_hf.models.maps import add_background
from wsss_hf.models.modeling_cam import CamClassifier, CamOutput
from wsss_hf.models.tta import resize_images, views

SIZE = (40, 56)


@pytest.fixture
def model(cam_folder):
    return CamClassifier.from_pretrained(cam_folder).eval()


@pytest.fixture
def images(cam_folder, toy_data):
    processor = WsssImageProcessor.from_pretrained(cam_folder)
    images = processor(images=toy_data["train"][:3]["image"], return_tensors="pt")["pixel_values"]
    return F.interpolate(images, size=(48, 64), mode="bilinear")


@pytest.fixture
def tags():
    tags = torch.zeros(3, 8)
    tags[0, [1, 4, 6]] = tags[2, 0] = 1  # the second image has none
    return tags


def with_background(maps, threshold):
    return add_background(maps[None], threshold)[0]


def labels_of(scores, classes):
    """Labels and their confidence."""
    labels = label_map(scores, classes)
    return labels, label_confidence(scores, labels, classes)


@torch.no_grad()
def localize_plainly(model, images, tags, size, scales, flip, fusion):
    """One image, one scale, one mirror image, one class at a time."""
    maps, logits = [], []
    for image, present in zip(images, tags, strict=True):
        views, image_logits = [], []
        for scale in scales:
            side = [round(length * scale) for length in image.shape[-2:]]
            scaled = F.interpolate(image[None], size=side, mode="bilinear", antialias=True)
            for mirrored in (False, True) if flip else (False,):
                output = model(scaled.flip(-1) if mirrored else scaled)
                cams = output.cams.flip(-1) if mirrored else output.cams
                views.append(F.interpolate(cams.clamp_min(0), size=size, mode="bilinear")[0])
                image_logits.append(output.logits[0])
        logits.append(sum(image_logits) / len(image_logits))
        for c in present.nonzero().flatten().tolist():
            normalized = torch.stack([view[c] / (view[c].max() + 1e-5) for view in views])
            fused = normalized.mean(dim=0) if fusion == "mean" else normalized.max(dim=0).values
            maps.append(fused / (fused.max() + 1e-5))
    return torch.stack(maps), torch.stack(logits)


@pytest.mark.parametrize("fusion", ["mean", "max"])
@pytest.mark.parametrize(("scales", "flip"), [((1.0,), False), ((0.75, 1.0, 1.5), True)])
def test_batched_views_are_the_plain_loop(model, images, tags, scales, flip, fusion):
    maps, logits = localize(model, images, tags, SIZE, scales, flip, fusion)
    wanted_maps, wanted_logits = localize_plainly(model, images, tags, SIZE, scales, flip, fusion)
    assert maps.shape == (4, *SIZE)
    torch.testing.assert_close(maps, wanted_maps, atol=1e-4, rtol=0)
    torch.testing.assert_close(logits, wanted_logits, atol=1e-4, rtol=1e-4)
    assert maps.min() >= 0 and (maps.amax(dim=(1, 2)) > 0.999).sum() >= 3


@pytest.mark.parametrize(("scales", "flip"), [((1.0,), False), ((0.5, 1.0, 1.5, 2.0), True)])
def test_the_sum_is_that_of_raw_maps_on_the_corners_of_what_the_network_saw(model, images, tags, scales, flip):
    maps, _ = localize(model, images, tags, SIZE, scales, flip, "sum")
    wanted = []
    for image, present in zip(images, tags, strict=True):
        for c in present.nonzero().flatten().tolist():
            total = torch.zeros(SIZE)
            for scale in scales:
                side = [round(length * scale) for length in image.shape[-2:]]
                scaled = F.interpolate(image[None], side, mode="bilinear", antialias=True)
                for mirrored in (False, True)[: 1 + flip]:
                    with torch.no_grad():
                        view = model(scaled.flip(-1) if mirrored else scaled).maps[:, c : c + 1]
                    view = F.interpolate(view, side, mode="bilinear", align_corners=True)
                    view = F.interpolate(view, SIZE, mode="bilinear", align_corners=False)[0, 0]
                    total += view.flip(-1) if mirrored else view
            total = total.clamp(min=0)
            wanted.append((total - total.min() - 1e-5) / (total.max() - total.min() + 1e-5))
    torch.testing.assert_close(maps, torch.stack(wanted).clamp(min=0), atol=1e-4, rtol=0)
    assert not torch.allclose(maps, localize(model, images, tags, SIZE, scales, flip)[0], atol=0.02)


def test_every_view_counts(model, images, tags):
    single, flipped, scaled = (
        localize(model, images, tags, SIZE, scales, flip)[0]
        for scales, flip in [((1.0,), False), ((1.0,), True), ((1.0, 1.5), False)]
    )
    assert (single - flipped).abs().max() > 0.01 and (single - scaled).abs().max() > 0.01


def test_images_without_tags_have_logits_but_no_map(model, images):
    maps, logits = localize(model, images, torch.zeros(3, 8), SIZE)
    assert maps.shape == (0, *SIZE) and logits.shape == (3, 8)


def test_a_map_that_is_zero_everywhere_stays_zero(model, images, tags):
    model.classifier.weight.data[4] = -1.0  # features are not negative after the last relu
    maps, _ = localize(model, images, tags, SIZE)
    assert not maps[1].any() and maps[[0, 2, 3]].amax(dim=(1, 2)).min() > 0.999
    labels, confidence = labels_of(with_background(maps[1:2], 0.4), torch.tensor([4]))
    assert not labels.any() and confidence.isfinite().all()


def as_probabilities(model):
    """A network whose maps are those of the model's CAMs, less 1, as probabilities."""

    def network(pixels):
        found = model(pixels)
        return CamOutput(logits=found.logits, cams=found.cams, maps=(found.cams - 1).sigmoid())

    return network


@pytest.mark.parametrize(("scales", "flip"), [((1.0,), False), ((0.75, 1.25), True)])
def test_averages_are_those_of_the_plain_loop(model, images, tags, scales, flip):
    logits, cams = average_maps(as_probabilities(model), images, tags, SIZE, scales, flip)
    torch.testing.assert_close(logits, cams - 1, atol=1e-4, rtol=1e-4)
    views = []
    with torch.no_grad():
        for scale in scales:
            scaled = images if scale == 1 else resize_images(images, scale)
            for mirror in (False, True)[: 1 + flip]:
                view = model(scaled.flip(-1) if mirror else scaled).cams
                view = view.flip(-1) if mirror else view
                views.append(F.interpolate(view, size=SIZE, mode="bilinear")[tags.bool()])
    torch.testing.assert_close(cams, torch.stack(views).mean(dim=0), atol=1e-4, rtol=1e-4)


def test_averages_want_probabilities(model, images, tags):
    with pytest.raises(ValueError, match="maps that are probabilities.*cam.maps: icd"):
        average_maps(model, images, tags, SIZE)


@torch.no_grad()
def test_padded_images_lie_at_the_top_left_and_the_rest_is_cut_off(model, images, tags):
    logits, cams = average_maps(as_probabilities(model), images, tags, (48, 64), flip=False, pad=65)
    maps, _ = localize(model, images, tags, (48, 64), flip=False, pad=65)
    whole = torch.zeros(3, 3, 65, 65)
    whole[:, :, :48, :64] = images
    wanted = F.interpolate(model(whole).cams, size=(65, 65), mode="bilinear")[tags.bool()][:, :48, :64]
    torch.testing.assert_close(cams, wanted, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits, wanted - 1, atol=1e-4, rtol=1e-4)
    positive = F.interpolate(model(whole).cams.relu(), size=(65, 65), mode="bilinear")[tags.bool()][:, :48, :64]
    torch.testing.assert_close(maps, positive / positive.amax(dim=(1, 2), keepdim=True), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(maps, localize(model, images, tags, (48, 64), flip=False)[0], atol=0.01)
    larger, _ = localize(model, images, tags, (48, 64), flip=False, pad=40)  # no side is shorter
    assert torch.equal(larger, localize(model, images, tags, (48, 64), flip=False)[0])


def test_an_unknown_fusion_is_refused(model, images, tags):
    with pytest.raises(ValueError, match="fusion: expected mean or max, got 'median'"):
        localize(model, images, tags, SIZE, fusion="median")


def test_a_label_is_the_strongest_map_above_the_threshold():
    maps = torch.tensor([[[0.9, 0.5, 0.3, 0.0]], [[0.2, 0.7, 0.39, 0.0]]])
    labels, confidence = labels_of(with_background(maps, 0.4), torch.tensor([2, 5]))
    assert labels.dtype == torch.uint8 and labels.tolist() == [[3, 6, 0, 0]]
    torch.testing.assert_close(confidence, torch.tensor([[1 - 0.4 / 0.9, 1 - 0.5 / 0.7, 1 - 0.39 / 0.4, 1.0]]))


def test_no_tag_is_background_everywhere():
    labels, confidence = labels_of(torch.full((1, 2, 3), 0.4), torch.zeros(0, dtype=torch.long))
    assert labels.shape == (2, 3) and not labels.any() and confidence.isfinite().all()


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_background_wins_a_tie_then_the_first_class(count):
    maps = torch.randint(0, 5, (count, 30, 30), generator=torch.Generator().manual_seed(0)) / 4
    labels, confidence = labels_of(with_background(maps, 0.5), torch.arange(count))
    strongest, first = maps.max(dim=0)
    wanted = torch.where(strongest > 0.5, first + 1, 0)
    assert torch.equal(labels.long(), wanted)
    tied = (torch.cat([torch.full((1, 30, 30), 0.5), maps]) == strongest.clamp_min(0.5)).sum(dim=0) > 1
    assert torch.equal(confidence == 0, tied)


def test_maps_are_those_of_the_models_own_scores(model, images, tags):
    """The scores of a model for an image are those of `localize` for a batch, to the bit."""
    for scales, flip in (((1.0,), False), ((0.75, 1.5), True)):
        maps, _ = localize(model, images, tags, SIZE, scales, flip)
        maps_of = maps.split([int(count) for count in tags.sum(dim=1)])
        for image, own, found in zip(images.split(1), tags.split(1), maps_of, strict=True):
            with torch.no_grad():
                outputs = list(views(model, image, scales, flip))
                scores = model.segmentation_scores(outputs, SIZE, own, background_threshold=0.4)
            assert torch.equal(scores[:, 1:][own.bool()], found) and not scores[:, 1:][~own.bool()].any()
            assert (scores[:, 0] == 0.4).all()
            if not flip:
                with torch.no_grad():
                    alone = model.segmentation_scores(model(image), SIZE, own, background_threshold=0.4)
                assert torch.equal(alone, scores)


def test_bf16_is_near_and_float32_the_default_on_cpus(model, images, tags):
    exact, rough = (localize(model, images, tags, SIZE, bf16=bf16)[0] for bf16 in (None, True))
    assert torch.equal(exact, localize(model, images, tags, SIZE, bf16=False)[0])
    assert rough.dtype == torch.float32 and 1e-4 < (rough - exact).abs().max() < 0.2


@pytest.mark.parametrize(("size", "scale", "wanted"), [((48, 64), 0.75, (36, 48)), ((1, 3), 0.25, (1, 1))])
def test_no_side_shrinks_to_nothing(size, scale, wanted):
    resized = resize_images(torch.full((1, 3, *size), 0.5), scale)
    assert resized.shape == (1, 3, *wanted)
    torch.testing.assert_close(resized, torch.full_like(resized, 0.5))
