"""Messages to systemd: that a service is ready, is alive, and is stopping (the protocol of ``sd_notify``).

https://www.freedesktop.org/software/systemd/man/latest/sd_notify.html. A supervisor that hangs sends none, and systemd
restarts the service after ``WatchdogSec`` of its unit.
"""

import os
import socket
from contextlib import suppress

READY, ALIVE, STOPPING = "READY=1", "WATCHDOG=1", "STOPPING=1"


def tell(*states: str) -> None:
    """Send ``states`` to the service manager, if this process is a service that it asked for them."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    place = "\0" + address[1:] if address.startswith("@") else address
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as line:
        line.connect(place)
        line.send("\n".join(states).encode())
