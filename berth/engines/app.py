"""What Serve's build task imports: the application of one berth, and the gateway's.

Kept free of vLLM: the build task runs once per berth and vLLM's import alone takes some ten CPU seconds, so the
engine is imported inside the replica, where it is needed.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from ray import serve

from berth.engines.replica import Replica
from berth.engines.team import TeamNode
from berth.ray.serve_config import node_name


def build(args: dict[str, Any]) -> serve.Application:
    """One berth: an app with a deployment named after its model, and one for each other slot of its ``team``.

    ``args``: ``model`` (the name users ask for), ``engine``, ``source`` (directory or hub id), ``engine_args``
    (vLLM's), ``gpus`` (how many the slot has), ``vram_mib`` (footprint per GPU), as berth.ray.serve_config writes them.
    Everything Ray needs to place it stands in the config's ``deployments`` entry, never here, so that a change of
    count restarts nothing.
    """
    model = str(args["model"])
    nodes = [serve.deployment(TeamNode, name=node_name(model, slot)).bind(args) for slot in args.get("team", ())[1:]]
    return serve.deployment(Replica, name=model).bind(args, *nodes)


def build_gateway(args: dict[str, Any]) -> serve.Application:
    """The one app that owns the route: its table of berths is ``user_config``.

    The runtime decides which gateway: ray.serve.llm's ingress where vLLM is installed, the light one elsewhere.
    """
    if find_spec("vllm"):
        from berth.engines.gateway import gateway_class

        return serve.deployment(gateway_class(), name="gateway").bind()
    from berth.engines.light_gateway import LightGateway

    return serve.deployment(LightGateway, name="gateway").bind()
