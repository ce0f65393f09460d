"""Prepares a corpus without the rest of the package; the same as `ra3 prepare`."""

import argparse
import sys

from megatron_ra3.corpus.commands import add_prepare_arguments, run_prepare

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    add_prepare_arguments(parser)
    try:
        sys.exit(run_prepare(parser.parse_args()))
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
