import json

import numpy as np
import pytest
import torch
from transformers import SegformerConfig, SegformerForSemanticSegmentation
from transformers.utils import ModelOutput

from wsss_hf.saliency.load import load_source
from wsss_hf.saliency.source import SaliencyError
from wsss_hf.saliency.transformers_model import foreground

CODE = """
import torch
from transformers import PreTrainedConfig, PreTrainedModel


class BrightConfig(PreTrainedConfig):
    model_type = "bright_maps"


class Bright(PreTrainedModel):
    config_class = BrightConfig

    def __init__(self, config):
        super().__init__(config)
        self.scale = torch.nn.Parameter(torch.ones(1))
        self.post_init()

    def forward(self, pixel_values):
        mean = pixel_values.mean(dim=1, keepdim=True) * self.scale
        return [mean[..., ::2, ::2] * 0, mean]
"""


def segformer(folder, labels):
    torch.manual_seed(0)
    config = SegformerConfig(
        num_labels=labels,
        depths=[1] * 4,
        hidden_sizes=[8, 8, 16, 16],
        decoder_hidden_size=8,
        num_attention_heads=[1] * 4,
    )
    SegformerForSemanticSegmentation(config).save_pretrained(folder)
    return folder


@pytest.fixture
def remote_folder(tmp_path):
    """A model with code of its own."""
    from safetensors.torch import save_file

    folder = tmp_path / "remote"
    folder.mkdir()
    (folder / "modeling_bright.py").write_text(CODE)
    auto_map = {
        "AutoConfig": "modeling_bright.BrightConfig",
        "AutoModelForImageSegmentation": "modeling_bright.Bright",
    }
    config = {"model_type": "bright_maps", "architectures": ["Bright"], "auto_map": auto_map}
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"scale": torch.ones(1)}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def maps_of(folder, rows, trust_remote_code=False, **settings):
    source = load_source(folder, settings=settings, trust_remote_code=trust_remote_code)
    source.prepare(rows, torch.device("cpu"))
    return [found for _, found in sorted(source.maps(rows), key=lambda one: one[0])]


@pytest.mark.parametrize("labels", [1, 2])
def test_a_segmenter_of_foreground_gives_its_probability(toy_data, tmp_path, labels):
    rows = toy_data["train"].select(range(3))
    folder = segformer(tmp_path / "model", labels)
    found = maps_of(folder, rows, size=64)
    model = SegformerForSemanticSegmentation.from_pretrained(folder).eval()
    source = load_source(folder, settings={"size": 64})
    for image, one in zip(rows["image"], found, strict=True):
        with torch.no_grad():
            logits = model(torch.from_numpy(source.format.show(image.convert("RGB")))[None]).logits
        wanted = logits.sigmoid()[0, 0] if labels == 1 else logits.softmax(dim=1)[0, 1]
        np.testing.assert_allclose(one, source.format.restore(wanted.numpy(), image.size), atol=1e-5)


def test_a_model_of_many_labels_is_refused(tmp_path):
    with pytest.raises(SaliencyError, match="expected a model of foreground maps .* got a segformer with 5 labels"):
        load_source(segformer(tmp_path / "model", 5), settings={"size": 64})


def test_code_of_a_model_runs_on_request_only(toy_data, remote_folder):
    rows = toy_data["train"].select(range(2))
    with pytest.raises(SaliencyError, match="remote: expected a model that transformers has, .*--trust-remote-code"):
        load_source(remote_folder, settings={"size": 32})
    settings = {"size": 32, "mean": [0, 0, 0], "std": [1, 1, 1]}
    for image, found in zip(rows["image"], maps_of(remote_folder, rows, True, **settings), strict=True):
        wanted = np.asarray(image.convert("RGB"), np.float32).mean(axis=-1) / 255
        assert found.shape == wanted.shape and abs(found - wanted).mean() < 0.1
    assert not np.any(maps_of(remote_folder, rows, True, output=0, **settings))
    before = load_source(remote_folder, settings=settings, trust_remote_code=True).content
    (remote_folder / "modeling_bright.py").write_text(CODE + "# changed")
    assert load_source(remote_folder, settings=settings, trust_remote_code=True).content != before


def test_pickled_weights_are_refused(toy_data, tmp_path):
    folder = segformer(tmp_path / "model", 2)
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="no weights in safetensors"):
        maps_of(folder, toy_data["train"], size=64)


def test_a_folder_that_holds_no_model_is_refused(tmp_path):
    with pytest.raises((SaliencyError, OSError), match="nothing"):
        load_source(tmp_path / "nothing", settings={"size": 8})


def test_the_map_is_found_in_what_models_return():
    maps = torch.rand(2, 1, 4, 5)
    other = torch.zeros(2, 1, 2, 2)
    for output in (maps, maps[:, 0], [other, maps], (other, [other, maps]), ModelOutput(alphas=maps, loss=other)):
        assert torch.equal(foreground(output, 2, "net"), maps[:, 0])
    assert torch.equal(foreground(ModelOutput(loss=other, logits=maps), 2, "net"), maps[:, 0])
    assert torch.equal(foreground([maps, other], 2, "net", 0), maps[:, 0])
    two = torch.randn(2, 2, 4, 5)
    assert torch.equal(foreground(two, 2, "net"), two.softmax(dim=1)[:, 1])


@pytest.mark.parametrize("output", [torch.zeros(2, 3, 4, 4), torch.zeros(1, 1, 4, 4), torch.zeros(2, 8), [], "text"])
def test_what_is_no_map_is_refused(output):
    with pytest.raises(SaliencyError, match="net: expected one map"):
        foreground(output, 2, "net")
