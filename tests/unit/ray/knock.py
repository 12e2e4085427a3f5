"""Ask the GCS whether it is alive, as a Ray client of this environment (token, certificates); prints gRPC's status."""

from __future__ import annotations

import sys


def main(address: str) -> None:
    import grpc
    from ray._private.grpc_utils import init_grpc_channel
    from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc

    stub = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(init_grpc_channel(address))
    try:
        stub.CheckAlive(gcs_service_pb2.CheckAliveRequest(), timeout=10)
    except grpc.RpcError as error:
        print(error.code().name)
    else:
        print("OK")


if __name__ == "__main__":
    main(sys.argv[1])
