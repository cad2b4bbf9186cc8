"""One whole training step of PLDA on SEAM: the model against the released program's step, written out plainly."""

import pytest
import torch
from torch.nn import functional as F

from wsss_hf import CamClassifier, CamConfig
from wsss_hf.models.wide_resnet import WideResNet38Config

CLASSES, PROGRESS, SCALE = 3, 0.3, 0.3
TAGS = torch.tensor([[1.0, 1, 0], [1, 0, 1]])
DILATIONS, ITERATIONS = [1, 2], 3


@pytest.fixture
def model():
    torch.manual_seed(3)
    backbone = WideResNet38Config(widths=[4, 4, 8, 8, 16, 24, 32], dropout=(0, 0))
    plda = {"maps": "seam", "hidden": [16, 8], "dropout": 0.0}
    plda |= {"pamr_iterations": ITERATIONS, "pamr_dilations": DILATIONS}
    seam = {"stages": [-3, -2], "projections": [6, 8], "embedding": 12}
    names = {c: f"class {c}" for c in range(CLASSES)}
    model = CamClassifier(CamConfig(backbone_config=backbone, id2label=names, seam=seam, plda=plda, maps="seam"))
    with torch.no_grad():
        model.classifier.weight.normal_(std=0.02)  # confident pixels of every class
        for parameter in model.methods["seam"].parameters():
            torch.nn.init.kaiming_normal_(parameter)
    return model.train()


def enlarged(maps, size):
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=True)


def max_norm(maps):
    maps = maps.relu()
    low, high = maps.flatten(2).min(dim=2).values, maps.flatten(2).max(dim=2).values
    low, high = low[:, :, None, None], high[:, :, None, None]
    return (maps - low - 1e-5).relu() / (high - low + 1e-5)


def one_hot(maps):
    strongest = maps[:, 1:].max(dim=1, keepdim=True).values
    return torch.cat([maps[:, :1], maps[:, 1:] * (maps[:, 1:] == strongest)], dim=1)


