"""`python -m secateur` is the `secateur` command."""

from secateur.cli.app import main

main()
