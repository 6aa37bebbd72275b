"""``python -m modreg_fast.bench``."""

import argparse
import sys

from modreg_fast.bench import add_arguments, main

parser = argparse.ArgumentParser(prog="python -m modreg_fast.bench", description="Benchmarks of modreg_fast.")
add_arguments(parser)
sys.exit(main(parser.parse_args()))
