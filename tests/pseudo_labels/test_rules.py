"""Label rules: DRS's and ICD's published ones, and those that a recipe names."""

import sys
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from PIL import Image

from wsss_hf.data.tagged import DataError, encode_png
from wsss_hf.inference.cam_maps import label_confidence, label_map
from wsss_hf.models.icd import icd_seeds
from wsss_hf.models.options import OptionError
from wsss_hf.pseudo_labels.rules import (
    Evidence,
    RuleError,
    build_rule,
    check_columns,
    class_labels,
    reads_background,
    reads_saliency,
    rows_to_label,
    seed_drs,
    seed_icd,
)
from wsss_hf.refinement.crf import refine_labels
from wsss_hf.settings import MasksSettings
from wsss_hf.stages.train_cam import train_cam


@pytest.fixture
def evidence():
    """An image of 24 x 28 pixels with classes 1 and 4 of 6."""
    generator = torch.Generator().manual_seed(0)
    scores, maps, cams = (torch.rand(n, 24, 28, generator=generator) for n in (3, 2, 2))
    image = np.random.default_rng(0).integers(0, 256, (24, 28, 3), dtype=np.uint8)
    saliency = torch.rand(24, 28, generator=generator)
    return Evidence(scores, torch.tensor([1, 4]), 6, image, saliency, (maps, cams))


def test_argmax_is_the_label_map(evidence):
    labels = build_rule("argmax").label(evidence)
    assert torch.equal(labels, label_map(evidence.scores, evidence.classes))


def test_drs_labels_are_classes_of_the_data_set(evidence):
    rule = build_rule("drs", {"saliency_threshold": 0.1961})
    assert rule.saliency == "needed" and not rule.averages
    labels = rule.label(evidence)
    assert torch.equal(labels, class_labels(seed_drs(evidence.scores, evidence.saliency), evidence.classes))
    assert {0, 2, 5, 255} == set(labels.unique().tolist())


def test_icd_reads_logits_of_maps(evidence):
    rule = build_rule("icd", {"saliency_threshold": 0.01})
    assert rule.saliency == "optional" and rule.averages
    maps, cams = evidence.averages
    evidence.averages = torch.logit(maps), cams
    evidence.saliency = evidence.saliency * 0.03
    seeds = seed_icd(torch.logit(maps), cams, evidence.saliency)
    assert torch.equal(rule.label(evidence), class_labels(seeds, evidence.classes))
    single = (maps[0] > 0.5) != (maps[1] > 0.5)
    single &= (evidence.saliency >= 0.01) & (cams.amin(dim=0) > 0.01)
    labels = rule.label(evidence)[single]
    wanted = torch.where(maps[0] > 0.5, 2, 5)[single]
    assert torch.equal(labels.long(), wanted)
    labels = build_rule("icd", {"saliency_threshold": 0.02}).label(evidence)
    assert (labels[evidence.saliency >= 0.02] != 0).all()
    nowhere = evidence.averages[0].amax(dim=0) < 0
    assert (labels[nowhere & (evidence.saliency < 0.02)] == 0).all() and nowhere.any()


def test_icd_without_saliency_closes_the_seeds(evidence):
    pytest.importorskip("pydensecrf")
    evidence.saliency = None
    maps, cams = evidence.averages
    evidence.averages = torch.logit(maps), cams
    seeds = class_labels(seed_icd(torch.logit(maps), cams), evidence.classes)
    labels = build_rule("icd").label(evidence)
    probability = 0.5 / (0.5 + 6 * 0.5 / 7)
    np.testing.assert_array_equal(labels, refine_labels(seeds.numpy(), evidence.image, 7, probability))
    evidence.scores, evidence.classes = evidence.scores[:1], evidence.classes[:0]
    evidence.averages = (maps[:0], cams[:0])
    assert not build_rule("icd").label(evidence).any()  # no tag, no object


@pytest.mark.parametrize("num_classes", [1, 20])
def test_icd_closes_seeds_as_its_program_does(num_classes):
    """A given label has 0.5, every other one 0.5 / number of labels: with a single class, too, it is the likelier."""
    densecrf = pytest.importorskip("pydensecrf.densecrf")
    rng, (rows, columns) = np.random.default_rng(0), np.mgrid[:40, :60]
    distance = (rows - 20) ** 2 + (columns - 30) ** 2
    colours = np.where(distance[..., None] < 12**2, [200, 80, 40], [40, 90, 160]) + rng.normal(0, 25, (40, 60, 3))
    image = colours.clip(0, 255).astype(np.uint8)
    top_down = torch.from_numpy(np.select([distance < 6**2, distance > 16**2], [1.0, -1.0], 0.0)).float()[None]
    evidence = Evidence(top_down, torch.tensor([0]), num_classes, image, None, (top_down, top_down))

    seeds, num_labels = np.select([distance < 6**2, distance > 16**2], [1, 0], 255), num_classes + 1
    shares = np.full((256, seeds.size), 0.5 / num_labels, dtype=np.float32)
    shares[seeds.ravel(), np.arange(seeds.size)] = 0.5
    shares = shares[:num_labels] / shares[:num_labels].sum(axis=0)
    crf = densecrf.DenseCRF2D(60, 40, num_labels)
    crf.setUnaryEnergy(-np.log(shares))
    crf.addPairwiseGaussian(sxy=3, compat=3)
    crf.addPairwiseBilateral(sxy=80, srgb=13, rgbim=image, compat=10)
    expected = np.array(crf.inference(10)).argmax(axis=0).reshape(40, 60)

    found = build_rule("icd").label(evidence).numpy()
    assert (found == expected).mean() > 0.995 and 0.1 < (found == 1).mean() < 0.5


