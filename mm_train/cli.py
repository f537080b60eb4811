"""What every command of the project shares: one-line errors and a clean exit status. Torch-free."""

import functools
import os
import sys
import time
from collections.abc import Callable

from kernels.backend import KernelError


class UserError(Exception):
    """A mistake that the user can mend: says what is wrong, the value, and what would be right.

    Raise it wherever outside input (config, shard, checkpoint, flag, environment) is found bad. Commands print it
    as one line and exit with status 2; libraries let it pass.
    """

    status = 2  # of a command that ends with it


class LostContact(UserError):
    """A rank ends because another one is gone or cannot be reached: not its mistake, and worth another try."""

    status = 69  # sysexits.h EX_UNAVAILABLE


def first_line(error: BaseException) -> str:
    """What an error of somebody else's says, in one line; its kind when it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def command(main: Callable[..., int | None]) -> Callable[..., int]:
    """Wrap a command's `main(argv=None)`: a UserError becomes one line on stderr and exit status 2; so do kernels that
    the environment asks for and that cannot run.

    Ctrl-C exits with 130 and a broken pipe with 141 like other Unix programs, both without a traceback. Anything else
    is a defect of ours and keeps its traceback.
    """

    @functools.wraps(main)
    def wrapped(*args, **kwargs) -> int:
        try:
            return main(*args, **kwargs) or 0
        except (UserError, KernelError) as error:
            rank = os.environ.get("RANK", "0")
            if rank != "0":
                # All ranks usually fail alike. Rank 0 speaks first and the launcher then ends the others; what is
                # still alive after the pause has a trouble of its own.
                time.sleep(3)
            prefix = f"[rank {rank}] " if rank != "0" else ""
            print(f"{prefix}error: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
            return error.status if isinstance(error, UserError) else UserError.status
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 130
        except BrokenPipeError:
            sys.stderr.close()  # the reader has gone: nothing more can be said, and Python would try at exit
            return 141

    return wrapped
