"""What a node does before torchrun starts on it: python -m olmo.cluster.node ADDRESSES COMMAND…

ADDRESSES are those of the allocation's first nodes, with commas between; "" where there is one.
"""

import os
import signal
import socket
import sys
from collections.abc import Sequence

import psutil

# How long nodes wait for each other at the start, in seconds: they do not begin at one moment, and
# the last may be importing torch from a slow file system.
JOIN_S = 600


def meeting(addresses: Sequence[str], number: int) -> dict[str, str]:
    """The environment in which torchrun and gloo of node `number` (from 0) find the other nodes.

    Both would announce the machine's own name, which may be unknown to the others, or mean
    127.0.1.1 here. An address by which one node reaches another is one by which it is reached.
    """
    # By itself each node would look whether the rendezvous' address is its own, which fails where a
    # node has several, and is true of two that share one machine.
    found = {"PET_RDZV_CONF": f"join_timeout={JOIN_S},is_host={int(number == 0)}"}
    own = address_towards(addresses[1 if number == 0 else 0])
    found["PET_LOCAL_ADDR"] = own
    if (interface := interface_of(own)) is not None:
        found["GLOO_SOCKET_IFNAME"] = interface
    return found


def address_towards(other: str) -> str:
    """This machine's address on the way to another one. Nothing is sent.

    Raises:
        ValueError: there is no way there.
    """
    try:
        kind, _, _, _, place = socket.getaddrinfo(other, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(kind, socket.SOCK_DGRAM) as probe:
            probe.connect(place)
            own: str = probe.getsockname()[0]
            return own
    except OSError as error:
        raise ValueError(
            f"{socket.gethostname()}: expected a way to the node {other}, found none ({error}); "
            "`scontrol show node` tells its NodeAddr, which has to be an address or a known name"
        ) from None


def interface_of(address: str) -> str | None:
    """The name of the network interface that has an address."""
    for name, found in psutil.net_if_addrs().items():
        if address in (one.address.split("%")[0] for one in found):
            return name
    return None


def main(addresses: str, *command: str) -> None:
    """Ignore a scheduler's signals, find the other nodes, and become `command` (exec)."""
    # A scheduler sends these to every process of a job. The ranks heed them; torchrun would die of
    # the one, and at the other give the ranks 30 seconds, whatever the scheduler gives.
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    if addresses:  # what a site has set itself stays
        try:
            found = meeting(addresses.split(","), int(os.environ["SLURM_NODEID"]))
        except ValueError as error:
            sys.exit(str(error))
        os.environ.update(found | os.environ)
    os.execv(command[0], command)


if __name__ == "__main__":
    main(*sys.argv[1:])
