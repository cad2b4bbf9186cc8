import pytest
import torch
import torch.nn.functional as F
from torch import nn

from wsss_hf.models import d2cam
from wsss_hf.models.d2cam import D2cam, D2camConfig
from wsss_hf.models.maps import normalize_maps
from wsss_hf.models.methods import TrainingStep


class TinyBackbone(nn.Module):
    channels = [4, 6]
    strides = [2, 4]


def make_method(num_classes=3, **options):
    torch.manual_seed(0)
    return D2cam(D2camConfig(**{"embedding_channels": 8, "stages": [-1]} | options), TinyBackbone(), num_classes)


def make_step(tags, progress=1.0, seed=1):
    """A step whose CAMs are sure of the left column (each tagged class its own rows) and of the right columns."""
    generator = torch.Generator().manual_seed(seed)
    tags = torch.tensor(tags, dtype=torch.float32)
    batch, classes = tags.shape
    features = torch.randn(batch, 6, classes, 4, generator=generator, requires_grad=True)
    cams = torch.full((batch, classes, classes, 4), -1.0)
    cams[..., 1] = 0.5
    cams[:, range(classes), range(classes), 0] = 2.0
    cams.requires_grad_()
    images = torch.rand(batch, 3, 8, 8, generator=generator)
    return TrainingStep(images, images, tags, (features,), cams, progress, lambda pixels: None)


def unit(*values):
    return F.normalize(torch.tensor(values, dtype=torch.float32), dim=-1)


def as_row(vectors):
    """(n, E) vectors as the pixels of one image, (1, E, 1, n)."""
    return vectors.T[None, :, None]


# the equations


def test_certain_regions_are_exclusive_and_read_tagged_classes_only():
    cams = torch.tensor([[0.9, 0.9, 0.1, 0.5, 0.1], [0.1, 0.8, 0.1, 0.1, 0.1], [0.1, 0.1, 0.1, 0.1, 0.9]])
    foreground, background = d2cam.certain_regions(cams[None, :, None], torch.tensor([[1.0, 1.0, 0.0]]), 0.7, 0.2)
    assert foreground[0, :, 0].int().tolist() == [[1, 0, 0, 0, 0], [0] * 5, [0] * 5]
    assert background[0, 0].int().tolist() == [0, 0, 1, 0, 1]


def test_prototypes_move_by_momentum_start_at_the_mean_and_stay_when_absent():
    prototypes = torch.stack((unit(1, 0, 0), torch.zeros(3), unit(0, 0, 1)))
    seen = torch.tensor([True, False, True])
    embeddings = as_row(torch.stack((unit(0, 1, 0), unit(1, 0, 0), unit(0, 0, 1), unit(0, 0, -1))))
    foreground = torch.tensor([[1, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]], dtype=torch.bool)[None, :, None]
    moved, now_seen = d2cam.updated_prototypes(prototypes, seen, embeddings, foreground, momentum=0.75)
    torch.testing.assert_close(moved, torch.stack((unit(0.75, 0.25, 0), unit(1, 0, 1), unit(0, 0, 1))))
    assert now_seen.tolist() == [True, True, True]
    still, unseen = d2cam.updated_prototypes(prototypes, seen, embeddings, torch.zeros_like(foreground), 0.75)
    assert still.equal(prototypes) and unseen.equal(seen)


