"""`python -m secateur` is the `secateur` command."""

from secateur.commands.cli import main

main()
