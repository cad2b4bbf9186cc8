"""`accelerate launch scripts/make_masks.py …`, with the options of `wsss make-masks`."""

import sys

from wsss_hf.cli.main import main

if __name__ == "__main__":
    main(["make-masks", *sys.argv[1:]])
