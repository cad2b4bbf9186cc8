"""The recipes of published methods, from saliency maps to a segmenter, on a toy data set with tiny networks."""

import numpy as np
import pytest
from PIL import Image

from wsss_hf.data.tagged import TaggedData, encode_png
from wsss_hf.recipes import load_recipe
from wsss_hf.stages.run import run

WIDTHS = "[4, 4, 4, 4, 4]"
TINY = [
    "image.size=48",
    "cam.train.epochs=1",
    "cam.train.batch_size=4",
    "refiner.train.epochs=1",
    "refiner.train.batch_size=4",
    "segmenter.backbone=null",
    "segmenter.backbone_config={model_type: resnet, depths: [1, 1, 1, 1], embedding_size: 4, "
    "hidden_sizes: [4, 4, 4, 4], layer_type: basic, out_features: [stage1, stage2, stage3, stage4]}",
    "segmenter.size=48",
    "segmenter.train.steps=2",
    "segmenter.train.batch_size=4",
    "segmenter.train.freeze_batch_norm=false",
    "evaluation.refine=[]",
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("voc_drs", [f"cam.backbone_config={{model_type: wsss_vgg16, widths: {WIDTHS}, extra_channels: [4]}}"]),
        (
            "voc_icd",
            [
                f"cam.backbone_config={{widths: {WIDTHS}, hidden_channels: [8, 8]}}",
                "cam.methods.icd.hidden_channels=8",
                "cam.felzenszwalb={size: 65, scale: 20.0, min_size: 4, merge_to: 6}",
                "masks.pad=65",
            ],
        ),
        ("voc_mat_label", [f"cam.backbone_config={{model_type: wsss_vgg16, widths: {WIDTHS}}}"]),
    ],
)
def test_a_published_recipe_runs_from_saliency_to_segmenter(toy_data, tmp_path, name, changes):
    if name == "voc_icd":
        pytest.importorskip("pydensecrf")
    rows = toy_data["train"]
    maps = [
        encode_png(Image.fromarray(np.where(np.asarray(mask) > 0, 200, 0).astype(np.uint8))) for mask in rows["mask"]
    ]
    train = rows.add_column("saliency", maps, feature=rows.features["mask"])
    data = TaggedData(
        {"train": train, "val": toy_data["val"]},
        {"source": "given", "saliency": {"source": "owner/net", "learnt_from": "class-agnostic masks"}},
    )
    recipe = load_recipe(name, [*TINY, *changes])
    result = run(data, recipe, tmp_path / "run")
    assert 0 <= result.results[0]["mean_iou"] <= 1
    assert (tmp_path / "run" / "refiner").exists() == (name == "voc_drs")
    assert recipe.masks.seeds == name.removeprefix("voc_")
