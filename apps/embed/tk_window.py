"""A model in a Tk window: Enter asks, Stop ends the reply, and the window never blocks.

python apps/embed/tk_window.py [MODEL]
"""

import queue
import sys
import threading
import tkinter

import mlx_stream


class Window:
    def __init__(self, root, engine):
        self.root, self.chat = root, engine.session(system="You are brief.")
        self.pieces, self.stopping = queue.Queue(), threading.Event()
        self.text = tkinter.Text(root, wrap="word")
        self.entry = tkinter.Entry(root)
        self.status = tkinter.Label(root, text="loading", anchor="w")
        self.text.pack(fill="both", expand=True)
        self.entry.pack(fill="x")
        stop = tkinter.Button(root, text="Stop", command=lambda: self.stopping.set())
        stop.pack(side="right")
        self.status.pack(fill="x")
        self.entry.bind("<Return>", self.ask)
        self.show()

    def ask(self, _event=None):
        question = self.entry.get().strip()
        if question:
            self.entry.delete(0, "end")
            self.text.insert("end", f"\n> {question}\n")
            self.stopping.set()  # ends any reply in progress
            self.stopping = threading.Event()
            threading.Thread(target=self.read, args=(question, self.stopping), daemon=True).start()

    def read(self, question, stopping):  # runs on its own thread, which waits for pieces
        try:
            for piece in self.chat.reply(question):
                self.pieces.put(piece.text)
                if stopping.is_set():
                    break
        except mlx_stream.errors.MlxStreamError as error:
            self.pieces.put(f"[{error}]")

    def show(self):  # runs on Tk's thread, sixty times a second
        while not self.pieces.empty():
            self.text.insert("end", self.pieces.get())
            self.text.see("end")
            self.status.config(text=str(self.chat.stats))
        self.root.after(16, self.show)


if __name__ == "__main__":
    with mlx_stream.Engine(sys.argv[1] if len(sys.argv) > 1 else "starter") as engine:
        root = tkinter.Tk()
        Window(root, engine)
        root.mainloop()
