"""The client against a supervisor's pipe and an engine's sockets that the test itself holds."""

import asyncio
import multiprocessing
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import msgspec
import pytest
import pytest_asyncio
import zmq
from fake_server import model_info

from ropeway.kernels.sampling_params import SamplingParams
from ropeway.scheduler.client import EngineClient, EngineFailed, NotReady, Quarantined
from ropeway.scheduler.messages import (
    AbortRequest,
    AddRequest,
    ChoiceStart,
    Drain,
    EngineLost,
    EngineReady,
    EngineStarting,
    Heartbeat,
    RowOutput,
    StepOutputs,
    ToEngine,
)
from ropeway.scheduler.processes import WorkerContext, send_control, socket_address

WORKER = 4
GREEDY = SamplingParams(temperature=0)


class FakeEngine:
    """One generation's end of the sockets."""

    def __init__(self, context: "zmq.Context[Any]", directory: str, generation: int) -> None:
        self.generation = generation
        self.pull, self.push = context.socket(zmq.PULL), context.socket(zmq.PUSH)
        self.pull.bind(socket_address(directory, generation, WORKER, "in"))
        self.push.connect(socket_address(directory, generation, WORKER, "out"))

    def ready(self, **changes: Any) -> None:
        self.send(EngineReady(self.generation, model_info(**changes)))

    def step(self, *rows: RowOutput, generation: int | None = None) -> None:
        self.send(StepOutputs(generation or self.generation, list(rows)))

    def send(self, message: object) -> None:
        self.push.send(msgspec.msgpack.encode(message))

    async def receive(self) -> AddRequest | AbortRequest:
        """The next message of the worker."""
        for _ in range(1000):
            if self.pull.poll(0):
                return msgspec.msgpack.decode(self.pull.recv(), type=ToEngine)
            await asyncio.sleep(0.01)
        raise AssertionError("the worker sent nothing")

    def die(self) -> None:
        self.pull.close(linger=0)
        self.push.close(linger=100)


class World:
    """What is around the client."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self.control, self.workers_control = multiprocessing.Pipe()
        self.context: zmq.Context[Any] = zmq.Context()
        self.engines: list[FakeEngine] = []

    async def start_engine(self, **changes: Any) -> FakeEngine:
        """The next generation, told by the supervisor, ready at once."""
        engine = FakeEngine(self.context, self.directory, len(self.engines) + 1)
        self.engines.append(engine)
        self.tell(EngineStarting(engine.generation))
        engine.ready(**changes)
        return engine

    def tell(self, message: Any) -> None:
        assert send_control(self.control, message)

    def close(self) -> None:
        for engine in self.engines:
            engine.die()
        self.context.term()
        self.control.close()


@pytest.fixture
def world() -> Iterator[World]:
    with tempfile.TemporaryDirectory(prefix="rw") as directory:
        made = World(directory)
        yield made
        made.close()


@pytest_asyncio.fixture
async def client(world: World) -> AsyncIterator[EngineClient]:
    with socket.socket() as listener:
        made = EngineClient(WorkerContext(WORKER, listener, world.directory, world.workers_control, None))
        await made.start()
        yield made
        await made.close()


async def until(fact: Any) -> None:
    """Lets the loop run until the fact is true."""
    for _ in range(1000):
        if fact():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("waited in vain")


async def test_a_request_and_its_tokens(world: World, client: EngineClient) -> None:
    """Guards the ordinary way: what is sent is what was asked, what comes out ends by itself."""
    engine = await world.start_engine(vocab_size=99)
    assert (await client.wait_ready()).vocab_size == 99
    stream = client.submit([1, 2], GREEDY, 5, 2, key_id="k", cache_salt="s", priority=3, deadline=1e12)
    request = await engine.receive()
    assert isinstance(request, AddRequest)
    assert (request.generation, request.prompt_ids, request.sampling, request.max_tokens) == (1, [1, 2], GREEDY, 5)
    assert request.choices == [ChoiceStart(0), ChoiceStart(1)]
    assert (request.key_id, request.cache_salt, request.priority, request.deadline) == ("k", "s", 3, 1e12)
    assert request.request_id >> 40 == WORKER
    ends = [RowOutput(stream.request_id, index, [7 + index], finish_reason="stop") for index in range(2)]
    engine.step(*ends)
    assert [output async for output in stream] == [ends]
    stream.abort()  # after the end it means nothing
    assert client.submit([1], GREEDY, 1).request_id != stream.request_id
    assert isinstance(await engine.receive(), AddRequest)


async def test_a_slow_reader_holds_its_own_tokens_only(world: World, client: EngineClient) -> None:
    """Guards memory: a thousand steps become one output per choice, nothing lost, nothing doubled."""
    engine = await world.start_engine()
    await client.wait_ready()
    stream = client.submit([1], GREEDY, 2000, 2)
    for step in range(1000):
        first = RowOutput(stream.request_id, 0, [step], cached_tokens=16 if step == 0 else None)
        second = RowOutput(stream.request_id, 1, [-step], finish_reason="length" if step == 999 else None)
        engine.step(first, second)
    last = client.submit([1], GREEDY, 1)
    engine.step(RowOutput(last.request_id, 0, [3], finish_reason="stop"))
    assert [len(outputs) async for outputs in last] == [1]
    outputs = await anext(stream)
    assert [(output.choice, len(output.token_ids)) for output in outputs] == [(0, 1000), (1, 1000)]
    assert outputs[0].token_ids == list(range(1000))
    assert (outputs[0].cached_tokens, outputs[0].finish_reason, outputs[1].finish_reason) == (16, None, "length")


async def test_aborts(world: World, client: EngineClient) -> None:
    """Guards rows nobody reads: one message per abort, and what crossed it is dropped."""
    engine = await world.start_engine()
    await client.wait_ready()
    stream = client.submit([1], GREEDY, 9, 3)
    await engine.receive()
    stream.abort(1)
    stream.abort(1)
    assert await engine.receive() == AbortRequest(1, stream.request_id, 1)
    engine.step(*(RowOutput(stream.request_id, index, [index]) for index in range(3)))
    assert [output.choice for output in await anext(stream)] == [0, 2]
    stream.abort()
    stream.abort()
    assert await engine.receive() == AbortRequest(1, stream.request_id)
    assert [outputs async for outputs in stream] == []
    assert not engine.pull.poll(50)


async def test_the_last_open_choice_aborted_ends_the_request(world: World, client: EngineClient) -> None:
    """Guards the client's own table: a stream whose choices all ended or were aborted is forgotten everywhere."""
    engine = await world.start_engine()
    await client.wait_ready()
    stream = client.submit([1], GREEDY, 9, 2)
    await engine.receive()
    engine.step(RowOutput(stream.request_id, 0, [5], finish_reason="stop"))
    assert len(await anext(stream)) == 1
    stream.abort(1)
    assert await engine.receive() == AbortRequest(1, stream.request_id)
    world.tell(EngineStarting(2))
    await until(lambda: client.status.reason == "engine_restarting")
    assert stream.deaths == 0


