"""`accelerate launch scripts/evaluate_models.py …`, with the options of `wsss evaluate`."""

import sys

from wsss_hf.cli.main import main

if __name__ == "__main__":
    main(["evaluate", *sys.argv[1:]])
