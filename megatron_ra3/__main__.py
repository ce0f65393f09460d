"""`python -m megatron_ra3`: the `ra3` command, for launchers that start modules (torchrun, srun)."""

import sys

from megatron_ra3.cli import main

sys.exit(main())
