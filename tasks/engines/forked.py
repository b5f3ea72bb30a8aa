"""What a job of the process engine runs as: ``forked.py FOLDER PYTHON -m MODULE [ARGUMENT…]``.

It asks the fork server that listens in FOLDER (``tasks.engines.forkserver``) for a fork that runs the module, in its
own process group and with its own streams, and ends as that one ends: same exit code, same signal. Where no server
answers it becomes the command itself. It is run as a bare script by an interpreter without site packages, since its
start is what a job waits for.
"""

import contextlib
import json
import os
import signal
import socket
import sys

SOCKET = "fork.sock"
FORKED = b"F"  # the server's first answer, before the fork's exit status as JSON
LOST = 70  # the server died, and its forks with it


def main(folder, command):
    # The whole group is sent a SIGTERM; the fork may take its time to end, and this process waits for it.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    request = {"module": command[2], "arguments": command[3:], "environment": dict(os.environ), "folder": os.getcwd()}
    found = connect(folder)
    answer = ask(found, json.dumps(request).encode()) if found else b""
    if not answer.startswith(FORKED):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.execv(command[0], command)
    status = json.loads(answer.removeprefix(FORKED) or str(LOST))
    if status < 0:
        end_by(-status)
    sys.exit(status)


def connect(folder):
    """Return a connection to the server, or None."""
    found = socket.socket(socket.AF_UNIX)
    try:
        # By the folder's descriptor: the path itself may be longer than an address takes.
        place = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        found.connect(f"/proc/self/fd/{place}/{SOCKET}")
        os.close(place)
    except OSError:
        return None
    return found


def ask(found, request):
    """Send the request with our streams; return all that the server says until it hangs up."""
    answer = b""
    with contextlib.suppress(OSError):
        socket.send_fds(found, [len(request).to_bytes(8, "big")], [0, 1, 2])
        found.sendall(request)
        while part := found.recv(64):
            answer += part
    return answer


def end_by(number):
    """Die by the signal that the fork died of, without a second core file."""
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(number, signal.SIG_DFL) if number not in (signal.SIGKILL, signal.SIGSTOP) else None
    os.kill(os.getpid(), number)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
