import pytest
from accelerate.state import AcceleratorState


@pytest.fixture(autouse=True)
def fresh_accelerator():
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()
