"""What of the environment is meant for this server: typing errors in `ROPEWAY_` names, and what Kubernetes adds.

Knows names, not what they mean. For a Service called "ropeway" Kubernetes gives every container of its namespace
ROPEWAY_PORT=tcp://10.0.0.7:8000, ROPEWAY_SERVICE_HOST and more ("service links", after Docker's old --link).
"""

import difflib
import re
from collections.abc import Collection, Mapping

PREFIX = "ROPEWAY_"
_LINK = re.compile(r"ROPEWAY_(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)")
_ADDRESS = re.compile(r"(tcp|udp|sctp)://.*")


def read_environment(environ: Mapping[str, str], known: Collection[str]) -> tuple[dict[str, str], list[str]]:
    """The variables without those that Kubernetes made up, and a sentence about each that is not used.

    Args:
        known: names of the variables that mean something.
    """
    ours, warnings = {}, []
    for name, value in environ.items():
        linked = bool(_LINK.fullmatch(name)) or (name.endswith("_PORT") and bool(_ADDRESS.fullmatch(value)))
        if not name.startswith(PREFIX) or (name in known and not linked):
            ours[name] = value
        elif linked and name in known:
            warnings.append(
                f"{name}={value} comes from a Kubernetes Service and is not used; `enableServiceLinks: false` in the "
                "pod's spec keeps such variables away."
            )
        elif not linked:
            words = [word.removeprefix(PREFIX) for word in known]
            near = difflib.get_close_matches(name.removeprefix(PREFIX), words, n=1, cutoff=0.6)
            hint = f"did you mean {PREFIX}{near[0]}?" if near else "`ropeway serve --help` lists all flags."
            warnings.append(f"There is no variable {name}, it is not used; {hint}")
    return ours, warnings
