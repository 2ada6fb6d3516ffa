"""How the command's threads wait for each other: asleep after microseconds, so that waiting slows no busy machine."""

from collections.abc import Mapping, MutableMapping

USERS_OWN = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""Variables of GNU's, LLVM's and Intel's OpenMP by which a user says how threads wait."""

ASLEEP: Mapping[str, str] = {"GOMP_SPINCOUNT": "2000", "OMP_WAIT_POLICY": "PASSIVE"}
"""GNU's OpenMP looks for the next product some ten microseconds long before it sleeps, and the count goes before the
policy. The other two know the policy only."""


def wait_asleep(environment: MutableMapping[str, str]) -> None:
    """Tell OpenMP, before torch loads it, that a thread which waits gives up its processor; the user's word stays.

    By default a thread that has done its share of a product turns in a loop until the others have done theirs. Where
    other processes want the processor, it keeps them, and with them the threads it waits for, from running
    (docs/decisions/threads.md).
    """
    if not any(name in environment for name in USERS_OWN):
        environment.update(ASLEEP)
