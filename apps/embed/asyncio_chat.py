"""A model in an asyncio program: each line of input is a question that cancels the previous reply.

python apps/embed/asyncio_chat.py [MODEL]
"""

import asyncio
import contextlib
import signal
import sys

import mlx_stream


async def answer(chat, question):
    try:
        async for piece in chat.areply(question, max_tokens=200):
            print(piece.text, end="", flush=True)
    except mlx_stream.errors.MlxStreamError as error:
        print(error, file=sys.stderr)
    finally:  # cancelled or not
        print()


async def main():
    model = sys.argv[1] if len(sys.argv) > 1 else "starter"
    interactive = sys.stdin.isatty()
    with mlx_stream.Engine(model) as engine, engine.session(system="You are brief.") as chat:
        reply = None
        # A thread waits for input, so that the loop is free for other work.
        while question := await asyncio.to_thread(sys.stdin.readline):
            if reply and not interactive:
                await reply  # from a pipe, every question is answered in full
            elif reply and not reply.done():
                reply.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await reply
            if question.strip():
                reply = asyncio.create_task(answer(chat, question.strip()))
        if reply:
            await reply


if __name__ == "__main__":
    # Ctrl-C ends the process immediately: a thread that waits for the keyboard cannot be woken.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        asyncio.run(main())
    except mlx_stream.errors.MlxStreamError as error:
        sys.exit(f"asyncio_chat.py: {error}")
