"""`accelerate launch scripts/run.py …`, with the options of `wsss run`."""

import sys

from wsss_hf.cli.main import main

if __name__ == "__main__":
    main(["run", *sys.argv[1:]])
