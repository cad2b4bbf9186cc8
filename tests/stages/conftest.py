import pytest
import torch

from wsss_hf import CamClassifier, Segmenter, SegmenterConfig, WsssImageProcessor
from wsss_hf.data.tagged import class_names
from wsss_hf.pseudo_labels.label_images import label_images
from wsss_hf.stages import make_masks as module


@pytest.fixture
def labelled_rows(monkeypatch):
    """The image ids that were labelled, in order; labelling stops with an error before row `stop_at[0]`."""
    seen, stop_at = [], [None]

    def watched(model, processor, rows, settings, rules=None):
        for item in label_images(model, processor, rows, settings, rules):
            if len(seen) == stop_at[0]:
                raise KeyboardInterrupt
            seen.append(rows[item.index]["image_id"])
            yield item

    monkeypatch.setattr(module, "label_images", watched)
    return seen, stop_at


@pytest.fixture(scope="module")
def segmenter_folder(toy_data, cam_folder, tmp_path_factory):
    """A saved segmenter for `toy_data` that has learnt nothing, but is of many minds."""
    torch.manual_seed(0)
    backbone = CamClassifier.from_pretrained(cam_folder).config.backbone_config
    names = dict(enumerate(["background", *class_names(toy_data)]))
    model = Segmenter(SegmenterConfig(backbone_config=backbone, output_stride=8, rates=[1], id2label=names))
    torch.nn.init.normal_(model.head[0].weight, std=0.3)
    folder = tmp_path_factory.mktemp("models") / "segmenter"
    model.save_pretrained(folder)
    WsssImageProcessor(size={"shortest_edge": 48, "longest_edge": 192}).save_pretrained(folder)
    return folder
