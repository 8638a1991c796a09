"""`@metered`: a function, coroutine, generator or async generator whose every call is metered."""

import functools
import inspect
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from typing import Any, ParamSpec, TypeVar, cast

from tollway.connectors.call import Amounts, Call, Count
from tollway.connectors.errors import Refused
from tollway.connectors.meter import Meter

P = ParamSpec("P")
R = TypeVar("R")


def metered(
    meter: Meter,
    operation: str | None = None,
    *,
    count: Count | None = None,
    surface: str = "agent",
    ask: Amounts | None = None,
    **fields: Any,
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Meter every call of a function; it stays what it is: sync or async, a generator or none.

    operation: by default the function's name. count: the result, or each item that a generator yields → what it used;
    inside, `current_call().add(...)` does the same. A generator's call begins with its first item and ends when it is
    exhausted, raises, or is closed. Raises Refused where the meter has a gate and the function is not async.
    """

    def wrap(function: Callable[P, R]) -> Callable[P, R]:
        name = operation or function.__qualname__.replace(".<locals>", "")

        def observe() -> Call:
            return meter.observe(name, surface=surface, ask=ask, **fields)

        is_async = inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function)
        if meter.gate is not None and not is_async:
            raise Refused(
                f"{name} is not async: a gate is asked by `async def` only; make it so, or meter without a gate"
            )
        return cast(Callable[P, R], functools.wraps(function)(_wrapper(function, observe, count)))

    return wrap


def _wrapper(function: Callable[..., Any], observe: Callable[[], Call], count: Count | None) -> Callable[..., Any]:
    if inspect.isasyncgenfunction(function):

        def async_generator(*args: Any, **kwargs: Any) -> AsyncGenerator[Any, Any]:
            return _async_items(function(*args, **kwargs), observe(), count)

        return async_generator
    if inspect.iscoroutinefunction(function):

        async def coroutine(*args: Any, **kwargs: Any) -> Any:
            async with observe() as call:
                result = await function(*args, **kwargs)
                call.count(count, result)
                return result

        return coroutine
    if inspect.isgeneratorfunction(function):

        def generator(*args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
            return (yield from _items(function(*args, **kwargs), observe(), count))

        return generator

    def plain(*args: Any, **kwargs: Any) -> Any:
        with observe() as call:
            result = function(*args, **kwargs)
            call.count(count, result)
            return result

    return plain


def _items(inner: Generator[Any, Any, Any], call: Call, count: Count | None) -> Generator[Any, Any, Any]:
    """As `yield from inner`, which is the current call only while it runs: between its items the consumer does."""

    def inside(step: Callable[[], Any]) -> Any:
        call.enter()
        try:
            return step()
        finally:
            call.leave()

    call.begin()
    step: Callable[[], Any] = functools.partial(inner.send, None)
    try:
        while True:
            item = inside(step)
            call.count(count, item)
            try:
                step = functools.partial(inner.send, (yield item))
            except GeneratorExit:
                inside(inner.close)
                raise
            except BaseException as error:  # noqa: BLE001 - thrown in: the inner one's business
                step = functools.partial(inner.throw, error)
    except StopIteration as stop:
        call.end(None)
        return stop.value
    except BaseException as error:
        call.end(error)
        raise


async def _async_items(inner: AsyncGenerator[Any, Any], call: Call, count: Count | None) -> AsyncGenerator[Any, Any]:
    """`_items` for an async generator; the gate is asked before its first item."""

    async def inside(step: Callable[[], Awaitable[Any]]) -> Any:
        call.enter()
        try:
            return await step()
        finally:
            call.leave()

    await call.begin_asking()
    step: Callable[[], Awaitable[Any]] = functools.partial(inner.asend, None)
    try:
        while True:
            item = await inside(step)
            call.count(count, item)
            try:
                step = functools.partial(inner.asend, (yield item))
            except GeneratorExit:
                await inside(inner.aclose)
                raise
            except BaseException as error:  # noqa: BLE001 - thrown in: the inner one's business
                step = functools.partial(inner.athrow, error)
    except StopAsyncIteration:
        call.end(None)
    except BaseException as error:
        call.end(error)
        raise
