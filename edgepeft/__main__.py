"""`python -m edgepeft` is the command line."""

from edgepeft.cli import main

main()