def test_a_confidence_that_favours_no_label_is_refused_before_training(toy_data, tiny_recipe, no_training, tmp_path):
    pytest.importorskip("pydensecrf")
    vars(tiny_recipe.masks).update({"seeds": "icd", "seed_options": {"confidence": 0.1}})
    with pytest.raises(RuleError, match="masks.seed_options.confidence: expected a number above 1/10 for 9 labels"):
        train_cam(toy_data, tiny_recipe, tmp_path / "cam")
    assert not list(tmp_path.iterdir())
    tiny_recipe.masks.seed_options = {"confidence": 0.11}
    check_columns(tiny_recipe.masks, toy_data["train"])


def test_what_is_not_there_is_named(monkeypatch):
    with pytest.raises(
        OptionError, match="masks.seeds: 'sign': unknown; expected argmax, saliency, auto, drs, icd or mat_label"
    ):
        build_rule("sign")
    monkeypatch.setitem(sys.modules, "pydensecrf", None)
    with pytest.raises(RuleError, match="icd: .*pip install pydensecrf2"):
        build_rule("icd").prepare()


def test_saliency_is_read_where_the_rule_uses_it(toy_data):
    rows = toy_data["train"]
    salient = rows.add_column("saliency", rows["image_id"][:])
    picture = encode_png(Image.new("L", (48, 48)))
    empty, some = (
        rows.add_column("saliency", [picture] * filled + [None] * (12 - filled), feature=rows.features["image"])
        for filled in (0, 9)
    )
    wanted = {
        "argmax": (False, False, False, False),
        "saliency": (True, True, True, True),
        "drs": (True, True, True, True),
        "icd": (False, True, False, True),
    }
    for name, expected in wanted.items():
        settings = MasksSettings(seeds=name)
        assert tuple(reads_saliency(settings, data) for data in (rows, salient, empty, some)) == expected
        counts = [len(rows_to_label(settings, data)) for data in (rows, salient, empty, some)]
        needs = expected[0]
        assert counts == [0 if needs else 12, 12, 0 if needs else 12, 9 if expected[3] else 12]
        for data, is_whole in ((rows, not needs), (salient, True), (empty, not needs), (some, not expected[3])):
            with nullcontext() if is_whole else pytest.raises(DataError, match=f"for masks.seeds: {name}, got "):
                check_columns(settings, data)


def test_icd_reads_no_refined_scores_and_so_no_background(toy_data):
    settings = MasksSettings(seeds="icd", refine=["grid_crf"])
    assert not reads_background(settings, toy_data["train"])


def test_a_saliency_threshold_that_is_not_found_yet_is_named(evidence):
    for name in ("drs", "saliency", "icd"):
        assert build_rule(name).saliency_threshold == "auto"
        with pytest.raises(RuleError, match="saliency_threshold: expected a number, got 'auto'"):
            build_rule(name).label(evidence)


def test_the_saliency_threshold_says_what_is_salient(evidence):
    for name in ("drs", "saliency"):
        low, high = (build_rule(name, {"saliency_threshold": level}).label(evidence) for level in (0.2, 0.8))
        assert (low == 0).float().mean() < 0.35 and (high == 0).float().mean() > 0.7
    expected = seed_drs(evidence.scores, evidence.saliency, saliency_threshold=0.8)
    labels = build_rule("drs", {"saliency_threshold": 0.8}).label(evidence)
    assert torch.equal(labels, class_labels(expected, evidence.classes))


