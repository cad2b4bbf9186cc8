"""`accelerate launch scripts/train_refiner.py …`, with the options of `wsss train-refiner`."""

import sys

from wsss_hf.cli.main import main

if __name__ == "__main__":
    main(["train-refiner", *sys.argv[1:]])
