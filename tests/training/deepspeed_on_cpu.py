"""`wsss …` under DeepSpeed on CPUs, for test_deepspeed.py: Accelerate itself has it on accelerators only."""

import sys

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType

from wsss_hf.cli.main import main

# Any kind of several devices; ACCELERATE_TORCH_DEVICE says which.
PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_HPU)
torch.accelerator.is_available = lambda: True  # else processes meet as those of a CPU do, without DeepSpeed
main(sys.argv[1:])