async def test_streams_go_on_with_the_next_engine(world: World, client: EngineClient) -> None:
    """Guards resumed streams: what was emitted, what lay in the socket, finished and aborted choices, usage."""
    first = await world.start_engine()
    await client.wait_ready()
    stream = client.submit([1, 2], GREEDY, 9, 3)
    await first.receive()
    first.step(*(RowOutput(stream.request_id, index, [10 + index], cached_tokens=0) for index in range(3)))
    await anext(stream)
    stream.abort(2)
    first.step(RowOutput(stream.request_id, 1, [21], finish_reason="stop"))
    assert client._pull and client._pull.poll(10_000)  # it lies there, unread, when the death is heard
    second = await world.start_engine()
    client._hear_supervisor()
    request = await second.receive()
    assert isinstance(request, AddRequest)
    assert (request.generation, request.request_id, request.prompt_ids) == (2, stream.request_id, [1, 2])
    assert request.choices == [ChoiceStart(0, [10])]
    second.step(RowOutput(stream.request_id, 0, [99]), generation=1)  # a dead engine's token
    second.step(RowOutput(stream.request_id, 0, [20], cached_tokens=2, finish_reason="length"))
    assert await anext(stream) == [RowOutput(stream.request_id, 1, [21], finish_reason="stop")]
    assert [outputs async for outputs in stream] == [
        [RowOutput(stream.request_id, 0, [20], finish_reason="length")]  # cached_tokens were told before
    ]


async def test_two_deaths_are_quarantine(world: World, client: EngineClient) -> None:
    """Guards against poison, and the neighbours: only who was in two living engines is given up."""
    await world.start_engine()
    await client.wait_ready()
    old = client.submit([1], GREEDY, 9)
    await world.start_engine()
    await until(lambda: client.status.ready and client.status.generation == 2)
    young = client.submit([2], GREEDY, 9)
    world.engines.append(FakeEngine(world.context, world.directory, 3))
    world.tell(EngineStarting(3))  # dies while loading: no request was there
    with pytest.raises(Quarantined, match="died twice"):
        await anext(old)
    fourth = await world.start_engine()
    request = await fourth.receive()
    assert (request.request_id, young.deaths) == (young.request_id, 1)


async def test_who_came_after_the_death_is_not_charged(world: World, client: EngineClient) -> None:
    """Guards requests that meet a dead engine before the news of its death: they were not with it."""
    await world.start_engine()
    await client.wait_ready()
    present = client.submit([1], GREEDY, 9)
    died = time.monotonic()
    late = client.submit([2], GREEDY, 9)
    second = FakeEngine(world.context, world.directory, 2)
    world.engines.append(second)
    world.tell(EngineStarting(2, died))
    second.ready()
    requests = [await second.receive(), await second.receive()]
    assert {request.request_id for request in requests} == {present.request_id, late.request_id}
    assert (present.deaths, late.deaths) == (1, 0)


