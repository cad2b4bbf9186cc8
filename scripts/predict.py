"""`accelerate launch scripts/predict.py …`, with the options of `wsss predict`."""

import sys

from wsss_hf.cli.main import main

if __name__ == "__main__":
    main(["predict", *sys.argv[1:]])
