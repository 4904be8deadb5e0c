"""The commands of the benchmarks: `python -m benchmarks COMMAND`."""

import shlex
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module

import click

from fastsam.cli.errors import InputError


class Commands(click.Group):
    """Commands, each imported when it is asked for: a gate decides how kernels are built before these are imported.

    Args:
        modules: the module of each command, which has it as `command`; or the command.
    """

    def __init__(self, name: str, modules: Mapping[str, str | click.Command], about: str) -> None:
        super().__init__(name, help=about)
        self.modules = modules

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order of the table."""
        return list(self.modules)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """Return the command of this name, or None."""
        found = self.modules.get(name)
        return import_module(found).command if isinstance(found, str) else found


GATES = Commands(
    "gate",
    {name: f"benchmarks.gates.{name}" for name in ("static", "count", "cpu", "gpu")},
    "Hold what is measured against a committed record: exit status 1 where something got worse.",
)
COMMANDS = Commands(
    "benchmarks",
    {
        "steps": "benchmarks.steps.run",
        "msam-curve": "benchmarks.steps.msam_curve",
        "overlap": "benchmarks.steps.overlap",
        "kernels": "benchmarks.kernels.run",
        "gate": GATES,
        "readme": "benchmarks.readme",
    },
    "Measure fastsam's steps and kernels side by side with what else would do their work.",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the exit status: 0; 1 for a red gate; 2 for bad input or what cannot run here; 130.

    Args:
        arguments: what follows `python -m benchmarks`; None for the process's own.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    typed = shlex.join(["python", "-m", "benchmarks", *arguments])
    try:
        status = COMMANDS.main(arguments, prog_name="python -m benchmarks", standalone_mode=False, obj=typed)
    except InputError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return 130
    return status if isinstance(status, int) else 0


if __name__ == "__main__":
    sys.exit(main())
