"""Prepare a node for torchrun, then run it: python -m olmo.cluster.node ADDRESSES COMMAND…

ADDRESSES are those of the allocation's first two nodes, comma-separated; "" for a single node.
"""

import os
import signal
import socket
import sys
from collections.abc import Sequence

import psutil

# Seconds that nodes wait for each other at the start: the last one may still be importing torch
# from a slow file system.
JOIN_S = 600


def rendezvous_environment(addresses: Sequence[str], number: int) -> dict[str, str]:
    """The environment by which torchrun and gloo of node `number` (from 0) find the other nodes.

    Both would announce the machine's hostname, which may not resolve on other nodes, or resolve to
    127.0.1.1 here. The address from which this node reaches another is used instead.
    """
    # is_host, since torchrun would compare the rendezvous address with its own: wrong on a node
    # with several addresses, and true for both of two nodes on one machine.
    found = {"PET_RDZV_CONF": f"join_timeout={JOIN_S},is_host={int(number == 0)}"}
    own = local_address(addresses[1 if number == 0 else 0])
    found["PET_LOCAL_ADDR"] = own
    if (interface := find_interface(own)) is not None:
        found["GLOO_SOCKET_IFNAME"] = interface
    return found


def local_address(other: str) -> str:
    """This machine's address on the route to another one (a UDP socket; nothing is sent).

    Raises:
        ValueError: there is no route.
    """
    try:
        kind, _, _, _, place = socket.getaddrinfo(other, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(kind, socket.SOCK_DGRAM) as probe:
            probe.connect(place)
            own: str = probe.getsockname()[0]
            return own
    except OSError as error:
        raise ValueError(
            f"{socket.gethostname()}: expected a route to the node {other}, found none ({error}); "
            "its NodeAddr in `scontrol show node` must be an address or a name that resolves"
        ) from None


def find_interface(address: str) -> str | None:
    """The name of the network interface with an address; None if there is none."""
    for name, found in psutil.net_if_addrs().items():
        if address in (one.address.split("%")[0] for one in found):
            return name
    return None


def main(addresses: str, *command: str) -> None:
    """Ignore a scheduler's signals, set the rendezvous environment, and exec `command`."""
    # A scheduler sends these to every process of a job. The ranks handle them; torchrun would die
    # of SIGUSR1, and kill the ranks 30 seconds after SIGTERM.
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    if addresses:  # variables that the site has set stay
        try:
            found = rendezvous_environment(addresses.split(","), int(os.environ["SLURM_NODEID"]))
        except ValueError as error:
            sys.exit(str(error))
        os.environ.update(found | os.environ)
    os.execv(command[0], command)


if __name__ == "__main__":
    main(*sys.argv[1:])
