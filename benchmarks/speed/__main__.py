"""`python -m benchmarks.speed`."""

import sys

from benchmarks.speed.table import main

sys.exit(main())
