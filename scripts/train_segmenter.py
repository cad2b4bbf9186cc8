"""`accelerate launch scripts/train_segmenter.py …`, with the options of `wsss train-segmenter`."""

import sys

from wsss_hf.cli.main import main

if __name__ == "__main__":
    main(["train-segmenter", *sys.argv[1:]])
