"""What the ssh program complains about before it is in, as errors that say what to do."""

from __future__ import annotations

import re
from collections.abc import Sequence

from smskd.errors import RefusedError

_CAUSES: tuple[tuple[str, str, str], ...] = (
    (
        r"REMOTE HOST IDENTIFICATION HAS CHANGED|host key .* has changed",
        "{device} shows another host key than the one that is known for it",
        "either it was installed anew, or something else answers in its place. Print the key on "
        "the device itself: ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub . Only if it is the "
        "one that ssh {device} shows: ssh-keygen -R with its host name, then ssh {device} once",
    ),
    (
        r"Host key verification failed|No .* host key is known",
        "the host key of {device} is not known here",
        "type ssh {device} once, compare the fingerprint with that of the device, and accept it",
    ),
    (
        r"Permission denied|Too many authentication failures|No supported authentication",
        "{device} does not let you in without a password",
        "give it your key: ssh-copy-id {device} ; a key with a passphrase: ssh-add. "
        "Then ssh {device} must work without a question",
    ),
    (
        r"Connection refused",
        "no ssh server answers at {device}",
        "on the device: sudo systemctl enable --now ssh ; for another port, "
        "name it as ssh://user@host:port or in ~/.ssh/config",
    ),
    (
        r"timed out|Timeout, server .* not responding",
        "{device} does not answer",
        "is it switched on, and in a network that this machine reaches? try: ssh {device}",
    ),
    (
        r"Could not resolve hostname|Name or service not known",
        "the name of {device} is not known to the network",
        "use its address, or an entry of ~/.ssh/config; a port goes as ssh://user@host:port",
    ),
    (
        r"No route to host|Network is unreachable|Host is down",
        "there is no way to {device} from this network",
        "is it switched on, and in a network that this machine reaches?",
    ),
    (
        r"[Bb]ad (configuration|owner|permissions)|Unsupported option|terminating, \d+ bad",
        "the ssh program does not accept its configuration",
        "mend ~/.ssh/config until ssh {device} works",
    ),
)


def connection_error(device: str, complaints: Sequence[str]) -> RefusedError | None:
    """Why ssh did not get in; None: its complaints are not those of a link that never was.

    Args:
        device: As the user wrote it.
        complaints: What ssh printed.
    """
    text = "\n".join(complaints)
    for pattern, message, remedy in _CAUSES:
        if re.search(pattern, text):
            # The warning about a changed key is a page long; its last line says nothing new.
            detail = "" if "host key" in message else f" ({complaints[-1]})"
            return RefusedError(
                message.format(device=device) + detail, remedy.format(device=device)
            )
    return None
