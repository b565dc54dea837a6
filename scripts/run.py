"""The target of `accelerate launch`: runs a recipe on every process, with the arguments of `distill run`."""

import sys

from distill.cli import main

if __name__ == "__main__":
    sys.exit(main(["run", *sys.argv[1:]]))
