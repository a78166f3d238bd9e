"""A model in a plain script: chat, then read a text in the background and ask about it.

python apps/embed/script.py [MODEL] < notes.txt
"""

import sys

import mlx_stream


def show(pieces):
    for piece in pieces:
        print(piece.text, end="", flush=True)
    print()


def main():
    model = sys.argv[1] if len(sys.argv) > 1 else "starter"
    with mlx_stream.Engine(model) as engine:
        with engine.session(system="You are brief.", max_tokens=60) as chat:
            show(chat.reply("Why is the sky blue?"))
            print(chat.stats, file=sys.stderr)
        if sys.stdin.isatty():
            return
        with engine.listen(max_tokens=60) as listener:
            for line in sys.stdin:
                listener.feed(line, timeout=60)  # the text is read in the background
            listener.flush()
            show(listener.ask("What was this about?"))
            used, budget = engine.memory
            print(f"{used / 1e6:,.0f} of {budget / 1e6:,.0f} MB", file=sys.stderr)


if __name__ == "__main__":
    try:
        main()
    except mlx_stream.errors.MlxStreamError as error:
        sys.exit(f"script.py: {error}")