async def test_what_is_refused_and_why(world: World, client: EngineClient) -> None:
    """Guards the codes that become 503s: loading, restarting, lost; and streams end when all is lost."""
    assert (client.status.reason, client.info) == ("loading", None)
    with pytest.raises(NotReady) as loading:
        client.submit([1], GREEDY, 1)
    await world.start_engine()
    await client.wait_ready()
    stream = client.submit([1], GREEDY, 1)
    world.tell(EngineStarting(2))
    await until(lambda: not client.status.ready)
    with pytest.raises(NotReady) as restarting:
        client.submit([1], GREEDY, 1)
    waiting = asyncio.ensure_future(client.wait_ready())
    world.tell(EngineLost("It is over."))
    with pytest.raises(EngineFailed, match="It is over"):
        await waiting
    with pytest.raises(EngineFailed):
        await anext(stream)
    with pytest.raises(NotReady) as lost:
        client.submit([1], GREEDY, 1)
    assert [caught.value.code for caught in (loading, restarting, lost)] == [
        "loading",
        "engine_restarting",
        "engine_failed",
    ]
    assert (client.status.phase, client.status.reason) == ("dead", "engine_failed")


async def test_status_follows_the_heartbeats(world: World, client: EngineClient) -> None:
    """Guards readiness: it needs this generation's ready and its heartbeats, and ends without them."""
    engine = await world.start_engine(step_timeout=4.0)
    await client.wait_ready()
    world.tell(Heartbeat(1, "stepping", "ready", 1.0, 5, 2, 3, 0.5))
    world.tell(Heartbeat(2, "loading"))  # of no known engine
    await until(lambda: client.status.running == 2)
    status = client.status
    assert (status.ready, status.phase, status.waiting, status.kv_usage) == (True, "stepping", 3, 0.5)
    begin = time.monotonic()
    await until(lambda: client.status.reason == "engine_stalled")
    assert time.monotonic() - begin > 0.5

    def alive_again() -> bool:
        world.tell(Heartbeat(1, "stepping"))
        return client.status.ready

    await until(alive_again)
    assert engine.generation == client.status.generation


async def test_drain(world: World, client: EngineClient) -> None:
    """Guards shutdown: unready at once, streams go on, new ones are the server's decision."""
    engine = await world.start_engine()
    await client.wait_ready()
    stream = client.submit([1], GREEDY, 1)
    deadline = time.monotonic() + 5
    world.tell(Drain(deadline))
    assert await client.wait_drain() == deadline
    assert (client.status.ready, client.status.reason, client.status.draining) == (False, "draining", True)
    engine.step(RowOutput(stream.request_id, 0, [1], finish_reason="stop"))
    assert [len(outputs) async for outputs in stream] == [1]
    client.submit([1], GREEDY, 1)


async def test_without_a_supervisor_all_ends(world: World, client: EngineClient) -> None:
    """Guards systems without a parent-death signal: a closed pipe ends the streams and asks the worker to exit."""
    await world.start_engine()
    await client.wait_ready()
    stream = client.submit([1], GREEDY, 1)
    world.control.close()
    assert await client.wait_drain() <= time.monotonic()
    with pytest.raises(EngineFailed):
        await anext(stream)


async def test_closing_ends_streams_and_sockets(world: World, client: EngineClient) -> None:
    """Guards the worker's exit: nobody waits for ever, and closing twice is fine."""
    await world.start_engine()
    await client.wait_ready()
    stream = client.submit([1], GREEDY, 1)
    await client.close()
    await client.close()
    with pytest.raises(EngineFailed):
        await anext(stream)
    stream.abort()


async def test_a_closed_client_takes_nothing(world: World, client: EngineClient) -> None:
    """Guards the last requests before a worker's exit: they were asserted away, and their streams never ended."""
    await world.start_engine()
    await client.wait_ready()
    await client.close()
    with pytest.raises(NotReady) as closed:
        client.submit([1], GREEDY, 1)
    assert (closed.value.code, client.status.reason, client._streams) == ("draining", "draining", {})


@pytest.mark.parametrize("engine_is", ["hung", "dead"])
async def test_deadlines_are_kept_without_an_engine(world: World, client: EngineClient, engine_is: str) -> None:
    """Guards clients that wait for a request whose engine hangs or is being restarted, far beyond their deadline."""
    engine = await world.start_engine()
    await client.wait_ready()
    stream = client.submit([1], GREEDY, 9, 2, deadline=time.monotonic() + 0.1)
    other = client.submit([1], GREEDY, 9)
    await engine.receive()
    await engine.receive()
    engine.step(RowOutput(stream.request_id, 0, [5, 6]), RowOutput(stream.request_id, 1, [7], finish_reason="stop"))
    await anext(stream)
    if engine_is == "dead":
        world.tell(EngineStarting(2))
    (end,) = await anext(stream)
    assert (end.choice, end.finish_reason, end.token_ids) == (0, "timeout", [])
    assert end.error == "The request's deadline passed after 2 tokens."
    assert [outputs async for outputs in stream] == []
    assert list(client._streams) == [other.request_id], "it is not sent to the next engine"
    if engine_is == "hung":
        assert await engine.receive() == AbortRequest(1, stream.request_id)