class Program:
    """The released program's step on the weights of `model`; maps have the background in channel 0."""

    def __init__(self, model):
        self.model, self.seam = model, model.methods["seam"]
        self.domain = model.methods["plda"].domain_classifier
        self.label = torch.cat([torch.ones(len(TAGS), 1), TAGS], dim=1)[:, :, None, None]

    def network(self, pixels):
        """CAMs, whose background no loss reads; refined maps; the last features."""
        *_, conv4, conv5, conv6 = self.model.backbone(pixels)
        cam = F.conv2d(conv6, self.model.classifier.weight)
        cam = torch.cat([torch.zeros_like(cam[:, :1]), cam], dim=1)
        scores = cam.detach().relu()
        scores = (scores - 1e-5).relu() / (scores.flatten(2).max(dim=2).values[:, :, None, None] + 1e-5)
        scores[:, 0] = 1 - scores[:, 1:].max(dim=1).values
        scores = one_hot(scores)
        first, second = (layer.weight for layer in self.seam.projections)
        size = cam.shape[-2:]
        read = [
            enlarged(pixels, size),
            F.conv2d(conv4.detach(), first).relu(),
            F.conv2d(conv5.detach(), second).relu(),
        ]
        vectors = F.conv2d(torch.cat(read, dim=1), self.seam.embedding.weight).flatten(2)
        vectors = vectors / (vectors.norm(dim=1, keepdim=True) + 1e-5)
        affinity = (vectors.transpose(1, 2) @ vectors).relu()
        affinity = affinity / (affinity.sum(dim=1, keepdim=True) + 1e-5)
        return cam, (scores.flatten(2) @ affinity).unflatten(2, size), conv6

    def confident(self, pixels, cam, refined):
        """Where a class is above 0.6 of its map's range, (B, C, h, w), and the one-hot pseudo labels there."""
        members = (max_norm(refined[:, 1:]) * self.label[:, 1:]) > 0.6
        scores = cam.clone()
        scores[:, 0] = 1
        mean, std = (
            torch.tensor(v).view(3, 1, 1) for v in (self.model.config.image_mean, self.model.config.image_std)
        )
        scores = pamr_plainly(enlarged(pixels * std + mean, cam.shape[-2:]), scores.softmax(dim=1)) * self.label
        labels = torch.zeros_like(scores)
        for image in range(len(scores)):
            highest = [scores[image, k].max() for k in range(CLASSES + 1)]
            cuts = [max((0.6 if k else 0.7) * highest[k], torch.tensor(0.2)) for k in range(CLASSES + 1)]
            claims = torch.stack([scores[image, k] > cuts[k] for k in range(CLASSES + 1)])
            labels[image] = claims * (claims.sum(dim=0) == 1)
        objects = labels[:, 1:] * members
        return members, torch.cat([torch.zeros_like(objects[:, :1]), objects], dim=1)

    def plda_losses(self, pixels, cam, refined, features):
        with torch.no_grad():
            source, source_labels = self.confident(pixels, cam, refined)
            hidden = F.interpolate(source.any(dim=1, keepdim=True).float(), pixels.shape[-2:])
            masked = pixels * (1 - hidden)
            masked_cam, masked_refined, _ = self.network(masked)
            target, target_labels = self.confident(masked, masked_cam, masked_refined)
        strength = 2 / (1 + torch.exp(torch.tensor(-10 * PROGRESS))) - 1
        hidden = (1 + strength) * features.detach() - strength * features  # the features, their gradient reversed
        for layer in (self.domain.layers[0], self.domain.layers[3]):
            hidden = F.conv2d(hidden, layer.weight, layer.bias).relu()
        adversarial = 0
        for c in range(CLASSES):
            weight, bias = self.domain.heads.weight[2 * c : 2 * c + 2], self.domain.heads.bias[2 * c : 2 * c + 2]
            logits = F.conv2d(hidden, weight, bias)
            domain = torch.full_like(source[:, c], 255, dtype=torch.long)
            domain[target[:, c]] = 1
            domain[source[:, c]] = 0
            loss = F.cross_entropy(logits, domain, ignore_index=255, reduction="none")
            chances = logits.detach().softmax(dim=1)
            loss = loss * (1 + (chances * (chances + 1e-10).log()).sum(dim=1).exp())
            counts = torch.stack([(domain == k).sum(dim=(1, 2)) for k in (0, 1)])
            total = counts.sum(dim=0)
            for k in (0, 1):
                balance = (total - counts[k]) / (1 + total)
                adversarial = adversarial + (loss * (domain == k) * balance[:, None, None]).mean()
        logits = torch.cat([torch.ones_like(cam[:, :1]), cam[:, 1:]], dim=1)
        return adversarial, self.mask_loss(logits, source_labels), self.mask_loss(logits, target_labels)

    def mask_loss(self, logits, labels):
        loss = F.cross_entropy(logits, labels.argmax(dim=1), reduction="none")
        counts = labels.sum(dim=(2, 3))
        balance = (counts.sum(dim=1, keepdim=True) - counts) / (1 + counts.sum(dim=1, keepdim=True))
        return ((labels * balance[:, :, None, None]).sum(dim=1) * loss).mean()

    def losses(self, pixels):
        label = self.label
        views = [pixels, F.interpolate(pixels, scale_factor=SCALE, mode="bilinear", align_corners=True)]
        cams, refined, lowest, logits, plda = [], [], [], [], []
        for view in views:
            cam, cam_rv, features = self.network(view)
            plda.append(self.plda_losses(view, cam, cam_rv, features))
            cam, cam_rv = enlarged(cam, view.shape[-2:]), enlarged(cam_rv, view.shape[-2:])
            logits.append(cam.mean(dim=(2, 3))[:, 1:])
            strongest = (cam_rv * label)[:, 1:].max(dim=1).values.flatten(1)
            lowest.append(strongest.sort(dim=1).values[:, : strongest.shape[1] // 4].relu().mean())
            cam, cam_rv = max_norm(cam), max_norm(cam_rv)
            if view is pixels:
                cam, cam_rv = enlarged(cam, views[1].shape[-2:]), enlarged(cam_rv, views[1].shape[-2:])
            cams.append(cam * label)
            refined.append(cam_rv * label)
        equivariance = (cams[0][:, 1:] - cams[1][:, 1:]).abs().mean()
        scores = [torch.cat([1 - cam[:, 1:].max(dim=1, keepdim=True).values, cam[:, 1:]], dim=1) for cam in cams]
        cross = 0
        for own, other in ((0, 1), (1, 0)):
            difference = (one_hot(scores[other].detach()) - refined[own]).abs().flatten(1)
            cross = cross + difference.topk(int(0.2 * difference.shape[1]), dim=1).values.mean()
        return {
            "classification": sum(F.binary_cross_entropy_with_logits(values, TAGS) for values in logits) / 2,
            "seam_equivariance": equivariance,
            "seam_cross": cross,
            "seam_min": sum(lowest) / 2,
            "plda_adversarial": (plda[0][0] + plda[1][0]) / 2,
            "plda_source_ce": (plda[0][1] + plda[1][1]) / 2,
            "plda_target_ce": (plda[0][2] + plda[1][2]) / 2,
        }


def pamr_plainly(images, scores):
    height, width = images.shape[-2:]

    def shifted(maps):
        found = []
        for reach in DILATIONS:
            padded = F.pad(maps, [reach] * 4, mode="replicate")
            places = [(y, x) for y in (0, reach, 2 * reach) for x in (0, reach, 2 * reach) if (y, x) != (reach, reach)]
            found += [padded[..., y : y + height, x : x + width] for y, x in places]
        return torch.stack(found)

    around = shifted(images)
    windows = torch.cat([around, images[None].expand(len(DILATIONS), *images.shape)])
    similarity = -((around - images).abs() / (0.1 * windows.std(dim=0) + 1e-8)).mean(dim=2)
    affinity = similarity.softmax(dim=0)[:, :, None]
    for _ in range(ITERATIONS):
        scores = (affinity * shifted(scores)).sum(dim=0)
    return scores


def test_losses_and_gradients_of_a_step_are_those_of_the_released_program(model):
    pixels = torch.randn(2, 3, 120, 96, generator=torch.Generator().manual_seed(8))
    pixels = F.avg_pool2d(F.pad(pixels, [4] * 4, mode="reflect"), 9, stride=1) * 6
    output = model(pixels, tags=TAGS, progress=PROGRESS)
    wanted = Program(model).losses(pixels)
    assert output.losses.keys() == wanted.keys()
    for name, loss in wanted.items():
        assert loss > 1e-3, name
        torch.testing.assert_close(output.losses[name], loss, atol=1e-6, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    summed = {"loss": output.loss} | output.losses
    for loss, plain in ({"loss": sum(wanted.values())} | wanted).items():
        found, expected = (
            torch.autograd.grad(value, list(parameters.values()), retain_graph=True, allow_unused=True)
            for value in (summed[loss], plain)
        )
        reached = 0
        for name, mine, theirs in zip(parameters, found, expected, strict=True):
            assert (mine is None or not mine.any()) == (theirs is None or not theirs.any()), f"{loss}: {name}"
            if theirs is not None and theirs.any():
                error = (mine - theirs).abs().max() / theirs.abs().max()
                assert error < 1e-3, f"{loss}: {name}: {error}"
                reached += 1
        assert reached >= (len(parameters) if loss == "loss" else 3), loss
