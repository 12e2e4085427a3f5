"""For users of a cluster's API: thin helpers over the ``openai`` package (``pip install berth[client]``).

Everything here takes or gives that package's own clients, so that whatever is not here is there.
"""

from berth.client.batch import Outcome, abatch, batch
from berth.client.connect import async_client, client
from berth.client.ranking import Ranked, arerank, rerank
from berth.client.structured import InvalidAnswer, aparse, parse

__all__ = [
    "InvalidAnswer",
    "Outcome",
    "Ranked",
    "abatch",
    "aparse",
    "arerank",
    "async_client",
    "batch",
    "client",
    "parse",
    "rerank",
]
