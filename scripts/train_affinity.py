"""`accelerate launch scripts/train_affinity.py …`, with the options of `wsss train-affinity`."""

import sys

from wsss_hf.cli.main import main

if __name__ == "__main__":
    main(["train-affinity", *sys.argv[1:]])
