"""`wsss …` under DeepSpeed on CPUs, for test_deepspeed.py: Accelerate itself has it on accelerators only."""

import sys

from accelerate import PartialState
from accelerate.utils import DistributedType

from wsss_hf.cli.main import main

# Any kind of several devices; ACCELERATE_TORCH_DEVICE says which.
PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_HPU)
main(sys.argv[1:])
