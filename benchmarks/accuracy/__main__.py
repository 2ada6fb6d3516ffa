"""`python -m benchmarks.accuracy`."""

from benchmarks.accuracy.table import main

main()
