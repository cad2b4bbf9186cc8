"""What `import wsss_hf` costs, and what it offers."""

import gc
import json
import subprocess
import sys

import pytest

import wsss_hf
from wsss_hf.models.libraries import without_collections

HEAVY = ["accelerate", "datasets", "evaluate", "huggingface_hub", "pandas", "pymatting", "scipy", "skimage", "typer"]
# What our models use of the library.
LIBRARY = """
import transformers.modeling_utils
import transformers.models.auto.modeling_auto
import transformers.pipelines.base
import transformers.pipelines.image_classification
import transformers.pipelines.image_segmentation
import transformers.image_processing_backends
import transformers.dynamic_module_utils
"""


def modules(code: str) -> set[str]:
    """The names in `sys.modules` of a new interpreter after this code."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport json, sys\nprint(json.dumps(list(sys.modules)))"],
        capture_output=True,
        text=True,
        check=True,
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.slow
def test_the_import_costs_no_more_than_torch_and_transformers():
    ours, library = modules("import wsss_hf"), modules(LIBRARY)
    added = {name.partition(".")[0] for name in ours - library}
    assert not added & set(HEAVY)
    rooms = {name.split(".")[1] for name in ours if name.startswith("wsss_hf.")}
    assert rooms <= {"models", "version"}


def test_everything_public_can_be_had():
    assert set(wsss_hf.__all__) <= set(dir(wsss_hf))
    for name in wsss_hf.__all__:
        assert getattr(wsss_hf, name) is not None, name


def test_a_name_that_is_not_there_is_an_attribute_error():
    assert not hasattr(wsss_hf, "train_everything")


SEARCHES = """
import gc, json
searched = []
gc.callbacks.append(lambda phase, info: searched.append(len(gc.get_objects(generation=info["generation"]))))
import wsss_hf
for _ in range(20):  # enough for what is youngest now, and then for what is no longer
    held = [[] for _ in range(1000)]
print(json.dumps([gc.isenabled(), max(searched), len(gc.get_objects())]))
"""


@pytest.mark.slow
def test_what_the_import_made_is_not_searched_for_garbage_at_once():
    done = subprocess.run([sys.executable, "-c", SEARCHES], capture_output=True, text=True, check=True)
    is_enabled, searched, objects = json.loads(done.stdout)
    assert is_enabled and searched < objects / 10


@pytest.mark.parametrize("is_enabled", [True, False])
def test_collections_go_on_after_an_import_that_fails_if_they_did_before(is_enabled):
    (gc.enable if is_enabled else gc.disable)()
    try:
        with pytest.raises(ImportError), without_collections():
            assert not gc.isenabled()
            raise ImportError
        assert gc.isenabled() == is_enabled
    finally:
        gc.enable()
