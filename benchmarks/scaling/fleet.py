"""Servers by the hundred, simulated: throughput, waiting times and costs for a number of replicas and a way to route.

Requests come at random (Poisson). Each has one of some common beginnings (system prompts; the n-th is asked for 1/n as
often as the first), words of its own, and an answer; lengths vary by a quarter to seven quarters. Routes: `random`;
`least`, to the replica with the fewest unfinished requests; `prefix`, to the replica that a hash of the beginning
names, or the next one while that has more than 1.25 times the average load and one request.
Run: python -m benchmarks.scaling.fleet [--replicas N ...] [--rate R] [--route ROUTE ...] [--price P] [--closed N ...]
"""

import argparse
import random
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import simpy

from benchmarks.scaling.replica import LIMITS, SMOLLM2, Limits, Replica, Request, ServiceTimes

Route = Callable[[Sequence[Replica], Request], Replica]


@dataclass(frozen=True)
class Load:
    """What comes in.

    Attributes:
        rate: Requests per second and replica.
        beginnings: How many common beginnings there are.
        shared, own, answer: Tokens: of a beginning; of a prompt behind it, on average; of an answer, on average.
    """

    rate: float = 1.0
    beginnings: int = 64
    shared: int = 256
    own: int = 64
    answer: int = 64


@dataclass(frozen=True)
class Outcome:
    """What came of it, of the requests after the first quarter of the time.

    Attributes:
        tokens: Generated per second and replica.
        first: Seconds to the first token: median and 99 %.
        each: Seconds per further token: median and 99 %.
        hits: Share of the prompts whose beginning was kept.
        busy: Share of the time that replicas compute.
    """

    tokens: float
    first: tuple[float, float]
    each: tuple[float, float]
    hits: float
    busy: float

    def cost(self, price: float) -> float:
        """Return the price of a million tokens by the price of a replica's hour."""
        return price / (self.tokens * 3600) * 1e6


def by_chance(replicas: Sequence[Replica], request: Request) -> Replica:
    return random.Random(f"{request.came}").choice(replicas)


def least_loaded(replicas: Sequence[Replica], _: Request) -> Replica:
    return min(replicas, key=lambda replica: replica.load)


def by_prefix(replicas: Sequence[Replica], request: Request) -> Replica:
    most = 1.25 * sum(replica.load for replica in replicas) / len(replicas) + 1
    home = random.Random(request.beginning).randrange(len(replicas))
    for place in range(len(replicas)):
        replica = replicas[(home + place) % len(replicas)]
        if replica.load <= most:
            return replica
    return replicas[home]


ROUTES: dict[str, Route] = {"random": by_chance, "least": least_loaded, "prefix": by_prefix}


def requests(load: Load, seed: int) -> Generator[Request, None, None]:
    """Yield requests without a time; the same ones for each route."""
    draw = random.Random(seed)
    weights = list(accumulate(1 / (place + 1) for place in range(load.beginnings)))

    def length(mean: int) -> int:
        return max(1, round(mean * draw.uniform(0.25, 1.75)))

    while True:
        (beginning,) = draw.choices(range(load.beginnings), cum_weights=weights)
        yield Request(beginning, load.shared, length(load.own), length(load.answer), 0.0)


def simulate(
    replicas: int,
    load: Load,
    route: Route,
    seconds: float,
    *,
    clients: int = 0,
    times: ServiceTimes = SMOLLM2,
    limits: Limits = LIMITS,
    seed: int = 0,
) -> Outcome:
    """Simulate so many seconds.

    Args:
        replicas: How many servers.
        load: What comes in.
        route: Which server gets a request.
        clients: 0 for requests that come at random; otherwise so many clients that each send one after another.
        times: What calls take.
        limits: Settings of the servers.
        seed: Of all that is drawn.
    """
    clock = simpy.Environment()
    servers = [Replica(clock, times, limits) for _ in range(replicas)]
    source, draw, sent = requests(load, seed), random.Random(seed + 1), list[Request]()

    def send() -> Request:
        request = next(source)
        request.came = clock.now
        route(servers, request).take(request)
        sent.append(request)
        return request

    def arrivals() -> Generator[Any, Any, None]:
        while True:
            yield clock.timeout(draw.expovariate(load.rate * replicas))
            send()

    def client() -> Generator[Any, Any, None]:
        while True:
            yield send().over

    for _ in range(clients):
        clock.process(client())
    if not clients:
        clock.process(arrivals())
    clock.run(until=seconds)
    return _outcome(sent, servers, seconds)


def _outcome(sent: Sequence[Request], servers: Sequence[Replica], seconds: float) -> Outcome:
    begin = seconds / 4
    ended = [request for request in sent if request.ended > begin]
    seen = [request for request in ended if request.came > begin]
    each = [(one.ended - one.first) / (one.answer - 1) for one in seen if one.answer > 1]
    return Outcome(
        tokens=sum(request.answer for request in ended) / (seconds - begin) / len(servers),
        first=_quantiles([request.first - request.came for request in seen]),
        each=_quantiles(each),
        hits=sum(server.hits for server in servers) / max(1, sum(server.queries for server in servers)),
        busy=min(1.0, sum(server.busy for server in servers) / seconds / len(servers)),
    )


def _quantiles(values: Sequence[float]) -> tuple[float, float]:
    ordered = sorted(values) or [float("nan")]
    return ordered[len(ordered) // 2], ordered[min(len(ordered) - 1, round(len(ordered) * 0.99))]


def _row(name: str, found: Outcome, price: float) -> str:
    return (
        f"{name:22} {found.tokens:6.1f} tokens/s  first {found.first[0]:5.2f} s, 99 % {found.first[1]:6.2f} s  "
        f"each {found.each[0] * 1e3:4.0f} ms, 99 % {found.each[1] * 1e3:4.0f} ms  kept {found.hits:4.0%}  "
        f"busy {found.busy:4.0%}  {found.cost(price):5.2f} a million"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 10, 100, 1000])
    parser.add_argument("--rate", type=float, default=1.0, help="requests per second and replica")
    parser.add_argument("--route", nargs="+", choices=sorted(ROUTES), default=list(ROUTES))
    parser.add_argument("--price", type=float, default=0.1, help="of a replica's hour")
    parser.add_argument("--seconds", type=float, default=120.0, help="that are simulated")
    parser.add_argument(
        "--closed", type=int, nargs="+", help="one replica and so many clients, as a benchmark has them"
    )
    options = parser.parse_args()
    if options.closed:
        load = Load(beginnings=1, shared=0, own=150, answer=64)
        for clients in options.closed:
            found = simulate(1, load, least_loaded, options.seconds, clients=clients)
            print(_row(f"{clients} clients", found, options.price))
        return
    for replicas in options.replicas:
        for name in options.route:
            found = simulate(replicas, Load(rate=options.rate), ROUTES[name], options.seconds)
            print(_row(f"{replicas} replicas, {name}", found, options.price))


if __name__ == "__main__":
    main()
