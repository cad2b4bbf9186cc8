import pytest

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
