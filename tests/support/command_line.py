"""The command line, run in this process."""

from typer.testing import CliRunner

from secateur.cli import app as cli

runner = CliRunner()


def run(*arguments: object) -> str:
    """Run a command that has to succeed, and return its standard output."""
    result = runner.invoke(cli.app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout
