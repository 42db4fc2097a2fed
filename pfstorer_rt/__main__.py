"""`python -m pfstorer_rt`, for launchers that want a module."""

from pfstorer_rt.cli import main

main()
