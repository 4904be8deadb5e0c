"""Entry of the command line: `fastsam ...` or `python -m fastsam ...`."""

import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec

import fastsam
from fastsam.installation import DISTRIBUTION, why_not_ours

NEEDED = {"click": "click", "rich": "rich", "matplotlib": "matplotlib", "sklearn": "scikit-learn", "scipy": "scipy"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return the exit code: 0, 2 after one line on stderr for bad input, 130 after Ctrl-C.

    Args:
        arguments: what follows the program's name; None for the process's own arguments.
    """
    if (why := why_not_ours(fastsam)) is not None:
        return _fail(why)
    missing = [package for module, package in NEEDED.items() if find_spec(module) is None]
    if missing:
        return _fail(f"the command line needs {', '.join(missing)}; install it with: pip install '{DISTRIBUTION}[cli]'")
    import click

    from fastsam.cli.commands import fastsam as commands
    from fastsam.cli.errors import InputError

    try:
        code = commands.main(arguments, prog_name="fastsam", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except click.ClickException as error:
        return _fail(error.format_message())
    except (click.Abort, KeyboardInterrupt):
        return 130
    except BrokenPipeError:  # the reader of our output has left, and Python would stumble over the pipe once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (InputError, OSError) as error:
        return _fail(str(error))


def _fail(message: str) -> int:
    print("fastsam:", " ".join(message.split()), file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
