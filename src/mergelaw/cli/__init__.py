"""The command line: `mergelaw`."""

import sys

from mergelaw.cli import forkserver


def main() -> None:
    """Run the command: in a fork where a server is running, else in this process."""
    status = forkserver.run(sys.argv[1:])
    if status is None:
        from mergelaw.cli import app  # imported at use, as a fork's command needs none of it

        return app.main()
    sys.exit(status)
