"""A process that generates through an endpoint; tests kill it. Arguments: URL, or several with commas, log, requests,
concurrency, token budget."""

import sys
from pathlib import Path

from fault_server import KEY_ENV
from understudy.generation import Endpoint, EndpointSource, Request, ServerPool, generate, log_of


def requests(number):
    return [Request(f"prompt number {i} of many {'x' * (i % 7)}", f"r/{i}", max_tokens=8) for i in range(number)]


def main(url, path, number, concurrency, budget):
    endpoint = Endpoint(url=url.split(","), api_key_env=KEY_ENV, timeout=4.0)
    source = (ServerPool if "," in url else EndpointSource)("toy", endpoint)
    with log_of(source, Path(path)) as log:
        generate(
            source,
            requests(int(number)),
            log,
            concurrency=int(concurrency),
            retries=30,
            backoff=0.001,
            longest_backoff=0.01,
            token_budget=int(budget),
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
