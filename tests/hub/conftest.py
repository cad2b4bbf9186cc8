"""The loopback Hub, for this process and for those it starts."""

import os

import huggingface_hub.constants
import pytest
from loopback_hub import TOKEN, LoopbackHub


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A fresh Hub that this process talks to, signed in, with an empty cache."""
    with LoopbackHub() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        # Read from the environment when the client was imported.
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        yield server


@pytest.fixture
def client_environment(hub, tmp_path):
    """The environment of a process that talks to the Hub from a clean cache; a test adds the token if it has one."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and k != "PYTHONPATH"}
    return environment | {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "stranger"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "OMP_NUM_THREADS": "1",
    }
