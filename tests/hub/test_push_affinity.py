"""An affinity network on the Hub: its files, its card, and what loads from there."""

import torch
from huggingface_hub import ModelCard

from wsss_hf import AffinityConfig, AffinityNetwork
from wsss_hf.hub.push import push_model

BACKBONE = {"model_type": "resnet", "layer_type": "basic", "embedding_size": 8, "hidden_sizes": [8, 16]}
BACKBONE |= {"depths": [1, 1]}


def save(folder):
    torch.manual_seed(0)
    network = AffinityNetwork(AffinityConfig(backbone_config=BACKBONE)).eval()
    network.save_pretrained(folder)
    return network


def test_it_is_pushed_with_processor_and_card_and_loads_from_there(hub, tmp_path):
    network = save(tmp_path / "affinity")
    (tmp_path / "affinity" / "recipe.yaml").write_text(
        "stage: train-affinity\ndata: {source: voc}\naffinity: {kind: irn}\n"
    )
    pushed = push_model(tmp_path / "affinity", "tester/affinity", licence="apache-2.0")
    assert pushed.changed
    card = ModelCard.load("tester/affinity")
    assert card.data.license == "apache-2.0" and "no mask was read" in card.text and "CVPR 2019" in card.text
    loaded = AffinityNetwork.from_pretrained("tester/affinity").eval()
    images = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(loaded(images).logits, network(images).logits, atol=0, rtol=0)
    assert loaded.image_processor is not None


def test_it_pushes_itself_and_claims_nothing_of_its_training(hub, tmp_path):
    save(tmp_path / "affinity").push_to_hub("tester/own")
    assert "is not recorded here" in ModelCard.load("tester/own").text
    files = set(hub.files("tester/own"))
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "affinity.py"} <= files
    assert not {"seam.py", "plda.py", "modeling_cam.py"} & files
