"""`push_to_hub` of a Trainer makes a repository like ours; of `WsssTrainer` with our card."""

import pytest
import torch
from huggingface_hub import ModelCard
from loopback_hub import OWNER, TOKEN
from transformers import (
    AutoModelForSemanticSegmentation,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    Trainer,
    TrainingArguments,
)

from wsss_hf import CamClassifier, CamConfig, Segmenter, SegmenterConfig, WsssImageProcessor, WsssTrainer

RESNET = {
    "model_type": "resnet",
    "layer_type": "basic",
    "embedding_size": 8,
    "hidden_sizes": [8, 8, 8, 8],
    "depths": [1, 1, 1, 1],
}


@pytest.mark.slow
@pytest.mark.parametrize("trainer_class", [Trainer, WsssTrainer])
@pytest.mark.parametrize("kind", ["cam", "segmenter"])
def test_the_trainer_pushes_a_repository_that_loads(hub, kind, trainer_class, tmp_path, monkeypatch):
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
    trainer = trainer_class(model, arguments, train_dataset=rows, processing_class=processor)
    trainer.train()
    trainer.push_to_hub(tags=["pets"])
    files = hub.repositories["model", f"{OWNER}/trained"].files()
    wanted = {"config.json", "model.safetensors", "preprocessor_config.json", "README.md", "portable_model.py"}
    assert wanted | {f"modeling_{kind}.py"} <= files.keys()
    again = AutoModelForSemanticSegmentation.from_pretrained(f"{OWNER}/trained")
    pixels = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(again.eval()(pixels).logits, model.eval()(pixels).logits)
    assert again.image_processor.size == processor.size
    if trainer_class is WsssTrainer:
        card = ModelCard(files["README.md"].decode())
        assert card.data.pipeline_tag == "image-segmentation" and {"wsss_hf", "pets"} <= {*card.data.tags}
        assert f"A `{type(model).__name__}` of wsss_hf" in card.text and "trust_remote_code=True" in card.text
        assert "Trainer" not in card.text
        # Somebody's own words stay.
        (tmp_path / "run" / "README.md").unlink()
        files["README.md"] = b"my own words"
        trainer.push_to_hub()
        assert hub.repositories["model", f"{OWNER}/trained"].files()["README.md"] == b"my own words"


def test_models_of_others_get_the_trainers_card(tmp_path):
    config = SegformerConfig(
        depths=[1] * 4, hidden_sizes=[8] * 4, num_attention_heads=[1] * 4, decoder_hidden_size=8, num_labels=3
    )
    arguments = TrainingArguments(tmp_path, report_to="none", use_cpu=True, disable_tqdm=True)
    WsssTrainer(SegformerForSemanticSegmentation(config), arguments).create_model_card()
    assert "generated_from_trainer" in (tmp_path / "README.md").read_text()
