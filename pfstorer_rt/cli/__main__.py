"""`python -m pfstorer_rt.cli`, for launchers that want a module."""

from pfstorer_rt.cli import main

main()
