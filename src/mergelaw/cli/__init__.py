"""The command line: `mergelaw`."""

import sys

from mergelaw.workflow import forkserver


def main() -> None:
    """Run the command: in a fork if a server is running, otherwise in this process."""
    status = forkserver.run(sys.argv[1:])
    if status is None:
        from mergelaw.cli import app  # imported here, since a forked command does not need it

        return app.main()
    sys.exit(status)


def serve() -> None:
    """Run the fork server, whose address is the program's argument."""
    from mergelaw.cli.app import main
    from mergelaw.cli.process import quiet

    quiet()
    forkserver.serve(sys.argv[1], main)