def test_the_saliency_rule_gives_salient_pixels_their_best_class(evidence):
    scores = torch.tensor([[0.9, 0.9, 0.9, 0.0, 0.9], [0.3, 0.1, 0.0, 0.95, 0.0], [0.2, 0.4, 0.0, 0.0, 0.5]])
    evidence.scores = scores[:, None]
    evidence.saliency = torch.tensor([[0.6, 0.6, 0.6, 0.5, 0.5]])  # 0.5 is not above 0.5
    rule = build_rule("saliency", {"saliency_threshold": 0.5})
    assert rule.saliency == "needed" and rule.label(evidence).tolist() == [[2, 5, 255, 0, 0]]
    certain = build_rule("saliency", {"saliency_threshold": 0.5, "object_threshold": 0.9})
    assert certain.label(evidence).tolist() == [[2, 5, 255, 2, 0]]
    evidence.scores, evidence.classes = evidence.scores[:1], evidence.classes[:0]
    labels = rule.label(evidence)
    assert labels.tolist() == [[0] * 5] and labels.dtype == torch.uint8  # no tag, no object


def test_drs_seeds_pixel_by_pixel():
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(4, 25, 30, generator=generator)
    scores[1:, :8] = 0.85 + 0.15 * scores[1:, :8]  # conflicts
    scores[1:, 8:14] *= 0.25  # mostly below the cue's threshold
    saliency = torch.rand(25, 30, generator=generator)
    saliency[:, ::2] *= 0.3
    expected = torch.zeros(25, 30, dtype=torch.uint8)
    for y in range(25):
        for x in range(30):
            salient = float(saliency[y, x]) > 50 / 255
            channels = [0.0 if salient else 1.0]
            channels += [float(value) if value >= 0.2 else 0.0 for value in scores[1:, y, x]]
            label = channels.index(max(channels))
            if sum(value > 0.9 for value in channels) > 2 or (salient and label == 0):
                label = 255
            expected[y, x] = label
    assert set(expected.unique().tolist()) == {0, 1, 2, 3, 255}
    assert torch.equal(seed_drs(scores, saliency), expected)
    with pytest.raises(RuleError, match="saliency"):
        seed_drs(scores, saliency[1:])


def test_auto_takes_saliency_where_there_is_some(evidence):
    rule, options = build_rule("auto", {"saliency_threshold": 0.5}), {"saliency_threshold": 0.5}
    assert torch.equal(rule.label(evidence), build_rule("saliency", options).label(evidence))
    evidence.saliency = None
    assert torch.equal(rule.label(evidence), build_rule("argmax").label(evidence))


def test_the_confidence_of_the_largest_score_is_its_margin(evidence):
    rule = build_rule("argmax")
    best, second = evidence.scores.topk(2, dim=0).values
    found = label_confidence(rule.decisive_scores(evidence), rule.label(evidence), evidence.classes)
    assert torch.equal(found, 1 - second / best)


@pytest.mark.parametrize(
    ("name", "options", "labels", "confidence"),
    [
        # salient: which class; elsewhere: background, unless a class has a high score
        (
            "saliency",
            {"object_threshold": 0.9},
            [2, 0, 0, 2, 255],
            [1 - 0.2 / 0.8, 1 - 0.6 / 0.9, 1, 1 - 0.9 / 0.95, 0],
        ),
        ("auto", {}, [2, 0, 0, 0, 255], [1 - 0.2 / 0.8, 1 - 0.6, 1, 1 - 0.95, 0]),
        ("drs", {"object_threshold": 0.3}, [2, 0, 0, 0, 255], [1, 1 - 0.6, 1, 1 - 0.95, 0]),
    ],
)
def test_where_saliency_decides_the_background_confidence_is_of_that_choice(
    evidence, name, options, labels, confidence
):
    evidence.saliency = torch.tensor([[1.0, 0.0, 0.0, 0.0, 1.0]])
    rule = build_rule(name, options | {"saliency_threshold": 0.5})
    for background in (0.0, 0.4, 1.0):  # which plays no part
        evidence.scores = torch.tensor([[[background] * 5], [[0.8, 0.1, 0.0, 0.95, 0.0]], [[0.2, 0.6, 0.0, 0.9, 0.0]]])
        found = rule.label(evidence)
        assert found.tolist() == [labels]
        confidences = label_confidence(rule.decisive_scores(evidence), found, evidence.classes)
        torch.testing.assert_close(confidences, torch.tensor([confidence]))
    evidence.scores, evidence.classes = evidence.scores[:1], evidence.classes[:0]
    found = rule.label(evidence)
    certain = label_confidence(rule.decisive_scores(evidence), found, evidence.classes)
    assert torch.equal(certain, (found == 0).float())  # no tag: no doubt


