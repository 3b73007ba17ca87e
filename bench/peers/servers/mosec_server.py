"""mosec: `--address` and `--port` are its own flags."""

from mosec import Runtime, Server, Worker

from bench.peers.servers.plain import WORKERS, answer


class Raw(Worker):  # type: ignore[misc] # (mosec is not installed where types are checked)
    """A worker whose requests and replies are bytes."""

    def deserialize(self, data: bytes) -> bytes:
        return data

    def serialize(self, data: bytes) -> bytes:
        return data


class Identity(Raw):
    """The path /identity."""

    def forward(self, data: bytes) -> bytes:
        return answer("identity", data)


class Spin10(Raw):
    """The path /spin10."""

    def forward(self, data: bytes) -> bytes:
        return answer("spin10", data)


if __name__ == "__main__":
    server = Server()
    server.register_runtime({f"/{each.__name__.lower()}": [Runtime(each, num=WORKERS)] for each in (Identity, Spin10)})
    server.run()
