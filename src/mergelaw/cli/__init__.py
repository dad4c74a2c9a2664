"""The command line: `mergelaw`."""

import sys

from mergelaw.workflow import forkserver


def main() -> None:
    """Run the command: in a fork where a server is running, else in this process."""
    status = forkserver.run(sys.argv[1:])
    if status is None:
        from mergelaw.cli import app  # imported at use, as a fork's command needs none of it

        return app.main()
    sys.exit(status)


def serve() -> None:
    """Run the fork server, whose address is the program's argument."""
    from mergelaw.cli.app import main
    from mergelaw.cli.process import quiet

    quiet()
    forkserver.serve(sys.argv[1], main)