def test_icd_and_mat_label_are_as_confident_as_their_probabilities(evidence):
    probabilities = torch.tensor([[[0.9, 0.2, 0.8, 0.5]], [[0.1, 0.1, 0.9, 0.5]]])
    cams = torch.tensor([[[3.0, 0.0, 4.0, 0.0]], [[0.0, 0.0, 1.0, 0.0]]])
    evidence.saliency, evidence.averages = torch.ones(1, 4), (probabilities.logit(), cams)
    evidence.saliency[0, 1] = 0
    rule = build_rule("icd", {"saliency_threshold": 0.5})
    labels = rule.label(evidence)
    assert labels.tolist() == [[2, 0, 2, 255]]  # the third by its CAMs, against the probabilities
    confidence = label_confidence(rule.decisive_scores(evidence), labels, evidence.classes)
    torch.testing.assert_close(confidence, torch.tensor([[1 - 0.1 / 0.9, 1 - 0.2 / 0.8, 0, 0]]))
    rule = build_rule("mat_label", {"tie": 0.0})
    evidence.scores = torch.cat([1 - probabilities.amax(dim=0, keepdim=True), probabilities])
    labels = rule.label(evidence)
    assert labels.tolist() == [[2, 0, 5, 255]]
    confidence = label_confidence(rule.decisive_scores(evidence), labels, evidence.classes)
    torch.testing.assert_close(confidence, torch.tensor([[1 - 0.1 / 0.9, 1 - 0.2 / 0.8, 1 - 0.8 / 0.9, 0]]))


@pytest.mark.parametrize("with_saliency", [False, True])
def test_icd_seeds_are_the_models_seeds_of_the_tagged_classes(with_saliency):
    generator = torch.Generator().manual_seed(0)
    top_down, cams = torch.randn(2, 5, 12, 14, generator=generator)
    saliency = torch.rand(12, 14, generator=generator) * 0.03 if with_saliency else None
    tagged = [1, 4]
    tags = torch.zeros(1, 5)
    tags[0, tagged] = 1
    expected = icd_seeds(top_down[None], cams[None], tags, None if saliency is None else saliency[None])[0]
    seeds = seed_icd(top_down[tagged], cams[tagged], saliency)
    assert {0, 255} < set(seeds.unique().tolist())
    assert torch.equal(class_labels(seeds, torch.tensor(tagged)), expected.to(torch.uint8))


def test_icd_seeds_without_tags_know_background_only():
    nothing = torch.zeros(0, 1, 2)
    assert seed_icd(nothing, nothing).tolist() == [[0, 0]]
    assert seed_icd(nothing, nothing, torch.tensor([[0.0, 1.0]])).tolist() == [[0, 255]]


def test_labels_become_classes_of_the_data_set():
    labels = torch.tensor([[0, 1, 2, 255]], dtype=torch.uint8)
    assert class_labels(labels, torch.tensor([3, 17])).tolist() == [[0, 4, 18, 255]]


def test_mat_label_makes_uncertain_alphas_and_near_ties_ignored(evidence):
    rule = build_rule("mat_label", {"uncertain": [0.45, 0.55], "tie": 0.2})
    assert rule.alphas and rule.saliency == "unused"
    alphas = torch.tensor([[0.9, 0.5, 0.1, 0.8], [0.1, 0.2, 0.3, 0.7]])[:, None]
    evidence.scores = torch.cat([1 - alphas.amax(dim=0, keepdim=True), alphas])
    assert rule.label(evidence).tolist() == [[2, 255, 0, 255]]
    assert build_rule("mat_label", {"uncertain": [0.5, 0.5], "tie": 0}).label(evidence).tolist() == [[2, 2, 0, 2]]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mat_label", {"band": [0, 1]}, "masks.seed_options.band: unknown; expected uncertain or tie"),
        ("argmax", {"tie": 0.1}, "masks.seed_options.tie: unknown; expected none"),
        ("mat_label", {"tie": "much"}, r"masks.seed_options.tie: expected a number in \[0, 1\], got 'much'"),
        ("mat_label", {"uncertain": [0.6, 0.4]}, "masks.seed_options.uncertain: expected the lower number first"),
        ("mat_label", {"uncertain": [0.6]}, "masks.seed_options.uncertain: expected a list of 2 numbers"),
        (
            "drs",
            {"saliency_threshold": "high"},
            r"saliency_threshold: expected a number in \[0, 1\] or auto, got 'high'",
        ),
        ("saliency", {"saliency_threshold": 50}, r"saliency_threshold: expected a number in \[0, 1\] or auto, got 50"),
        ("drs", {"object_threshold": 2}, "masks.seed_options.object_threshold: expected a number in"),
        ("icd", {"iterations": 0}, "masks.seed_options.iterations: expected a whole number >= 1, got 0"),
    ],
)
def test_unfit_options_are_named(name, options, message):
    with pytest.raises(OptionError, match=message):
        build_rule(name, options)


def test_options_reach_the_published_rules(evidence):
    published = {"saliency_threshold": 0.1961}
    labels = build_rule("drs", published | {"conflict_threshold": 0.5}).label(evidence)
    seeds = seed_drs(evidence.scores, evidence.saliency, conflict_threshold=0.5)
    assert torch.equal(labels, class_labels(seeds, evidence.classes))
    assert not torch.equal(labels, build_rule("drs", published).label(evidence))
