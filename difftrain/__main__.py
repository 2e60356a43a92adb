"""``python -m difftrain`` and ``torchrun -m difftrain``."""

import sys

from difftrain.cli import main

sys.exit(main())
