"""The compute service put together: forkserver, pool, queue, lanes; in the order of their lives."""

import os
from importlib.metadata import version

import structlog

from common.describe import described
from common.health import Health
from common.lane import MAX_MESSAGE_BYTES, SERVICE
from common.lane_server import Lanes
from common.policy import FirstComeFirstServed
from common.processes import ProcessWatch
from common.recorder import Recorder
from common.rpc import handlers
from common.service import serve as serve_until_stopped
from compute.arena import InputArena
from compute.call import Call
from compute.forkserver import ForkServer
from compute.lane import Door
from compute.metrics import FORKSERVER, ComputeMetrics
from compute.pool import Pool
from compute.queue import Queue
from compute.settings import ComputeSettings
from protos.unlatch_pb2 import Welcome

log = structlog.get_logger()


async def serve(settings: ComputeSettings, notify_socket: str = "") -> None:
    """Run a replica until it is told to stop. Raises StartError or BindError when it cannot start."""
    forkserver = ForkServer(settings.kernels, settings.worker_blas_threads, settings.max_reply_bytes)
    recorder = Recorder()
    with ProcessWatch(reaper=FORKSERVER) as processes:
        processes.watch("front", os.getpid())
        arena = InputArena(settings.input_arena_bytes)
        queue = Queue(FirstComeFirstServed[Call](), settings.max_queued_calls)
        metrics = ComputeMetrics(recorder, processes, queue.__len__)
        metrics.forkserver_runs(forkserver.pid)
        pool = Pool(forkserver, settings.worker_count, arena, metrics, queue.pump)
        queue.feed(pool)
        try:
            await pool.start()
            welcome = Welcome(
                server=settings.name,
                version=version("unlatch"),
                kernels=[described(spec) for spec in pool.kernels.values()],
                window_calls=settings.window_calls,
                window_bytes=settings.window_bytes,
                max_call_bytes=settings.max_call_bytes,
            )
            door = Door(pool.kernels, arena, queue, metrics, settings.max_call_bytes)
            lanes = Lanes(lambda: welcome, door.accept)
            health = Health(SERVICE)
            health.set(serving=True)
            await serve_until_stopped(
                "front",
                settings,
                handlers=[handlers(SERVICE, streams={"Open": lanes.open})],
                reflected=[SERVICE],
                max_message_bytes=MAX_MESSAGE_BYTES,
                health=health,
                recorder=recorder,
                collectors=[metrics, processes],
                drain=lanes.drain,
                notify_socket=notify_socket,
            )
        finally:
            await pool.stop()
            arena.close()
