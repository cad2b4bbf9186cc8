import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest

from wsss_hf.data.sources import load_data

SCRIPT = Path(__file__).parents[1] / "scripts" / "benchmark_size.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("benchmark_size", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_images_have_tags_and_masks_that_agree(script, tmp_path):
    script.generate(tmp_path / "data", 7, 16)
    rows = load_data(tmp_path / "data")["train"]
    assert len(rows) == 7 and set(map(len, rows["tags"])) == {1}
    for row in rows:
        assert set(np.unique(row["mask"])) == {0, row["tags"][0] + 1}
        assert row["image"].size == row["mask"].size == (16, 16)


def test_a_process_is_measured_until_a_file_appears_and_to_its_end(script, tmp_path):
    code = "import sys, time; held = bytearray(10**8); open(sys.argv[1], 'w').close(); time.sleep(0.5)"
    # A process begins with the peak of the one that starts it: this one's would hide it.
    arguments = f"[sys.executable, '-c', {code!r}, {str(tmp_path / 'begun')!r}], Path({str(tmp_path / 'begun')!r})"
    fresh = "import json, sys; from pathlib import Path; import benchmark_size as b; "
    fresh += f"print(json.dumps(b.measure({arguments})))"
    done = subprocess.run([sys.executable, "-c", fresh], cwd=SCRIPT.parent, capture_output=True, text=True, check=True)
    figures = json.loads(done.stdout)
    assert 95 < figures["peak MiB"] < 1000 and figures["s"] > 0.5
    assert not hasattr(psutil.Process().memory_info(), "shared") or 95 < figures["own MiB"] < figures["peak MiB"]
    assert figures["s until then"] < figures["s"] and figures["starts after CPU s"] <= figures["CPU s"] + 0.02
    with pytest.raises(SystemExit, match="ended with 3"):
        script.measure([sys.executable, "-c", "raise SystemExit(3)"])