def test_prototypes_of_two_processes_are_those_of_the_whole_batch(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    embeddings = F.normalize(torch.randn(4, 5, 3, 3, generator=generator), dim=1)
    foreground = torch.rand(4, 2, 3, 3, generator=generator) > 0.6
    bank = torch.zeros(2, 5), torch.tensor([False, False])
    whole, _ = d2cam.updated_prototypes(*bank, embeddings, foreground, 0.9)

    sent = []
    monkeypatch.setattr(d2cam, "all_reduce_sum", lambda tensor: sent.append(tensor) or tensor)
    for half in (slice(0, 1), slice(1, 4)):
        d2cam.updated_prototypes(*bank, embeddings[half], foreground[half], 0.9)
    monkeypatch.setattr(d2cam, "all_reduce_sum", lambda tensor: sum(sent))
    half, _ = d2cam.updated_prototypes(*bank, embeddings[:1], foreground[:1], 0.9)
    torch.testing.assert_close(half, whole)


def test_prototype_maps_are_positive_cosines_and_empty_for_unseen_classes():
    embeddings = as_row(torch.stack((unit(1, 0), unit(1, 1), unit(-1, 0))))
    prototypes = torch.stack((unit(1, 0), unit(1, 0)))
    maps = d2cam.prototype_maps(embeddings, prototypes, torch.tensor([True, False]))
    torch.testing.assert_close(maps[0, :, 0], torch.tensor([[1, 0.5**0.5, 0], [0, 0, 0]]))


def test_category_decoupling_is_cross_entropy_over_the_seen_prototypes():
    generator = torch.Generator().manual_seed(0)
    embeddings = F.normalize(torch.randn(1, 4, 1, 3, generator=generator), dim=1).requires_grad_()
    prototypes = F.normalize(torch.randn(3, 4, generator=generator), dim=1)
    seen = torch.tensor([True, True, False])
    foreground = torch.tensor([[1, 1, 0], [0, 0, 0], [0, 0, 1]], dtype=torch.bool)[None, :, None]
    loss = d2cam.category_decoupling_loss(embeddings, foreground, prototypes, seen, temperature=0.2)
    logits = embeddings[0, :, 0].T @ prototypes[:2].T / 0.2
    torch.testing.assert_close(loss, F.cross_entropy(logits[:2], torch.tensor([0, 0])))

    loss.backward()
    gradient = embeddings.grad[0, :, 0]
    assert gradient[:, :2].any() and gradient[:, 2].eq(0).all()  # the unseen class does not attract its pixel
    changed = torch.cat((prototypes[:2], -prototypes[2:]))
    repelled = d2cam.category_decoupling_loss(embeddings, foreground, changed, seen, temperature=0.2)
    assert repelled.item() == loss.item()


def test_category_decoupling_weighs_regions_alike():
    prototypes = torch.eye(2)
    embeddings = as_row(torch.stack((unit(1, 0), unit(1, 0), unit(1, 0), unit(1, 0))))
    foreground = torch.tensor([[1, 1, 1, 0], [0, 0, 0, 1]], dtype=torch.bool)[None, :, None]
    loss = d2cam.category_decoupling_loss(embeddings, foreground, prototypes, torch.tensor([True, True]), 1.0)
    right, wrong = (
        F.cross_entropy(torch.eye(2), torch.tensor([0, 1])),
        F.cross_entropy(torch.eye(2), torch.tensor([1, 0])),
    )
    torch.testing.assert_close(loss, (right + wrong) / 2)


def test_empty_bank_gives_zero_without_nan():
    embeddings = torch.ones(1, 4, 2, 2, requires_grad=True)
    foreground = torch.ones(1, 3, 2, 2, dtype=torch.bool)
    loss = d2cam.category_decoupling_loss(embeddings, foreground, torch.zeros(3, 4), torch.zeros(3, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0 and embeddings.grad.eq(0).all()


def test_foreground_background_decoupling_is_cross_entropy_between_two_fixed_centres():
    embeddings = F.normalize(torch.randn(1, 4, 1, 5, generator=torch.Generator().manual_seed(0)), dim=1)
    ours, theirs = embeddings.clone().requires_grad_(), embeddings.clone().requires_grad_()
    foreground = torch.tensor([[1, 1, 1, 0, 0]], dtype=torch.bool)[None, :, None]
    loss = d2cam.foreground_background_loss(ours, foreground, ~foreground[:, 0], temperature=0.5)

    centres = torch.stack(
        [F.normalize(embeddings[0, :, 0, side].sum(dim=1), dim=0) for side in (slice(3), slice(3, 5))]
    )
    logits = theirs[0, :, 0].T @ centres.T / 0.5
    zeros, ones = torch.zeros(3, dtype=torch.long), torch.ones(2, dtype=torch.long)
    expected = (F.cross_entropy(logits[:3], zeros) + F.cross_entropy(logits[3:], ones)) / 2
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_sides_of_an_image_are_pulled_apart():
    embeddings = F.normalize(torch.randn(1, 4, 1, 6, generator=torch.Generator().manual_seed(0)), dim=1)
    foreground = torch.tensor([[1, 1, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0]], dtype=torch.bool)[None, :, None]
    background = torch.tensor([0, 0, 0, 1, 1, 0], dtype=torch.bool)[None, None]
    pixels = embeddings[0, :, 0].T.clone().requires_grad_()
    optimiser = torch.optim.SGD([pixels], lr=0.5)
    history = []
    for _ in range(50):
        optimiser.zero_grad()
        loss = d2cam.foreground_background_loss(as_row(F.normalize(pixels, dim=1)), foreground, background, 0.5)
        loss.backward()
        history.append(loss.item())
        assert pixels.grad[5].eq(0).all()  # an uncertain pixel takes no part
        optimiser.step()
    final = F.normalize(pixels.detach(), dim=1)
    assert history[-1] < 0.3 * history[0]
    assert (final[:3] @ final[:3].T).min() > 0.5 > -0.5 > (final[:3] @ final[3:5].T).max()


def test_an_image_with_one_side_only_adds_nothing():
    embeddings = F.normalize(torch.randn(1, 4, 1, 3, generator=torch.Generator().manual_seed(0)), dim=1)
    everywhere, nowhere = torch.ones(1, 1, 3, dtype=torch.bool), torch.zeros(1, 1, 3, dtype=torch.bool)
    assert d2cam.foreground_background_loss(embeddings, nowhere[:, None], everywhere).item() == 0
    assert d2cam.foreground_background_loss(embeddings, everywhere[:, None], nowhere).item() == 0


def test_stabilisation_is_the_mean_difference_where_it_counts():
    maps = torch.tensor([[[[0.5, 0.5, 0.9]]]], requires_grad=True)
    cams = torch.tensor([[[[1.0, 0.4, 0.0]]]], requires_grad=True)
    loss = d2cam.stabilisation_loss(maps, cams, torch.tensor([[[[True, True, False]]]]))
    torch.testing.assert_close(loss, torch.tensor(0.3))
    loss.backward()
    torch.testing.assert_close(maps.grad.flatten(), torch.tensor([-0.5, 0.5, 0.0]))
    assert cams.grad is None


def test_exclusivity_is_the_mean_product_with_each_other_class():
    generator = torch.Generator().manual_seed(0)
    maps, tags = torch.rand(2, 3, 2, 2, generator=generator), torch.tensor([[1.0, 0, 1.0], [0, 1.0, 0]])
    expected = []
    for image in range(2):
        pairs = [(a, b) for a in range(3) for b in range(3) if tags[image, a] and a != b]
        expected.append(torch.stack([(maps[image, a] * maps[image, b]).mean() for a, b in pairs]).mean())
    torch.testing.assert_close(d2cam.exclusivity_loss(maps, tags), torch.stack(expected).mean())

    exclusive = F.one_hot(maps.argmax(dim=1), 3).permute(0, 3, 1, 2).float()
    assert d2cam.exclusivity_loss(exclusive, tags).item() == 0


# the module


def test_gradients_reach_the_features_and_the_head_never_the_cams():
    method, step = make_method(), make_step([[1, 0, 0], [0, 1, 1]])
    losses = method.losses(step)
    assert set(losses) == {"d2cam_category", "d2cam_foreground", "d2cam_stabilisation", "d2cam_exclusivity"}
    for loss in losses.values():
        (gradient,) = torch.autograd.grad(loss, step.features[0], retain_graph=True)
        assert loss > 0 and gradient.any()
    sum(losses.values()).backward()
    assert step.cams.grad is None
    assert all(parameter.grad.any() for parameter in method.parameters())


def test_the_head_may_learn_alone():
    method, step = make_method(train_backbone=False), make_step([[1, 0, 0], [0, 1, 1]])
    losses = method.losses(step)
    for name, loss in make_method().losses(step).items():
        torch.testing.assert_close(losses[name], loss)
    sum(losses.values()).backward()
    assert step.features[0].grad is None
    assert all(parameter.grad.any() for parameter in method.parameters())


def test_batch_without_tags_is_harmless():
    method, step = make_method(), make_step([[0, 0, 0], [0, 0, 0]])
    method.losses(make_step([[1, 1, 1]]))
    bank = method.prototypes.clone()
    losses = method.losses(step)
    assert all(loss.item() == 0 for loss in losses.values())
    sum(losses.values()).backward()
    assert all(parameter.grad.eq(0).all() for parameter in method.parameters())
    assert method.prototypes.equal(bank)


def test_losses_are_finite_float32_under_autocast():
    method, step = make_method(), make_step([[1, 0, 0], [0, 1, 1]])
    with torch.autocast("cpu", torch.bfloat16):
        losses = method.losses(step)
        maps = method.maps(step)
    exact = make_method().losses(step)
    for name, loss in losses.items():
        assert loss.dtype == torch.float32 and loss.isfinite()
        assert loss.item() == pytest.approx(exact[name].item(), rel=0.1)
    assert maps.dtype == torch.float32


def test_bank_fills_with_the_tagged_classes_in_training_only():
    method, step = make_method(), make_step([[1, 0, 0], [1, 1, 0]])
    method.eval().losses(step)
    assert not method.seen.any()
    method.train().losses(step)
    assert method.seen.tolist() == [True, True, False]
    torch.testing.assert_close(method.prototypes.norm(dim=1), torch.tensor([1.0, 1.0, 0.0]))


def test_weights_ramp_up_linearly():
    def losses_at(progress):
        return make_method(ramp=0.2).losses(make_step([[1, 0, 0], [0, 1, 1]], progress))

    start, middle, later = losses_at(0.0), losses_at(0.1), losses_at(0.9)
    for name, loss in later.items():
        assert start[name].item() == 0
        torch.testing.assert_close(middle[name], 0.5 * loss)


@pytest.mark.parametrize("name", ["category", "foreground", "stabilisation", "exclusivity"])
def test_each_loss_has_its_own_weight(name):
    step = make_step([[1, 0, 0], [0, 1, 1]])
    base, off = make_method().losses(step), make_method(**{f"{name}_weight": 0.0}).losses(step)
    assert [key for key in base if base[key] != off[key]] == [f"d2cam_{name}"]
    assert off[f"d2cam_{name}"].item() == 0


def test_maps_use_the_bank_where_it_has_the_class_and_the_cam_where_not():
    method, step = make_method(), make_step([[1, 0, 0], [0, 1, 0]])
    method.losses(step)
    maps = method.eval().maps(step)
    similarity = F.cosine_similarity(
        method.embeddings(step.features)[:, None], method.prototypes[:2, :, None, None], dim=2
    )
    assert maps.min() >= 0
    torch.testing.assert_close(maps[:, :2], similarity.relu())
    torch.testing.assert_close(maps[:, 2], normalize_maps(step.cams)[:, 2])


def test_bank_survives_saving():
    method, step = make_method(), make_step([[1, 0, 0], [0, 1, 0]])
    method.losses(step)
    restored = make_method()
    restored.load_state_dict(method.state_dict())
    assert restored.seen.equal(method.seen) and restored.prototypes.equal(method.prototypes)
    assert restored.eval().maps(step).equal(method.eval().maps(step))


def test_the_map_grows_from_the_certain_pixel_to_the_object():
    generator = torch.Generator().manual_seed(0)
    is_object = torch.zeros(4, 8, 8, dtype=torch.bool)
    is_object[:, 2:6, 2:6] = True
    features = 0.3 * torch.randn(4, 6, 8, 8, generator=generator)
    features[:, 0] += torch.where(is_object, 2.0, 0.0)
    tags = torch.eye(2).repeat(2, 1)
    features[:, 1] += 2 * is_object * tags[:, 1, None, None]
    cams = torch.where(is_object[:, None], 1.5, -1.0).repeat(1, 2, 1, 1)  # uncertain on the object
    cams[:, :, 3:5, 3:5] = 4.0  # but for its centre
    step = TrainingStep(features, features, tags, (features,), cams, 1.0, lambda pixels: None)
    method = make_method(num_classes=2)
    optimiser = torch.optim.Adam(method.parameters(), lr=0.01)
    for _ in range(80):
        optimiser.zero_grad()
        sum(method.losses(step).values()).backward()
        optimiser.step()
    maps = method.eval().maps(step)
    own = maps[tags.bool()]
    assert ((own > 0.6) == is_object).float().mean() > 0.95
    assert maps[~tags.bool()][is_object].mean() < 0.5 * own[is_object].mean()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"embedding_channels": 0}, "embedding_channels: expected a whole number >= 1, got 0"),
        (
            {"foreground_threshold": 0.1},
            r"background_threshold: .* foreground_threshold \(0.1\), got 0.2",
        ),
        ({"temperature": 0}, "temperature: expected a number > 0, got 0"),
        ({"momentum": 1.0}, r"momentum: expected a number in \[0, 1\), got 1.0"),
        ({"ramp": -1}, r"ramp: expected a number in \[0, 1\], got -1"),
        ({"exclusivity_weight": -2}, "exclusivity_weight: expected a number >= 0, got -2"),
    ],
)
def test_config_refuses_bad_values(options, words):
    with pytest.raises(ValueError, match=f"d2cam.{words}"):
        D2camConfig.from_dict(options, "d2cam")


def test_the_head_reads_the_stages_that_are_named():
    features = (torch.randn(1, 4, 6, 8), torch.randn(1, 6, 3, 4))
    for stages, read in (([-2], [0]), ([-1], [1]), ([0, 1], [0, 1]), (None, [0, 1])):
        method = make_method(stages=stages)
        assert method.config.stages == (stages or [-2, -1])  # a saved model says which they are
        embeddings = method.embeddings(features)
        assert embeddings.shape == (1, 8, 3, 4)  # the resolution of the maps
        for stage in (0, 1):
            changed = [maps.clone() for maps in features]
            changed[stage] += 1
            assert torch.equal(method.embeddings(tuple(changed)), embeddings) is (stage not in read)
    with pytest.raises(ValueError, match=r"d2cam.stages: expected stages of this backbone \(-2 to 1\), got -3"):
        make_method(stages=[-3])
    with pytest.raises(ValueError, match="stages: expected a list of whole numbers or null"):
        make_method(stages=[])
