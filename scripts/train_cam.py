"""`accelerate launch scripts/train_cam.py …`, with the options of `wsss train-cam`."""

import sys

from wsss_hf.cli.main import main

if __name__ == "__main__":
    main(["train-cam", *sys.argv[1:]])
