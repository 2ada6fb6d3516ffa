"""`python -m benchmarks.gpu`."""

import sys

from benchmarks.gpu.measurement import main

sys.exit(main())
