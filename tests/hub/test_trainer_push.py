"""`transformers.Trainer.push_to_hub` makes a repository like ours."""

import pytest
import torch
from loopback_hub import OWNER, TOKEN
from transformers import AutoModelForSemanticSegmentation, Trainer, TrainingArguments

from wsss_hf import CamClassifier, CamConfig, Segmenter, SegmenterConfig, WsssImageProcessor

RESNET = {
    "model_type": "resnet",
    "layer_type": "basic",
    "embedding_size": 8,
    "hidden_sizes": [8, 8, 8, 8],
    "depths": [1, 1, 1, 1],
}


@pytest.mark.parametrize("kind", ["cam", "segmenter"])
def test_the_trainer_pushes_a_repository_that_loads(hub, kind, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)  # a client that keeps its Hub
    torch.manual_seed(0)
    names = {0: "background", 1: "cat", 2: "cow"}
    if kind == "cam":
        model, labels = CamClassifier(CamConfig(backbone_config=dict(RESNET), id2label=names)), torch.eye(3)[1]
    else:
        model = Segmenter(SegmenterConfig(backbone_config=dict(RESNET), id2label=names, rates=[1]))
        labels = torch.ones(32, 32, dtype=torch.int64)
    rows = [{"pixel_values": torch.randn(3, 32, 32), "labels": labels}] * 4
    arguments = TrainingArguments(
        tmp_path / "run",
        max_steps=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        save_strategy="no",
        hub_model_id=f"{OWNER}/trained",
        hub_token=TOKEN,
    )
    processor = WsssImageProcessor(size={"shortest_edge": 48, "longest_edge": 96})
    trainer = Trainer(model, arguments, train_dataset=rows, processing_class=processor)
    trainer.train()
    trainer.push_to_hub()
    files = hub.repositories["model", f"{OWNER}/trained"].files()
    wanted = {"config.json", "model.safetensors", "preprocessor_config.json", "README.md", "portable_model.py"}
    assert wanted | {f"modeling_{kind}.py"} <= files.keys()
    again = AutoModelForSemanticSegmentation.from_pretrained(f"{OWNER}/trained")
    pixels = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(again.eval()(pixels).logits, model.eval()(pixels).logits)
    assert again.image_processor.size == processor.size
