"""What `import wsss_hf` costs, and what it offers."""

import json
import subprocess
import sys

import pytest

import wsss_hf

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
