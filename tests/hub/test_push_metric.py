"""Metrics as Spaces: evaluate loads them from the Hub, and they count as the package's own."""

import evaluate
import numpy as np
import pytest
from evaluate.utils.file_utils import DownloadConfig
from huggingface_hub import SpaceCard

from wsss_hf.hub.metric_space import push_metric
from wsss_hf.hub.upload import HubError
from wsss_hf.metrics.boundary_f import BoundaryF
from wsss_hf.metrics.mean_iou import MeanIoU

NAMES = ["background", "cat", "dog"]


@pytest.fixture
def hub(hub, monkeypatch):
    monkeypatch.setattr(evaluate.config, "HUB_EVALUATE_URL", hub.url + "/spaces/{path}/resolve/{revision}/{name}")
    monkeypatch.setattr(evaluate.config, "HF_UPDATE_DOWNLOAD_COUNTS", False)
    monkeypatch.setattr(evaluate.config, "HF_EVALUATE_OFFLINE", False)
    return hub


@pytest.mark.parametrize(("name", "metric_class"), [("mean_iou", MeanIoU), ("boundary_f", BoundaryF)])
def test_evaluate_finds_the_metric_on_the_hub(hub, name, metric_class, tmp_path):
    push_metric(name, f"tester/our_{name}")
    files = hub.files(f"tester/our_{name}", kind="space")
    assert {f"our_{name}.py", "streaming.py", "README.md", "index.html"} <= set(files)
    card = SpaceCard(files["README.md"].decode())
    assert card.data.sdk == "static" and "evaluate" in card.data.tags
    assert f"evaluate.load(&quot;tester/our_{name}&quot;".encode() in files["index.html"]
    assert f'evaluate.load("tester/our_{name}"' in card.text and f"{name}: mean of " in card.text

    options = DownloadConfig(cache_dir=tmp_path / "cache")
    loaded = evaluate.load(
        f"tester/our_{name}",
        class_names=NAMES,
        download_config=options,
        cache_dir=str(tmp_path),
        revision="main",
    )
    assert not type(loaded).__module__.startswith("wsss_hf")
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 3, (2, 20, 30), dtype=np.uint8) for _ in range(3)]
    figures = []
    for metric in (loaded, metric_class(class_names=NAMES)):
        for prediction, reference in images:
            metric.add(prediction=prediction, reference=reference)
        figures.append(metric.compute())
    assert figures[0] == figures[1]


def test_an_unknown_metric_is_refused(hub):
    with pytest.raises(HubError, match="metric 'accuracy': unknown; expected mean_iou or boundary_f"):
        push_metric("accuracy", "tester/accuracy")
    assert hub.requests == []
